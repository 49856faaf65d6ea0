"""A linear layer that many adapters share: one product for all rows of a batch, and two small ones for each.

    y_b = g_b ⊙ (W x_b + B_b (A_b x_b)) + bias        for row b with its own adapter, s folded into B

The layer keeps its adapters in slots, A (slots, r, in) and B (slots, r, out). When a batch begins, each row's pair is
gathered once, (batch, r, in) and (batch, r, out). Every forward pass is then one product with W, which is read once for
all rows, and two batched thin ones. The cost depends on the rows, not on how many adapters are resident.

Slot 0 holds zeros: the row without an adapter. A smaller rank is padded with zeros, unless that more than doubles the
work: then the ranks beyond are a second, smaller product of the rows that have them.

g is DoRA's m / ‖W + s·BA‖, one number for each output, computed when an adapter comes into its slot; it is 1 for all
other rows, and no layer multiplies by it as long as no row of the batch is DoRA's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.linear4bit import Linear4bit
from minilora.quant import dequantize


class BankedLinear(nn.Module):
    """A frozen linear layer, float or in 4 bits, and its slots. x (batch, T, in) -> (batch, T, out), or both without T.

    Outside a batch, and in one that leaves this layer alone, it is the frozen layer.
    """

    A: Tensor  # (slots, r, in)
    B: Tensor  # (slots, r, out), s·Bᵀ of each adapter
    g: Tensor | None  # (slots, out); None as long as no adapter here was DoRA's

    def __init__(self, base_layer, slots: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        for name, features in (("A", self.in_features), ("B", self.out_features)):
            self.register_buffer(name, torch.zeros(slots, 0, features, device=device, dtype=dtype), persistent=False)
        self.register_buffer("g", None, persistent=False)
        self.rows: tuple[Tensor, Tensor] | None = None  # A (batch, r, in) and B (batch, r, out) of the batch's rows
        # Where few rows have a larger rank: which, (k,), and of the ranks beyond A (k, r, in) and B (k, r, out).
        self.rest: tuple[Tensor, Tensor, Tensor] | None = None
        self.row_g: Tensor | None = None  # each row's g, (batch, 1, out); None where no row is DoRA's
        self.train(base_layer.training)

    @property
    def r(self) -> int:
        return self.A.shape[1]

    def store(self, slot: int, A: Tensor | None, B: Tensor | None):
        """Puts A (r, in) and s·Bᵀ (r, out) into a slot; None, None: zeros. Both stacks grow with the largest rank."""
        r = 0 if A is None else len(A)
        if r > self.r:
            self.A, self.B = (F.pad(stack, (0, 0, 0, r - self.r)) for stack in (self.A, self.B))
        for stack, factor in ((self.A, A), (self.B, B)):
            stack[slot, r:] = 0
            if factor is not None:
                stack[slot, :r] = factor

    def store_g(self, slot: int, g: Tensor | None):
        """Puts DoRA's g (out,) into a slot; None: ones."""
        if g is not None and self.g is None:
            self.g = self.B.new_ones(len(self.B), self.out_features)
        if self.g is not None:
            self.g[slot] = 1 if g is None else g

    def gather(self, slots: Tensor | None, r: int | None = None):
        """Picks each row's A and B by slots (batch,), of each the first r; None: the layer is plain again."""
        if slots is None or r == 0 or self.r == 0:
            self.rows = None
        else:
            self.rows = self.A[:, :r].index_select(0, slots), self.B[:, :r].index_select(0, slots)

    def begin(self, slots: Tensor, ranks: list[int], scaled: bool):
        """Row b of the batch to come has the adapter in slots[b], of rank ranks[b]. scaled: whether any is DoRA's."""
        common = common_rank(ranks)
        self.gather(slots, common)
        higher = torch.tensor([row for row, r in enumerate(ranks) if r > common], dtype=torch.int64)
        self.rest = None
        if len(higher):
            rows = higher.to(slots.device)
            A, B = (stack[:, common : max(ranks)].index_select(0, slots[rows]) for stack in (self.A, self.B))
            self.rest = rows, A, B
        self.row_g = self.g[slots][:, None] if scaled and self.g is not None else None

    def end(self):
        """The layer is plain again."""
        self.gather(None)
        self.rest = self.row_g = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.rows is None and self.rest is None:
            return y
        return self.adapt(x, y) if x.dim() == 3 else self.adapt(x[:, None], y[:, None])[:, 0]

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """The base's y (batch, T, out) with what each row adds to it, and then DoRA's g."""
        if self.rows is not None:
            y = self.add(x, y)
        if self.rest is not None:
            y = self.add_rest(x, y)
        return y if self.row_g is None else self.scale(y)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x (batch, T, in), y (batch, T, out) -> y + B (A x), each row with its own."""
        assert self.rows is not None
        A, B = self.rows
        # A thin matrix lies down, (r, T): standing, the same product takes half as long again for one token.
        h = torch.bmm(A.to(x.dtype), x.transpose(1, 2)).transpose(1, 2)  # (batch, T, r)
        # In place where no gradients are kept: y is this layer's own, and a second array of its size is half the cost.
        add = torch.baddbmm if torch.is_grad_enabled() else Tensor.baddbmm_
        return add(y, h.to(y.dtype), B.to(y.dtype))

    def add_rest(self, x: Tensor, y: Tensor) -> Tensor:
        """The same for the ranks that only some rows have."""
        assert self.rest is not None
        rows, A, B = self.rest
        h = torch.bmm(A.to(x.dtype), x[rows].transpose(1, 2)).transpose(1, 2)  # (k, T, the ranks beyond)
        add = torch.index_add if torch.is_grad_enabled() else Tensor.index_add_
        return add(y, 0, rows, torch.bmm(h.to(y.dtype), B.to(y.dtype)))

    def scale(self, y: Tensor) -> Tensor:
        """g ⊙ (y - bias) + bias, each row (T, out) with its own g; where g is 1, y to the last bit."""
        assert self.row_g is not None
        g, bias = self.row_g.to(y.dtype), self.base_layer.bias
        return y * g if bias is None else torch.addcmul(bias.to(y.dtype) * (1 - g), y, g)


def common_rank(ranks: list[int]) -> int:
    """The rank up to which all rows are computed together; the rest is a smaller product of the rows that have more.

    It is the largest, a single product, unless another at least halves the work: rows without an adapter beside few
    with one, or one of rank 64 among those of rank 8.
    """
    largest = max(ranks, default=0)

    def work(common: int) -> int:
        return len(ranks) * common + sum(r > common for r in ranks) * (largest - common)

    best = min({0, *ranks}, key=work)
    return best if 2 * work(best) <= work(largest) else largest


@torch.no_grad()
def norms(layer: nn.Linear | Linear4bit, A: Tensor, B: Tensor) -> Tensor:
    """‖W + s·BA‖ of each row of the layer's W, (out,), in float32 at least; 1 for a row of zeros, as in DoRALinear.
    A (r, in), and s·Bᵀ as B (r, out)."""
    dtype = torch.promote_types(layer.dtype if isinstance(layer, Linear4bit) else layer.weight.dtype, torch.float32)
    W = dequantize(layer.quantized, dtype) if isinstance(layer, Linear4bit) else layer.weight.to(dtype)  # (out, in)
    with torch.autocast(W.device.type, enabled=False):
        found = torch.addmm(W, B.T.to(W), A.to(W)).norm(dim=1)
    return found.masked_fill(found == 0, 1)
