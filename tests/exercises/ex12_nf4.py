"""Exercise 12: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "levels": """
from statistics import NormalDist


def quantiles(count, last):
    step = (last - 0.5) / count
    return [NormalDist().inv_cdf(0.5 + step * k) for k in range(1, count + 1)]


def nf4_levels():
    above, below = quantiles(8, 0.9677083), quantiles(7, 0.9677083)
    table = [-q for q in reversed(below)] + [0.0] + above
    return torch.tensor([level / above[-1] for level in table])


def nearest(scaled, levels):
    upper = torch.searchsorted(levels, scaled).clamp(1, len(levels) - 1)
    lower = upper - 1
    take_upper = levels[upper] - scaled < scaled - levels[lower]
    return torch.where(take_upper, upper, lower).to(torch.uint8)
"""
}

LINES = (
    "    take_upper = levels[upper] - scaled < scaled - levels[lower]\n"
    "    return torch.where(take_upper, upper, lower).to(torch.uint8)\n"
)
MUTANTS = [
    Mutant("no zero", ("quantiles(7, 0.9677083)", "+ [0.0] +"), ("quantiles(8, 0.9677083)", "+"), "no room for zero"),
    Mutant("seventeen", "quantiles(7, 0.9677083)", "quantiles(8, 0.9677083)", "are seventeen"),
    Mutant("zero forgotten", " + [0.0]", "", "the zero is missing"),
    Mutant("float64", "for level in table])", "for level in table], dtype=torch.float64)", "expected float32"),
    Mutant(
        "probabilities to 1",
        ("NormalDist().inv_cdf(0.5 + step * k)", "quantiles(8, 0.9677083), quantiles(7, 0.9677083)"),
        ("torch.special.ndtri(torch.tensor(0.5 + step * k)).item()", "quantiles(8, 1.0), quantiles(7, 1.0)"),
        "the quantile is infinite",
    ),
    Mutant("not sorted", "reversed(below)", "below", "not in ascending order"),
    Mutant("not divided by the largest", "level / above[-1]", "level", "divide them by the largest"),
    Mutant("8 below and 7 above", "above, below =", "below, above =", "8 levels below zero and 7 above"),
    Mutant("evenly spaced", "NormalDist().inv_cdf(0.5 + step * k)", "step * k", "your levels are evenly spaced"),
    Mutant(
        "density",
        ("inv_cdf(", "torch.tensor([level / above[-1] for level in table])"),
        ("pdf(", "torch.tensor(sorted(level / max(above) for level in table))"),
        "the normal density",
    ),
    Mutant("distribution function", "inv_cdf(", "cdf(", "the normal distribution function"),
    Mutant(
        "7 of the 8 steps",
        "quantiles(8, 0.9677083), quantiles(7, 0.9677083)",
        "quantiles(8, 0.9677083), quantiles(8, 0.9677083)[:7]",
        "you take 7 of the 8 steps from above",
    ),
    Mutant(
        "last of 1 - 1/32",
        "quantiles(8, 0.9677083), quantiles(7, 0.9677083)",
        "quantiles(8, 1 - 1 / 32), quantiles(7, 1 - 1 / 32)",
        "1 - 1/32",
    ),
    Mutant("the level below", LINES, "    return lower.to(torch.uint8)\n", "the one above may be nearer"),
    Mutant("the level above", LINES, "    return upper.to(torch.uint8)\n", "take the next one up"),
    Mutant(
        "evenly spaced codes",
        LINES,
        "    scaled = (scaled - levels[0]) / (levels[-1] - levels[0])\n"
        "    return (scaled * (len(levels) - 1)).round().clamp(0, len(levels) - 1).to(torch.uint8)\n",
        "as if the levels were evenly spaced",
    ),
    Mutant("int64", ".to(torch.uint8)", "", "end with .to(torch.uint8)"),
    Mutant("levels themselves", LINES, "    return levels[lower]\n", "the index of a level"),
    Mutant("upper on a midpoint", "- scaled < scaled", "- scaled <= scaled", "you take the upper one"),
    Mutant(
        "even code on a midpoint",
        "    take_upper = levels[upper] - scaled < scaled - levels[lower]\n",
        "    distance = (levels[upper] - scaled) - (scaled - levels[lower])\n"
        "    take_upper = (distance < 0) | (distance == 0) & (upper % 2 == 0)\n",
        "you take the even code",
    ),
    Mutant(
        "a border above the last level",
        LINES,
        "    borders = torch.cat([(levels[:-1] + levels[1:]) / 2, levels[-1:]])\n"
        "    return torch.bucketize(scaled, borders).to(torch.uint8)\n",
        "a code that no level has",
    ),
    Mutant(
        "a border below the first level",
        LINES,
        "    borders = torch.cat([levels[:1] - 1e-6, (levels[:-1] + levels[1:]) / 2])\n"
        "    return (torch.bucketize(scaled, borders) - 1).to(torch.uint8)\n",
        "wrapped round",
    ),
    Mutant(
        "clamped in place",
        "    lower = upper",
        "    scaled.clamp_(levels[0], levels[-1])\n    lower = upper",
        "you write",
    ),
    Mutant(
        "1/2 taken for a step",
        ("step = (last - 0.5) / count", "range(1, count + 1)"),
        ("step = (last - 0.5) / (count - 1)", "range(count)"),
        "counts 1/2 itself",
    ),
]
