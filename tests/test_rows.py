"""rows.py: which rows a step learns from, and how much of them; and the loss on the places that count alone."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_train import CONFIG, SHAPE, Noisy, assert_same, gradients_of_a_step, small_model, weights
from torch import nn
from torch.nn import functional as F

from minilora.adapters.inject import apply_lora
from minilora.adapters.prompts import PrefixTuning, Prompt, SoftPrompt
from minilora.config import LoRAConfig
from minilora.memory import MemoryMeter
from minilora.model import GPT, KVCache
from minilora.rows import WINDOW, batch_of, batch_rows, batch_rows_by_length, row_lengths, trimmed
from minilora.train import (
    evaluate_loss,
    learning_rate_factor,
    make_optimizer,
    set_gradient_checkpointing,
    train,
    training_step,
)
from minilora.train_settings import IGNORE

GROUPED = replace(CONFIG, group_by_length=True)


def examples(rows: int, length: int = 12, seed: int = 1) -> SimpleNamespace:
    """Instruction data: the first tokens of a row do not count, and behind the last counted one there is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SHAPE.vocab_size, (rows, length), generator=generator)
    ends = torch.randint(4, length + 1, (rows, 1), generator=generator)
    starts = (torch.rand(rows, 1, generator=generator) * ends).long()
    columns = torch.arange(length)
    labels = ids.masked_fill((columns < starts) | (columns >= ends), IGNORE)
    return SimpleNamespace(input_ids=ids, labels=labels)


def model_of(method: str) -> nn.Module:
    """In float64, with random A and B and random prompts: nothing that is trained is zero."""
    torch.manual_seed(0)
    model: nn.Module = GPT(replace(SHAPE, tie_word_embeddings=False)).double()
    if method in ("lora", "dora"):
        targets = ["q_proj", "v_proj", "up_proj", "lm_head"]
        apply_lora(model, LoRAConfig(3, 6, target_modules=targets, use_dora=method == "dora"))
    if method in ("soft-prompt", "prefix"):
        model = {"soft-prompt": SoftPrompt, "prefix": PrefixTuning}[method](model, 3).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


methods = pytest.mark.parametrize("method", ["full", "lora", "dora", "soft-prompt", "prefix"])


def loss_over_all_places(model, ids, labels) -> torch.Tensor:
    """The mean over the counted tokens, of logits that are made for every token."""
    logits = model(ids)[:, -ids.shape[1] :]  # without those at a soft prompt
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    total = F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (following != IGNORE).sum()


# --- the loss ---------------------------------------------------------------------------------------------------------


@methods
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("pieces", [1, 4])
def test_loss_and_gradients_are_those_of_logits_for_every_token(method, pieces, checkpointing):
    """Also where a micro-batch counts nothing: with four pieces the first is rows 0 and 1."""
    model, data = model_of(method), examples(8)
    data.labels[:2] = IGNORE
    set_gradient_checkpointing(model, checkpointing)
    expected = loss_over_all_places(model, data.input_ids, data.labels)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    config = replace(CONFIG, batch_size=8, accumulation_steps=pieces, max_grad_norm=math.inf)
    loss, found = gradients_of_a_step(model, data.input_ids, data.labels, config)
    assert abs(loss - expected) < 1e-12, f"the loss is {expected}, the step's is off by {loss - expected:.1e}"
    for name, gradient in gradients.items():
        off = (found[name] - gradient).abs().max()
        assert off < 1e-12, f"gradient of {name}: up to {gradient.abs().max():.1e}, the step's is off by {off:.1e}"
    whole = evaluate_loss(model, data, 3)
    assert abs(whole - expected) < 1e-12, f"evaluated: {expected} is right, off by {whole - expected:.1e}"


@methods
def test_logits_are_made_for_the_counted_places_and_no_others(method):
    model, data, made = model_of(method), examples(8), []
    model.get_submodule("lm_head").register_forward_hook(lambda module, inputs, output: made.append(len(output)))
    config = replace(CONFIG, batch_size=8, accumulation_steps=2)
    gradients_of_a_step(model, data.input_ids, data.labels, config)
    evaluate_loss(model, data, 8)
    first, second = ((half[:, 1:] != IGNORE).sum().item() for half in data.labels.split(4))
    expected = [first, second, first + second]
    assert made == expected, f"rows that the head computes: expected {expected}, got {made}"


@methods
def test_places_have_the_logits_that_stand_there_among_all(method):
    model, ids = model_of(method), examples(3).input_ids
    where = torch.tensor([2, 0, 0, 1]), torch.tensor([11, 0, 5, 3])
    with torch.no_grad():
        expected, found = model(ids)[:, -12:][where], model(ids, where=where)
        cached = model(ids, model.new_cache(3) if isinstance(model, Prompt) else KVCache(), where)
    for given, how in ((found, "without"), (cached, "with")):
        assert given.shape == expected.shape, f"{how} a cache: four places, (4, V), not {tuple(given.shape)}"
        off = (given - expected).abs().max()
        assert off < 1e-12, f"{how} a cache: the logits at {where} are off by {off:.1e}"


@methods
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_in_which_nothing_counts_has_gradients_of_zero(method, precision):
    model, data = model_of(method).float(), examples(4)
    nothing = torch.full_like(data.labels, IGNORE)
    config = replace(CONFIG, accumulation_steps=2, precision=precision)
    loss, gradients = gradients_of_a_step(model, data.input_ids, nothing, config)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    assert loss == 0 and largest == 0, f"loss {loss} and a gradient of {largest}, and nothing counts"


def test_logits_take_twelve_bytes_for_each_place_and_word():
    """At the start of backward: log-probabilities and two gradients, in float32. A place also has its hidden state."""
    torch.manual_seed(0)
    V, C = 4096, SHAPE.hidden_size
    model = GPT(replace(SHAPE, vocab_size=V)).requires_grad_(False)
    apply_lora(model, LoRAConfig(2, 4, target_modules=["q_proj"]))
    optimizer = make_optimizer(model, CONFIG)
    ids, peaks = torch.randint(V, (4, 16)), []
    for counted in (15, 4):
        labels = ids.clone()
        labels[:, : 16 - counted] = IGNORE
        for _ in range(2):
            with MemoryMeter(model, optimizer) as meter:
                training_step(model, optimizer, ids, labels, CONFIG)
        peaks.append(meter.peak.total)
    expected, fell = 4 * (15 - 4) * (12 * V + 4 * C), peaks[0] - peaks[1]
    assert abs(fell / expected - 1) < 0.01, (
        f"the peak should fall by {expected} bytes, and falls by {fell}, from {peaks[0]}"
    )


# --- columns ----------------------------------------------------------------------------------------------------------


def test_a_batch_is_as_wide_as_its_last_counted_token():
    labels = torch.full((4, 6), IGNORE)
    labels[0, 3], labels[1, 0], labels[3, 1] = 7, 7, 7
    lengths = row_lengths(labels).tolist()
    assert lengths == [4, 1, 1, 2], f"the last counted tokens are the 4th, 1st, none and 2nd, lengths {lengths}"
    for rows, width in (([0, 1], 4), ([2, 3], 2), ([2], 1)):
        shapes = [tuple(part.shape) for part in trimmed(labels[rows], labels[rows])]
        assert shapes == [(len(rows), width)] * 2, f"rows {rows} need {width} columns, not {shapes}"


@methods
def test_a_trimmed_batch_has_the_same_loss_and_gradients(method):
    model, data = model_of(method), examples(30)
    rows = torch.tensor([row for row, length in enumerate(row_lengths(data.labels)) if length < 9][:4])
    ids, labels = data.input_ids[rows], data.labels[rows]
    short_ids, short_labels = trimmed(ids, labels)
    assert short_ids.shape[1] < 9, f"the case shows nothing: {short_ids.shape[1]} of 12 columns are left"
    loss, gradients = gradients_of_a_step(model, ids, labels)
    short_loss, short_gradients = gradients_of_a_step(model, short_ids, short_labels)
    assert abs(loss - short_loss) < 1e-12, f"the loss is {loss}, off by {short_loss - loss:.1e} in the trimmed batch"
    for name, gradient in gradients.items():
        off = (gradient - short_gradients[name]).abs().max()
        assert off < 1e-12, f"gradient of {name} is off by {off:.1e} in the trimmed batch"


def test_evaluation_reads_rows_of_like_length_and_no_more_columns_than_they_need():
    model, data, read = small_model(), examples(40), []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: read.append(tuple(inputs[0].shape)))
    evaluate_loss(model, data, 8)
    lengths = row_lengths(data.labels).sort().values
    expected = [(8, int(some.max())) for some in lengths.split(8)]
    assert read == expected, f"shapes of the batches: expected {expected}, got {read}"


@pytest.mark.parametrize("config", [CONFIG, GROUPED], ids=["shuffled", "grouped"])
def test_the_loop_learns_from_batch_of_and_counts_its_tokens(config):
    data, model, by_hand = examples(10), small_model(), small_model()
    history, tokens = train(model, data, config, progress=False), 0
    optimizer = make_optimizer(by_hand, config)
    for step in range(config.steps):
        ids, labels = batch_of(data, step, config)
        tokens += ids.numel()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * learning_rate_factor(step, config)
        training_step(by_hand, optimizer, ids, labels, config)
    assert_same(weights(model), weights(by_hand))
    assert history.tokens == tokens, f"{tokens} tokens went through the model, the history says {history.tokens}"
    untrimmed = config.steps * config.batch_size * 12
    assert tokens < untrimmed, f"nothing was trimmed of {untrimmed} tokens"


# --- rows of like length ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count, size", [(10, 4), (10, 5), (3, 8), (1, 2), (400, 8), (403, 8), (37, 4)])
def test_each_epoch_holds_every_row_once(count, size):
    config, labels = replace(GROUPED, batch_size=size), examples(count).labels
    steps = 4 * count if count < 100 else count
    rows = torch.cat([batch_rows_by_length(labels, step, config) for step in range(steps)])
    epochs = rows[: len(rows) // count * count].view(-1, count)
    for number, epoch in enumerate(epochs):
        times = epoch.bincount(minlength=count)
        wrong = {row: n for row, n in enumerate(times.tolist()) if n != 1}
        assert not wrong, f"epoch {number} of {count} rows in batches of {size}: times other than 1: {wrong}"


def test_grouped_batches_have_less_padding_and_no_order_of_lengths():
    data, size = examples(400), 8
    config = replace(GROUPED, batch_size=size)
    per_epoch = 400 // size
    widths = {}
    for name, each in (("shuffled", replace(config, group_by_length=False)), ("grouped", config)):
        widths[name] = [batch_of(data, step, each)[0].shape[1] for step in range(per_epoch)]
    needed = row_lengths(data.labels).sum().item()
    padding = {name: size * sum(of) - needed for name, of in widths.items()}
    assert padding["grouped"] < 0.25 * padding["shuffled"], f"padding beside {needed} tokens that are needed: {padding}"
    window = widths["grouped"][:WINDOW]
    assert window != sorted(window) and window != sorted(window, reverse=True), f"widths in order: {window}"
    seeds = [batch_rows_by_length(data.labels, 3, replace(config, seed=seed)).tolist() for seed in (0, 1)]
    assert seeds[0] != seeds[1], f"two seeds have the same rows at step 3: {seeds[0]}"
    epochs = [batch_rows_by_length(data.labels, step, config).tolist() for step in (3, 3 + per_epoch)]
    assert epochs[0] != epochs[1], f"two epochs have the same rows at step 3: {epochs[0]}"


def test_a_window_is_the_rows_that_a_shuffle_has_there():
    """So that grouping changes the order of a few batches, and not of the epoch."""
    data, config = examples(400), replace(GROUPED, batch_size=8)
    for start in (0, WINDOW):
        steps = range(start, start + WINDOW)
        grouped = torch.cat([batch_rows_by_length(data.labels, step, config) for step in steps])
        plain = torch.cat([batch_rows(400, step, config) for step in steps])
        assert torch.equal(grouped.sort().values, plain.sort().values), f"steps {steps} have other rows than shuffled"


def test_off_is_the_plain_shuffle_and_steps_may_be_asked_in_any_order():
    data = examples(23)
    for step in (9, 2, 5):
        ids, labels = batch_of(data, step, CONFIG)
        rows = batch_rows(23, step, CONFIG)
        assert torch.equal(ids, data.input_ids[rows][:, : ids.shape[1]]), f"step {step} has other rows than {rows}"
    forward = [batch_rows_by_length(data.labels, step, GROUPED).tolist() for step in range(12)]
    backward = [batch_rows_by_length(data.labels, step, GROUPED).tolist() for step in reversed(range(12))]
    assert forward == backward[::-1], "the rows of a step depend on which steps were asked for before"


def test_a_killed_grouped_run_goes_on_bit_for_bit(tmp_path):
    data, config, path = examples(23), replace(GROUPED, steps=12, save_every=4), tmp_path / "state"

    def stop(done, _):
        if done == 7:
            raise KeyboardInterrupt

    whole, resumed = Noisy(small_model()), Noisy(small_model())
    history = train(whole, data, config, state_path=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(Noisy(small_model()), data, config, state_path=path, progress=False, after_step=stop)
    resumed_history = train(resumed, data, config, state_path=path, resume=True, progress=False)
    assert_same(weights(whole), weights(resumed))
    assert history.train_loss == resumed_history.train_loss and history.tokens == resumed_history.tokens, (
        f"uninterrupted {history.train_loss}, {history.tokens} tokens; resumed {resumed_history.train_loss}, "
        f"{resumed_history.tokens}"
    )
    with pytest.raises(ValueError, match="group_by_length was True and is now False"):
        train(resumed, data, replace(config, group_by_length=False), state_path=path, resume=True, progress=False)
