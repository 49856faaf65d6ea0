"""The fast layer: the plain layer's function and gradients, for less. A and B are random.

The plain class is the reference here; `test_lora.py` holds it to the formula.
"""

import copy
import math

import pytest
import torch
from test_lora import FEW, IN, MANY, OUT, OtherLinear, R, both, gradients, make_layer, with_and_without_start
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from minilora import fast
from minilora.fast import AddedInPlace, FastLoRALinear, FormedWeight, LowRankTerm, dropout_mask
from minilora.linear4bit import Linear4bit
from minilora.lora import LoRALinear
from minilora.quant import quantize


def assert_derivatives(function, step=1e-6, bar=1e-7, **inputs):
    """Every derivative that backward gives is that of central differences, one element of an input at a time."""
    wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
    output = function(**inputs)
    weights = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((output * weights).sum(), list(wanted.values()))
    for (name, tensor), gradient in zip(wanted.items(), got, strict=True):
        expected, flat = [], tensor.detach().view(-1)  # shares the tensor's numbers
        with torch.no_grad():
            for place in range(len(flat)):
                value, sums = flat[place].item(), []
                for moved in (value + step, value - step):
                    flat[place] = moved
                    sums.append((function(**inputs) * weights).sum().item())
                flat[place] = value
                expected.append((sums[0] - sums[1]) / (2 * step))
        expected = torch.tensor(expected, dtype=gradient.dtype).view_as(gradient)
        off, size = (gradient - expected).abs().max().item(), expected.abs().max().item()
        assert off <= bar * max(size, 1), (
            f"gradient of {name} by backward and by differences: off by {off:.1e} where the largest is {size:.1e}"
        )


def form_of(output):
    """The autograd function that made the output."""
    return type(output.grad_fn).__name__.removesuffix("Backward")


# The three forms against finite differences


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_derivatives_of_the_formed_weight(bias, needs_input_gradient):
    layer = make_layer(bias=bias)
    base, x = layer.base_layer, torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=needs_input_gradient)
    assert_derivatives(
        lambda x, A, B: FormedWeight.apply(x, base.weight, base.bias, A, B, 1.5), x=x, A=layer.lora_A, B=layer.lora_B
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["A trained", "A frozen"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_derivatives_of_the_low_rank_term(masked, needs_input_gradient, frozen):
    layer = make_layer()
    layer.lora_A.requires_grad_(not frozen)
    x = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=needs_input_gradient)
    base = torch.randn(3, 4, OUT, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4, IN) > 0.3 if masked else None
    assert_derivatives(
        lambda base, x, A, B: LowRankTerm.apply(base, x, A, B, 1.5, mask),
        base=base,
        x=x,
        A=layer.lora_A,
        B=layer.lora_B,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input_gradient", [True, False])
@pytest.mark.parametrize("tokens_in_a_piece", [1, 5, 12], ids=str)
def test_derivatives_of_what_is_added_in_place(bias, needs_input_gradient, tokens_in_a_piece, monkeypatch):
    monkeypatch.setattr(fast, "PIECE", tokens_in_a_piece * IN)
    layer = make_layer(bias=bias)
    base, x = layer.base_layer, torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=needs_input_gradient)
    mask = torch.rand(3, 4, IN) > 0.3
    assert_derivatives(
        lambda x, A, B: AddedInPlace.apply(x, base.weight, base.bias, A, B, 1.5, mask),
        x=x,
        A=layer.lora_A,
        B=layer.lora_B,
    )


# The fast layer against the plain one


def unfreeze(layer):
    layer.base_layer.requires_grad_(True)


def freeze_A(layer):
    layer.lora_A.requires_grad_(False)


def other_base(layer):
    layer.base_layer = OtherLinear(layer.base_layer)


def in_4_bits(layer):
    base = layer.base_layer
    layer.base_layer = Linear4bit.from_linear(base, quantize(base.weight.detach(), "nf4", 32, True))


def wider_base(layer):
    layer.base_layer.double()


def hook_on_base(layer):
    layer.base_layer.register_forward_hook(lambda base, inputs, y: 2 * y)


def hook_before_base(layer):
    layer.base_layer.register_forward_pre_hook(lambda base, inputs: (2 * inputs[0],))


def hook_on_base_s_gradient(layer):
    layer.base_layer.register_full_backward_hook(lambda base, gx, gy: (2 * gx[0],) if gx[0] is not None else None)


def other_forward_of_base(layer):
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * forward(x)


def half_adapter(layer):
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.bfloat16(), layer.lora_B.data.bfloat16()
    layer.base_layer.bfloat16()


# By name: options of make_layer, the input's dtype if not the layer's, what is done to the layer, how it is run.
CASES = {
    "plain": {},
    "no bias": dict(layer=dict(bias=False)),
    "rsLoRA": dict(layer=dict(use_rslora=True)),
    "three times as wide": dict(layer=dict(in_features=18, out_features=6)),
    "float32": dict(layer=dict(dtype=torch.float32)),
    "A frozen": dict(change=freeze_A),
    "base not frozen": dict(change=unfreeze),
    "base no nn.Linear": dict(change=other_base),
    "base in 4 bits": dict(layer=dict(dtype=torch.float32), change=in_4_bits),
    "base in 4 bits, x wider than A": dict(layer=dict(dtype=torch.float32), change=in_4_bits, dtype=torch.float64),
    "base in 4 bits, autocast": dict(layer=dict(dtype=torch.float32), change=in_4_bits, run="autocast"),
    "base wider than A": dict(layer=dict(dtype=torch.float32), dtype=torch.float64, change=wider_base),
    "a hook on the base": dict(change=hook_on_base),
    "a hook before the base": dict(change=hook_before_base),
    "a hook on the base's gradient": dict(change=hook_on_base_s_gradient),
    "another forward of the base": dict(change=other_forward_of_base),
    "bfloat16": dict(layer=dict(dtype=torch.bfloat16)),
    "float16": dict(layer=dict(dtype=torch.float16)),
    "A in bfloat16 too": dict(layer=dict(dtype=torch.bfloat16), change=half_adapter),
    "autocast": dict(layer=dict(dtype=torch.float32), run="autocast"),
    "autocast, float64": dict(run="autocast"),
    "x not contiguous": dict(run="strided"),
    "checkpointing": dict(run="checkpoint"),
    "x needs no gradient": dict(run="no input gradient"),
    "eval mode": dict(run="eval"),
}
BARS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the norm


def run_case(layer, x, run):
    """The output, and the gradients by name: of x, A, B and what else is not frozen."""
    if run == "eval":
        layer.eval()
    x = x.clone().requires_grad_(run != "no input gradient")
    inputs = {"x": x} if x.requires_grad else {}
    inputs |= {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}
    if run == "strided":  # neither the input nor the gradient of the output is contiguous
        y = layer(x.repeat_interleave(2, -1)[..., ::2])
        y = y.mT if y.ndim > 1 else y
    elif run == "checkpoint":
        y = checkpoint(layer, x, use_reentrant=False)
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=run == "autocast"):
            y = layer(x)
    return {"the output": y, **dict(zip(inputs, gradients(y, *inputs.values()), strict=True))}


@with_and_without_start
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("leading", [(), FEW, MANY, (2, 3, 4), (0,)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_all_gradients_are_the_plain_layer_s(case, leading, dropout, started, monkeypatch):
    options, dtype, change, run = (CASES[case].get(key) for key in ("layer", "dtype", "change", "run"))
    fast = make_layer(FastLoRALinear, dropout=dropout, started=started, **(options or {}))
    dtype = dtype or fast.base_layer.weight.dtype
    if change is not None:
        change(fast)
    plain = copy.deepcopy(fast)
    plain.__class__ = LoRALinear  # the same base, A, B and start
    x = torch.randn(*leading, fast.in_features, dtype=dtype)

    def dropout_as_the_fast_layer_draws_it(x, p, training):
        if not training or p == 0:
            return x
        mask, kept = dropout_mask(x, p)
        return x * mask / kept

    monkeypatch.setattr(F, "dropout", dropout_as_the_fast_layer_draws_it)
    results = []
    for layer in (fast, plain):
        torch.manual_seed(1)
        results.append(run_case(layer, x, run))
    got, expected = results
    assert list(got) == list(expected), f"gradients of {list(got)}, expected of {list(expected)}"
    for name, right in expected.items():
        found = got[name]
        assert found.dtype == right.dtype and found.shape == right.shape, (
            f"{name} is {found.dtype} {tuple(found.shape)}, expected {right.dtype} {tuple(right.shape)}"
        )
        computed_in = (
            torch.bfloat16
            if run == "autocast" and dtype == torch.float32
            else min((dtype, right.dtype), key=lambda kind: kind.itemsize)
        )
        off, size = (found.double() - right.double()).norm().item(), right.double().norm().item()
        allowed = BARS[computed_in] * size
        assert off <= allowed, f"{name} is off by {off:.1e} (norm), where {allowed:.1e} is allowed of {size:.1e}"


def test_in_half_precision_it_is_as_near_to_the_exact_result_as_the_plain_layer():
    fast = make_layer(FastLoRALinear, torch.bfloat16, in_features=64, out_features=48)
    plain, exact = copy.deepcopy(fast), copy.deepcopy(fast).double()
    plain.__class__ = exact.__class__ = LoRALinear
    x = torch.randn(100, 64).bfloat16()
    results = [run_case(layer, x.to(layer.base_layer.weight.dtype), None) for layer in (fast, plain, exact)]
    for name, right in results[2].items():
        ours, theirs = ((result[name].double() - right).norm().item() for result in results[:2])
        assert ours <= 1.2 * theirs, f"{name}: the fast layer errs by {ours:.2e}, the plain one by {theirs:.2e}"


def test_it_is_off_and_on_and_merged_as_the_plain_layer():
    x = torch.randn(*MANY, IN, dtype=torch.float64)
    for state in ("disabled", "merged", "merged and disabled"):
        results = []
        for kind in (FastLoRALinear, LoRALinear):
            layer = make_layer(kind, dropout=0.5)
            if "merged" in state:
                layer.merge()
            layer.enabled = "disabled" not in state
            results.append(layer(x))
        assert torch.equal(*results), f"{state}: off by {(results[0] - results[1]).abs().max():.1e}, none is allowed"


# Which form is chosen


def test_many_tokens_form_the_weight_and_few_do_not():
    layer = make_layer(FastLoRALinear)
    few, many = (layer(torch.randn(*shape, IN, dtype=torch.float64)) for shape in (FEW, MANY))
    assert (form_of(few), form_of(many)) == ("LowRankTerm", "FormedWeight")


def test_with_dropout_the_update_is_added_in_place_whatever_the_number_of_tokens():
    layer = make_layer(FastLoRALinear, dropout=0.3)
    few, many = (layer(torch.randn(*shape, IN, dtype=torch.float64)) for shape in (FEW, MANY))
    assert (form_of(few), form_of(many)) == ("AddedInPlace", "AddedInPlace")


@pytest.mark.parametrize("shape", [(6, 5), (12, 4), (4, 12), (8, 8), (30, 10), (1, 50)], ids=str)
@pytest.mark.parametrize("started", [False, True])
def test_forming_pays_from_the_counted_tokens_on(shape, started):
    """2·r·in·out against N·r·(in + out): r, and so a start, makes no difference."""
    layer = make_layer(FastLoRALinear, started=started, in_features=shape[0], out_features=shape[1])
    threshold = 2 * shape[0] * shape[1] / (shape[0] + shape[1])
    paying = [tokens for tokens in range(100) if layer.forming_pays(torch.empty(tokens, shape[0]).double())]
    expected = [tokens for tokens in range(100) if tokens > threshold]
    assert paying == expected, f"it pays from {paying[:1]} tokens on; the counts say from {expected[:1]}, {threshold:g}"


def test_tokens_of_all_leading_dimensions_count_together():
    layer = make_layer(FastLoRALinear)
    shapes = [(5,), (6,), (1, 5), (2, 3), (1, 1, 6), ()]
    found = [layer.forming_pays(torch.randn(*shape, IN, dtype=torch.float64)) for shape in shapes]
    assert found == [False, True, False, True, True, False], dict(zip(shapes, found, strict=True))


@pytest.mark.parametrize(
    ("case", "pays"),
    [
        ("plain", True),
        ("float32", True),
        ("no bias", True),
        ("A frozen", False),
        ("base not frozen", False),
        ("base no nn.Linear", False),
        ("base in 4 bits", True),
        ("base in 4 bits, x wider than A", False),
        ("base in 4 bits, autocast", False),
        ("base wider than A", False),
        ("a hook on the base", False),
        ("a hook before the base", False),
        ("a hook on the base's gradient", False),
        ("another forward of the base", False),
        ("bfloat16", False),
        ("float16", False),
        ("A in bfloat16 too", False),
        ("autocast", False),
        ("autocast, float64", False),
    ],
)
@pytest.mark.parametrize(("dropout", "form"), [(0.0, "FormedWeight"), (0.3, "AddedInPlace")])
def test_the_weight_is_read_only_where_that_is_exact_and_saves_something(case, pays, dropout, form):
    options, dtype, change, run = (CASES[case].get(key) for key in ("layer", "dtype", "change", "run"))
    layer = make_layer(FastLoRALinear, **(options or {}) | {"dropout": dropout})
    dtype = dtype or layer.base_layer.weight.dtype
    if change is not None:
        change(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=run == "autocast"):
        found = form_of(layer(torch.randn(*MANY, IN, dtype=dtype)))
    assert found == (form if pays else "LowRankTerm"), f"{case}: computed by {found}"


@pytest.mark.parametrize("bias_trained", [False, True])
def test_a_trained_bias_gets_its_gradient(bias_trained):
    layer = make_layer(FastLoRALinear)
    layer.base_layer.bias.requires_grad_(bias_trained)
    layer(torch.randn(*MANY, IN, dtype=torch.float64)).sum().backward()
    assert (layer.base_layer.bias.grad is not None) == bias_trained


def test_dropout_drops_that_share_of_the_input_while_training_only():
    layer = make_layer(FastLoRALinear, dropout=0.3, bias=False, in_features=50, out_features=50)
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.zeros_(layer.lora_A)
    with torch.no_grad():
        layer.lora_A[0, 0] = layer.lora_B[:, 0] = 1  # y = s · x_0 everywhere
        y = layer(torch.ones(4000, 50, dtype=torch.float64))[:, 0]
        kept = y[y != 0]
        assert abs(len(kept) / 4000 - 0.7) < 0.03, f"{len(kept) / 4000:.3f} of the input was kept; 0.7 should be"
        off = (kept * 0.7 / layer.scaling - 1).abs().max().item()
        assert off < 2**-16, f"what is kept is divided by 0.7 to 16 bits; the quotient is off by {off:.1e}"
        y = layer.eval()(torch.ones(60, 50, dtype=torch.float64))
        assert (y - layer.scaling).abs().max() < 1e-12, "in eval mode something was dropped"


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.05, 0.3, 0.5, 0.9, 1 - 1e-6])
def test_a_mask_drops_that_share_to_16_bits(p):
    """Within four standard deviations of a binomial count; what it says is kept differs from 1 - p by half a step."""
    torch.manual_seed(0)
    x = torch.empty(250, 1001)
    mask, kept = dropout_mask(x, p)
    assert mask.shape == x.shape and mask.dtype == torch.bool
    assert kept > 0 and abs(kept - (1 - p)) <= 2**-16, f"kept with probability {kept}, 1 - p is {1 - p}"
    found, off = mask.float().mean().item(), 4 * math.sqrt(kept * (1 - kept) / x.numel()) + 1e-9
    assert abs(found - kept) <= off, f"{found:.5f} are kept, {kept:.5f} said, {off:.5f} allowed"


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 3), (2, 0), (2, 3, 4)], ids=str)
def test_a_mask_is_of_any_shape(shape):
    assert dropout_mask(torch.empty(shape), 0.5)[0].shape == shape


def test_elements_are_dropped_independently_of_their_neighbours():
    """Four elements share a draw of 64 bits, so each of the four is held against the three that follow it."""
    torch.manual_seed(0)
    dropped = ~dropout_mask(torch.empty(4, 200_000), 0.3)[0].view(-1, 4)
    dropped = dropped.double() - 0.3
    together = (dropped.T @ dropped / len(dropped)).fill_diagonal_(0).abs().max().item()
    allowed = 4 * 0.3 * 0.7 / math.sqrt(len(dropped))
    assert together < allowed, f"two places of one draw are dropped together: covariance {together:.1e} > {allowed:.1e}"


# What is kept, and what is computed


def saved_bytes(layer, x, known):
    """Bytes that the forward pass keeps for backward, beside the tensors `known`; each storage counts once."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    for tensor in known:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())


@with_and_without_start
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [4, 100])
def test_backward_keeps_no_copy_of_the_weight_nor_of_the_input(tokens, dropout, started):
    layer = make_layer(FastLoRALinear, torch.float32, dropout=dropout, started=started, in_features=40, out_features=30)
    x, r = torch.randn(tokens, 40, requires_grad=True), R * (1 + started)
    kept = saved_bytes(layer, x, [x, *layer.parameters()])
    # A x holds r numbers a token, the mask one byte an element; the formed weight keeps neither.
    allowed = tokens * 40 + tokens * r * 4 if dropout else (tokens * r * 4 if tokens == 4 else 0)
    allowed += 4 * r * (40 + 30) if started else 0  # [A ; A0] and [B | -B0]
    assert kept == allowed, f"{kept} bytes kept, {allowed} expected; x takes {x.nbytes}, W {4 * 40 * 30}"


@with_and_without_start
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [3, 50])
def test_with_a_frozen_x_is_not_kept(tokens, dropout, started):
    layer = make_layer(FastLoRALinear, dropout=dropout, started=started)
    freeze_A(layer)
    x, r = torch.randn(tokens, IN, dtype=torch.float64, requires_grad=True), R * (1 + started)
    kept = saved_bytes(layer, x, layer.parameters())
    expected = tokens * r * 8 + tokens * IN * bool(dropout)  # A x, and the mask
    expected += 8 * r * (IN + OUT) if started else 0
    assert kept == expected, f"{kept} bytes kept, {expected} expected; x takes {x.nbytes}"


def test_under_dropout_no_array_as_large_as_x_is_made_but_its_gradient(monkeypatch):
    monkeypatch.setattr(fast, "PIECE", 10 * 40)  # ten tokens
    layer = make_layer(FastLoRALinear, dropout=0.5, in_features=40, out_features=30)
    x = torch.randn(100, 40, dtype=torch.float64, requires_grad=True)
    outputs = []
    forward = new_bytes(lambda: outputs.append(layer(x)), [x])
    wanted = [x, layer.lora_A, layer.lora_B]
    backward = new_bytes(lambda: torch.autograd.grad(outputs[0].sum(), wanted), [x])
    assert [size for size in forward if size >= x.nbytes] == [], f"x takes {x.nbytes} bytes, forward makes {forward}"
    assert [size for size in backward if size >= x.nbytes] == [x.nbytes], f"x takes {x.nbytes}, backward {backward}"


def new_bytes(run, known):
    """The sizes of the storages that operations make, without those of known tensors."""
    sizes = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
                alive.append(tensor)  # or another could take its place
            return result

    alive = []
    with Watch():
        run()
    for tensor in known:
        sizes.pop(tensor.untyped_storage()._cdata, None)
    return sorted(sizes.values())


def products_of(run):
    """The shapes of all matrix products."""
    shapes = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                shapes.append(tuple(result.shape))
            return result

    with Count():
        run()
    return shapes


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [3, 50])
def test_no_input_gradient_is_computed_where_none_is_asked(tokens, dropout):
    layer = make_layer(FastLoRALinear, dropout=dropout)
    output = layer(torch.randn(tokens, IN, dtype=torch.float64))
    shapes = products_of(lambda: output.sum().backward())
    assert (tokens, IN) not in shapes, f"products of shapes {shapes}, and ({tokens}, {IN}) is the input's gradient"


@pytest.mark.parametrize("tokens", [3, 50])
def test_a_s_gradient_is_not_computed_where_a_is_frozen(tokens):
    layer = make_layer(FastLoRALinear)
    freeze_A(layer)
    output = layer(torch.randn(tokens, IN, dtype=torch.float64, requires_grad=True))
    shapes = products_of(lambda: output.sum().backward())
    assert (R, IN) not in shapes, f"products of shapes {shapes}, and ({R}, {IN}) is A's gradient"
    assert layer.lora_A.grad is None


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_weight_gradient_is_never_computed(dropout):
    layer = make_layer(FastLoRALinear, dropout=dropout, in_features=9, out_features=7)
    output = layer(torch.randn(50, 9, dtype=torch.float64, requires_grad=True))
    shapes = products_of(lambda: output.sum().backward())
    formed = 0 if dropout else 1  # W + sBA, and gW would be (7, 9) too
    assert shapes.count((7, 9)) == formed, f"products of shapes {shapes}; (7, 9) should be there {formed} times"


@both
def test_checkpointing_gives_the_very_same_gradients(kind):
    for tokens in (2, 50):
        for dropout in (0.0, 0.3):
            layer = make_layer(kind, dropout=dropout)
            x = torch.randn(tokens, IN, dtype=torch.float64, requires_grad=True)
            inputs, results = (x, layer.lora_A, layer.lora_B), []
            for run in (layer, lambda x, layer=layer: checkpoint(layer, x, use_reentrant=False)):
                torch.manual_seed(1)
                results.append(gradients(run(x), *inputs))
            for name, a, b in zip("xAB", *results, strict=True):
                assert torch.equal(a, b), f"{tokens} tokens: gradient of {name} off by {(a - b).abs().max():.1e}"
