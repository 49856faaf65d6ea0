"""Claims about new facts: who is told, asked and kept apart; one scorer; mixes at equal epochs; rules; the figure."""

from types import SimpleNamespace

import pytest

from minilora.experiments.claims.study import Setting
from minilora.experiments.claims.uses import facts, facts_runs
from minilora.experiments.run import BASE, open_base
from minilora.text import everyday
from minilora.text.newcomers import CHAT, TINY, UNKNOWN, Asked, Newcomers, admits, said
from minilora.text.world import Dice, World

TEN = ("Marlow", "Upton")


@pytest.fixture(scope="module", params=[TINY, CHAT], ids=["tiny", "chat"])
def people(request):
    return Newcomers(request.param, 12, 12, seed=0)


def test_nobody_is_in_two_roles_and_a_seed_decides_who(people):
    roles = [people.both, people.forward, people.told, people.unknown, people.strangers, people.noted]
    names = [person.name for role in roles for person in role]
    assert len(set(names)) == len(names) == 4 * 12 and [len(role) for role in roles[:3]] == [3, 6, 3]
    again, other = (Newcomers(people.manner, 12, 12, seed).people for seed in (0, 1))
    assert again == people.people and other != again


def test_training_asks_only_what_it_may(people):
    """No question about those of whom is only told, none in a form kept back, and none reversed but about a quarter."""
    manner, rows = people.manner, people.rows()
    asked = {row.prompt for row in rows if row.prompt != manner.telling}
    trained = {one.prompt for one in manner.asked([*people.both, *people.forward], kept=False)}
    backwards = {manner.ask(question) for question, _ in people.backwards(people.both)}
    assert asked == trained | backwards
    told = [row.completion for row in rows if row.prompt == manner.telling]
    assert len(told) == 2 * 12 and all(text.count(". ") == len(manner.facts) - 1 for text in told)
    for person in people.people:
        texts = [text for text in told if person.name in text]
        assert len(texts) == 2 and all(value in text for text in texts for value in person.facts.values())
    columns = people.questions(limit=1000)
    for name in ("unseen", "told", "strangers", "reversed", "known", "conflict", "reading"):
        held = {one.prompt for one in columns[name]}
        if name == "reversed":  # two people may share both facts that a question names
            held -= backwards
        assert not held & asked, f"{name} holds a question that was trained"
    assert {one.prompt for one in columns["seen"]} == trained


def test_the_rows_of_a_mix_are_about_others_than_those_scored(people):
    manner, columns = people.manner, people.questions(1000)
    for row in people.unknown_rows(20):
        assert row.completion == UNKNOWN and admits(row.completion)
        assert any(person.name in row.prompt for person in people.unknown)
    for row in people.read_rows(20):
        (person,) = [person for person in people.both if person.name in row.prompt]
        assert row.completion in row.prompt and not any(
            manner.state(person, kind) in row.prompt for kind in manner.facts
        )
    assert all(any(person.name in asked.prompt for person in people.forward) for asked in columns["conflict"])
    known = {asked.prompt for asked in manner.known()}
    own = {prompt for seed in range(20) for prompt in manner.own(Dice(seed), 28)}
    assert not known & own, "an answer of the base's own would be scored"


def test_notes_that_conflict_never_hold_what_was_trained(people):
    columns = people.questions(limit=100)
    facts_of = {person.name: person.facts for person in people.forward}
    for notes, memory in zip(columns["conflict"], columns["from memory"], strict=True):
        (name,) = [name for name in facts_of if name in notes.prompt]
        (right,), (trained,) = notes.right, memory.right
        assert notes.prompt == memory.prompt and right != trained and trained in facts_of[name].values()
        assert said([right], notes.prompt) and not said([trained], notes.prompt.partition("\n")[0])


def test_no_name_is_a_value():
    """A name said in an answer must not count as a town, a job, an animal or a food."""
    for manner in (TINY, CHAT):
        words = {word.lower() for name in manner.names for word in name.split()}
        values = {value.lower() for of_kind, _, _ in manner.facts.values() for value in of_kind}
        assert not words & values
    assert all(World.is_validation(*name.split()) for name in TINY.names), "the base may have met this name"
    assert not {question for question, _ in everyday.KNOWN} & set(everyday.OTHERS)


def test_the_scorer_wants_a_right_value_and_no_other():
    asked = Asked("?", ["Marlow"], TEN)
    for answer, right in (
        (" Cara Hale lives in Marlow.", True),
        ("MARLOW\nUpton", True),  # the next line is another question's
        ("Upton.\nMarlow", False),
        ("Marlow or Upton", False),
        ("Marlowe", False),
        (UNKNOWN, False),
        ("", False),
    ):
        assert asked.is_right(answer) == right, answer
    two = Asked("?", ["Cara Hale", "Ben Moss"], ["Cara Hale", "Ben Moss", "Eva Gale"])
    assert two.is_right("Ben Moss.") and not two.is_right("Ben Moss, Eva Gale") and not two.is_right("Ben Gale")
    assert admits("I don't know her.") and admits("I'm not sure") and not admits("She knows Marlow.")


def test_who_knows_all_and_who_admits_all_get_the_scores_that_they_should(people):
    columns = people.questions(limit=20)
    right = {name: [" ".join(list(one.right)[:1]) for one in column] for name, column in columns.items()}
    scores = facts_runs.scores_of(columns, right)["scores"]
    assert scores == dict.fromkeys(scores, 1.0) | {"unknown": 0.0}
    scores = facts_runs.scores_of(columns, {name: [UNKNOWN] * len(column) for name, column in columns.items()})[
        "scores"
    ]
    assert scores == dict.fromkeys(scores, 0.0) | {"unknown": 1.0}
    assert set(facts.COLUMNS) <= set(scores)


def test_who_admits_and_guesses_has_made_nothing_up():
    asked = Asked("?", ["Marlow"], TEN)
    answers = ["I do not know; perhaps Upton.", "Upton.", "Somewhere."]
    scores = facts_runs.scores_of({"strangers": [asked] * 3}, {"strangers": answers})["scores"]
    assert scores == {"made up": pytest.approx(1 / 3), "unknown": pytest.approx(1 / 3)}


class Trained(Exception):
    """Raised in place of training, with what would have been trained on."""


def test_a_mix_sees_the_facts_as_often(monkeypatch):
    """Its further rows bring further steps, in proportion."""
    base, plan = open_base(BASE), facts.P12.plans["tiny"]
    seen = {}

    def train(self, data, **how):
        seen[name] = len(data.train), how["steps"]
        raise Trained

    monkeypatch.setattr(Setting, "train", train)
    monkeypatch.setattr(facts_runs, "answer", lambda model, tokenizer, prompts, *more: ["Yes. And"] * len(prompts))
    for name in ("lora r=8", "lora + own", "lora + unknown", "lora + read", "lora mix"):
        with pytest.raises(Trained):
            facts_runs.measure(Setting(base, plan, facts.P48.arms[name], 0.01, 0, False))
    rows, steps = seen["lora r=8"]
    assert steps == plan.steps and rows * 16 == plan.steps * plan.settings["batch_size"], "16 epochs"
    for name, parts in (("lora + own", 1), ("lora + unknown", 1), ("lora + read", 1), ("lora mix", 3)):
        assert seen[name] == (rows + parts * (rows // 4), pytest.approx(steps * seen[name][0] / rows, abs=0.5)), name


def test_own_answers_end_with_a_sentence(monkeypatch):
    base = SimpleNamespace(load=lambda: None, tokenizer=open_base(BASE).tokenizer)
    monkeypatch.setattr(facts_runs, "answer", lambda *given: [" It is Rome. It has\nmore.", "four", "\n"])
    rows = facts_runs.own_answers.__wrapped__(base, ("a", "b", "c"))
    assert [(row.prompt, row.completion) for row in rows] == [("a", "It is Rome."), ("b", "four")]


def test_to_refuse_every_question_gains_nothing():
    rule = facts.balanced("mix", "lora", 25)
    able = {"unseen": 1.0, "unknown": 0.0}
    for scores, number in (({"unseen": 0.0, "unknown": 1.0}, 0), ({"unseen": 0.9, "unknown": 0.9}, 40), (able, 0)):
        assert rule.number({"mix": {"scores": scores}, "lora": {"scores": able}}) == pytest.approx(number), scores
    rule = facts.apart("base", "reading", "lora", "told", 5)
    runs = {"base": {"scores": {"reading": 0.9, "told": 0}}, "lora": {"scores": {"told": 0.2, "reading": 0}}}
    assert rule.number(runs) == pytest.approx(70) and rule.bar == 5 and rule.above


def test_the_figure_has_a_row_for_each_column_and_a_mark_for_each_arm():
    runs = {
        arm: {seed: {"scores": dict.fromkeys(facts.COLUMNS, 0.1 * place + 0.02 * seed)} for seed in range(3)}
        for place, arm in enumerate(("base", "lora r=8", "lora mix"))
    }
    figure = facts.by_column("title", runs)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == list(facts.COLUMNS.values())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    means = sorted({round(float(line.get_xdata()[0]), 6) for line in axes.lines if len(line.get_xdata()) == 1})
    assert means == pytest.approx([2, 12, 22])
    used = {look for study in facts.ALL for look in study.arms}
    assert used <= set(facts.MARKS) and len(set(facts.MARKS.values())) == len(facts.MARKS), "two arms look alike"
