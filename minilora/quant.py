"""Four bits: weights stored as one of sixteen numbers each, and the linear layer that computes with them.

A block of 64 neighbours in the flattened weight shares one scale, its largest magnitude. Each weight then becomes the
number, 0 to 15, of the level nearest to it in units of that scale, and two such codes fit in a byte:

    absmax = max |w| over the block        code = nearest(w / absmax)        w ≈ absmax · level[code]

The schemes differ in where the sixteen levels lie between -1 and 1, and in nothing else:

    int4   evenly spaced: seven each way from zero. The toy: what "rounding to 4 bits" brings to mind
    fp4    a float of 4 bits: a sign, two bits of exponent, one of mantissa
    nf4    quantiles of a normal distribution (Dettmers et al. 2023, section 3): trained weights are nearly normal, so
           its levels are dense where weights are

Bits per weight: 4, and 32/64 for a float32 scale, which makes 4.5. Double quantization stores the scales in 8 bits, in
blocks of 256 with a float32 scale of their own: 4 + 8/64 + 32/(64·256) = 4.127.

Nothing is ever computed in 4 bits. A layer turns its codes into numbers of the input's dtype, multiplies, and throws
the numbers away; backward turns them again. So 4 bits save memory and cost time. Codes, scales, order in the byte and
ties are those of bitsandbytes, bit for bit. What that library adds is fused kernels, which look the levels up
inside the matrix product: the float weight is then never written to memory. Here one layer's float weight exists for a
moment, and making it costs about as much as reading it twice more.

Letters in the shape comments: n weights, N blocks of block_size weights, in and out the layer's features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minilora.levels import LEVELS, SCALE_LEVELS, encode, level_pairs, nearest, pack_codes

SCALE_BLOCK = 256  # scales that share a scale under double quantization
CHUNK = 2**20  # weights handled at a time: temporaries stay small, and in the processor's cache
TINY = 1e-38  # in place of a scale of zero, which cannot be divided by


def check_settings(scheme: str, block_size: int):
    """Raises ValueError for an unknown scheme and a block size that is not a power of two from 16 to 4096."""
    if scheme not in LEVELS:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(LEVELS)}")
    if type(block_size) is not int or not 16 <= block_size <= 4096 or block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size!r}; it must be a power of two from 16 to 4096")


@dataclass
class QuantizedTensor:
    """A weight in 4 bits: `dequantize` gives it back, about.

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
        if self.nested_scales is None:
            return self.scales
        level = SCALE_LEVELS.to(self.scales.device)[self.scales.int()]
        return level * self.nested_scales.repeat_interleave(SCALE_BLOCK)[: len(level)] + self.nested_offset


def stored_shapes(n: int, block_size: int, double_quant: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each of QuantizedTensor's tensors for a weight of n elements."""
    blocks = math.ceil(n / block_size)
    stored = {"codes": ((math.ceil(n / 2),), torch.uint8)}
    if not double_quant:
        return stored | {"scales": ((blocks,), torch.float32)}
    nested = {
        "nested_scales": ((math.ceil(blocks / SCALE_BLOCK),), torch.float32),
        "nested_offset": ((), torch.float32),
    }
    return stored | {"scales": ((blocks,), torch.uint8)} | nested


def quantize(weight: Tensor, scheme: str = "nf4", block_size: int = 64, double_quant: bool = False) -> QuantizedTensor:
    """Rounds a floating-point tensor of any shape to 4 bits a number.

    The flattened tensor is cut into blocks; the last may be short. Raises ValueError for a scheme or block size that
    `check_settings` refuses, a tensor of integers, an empty one, and one with NaN or infinity in it.
    """
    check_settings(scheme, block_size)
    if not weight.is_floating_point() or not weight.numel():
        raise ValueError(
            f"the weight is {weight.dtype} {tuple(weight.shape)}; only floating-point numbers are quantized"
        )
    codes, scales = [], []
    for piece in weight.detach().reshape(-1).split(CHUNK):
        scaled, absmax = scale_to_unit(piece, block_size)
        codes.append(pack_codes(encode(F.pad(scaled, (0, len(scaled) % 2)), scheme)))  # an odd end: one zero more
        scales.append(absmax)
    codes, scales = torch.cat(codes), torch.cat(scales)
    check_finite("the weight", scales)  # a block with NaN or infinity in it has no finite absmax
    quantized = QuantizedTensor(codes, scales, scheme, block_size, tuple(weight.shape), weight.dtype)
    return quantize_scales(quantized) if double_quant else quantized


def check_finite(name: str, tensor: Tensor):
    tensor = (
        tensor.float() if tensor.dtype == torch.float64 else tensor
    )  # quantized in float32, where 1e300 is infinite
    if not tensor.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity and cannot be quantized")


def scale_to_unit(flat: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """flat (n,) -> every block over its absmax, float32 (n,) within ±1, and the absmax of each block, float32 (N,)."""
    whole = len(flat) // block_size * block_size
    blocks = flat[:whole].float().view(-1, block_size)  # (N, block_size)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).clamp(-1, 1).view(-1)
    if whole == len(flat):
        return scaled, absmax
    # bitsandbytes divides in a short last block. That is not always the same last bit as multiplying by 1/absmax.
    rest = flat[whole:].float()
    last = rest.abs().amax().clamp(min=TINY)
    return torch.cat([scaled, (rest / last).clamp(-1, 1)]), torch.cat([absmax, last[None]])


def quantize_scales(quantized: QuantizedTensor) -> QuantizedTensor:
    """Double quantization: scales are all positive, so their mean is taken off; what is left fits 8 bits."""
    offset = quantized.scales.mean()
    scaled, nested_scales = scale_to_unit(quantized.scales - offset, SCALE_BLOCK)
    codes = nearest(scaled, SCALE_LEVELS.to(scaled.device))
    return replace(quantized, scales=codes, nested_scales=nested_scales, nested_offset=offset)


def dequantize(quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """absmax · level[code] for every weight, in its own shape; multiplied in float32, then cast to `dtype` (None: the
    dtype it had)."""
    scheme, size, dtype = quantized.scheme, quantized.block_size, dtype or quantized.dtype
    return dequantize_blocks(quantized.codes, quantized.absmax(), scheme, size, list(quantized.shape), dtype)


@torch.library.custom_op("minilora::dequantize_blocks", mutates_args=())
def dequantize_blocks(
    codes: Tensor, absmax: Tensor, scheme: str, block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """One operation in torch's eyes, as a kernel is: fake tensors and the meter pass it in one step."""
    pairs = (
        level_pairs(scheme, codes.device).view(torch.int64).view(-1)
    )  # (256,): two float32 moved as one 8-byte number
    codes = F.pad(codes, (0, len(absmax) * block_size // 2 - len(codes)))  # fills the last block up
    weight = torch.empty(len(absmax), block_size, dtype=dtype, device=codes.device)  # (N, block_size)
    pieces = codes.split(CHUNK // 2), absmax.split(CHUNK // block_size), weight.split(CHUNK // block_size)
    for some_codes, some_scales, target in zip(*pieces, strict=True):
        values = pairs.take(some_codes.long()).view(torch.float32).view(-1, block_size)
        torch.mul(values, some_scales[:, None], out=target)
    return weight.view(-1)[: math.prod(shape)].view(shape)


@dequantize_blocks.register_fake
def _(codes, absmax, scheme, block_size, shape, dtype):
    return codes.new_empty(shape, dtype=dtype)


class DequantizedLinear(Function):
    """y = x Wᵀ + b with W = dequantize(quantized), and gx = g W with W made again.

    Autograd over F.linear(x, dequantize(quantized)) would keep each layer's float W from forward to backward, and
    the 4 bits would save nothing. Here only the codes wait, by reference; W is frozen, so x need not wait either.
    """

    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor | None, quantized: QuantizedTensor) -> Tensor:
        ctx.quantized = quantized
        return F.linear(x, dequantize(quantized, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        gx = g @ dequantize(ctx.quantized, g.dtype) if ctx.needs_input_grad[0] else None  # (..., out) (out, in)
        gb = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return gx, gb, None


class Linear4bit(nn.Module):
    """A frozen linear layer in 4 bits, x (..., in) -> (..., out), computed in x's dtype (under autocast, in its).

    The tensors of the QuantizedTensor are buffers: they move with the module and are in its state_dict, and nothing
    trains them. `.to(dtype)` casts the bias and says as what the weight is to be dequantized; scales stay float32.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        """An empty layer, to be filled by load_state_dict. `dtype` is that of the weight and the bias."""
        super().__init__()
        check_settings(scheme, block_size)
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.block_size, self.double_quant = scheme, block_size, double_quant
        self.dtype = dtype or torch.get_default_dtype()
        for name, (shape, kind) in stored_shapes(in_features * out_features, block_size, double_quant).items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=self.dtype, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantized: QuantizedTensor) -> "Linear4bit":
        """The same layer with its bias, and `quantized` in place of its weight."""
        settings = (
            quantized.scheme,
            quantized.block_size,
            quantized.nested_scales is not None,
            "meta",
            quantized.dtype,
        )
        layer = cls(linear.in_features, linear.out_features, False, *settings)
        for name, tensor in quantized.tensors.items():
            setattr(layer, name, tensor)
        layer.bias = linear.bias
        return layer.train(linear.training)

    @property
    def quantized(self) -> QuantizedTensor:
        """The layer's weight, (out, in); its tensors are the layer's own."""
        shape = (self.out_features, self.in_features)
        return QuantizedTensor(
            scheme=self.scheme, block_size=self.block_size, shape=shape, dtype=self.dtype, **dict(self._buffers)
        )

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))  # as nn.Linear does, which leaves float64 alone too
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return DequantizedLinear.apply(x, bias, self.quantized)

    def _apply(self, fn: Callable, recurse: bool = True):
        """What `.to`, `.cuda`, `.half` and the like go through."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is self.bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(move, recurse)

    def get_extra_state(self) -> dict:
        """What a state_dict holds besides the tensors, which do not say of themselves what they mean."""
        return {"scheme": self.scheme, "block_size": self.block_size, "double_quant": self.double_quant}

    def set_extra_state(self, state: dict):
        """Raises ValueError for codes of another scheme or block size: they would fit and mean something else."""
        if state != self.get_extra_state():
            raise ValueError(f"the state_dict holds a layer of {state}, and this one is of {self.get_extra_state()}")

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{features}, {self.scheme}, block_size={self.block_size}, double_quant={self.double_quant}"


def float_linears(model: nn.Module, skip: Sequence[str] = ("lm_head",)) -> dict[str, nn.Linear]:
    """By full name, every nn.Linear but the output head, or whose name has a part that `skip` lists."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name: linear for name, linear in linears.items() if not set(name.split(".")) & set(skip)}


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """By full name, every Linear4bit."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def put(model: nn.Module, name: str, module: nn.Module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantize_model(
    model: nn.Module,
    scheme: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    skip: Sequence[str] = ("lm_head",),
) -> nn.Module:
    """Puts a Linear4bit where a linear layer stood, one after the other. Changes and returns the model.

    Embeddings, norms and the output head keep their floats, as in QLoRA: they are few, and rounding them costs most.
    Raises ValueError, before anything is changed, for settings that `check_settings` refuses, a weight with NaN or
    infinity in it (by name), and a model with no nn.Linear left to quantize.
    """
    check_settings(scheme, block_size)
    linears = float_linears(model, skip)
    if not linears:
        raise ValueError("the model has no nn.Linear to quantize; was it quantized before?")
    for name, linear in linears.items():
        check_finite(f"{name}.weight", linear.weight)
    for name in list(linears):
        linear = linears.pop(name)  # the last reference but the model's: its float weight is freed in this round
        quantized = quantize(linear.weight, scheme, block_size, double_quant)
        put(model, name, Linear4bit.from_linear(linear, quantized))
    return model


def dequantize_model(model: nn.Module) -> nn.Module:
    """The inverse: nn.Linear layers with the weights that the codes stand for. Changes and returns the model."""
    for name, layer in quantized_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dequantize(layer.quantized), requires_grad=False)
        linear.bias = layer.bias
        put(model, name, linear.train(layer.training))
    return model
