"""The bench of a real model, at a tiny shape: what is timed is what the rows say, and no time is asserted."""

import math
import os
from dataclasses import replace

import pytest
import torch

from minilora import load_model, save_model
from minilora.__main__ import main
from minilora.adapters.inject import lora_layers
from minilora.experiments import bench, bench_model, bench_ratios, peers
from minilora.experiments.bench import BenchSettings
from minilora.experiments.bench_model import FORMATS, english_rows, format_model_bench, resident_set, run_model_bench
from minilora.experiments.bench_ratios import LossOfAllLogits, ModelBenchSettings
from minilora.inference.bank import AdapterBank
from minilora.linear4bit import quantize_model
from minilora.rows import counted_places, row_lengths
from minilora.train import evaluate_loss, next_token_targets
from minilora.train_settings import IGNORE

OURS = {  # by claim, the bar
    "step, LoRA q_proj, v_proj over full": None,
    "step, LoRA all linears over full": None,
    "step, logits of all tokens over counted": None,
    "step, bfloat16 base over float32": None,
    "step, autocast over float32": None,
    "decoding 1, adapter apart over merged": 1.12,
    "decoding 1, bfloat16 over float32": None,
    "decoding 3, adapter apart over merged": 1.12,
    "decoding 3, bfloat16 over float32": None,
    "one token, 2 rows, 2 of 5 adapters, over base": 1.15,
    "generation, 2 rows, 2 of 5 adapters, over base": 1.15,
}
THEIRS = {
    "step, LoRA over PEFT's": 0.55,
    "step, LoRA over transformers' full": 0.75,
    "epoch, 16 to 32 tokens a row, over PEFT's": None,
    "decoding 1, over transformers'": 0.75,
    "decoding 3, over transformers'": 0.9,
}


@pytest.fixture(scope="module")
def settings(base_folder):
    sizes = dict(batch_size=2, sequence_length=32, counted_tokens=8, r=2, prompt_length=6, new_tokens=5)
    sizes |= dict(
        served_rows=2, resident=5, decoded_rows=(1, 3), text_rows=4, text_length=32, rounds=1, threads=1, progress=False
    )
    return ModelBenchSettings(base=base_folder.directory, **sizes)


@pytest.fixture(scope="module")
def measured(settings):
    return run_model_bench(settings)


def needs_peers(settings):
    if not peers.can_read(settings.base):
        pytest.skip("transformers and peft are not installed")


def test_every_claim_has_a_row_and_its_bar(measured, settings):
    expected = OURS | (THEIRS if peers.can_read(settings.base) else {})
    found = {row.claim: row.bar for row in measured.rows}
    assert found == expected, f"missing or too many: {found.items() ^ expected.items()}"
    for row in measured.rows:
        assert 0 < row.lowest <= row.ratio <= row.highest < math.inf, row


def test_the_arithmetic_of_a_step_is_of_what_its_name_says(measured):
    arithmetic = {row.claim: row.arithmetic for row in measured.rows}
    few, every = (arithmetic[f"step, LoRA {targets} over full"] for targets in ("q_proj, v_proj", "all linears"))
    assert 0.5 < few < every < 1, f"over full, q_proj and v_proj {few} and all linears {every}"
    # The head has 800 x 16 weights and forward and input gradient of 64 tokens, of which 16 count.
    more = 2 * 2 * 800 * 16 * (64 - 16)
    assert arithmetic["step, logits of all tokens over counted"] > 1.5, f"{more} operations more for the head"
    assert all(value is None for claim, value in arithmetic.items() if claim.startswith("decoding"))


def test_a_step_counts_the_last_tokens_of_each_row(settings):
    whole = ModelBenchSettings(base=settings.base)
    assert (whole.batch_size, whole.sequence_length, whole.counted_tokens) == (8, 96, 24)
    for case in (settings, whole):
        ids, labels = case.batch()
        assert ids.shape == labels.shape == (case.batch_size, case.sequence_length)
        rows, columns = counted_places(next_token_targets(labels))
        assert len(rows) == case.batch_size * case.counted_tokens, f"{len(rows)} places count"
        assert set(columns.tolist()) == set(range(case.sequence_length - 1)[-case.counted_tokens :])
        assert torch.equal(labels[:, -case.counted_tokens :], ids[:, -case.counted_tokens :])
        assert torch.equal(case.batch()[0], ids), "the same at every call"


def test_the_loss_of_all_logits_is_that_of_the_logits_that_count(settings):
    model, (ids, labels) = settings.load_lora(), settings.batch()
    made = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.shape.numel()))
    everywhere = peers.training_step_of(LossOfAllLogits(model), ids, labels)().item()
    with torch.no_grad():
        [
            p.zero_() for name, p in model.named_parameters() if name.endswith("lora_B")
        ]  # the step is undone: B starts at 0
    selected = bench_ratios.step_of(model, ids, labels)().item()
    assert everywhere == pytest.approx(selected, abs=1e-5), (
        f"of all logits {everywhere}, of those that count {selected}"
    )
    assert made == [64 * 800, 16 * 800], made


def test_every_model_is_what_its_claim_says(settings):
    """Adapters are in float32 whatever the base is in, and all of them are of rank r with alpha 2 r."""
    for dtype in (torch.float32, torch.bfloat16):
        model = settings.load_lora(dtype=dtype)
        types = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
        assert types == {True: torch.float32, False: dtype}, types
        config = vars(model)["lora_config"]
        assert (config.r, config.lora_alpha, config.target_modules) == (2, 4, "all-linear")
    assert all(parameter.requires_grad for parameter in settings.load().parameters()), "full fine-tuning trains all"


def test_decoding_takes_as_many_rows_and_tokens_as_it_says(settings, monkeypatch):
    taken = set()

    def measure(actions, *_, **__):
        taken.update((len(action()), *map(len, action())) for action in actions.values())
        return []

    monkeypatch.setattr(bench_ratios, "measure", measure)
    bench_ratios.decoding(settings)
    assert taken == {(1, 5), (3, 5, 5, 5)}, f"1 and 3 rows of 5 new tokens, not {taken}"


def test_what_is_held_against_what(settings, monkeypatch):
    """Decoding: merged, apart, bfloat16. Steps: float32, bfloat16 weights, float32 weights under autocast."""
    decoded, steps = [], []

    def generate(model, prompts, new):
        merged = {layer.merged for _, layer in lora_layers(model)}
        decoded.append((merged, model.lm_head.weight.dtype))

    def step_of(model, ids, labels, precision="float32"):
        return lambda: steps.append((model.lm_head.weight.dtype, precision))

    monkeypatch.setattr(bench_ratios, "generate", generate)
    monkeypatch.setattr(bench_ratios, "step_of", step_of)
    bench_ratios.decoding(replace(settings, decoded_rows=(1,)))
    bench_ratios.precisions(settings)
    expected = [({True}, torch.float32), ({False}, torch.float32), (set(), torch.bfloat16)]
    assert decoded[:3] == expected, decoded
    expected = [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float32, "bfloat16")]
    assert steps[:3] == expected, steps


def test_the_resident_set_of_a_step_is_not_that_of_loading(settings, monkeypatch):
    if resident_set() is None:
        pytest.skip("this system has no /proc/self/status")
    order = []
    for name in ("forget_highest", "resident_set", "training_step"):
        own = getattr(bench_model, name)
        monkeypatch.setattr(bench_model, name, lambda *a, name=name, own=own: (order.append(name), own(*a))[1])
    bench_model.memory_of_step(settings)
    assert order[:4] == ["forget_highest", "resident_set", "training_step", "training_step"], order


def test_the_bank_serves_what_its_rows_say(settings, monkeypatch):
    """All adapters are resident, each row has another, and both sides decode the same tokens."""
    taken, chosen = [], []

    def measure(actions, *_, **__):
        taken.append([action() for action in actions.values()])
        return []

    select = AdapterBank.select
    monkeypatch.setattr(AdapterBank, "select", lambda bank, names: (chosen.append((bank, names)), select(bank, names)))
    monkeypatch.setattr(bench_ratios, "measure", measure)
    bench_ratios.serving(settings)
    assert taken[0] == [None, None] and [len(row) for row in taken[1][0]] == [5, 5]
    assert taken[1][0] == taken[1][1], "an adapter whose B is 0 says what the base says"
    last = [names for _, names in chosen if names][-1]
    assert len(set(last)) == 2 and set(chosen[-1][0].resident) == set(chosen[-1][0].names), last


def test_losses_are_those_of_the_model_in_each_format(measured, settings, base_folder):
    data = english_rows(base_folder.tokenizer, settings)  # a second time: the same text, or other losses
    assert data.input_ids.shape == (4, 32) and data.counted_tokens == 4 * 31
    assert [row.name for row in measured.formats] == ["float32", "nf4", "int4", "fp4"]
    for row in measured.formats:
        model = load_model(settings.base, torch.float32)
        if FORMATS[row.name]:
            assert FORMATS[row.name].scheme == row.name
            quantize_model(model, FORMATS[row.name])
        expected = evaluate_loss(model, data, 4, "float32")
        assert row.loss == pytest.approx(expected, abs=1e-5), f"{row.name}: off by {row.loss - expected:.2g}"
        assert row.seconds > 0 and (row.bits == 32 if row.name == "float32" else 4 < row.bits < 6), row


def test_bytes_of_a_step(measured, settings):
    model = settings.load_lora()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    adapters = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    peak = measured.memory.peak
    assert peak.weights == weights, f"weights and adapters of {weights} bytes, not {peak.weights}"
    assert peak.optimizer >= 2 * adapters, f"AdamW's state is there: two tensors for {adapters} bytes of adapters"
    assert peak.activations > 0
    for growth in (measured.memory.growth, measured.memory.growth_returned):
        assert (growth is None) == (resident_set() is None), "known where the system tells"
        assert growth is None or growth > 0, f"the resident set grew by {growth}"
    assert bench_model.RETURN_BLOCKS not in os.environ, "the process's own environment is as it was"


def test_the_resident_set_grows_with_what_is_written():
    if resident_set() is None:
        pytest.skip("this system has no /proc/self/status")
    before, _ = resident_set()
    kept = torch.ones(2**26, dtype=torch.uint8)  # beyond what an allocator keeps of memory that was freed
    now, highest = resident_set()
    assert now - before > 0.9 * len(kept) and highest >= now, f"64 MiB were written, and it grew by {now - before}"


def test_the_table_says_it_all(measured, settings):
    table = format_model_bench(measured, settings)
    for row in measured.rows:
        assert f"{row.claim} " in table and f"{row.ratio:.2f}" in table
    for name in ("bytes of tensors at the peak", "beyond the weights", "growth of the resident set", "go back at once"):
        assert name in table
    losses = {
        line.split()[0]: line.split() for line in table.splitlines() if line.split()[:1] in [[n] for n in FORMATS]
    }
    for row in measured.formats:
        cells = losses[row.name]
        assert cells[-2:] == [f"{row.loss:.4f}", f"{row.loss - measured.formats[0].loss:+.4f}"], cells
    assert "32 of which 8 count" in table and "1 threads" in table
    unknown = replace(measured, memory=replace(measured.memory, growth=None))
    assert "unknown on this system" in format_model_bench(unknown, settings)


def test_a_base_that_does_not_do_is_refused_before_anything_is_measured(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_model, "measure_formats", lambda settings: pytest.fail("it was measured"))
    with pytest.raises(ValueError, match="sequences of 65 tokens .* end at 64"):
        run_model_bench(replace(settings, text_length=65))
    save_model(quantize_model(load_model(settings.base)), tmp_path)
    with pytest.raises(ValueError, match="is in 4 bits"):
        run_model_bench(replace(settings, base=tmp_path))


def test_without_the_peers_their_rows_are_absent(settings, monkeypatch):
    monkeypatch.setattr(peers, "can_read", lambda base: False)
    for claims in (bench_ratios.steps_over_peers, bench_ratios.epoch_over_peers, bench_ratios.decoding_over_peers):
        assert claims(settings) == [], f"{claims.__name__} has rows without them"


def test_rows_of_unlike_length_end_where_they_say_and_a_quarter_counts(settings):
    data, T = settings.unlike_rows(), settings.sequence_length
    lengths, counted = row_lengths(data.labels), (data.labels != IGNORE).sum(1)
    assert data.input_ids.shape == (6 * settings.batch_size, T)
    assert (lengths.min().item(), lengths.max().item()) == (T // 2, T), lengths
    assert (counted - lengths / 4).abs().max() < 1, f"of {lengths.tolist()} tokens {counted.tolist()} count"
    assert data.labels[data.labels != IGNORE].equal(data.input_ids[data.labels != IGNORE]), "labels are the tokens"


def test_their_step_is_of_the_same_loss_with_adapters_of_the_same_shapes(settings):
    needs_peers(settings)
    ids, labels = settings.batch()
    with peers.quiet():
        theirs = peers.load(settings.base, settings.r)
        loss = peers.training_step_of(theirs, ids, labels)().item()
    ours = settings.load_lora()
    expected = bench_ratios.step_of(ours, ids, labels)().item()
    assert loss == pytest.approx(expected, abs=1e-5), f"ours {expected}, theirs {loss}"
    shapes = [sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert shapes[0] == shapes[1] and len(shapes[0]) == 14


def test_their_decoding_gives_the_same_tokens(settings):
    needs_peers(settings)
    with peers.quiet():
        theirs = peers.decoder(peers.load(settings.base).eval(), settings.random_ids(3, 6), 5)()
    assert theirs == bench_ratios.decoder(settings.load(), 3, settings)()


def test_the_command_measures_the_base_that_it_is_given(settings, measured, monkeypatch, capsys):
    taken = []
    monkeypatch.setattr(bench_model, "run_model_bench", lambda settings: taken.append(settings) or measured)
    base = settings.base
    assert main(["bench", "--base", str(base), "--rounds", "2", "--seed", "4"]) == 0
    assert "decoding 1, adapter apart over merged" in capsys.readouterr().out
    assert main(["bench", "--base", str(base)]) == 0
    expected = [ModelBenchSettings(base=base, rounds=2, seed=4), ModelBenchSettings(base=base, rounds=3, seed=0)]
    assert taken == expected
    monkeypatch.setattr(bench, "run_bench", lambda settings: taken.append(settings) or [])
    monkeypatch.setattr(bench, "format_bench", lambda *_: "")
    assert main(["bench"]) == 0 and taken[-1] == BenchSettings(rounds=5), "without a base as ever"
    capsys.readouterr()
    assert main(["bench", "--base", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
