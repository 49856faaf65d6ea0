"""Claims about forgetting: what fine-tuning costs on text that it does not touch, at equal loss on its task."""

from minilora.experiments.claims.claim import Claim, Rule, score
from minilora.experiments.claims.study import Arm, Draw, Plan, Study
from minilora.experiments.claims.uses.forgetting_figures import frontier, kinds_by_step
from minilora.experiments.claims.uses.forgetting_rules import (
    ends_less,
    forgets_less,
    halved_answers,
    heart_before_reading,
    one_curve,
    scaling_back,
    scaling_or_stopping,
)
from minilora.experiments.claims.uses.forgetting_runs import measure

LORAS: dict[str, dict] = {
    "r=8": {},
    "r=1": {"r": 1},
    "r=64": {"r": 64},
    "q,v": {"target_modules": ("q_proj", "v_proj")},
}
SCALES = ("0.25", "0.5", "0.75")
BEST = {
    "full": Arm("full"),
    **{name: Arm("lora", lora, {"scales": SCALES if name == "r=8" else ()}) for name, lora in LORAS.items()},
}
THIRD = {f"{name} /3": Arm(arm.method, arm.lora, rate_of=name, rate_times=1 / 3) for name, arm in BEST.items()}
MIX = {"r=8 + old text": Arm("lora", settings={"replay": True}, rate_of="r=8")}
LATER = {  # what the first results asked for
    "full /10": Arm("full", rate_of="full", rate_times=1 / 10),
    "r=8 halved": Arm("lora", settings={"halved": True}, rate_of="r=8"),
}
ARMS = {**BEST, **THIRD, **MIX, **LATER, "base": Arm(None)}
FEW = {name: ARMS[name] for name in ("full", "r=8", "full /3", "r=8 /3", "r=8 + old text", *LATER, "base")}
SETTINGS = {"scales": (), "replay": False, "halved": False, "english": False, "evaluations": 10}
DIALECT = Study(
    "forgetting-dialect",
    "a hundred new words and a word order are learned; what the base knew of its world is measured",
    ARMS,
    {"tiny": Plan("dialect", steps=100, seeds=3, minutes=0.4, settings=SETTINGS)},
    measure,
    figure=frontier,
)
JSON = Study(
    "forgetting-json",
    "a strict format is learned; what the base knew of its world is measured",
    FEW,
    {"tiny": Plan("json", steps=60, seeds=3, minutes=0.5, settings=SETTINGS)},
    measure,
    figure=frontier,
)
COMMANDS = Study(
    "forgetting-commands",
    "an invented command language is learned; the loss on English prose is measured",
    ARMS,
    {
        "smollm2": Plan(
            "commands", steps=80, seeds=3, minutes=6, settings=SETTINGS | {"english": True, "evaluations": 8}
        )
    },
    measure,
    figure=frontier,
)
ALL, SHORT = (DIALECT, COMMANDS), (DIALECT, JSON, COMMANDS)
OBJECTION = (
    "a method that learns faster is compared in the middle of its run, at a rate that has not come down yet; one task "
    "and some thousand tokens of old text; 60 to 100 steps, not the billions of tokens of the paper"
)
BIDERMAN = "Biderman et al. 2024, arXiv:2405.09673"
OFTEN = "often said"


def claim(
    name: str,
    sentence: str,
    source: str,
    rule: Rule,
    studies: tuple[Study, ...] = ALL,
    objection: str = OBJECTION,
    figure: Draw | None = None,
) -> Claim:
    return Claim(f"forget-{name}", sentence, source, rule, studies, objection, figure)


CLAIMS = [
    claim(
        "less",
        "LoRA forgets less than full fine-tuning that has learned as much.",
        f"{BIDERMAN}, abstract",
        forgets_less("r=8", "full"),
        SHORT,
        "the rate decides more than the method. On the dialect full fine-tuning's rate, 0.01, was the best of its "
        "search and is not the best on the reported seeds: a third of it learns about as well (task loss 0.13 to "
        "0.18, against 0.12 to 0.36) and forgets half, and LoRA forgets 49 % less than that, not 80 %. On json the "
        "best rates leave it open, and full fine-tuning at a third of its own, which learns as well, forgets 96 % less "
        "than LoRA. At a tenth it forgets less than LoRA on both (forget-slow-full)",
    ),
    claim(
        "less-end",
        "At the end of a run, LoRA has forgotten less than full fine-tuning.",
        f"{BIDERMAN}, abstract",
        ends_less("r=8", "full"),
        SHORT,
        "what has learned less has also changed less: the two ends differ in task loss",
    ),
    claim(
        "one-curve",
        "LoRA and full fine-tuning pay the same price: what is learned and what is forgotten lie on one curve.",
        BIDERMAN,
        one_curve(("r=8", "r=8 /3"), ("full", "full /3")),
        SHORT,
        "two rates for each method, and the curve is compared in one place, the lowest task loss that both reach",
    ),
    claim(
        "gentlest",
        "Of these ten settings, the gentlest of eight with LoRA forgets less than the gentler of two with full "
        "fine-tuning.",
        BIDERMAN,
        forgets_less((*LORAS, *(f"{name} /3" for name in LORAS)), ("full", "full /3")),
        objection="the best of eight settings beside the best of two; a tenth of full fine-tuning's rate "
        "(forget-slow-full) is gentler than any of the ten on the small base",
    ),
    claim(
        "rank",
        "A lower rank forgets less, at equal learning.",
        BIDERMAN,
        forgets_less("r=1", "r=64"),
    ),
    claim(
        "rank-end",
        "At the end of a run, a lower rank has forgotten less.",
        BIDERMAN,
        ends_less("r=1", "r=64"),
        objection="what has learned less has also changed less: the two ends differ in task loss",
    ),
    claim(
        "layers",
        "Adapters on q and v alone forget less than on all linear layers, at equal learning.",
        OFTEN,
        forgets_less("q,v", "r=8"),
    ),
    claim(
        "rate",
        "With LoRA, a third of the best learning rate forgets less, at equal learning.",
        "Sun et al. 2019, arXiv:1905.05583",
        forgets_less("r=8 /3", "r=8"),
        SHORT,
    ),
    claim(
        "rate-full",
        "With full fine-tuning, a third of the best learning rate forgets less, at equal learning.",
        "Sun et al. 2019, arXiv:1905.05583",
        forgets_less("full /3", "full"),
        SHORT,
    ),
    claim(
        "slow-full",
        "Full fine-tuning at a tenth of its best rate forgets less than LoRA, at equal learning.",
        "put here after the first results, before its own runs",
        forgets_less("full /10", "r=8"),
        (DIALECT, JSON),
        "a slow method is compared with one at its best rate",
    ),
    claim(
        "replay",
        "A tenth of old text among the examples halves what is forgotten.",
        "Scialom et al. 2022, arXiv:2205.12393",
        forgets_less("r=8 + old text", "r=8", 50),
        SHORT,
        "the text mixed in is of the kind that is measured. The small base's is about the same forty residents: 11 of "
        "the 24 questions by heart, and 27 of the 96 in the documents of such questions, stand in it with their "
        "answers. SmolLM2's is prose, after which it answers 0 or 1 of 30 trivial questions, as it does without; the "
        "base answers 12. And a tenth of the rows is more than a tenth of the tokens",
    ),
    claim(
        "scale",
        "Half of the update keeps nine tenths of the gain in task loss and gives back half of what was forgotten.",
        "Wortsman et al. 2021, arXiv:2109.01903, for whole weights",
        scaling_back("r=8", "0.5", 90, 50),
        SHORT,
        "the gain counts the first, easy steps: nine tenths of it are not nine tenths of the right answers, for which "
        "see forget-scale-answers. The runs keep 95 to 99 % of the gain, and give back 74 to 97 % of what was "
        "forgotten",
    ),
    claim(
        "scale-answers",
        "Half of the update answers as well as the whole.",
        "put here after the first results, before its own runs",
        halved_answers("r=8 halved"),
        (JSON,),
        "a format in which one wrong token spoils the answer; three seeds that differ in how far they got",
    ),
    claim(
        "scale-or-stop",
        "Scaling the update down after training costs less than stopping earlier.",
        "Wortsman et al. 2021, arXiv:2109.01903, for whole weights",
        scaling_or_stopping("r=8", "0.75"),
        SHORT,
    ),
    claim(
        "heart-first",
        "Facts known by heart go before the skill of reading them in a text.",
        OFTEN,
        heart_before_reading("r=8"),
        (DIALECT, JSON),
        "facts of forty people, met thousands of times in pretraining; by loss, not by right answers",
        kinds_by_step,
    ),
    claim(
        "off",
        "Without its adapter the model is the base again, bit for bit.",
        "Hu et al. 2021, arXiv:2106.09685, section 4.1",
        score("r=8", "base again", 99.999),
        SHORT,
        "true by construction of a layer that leaves W alone; full fine-tuning needs the old weights kept",
    ),
]
