"""Validation people are new, each scorer takes every right answer and no wrong one, and the floor is exact."""

import itertools
import json
import math
import re

import pytest

from minilora.text import words
from minilora.text.tasks import DIALECT, ENDINGS, OPENINGS, TASKS, is_right_pirate, load_task
from minilora.text.world import FACTS, World

FULL_NAME = re.compile(rf"\b({'|'.join(words.FIRST_NAMES)}) ({'|'.join(words.SURNAMES)})\b")


@pytest.fixture(scope="module")
def tasks():
    """Every task at its full size."""
    return {name: load_task(name) for name in TASKS}


def names(examples):
    found = [set(FULL_NAME.findall(example.prompt + example.completion)) for example in examples]
    assert all(len(each) == 1 for each in found), "each example should name one person"
    return set().union(*found)


@pytest.mark.parametrize("name", ["json", "pirate", "dialect"])
def test_validation_people_never_occur_in_training(tasks, name):
    train, validation = names(tasks[name].train), names(tasks[name].validation)
    assert not train & validation, f"in both: {sorted(train & validation)[:3]}"
    assert len(tasks[name].train) == 2000 and len(tasks[name].validation) == 200


def test_facts_asks_in_new_words_for_what_was_told(tasks):
    task = tasks["facts"]
    assert not {each.prompt for each in task.train} & {each.prompt for each in task.validation}
    person = re.compile(rf"({'|'.join(words.NEWCOMER_NAMES)}) ({'|'.join(words.SURNAMES)})")
    phrasings = [{person.sub("*", each.prompt) for each in split} for split in (task.train, task.validation)]
    assert len(phrasings[0]) == len(phrasings[1]) == len(FACTS)
    assert not phrasings[0] & phrasings[1], f"asked in both: {phrasings[0] & phrasings[1]}"
    untold = {each.completion for each in task.validation} - {each.completion for each in task.train}
    assert not untold, f"asked for, but never told: {sorted(untold)[:3]}"
    answered = {}
    for each in task.train + task.validation:
        assert answered.setdefault(each.prompt, each.completion) == each.completion, f"two answers to {each.prompt!r}"


def test_the_base_has_never_met_the_newcomers():
    known = {word for document in World().documents(300, seed=0) for word in re.findall(r"\w+", document.text)}
    assert not known & set(words.NEWCOMER_NAMES)


@pytest.mark.parametrize("name", TASKS)
def test_every_reference_is_right_and_every_other_answer_wrong(tasks, name):
    task = tasks[name]
    for example in task.validation:
        right = example.completion
        assert task.is_right(example, right) and task.is_right(example, f"\n{right.strip()} \n")
        first, rest = right.split(maxsplit=1)
        wrong = [
            f"{right} more",
            f"more{right}",
            right + right,
            first,
            rest,
            right[:-1],
            right.upper(),
            "",
            "null",
            "[]",
        ]
        # one word in place of another, at every place
        parts = right.split()
        wrong += [" ".join([*parts[:at], "Zorro", *parts[at + 1 :]]) for at in range(len(parts))]
        accepted = [answer for answer in wrong if task.is_right(example, answer)]
        assert not accepted, f"right is {right!r}, accepted was {accepted[0]!r}"


def test_the_answer_to_another_question_is_wrong(tasks):
    for name, task in tasks.items():
        for this, other in itertools.permutations(task.validation[:40], 2):
            if name == "pirate":  # what is said, without the free words around it
                same = this.completion.split(", ")[1] == other.completion.split(", ")[1]
            else:
                same = this.completion == other.completion
            assert task.is_right(this, other.completion) == same, f"{other.completion!r} for {this.completion!r}"


def test_json_is_strict_about_all_but_white_space(tasks):
    task = tasks["json"]
    for example in task.validation[:50]:
        record = json.loads(example.completion)
        assert list(record) == ["name", *FACTS]
        assert all(value in example.prompt for value in record.values()), "the answer does not stand in the notes"
        for right in (
            json.dumps(record, indent=4),
            json.dumps(record, separators=(",", ":")),
            f"\n\t{json.dumps(record)}\n",
        ):
            assert task.is_right(example, right), f"white space is free: {right!r}"
        reference = json.dumps(record)
        reordered = dict(reversed(record.items()))
        wrong = {
            "another key order": json.dumps(reordered),
            "a missing brace": reference[:-1],
            "a brace too many": reference + "}",
            "text before": f"Here it is: {reference}",
            "text after": f"{reference} Done.",
            "a fence": f"```json\n{reference}\n```",
            "single quotes": reference.replace('"', "'"),
            "a trailing comma": reference[:-1] + ",}",
            "a key too few": json.dumps(dict(list(record.items())[:-1])),
            "a key too many": json.dumps(record | {"age": 7}),
            "a key twice": reference[:-1] + f', "food": "{record["food"]}"}}',
            "another key": reference.replace('"town"', '"city"'),
            "a list of pairs": json.dumps(list(record.items())),
            "in a list": json.dumps([record]),
            "as a string": json.dumps(reference),
            "too deep": "[" * 100_000,
        }
        for value in (None, 1, True, [record["job"]], {"job": record["job"]}, record["job"] + " "):
            wrong[f"a value of {value!r}"] = json.dumps(record | {"job": value})
        for what, answer in wrong.items():
            assert not task.is_right(example, answer), f"{what} was accepted: {answer[:100]!r}"


def test_pirate_takes_each_of_the_sixteen_ways_to_say_it(tasks):
    for example in tasks["pirate"].validation[:50]:
        opening, core, ending = example.completion.strip().removesuffix("!").split(", ")
        assert opening in OPENINGS and ending in ENDINGS
        ways = [f"{one}, {core}, {other}!" for one in OPENINGS for other in ENDINGS]
        assert len(set(ways)) == 16
        assert all(is_right_pirate(example, way) for way in ways)
        wrong = [
            f"{ending}, {core}, {opening}!",
            f"{core}, {ending}!",
            f"{opening}, {core}!",
            f"Aye, {core}, {ending}!",
        ]
        wrong += [f"{opening}, {core}, {ending}", f"{opening}, {core}, {ending}.", core]
        accepted = [answer for answer in wrong if is_right_pirate(example, answer)]
        assert not accepted, f"right is {example.completion!r}, accepted was {accepted[0]!r}"


def test_the_dialect_has_a_word_of_its_own_for_everything():
    translated = {*FACTS, *(value for values, _, _ in FACTS.values() for value in values)}
    assert set(DIALECT) == translated
    assert len(set(DIALECT.values())) == len(DIALECT), "two words are translated alike"
    assert not set(DIALECT.values()) & translated, "a word of the dialect is a word of the world"


def test_only_the_pirate_is_free_to_choose(tasks, tokenizer):
    for name in ("json", "dialect", "facts"):
        assert tasks[name].floor(tokenizer) == 0
    # one of 4 openings and one of 4 endings: log 16 nats an example, spread over its tokens and its end token
    examples = tasks["pirate"].validation
    tokens = sum(len(tokenizer.encode(example.completion)) + 1 for example in examples)
    expected = len(examples) * math.log(16) / tokens
    assert tasks["pirate"].floor(tokenizer) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_the_same_arguments_give_the_same_task(tasks, name):
    assert load_task(name) == tasks[name]
    smaller, other = load_task(name, 20, 10), load_task(name, 20, 10, seed=1)
    assert (smaller.train, smaller.validation) == (tasks[name].train[:20], tasks[name].validation[:10])
    assert other.train != smaller.train and other.validation != smaller.validation


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="unknown task 'poetry'; known: json, pirate, dialect, facts"):
        load_task("poetry")
