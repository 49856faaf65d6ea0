"""Claims about training data: few good examples against many noisy ones, and what a small set does to a run."""

from collections.abc import Mapping

from minilora.experiments.claims.claim import Claim, Record, Rule, more_right, score
from minilora.experiments.claims.study import Arm, Plan, Study
from minilora.experiments.claims.uses.data_figures import loss_curves, score_map
from minilora.experiments.claims.uses.data_runs import measure

SIZES = {"fewest": 25, "few": 100, "some": 500, "many": 2000}
SETTINGS = {"examples": 1, "wrong": 0, "how": "another", "evaluations": 8}


def arm_of(method: str, examples: int, percent: int, rate_of: str | None = None, **how: str) -> Arm:
    return Arm(method, settings={"examples": examples, "wrong": percent / 100, **how}, rate_of=rate_of)


def arms_of(method: str, *percents: int) -> dict[str, Arm]:
    """An arm for each size and share of wrong labels. A rate is searched for each size, with right labels, and once
    more for 30 % wrong of many; the other shares take the rate of the nearer of these two."""
    arms = {}
    for size, examples in SIZES.items():
        for percent in percents:
            searched = percent == 0 or (size, percent) == ("many", 30)
            nearest = f"{method} {size} {30 if (size, percent) == ('many', 50) else 0}%"
            arms[f"{method} {size} {percent}%"] = arm_of(method, examples, percent, None if searched else nearest)
    return arms


RANKS = {f"r={r} few 0%": Arm("lora", {"r": r}, {"examples": SIZES["few"]}) for r in (1, 64)}
MISTAKES = {
    f"lora many {percent}% {how}": arm_of("lora", SIZES["many"], percent, "lora many 30%", how=how)
    for percent in (30, 50)
    for how in ("word", "same word")
}
BASE = {"base": Arm(None)}
TOWNS = Study(
    "data",
    "24 words and a word order, 25 to 2,000 examples, up to half of the labels another example's",
    arms_of("lora", 0, 10, 30, 50) | arms_of("full", 0, 30, 50) | RANKS | MISTAKES | BASE,
    {"tiny": Plan("towns", steps=200, seeds=3, minutes=0.3, settings=SETTINGS)},
    measure,
    chosen_by="last_validation_loss",
    figure=score_map,
)
# Wrong labels may cost time and no more. Rates are shared: with 200 steps, clean and noisy arms chose the same ones.
LONG = Study(
    "data-long",
    "as `data`, at three times the steps",
    {
        "lora some 0%": arm_of("lora", SIZES["some"], 0, "lora many 30%"),
        "lora many 0%": arm_of("lora", SIZES["many"], 0, "lora many 30%"),
        "lora many 30%": arm_of("lora", SIZES["many"], 30),
        "lora many 50%": arm_of("lora", SIZES["many"], 50, "lora many 30%"),
        **BASE,
    },
    {"tiny": Plan("towns", steps=600, seeds=3, minutes=0.9, settings=SETTINGS)},
    measure,
    chosen_by="last_validation_loss",
    figure=score_map,
)
REAL = {  # with fewer searches for a rate
    "lora few 0%": arm_of("lora", 25, 0, "lora some 0%"),
    "lora few 30%": arm_of("lora", 25, 30, "lora some 0%"),
    "lora some 0%": arm_of("lora", 100, 0),
    "lora many 0%": arm_of("lora", 400, 0),
    "lora many 30%": arm_of("lora", 400, 30),
    "lora many 50%": arm_of("lora", 400, 50, "lora many 30%"),
    "full many 0%": arm_of("full", 400, 0),
    "full many 30%": arm_of("full", 400, 30, "full many 0%"),
}
ORDERS = Study(
    "data-orders",
    "orders as JSON, 25 to 400 examples, up to half of the labels another example's",
    REAL | BASE,
    {"smollm2": Plan("orders", steps=40, seeds=3, minutes=3, settings=SETTINGS | {"evaluations": 5})},
    measure,
    chosen_by="last_validation_loss",
    figure=score_map,
)


def rise(record: Record) -> float:
    """By how many percent the last validation loss lies above the lowest along the run."""
    best = record["best_validation_loss"]
    return 100 * (record["last_validation_loss"] - best) / best


def overfits(arm: str, bar: float) -> Rule:
    words = f"last validation loss of {arm} above the lowest along the run, percent of the latter"
    return Rule((arm, "lora many 0%", "base"), words, lambda runs: rise(runs[arm]), bar)


def overfits_more(arm: str, than: str, bar: float, more: tuple[str, ...]) -> Rule:
    words = f"last validation loss above the lowest along the run, percent, of {arm} above that of {than}"
    return Rule((arm, than, *more), words, lambda runs: rise(runs[arm]) - rise(runs[than]), bar, "points")


def lost(runs: Mapping[str, Record], method: str, share: int) -> float:
    """Points of the held-out score that wrong labels cost the method with many examples."""
    right, wrong = (runs[f"{method} many {each}%"]["scores"]["task"] for each in (0, share))
    return 100 * (right - wrong)


def robust(share: int, bar: float) -> Rule:
    words = f"points that {share} % wrong labels of many cost full fine-tuning above those that they cost LoRA"
    arms = tuple(f"{method} many {each}%" for method in ("lora", "full") for each in (0, share))
    return Rule(
        (*arms, "base"), words, lambda runs: lost(runs, "full", share) - lost(runs, "lora", share), bar, "points"
    )


def outweighs(share: int, bar: float) -> Rule:
    words = f"points that {share} % wrong labels of many cost LoRA; all sizes, shares and both methods are run"
    arms = (f"{method} {size} {each}%" for method in ("lora", "full") for size in SIZES for each in (0, 30, 50))
    return Rule((*arms, "base"), words, lambda runs: lost(runs, "lora", share), bar, "points", above=False)


def beats(share: int) -> Rule:
    """The bar: by five answers in a hundred more, one would collect fewer and better examples."""
    rule = more_right("lora some 0%", f"lora many {share}%", "task", 5)
    words = f"{rule.statistic}; some are 500 and many 2,000 on the tiny base, 100 and 400 on SmolLM2"
    return Rule((*rule.arms, "lora many 0%", "base"), words, rule.number, rule.bar, rule.unit)


OBJECTION = (
    "equal steps, so a small set is passed over more often, and wrong labels slow learning down: the study at three "
    "times the steps was added when that was seen; wrong labels are another example's, which no real annotator would "
    "write"
)
LIMA = "Zhou et al. 2023, arXiv:2305.11206 (LIMA), abstract"
BOTH, ALL = (TOWNS, ORDERS), (TOWNS, LONG, ORDERS)
CLAIMS = [
    Claim(
        "few-good",
        "Good examples, 100 or 500, beat four times as many of which 30 % are wrong.",
        LIMA,
        beats(30),
        ALL,
        OBJECTION,
    ),
    Claim(
        "few-good-half",
        "Good examples, 100 or 500, beat four times as many of which half are wrong.",
        LIMA,
        beats(50),
        ALL,
        f"{OBJECTION}; the rate is that of 30 %",
    ),
    Claim(
        "tiny-overfit",
        "Tiny data sets overfit.",
        "often said",
        overfits("lora few 0%", 10),
        BOTH,
        "few are 100 examples on the tiny base; after 25 there the loss does rise, by 34.9, 14.0 and 36.9 % (mean "
        "28.6, interval 7 to 50, which would be open). On SmolLM2 few are 25, in 40 steps. The rate with the lowest "
        "last loss is also one that overfits little; by the gap between training and validation loss, which is wide, "
        "all small sets overfit",
        loss_curves,
    ),
    Claim(
        "rank-overfits",
        "On a hundred examples a higher rank overfits more: 64 more than 1.",
        "often said",
        overfits_more("r=64 few 0%", "r=1 few 0%", 5, ("lora few 0%", "full few 0%", "base")),
        (TOWNS,),
        "each rank has its own rate, chosen by the last loss, which a rate that overfits less can win",
        loss_curves,
    ),
    Claim(
        "noise-robust",
        "LoRA is hurt less by wrong labels than full fine-tuning.",
        "Biderman et al. 2024, arXiv:2405.09673, who find that LoRA regularizes more",
        robust(30, 5),
        BOTH,
        "a method that learns more slowly has less time to learn the noise, and less to learn the task. On SmolLM2 a "
        "rate for wrong labels was searched for LoRA alone, and full fine-tuning takes its rate of right labels; the "
        "search ended at LoRA's rate of right labels too, 0.003",
    ),
    Claim(
        "learns-noise",
        "A model learns the wrong labels it is given: of few examples it repeats most of the wrong ones.",
        "Zhang et al. 2016, arXiv:1611.03530, abstract",
        score("lora few 30%", "repeated", 50),
        BOTH,
        "few rows are passed over 32 times on the tiny base and 26 times on SmolLM2; 30 wrong rows there and 8 here",
    ),
    Claim(
        "enough-outweigh",
        "Enough examples outweigh wrong labels: 30 % wrong of many cost less than 5 answers in a hundred.",
        "Rolnick et al. 2017, arXiv:1705.10694, abstract",
        outweighs(30, 5),
        (TOWNS,),
        "the wrong labels are drawn anew for each row; 200 steps are 1.6 passes, too few to average them "
        "out: a run of 600 steps, one seed, gave 97 % right answers",
    ),
    Claim(
        "same-mistake",
        "Mistakes that repeat do more harm than as many random ones.",
        "often said",
        more_right("lora many 30% word", "lora many 30% same word", "task", 5),
        (TOWNS,),
        "one word is wrong in both; as long as most labels of a word are right, the likeliest answer stays right; two "
        "labels of a word are sooner learned than twenty-four, and 200 steps do not end the learning",
    ),
    Claim(
        "same-mistake-half",
        "Where half of the labels are wrong, mistakes that repeat do more harm than random ones.",
        "often said",
        more_right("lora many 50% word", "lora many 50% same word", "task", 5),
        (TOWNS,),
        "a word with two labels as likely as each other has no right answer but by chance, however long it is trained; "
        "with random ones the right answer stays the likeliest, and 200 steps are too few to find it",
    ),
    Claim(
        "tenth-wrong",
        "One wrong label in ten does no harm to a few hundred examples.",
        "Rolnick et al. 2017, arXiv:1705.10694",
        Rule(
            ("lora some 0%", "lora some 10%", *(f"lora {size} 10%" for size in ("fewest", "few", "many")), "base"),
            "points of the held-out score that 10 % wrong labels cost LoRA on some examples",
            lambda runs: 100 * (runs["lora some 0%"]["scores"]["task"] - runs["lora some 10%"]["scores"]["task"]),
            5,
            "points",
            above=False,
        ),
        (TOWNS,),
        "one task, whose wrong labels contradict each other",
    ),
]
