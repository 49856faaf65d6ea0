"""Exercise 17: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "inference.bank_layers": """
def widened(old, r):
    new = old.new_zeros(old.shape[0], r, old.shape[2])
    new[:, : old.shape[1]] = old
    return new


class BankedLinear:
    def store(self, slot, A, B):
        if A is not None and len(A) > self.r:
            self.A = widened(self.A, len(A))
            self.B = widened(self.B, len(A))
        self.A[slot].zero_()
        self.B[slot].zero_()
        if A is None:
            return
        for row, (a, b) in enumerate(zip(A, B)):
            self.A[slot, row] = a
            self.B[slot, row] = b

    def gather(self, slots, r=None):
        self.rows = None
        if slots is not None and r != 0:
            self.rows = self.A.index_select(0, slots), self.B.index_select(0, slots)
            self.rows = tuple(stack[:, :r] for stack in self.rows)

    def add(self, x, y):
        A, B = self.rows
        narrow = torch.einsum("bti,bri->btr", x, A.to(x.dtype)).to(y.dtype)
        wide = torch.einsum("btr,bro->bto", narrow, B.to(y.dtype))
        return y + wide
"""
}

ROW_A = "self.A[slot, row] = a"
MUTANTS = [
    Mutant("stored one slot too low", ROW_A, "slot -= row == 0\n            " + ROW_A, "one slot too low"),
    Mutant(
        "stored in every slot",
        ("self.A[slot, row] = a", "self.B[slot, row] = b"),
        ("self.A[:, row] = a", "self.B[:, row] = b"),
        "every slot got the adapter",
    ),
    Mutant("scaled once more in store", "self.B[slot, row] = b", "self.B[slot, row] = b / len(A)", "B has the scaling"),
    Mutant("never grown", "len(A) > self.r", "False", "raised IndexError"),
    Mutant("grown without its content", "new[:, : old.shape[1]] = old", "pass", "the other slots are lost"),
    Mutant("shrinks", "len(A) > self.r", "len(A) != self.r", "raised"),
    Mutant(
        "grown in float32",
        "old.new_zeros(old.shape[0], r, old.shape[2])",
        "torch.zeros(old.shape[0], r, old.shape[2])",
        "dtype and device of the old one",
    ),
    Mutant(
        "stale numbers",
        ("self.A[slot].zero_()", "self.B[slot].zero_()", "if A is None:"),
        ("pass", "pass", "if A is None:\n            self.A[slot] = 0"),
        "former adapter are left",
    ),
    Mutant(
        "not emptied",
        ("self.A[slot].zero_()", "self.B[slot].zero_()"),
        ("self.A[slot, (self.r if A is None else 0) :] = 0", "self.B[slot, (self.r if A is None else 0) :] = 0"),
        "None, None left the slot's adapter",
    ),
    Mutant(
        "first row's adapter for all",
        "self.A.index_select(0, slots), ",
        "self.A[slots[:1]].expand(len(slots), -1, -1), ",
        "every row got the first row's adapter",
    ),
    Mutant("row b gets slot b", "self.A.index_select(0, slots)", "self.A[: len(slots)]", "row b got slot b"),
    Mutant("gather off by one", "self.A.index_select(0, slots)", "self.A[slots - 1]", "slot 0 is the base"),
    Mutant("None ignored", "self.rows = None\n        if", "if", "the batch's rows stay"),
    Mutant("r ignored", "stack[:, :r]", "stack", "computed for nothing"),
    Mutant("r of the last", "stack[:, :r]", "stack if r is None else stack[:, -r:]", "A of the rows, of rank 1"),
    Mutant("r = 0 ignored", " and r != 0", "", "to be None after gather(slots, 0)"),
    Mutant("add: first adapter for all", '"bti,bri->btr", x, A', '"bti,ri->btr", x, A[0]', "the first row's A"),
    Mutant(
        "add: first pair for all",
        "A, B = self.rows",
        "A, B = (part[:1].expand_as(part) for part in self.rows)",
        "through the first row's adapter",
    ),
    Mutant("add: A not transposed", '"bti,bri->btr", x', '"bti,bir->btr", x', "A is not transposed"),
    Mutant("add: B transposed", '"btr,bro->bto"', '"btr,bor->bto"', "once too often"),
    Mutant(
        "add: T summed",
        '"btr,bro->bto", narrow, B.to(y.dtype))',
        '"btr,bro->bo", narrow, B.to(y.dtype))[:, None]',
        "the positions are summed",
    ),
    Mutant("add: last position only", "return y + wide", "return y + wide[:, -1:]", "the last one's term"),
    Mutant("add: scaled once more", "return y + wide", "return y + wide / A.shape[1]", "B has the scaling in it"),
    Mutant("add: y forgotten", "return y + wide", "return wide", "y is missing"),
    Mutant("add: in place", "return y + wide", "return y.add_(wide)", "y is added to in place"),
    Mutant("add: x overwritten", "return y + wide", "x.detach().mul_(2)\n        return y + wide", "x was changed"),
    Mutant("add: detached", "return y + wide", "return y + wide.detach()", "no gradient reaches x"),
    Mutant("add: dtypes mixed", "A.to(x.dtype)", "A", "raised RuntimeError"),
    Mutant(
        "add: widened",
        ("A.to(x.dtype)).to(y.dtype)", "B.to(y.dtype)"),
        ("A.to(x.dtype)).float()", "B.float()"),
        "widen the sum",
    ),
    Mutant("add: widened at the end", "return y + wide", "return y.double() + wide", "widen the sum"),
    Mutant(
        "into the base",
        "self.rows = None\n",
        "self.rows = None\n        if slots is not None and self.r:\n"
        "            self.base_layer.weight.data.add_(self.B[1].T @ self.A[1])\n",
        "the whole layer",
    ),
    Mutant(
        "base touched at the end",
        "self.rows = None\n",
        "self.rows = None\n        if slots is None:\n            self.base_layer.weight.data.mul_(1 + 1e-12)\n",
        "which all rows share",
    ),
]
