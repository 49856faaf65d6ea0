"""The shipped instruction sets: the files are what the generators write, nothing held out is in training, and the
scorers take the right answers and refuse the wrong ones."""

import json
import re

import pytest

from minilora.experiments.run import BASE
from minilora.text import instruction_sets as sets
from minilora.text.datasets import data_named, load_dataset
from minilora.text.instruction_sets import (
    COUNTS,
    FACTS,
    FIRST_NAMES,
    INSTRUCTIONS,
    ITEM_SIZES,
    PIRATE_WORDS,
    SCORERS,
    SURNAMES,
    WORDINGS,
    is_in_voice,
    is_right_fact,
    json_lines,
    orders_lines,
    people_lines,
)
from minilora.text.tasks import Example, is_right_json
from minilora.text.tokenizer import open_tokenizer

SPLITS = {"train": ".jsonl", "validation": ".validation.jsonl"}


def entries(name, split):
    return [json.loads(line) for line in (INSTRUCTIONS / f"{name}{SPLITS[split]}").read_text("utf-8").splitlines()]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["orders", "people"])
def test_a_file_is_what_its_generator_writes(name, split):
    written = (INSTRUCTIONS / f"{name}{SPLITS[split]}").read_bytes()
    assert written == json_lines(getattr(sets, f"{name}_lines")(split)).encode()


def test_every_set_has_its_two_files_and_no_prompt_twice():
    assert sorted(file.name for file in INSTRUCTIONS.iterdir()) == sorted(
        name + ending for name in SCORERS for ending in SPLITS.values()
    )
    for name in SCORERS:
        prompts = [
            json.dumps(each.get("prompt") or each["messages"][:-1]) for split in SPLITS for each in entries(name, split)
        ]
        assert len(set(prompts)) == len(prompts), f"{name} asks something twice"


def test_no_held_out_name_or_wording_of_orders_is_in_training():
    assert (len(orders_lines("train")), len(orders_lines("validation"))) == (432, 48)
    for words in (FIRST_NAMES, SURNAMES, WORDINGS):
        assert not set(words["train"]) & set(words["validation"])
    training = json_lines(orders_lines("train"))
    known = set(re.findall(r"\w+", training))
    for line in orders_lines("validation"):
        name = json.loads(line["completion"])["name"]
        assert name in line["prompt"] and not set(name.split()) & known, f"{name} is in training"
    for wording in WORDINGS["validation"]:
        piece = max(re.split(r"\{\w+\}", wording), key=len)  # its longest part without a name, goods or a day
        assert piece not in training, f"{piece!r} is in training"


@pytest.mark.parametrize("split", SPLITS)
def test_an_order_says_all_that_its_json_holds(split):
    for line in orders_lines(split):
        order = json.loads(line["completion"])
        counts = [count for count in COUNTS if COUNTS[count] == order["quantity"]]
        item = order["item"] + "s" * (order["quantity"] > 1)
        goods = [" ".join(filter(None, (count, order["size"], item))) for count in counts]
        assert any(f" {each}" in f" {line['prompt']}" for each in goods), f"{line} does not hold one of {goods}"
        assert order["name"] in line["prompt"] and order["day"] in line["prompt"]
        assert order["size"] in ITEM_SIZES
    assert len({line["completion"] for line in orders_lines(split)}) > 0.9 * len(orders_lines(split))


def test_people_are_asked_in_phrasings_that_training_never_used():
    train, validation = people_lines("train"), people_lines("validation")
    assert (len(train), len(validation)) == (192, 48)
    assert {line["completion"] for line in train} == {line["completion"] for line in validation}, "the same facts"
    for _, _, questions in FACTS.values():
        assert len(set(questions)) == 5
    for line in validation:
        others = {each["prompt"] for each in train if each["completion"] == line["completion"]}
        assert len(others) == 4 and line["prompt"] not in others


# -- the scorers -----------------------------------------------------------------------------------------------------


def test_a_right_answer_is_right_in_every_set():
    tokenizer = open_tokenizer(BASE)
    for name in ("orders", "people"):
        task = load_dataset(data_named(name), tokenizer, 128).task
        assert task and task.name == f"{name}.jsonl" and task.is_right is SCORERS[name]
        assert len(task.validation) == 48
        for one, other in zip(task.validation, task.validation[1:], strict=False):
            assert task.is_right(one, one.completion), f"refused {one.completion!r}"
            assert not task.is_right(one, other.completion), f"accepted {other.completion!r} for {one.completion!r}"
        assert len(load_dataset(data_named(name), tokenizer, 128, count=5).task.validation) == 5
    for split in SPLITS:
        for each in entries("pirate", split):
            answer = each["messages"][-1]["content"]
            assert is_in_voice(Example("", ""), answer), f"not in voice: {answer!r}"
            assert len(answer) < 140, f"longer than two short sentences: {answer!r}"


def test_orders_must_be_exact():
    assert SCORERS["orders"] is is_right_json
    example = Example("", orders_lines("validation")[0]["completion"])
    order = json.loads(example.completion)
    assert is_right_json(example, f"\n {json.dumps(order, indent=1)} ")
    for key in order:
        assert not is_right_json(example, json.dumps(order | {key: "other"})), f"accepted another {key}"
    assert not is_right_json(example, json.dumps(order | {"quantity": float(order["quantity"])})), "6.0 is not 6"
    for wrong in ("", "Sure! " + example.completion, example.completion + "}", json.dumps(order | {"note": 1})):
        assert not is_right_json(example, wrong), f"accepted {wrong!r}"


def test_a_fact_is_its_value_and_no_other():
    example = Example("", "Alvar Tindrel plays the harp.")
    for right in (example.completion, "The HARP, of course.", "harp"):
        assert is_right_fact(example, right), f"refused {right!r}"
    for wrong in ("", "Alvar Tindrel plays the oboe.", "the harp or the oboe", "a harpsichord", "an instrument"):
        assert not is_right_fact(example, wrong), f"accepted {wrong!r}"


def test_two_different_pirate_words_make_a_voice():
    example = Example("", "")
    for right in ("Arr, that be Paris, matey!", "AYE. Ye know it.", "The cap’n drinks grog."):
        assert is_in_voice(example, right), f"refused {right!r}"
    for wrong in ("", "The capital of Italy is Rome.", "Arr! Arr! Arr!", "yes, yet the year is dear, matey", "Array"):
        assert not is_in_voice(example, wrong), f"accepted {wrong!r}"
    assert len(set(PIRATE_WORDS)) == len(PIRATE_WORDS)


def test_a_name_of_a_set_is_its_file_and_a_task_stays_a_task():
    tokenizer = open_tokenizer(BASE)
    assert data_named("pirate") == str(INSTRUCTIONS / "pirate.jsonl") and data_named("json") == "json"
    assert data_named("my.txt") == "my.txt"
    task = load_dataset("pirate", tokenizer, 128, count=3)
    assert task.name == "pirate" and len(task.train) == 2000 and len(task.validation) == 3
    with pytest.raises(ValueError, match="pirate.jsonl, line 1: .* comes without a chat template"):
        load_dataset(data_named("pirate"), tokenizer, 128)


def test_another_file_of_the_same_name_has_no_scorer(tmp_path):
    for ending in SPLITS.values():
        (tmp_path / f"orders{ending}").write_bytes((INSTRUCTIONS / f"orders{ending}").read_bytes())
    dataset = load_dataset(str(tmp_path / "orders.jsonl"), open_tokenizer(BASE), 128)
    assert dataset.task is None and dataset.name == "orders.jsonl"
