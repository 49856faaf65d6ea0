"""The studies of ranks chosen by a program: arms of one size, a fair control, and figures that show the choice."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilora import GPT, GPTConfig
from minilora.experiments.claims import study
from minilora.experiments.claims.knobs import automatic, automatic_figures
from minilora.experiments.claims.knobs.automatic import ARMS, CHOICES, DIALECT, HAND, PROGRAM, UNIFORM
from minilora.experiments.run import open_base
from minilora.linear4bit import float_linears
from minilora.text.batches import Batches

with torch.device("meta"):
    LAYERS = float_linears(GPT(GPTConfig.preset("base")))
COSTS = {name: sum(layer.weight.shape) for name, layer in LAYERS.items()}
NUMBERS = UNIFORM.r * sum(COSTS.values())


def energies(seed: int = 0) -> dict[str, torch.Tensor]:
    """Made up: falling, and of very different size from layer to layer."""
    dice = torch.Generator().manual_seed(seed)
    full = {name: min(layer.weight.shape) for name, layer in LAYERS.items()}
    return {name: torch.rand(1, generator=dice) ** 4 * 0.8 ** torch.arange(k) for name, k in full.items()}


def test_all_arms_train_as_many_numbers():
    assert NUMBERS == 162_816
    for arm in HAND.values():
        lora = {"r": 8, "lora_alpha": 16, "target_modules": ("proj",), **arm.lora}
        numbers = lora["r"] * sum(cost for name, cost in COSTS.items() if name.endswith(lora["target_modules"]))
        assert abs(numbers - NUMBERS) < 0.02 * NUMBERS and lora["lora_alpha"] == 2 * lora["r"], arm
    for name, choose in CHOICES.items():
        ranks = choose(energies(), COSTS, 0)
        assert 0 <= NUMBERS - sum(COSTS[layer] * r for layer, r in ranks.items()) < 0.02 * NUMBERS, name
        assert all(0 < r <= min(LAYERS[layer].weight.shape) for layer, r in ranks.items()), name


def test_chance_deals_the_same_ranks_anew():
    def counted(ranks):
        return Counter((COSTS[name], ranks.get(name, 0)) for name in COSTS)

    ranks, deals = (
        CHOICES["gradient"](energies(), COSTS, 0),
        [CHOICES["chance"](energies(), COSTS, seed) for seed in (0, 1)],
    )
    assert counted(deals[0]) == counted(deals[1]) == counted(ranks)
    assert deals[0] != deals[1] and ranks not in deals
    assert deals[0] == CHOICES["chance"](energies(), COSTS, 0), "a seed gives one deal"


def test_a_third_of_the_matrices_is_the_steepest_third():
    steep = set([name for name in COSTS if ".mlp." not in name][:14])
    made_up = {name: torch.full((192,), COSTS[name] * (2.0 if name in steep else 1.0)) for name in COSTS}
    ranks = CHOICES["third"](made_up, COSTS, 0)
    assert set(ranks) == steep and len(steep) == len(COSTS) / 3
    assert max(ranks.values()) - min(ranks.values()) == 1


def test_the_best_of_the_programs_is_held_against_the_best_by_hand():
    rule = next(claim.rule for claim in automatic.CLAIMS if claim.name == "auto-hand")
    assert set(rule.arms) == {*HAND, *PROGRAM, "base"} and rule.bar == -5
    runs = {arm: {"best_validation_loss": 2.0} for arm in rule.arms}
    runs["MLP"] = {"best_validation_loss": 1.0}
    runs["adalora"] = {"best_validation_loss": 1.2}
    assert rule.number(runs) == pytest.approx(-20)


def test_a_run_uses_the_ranks_that_it_stores(monkeypatch):
    """Two steps on the shipped base, on few rows."""
    base, whole = open_base(study.BASES["tiny"]), study.dataset
    monkeypatch.setattr(automatic, "score_task", lambda *_: SimpleNamespace(score=0.5))

    def small(name, base):
        data = whole(name, base)
        return replace(
            data,
            train=Batches(data.train.input_ids[:16], data.train.labels[:16]),
            validation=Batches(data.validation.input_ids[:2], data.validation.labels[:2]),
        )

    for place in (automatic, study):
        monkeypatch.setattr(place, "dataset", small)
    automatic.energies_of.cache_clear()
    plan, records = replace(DIALECT.plans["tiny"], steps=2), {}
    for name in ("gradient", "one alpha", "base"):
        arm = DIALECT.arms[name]
        records[name] = automatic.measure(study.Setting(base, plan, arm, 1e-3 if arm.method else None, 0, False))
    automatic.energies_of.cache_clear()
    gradient, one, plain = records.values()
    assert gradient["ranks"] == one["ranks"] and gradient["best_validation_loss"] != one["best_validation_loss"]
    kinds = {name.rpartition(".")[2]: cost for name, cost in COSTS.items()}
    numbers = sum(sum(ranks) * kinds[kind] for kind, ranks in gradient["ranks"].items())
    assert gradient["scores"] == {"task": 0.5, "numbers": numbers} and NUMBERS - 256 < numbers <= NUMBERS
    assert [len(ranks) for ranks in gradient["ranks"].values()] == [6] * 7
    assert plain["scores"]["numbers"] == 0 and not any(map(any, plain["ranks"].values()))
    tuning = study.Setting(base, plan, ARMS["uniform"], 1e-3, study.TUNING_SEED, False)
    assert set(automatic.measure(tuning)) == {"best_validation_loss", "validation_loss"}


def test_each_seed_chooses_on_training_rows_of_its_own(monkeypatch):
    base, seen = open_base(study.BASES["tiny"]), []
    monkeypatch.setattr(
        automatic, "gradient_energies", lambda model, batches: seen.append(torch.cat([ids for ids, _ in batches])) or {}
    )
    automatic.energies_of.cache_clear()
    for seed in (0, 1):
        automatic.energies_of(base, "dialect", seed)
    automatic.energies_of.cache_clear()
    train = {tuple(row) for row in study.dataset("dialect", base).train.input_ids.tolist()}
    assert [len(rows) for rows in seen] == [automatic.ROWS] * 2 and not torch.equal(*seen)
    assert all(tuple(row) in train for rows in seen for row in rows.tolist()), "held-out rows take part in the choice"


def test_the_figures_show_means_over_seeds():
    ranks = [dict.fromkeys(automatic_figures.KINDS, [4, 6 * seed]) for seed in (0, 1)]
    by_seed = {seed: {"best_validation_loss": 0.5 + seed / 10, "ranks": ranks[seed]} for seed in (0, 1)}
    runs = dict.fromkeys(DIALECT.arms, by_seed)
    maps = automatic_figures.rank_maps("ranks", runs)
    assert [axes.get_title() for axes in maps.axes] == ["from the gradient", "AdaLoRA", "steepest third"]
    assert [text.get_text() for text in maps.axes[0].texts[:2]] == ["4", "3"]
    (axes,) = automatic_figures.losses_by_arm("losses", runs).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == len(DIALECT.arms) - 1 and "base" not in names, "the base's loss would squeeze the others"
    assert axes.lines[1].get_xdata() == pytest.approx([0.55, 0.55])
