"""What generation prepares: the function of the layers as they are, of whatever kind, and whenever they change."""

import copy
import pickle
import weakref
from contextlib import nullcontext
from threading import Thread

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.adapters.adapter import extract_adapter
from minilora.adapters.dora import DoRALinear
from minilora.adapters.inject import (
    adapter_parameters,
    apply_lora,
    lora_layers,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from minilora.config import LoRAConfig
from minilora.experiments.bench import one_token
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import generate, stream
from minilora.inference.prepared import LYING, MANY, Prepared, SharedInput
from minilora.inference.rollouts import sample
from minilora.inference.serve import Request, serve
from minilora.linear4bit import quantize_model
from minilora.model import GPT, GPTConfig
from minilora.quant import Quantization

BARS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2}  # of the largest logit
FIRST = "model.layers.0.self_attn.v_proj"


def make(dtype=torch.float32, in_4_bits=False, bias=False, plain=False, start=False, **lora) -> GPT:
    """With random weights and biases, and a random adapter on all linears unless it is to be plain."""
    torch.manual_seed(0)
    shape = dict(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, max_position_embeddings=2 * MANY, attention_bias=bias, mlp_bias=bias)
    model = GPT(GPTConfig(**shape)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    if in_4_bits:
        quantize_model(model, Quantization(block_size=16))
    if not plain:
        settings = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **lora}
        apply_lora(model, LoRAConfig(**settings, init_lora_weights="pissa" if start else True))
        for parameter in adapter_parameters(model):
            nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False).eval()


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(24, (rows, tokens), generator=torch.Generator().manual_seed(rows + tokens))


@torch.no_grad()
def assert_same(model: GPT, prepared: Prepared, ids: Tensor, what: str):
    """The logits of one pass with the prepared forms are those without."""
    expected = model(ids)
    with prepared:
        found = model(ids)
    off, size = (found - expected).abs().max().item(), expected.abs().max().item()
    allowed = BARS[expected.dtype] * size
    assert found.dtype == expected.dtype, f"{what}: logits of {found.dtype}, expected {expected.dtype}"
    assert off <= allowed, f"{what}: logits off by {off:.1e} of {size:.1e}, where {allowed:.1e} is allowed"


KINDS = {
    "plain": dict(plain=True),
    "LoRA": {},
    "LoRA on q and up alone": dict(target_modules=["q_proj", "up_proj"]),
    "ranks that differ": dict(rank_pattern={"k_proj": 1, "gate_proj": 7}),
    "rsLoRA with biases": dict(use_rslora=True, bias_of_base=True),
    "PiSSA": dict(start=True),
    "DoRA": dict(use_dora=True),
    "DoRA with biases": dict(use_dora=True, bias_of_base=True),
    "QLoRA": dict(in_4_bits=True),
    "4 bits, plain": dict(in_4_bits=True, plain=True),
    "DoRA in 4 bits with biases": dict(in_4_bits=True, use_dora=True, bias_of_base=True),
}


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_the_layers_themselves(kind, dtype):
    settings = dict(KINDS[kind])
    model = make(dtype, bias=settings.pop("bias_of_base", False), **settings)
    prepared = Prepared(model)
    for rows, tokens in ((1, 1), (2, 1), (1, 3), (LYING // 2, 2), (LYING + 1, 1), (1, MANY), (1, MANY + 1), (4, 40)):
        assert_same(model, prepared, ids_of(rows, tokens), f"{kind}, {rows} x {tokens} tokens")


def off(model):
    for _, layer in lora_layers(model):
        layer.enabled = False


def changed_in_place(factor):
    def change(model):
        getattr(model.get_submodule(FIRST), factor).add_(1.0)

    return change


def replaced(model):
    model.get_submodule(FIRST).lora_B = nn.Parameter(torch.ones(8, 3), requires_grad=False)


def retrained(model):
    """As an optimizer does: through .data of a parameter that counts as trainable, in place."""
    layer = model.get_submodule(FIRST)
    layer.lora_A.requires_grad_(True)
    torch.optim.SGD([layer.lora_A], 1.0).zero_grad()
    layer.lora_A.grad = torch.ones_like(layer.lora_A)
    torch.optim.SGD([layer.lora_A], 1.0).step()


def other_numbers(model):
    """As `vector_to_parameters` does."""
    factor = model.get_submodule(FIRST).lora_A
    factor.data = factor.data + 1


def other_base(model):
    model.get_submodule(FIRST).base_layer = nn.Linear(16, 8, bias=False)


class Twice(nn.Module):
    def forward(self, W):
        return 2 * W


def replaced_forward(name):
    def change(model):
        layer = model.get_submodule(name)
        forward = layer.forward
        layer.forward = lambda x: 2 * forward(x)

    return change


def hooked(name, before=None, after=None):
    """before: of a layer's x, after: of its y."""

    def change(model):
        layer = model.get_submodule(name)
        if before is not None:
            layer.register_forward_pre_hook(lambda _, inputs: (before(*inputs),))
        if after is not None:
            layer.register_forward_hook(lambda _, inputs, y: after(y))

    return change


CHANGES = {
    "switched off": off,
    "merged": merge_lora,
    "merged and switched off": lambda model: (merge_lora(model), off(model)),
    "merged and back": lambda model: (merge_lora(model), unmerge_lora(model)),
    "removed": remove_lora,
    "A in place": changed_in_place("lora_A"),
    "B in place": changed_in_place("lora_B"),
    "m in place": changed_in_place("lora_magnitude_vector"),
    "the start of A in place": changed_in_place("start_A"),
    "B another parameter": replaced,
    "A with other numbers": other_numbers,
    "a step of an optimizer": retrained,
    "scaling": lambda model: setattr(model.get_submodule(FIRST), "scaling", 9.0),
    "W in place": lambda model: model.get_submodule(FIRST).base_layer.weight.add_(0.1),
    "another base layer": other_base,
    "quantized": lambda model: quantize_model(model, Quantization(block_size=16)),
    "rounded to bfloat16 and back": lambda model: model.bfloat16().float(),
    "cast to float64": lambda model: model.double(),
    "W parametrized": lambda model: register_parametrization(model.get_submodule(FIRST).base_layer, "weight", Twice()),
    "forward replaced": replaced_forward(FIRST),
    "the base layer's forward replaced": replaced_forward(FIRST + ".base_layer"),
    "a hook on the base layer": hooked(FIRST + ".base_layer", after=lambda y: 2 * y),
    "a hook before the base layer": hooked(FIRST + ".base_layer", before=lambda x: 2 * x),
    "a hook on the layer": hooked(FIRST, after=lambda y: y.mul_(2)),
    "a hook that makes another x": hooked(FIRST, before=lambda x: 2 * x),
    "a hook that changes x for the next layer too": hooked(
        FIRST.replace("v_proj", "k_proj"), before=lambda x: x.mul_(2)
    ),
}


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "PiSSA"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_between_two_passes_counts(change, kind):
    if change == "m in place" and kind != "DoRA":
        pytest.skip("only DoRA has a magnitude")
    if change == "the start of A in place" and kind != "PiSSA":
        pytest.skip("only PiSSA has a start")
    model, ids = make(**KINDS[kind]), ids_of(2, 1)
    prepared = Prepared(model)
    assert_same(model, prepared, ids, "before")
    before = model(ids)
    CHANGES[change](model)
    here = {name for name, module in model.named_modules() if "forward" in vars(module)}
    same = torch.equal(model(ids).float(), before)
    unchanged = change == "merged and back"
    assert same == unchanged or change == "merged", f"{change}: does the model change? {not same}"
    assert_same(model, prepared, ids, change)
    left = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert left == here, f"{change}: forwards of {left} are replaced after the pass, of {here} before"


@torch.no_grad()
def test_no_parameter_can_take_the_place_of_one_that_is_gone():
    """Its address is its name until the next pass has looked, and then it is free."""
    model, ids = make(), ids_of(2, 1)
    prepared, layer = Prepared(model), model.get_submodule(FIRST)
    gone = weakref.ref(layer.lora_A)
    layer.lora_A = None
    assert gone() is not None, "another parameter could have its address and pass for it"
    layer.lora_A = nn.Parameter(torch.ones(3, 16), requires_grad=False)
    assert_same(model, prepared, ids, "A another parameter")
    assert gone() is None, "what is gone is kept for good"


def test_afterwards_the_layers_are_their_own_again_also_after_an_error():
    model = make()
    prepared = Prepared(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for error in (None, ValueError("stop")):
        with pytest.raises(ValueError, match="stop") if error else nullcontext(), torch.no_grad(), prepared:
            model(ids_of(1, 1))
            assert any("forward" in vars(module) for module in model.modules()), "nothing was prepared"
            if error:
                raise error
        for name, module in model.named_modules():
            assert vars(module).keys() == before[name].keys(), (
                f"{name} keeps {vars(module).keys() - before[name].keys()}"
            )
        held = [shared for shared in prepared.inputs if shared.x is not None or shared.h or shared.rows.numel()]
        assert not held, f"{len(held)} inputs are still held"


def test_between_two_tokens_of_a_stream_the_model_can_be_trained():
    model = make()
    tokens = stream(model, [1, 2, 3], max_new_tokens=6)
    next(tokens)
    parameters = adapter_parameters(model)
    for parameter in parameters:
        parameter.requires_grad_(True)
    model(ids_of(1, 2)).sum().backward()
    without = [parameter for parameter in parameters if parameter.grad is None]
    assert not without, f"{len(without)} of {len(parameters)} parameters got no gradient"


def test_two_streams_of_one_model_do_not_disturb_each_other():
    model, prompts = make(), ([1, 2, 3], [7, 5])
    alone = [list(stream(model, prompt, max_new_tokens=12)) for prompt in prompts]
    streams = [stream(model, prompt, max_new_tokens=12) for prompt in prompts]
    in_turn = list(zip(*streams, strict=True))
    assert [list(each) for each in zip(*in_turn, strict=True)] == alone


def test_two_threads_generate_with_one_model_and_do_not_disturb_each_other(monkeypatch):
    """The second generates in the middle of a pass of the first, between reading x and the product with W."""
    model, (first, second), found = make(), ([1, 2, 3], [7, 5]), []
    expected = [generate(model, [prompt], 12) for prompt in (first, second)]
    other, read = Thread(target=lambda: found.append(generate(model, [second], 12))), SharedInput.read

    def read_and_start_the_other(shared, x):
        read(shared, x)
        if other.ident is None:
            other.start()
            other.join()

    monkeypatch.setattr(SharedInput, "read", read_and_start_the_other)
    found.append(generate(model, [first], 12))
    assert found == expected[::-1], f"the second and the first say {found}, alone {expected[::-1]}"


@torch.no_grad()
def test_a_form_that_somebody_kept_from_a_pass_is_the_layer_s_own_afterwards():
    model, x = make(), torch.randn(1, 1, 16)
    layer = model.get_submodule(FIRST)
    with Prepared(model):
        model(ids_of(1, 1))
        form = layer.forward
    layer.lora_A.add_(1)
    off = (form(x) - layer(x)).abs().max().item()
    assert off < 1e-6, f"the kept form is off by {off:.1e}"


@torch.no_grad()
def test_an_interrupt_while_the_forms_are_put_in_place_leaves_none():
    class Interrupted(dict):
        def items(self):
            for number, item in enumerate(super().items()):
                if number == 3 and self.pop("again", True):
                    raise KeyboardInterrupt
                yield item

    model = make()
    prepared = Prepared(model)
    prepared.forwards = Interrupted(prepared.forwards)
    with pytest.raises(KeyboardInterrupt), prepared:
        pytest.fail("the pass began")
    left = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert not left, f"{len(left)} layers keep the form, {left[:1]} the first"


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@torch.no_grad()
def test_a_copy_made_during_a_pass_has_adapters_of_its_own(duplicate):
    model, ids = make(), ids_of(2, 1)
    with Prepared(model):
        model(ids)
        copied = duplicate(model)
        for each in (model, copied):
            each.get_submodule(FIRST).lora_A.add_(1)
        found = copied(ids)
    off = (found - model(ids)).abs().max().item()
    assert off < 1e-5, f"the logits of the copy, changed alike, are off by {off:.1e}"


def test_a_model_made_in_inference_mode_generates():
    """Its tensors do not count their changes."""
    prompts, expected = [[1, 2, 3], [4]], generate(make(), [[1, 2, 3], [4]], 8)
    with torch.inference_mode():
        model = make()
        assert generate(model, prompts, 8) == expected
        prepared, ids = Prepared(model), ids_of(2, 1)
        model.get_submodule(FIRST).lora_A.add_(1)
        assert_same(model, prepared, ids, "A in place, in inference mode")
    assert generate(make(), prompts, 8) == expected


@torch.no_grad()
def test_layers_by_themselves_take_an_x_of_no_rows():
    layers = nn.ModuleDict({"q_proj": DoRALinear(nn.Linear(6, 4), 2, 4), "o_proj": nn.Linear(6, 4)})
    with Prepared(layers):
        shapes = [tuple(layer(torch.zeros(0, 1, 6)).shape) for layer in layers.values()]
    assert shapes == [(0, 1, 4)] * 2, shapes


@pytest.mark.parametrize("dtype", BARS, ids=str)
@torch.no_grad()
def test_a_layer_in_4_bits_takes_an_x_of_any_dtype(dtype):
    model = make(in_4_bits=True)  # of float32
    layer, x = model.get_submodule(FIRST), torch.randn(2, 1, 16).to(dtype)
    expected = layer(x)
    with Prepared(model):
        found = layer(x)
    assert found.dtype == expected.dtype == dtype, f"{found.dtype}, expected {expected.dtype}"
    off = (found - expected).abs().max().item()
    assert off <= 1e-5, f"x of {dtype}: off by {off:.1e}"


def test_a_layer_that_somebody_listens_to_or_has_replaced_stays_as_it_is():
    model, heard = make(), []
    layers = model.model.layers[0].self_attn
    layers.q_proj.base_layer.register_forward_hook(lambda *_: heard.append("q"))
    forward = layers.k_proj.forward
    layers.k_proj.forward = lambda x: heard.append("k") or forward(x)
    with torch.no_grad(), Prepared(model):
        model(ids_of(1, 1))
    assert heard == ["q", "k"], f"heard of {heard}, expected of q and k, once each"
    assert "forward" in vars(layers.k_proj), "the replaced forward is gone"


def test_under_autocast_nothing_is_prepared():
    model = make()
    prepared, ids = Prepared(model), ids_of(1, 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)
        with prepared:
            assert torch.equal(model(ids), expected), "under autocast the numbers changed"


class Products(TorchDispatchMode):
    """Counts the matrix products that are run inside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "expected"), [("plain", 7 * 2 + 1), ("LoRA", (4 + 7 + 7) * 2 + 1)])
def test_layers_that_read_one_x_share_a_product(kind, expected):
    """For each layer W x, with an adapter B h as well; A x once for q, k and v, for gate and up, for o and for down."""
    model = make(**KINDS[kind])
    with torch.no_grad(), Prepared(model), Products() as products:
        model(ids_of(1, 1))
    assert products.count == expected, f"{products.count} products, {expected} expected"


def test_dora_s_norms_are_computed_before_and_not_in_a_pass(monkeypatch):
    model = make(use_dora=True)
    prepared = Prepared(model)
    monkeypatch.setattr(DoRALinear, "norms", lambda self: pytest.fail("norms are computed for a token"))
    with torch.no_grad(), prepared:
        model(ids_of(1, 1))


WAYS = {
    "generate": lambda model: generate(model, [[1, 2], [3]], 4),
    "stream": lambda model: list(stream(model, [1, 2], 4)),
    "sample": lambda model: sample(model, [[1, 2], [3]], 4, 1.0, 24, (), seed=0, precision="float32"),
    "serve": lambda model: list(serve(AdapterBank(model), [Request([1, 2], None, 4)])),
    "the bench's token": lambda model: torch.no_grad()(one_token(model, ids_of(1, 3)))(),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_generates_does_so_prepared(way):
    model, prepared = make(plain=True), []
    inner = model.model.layers[1].mlp
    inner.register_forward_hook(lambda *_: prepared.append("forward" in vars(inner.down_proj)))
    with torch.no_grad():
        WAYS[way](model)
    assert prepared[-1], f"the last of {len(prepared)} passes of {way} is that of the plain layers"


@torch.no_grad()
def test_the_bench_s_token_is_always_the_same():
    model, lengths = make(plain=True), []
    model.model.register_forward_pre_hook(lambda _, inputs: lengths.append(len(inputs[1])))
    decode = one_token(model, ids_of(2, 5))
    for _ in range(3):
        decode()
    assert lengths == [0, 5, 5, 5], f"the passes had {lengths} tokens in the cache"


class Loud(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_a_layer_of_a_kind_of_its_own_keeps_its_forward():
    model = make()
    for place in (FIRST + ".base_layer", "lm_head"):
        loud, linear = model.get_submodule(place), Loud(1, 1, bias=False)
        linear.weight, linear.bias = loud.weight, loud.bias
        model.set_submodule(place, linear)
    assert_same(model, Prepared(model), ids_of(2, 1), "layers of a subclass")


def test_what_is_prepared_has_no_gradient_graph():
    prepared = Prepared(make().requires_grad_(True))
    graphs = [shared.A for shared in prepared.inputs if shared.A is not None and shared.A.grad_fn is not None]
    assert not graphs, f"{len(graphs)} of the A's of {len(prepared.inputs)} inputs keep a graph"


def test_in_a_bank_the_base_layers_are_prepared():
    bank = AdapterBank(make(plain=True), {"one": extract_adapter(make())})
    prepared, ids = Prepared(bank.model), ids_of(2, 1)
    with bank.rows(["one", None]):
        assert_same(bank.model, prepared, ids, "a bank")
        with torch.no_grad(), prepared:
            layer = bank.model.get_submodule(FIRST)
            assert "forward" in vars(layer.base_layer) and "forward" not in vars(layer)
