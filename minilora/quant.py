"""Four bits: weights stored as one of sixteen numbers each.

A block of 64 neighbours in the flattened weight shares one scale, its largest magnitude. Each weight is divided by that
scale and stored as the number, 0 to 15, of the nearest level; two such codes fit in a byte:

    absmax = max |w| over the block        code = nearest(w / absmax)        w ≈ absmax · level[code]

The schemes differ in where the levels lie between -1 and 1:

    int4   evenly spaced: seven each way from zero, fifteen in all. The toy: what "rounding to 4 bits" brings to mind
    fp4    a float of 4 bits: a sign, two bits of exponent, one of mantissa
    nf4    quantiles of a normal distribution (Dettmers et al. 2023, section 3): trained weights are nearly normal, so
           its levels are dense where weights are

Bits per weight: 4, and 32/64 for a float32 scale, which makes 4.5. Double quantization stores the scales in 8 bits, in
blocks of 256 with a float32 scale of their own: 4 + 8/64 + 32/(64·256) = 4.127.

fp4 and nf4 are those of bitsandbytes, bit for bit: codes, scales, the order in the byte and ties. Here are pure
functions from tensors to tensors; `linear4bit.py` has the layer that computes with such weights.

Letters in the shape comments: n weights, N blocks of block_size weights.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.levels import LEVELS, SCALE_LEVELS, chunk_on, encode, level_pairs, nearest, pack_codes, placed

SCALE_BLOCK = 256  # scales that share a scale under double quantization
BLOCK_SIZES = [2**power for power in range(4, 13)]  # 16 to 4096: a chunk holds whole blocks
TINY = 1e-38  # in place of a scale of zero, which cannot be divided by


@dataclass(frozen=True)
class Quantization:
    """How weights are put into 4 bits. The defaults are QLoRA's (Dettmers et al. 2023, section 3).

    Raises ValueError for an unknown scheme and a block size that is none of BLOCK_SIZES.
    """

    scheme: str = "nf4"
    block_size: int = 64  # weights that share a scale
    double_quant: bool = True  # the scales themselves in 8 bits

    def __post_init__(self):
        if self.scheme not in LEVELS:
            raise ValueError(f"unknown scheme {self.scheme!r}; known: {', '.join(LEVELS)}")
        if type(self.block_size) is not int or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size is {self.block_size!r}; it must be a power of two from 16 to 4096")


QLORA = Quantization()


@dataclass
class QuantizedTensor:
    """A weight in 4 bits, which `dequantize` turns back into floats.

    Without double quantization `scales` is the float32 absmax of each block, and the last two fields are None. With
    it, absmax ≈ nested_scales · level[scales] + nested_offset, by blocks of 256.
    """

    codes: Tensor  # uint8 (ceil(n/2),), two codes in each byte, the first in the high half
    scales: Tensor  # float32 or uint8 (N,)
    scheme: str
    block_size: int
    shape: tuple[int, ...]  # of the weight
    dtype: torch.dtype  # of the weight
    nested_scales: Tensor | None = None  # float32 (ceil(N/256),)
    nested_offset: Tensor | None = None  # float32 (), the mean absmax

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by field."""
        names = ("codes", "scales", "nested_scales", "nested_offset")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_parameter(self) -> float:
        return 8 * self.nbytes / math.prod(self.shape)

    def absmax(self) -> Tensor:
        """The scale of each block, float32 (N,)."""
        if self.nested_scales is None or self.nested_offset is None:
            return self.scales
        level = placed(SCALE_LEVELS, self.scales.device)[self.scales.int()]
        return level * self.nested_scales.repeat_interleave(SCALE_BLOCK)[: len(level)] + self.nested_offset


def stored_shapes(n: int, block_size: int, double_quant: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of QuantizedTensor's tensors for a weight of n elements."""
    blocks = math.ceil(n / block_size)
    codes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": ((math.ceil(n / 2),), torch.uint8)}
    if not double_quant:
        return codes | {"scales": ((blocks,), torch.float32)}
    nested = {
        "nested_scales": ((math.ceil(blocks / SCALE_BLOCK),), torch.float32),
        "nested_offset": ((), torch.float32),
    }
    return codes | {"scales": ((blocks,), torch.uint8)} | nested


def quantize(weight: Tensor, scheme: str = "nf4", block_size: int = 64, double_quant: bool = False) -> QuantizedTensor:
    """Rounds a floating-point tensor of any shape to 4 bits a number.

    The flattened tensor is cut into blocks; the last may be short. Raises ValueError for a scheme or block size that
    `Quantization` refuses, a tensor of integers, an empty one, and one with NaN or infinity in it.
    """
    Quantization(scheme, block_size, double_quant)
    if not weight.is_floating_point() or not weight.numel():
        found = f"{weight.dtype} {tuple(weight.shape)}"
        raise ValueError(f"the weight is {found}; only floating-point numbers are quantized")
    pieces = []
    for piece in weight.detach().reshape(-1).split(chunk_on(weight.device)):
        scaled, absmax = scale_to_unit(piece, block_size)
        codes = pack_codes(encode(F.pad(scaled, (0, len(scaled) % 2)), scheme))  # an odd end is filled up with a zero
        pieces.append((codes, absmax))
    codes, scales = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    check_finite("the weight", scales)  # a block with NaN or infinity in it has no finite absmax
    quantized = QuantizedTensor(codes, scales, scheme, block_size, tuple(weight.shape), weight.dtype)
    return quantize_scales(quantized) if double_quant else quantized


def check_finite(name: str, tensor: Tensor):
    in_float32 = tensor.float() if tensor.dtype == torch.float64 else tensor  # where 1e300 is ∞
    if not in_float32.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity and cannot be quantized")


def scale_to_unit(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """flat (n,) -> every block over its absmax, float32 (n,) within ±1, and the absmax of each block, float32 (N,)."""
    whole = len(flat) // block_size * block_size
    blocks = flat[:whole].float().view(-1, block_size)  # (N, block_size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).clamp(-1, 1).view(-1)
    if whole == len(flat):
        return scaled, absmax
    # bitsandbytes divides in a short last block, where the last bit can differ from that of a product with 1/absmax.
    rest = flat[whole:].float()
    last = rest.abs().amax().clamp(min=TINY)
    return torch.cat([scaled, (rest / last).clamp(-1, 1)]), torch.cat([absmax, last[None]])


def quantize_scales(quantized: QuantizedTensor) -> QuantizedTensor:
    """Double quantization: the 8-bit levels are symmetric about 0 and scales are positive, so their mean is subtracted
    before the scales are rounded."""
    offset = quantized.scales.mean()
    scaled, nested_scales = scale_to_unit(quantized.scales - offset, SCALE_BLOCK)
    codes = nearest(scaled, placed(SCALE_LEVELS, scaled.device))
    return replace(quantized, scales=codes, nested_scales=nested_scales, nested_offset=offset)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """absmax · level[code] for every weight, in the weight's shape; multiplied in float32, then cast to `dtype` (None:
    the dtype of the weight before it was quantized)."""
    scheme, size, dtype = quantized.scheme, quantized.block_size, dtype or quantized.dtype
    return dequantize_blocks(quantized.codes, quantized.absmax(), scheme, size, list(quantized.shape), dtype)


@torch.library.custom_op("minilora::dequantize_blocks", mutates_args=())
def dequantize_blocks(
    codes: Tensor, absmax: Tensor, scheme: str, block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """Registered as one operation, so that fake tensors and the MemoryMeter see a single call, as of a kernel."""
    # (256,): the two float32 levels of each byte, moved as one number of 8 bytes
    pairs = level_pairs(scheme, codes.device).view(torch.int64).view(-1)
    if missing := len(absmax) * block_size // 2 - len(codes):
        codes = F.pad(codes, (0, missing))  # fills the last block up
    weight = torch.empty(len(absmax), block_size, dtype=dtype, device=codes.device)  # (N, block_size)
    chunk = chunk_on(codes.device)
    pieces = codes.split(chunk // 2), absmax.split(chunk // block_size), weight.split(chunk // block_size)
    for some_codes, some_scales, target in zip(*pieces, strict=True):
        values = pairs.index_select(0, some_codes.int()).view(torch.float32).view(-1, block_size)
        torch.mul(values, some_scales[:, None], out=target)
    return weight.view(-1)[: math.prod(shape)].view(shape)


@dequantize_blocks.register_fake
def _(codes, absmax, scheme, block_size, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)
