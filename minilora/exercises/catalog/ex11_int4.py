"""Exercise 11: rounding to 4 bits, by hand."""

import math
from unittest import mock

import torch
from torch import Tensor, nn

from minilora import levels, quant
from minilora.exercises.checking import Draw, Exercise, expect, expect_error, require, show
from minilora.levels import int4_codes, int4_levels, pack_codes, unpack_codes
from minilora.quant import quantize, scale_to_unit

EXERCISE = Exercise(
    number=11,
    slug="int4",
    title="Four bits by hand: int4",
    targets=(
        "levels:int4_levels",
        "levels:int4_codes",
        "levels:pack_codes",
        "levels:unpack_codes",
        "quant:scale_to_unit",
        "quant:quantize",
    ),
    difficulty=2,
    minutes=60,
    notebook="03_qlora",
    section="1. Four bits by hand",
    explanation="""\
Cut the flattened weight into blocks of neighbours, divide each block by its largest magnitude, and keep for each
weight the number, 0 to 15, of the nearest of 16 levels (Dettmers et al. 2023, section 2, uses the same blocks):

    absmax = max |w| of the block        code = nearest(w / absmax)        w ≈ absmax · level[code]

`int4_levels()`: (code - 8) / 7 for code 0 to 15, float32. `int4_codes(scaled)`: (n,) within ±1 -> uint8 codes 1 to 15,
halfway to the even one. `pack_codes(codes)`: two uint8 codes in each byte, the first in the high half; `unpack_codes`
undoes it, with integers of any dtype, and keeps the dtype.

`scale_to_unit(flat, block_size)`: each block over its absmax, float32 (n,), and the absmax of each block, float32 (N,).
The last block may be short. A block of zeros gives zeros, with an absmax that is 0 or next to it; never NaN.

`quantize(weight, ...)`: a QuantizedTensor with the weight's shape, dtype, scheme and block_size. `encode(scaled,
scheme)` knows the codes of every scheme. An odd last code has a byte of its own. ValueError for a scheme or block size
that `Quantization(scheme, block_size, double_quant)` refuses, a tensor that is not floating-point or is empty, NaN and
infinity. With double_quant, return what `quantize_scales` makes of it (exercise 13). The weight may require gradients,
what is stored does not. You need not cut the weight into pieces.""",
    hints=(
        "(scaled * 7).round() rounds halves to the even number. A byte is 16 · high + low; << 4 and >> 4 move by one "
        "half, & 15 keeps the low one. codes[::2] is every second code.",
        "F.pad(flat, (0, -n % block_size)) fills the last block with zeros, which change no absmax; cut the result "
        "back to n. clamp(min=TINY) makes division by a scale of zero safe. NaN and infinity reach the scales, so "
        "isfinite on those is enough.",
        "quantize: make a Quantization; check dtype and numel; flat = weight.detach().reshape(-1); scaled, absmax = "
        "scale_to_unit(flat, block_size); check isfinite; codes = encode(scaled, scheme), with one zero appended to "
        "scaled if n is odd; QuantizedTensor(pack_codes(codes), absmax, scheme, block_size, tuple(weight.shape), "
        "weight.dtype).",
    ),
    question="One weight in a block becomes thirty times as large. What happens to the other weights of its block, "
    "what to those of other blocks, and what would a scale for the whole tensor have done?",
    answer="The scale of its block becomes up to thirty times as large, so the others fall within a thirtieth of "
    "the range: with int4, whose levels are 1/7 apart, all of them become zero. Other blocks do not notice. One "
    "scale for the whole tensor would have set nearly every weight to zero. Blocks limit the harm of an outlier to "
    "its neighbours; that is what they cost bytes for.",
    spoilers=(
        "absmax = w.abs().max()",
        "codes = ((w / absmax * 7).round() + 8)",
        "packed = codes[::2] * 16 + codes[1::2]",
        "unpacked = torch.stack([packed // 16, packed % 16]",
        "again = absmax * ((unpacked - 8) / 7)",
        "scaled = (blocks / blocks.abs().amax(1",
        "return torch.cat([packed // 16, packed % 16])",
    ),
)
SMALL = (2, 3, 5)  # the numbers in a block of the first cases


@EXERCISE.property("int4_levels: (code - 8) / 7, sixteen of them")
def sixteen(draw: Draw):
    code = torch.arange(16).double()
    slips = {
        "divide by 7 and not by 8: the largest level is 1": (code - 8) / 8,
        "zero must be a level: the levels are sevenths, and code 8 is zero": (code - 7.5) / 7.5,
        "the offset is missing: code 8 is zero": code / 7,
        "code 8 is zero, and not code 7": (code - 7) / 7,
        "the levels are in units of the scale: divide by 7": code - 8,
    }
    found = int4_levels()
    expect(found, ((code - 8) / 7).float(), {}, {k: v.float() for k, v in slips.items()}, "the levels", 1e-6)
    require(found.dtype == torch.float32, f"expected float32, got {found.dtype}")


def sevenths(draw: Draw, n: int) -> tuple[Tensor, Tensor]:
    """n numbers within ±1, each at most 0.4 of a step from k/7, and these k, int64."""
    k = torch.tensor([draw.integer(-6, 6) for _ in range(n)])
    k[0] = -k[0].abs().clamp(min=1)  # below zero, where cutting off and rounding down differ
    off = torch.tensor([draw.number(-0.4, 0.4) for _ in range(n)])
    return (k + off) / 7, k


@EXERCISE.property("int4_codes: the nearest level's code, 1 to 15; halfway, the even one")
def nearest_code(draw: Draw):
    for n in (2, 4, 12):
        scaled, k = sevenths(draw, n)
        scaled, k = torch.cat([scaled, torch.tensor([1.0, -1.0])]), torch.cat([k, torch.tensor([7, -7])])
        slips = {
            "round to the nearest, and do not cut the digits off": (scaled * 7).trunc().long() + 8,
            "round to the nearest, and not down": (scaled * 7).floor().long() + 8,
            "the levels are sevenths, and not eighths": ((scaled * 8).round().long() + 8) % 256,
            "the offset is missing: code 8 is zero": k % 256,
            "code 8 is zero, and not code 7": k + 7,
            "the levels are sevenths around zero, and not fifteenths from -1 on": ((scaled + 1) * 7.5).round().long(),
        }
        codes = int4_codes(scaled)
        expect(codes, (k + 8).to(torch.uint8), {"scaled": scaled}, slips, "codes", 0)
        require(codes.dtype == torch.uint8, f"expected codes in uint8, got {codes.dtype}", {"scaled": scaled})
    halves = torch.tensor([0.5, -0.5])  # 3.5 sevenths
    slips = {
        "floor(x + 0.5) rounds halves up; 3.5 goes to 4 and -3.5 to -4": torch.tensor([12, 5]),
        "halves go to the even number, 3.5 to 4 and -3.5 to -4": torch.tensor([11, 5]),
    }
    expect(int4_codes(halves), torch.tensor([12, 4]), {"scaled": halves}, slips, "codes", 0)


def some_codes(draw: Draw, n: int) -> list[int]:
    return [draw.integer(0, 15) for _ in range(n)]


def two_by_two(high: list[int], low: list[int]) -> Tensor:
    return torch.tensor([16 * a + b for a, b in zip(high, low, strict=True)])


@EXERCISE.property("pack_codes: two codes in a byte, the first in the high half")
def packing(draw: Draw):
    for pairs in (1, 2, 3, 20):
        codes = [*some_codes(draw, 2 * pairs - 2), *draw.choice(((1, 14), (12, 3), (9, 6)))]
        first, second = codes[::2], codes[1::2]
        slips = {
            "the halves are swapped: the first code is the high one": two_by_two(second, first),
            "neighbours share a byte; you pack the first half of all codes with the second": (
                two_by_two(codes[:pairs], codes[pairs:])
            ),
            "the first code must move up by four bits, << 4": (
                torch.tensor([a | b for a, b in zip(first, second, strict=True)])
            ),
        }
        given = torch.tensor(codes, dtype=torch.uint8)
        found = pack_codes(given)
        expect(found, two_by_two(first, second).to(torch.uint8), {"codes": given}, slips, "the bytes", 0)
        require(found.dtype == torch.uint8, f"expected bytes, uint8, got {found.dtype}", {"codes": given})
        require(given.tolist() == codes, "the codes were changed in place", {"codes": codes})


@EXERCISE.property("unpack_codes: the inverse, with the dtype it was given")
def unpacking(draw: Draw):
    for pairs, dtype in ((1, torch.uint8), (2, torch.uint8), (2, torch.int64), (20, torch.int64)):
        codes = [*some_codes(draw, 2 * pairs - 2), *draw.choice(((1, 14), (12, 3), (9, 6)))]
        first, second = codes[::2], codes[1::2]
        given = two_by_two(first, second).to(dtype)
        swapped = [code for pair in zip(second, first, strict=True) for code in pair]
        slips = {
            "the halves are swapped: the high half is the first code": torch.tensor(swapped),
            "the two codes of a byte are neighbours: stack them, one beside the other": torch.tensor(first + second),
            "the high half must move down by four bits, >> 4": torch.tensor(
                [code for a, b in zip(first, second, strict=True) for code in (16 * a, b)]
            ),
            "of the second code only four bits belong to it: & 15": torch.tensor(
                [code for a, b in zip(first, second, strict=True) for code in (a, 16 * a + b)]
            ),
        }
        found = unpack_codes(given)
        expect(found, torch.tensor(codes), {"packed": given}, slips, "the codes", 0)
        require(found.dtype == dtype, f"expected the dtype it was given, {dtype}, got {found.dtype}", {"packed": given})


def by_blocks(flat: Tensor, size: int, scale) -> Tensor:
    return torch.cat([block / scale(block) for block in flat.float().split(size)])


def absmax_of(flat: Tensor, size: int) -> Tensor:
    return torch.tensor([max(abs(value) for value in block.tolist()) for block in flat.float().split(size)])


@EXERCISE.property("scale_to_unit: every block over its largest magnitude, the last one short")
def blockwise(draw: Draw):
    for size in SMALL:
        lengths = 2 * size, 2 * size + draw.integer(1, size - 1), draw.integer(1, size - 1)
        for n, kind in zip(lengths, (torch.float32, torch.bfloat16, torch.float64), strict=True):
            flat = draw.normal(n, dtype=kind)
            flat[::size] = -flat[::size].abs() - 2.5  # the largest of each block, and negative
            before, whole = flat.clone(), n // size * size
            right, absmax = by_blocks(flat, size, lambda block: block.abs().max()), absmax_of(flat, size)
            filled = torch.cat([right, torch.zeros(-n % size)])
            slips = {
                "absmax is the largest magnitude: take abs() before the maximum": by_blocks(flat, size, torch.max),
                "each block has a scale of its own; you take one for all": flat.float() / flat.float().abs().max(),
                "the last, short block is missing": right[:whole],
                "the zeros that fill the last block up must be cut off again": filled,
                "flat again: (n,), and not one row for each block": filled.view(-1, size),
                "the block is not scaled: divide by its absmax": flat.float(),
                "that is scaled by the block's norm; its largest magnitude is asked for": (
                    by_blocks(flat, size, torch.linalg.vector_norm)
                ),
            }
            case = {"flat": flat, "block_size": size}
            scaled, scales = scale_to_unit(flat, size)
            require(torch.equal(flat, before), "flat was changed in place", {"flat": before, "block_size": size})
            kinds = scaled.dtype == scales.dtype == torch.float32
            require(kinds, f"expected float32 twice, got {scaled.dtype} and {scales.dtype}", case)
            expect(scaled, right, case, slips, "scaled", 1e-6)
            slips = {
                "the scales are the factors' inverse: absmax itself is returned": 1 / absmax,
                "one scale for each block, (N,), and not a column": absmax[:, None],
                "one scale for each block, and not for each weight": absmax.repeat_interleave(size)[:n],
            }
            expect(scales, absmax, case, slips, "absmax", 1e-6)


@EXERCISE.property("scale_to_unit: a block of zeros stays zero, a short one too")
def zeros(draw: Draw):
    for size in SMALL:
        flat = torch.cat([draw.normal(size, dtype=torch.float32) + 3, torch.zeros(size + draw.integer(1, size - 1))])
        case = {"flat": flat, "block_size": size}
        scaled, scales = scale_to_unit(flat, size)
        slip = "0 / 0: a scale of zero must not divide; clamp(min=TINY) before"
        require(scaled.isfinite().all().item(), f"expected numbers, got {show(scaled)}", case, slip)
        require(not scaled[size:].any(), f"expected zeros for the blocks of zeros, got {show(scaled[size:])}", case)
        tiny = len(scales) == 3 and (scales[1:].abs() < 1e-30).all().item()
        require(tiny, f"expected three scales, the last two 0 or below 1e-30, got {show(scales)}", case)


def rounded_to_int4(draw: Draw, n: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (n,), its int4 codes and its scales, built from the codes."""
    scaled, k = sevenths(draw, n)
    sign = torch.tensor([draw.choice((-1, 1)) for _ in range(math.ceil(n / size))])
    scaled[::size], k[::size] = sign.float(), 7 * sign  # the largest of each block
    scales = torch.tensor([draw.number(0.2, 5) for _ in sign])
    return scaled * scales.repeat_interleave(size)[:n], k + 8, scales


def check_stored(found, codes: Tensor, scales: Tensor, case: dict):
    """codes (n,) int64; an odd one is followed by a half byte that may hold anything."""
    n = len(codes)
    size = tuple(found.codes.shape)
    slips = {
        "an odd last code has a byte of its own: fill up with a zero": (n // 2,),
        "two codes in each byte: pack them": (n,),
        "block by block filled up with zeros? n codes are kept and no more": (len(scales) * case["block_size"] // 2,),
    }
    expect(size, (-(-n // 2),), case, slips, "shape of codes", 0)
    require(found.codes.dtype == torch.uint8, f"expected codes in uint8, got {found.codes.dtype}", case)
    halves = [half for byte in found.codes.tolist() for half in (byte // 16, byte % 16)]
    swapped = [half for byte in found.codes.tolist() for half in (byte % 16, byte // 16)]
    slip = "the halves of the bytes are swapped" if swapped[:n] == codes.tolist() else ""
    wrong = sum(a != b for a, b in zip(halves, codes.tolist(), strict=False))
    first = next((i for i, (a, b) in enumerate(zip(halves, codes.tolist(), strict=False)) if a != b), 0)
    message = (
        f"{wrong} of {n} codes are wrong; the first is number {first}: expected {codes[first]}, got {halves[first]}"
    )
    require(not wrong, message, case, slip)
    expect(found.scales, scales, case, {}, "scales", 1e-6)


@EXERCISE.property("quantize: codes, scales and fields for a weight of any shape and dtype")
def stored(draw: Draw):
    kinds = torch.float32, torch.float64, torch.float16, torch.float32, torch.float64
    for shape, dtype in zip(((32,), (3, 12), (5, 7), (), (1, 3, 21)), kinds, strict=True):
        size = draw.choice((16, 32))
        flat, codes, scales = rounded_to_int4(draw, math.prod(shape), size)
        weight = flat.to(dtype).view(shape)
        if len(shape) == 2:  # the same numbers, stored column by column
            weight = weight.T.contiguous().T
        scales = absmax_of(weight.reshape(-1), size)
        weight, before = nn.Parameter(weight), weight.clone()
        case = {"shape": shape, "dtype": dtype, "scheme": "int4", "block_size": size}
        found = quantize(weight, "int4", size)
        require(isinstance(found, quant.QuantizedTensor), f"expected a QuantizedTensor, got {type(found).__name__}")
        require(torch.equal(weight, before), "the weight was changed in place", case)
        check_stored(found, codes, scales, case)
        for name, value in {"scheme": "int4", "block_size": size, "shape": shape, "dtype": dtype}.items():
            got = getattr(found, name)
            require(got == value, f"expected the field {name} to be {value!r}, got {got!r}", case)
        plain = found.nested_scales is None and found.nested_offset is None
        require(plain, "expected no nested_scales and no nested_offset without double_quant", case)
        slip = "what is stored is no function of the weight any more: weight.detach()"
        require(not found.scales.requires_grad, "the scales require a gradient", case, slip)


@EXERCISE.property(
    "quantize: the scheme decides on the codes, and quantize_scales on what double_quant is", inside=True
)
def other_ways(draw: Draw):
    def nearest(scaled: Tensor, table: Tensor) -> Tensor:  # in place of exercise 12's
        return (scaled[:, None] - table).abs().argmin(1).to(torch.uint8)

    weight = torch.cat([torch.tensor([1.0]), draw.normal(39, dtype=torch.float32).clamp(-0.9, 0.9)])
    case = {"shape": (40,), "scheme": "fp4", "block_size": 64}
    with mock.patch.object(levels, "nearest", nearest), mock.patch.object(quant, "nearest", nearest):
        found = quantize(weight, "fp4", 64)
    halves = [half for byte in found.codes.tolist() for half in (byte // 16, byte % 16)]
    off = (levels.fp4_levels()[halves] - weight).abs() - (levels.fp4_levels() - weight[:, None]).abs().amin(1)
    int4 = ((weight * 7).round() + 8).int().tolist() == halves
    slip = "those are int4's codes: encode(scaled, scheme) knows those of every scheme" if int4 else ""
    require(off.max().item() < 1e-6, "expected the codes of fp4's nearest levels, got others", case, slip)

    case = {"shape": (40,), "scheme": "int4", "block_size": 16, "double_quant": True}
    with mock.patch.object(quant, "quantize_scales", lambda plain: ("made of", plain)):
        twice, plain = quantize(weight, "int4", 16, True), quantize(weight, "int4", 16)
    handed_on = isinstance(twice, tuple) and twice[0] == "made of" and torch.equal(twice[1].codes, plain.codes)
    slip = "double_quant is ignored, or done by hand: return quantize_scales(quantized)"
    require(handed_on, "expected what quantize_scales makes of the quantized weight", case, slip)


@EXERCISE.property("quantize: refuses NaN and infinity, integers, nothing at all, and settings that do not exist")
def refused(draw: Draw):
    for value in (math.nan, math.inf, -math.inf):
        for place in (draw.integer(0, 31), 35):  # in a whole block and in the short last one
            weight = draw.normal(37, dtype=torch.float32)
            weight[place] = value
            case = {"shape": (37,), "block_size": 16, f"weight[{place}]": value}
            slip = "a block with NaN or infinity in it has no finite absmax: check the scales"
            expect_error(lambda weight=weight: quantize(weight, "int4", 16), (), case, slip)
    whole = torch.ones(32, dtype=torch.int64)
    expect_error(lambda: quantize(whole, "int4", 16), (), {"dtype": torch.int64}, "weight.is_floating_point()")
    expect_error(lambda: quantize(torch.empty(0, 3), "int4", 16), (), {"shape": (0, 3)}, "weight.numel() is 0")
    slip = "Quantization(scheme, block_size, double_quant) raises for both"
    expect_error(lambda: quantize(torch.ones(32), "int4", 24), ("block_size",), {"block_size": 24}, slip)
    expect_error(lambda: quantize(torch.ones(32), "int5", 16), ("scheme",), {"scheme": "int5"}, slip)
