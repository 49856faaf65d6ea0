"""Exercise 12: the sixteen levels of NF4, and rounding to the nearest of a table."""

from statistics import NormalDist

import torch
from torch import Tensor

from minilora.exercises.checking import SIZES, Draw, Exercise, expect, require
from minilora.levels import nearest, nf4_levels

EXERCISE = Exercise(
    number=12,
    slug="nf4",
    title="NF4: levels where weights are",
    targets=("levels:nf4_levels", "levels:nearest"),
    difficulty=2,
    minutes=40,
    notebook="03_qlora",
    section="3. Where the levels lie",
    explanation="""\
Four bits choose one of sixteen levels between -1 and 1. Trained weights are nearly normal, so NF4 ("normal float",
Dettmers et al. 2023, appendix E) puts its levels at quantiles of the standard normal: dense near zero, where weights
are many. The quantile Q(p) is the number below which a normal number falls with probability p; Q(1/2) = 0 and Q(1) is
infinite.

    above   Q(p) for 8 probabilities p in equal steps above 1/2, the last of them P = 0.9677083
    below   -Q(p) for 7 probabilities p in equal steps above 1/2, the last of them P as well
    levels  below, 0 and above in ascending order, all divided by Q(P), the largest      (16,) float32

So the steps are (P - 1/2)/8 above and (P - 1/2)/7 below, and the levels reach from -1 to 1. `nf4_levels` returns that
table. The module has `normal_quantile(probability)` for Q, of a tensor.

`nearest(scaled, levels)` rounds to a table: for each of scaled (n,) the index of the nearest of the sorted levels,
uint8 (n,). A value exactly halfway between two levels gets the lower one; one beyond the ends gets the end. It serves
any ascending table of 2 to 256 levels. Between two neighbours the border is their midpoint, so the code is the number
of midpoints below the value. Neither argument is changed.""",
    hints=(
        "nf4_levels: torch.linspace makes equal steps. From P down to 1/2 in 9 points, and without the 1/2, are the 8 "
        "probabilities; the same with 8 points gives the 7. nearest: write down the midpoints of neighbouring levels.",
        "nf4_levels: put the 7 negated quantiles, a zero and the 8 quantiles into one tensor, sort it, divide by its "
        "largest. nearest: torch.bucketize(values, borders) counts borders below each value, ties included as asked.",
        "above = normal_quantile(torch.linspace(P, 1/2, 9)[:8]); below = -normal_quantile(torch.linspace(P, 1/2, "
        "8)[:7]); torch.cat with a zero, .sort().values, over .max(). The midpoints are half the sum of levels[:-1] "
        "and levels[1:]; bucketize gives int64, so end with .to(torch.uint8).",
    ),
    question="Q(p) is symmetric around p = 1/2. Why does NF4 take 8 levels above zero and 7 below, and what would be "
    "lost with 8 on either side?",
    answer="There are sixteen codes, and zero should be exact, for padding and for weights that are pruned: with "
    "zero among the levels 15 are left, and 15 is odd. The eighth goes above, by a convention. With 8 on either side "
    "zero would not be a level, the smallest weights, which are the most, would be pushed to one side or the other, "
    "and a tensor of zeros would not stay one.",
    spoilers=(
        "quantile = statistics.NormalDist().inv_cdf",
        "above = [quantile(",
        "below = [-quantile(",
        "nf4 = torch.tensor(sorted(",
    ),
)
NORMAL, LAST = NormalDist(), 0.9677083  # the probability of the outermost levels


# The table to ten digits, and what some mistakes make of it: no formula here gives the exercise away.
RIGHT = torch.tensor(
    [
        -1,
        -0.6961928906,
        -0.5250730387,
        -0.3949174907,
        -0.2844413576,
        -0.1847734352,
        -0.09104999214,
        0,
        0.07958032909,
        0.1609301727,
        0.2461122939,
        0.3379151935,
        0.4407098024,
        0.5626169701,
        0.7229567279,
        1,
    ],
    dtype=torch.float64,
)
OF_31_32 = torch.tensor(
    [
        -1,
        -0.6934942159,
        -0.5225630032,
        -0.3928681828,
        -0.2829017987,
        -0.1837497148,
        -0.09053941965,
        0,
        0.07913367683,
        0.1600350636,
        0.2447662616,
        0.3361186993,
        0.4384771795,
        0.5600152559,
        0.7202957466,
        1,
    ],
    dtype=torch.float64,
)
OF_29_30 = torch.tensor(
    [
        -1,
        -0.6988065532,
        -0.5275172286,
        -0.3969177609,
        -0.2859459772,
        -0.1857746377,
        -0.09154952009,
        0,
        0.08001733157,
        0.1618056983,
        0.2474281961,
        0.3396699667,
        0.4428874636,
        0.5651481095,
        0.7255307784,
        1,
    ],
    dtype=torch.float64,
)
OF_DENSITY = torch.tensor(
    [
        -0.9953118957,
        -0.9561855216,
        -0.9145054713,
        -0.8707462823,
        -0.8253879527,
        -0.7789073436,
        -0.7317700779,
        0,
        0.7317700779,
        0.773041722,
        0.8138545739,
        0.8538985402,
        0.8928557946,
        0.9304048375,
        0.9662248126,
        1,
    ],
    dtype=torch.float64,
)
OF_DISTRIBUTION = torch.tensor(
    [
        -1,
        -0.9793286371,
        -0.9573752707,
        -0.9341642072,
        -0.9097326669,
        -0.8841309815,
        -0.8574225637,
        0,
        0.8540098541,
        0.8775548716,
        0.900266039,
        0.922098159,
        0.9430136649,
        0.9629826891,
        0.9819830272,
        1,
    ],
    dtype=torch.float64,
)


@EXERCISE.property("nf4_levels: sixteen finite float32 numbers, zero among them")
def sixteen(draw: Draw):
    levels = nf4_levels()
    if tuple(getattr(levels, "shape", ())) != (16,):
        slips = {
            "8 levels above zero and 7 below: a side of yours lacks one, or the zero is missing": torch.zeros(15),
            "8 above, 8 below and a zero are seventeen, one more than four bits can tell apart: 7 below": torch.zeros(
                17
            ),
        }
        found = torch.zeros(levels.shape) if isinstance(levels, Tensor) else levels
        expect(found, torch.zeros(16), None, slips, "the table")
    require(levels.dtype == torch.float32, f"expected float32, got {levels.dtype}")
    case = {"levels": [round(x, 3) for x in levels.tolist()]}
    slip = "at a probability of 0 or 1 the quantile is infinite: the last probability is 0.9677083"
    require(bool(levels.isfinite().all()), "expected finite numbers only", case, slip)
    slip = "8 above and 8 below leave no room for zero, and a weight of zero should stay zero: 7 below, 0, 8 above"
    smallest = levels.abs().min().item()
    require(smallest < 1e-7, f"expected 0 among the levels; the one nearest to it is {smallest:.3g}", case, slip)


@EXERCISE.property(
    "nf4_levels: quantiles of the normal distribution in equal steps of probability, sorted, the largest 1"
)
def quantiles(draw: Draw):
    levels, right = nf4_levels(), RIGHT
    zeros = int((levels.abs() < 1e-7).sum())
    slip = "linspace from 1/2 counts 1/2 itself, whose quantile is 0: take one point more, and leave it out"
    case = {"levels": [round(x, 3) for x in levels.tolist()]}
    require(zeros == 1, f"expected one zero among the levels, got {zeros}", case, slip)
    mirrored = torch.cat([-right[8:15].flip(0), right[7:]])
    even = torch.tensor([k / 7 for k in range(-7, 0)] + [k / 8 for k in range(9)])
    slips = {
        "these are the levels, but not in ascending order: a level's code is its place in it": right[
            levels.argsort().argsort()
        ],
        "your levels are quantiles, but not yet from -1 to 1: divide them by the largest": right * NORMAL.inv_cdf(LAST),
        "your levels are evenly spaced; the probabilities should be, and the levels their quantiles": even,
        "evenly spaced from -1 to 1 is int4's way; here the probabilities are even": torch.linspace(-1, 1, 16),
        "yours has 8 levels below zero and 7 above; it is 7 below and 8 above": -right.flip(0),
        "that is the normal density; the quantile is the inverse of the distribution function": OF_DENSITY,
        "that is the normal distribution function; the quantile is its inverse": OF_DISTRIBUTION,
        "below zero you take 7 of the 8 steps from above; take 7 larger ones, which reach 0.9677083": mirrored,
        "your last probability is 1 - 1/32; it is 0.9677083": OF_31_32,
        "your last probability is 1 - 1/30; it is 0.9677083": OF_29_30,
    }
    expect(levels, right, {"your levels": [round(x, 3) for x in levels.tolist()]}, slips, "the table", tolerance=1e-6)


def ladder(draw: Draw, least: int, most: int) -> Tensor:
    """An ascending table, all its entries multiples of 1/16: midpoints are exact, whatever the order of operations."""
    return (draw.normal(129).argsort()[: draw.integer(least, most)].sort().values - 64) / 16


def by_hand(scaled: Tensor, levels: Tensor) -> Tensor:
    """For each value the place of the nearest level, in Python, number by number; of two as near, the lower."""
    distances = [[abs(level - x) for level in levels.tolist()] for x in scaled.tolist()]
    return torch.tensor([row.index(min(row)) for row in distances], dtype=torch.uint8)


def check(scaled: Tensor, levels: Tensor, case: dict, slips: dict):
    expected = by_hand(scaled, levels)
    codes = nearest(scaled, levels)
    require(isinstance(codes, Tensor), f"expected a tensor, got {type(codes).__name__}", case)
    floats = "a code is the index of a level, not the level itself"
    slip = floats if codes.is_floating_point() else "a code fits in a byte: end with .to(torch.uint8)"
    require(codes.dtype == torch.uint8, f"expected codes of dtype uint8, got {codes.dtype}", case, slip)
    expect(codes, expected, case, slips, "the codes", tolerance=0)


@EXERCISE.property("nearest: the code of the nearest level, uint8, for any ascending table")
def nearest_level(draw: Draw):
    for most in (3, 6, 16, 60):
        levels = ladder(draw, 3, most)
        n = draw.integer(10, 12)
        low, high = levels[0].item(), levels[-1].item()
        inside = low + torch.rand(n, generator=draw.generator) * (high - low)
        scaled = ((inside * 32).floor() * 2 + 1) / 64  # odd multiples of 1/64: never on a level or a midpoint
        last = len(levels) - 1
        lower = torch.tensor([sum(level <= x for level in levels.tolist()) - 1 for x in scaled.tolist()]).clamp(min=0)
        slips = {
            "you count levels below the value and take the next one up; count midpoints": (lower + 1).clamp(max=last),
            "you take the level below, though the one above may be nearer; count midpoints": lower,
            "your codes are one too large": by_hand(scaled, levels).int() + 1,
            "your codes are rounded as if the levels were evenly spaced": (
                ((scaled - low) / (high - low) * last).round().clamp(0, last)
            ).int(),
            "you count from the largest level down": last - by_hand(scaled, levels).int(),
        }
        check(scaled, levels, {"scaled": scaled, "levels": levels}, slips)


@EXERCISE.property("nearest: beyond the ends of the table it is the first or the last level")
def beyond(draw: Draw):
    for most in SIZES:
        levels = ladder(draw, 2, most)
        far = 1 / 16 + torch.rand(2, generator=draw.generator) * 20
        scaled = torch.stack([levels[0] - far[0], levels[-1] + far[1]])
        last = len(levels) - 1
        slips = {
            "a value above the last level gets a code that no level has": torch.tensor([0, len(levels)]),
            "a value above the last level gets the code below the last": torch.tensor([0, last - 1]),
            "a value below the first level gets the second": torch.tensor([1, last]),
            "a code of -1 has wrapped round: below the first level the code is 0": torch.tensor([255, last]),
        }
        check(scaled, levels, {"scaled": scaled, "levels": levels}, slips)


@EXERCISE.property("nearest: halfway between two levels the lower one; on a level that level")
def ties(draw: Draw):
    for most in SIZES:
        levels = ladder(draw, 3, most + 1)
        middles = levels[1:] - levels.diff() / 2
        check(levels.clone(), levels, {"scaled = levels": levels}, {})
        upper = torch.arange(1, len(levels))
        slips = {
            "halfway between two levels you take the upper one; it is the lower": upper,
            "halfway between two levels you take the even code; it is the lower": upper - upper % 2,
        }
        check(middles, levels, {"scaled (midpoints)": middles, "levels": levels}, slips)


@EXERCISE.property("nearest: 256 levels as well, many values, and nothing given is changed")
def many(draw: Draw):
    levels = torch.arange(256) / 128.0 - 1
    places = torch.randint(0, 256, (2000,), generator=draw.generator)
    scaled = levels[places] + (torch.rand(2000, generator=draw.generator) - 0.5) / 140
    scaled[:2], places[:2] = torch.tensor([-1.5, 1.5]), torch.tensor([0, 255])
    before = scaled.clone(), levels.clone()
    case = {"levels": 256, "values": 2000}
    codes = nearest(scaled, levels)
    unchanged = torch.equal(scaled, before[0]) and torch.equal(levels, before[1])
    require(unchanged, "expected scaled and levels to be as before", case, "you write into what was given")
    expect(codes, places.to(torch.uint8), case, what="the codes", tolerance=0)
