"""The linear layer in 4 bits, held against an nn.Linear of the same weights, and a model made of such layers."""

import copy
import math
import weakref
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from minilora import GPT, GPTConfig, LoRAConfig, MemoryMeter, adapter_parameters, apply_lora, linear4bit
from minilora.levels import SCALE_LEVELS
from minilora.linear4bit import Linear4bit, dequantize_model, quantize_model, quantized_layers
from minilora.quant import QLORA, Quantization, dequantize, quantize

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IN, OUT = 40, 24
PARTS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LINEARS = [f"model.layers.{layer}.{part}" for layer in range(2) for part in PARTS]  # of small_gpt, but the head
IDS = torch.arange(48).view(3, 16)  # enough tokens for LoRA on float weights to form them


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_pair(dtype=torch.float32, bias=True, double_quant=True):
    """A Linear4bit, and the nn.Linear that holds the float weights its codes stand for, with a bias of its own."""
    torch.manual_seed(0)
    twin = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    layer = Linear4bit.from_linear(copy.deepcopy(twin), quantize(twin.weight, double_quant=double_quant))
    twin.weight = nn.Parameter(dequantize(layer.quantized), requires_grad=False)
    return layer, twin


def small_gpt(dtype=torch.float32):
    torch.manual_seed(0)
    return GPT(GPTConfig(64, 32, 48, 2, 4, 2, max_position_embeddings=16, attention_bias=True)).to(dtype)


def gradients(output, *inputs):
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)  # differs for every element
    weights = weights.view(output.shape[::-1]).permute(*reversed(range(output.ndim)))  # and is not contiguous
    return torch.autograd.grad((output * weights).sum(), inputs)


def assert_close(got, expected, what, **tolerance):
    torch.testing.assert_close(got, expected, msg=lambda message: f"{what}: {message}", **tolerance)


def buffers(module):
    return {name: tensor.clone() for name, tensor in module.named_buffers()}


def assert_same_bits(got, expected, what):
    assert got.keys() == expected.keys(), f"{what}: {sorted(got)} and not {sorted(expected)}"
    for name in expected:
        same = torch.equal(got[name], expected[name]) and got[name].dtype == expected[name].dtype
        assert same, f"{what}: {name} is not the same bit for bit"


# The layer


@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_layer_equals_nn_linear_of_the_same_weights(dtype, bias, leading):
    layer, twin = make_pair(dtype, bias)
    x = normal(IN, *leading, dtype=dtype).movedim(0, -1).requires_grad_()  # not contiguous
    got, expected = layer(x), twin(x)
    assert_close(got, expected, "output")
    a, b = gradients(got, x, *layer.parameters()), gradients(expected, x, *([twin.bias] if bias else []))
    for what, mine, right in zip(("input", "bias")[: 1 + bias], a, b, strict=True):
        assert_close(mine, right, f"gradient of the {what}")
    assert not layer.requires_grad_(False)(x.detach()).requires_grad, (
        "nothing asks for a gradient, and the output has one"
    )


def kept_for_backward(forward, x):
    """Bytes that autograd's hooks see saved, and bytes alive between forward and backward, beside x and y."""
    saved = []
    with MemoryMeter(nn.Module()) as meter, saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        y = forward(x)
        return sum(saved), meter.now.total - x.nbytes - y.nbytes


def test_the_float_weight_does_not_wait_for_backward():
    layer, _ = make_pair()
    x, weight_bytes = normal(3, IN).requires_grad_(), 4 * IN * OUT
    stored = sum(tensor.nbytes for tensor in [*layer.buffers(), *layer.parameters(), SCALE_LEVELS])  # alive anyway
    saved, alive = kept_for_backward(lambda x: F.linear(x, dequantize(layer.quantized), layer.bias), x)
    assert saved >= weight_bytes and alive >= weight_bytes, "the contrast: plain autograd keeps the float weight"
    saved, alive = kept_for_backward(layer, x)
    assert saved == 0, f"{saved} bytes saved for backward"
    assert alive <= stored < weight_bytes, f"{alive} bytes alive before backward, {stored} of them stored anyway"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layer_computes_in_the_dtype_of_its_input_or_of_autocast(dtype, double_quant, monkeypatch):
    layer, _ = make_pair(double_quant=double_quant)
    made = []  # dtypes of the float weights
    monkeypatch.setattr(
        linear4bit, "dequantize", lambda quantized, dtype: made.append(dtype) or dequantize(quantized, dtype)
    )
    x = normal(3, IN, dtype=dtype).requires_grad_()
    for autocast in (False, True) if dtype == torch.float32 else (False,):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = layer(x)
        used = torch.bfloat16 if autocast else dtype
        weight = dequantize(layer.quantized).to(used)  # one cast from float32
        right = F.linear(x.to(used), weight, layer.bias.to(used))
        same = got.dtype == used and torch.equal(got, right)
        assert same, f"in {used} expected, got {got.dtype}, off by up to {(got - right).abs().max()}"
        of_x, of_bias = gradients(got, x, layer.bias)
        assert of_x.dtype == dtype and of_bias.dtype == torch.float32, (
            f"gradients in {of_x.dtype} and {of_bias.dtype}, not in {dtype} and float32"
        )
        assert made[-2:] == [used, used], f"a float weight was made in {made[-2:]}, forward and backward"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_casting_a_model_casts_the_bias_and_not_the_scales(cast, double_quant):
    layer, _ = make_pair(double_quant=double_quant)
    before = buffers(layer)
    cast(nn.Sequential(layer))
    assert_same_bits(buffers(layer), before, "after the cast")
    assert layer.bias.dtype == cast(torch.ones(1)).dtype, f"the bias is {layer.bias.dtype}"


def test_layer_can_be_trained_beside_copied_and_moved():
    layer, _ = make_pair()
    before, x = buffers(layer), normal(3, IN)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)), f"the copy's output differs by up to {(twin(x) - layer(x)).abs().max():.3g}"
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x).sum().backward()  # an expanded gradient
    optimizer.step()
    assert_same_bits(buffers(layer), before, "after a step of training")
    assert_close(layer.bias - twin.bias, torch.full((OUT,), -3.0), "the bias moves by 3, and not the copy's: it moved")
    twin.to("meta")
    assert all(tensor.is_meta for tensor in [*twin.parameters(), *twin.buffers()])
    assert twin(x.to("meta")).shape == (3, OUT), f"(3, {OUT}) expected on meta"


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_state_dict_fills_an_empty_layer_bit_for_bit(bias, double_quant, tmp_path):
    layer, _ = make_pair(bias=bias, double_quant=double_quant)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    empty = Linear4bit(IN, OUT, bias, *([] if double_quant else [Quantization(double_quant=False)]))
    empty.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert_same_bits(buffers(empty), buffers(layer), "loaded")
    assert torch.equal(empty(normal(3, IN)), layer(normal(3, IN))), "the filled layer computes something else"


def test_a_state_dict_of_other_settings_is_refused():
    for stored, options, message in (
        (True, dict(scheme="fp4"), "holds a layer of .*'nf4'.* this one is of .*'fp4'"),
        (True, dict(block_size=32), "holds a layer of .*64.* this one is of .*32"),
        (True, dict(double_quant=False), "holds a layer of .*'double_quant': True.* this one is of .*False"),
        (False, dict(double_quant=True), "holds a layer of .*'double_quant': False.* this one is of .*True"),
    ):
        layer, _ = make_pair(double_quant=stored)
        with pytest.raises(ValueError, match=message):
            Linear4bit(IN, OUT, quantization=Quantization(**options)).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_empty_layer_is_made_of_the_tensors_of_a_full_one(double_quant):
    settings = Quantization(double_quant=double_quant)
    empty = Linear4bit(IN, OUT, bias=False, quantization=settings).quantized
    full = quantize(normal(OUT, IN), **asdict(settings))
    kinds = [{name: (t.shape, t.dtype) for name, t in each.tensors.items()} for each in (empty, full)]
    assert kinds[0] == kinds[1], f"an empty layer holds {kinds[0]}, a full one {kinds[1]}"
    rest = [(each.scheme, each.block_size, each.shape, each.dtype) for each in (empty, full)]
    assert rest[0] == rest[1], f"an empty layer says it is {rest[0]}, a full one {rest[1]}"


# The model


def test_quantize_model_replaces_linear_layers_and_nothing_else_and_can_be_undone():
    model = small_gpt().eval()
    model.get_submodule(LINEARS[3]).train()
    model.lm_head.requires_grad_(False)
    names = list(model.state_dict())
    kept = {name: p for name, p in model.named_parameters() if name not in {f"{linear}.weight" for linear in LINEARS}}
    trainable = [parameter.requires_grad for parameter in kept.values()]
    settings = Quantization("int4", 32, False)
    assert quantize_model(model, settings) is model
    layers = quantized_layers(model)
    found = {layer.quantization for layer in layers.values()}
    assert found == {settings}, f"the layers are {found}, and not {settings}"
    assert list(layers) == LINEARS, f"replaced: {list(layers)}"
    left = dict(model.named_parameters())
    assert left.keys() == kept.keys() and all(left[name] is kept[name] for name in kept), "these must stay themselves"
    assert [kept[name].requires_grad for name in kept] == trainable, (
        "what was trainable should still be, and nothing else"
    )
    assert not any(tensor.requires_grad for tensor in model.buffers()), "what is quantized is frozen"
    assert [name for name in LINEARS if layers[name].training] == [LINEARS[3]], "training mode must be carried over"
    with pytest.raises(ValueError, match="no nn.Linear to quantize"):
        quantize_model(model)

    expected = model(IDS)
    assert dequantize_model(model) is model and not quantized_layers(model) and list(model.state_dict()) == names
    assert torch.equal(model(IDS), expected), f"logits differ by {(model(IDS) - expected).abs().max()}"
    linears = [model.get_submodule(name) for name in LINEARS]
    assert all(type(linear) is nn.Linear and not linear.weight.requires_grad for linear in linears)
    assert [linear.training for linear in linears] == [name == LINEARS[3] for name in LINEARS]
    for name, again in quantized_layers(quantize_model(model, settings)).items():
        assert_same_bits(buffers(again), buffers(layers[name]), f"{name} quantized again")
    assert "lm_head" in quantized_layers(quantize_model(small_gpt(), skip=()))


def test_float_weights_are_freed_one_after_the_other(monkeypatch):
    model, alive = small_gpt(), []
    weights = [weakref.ref(model.get_submodule(name).weight) for name in LINEARS]

    def counting(*arguments, **settings):
        alive.append(sum(weight() is not None for weight in weights))
        return quantize(*arguments, **settings)

    monkeypatch.setattr(linear4bit, "quantize", counting)
    quantize_model(model)
    assert alive == list(range(len(LINEARS), 0, -1)), f"float weights alive at each layer: {alive}"
    assert not any(weight() is not None for weight in weights), "a float weight is still alive"
    assert all(layer.quantization == QLORA for layer in quantized_layers(model).values()), (
        "double quantization is the default"
    )


def test_lora_on_4_bits_equals_lora_on_the_float_weights_and_leaves_the_codes_alone():
    model = apply_lora(quantize_model(small_gpt(torch.float64)), LoRAConfig(r=3, target_modules="all-linear"))
    adapters = adapter_parameters(model.double())  # in float64, two orders of summing agree closely
    for parameter in adapters:
        nn.init.normal_(parameter, std=0.3)
    plain = dequantize_model(copy.deepcopy(model))
    for linears, kind in ((model, Linear4bit), (plain, nn.Linear)):
        assert all(type(linears.get_submodule(f"{name}.base_layer")) is kind for name in LINEARS), f"not all {kind}"
    got, expected = model(IDS), plain(IDS)
    assert_close(got, expected, "logits")
    for a, b in zip(gradients(got, *adapters), gradients(expected, *adapter_parameters(plain)), strict=True):
        assert b.abs().max() > 0 and a.shape == b.shape, f"shapes {a.shape} and {b.shape}, largest {b.abs().max()}"
        assert_close(a, b, "gradient of A or B")

    before, start = buffers(model), [parameter.detach().clone() for parameter in adapters]
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(3):
        model(IDS).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(buffers(model), before, "after three steps of training")
    assert not any(torch.equal(a, b) for a, b in zip(adapters, start, strict=True)), "A or B did not train"


def test_a_cast_model_dequantizes_to_its_new_dtype():
    model = quantize_model(small_gpt()).to(torch.bfloat16)
    expected = model(IDS)
    assert torch.equal(dequantize_model(model)(IDS), expected), (
        "the dequantized model says something else than the one in 4 bits"
    )


def test_a_wrapped_head_stays_in_floats():
    model = apply_lora(small_gpt(), LoRAConfig(r=2, target_modules=["lm_head", "q_proj"]))
    assert not [name for name in quantized_layers(quantize_model(model)) if "lm_head" in name]


def test_float64_weights_that_overflow_are_named_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    model[1].weight.data[0, 0] = 1e300
    with pytest.raises(ValueError, match="1.weight holds NaN or infinity"):
        quantize_model(model)
    assert type(model[0]) is nn.Linear


def test_quantize_model_names_the_bad_layer_and_leaves_the_model_as_it_was():
    model = small_gpt()
    before = dict(model.named_modules())
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        quantize_model(model)
    assert dict(model.named_modules()) == before, "a layer was replaced before the check"
