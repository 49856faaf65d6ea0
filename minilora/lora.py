"""The LoRA layer: a frozen linear layer plus a trained low-rank update (Hu et al. 2021, section 4.1).

    y = W x + b + s · B(A(dropout(x)))        s = lora_alpha / r

W (out, in) and b stay frozen. A (r, in) and B (out, r) are trained: r·(in + out) numbers instead of in·out.
B starts at zero, so the wrapped layer starts as the layer it wraps; A starts random, because with both at zero
neither would ever get a gradient. The update is as good as a change of weight, ΔW = s·BA, so after training it can
be added to W for good (`merge`) and inference costs what it did before.

The formula stands in `lora_reference`. Training computes the same function in one of two cheaper ways, both exact:
`FormedWeight` for many tokens, `LowRankTerm` for few. `LoRALinear` picks one, by counting multiplications.

Letters in the shape comments:
    N tokens (all leading dimensions of x together)   in, out the layer's features   r rank
"""

import math
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def check_hyperparameters(r: int, lora_alpha: float, lora_dropout: float):
    """Raises ValueError, naming the field, for a value that cannot work."""
    check_rank("r", r)
    check_alpha("lora_alpha", lora_alpha)
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout is {lora_dropout!r}; it must be a probability of at least 0 and below 1")


def check_rank(name: str, r: int):
    if type(r) is not int or r < 1:
        raise ValueError(f"{name} is {r!r}; it must be a whole number of at least 1")


def check_alpha(name: str, lora_alpha: float):
    if not (isinstance(lora_alpha, (int, float)) and 0 < lora_alpha < math.inf):
        raise ValueError(f"{name} is {lora_alpha!r}; it must be a number above 0")


@dataclass
class LoRAConfig:
    """Which layers get an adapter, and of what shape. Field names and meanings are PEFT's.

    Raises ValueError for a rank, alpha or dropout out of range and for an unknown start, naming the field.
    """

    r: int = 8  # rank of the update
    lora_alpha: float = 16  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # on the input of A, while training
    target_modules: list[str] | str = ("q_proj", "v_proj")  # name suffixes, one regular expression, or "all-linear"
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) (Kalajdzievski 2023), so that a high rank still learns
    rank_pattern: dict[str, int] = field(default_factory=dict)  # name suffix or expression -> r for those layers
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # the same for lora_alpha
    use_dora: bool = False  # magnitude and direction apart (Liu 2024): adapters/dora.py
    init_lora_weights: bool | str = True  # how A and B start (adapters/starts.py); True: A random, B zero

    def __post_init__(self):
        if not isinstance(self.target_modules, str):
            self.target_modules = list(self.target_modules)
        check_hyperparameters(self.r, self.lora_alpha, self.lora_dropout)
        for key, r in self.rank_pattern.items():
            check_rank(f"rank_pattern[{key!r}]", r)
        for key, lora_alpha in self.alpha_pattern.items():
            check_alpha(f"alpha_pattern[{key!r}]", lora_alpha)
        starts = True, "gaussian", "pissa", "olora", "eva"
        if self.init_lora_weights not in starts:
            raise ValueError(f"init_lora_weights is {self.init_lora_weights!r}; known are {starts}, and apply_loftq")


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def lora_reference(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """The formula as it is written, y = W x + b + s·B(A x), without dropout: x (..., in) -> (..., out)."""
    return F.linear(x, W, bias) + scaling * F.linear(F.linear(x, A), B)


class FormedWeight(Function):
    """y = (W + s·BA) x + b, with W + s·BA formed for the step, thrown away and formed again in backward.

    Multiplications, for N tokens (times two for FLOPs; x, y and g = dL/dy as rows):

        full fine-tuning                        LoRA, this form
        y  = x Wᵀ           N·in·out            y  = x (W + sBA)ᵀ     N·in·out + r·in·out
        gx = g W            N·in·out            gx = g (W + sBA)      N·in·out + r·in·out
        gW = gᵀ x           N·in·out            gA = (s·Bᵀgᵀ) x       N·r·(out + in)
                                                gB = (s·A xᵀ g)ᵀ      N·r·(in + out)

    Of three large products two remain: that is the limit of 2/3. LoRA saves the weight gradient, never the product
    that carries the gradient on to the layers below. The rest is 2·r/N + 2·r·(in + out)/(in·out) of one large product:
    7 % of it for r = 8, 512 features and 2048 tokens. Written plainly, the formula spends 3·N·r·(in + out) on thin
    products instead of 2·N·r·(in + out), and passes several times over arrays of N·out numbers, to scale, to add and
    to collect gradients; that waits for memory and costs more than the arithmetic.

    Saved for backward: x, and references to W, A, B. Keeping W + sBA would hold a second copy of every weight from
    forward to backward; forming it again costs r·in·out.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(x, W, A, B)
        ctx.scaling = scaling
        return F.linear(x, torch.addmm(W, B, A, alpha=scaling), bias)  # addmm: W + s·B A, (out, in)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, W, A, B = ctx.saved_tensors
        gx = g @ torch.addmm(W, B, A, alpha=ctx.scaling) if ctx.needs_input_grad[0] else None  # (..., in)
        x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])  # (N, in), (N, out)
        # Thin matrices lie down, (r, N) and (r, out): as columns, (N, r), the same products take 2 to 5 times as long.
        gA = (ctx.scaling * B.T @ g.T) @ x  # (r, N) (N, in)
        gB = ((ctx.scaling * A @ x.T) @ g).T  # ((r, N) (N, out))ᵀ
        return gx, None, None, gA, gB, None


class LowRankTerm(Function):
    """y = base + s · (m ⊙ x) Aᵀ Bᵀ, the base layer's output kept apart and m a dropout mask or None.

    It asks nothing of the base layer, so it serves any dtype and a quantized base, and whatever of the base is not
    frozen gets its gradient from the base's own autograd. Multiplications over the base layer's: N·r·(in + out)
    forward, twice that backward.

    Saved for backward: x by reference, A x (r numbers a token) and the mask (one byte an element). Plain autograd
    would hold the dropped x as well, four bytes an element, which is how LoRA comes to need more memory than full
    fine-tuning. A and B may be float32 beside half-precision activations; the products are in the base output's dtype.
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
            gx = gx if mask is None else gx * mask
        if ctx.needs_input_grad[2]:
            dropped = (x if mask is None else x * mask).reshape(-1, x.shape[-1]).to(g.dtype)  # (N, in)
            gA = (h @ dropped).to(A.dtype)  # (r, N) (N, in)
        gB = ctx.scaling * (Ax @ rows).T  # ((r, N) (N, out))ᵀ
        return g, gx, gA, gB.to(B.dtype), None, None


class LoRALinear(nn.Module):
    """Wraps `base_layer`, anything with in_features, out_features and forward: x (..., in) -> (..., out).

    `lora_A` (r, in) and `lora_B` (out, r) are float32, also on a half-precision base, and float64 on a float64 one.
    `enabled = False` gives the original layer's output, merged or not. `merge` needs an nn.Linear. Where the weight is
    formed for the step, base_layer.forward does not run: put hooks on the LoRALinear.
    """

    def __init__(self, base_layer: nn.Module, r: int, lora_alpha: float, lora_dropout=0.0, use_rslora=False):
        super().__init__()
        check_hyperparameters(r, lora_alpha, lora_dropout)
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.scaling = lora_scaling(r, lora_alpha, use_rslora)
        self.enabled = True
        stored = next(chain(base_layer.parameters(), base_layer.buffers()))
        like = dict(device=stored.device, dtype=torch.promote_types(stored.dtype, torch.float32))
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **like))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # uniform within ±1/sqrt(in), as nn.Linear's own weight
        self.register_buffer("original_weight", None, persistent=False)  # W while merged: moves with the module
        for name in ("start_A", "start_B"):  # A and B at the start, if `start_from` took them out of W
            self.register_buffer(name, None)
        self.original_mark: str | None = None  # what the base's fingerprint says of W, noted before that
        self.train(base_layer.training)  # put into a model in eval mode, it must not drop anything

    @property
    def merged(self) -> bool:
        return self.original_weight is not None

    @property
    def moved(self) -> bool:
        return self.start_A is not None

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            y = F.linear(x, self.original_weight, self.base_layer.bias) if self.merged else self.base_layer(x)
            return LowRankTerm.apply(y, x, self.start_A, self.start_B, self.scaling, None) if self.moved else y
        if self.merged:
            return self.base_layer(x)
        dropping = self.training and self.lora_dropout > 0
        if not dropping and self.forming_pays(x):
            base = self.base_layer
            return FormedWeight.apply(x, base.weight, base.bias, self.lora_A, self.lora_B, self.scaling)
        scaling, mask = self.scaling, None
        if dropping:
            keep = 1 - self.lora_dropout
            scaling, mask = scaling / keep, torch.empty_like(x, dtype=torch.bool).bernoulli_(keep)
        return LowRankTerm.apply(self.base_layer(x), x, self.lora_A, self.lora_B, scaling, mask)

    def forming_pays(self, x: Tensor) -> bool:
        """True where W + s·BA costs less than B(A x), and is exact, and W is frozen, and A is not (x is kept anyway).

        Forming twice costs 2·r·in·out; it spares N·r·(in + out). So it pays from N = 2·in·out / (in + out) tokens:
        the layer's width. In half precision it never does: added to a bfloat16 weight, an update below 1/512
        of it would round away.
        """
        tokens, features = x.numel() // self.in_features, self.in_features + self.out_features
        if tokens * features <= 2 * self.in_features * self.out_features:
            return False  # asked first: it is cheap, and ends the matter where one token is decoded
        base, device = self.base_layer, x.device.type
        frozen = not any(parameter.requires_grad for parameter in base.parameters())
        if type(base) is not nn.Linear or not frozen or not self.lora_A.requires_grad:
            return False
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        same_dtype = x.dtype == base.weight.dtype == self.lora_A.dtype
        return same_dtype and not autocast and x.dtype.itemsize >= 4

    def product(self, A: Tensor, B: Tensor) -> Tensor:
        """s·BA, (out, in), in float32 at least."""
        wide = torch.promote_types(A.dtype, torch.float32)
        return self.scaling * B.to(wide) @ A.to(wide)

    def update(self) -> Tensor:
        """What `merge` adds to the base layer's weight: s·BA."""
        return self.product(self.lora_A, self.lora_B)

    def delta_weight(self) -> Tensor:
        """ΔW, (out, in): what training did to W. That is s·BA, less what of it was W at the start."""
        return self.update() - self.product(self.start_A, self.start_B) if self.moved else self.update()

    @torch.no_grad()
    def start_from(self, A: Tensor, B: Tensor):
        """Starts at A (r, in), B (out, r) and takes them out of an nn.Linear's weight: W ← W - s·BA, rounded once."""
        self.lora_A.copy_(A.float())  # to the digits that an adapter file holds: what is left of W makes up for it
        self.lora_B.copy_(B.float())
        self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        self.base_layer.weight.copy_(self.base_layer.weight - self.product(self.start_A, self.start_B))

    @torch.no_grad()
    def merge(self):
        """W += s·BA, once. Half-precision weights are added to in float32 and rounded once.

        Raises ValueError when the base layer is not an nn.Linear, whose weight can be added to.
        """
        if self.merged:
            return
        if not isinstance(self.base_layer, nn.Linear):
            raise ValueError(f"cannot merge into {type(self.base_layer).__name__}; only an nn.Linear can be added to")
        weight = self.base_layer.weight
        self.original_weight = weight.detach().clone()
        weight.copy_(weight + self.update())  # type promotion makes the sum float32 or wider

    @torch.no_grad()
    def unmerge(self):
        """Puts the very weights back. (W + ΔW) - ΔW would not be W: the sum was rounded, and what it lost is gone."""
        if self.merged:
            self.base_layer.weight.copy_(self.original_weight)
            self.original_weight = None

    def extra_repr(self) -> str:
        return f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, scaling={self.scaling:g}"
