"""The world's entropy is exact: small worlds are enumerated, every choice in turn, and every text weighed."""

import math
from collections import Counter

import pytest

from minilora.text import words, world
from minilora.text.world import DOCUMENT_KINDS, FACTS, INSTRUCTIONS, Dice, World, is_right_list, nats_per_token, state


class Walk(Dice):
    """Dice that fall as told: a path of indices, extended with zeros; `widths` notes how many ways each could fall."""

    def __init__(self, path):
        super().__init__(0)
        self.path, self.widths = list(path), []

    def index(self, count):
        self.widths.append(count)
        if len(self.path) < len(self.widths):
            self.path.append(0)
        return self.path[len(self.widths) - 1]


def all_outcomes(make, limit=20_000):
    """Every (text, nats) that `make` can produce, by walking the tree of choices."""
    outcomes, path = [], []
    while len(outcomes) < limit:
        dice = Walk(path)
        outcomes.append((make(dice), dice.nats))
        path = dice.path
        while path and path[-1] == dice.widths[len(path) - 1] - 1:  # back to the last choice with another option left
            path.pop()
        if not path:
            return outcomes
        path[-1] += 1
    raise AssertionError(f"more than {limit} outcomes: make the world of this test smaller")


def check_exact(outcomes):
    """exp(-nats) is the probability of the text: no text comes about in two ways, and the probabilities sum to 1."""
    assert len(outcomes) > 1, "there was nothing to choose, so nothing was tested"
    twice = [text for text, count in Counter(text for text, _ in outcomes).items() if count > 1]
    assert not twice, f"{len(twice)} texts can come about in two ways, so their nats are too many: {twice[:1]}"
    total = sum(math.exp(-nats) for _, nats in outcomes)
    assert abs(total - 1) < 1e-9, f"the probabilities of all texts sum to {total}, not 1"


def keep(monkeypatch, module, **counts):
    """Shortens lists of the vocabulary."""
    for name, count in counts.items():
        monkeypatch.setattr(module, name, getattr(module, name)[:count])


def keep_facts(monkeypatch, kinds, jobs):
    """`kinds` kinds of facts, of one value each (but as many jobs as told), and of one question each but the first."""
    facts = {
        kind: (values[: jobs if kind == "job" else 1], sentences, questions if kind == "town" else questions[:1])
        for kind, (values, sentences, questions) in list(FACTS.items())[:kinds]
    }
    monkeypatch.setattr(world, "FACTS", facts)


@pytest.fixture
def small(monkeypatch):
    """Two first names with one held-out surname each, two jobs, two adjectives, and one of nearly all else."""
    keep(monkeypatch, words, FIRST_NAMES=2, SURNAMES=8, TOWNS=1, THINGS=1, FOODS=1, ANIMALS=1, ADJECTIVES=2)
    keep(monkeypatch, world, WEATHER=1, TIMES=1, WENT=1, PLACES=1, GREETINGS=1, DEEDS=1, MOODS=1, SKIES=1, WAITED=1)
    keep_facts(monkeypatch, kinds=4, jobs=2)
    monkeypatch.setattr(world, "CLASSES", {"town": ("Arden", "Kelso", "Upton"), "food": ("bread", "jam", "soup")})
    return World("validation", residents=2)


def test_notes_are_exact(small):
    check_exact(all_outcomes(lambda dice: small.notes(dice, people=1, questions=1)))


def test_notes_about_one_or_two_people_are_exact(small, monkeypatch):
    keep_facts(monkeypatch, kinds=2, jobs=1)
    pick = Dice.pick
    # There are two kinds of facts, so notes tell two of each person and cannot choose to tell three or four.
    monkeypatch.setattr(Dice, "pick", lambda dice, options: pick(dice, (2,) if options == (2, 3, 4) else options))
    outcomes = all_outcomes(lambda dice: small.notes(dice, questions=2))
    check_exact(outcomes)
    people = {sum(first in text for first in words.FIRST_NAMES) for text, _ in outcomes}
    assert people == {1, 2}, f"notes should be about one or two people, not {people}"


def test_memory_and_residents_are_exact(small):
    check_exact(all_outcomes(lambda dice: small.memory(dice, questions=2)))
    check_exact(all_outcomes(small.resident))


def test_stories_are_exact(small):
    check_exact(all_outcomes(small.story))


@pytest.mark.parametrize("form", INSTRUCTIONS)
def test_each_instruction_is_exact(small, form):
    check_exact(all_outcomes(lambda dice: small._instruction(dice, form)))


def test_two_instructions_are_exact(small):
    check_exact(all_outcomes(lambda dice: small.instruction(dice, tasks=2)))


def test_patterns_are_exact(small, monkeypatch):
    monkeypatch.setattr(world, "CLASSES", {"town": ("Arden", "Kelso"), "food": ("soup",)})
    check_exact(all_outcomes(small.pattern))


def test_no_word_stands_in_two_lists():
    # A thing that is also a food could be drawn in two ways, and the enumerated worlds above would not show it.
    lists = [values for values in vars(words).values() if isinstance(values, tuple)]
    twice = [word for word, count in Counter(word for values in lists for word in values).items() if count > 1]
    assert not twice, f"drawn in two ways: {twice}"


def test_nats_counted_by_hand():
    # Resident: one of 40 people, four facts in one of 4! orders, each told in one of two ways.
    (document,) = World().documents(1, seed=0, kind="resident")
    expected = math.log(40) + math.log(24) + 4 * math.log(2)
    assert document.nats == pytest.approx(expected, abs=1e-12), f"{document.nats} nats, by hand {expected}"


def test_the_kind_is_part_of_the_surprise():
    document, dice = World().document(Dice(0)), Dice(0)
    kind = dice.weighted(DOCUMENT_KINDS)
    assert kind == document.kind
    assert dice.nats == pytest.approx(-math.log(DOCUMENT_KINDS[kind]), abs=1e-12)
    getattr(World(), kind)(dice)
    assert document.nats == pytest.approx(dice.nats, abs=1e-12)


def test_each_document_counts_its_own_nats():
    dice = Dice(0)
    documents = [World().document(dice) for _ in range(10)]
    assert sum(document.nats for document in documents) == pytest.approx(dice.nats, abs=1e-9)


def test_weighted_choices_come_as_often_as_they_say():
    assert sum(DOCUMENT_KINDS.values()) == pytest.approx(1, abs=1e-12)
    dice, count = Dice(1), 20_000
    drawn = Counter(dice.weighted(DOCUMENT_KINDS) for _ in range(count))
    for kind, probability in DOCUMENT_KINDS.items():
        spread = math.sqrt(probability * (1 - probability) / count)
        assert abs(drawn[kind] / count - probability) < 5 * spread, f"{kind}: {drawn[kind] / count}, not {probability}"


def test_one_seed_one_text_and_another_seed_another():
    first, again, other = (World().documents(20, seed) for seed in (3, 3, 4))
    assert first == again
    assert [document.text for document in first] != [document.text for document in other]


def test_residents_are_the_same_in_every_world():
    assert World("train").residents == World("validation").residents
    assert World(resident_seed=1).residents != World().residents


def test_held_out_people_are_never_in_training():
    named = {}
    for people in ("train", "validation"):
        here = World(people)
        outcomes = all_outcomes(lambda dice, here=here: here.person(dice).name)
        check_exact(outcomes)
        named[people] = {name for name, _ in outcomes}
    both = named["train"] & named["validation"]
    assert not both, f"in both: {sorted(both)[:3]}"
    assert len(named["train"] | named["validation"]) == len(words.FIRST_NAMES) * len(words.SURNAMES)
    for names in named.values():  # a held-out person is a new combination of known words
        assert {name.split()[0] for name in names} == set(words.FIRST_NAMES)
        assert {name.split()[1] for name in names} == set(words.SURNAMES)


def test_answers_from_notes_stand_in_the_notes():
    for document in World().documents(200, seed=5, kind="notes"):
        notes, *questions = document.text.removeprefix("Notes: ").split("\nQuestion: ")
        told = [sentence.split() for sentence in notes.rstrip(".").split(". ")]
        told = {(sentence[0], sentence[1], sentence[-1]) for sentence in told}  # first name, surname, value
        for question in questions:
            asked, answer = question.split("\nAnswer: ")
            first, surname, *_, value = answer.rstrip(".").split()
            assert (first, surname, value) in told, f"{answer!r} is not in {notes!r}"
            assert f"{first} {surname}" in asked, f"{answer!r} is about somebody else than {asked!r}"


def test_answers_from_memory_are_the_same_in_every_document():
    here = World("validation")
    known = {
        question.format(name=person.name): state(person, kind)
        for person in here.residents
        for kind in FACTS
        for question in FACTS[kind][2]
    }
    for document in here.documents(100, seed=6, kind="memory"):
        for question in document.text.removeprefix("Question: ").split("\nQuestion: "):
            asked, answer = question.split("\nAnswer: ")
            assert known[asked] == answer, f"{asked} is answered {answer!r}, not {known[asked]!r}"


def test_a_list_is_right_if_it_names_three_different_things_of_its_kind():
    prompt = "Instruction: List three towns.\nAnswer: Arden, Kelso, Upton.\nInstruction: List three animals.\nAnswer:"
    assert is_right_list(prompt, " fox, goat, hen.")
    assert not is_right_list(prompt, " fox, goat.")
    assert not is_right_list(prompt, " fox, goat, fox.")
    assert not is_right_list(prompt, " fox, goat, bread.")
    assert not is_right_list(prompt, " fox, goat, hen, hen.")
    assert not is_right_list(prompt, "")


def test_unknown_people_are_refused():
    with pytest.raises(ValueError, match="'train' or 'validation'"):
        World("test")


def test_nats_per_token_counts_an_end_token_for_each_document():
    documents = World().documents(2, seed=0)
    expected = (documents[0].nats + documents[1].nats) / (3 + 1 + 5 + 1)
    assert nats_per_token(documents, [[7] * 3, [7] * 5]) == pytest.approx(expected, abs=1e-12)
