"""Claims about when to prompt, when to retrieve and when to train: four tasks, and in each the same arms.

    facts   people whom the base has never met, asked with phrasings that training did not use
    format  a text, written as one strict JSON object
    voice   an answer as a pirate gives it
    skill   a new language: words and an order of words that nobody has met

The tiny base was never taught to go on from worked examples, but for the world's "pattern" documents, which are of
another form: that examples do nothing for it says little about models that have learned to. It reads notes without
fault, which SmolLM2 does not. So each base is half of the answer.
"""

import statistics
from collections.abc import Mapping

from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from minilora.experiments.claims.claim import Claim, Record, Rule, more_right
from minilora.experiments.claims.study import Arm, Plan, Study
from minilora.experiments.claims.uses.prompting_runs import measure
from minilora.experiments.looks import DARK, GREEN, LEGEND, ORANGE, PINK, look_of, new_figure
from minilora.experiments.pictures import Figure, redrawable
from minilora.text.invented import RULES

# The settings of all arms, unless they say otherwise. examples: in the prompt; nearest: those like the question, by
# BM25, and not the same for all; notes: how many BM25 finds, or "oracle"; train: on how many examples, 0 for all.
PLAIN = {"examples": 0, "nearest": False, "notes": 0, "train": 0, "instruction": ""}
RETRIEVED = {"notes": 4}
ARMS = {
    "instruction": Arm(None),  # the base as it is
    "1 example": Arm(None, settings={"examples": 1}),
    "4 examples": Arm(None, settings={"examples": 4}),
    "16 examples": Arm(None, settings={"examples": 16}),
    "16 nearest": Arm(None, settings={"examples": 16, "nearest": True}),
    "lora": Arm("lora"),
    "full": Arm("full"),
    "lora, 16 examples": Arm("lora", settings={"train": 16}),
}
FACTS_ARMS = ARMS | {
    "retrieval": Arm(None, settings=RETRIEVED),
    "oracle": Arm(None, settings={"notes": "oracle"}),
    "lora and retrieval": Arm("lora", settings=RETRIEVED),
}
PROMPTS = ("instruction", "1 example", "4 examples", "16 examples", "16 nearest")


LOOKS = {
    "instruction": (DARK, "o"),
    "1 example": (ORANGE, "o"),
    "4 examples": (ORANGE, "s"),
    "16 examples": (ORANGE, "^"),
    "16 nearest": (ORANGE, "*"),
    "retrieval": (GREEN, "o"),
    "oracle": (GREEN, "^"),
    "lora and retrieval": (PINK, "D"),
    "lora": (look_of("lora").colour, "D"),
    "lora, 16 examples": (look_of("lora").colour, "v"),
    "full": (look_of("full").colour, "P"),
}
HOLLOW = ("lora and retrieval", "full")  # and large: seen around a point in the same place


@redrawable
def score_over_tokens(title: str, runs: Mapping[str, Mapping[int, Record]]) -> Figure:
    """One task: right answers over the tokens that an answer costs; the legend says how many bytes are kept for it."""
    figure, (axes,) = new_figure(6, 3.2)
    draw_arms(axes, runs)
    axes.set(ylabel="right answers (%)", xlabel="tokens for one answer, prompt and all", title=title)
    labelled, labels = axes.get_legend_handles_labels()
    kept = [bytes_in_words(statistics.mean(record["bytes"] for record in runs[arm].values())) for arm in labels]
    texts = [f"{arm}, {size}" for arm, size in zip(labels, kept, strict=True)]
    figure.legend(labelled, texts, **LEGEND, loc="outside right upper")
    return figure


@redrawable
def four_tasks(runs_of: Mapping[str, Mapping[str, Mapping[int, Record]]]) -> Figure:
    """All tasks, a panel each. runs_of: by the panel's title, runs by arm and seed."""
    figure, panels = new_figure(7.5, 5, rows=2, columns=2)
    for axes, (title, runs) in zip(panels, runs_of.items(), strict=True):
        draw_arms(axes, runs)
        axes.set_title(title)
    for axes in panels[::2]:
        axes.set_ylabel("right answers (%)")
    for axes in panels[2:]:
        axes.set_xlabel("tokens, prompt and answer")
    every = {label: drawn for axes in panels for drawn, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = [arm for arm in LOOKS if arm in every]
    figure.legend([every[arm] for arm in order], order, **LEGEND, loc="outside right upper")
    return figure


def draw_arms(axes, runs: Mapping[str, Mapping[int, Record]]):
    """A point for the mean of an arm's seeds, with a bar from the lowest to the highest."""
    for arm, (colour, marker) in LOOKS.items():
        records = list(runs.get(arm, {}).values())
        if records:
            scores = [100 * record["scores"]["task"] for record in records]
            tokens = statistics.mean(record["prompt_tokens"] + record["answer_tokens"] for record in records)
            mean = statistics.mean(scores)
            spread = [[mean - min(scores)], [max(scores) - mean]]
            shape = (
                dict(fmt=marker, markersize=10, fillstyle="none") if arm in HOLLOW else dict(fmt=marker, markersize=6)
            )
            axes.errorbar(tokens, mean, spread, color=colour, capsize=3, label=arm, **shape)
    axes.set(xscale="log", ylim=(-7, 107))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def bytes_in_words(count: float) -> str:
    for unit in ("B", "kB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} MB"


def study(name: str, about: str, arms: dict[str, Arm], tiny: str, real: str, steps: int, instruction: str) -> Study:
    """tiny, real: the data at both scales. steps, instruction: at the second; the other's prompts say what to do."""
    plans = {
        "tiny": Plan(tiny, 150, 3, 0.3, PLAIN),
        "smollm2": Plan(real, steps, 3, 3, PLAIN | {"instruction": instruction}),
    }
    return Study(name, about, arms, plans, measure, "loss", score_over_tokens)


NEW_PEOPLE = "people whom the base has never met, asked with phrasings that training did not use"
BRIEFLY = "Answer the question in one short sentence."
FACTS = study("prompt-facts", NEW_PEOPLE, FACTS_ARMS, "people", "people", 60, BRIEFLY)
FORMAT = study(
    "prompt-format",
    "a text, written as one strict JSON object",
    ARMS,
    "json",
    "orders",
    30,
    "Write the order as one JSON object with the keys name, item (a single one), quantity (a number), size (null if "
    "none is said) and day, in this order, and nothing else.",
)
VOICE = study(
    "prompt-voice",
    "an answer as a pirate gives it",
    ARMS,
    "pirate",
    "pirate",
    30,
    "You are a pirate. Answer in one or two sentences and talk like a pirate: arr, matey, ahoy, aye, ye.",
)
SKILL = study(
    "prompt-skill", "translation into a language that nobody has met", ARMS, "dialect", "invented", 120, RULES
)


def best_prompt(bar: float, above: bool) -> Rule:
    """The best of PROMPTS beside LoRA: of five, on the questions asked, which favours prompting a little."""

    def number(runs: Mapping[str, Record]) -> float:
        right = {arm: 100 * record["scores"]["task"] for arm, record in runs.items()}
        return max(right[arm] for arm in PROMPTS) - right["lora"]

    words = "right answers behind the best of five prompts (instruction, 1, 4, 16, 16 nearest examples), above LoRA's"
    return Rule((*PROMPTS, "lora"), words, number, bar, "points", above)


def together(bar: float) -> Rule:
    def number(runs: Mapping[str, Record]) -> float:
        right = {arm: 100 * record["scores"]["task"] for arm, record in runs.items()}
        return right["lora and retrieval"] - max(right["retrieval"], right["lora"])

    words = "right answers of LoRA and retrieval together, above those of the better of the two, paired by seed"
    return Rule(("lora and retrieval", "retrieval", "lora"), words, number, bar, "points")


def follows(arm: str, bar: float) -> Rule:
    """What is lost of the score when all facts change and nothing but the notes is written anew."""

    def number(runs: Mapping[str, Record]) -> float:
        return 100 * (runs[arm]["scores"]["changed"] - runs[arm]["scores"]["task"])

    words = f"right answers of {arm} after all facts changed and only the notes were written anew, above those before"
    return Rule((arm,), words, number, bar, "points")


CLAIMS = [
    Claim(
        "retrieve-facts",
        "For new facts use retrieval, not fine-tuning.",
        "Ovadia et al. 2023, arXiv:2312.05934, abstract",
        more_right("retrieval", "lora", "task", 5),
        (FACTS,),
        "LoRA trains on questions of the very form that is asked, which the paper's fine-tuning on raw text does not",
    ),
    Claim(
        "bm25",
        "BM25, which only counts words, retrieves well enough: four notes of it serve as well as the right one.",
        "Thakur et al. 2021, arXiv:2104.08663, abstract: a robust baseline",
        more_right("retrieval", "oracle", "task", -5),
        (FACTS,),
        "BM25 found the right note for every question (80 of 80 and 48 of 48), for each note holds the full name that "
        "is asked about: the 3 of 48 answers that SmolLM2 loses are lost to the three more notes in front of it; "
        "nothing is trained or drawn, so all seeds are one run, and the interval, of no width, leaves out that other "
        "questions would score otherwise",
    ),
    Claim(
        "lora-and-retrieval",
        "LoRA and retrieval together beat each alone.",
        "Balaguer et al. 2024, arXiv:2401.08406, abstract: the gains are cumulative",
        together(5),
        (FACTS,),
        "where one alone is right all the time, nothing can be added",
    ),
    Claim(
        "edited-notes",
        "A model that is fine-tuned to use retrieval follows a note that was edited.",
        "Lewis et al. 2020, arXiv:2005.11401, on replacing the index",
        follows("lora and retrieval", -10),
        (FACTS,),
        "it was trained on the very facts that change, which tempts it to know them by heart",
    ),
    Claim(
        "prompt-first",
        "For a format or a voice a few examples in the prompt suffice; fine-tune only when prompting fails.",
        "Brown et al. 2020, arXiv:2005.14165, abstract; in most guides, such as Mistral's on fine-tuning",
        best_prompt(-10, above=True),
        (FORMAT, VOICE),
        "both bases are small, and the tiny one, never taught to use examples, scores 0 behind every prompt; SmolLM2's "
        "prompts also have an instruction, which training has not, and that of the voice names five of the words that "
        "the scorer counts",
    ),
    Claim(
        "hard-skill",
        "For a hard skill or new facts, instructions and examples in the prompt do not suffice.",
        "Mosbach et al. 2023, arXiv:2305.16938, abstract, doubts that there is a difference",
        best_prompt(-10, above=False),
        (SKILL, FACTS),
        "skill: LoRA hardly learned the new words in these steps (right in 0 to 12 %, full fine-tuning in 80 to 99 %), "
        "and where both are near zero a small difference says nothing for prompting; facts: the 16 nearest examples "
        "hold the very answer to every question, which is retrieval by another name, and without them the best prompt "
        "is right in 4 to 5 % (tiny) and 10 to 19 % (SmolLM2), with them in 30 % and 58 %",
    ),
    Claim(
        "scores-as-full",
        "LoRA is right as often as full fine-tuning.",
        "Hu et al. 2021, arXiv:2106.09685, abstract",
        more_right("lora", "full", "task", -5),
        (FACTS, FORMAT, VOICE, SKILL),
        "rank 8 only, and as many steps for both: LoRA may only be slower to learn new words",
    ),
    Claim(
        "same-examples",
        "With the same few examples, fine-tuning on them does no worse than showing them in the prompt.",
        "Mosbach et al. 2023, arXiv:2305.16938, abstract",
        more_right("lora, 16 examples", "16 examples", "task", -5),
        (FORMAT, VOICE),
        "they are not quite the same: the tiny base's prompt has room for 5 (format) or 11 (voice) of the 16 that LoRA "
        "trains on, and it cannot use examples; SmolLM2's prompts also have an instruction, which training has not, "
        "and that of the voice names five of the words that the scorer counts; LoRA's rate was chosen on the whole "
        "validation set, and its steps are those of training on all examples",
    ),
]
