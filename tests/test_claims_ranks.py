"""Ranks and layers: equal numbers of parameters, what a run measures, the rules, and the figure."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilora.adapters.inject import apply_lora, count_parameters, lora_layers, remove_lora
from minilora.experiments.claims import ledger
from minilora.experiments.claims.knobs import ranks, ranks_runs
from minilora.experiments.claims.knobs.ranks_figures import ladder
from minilora.experiments.claims.study import BASES, Arm, Plan, Setting
from minilora.experiments.claims.uses.costs import lora_of, shape_of
from minilora.experiments.run import open_base
from minilora.experiments.tune import TUNING_SEED
from minilora.model import GPT
from minilora.text.batches import Batches

CLAIMS = {claim.name: claim for claim in ranks.CLAIMS}
TWO = ranks.RANKS["r=2"]


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


@pytest.fixture
def small(base, monkeypatch):
    """A setting of a few rows and steps."""
    whole = Setting.dataset

    def few(setting):
        data = whole(setting)
        held = Batches(data.validation.input_ids[:4], data.validation.labels[:4])
        return replace(data, validation=held)

    monkeypatch.setattr(Setting, "dataset", few)

    def setting(arm=TWO, seed=0, **more):
        settings = ranks.SETTINGS | {"batch": 2, "asked": 2, "evaluations": 2} | more
        return Setting(base, Plan("dialect", 2, 1, 1, settings), arm, arm.method and 1e-3, seed, False)

    return setting


# Where the adapters are


@pytest.mark.parametrize("shape", ["base", "smollm2"])
def test_wherever_the_adapters_are_as_many_numbers_are_trained(base, shape):
    plan, trained, layers = Plan(shape, 1, 1, 1), {}, {}
    with torch.device("meta"):
        model = GPT(shape_of(Setting(base, plan, Arm(None), None, 0)))
    for name, arm in ({"r=8": ranks.RANKS["r=8"]} | ranks.PLACES).items():
        apply_lora(model, lora_of(ranks_runs.placed(Setting(base, plan, arm, 1e-3, 0))))
        where = [layer for layer, _ in lora_layers(model)]
        assert ("lm_head" in where) == (name == "with head"), f"{name} has adapters on {where}"
        trained[name] = count_parameters(model)[0]
        layers[name] = sorted({int(layer.split(".")[2]) for layer in where if layer != "lm_head"})
        remove_lora(model)
    for name, numbers in trained.items():
        assert numbers == pytest.approx(trained["r=8"], rel=0.02), f"{name} trains {numbers:,}, r=8 {trained['r=8']:,}"
    every = list(range(model.config.num_hidden_layers))
    third = len(every) // 3
    assert layers.pop("first third") == every[:third] and layers.pop("last third") == every[-third:]
    assert all(found == every for found in layers.values())


# A run


def test_a_run_is_measured_at_its_best_and_at_its_end(small):
    record = ranks_runs.measure(small())
    assert [step for step, _ in record["validation_loss"]] == [0, 1, 2] and record["trained"] == 2 * 20352
    assert record["last_validation_loss"] == record["validation_loss"][-1][1]
    assert record["best_validation_loss"] == min(loss for _, loss in record["validation_loss"])
    assert set(record["scores"]) == {"task"} and len(record["train_loss"]) == 2
    assert "scores" not in ranks_runs.measure(small(seed=TUNING_SEED))
    untuned = ranks_runs.measure(small(Arm(None)))
    assert untuned["best_validation_loss"] == pytest.approx(record["validation_loss"][0][1])


def test_where_the_loss_rises_again_the_last_is_not_the_best(small, monkeypatch):
    """`last_validation_loss` decides which rate a few examples get, and what `rank-few` says."""
    history = SimpleNamespace(
        best_validation_loss=0.5, validation_loss=[[0, 2.0], [1, 0.5], [2, 1.5]], train_loss=[(1, 1.0), (2, 1.0)]
    )
    finished = SimpleNamespace(model=torch.nn.Linear(1, 1), history=history)
    seen = {}
    monkeypatch.setattr(Setting, "train", lambda setting, data, **training: seen.update(training) or finished)
    record = ranks_runs.measure(small(seed=TUNING_SEED, batch=32))
    assert (record["best_validation_loss"], record["last_validation_loss"]) == (0.5, 1.5)
    assert seen == {"steps": 2, "batch_size": 32, "evaluations": 2}


def test_commands_have_as_many_held_out_rows_as_the_study_says(base, monkeypatch):
    """200, and not the 64 that they come with."""
    monkeypatch.setattr(ranks_runs, "commands", lambda tokenizer, validation: validation)
    plan = ranks.COMMANDS.plans["smollm2"]
    assert ranks_runs.data_of(Setting(base, plan, TWO, 1e-3, 0)) == ranks_runs.HELD_OUT


def test_the_long_arm_makes_four_times_the_steps(small):
    (arm,) = ranks.LONG.values()
    record = ranks_runs.measure(small(arm))
    assert record["validation_loss"][-1][0] == 8 and record["trained"] == 20352


def test_few_examples_are_others_for_each_seed_and_are_held_against_the_same_rows(small):
    few, again, other = (ranks_runs.data_of(small(seed=seed, examples=5)) for seed in (0, 0, 1))
    whole = ranks_runs.data_of(small())
    assert few.train.input_ids.shape == (5, whole.train.input_ids.shape[1]) and len(whole.train) == 2000
    assert torch.equal(few.train.input_ids, again.train.input_ids)
    assert not torch.equal(few.train.input_ids, other.train.input_ids)
    assert torch.equal(few.validation.input_ids, other.validation.input_ids)
    rows = {tuple(row) for row in torch.cat([whole.train.input_ids, whole.train.labels], 1).tolist()}
    assert {tuple(row) for row in torch.cat([few.train.input_ids, few.train.labels], 1).tolist()} <= rows


def test_all_arms_of_the_few_see_the_same_examples_and_what_they_lose_later_decides():
    assert ranks.FEW.plans["tiny"].settings["examples"] == 100 and ranks.FEW.chosen_by == "last_validation_loss"
    runs = {
        arm: {"best_validation_loss": 1.0, "last_validation_loss": last} for arm, last in (("r=8", 2), ("r=128", 4))
    }
    assert CLAIMS["rank-few"].rule.number(runs) == pytest.approx(50)


def test_the_bytes_of_a_step_are_of_the_arms_own_rank_and_layers(base):
    found = {}
    for name in ("r=2", "r=32", "last third"):  # above 64 a warning says that k and v have no more
        setting = Setting(base, ranks.MEMORY.plans["tiny"], ranks.MEMORY.arms[name], None, 0)
        found[name] = ranks_runs.bytes_of_a_step(setting)["scores"]
    trained = [round(scores["trained, million"] * 1e6) for scores in found.values()]
    assert trained == [2 * 20352, 32 * 20352, 8 * 20352], "the last: 2 layers of 6 at rank 24"
    low, high, last = (scores["peak, GB"] for scores in found.values())
    held = 3 * 4 * 30 * 20352 / 1e9  # of each number more itself and Adam's two averages, 4 bytes each
    assert high - low == pytest.approx(held), "the peak comes before the gradients"
    assert last < low, f"two layers of six hold {last} GB, all with a lower rank {low}"
    rule = CLAIMS["rank-memory"].rule
    runs = {arm: {0: {"scores": {"peak, GB": peak}}} for arm, peak in (("r=128", 1.2), ("r=8", 1.0))}
    assert rule.exact and rule.decide(runs).verdict == "holds" and rule.decide(runs).number == pytest.approx(120)


# The rules


def verdict(name: str, arm: str, than: str, loss: float) -> str:
    """Of the claim, where the arm's loss is so many times the other's."""
    losses = {arm: loss, than: 1.0}
    runs = {
        each: {seed: {"best_validation_loss": value * (1 + seed / 50)} for seed in range(3)}
        for each, value in losses.items()
    }
    return CLAIMS[name].rule.decide(runs).verdict


@pytest.mark.parametrize("name, arm, than", [
    ("rank-1", "r=8", "r=1"), ("targets-mlp", "MLP", "attention"), ("targets-last-first", "last third", "first third"),
    ("targets-head", "with head", "r=8"),
])  # fmt: skip
def test_what_is_said_to_learn_better_needs_a_loss_lower_by_more_than_5_percent(name, arm, than):
    assert [verdict(name, arm, than, loss) for loss in (0.9, 0.97, 1.1)] == ["holds", "fails", "fails"]


@pytest.mark.parametrize("name, arm, than", [
    ("rank-8", "r=8", "r=128"), ("rank-1-easy", "r=1", "r=8"), ("rank-1-time", "r=1, four times the steps", "r=8"),
    ("targets-qv", "q,v", "r=8"), ("targets-mlp-alone", "MLP", "r=8"), ("targets-last", "last third", "r=8"),
])  # fmt: skip
def test_what_is_said_to_be_enough_may_have_a_loss_higher_by_5_percent(name, arm, than):
    assert [verdict(name, arm, than, loss) for loss in (0.9, 1.03, 1.1)] == ["holds", "holds", "fails"]


def test_every_arm_has_a_rate_of_its_own_in_fine_steps_and_the_base_stands_beside():
    trained = (ranks.DIALECT, ranks.PIRATE, ranks.COMMANDS, ranks.FEW)
    for study in trained:
        assert study.finer and "base" in study.arms
        assert all(arm.rate_of is None for arm in study.arms.values()), study.name
    assert set(ledger.FAMILIES) and all(ledger.CLAIMS[name] is claim for name, claim in CLAIMS.items())


# The figure


def test_the_figure_has_every_arm_and_says_how_many_answers_are_right():
    runs = {arm: {seed: {"best_validation_loss": 0.5 + 0.1 * place + 0.01 * seed, "method": each.method,
                         "scores": {"task": 0.25}} for seed in range(3)}
            for place, (arm, each) in enumerate(ranks.DIALECT.arms.items())}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = ladder("ranks-dialect", runs)
        figure.canvas.draw()
    (axes,) = figure.axes
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert len(labels) == len(runs) - 1 and labels[2] == "r=8\n25%" and "untuned base" in axes.get_title()
    line = next(line for line in axes.lines if line.get_label().startswith("rank"))
    assert list(line.get_xdata()) == [0, 1, 2, 3, 4] and line.get_ydata()[0] == pytest.approx(0.51)
