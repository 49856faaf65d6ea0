"""Exercise 23: rotary positions, and the rows of a file that pairs its features otherwise."""

import torch
from torch import Tensor

from minilora.exercises.checking import Draw, Exercise, expect, require
from minilora.model import GPTConfig, apply_rotary, rotary_cos_sin
from minilora.storage.gguf import in_halves

EXERCISE = Exercise(
    number=23,
    slug="rotary",
    title="Rotary positions, and a file that pairs otherwise",
    targets=("storage.gguf:in_halves",),
    difficulty=2,
    minutes=20,
    notebook="06_a_real_model",
    section="1. From GGUF to logits",
    explanation="""\
Attention compares queries and keys by q·k, which knows no order. Rotary embedding (Su et al. 2021, arXiv 2104.09864)
takes the D features of a head in pairs, D/2 of them, and turns each pair (a, b) by an angle that grows with the
position p of its token:

    (a, b) -> (a cos θ - b sin θ, a sin θ + b cos θ)        θ = p · the pair's frequency

Lengths stay, and q·k depends on the distance of two tokens alone, for both are turned by the same angle more.

Which two features are a pair? Hugging Face, and this package's `apply_rotary`, take one from each half of a head, i and
i + D/2. llama.cpp takes neighbours, 2i and 2i + 1. Each stores the rows of q_proj and k_proj, one row a feature, in its
own order, and a GGUF file has llama.cpp's:

    llama.cpp      a0 b0 a1 b1 a2 b2 a3 b3        each a with its b beside it
    Hugging Face   a0 a1 a2 a3 b0 b1 b2 b3        each a with its b half a head further

`in_halves(rows, heads)` brings rows from the first order to the second: rows (heads·D, ...) of a weight or of a bias ->
the same rows, head by head, of each head first all a's, then all b's. D is not given; it follows from the shape. q_proj
and k_proj may have different numbers of heads. dtype and numbers stay, and the argument is not changed.""",
    hints=(
        "Within a head: rows 0, 2, 4, ... and then rows 1, 3, 5, ... All heads at once: three dimensions in place of "
        "one, of the heads, the pairs, and the two of a pair.",
        "rows.unflatten(0, (heads, -1, 2)) has the dimensions heads, D/2, 2. Wanted is heads, 2, D/2.",
        "rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).",
    ),
    question="The file was read with its rows in the wrong order. No error, every weight is there, and the model still "
    "writes words. Why do shapes not tell, nor the first tokens of a text, and what gets worse?",
    answer="A permutation of rows changes no shape and no number. At position 0 nothing is turned, and q·k is the "
    "same in either order, for q and k are permuted alike. Over a short distance most pairs turn by small "
    "angles, so attention to near neighbours is only a little wrong. The further apart two tokens are, the "
    "more it matters that features turn with the wrong partner and at the wrong speed: attention no longer "
    "finds what stands further back. The model begins fluently and ends in repetition or nonsense. "
    "Comparing logits with a program that is known to be right shows it at once.",
)


def order(heads: int, D: int) -> list[int]:
    """For each row of the result, the row that it was."""
    return [head * D + 2 * i + second for head in range(heads) for second in (0, 1) for i in range(D // 2)]


def mistakes(heads: int, D: int) -> dict[str, list[int]]:
    """The same for each mistake, by sentence."""
    where, all_rows = order(heads, D), torch.arange(heads * D)
    across = [head * D + 2 * i + second for second in (0, 1) for head in range(heads) for i in range(D // 2)]
    odd = [head * D + 2 * i + second for head in range(heads) for second in (1, 0) for i in range(D // 2)]
    return {
        "the rows are in the order they came in": all_rows.tolist(),
        "the wrong direction: from halves to pairs; it is from pairs to halves": [
            where.index(place) for place in range(heads * D)
        ],
        "the even rows of all heads come first; each head has halves of its own": across,
        "the odd rows come first; the a's are the even ones": odd,
        "heads and pairs have changed places: the heads are the outermost": (
            all_rows.unflatten(0, (-1, heads, 2)).permute(1, 2, 0).flatten().tolist()
        ),
        "the heads are in the wrong order": all_rows.unflatten(0, (heads, -1, 2)).flip(0).mT.flatten().tolist(),
        "within each half the rows are in the wrong order": (
            all_rows.unflatten(0, (heads, -1, 2)).flip(1).mT.flatten().tolist()
        ),
    }


def check(draw: Draw, heads: int, D: int, *rest: int, dtype=torch.float64):
    rows = (10 * draw.normal(heads * D, *rest)).to(dtype)
    kept, wanted, case = rows.clone(), rows[order(heads, D)], {"heads": heads, "D": D, "rows": rows}
    slips = {sentence: rows[wrong] for sentence, wrong in mistakes(heads, D).items()}
    found = in_halves(rows, heads)
    require(torch.equal(rows, kept), "the rows that were given have changed", case, "make a new tensor")
    expect(found, wanted, case, slips, "the rows", 0)
    require(found.dtype == dtype, f"expected {dtype}, got {found.dtype}", case, "rows are moved, not computed with")


@EXERCISE.property("of each head first the even rows, then the odd ones")
def weights(draw: Draw):
    for heads, D in ((1, 6), (2, 6), (3, 8)):
        check(draw, heads, D, draw.integer(1, 4))


@EXERCISE.property("a bias has one dimension, and there may be more than two")
def shapes(draw: Draw):
    for heads, D in ((1, 6), (4, 8)):
        check(draw, heads, D)
        check(draw, heads, D, 2, draw.integer(1, 3))


@EXERCISE.property("heads as given, also where keys have fewer of them than queries; D may be 2 or large")
def grouped(draw: Draw):
    for heads, D in ((9, 64), (3, 64), (2, 10)):
        check(draw, heads, D, 2)
    rows = draw.normal(6, 3)
    slip = "of a pair alone there are no halves to be told apart"
    expect(in_halves(rows, 3), rows, {"heads": 3, "D": 2}, {slip: rows.flip(0)}, "the rows", 0)


@EXERCISE.property("every dtype stays as it is, to the bit")
def dtypes(draw: Draw):
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        check(draw, 2, 6, 3, dtype=dtype)


def turned_beside(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) with neighbours as pairs, as llama.cpp turns it; cos and sin as of `rotary_cos_sin`."""
    half = x.shape[-1] // 2
    a, b, c, s = x[..., 0::2], x[..., 1::2], cos[..., :half], sin[..., :half]
    return torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2)


@EXERCISE.property("turned in halves after the sorting, it is what llama.cpp turns in pairs; q·k is the same")
def together(draw: Draw):
    for heads, D in ((1, 6), (3, 8)):
        config = GPTConfig(7, heads * D, 4, 1, heads, head_dim=D, max_position_embeddings=512, rope_theta=100.0)
        C, T = 5, 4
        W_q, W_k, x = draw.normal(heads * D, C), draw.normal(heads * D, C), draw.normal(1, T, C)
        cos, sin = (t.double() for t in rotary_cos_sin(config, torch.tensor([[0, 2, 9, 30]])))

        def split(W: Tensor, x=x, T=T, heads=heads, D=D) -> Tensor:
            return (x @ W.T).view(1, T, heads, D).transpose(1, 2)  # (1, H, T, D)

        q, k = (apply_rotary(split(in_halves(W, heads)), cos, sin) for W in (W_q, W_k))
        p, m = (turned_beside(split(W), cos, sin) for W in (W_q, W_k))
        case = {"heads": heads, "D": D, "positions": [0, 2, 9, 30]}
        expect(q, p[..., order(1, D)], case, what="q", tolerance=1e-5)
        slips = {"attention over rows in llama.cpp's order": apply_rotary(split(W_q), cos, sin)}
        slips = {name: wrong @ apply_rotary(split(W_k), cos, sin).mT for name, wrong in slips.items()}
        expect(q @ k.mT, p @ m.mT, case, slips, "q·k of all pairs of tokens", 1e-5)
