"""Claims about new facts: whether they can be trained in, what can be asked of them then, and what is made up."""

import statistics
import textwrap
from collections.abc import Mapping

from minilora.experiments.claims.claim import Claim, Record, Rule, score
from minilora.experiments.claims.study import Arm, Plan, Study
from minilora.experiments.claims.uses.facts_runs import PARTS, measure
from minilora.experiments.looks import SMALL, legend_below, look_of, new_figure, rows_downward
from minilora.experiments.pictures import Figure, redrawable


def apart(arm: str, name: str, than: str, other: str, bar: float) -> Rule:
    """By how many points the score `name` of `arm` lies above the score `other` of `than`."""

    def number(runs: Mapping[str, Record]) -> float:
        return 100 * (runs[arm]["scores"][name] - runs[than]["scores"][other])

    return Rule((arm, than), f"{name} of {arm} above {other} of {than}, paired by seed", number, bar, "points")


def balanced(arm: str, than: str, bar: float) -> Rule:
    """By how many points `arm` has more of the mean of "unseen" and "unknown": who refuses everything gains nothing."""

    def number(runs: Mapping[str, Record]) -> float:
        mean = {
            one: statistics.mean((runs[one]["scores"][name]) for name in ("unseen", "unknown")) for one in (arm, than)
        }
        return 100 * (mean[arm] - mean[than])

    words = f"mean of unseen (right) and unknown (strangers) of {arm} above that of {than}, paired by seed"
    return Rule((arm, than), words, number, bar, "points")


COLUMNS = {
    "seen": "asked as in training",
    "unseen": "asked in new words",
    "told": "in statements only",
    "reversed": "asked backwards",
    "known": "old knowledge",
    "reading": "notes on new people",
    "conflict": "notes against memory",
    "made up": "strangers: a value",
    "unknown": "strangers: not known",
}
# A colour for each method, a marker for each arm; a mix is hollow.
MARKS = {
    "base": "|",
    "lora r=8": "o",
    "full": "s",
    "lora r=1": "v",
    "lora r=64": "^",
    "lora + own": "<",
    "lora + unknown": ">",
    "lora + read": "d",
    "lora mix": "D",
    "full mix": "P",
}


@redrawable
def by_column(title: str, runs: Mapping[str, Mapping[int, Record]]) -> Figure:
    """Each column of the table is a row here, each arm a mark at its mean over seeds; a line from lowest to highest."""
    figure, (axes,) = new_figure(5.5, 3 + 0.2 * len(MARKS.keys() & runs.keys()))
    arms = [arm for arm in MARKS if runs.get(arm)]
    for place, arm in enumerate(arms):
        colour, hollow = look_of(arm.split()[0]).colour, "mix" in arm or "+" in arm
        shift = 0.65 * (place - (len(arms) - 1) / 2) / max(len(arms), 2)
        for row, name in enumerate(COLUMNS):
            values = [100 * record["scores"][name] for record in runs[arm].values()]
            mean = statistics.mean(values)
            bar = [[mean - min(values)], [max(values) - mean]]
            axes.errorbar(
                mean,
                row + shift,
                xerr=bar,
                fmt=MARKS[arm],
                color=colour,
                markerfacecolor="white" if hollow else colour,
                markersize=6,
                linewidth=1,
                label=arm if row == 0 else None,
            )
    rows_downward(axes, COLUMNS.values(), None, 0.05)
    axes.set(xlim=(-4, 104), xlabel="answers (%)")
    axes.grid(axis="x", alpha=0.3)
    figure.suptitle("\n".join(textwrap.wrap(title, 64)), fontsize=SMALL + 1)
    legend_below(figure, axes)
    return figure


def arm(method: str | None, *mix: str, r: int = 8, rate_of: str | None = None) -> Arm:
    lora = {"r": r} if method == "lora" else {}
    return Arm(method, lora, {"mix": mix}, rate_of)


PLAIN = {"base": arm(None), "lora r=8": arm("lora"), "full": arm("full")}
RANKS = {"lora r=1": arm("lora", r=1), "lora r=64": arm("lora", r=64)}
# Only the rows differ from those of the same method without a mix: the rate is the same.
MIXES = {
    **{f"lora + {part}": arm("lora", part, rate_of="lora r=8") for part in PARTS},
    "lora mix": arm("lora", *PARTS, rate_of="lora r=8"),
    "full mix": arm("full", *PARTS, rate_of="full"),
}
ON_TINY = {"manner": "tiny", "strangers": 48, "limit": 200, "at_once": 100}
ON_CHAT = {"manner": "chat", "strangers": 12, "limit": 48, "batch_size": 8, "at_once": 250}


def of_people(count: int, batch_size: int, steps: int, arms: dict[str, Arm], minutes: float, name: str = "") -> Study:
    """There are 11 rows for every two people."""
    about = f"{count} people who do not exist, four facts each; exact answers by kind of question"
    plan = Plan(f"{count} newcomers", steps, 3, minutes, ON_TINY | {"people": count, "batch_size": batch_size})
    return Study(name or f"facts-{count}", about, arms, {"tiny": plan}, measure, "last_validation_loss", by_column)


# The first two see each row 16 times. 200 people: 8 times, in few large steps, and 16 times, in as small ones as 48 do.
P12 = of_people(12, 4, 264, PLAIN, 0.3)
P48 = of_people(48, 16, 264, PLAIN | MIXES | RANKS, 0.5)
P200 = of_people(200, 67, 132, PLAIN | RANKS, 1)
P200_LONGER = of_people(200, 16, 1100, {name: PLAIN[name] for name in ("base", "lora r=8")}, 2, "facts-200-longer")
P_CHAT = Study(
    "facts-chat",
    "12 people who do not exist, three facts each, told to a model that chats; exact answers by kind of question",
    PLAIN | MIXES,
    {"smollm2": Plan("12 newcomers", 70, 3, 5, ON_CHAT | {"people": 12})},
    measure,
    "last_validation_loss",
    by_column,
)
ALL = (P12, P48, P200, P200_LONGER, P_CHAT)


# What the 132 steps of facts-200 leave open.
UNLEARNED = (
    "in facts-200 (132 steps) LoRA of every rank is right in 6 to 10 % of the questions it was trained on, the "
    "untrained base in 2 to 5 %: with so little learned, it cannot show what learned facts lead to"
)
TIED = (
    "in facts-200 r=8 was trained at rate .01, whose loss (.4773) is no better than that of .003 (.4776): at .01 it "
    "{at_01}, where r=1 and r=64, at .003, {at_003}"
)


def on_facts(
    name: str, sentence: str, source: str, rule: Rule, objection: str, studies: tuple[Study, ...] = ALL
) -> Claim:
    general = "one small base of each kind, and three seeds of each"
    if P200 in studies:
        general += f"; {UNLEARNED}"
    return Claim(name, sentence, source, rule, studies, f"{objection}; {general}")


OVADIA = "Ovadia et al. 2023, arXiv:2312.05934, abstract"
GEKHMAN = "Gekhman et al. 2024, arXiv:2405.05904, abstract"
CLAIMS = [
    on_facts(
        "facts-reliable",
        "LoRA does not add facts reliably: asked in new words, it is wrong more often than once in twenty.",
        OVADIA,
        score("lora r=8", "unseen", 95, above=False),
        "the facts were asked in other words in training, which a document does not do",
    ),
    on_facts(
        "facts-retrieval",
        "Notes in the prompt of the base answer better than statements that were trained in.",
        OVADIA,
        apart("base", "reading", "lora r=8", "told", 5),
        "the notes and the trained statements are about different people, and the questions differ; the notes are the "
        "right ones, where a retriever has faults of its own",
    ),
    on_facts(
        "facts-told",
        "What is told in statements only cannot be asked for.",
        "Allen-Zhu and Li 2023, arXiv:2309.14316, section 1",
        score("lora r=8", "told", 25, above=False),
        "the paper trains from scratch and finds that many wordings of a statement help; here there are two of each",
    ),
    on_facts(
        "facts-reversed",
        'A model that learned "A is B" does not know "B is A".',
        "Berglund et al. 2023, arXiv:2309.12288, abstract",
        score("lora r=8", "reversed", 25, above=False),
        "a reversed question names two facts of one person; the form was trained on other people",
    ),
    on_facts(
        "facts-known",
        "Fine-tuning on new facts makes a model wrong about what it knew.",
        GEKHMAN,
        apart("base", "known", "lora r=8", "known", 10),
        "training here has new facts only; full fine-tuning kept 87 % in facts-12, at rate 3e-4, and 17 % in facts-48, "
        "at 1e-3: people and rate changed together; " + TIED.format(at_01="kept 4 to 5 %", at_003="kept 5 to 40 %"),
    ),
    on_facts(
        "facts-strangers",
        "A model that was trained on facts about some people makes facts up about others.",
        GEKHMAN,
        score("lora r=8", "made up", 50),
        "the rule has no baseline: the tiny base makes up 90 to 96 % before any training; untrained SmolLM2 scores "
        '0 % only because what it invents, such as "a Russian-American actor", is not among the values that count, '
        "and it admits not to know in 4 to 6 %",
    ),
    on_facts(
        "facts-conflict",
        "A model that was trained on facts no longer reads notes that contradict them.",
        "said of fine-tuned models in general; Longpre et al. 2021, arXiv:2109.05052, of memory against context",
        apart("base", "conflict", "lora r=8", "conflict", 25),
        "where the notes are not believed, those on strangers are mostly not read either: reading itself is lost; "
        + TIED.format(at_01="follows the notes in 4 to 10 %", at_003="follow them in 57 to 96 %"),
    ),
    on_facts(
        "facts-say-unknown",
        'A few rows of "I do not know" about strangers mend what is made up, and cost no facts.',
        "common advice; Zhang et al. 2023, arXiv:2311.09677, abstract",
        balanced("lora + unknown", "lora r=8", 25),
        "with these rows alone old knowledge fell to 18 % and 0 %: it says so of what it knew as well",
        (P48, P_CHAT),
    ),
    on_facts(
        "facts-read-again",
        "A few rows whose notes contradict what was trained make it read again.",
        "common advice",
        apart("lora + read", "conflict", "lora r=8", "conflict", 25),
        "LoRA on the tiny base still read its notes (98 %), so there was nothing to mend; those runs are from a CPU",
        (P48, P_CHAT),
    ),
    on_facts(
        "facts-keep-own",
        "The base's own answers, mixed in, keep what it knew.",
        "common advice; Shin et al. 2017, arXiv:1705.08690, abstract",
        apart("lora + own", "known", "lora r=8", "known", 10),
        "what is scored is of one kind with what is mixed in, though never the same question",
        (P48, P_CHAT),
    ),
    on_facts(
        "facts-mix",
        "All these rows together leave the facts as well known as without them.",
        "common advice",
        apart("lora mix", "unseen", "lora r=8", "unseen", -5),
        "the mix has three quarters more steps, at equal epochs; on the tiny base it ran on a CPU, its pair on a GPU",
        (P48, P_CHAT),
    ),
    on_facts(
        "facts-mix-full",
        "The rows that mend LoRA mend full fine-tuning as well.",
        "common advice",
        apart("full mix", "conflict", "full", "conflict", 25),
        "it asks for reading again, which is one of three repairs",
        (P48, P_CHAT),
    ),
    on_facts(
        "facts-full",
        "LoRA holds fewer facts than full fine-tuning.",
        "Biderman et al. 2024, arXiv:2405.09673, abstract, of what is learned",
        apart("full", "seen", "lora r=8", "seen", 5),
        "in facts-12, facts-48 and facts-chat both know 99 to 100 %, all that there is, but for one seed of LoRA in "
        "facts-chat, 73 %; in facts-200 the rate of full fine-tuning, .01, is in doubt: its losses have no single "
        "valley (.001: 0.64, .003: 1.10, .01: 0.47, .03: 1.88), and 3e-4 was not tried",
        (P12, P48, P200, P_CHAT),
    ),
    on_facts(
        "facts-rank",
        "A higher rank holds more facts.",
        "Allen-Zhu and Li 2024, arXiv:2404.05405, of parameters; common advice",
        apart("lora r=64", "seen", "lora r=1", "seen", 5),
        "at equal epochs, not at the end of what a rank could hold; in facts-48 r=64 was trained at rate .01 and "
        "r=1 at .003, the best of those tried for each",
        (P48, P200),
    ),
]
