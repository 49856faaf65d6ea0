"""Capacity: random pairs whose bits are known, adapters side by side, bits that are counted, and the rules on them."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minilora.adapters.inject import find_targets, linear_layers
from minilora.experiments.claims.knobs import capacity, capacity_runs
from minilora.experiments.claims.knobs.capacity_runs import SideBySide, in_steps, recall, round_adapters, to_learn
from minilora.experiments.claims.study import BASES, Arm, Plan, Setting
from minilora.experiments.run import open_base
from minilora.experiments.tune import TUNING_SEED
from minilora.lora import LoRALinear
from minilora.text.newcomers import TINY, Newcomers
from minilora.text.pairs import pairs, words
from minilora.train import train
from minilora.train_settings import IGNORE


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


def small(base, seed: int = 0, steps: int = 4, seeds: int = 2, method: str | None = "lora", **settings) -> Setting:
    plan = Plan("random pairs", steps, seeds, 1, capacity.SETTINGS | {"count": 3})
    lora = {"r": 1, "target_modules": capacity.QV}
    return Setting(base, plan, Arm(method, lora, settings), 1e-2, seed, progress=False)


# What is to be learned


def test_a_pair_is_three_words_that_are_given_and_four_that_count(base):
    rows, known = pairs(500, 0, base.tokenizer), words(base.tokenizer)
    assert len(set(known)) == 1024 and rows.input_ids.shape == (500, 1 + 3 + 4)
    assert {id for row in rows.input_ids[:, 1:].tolist() for id in row} <= set(known)
    assert (rows.labels != IGNORE).tolist() == [[False] * 4 + [True] * 4] * 500
    assert torch.equal(rows.labels[:, 4:], rows.input_ids[:, 4:]), "the loss counts the value as it stands in the row"
    assert len({tuple(key) for key in rows.input_ids[:, 1:4].tolist()}) == 500, "no two keys are alike"
    for place in range(1, 8):  # of 1,024 words 500 draws hit about 396 different ones
        assert 340 < len(set(rows.input_ids[:, place].tolist())) < 450, f"word {place} is not drawn from all"
    places = torch.tensor([[known.index(id) for id in row] for row in rows.input_ids[:, 1:].tolist()])
    bits = (places[..., None] >> torch.arange(10) & 1).flatten(1).float()  # (500, 70)
    related = torch.corrcoef(bits.T) - torch.eye(70)
    assert related.abs().max() < 0.25, "no bit of a pair tells another"
    assert torch.equal(rows.input_ids, pairs(500, 0, base.tokenizer).input_ids)
    assert not torch.equal(rows.input_ids, pairs(500, 1, base.tokenizer).input_ids)
    tiny = SimpleNamespace(vocab_size=2, decode=lambda ids: " word")
    with pytest.raises(ValueError, match="has 2 words of its own; random pairs need 1024"):
        words(tiny)


def test_the_bits_are_those_of_equally_likely_choices(base):
    rows, bits = to_learn(small(base), [0, 1])
    assert (len(rows), bits) == (2 * 3, 3 * 40), "rows of both seeds, and the bits of one"
    _, bits = to_learn(small(base, what="facts"), [0])
    counts = [len(set(values)) for values, _, _ in TINY.facts.values()]
    assert bits == pytest.approx(3 * math.log2(math.prod(counts)))


def test_of_a_fact_the_value_counts_and_what_is_before_it_does_not(base):
    rows, _ = to_learn(small(base, what="facts"), [0])
    decode, people = base.tokenizer.decode, Newcomers(TINY, 3, 1, 0).people
    stated = [(TINY.state(person, kind), person.facts[kind]) for person in people for kind in TINY.facts]
    assert len(rows) == len(stated) == 12
    for ids, labels, (statement, value) in zip(rows.input_ids, rows.labels, stated, strict=True):
        counts = labels != IGNORE
        assert decode(ids[counts].tolist()).strip() == f"{value}."
        assert decode([*ids[~counts & (ids > 2)].tolist(), *ids[counts].tolist()]).strip() == statement


# What is stored


def knows(rows, places=slice(None), words_of=None):
    """A model that is sure of the right word in these rows, and otherwise knows no more than which words there are."""

    def model(input_ids, where):
        logits = torch.full((len(where[0]), 3072), -1e9)
        logits[:, words_of] = 0.0
        sure = torch.isin(where[0], torch.arange(len(input_ids))[places])
        logits[sure, input_ids[where[0], where[1] + 1][sure]] = 1e9
        return logits

    return model


def test_who_knows_only_the_words_has_stored_nothing_and_who_knows_all_has_stored_all(base):
    rows, bits = to_learn(small(base), [0, 1])
    known = words(base.tokenizer)
    for places, missing, right in (([], [120, 120], [0, 0]), (slice(None), [0, 0], [1, 1]),
                                   ([0, 1, 2], [0, 120], [1, 0]), ([1, 5], [80, 80], [1 / 3, 1 / 3])):  # fmt: skip
        lost, shares = recall(knows(rows, places, known), rows, 2)
        assert lost.tolist() == pytest.approx(missing, abs=1e-3) and shares.tolist() == pytest.approx(right)
    assert recall(base.load(), rows, 2)[0].min() > bits, "the base does not know which words can occur"


# Adapters side by side


@pytest.mark.parametrize("r", [1, 4])
def test_an_adapter_side_by_side_is_a_lora_layer(r):
    torch.manual_seed(0)
    layer, dice = nn.Linear(12, 8).requires_grad_(False), [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both, x = SideBySide(layer, r, dice), torch.randn(6, 5, 12)
    assert not torch.equal(both.A[0], both.A[1]), "each seed begins elsewhere"
    both.B.data.normal_()
    for seed in range(2):
        alone = LoRALinear(layer, r, capacity_runs.ALPHA)
        assert all(0.5 * 12**-0.5 < A.abs().max() <= 12**-0.5 for A in (both.A[seed], alone.lora_A))
        alone.lora_A.data, alone.lora_B.data = both.A[seed].data, both.B[seed].data
        mine = slice(3 * seed, 3 * seed + 3)
        assert (both(x)[mine] - alone(x[mine])).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_nothing_passes_from_one_seed_to_another(base, method):
    both = capacity_runs.trained(small(base, method=method), [0, 1])
    (alone,) = capacity_runs.trained(small(base, 1, method=method), [1])
    assert both[1]["missing"] == pytest.approx(alone["missing"], abs=0.05)
    assert both[0]["missing"] != pytest.approx(both[1]["missing"], abs=0.5), "seeds have pairs of their own"
    assert both[0]["parameters"] == 1280


def test_each_seed_begins_with_an_adapter_of_its_own(base, monkeypatch):
    begun, put_in = [], capacity_runs.put_in
    monkeypatch.setattr(capacity_runs, "put_in", lambda *given: begun.append(list(given[-1])) or put_in(*given))
    capacity_runs.trained(small(base, TUNING_SEED), [4, 7])
    assert begun == [[4, 7]]


def test_the_seeds_of_an_arm_are_trained_once_and_a_tuning_run_by_itself(base, monkeypatch):
    ran = []

    def trained(setting, seeds):
        ran.append((setting.arm.settings, list(seeds)))
        return [{"missing": float(seed)} for seed in seeds]

    monkeypatch.setattr(capacity_runs, "trained", trained)
    capacity_runs.LAST.clear()
    assert [capacity_runs.measure(small(base, seed))["missing"] for seed in (0, 1, 2)] == [0, 1, 2]
    capacity_runs.measure(small(base, 0, count=5))
    assert capacity_runs.measure(small(base, TUNING_SEED)) == {"missing": TUNING_SEED}
    assert ran == [({}, [0, 1]), ({}, [2]), ({"count": 5}, [0, 1]), ({}, [TUNING_SEED])]
    capacity_runs.LAST.clear()


def test_a_run_says_what_is_stored_by_step_and_when_rounded(base, monkeypatch):
    steps = []
    monkeypatch.setattr(
        capacity_runs, "train", lambda *args, **more: steps.append(args[2].steps) or train(*args, **more)
    )
    first, second = capacity_runs.trained(small(base, steps=20), [0, 1])
    scores = first["scores"]
    assert [step for step, _ in first["curve"]] == list(range(1, 21))
    assert first["curve"][-1][1] == pytest.approx(scores["stored"], abs=0.6)
    assert scores["stored"] == pytest.approx(120 - first["missing"], abs=0.02)
    assert scores["per parameter"] == pytest.approx(scores["stored"] / 1280, abs=1e-4)
    assert scores["late"] == pytest.approx((scores["stored"] - first["curve"][9][1]) / 1280, abs=1e-4)
    assert scores["new"] < scores["stored"], "pairs that were not trained are not known"
    assert list(first["rounded"]) == list(capacity_runs.ROUNDED) and second["rounded"] != first["rounded"]
    (quick,) = capacity_runs.trained(small(base, TUNING_SEED, steps=20), [TUNING_SEED])
    assert set(quick) == {"bits", "missing", "scores"} and steps == [20, 5]


def test_each_rounding_begins_with_the_adapter_as_it_was_trained(base):
    rows, _ = to_learn(small(base), [0, 1])
    model = base.load().requires_grad_(False)
    capacity_runs.put_in(model, capacity.QV, 1, [0, 1])
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(adapter) == 8 and all(len(part) == 2 for part in adapter), "q and v of two layers, A and B"
    assert not any(torch.equal(*part) for part in adapter[::2]), "each seed begins elsewhere"
    with torch.no_grad():
        for parameter in adapter:
            parameter.add_(torch.randn_like(parameter) / 20)
    missing = capacity_runs.when_rounded(model, rows, 2)
    kept = [parameter.clone() for parameter in adapter]
    assert torch.equal(missing["8 bits"], capacity_runs.when_rounded(model, rows, 2)["8 bits"])
    round_adapters(model, 3)
    assert torch.equal(recall(model, rows, 2)[0], missing["3 bits"])
    assert all(not torch.equal(parameter, was) for parameter, was in zip(adapter, kept, strict=True))


def test_an_adapter_is_rounded_to_so_many_bits():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for digits, levels in ((3, 7), (4, 15), (8, 255)):
        rounded = in_steps(weight, 2 ** (digits - 1) - 1)
        for row, was in zip(rounded, weight, strict=True):
            assert len(row.unique()) <= levels and (row - was).abs().max() <= was.abs().max() / (levels - 1) * 1.001
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64).requires_grad_(False))
    frozen, weight = model[1].weight.clone(), model[0].weight.clone()
    round_adapters(model, 16)
    assert torch.equal(model[0].weight, weight.bfloat16().float()) and torch.equal(model[1].weight, frozen)
    round_adapters(model, 4)
    assert torch.equal(model[0].weight, in_steps(weight.bfloat16().float(), 7)), "of 15 levels, 7 lie above zero"


# Rules, on made-up runs

SIZES = {"r=1": 1280, "r=2": 2560, "r=8": 10240, "MLP r=1": 4224, "all r=1": 6784,
         "facts r=1": 1280, "facts r=2": 2560, "facts r=4": 5120, "r=2, 4-bit base": 2560}  # fmt: skip


def run_of(arm: str, density: float = 1.0, left: float = 1.0, right: float = 1.0) -> dict:
    parameters = SIZES.get(arm, 1280)
    stored = density * parameters
    rounded = {name: stored * left for name in capacity_runs.ROUNDED}
    scores = {"stored": stored, "per parameter": density, "right": right}
    return {"parameters": parameters, "bits": 2.0 * parameters, "scores": scores, "rounded": rounded}


def number(name: str, **changed) -> float:
    """What the rule of that claim makes of runs of 1 bit a parameter, but for those arms that are `changed`."""
    (claim,) = (claim for claim in capacity.CLAIMS if claim.name == name)
    return claim.rule.number({arm: run_of(arm, **changed.get(arm, {})) for arm in claim.rule.arms})


def test_the_rules_compare_bits_per_parameter():
    assert number("capacity-two-bits") == 1 and number("capacity-two-bits", **{"MLP r=1": {"density": 1.9}}) == 1.9
    assert number("capacity-rank", **{"r=8": {"density": 0.6}}) == pytest.approx(60)
    assert number("capacity-targets", **{"MLP r=1": {"density": 2.0}}) == 50
    assert number("capacity-4-bit-base", **{"r=2, 4-bit base": {"density": 0.8}}) == pytest.approx(80)


def test_the_rules_on_rounding_take_the_worst_arm():
    for name in ("capacity-bfloat16", "capacity-4-bits"):
        assert number(name) == 100 and number(name, **{"r=8": {"left": 0.7}}) == pytest.approx(70)


def test_the_rules_on_load_and_facts():
    assert number("capacity-overfull", **{"r=1, 128 pairs": {"density": 0.5}, "r=1, 32 pairs": {"density": 2.0}}) == 25
    assert number("capacity-overfull") == 100
    assert number("capacity-predicts", **{"facts r=1": {"density": 0.8}}) == pytest.approx(20)
    assert number("capacity-predicts", **{"facts r=1": {"density": 1.2}}) == pytest.approx(20)
    assert number("capacity-predicts", **{"r=1": {"density": 2.0}}) == 50
    assert number("capacity-enough", **{"facts r=4": {"right": 0.9}}) == 90


@pytest.mark.parametrize("name", ["capacity-rank", "capacity-4-bits", "capacity-overfull", "capacity-enough"])
def test_a_claim_is_drawn(name):
    (claim,) = (claim for claim in capacity.CLAIMS if claim.name == name)
    runs = {arm: {seed: run_of(arm, 1 + 0.1 * seed) for seed in range(3)} for arm in claim.rule.arms}
    figure = (claim.figure or claim.studies[0].figure)("title", runs)
    figure.draw_without_rendering()
    assert any(len(line.get_xdata()) for line in figure.axes[0].lines)


def test_the_figure_of_the_study_names_what_it_compares():
    every = {arm: {0: run_of(arm)} for arm in capacity.CAPACITY.arms}
    labels = [text.get_text() for text in capacity.CAPACITY.figure("title", every).legends[0].get_texts()]
    assert "r=8: 1.00" in labels and not any("pairs" in label or label.startswith("base") for label in labels)


def test_each_arm_has_about_two_bits_to_learn_for_each_number(base):
    """An adapter that could not be filled would say nothing about how much it holds."""
    layers = linear_layers(base.load())
    for name, arm in capacity.CAPACITY.arms.items():
        if arm.method is None or "pairs" in name or "facts" in name:
            continue
        sides = [(layer.in_features, layer.out_features) for layer in
                 map(layers.get, find_targets(list(layers), arm.lora["target_modules"]))]  # fmt: skip
        count = arm.lora["r"] * sum(map(sum, sides))
        load = 40 * arm.settings["count"] / count
        assert 1.9 < load < 2.5, f"{name}: {load:.2f} bits to learn for each of {count} parameters"
