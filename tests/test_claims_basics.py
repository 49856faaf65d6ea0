"""What the first notebooks measured, as claims: counts that are exact, ΔW in pieces, rounding, sums, merging."""

import math
from dataclasses import replace

import pytest
import torch

from minilora.adapters.inject import lora_layers
from minilora.experiments.claims import ledger, study
from minilora.experiments.claims.bars import bars
from minilora.experiments.claims.claim import quantity
from minilora.experiments.claims.study import BASES, Plan, Setting
from minilora.experiments.claims.uses import basics, combining, costs, speed
from minilora.experiments.run import open_base
from minilora.linear4bit import quantized_layers
from minilora.text.batches import Batches


@pytest.fixture(scope="module")
def base():
    return open_base(BASES["tiny"])


def setting_of(base, where: study.Study, arm: str, rate=None, scale="tiny", **plan) -> Setting:
    return Setting(base, replace(where.plans[scale], **plan), where.arms[arm], rate, 0, progress=False)


def few_rows(data: study.Dataset, rows: int) -> study.Dataset:
    """The data with less to validate on."""
    held_out = Batches(data.validation.input_ids[:rows], data.validation.labels[:rows])
    task = data.task and replace(data.task, validation=data.task.validation[:rows])
    return replace(data, validation=held_out, task=task)


# Exact numbers


def test_one_run_decides_an_exact_number():
    rule = quantity("counted", "share", "a share", 1, above=False, exact=True)
    for value, verdict in ((0.5, "holds"), (2.0, "fails"), (1.0, "open")):
        found = rule.decide({"counted": {0: {"scores": {"share": value}}}})
        assert (found.verdict, found.seeds, found.low, found.high) == (verdict, 1, value, value)
        assert found.text().endswith("%, exact")
    assert rule.words.startswith("an exact number: holds if it lies below 1 %")
    with pytest.raises(ValueError, match="from 2 to"):
        quantity("counted", "share", "a share", 1).decide({"counted": {0: {"scores": {"share": 0.5}}}})


@pytest.mark.parametrize(
    "scale, arm, trained, total",
    [
        ("tiny", "all linears", 162_816, 3_114_432),
        ("large", "q, v", 4_194_304, 6_742_609_920),
        ("large", "all linears", 19_988_480, 6_758_404_096),
        ("large", "full", 6_738_415_616, 6_738_415_616),
    ],
)
def test_the_parameters_are_those_that_peft_counts(base, scale, arm, trained, total):
    record = costs.share_trained(setting_of(base, costs.SHARE, arm, scale=scale))
    assert (record["trained"], record["total"]) == (trained, total)
    assert record["scores"]["trained, %"] == pytest.approx(100 * trained / total)


def test_bytes_of_files_are_those_of_their_tensors(base):
    """The count that stands for a file too large to write, beside files that are written."""
    for arm, width in (("full", 4), ("q, v, r=4", 4), ("all linears, r=8", 4)):
        written = costs.saved_bytes(setting_of(base, costs.SIZE, arm))["bytes"]
        counted = costs.saved_bytes(setting_of(base, costs.SIZE, arm, settings={"tensors": True}))["bytes"]
        counted *= width / (2 if arm == "full" else 4)  # the shipped base is in float32
        assert counted < written < 1.1 * counted, f"{arm}: {written} bytes in files, {counted} in tensors"


def test_a_step_at_7b_is_simulated_as_planned(base):
    plan = costs.KEPT.plans["large"]
    assert plan.settings["step"] == {"dtype": "bfloat16", "batch_size": 1, "sequence_length": 2048}
    assert costs.CHECKPOINTED.plans["large"].settings["step"]["gradient_checkpointing"]
    record = costs.bytes_of_a_step(setting_of(base, costs.CHECKPOINTED, "lora"))
    assert "LoRA r=8 on all-linear, batch 16 x 80 tokens (36 counted)" in record["step"]
    assert "checkpointing" in record["step"]
    assert (
        record["scores"]["peak, GB"] < costs.bytes_of_a_step(setting_of(base, costs.KEPT, "lora"))["scores"]["peak, GB"]
    )


def test_the_rules_on_counts_are_about_the_arm_that_they_name():
    """Each arm has a number of its own, so that no other arm could give the same answer."""
    peaks = {"full": 40.0, "lora": 10.0, "qlora": 2.0}
    peak = {name: {"scores": {"peak, GB": peak}} for name, peak in peaks.items()}
    share = {
        name: {"scores": {"trained, %": value}} for name, value in (("full", 100), ("q, v", 1), ("all linears", 3))
    }
    size = {name: {"bytes": value} for name, value in (("full", 600), ("q, v, r=4", 2), ("all linears, r=8", 6))}
    expected = {"share": (share, 3), "memory": (peak, 25), "qlora-65b": (peak, 2e9 / 2**30), "size": (size, 300)}
    assert list(expected) == [claim.name for claim in costs.CLAIMS]
    for name, (runs, number) in expected.items():
        found = ledger.CLAIMS[name].rule.number(runs)
        assert found == pytest.approx(number), f"{name}: expected {number}, got {found}"


# ΔW


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_the_pieces_of_a_matrix_are_those_of_its_svd(shape):
    torch.manual_seed(0)
    change = torch.randn(shape) @ torch.diag(torch.linspace(2, 0.1, shape[1]))
    energies, L, R = basics.directions(change)
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    assert torch.allclose(energies.float(), S.square(), rtol=1e-4)
    for rank in (0, 1, 5, min(shape)):
        nearest = U[:, :rank] * S[:rank] @ Vh[:rank]
        assert torch.allclose(L[:, :rank] @ R[:rank], nearest, atol=1e-4), f"not the nearest of rank {rank}"


def test_what_is_kept_goes_from_the_base_to_the_trained_model(base, monkeypatch):
    monkeypatch.setattr(study, "dataset", lambda name, base: few_rows(study.load_dataset(name, base.tokenizer), 4))
    found, energies = basics.directions, torch.tensor([8.0, *[1.0] * 8, *[0.0] * 55])
    monkeypatch.setattr(basics, "directions", lambda change: (energies, *found(change)[1:]))
    record = basics.cut_to_ranks(setting_of(base, basics.RANK[0], "full", 1e-3, steps=1))
    scores = record["scores"]
    assert scores["kept at 64"] == pytest.approx(1, abs=0.02), (
        "64 directions are nearly all, and all is the trained model"
    )
    assert scores["kept at 0"] < scores["kept at 8"] < 1.02
    shares = [0, 8 / 16, 9 / 16, 11 / 16, 15 / 16, 1, 1, 1]
    assert record["energy_by_rank"] == shares, "shares of the sum of σ², from rank 0 on"
    assert (scores["energy at 8"], scores["rank for 90 %"]) == (15 / 16, 8)
    assert dict(record["loss_by_rank"])[64] == pytest.approx(record["validation_loss"][-1][1], abs=0.02)


def test_what_a_cut_costs_is_a_rise_of_the_loss():
    run = {"validation_loss": [[0, 5.0], [9, 0.25]], "loss_by_rank": [[0, 4.0], [8, 0.75], [64, 0.3]]}
    assert basics.rise_at_8({"full": run}) == 0.5


# Four bits


def test_rounding_costs_nothing_where_nothing_is_rounded(base, monkeypatch):
    rows = torch.randint(3, 3000, (4, 32), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(basics, "text_rows", lambda setting: Batches(rows, rows))
    cost = {arm: basics.cost_of_rounding(setting_of(base, basics.ROUNDING, arm)) for arm in basics.SCHEMES}
    assert cost["floats"]["scores"] == {"KL": 0.0, "rise": 0.0} and cost["floats"]["tokens"] == 4 * 31
    assert all(0 < cost[scheme]["scores"]["KL"] < 1 for scheme in ("nf4", "int4", "fp4"))


def test_nf4_is_held_against_the_better_of_the_others():
    def runs(nf4, int4, fp4):
        costs = {"floats": 0.0, "nf4": nf4, "int4": int4, "fp4": fp4}
        return {
            name: {seed: {"scores": {"KL": kl * (1 + seed / 100)}} for seed in range(3)} for name, kl in costs.items()
        }

    rule = ledger.CLAIMS["nf4"].rule
    assert rule.decide(runs(1, 2, 4)).number == pytest.approx(50) and rule.decide(runs(1, 2, 4)).verdict == "holds"
    assert rule.decide(runs(1, 4, 0.5)).verdict == "fails" and rule.decide(runs(1, 1, 1)).verdict == "fails"


def test_each_seed_is_another_text(base):
    rows = [
        basics.text_rows(replace(setting_of(base, basics.ROUNDING, "nf4"), seed=seed)).input_ids for seed in (0, 0, 1)
    ]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0][:3], rows[2][:3])


# Merging and sums


def test_merging_into_floats_loses_nothing_and_rounding_does(base, monkeypatch):
    monkeypatch.setattr(study, "dataset", lambda name, base: few_rows(study.load_dataset(name, base.tokenizer), 4))
    monkeypatch.setattr(combining, "score_task", lambda *_: type("Scored", (), {"score": 0.5}))
    states, evaluate = [], combining.loss_of

    def watched(model, *settings):
        states.append((all(layer.merged for _, layer in lora_layers(model)), bool(quantized_layers(model))))
        return evaluate(model, *settings)

    monkeypatch.setattr(combining, "loss_of", watched)
    record = combining.merged_losses(setting_of(base, combining.MERGE, "qlora", 1e-2, steps=2))
    assert states == [(False, True), (True, False), (True, True)], "(merged, in 4 bits): apart, merged, rounded again"
    assert record["losses"]["apart"] == pytest.approx(record["validation_loss"][-1][1], rel=1e-4)
    assert abs(record["scores"]["lost, merged %"]) < 0.1 and record["losses"]["rounded"] != record["losses"]["merged"]
    gain = record["validation_loss"][0][1] - record["losses"]["apart"]
    lost = 100 * (record["losses"]["rounded"] - record["losses"]["apart"]) / gain
    assert record["scores"]["lost, rounded %"] == pytest.approx(lost)


def test_a_sum_is_judged_by_the_task_that_suffers_more():
    scores = {"json alone": 1.0, "pirate alone": 0.8, "json, 1 + 1": 0.9, "pirate, 1 + 1": 0.4}
    assert combining.left_of_the_worse({"lora": {"scores": scores}}) == pytest.approx(50)


# Time


class HandClock:
    """A clock that only the actions move: the n-th call of one takes the n-th of its seconds, the first to warm up."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def action(self, *seconds: float):
        left = iter(seconds)

        def act(*_):
            self.now += next(left)

        return act


def test_times_are_the_median_over_the_first_in_percent(monkeypatch):
    """Of three rounds, a fast and a slow one do not count."""
    clock = HandClock(monkeypatch)
    actions = {"first": clock.action(50, 2, 2, 2), "other": clock.action(90, 2, 20, 6)}
    assert speed.percent(actions, 3) == {"other": 300.0}


def test_milliseconds_are_the_median_after_a_warm_up(monkeypatch):
    assert speed.median_ms(HandClock(monkeypatch).action(50, 2, 20, 6), 3) == 6000


def test_a_step_is_the_median_of_its_rounds(base, monkeypatch):
    monkeypatch.setattr(speed, "step_of", lambda *_: None)
    rounds = {name: [1.0, 10.0, 3.0] for name in ("q, v", "all linears", "qlora")}
    monkeypatch.setattr(speed, "ratios_in_turn", lambda *_: rounds)
    scores = speed.time_of_a_step(setting_of(base, speed.SPEED[0], "steps"))["scores"]
    assert scores == dict.fromkeys(rounds, 300.0)


def test_the_slower_of_two_bases_decides_how_fast_a_switch_is():
    runs = {name: {"scores": {"switch, ms": ms}} for name, ms in (("base", 2.0), ("wide", 3.0))}
    assert speed.slower_switch(runs) == 3.0


# Figures


def test_bars_show_the_mean_and_every_seed():
    runs = {arm: {seed: {"scores": {"a": seed + 1.0, "b": 2.0}} for seed in range(3)} for arm in ("lora", "qlora")}
    figure = bars(["a", "b"], "percent", 1.5)("a title", runs)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["2"] * 4 and axes.get_xlabel() == "percent"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["LoRA", "QLoRA"]
    dots = [dot for dots in axes.collections for dot in dots.get_offsets().tolist()] if axes.collections else []
    assert any(math.isclose(x, 3.0) for x, _ in dots), "each seed is a dot"


class Anything(dict):
    """Scores, whatever they are called."""

    __contains__ = __missing__ = lambda self, name: 1.0  # type: ignore[assignment]


@pytest.mark.parametrize("family", [basics, combining, costs, speed])
def test_a_bar_that_is_drawn_is_one_that_decides(family):
    studies = {where for claim in family.CLAIMS for where in claim.studies if where not in basics.RANK}
    for where in studies:
        decides = {f"the rule's bar, {claim.rule.bar:g}" for claim in family.CLAIMS if where in claim.studies}
        figure = where.figure("a title", {arm: {seed: {"scores": Anything()} for seed in (0, 1)} for arm in where.arms})
        drawn = {line.get_label() for line in figure.axes[0].lines if "bar" in str(line.get_label())}
        assert drawn <= decides, f"{where.name}: {drawn}, and the rules say {decides}"
    words = combining.MERGE.figure("", {"lora": {0: {"scores": Anything()}}}).axes[0].get_xlabel()
    merged, rounded = (ledger.CLAIMS[name].rule.bar for name in ("merge", "merge-4bit"))
    assert f"(the rules' bars: merged {merged}, rounded {rounded})" in words


def test_the_figure_of_ranks_shows_both_bars_in_their_units():
    """With 5 nats gained, 0.05 nats above the trained model are 99 % of the gain."""
    scores = {f"kept at {rank}": 1.0 for rank in basics.RANKS}
    run = {"scores": scores, "energy_by_rank": [1.0] * 8, "validation_loss": [[0, 6.0], [9, 9.0], [18, 1.0]]}
    figure = basics.kept_by_rank("a title", {"full": {0: run, 1: run}})
    (axes,) = figure.axes
    heights = {line.get_label(): line.get_ydata()[0] for line in axes.lines if "bar" in str(line.get_label())}
    assert heights == pytest.approx({"low-rank's bar, 90 %": 90, "extract's bar, 0.05 nats": 99})
    (nats,) = axes.child_axes
    assert nats.get_ylabel() == "rise of the loss (nats)"
    figure.draw_without_rendering()  # places the right axis beside the left
    for share, rise in ((100, 0.0), (99, 0.05), (20, 4.0)):
        left, right = axes.transData.transform((0, share))[1], nats.transData.transform((0, rise))[1]
        assert right == pytest.approx(left), f"{share} % and {rise} nats should lie at one height"


def test_a_number_that_rounds_to_nothing_has_no_minus():
    runs = {"lora": {seed: {"scores": {"a": -1e-7}} for seed in range(3)}}
    assert [text.get_text() for text in bars(["a"], "percent")("a title", runs).axes[0].texts] == ["0"]


def test_the_variants_have_a_second_task_and_three_a_real_model():
    on = {name: [where.name for where in ledger.CLAIMS[name].studies] for name in ("as-full", "qlora", "dora", "pissa")}
    assert on["as-full"] == on["qlora"] == on["dora"] == ["dialect", "json", "orders"] and on["pissa"] == [
        "dialect",
        "json",
    ]
    assert isinstance(ledger.CLAIMS["dora"].studies[2].plans["smollm2"], Plan)
