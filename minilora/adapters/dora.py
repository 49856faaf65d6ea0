"""DoRA: the magnitude and the direction of each row of W are trained separately (Liu et al. 2024, section 4).

    V = W + s·BA        y = m ⊙ (V x) / ‖V‖ + b        ‖V‖ by row, (out,)

m (out,) is trained beside A and B, and starts as the row norms of W, so that the layer starts as the one it wraps. In
backward ‖V‖ counts as a constant (section 4.3): the gradient of A and B is LoRA's, scaled by g = m / ‖V‖. The gradient
of m needs V x, so the layer keeps an array of N·out numbers that LoRA does not keep.

The norms need no BA in full: ‖V‖² = ‖W‖² + 2s ⟨W, BA⟩ + s² ‖BA‖², and by row ⟨W, BA⟩ = Σ (W Aᵀ) ⊙ B and
‖BA‖² = Σ (B AAᵀ) ⊙ B are made of products of rank r.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minilora.fast import FastLoRALinear, LowRankTerm, dropout_mask, formed_weight
from minilora.linear4bit import Linear4bit
from minilora.quant import QuantizedTensor, dequantize


class FormedDirection(Function):
    """y = (g ⊙ (W + sBA)) x + b with g = m / ‖W + sBA‖, the weight formed for the step as in `fast.FormedWeight`.

    The gradient of m is Σ_n gy ⊙ (V x) / ‖V‖, summed over tokens, and (V x) / ‖V‖ = (y - b) / m. So y is kept, which
    the next layer may keep as well, and no product is computed twice.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor | QuantizedTensor, bias, A: Tensor, B: Tensor, m: Tensor, norm: Tensor, s):
        g = (m / norm)[:, None]  # (out, 1)
        y = F.linear(x, formed_weight(W, A, B, s).mul_(g), bias)
        floats, ctx.quantized = (None, W) if isinstance(W, QuantizedTensor) else (W, None)
        ctx.save_for_backward(x, floats, bias, A, B, m, g, y)
        ctx.scaling = s
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy: Tensor):
        x, floats, bias, A, B, m, g, y = ctx.saved_tensors
        s, W = ctx.scaling, ctx.quantized if floats is None else floats
        gx = gy @ formed_weight(W, A, B, s).mul_(g) if ctx.needs_input_grad[0] else None
        x, rows, y = x.reshape(-1, x.shape[-1]), gy.reshape(-1, gy.shape[-1]), y.reshape(-1, y.shape[-1])  # (N, ...)
        gB = g * s * ((A @ x.T) @ rows).T  # ((r, N) (N, out))ᵀ
        gA = (s * (g * B).T @ rows.T) @ x  # (r, N) (N, in)
        gm = (rows * y).sum(0)  # Σ_n gy ⊙ y, (out,)
        if bias is not None:
            gm = gm - bias * rows.sum(0)
        gm = torch.where(m == 0, 0, gm / m)  # m begins at 0 where W's row is 0: so are its g and V x, and so they stay
        return gx, None, None, gA, gB, gm, None, None


class DoRALinear(FastLoRALinear):
    """A LoRA layer with a trained magnitude, `lora_magnitude_vector` (out,), in A's dtype.

    With dropout, as in PEFT: y = W x + b + (g - 1) ⊙ (W x_d) + g ⊙ s·BA x_d, x_d the dropped input.
    """

    def __init__(self, base_layer, r: int, lora_alpha: float, lora_dropout=0.0, use_rslora=False):
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora)
        self.lora_magnitude_vector = nn.Parameter(self.float_weight().pow(2).sum(1).sqrt())

    def float_weight(self) -> Tensor:
        """W (out, in), in A's dtype: float32 at least."""
        base, dtype = self.base_layer, self.lora_A.dtype
        if isinstance(base, Linear4bit):
            return dequantize(base.quantized, dtype)
        return (base.weight if self.original_weight is None else self.original_weight).detach().to(dtype)

    @torch.no_grad()
    def norms(self) -> Tensor:
        """‖W + s·BA‖ of each row, (out,), with W as it is now: `quantize_model` may have changed it. 1 for a row of
        zeros, which has no direction and is 0 whatever its g."""
        W, (A, B), s = self.float_weight(), self.factors(), self.scaling
        with torch.autocast(W.device.type, enabled=False):  # a norm of three digits would scale the whole row
            cross = (W @ A.T * B).sum(1)  # (out, in) (in, r) ⊙ (out, r)
            square = (B @ (A @ A.T) * B).sum(1)
            norms = (W.pow(2).sum(1) + 2 * s * cross + s**2 * square).clamp(min=0).sqrt()
        return norms.masked_fill(norms == 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged or not self.enabled:
            return super().forward(x)
        base, (A, B), m, s = self.base_layer, self.factors(), self.lora_magnitude_vector, self.scaling
        norm = self.norms()
        dropping = self.training and self.lora_dropout > 0
        if not dropping and self.forming_pays(x):
            return FormedDirection.apply(x, self.weight_to_form, base.bias, A, B, m, norm, s)
        y, bias = base(x), base.bias if base.bias is not None else 0
        g = (m / norm).to(y.dtype)
        if not dropping:
            return g * (LowRankTerm.apply(y, x, A, B, s, None) - bias) + bias
        mask, kept = dropout_mask(x, self.lora_dropout)
        dropped = base(x * mask / kept) - bias  # W x_d
        return y - dropped + g * LowRankTerm.apply(dropped, x, A, B, s / kept, mask)

    def delta_weight(self) -> Tensor:
        """ΔW = g ⊙ (W + s·BA) - W, (out, in), in float32 at least."""
        W = self.float_weight()
        return (self.lora_magnitude_vector / self.norms())[:, None] * (W + super().delta_weight()) - W
