"""Exercise 13: the scales of 4-bit blocks, rounded to 8 bits themselves."""

from functools import partial

import torch
from torch import Tensor

from minilora.exercises.checking import Draw, Exercise, expect, require
from minilora.levels import SCALE_LEVELS
from minilora.quant import QuantizedTensor, quantize_scales

EXERCISE = Exercise(
    number=13,
    slug="double_quantization",
    title="Double quantization",
    targets=("quant:quantize_scales", "quant:QuantizedTensor.absmax"),
    difficulty=2,
    minutes=35,
    notebook="03_qlora",
    section="5. Double quantization",
    explanation="""\
A weight in 4 bits keeps one float32 scale, the absmax, for every block of 64: half a bit per weight. QLoRA (Dettmers et
al. 2023, section 3) rounds the N scales too, to one of the 256 levels of `SCALE_LEVELS` (sorted, from -0.99 to 1). All
scales are positive, so half of the levels would lie idle; hence their mean is taken off first:

    offset = mean of the scales                                        float32 ()
    rest   = scales - offset                                           (N,)
    nested = largest |rest| of each 256 neighbours                     float32 (ceil(N/256),), the last may be short
    code   = index of the level nearest to rest / nested               uint8 (N,)

`quantize_scales` returns a new QuantizedTensor with these as `nested_offset`, `nested_scales` and `scales`, and all
else as it was (`dataclasses.replace` does that); the one given stays as it is.

`absmax` is the way back, float32 (N,):

    absmax ≈ level[code] · nested of its block of 256 + offset

Without double quantization (`nested_scales` is None) the absmax are the `scales`. Available: `SCALE_BLOCK`,
`scale_to_unit` (exercise 11) and `nearest` (exercise 12). Nothing is demanded of how you use them.""",
    hints=(
        "quantize_scales is for scales what quantize is for weights: blocks, the largest magnitude of each, the "
        "nearest level. Only the mean is new, and the last block may be short of 256.",
        "scale_to_unit(flat, 256) gives the rest over its block's largest, and the largest of each block. In absmax "
        "every nested scale belongs to 256 neighbours: repeat_interleave, cut to N. Codes index as .int(), not uint8.",
        "offset = scales.mean(); scaled, nested = scale_to_unit(scales - offset, SCALE_BLOCK); the codes are "
        "nearest(scaled, SCALE_LEVELS); then replace(quantized, scales=..., nested_scales=..., nested_offset=...). "
        "Back: SCALE_LEVELS[scales.int()] times the repeated nested scales, plus the offset.",
    ),
    question="What would happen to the error of the scales if the mean were not taken off, and why? Which levels would "
    "never be used?",
    answer="Scales are absolute maxima, so all are positive. Their 8-bit levels reach from -1 to 1 times the "
    "largest: without the mean taken off, the negative half of the levels would never be used, and as all scales lie "
    "around a mean that is large beside their spread, most of the positive half neither. The error would be several "
    "times as large. With the mean taken off both halves are in use, and the range is that of the spread.",
)
EACH = 256  # scales with a nested scale in common


def stored(draw: Draw, N: int, scales: Tensor, nested=None, offset=None) -> QuantizedTensor:
    """A weight of N blocks of 16, put together by hand from random codes."""
    codes = torch.randint(0, 256, (8 * N,), generator=draw.generator, dtype=torch.uint8)
    return QuantizedTensor(codes, scales, "fp4", 16, (N, 16), torch.bfloat16, nested, offset)


def plain(draw: Draw, N: int) -> QuantizedTensor:
    """Scales from 0.01 to 0.1 and one of 0.15, or the mirror image; twice and three times that in the next blocks."""
    scales = 0.01 + 0.09 * torch.rand(N, generator=draw.generator)
    scales[draw.integer(0, min(N, EACH) - 1)] = 0.15
    if draw.choice((True, False)):
        scales = 0.16 - scales
    return stored(draw, N, scales * (1 + torch.arange(N) // EACH))


def double(draw: Draw, N: int) -> QuantizedTensor:
    """Codes, nested scales and offset, each drawn by itself."""
    codes = torch.randint(0, 256, (N,), generator=draw.generator, dtype=torch.uint8)
    nested = 0.05 + draw.normal(-(-N // EACH), dtype=torch.float32).abs()
    return stored(draw, N, codes, nested, torch.tensor(draw.number(1, 3)))


def sizes(draw: Draw) -> list[int]:
    """Numbers of blocks, the smallest first: one short block of scales, two whole ones, a third that is short."""
    return [draw.integer(3, 4), draw.integer(5, 12), draw.integer(100, 255), 512, draw.integer(540, 767)]


def largest(values: Tensor, size: int = EACH) -> Tensor:
    """The largest magnitude of each block."""
    return torch.stack([block.abs().max() for block in values.split(size)])


def told(quantized: QuantizedTensor) -> dict:
    names = ("scales", "nested_scales", "nested_offset")
    return {name: value for name in names if (value := getattr(quantized, name)) is not None}


def float32(tensor, what: str, case: dict):
    require(isinstance(tensor, Tensor), f"{what}: expected a tensor, got {tensor!r}", case)
    require(tensor.dtype == torch.float32, f"{what}: expected float32, got {tensor.dtype}", case)


def places(values: Tensor) -> Tensor:
    """The index of the nearest of the 256 levels, int64."""
    return (values[:, None] - SCALE_LEVELS.double()).abs().min(1).indices


@EXERCISE.property("absmax: without double quantization, the scales themselves")
def scales_themselves(draw: Draw):
    for N in sizes(draw):
        quantized = plain(draw, N)
        expect(quantized.absmax(), quantized.scales, told(quantized), what="absmax", tolerance=0)


@EXERCISE.property("absmax: level[code] · nested scale + offset, float32, a nested scale for each 256 codes")
def way_back(draw: Draw):
    for N in sizes(draw):
        quantized = double(draw, N)
        codes, nested, offset = (value.double() for value in told(quantized).values())
        level = SCALE_LEVELS.double()[codes.long()]
        block = torch.tensor([i // EACH for i in range(N)])
        turns = torch.tensor([i % len(nested) for i in range(N)])
        slips = {
            "the offset is not added: the mean was taken off": level * nested[block],
            "the offset is scaled with the level; it was taken off before, so it is added last": (
                (level + offset) * nested[block]
            ),
            "the offset is taken off a second time; add it": level * nested[block] - offset,
            "the nested scales are missing: each level is a multiple of its block's": level + offset,
            "the first nested scale serves all; each 256 neighbours have one of their own": level * nested[0] + offset,
            "the nested scales take turns; each serves 256 neighbours": level * nested[turns] + offset,
            "you divide by the nested scale; multiply": level / nested[block] + offset,
            "the code is not a level; look it up in SCALE_LEVELS": codes * nested[block] + offset,
            "the code over 255 is not a level; look it up in SCALE_LEVELS": codes / 255 * nested[block] + offset,
        }
        found, case = quantized.absmax(), {"N": N, **told(quantized)}
        expect(found, level * nested[block] + offset, case, slips, "absmax", tolerance=1e-5)
        float32(found, "absmax", case)


@EXERCISE.property("quantize_scales: nested_offset is the mean of all scales, float32 ()")
def offset_is_mean(draw: Draw):
    for N in sizes(draw):
        quantized = plain(draw, N)
        scales, case = quantized.scales.double(), told(quantized)
        found = quantize_scales(quantized)
        require(isinstance(found, QuantizedTensor), f"expected a QuantizedTensor, got {type(found).__name__}", case)
        means = torch.stack([block.mean() for block in scales.split(EACH)])
        slips = {
            "the offset is 0; take the mean off": torch.zeros(()),
            "the offset has a dimension; it is a single number, of shape ()": scales.mean()[None],
            "each 256 scales have a mean of their own in yours; take that of all": means,
            "that is the largest scale; take the mean": scales.max(),
            "that is the smallest scale; take the mean": scales.min(),
            "that is the median; take the mean": scales.median(),
        }
        expect(found.nested_offset, scales.mean(), case, slips, "nested_offset", tolerance=1e-5)
        float32(found.nested_offset, "nested_offset", case)


@EXERCISE.property("quantize_scales: nested_scales are the largest magnitude of what is left, one for each 256")
def nested(draw: Draw):
    for N in sizes(draw):
        quantized = plain(draw, N)
        scales, case = quantized.scales.double(), {"N": N, **told(quantized)}
        found = quantize_scales(quantized)
        rest = scales - scales.mean()
        above = torch.stack([block.max() for block in rest.split(EACH)])
        slips = {
            "the mean is not taken off before the largest is looked for": largest(scales),
            "one nested scale serves all; each 256 neighbours have one of their own": largest(rest, N),
            "the last block is short and has no nested scale in yours; it needs one too": largest(rest)[: N // EACH],
            "that is the largest, not the largest magnitude: below the mean the rest is negative": above,
            "the blocks are of the weight's block size; scales are in blocks of 256": largest(rest, 16),
            "the inverse is stored; store the largest magnitude": 1 / largest(rest),
        }
        expect(found.nested_scales, largest(rest), case, slips, "nested_scales", tolerance=1e-5)
        float32(found.nested_scales, "nested_scales", case)


@EXERCISE.property("quantize_scales: scales are the codes of the nearest of 256 levels, uint8")
def codes(draw: Draw):
    for N in sizes(draw):
        quantized = plain(draw, N)
        scales, case = quantized.scales.double(), {"N": N, **told(quantized)}
        found = quantize_scales(quantized).scales
        require(isinstance(found, Tensor), f"scales: expected a tensor, got {type(found).__name__}", case)
        slip = "store the codes, one byte each: .to(torch.uint8)"
        require(found.dtype == torch.uint8, f"expected scales of dtype uint8, got {found.dtype}", case, slip)
        require(found.shape == (N,), f"expected {N} codes, got shape {tuple(found.shape)}", case)
        rest = scales - scales.mean()
        unit, levels = rest / largest(rest)[torch.arange(N) // EACH], SCALE_LEVELS.double()
        # A value may be as near to two levels, but for the last digits: then either code will do.
        best = places(unit)
        near = (unit - levels[found.long()]).abs() <= (unit - levels[best]).abs() + 1e-5
        of_all = scales / largest(scales)[torch.arange(N) // EACH]
        slips = {
            "the mean is not taken off what is rounded": partial(places, of_all),
            "what is rounded is not divided by its block's nested scale": partial(places, rest),
            "what is rounded is divided by the first nested scale in every block": partial(
                places, rest / largest(rest)[0]
            ),
            "what is rounded is divided by the largest of all, not by its block's": partial(
                places, rest / largest(rest, N)
            ),
            "rounded as if the levels were evenly spaced; they are in SCALE_LEVELS": ((unit + 1) * 127.5).round().int(),
            "rounded to steps of 1/127; the 256 levels are in SCALE_LEVELS": (unit * 127 + 127).round().int(),
            "you take the level below, though the one above may be nearer": ((levels <= unit[:, None]).sum(1) - 1)
            % 256,
        }
        expect(found, torch.where(near, found.long(), best), case, slips, "the codes", tolerance=0)


@EXERCISE.property("quantize_scales: all else is as it was, and so is the QuantizedTensor that was given")
def all_else(draw: Draw):
    for N in sizes(draw):
        quantized = plain(draw, N)
        before = {name: value.clone() for name, value in quantized.tensors.items()}
        case = told(quantized) | {"scales": before["scales"]}
        found = quantize_scales(quantized)
        slip = "you change the QuantizedTensor that was given; return a new one, with dataclasses.replace"
        same = found is not quantized and quantized.nested_scales is None and quantized.nested_offset is None
        same = same and all(torch.equal(value, before[name]) for name, value in quantized.tensors.items())
        require(same, "expected the QuantizedTensor that was given to be as it was", case, slip)
        for name in ("scheme", "block_size", "shape", "dtype"):
            expect(getattr(found, name), getattr(quantized, name), case, what=name)
        expect(found.codes, quantized.codes, case, what="codes", tolerance=0)
