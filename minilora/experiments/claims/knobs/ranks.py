"""Claims about the rank and the layers: how much is trained, and where.

Every arm has a rate of its own, from a search in steps of about 1.7. The arms that differ in where the adapters are
train as many numbers as rank 8 on all linears, within 2 %: fewer layers have a higher rank.
"""

from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import Claim, Rule, better, lower_loss, no_worse
from minilora.experiments.claims.knobs.ranks_figures import ladder
from minilora.experiments.claims.knobs.ranks_runs import bytes_of_a_step, measure
from minilora.experiments.claims.study import Arm, Plan, Study
from minilora.experiments.claims.uses.costs import SEVEN, SMOL, TINY, step_plan
from minilora.experiments.claims.uses.data_figures import loss_curves

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
RANKS = {f"r={r}": Arm("lora", {"r": r}) for r in (1, 2, 8, 32, 128)}
PLACES = {  # the sum of r·(in + out) is that of r=8 on all linears
    "q,v": Arm("lora", {"r": 42, "target_modules": ("q_proj", "v_proj")}),
    "attention": Arm("lora", {"r": 21, "target_modules": ATTENTION}),
    "MLP": Arm("lora", {"r": 13, "target_modules": MLP}),
    "first third": Arm("lora", {"r": 24}, {"third": 0}),
    "last third": Arm("lora", {"r": 24}, {"third": 2}),
    "with head": Arm("lora", {"r": 7, "target_modules": r"model\..*|lm_head"}),
}
BASE = {"base": Arm(None)}
LONG = {"r=1, four times the steps": Arm("lora", {"r": 1}, {"times": 4})}
THREE = {name: RANKS[name] for name in ("r=1", "r=8", "r=128")}
SETTINGS = {"times": 1, "examples": None, "asked": None, "evaluations": 4, "batch": 16}

DIALECT = Study(
    "ranks-dialect",
    "a hundred new words and a word order, batches of 32; r=... on all linears, the others as many numbers as r=8",
    RANKS | PLACES | LONG | {"full": Arm("full")} | BASE,
    {"tiny": Plan("dialect", steps=100, seeds=5, minutes=0.6, settings=SETTINGS | {"batch": 32})},
    measure,
    figure=ladder,
    finer=True,
)
PIRATE = Study(
    "ranks-pirate",
    "an easy task: a voice that the base can nearly speak",
    THREE | BASE,
    {"tiny": Plan("pirate", steps=60, seeds=5, minutes=0.3, settings=SETTINGS)},
    measure,
    figure=ladder,
    finer=True,
)
COMMANDS = Study(
    "ranks-commands",
    "an invented command language, batches of 16; r=... on all linears, the others as many numbers as r=8",
    THREE | PLACES | BASE,
    {"smollm2": Plan("commands", steps=30, seeds=4, minutes=4, settings=SETTINGS | {"asked": 100})},
    measure,
    figure=ladder,
    finer=True,
)
FEW = Study(
    "ranks-few",
    "a hundred examples of the dialect, others for each seed, passed over 32 times; held out, some words are unseen",
    THREE | BASE,
    {
        "tiny": Plan(
            "dialect",
            steps=100,
            seeds=5,
            minutes=0.6,
            settings=SETTINGS | {"batch": 32, "examples": 100, "evaluations": 10},
        )
    },
    measure,
    chosen_by="last_validation_loss",
    figure=loss_curves,
    finer=True,
)
MEMORY = Study(
    "ranks-memory",
    "bytes of one AdamW step: the base 16 x 80 tokens, SmolLM2 8 x 96 (both float32), Llama-2-7B 1 x 2048 (bfloat16)",
    {name: Arm(None, arm.lora, arm.settings) for name, arm in (RANKS | PLACES).items()},
    {
        "tiny": step_plan(*TINY, counted_tokens=36),
        "smollm2": step_plan(*SMOL, counted_tokens=36),
        "large": step_plan(*SEVEN),
    },
    bytes_of_a_step,
    chosen_by="",
    figure=bars(["peak, GB"], "peak, GB of tensors"),
)
HARD = (DIALECT, COMMANDS)


def of_peaks(arm: str, than: str, bar: float, above: bool) -> Rule:
    """Exact: percent of the peak of `than` that the peak of `arm` is."""
    words = f"peak of tensors in a step of {arm}, percent of that of {than}"
    return Rule(
        (arm, than),
        words,
        lambda runs: 100 * runs[arm]["scores"]["peak, GB"] / runs[than]["scores"]["peak, GB"],
        bar,
        above=above,
        exact=True,
    )


SCHULMAN = "Schulman et al. 2025, LoRA Without Regret"
SHORT = (
    "short runs: what is compared is how far each arm comes in the same steps, not where it would end; alpha is 16 at "
    "every rank, which a rate of its own makes up for. On SmolLM2 the loss at the rates beside the best is for most "
    "arms two to five times as high, so the search, which has one seed, decides as much as the arm, and no interval "
    "shows that"
)
COUNTS = f"equal counts are no equal bytes, for which see targets-memory; {SHORT}"


def claim(
    name: str,
    sentence: str,
    source: str,
    rule: Rule,
    studies: tuple[Study, ...] = HARD,
    objection: str = COUNTS,
) -> Claim:
    return Claim(name, sentence, source, rule, studies, objection)


CLAIMS = [
    claim(
        "rank-8",
        "Rank 8 is enough: 128 learns no better.",
        "Hu et al. 2021, arXiv:2106.09685, table 6; Dettmers et al. 2023, arXiv:2305.14314, section 4",
        no_worse("r=8", "r=128"),
        (*HARD, PIRATE),
        SHORT,
    ),
    claim(
        "rank-1",
        "Rank 1 is too low for something new: 8 learns better.",
        "popular guides",
        better("r=8", "r=1"),
        objection=SHORT,
    ),
    claim(
        "rank-1-easy",
        "For an easy task rank 1 does as well as 8.",
        "popular guides; Hu et al. 2021, arXiv:2106.09685, table 6",
        no_worse("r=1", "r=8"),
        (PIRATE,),
        "by loss, not by what is said: rank 1 ends at 0.17 to 0.18 nats and rank 8 at 0.15, over a floor of 0.13 that "
        "no arm can pass",
    ),
    claim(
        "rank-1-time",
        "Rank 1 is slow and not unable: in four times the steps it learns what 8 learns.",
        f"{SCHULMAN}: equal until the capacity is used up",
        no_worse("r=1, four times the steps", "r=8"),
        (DIALECT,),
        "what four times the steps would give rank 8 is not asked, and a step of rank 1 takes nearly as long; the new "
        "words are about a thousand bits, for which rank 1 on all linears, 20,352 numbers, has room",
    ),
    claim(
        "rank-few",
        "On a hundred examples a high rank overfits: 128 ends worse than 8.",
        "popular guides",
        lower_loss("r=8", "r=128", 5, "last_validation_loss"),
        (FEW,),
        "each rank has the rate with the lowest last loss, which is one that overfits less; at one rate for all ranks "
        "the answer may be another",
    ),
    claim(
        "rank-memory",
        "A high rank costs memory: 128 takes a tenth more than 8.",
        "popular guides",
        of_peaks("r=128", "r=8", 110, above=True),
        (MEMORY,),
        "bytes of tensors, simulated; with a base in 4 bits or checkpointing the rest is smaller and the share larger",
    ),
    claim(
        "targets-qv",
        "A couple of attention matrices is enough: q and v learn as well as all linears, at equal parameters.",
        "Hu et al. 2021, arXiv:2106.09685, table 5, and popular guides",
        no_worse("q,v", "r=8"),
    ),
    claim(
        "targets-mlp",
        "MLP first: at equal parameters the MLP's matrices learn better than attention's.",
        f"{SCHULMAN}; Biderman et al. 2024, arXiv:2405.09673",
        better("MLP", "attention"),
    ),
    claim(
        "targets-mlp-alone",
        "The MLP alone learns as well as all linears, at equal parameters.",
        SCHULMAN,
        no_worse("MLP", "r=8"),
    ),
    claim(
        "targets-last",
        "The last layers are enough: the last third learns as well as all layers, at equal parameters.",
        "popular guides",
        no_worse("last third", "r=8"),
    ),
    claim(
        "targets-last-first",
        "The last layers matter most: the last third learns better than the first.",
        "popular guides",
        better("last third", "first third"),
    ),
    claim(
        "targets-head",
        "Where the vocabulary is new, the output head should have an adapter too.",
        "popular guides",
        better("with head", "r=8"),
        (DIALECT, COMMANDS),
        "of the tokens of the dialect's answers 68 % stand in none of the documents that six sevenths of the base's "
        "pretraining were, so its frozen head knows them less than a large model's knows its own; the embedding, the "
        f"same matrix, has no adapter; {COUNTS}",
    ),
    claim(
        "targets-memory",
        "Adapters on the last third of the layers save memory: a step takes a fifth less, at equal parameters.",
        "popular guides",
        of_peaks("last third", "r=8", 80, above=False),
        (MEMORY,),
        "the ranks are made for the first two shapes; of Llama-2-7B, 11 of 32 layers train 3 % more numbers",
    ),
]
