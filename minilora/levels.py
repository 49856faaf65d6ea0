"""Where the levels of a 4-bit number lie, and how a number from -1 to 1 is rounded to one of them.

int4, FP4 and NF4 are tables of sixteen levels, each made by its formula and indexed by code; the largest level is 1.
Double quantization rounds the scales to a table of 256. All that `quant.py` knows of a scheme it looks up here.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache

import torch
from torch import Tensor


def int4_levels() -> Tensor:
    """(code - 8) / 7: evenly spaced and symmetric, so that zero is a level. Code 0, -8/7, is never used."""
    return (torch.arange(16) - 8) / 7


def fp4_levels() -> Tensor:
    """The code's bits are s e e m: (-1)^s · (1 + m/2) · 2^(4 - e) / 12, or (-1)^s · m/16 / 12 where e is 0. As in
    bitsandbytes, a larger e is a smaller number, 12 is the largest magnitude, and codes 0 and 8 are both 0.0."""
    code = torch.arange(16)
    s, e, m = code >> 3, code >> 1 & 3, code & 1
    magnitude = torch.where(e > 0, (1 + m / 2) * 2 ** (4 - e), m / 16)
    return (1 - 2 * s) * magnitude / 12 + 0.0  # + 0.0 turns -0.0 into 0.0


def nf4_levels() -> Tensor:
    """Quantiles of the standard normal, 8 above zero, 7 below, and zero, over the largest (Dettmers 2023, app. E).

    Their probabilities are evenly spaced between 1/2, where the quantile is 0, and 0.9677083, short of 1, where it is
    infinite: halfway between 1 - 1/32 and 1 - 1/30, the middles of the last of 16 and of 15 equal slices."""
    last = 0.9677083
    above, below = (normal_quantile(torch.linspace(last, 0.5, count + 1)[:-1]) for count in (8, 7))
    levels = torch.cat([-below, torch.zeros(1), above]).sort().values
    return levels / levels.max()


def normal_quantile(probability: Tensor) -> Tensor:
    return torch.special.ndtri(probability.double()).float()  # in double, for the last digit of the published table


def scale_levels() -> Tensor:
    """The 256 levels of an 8-bit scale, sorted: 1, 2, 4, ... 64 in each of seven decades, each way, and 0 and 1.
    "Dynamic" quantization (Dettmers 2016, section 1.3.1): fine steps near 1, and still some left at a millionth."""
    edges = [torch.linspace(0.1, 1, 2**decade + 1) for decade in range(7)]
    above = torch.cat([10 ** (decade - 6) * ((edge[:-1] + edge[1:]) / 2) for decade, edge in enumerate(edges)])
    return torch.cat([-above, above, torch.tensor([0.0, 1.0])]).sort().values


class Tables(Mapping):
    """Scheme -> its levels (16,) float32, indexed by code. A table is made by its formula when first asked for."""

    def __init__(self, **formulas: Callable[[], Tensor]):
        self.formulas = formulas
        self.made = cache(lambda scheme: formulas[scheme]())
        self.cache_clear = self.made.cache_clear

    def __getitem__(self, scheme: str) -> Tensor:
        return self.made(scheme)

    def __contains__(self, scheme) -> bool:
        return scheme in self.formulas  # Mapping's own would make the table

    def __iter__(self) -> Iterator[str]:
        return iter(self.formulas)

    def __len__(self) -> int:
        return len(self.formulas)


LEVELS = Tables(int4=int4_levels, fp4=fp4_levels, nf4=nf4_levels)
SCALE_LEVELS = scale_levels()  # (256,) float32


def encode(scaled: Tensor, scheme: str) -> Tensor:
    """The codes (n,), uint8, of the levels nearest to scaled (n,)."""
    if scheme == "int4":
        return int4_codes(scaled)
    levels, order = LEVELS[scheme].to(scaled.device).sort(stable=True)
    codes = nearest(scaled, levels)
    return codes if scheme == "nf4" else order.to(torch.uint8)[codes.int()]  # FP4's codes are not in order of value


def int4_codes(scaled: Tensor) -> Tensor:
    """The nearest of evenly spaced levels, without a table: (n,) within ±1 -> codes 1 to 15, uint8; ties go to even."""
    return ((scaled * 7).round() + 8).to(torch.uint8)


def nearest(scaled: Tensor, levels: Tensor) -> Tensor:
    """The index, uint8, of the nearest sorted level: how many midpoints lie below. On a midpoint, the lower level."""
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


def pack_codes(codes: Tensor) -> Tensor:
    """Two 4-bit codes in a byte: byte i holds codes 2i (high half) and 2i + 1 (low half). (n,) -> (n/2,)."""
    return codes[::2] << 4 | codes[1::2]


def unpack_codes(packed: Tensor) -> Tensor:
    """(n/2,) -> (n,), the inverse of `pack_codes`."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)


@cache
def level_pairs(scheme: str, device: torch.device) -> Tensor:
    """The two levels that each byte stands for, (256, 2): one look-up instead of two, and no shifting."""
    return LEVELS[scheme][unpack_codes(torch.arange(256)).view(256, 2)].to(device)


@cache
def placed(levels: Tensor, device: torch.device) -> Tensor:
    """A table of levels, moved to a device once: every move there waits until the device has done all its work."""
    return levels.to(device)


def chunk_on(device: torch.device) -> int:
    """How many weights are handled at a time: few, so that temporaries are small and stay in a processor's cache. A GPU
    takes eight times as many, because there the start of a kernel would take longer than the kernel."""
    return 2**20 if device.type == "cpu" else 2**23
