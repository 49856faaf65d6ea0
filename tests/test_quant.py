"""Rounding to 4 bits, held against published tables and brute force; the layer, against an nn.Linear of its weights."""

import copy
import math
import weakref

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from minilora import GPT, GPTConfig, LoRAConfig, MemoryMeter, adapter_parameters, apply_lora, quant
from minilora.levels import LEVELS, SCALE_LEVELS, pack_codes, unpack_codes
from minilora.quant import Linear4bit, dequantize, dequantize_model, quantize, quantize_model, quantized_layers

SCHEMES, FLOATS = ("int4", "fp4", "nf4"), (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]  # codes 0 to 7; then the same, negated
IN, OUT = 40, 24
PARTS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
LINEARS = [f"model.layers.{layer}.{part}" for layer in range(2) for part in PARTS]  # of small_gpt, but the head
IDS = torch.arange(48).view(3, 16)  # enough tokens for LoRA on float weights to form them


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes_of(quantized):
    return unpack_codes(quantized.codes)[: math.prod(quantized.shape)].long()


def scales_of(weight, block_size):
    """The absmax of every weight's own block, (n,), and of every block, (N,)."""
    blocks = torch.stack([block.abs().max() for block in weight.float().flatten().split(block_size)])
    return blocks.repeat_interleave(block_size)[: weight.numel()], blocks


def assert_nearest(values, codes, levels):
    distances = (values.double()[:, None] - levels.double()).abs()
    farther = (distances.gather(1, codes.long()[:, None])[:, 0] - distances.amin(1)).max().item()
    assert farther < 1e-6, f"a level was chosen that is {farther:.2e} of a scale farther than the nearest"


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


# Levels, codes and rounding


def test_levels_are_the_published_ones():
    assert torch.equal(LEVELS["nf4"], torch.tensor(NF4)), f"off by {(LEVELS['nf4'] - torch.tensor(NF4)).abs().max()}"
    assert_close(LEVELS["fp4"], torch.tensor(FP4 + [-level for level in FP4]), "fp4 by code", rtol=1e-7, atol=5e-8)
    assert not LEVELS["fp4"].signbit()[8], "the second zero must be positive"
    assert_close(LEVELS["int4"] * 7, torch.arange(-8.0, 8), "int4 in sevenths")
    assert SCALE_LEVELS.shape == (256,) and (SCALE_LEVELS.diff() > 0).all(), "256 levels, sorted, none twice"
    assert SCALE_LEVELS[127] == 0 and SCALE_LEVELS[255] == 1
    assert torch.equal(SCALE_LEVELS[:127], -SCALE_LEVELS[128:255].flip(0)), "symmetric but for 0 and 1"
    assert_close(SCALE_LEVELS[191:255], 0.1 + 0.9 * (torch.arange(64) + 0.5) / 64, "levels from 0.1 to 1")


def test_packing_puts_the_first_code_in_the_high_half_and_can_be_undone():
    assert quantize(torch.tensor([1.0, -1.0])).codes.tolist() == [0xF0]
    assert quantize(torch.tensor([-1.0])).codes.tolist() == [0x07], "an odd end is filled up with a zero"
    zeros = quantize(torch.zeros(64))
    assert zeros.codes.tolist() == [0x77] * 32 and zeros.scales.tolist() == [0.0]
    short = quantize(torch.zeros(3))
    assert short.codes.tolist() == [0x77] * 2 and short.scales < 1e-37, "a short block of zeros"
    every_byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_codes(unpack_codes(every_byte)), every_byte)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (128,), (7, 13), (3, 5, 17), (33, 65)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_becomes_the_nearest_level_of_its_block(scheme, shape, dtype):
    weight, levels = normal(*shape, dtype=dtype) * 0.02, LEVELS[scheme]
    half_gap = levels.double().sort().values.diff().max() / 2
    for block_size in (16, 64):
        quantized = quantize(weight, scheme, block_size)
        back, codes = dequantize(quantized), codes_of(quantized)
        assert back.shape == weight.shape and back.dtype == dtype, f"got {back.dtype} {tuple(back.shape)}"
        each, scales = scales_of(weight, block_size)
        assert torch.equal(quantized.scales, scales), "a scale must be the largest magnitude of its block"
        assert torch.equal(back.flatten(), (levels[codes] * each).to(dtype)), "absmax · level[code], cast once"
        assert_nearest(weight.flatten().double() / each, codes, levels)
        error = ((back.double() - weight.double()).abs().flatten() / each).max()
        rounding = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert error <= half_gap + rounding, f"error of {error:.4f} scales; half the widest gap is {half_gap:.4f}"
        assert scheme != "int4" or codes.min() > 0, "int4's code 0, -8/7, must never be used"


@pytest.mark.parametrize("block_size", [16, 64])  # a whole block is multiplied by 1/absmax, a short one divided
@pytest.mark.parametrize("scheme", ["fp4", "nf4"])
def test_on_a_midpoint_the_lower_level_is_taken(scheme, block_size):
    levels = LEVELS[scheme].unique()
    middles = (levels[:-1] + levels[1:]) / 2
    ones = torch.ones(16 - len(middles))  # make absmax 1
    for values, expected in ((middles, levels[:-1]), (middles.nextafter(ones[0]), levels[1:])):
        got = dequantize(quantize(torch.cat([values, ones]), scheme, block_size))[: len(values)]
        assert torch.equal(got, expected), f"levels {got.tolist()} and not {expected.tolist()}"


def test_a_whole_block_is_multiplied_by_the_inverse_of_absmax_and_a_short_one_divided():
    weight = torch.tensor([165.0] * 63 + [1920.0])  # 165/1920 is a midpoint of fp4, and 165 · (1/1920) just above it
    whole, short = codes_of(quantize(weight, "fp4", 64)), codes_of(quantize(weight, "fp4", 128))
    assert whole.tolist() == [6] * 63 + [3] and short.tolist() == [1] * 63 + [3], "bitsandbytes' last bit"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_quantized_and_zeros_come_back_as_they_were(scheme):
    for shape in ((64, 64), (7, 13)):
        once = quantize(normal(*shape), scheme)
        twice, codes = quantize(dequantize(once), scheme), codes_of(once)
        if scheme == "fp4":
            codes[codes == 8] = 0  # both are zero
        assert torch.equal(codes_of(twice), codes) and torch.equal(twice.scales, once.scales)
    back = dequantize(quantize(torch.cat([normal(64), torch.zeros(64), normal(64), torch.zeros(7)]), scheme))
    assert not back[64:128].any() and not back[192:].any(), "zeros came back as something else"
    assert not dequantize(quantize(torch.zeros(100), scheme, double_quant=True)).any()


def test_levels_pay_where_the_weights_are():
    def errors(weight):
        return {scheme: (dequantize(quantize(weight, scheme)) - weight).pow(2).mean().item() for scheme in SCHEMES}

    bell = normal(128, 256)
    of_bell, of_flat = errors(bell), errors(torch.special.ndtr(bell) * 2 - 1)  # the same, made uniform
    assert of_bell["nf4"] < min(of_bell["fp4"], of_bell["int4"]), f"squared errors on normal data: {of_bell}"
    assert of_flat["int4"] < of_flat["nf4"], f"squared errors on uniform data: {of_flat}"


@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_neither_the_size_of_a_chunk_nor_strides_matter(scheme, block_size, monkeypatch):
    weights = [normal(size).requires_grad_() for size in (256, 257, 512, 1000, 1001)] + [normal(30, 50).T]
    wholes = [quantize(weight.contiguous(), scheme, block_size, True) for weight in weights]
    expected = [dequantize(whole) for whole in wholes]
    monkeypatch.setattr(quant, "CHUNK", 256)
    for weight, whole, values in zip(weights, wholes, expected, strict=True):
        got = quantize(weight, scheme, block_size, True)
        assert_same_bits(got.tensors, whole.tensors, f"{tuple(weight.shape)} in chunks")
        assert torch.equal(dequantize(got), values) and not dequantize(got).requires_grad


# Double quantization


@pytest.mark.parametrize("double_quant, most", [(True, 4.13), (False, 4.5)])
def test_bits_per_parameter(double_quant, most):
    quantized = quantize(normal(1024, 1024), double_quant=double_quant)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in quantized.tensors.values())
    assert 4 < quantized.bits_per_parameter == 8 * stored / 2**20 <= most, f"{8 * stored / 2**20} bits"
    empty = Linear4bit(1024, 1024, bias=False, double_quant=double_quant).quantized.tensors
    kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (empty, quantized.tensors)]
    assert kinds[0] == kinds[1], "an empty layer must be made of the same tensors"


def test_double_quantization_stores_the_nearest_of_256_levels_for_each_scale():
    weight = normal(601, 64) * normal(601, 1, seed=1)  # 601 scales that differ: two whole blocks of 256 and a short one
    plain, double = quantize(weight), quantize(weight, double_quant=True)
    assert torch.equal(double.codes, plain.codes), "the codes must not depend on how scales are stored"
    assert_close(double.nested_offset, plain.scales.mean(), "nested_offset")
    rest = plain.scales - double.nested_offset
    each, scales = scales_of(rest, 256)
    assert torch.equal(double.nested_scales, scales) and double.scales.dtype == torch.uint8
    assert_nearest(rest.double() / each, double.scales, SCALE_LEVELS)
    error = ((double.absmax() - plain.scales).abs() / each).max()
    assert error <= SCALE_LEVELS.diff().max() / 2 + 1e-6, f"absmax is off by {error:.4f}, more than half a level"
    expected = LEVELS["nf4"][codes_of(double)].view(601, 64) * double.absmax()[:, None]
    assert torch.equal(dequantize(double), expected), "dequantize must use the scales as they are stored"


# Bad input


@pytest.mark.parametrize("settings", [("nf8", 64), *(("nf4", size) for size in (0, 8, 48, 8192, -64, 64.0, True))])
def test_unknown_schemes_and_impossible_block_sizes_are_refused(settings):
    message = (
        "unknown scheme 'nf8'; known: int4, fp4, nf4" if settings[0] == "nf8" else f"block_size is {settings[1]}; "
    )
    model = nn.Sequential(nn.Linear(8, 8))
    for function, *arguments in (quantize, normal(64)), (quantize_model, model), (Linear4bit, 8, 8, True):
        with pytest.raises(ValueError, match=message):
            function(*arguments, *settings)
    assert type(model[0]) is nn.Linear


def test_weights_that_are_not_finite_numbers_are_refused():
    for weight in (torch.ones(64, dtype=torch.int64), torch.empty(0), torch.empty(3, 0)):
        with pytest.raises(ValueError, match="only floating-point numbers are quantized"):
            quantize(weight)
    for value in (math.nan, math.inf, -math.inf, 1e300):  # the last is infinite in float32
        for place in (3, 69):  # in a whole block and in a short last one
            weight = normal(70, dtype=torch.float64)
            weight[place] = value
            with pytest.raises(ValueError, match="NaN or infinity"):
                quantize(weight)


def test_quantize_model_names_the_bad_layer_and_leaves_the_model_as_it_was():
    model = small_gpt()
    before = dict(model.named_modules())
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        quantize_model(model)
    assert dict(model.named_modules()) == before, "a layer was replaced before the check"


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
    assert not layer.requires_grad_(False)(x.detach()).requires_grad


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
        quant, "dequantize", lambda quantized, dtype: made.append(dtype) or dequantize(quantized, dtype)
    )
    x = normal(3, IN, dtype=dtype).requires_grad_()
    for autocast in (False, True) if dtype == torch.float32 else (False,):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got = layer(x)
        used = torch.bfloat16 if autocast else dtype
        weight = dequantize(layer.quantized).to(used)  # one cast from float32
        assert got.dtype == used and torch.equal(got, F.linear(x.to(used), weight, layer.bias.to(used)))
        of_x, of_bias = gradients(got, x, layer.bias)
        assert of_x.dtype == dtype and of_bias.dtype == torch.float32
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
    assert torch.equal(twin(x), layer(x))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x).sum().backward()  # an expanded gradient
    optimizer.step()
    assert_same_bits(buffers(layer), before, "after a step of training")
    assert_close(layer.bias - twin.bias, torch.full((OUT,), -3.0), "the bias moves by 3, and not the copy's: it moved")
    twin.to("meta")
    assert all(tensor.is_meta for tensor in [*twin.parameters(), *twin.buffers()])
    assert twin(x.to("meta")).shape == (3, OUT)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_state_dict_fills_an_empty_layer_bit_for_bit(bias, double_quant, tmp_path):
    layer, _ = make_pair(bias=bias, double_quant=double_quant)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    empty = Linear4bit(IN, OUT, bias, **({} if double_quant else {"double_quant": False}))
    empty.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert_same_bits(buffers(empty), buffers(layer), "loaded")
    assert torch.equal(empty(normal(3, IN)), layer(normal(3, IN)))


def test_a_state_dict_of_other_settings_is_refused():
    for stored, options, message in (
        (True, dict(scheme="fp4"), "holds a layer of .*'nf4'.* this one is of .*'fp4'"),
        (True, dict(block_size=32), "holds a layer of .*64.* this one is of .*32"),
        (True, dict(double_quant=False), "holds a layer of .*'double_quant': True.* this one is of .*False"),
        (False, dict(double_quant=True), "holds a layer of .*'double_quant': False.* this one is of .*True"),
    ):
        layer, _ = make_pair(double_quant=stored)
        with pytest.raises(ValueError, match=message):
            Linear4bit(IN, OUT, **options).load_state_dict(layer.state_dict())


# The model


def test_quantize_model_replaces_linear_layers_and_nothing_else_and_can_be_undone():
    model = small_gpt().eval()
    model.get_submodule(LINEARS[3]).train()
    model.lm_head.requires_grad_(False)
    names = list(model.state_dict())
    kept = {name: p for name, p in model.named_parameters() if name not in {f"{linear}.weight" for linear in LINEARS}}
    trainable = [parameter.requires_grad for parameter in kept.values()]
    settings = dict(scheme="int4", block_size=32, double_quant=False)
    assert quantize_model(model, **settings) is model
    layers = quantized_layers(model)
    assert all({name: getattr(layer, name) for name in settings} == settings for layer in layers.values())
    assert list(layers) == LINEARS, f"replaced: {list(layers)}"
    left = dict(model.named_parameters())
    assert left.keys() == kept.keys() and all(left[name] is kept[name] for name in kept), "these must stay themselves"
    assert [kept[name].requires_grad for name in kept] == trainable
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
    for name, again in quantized_layers(quantize_model(model, **settings)).items():
        assert_same_bits(buffers(again), buffers(layers[name]), f"{name} quantized again")
    assert "lm_head" in quantized_layers(quantize_model(small_gpt(), skip=()))


def test_float_weights_are_freed_one_after_the_other(monkeypatch):
    model, alive = small_gpt(), []
    weights = [weakref.ref(model.get_submodule(name).weight) for name in LINEARS]

    def counting(*arguments):
        alive.append(sum(weight() is not None for weight in weights))
        return quantize(*arguments)

    monkeypatch.setattr(quant, "quantize", counting)
    quantize_model(model)
    assert alive == list(range(len(LINEARS), 0, -1)), f"float weights alive at each layer: {alive}"
    assert not any(weight() is not None for weight in weights), "a float weight is still alive"
    assert all(layer.double_quant for layer in quantized_layers(model).values()), "double quantization is the default"


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
        assert b.abs().max() > 0 and a.shape == b.shape
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
    assert torch.equal(dequantize_model(model)(IDS), expected)


def test_a_wrapped_head_stays_in_floats():
    model = apply_lora(small_gpt(), LoRAConfig(r=2, target_modules=["lm_head", "q_proj"]))
    assert not [name for name in quantized_layers(quantize_model(model)) if "lm_head" in name]


def test_float64_weights_that_overflow_are_named_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double()
    model[1].weight.data[0, 0] = 1e300
    with pytest.raises(ValueError, match="1.weight holds NaN or infinity"):
        quantize_model(model)
    assert type(model[0]) is nn.Linear
