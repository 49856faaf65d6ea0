"""train.py: properties of the loop, on a model small enough to train in milliseconds."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from minilora import rows as rows_file
from minilora import train as train_file
from minilora.adapters.inject import apply_lora
from minilora.config import LoRAConfig
from minilora.model import GPT, GPTConfig
from minilora.rows import batch_of, batch_rows
from minilora.train import (
    evaluate_loss,
    learning_rate_factor,
    make_optimizer,
    set_gradient_checkpointing,
    train,
    training_step,
)
from minilora.train_settings import NonFiniteError, TrainConfig

SHAPE = GPTConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)
CONFIG = TrainConfig(steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=2)


class Noisy(nn.Module):
    """A GPT whose logits go through dropout, so that the random state matters."""

    def __init__(self, gpt: GPT):
        super().__init__()
        self.gpt, self.dropout = gpt, nn.Dropout(0.2)

    def forward(self, input_ids, where=None):
        return self.dropout(self.gpt(input_ids, where=where))


def small_model(dtype=torch.float32, seed=0) -> GPT:
    torch.manual_seed(seed)
    return GPT(SHAPE).to(dtype)


def small_data(rows=10, length=9, seed=1) -> SimpleNamespace:
    """Random ids; of each row another number of labels counts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SHAPE.vocab_size, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : row % (length - 1)] = -100
    return SimpleNamespace(input_ids=ids, labels=labels)


def quiet(model, config=CONFIG, data=None, **options):
    return train(model, data or small_data(), config, progress=False, **options)


def weights(model) -> dict:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first: dict, second: dict):
    for name in first:
        gap = (first[name] - second[name]).abs().max()
        assert torch.equal(first[name], second[name]), f"{name} should be bit-equal, and differs by up to {gap:.2e}"


class Recorder:
    """In an optimizer's place: keeps the gradients that it is given to step with."""

    def step(self):
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def gradients_of_a_step(model, ids, labels, config=CONFIG) -> tuple[torch.Tensor, dict]:
    """The loss that training_step returns, and by name the gradients that the optimizer is given."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    recorder = Recorder()
    recorder.param_groups = [{"params": list(trainable.values())}]
    loss = training_step(model, recorder, ids, labels, config)
    left = [name for name, parameter in trainable.items() if parameter.grad is not None]
    assert not left, f"after a step no gradient is kept; there are those of {left}"
    return loss, dict(zip(trainable, recorder.gradients, strict=True))


def norm_of(gradients: dict) -> float:
    return math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients.values()))


def loss_by_hand(model, ids, labels) -> tuple[float, int]:
    """Sum of -log p(next token) and how many count, token by token."""
    total, count = 0.0, 0
    for row in range(len(ids)):
        log_p = model(ids[row : row + 1])[0].log_softmax(-1).detach()
        for t in range(ids.shape[1] - 1):
            if labels[row, t + 1] != -100:
                total, count = total - float(log_p[t, labels[row, t + 1]]), count + 1
    return total, count


def steps_by_hand(model, steps: int):
    """The first steps of `quiet(model)`, written out."""
    data, optimizer = small_data(), make_optimizer(model, CONFIG)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = CONFIG.learning_rate * learning_rate_factor(step, CONFIG)
        training_step(model, optimizer, *batch_of(data, step, CONFIG), CONFIG)


# --- the gradient of a batch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(pieces):
    model, data = small_model(torch.float64), small_data(8)
    results = []
    for accumulation_steps in (1, pieces):
        config = replace(CONFIG, batch_size=8, accumulation_steps=accumulation_steps, max_grad_norm=math.inf)
        results.append(gradients_of_a_step(model, data.input_ids, data.labels, config))
    (loss, gradients), (cut_loss, cut_gradients) = results
    assert abs(loss - cut_loss) < 1e-13, f"{pieces} micro-batches give the loss {cut_loss}, the whole batch {loss}"
    for name, gradient in gradients.items():
        gap = (gradient - cut_gradients[name]).abs().max()
        assert gap < 1e-14, f"gradient of {name} differs by {gap:.2e} between 1 and {pieces} micro-batches"


def test_the_loss_of_a_step_is_the_mean_over_counted_tokens():
    model, data = small_model(torch.float64), small_data(4)
    total, count = loss_by_hand(model, data.input_ids, data.labels)
    loss, _ = gradients_of_a_step(model, data.input_ids, data.labels)
    assert abs(loss.item() - total / count) < 1e-12, (
        f"the mean over the counted tokens is {total / count}, and the loss is {loss.item()}"
    )


def test_gradients_are_clipped_to_the_norm():
    model, data = small_model(torch.float64), small_data(4)
    norms = []
    for most in (math.inf, 0.01):
        config = replace(CONFIG, max_grad_norm=most)
        norms.append(norm_of(gradients_of_a_step(model, data.input_ids, data.labels, config)[1]))
    norm, clipped = norms
    assert norm > 0.1 and abs(clipped - 0.01) < 1e-6, f"norm {norm:.4f} was clipped to {clipped:.6f}, not 0.01"


def test_a_batch_in_which_nothing_counts_changes_nothing():
    model, data = small_model(), small_data(4)
    before = weights(model)
    loss = training_step(
        model, make_optimizer(model, CONFIG), data.input_ids, torch.full_like(data.labels, -100), CONFIG
    )
    assert loss == 0, f"nothing counts, so the loss is 0, and not {loss}"
    assert_same(before, weights(model))


@pytest.mark.parametrize("frozen_embedding", [False, True])
def test_checkpointing_gives_the_same_gradients(frozen_embedding):
    model, data = small_model(torch.float64), small_data(4)
    model.model.embed_tokens.weight.requires_grad_(not frozen_embedding)
    gradients = []
    for enabled in (False, True):
        set_gradient_checkpointing(model, enabled)
        assert model.model.gradient_checkpointing == enabled
        gradients.append(gradients_of_a_step(model, data.input_ids, data.labels)[1])
    for name, gradient in gradients[0].items():
        gap = (gradient - gradients[1][name]).abs().max()
        assert gap < 1e-12, f"gradient of {name} differs by {gap:.2e} under checkpointing"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_below_the_first_adapter_nothing_waits_for_backward_and_nothing_runs_twice(checkpointing):
    """Adapters in the upper layer of two: a step costs the forward pass of the lower one, and no more."""
    model = apply_lora(small_model(), LoRAConfig(2, 4, target_modules=r".*layers\.1\..*_proj"))
    set_gradient_checkpointing(model, checkpointing)
    runs, waiting = [], []
    for number, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda layer, inputs, number=number: runs.append(number))
    model.model.layers[1].register_forward_pre_hook(lambda layer, inputs: waiting.append(len(saved)))
    ids, saved = small_data().input_ids, []
    with saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        logits = model(ids)
    logits.sum().backward()
    assert checkpointing or waiting[0] == 0, f"{waiting[0]} tensors of what lies below the adapters wait for backward"
    assert saved, "the layer with adapters keeps something"
    expected = [0, 1, 1] if checkpointing else [0, 1]
    assert runs == expected, f"layers ran in the order {runs}, expected {expected}"


def test_checkpointing_that_no_module_offers_is_an_error():
    with pytest.raises(ValueError, match="gradient_checkpointing is not supported by Linear"):
        set_gradient_checkpointing(nn.Linear(2, 2), True)
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        quiet(nn.Sequential(nn.Embedding(23, 4), nn.Linear(4, 23)), replace(CONFIG, gradient_checkpointing=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_step_runs_on_fake_tensors(precision, checkpointing):
    config = replace(CONFIG, precision=precision, accumulation_steps=2)
    with FakeTensorMode():
        model = GPT(SHAPE)
        set_gradient_checkpointing(model, checkpointing)
        optimizer = make_optimizer(model, config)
        ids = torch.zeros(4, 8, dtype=torch.int64)
        loss = training_step(model, optimizer, ids, ids.clone(), config)
    assert loss.shape == () and not loss.requires_grad, f"a scalar without a graph, not {loss}"
    assert optimizer.param_groups[0]["fused"], "on a CPU AdamW is fused"
    assert len(optimizer.state) == len(list(model.parameters())), "the optimizer did not make its moments"


def test_bfloat16_runs_the_matrices_and_not_the_softmax(monkeypatch):
    model, data, seen = small_model(), small_data(4), {}
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.update(mlp=output.dtype))
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        train_file.F,
        "cross_entropy",
        lambda logits, *rest, **options: (seen.update(loss=logits.dtype), cross_entropy(logits, *rest, **options))[1],
    )
    gradients_of_a_step(model, data.input_ids, data.labels, replace(CONFIG, precision="bfloat16"))
    assert seen == {"mlp": torch.bfloat16, "loss": torch.float32}, (
        f"matrices in bfloat16, the softmax in float32, not {seen}"
    )
    gradients_of_a_step(model, data.input_ids, data.labels)  # "auto", on a CPU
    assert seen == {"mlp": torch.float32, "loss": torch.float32}, f"everything in float32 on a CPU, not {seen}"


# --- learning rate, order of the data, optimizer ---------------------------------------------------------------------


def test_the_schedule_climbs_and_then_falls_as_a_cosine():
    config = TrainConfig(steps=110, batch_size=1, learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1)
    factors = [learning_rate_factor(step, config) for step in range(111)]
    climbs = [b - a for a, b in zip(factors[:10], factors[1:11], strict=True)]
    assert factors[0] > 0 and max(climbs) - min(climbs) < 1e-12, "the warm-up is not a straight line"
    assert factors[10] == max(factors) == 1.0, (
        f"the peak is 1 at step 10, not {factors[10]}, and nowhere higher: {max(factors)}"
    )
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False)), "the cosine does not fall throughout"
    assert abs(factors[60] - 0.55) < 1e-12 and abs(factors[110] - 0.1) < 1e-12, (
        f"half-way 0.55 and at the end 0.1, not {factors[60]} and {factors[110]}"
    )
    assert 1 - factors[20] < 0.1 * (1 - 0.1), "the cosine starts flat; this falls at once"
    assert learning_rate_factor(0, replace(config, warmup_steps=0)) == 1.0, (
        "without a warm-up the first step has the peak rate"
    )


@pytest.mark.parametrize("count, batch_size", [(10, 4), (10, 5), (3, 8), (1, 2)])
def test_each_epoch_holds_every_row_once_in_an_order_of_its_own(count, batch_size):
    config = replace(CONFIG, batch_size=batch_size)
    rows = torch.cat([batch_rows(count, step, config) for step in range(4 * count)]).view(-1, count)  # (epochs, count)
    assert (rows.sort(dim=1).values == torch.arange(count)).all(), "an epoch misses a row or has one twice"
    if count == 10:
        orders = {tuple(epoch.tolist()) for epoch in rows}
        assert len(orders) == len(rows), f"{len(rows)} epochs share {len(orders)} orders"
        other = torch.cat([batch_rows(count, step, replace(config, seed=1)) for step in range(5)])
        assert not torch.equal(rows.flatten()[: len(other)], other), "another seed gave the same order"


def test_rows_depend_on_seed_and_step_alone():
    first = batch_rows(10, 7, CONFIG)
    torch.manual_seed(99)
    batch_rows(10, 3, CONFIG)
    rows_file.epoch_order.cache_clear()
    assert torch.equal(first, batch_rows(10, 7, CONFIG)), (
        f"the rows of step 7 were {first}, and now are {batch_rows(10, 7, CONFIG)}"
    )


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = small_model()
    model.model.norm.weight.requires_grad_(False)
    q, *rest = [p for p in model.parameters() if p.requires_grad]
    stranger = nn.Parameter(torch.ones(3, 5))
    for groups, complaint in [
        ([{"params": rest}], r"in no parameter group.*model\.embed_tokens\.weight"),
        ([{"params": [q, *rest]}, {"params": [q]}], r"embed_tokens\.weight is in more than one"),
        ([{"params": [q, q, *rest]}], r"embed_tokens\.weight is in more than one"),
        ([{"params": [q, *rest, model.model.norm.weight]}], r"model\.norm\.weight is frozen"),
        ([{"params": [q, *rest, stranger]}], r"shape \(3, 5\) is in a group but not in the model"),
        ([], "in no parameter group"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            make_optimizer(model, CONFIG, groups)
    held = [p for group in make_optimizer(model, CONFIG).param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in (q, *rest)} and len(held) == len(rest) + 1, (
        f"{len(held)} parameters are held, {len({id(p) for p in held})} different ones; {len(rest) + 1} are trainable"
    )
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimizer(model.requires_grad_(False), CONFIG)


def test_vectors_do_not_decay_and_groups_keep_their_own_rates():
    model, config = small_model(), replace(CONFIG, weight_decay=0.1)
    split = {"B": [], "rest": []}
    for name, parameter in model.named_parameters():
        split["B" if "q_proj" in name else "rest"].append(parameter)
    groups = [{"params": iter(split["B"]), "lr": 0.16}, {"params": split["rest"]}]
    for group in make_optimizer(model, config, groups).param_groups:
        assert group["weight_decay"] == (0.1 if group["params"][0].ndim > 1 else 0.0), (
            f"matrices decay by 0.1, vectors not; {group['params'][0].ndim} dimensions by {group['weight_decay']}"
        )
        assert group["initial_lr"] == (0.16 if group["params"][0] in set(split["B"]) else 1e-2), (
            f"the peak of q_proj is 0.16, of the rest 0.01; here it is {group['initial_lr']}"
        )
        assert len({p.ndim for p in group["params"]}) == 1


def test_each_group_follows_the_schedule_from_its_own_peak():
    model, seen = small_model(), []
    rest = [p for name, p in model.named_parameters() if "q_proj" not in name]
    q = [p for name, p in model.named_parameters() if "q_proj" in name]
    optimizer = make_optimizer(model, CONFIG, [{"params": q, "lr": 0.1}, {"params": rest}])
    step = type(optimizer).step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(optimizer), "step", lambda self: (seen.append([g["lr"] for g in self.param_groups]), step(self))
        )
        quiet(model, parameter_groups=[{"params": q, "lr": 0.1}, {"params": rest}])
    for number, rates in enumerate(seen):
        factor = learning_rate_factor(number, CONFIG)
        assert rates == pytest.approx([0.1 * factor, 0.01 * factor, 0.01 * factor]), f"step {number}: {rates}"


# --- the loop --------------------------------------------------------------------------------------------------------


def test_the_loop_is_the_training_step_repeated():
    model, by_hand = small_model(), small_model()
    quiet(model)
    steps_by_hand(by_hand, CONFIG.steps)
    assert_same(weights(by_hand), weights(model))


def test_only_what_requires_grad_is_trained():
    model = small_model()
    chosen = {name for name, _ in model.named_parameters() if "v_proj" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    before = weights(model)
    quiet(model)
    changed = {name for name, weight in weights(model).items() if not torch.equal(weight, before[name])}
    assert changed == chosen, f"trained without requires_grad: {changed - chosen}; not trained: {chosen - changed}"
    assert all(p.grad is None for p in model.parameters()), "gradients were left behind"


def test_one_seed_one_result_bit_for_bit():
    def run(seed):
        model = Noisy(small_model())
        torch.seed()  # whatever was drawn before must not matter
        history = quiet(model, replace(CONFIG, seed=seed))
        return weights(model), history.train_loss

    (first, losses), (second, same_losses), (other, _) = run(3), run(3), run(4)
    assert_same(first, second)
    assert losses == same_losses, f"the same seed should give the same losses, {losses}, not {same_losses}"
    assert any(not torch.equal(first[name], other[name]) for name in first), "another seed changed nothing"


def test_gradients_left_over_from_elsewhere_do_not_enter_the_first_step():
    fresh, used = small_model(), small_model()
    used(small_data(seed=5).input_ids).square().sum().backward()
    assert next(used.parameters()).grad.abs().max() > 0
    quiet(fresh), quiet(used)
    assert_same(weights(fresh), weights(used))


def test_dropout_is_on_in_training_whatever_mode_the_model_came_in():
    losses = [quiet(Noisy(small_model()).train(mode)).train_loss for mode in (True, False)]
    assert losses[0] == losses[1], f"the same losses were expected, and not {losses[0]} and {losses[1]}"


def test_training_learns_and_the_history_says_so():
    data = SimpleNamespace(input_ids=torch.arange(9).repeat(6, 1), labels=torch.arange(9).repeat(6, 1))
    config = TrainConfig(steps=40, batch_size=4, learning_rate=2e-2, eval_every=15)
    model = small_model()
    start = evaluate_loss(model, data, 3)
    history = quiet(model, config, data, validation=data)
    assert [step for step, _ in history.train_loss] == list(range(40))
    assert [step for step, _ in history.validation_loss] == [0, 15, 30, 40], (
        f"every 15 steps, at the start and at the end: {history.validation_loss}"
    )
    assert history.validation_loss[0][1] == pytest.approx(start, abs=1e-6), (
        f"{start} before training, not {history.validation_loss[0]}"
    )
    assert history.validation_loss[-1][1] == pytest.approx(evaluate_loss(model, data, 3), abs=1e-6)
    assert history.validation_loss[-1][1] < 0.1 * start, (
        f"from {start:.3f} only to {history.validation_loss[-1][1]:.3f}"
    )
    assert history.best_validation_loss == min(loss for _, loss in history.validation_loss)
    assert len(history.step_seconds) == 40 and history.tokens == 40 * 4 * 9, (
        f"40 steps of 4 x 9 tokens, not {len(history.step_seconds)} and {history.tokens}"
    )
    assert min(history.step_seconds) <= history.seconds_per_step <= max(history.step_seconds), (
        f"no median: {history.seconds_per_step}"
    )
    assert history.tokens_per_second == pytest.approx(history.tokens / sum(history.step_seconds))
    assert not model.training


def test_evaluating_does_not_change_the_run():
    losses = []
    for validation, every in ((None, 0), (small_data(seed=5), 1)):
        model = Noisy(small_model())
        losses.append(quiet(model, replace(CONFIG, eval_every=every), validation=validation).train_loss)
    assert losses[0] == losses[1], f"the same losses were expected, and not {losses[0]} and {losses[1]}"


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("training", [False, True])
def test_evaluate_loss_is_the_mean_over_all_counted_tokens(batch_size, training):
    model, data = Noisy(small_model(torch.float64)).eval(), small_data()
    total, count = loss_by_hand(model, data.input_ids, data.labels)
    model.train(training)
    loss = evaluate_loss(model, data, batch_size)
    assert abs(loss - total / count) < 1e-12, f"{loss} is not {total / count} (dropout left on?)"
    assert model.training == training and all(p.grad is None for p in model.parameters())


class Poisoned(nn.Module):
    """A model whose loss (or only its gradient) turns into NaN at one forward in training."""

    def __init__(self, gpt: GPT, at: int, gradient_only: bool):
        super().__init__()
        self.gpt, self.at, self.gradient_only, self.calls = gpt, at, gradient_only, 0

    def forward(self, input_ids, where=None):
        logits = self.gpt(input_ids, where=where)
        self.calls += self.training
        if self.training and self.calls == self.at + 1:
            if not self.gradient_only:
                return logits * math.nan
            logits.register_hook(lambda gradient: gradient * math.nan)
        return logits


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_non_finite_step_stops_the_run_and_is_not_applied(gradient_only):
    good, model = small_model(), Poisoned(small_model(), 3, gradient_only)
    with pytest.raises(NonFiniteError, match=r"at step 3 of 6 .*nan.*learning rate below 0\.01"):
        quiet(model)
    steps_by_hand(good, 3)
    assert_same(weights(good), weights(model.gpt))
    assert all(p.grad is None for p in model.parameters())


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 0),
        ("steps", 2.5),
        ("batch_size", 0),
        ("accumulation_steps", 0),
        ("accumulation_steps", 3),  # does not divide the batch of 4
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("warmup_steps", -1),
        ("warmup_steps", 6),
        ("final_learning_rate", 1.5),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("max_grad_norm", 0.0),
        ("eval_every", -1),
        ("save_every", True),
        ("precision", "float16"),
        ("seed", -1),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} is .*; it must be"):
        replace(CONFIG, **{field: value})


@pytest.mark.parametrize(
    "ids, labels, complaint",
    [
        (torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64), "one shape"),
        (torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64), "int64"),
        (torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64), "one shape"),
        (torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5, dtype=torch.int64), "no token counts"),
        (torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64), "no token counts"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.full((2, 5), -100), "no token counts"),
    ],
)
def test_bad_data_is_refused(ids, labels, complaint):
    data = SimpleNamespace(input_ids=ids, labels=labels)
    with pytest.raises(ValueError, match=f"training data: .*{complaint}"):
        quiet(small_model(), data=data)
    with pytest.raises(ValueError, match=complaint):
        evaluate_loss(small_model(), data, 2)


def test_saving_without_a_place_is_refused():
    for config, resume in ((replace(CONFIG, save_every=1), False), (CONFIG, True)):
        with pytest.raises(ValueError, match="state_path"):
            quiet(small_model(), config, resume=resume)
