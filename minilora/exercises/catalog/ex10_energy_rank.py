"""Exercise 10: how much rank a matrix needs, and the best A and B of a rank."""

import torch
from torch import Tensor

from minilora.adapters.starts import energy_rank, pissa
from minilora.exercises.checking import SIZES, Draw, Exercise, expect, expect_error, require

EXERCISE = Exercise(
    number=10,
    slug="energy_rank",
    title="How much rank a change needs",
    targets=("adapters.starts:energy_rank", "adapters.starts:pissa"),
    difficulty=2,
    minutes=30,
    notebook="01_lora_from_scratch",
    section="7. A real ΔW",
    explanation="""\
Every matrix is a sum of rank-1 pieces, its singular value decomposition: W = U S Vᵀ = Σ σ_i u_i v_iᵀ, σ_1 ≥ σ_2 ≥ …
Its energy is ‖W‖² = Σ σ_i². Keep the first r pieces: no matrix of rank r is nearer to W, and what is missing has the
energy of the other σ_i (Eckart and Young 1936).

`energy_rank(singular_values, share)`: the fewest of the largest σ whose squares add up to at least `share` of the sum
of all squares, as an int. At least 1, for a matrix of zeros too; never more than there are, whatever rounding does to a
sum. A share that is not above 0 and at most 1: ValueError, in which the word share occurs.

`pissa(W, r, scaling)`: the A (r, in) and B (out, r) for which s·BA, s the scaling, is those first r pieces of W
(out, in). S_r / s is split evenly, a square root for each side (Meng et al. 2024, section 3):

    A = √(S_r / s) V_rᵀ        B = U_r √(S_r / s)

V_r and U_r are the r singular vectors that belong to the largest σ. A and B have the dtype of W, and W stays as it was.
`torch.linalg.svd` may be used; it sorts from the largest on.""",
    hints=(
        "cumsum of the squares is the energy of the first 1, 2, ... k pieces. Which of them fall short of the share? "
        "torch.linalg.svd(W, full_matrices=False) gives U (out, k), S (k,) and Vh (k, in): Vh is Vᵀ already.",
        "One more than the number of sums that fall short. Compare with share · (the last of the same sums), so that "
        "the last one never falls short. For pissa: rows of Vh, columns of U.",
        "energy = cumsum(σ²); r = 1 + how many energy < share · energy[-1], at most k. root = sqrt(S[:r] / s); A is "
        "Vh[:r] with row i times root[i], B is U[:, :r] with column i times root[i].",
    ),
    question="A ΔW needs 22 pieces for 90 % of its energy. Why does it not follow that LoRA needs r = 22 for the task, "
    "and what would you measure instead?",
    answer="Energy counts every direction by its size, the task by its use. The small pieces of a ΔW may be noise "
    "of training that no answer depends on, and a piece with little energy may be the one that matters. Besides, "
    "LoRA need not find the best approximation of this ΔW; another change of a lower rank may do the task as well. "
    "Measure the task: train with several ranks, or cut the ΔW to its first r pieces and evaluate the model, and see "
    "from which r on the score no longer rises.",
)


def fewest(squares: list[float], share: float) -> int:
    """The first number of terms whose sum is enough."""
    return next(r for r in range(1, len(squares) + 1) if sum(squares[:r]) >= share * sum(squares))


@EXERCISE.property("energy_rank: the fewest of the largest whose squares hold the share")
def holds_the_share(draw: Draw):
    for most in SIZES * 3:
        values = (draw.normal(draw.integer(3, 2 + most)).abs() + 0.4).sort(descending=True).values
        squares, before = values.square().tolist(), values.clone()
        total, largest, ranks = sum(squares), squares[0], range(1, len(squares) + 1)
        # One share for each rank, halfway between what it holds and one less does, so that no rounding decides.
        shares = [round((sum(squares[:r]) - squares[r - 1] / 2) / total, 3) for r in ranks]
        slips = {
            "one too few: the sum of so many is still below the share": [r - 1 for r in ranks],
            "one too many: with one fewer the share is reached already": [r + 1 for r in ranks],
            "energy is the sum of squares: square the singular values": [fewest(values.tolist(), s) for s in shares],
            "you count from the smallest: the largest singular values stand first": [
                fewest(squares[::-1], s) for s in shares
            ],
            "the share is one of the whole energy, not of the largest alone: sums hold it, cumsum": [
                max(1, sum(square >= s * largest for square in squares)) for s in shares
            ],
            "the share is one of the whole energy: compare with share times the sum of all squares": [1 for _ in ranks],
        }
        case = {"singular_values": values, "shares": shares}
        found = [energy_rank(values, share) for share in shares]
        require(all(type(r) is int for r in found), f"expected int, got {found[0]!r}", case, "convert with int(...)")
        expect(found, [*ranks], case, slips, "the ranks", 0)
        require(torch.equal(values, before), "the singular values were changed in place", {"singular_values": before})


def check_rank(values: Tensor, share: float, right: int, slips: dict):
    expect(energy_rank(values, share), right, {"singular_values": values, "share": share}, slips, "the rank", 0)


@EXERCISE.property("energy_rank: a sum that is exactly the share is enough; zeros are never needed")
def exactly(draw: Draw):
    for splits in (1, 2, 3):
        squares = [64.0]  # and then powers of 4 that add up to 64: all sums and shares are exact
        for _ in range(splits):
            whole = squares.pop(draw.integer(0, len(squares) - 1))
            squares = sorted(squares + [whole / 4] * 4, reverse=True)
        k = len(squares)
        values = torch.tensor(squares + [0.0] * draw.integer(1, 3), dtype=torch.float64).sqrt()
        for r in (1, draw.integer(1, k - 1), k):
            slips = {
                "a sum that is exactly the share is enough: ≥ and not >": r + 1,
                "zeros add nothing to the energy: fewer are enough": len(values),
            }
            check_rank(values, sum(squares[:r]) / 64, r, slips)
    for share in (0.5, 1.0):
        slips = {"at least 1, for a matrix of zeros too": 0, "of zeros 1 is enough, the least there is": 3}
        check_rank(torch.zeros(3), share, 1, slips)


@EXERCISE.property("energy_rank: share 1 asks for all of them and never for more, whatever rounding does")
def never_more(draw: Draw):
    for number in range(40):
        values = draw.normal(3 + 3 * number).abs().sort(descending=True).values + 0.1
        values = values.to(draw.choice((torch.float32, torch.float64)))
        slip = "more than there are: two ways of adding up round differently; compare with the last of the same sums"
        check_rank(values, 1.0, len(values), {slip: len(values) + 1, "all of them are asked for": len(values) - 1})


@EXERCISE.property("energy_rank: a share that is not above 0 and at most 1 is refused")
def refused(draw: Draw):
    for share in (0, -0.5, 1.01, 90):
        slip = "raise ValueError unless 0 < share <= 1"
        expect_error(lambda share=share: energy_rank(torch.ones(3), share), ("share",), {"share": share}, slip)


def matrix(draw: Draw, out: int, inside: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W (out, in) with U (out, k), σ (k,) well apart and V (in, k), W = U diag(σ) Vᵀ: put together, not decomposed."""
    k = min(out, inside)
    U, V = (torch.linalg.qr(draw.normal(size, k)).Q for size in (out, inside))
    S = torch.tensor([draw.number(0.6, 1.0) + 1.5 * number for number in range(k)]).double().flip(0)
    return torch.einsum("ok,k,ik->oi", U, S, V), U, S, V


def pieces(U: Tensor, S: Tensor, V: Tensor, which: slice) -> Tensor:
    return torch.einsum("ok,k,ik->oi", U[:, which], S[which], V[:, which])


@EXERCISE.property("pissa: A is (r, in) and B is (out, r)")
def shapes(draw: Draw):
    for most in SIZES:
        k = draw.integer(2, most)
        for out, inside in ((k, k + 2), (k + 2, k)):
            W, r = matrix(draw, out, inside)[0], draw.integer(1, k - 1)
            A, B = pissa(W, r, 2.0)
            case = {"W": (out, inside), "r": r}
            slips = {
                "A and B are exchanged: return A, B": (out, r),
                "A is transposed: A is (r, in)": (inside, r),
                "all k directions are kept: A has the first r": (k, inside),
                "Vh is Vᵀ already, one direction in each row: take its first r rows": (r, k),
            }
            expect(tuple(A.shape), (r, inside), case, slips, "shape of A")
            slips = {"B is transposed: B is (out, r)": (r, out), "all k directions are kept: B has r": (out, k)}
            expect(tuple(B.shape), (out, r), case, slips, "shape of B")


@EXERCISE.property("pissa: s·BA is the r largest pieces of W")
def best(draw: Draw):
    for most in SIZES:
        k = draw.integer(2, most)
        for out, inside in ((k, k), (k, k + 2), (k + 2, k)):
            W, U, S, V = matrix(draw, out, inside)
            r, s = draw.integer(1, k - 1), draw.choice((0.5, 2.0, 3.0))
            A, B = pissa(W.clone(), r, s)
            first, U_r, V_r = pieces(U, S, V, slice(r)), U[:, :r], V[:, :r]
            mixed = torch.linalg.svd(W, full_matrices=False)
            slips = {
                "the scaling is missing: S_r / s, so that s·BA has S_r again": s * first,
                "the scaling divides twice: under the root, S_r / s, and nowhere else": first / s,
                "the scaling stands upside down: S_r is divided by it": s * s * first,
                "those are the smallest singular values; the first r are the largest": pieces(U, S, V, slice(k - r, k)),
                "torch.linalg.svd gives Vh, which is Vᵀ already: take rows of it": lambda parts=mixed, r=r: (
                    parts[0][:, :r] * parts[1][:r] @ parts[2][:, :r].T
                ),
                "S_r is missing: under the root stands S_r / s": U_r @ V_r.T,
                "S_r comes in twice: each side takes its square root": U_r * S[:r] ** 2 / s @ V_r.T,
                "only one side has √(S_r / s); both need it": U_r * (S[:r] * s).sqrt() @ V_r.T,
                "all of W is there: keep the first r directions": W,
            }
            expect(s * B @ A, first, {"W": W, "r": r, "scaling": s}, slips, "s·BA", 1e-8)


@EXERCISE.property("pissa: A and B share S_r / s evenly, A Aᵀ = Bᵀ B = S_r / s")
def evenly(draw: Draw):
    for most in SIZES:
        W, _, S, _ = matrix(draw, draw.integer(2, most), draw.integer(2, most))
        r, s = draw.integer(1, len(S)), draw.choice((0.5, 2.0, 3.0))
        A, B = pissa(W, r, s)
        right = S[:r] / s
        for name, gram in (("A Aᵀ", A @ A.T), ("Bᵀ B", B.T @ B)):
            slips = {
                "all of S_r / s is on this side; each side takes its square root": (right**2).diag(),
                "nothing of S_r is on this side; each side takes √(S_r / s)": torch.eye(r).double(),
                "that is S_r: the scaling belongs under the root on both sides, √(S_r / s)": S[:r].diag(),
                "s divides all of it on this side: √(S_r / s), and not √S_r / s": (right / s).diag(),
            }
            expect(gram, right.diag(), {"W": W, "r": r, "scaling": s}, slips, name, 1e-8)


@EXERCISE.property("pissa: all directions give W; A and B have its dtype, and W is left as it was")
def whole(draw: Draw):
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        for most in SIZES:
            W = matrix(draw, draw.integer(2, most), draw.integer(2, most))[0].to(dtype)
            before, s = W.clone(), draw.number(0.3, 3)
            A, B = pissa(W, min(W.shape), s)
            case = {"W": W, "r": min(W.shape), "scaling": s}
            require(torch.equal(W, before), "W was changed in place", case)
            require(A.dtype == B.dtype == dtype, f"expected A and B in {dtype}, got {A.dtype} and {B.dtype}", case)
            expect(s * B @ A, W, case, what="s·BA", tolerance=tolerance)
