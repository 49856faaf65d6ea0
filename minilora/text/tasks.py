"""Fine-tuning tasks made from the world: training and validation examples, and a scorer that cannot be argued with.

    json     a strict format: notes about a person, written as one JSON object
    pirate   a voice: the same statement as a pirate would say it, with some freedom of words
    dialect  a hard skill: about a hundred new words and a new word order
    facts    new knowledge: people the base has never heard of, asked with phrasings that training never used

`validation` never shares a person with `train`; in `facts`, where the people are what is learned, it never shares a
phrasing instead. Each example carries the exact entropy of its completion given its prompt. The sum of these over the
validation tokens is the floor of the validation loss: zero where only one answer is right, above zero for `pirate`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from minilora.text import words
from minilora.text.chat import ChatPrompt
from minilora.text.tokenizer import AnyTokenizer
from minilora.text.world import FACTS, Dice, World, fixed_people, state


@dataclass
class Example:
    prompt: ChatPrompt
    completion: str  # after a text it starts with a space
    nats: float = 0.0  # the entropy of the completion given the prompt


@dataclass
class Task:
    name: str
    train: list[Example]
    validation: list[Example]
    is_right: Callable[[Example, str], bool]  # (example, the model's answer)

    def floor(self, tokenizer: AnyTokenizer) -> float:
        """The least possible mean validation loss, in nats per counted token (the completion and its end token)."""
        tokens = sum(len(tokenizer.encode(example.completion, continues=True)) + 1 for example in self.validation)
        return sum(example.nats for example in self.validation) / tokens


def load_task(name: str, train_size: int = 2000, validation_size: int = 200, seed: int = 0) -> Task:
    """The task called `name`, a pure function of the arguments. Raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    make_example, is_right = TASKS[name]

    def examples(split: str, size: int) -> list[Example]:
        world, dice = World(split), Dice(f"task {name} {split} {seed}")
        return [make_example(world, dice) for _ in range(size)]

    return Task(name, examples("train", train_size), examples("validation", validation_size), is_right)


def is_exact(example: Example, answer: str) -> bool:
    return answer.strip() == example.completion.strip()


def json_example(world: World, dice: Dice) -> Example:
    kinds = dice.several(list(FACTS), len(FACTS))
    person = world.person(dice, kinds)
    notes = " ".join(state(person, kind, dice.pick((0, 1))) for kind in kinds)
    record = {"name": person.name} | {kind: person.facts[kind] for kind in FACTS}
    return Example(f"Notes: {notes}\nJSON:", " " + json.dumps(record))


def is_right_json(example: Example, answer: str) -> bool:
    """One JSON object with the right keys in the right order and the right values; white space is free."""
    try:
        # repr, because in Python True == 1 == 1.0, and in JSON these are three different values
        given, right = (repr(json.loads(text, object_pairs_hook=list)) for text in (answer, example.completion))
        return given == right
    except (ValueError, RecursionError):
        return False


PIRATE_FACTS = {
    "town": "{name} be livin' in {value}",
    "job": "{name} be workin' as a {value}",
    "animal": "{name} be keepin' a {value}",
    "food": "{name} be lovin' {value}",
}
OPENINGS = ("Arr", "Ahoy", "Avast", "Yo ho")
ENDINGS = ("matey", "me hearty", "says I", "ye landlubber")


def pirate_example(world: World, dice: Dice) -> Example:
    kind = dice.pick(list(FACTS))
    person = world.person(dice, [kind])
    prompt = f"Say it like a pirate: {state(person, kind, dice.pick((0, 1)))}\nPirate:"
    before = dice.nats
    core = PIRATE_FACTS[kind].format(name=person.name, value=person.facts[kind])
    return Example(prompt, f" {dice.pick(OPENINGS)}, {core}, {dice.pick(ENDINGS)}!", dice.nats - before)


def is_right_pirate(example: Example, answer: str) -> bool:
    """Any opening and any ending, around exactly the sentence asked for."""
    core = example.completion.split(", ")[1]
    return answer.strip() in {f"{opening}, {core}, {ending}!" for opening in OPENINGS for ending in ENDINGS}


SYLLABLES = ("ba", "do", "fi", "ga", "ke", "lu", "mo", "na", "pi", "ro", "su", "ta", "ve", "zu")


def _dialect_words() -> dict[str, str]:
    """A new word of two or three syllables for each kind of fact and for each town, job, animal and food."""
    dice = Dice("dialect")
    dialect: dict[str, str] = {}
    for old in [*FACTS, *(value for values, _, _ in FACTS.values() for value in values)]:
        while (new := "".join(dice.pick(SYLLABLES) for _ in range(dice.pick((2, 3))))) in dialect.values():
            pass  # taken already
        dialect[old] = new
    return dialect


DIALECT = _dialect_words()


def dialect_example(world: World, dice: Dice) -> Example:
    """Verb, object, subject: "Mara Hale lives in Farley." -> "Supive kega Mara Hale."."""
    kind = dice.pick(list(FACTS))
    person = world.person(dice, [kind])
    sentence = f"{DIALECT[kind]} {DIALECT[person.facts[kind]]} {person.name}."
    return Example(f"Say it in dialect: {state(person, kind)}\nDialect:", " " + sentence[0].upper() + sentence[1:])


NEWCOMERS = fixed_people(words.NEWCOMER_NAMES, Dice("newcomers"))


def facts_example(world: World, dice: Dice) -> Example:
    """Training asks in the first phrasing of each question; validation asks for the same facts in the second."""
    person, kind = dice.pick(NEWCOMERS), dice.pick(list(FACTS))
    question = FACTS[kind][2][0 if world.people == "train" else 1].format(name=person.name)
    return Example(f"Question: {question}\nAnswer:", " " + state(person, kind))


TASKS = {
    "json": (json_example, is_right_json),
    "pirate": (pirate_example, is_right_pirate),
    "dialect": (dialect_example, is_exact),
    "facts": (facts_example, is_exact),
}
