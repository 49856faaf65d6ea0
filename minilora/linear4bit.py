"""The linear layer whose weight is kept in 4 bits, and a model made of such layers (QLoRA, Dettmers et al. 2023).

Nothing is ever computed in 4 bits. The layer turns its codes into floats of the input's dtype, multiplies, and throws
the floats away; backward makes them again. So 4 bits save memory and cost time: making the floats takes about as long
as reading them twice more. bitsandbytes' fused kernels look levels up inside the product and write no floats to memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minilora.dtypes import autocast_dtype
from minilora.quant import QLORA, Quantization, QuantizedTensor, check_finite, dequantize, quantize, stored_shapes


class DequantizedLinear(Function):
    """y = x Wᵀ + b with W = dequantize(quantized), and gx = g W with W made again.

    Autograd over F.linear(x, dequantize(quantized)) would keep each layer's float W from forward to backward, and
    the 4 bits would save nothing. Here only the codes wait, by reference. W is frozen, so x need not wait either.
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
    """A frozen linear layer in 4 bits, x (..., in) -> (..., out); in and out are its features.

    It computes in the dtype of x, or under autocast in autocast's dtype. Codes and scales are buffers, which move with
    the module; nothing trains or casts them. `.to(dtype)` casts the bias and sets the dtype that `dequantize` gives.
    """

    codes: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias=True, quantization=QLORA, device=None, dtype=None):
        """An empty layer, to be filled by load_state_dict. `dtype` is that of the weight and the bias."""
        super().__init__()
        self.in_features, self.out_features, self.quantization = in_features, out_features, quantization
        self.dtype: torch.dtype = dtype or torch.get_default_dtype()
        shapes = stored_shapes(in_features * out_features, quantization.block_size, quantization.double_quant)
        for name, (shape, kind) in shapes.items():
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=self.dtype, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, quantized: QuantizedTensor) -> "Linear4bit":
        """The same layer with its bias, and `quantized` in place of its weight."""
        quantization = Quantization(quantized.scheme, quantized.block_size, quantized.nested_scales is not None)
        layer = cls(linear.in_features, linear.out_features, False, quantization, "meta", quantized.dtype)
        for name, tensor in quantized.tensors.items():
            setattr(layer, name, tensor)
        layer.bias = linear.bias
        return layer.train(linear.training)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    @property
    def quantized(self) -> QuantizedTensor:
        """The layer's weight, (out, in); its tensors are the layer's own."""
        q, shape = self.quantization, (self.out_features, self.in_features)
        return QuantizedTensor(scheme=q.scheme, block_size=q.block_size, shape=shape, dtype=self.dtype, **self.tensors)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float64 and (dtype := autocast_dtype(x.device)) is not None:
            x = x.to(dtype)  # nn.Linear under autocast does the same, and leaves float64 alone too
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return DequantizedLinear.apply(x, bias, self.quantized)

    def _apply(self, fn: Callable, recurse: bool = True):
        """`.to`, `.cuda`, `.half` and the like call this method with the `fn` that each tensor goes through."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor is self.bias or moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(move, recurse)

    def get_extra_state(self) -> dict:
        """What the codes mean, which the tensors of a state_dict do not say."""
        return asdict(self.quantization)

    def set_extra_state(self, state: dict):
        """Raises ValueError for codes of another scheme or block size: they would fit and mean something else."""
        if state != self.get_extra_state():
            raise ValueError(f"the state_dict holds a layer of {state}, and this one is of {self.get_extra_state()}")

    def extra_repr(self) -> str:
        features = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{features}, {self.quantization}"


def float_linears(model: nn.Module, skip: Sequence[str] = ("lm_head",)) -> dict[str, nn.Linear]:
    """By full name, every nn.Linear whose name has no part that `skip` lists: all but the output head."""
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    return {name: linear for name, linear in linears.items() if not set(name.split(".")) & set(skip)}


def quantized_layers(model: nn.Module) -> dict[str, Linear4bit]:
    """By full name, every Linear4bit."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def replace_module(model: nn.Module, name: str, module: nn.Module):
    """Puts `module` where the module of that full name stands in the model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantize_model(model: nn.Module, quantization=QLORA, skip: Sequence[str] = ("lm_head",)) -> nn.Module:
    """Puts a Linear4bit where a linear layer stood, one after the other. Changes and returns the model.

    Embeddings, norms and the output head keep their floats, as in QLoRA: they are few, and rounding them costs most.
    Raises ValueError, changing nothing, for a weight with NaN or infinity (by name) and a model without nn.Linear left.
    """
    linears = float_linears(model, skip)
    if not linears:
        raise ValueError("the model has no nn.Linear to quantize; was it quantized before?")
    for name, linear in linears.items():
        check_finite(f"{name}.weight", linear.weight)
    for name in list(linears):
        linear = linears.pop(name)  # the last reference but the model's: its float weight is freed in this round
        quantized = quantize(linear.weight, **asdict(quantization))
        replace_module(model, name, Linear4bit.from_linear(linear, quantized))
    return model


def dequantize_model(model: nn.Module) -> nn.Module:
    """The inverse: nn.Linear layers with the weights that the codes stand for. Changes and returns the model."""
    for name, layer in quantized_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(dequantize(layer.quantized), requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        replace_module(model, name, linear.train(layer.training))
    return model
