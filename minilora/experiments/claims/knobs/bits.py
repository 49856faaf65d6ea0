"""Claims about training on a base in few bits: which levels, which blocks, and a start that puts back what was lost."""

from collections.abc import Mapping
from typing import Any

from minilora.experiments.claims.claim import Claim, Record, Rule, better, no_worse
from minilora.experiments.claims.knobs.bits_runs import above_floats, measure
from minilora.experiments.claims.study import Arm, Plan, Study
from minilora.quant import Quantization


def arm_of(rate_of: str | None = None, loftq: bool = False, **how: Any) -> Arm:
    """how: fields of Quantization that are not QLoRA's (NF4, blocks of 64, double quantization)."""
    return Arm("lora", settings={"base": Quantization(**how), "loftq": loftq}, rate_of=rate_of)


LEVELS = {
    "floats": Arm("lora", settings={"base": None, "loftq": False}),
    "nf4": arm_of(),
    "int4": arm_of(scheme="int4"),
    "fp4": arm_of(scheme="fp4"),
}
MORE = {
    "loftq": arm_of(loftq=True),
    "nf4, plain scales": arm_of("nf4", double_quant=False),
    "nf4, block 32": arm_of("nf4", block_size=32),
    "nf4, block 256": arm_of("nf4", block_size=256),
}
ENGLISH = Study(
    "bits-english",
    "English documentation as plain text, of which SmolLM2 has read much like it; LoRA r=8 on a base rounded once",
    LEVELS | MORE,
    {"smollm2": Plan("english", steps=30, seeds=3, minutes=4)},
    measure,
    figure=above_floats,
)
DIALECT = Study(
    "bits-dialect",
    "a hundred new words and a new word order, on a base that was trained in floats; LoRA r=8 on it, rounded once",
    LEVELS | MORE,
    {"tiny": Plan("dialect", steps=100, seeds=5, minutes=0.3)},
    measure,
    figure=above_floats,
)
BOTH = (ENGLISH, DIALECT)
FREE = 2  # percent of a loss: a choice that costs nothing needs no more than a gain beyond doubt
NOT_FLOATS = (
    "SmolLM2 came to us in 4 bits (Q4_1: 16 levels in blocks of 32), so its floats, and any bfloat16 file made of it, "
    "are such numbers, and this rounding is their second; the small base was never rounded before"
)
DETTMERS = "Dettmers et al. 2023, arXiv:2305.14314"


def to_the_next_best(runs: Mapping[str, Record]) -> float:
    loss = {arm: runs[arm]["best_validation_loss"] for arm in ("nf4", "int4", "fp4")}
    other = min(loss["int4"], loss["fp4"])
    return 100 * (other - loss["nf4"]) / other


def left_of_the_gap(runs: Mapping[str, Record]) -> float:
    """The gap to the floats after training, percent of that before."""
    (before, after), (floats_before, floats_after) = (
        [runs[arm]["validation_loss"][at][1] for at in (0, -1)] for arm in ("nf4", "floats")
    )
    return 100 * (after - floats_after) / (before - floats_before)


CLAIMS = [
    Claim(
        "bits-floats",
        "LoRA trains as well on a base in NF4 with double quantization as on one in floats.",
        f"{DETTMERS}, abstract",
        no_worse("nf4", "floats"),
        BOTH,
        "on English text 3 % of the loss are 0.09 nats a token, a fifth of the 0.45 that training gains on floats: who "
        f"trains for the likelihood of text would not call that as well. {NOT_FLOATS}",
    ),
    Claim(
        "bits-recovered",
        "Training wins back what rounding lost: of a loss that NF4 raised, next to nothing is left in the end.",
        f"{DETTMERS}, section 4: fully recovered through adapter finetuning after quantization",
        Rule(
            ("nf4", "floats"),
            "loss of nf4 above that of floats after training, percent of what it was before training",
            left_of_the_gap,
            bar=25,
            above=False,
        ),
        (ENGLISH,),
        f"30 steps, some 30,000 tokens, at rank 8 only; the text is of the kind that is trained on. {NOT_FLOATS}",
    ),
    Claim(
        "bits-levels",
        "Of the ways to spend 4 bits, LoRA trains better on NF4 than on int4 or FP4.",
        f"{DETTMERS}, section 4 and table 4",
        Rule(
            ("nf4", "int4", "fp4"),
            "loss of nf4 below the lower of int4's and fp4's, percent of the latter",
            to_the_next_best,
            bar=FREE,
        ),
        BOTH,
        f"by the loss at equal steps, where the paper compares scores. {NOT_FLOATS}",
    ),
    Claim(
        "bits-blocks",
        "Small blocks help: LoRA trains better on NF4 in blocks of 32 than in blocks of 256.",
        "often said of group sizes",
        better("nf4, block 32", "nf4, block 256", FREE),
        BOTH,
        "both arms take the rate that was chosen for blocks of 64, and differ by 0.2 bits a weight; seeds are of the "
        "training alone, and each base is rounded in one way: by a chance of its rounding the small one is better in "
        f"blocks of 32 than in floats, by 2.9 % of the loss after training. {NOT_FLOATS}",
    ),
    Claim(
        "bits-double",
        "Double quantization of the scales costs nothing in training.",
        f"{DETTMERS}, section 3: without degrading performance",
        no_worse("nf4", "nf4, plain scales", FREE),
        BOTH,
        f"both arms take the rate that was chosen for double quantization. {NOT_FLOATS}",
    ),
    Claim(
        "bits-loftq",
        "LoftQ's start, which puts back into A and B what rounding lost, trains better than NF4 alone.",
        "Li et al. 2023, arXiv:2310.08659, abstract",
        better("loftq", "nf4", FREE),
        BOTH,
        "rank 8, which holds little of what is lost; and a B that does not start at zero learns faster in the first "
        f"steps, whatever it holds. {NOT_FLOATS}",
    ),
]
