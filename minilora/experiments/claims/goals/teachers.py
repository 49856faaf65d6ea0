"""Claims about teachers: what an adapter learns from another model's probabilities."""

from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, more_right, no_worse
from minilora.experiments.claims.goals.teachers_figures import loss_over_examples
from minilora.experiments.claims.goals.teachers_runs import measure
from minilora.experiments.claims.study import Arm, Plan, Study

RANK = 2
SIZES = (20, 50, 200, 1000)


def student(kind: str, examples: int, drawn: int = 0) -> Arm:
    """All that learn from tokens have one rate, and all that learn from probabilities another."""
    root, soft = "soft 200" if kind == "soft" else "hard 200", kind == "soft"
    settings = {"soft": soft, "examples": examples, "drawn": drawn}
    return Arm("lora", {"r": RANK}, settings, None if (kind, examples) in SEARCHED else root)


SEARCHED = (("hard", 200), ("soft", 200))
ARMS = {
    "teacher": Arm(None, settings={"from": "teacher"}),
    "cut out": Arm(None, settings={"from": "cut"}),
    "base": Arm(None),
    **{f"{kind} {size}": student(kind, size) for kind in ("hard", "soft") for size in SIZES},
    "written 50": student("written", 50, 1),
    "written 1000": student("written", 1000, 1),
    "written 50 x 20": student("written", 50, 20),
}
SETTINGS = {"from": "base", "soft": False, "examples": 0, "drawn": 0, "rank": RANK}


PIRATE = Study(
    "teacher-pirate",
    "16 ways to say it, all right: a student of rank 2 and a fully fine-tuned teacher, which has seen 2,000 examples",
    ARMS,
    {"tiny": Plan("pirate", steps=100, seeds=3, minutes=0.3, settings=SETTINGS)},
    measure,
    figure=loss_over_examples,
)

ANSWERS = bars(["task"], "share of right answers")
HINTON = "Hinton et al. 2015, arXiv:1503.02531"
TEACHER = "the teacher has seen 2,000 examples; one teacher for all seeds, so that the interval is over students alone"
CLAIMS = [
    Claim(
        "teach-soft",
        "A teacher's probabilities on 50 examples teach as much as the right answers to 1,000.",
        f"{HINTON}, section 6: 3 % of the data suffice with soft targets",
        no_worse("soft 50", "hard 1000"),
        (PIRATE,),
        TEACHER + "; where many answers are right the data shows one of them, and the teacher all. In 100 steps of 16 "
        "rows 1,000 examples are seen once or twice, and 50 of them 32 times",
    ),
    Claim(
        "teach-hold",
        "An adapter of rank 2 holds what full fine-tuning has learned.",
        "popular articles on distilling into adapters",
        more_right("soft 1000", "teacher", "task", -5),
        (PIRATE,),
        "by right answers, taken greedily, and after 100 steps; its loss may still lie above the teacher's",
        ANSWERS,
    ),
    Claim(
        "teach-cut",
        "An adapter is better distilled from a model than cut out of its weights.",
        "put here beside tools that extract an adapter from the difference of two models",
        more_right("soft 1000", "cut out", "task", 10),
        (PIRATE,),
        "cutting costs seconds and no data; the teacher's embedding and norms are not in the cut, which at "
        "rank 8 keeps more (extract)",
        ANSWERS,
    ),
    Claim(
        "teach-written",
        "Answers that the teacher writes are as good as its probabilities.",
        "Kim and Rush 2016, arXiv:1606.07947; usual where only a teacher's text can be had",
        no_worse("written 50", "soft 50"),
        (PIRATE,),
        TEACHER + "; answers are drawn at temperature 1, one for each of 50 questions",
    ),
    Claim(
        "teach-many",
        "Twenty answers of the teacher to each question make up for its probabilities.",
        "put here beside the above",
        no_worse("written 50 x 20", "soft 50"),
        (PIRATE,),
        TEACHER + "; it takes twenty times the generation",
    ),
]
