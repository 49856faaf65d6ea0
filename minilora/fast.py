"""LoRA's forward and backward pass at the least cost: the function of `LoRALinear`, up to rounding.

Plain autograd over the formula makes six thin products, N·r·in or N·r·out, where `FormedWeight` makes four, passes
several times over arrays of N·out numbers, and under dropout keeps a dropped copy of x for every layer. `FormedWeight`
is for many tokens, `AddedInPlace` for dropout, and `LowRankTerm` for few tokens and every kind of base layer;
`FastLoRALinear` chooses, between the first and the last by counting multiplications.

Letters in the shape comments: N tokens (all leading dimensions of x), in and out features, r rank (2r after PiSSA).
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from minilora.dtypes import autocast_dtype
from minilora.linear4bit import Linear4bit
from minilora.lora import LoRALinear
from minilora.quant import QuantizedTensor, dequantize

PIECE = 2**18  # numbers that are dropped at once: 1 MB in float32, which a core's cache holds


class FormedWeight(Function):
    """y = (W + s·BA) x + b, with W + s·BA formed in forward, thrown away, and formed again in backward.

    Multiplications, for N tokens (times two for FLOPs; x, y and g = dL/dy as rows):

        full fine-tuning                        LoRA, this form
        y  = x Wᵀ           N·in·out            y  = x (W + sBA)ᵀ     N·in·out + r·in·out
        gx = g W            N·in·out            gx = g (W + sBA)      N·in·out + r·in·out
        gW = gᵀ x           N·in·out            gA = (s·Bᵀgᵀ) x       N·r·(out + in)
                                                gB = (s·A xᵀ g)ᵀ      N·r·(in + out)

    Of three large products two remain: that is the limit of 2/3. LoRA saves the weight gradient, never the product
    that carries the gradient on to the layers below. The rest is 2·r/N + 2·r·(in + out)/(in·out) of one large product:
    7 % for r = 8, 512 features and 2048 tokens. Plain autograd over y = W x + s·B(A x) spends 3·N·r·(in + out) on thin
    products instead of 2·N·r·(in + out). It also passes several times over arrays of N·out numbers, to scale, to add
    and to collect gradients, and these passes wait for memory longer than the arithmetic takes.

    Saved for backward: x, and references to W, A, B. Keeping W + sBA would hold a second copy of every weight from
    forward to backward; forming it again costs r·in·out.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor | QuantizedTensor, bias, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        floats, ctx.quantized = (None, W) if isinstance(W, QuantizedTensor) else (W, None)
        ctx.save_for_backward(x, floats, A, B)
        ctx.scaling = scaling
        return F.linear(x, formed_weight(W, A, B, scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, floats, A, B = ctx.saved_tensors
        W = ctx.quantized if floats is None else floats
        gx = g @ formed_weight(W, A, B, ctx.scaling) if ctx.needs_input_grad[0] else None  # (..., in)
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])  # (N, in), (N, out)
        # Thin matrices lie down, (r, N) and (r, out): as columns, (N, r), the same products take 2 to 5 times as long.
        gA = (ctx.scaling * B.T @ g.T) @ x  # (r, N) (N, in)
        gB = ((ctx.scaling * A @ x.T) @ g).T  # ((r, N) (N, out))ᵀ
        return gx, None, None, gA, gB, None


def formed_weight(W: Tensor | QuantizedTensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """W + s·BA, (out, in), a new tensor. So are the floats of a W in 4 bits, and the update is added in their place."""
    floats = floats_of(W, A.dtype)
    return torch.addmm(floats, B, A, alpha=scaling, out=None if floats is W else floats)


def floats_of(W: Tensor | QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """W itself, or what its 4 bits stand for."""
    return dequantize(W, dtype) if isinstance(W, QuantizedTensor) else W


class LowRankTerm(Function):
    """y = base + s · (m ⊙ x) Aᵀ Bᵀ, with base (..., out) the base layer's output and m a dropout mask or None.

    The base layer computes its output itself, so it may be quantized and of any dtype, and a weight that is not frozen
    gets its gradient there. Multiplications besides: N·r·(in + out) forward, twice as many backward.

    Saved for backward: x by reference, A x (r numbers a token) and the mask (one byte an element). Plain autograd would
    hold the dropped x as well, four bytes an element: so LoRA comes to need more memory than full fine-tuning. The
    products are in the dtype of `base`, also where A and B are float32.
    """

    @staticmethod
    def forward(ctx, base: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
        dropped = (x if mask is None else x * mask).reshape(-1, x.shape[-1]).to(base.dtype)  # (N, in)
        Ax = A.to(base.dtype) @ dropped.T  # (r, N)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, Ax, A, B, mask)  # A frozen: A x is enough
        ctx.scaling = scaling
        rows = base.reshape(-1, base.shape[-1])  # (N, out)
        return torch.addmm(rows, Ax.T, B.to(base.dtype).T, alpha=scaling).view_as(base)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, Ax, A, B, mask = ctx.saved_tensors
        rows = g.reshape(-1, g.shape[-1])  # (N, out)
        h = ctx.scaling * B.to(g.dtype).T @ rows.T  # (r, N)
        gx = gA = None
        if ctx.needs_input_grad[1]:
            gx = (h.T @ A.to(g.dtype)).view(*g.shape[:-1], A.shape[1])
            gx = gx if mask is None else gx.mul_(mask)
        if ctx.needs_input_grad[2]:
            dropped = (x if mask is None else x * mask).reshape(-1, x.shape[-1]).to(g.dtype)  # (N, in)
            gA = (h @ dropped).to(A.dtype)  # (r, N) (N, in)
        gB = ctx.scaling * (Ax @ rows).T  # ((r, N) (N, out))ᵀ
        return g, gx, gA, gB.to(B.dtype), None, None


class AddedInPlace(Function):
    """y = W x + b + s · (m ⊙ x) Aᵀ Bᵀ, with a frozen W and a dropout mask m: `LowRankTerm`'s products, fewer arrays.

    W x + b is computed here, so nothing else needs it, and the update is added where it lies; in backward so is the
    update's part of gx. On a CPU dropped copies are made in pieces of a few tokens, which stay in the cache. Arrays of
    N·in numbers do not, and their memory goes back to the system and comes again page by page.

    Saved for backward: x and W by reference, A x (r numbers a token) and the mask (one byte an element).
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor | QuantizedTensor, bias, A: Tensor, B: Tensor, scaling: float, mask: Tensor):
        floats, ctx.quantized = (None, W) if isinstance(W, QuantizedTensor) else (W, None)
        y = F.linear(x, floats_of(W, x.dtype), bias)  # (..., out)
        Ax = torch.cat([A @ dropped.T for _, dropped in dropped_pieces(x, mask)], dim=1)  # (r, N)
        y.view(-1, y.shape[-1]).addmm_(Ax.T, B.T, alpha=scaling)
        ctx.save_for_backward(x, floats, Ax, A, B, mask)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, floats, Ax, A, B, mask = ctx.saved_tensors
        W = floats_of(ctx.quantized if floats is None else floats, g.dtype)
        rows, keeps = g.reshape(-1, g.shape[-1]), mask.view(-1, mask.shape[-1])  # (N, out) and (N, in)
        h = ctx.scaling * B.T @ rows.T  # (r, N)
        gx = rows @ W if ctx.needs_input_grad[0] else None  # (N, in)
        gA = torch.zeros_like(A)
        for piece, dropped in dropped_pieces(x, mask):
            if gx is not None:
                gx[piece] += (h[:, piece].T @ A).mul_(keeps[piece])
            gA.addmm_(h[:, piece], dropped)  # (r, n) (n, in)
        gB = ctx.scaling * (Ax @ rows).T  # ((r, N) (N, out))ᵀ
        return None if gx is None else gx.view_as(x), None, None, gA, gB, None, None


def dropped_pieces(x: Tensor, mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of m ⊙ x, a few at a time: their place among all N, and their numbers (n, in), n·in of about PIECE."""
    x, mask = x.reshape(-1, x.shape[-1]), mask.view(-1, mask.shape[-1])  # (N, in) both
    n = max(1, PIECE // x.shape[-1] if x.device.type == "cpu" else len(x))
    for first in range(0, max(1, len(x)), n):
        piece = slice(first, first + n)
        yield piece, x[piece] * mask[piece]


def dropout_mask(x: Tensor, p: float) -> tuple[Tensor, float]:
    """True where an element is kept, in x's shape, and the probability of that: 1 - p to 16 bits.

    An element is dropped where 16 random bits, read as a number, are below p·2¹⁶; one draw of 64 bits serves four. On a
    CPU, whose generator draws one number after the other, `bernoulli_` takes five times as long: one draw an element.
    """
    n, threshold = x.numel(), min(round(p * 2**16), 2**16 - 1)
    draws = torch.empty(-(-n // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = draws.view(torch.int16)[:n].view(x.shape)  # from -2¹⁵ to 2¹⁵ - 1
    return bits >= threshold - 2**15, 1 - threshold / 2**16


def is_overheard(layer: nn.Module) -> bool:
    """Whether a hook listens to this layer, or somebody has replaced its forward."""
    forward = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return bool(forward or layer._backward_hooks or layer._backward_pre_hooks)


class FastLoRALinear(LoRALinear):
    """The same layer, faster. Where W is read here, base_layer.forward does not run."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or self.merged:
            return super().forward(x)
        A, B = self.factors()
        dropping = self.training and self.lora_dropout > 0
        if not dropping and self.forming_pays(x):
            return FormedWeight.apply(x, self.weight_to_form, self.base_layer.bias, A, B, self.scaling)
        mask, kept = dropout_mask(x, self.lora_dropout) if dropping else (None, 1.0)
        if dropping and self.is_plain(x):
            return AddedInPlace.apply(x, self.weight_to_form, self.base_layer.bias, A, B, self.scaling / kept, mask)
        return LowRankTerm.apply(self.base_layer(x), x, A, B, self.scaling / kept, mask)

    @property
    def weight_to_form(self) -> Tensor | QuantizedTensor:
        """W, as `formed_weight` takes it."""
        return self.base_layer.quantized if isinstance(self.base_layer, Linear4bit) else self.base_layer.weight

    def forming_pays(self, x: Tensor) -> bool:
        """True where W + s·BA costs less than B(A x), and W can be read (`is_plain`).

        Forming W + s·BA twice costs 2·r·in·out multiplications and spares N·r·(in + out). So it pays for more than
        N = 2·in·out / (in + out) tokens: the width of a square layer, 1.5 times the shorter side of a layer with sides
        1 : 3.
        """
        tokens, features = x.numel() // self.in_features, self.in_features + self.out_features
        # The number is asked first, because it is cheap and settles the matter where one token is decoded.
        return tokens * features > 2 * self.in_features * self.out_features and self.is_plain(x)

    def is_plain(self, x: Tensor) -> bool:
        """True where W is read here, at no loss, in place of base_layer.forward: W is frozen, A is not (x is kept
        anyway), and nobody listens to the base layer.

        False in half precision and under autocast: an update below 1/512 of a bfloat16 weight rounds away in it.
        """
        base, A = self.base_layer, self.lora_A
        frozen = not any(parameter.requires_grad for parameter in base.parameters())
        if type(base) not in (nn.Linear, Linear4bit) or is_overheard(base) or not frozen or not A.requires_grad:
            return False
        dtype = x.dtype if isinstance(base, Linear4bit) else base.weight.dtype  # 4 bits have none of their own
        return x.dtype == dtype == A.dtype and dtype.itemsize >= 4 and autocast_dtype(x.device) is None
