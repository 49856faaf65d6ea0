"""Forgetting: read off a run's curve at equal task loss; the rules can say no; what a run measures is what it says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilora.adapters.inject import lora_layers
from minilora.experiments.claims import study
from minilora.experiments.claims.study import Plan, Setting
from minilora.experiments.claims.uses import forgetting, forgetting_figures, forgetting_rules, forgetting_runs
from minilora.experiments.claims.uses.forgetting_rules import LEAST, at_equal_loss, less, price
from minilora.experiments.methods import BaseFolder
from minilora.experiments.run import open_base
from minilora.text import commands, old_text
from minilora.text.batches import Batches
from minilora.text.datasets import load_dataset
from minilora.text.world import World
from minilora.train import evaluate_loss


def of(*curve: tuple[float, float], **more) -> dict:
    """A record with these (task loss, forgotten) along the run, on a base whose loss on old text is 2."""
    return {"curve": [[step, task, 2 + forgotten] for step, (task, forgotten) in enumerate(curve)], **more}


def test_the_price_is_read_between_two_evaluations_over_the_logarithm_of_the_task_loss():
    run = of((8, 0), (2, 0.4), (0.5, 1.0))
    assert price(run, 8) == 0 and price(run, 2) == pytest.approx(0.4) and price(run, 0.5) == pytest.approx(1.0)
    assert price(run, 4) == pytest.approx(0.2), "halfway from 8 to 2, on a logarithmic scale"
    assert price(run, 1) == pytest.approx(0.7)


def test_the_price_is_the_least_at_which_a_task_loss_was_reached():
    """Old loss may fall again and task loss may rise again: who can choose the step takes the best."""
    assert price(of((8, 0), (2, 0.9), (1, 0.5)), 4) == pytest.approx(0.45)
    assert price(of((8, 0), (2, 0.9), (1, 0.1)), 2) == pytest.approx(0.1), "later and cheaper"
    back = of((8, 0), (1, 0.5), (4, 0.1))
    assert price(back, 1) == pytest.approx(0.5) and price(back, 2) == pytest.approx(0.3), "passed again on the way back"


def test_a_share_of_the_larger_has_the_same_meaning_both_ways():
    assert less(0.5, 1.0) == 50 and less(1.0, 0.5) == -50 and less(1.0, 1.0) == 0
    assert less(0, LEAST / 5) == pytest.approx(20), "nothing much is forgotten by either"
    assert less(-0.1, 0.4) > 100, "better than the base was"


def test_arms_are_compared_at_the_lowest_task_loss_that_both_reach():
    """`a` learns little and forgets little; where it ends, `b` had forgotten less still. The ends say the opposite."""
    runs = {"a": of((8, 0), (2, 0.4)), "b": of((8, 0), (2, 0.2), (0.5, 2.0)), "base": of((8, 0))}
    assert at_equal_loss(runs, ("a",), ("b",)) == pytest.approx(-50)
    assert at_equal_loss(runs, ("b",), ("a",)) == pytest.approx(50)
    assert forgetting_rules.ends_less("a", "b").number(runs) == pytest.approx(80)


def test_of_several_arms_the_gentlest_that_gets_there_counts():
    runs = {
        "fast": of((8, 0), (0.5, 1.0)),
        "slow": of((8, 0), (2, 0.1)),  # does not reach 1
        "mild": of((8, 0), (1, 0.4)),
        "full": of((8, 0), (1, 0.8)),
    }
    assert at_equal_loss(runs, ("fast", "slow", "mild"), ("full",)) == pytest.approx(50)
    assert forgetting_rules.one_curve(("full",), ("fast", "mild")).number(runs) == pytest.approx(50), "without a sign"


def by_seed(rule, **arms) -> str:
    return rule.decide({arm: dict.fromkeys(range(3), record) for arm, record in arms.items()}).verdict


def test_every_kind_of_rule_can_hold_and_fail():
    dear, cheap = of((8, 0), (1, 1.0)), of((8, 0), (1, 0.5))
    base = of((8, 0))
    least = forgetting_rules.forgets_less("a", "b")
    assert (by_seed(least, a=cheap, b=dear), by_seed(least, a=dear, b=cheap)) == ("holds", "fails")
    assert by_seed(least, a=of((8, 0), (1, 0.9)), b=dear) == "fails", "a tenth less is no reason to choose"
    ends = forgetting_rules.ends_less("a", "b")
    assert (by_seed(ends, a=cheap, b=dear, base=base), by_seed(ends, a=dear, b=cheap, base=base)) == ("holds", "fails")
    one = forgetting_rules.one_curve(("a",), ("b",))
    assert (by_seed(one, a=dear, b=of((8, 0), (1, 0.9))), by_seed(one, a=dear, b=cheap)) == ("holds", "fails")
    heart = forgetting_rules.heart_before_reading("a")
    for risen, verdict in ((2.0, "holds"), (0.5, "fails"), (1.1, "fails")):
        kinds = {"answer by heart": [0.1, 0.1 + risen], "answer from notes": [0.0, 1.0]}
        assert by_seed(heart, a=of((8, 0), (1, 1), kinds=kinds)) == verdict


def test_half_of_an_update_has_to_keep_the_skill_and_give_back_the_rest():
    rule = forgetting_rules.scaling_back("a", "0.5", 90, 50)
    cases = ((1.1, 0.2, "holds"), (1.1, 0.8, "fails"), (4.0, 0.2, "fails"), (0.9, -0.1, "holds"))
    for task, forgotten, verdict in cases:  # the run goes from 8 to 1 and forgets 1
        run = of((8, 0), (1, 1.0), scaled={"0.5": [task, 2 + forgotten]})
        assert by_seed(rule, a=run) == verdict, f"task loss {task}, forgotten {forgotten}"
    stop = forgetting_rules.scaling_or_stopping("a", "0.5")
    for forgotten, verdict in ((0.3, "holds"), (0.9, "fails")):  # at 2 the run itself had forgotten 2/3
        assert by_seed(stop, a=of((8, 0), (1, 1.0), scaled={"0.5": [2, 2 + forgotten]})) == verdict

    half = forgetting_rules.halved_answers("a")
    for halved, verdict in ((0.85, "holds"), (0.7, "fails")):
        assert by_seed(half, a={"scores": {"task": 0.9, "task, halved": halved}}) == verdict


# What a run measures


@pytest.fixture(scope="module")
def base() -> BaseFolder:
    return open_base(study.BASES["tiny"])


@pytest.fixture
def small(monkeypatch, base) -> Setting:
    """Two steps on eight examples' validation; old text of two documents a kind, without the slow scores."""
    data = load_dataset("dialect", base.tokenizer, study.ROW)
    data = replace(data, validation=Batches(data.validation.input_ids[:8], data.validation.labels[:8]))
    monkeypatch.setattr(study, "dataset", lambda name, base: data)
    monkeypatch.setattr(forgetting_runs, "world_text", lambda tokenizer: old_text.world_text(tokenizer, count=2))
    monkeypatch.setattr(forgetting_runs, "evaluate_world", lambda *a, **k: SimpleNamespace(scores={"asked": 0.5}))
    monkeypatch.setattr(forgetting_runs, "score_task", lambda *a, **k: SimpleNamespace(score=0.25))
    old = forgetting_runs.Old(base, english=False)
    monkeypatch.setattr(forgetting_runs, "old_of", lambda *which: old)
    settings = forgetting.SETTINGS | {"evaluations": 2}
    return Setting(base, Plan("dialect", 2, 1, 1, settings), forgetting.ARMS["r=8"], 0.1, 0, progress=False)


def test_a_run_is_measured_along_its_way_and_without_its_adapter(small):
    record = forgetting_runs.measure(small)
    untuned = forgetting_runs.measure(replace(small, arm=forgetting.ARMS["base"], rate=None))
    assert [step for step, _, _ in record["curve"]] == [0, 1, 2]
    assert record["curve"][0] == untuned["curve"][0], "the first point should be the base"
    assert [task for _, task, _ in record["curve"]] == [task for _, task in record["validation_loss"]]
    for (_, _, old), *each in zip(record["curve"], *(record["kinds"][k] for k in old_text.DOCUMENT_KINDS), strict=True):
        assert old == pytest.approx(sum(each) / 6, abs=1e-4), "the mean of the six kinds of text, without the answers"
    assert record["curve"][2][2] != record["curve"][0][2]
    assert record["scores"] == {"task": 0.25, "asked": 0.5, "base again": 1.0}
    assert set(record["scaled"]) == set(forgetting.SCALES)
    halved = forgetting_runs.measure(replace(small, arm=forgetting.ARMS["r=8 halved"]))
    assert halved["scores"]["task, halved"] == 0.25 and halved["curve"] == record["curve"]
    assert set(forgetting_runs.measure(replace(small, seed=1000))) == {"best_validation_loss", "validation_loss"}


def test_half_of_the_update_answers_at_half_of_every_scaling(small, monkeypatch):
    def scalings(model, *rest):
        return SimpleNamespace(score=[layer.scaling for _, layer in lora_layers(model)])

    monkeypatch.setattr(forgetting_runs, "score_task", scalings)
    scores = forgetting_runs.measure(replace(small, arm=forgetting.ARMS["r=8 halved"]))["scores"]
    assert scores["task"] and scores["task, halved"] == [scaling / 2 for scaling in scores["task"]]


def test_a_scaled_update_goes_from_the_base_to_the_model_and_back(small, base):
    data, old = small.dataset(), forgetting_runs.old_of(base, False)
    model = small.train(data, evaluations=1).model
    before = [layer.scaling for _, layer in lora_layers(model)]
    whole = [evaluate_loss(model, data.validation, 16), old.loss(model)["mean"]]
    assert forgetting_runs.scaled(model, 0, data, old)[1] == pytest.approx(old.losses["mean"], abs=1e-6)
    assert forgetting_runs.scaled(model, 1, data, old) == whole
    assert [layer.scaling for _, layer in lora_layers(model)] == before


def test_every_tenth_row_is_an_old_text(small, base):
    data = small.dataset()
    mixed, rows, wide = forgetting_runs.with_replay(data, base, english=False), len(data.train), 32
    assert len(mixed.train) - rows == rows // 9 and mixed.validation is data.validation
    assert torch.equal(mixed.train.labels[:rows, :wide], data.train.labels)
    assert (mixed.train.labels[:rows, wide:] == -100).all(), "what is padded does not count"
    replayed = base.tokenizer.decode(mixed.train.input_ids[rows].tolist())
    assert (mixed.train.labels[rows:] != -100).sum() > 20 * (rows // 9), "old text is learned whole"
    assert replayed.startswith(("Story:", "Notes:", "Question:", "Resident:", "Instruction:", "Pattern:"))


def test_the_base_has_mastered_what_is_measured(base):
    rows, model = old_text.world_text(base.tokenizer, 4), base.load().eval()
    for name in old_text.ANSWERS.values():
        assert evaluate_loss(model, rows[name], 16) < 0.01, f"{name}: the base should know these by a hair"


def test_what_is_mixed_in_is_about_other_people_than_what_is_measured_but_for_the_residents(base):
    texts = [base.tokenizer.decode(ids) for ids in old_text.world_replay(base.tokenizer, 60)]
    people = [text.split()[1:3] for text in texts if text.startswith("Notes:")]
    assert len(people) > 10 and not any(World.is_validation(first, surname) for first, surname in people)
    measured = base.tokenizer.decode(old_text.world_text(base.tokenizer, 2)["notes"].input_ids[0].tolist())
    assert World.is_validation(*measured.split()[1:3])
    by_heart = old_text.world_text(base.tokenizer, 24)["answer by heart"].input_ids
    asked = [base.tokenizer.decode(row.tolist()).partition("\n<")[0].strip() for row in by_heart]
    mixed = "\n".join(base.tokenizer.decode(ids) for ids in old_text.world_replay(base.tokenizer, 222))
    assert sum(question in mixed for question in asked) == 11, "as the objection to forget-replay says"


def test_prose_is_measured_in_other_words_than_are_mixed_in(base):
    rows = old_text.english_text(base.tokenizer, 40)
    assert rows["prose"].counted_tokens >= 4_000 and len(rows["code"]) == 20
    measured, mixed = old_text.help_topics()
    assert not set(measured.split("\n\n")) & set(mixed.split("\n\n")), "topics quote one another"
    assert all(len(ids) < old_text.ROW for ids in old_text.english_replay(base.tokenizer, 9))


def test_questions_have_an_answer_in_words_or_figures():
    assert len(old_text.QUESTIONS) == 30 and all(question.endswith("?") for question in old_text.QUESTIONS)
    assert old_text.is_answered("What is the capital of France?", "It is Paris.")
    assert old_text.is_answered("How many days are in a week?", "There are 7 days.")
    assert old_text.is_answered("Which animal says meow?", "Cats do.")
    assert not old_text.is_answered("What is the capital of France?", "I do not know.")
    for question, said in (("Which animal says meow?", "It is located"), ("How many days are in a week?", "17 days")):
        assert not old_text.is_answered(question, said), f"{said}: a part of a word is not the word"


def test_commands_are_new_combinations_of_words_that_were_shown():
    asked = commands.command_examples(300)
    codes, parts = {each.completion for each in asked}, {word for each in asked for word in codes_of(each.completion)}
    assert len({each.prompt for each in asked}) == 300 and len(codes) > 250
    assert len(set(commands.WORDS.values())) == len(commands.WORDS), "no two words share a translation"
    assert parts == set(commands.WORDS.values())
    first = asked[0]
    assert first.completion.endswith("!") and all(
        word in first.prompt for word, new in commands.WORDS.items() if new in codes_of(first.completion)
    )


def codes_of(code: str) -> list[str]:
    action, rest = code.split(":")
    thing, rest = rest.split("/")
    return [action, thing, rest.split("#")[0]]


def test_both_figures_name_every_line():
    kinds = {"story": [0.5, 0.7], "answer by heart": [0.0, 1.0]}
    run = of((8, 0), (1, 1.0), kinds=kinds)
    runs = {arm: {0: run, 1: run} for arm in forgetting.ARMS if arm not in ("base", "r=8 halved")} | {
        "base": {0: of((8, 0))}
    }
    figure = forgetting_figures.frontier("made up", runs)
    names = [*figure.axes[0].texts, *(text for legend in figure.legends for text in legend.get_texts())]
    named = {text.get_text() for text in names}
    assert {"LoRA r=8", "LoRA r=8, rate/3", "full fine-tuning", "base"} <= named and len(named) == len(runs)
    (axes,) = forgetting_figures.kinds_by_step("made up", {"r=8": runs["r=8"]}).axes
    assert {text.get_text() for text in axes.texts} == set(kinds)
    (heart,) = (claim for claim in forgetting.CLAIMS if claim.name == "forget-heart-first")
    assert heart.figure is forgetting_figures.kinds_by_step and len(heart.rule.arms) == 1, "it shows one arm"
