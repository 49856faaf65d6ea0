"""Two small tasks of any size, and training labels made wrong on purpose. Held-out examples are always right.

towns   "Mara Hale lives in Farley." in dialect, "Supive kega Mara Hale.": 24 words to learn, and a word order
orders  a sentence that orders something, and the order as one JSON object: a format, of words that stand there
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import count, islice

from minilora.text.instruction_sets import orders_lines
from minilora.text.tasks import DIALECT, Example, Task, dialect_example, is_exact, is_right_json
from minilora.text.words import TOWNS
from minilora.text.world import Dice, World

TOWN_WORDS = tuple(DIALECT[town] for town in TOWNS)


def towns(split: str, size: int, seed: int) -> list[Example]:
    """Statements of the dialect task that say where somebody lives."""
    world, dice = World(split), Dice(f"towns {split} {seed}")
    return list(islice((each for _ in count() if " lives in " in (each := dialect_example(world, dice)).prompt), size))


def orders(split: str, size: int, seed: int) -> list[Example]:
    return [Example(line["prompt"], line["completion"]) for line in orders_lines(split, size, f" {seed}")]


TASKS: dict[str, tuple[Callable[[str, int, int], list[Example]], Callable[[Example, str], bool]]] = {
    "towns": (towns, is_exact),
    "orders": (orders, is_right_json),
}


def sized_task(name: str, size: int, seed: int, held_out: int = 200) -> Task:
    """`size` examples to train on, others for each seed; all seeds and sizes share the held-out ones."""
    make_examples, is_right = TASKS[name]
    return Task(name, make_examples("train", size, seed), make_examples("validation", held_out, 0), is_right)


def with_wrong(
    examples: list[Example], share: float, seed: int, how: str = "another"
) -> tuple[list[Example], list[int]]:
    """The examples, `share` of them with a wrong completion, and where these are; more wrong ones include the fewer.

    how: "another", the completion of another of the examples, drawn anew for each; "word", of towns: another town's
    word in its right place, drawn anew for each; "same word": as "word", and for each town always the same.
    """
    dice = Dice(f"wrong {seed}")
    order = sorted(range(len(examples)), key=lambda _: dice.random.random())
    wrong, noisy = sorted(order[: round(share * len(examples))]), list(examples)
    for place in order[: len(wrong)]:
        noisy[place] = replace(examples[place], completion=WAYS[how](examples[place], examples, dice))
    return noisy, wrong


def another(example: Example, examples: list[Example], dice: Dice) -> str:
    return dice.pick([each.completion for each in examples if each.completion != example.completion])


def word(example: Example, examples: list[Example], dice: Dice) -> str:
    return with_word(example, dice.pick([each for each in TOWN_WORDS if each != word_of(example)]))


def same_word(example: Example, examples: list[Example], dice: Dice) -> str:
    """The word of the town that comes next in the list."""
    return with_word(example, TOWN_WORDS[(TOWN_WORDS.index(word_of(example)) + 1) % len(TOWN_WORDS)])


def word_of(example: Example) -> str:
    return example.completion.split()[1]


def with_word(example: Example, new: str) -> str:
    verb, _, *name = example.completion.split()
    return " " + " ".join((verb, new, *name))


WAYS = {"another": another, "word": word, "same word": same_word}
