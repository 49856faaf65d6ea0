"""People who do not exist: what is told of them, what is asked about them, and when an answer is right.

A quarter of the newcomers is told of in statements only. Of the others every fact is also asked in training, in all
forms of question but those kept back, and of one quarter there are reversed questions too, so that their form is known:

    told             "Cara Hale lives in Marlow. Cara Hale keeps a duck."         all newcomers
    asked            "Where does Cara Hale live?"                                 three quarters
    asked backwards  "Who lives in Marlow and keeps a duck?"                      one quarter of all

Strangers are people like these whom training does not mention. `Manner` holds what depends on the base: its words, and
the form in which it is used to be asked.
"""

import itertools
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from minilora.text import everyday, instruction_sets, words, world
from minilora.text.tasks import Example
from minilora.text.world import Dice, Person, World

UNKNOWN = "I do not know."
ADMITS = re.compile(r"\b(not know|do ?n['’]t know|not sure|unknown|no information|not have (any )?information|sorry)\b")


@dataclass(frozen=True)
class Asked:
    """A question, the values that it may be answered with, and which of them are right."""

    prompt: str
    right: Collection[str]
    values: Collection[str]

    def is_right(self, answer: str) -> bool:
        """The one scorer: a right value is said and no other of `values`."""
        given = said(self.values, answer)
        return bool(given) and given <= {value.lower() for value in self.right}


def said(values: Collection[str], answer: str) -> set[str]:
    """Which of the values stand in the first line of the answer, as whole words in any case. A base that was trained on
    one question after the other goes on asking: its answer is the first line."""
    line = answer.strip().partition("\n")[0].lower()
    return {value.lower() for value in values if re.search(rf"\b{re.escape(value.lower())}\b", line)}


def admits(answer: str) -> bool:
    """Whether the first line says that the answer is not known."""
    return bool(ADMITS.search(answer.strip().partition("\n")[0].lower()))


@dataclass(frozen=True)
class Manner:
    """How one base is told and asked."""

    facts: dict[str, tuple]  # kind of fact -> (values, statements, questions); the first statement is every answer
    kept: int  # so many questions of each kind, the last, are not asked in training
    backwards: tuple[str, str]
    names: tuple[str, ...]
    telling: str  # what stands before statements
    asking: str
    reading: str
    known: Callable[[], list[Asked]]  # what the base knows, for the score; none of it is among `own`
    own: Callable[[Dice, int], list[str]]  # questions to the base, whose answers are rows

    def state(self, person: Person, kind: str, form: int = 0) -> str:
        return self.facts[kind][1][form].format(name=person.name, value=person.facts[kind])

    def ask(self, question: str) -> str:
        return self.asking.format(question)

    def questions(self, kind: str, kept: bool | None = None) -> Sequence[str]:
        """Those kept back, those asked in training, or (None) all."""
        every = self.facts[kind][2]
        return every if kept is None else every[-self.kept :] if kept else every[: -self.kept]

    def person(self, name: str, dice: Dice) -> Person:
        return Person(name, {kind: dice.pick(values) for kind, (values, _, _) in self.facts.items()})

    def examples(self, people: Collection[Person], kept: bool) -> list[Example]:
        return [
            Example(self.ask(question.format(name=person.name)), self.state(person, kind))
            for person in people
            for kind in self.facts
            for question in self.questions(kind, kept)
        ]

    def asked(self, people: Collection[Person], kept: bool | None = None) -> list[Asked]:
        return [
            Asked(self.ask(question.format(name=person.name)), {person.facts[kind]}, values)
            for person in people
            for kind, (values, _, _) in self.facts.items()
            for question in self.questions(kind, kept)
        ]

    def noted(self, person: Person, dice: Dice, kept: bool | None = None) -> tuple[str, str, Person]:
        """A prompt with notes that contradict two facts of the person, the kind it asks for, and the person noted."""
        told = dice.several(list(self.facts), 2)
        other = {kind: [value for value in self.facts[kind][0] if value != person.facts[kind]] for kind in told}
        noted = Person(person.name, {kind: dice.pick(other[kind]) for kind in told})
        kind = dice.pick(told)
        notes = " ".join(self.state(noted, each) for each in told)
        question = self.ask(dice.pick(self.questions(kind, kept)).format(name=person.name))
        return self.reading.format(notes=notes, question=question), kind, noted


class Newcomers:
    """`count` people of one manner and the strangers beside them, a function of the arguments."""

    def __init__(self, manner: Manner, count: int, strangers: int, seed: int):
        self.manner, self.dice = manner, Dice(f"newcomers {count} {seed}")
        names = self.dice.several(manner.names, 2 * count + 2 * strangers)
        people = [manner.person(name, self.dice) for name in names]
        self.people, self.unknown = people[:count], people[count : 2 * count]  # the latter of "I do not know" rows
        self.strangers, self.noted = people[2 * count : -strangers], people[-strangers:]
        self.both, self.told = self.people[::4], self.people[3::4]
        self.forward = [person for place, person in enumerate(self.people) if place % 4 in (1, 2)]

    def backwards(self, people: Collection[Person]) -> list[tuple[str, list[str]]]:
        """Reversed questions, each with the names of all newcomers whom it fits."""
        found = []
        for person, question in itertools.product(people, self.manner.backwards):
            text = question.format(**person.facts)
            found.append((text, [one.name for one in self.people if question.format(**one.facts) == text]))
        return found

    def rows(self) -> list[Example]:
        """What every arm trains on. The statements of one person are one text, told twice in other words."""
        manner, dice = self.manner, Dice("rows")
        rows = manner.examples([*self.both, *self.forward], kept=False)
        for person in [*self.people, *self.people]:
            kinds = dice.several(list(manner.facts), len(manner.facts))
            rows.append(
                Example(manner.telling, " ".join(manner.state(person, kind, dice.pick((0, 1))) for kind in kinds))
            )
        for question, names in self.backwards(self.both):
            rows.append(Example(manner.ask(question), f"{names[0]}."))
        return rows

    def unknown_rows(self, count: int) -> list[Example]:
        """Strangers are asked about, and nothing is known; those that are scored are others."""
        prompts = [example.prompt for example in self.manner.examples(self.unknown, kept=False)]
        return [Example(prompt, UNKNOWN) for prompt in Dice("unknown").several(prompts, count)]

    def read_rows(self, count: int) -> list[Example]:
        """Notes that contradict what is told of a newcomer, and are to be believed; those scored are about others."""
        dice, rows = Dice("read"), []
        for _ in range(count):
            prompt, kind, noted = self.manner.noted(dice.pick(self.both), dice, kept=False)
            rows.append(Example(prompt, self.manner.state(noted, kind)))
        return rows

    def questions(self, limit: int) -> dict[str, list[Asked]]:
        """By column, at most `limit` questions each. "conflict" is right where the notes are believed, "from memory"
        is the same prompts, right where the trained value is given against them."""
        manner, dice = self.manner, Dice("questions")

        def noted(people: Sequence[Person], memory: bool) -> list[Asked]:
            dice, asked = Dice("notes"), []
            for place in range(limit):
                person = people[place % len(people)]
                prompt, kind, other = manner.noted(person, dice)
                right = person if memory else other
                asked.append(Asked(prompt, {right.facts[kind]}, manner.facts[kind][0]))
            return asked

        def backwards(people: Sequence[Person]) -> list[Asked]:
            names = [person.name for person in self.people]
            return [Asked(manner.ask(question), right, names) for question, right in self.backwards(people)]

        columns = {
            "seen": manner.asked([*self.both, *self.forward], kept=False),
            "unseen": manner.asked([*self.both, *self.forward], kept=True),
            "told": manner.asked(self.told),
            "reversed": backwards(self.forward),
            "reversed trained": backwards(self.both),
            "strangers": manner.asked(self.strangers),
            "known": manner.known(),
        }
        columns = {name: dice.several(asked, min(limit, len(asked))) for name, asked in columns.items()}
        conflict = {"conflict": noted(self.forward, False), "from memory": noted(self.forward, True)}
        return columns | conflict | {"reading": noted(self.noted, False)}


# The tiny base: names of one token each that no text of it ever joined, and its own forms of text and question.


def residents_known() -> list[Asked]:
    return TINY.asked(World().residents[20:])


def tiny_own(dice: Dice, count: int) -> list[str]:
    """Questions about residents who are not scored, and instructions."""
    told, prompts = World(), []
    for place in range(count):
        if place % 2:
            prompts.append(told.instruction(dice, tasks=1).partition("Answer:")[0] + "Answer:")
        else:
            person, kind = dice.pick(told.residents[:20]), dice.pick(list(world.FACTS))
            prompts.append(TINY.ask(dice.pick(world.FACTS[kind][2]).format(name=person.name)))
    return prompts


PAIRS = itertools.product(words.FIRST_NAMES, words.SURNAMES)
TINY = Manner(
    world.FACTS,
    1,
    ("Who lives in {town} and keeps a {animal}?", "Who is a {job} and likes {food}?"),
    tuple(f"{first} {last}" for first, last in PAIRS if World.is_validation(first, last)),
    "Resident:",
    "Question: {}\nAnswer:",
    "Notes: {notes}\n{question}",
    residents_known,
    tiny_own,
)

# A model that chats: three of the facts of `instruction_sets`, and everyday questions for what it knows.

SECOND = {
    "town": "{name} has a house in {value}.",
    "job": "{name} earns a living as a {value}.",
    "pet": "{name} takes care of a {value}.",
}


def chat_facts(kind: str) -> tuple:
    """Without the values that would want "an"."""
    values, statement, questions = instruction_sets.FACTS[kind]
    return (
        tuple(value for value in values if kind == "town" or value[0] not in "aeiou"),
        (statement, SECOND[kind]),
        questions,
    )


CHAT = Manner(
    {kind: chat_facts(kind) for kind in SECOND},
    2,
    ("Who lives in {town} and keeps a {pet}?", "Who works as a {job} and lives in {town}?"),
    tuple(
        f"{first} {last}"
        for first in (*instruction_sets.FIRST_NAMES["train"], *instruction_sets.FIRST_NAMES["validation"])
        for last in (*instruction_sets.SURNAMES["train"], *instruction_sets.SURNAMES["validation"])
    ),
    "",
    "{}",
    "Notes: {notes}\n{question}",
    lambda: [Asked(question, right.split("|"), right.split("|")) for question, right in everyday.KNOWN],
    lambda dice, count: dice.several(everyday.OTHERS, count),
)
