"""The bench's machinery at a tiny shape. Times are never asserted: a test must not depend on a machine's mood."""

from dataclasses import replace

import pytest
import torch

from minilora.experiments import bench
from minilora.experiments.bench import BenchRow, BenchSettings, format_bench, run_bench

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


@pytest.fixture(scope="module")
def rows():
    return run_bench(TINY)


def test_every_claim_has_a_row_with_a_median_between_its_extremes(rows):
    bars = {row.claim: row.bar for row in rows if row.bar is not None and "bitsandbytes" not in row.claim}
    assert list(bars.values()) == [0.72, 0.80, 1.10, 1.05, 1.25, 1.8, 1.6, 1.1], bars
    assert len(rows) in (11, 13), "with bitsandbytes two rows more"
    for row in rows:
        assert 0 < row.lowest <= row.ratio <= row.highest, row


def test_the_arithmetic_of_a_lora_step_is_near_two_thirds_and_of_a_merged_forward_exactly_one(rows):
    parts = ("LoRA r=2 on q_proj", "LoRA r=2 on all", "QLoRA", "merged")
    few, every, quantized, merged = (next(row for row in rows if part in row.claim) for part in parts)
    assert merged.arithmetic == 1.0
    assert quantized.arithmetic > every.arithmetic, "QLoRA leaves the base's product as it is and adds thin ones"
    # r / width is 1/16 here: the thin products weigh far more than at the shape of the claims.
    assert 0.55 < few.arithmetic < every.arithmetic < 1.0, (few, every)


def test_arithmetic_counts_what_the_step_multiplies():
    x, W = torch.randn(4, 8), torch.randn(8, 8)
    actions = {"one": lambda: x @ W, "three": lambda: x @ W @ W @ W}
    ratios, arithmetic = bench.interleave(actions, TINY, "")
    assert arithmetic == {"three": 3.0}
    assert len(ratios["three"]) == TINY.rounds


def test_actions_take_turns():
    order, x = [], torch.randn(2, 2)

    def action(name):
        order.append(name)
        return x @ x

    bench.interleave({name: lambda name=name: action(name) for name in "ab"}, TINY, "")
    assert "".join(order) == "ab" * (1 + TINY.rounds), order


def test_the_table_says_whether_each_bar_is_met_and_under_which_conditions():
    rows = [BenchRow("good", 0.70, 0.69, 0.71, bar=0.72, arithmetic=0.66)]
    rows.append(BenchRow("bad", 0.85, 0.80, 0.90, bar=0.80, arithmetic=0.70))
    table = format_bench(rows, TINY)
    assert torch.__version__ in table and "1 thread" in table and "load" in table
    good, bad = (next(line for line in table.splitlines() if line.startswith(name)) for name in ("good", "bad"))
    assert "met" in good and "0.70" in good and "0.72" in good and "0.660" in good, good
    assert "MISSED" in bad and "0.85" in bad, bad


def test_the_thread_count_is_set_for_the_measurement_and_put_back(monkeypatch):
    before, during = torch.get_num_threads(), []
    monkeypatch.setattr(bench, "CLAIMS", [lambda settings: during.append(torch.get_num_threads()) or []])
    run_bench(replace(TINY, threads=before + 1))
    assert during == [before + 1] and torch.get_num_threads() == before
