"""Claims about adapters merged into one: what it costs each task, how it is best done, and what predicts the cost."""

from collections.abc import Callable

from minilora.experiments.claims.claim import Claim, Record, Rule
from minilora.experiments.claims.study import Arm, Plan, Study
from minilora.experiments.claims.together.merging_figures import over_number, pair_plot, task_bars
from minilora.experiments.claims.together.merging_numbers import kept, kept_alone, merged_above_union, predicts
from minilora.experiments.claims.together.merging_runs import EVERY_WAY, measure
from minilora.text.rewordings import REWORDINGS

ARMS = {
    "apart": Arm("lora", settings={"one for all": False}),
    # As many steps as the adapters of one merge took together; and as many as one of them.
    "union": Arm("lora", settings={"one for all": True, "as long": True, "largest": 2}),
    "union short": Arm("lora", settings={"one for all": True, "as long": False, "largest": 2}),
    # Of pairs only, and of no rule: the same adapters with a weight for each, and others at a smaller rate.
    "a weight each": Arm(
        "lora", settings={"one for all": False, "methods": ("weights",), "sizes": (2,)}, rate_of="apart"
    ),
    "gently": Arm(
        "lora",
        settings={"one for all": False, "methods": ("sum", "linear"), "sizes": (2,), "times": 3},
        rate_of="apart",
        rate_times=0.3,
    ),
}
SIX = Study(
    "merging",
    "six tasks, an adapter of rank 8 on all linears for each; all pairs and triples and all six put together",
    ARMS,
    {
        "tiny": Plan(
            "rewordings",
            steps=40,
            seeds=3,
            minutes=8,
            settings={
                **EVERY_WAY,
                "tasks": tuple(REWORDINGS),
                "tuned on": 20,
                "asked": 40,
                "training": {"batch_size": 16},
            },
        )
    },
    measure,
    chosen_by="tuning_loss",
    figure=over_number,
)
REAL = Study(
    "merging-two",
    "a pirate's voice and orders as JSON, an adapter of rank 8 on all linears for each, put together; SmolLM2-135M",
    {name: Arm(None, settings=arm.settings) for name, arm in list(ARMS.items())[:2]},
    {
        "smollm2": Plan(
            "pirate and orders",
            steps=24,
            seeds=2,
            minutes=15,
            settings={
                **EVERY_WAY,
                "tasks": ("pirate", "orders"),
                "tuned on": 6,
                "asked": 30,
                "rates": {"pirate": 0.001, "orders": 0.003},  # of the searches in prompt-voice and `compare`
                "training": {"batch_size": 8, "group_by_length": True},
            },
        )
    },
    measure,
    chosen_by="tuning_loss",
    figure=task_bars,
)


def of_apart(words: str, number: Callable[[Record], float], bar: float, unit: str = "%", above: bool = True) -> Rule:
    return Rule(("apart",), words, lambda runs: number(runs["apart"]), bar, unit, above)


def prediction(statistic: str, words: str) -> Rule:
    return of_apart(
        f"Spearman's correlation over the 15 pairs, {words} against the share of the gain in loss that the plain sum "
        "takes from its two tasks",
        lambda record: predicts(record, statistic),
        bar=0.5,
        unit="correlation",
    )


BOTH = (SIX, REAL)
CLAIMS = [
    Claim(
        "add-tuned",
        "With a well chosen weight, adapters of two tasks can be added, and the sum does both.",
        "Ilharco et al. 2023, arXiv:2212.04089, section 4; popular articles on merging adapters",
        of_apart(
            "of each task's score alone, percent left under the sum with one tuned weight, the lower of two tasks, "
            "mean over the pairs",
            lambda record: kept(record, "linear", 2, min),
            bar=80,
        ),
        BOTH,
        "exact answers break first: on the tiny base, where 38 % of the scores are left, so is 87 % of the gain in "
        "loss; on SmolLM2 no order is right, and 85 and 91 % of the gain in loss on orders is left. And the tiny "
        "base's rate is high: with a weight for each the worse of two keeps 26 %, trained at 0.3 of the rate 15 %, "
        "and both together 41 and 51 instead of 38",
    ),
    Claim(
        "merge-many",
        "The more adapters are merged, the worse each does its task.",
        "Ilharco et al. 2023, arXiv:2212.04089, figure 4; Yadav et al. 2023, arXiv:2306.01708, figure 5",
        of_apart(
            "percent of the score alone that is left in pairs above what is left with all six, sums with a tuned "
            "weight, points",
            lambda record: kept(record, "linear", 2) - kept(record, "linear", 6),
            bar=10,
            unit="points",
        ),
        (SIX,),
        "six short tasks of one small world, at rank 8 in layers 192 wide: there is little room for more",
    ),
    Claim(
        "ties",
        "TIES loses less than adding the adapters.",
        "Yadav et al. 2023, arXiv:2306.01708, table 1",
        of_apart(
            "percent of the scores alone that TIES leaves above what the sum leaves, each with a tuned weight, mean "
            "over all merges, points",
            lambda record: kept(record, "ties") - kept(record, "linear"),
            bar=5,
            unit="points",
        ),
        BOTH,
        "a fifth of the entries is kept, as in the paper, and that share is not tuned; full matrices, no SVD after",
    ),
    Claim(
        "dare",
        "DARE: nine of ten entries of a trained change can be dropped, and nothing is lost.",
        "Yu et al. 2023, arXiv:2311.03099, abstract: 90 % or even 99 %",
        of_apart(
            "of each task's score alone, percent left with 90 % of the entries of ΔW dropped and the others times 10, "
            "mean of the tasks",
            kept_alone,
            bar=95,
        ),
        BOTH,
        "the paper drops the small changes of full fine-tuning of large models; LoRA's at a high rate are "
        "larger. On SmolLM2 60 answers of two seeds are too few to tell 95 % from all",
    ),
    Claim(
        "merge-or-train",
        "Merging replaces training on all the tasks.",
        "Ilharco et al. 2023, arXiv:2212.04089, abstract; Huang et al. 2023, arXiv:2307.13269 (LoraHub)",
        Rule(
            ("apart", "union"),
            "percent of the scores alone that the best way to merge leaves (chosen by held-out loss), above what one "
            "adapter has that is trained on the union with as many steps as those merged together",
            merged_above_union,
            bar=-10,
            unit="points",
        ),
        BOTH,
        "the union needs all the data in one place and a run for every choice of tasks, which merging does not",
    ),
    Claim(
        "overlap-subspaces",
        "Adapters disturb each other where the subspaces of their updates overlap.",
        "Shah et al. 2023, arXiv:2311.13600 (ZipLoRA), section 4; Ilharco et al. 2023, arXiv:2212.04089, section 5",
        prediction("subspaces", "overlap of the singular vectors of the two ΔW"),
        (SIX,),
        "15 pairs of six tasks are no 15 independent things; trained from random A's, all pairs overlap alike (0.07 to "
        "0.12, where chance gives 0.04), and which tasks they are says more than how they overlap",
        pair_plot("subspaces"),
    ),
    Claim(
        "overlap-outputs",
        "What one adapter does to the other's inputs tells how much it disturbs: ‖ΔW_j x‖ beside ‖ΔW_i x‖.",
        "the argument behind merging by activations: Jin et al. 2023, arXiv:2212.09849 (RegMean)",
        prediction("outputs", "‖ΔW_j x‖ / ‖ΔW_i x‖ on inputs of task i, mean of layers and of both directions,"),
        (SIX,),
        "15 pairs of six tasks are no 15 independent things; the inputs are those behind one adapter, not behind both",
        pair_plot("outputs"),
    ),
]
