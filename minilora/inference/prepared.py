"""What generation makes once, before the first token, because otherwise every token would make it anew.

A token reads every weight and computes next to nothing with it. So it waits for memory, and where a layer is small for
Python and for the start of each operation. Three things are spared, and the function stays the same up to rounding:

- Layers that read one x share what they make of it. The A's of q, k and v lie in one matrix, so that one thin product
  serves three layers, and those of gate and up in another:

      [h_q; h_k; h_v] = [A_q; A_k; A_v] x        y_q = W_q x + s·B_q h_q, and so on

- DoRA's norms ‖W + s·BA‖ do not change while text is generated. They, too, are computed once.
- On a CPU the x of few tokens lies down, as columns (in, N), and W xᵀ is computed instead of x Wᵀ. The numbers are the
  same, but for W xᵀ the library of matrix products (MKL, measured) shares W's rows among its threads; for x Wᵀ it takes
  two to three times as long. A single token is put there twice, as two columns, because for one column the library has
  another routine, which uses one thread.

While a forward pass runs, `Prepared` puts these forms in place of the layers' own `forward`. A layer that it does not
know stays as it is, as does every layer on a pass of many tokens, such as the prompt's.
"""

from collections.abc import Sequence
from threading import get_ident
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.dora import DoRALinear
from minilora.dtypes import autocast_dtype
from minilora.fast import FastLoRALinear, is_overheard
from minilora.inference.bank_layers import BankedLinear
from minilora.linear4bit import Linear4bit
from minilora.lora import LoRALinear
from minilora.quant import dequantize

LYING = 8  # tokens: the x of up to so many lies down
MANY = 64  # tokens: with more a layer computes as it always does
READ_ONE_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in model.Attention and model.MLP
ADAPTED = (LoRALinear, FastLoRALinear, DoRALinear)


class SharedInput:
    """The x of layers that read one, as the first of them prepares it for all.

    factors: of each of these layers A (r, in), None where it has no adapter.
    """

    x: Tensor | None  # what the others were made of
    changes: int  # of x in place, as they were counted then
    rows: Tensor  # x standing, (N, in)
    columns: Tensor | None  # x lying down, (in, N), or (in, 2) of a single token; None where it stands
    h: Sequence[Tensor]  # of each layer A x, (r, N)
    thread: int | None = None  # whose pass is under way

    def __init__(self, factors: Sequence[Tensor | None]):
        self.ranks = [0 if A is None else len(A) for A in factors]
        self.A = torch.cat([A for A in factors if A is not None]) if any(self.ranks) else None  # (R, in)
        self.forget()

    def read(self, x: Tensor):
        """x (..., in)."""
        self.x, self.changes = x, changes_of(x)
        self.rows = x.reshape(-1, x.shape[-1]).contiguous()  # (N, in)
        if len(self.rows) <= LYING and x.dtype == torch.float32 and x.device.type == "cpu":
            self.columns = (torch.cat([self.rows, self.rows]) if len(self.rows) == 1 else self.rows).T
        else:
            self.columns = None
        if self.A is not None:
            self.h = (self.A @ self.rows.T).split(self.ranks)

    def forget(self):
        self.x, self.changes, self.rows, self.columns, self.h = None, 0, torch.empty(0, 0), None, ()
        self.thread = None


class PreparedLinear:
    """One layer's forward pass: y = g ⊙ (W x) + s·B h + bias, with h = A x from the shared input.

    layer: a LoRA layer of one of the kinds ADAPTED, an nn.Linear or a Linear4bit. place: which of the layers that share
    the input. B (out, r), None for no adapter; g (out, 1) for DoRA, whose B is multiplied by it already, else None.
    """

    def __init__(self, layer: nn.Module, shared: SharedInput, place: int, B: Tensor | None, g: Tensor | None):
        self.plain: Any = MethodType(type(layer).forward, layer)
        self.shared, self.place, self.B, self.g = shared, place, B, g
        self.base: Any = getattr(layer, "base_layer", layer)
        self.scaling: Any = getattr(layer, "scaling", 1.0)
        self.dtype = dtype_of(self.base)

    def __call__(self, x: Tensor) -> Tensor:
        base, shared = self.base, self.shared
        if not 0 < x.numel() <= MANY * x.shape[-1] or x.dtype != self.dtype or shared.thread != get_ident():
            return self.plain(x)
        if x is not shared.x or changes_of(x) != shared.changes:
            shared.read(x)
        W = dequantize(base.quantized, x.dtype) if isinstance(base, Linear4bit) else base.weight
        if shared.columns is None:
            y = F.linear(shared.rows, W).T  # (out, N), as every y that follows
        else:
            y = (W @ shared.columns)[:, : len(shared.rows)]
        if self.g is not None:
            y.mul_(self.g)
        if self.B is not None:
            y.addmm_(self.B, shared.h[self.place], alpha=self.scaling)
        if base.bias is not None:
            y.add_(base.bias.to(x.dtype)[:, None])
        return y.T.view(*x.shape[:-1], -1)

    def __reduce__(self):
        """For `copy.deepcopy`: a model that is copied during a pass gets the layer's own forward."""
        return getattr, (self.plain.__self__, "forward")


class Prepared:
    """`with prepared:` around each forward pass of a model that generates, in eval mode and without gradients.

    Where an adapter or what it wraps was changed, switched on or off or merged since the pass before, all is prepared
    anew. Only a change of numbers through `.data` goes unseen, because torch does not count it.

    Another thread that uses the model meanwhile meets the layers as they are.
    """

    def __init__(self, model: nn.Module):
        self.model, self.device = model, next(model.parameters()).device
        self.prepare()

    @torch.no_grad()
    def prepare(self):
        self.adapted = [module for module in self.model.modules() if type(module) in ADAPTED]
        self.state = self.state_now()
        # Kept alive with their numbers: else a later tensor could be where one of these was, and pass for it.
        self.kept = [(tensor, tensor.detach()) for layer in self.adapted for tensor in tensors_of(layer)]
        self.forwards: dict[nn.Module, PreparedLinear] = {}
        self.inputs: list[SharedInput] = []
        for parent in self.model.modules():
            if not isinstance(parent, (LoRALinear, BankedLinear)):  # the base layer is no layer of the model by itself
                children = {name: base_of_banked(child) for name, child in parent.named_children()}
                known = {name: child for name, child in children.items() if can_be_prepared(child)}
                for group in READ_ONE_INPUT:
                    self.prepare_together([known.pop(name) for name in group if name in known])
                for layer in known.values():
                    self.prepare_together([layer])

    def prepare_together(self, layers: list[nn.Module]):
        """Layers that read one x."""
        adapters = [adapter_of(layer) for layer in layers]
        shared = SharedInput([A for A, _, _ in adapters])
        for place, (layer, (_, B, g)) in enumerate(zip(layers, adapters, strict=True)):
            self.forwards[layer] = PreparedLinear(layer, shared, place, B, g)
        self.inputs.append(shared)

    def state_now(self) -> list:
        """Of the adapted layers, what their prepared forms depend on."""
        state: list = []
        for layer in self.adapted:
            base = layer._modules["base_layer"]
            state += layer.enabled, layer.scaling, id(base), is_overheard(base)
            for tensor in tensors_of(layer):
                state += id(tensor), tensor.data_ptr(), changes_of(tensor)
        return state

    def __enter__(self):
        if self.state_now() != self.state:
            self.prepare()
        if autocast_dtype(self.device) is not None:
            return
        try:
            for shared in self.inputs:
                shared.thread = get_ident()
            for layer, forward in self.forwards.items():
                vars(layer).setdefault("forward", forward)  # one that somebody has put there since stays
        except BaseException:  # a KeyboardInterrupt
            self.__exit__()
            raise

    def __exit__(self, *error):
        for layer, forward in self.forwards.items():
            if vars(layer).get("forward") is forward:
                del vars(layer)["forward"]
        for shared in self.inputs:
            shared.forget()


def tensors_of(layer: Any) -> list[Tensor]:
    """What the prepared form of an adapted layer is made of: A and B, and for DoRA m and W."""
    owners: list[Any] = [layer, layer._modules["base_layer"]] if isinstance(layer, DoRALinear) else [layer]
    return [t for owner in owners for own in (owner._parameters, owner._buffers) for t in own.values() if t is not None]


def changes_of(tensor: Tensor) -> int:
    """How often its numbers were changed in place; 0 for a tensor of `torch.inference_mode`, which does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return 0


def base_of_banked(layer: nn.Module) -> nn.Module:
    """A bank's layer adds to each row what is the row's own; its base layer is one like others."""
    return layer.base_layer if isinstance(layer, BankedLinear) else layer


def can_be_prepared(layer: Any) -> bool:
    """Whether its function is known here, its changes are counted, and nobody listens to its base layer or has replaced
    a forward."""
    if not isinstance(vars(layer).get("forward"), PreparedLinear | None):
        return False
    if type(layer) not in ADAPTED:
        return type(layer) in (nn.Linear, Linear4bit) and not (layer._forward_hooks or layer._forward_pre_hooks)
    if type(layer.base_layer) not in (nn.Linear, Linear4bit) or is_overheard(layer.base_layer):
        return False
    return not (layer.merged and not layer.enabled) and not any(tensor.is_inference() for tensor in tensors_of(layer))


def adapter_of(layer: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A (r, in), B (out, r) and DoRA's g (out, 1) as they act, in the dtype that the layer computes in."""
    if type(layer) not in ADAPTED or layer.merged or not layer.enabled:
        return None, None, None
    dtype, (A, B), g = dtype_of(layer.base_layer), layer.factors(), None
    if isinstance(layer, DoRALinear):
        g = (layer.lora_magnitude_vector / layer.norms())[:, None]
        B, g = g * B, g.to(dtype)
    return A.to(dtype), B.to(dtype), g


def dtype_of(base: Any) -> torch.dtype:
    return base.dtype if isinstance(base, Linear4bit) else base.weight.dtype
