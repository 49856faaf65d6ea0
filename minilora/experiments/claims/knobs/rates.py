"""Claims about the learning rate, the batch and the scale.

All but one rest on curves of the loss over the rate, one for each arm and seed (`rates_runs`), in steps of 2.
"""

import math
from collections.abc import Mapping

from minilora.experiments.claims.claim import Claim, Record, Rule
from minilora.experiments.claims.knobs.rates_figures import alpha_law, batches, rate_curves
from minilora.experiments.claims.knobs.rates_runs import best, share_needed
from minilora.experiments.claims.knobs.rates_studies import (
    ALPHAS,
    BATCHES,
    DIALECT,
    EXAMPLES,
    FULL,
    JSON,
    LENGTHS,
    ORDERS,
    R8,
    SAME_PRODUCT,
    SHORT,
)


def times(arm: str, than: str, bar: float) -> Rule:
    """How many times as high the best rate of `arm` is as that of `than`."""
    words = f"best rate of {arm} over that of {than}, each from the seed's own curve"
    return Rule((arm, than), words, lambda runs: best(runs[arm]) / best(runs[than]), bar, "times")


def same_rate(arm: str, other: str, bar: float = 2) -> Rule:
    def number(runs: Mapping[str, Record]) -> float:
        return math.exp(abs(math.log(best(runs[arm]) / best(runs[other]))))

    words = f"the higher over the lower of the best rates of {arm} and {other}, each from the seed's own curve"
    return Rule((arm, other), words, number, bar, "times", above=False)


def longer_lower(bar: float) -> Rule:
    arms = tuple(f"{name}, {steps} steps" for steps in (25, 200) for name in (R8, FULL))

    def number(runs: Mapping[str, Record]) -> float:
        lora, full, long_lora, long_full = (best(runs[arm]) for arm in arms)
        return (lora / full) / (long_lora / long_full)

    words = "best rate of LoRA over that of full fine-tuning: the ratio after 25 steps over the ratio after 200"
    return Rule(arms, words, number, bar, "times")


def same_loss(words: str, bar: float = 10) -> Rule:
    """At every alpha."""

    def number(runs: Mapping[str, Record]) -> float:
        losses = [runs[arm]["best_validation_loss"] for arm in ALPHAS]
        return 100 * (max(losses) / min(losses) - 1)

    words += ": by how many percent the highest of the alphas 2 to 1024 lies above the lowest"
    return Rule(tuple(ALPHAS), words, number, bar, above=False)


def product_law(bar: float) -> Rule:
    """best rate ∝ alpha^-e: where the product of the two is all that counts, e is 1."""
    low, high = "r=8, alpha 2", "r=8, alpha 1024"

    def number(runs: Mapping[str, Record]) -> float:
        return 100 * math.log(best(runs[low]) / best(runs[high])) / math.log(ALPHAS[high] / ALPHAS[low])

    words = "the exponent e, times 100, in: the best rate goes as alpha to the power -e, from alpha 2 to 1024; "
    return Rule(tuple(ALPHAS), words + "100 if the product of the two is all that counts", number, bar, signed=False)


def needs(runs: Mapping[str, Record], batch: str) -> float:
    """Of full fine-tuning's run at its best rate, the percent after which it has the loss where LoRA's run ends."""
    return share_needed(runs[f"full, {batch}"], runs[f"lora, {batch}"]["best_validation_loss"])


def falls_behind(batch: str, than: str, bar: float = 10) -> Rule:
    """That the share is smaller at `batch`: LoRA lies further behind. It does not depend on the scale of the loss."""
    arms = tuple(f"{method}, {name}" for name in (than, batch) for method in ("full", "lora"))
    words = "of full fine-tuning's run, the percent after which it has the loss where LoRA's ends, each at its best "
    words += f"rate: that share at {than} minus that at {batch}"
    return Rule(arms, words, lambda runs: needs(runs, than) - needs(runs, batch), bar, "points")


SCHULMAN = "Schulman et al. 2025, LoRA Without Regret"
SMALL = "small bases and runs of 30 to 200 steps"
OF_ONE_ALPHA = (
    "a ratio is that of one alpha: on dialect, from alpha 2 to 1024, LoRA's best rate goes from 0.026 to 0.0006, from "
    "4.6 times full fine-tuning's to a ninth. The rule takes plain means: on SmolLM2 the ratios are 37, 18 and 11, "
    "whose interval in logarithms would be 7 to 55, above both bars"
)
RATES = (DIALECT, JSON, ORDERS)
CLAIMS = [
    Claim(
        "rate-higher",
        "LoRA wants a higher rate than full fine-tuning: at least twice as high.",
        "often said",
        times(R8, FULL, 2),
        RATES,
        f"{SMALL}; {OF_ONE_ALPHA}",
        rate_curves,
    ),
    Claim(
        "rate-ten",
        "LoRA's best rate is ten times that of full fine-tuning: who multiplies by ten is off by 2 at most.",
        f"{SCHULMAN}; Biderman et al. 2024, arXiv:2405.09673",
        times(R8, FULL, 5),
        RATES,
        f"{SMALL}; {OF_ONE_ALPHA}; a ratio above 20 would hold too, and be off on the other side",
        rate_curves,
    ),
    Claim(
        "rate-any-rank",
        "With alpha fixed the best rate is the same at every rank: from 1 to 64 it moves by less than 2.",
        f"{SCHULMAN}; Hu et al. 2021, arXiv:2106.09685, section 4.1",
        same_rate("r=1", "r=64"),
        (DIALECT, JSON),
        f"{SMALL}; it does move, upward, by 1.7 on dialect, within the bar",
        rate_curves,
    ),
    Claim(
        "rate-alpha-2r",
        "With alpha = 2r the rate can stay when the rank changes: from 1 to 64 the best one moves by less than 2.",
        'guides that advise "alpha = 2r" and one rate',
        same_rate("r=1, alpha 2", "r=64, alpha 128"),
        (DIALECT, JSON),
        f"{SMALL}; nobody goes from 1 to 64, and from 8 to 16 the best rate moves by a sixth of that, in logarithms",
        rate_curves,
    ),
    Claim(
        "rate-rslora",
        "With the scale alpha/√r of rsLoRA the rate can stay: from rank 1 to 64 the best one moves by less than 2.",
        "Kalajdzievski 2023, arXiv:2312.03732, section 4",
        same_rate("r=1", "r=64, alpha 128"),  # alpha/√r is 16 at rank 1 and 2 at rank 64, as are these
        (DIALECT, JSON),
        f"{SMALL}; the paper asks that learning be stable at large ranks, and 64 of a width of 192 is not large; on "
        "dialect the best rate falls by 2.0 here and rises by 1.7 with alpha/r, so that neither is the better guide",
        rate_curves,
    ),
    Claim(
        "rate-short",
        "The shorter the run, the more LoRA's best rate lies above full fine-tuning's: at 25 steps a quarter more.",
        f"{SCHULMAN}: 15 times in short runs, 10 in longer ones",
        longer_lower(1.25),
        (LENGTHS,),
        "one task; four best rates make the number, and the error of each is in it",
        rate_curves,
    ),
    Claim(
        "alpha-free",
        "Alpha need not be tuned: with a rate of its own, each from 2 to 1024 ends within 10 % of the best.",
        "Hu et al. 2021, arXiv:2106.09685, section 4.1",
        same_loss("lowest loss of a curve"),
        (DIALECT, JSON),
        f"{SMALL}; the highest over the lowest of four noisy losses is above 0 % where alpha does nothing; on dialect "
        "the losses go down with alpha in order, 0.65, 0.62, 0.55, 0.53, so it is no noise",
        rate_curves,
    ),
    Claim(
        "alpha-is-rate",
        "Alpha is a learning rate in disguise: twice the alpha wants half the rate.",
        "Hu et al. 2021, arXiv:2106.09685, section 4.1",
        product_law(75),
        (DIALECT, JSON),
        "with A frozen the law is exact under Adam, and at a high alpha A hardly moves: over another range of alphas "
        "the exponent is another. On dialect it is 0.48 from 2 to 16, 0.54 to 128 and 0.76 to 1024",
        alpha_law,
    ),
    Claim(
        "same-product",
        "Where alpha times rate is the same, so is the run: from alpha 2 to 1024 the last losses lie within 10 %.",
        "Hu et al. 2021, arXiv:2106.09685, section 4.1, as it is often retold",
        same_loss("last loss"),
        (SAME_PRODUCT,),
        "one product, below the best one; at a higher one A would move sooner",
    ),
    Claim(
        "batch-lora",
        "LoRA tolerates large batches less than full fine-tuning: from 16 to 256 it falls further behind.",
        SCHULMAN,
        falls_behind("batch 256", "batch 16"),
        (BATCHES,),
        f"by the loss it would hold: LoRA is 0.42 nats behind at 16 and 0.92 at 256; but {EXAMPLES:,} examples are "
        "12 steps of 256, and where less is learned a gap is wider. The shares are 30, 29 and 34 %; along full "
        "fine-tuning's run the rate has not yet come down, so they are too large at every batch",
        batches,
    ),
    Claim(
        "batch-steps",
        "It is the batch itself: in as few steps with a batch of 16 LoRA is not as far behind.",
        SCHULMAN,
        falls_behind("batch 256", "batch 16" + SHORT),
        (BATCHES,),
        "12 steps of each. In nats, which depend on where a loss lies, LoRA is 0.51 behind with 16 and 0.92 with 256",
        batches,
    ),
    Claim(
        "batch-rate",
        "With Adam a larger batch wants a higher rate: 16 times the batch at least twice the rate, by theory 4 times.",
        "Malladi et al. 2022, arXiv:2205.10287: the square root",
        times("lora, batch 256", "lora, batch 16", 2),
        (BATCHES,),
        "at equal examples a larger batch has fewer steps, which alone want a higher rate: 12 steps of 16 want LoRA's "
        "0.0125 too, where 192 steps want 0.0072",
        rate_curves,
    ),
]
