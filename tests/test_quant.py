"""Rounding to 4 bits, held against published tables and brute force."""

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from minilora import quant
from minilora.levels import LEVELS, SCALE_LEVELS, pack_codes, unpack_codes
from minilora.quant import QLORA, Quantization, dequantize, quantize, stored_shapes

SCHEMES, FLOATS = ("int4", "fp4", "nf4"), (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]  # codes 0 to 7; then the same, negated


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


def assert_close(got, expected, what, **tolerance):
    torch.testing.assert_close(got, expected, msg=lambda message: f"{what}: {message}", **tolerance)


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
    assert SCALE_LEVELS[127] == 0 and SCALE_LEVELS[255] == 1, (
        f"0 at 127 and 1 at 255, not {SCALE_LEVELS[127]} and {SCALE_LEVELS[255]}"
    )
    assert torch.equal(SCALE_LEVELS[:127], -SCALE_LEVELS[128:255].flip(0)), "symmetric but for 0 and 1"
    assert_close(SCALE_LEVELS[191:255], 0.1 + 0.9 * (torch.arange(64) + 0.5) / 64, "levels from 0.1 to 1")


def test_packing_puts_the_first_code_in_the_high_half_and_can_be_undone():
    assert quantize(torch.tensor([1.0, -1.0])).codes.tolist() == [0xF0], (
        "1 is code 15 in the high half, -1 code 0 in the low"
    )
    assert quantize(torch.tensor([-1.0])).codes.tolist() == [0x07], "an odd end is filled up with a zero"
    zeros = quantize(torch.zeros(64))
    assert zeros.codes.tolist() == [0x77] * 32 and zeros.scales.tolist() == [0.0], (
        f"zeros are code 7 at scale 0, not {zeros}"
    )
    short = quantize(torch.zeros(3))
    assert short.codes.tolist() == [0x77] * 2 and short.scales < 1e-37, "a short block of zeros"
    every_byte = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_codes(unpack_codes(every_byte)), every_byte), (
        f"bytes came back as {pack_codes(unpack_codes(every_byte))}"
    )


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
        changed, off = (codes_of(twice) != codes).sum(), (twice.scales - once.scales).abs().max()
        assert changed == 0 and off == 0, f"{changed} codes changed, and scales by up to {off:.3g}"
    back = dequantize(quantize(torch.cat([normal(64), torch.zeros(64), normal(64), torch.zeros(7)]), scheme))
    assert not back[64:128].any() and not back[192:].any(), "zeros came back as something else"
    assert not dequantize(quantize(torch.zeros(100), scheme, double_quant=True)).any(), (
        "zeros came back as something else"
    )


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
    monkeypatch.setattr(quant, "chunk_on", lambda device: 256)
    for weight, whole, values in zip(weights, wholes, expected, strict=True):
        got = quantize(weight, scheme, block_size, True)
        assert_same_bits(got.tensors, whole.tensors, f"{tuple(weight.shape)} in chunks")
        assert torch.equal(dequantize(got), values) and not dequantize(got).requires_grad, (
            f"in chunks the values differ by up to {(dequantize(got) - values).abs().max():.3g}, or ask for a gradient"
        )


# Double quantization


@pytest.mark.parametrize("double_quant, most", [(True, 4.13), (False, 4.5)])
def test_bits_per_parameter(double_quant, most):
    quantized = quantize(normal(1024, 1024), double_quant=double_quant)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in quantized.tensors.values())
    assert 4 < quantized.bits_per_parameter == 8 * stored / 2**20 <= most, f"{8 * stored / 2**20} bits"
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in quantized.tensors.items()}
    found = stored_shapes(2**20, 64, double_quant)
    assert found == expected, f"stored_shapes says {found}, and what is stored is {expected}"


def test_double_quantization_stores_the_nearest_of_256_levels_for_each_scale():
    weight = normal(601, 64) * normal(601, 1, seed=1)  # 601 scales that differ: two whole blocks of 256 and a short one
    plain, double = quantize(weight), quantize(weight, double_quant=True)
    assert torch.equal(double.codes, plain.codes), "the codes must not depend on how scales are stored"
    assert_close(double.nested_offset, plain.scales.mean(), "nested_offset")
    rest = plain.scales - double.nested_offset
    each, scales = scales_of(rest, 256)
    assert torch.equal(double.nested_scales, scales) and double.scales.dtype == torch.uint8, (
        f"the largest rest of each 256 is {scales}, not {double.nested_scales}; scales are {double.scales.dtype}"
    )
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
    for function, *arguments in (quantize, normal(64)), (Quantization,):
        with pytest.raises(ValueError, match=message):
            function(*arguments, *settings)


def test_the_settings_of_qlora_are_the_paper_s_and_cannot_be_changed():
    assert QLORA == Quantization("nf4", 64, True), f"QLoRA is NF4 in blocks of 64 with 8-bit scales, not {QLORA}"
    with pytest.raises(FrozenInstanceError):
        QLORA.block_size = 32


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
