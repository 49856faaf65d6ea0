"""Six small tasks of the world with one right form of answer each, for adapters that are to be put together.

    pirate    a voice                          "Arr, Mara Hale be livin' in Farley, matey!"
    past      a statement of what was          "Mara Hale once lived in Farley."
    denial    its opposite                     "Mara Hale does not live in Farley."
    question  what the statement answers       "Where does Mara Hale live?"
    record    two facts as JSON                {"name": "Mara Hale", "town": "Farley", "food": "beans"}
    table     the same two facts as a line     "Mara Hale | Farley | beans"

The first four are given one statement about a person, the last two notes of two facts. A prompt says which is wanted.
"""

import json
from collections.abc import Callable

from minilora.text.tasks import Example, Task, is_exact, is_right_json, is_right_pirate, pirate_example
from minilora.text.world import FACTS, Dice, World, state

PAST = {
    "town": "{name} once lived in {value}.",
    "job": "{name} once was a {value}.",
    "animal": "{name} once kept a {value}.",
    "food": "{name} once liked {value}.",
}
DENIAL = {
    "town": "{name} does not live in {value}.",
    "job": "{name} is not a {value}.",
    "animal": "{name} does not keep a {value}.",
    "food": "{name} does not like {value}.",
}
QUESTION = {kind: questions[0] for kind, (_, _, questions) in FACTS.items()}


def reworded(asked: str, forms: dict[str, str]) -> Callable[[World, Dice], Example]:
    """A statement in another form; `asked` has a place for it."""

    def make(world: World, dice: Dice) -> Example:
        kind = dice.pick(list(FACTS))
        person = world.person(dice, [kind])
        said = forms[kind].format(name=person.name, value=person.facts[kind])
        return Example(asked.format(state(person, kind, dice.pick((0, 1)))), f" {said}")

    return make


def listed(mark: str, write: Callable[[dict[str, str]], str]) -> Callable[[World, Dice], Example]:
    """Notes of two facts, and the name and the facts in the order of the notes, as `write` puts them."""

    def make(world: World, dice: Dice) -> Example:
        kinds = dice.several(list(FACTS), 2)
        person = world.person(dice, kinds)
        notes = " ".join(state(person, kind, dice.pick((0, 1))) for kind in kinds)
        return Example(f"Notes: {notes}\n{mark}:", " " + write({"name": person.name, **person.facts}))

    return make


REWORDINGS: dict[str, tuple[Callable[[World, Dice], Example], Callable[[Example, str], bool]]] = {
    "pirate": (pirate_example, is_right_pirate),
    "past": (reworded("Say it in the past: {}\nPast:", PAST), is_exact),
    "denial": (reworded("Deny it: {}\nDenial:", DENIAL), is_exact),
    "question": (reworded("Ask for it: {}\nAsked:", QUESTION), is_exact),
    "record": (listed("JSON", json.dumps), is_right_json),
    "table": (listed("Table", lambda facts: " | ".join(facts.values())), is_exact),
}


def rewording(name: str, train: int, held_out: int) -> Task:
    """The task of that name: nobody who is held out occurs in training."""
    make, is_right = REWORDINGS[name]

    def examples(split: str, size: int) -> list[Example]:
        world, dice = World(split), Dice(f"rewording {name} {split}")
        return [make(world, dice) for _ in range(size)]

    return Task(name, examples("train", train), examples("validation", held_out), is_right)
