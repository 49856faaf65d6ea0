"""Exercise 07: the scaling of LoRA and of rsLoRA."""

import torch

from minilora.config import lora_scaling
from minilora.exercises.checking import Draw, Exercise, expect, require

EXERCISE = Exercise(
    number=7,
    slug="rslora",
    title="rsLoRA's scaling",
    targets=("config:lora_scaling",),
    difficulty=1,
    minutes=10,
    notebook="04_variants",
    section="2. The code of each",
    explanation="""\
The update s·BA is a sum of r terms, one for each row of A and column of B: s·(b₁ a₁ᵀ + ... + b_r a_rᵀ). LoRA takes
s = alpha / r, which is alpha times the mean of the terms. But terms that point in independent directions partly cancel,
and their sum grows as √r, not as r. Divided by r it shrinks as 1/√r: a layer of high rank is turned down, and learns no
better than one of low rank.

rsLoRA ("rank-stabilized", Kalajdzievski 2023, arXiv 2312.03732) divides by √r instead, so that the size of s·B(A x)
does not depend on r:

    LoRA     s = alpha / r
    rsLoRA   s = alpha / √r

`lora_scaling(r, lora_alpha, use_rslora)` returns s, a Python number that is not rounded: r is a whole number of at
least 1, lora_alpha any number above 0, whole or not. Without the third argument it is plain LoRA. Only r stands under
the root. At r = 1 both are alpha.""",
    hints=(
        "Two cases, one division each. Python's / never rounds; // does.",
        "math.sqrt(r) is √r, and r**0.5 as well. The root is over r alone, and alpha stays above it in both cases.",
        "Return lora_alpha / r, or lora_alpha / math.sqrt(r) if use_rslora.",
    ),
    question="With alpha = 16 and r = 64, LoRA's s is 0.25 and rsLoRA's is 2. Could you get rsLoRA's numbers out of "
    "plain LoRA by choosing another alpha? If so, what is the paper's claim about?",
    answer="At one rank, yes: alpha = 16·√r with plain LoRA gives alpha / √r of 16, and at r = 64 the two settings "
    "are the same layer. The claim is about what happens when r is changed and all else stays: with alpha / r a "
    "higher rank turns the update down, so that it seems to bring nothing, while with alpha / √r its size, and so "
    "the best learning rate, stays about the same. It is a rule for carrying settings from one rank to another, and "
    "no new kind of layer.",
    spoilers=("assert abs(lora_scaling(r, 16, True) / lora_scaling(r, 16) - r**0.5)",),
)


def cases(draw: Draw):
    """(r, alpha), the ranks no squares: √r is then no whole number either."""
    for ranks in ((3,), (5, 6, 7, 8), (12, 24, 32, 63)):
        yield draw.choice(ranks), draw.integer(28, 35)
        yield draw.choice(ranks), draw.number(0.3, 0.9)


def mistakes(r: int, alpha: float) -> dict:
    """What is wrong for either kind, by sentence."""
    return {
        "rounded down: use /, not //": lambda: alpha // r,
        "rounded down: use /, not //, and no int()": lambda: alpha // r**0.5,
        "√r was rounded to a whole number": lambda: alpha / int(r**0.5),
        "the root is over r alone, not over alpha / r": lambda: (alpha / r) ** 0.5,
        "the root is over r alone, not over alpha": lambda: alpha**0.5 / r,
        "r**1/2 is (r**1) / 2; √r is r**0.5 or math.sqrt(r)": lambda: alpha / r / 2,
        "alpha / r**1/2 is (alpha / r) / 2; √r is r**0.5 or math.sqrt(r)": lambda: alpha / (r / 2),
        "that is alpha / r²": lambda: alpha / r**2,
        "upside down: alpha stands above": lambda: r / alpha,
        "upside down: alpha stands above, √r below": lambda: r**0.5 / alpha,
        "alpha is missing": lambda: 1 / r,
        "alpha is missing above √r": lambda: 1 / r**0.5,
        "that multiplies by r: alpha is divided by it": lambda: alpha * r,
        "that multiplies by √r: alpha is divided by it": lambda: alpha * r**0.5,
    }


@EXERCISE.property("LoRA: s = alpha / r, not rounded")
def plain(draw: Draw):
    for r, alpha in cases(draw):
        slips = {"that is rsLoRA's scaling, and use_rslora is False": alpha / r**0.5, **mistakes(r, alpha)}
        case = {"r": r, "lora_alpha": alpha, "use_rslora": False}
        expect(lora_scaling(r, alpha, False), alpha / r, case, slips, "s")


@EXERCISE.property("rsLoRA: s = alpha / √r, with alpha outside of the root")
def rank_stabilized(draw: Draw):
    for r, alpha in cases(draw):
        slips = {"that is plain LoRA's scaling, and use_rslora is True": alpha / r, **mistakes(r, alpha)}
        case = {"r": r, "lora_alpha": alpha, "use_rslora": True}
        expect(lora_scaling(r, alpha, True), alpha * r**-0.5, case, slips, "s")


@EXERCISE.property("without use_rslora it is plain LoRA")
def default(draw: Draw):
    for r, alpha in cases(draw):
        slip = "that is rsLoRA's scaling: is use_rslora False by default, and are the two cases the right way round?"
        expect(lora_scaling(r, alpha), alpha / r, {"r": r, "lora_alpha": alpha}, {slip: alpha / r**0.5}, "s")


@EXERCISE.property("at r = 1 both are alpha")
def rank_one(draw: Draw):
    alpha = draw.integer(2, 40)
    for use_rslora in (False, True):
        case = {"r": 1, "lora_alpha": alpha, "use_rslora": use_rslora}
        expect(lora_scaling(1, alpha, use_rslora), float(alpha), case, what="s")


@EXERCISE.property("the size of s·B(A x) for random A and B: rsLoRA's is the same at every rank, LoRA's falls as 1/√r")
def size_of_the_update(draw: Draw):
    d, ranks, alpha = 64, (1, 4, 16, 64), draw.integer(1, 20)
    for use_rslora in (True, False):
        sizes = []
        for r in ranks:
            # 64 layers, 8 tokens each: enough for the mean to be within a few percent.
            A, B, x = draw.normal(64, r, d) / d**0.5, draw.normal(64, d, r), draw.normal(64, d, 8)
            sizes.append(lora_scaling(r, alpha, use_rslora) * (B @ (A @ x)).square().mean().sqrt().item())
        wanted = [alpha if use_rslora else alpha / r**0.5 for r in ranks]
        off = (torch.tensor(sizes) / torch.tensor(wanted) - 1).abs().max().item()
        told = [[f"{size:.1f}" for size in row] for row in (wanted, sizes)]
        case = {"ranks": ranks, "lora_alpha": alpha, "use_rslora": use_rslora}
        message = f"expected outputs of a size near {', '.join(told[0])}, got {', '.join(told[1])}"
        require(off < 0.2, message, case, "the scaling depends on the rank in another way than the formula says")
