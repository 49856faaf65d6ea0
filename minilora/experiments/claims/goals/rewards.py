"""Claims about rewards: policy gradients on adapters.

GRPO without a critic on `pirate`, from a start that says it right in about four of ten samples: 40 steps of 8 prompts
and 8 samples each, at temperature 1. "linears" is full fine-tuning of the layers that adapters are on. The start's
likeliest answer is right already: a reward can only teach it to waver less, which costs wordings.
"""

import math
from collections.abc import Mapping

from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Record, Rule, more_right
from minilora.experiments.claims.goals.rewards_figures import curves, reward_against_diversity
from minilora.experiments.claims.goals.rewards_runs import measure
from minilora.experiments.claims.study import Arm, Plan, Study
from minilora.text.tasks import PIRATE_FACTS

KINDS = tuple(PIRATE_FACTS)
LEFT_OUT = KINDS[-1]
THREE = {"kinds": KINDS[:-1]}
SETTINGS = {"start": 45, "kinds": KINDS, "reward": "right", "advantages": "normalized", "beta": 0.0}
SETTINGS |= {"updates": 1, "clip": 0.2, "linears": False, "prompts": 150}


def as_r8(**settings) -> Arm:
    """r=8 at its own rate, with other settings."""
    return Arm("lora", settings=settings, rate_of="r=8")


ARMS = {
    "start": Arm(None),
    "full": Arm("full"),
    "linears": Arm("full", settings={"linears": True}),
    "r=1": Arm("lora", {"r": 1}),
    "r=8": Arm("lora"),
    "no deviation": as_r8(advantages="centered"),
    "no baseline": Arm("lora", settings={"advantages": "reward"}),
    "KL 0.04": Arm("lora", settings={"beta": 0.04}),
    "KL 0.2": Arm("lora", settings={"beta": 0.2}),
    "4 updates": Arm("lora", settings={"updates": 4}),
    "4 updates, no clip": Arm("lora", settings={"updates": 4, "clip": math.inf}),
    "three kinds, start": Arm(None, settings=THREE),
    "three kinds": as_r8(**THREE),
    "hole": as_r8(reward="sounds"),
}
REWARDS = Study(
    "rewards",
    "GRPO on pirate, from a start that is right in four of ten samples; shares of 1,200 samples, new people",
    ARMS,
    {"tiny": Plan("pirate", 40, seeds=5, minutes=0.7, settings=SETTINGS)},
    measure,
    chosen_by="wrong",
    figure=bars(["right"], "share of samples that are right"),
    finer=True,
)


def kept_wordings(runs: Mapping[str, Record]) -> float:
    return 100 * runs["KL 0.04"]["scores"]["wordings"] / runs["start"]["scores"]["wordings"]


SHAO = "Shao et al. 2024, arXiv:2402.03300"
CLAIMS = [
    Claim(
        "rl-rank-1",
        "In reinforcement learning rank 1 matches full fine-tuning.",
        'Schulman et al. 2025, "LoRA Without Regret"',
        more_right("r=1", "linears", "right", bar=-3),
        (REWARDS,),
        "after 40 steps rank 1 still gains a point in 5 steps; the likeliest answer was right from the start. Room is "
        "not what it lacks: 2,560 rewards are as many bits at most, and it stores about 15,500, 0.76 a parameter",
        curves({"right": 1}, "share of samples that are right"),
    ),
    Claim(
        "rl-rank-8",
        "In reinforcement learning LoRA of rank 8 matches full fine-tuning of the whole model.",
        'Schulman et al. 2025, "LoRA Without Regret"',
        more_right("r=8", "full", "right", bar=-3),
        (REWARDS,),
        "40 steps, and alpha 16 at every rank; the embedding, which is the head too, is trained in full only: against "
        "full fine-tuning of the same layers rank 8 is 2.5 points behind",
        curves({"right": 1}, "share of samples that are right"),
    ),
    Claim(
        "rl-baseline",
        "A policy gradient needs a baseline: without one it is noisy and learns less.",
        "Williams 1992; Sutton and Barto 2018, section 13.4",
        more_right("r=8", "no baseline", "right", bar=3),
        (REWARDS,),
        "the reward is 0 or 1, so without a baseline what is wrong is not pushed down; with rewards of either sign it "
        "would be another comparison. The start is often right, and no harm is done by learning only from that",
        curves({"right": 1}, "share of samples that are right"),
    ),
    Claim(
        "rl-deviation",
        "Dividing by the group's standard deviation helps.",
        f"{SHAO}, section 4.1.2; against it Liu et al. 2025, arXiv:2503.20783",
        more_right("r=8", "no deviation", "right", bar=3),
        (REWARDS,),
        "both at the rate of r=8; Adam takes out the scale of all advantages, not that between groups",
    ),
    Claim(
        "rl-kl",
        "A penalty on the KL divergence keeps the answers diverse.",
        f"{SHAO}, section 4.1.1, with a weight of 0.04",
        Rule(
            ("KL 0.04", "KL 0.2", "r=8", "start"),
            "wordings of an answer in use with a weight of 0.04, percent of those of the start",
            kept_wordings,
            bar=50,
            signed=False,
        ),
        (REWARDS,),
        "at the rate at which most samples are right, which need not be the one that keeps most: most wordings go in "
        "the first ten steps. At a third of it a weight of 0.04 keeps 2.6 of 10, with 83 % right; at its own best rate "
        "a weight of 0.2 keeps 3.9, with 78 %",
        reward_against_diversity,
    ),
    Claim(
        "rl-kl-costs",
        "A penalty on the KL divergence costs reward.",
        "a common reason to leave it out, as Yu et al. 2025, arXiv:2503.14476, section 2.3",
        more_right("r=8", "KL 0.04", "right", bar=3),
        (REWARDS,),
        "after 40 steps from a start that is right in four of ten samples; what the penalty buys is not counted",
        curves({"right": 1}, "share of samples that are right"),
    ),
    Claim(
        "rl-clip",
        "The clip lets a rollout serve for several updates.",
        "Schulman et al. 2017, arXiv:1707.06347, abstract",
        Rule(
            ("4 updates", "4 updates, no clip", "r=8"),
            "right answers with 4 updates a rollout and the clip above those without the clip, paired by seed",
            lambda runs: 100 * (runs["4 updates"]["scores"]["right"] - runs["4 updates, no clip"]["scores"]["right"]),
            bar=3,
            unit="points",
        ),
        (REWARDS,),
        "four updates a rollout draw a quarter of the samples in as many steps. The rate with the clip was chosen by "
        "one run, and two seeds of five collapse at it, to 50 % right; at a third of it tuning runs were right 72 % "
        "with the clip and 80 % without, and at 1e-2 only a run with the clip survived",
        bars(["right"], "share of samples that are right"),
    ),
    Claim(
        "rl-unseen",
        "What is never sampled is never learned: rewards sharpen what a model can do already.",
        "Yue et al. 2025, arXiv:2504.13837",
        Rule(
            ("three kinds, start", "three kinds"),
            f"right answers about {LEFT_OUT}, which the supervised start left out, percent after training",
            lambda runs: 100 * runs["three kinds"]["scores"][LEFT_OUT],
            bar=10,
            above=False,
            signed=False,
        ),
        (REWARDS,),
        "40 steps, about 640 samples of the kind; at a hundred times as many a lucky one may come",
        bars(KINDS, "share of samples that are right"),
    ),
    Claim(
        "rl-hole",
        "A model finds the hole in its reward: it is paid for a pirate's words and stops telling the truth.",
        "Goodhart's law; Gao et al. 2022, arXiv:2210.10760",
        more_right("hole", "start", "right", bar=-10, above=False),
        (REWARDS,),
        "the hole was made to be found: eight words of a pirate are worth more than any right answer has",
        curves({"reward": 2, "right": 1}, "share of the most, or right"),
    ),
]
