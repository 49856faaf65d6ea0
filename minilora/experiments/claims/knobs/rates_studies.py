"""The studies of rate, batch and scale: which arms, on what, and where each arm's curve begins."""

from dataclasses import replace
from typing import Any

from minilora.experiments.claims.knobs.rates_figures import batches, best_rates, loss_curves
from minilora.experiments.claims.knobs.rates_runs import at_one_rate, curve
from minilora.experiments.claims.study import Arm, Plan, Study

SETTINGS = {"evaluations": 1, "training": {}}
FULL, R8 = "full", "r=8"  # alpha is 16 unless an arm's name says otherwise
ALPHAS = {"r=8, alpha 2": 2, R8: 16, "r=8, alpha 128": 128, "r=8, alpha 1024": 1024}


def arm_of(method: str, first: float, training: dict[str, Any] | None = None, **lora: float) -> Arm:
    """An arm whose curve begins at the rate `first`. training: fields of TrainConfig that are not the plan's."""
    more = {"training": training} if training else {}
    return Arm(None, dict(lora), {"method": method, "first": first, **more})


def ranks_of(full: float, lora: float) -> dict[str, Arm]:
    """Where the curves begin: of full fine-tuning, and of LoRA with alpha 16."""
    ranks = {f"r={r}": arm_of("lora", lora, r=r) for r in (1, 8, 64)}
    return {FULL: arm_of("full", full), **ranks}


def alphas_of(lora: float) -> dict[str, Arm]:
    """alpha 2r at the ends of the ranks, and at rank 8 the scale from an eighth of that to 64 times as much."""
    return {
        "r=1, alpha 2": arm_of("lora", 2 * lora, r=1, lora_alpha=2),
        "r=64, alpha 128": arm_of("lora", lora / 4, r=64, lora_alpha=128),
        "r=8, alpha 2": arm_of("lora", 4 * lora, lora_alpha=2),
        "r=8, alpha 128": arm_of("lora", lora / 4, lora_alpha=128),
        "r=8, alpha 1024": arm_of("lora", lora / 16, lora_alpha=1024),
    }


def study_of(
    name: str, about: str, arms: dict[str, Arm], scale: str, plan: Plan, figure=best_rates, **settings
) -> Study:
    return Study(name, about, arms, {scale: replace(plan, settings=SETTINGS | settings)}, curve, figure=figure)


TOOLS = "the last loss at rates in steps of 2 until the lowest is between two that are higher, for each seed"
DIALECT = study_of(
    "rates-dialect",
    f"a hundred new words; {TOOLS}",
    ranks_of(full=1e-3, lora=2e-3) | alphas_of(lora=2e-3),
    "tiny",
    Plan("dialect", steps=100, seeds=3, minutes=1.5),
)
JSON = study_of(
    "rates-json",
    f"a new format, 30 steps, as in `json`; {TOOLS}",
    ranks_of(full=5e-4, lora=2e-3) | alphas_of(lora=2e-3),
    "tiny",
    Plan("json", steps=30, seeds=3, minutes=1),
)
ORDERS = study_of(
    "rates-orders",
    f"orders as JSON, 30 steps of 8; {TOOLS}",
    {name: arm for name, arm in ranks_of(full=1e-4, lora=1e-3).items() if name in (FULL, R8)},
    "smollm2",
    Plan("orders", steps=30, seeds=3, minutes=12),
)
LENGTHS = study_of(
    "rates-lengths",
    f"as rates-dialect, 25 and 200 steps; {TOOLS}",
    {
        f"{name}, {steps} steps": arm_of(method, first, {"steps": steps})
        for name, method, first in ((FULL, "full", 1e-3), (R8, "lora", 2e-3))
        for steps in (25, 200)
    },
    "tiny",
    Plan("dialect", steps=200, seeds=3, minutes=1.5),
)

EXAMPLES = 3072
SHORT = ", few steps"  # as few with the small batch as with the large one


def batch_arms(full: float, lora: float) -> dict[str, Arm]:
    """The same number of examples in batches of 16, 64 and 256; and as many steps with the least as with the most."""
    training = {f"batch {size}": {"batch_size": size, "steps": EXAMPLES // size} for size in (16, 64, 256)}
    training["batch 16" + SHORT] = {"batch_size": 16, "steps": EXAMPLES // 256}
    return {
        f"{method}, {name}": arm_of(method, first, each)
        for method, first in (("full", full), ("lora", lora))
        for name, each in training.items()
    }


BATCHES = study_of(
    "batches",
    f"a hundred new words, {EXAMPLES:,} examples in batches of 16 to 256; {TOOLS}",
    batch_arms(full=1e-3, lora=4e-3),
    "tiny",
    Plan("dialect", steps=EXAMPLES // 16, seeds=3, minutes=1.5),
    batches,
    evaluations=12,
)
PRODUCT = 0.064  # of alpha and rate: 0.004 at alpha 16, half of the best one or less
SAME_PRODUCT = Study(
    "product",
    f"a hundred new words, alpha 2 to 1024 at the rate {PRODUCT:g}/alpha, a loss at every fifth step",
    {
        name: Arm(None, {"lora_alpha": alpha}, {"method": "lora", "rate": PRODUCT / alpha})
        for name, alpha in ALPHAS.items()
    },
    {"tiny": Plan("dialect", 100, 3, 0.5, SETTINGS | {"evaluations": 20})},
    at_one_rate,
    figure=loss_curves,
)
