"""The LoRA layer: a frozen linear layer plus a trained low-rank update (Hu et al. 2021, section 4.1).

    y = W x + b + s · B(A(dropout(x)))        s = lora_alpha / r, in rsLoRA lora_alpha / √r

                 x (in)
          ┌────────┴────────┐
          │              dropout          only while training
       W x + b            A (r, in)       trained, random at the start
       frozen               │             r numbers
          │               B (out, r)      trained, zero at the start
          │                 │ · s
          └───────(+)───────┘
                 y (out)

W (out, in) and b stay frozen. A and B are trained: r·(in + out) numbers instead of in·out. B starts at zero, so the
wrapped layer starts as the layer it wraps. A starts random, because with both at zero neither would ever get a
gradient. The update acts as a change of weight, ΔW = s·BA. So after training it can be added to W for good (`merge`),
and inference then takes no longer than before. From forward to backward the layer keeps its dropped input and A x.

This is all of LoRA. `fast.py` computes the same function with a backward pass of its own, faster and in less memory;
`adapters/dora.py` adds DoRA's magnitude; `adapters/inject.py` puts the layers into a model.
"""

import math
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.config import check_hyperparameters, lora_scaling


class LoRALinear(nn.Module):
    """Wraps `base_layer`, anything with in_features, out_features and forward: x (..., in) -> (..., out).

    `lora_A` (r, in) and `lora_B` (out, r) are float32, also on a half-precision base, and float64 on a float64 one.
    """

    original_weight: Tensor | None  # W, while ΔW is merged into base_layer.weight
    start_A: Tensor | None  # what A and B began as, where B did not begin at zero (PiSSA and OLoRA)
    start_B: Tensor | None

    def __init__(self, base_layer, r: int, lora_alpha: float, lora_dropout=0.0, use_rslora=False):
        super().__init__()
        check_hyperparameters(r, lora_alpha, lora_dropout)
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_scaling(r, lora_alpha, use_rslora)
        self.enabled = True  # False: the layer computes W x + b alone, merged or not
        W = next(chain(base_layer.parameters(), base_layer.buffers()))
        device, dtype = W.device, torch.promote_types(W.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform within ±1/√in, as nn.Linear's own weight
        self.register_buffer("original_weight", None, persistent=False)  # moves with the module, is not in its state
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.train(base_layer.training)  # put into a model in eval mode, the layer must not drop anything

    def forward(self, x: Tensor) -> Tensor:
        if self.original_weight is not None and not self.enabled:
            return F.linear(x, self.original_weight, self.base_layer.bias)
        y = self.base_layer(x)  # (..., out): W x + b, or (W + ΔW) x + b once merged
        if self.merged or not self.enabled:
            return y
        A, B = (factor.to(y.dtype) for factor in self.factors())  # half precision if the base computes in it
        dropped = F.dropout(x, self.lora_dropout, self.training).to(y.dtype)  # (..., in)
        return y + self.scaling * F.linear(F.linear(dropped, A), B)  # W x + b + s · B(A(dropout(x)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they act. Where B₀ ≠ 0, the starting product B₀A₀ is subtracted, so that W need not change:

        BA - B₀A₀ = [B | -B₀] · [A ; A₀]        of rank 2r, which costs twice the thin products
        """
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], dim=1)

    @property
    def merged(self) -> bool:
        return self.original_weight is not None

    def delta_weight(self) -> Tensor:
        """ΔW = s·BA, (out, in), with the factors as they act: what training did to W; in float32 at least."""
        A, B = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in self.factors())
        return self.scaling * B @ A

    @torch.no_grad()
    def merge(self):
        """W += ΔW, once; the sum is made in float32 and rounded once. ValueError unless the base is an nn.Linear."""
        if self.merged:
            return
        if not isinstance(self.base_layer, nn.Linear):
            raise ValueError(f"cannot merge into {type(self.base_layer).__name__}; only an nn.Linear can be added to")
        weight = self.base_layer.weight
        self.original_weight = weight.detach().clone()
        weight.copy_(weight + self.delta_weight())  # type promotion makes the sum float32 or wider

    @torch.no_grad()
    def unmerge(self):
        """Puts the very weights back. (W + ΔW) - ΔW would not be W, because the sum was rounded."""
        if self.merged:
            self.base_layer.weight.copy_(self.original_weight)
            self.original_weight = None

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, scaling={self.scaling:g}"
