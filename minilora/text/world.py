"""A tiny world, told by a generator that knows how surprising it is.

People live in towns, have jobs, keep animals, like foods and carry things. The generator tells of them in stories,
in notes with questions, in questions about residents that must be known by heart, in instructions and in patterns.
Such a text gives a student what no scraped file could: every answer can be scored exactly, people can be held out for
certain, and because each random choice has a known probability, the entropy of the text is known exactly:

    nats(document) = sum over the choices made of -log p(choice)

No model can, on average, score below this entropy: it is the floor under every loss curve. Two things make the floor
exact and not just a bound: the text shows which choices were made (no two ways of choosing give the same text; a test
enumerates small worlds to prove it), and a tokenizer maps a text to one sequence of tokens. In nats per token, the
floor is the sum over documents divided by the tokens to predict, the end token of each document included.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minilora.text import words


class Dice:
    """Random choices, with their surprise summed up in `nats`. One seed gives one sequence, on any Python."""

    def __init__(self, seed: int | str):
        self.random = random.Random(seed)
        self.nats = 0.0

    def pick(self, options: Sequence):
        """One of n options, each with probability 1/n: log n nats."""
        self.nats += math.log(len(options))
        return options[self.index(len(options))]

    def several(self, options: Sequence, count: int) -> list:
        """`count` different options in a random order: log n + log(n-1) + ... nats."""
        left = list(options)
        chosen = []
        for _ in range(count):
            chosen.append(self.pick(left))
            left.remove(chosen[-1])
        return chosen

    def weighted(self, options: dict):
        """A key of `options`, drawn with the probability p that is its value: -log p nats. All p sum to 1."""
        point = self.random.random()
        for option in options:
            if point < options[option]:
                break
            point -= options[option]
        self.nats -= math.log(options[option])
        return option

    def index(self, count: int) -> int:
        return int(self.random.random() * count)


@dataclass
class Person:
    name: str  # first name and surname
    facts: dict[str, str]  # kind of fact -> its value: {"town": "Marlow", "job": "baker"}

    @property
    def first(self) -> str:
        return self.name.split()[0]


@dataclass
class Document:
    kind: str
    text: str
    nats: float  # the exact surprise of this text given nothing but the generator


# kind of fact -> (values, sentences, questions). The first sentence is also the form of every answer.
FACTS = {
    "town": (
        words.TOWNS,
        ("{name} lives in {value}.", "{name} has a house in {value}."),
        ("Where does {name} live?", "In which town does {name} live?"),
    ),
    "job": (
        words.JOBS,
        ("{name} is a {value}.", "{name} works as a {value}."),
        ("What is the job of {name}?", "What work does {name} do?"),
    ),
    "animal": (
        words.ANIMALS,
        ("{name} keeps a {value}.", "{name} takes care of a {value}."),
        ("Which animal does {name} keep?", "What animal does {name} have?"),
    ),
    "food": (
        words.FOODS,
        ("{name} likes {value}.", "{name} is fond of {value}."),
        ("What does {name} like?", "Which food does {name} like?"),
    ),
}
CLASSES = {kind: values for kind, (values, _, _) in FACTS.items()} | {"thing": words.THINGS}
DOCUMENT_KINDS = {"story": 0.2, "notes": 0.4, "memory": 0.15, "resident": 0.05, "instruction": 0.14, "pattern": 0.06}


def state(person: Person, kind: str, sentence: int = 0) -> str:
    return FACTS[kind][1][sentence].format(name=person.name, value=person.facts[kind])


def fixed_people(firsts: Iterable[str], dice: Dice) -> list[Person]:
    """A person of each first name, with a surname and one fact of every kind."""
    return [
        Person(f"{first} {dice.pick(words.SURNAMES)}", {kind: dice.pick(FACTS[kind][0]) for kind in FACTS})
        for first in firsts
    ]


class World:
    """The generator. It invents the people of one side, "train" or "validation"; no full name is on both.

    Every first name and every surname occurs on both sides, so a held-out person is a new combination of known
    words. The residents, fixed people with fixed facts, are the same in every World of one `resident_seed`.
    """

    def __init__(self, people: str = "train", residents: int = len(words.RESIDENT_NAMES), resident_seed: int = 0):
        if people not in ("train", "validation"):
            raise ValueError(f"people must be 'train' or 'validation', not {people!r}")
        self.people = people
        self.residents = fixed_people(words.RESIDENT_NAMES[:residents], Dice(f"residents {resident_seed}"))

    def person(self, dice: Dice, kinds: Iterable[str] = (), other: Person | None = None) -> Person:
        """Somebody new, whose first name differs from `other`'s, with a fact of each of `kinds`."""
        first = dice.pick([first for first in words.FIRST_NAMES if other is None or first != other.first])
        held_out = self.people == "validation"
        surname = dice.pick([last for last in words.SURNAMES if self.is_validation(first, last) == held_out])
        return Person(f"{first} {surname}", {kind: dice.pick(FACTS[kind][0]) for kind in kinds})

    @staticmethod
    def is_validation(first: str, surname: str) -> bool:
        """One full name in eight is held out."""
        return (words.FIRST_NAMES.index(first) + words.SURNAMES.index(surname)) % 8 == 0

    def document(self, dice: Dice, kind: str | None = None) -> Document:
        """One document. Its kind names a method below, and is drawn from DOCUMENT_KINDS unless it is given."""
        before = dice.nats
        kind = kind or dice.weighted(DOCUMENT_KINDS)
        text = getattr(self, kind)(dice)
        return Document(kind, text, dice.nats - before)

    def documents(self, count: int, seed: int | str, kind: str | None = None) -> list[Document]:
        """`count` independent documents, a pure function of the arguments."""
        dice = Dice(f"documents {self.people} {seed}")
        return [self.document(dice, kind) for _ in range(count)]

    def notes(self, dice: Dice, people: int | None = None, questions: int = 4) -> str:
        """Facts about one or two new people, then questions; the answers stand in the notes and nowhere else."""
        cast: list[Person] = []
        told: list[tuple[Person, str]] = []
        for _ in range(people or dice.pick((1, 2))):
            kinds = dice.several(list(FACTS), dice.pick((2, 3, 4)))
            cast.append(self.person(dice, kinds, other=cast[0] if cast else None))
            told += [(cast[-1], kind) for kind in kinds]
        sentences = [state(person, kind, dice.pick((0, 1))) for person, kind in told]
        asked = dice.several(told, min(questions, len(told)))
        return f"Notes: {' '.join(sentences)}\n" + "\n".join(self._question(dice, *fact) for fact in asked)

    def memory(self, dice: Dice, questions: int = 4) -> str:
        """Questions about residents: the answers stand nowhere and have to be known."""
        facts = [(person, kind) for person in self.residents for kind in FACTS]
        return "\n".join(self._question(dice, *fact) for fact in dice.several(facts, questions))

    def resident(self, dice: Dice) -> str:
        """All that is known of one resident."""
        person = dice.pick(self.residents)
        return "Resident: " + " ".join(state(person, kind, dice.pick((0, 1))) for kind in dice.several(list(FACTS), 4))

    def _question(self, dice: Dice, person: Person, kind: str) -> str:
        question = dice.pick(FACTS[kind][2]).format(name=person.name)
        return f"Question: {question}\nAnswer: {state(person, kind)}"

    def story(self, dice: Dice) -> str:
        """Something happens to somebody: much freedom, and names, places and things that come back."""
        hero = self.person(dice)
        friend = self.person(dice, ["job"], other=hero)
        thing, food, animal, look = map(dice.pick, (words.THINGS, words.FOODS, words.ANIMALS, words.ADJECTIVES))
        who, other = hero.first, friend.first
        text = (
            f"Story: One {dice.pick(WEATHER)} {dice.pick(TIMES)}, {hero.name} {dice.pick(WENT)} "
            f"{dice.pick(words.TOWNS)} with a {look} {thing}. {dice.pick(PLACES)} {who} met {friend.name}, "
            f"the {friend.facts['job']}, who had some {food} and a {dice.pick(words.ADJECTIVES)} {animal}."
        )
        turns = (  # functions, so that a turn that is not told makes no choices and adds no nats
            lambda: f'"{dice.pick(GREETINGS)}, {who}," said {other}. "Is that your {thing}?"',
            lambda: f"{who} gave {other} the {thing} for the {food}.",
            lambda: f"Then the {animal} {dice.pick(DEEDS)} the {dice.pick((thing, food))}.",
            lambda: f"{other} looked at the {look} {thing} and {dice.pick(MOODS)}.",
            lambda: f"It {dice.pick(SKIES)}, and {who} and {other} {dice.pick(WAITED)} {dice.pick(PLACES).lower()}.",
        )
        told = " ".join(turn() for turn in dice.several(turns, 3))
        end = f"In the end {dice.pick((who, other))} went home with the {dice.pick((thing, food, animal))}."
        return f"{text} {told} {end}"

    def instruction(self, dice: Dice, tasks: int = 3) -> str:
        """Small tasks. Where several answers are right, a scorer can tell them from the wrong ones."""
        return "\n".join(self._instruction(dice, form) for form in dice.several(INSTRUCTIONS, tasks))

    def _instruction(self, dice: Dice, form: str) -> str:
        if form == "describe":
            (first, second), thing = dice.several(words.ADJECTIVES, 2), dice.pick(words.THINGS)
            task, answer = f"Describe the {first} {second} {thing}.", f"The {thing} is {first} and {second}."
        elif form == "list":
            kind = dice.pick(list(CLASSES))
            task, answer = f"List three {kind}s.", ", ".join(dice.several(CLASSES[kind], 3)) + "."
        elif form == "backwards":
            items = dice.several(dice.pick(list(CLASSES.values())), 3)
            task, answer = f"Write backwards: {' '.join(items)}.", f"{' '.join(reversed(items))}."
        elif form == "quote":
            items = dice.several(dice.pick(list(CLASSES.values())), 2)
            task, answer = f"Put in quotes: {', '.join(items)}.", f'"{items[0]}", "{items[1]}".'
        elif form == "quote name":
            person = self.person(dice)
            task, answer = f"Put in quotes: {person.name}.", f'"{person.name}".'
        else:
            kinds = dice.several(list(CLASSES), 2)
            items = [dice.pick(CLASSES[kind]) for kind in kinds]
            wanted = dice.pick((0, 1))
            task, answer = f"Which is one of the {kinds[wanted]}s: {items[0]} or {items[1]}?", f"{items[wanted]}."
        return f"Instruction: {task}\nAnswer: {answer}"

    def pattern(self, dice: Dice) -> str:
        """Five examples of a rule that is never named."""
        form = dice.pick(("class", "quote", "swap", "twice"))
        classes = [dice.pick(list(CLASSES.values())) for _ in range(5)]
        items = [dice.pick(words_of_class) for words_of_class in classes]
        if form == "class":
            pairs = [f"{item} -> {next(kind for kind in CLASSES if item in CLASSES[kind])}" for item in items]
        elif form == "quote":
            pairs = [f'{item} -> "{item}"' for item in items]
        elif form == "twice":
            pairs = [f"{item} -> {item} {item}" for item in items]
        else:
            seconds = [dice.pick(words.ADJECTIVES) for _ in items]
            pairs = [f"{second} {item} -> {item} {second}" for item, second in zip(items, seconds, strict=True)]
        return f"Pattern: {'; '.join(pairs)}."


def nats_per_token(documents: Sequence[Document], encoded: Sequence[Sequence[int]]) -> float:
    """The entropy floor of these documents: their nats over their tokens, one end token for each included."""
    return sum(document.nats for document in documents) / sum(len(ids) + 1 for ids in encoded)


def is_right_list(prompt: str, answer: str) -> bool:
    """Whether `answer` gives three different words of the kind that the last "List three ..." of `prompt` names."""
    kind = prompt.rpartition("List three ")[2].split("s.")[0]
    given = answer.strip().removesuffix(".").split(", ")
    return len(given) == len(set(given)) == 3 and set(given) <= set(CLASSES[kind])


INSTRUCTIONS = ("describe", "list", "backwards", "quote", "quote name", "which")
WEATHER = ("bright", "cloudy", "cold", "foggy", "hot", "rainy", "snowy", "stormy", "sunny", "windy")
TIMES = ("afternoon", "day", "evening", "morning", "night")
WENT = ("came to", "drove to", "hurried to", "rode to", "sailed to", "set out for", "travelled to", "walked to")
PLACES = ("At the gate", "Behind the church", "By the river", "In the market", "Near the mill", "On the bridge")
GREETINGS = ("Good day", "Hello", "Look here", "Tell me", "Welcome")
DEEDS = ("broke", "dropped", "found", "hid", "stole", "touched")
MOODS = ("began to sing", "laughed", "said nothing", "shook hands", "smiled", "was sad", "wept")
SKIES = ("began to rain", "grew dark", "grew late", "started to snow", "was getting cold")
WAITED = ("danced", "sat down", "slept", "talked", "waited")
