"""Layers and models for the checkers: small, in float64, with random A and B, and made without the code under test."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.exercises.checking import Draw
from minilora.lora import LoRALinear


def lora_layer(draw: Draw, most: int, r: int | None = None, dropout: float = 0.0, kind: type = LoRALinear):
    """A LoRALinear of random shape up to `most`, put together by hand: __init__ is an exercise of its own."""
    base = nn.Linear(draw.integer(1, most), draw.integer(1, most)).double()
    for parameter in base.parameters():
        parameter.data = draw.normal(*parameter.shape)
    return assemble(draw, base, r or draw.integer(1, most), draw.integer(1, 20), dropout, kind)


def assemble(draw: Draw, base: Any, r: int, lora_alpha: float, dropout=0.0, kind: type = LoRALinear) -> LoRALinear:
    """What `kind(base, r, lora_alpha, dropout)` makes, with random A and B, and `base` frozen."""
    layer: Any = object.__new__(kind)
    nn.Module.__init__(layer)
    layer.base_layer = base.requires_grad_(False)
    layer.in_features, layer.out_features = base.in_features, base.out_features
    layer.r, layer.lora_alpha, layer.lora_dropout, layer.scaling = r, lora_alpha, dropout, lora_alpha / r
    layer.enabled = True
    layer.lora_A = nn.Parameter(draw.normal(r, base.in_features))
    layer.lora_B = nn.Parameter(draw.normal(base.out_features, r))
    layer.register_buffer("original_weight", None, persistent=False)
    layer.register_buffer("start_A", None)
    layer.register_buffer("start_B", None)
    return layer


def written_out(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W x + b + s·BA x, by way of the whole of BA."""
    y = torch.einsum("...i,oi->...o", x, W + scaling * torch.einsum("or,ri->oi", B, A))
    return y if bias is None else y + bias


class Results(TorchDispatchMode):
    """Notes how many numbers each tensor has that is made inside; views of what was `given` are not made."""

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.sizes.append(tensor.numel())
        return made

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # otherwise torch loads its compiler first, for a second or more
        return False
