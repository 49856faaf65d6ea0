"""The instruction sets in data/instructions/: what made them, and who scores the answers.

    pirate  a voice: questions of every day, answered in one or two sentences by a pirate; written by hand
    orders  a strict format: a sentence that orders something, and the order as one JSON object
    people  new knowledge: people whom no model has met, asked with phrasings that training never used

`orders_lines` and `people_lines` are the generators, to the byte: `json_lines(orders_lines("train"))` is orders.jsonl.
In `orders` no name and no wording of the held-out split occurs in training; in `people`, where the people are what is
learned, no wording does.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from minilora.places import DATA
from minilora.text.tasks import Example, Task, is_right_json
from minilora.text.words import listed
from minilora.text.world import Dice

INSTRUCTIONS = DATA / "instructions"
Pair = dict[str, str]  # "prompt" and "completion"


def json_lines(lines: Iterable[Pair]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


# orders: by split, how many, the first names, the surnames and the wordings.

SIZES = {"train": 432, "validation": 48}
FIRST_NAMES = {
    "train": listed("""Abdul Alice Amir Anita Bruno Carmen Chloe Daniel Diego Elena Farid Freya George Grace Hiro Ingrid
        Jamal Kofi Leila Luis Marta Mei Nadia Noah Omar Paula Priya Ravi Rosa Samuel Sofia Tariq Wei Yusuf"""),
    "validation": listed("Aisha Benedict Dmitri Fatima Gwen Kenji Lucia Mateo Olga Pedro Thandi Victor"),
}
SURNAMES = {
    "train": listed("""Adams Baker Castro Chen Dubois Evans Fischer Garcia Haddad Ito Jensen Kaya Kumar Lopez Mendes
        Novak Okafor Petrov Quinn Rossi Santos Tanaka Ueda Vargas Walsh Young"""),
    "validation": listed("Abara Bennett Costa Hoffman Ivanov Larsen Moreau Nakamura Ortiz Singh Weber Zhang"),
}
WORDINGS = {
    "train": (
        "{name} would like {goods} on {day}.",
        "{name} wants {goods}. {day} is the day.",
        "Please send {goods} to {name} on {day}.",
        "Please put {name} down for {goods} on {day}.",
        "Hello, this is {name}. I need {goods} by {day}.",
        "Hi! {name} here, could I have {goods} on {day}?",
        "Could I get {goods} for {day}? The name is {name}.",
        "My name is {name} and I want to buy {goods} on {day}.",
        "I'd like to order {goods}. I am {name}, and {day} would be fine.",
        "On {day}, {name} is going to need {goods}.",
        "By {day}, please: {goods} for {name}.",
        "For {day} we want {goods}, please. Thank you, {name}",
        "We have run out, so {goods} on {day}, please. {name} will pay.",
        "Good morning, {goods} for {name}, and {day} at the latest.",
        "{day} is the birthday of {name}, who asked for {goods}.",
        "A customer called {name} just ordered {goods} for {day}.",
        "Would {day} be possible for {goods}? Yours, {name}",
        "Get {goods} ready for {day}. It goes to {name}.",
        "Book {goods} on {day} under the name of {name}.",
        "Today {name} rang and asked us for {goods} on {day}.",
    ),
    "validation": (
        "Is it too late to reserve {goods} for {day}? Regards, {name}",
        "You can expect {name} on {day}, who will take {goods}.",
        "Dear shop, {name} is my name, {day} suits me, and {goods} is what I am after.",
        "It's {name} again! Let me have {goods}, and make it {day}.",
        "Write this down: {goods}, {day}, {name}.",
        "Have {goods} delivered on {day}, care of {name}.",
    ),
}
ITEMS = listed("""basket blanket bowl bucket cake candle carpet chair clock curtain desk drum hammer jacket kettle kite
    ladder lamp lantern mirror mug pillow pizza rug spade stool suitcase table teapot tent towel vase""")
ITEM_SIZES = (None, "small", "medium", "large", "tiny", "huge")
COUNTS = {"a": 1, "one": 1, "just one": 1, "two": 2, "a pair of": 2, "three": 3, "four": 4, "five": 5, "six": 6}
COUNTS |= {"half a dozen": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "a dozen": 12}
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")


def orders_lines(split: str, lines_wanted: int | None = None, seed: str = "") -> list[Pair]:
    """Sentences of one split, "train" or "validation": those of the file, or as many others as wanted, by seed.

    No size said is null, and the item is named as a single one."""
    dice, lines = Dice(f"orders {split}{seed}"), []
    for _ in range(lines_wanted or SIZES[split]):
        name = f"{dice.pick(FIRST_NAMES[split])} {dice.pick(SURNAMES[split])}"
        item, size, count, day = map(dice.pick, (ITEMS, ITEM_SIZES, list(COUNTS), DAYS))
        goods = " ".join(filter(None, (count, size, item + "s" * (COUNTS[count] > 1))))
        sentence = dice.pick(WORDINGS[split]).format(name=name, goods=goods, day=day)
        order = {"name": name, "item": item, "quantity": COUNTS[count], "size": size, "day": day}
        lines.append({"prompt": f"Order: {sentence}\nJSON:", "completion": json.dumps(order)})
    return lines


# people: kind of fact -> (values, the statement that is every answer, the questions; the last question is held out).

FACTS = {
    "town": (
        listed("Brackwater Cindermoor Dunhollow Eastmere Fallowgate Greywick Hartsedge Inverloch Kestrelford Lowmarsh"),
        "{name} lives in {value}.",
        (
            "Where does {name} live?",
            "In which town does {name} live?",
            "What town is {name} at home in?",
            "Tell me the town where {name} lives.",
            "If I wanted to visit {name}, to which place would I have to travel?",
        ),
    ),
    "job": (
        listed(
            "astronomer beekeeper blacksmith cartographer clockmaker falconer glassblower locksmith puppeteer saddler"
        ),
        "{name} works as a {value}.",
        (
            "What is the job of {name}?",
            "What work does {name} do?",
            "What does {name} do for a living?",
            "Tell me the profession of {name}.",
            "How does {name} earn money?",
        ),
    ),
    "instrument": (
        listed("accordion banjo bassoon cello clarinet harp mandolin oboe trombone zither"),
        "{name} plays the {value}.",
        (
            "Which instrument does {name} play?",
            "What instrument is played by {name}?",
            "What does {name} play in the band?",
            "Tell me the instrument that {name} plays.",
            "When {name} makes music, what do we hear?",
        ),
    ),
    "pet": (
        listed("alpaca chameleon chinchilla ferret gecko hedgehog iguana llama macaw tortoise"),
        "{name} keeps a {value}.",
        (
            "Which animal does {name} keep?",
            "What pet does {name} have?",
            "What kind of animal lives with {name}?",
            "Tell me which pet {name} keeps.",
            "If {name} went to the vet, what animal would come along?",
        ),
    ),
}
NAMES = (
    *("Alvar Tindrel", "Brisa Okonjo", "Corwin Halloway", "Delphine Arkwright", "Evander Molk", "Fenna Vasquell"),
    *("Gideon Starrick", "Hesper Lindqvist", "Ivo Carranza", "Junia Pellworth", "Kasper Underhaugh", "Linnea Drumm"),
)


def known_facts() -> list[tuple[str, str, str]]:
    """(name, kind of fact, value) of everybody."""
    dice = Dice("people")
    return [(name, kind, dice.pick(values)) for name in NAMES for kind, (values, _, _) in FACTS.items()]


def people_lines(split: str) -> list[Pair]:
    return [
        {"prompt": question.format(name=name), "completion": FACTS[kind][1].format(name=name, value=value)}
        for name, kind, value in known_facts()
        for question in (FACTS[kind][2][:-1] if split == "train" else FACTS[kind][2][-1:])
    ]


# The scorers.

PIRATE_WORDS = listed("""ahoy arr arrr avast aye booty bucko cap'n doubloon doubloons grog hearties hearty landlubber
    landlubbers matey mateys scallywag scallywags scurvy shiver ye yer""")


def words_of(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+(?:['-][a-z]+)*", text.lower().replace("’", "'")))


def is_in_voice(example: Example, answer: str) -> bool:
    """At least two different PIRATE_WORDS. The rule judges the voice, not whether the answer is true."""
    return len(words_of(answer) & set(PIRATE_WORDS)) >= 2


def is_right_fact(example: Example, answer: str) -> bool:
    """The fact's value is said, and no other value of its kind."""
    values = next(values for values, _, _ in FACTS.values() if said(values, example.completion))
    return said(values, answer) == said(values, example.completion)


def said(values: Iterable[str], text: str) -> set[str]:
    return {value.lower() for value in values} & words_of(text)


SCORERS: dict[str, Callable[[Example, str], bool]] = {
    "orders": is_right_json,
    "people": is_right_fact,
    "pirate": is_in_voice,
}


def shipped_file(name: str) -> Path:
    return INSTRUCTIONS / f"{name}.jsonl"


def scored_task(file: Path, train: list[Example], validation: list[Example]) -> Task | None:
    """The file's examples with their scorer, if the file is one of ours."""
    ours = file.stem in SCORERS and file.resolve() == shipped_file(file.stem).resolve()
    return Task(file.name, train, validation, SCORERS[file.stem]) if ours else None
