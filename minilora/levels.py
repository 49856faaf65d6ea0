"""Where the levels of a 4-bit number lie: int4, FP4 and NF4, each made by its formula; and the 8-bit levels of scales.

A table is indexed by code, 0 to 15, and its largest entry is 1 (for the scheme's own reasons int4 has a -8/7 that
nothing is rounded to). `quant.py` looks numbers up here and knows nothing else of a scheme.
"""

import torch
from torch import Tensor


def int4_levels() -> Tensor:
    """(code - 8) / 7: evenly spaced and symmetric, so that zero is a level. Code 0, -8/7, is never used."""
    return (torch.arange(16) - 8) / 7


def fp4_levels() -> Tensor:
    """The code's bits are s e e m: (-1)^s · (1 + m/2) · 2^(4 - e), or m/16 where e is 0; over 12, the largest.

    bitsandbytes' own: a larger e is a smaller number, and both zeros, codes 0 and 8, are positive.
    """
    levels = []
    for code in range(16):
        sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
        magnitude = (1 + mantissa / 2) * 2 ** (4 - exponent) if exponent else mantissa / 16
        levels.append(sign * magnitude / 12 + 0.0)  # + 0.0 turns -0.0 into 0.0
    return torch.tensor(levels)


def nf4_levels() -> Tensor:
    """Quantiles of the standard normal, 8 above zero and 7 below, with zero, over the largest (Dettmers 2023, app. E).

    Their probabilities are evenly spaced, from 1/2, where the quantile is 0, to 0.9677083 and not to 1, where it is
    infinite: halfway between 1 - 1/32 and 1 - 1/30, the middles of the last of 16 and of 15 equal slices.
    """
    last = 0.9677083
    above = normal_quantile(torch.linspace(last, 0.5, 9)[:-1])
    below = -normal_quantile(torch.linspace(last, 0.5, 8)[:-1])
    levels = torch.cat([below, torch.zeros(1), above]).sort().values
    return levels / levels.max()


def normal_quantile(probability: Tensor) -> Tensor:
    return torch.special.ndtri(probability.double()).float()  # in double, for the last digit of the published table


def scale_levels() -> Tensor:
    """The 256 levels of an 8-bit scale, sorted: 1, 2, 4, ... 64 in each of seven decades, each way, and 0 and 1.

    "Dynamic" quantization (Dettmers 2016, section 1.3.1): fine steps near 1, and still some left at a millionth.
    """
    decades = []
    for number in range(7):
        edges = torch.linspace(0.1, 1, 2**number + 1)
        decades.append(10 ** (number - 6) * ((edges[:-1] + edges[1:]) / 2))
    above = torch.cat(decades)
    return torch.cat([-above, above, torch.tensor([0.0, 1.0])]).sort().values


LEVELS = {"int4": int4_levels(), "fp4": fp4_levels(), "nf4": nf4_levels()}  # (16,) float32 each, by code
SCALE_LEVELS = scale_levels()  # (256,) float32
