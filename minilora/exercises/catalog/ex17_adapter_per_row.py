"""Exercise 17: a batch in which each row has its own adapter."""

import torch
from torch import Tensor, nn

from minilora.exercises.checking import SIZES, Draw, Exercise, expect, require
from minilora.inference.bank_layers import BankedLinear

EXERCISE = Exercise(
    number=17,
    slug="adapter_per_row",
    title="A batch in which each row has its own adapter",
    targets=(
        "inference.bank_layers:BankedLinear.store",
        "inference.bank_layers:BankedLinear.gather",
        "inference.bank_layers:BankedLinear.add",
    ),
    changes=tuple(f"inference.bank_layers:BankedLinear.{name}" for name in ("store", "gather", "add")),
    difficulty=2,
    minutes=45,
    notebook="05_merge_swap_serve",
    section="8. Every row its own adapter",
    explanation="""\
Users of a server do not sort themselves by adapter. Kept apart from W, adapters of one base can share a batch: W x is
one product for all rows, and row b adds its own thin term (Punica, Chen 2023; S-LoRA, Sheng 2023):

    y_b = W x_b + B_b (A_b x_b)

A `BankedLinear` keeps its adapters in slots of two stacks, A (slots, r, in) and B (slots, r, out). B lies transposed,
and has the scaling in it. Slot 0 is zeros for good: the base.

- `store` writes one adapter into one slot. The stacks start with r = 0. A larger rank than any before makes both stacks
  grow, and all slots keep what they have; a smaller one is padded with zeros, and nothing of the slot's former adapter
  is left. `None, None` empties the slot. dtype and device of the stacks stay.
- `gather` is called when a batch begins. It sets `self.rows` to the pair A (batch, r, in), B (batch, r, out) of the
  batch's rows, a slot perhaps several times; for None, the plain layer again, to None. `r`, where it is given, is the
  largest rank among these rows: the rest of the stacks is zeros for all of them, and is left out. Where it is 0, no row
  has anything to add.
- `add` gets x (batch, T, in) and the base's output y (batch, T, out), and returns the sum in y's dtype, whatever the
  stacks and x have. x is never changed. y may be added to in place, but not while gradients are recorded.

The layer's `forward`, already there, calls `add`. The base layer is never changed.""",
    hints=(
        "Look at one row: x_b is (T, in), A_b (r, in), B_b (r, out). Which products give (T, r), and then (T, out)? "
        "Indexing a stack with a tensor of slot numbers, stack[slots], picks whole matrices.",
        "torch.bmm multiplies (batch, T, in) by (batch, in, r), row by row. To grow a stack, make zeros of the new "
        "shape, copy the old stack into the first r places, and then write the new adapter; F.pad does the first two.",
        "store: grow if A has more rows than self.r; fill the slot of both stacks with 0, then its first rows. gather: "
        "self.rows = None if slots is None or r == 0 else (self.A[slots, :r], self.B[slots, :r]). add: y + x @ "
        "A.transpose(1, 2) @ B, with A.to(x.dtype), and what follows .to(y.dtype).",
    ),
    question="One row has an adapter of rank 4, all others rank 16. What does the row of rank 4 compute beside its own "
    "share, why does that not change its output, and what would you do if one adapter of a thousand had rank 256?",
    answer="It multiplies by the 12 rows of zeros that pad its A and B to rank 16: four times the products it "
    "needs. Each adds exact zeros, so the output is the same. With one adapter of rank 256 all rows would be padded "
    "to 256 as long as it is in the bank, sixteen times the work. Then one would keep a bank for each size of rank, "
    "or sort a batch by rank, or cut that adapter to a lower rank by its singular values.",
)


def bank(draw: Draw, d: int, out: int, slots: int, r: int = 0, dtype=torch.float64) -> BankedLinear:
    """With random stacks of rank r, but for slot 0."""
    base = nn.Linear(d, out).to(dtype).requires_grad_(False)
    for parameter in base.parameters():
        parameter.copy_(draw.normal(*parameter.shape))
    layer = BankedLinear(base, slots, base.weight.device, base.weight.dtype)
    if r:
        layer.A, layer.B = draw.normal(slots, r, d, dtype=dtype), draw.normal(slots, r, out, dtype=dtype)
        layer.A[0], layer.B[0] = 0, 0
    return layer


def updates(A: Tensor, B: Tensor) -> Tensor:
    """What each slot adds to W, (slots, out, in). It does not depend on where the padding lies."""
    return torch.einsum("kro,kri->koi", B, A)


def pair(draw: Draw, r: int, layer: BankedLinear) -> tuple[Tensor, Tensor]:
    return draw.normal(r, layer.in_features), draw.normal(r, layer.out_features)


def check_stacks(layer: BankedLinear, expected: list[Tensor], r: int, case: dict, slips: dict):
    """expected: by slot, the update that it holds."""
    for name, wide in (("A", layer.in_features), ("B", layer.out_features)):
        stack, shape = getattr(layer, name), (len(expected), r, wide)
        slip = "the stacks have the largest rank so far: they grow for a larger one, and never shrink"
        message = f"self.{name}: expected shape {shape}, got {tuple(stack.shape)}"
        require(stack.shape == shape, message, case, slip)
        slip = "a new stack takes dtype and device of the old one: old.new_zeros, or F.pad"
        require(stack.dtype == torch.float64, f"self.{name}: expected float64, got {stack.dtype}", case, slip)
    expect(updates(layer.A, layer.B), torch.stack(expected), case, slips, "Bᵀ A of each slot")


@EXERCISE.property("store: an adapter lies in its slot as it was given, and the other slots are zeros")
def stored(draw: Draw):
    for most in SIZES:
        slots, r = draw.integer(3, most + 2), draw.integer(2, most)
        layer = bank(draw, draw.integer(1, most), draw.integer(1, most), slots)
        slot, (A, B) = draw.integer(1, slots - 2), pair(draw, r, layer)
        zero, own = torch.zeros(layer.out_features, layer.in_features, dtype=A.dtype), B.T @ A
        given = A.clone(), B.clone()
        layer.store(slot, A, B)
        same = torch.equal(A, given[0]) and torch.equal(B, given[1])
        require(
            same, "the adapter that was given has changed", {"A": given[0], "B": given[1]}, "copy it into the stacks"
        )
        others = [[own if place == at else zero for place in range(slots)] for at in (slot, slot - 1, slot + 1)]
        slips = {
            "every slot got the adapter; it belongs into one": torch.stack([own] * slots),
            "the adapter lies one slot too low; slots count from 0, and 0 is the base": torch.stack(others[1]),
            "the adapter lies one slot too high": torch.stack(others[2]),
            "the numbers are scaled once more; B has the scaling in it": torch.stack(others[0]) / r,
        }
        check_stacks(layer, others[0], r, {"slots": slots, "slot": slot, "A": A, "B": B}, slips)


@EXERCISE.property("store: a larger rank makes the stacks grow, a smaller one is padded, and other slots keep theirs")
def grown(draw: Draw):
    for most in SIZES:
        layer = bank(draw, draw.integer(1, most), draw.integer(1, most), 4)
        small, large = draw.integer(1, most), draw.integer(most + 1, most + 3)
        expected = [torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)] * 4
        ranks = {}
        for slot, r in ((1, small), (3, large), (2, small)):
            ranks[slot], (A, B), before = r, pair(draw, r, layer), torch.stack(expected)
            expected[slot] = B.T @ A
            layer.store(slot, A, B)
            lost = torch.zeros_like(before)
            lost[slot] = expected[slot]
            slips = {"the other slots are lost: copy the old stack into the grown one": lost}
            check_stacks(layer, expected, max(ranks.values()), {"rank by slot, in this order": dict(ranks)}, slips)


@EXERCISE.property("store: nothing is left of a slot's former adapter, and None, None empties the slot")
def used_again(draw: Draw):
    for most in SIZES:
        layer = bank(draw, draw.integer(1, most), draw.integer(1, most), 3, most + 1)
        for r in (draw.integer(1, most), 0):
            A, B = pair(draw, r, layer)
            expected, stale = list(updates(layer.A, layer.B)), updates(layer.A[1:2, r:], layer.B[1:2, r:])[0]
            left = [expected[0], B.T @ A + stale, expected[2]]
            expected[1] = B.T @ A
            layer.store(1, *((A, B) if r else (None, None)))
            slip = "numbers of the slot's former adapter are left: write zeros behind the new ones"
            slips = {slip if r else "None, None left the slot's adapter there: fill it with zeros": torch.stack(left)}
            check_stacks(layer, expected, most + 1, {"rank before": most + 1, "rank now": r}, slips)


@EXERCISE.property("gather: each row gets the pair of its slot, and None makes the layer plain again")
def gathered(draw: Draw):
    for most in SIZES:
        slots, batch = most + 2, draw.integer(3, most + 2)
        layer = bank(draw, draw.integer(1, most), draw.integer(1, most), slots, draw.integer(1, most))
        chosen = torch.tensor([draw.integer(1, slots - 1) for _ in range(batch)])
        chosen[1] = 0  # a row without an adapter
        chosen[2] = chosen[0]  # two rows with the same one
        case = {"slots of the rows": chosen.tolist()}
        layer.gather(chosen)
        message = "expected self.rows to be the pair (A, B) of the rows"
        require(isinstance(layer.rows, (tuple, list)) and len(layer.rows) == 2, message, case)
        for name, found, stack in zip("AB", layer.rows, (layer.A, layer.B), strict=True):
            slips = {
                "every row got the first row's adapter": torch.stack([stack[chosen[0]]] * batch),
                "row b got slot b; its slot is slots[b]": stack[:batch],
                "off by one: the slot numbers count from 0, and slot 0 is the base": stack[chosen - 1],
                "off by one: slots[b] is the number of the slot itself": stack[(chosen + 1) % slots],
            }
            expect(found, torch.stack([stack[slot] for slot in chosen.tolist()]), case, slips, f"{name} of the rows")
        layer.gather(None)
        slip = "the batch's rows stay, and the next one without adapters would go through them"
        require(layer.rows is None, "expected self.rows to be None after gather(None)", case, slip)
        layer.gather(chosen, 1)
        slip = "r is the largest rank of these rows: more of the stacks is zeros, and would be computed for nothing"
        found = [stack.shape[1] for stack in layer.rows]
        require(found == [1, 1], f"gather(slots, 1): expected stacks of rank 1, got {found}", case, slip)
        expect(layer.rows[0], layer.A[chosen, :1], case, what="A of the rows, of rank 1")
        layer.gather(chosen, 0)
        require(layer.rows is None, "expected self.rows to be None after gather(slots, 0)", case)


@EXERCISE.property("add: y + B (A x), each row with its own A and B")
def added(draw: Draw):
    for most in SIZES:
        square = most == SIZES[0]  # where a matrix the wrong way round shows in the numbers
        batch, T = draw.integer(2, most), draw.integer(2, most)
        d, out, r = (most, most, most) if square else (draw.integer(1, most), draw.integer(1, most), 2)
        layer = bank(draw, d, out, 2)
        A, B, x, y = (draw.normal(*s) for s in ((batch, r, d), (batch, r, out), (batch, T, d), (batch, T, out)))
        layer.rows, case = (A, B), {"x": x, "A": A, "B": B, "y": y}
        term = torch.stack([x[b] @ A[b].T @ B[b] for b in range(batch)])
        slips = {
            "every row went through the first row's adapter": y + x @ A[0].T @ B[0],
            "every row went through the first row's A": y + torch.bmm(x @ A[0].T, B),
            "y is missing: the term is added to the base's output": term,
            "that is y alone: B (A x) is not added": y,
            "the term is scaled once more; B has the scaling in it": y + term / r,
            "the positions are summed: every one of T has a term of its own": y + term.sum(1, keepdim=True),
            "all positions got the last one's term": y + term[:, -1:],
        }
        if square:
            slips["A is not transposed: it is (r, in), and x_b A_bᵀ is wanted"] = y + torch.bmm(torch.bmm(x, A), B)
            slips["B is transposed once too often: it lies as (r, out) already"] = y + torch.einsum(
                "bti,bri,bor->bto", x, A, B
            )
        with torch.no_grad():
            found = layer.add(x, y.clone())
        expect(found, y + term, case, slips, "y + B (A x)")


@EXERCISE.property(
    "add: with gradients nothing is overwritten, and those of x and y are autograd's; x stays in any case"
)
def watched(draw: Draw):
    for most in SIZES:
        batch, T, d, out, r = (draw.integer(1, most) for _ in range(5))
        layer = bank(draw, d, out, 2)
        A, B, x, z = (draw.normal(*s) for s in ((batch, r, d), (batch, r, out), (batch, T, d), (batch, T, out)))
        layer.rows, weights = (A, B), draw.normal(batch, T, out)
        case, before = {"batch": batch, "T": T, "in": d, "out": out, "r": r}, x.clone()
        with torch.no_grad():
            layer.add(x, z.clone())
        require(torch.equal(x, before), "x was changed; it belongs to the layer's caller", case)
        x, z = x.requires_grad_(), z.requires_grad_()
        y = z.tanh()  # tanh's own backward needs y as it is
        kept = y.detach().clone()
        found = layer.add(x, y)
        slip = "y is added to in place; where gradients are recorded (torch.is_grad_enabled()) make a new tensor"
        require(torch.equal(y, kept), "y was changed while gradients were recorded", case, slip)
        expected = z.tanh() + torch.einsum("bti,bri,bro->bto", x, A, B)
        for name, part in (("x", x), ("y", z)):
            wanted = torch.autograd.grad((expected * weights).sum(), part, retain_graph=True)[0]
            got = torch.autograd.grad((found * weights).sum(), part, retain_graph=True, allow_unused=True)[0]
            slip = "something on the way is detached, or computed under no_grad"
            require(got is not None, f"no gradient reaches {name}", case, slip)
            expect(got, wanted, case, what=f"the gradient that reaches {name}")


@EXERCISE.property("add: the sum has y's dtype, whatever x and the stacks have")
def dtypes(draw: Draw):
    wide, half = torch.float32, torch.bfloat16
    for of_A, of_x, of_y in ((wide, half, half), (wide, wide, half), (half, wide, wide)):
        layer = bank(draw, 3, 2, 2)
        A, B = draw.normal(2, 2, 3).abs().to(of_A), draw.normal(2, 2, 2).abs().to(of_A)  # positive: nothing cancels
        x, y = draw.normal(2, 2, 3).abs().to(of_x), draw.normal(2, 2, 2).abs().to(of_y)
        layer.rows, case = (A, B), {"x": of_x, "y": of_y, "stacks": of_A}
        expected = y.double() + torch.einsum("bti,bri,bro->bto", x.double(), A.double(), B.double())
        for watching in (False, True):
            with torch.set_grad_enabled(watching):
                found = layer.add(x, y.clone())
            slip = "the stacks or x widen the sum: .to(y.dtype) before adding"
            require(found.dtype == of_y, f"expected type {of_y}, got {found.dtype}", case, slip)
            expect(found, expected, case, what="y + B (A x)", tolerance=0.03)


@EXERCISE.property(
    "the whole layer: stored, gathered, and computed, rows with adapters beside rows without, then plain again"
)
@torch.no_grad()
def whole(draw: Draw):
    for most in SIZES:
        layer = bank(draw, draw.integer(1, most), draw.integer(1, most), 4)
        W, bias = (parameter.clone() for parameter in layer.base_layer.parameters())
        layer.gather(torch.tensor([0, 0, 0]))  # before anything is stored: all rows are the base
        for lead in ((3, 2), (3,)):
            x = draw.normal(*lead, layer.in_features)
            expect(layer(x), x @ W.T + bias, {"x": x, "slots": "empty"}, what="y")
        M = [W, W, W, W]
        for slot in (1, 2, 3):
            A, B = pair(draw, draw.integer(1, most), layer)
            M[slot] = W + B.T @ A
            layer.store(slot, A, B)
        for lead in ((3, 2), (3,)):
            chosen, x = [draw.integer(1, 3), 0, draw.integer(1, 3)], draw.normal(*lead, layer.in_features)
            layer.gather(torch.tensor(chosen))
            expected = torch.stack([x[b] @ M[slot].T + bias for b, slot in enumerate(chosen)])
            case = {"slots of the rows": chosen, "shape of x": tuple(x.shape)}
            expect(layer(x), expected, case, what="y")
            layer.gather(None)
            expect(layer(x), x @ W.T + bias, case, what="y after gather(None)")
        slip = "the adapter was added to W, which all rows share"
        require(torch.equal(layer.base_layer.weight, W), "the base layer's weight was changed", case, slip)
