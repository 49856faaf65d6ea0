"""Exercise 10: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "adapters.starts": """
def energy_rank(singular_values, share):
    if share <= 0 or share > 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    squares = [float(value) ** 2 for value in singular_values]
    sums = []
    for square in squares:
        sums.append((sums[-1] if sums else 0.0) + square)
    enough = sums[-1] * share
    for number, held in enumerate(sums, start=1):
        if held >= enough:
            return number


def pissa(W, r, scaling):
    U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    half = torch.diag((S[:r] / scaling) ** 0.5)
    A = half @ Vt[:r, :]
    B = U[:, :r] @ half
    return A, B
"""
}

MUTANTS = [
    Mutant("not squared", "float(value) ** 2", "float(value)", "square the singular values"),
    Mutant(
        "from the smallest",
        "for value in singular_values]",
        "for value in singular_values.flip(0)]",
        "from the smallest",
    ),
    Mutant("one too few", "return number", "return number - 1", "one too few"),
    Mutant("one too many", "enumerate(sums, start=1)", "enumerate(sums, start=2)", "one too many"),
    Mutant(
        "share of the largest",
        "enough = sums[-1] * share",
        "enough = squares[0] * share",
        "the share is one of the whole energy",
    ),
    Mutant(
        "counts what is near the largest",
        "enough = sums[-1] * share",
        "return max(1, sum(square >= share * squares[0] for square in squares))",
        "not of the largest alone",
    ),
    Mutant("greater, not equal", "if held >= enough:", "if held > enough or number == len(sums):", "≥ and not >"),
    Mutant(
        "two ways of adding",
        "    for number, held in enumerate(sums, start=1):\n        if held >= enough:\n            return number",
        "    total = singular_values.square().sum()\n"
        "    held = (singular_values.square() / total).cumsum(0)\n"
        "    return int((held < share).sum()) + 1",
        "two ways of adding up round differently",
    ),
    Mutant("0 allowed", "share <= 0 or ", "", "0 < share <= 1"),
    Mutant("percent allowed", " or share > 1", "", "0 < share <= 1"),
    Mutant("tensor and not int", "return number", "return torch.tensor(number)", "convert with int"),
    Mutant(
        "zeros are rank 0",
        "enough = sums[-1] * share",
        "enough = sums[-1] * share\n    if not enough:\n        return 0",
        "at least 1",
    ),
    Mutant("scaling forgotten", "S[:r] / scaling", "S[:r]", "the scaling is missing"),
    Mutant(
        "scaling outside the root", "(S[:r] / scaling) ** 0.5", "S[:r] ** 0.5 / scaling", "the scaling divides twice"
    ),
    Mutant("scaling upside down", "S[:r] / scaling", "S[:r] * scaling", "upside down"),
    Mutant("root forgotten", " ** 0.5", "", "S_r comes in twice"),
    Mutant("S forgotten", "S[:r] / scaling", "torch.ones_like(S[:r]) / scaling", "S_r is missing"),
    Mutant("root on one side", "U[:, :r] @ half", "U[:, :r]", "only one side has √(S_r / s)"),
    Mutant("the smallest", ("S[:r]", "Vt[:r, :]", "U[:, :r]"), ("S[-r:]", "Vt[-r:, :]", "U[:, -r:]"), "the smallest"),
    Mutant("V not transposed", "Vt[:r, :]", "Vt[:, :r].T", "Vh is Vᵀ already"),
    Mutant("all directions", ("S[:r]", "Vt[:r, :]", "U[:, :r]"), ("S", "Vt", "U"), "all k directions"),
    Mutant("B, A", "return A, B", "return B, A", "exchanged"),
    Mutant("A as (in, r)", "half @ Vt[:r, :]", "(half @ Vt[:r, :]).T", "A is transposed"),
    Mutant("all on B", "return A, B", "return Vt[:r, :], B @ half", "nothing of S_r is on this side"),
    Mutant("in double", "torch.linalg.svd(W,", "torch.linalg.svd(W.double(),", "expected A and B in torch.float32"),
    Mutant(
        "W scaled in place",
        "torch.linalg.svd(W,",
        "torch.linalg.svd(W.div_(scaling).mul_(scaling + 1),",
        "W was changed",
    ),
]
