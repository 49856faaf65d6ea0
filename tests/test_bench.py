"""The bench's machinery at a tiny shape, on a clock of its own: a test must not depend on a machine's mood."""

import os
from dataclasses import asdict, replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from minilora.adapters.inject import lora_layers
from minilora.experiments import bench, bench_rows, peers, timing
from minilora.experiments.bench import BenchSettings, format_bench, run_bench
from minilora.experiments.bench_rows import BenchRow

TINY = BenchSettings(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=64,
    batch_size=2,
    sequence_length=32,
    r=2,
    matrix_size=64,
    serving_rows=2,
    rounds=3,
    threads=1,
    progress=False,
)


FIRST = [50.0, 1.0, 2.0, 4.0]  # seconds of the warm-up and of three rounds
SECOND = [900.0, 3.0, 1.0, 8.0]
RATIOS = [3.0, 0.5, 2.0]


@pytest.fixture(scope="module")
def rows():
    return run_bench(TINY)


@pytest.fixture
def clock(monkeypatch):
    """In place of the `time` of what is timed in turn: it stands still but for what is added to `now`."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(timing, "time", clock)
    return clock


def timed(clock, seconds: list[float], products: int = 0):
    """An action that takes these seconds, one after the other, and multiplies 4 x 8 by 8 x 8 so many times."""
    x, W, times = torch.randn(4, 8), torch.randn(8, 8), iter(seconds)

    def action():
        for _ in range(products):
            x @ W
        clock.now += next(times)

    return action


def test_every_claim_has_a_row_with_a_median_between_its_extremes(rows):
    bars = {row.claim: row.bar for row in rows if row.bar is not None and "bitsandbytes" not in row.claim}
    assert list(bars.values()) == [0.72, 0.74, 0.90, 0.85, 1.10, 1.05, 1.25, 1.25, 1.8, 1.6, 1.1], bars
    assert len(rows) == 15 + 3 * bool(find_spec("bitsandbytes")) + 4 * peers.installed(), [row.claim for row in rows]
    for row in rows:
        assert 0 < row.lowest <= row.ratio <= row.highest, row


def test_the_arithmetic_of_a_lora_step_is_near_two_thirds_and_of_a_merged_forward_exactly_one(rows):
    ends = ("step, LoRA r=2 on q_proj, v_proj", "LoRA r=2 on all linears", "last third", "QLoRA r=2 on all linears")
    few, every, late, quantized = (next(row for row in rows if row.claim.endswith(end)) for end in ends)
    merged = next(row for row in rows if row.claim == "forward, LoRA merged")
    assert merged.arithmetic == 1.0
    # 64 tokens: QLoRA forms its floats with the update from 33 or 43 tokens on, as LoRA does.
    assert quantized.arithmetic == every.arithmetic, "a step of QLoRA multiplies as LoRA's does"
    assert late.arithmetic < 0.75 * every.arithmetic, "below the first adapter nothing is differentiated"
    # r / width is 1/16 here: the thin products weigh far more than at the shape of the claims.
    assert 0.55 < few.arithmetic < every.arithmetic < 1.0, (few, every)


def test_ratios_are_those_of_each_round_to_the_first_action_without_the_warm_up(clock):
    thrice = [3 * seconds for seconds in FIRST]
    actions = {name: timed(clock, seconds) for name, seconds in (("a", FIRST), ("b", SECOND), ("c", thrice))}
    ratios, _ = bench_rows.interleave(actions, TINY, "")
    upside_down, with_warm_up = [1 / ratio for ratio in RATIOS], [SECOND[0] / FIRST[0], *RATIOS]
    what = f"b's seconds over a's are {RATIOS} (upside down {upside_down}, with the warm-up {with_warm_up})"
    assert ratios["b"] == RATIOS, f"{what}, not {ratios['b']}"
    assert ratios == {"b": RATIOS, "c": [3.0] * 3}, f"all but a, each held against a: {ratios}"


def test_a_row_has_the_median_the_extremes_its_bar_and_its_arithmetic(clock):
    for counted, arithmetic in ((True, 2.0), (False, None)):
        actions = {"a": timed(clock, FIRST, 2), "b": timed(clock, SECOND, 4)}
        (row,) = bench_rows.measure(actions, TINY, {"b": 2.5}, counted)
        expected = dict(claim="b", ratio=2.0, lowest=0.5, highest=3.0, bar=2.5, arithmetic=arithmetic)
        for name, value in expected.items():
            found = asdict(row)[name]
            assert found == value, f"of the ratios {RATIOS}, counted {counted}: {name} is {value}, not {found}"
    actions = {"a": timed(clock, FIRST), "b": timed(clock, SECOND)}
    (row,) = bench_rows.measure(actions, TINY, {})
    assert (row.bar, row.arithmetic) == (None, None), f"without a bar and without products there is neither: {row}"


def test_arithmetic_is_the_ratio_of_what_each_action_multiplies_to_the_first(clock):
    counts = {"two": 2, "six": 6, "one": 1}
    actions = {name: timed(clock, FIRST, products) for name, products in counts.items()}
    _, arithmetic = bench_rows.interleave(actions, TINY, "")
    assert arithmetic == {"six": 3.0, "one": 0.5}, f"6 products over 2 are 3.0, 1 over 2 is 0.5, not {arithmetic}"


def test_a_step_of_lora_is_held_against_full_fine_tuning_and_dora_against_lora(clock, monkeypatch):
    """Here a step takes a second for each trainable parameter."""

    def step(model, *_):
        clock.now += sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    monkeypatch.setattr(bench, "training_step", step)
    full = sum(parameter.numel() for parameter in TINY.build_model().parameters())
    linears = [(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)]
    few = 2 * 2 * 2 * (32 + 32)  # layers, q and v, r
    every = 2 * sum(2 * (rows + columns) for rows, columns in linears)
    lengths = 2 * sum(rows for rows, _ in linears)  # DoRA's magnitudes
    shares = {"q_proj, v_proj": few, "on all linears": every, "0.05": every, "last third": every // 2, "QLoRA": every}
    expected = [share / full for share in shares.values()] + [(every + lengths) / every]
    found = [row.ratio for row in bench.training_steps(TINY) + bench.dora_step(TINY)]
    assert found == pytest.approx(expected), f"{list(shares)} over full and DoRA over LoRA: {expected}, not {found}"


def test_decoding_holds_an_adapter_apart_against_a_merged_one(monkeypatch):
    merged = []

    def generate(model, prompts, new):
        merged.append({layer.merged for _, layer in lora_layers(model)})

    monkeypatch.setattr(bench, "generate", generate)
    bench.decoding(replace(TINY, rounds=1))
    assert merged == [{True}, {False}] * 2, f"merged first, then apart, not {merged}"


def test_random_ids_are_the_seed_s():
    first, again, other = (replace(TINY, seed=seed).random_ids(3, 9) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_actions_take_turns():
    order, x = [], torch.randn(2, 2)

    def action(name):
        order.append(name)
        return x @ x

    bench_rows.interleave({name: lambda name=name: action(name) for name in "ab"}, TINY, "")
    assert "".join(order) == "ab" * (1 + TINY.rounds), order


def test_the_table_says_whether_each_bar_is_met_and_under_which_conditions():
    rows = [BenchRow("good", 0.70, 0.69, 0.71, bar=0.72, arithmetic=0.66)]
    rows.append(BenchRow("exact", 0.80, 0.75, 0.85, bar=0.80, arithmetic=None))
    rows.append(BenchRow("bad", 0.85, 0.80, 0.90, bar=0.80, arithmetic=0.70))
    rows.append(BenchRow("free", 2.5, 2.0, 3.0, bar=None, arithmetic=None))
    table = format_bench(rows, TINY)
    assert torch.__version__ in table and "1 thread" in table and "load" in table
    lines = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line}
    expected = {
        "good": ["0.70", "0.69", "0.71", "0.72", "met", "0.660"],
        "exact": ["0.80", "0.75", "0.85", "0.80", "met", "-"],  # at most the bar
        "bad": ["0.85", "0.80", "0.90", "0.80", "MISSED", "0.700"],
        "free": ["2.50", "2.00", "3.00", "-", "-"],
    }
    for name, cells in expected.items():
        assert lines[name] == cells, f"the line of {name!r} should be {cells}, not {lines[name]}"


def test_the_thread_count_is_set_for_the_measurement_and_put_back(monkeypatch):
    before, during = torch.get_num_threads(), []
    monkeypatch.setattr(bench, "CLAIMS", [lambda settings: during.append(torch.get_num_threads()) or []])
    run_bench(replace(TINY, threads=before + 1))
    assert during == [before + 1] and torch.get_num_threads() == before


def test_a_fresh_process_has_the_environment_that_was_asked_for_and_ours_is_as_before(monkeypatch):
    monkeypatch.setenv("MINILORA_KEPT", "ours")
    for name in ("MINILORA_KEPT", "MINILORA_NEW"):
        assert timing.in_a_fresh_process(os.getenv, name, **{name: "theirs"}) == "theirs"
    assert (os.getenv("MINILORA_KEPT"), os.getenv("MINILORA_NEW")) == ("ours", None)
