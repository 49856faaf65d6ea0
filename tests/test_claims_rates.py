"""The claims on rate, batch and scale: a best rate is read off a curve, the rules can say no, a run is what it says."""

import math
from types import SimpleNamespace

import pytest
import torch

from minilora.adapters.inject import apply_lora, lora_layers
from minilora.adapters.variants import freeze_A
from minilora.config import LoRAConfig
from minilora.experiments.claims import study
from minilora.experiments.claims.knobs import rates, rates_runs, rates_studies
from minilora.experiments.claims.knobs.rates_runs import best_rate, bracketed, share_needed
from minilora.experiments.claims.study import BASES, Setting
from minilora.experiments.run import open_base
from minilora.text.batches import Batches
from minilora.train import train
from minilora.train_settings import NonFiniteError, TrainConfig

# A curve and its lowest point


@pytest.mark.parametrize("best", [1e-4, 0.006, 0.0061, 0.02, 0.5])
def test_a_curve_goes_on_until_its_lowest_point_has_higher_neighbours(best):
    found = bracketed(lambda rate: 1 + abs(math.log2(rate / best)), 0.001)
    rates = [rate for rate, _ in found]
    assert len(rates) >= 4 and {0.001, 0.002, 0.004, 0.008} <= set(rates)
    assert all(high == pytest.approx(2 * low) for low, high in zip(rates, rates[1:], strict=False)), "no gap"
    lowest = min(found, key=lambda point: point[1])[0]
    assert rates[0] < lowest < rates[-1] and max(lowest / best, best / lowest) < 2**0.5 + 1e-9
    assert rates[0] >= min(0.001, 0.49 * lowest) and rates[-1] <= max(0.008, 2.01 * lowest), "no further than needed"


def test_where_every_run_diverges_lower_rates_are_tried():
    found = bracketed(lambda rate: None if rate > 3e-4 else 1 + abs(math.log2(rate / 2e-4)), 0.001)
    assert [loss is None for _, loss in found][-5:] == [True] * 5
    assert best_rate(found) < 3e-4


@pytest.mark.parametrize("best", [0.0029, 0.004, 0.0055])
@pytest.mark.parametrize("times", [1, 5])
def test_the_best_rate_is_a_parabolas_lowest_point_and_not_one_of_the_grids(best, times):
    """In the logarithms of both: to multiply the losses, or to widen the curve, moves nothing."""
    curve = [(rate, times * math.exp(times * math.log(rate / best) ** 2)) for rate in (0.002, 0.004, 0.008, 0.016)]
    assert best_rate(curve) == pytest.approx(best)


def test_a_run_that_diverged_counts_as_the_highest_loss():
    curve = [(0.001, 2.0), (0.002, 1.0), (0.004, None)]
    assert best_rate(curve) == best_rate([*curve[:2], (0.004, 2.0)]) == pytest.approx(0.002)


def test_the_share_of_a_run_is_read_between_two_evaluations_over_the_logarithm_of_the_loss():
    run = {"validation_loss": [[0, 8.0], [50, 2.0], [100, 0.5]]}
    assert [share_needed(run, level) for level in (8, 4, 2, 1, 0.5, 0.4)] == pytest.approx([0, 25, 50, 75, 100, 100])
    assert share_needed({"validation_loss": [[0, 8.0], [50, 2.0], [100, 4.0]]}, 3) < 50, "the first time"
    assert share_needed(run, 9) == 0, "it was there before the first step"


# The rules


def at(rate: float, loss: float = 1.0, along=((0, 4.0), (12, 1.0))) -> dict:
    """A record whose best rate is `rate`."""
    points = [(rate / 2, 2 * loss), (rate, loss), (2 * rate, 2 * loss)]
    return {"curve": points, "best_validation_loss": loss, "validation_loss": along}


def said(name: str, **records) -> tuple[str, float]:
    claim = next(claim for claim in rates.CLAIMS if claim.name == name)
    found = claim.rule.decide({arm: dict.fromkeys(range(3), records[arm]) for arm in claim.rule.arms})
    return found.verdict, pytest.approx(found.number)


def test_ratios_of_best_rates():
    for ratio, higher, ten in ((1, "fails", "fails"), (3, "holds", "fails"), (10, "holds", "holds")):
        arms = {"full": at(0.001), "r=8": at(0.001 * ratio)}
        assert said("rate-higher", **arms) == (higher, ratio) and said("rate-ten", **arms) == (ten, ratio)
    assert rates.times("r=8", "full", 5).decide({"r=8": {0: at(3), 1: at(3)}, "full": {0: at(1), 1: at(1)}}).text() == (
        "3.0 times (3.0 to 3.0)"
    )


@pytest.mark.parametrize(
    "name, low, high",
    [
        ("rate-any-rank", "r=1", "r=64"),
        ("rate-alpha-2r", "r=1, alpha 2", "r=64, alpha 128"),
        ("rate-rslora", "r=1", "r=64, alpha 128"),
    ],
)
def test_a_rate_moves_with_the_rank_either_way(name, low, high):
    for factor, verdict in ((1, "holds"), (1.5, "holds"), (3, "fails")):
        assert said(name, **{low: at(0.01), high: at(0.01 * factor)}) == (verdict, factor)
        assert said(name, **{high: at(0.01), low: at(0.01 * factor)}) == (verdict, factor), "a factor has no direction"


def test_the_scales_of_the_arms_are_those_of_the_three_laws():
    def scale(arm, rslora=False):
        config = {"r": 8, "lora_alpha": 16} | rates_studies.DIALECT.arms[arm].lora
        return config["lora_alpha"] / config["r"] ** (0.5 if rslora else 1)

    assert scale("r=1, alpha 2") == scale("r=8") == scale("r=64, alpha 128") == 2, "alpha = 2r"
    assert (scale("r=1"), scale("r=64")) == (16, 0.25), "alpha is 16"
    for r, arm in ((1, "r=1"), (64, "r=64, alpha 128")):
        assert scale(arm) == 16 / r**0.5, "alpha/√r of rsLoRA with alpha 16"
    assert {
        arm: rates_studies.DIALECT.arms[arm].lora.get("lora_alpha", 16) for arm in rates_studies.ALPHAS
    } == rates_studies.ALPHAS


def test_the_ratio_in_short_runs_over_that_in_longer_ones():
    arms = {f"{name}, {steps} steps": at(0.001) for name in ("full", "r=8") for steps in (25, 200)}
    assert said("rate-short", **arms) == ("fails", 1)
    assert said("rate-short", **arms | {"r=8, 25 steps": at(0.002)}) == ("holds", 2)
    assert said("rate-short", **arms | {"full, 25 steps": at(0.002)}) == ("fails", 0.5)
    assert said("rate-short", **arms | {"full, 200 steps": at(0.002)}) == ("holds", 2)


def test_the_law_of_the_product_has_the_exponent_one():
    for power, verdict in ((1, "holds"), (0.5, "fails"), (0, "fails")):
        arms = {arm: at(0.1 * alpha**-power) for arm, alpha in rates_studies.ALPHAS.items()}
        assert said("alpha-is-rate", **arms) == (verdict, 100 * power)
    even = {arm: at(0.01) for arm in rates_studies.ALPHAS}
    for arm in rates_studies.ALPHAS:
        for loss, verdict, spread in ((1.05, "holds", 5), (1.25, "fails", 25)):
            for name in ("alpha-free", "same-product"):
                assert said(name, **even | {arm: at(0.01, loss)}) == (verdict, spread)


def test_who_lies_further_behind_in_large_batches():
    """Full fine-tuning goes from 4 to 1 in its run: where LoRA ends at 2, half of the run is needed."""
    arms = {f"{method}, {name}": at(0.01) for method in ("full", "lora")
            for name in ("batch 16", "batch 256", "batch 16, few steps")}  # fmt: skip
    assert said("batch-lora", **arms) == ("fails", 0)
    assert said("batch-lora", **arms | {"lora, batch 256": at(0.01, 2)}) == ("holds", 50)
    assert said("batch-lora", **arms | {"lora, batch 16": at(0.01, 2)}) == ("fails", -50)
    both = {"lora, batch 256": at(0.01, 2), "lora, batch 16, few steps": at(0.01, 2)}
    assert said("batch-steps", **arms | both) == ("fails", 0), "as few steps of 16 lie as far behind"
    assert said("batch-rate", **arms | {"lora, batch 256": at(0.04)}) == ("holds", 4)


def test_batches_see_as_many_examples():
    for name, arm in rates_studies.BATCHES.arms.items():
        training, few = arm.settings["training"], name.endswith("few steps")
        assert training["steps"] == rates_studies.EXAMPLES // (256 if few else training["batch_size"]), name


# A run


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


def test_a_curve_is_trained_as_the_arm_says(base, monkeypatch):
    """Which runs are made: their method, rank, steps and batch; the losses are made up, the best rate is 0.02."""
    seen = []

    def run(experiment, **more):
        training = experiment.training
        seen.append((experiment.method, experiment.lora.r, experiment.lora.lora_alpha, training))
        if training.learning_rate > 0.03:
            raise NonFiniteError("diverged")
        loss = 1 + abs(math.log2(training.learning_rate / 0.02))
        return SimpleNamespace(history=SimpleNamespace(validation_loss=[[0, 5.0], [training.steps, loss]]))

    monkeypatch.setattr(study, "run", run)
    for where, arm, (method, r, alpha, steps, batch, every) in (
        (rates_studies.DIALECT, "full", ("full", 8, 16, 100, 16, 100)),
        (rates_studies.DIALECT, "r=64, alpha 128", ("lora", 64, 128, 100, 16, 100)),
        (rates_studies.LENGTHS, "r=8, 25 steps", ("lora", 8, 16, 25, 16, 25)),
        (rates_studies.BATCHES, "lora, batch 256", ("lora", 8, 16, 12, 256, 1)),
        (rates_studies.BATCHES, "full, batch 16", ("full", 8, 16, 192, 16, 16)),
    ):
        seen.clear()
        record = rates_runs.curve(Setting(base, where.plans["tiny"], where.arms[arm], None, 7, progress=False))
        assert {each[:3] for each in seen} == {(method, r, alpha)}
        trained = seen[0][3]
        assert (trained.steps, trained.batch_size, trained.eval_every, trained.seed) == (steps, batch, every, 7)
        assert [rate for rate, _ in record["curve"]] == sorted(each[3].learning_rate for each in seen)
        assert record["alpha"] == alpha and record["validation_loss"][0] == [0, 5.0]
        lowest = min(loss for _, loss in record["curve"] if loss is not None)
        assert record["best_validation_loss"] == pytest.approx(lowest, abs=1e-4) and lowest < 1.5
        assert all((loss is None) == (rate > 0.03) for rate, loss in record["curve"])
        assert record["scores"]["best rate, thousandths"] == pytest.approx(1000 * best_rate(record["curve"]), rel=1e-3)


def test_runs_of_one_product_differ_in_how_it_is_split(base, monkeypatch):
    seen = []

    def run(experiment, **more):
        seen.append((experiment.lora.lora_alpha, experiment.training.learning_rate))
        return SimpleNamespace(history=SimpleNamespace(validation_loss=[[0, 5.0], [5, 0.5], [100, 1.0]]))

    monkeypatch.setattr(study, "run", run)
    for arm in rates_studies.SAME_PRODUCT.arms.values():
        plan = rates_studies.SAME_PRODUCT.plans["tiny"]
        record = rates_runs.at_one_rate(Setting(base, plan, arm, None, 7, progress=False))
        assert record["best_validation_loss"] == 1.0, "the last, and not the lowest along the run"
        assert record["alpha"] == seen[-1][0]
    assert [alpha for alpha, _ in seen] == [2, 16, 128, 1024]
    assert {alpha * rate for alpha, rate in seen} == {rates_studies.PRODUCT}


def test_with_A_frozen_only_the_product_of_alpha_and_rate_counts(base):
    """Adam's step does not see the gradient's scale: four times alpha at a quarter of the rate is the same run.

    It is not where A learns too, whose steps are then a quarter.
    """
    data = study.dataset("dialect", base)
    rows = Batches(data.train.input_ids[:2], data.train.labels[:2])
    updates = {}
    for frozen in (True, False):
        for alpha, rate in ((16, 0.04), (64, 0.01)):
            model = base.load()
            torch.manual_seed(0)
            apply_lora(model, LoRAConfig(r=1, lora_alpha=alpha, target_modules="all-linear"))
            if frozen:
                freeze_A(model)
            train(model, rows, TrainConfig(3, 2, rate, max_grad_norm=math.inf), progress=False)
            updates[frozen, alpha] = torch.cat([layer.delta_weight().flatten() for _, layer in lora_layers(model)])
    apart = {frozen: (updates[frozen, 16] - updates[frozen, 64]).norm() / updates[frozen, 16].norm()
             for frozen in (True, False)}  # fmt: skip
    assert apart[True] < 0.01 < 0.1 < apart[False], f"how far the updates are apart: {apart}"


@pytest.mark.parametrize("claim", rates.CLAIMS, ids=lambda claim: claim.name)
def test_every_claim_is_drawn(claim):
    """With all arms of the study, and with those of the rule."""
    where = claim.studies[0]
    for arms in (where.arms, claim.rule.arms):
        runs = {arm: {seed: at(0.01, along=[[0, 4.0], [12, 1.0]]) | {"alpha": rates_studies.ALPHAS.get(arm, 16)}
                      for seed in range(2)} for arm in arms}  # fmt: skip
        draw = claim.figure if claim.figure and arms is claim.rule.arms else where.figure
        figure = draw("a title", runs)
        assert figure.axes and figure.axes[0].get_title() and figure.axes[0].get_xlabel()
