"""Variants on other tasks, and bases in few bits: what the rules count, what an arm trains, which floats it gets."""

import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from minilora.adapters.inject import lora_layers
from minilora.adapters.starts import loftq, pissa
from minilora.experiments.claims import ledger, study
from minilora.experiments.claims.claim import Rule
from minilora.experiments.claims.knobs import bits, bits_runs, orders, orders_figures
from minilora.experiments.claims.study import Setting
from minilora.experiments.claims.uses import variants
from minilora.linear4bit import quantized_layers
from minilora.quant import QLORA, Quantization
from minilora.text.batches import Batches
from minilora.train import evaluate_loss


def of(**losses: float) -> dict:
    """One seed's records: arms whose names are no Python names are given with _ for what is none."""
    names = {"rslora_64": "rslora r=64", "lora_64": "lora r=64", "lora_plus": "lora+"}
    return {names.get(arm, arm): {"best_validation_loss": loss} for arm, loss in losses.items()}


def rule_of(name: str) -> Rule:
    return ledger.CLAIMS[name].rule


def plain_of(where: study.Study, arm: str, base, **plan) -> Setting:
    (scale,) = where.plans
    return Setting(base, replace(where.plans[scale], **plan), where.arms[arm], 1e-2, 3, progress=False)


# Variants


def test_rank_correlation_is_spearmans():
    order = "abcde"
    for places, rho in (((0, 1, 2, 3, 4), 1), ((4, 3, 2, 1, 0), -1), ((1, 0, 2, 3, 4), 0.9), ((2, 0, 1, 4, 3), 0.6)):
        found = orders.rank_correlation(order, dict(zip(order, places, strict=True)))
        assert found == pytest.approx(rho), f"values {places} of a to e: expected {rho}, got {found}"


def test_the_order_that_is_tested_is_that_of_the_stored_runs_on_dialect():
    runs = ledger.reported(variants.DIALECT, "tiny")
    mean = {arm: statistics.mean(run["best_validation_loss"] for run in runs[arm].values()) for arm in runs}
    assert list(orders.DIALECT_ORDER) == sorted(orders.DIALECT_ORDER, key=mean.__getitem__)


def test_the_rules_on_the_variants_count_what_they_say():
    runs = of(rslora_64=0.66, eva=0.7, lora_64=0.75, lora_plus=0.8, dora=0.9, lora=1.0, pissa=1.2)
    assert rule_of("again-order").number(runs) == 1 and rule_of("again-best").number(runs) == 0
    assert rule_of("again-gain").number(runs) == pytest.approx((30 + 20 + 10 - 20) / 4)
    assert rule_of("again-rslora").number(runs) == pytest.approx(12), "against LoRA of the same rank"
    assert rule_of("again-pissa").number(runs) == pytest.approx(-20)
    runs |= of(eva=0.6)
    assert rule_of("again-best").number(runs) == pytest.approx(10), "EVA is the lowest now"
    assert rule_of("again-order").number(runs) == pytest.approx(1 - 6 * 2 / (7 * 48))


def test_every_arm_trains_as_its_name_says(monkeypatch, base_folder, make_experiment):
    """The seed, the decay and the dropout reach the run."""
    seen = {}
    history = SimpleNamespace(best_validation_loss=1.0, validation_loss=[[0, 2.0], [9, 1.0], [10, 1.5]])

    def run(experiment, **more):
        seen.update(decay=experiment.training.weight_decay, seed=experiment.training.seed, **vars(experiment.lora))
        return SimpleNamespace(model=base_folder.load(), history=history)

    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(Setting, "dataset", lambda setting: make_experiment().dataset)
    monkeypatch.setattr(orders, "share_right", lambda *asked: 0.25)
    expected = {
        "lora": (0, 3, 0),
        "lora again": (0, 103, 0),
        "dropout 0.1": (0, 3, 0.1),
        "weight decay 0.1": (0.1, 3, 0),
    }
    for arm, values in expected.items():
        orders.measure(plain_of(orders.JSON, arm, base_folder))
        assert (seen["decay"], seen["seed"], seen["lora_dropout"]) == values, f"{arm}: {seen}"
    record = orders.few_examples(plain_of(orders.FEW, "weight decay 1", base_folder))
    assert seen["decay"] == 1 and record["scores"] == {"task": 0.25}
    assert record["last_validation_loss"] == 1.5, "the loss at the end, and not the lowest"
    data = make_experiment().dataset.validation
    record = orders.measure(plain_of(orders.JSON, "base", base_folder))
    assert record["best_validation_loss"] == pytest.approx(evaluate_loss(base_folder.load(), data, 4, "float32"))


def test_few_examples_are_others_for_each_seed_and_held_out_ones_the_same(monkeypatch, base_folder):
    trained, validated, asked = [], [], []

    def train(setting, data, **training):
        trained.append(data.train.input_ids)
        validated.append(data.validation.input_ids)
        history = SimpleNamespace(best_validation_loss=1.0, validation_loss=[[60, 1.0]])
        return SimpleNamespace(model=None, history=history)

    monkeypatch.setattr(Setting, "train", train)
    monkeypatch.setattr(orders, "share_right", lambda model, tokenizer, task, examples: asked.append(examples) or 0.5)
    for seed in (0, 1):
        orders.few_examples(replace(plain_of(orders.FEW, "lora", base_folder), seed=seed))
    assert [len(rows) for rows in trained] == [25, 25] and [len(rows) for rows in validated] == [200, 200]
    assert not torch.equal(*trained), "both seeds learn the same examples"
    assert torch.equal(*validated) and asked[0] == asked[1] and len(asked[0]) == 200, "what is held out differs by seed"


# Bases in few bits


def test_eigenvalues_give_the_start_that_an_svd_gives():
    """For wide and for tall weights; signs of the directions are free, their product is not."""
    for shape in ((24, 40), (40, 24)):
        W = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (A, B), (A_svd, B_svd) = (start(W, 4, 2.0) for start in (bits_runs.best_of_rank, pissa))
        assert A.shape == A_svd.shape and torch.allclose(B @ A, B_svd @ A_svd, atol=1e-5)
        assert torch.allclose(A.norm(dim=1), A_svd.norm(dim=1), atol=1e-5), "A and B share the singular values evenly"
        errors = [loftq(W, 4, 2.0, QLORA, best_of_rank=start)[-1] for start in (bits_runs.best_of_rank, pissa)]
        assert errors[0] == pytest.approx(errors[1], abs=1e-4) and errors[0][-1] < errors[0][0]
    asked: list = []
    loftq(W, 4, 2.0, best_of_rank=lambda *which: asked.append(which) or pissa(*which))
    assert len(asked) == 5, "LoftQ asks for the decomposition that it is given, once a round"


@pytest.fixture
def text(monkeypatch, make_experiment):
    """Random tokens in place of every study's data."""
    data = replace(make_experiment().dataset, training={"batch_size": 4})
    monkeypatch.setattr(bits_runs, "data_of", lambda setting: data)
    return data


def in_bits(base, arm: str, steps=2) -> Setting:
    return plain_of(bits.DIALECT, arm, base, steps=steps)


@pytest.mark.parametrize("arm", [arm for arm in bits.DIALECT.arms if arm != "loftq"])
def test_a_base_rounded_once_is_the_base_that_qlora_keeps_in_codes(base_folder, text, arm):
    """Before training, and so after: the floats are the same, and only they are."""
    quantization = {
        "floats": None,
        "nf4": QLORA,
        "int4": Quantization("int4"),
        "fp4": Quantization("fp4"),
        "nf4, plain scales": Quantization(double_quant=False),
        "nf4, block 32": Quantization(block_size=32),
        "nf4, block 256": Quantization(block_size=256),
    }[arm]
    model, kept = bits_runs.adapted(in_bits(base_folder, arm)), base_folder.load(quantization)
    assert not quantized_layers(model) and bool(quantized_layers(kept)) == (quantization is not None)
    ids = text.validation.input_ids
    with torch.no_grad():
        assert torch.allclose(model.eval()(ids), kept.eval()(ids), atol=1e-6), f"{arm} is not {quantization}"


def test_arms_differ_in_their_base_alone(base_folder, text):
    """Of one seed, A starts the same in all of them, and another seed's A is another; what is trained is A and B."""
    starts = []
    for arm, seed in (("floats", 3), ("fp4", 3), ("fp4", 4)):
        torch.manual_seed(seed)
        model = bits_runs.adapted(in_bits(base_folder, arm))
        assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {
            "lora_A",
            "lora_B",
        }
        starts.append(torch.cat([layer.lora_A.flatten() for _, layer in lora_layers(model)]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    first, again = (bits_runs.measure(in_bits(base_folder, "nf4")) for _ in range(2))
    assert first == again and [step for step, _ in first["validation_loss"]] == [0, 2]


def test_the_seed_decides_how_A_starts_and_which_rows_are_drawn(base_folder, text, monkeypatch):
    seen = []

    def train(model, rows, config, *more, **settings):
        seen.append((config.seed, next(layer for _, layer in lora_layers(model)).lora_A.detach().clone()))
        return SimpleNamespace(best_validation_loss=1.0, validation_loss=[])

    monkeypatch.setattr(bits_runs, "train", train)
    for seed in (3, 4):
        bits_runs.measure(replace(in_bits(base_folder, "nf4"), seed=seed))
    assert [seed for seed, _ in seen] == [3, 4], "the run's seed is not the setting's"
    assert not torch.equal(seen[0][1], seen[1][1]), "A starts the same for both seeds"


def test_loftqs_start_is_nearer_to_the_floats_than_rounding_alone(base_folder):
    bits_runs.loftq_start.cache_clear()
    original = dict(base_folder.load().named_parameters())
    rounded = dict(lora_layers(bits_runs.adapted(in_bits(base_folder, "nf4"))))
    for name, layer in lora_layers(bits_runs.adapted(in_bits(base_folder, "loftq"))):
        W = original[f"{name}.weight"]
        with torch.no_grad():
            error = (layer.base_layer.weight + layer.delta_weight() - W).norm() / W.norm()
            alone = (rounded[name].base_layer.weight - W).norm() / W.norm()
        assert error < 0.8 * alone, f"{name}: {error:.3f} with A and B of LoftQ, {alone:.3f} without"
        assert not torch.equal(layer.base_layer.weight, W), "the base itself is rounded"


def test_the_rules_on_bits_count_what_they_say():
    runs = of(nf4=0.9, int4=1.0, fp4=1.2)
    assert rule_of("bits-levels").number(runs) == pytest.approx(10), "below the better of the two others"
    assert rule_of("bits-levels").number(runs | of(nf4=1.1)) == pytest.approx(-10)
    runs = {"nf4": {"validation_loss": [[0, 3.2], [30, 2.55]]}, "floats": {"validation_loss": [[0, 3.0], [30, 2.5]]}}
    assert rule_of("bits-recovered").number(runs) == pytest.approx(25)


def test_what_is_held_out_of_the_english_text_is_not_trained_on(monkeypatch, tokenizer):
    def rows(tokenizer, settings):
        ids = torch.arange(settings.text_rows * settings.text_length).view(settings.text_rows, -1)
        return Batches(ids, ids)

    monkeypatch.setattr(bits_runs, "english_rows", rows)
    data = bits_runs.english(tokenizer)
    assert not set(data.train.input_ids.unique().tolist()) & set(data.validation.input_ids.unique().tolist())
    assert data.validation.input_ids.shape == (64, 128) and len(data.train) == 336
    bits_runs.english.cache_clear()


# Figures


def test_the_figures_show_every_arm_beside_the_one_it_is_held_against():
    losses = {"lora": [1.0, 1.2, 1.1], "dora": [0.9, 1.1, 1.0], "rslora r=64": [0.5, 0.6, 0.5], "base": [9.0] * 3}
    runs = {arm: {s: {"last": loss} for s, loss in enumerate(of_arm)} for arm, of_arm in losses.items()}
    (axes,) = orders_figures.gains("last", "lora")("made up", runs).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["DoRA", "rslora r=64"]
    assert [text.get_text() for text in axes.texts] == ["+9.1", "+51.5"]

    def curve(before: float, after: float) -> dict:
        return {seed: {"validation_loss": [[0, before], [30, after + seed / 100]]} for seed in range(3)}

    runs = {"floats": curve(3.0, 2.5), "nf4": curve(3.2, 2.54), "int4": curve(3.4, 2.6)}
    (axes,) = bits_runs.above_floats("made up", runs).axes
    assert [text.get_text() for text in axes.texts] == ["+0.200", "+0.400", "+0.040", "+0.100"]


def test_a_study_that_is_half_run_is_drawn(base_folder):
    """Before the arm has runs that the others are held against, and where it has other seeds than one of them."""
    record = {"last": 1.0, "validation_loss": [[0, 2.0], [9, 1.0]]}
    half = {"lora": {0: record}, "floats": {0: record}, "dora": {0: record, 1: record}, "nf4": {1: record}}
    for draw, than in ((orders_figures.gains("last", "lora"), "lora"), (bits_runs.above_floats, "floats")):
        for runs in (half, {arm: of_arm for arm, of_arm in half.items() if arm != than}):
            (axes,) = draw("half", runs).axes
            assert "nf4" not in [tick.get_text() for tick in axes.get_yticklabels()]
