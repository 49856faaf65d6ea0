"""objectives.py: the formulas against other ways to the same numbers, and each objective in the loop."""

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minilora import LoRAConfig, apply_lora, disable_lora
from minilora.adapters.inject import absorb_lora, lora_layers
from minilora.model import GPT, GPTConfig
from minilora.objectives import (
    Distillation,
    Preference,
    distillation_loss,
    dpo_loss,
    preferred,
    token_log_probs,
    with_reference,
)
from minilora.storage.training_state import digest
from minilora.text.batches import Batches
from minilora.train import evaluate_loss, make_optimizer, train, training_step
from minilora.train_settings import TrainConfig

SHAPE = GPTConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)
CONFIG = TrainConfig(steps=5, batch_size=4, learning_rate=1e-2, warmup_steps=2)
BETA = 0.3


def small_model(seed=0, random_B=True, dtype=torch.float64, r=3) -> GPT:
    """A base with an adapter, by default one that does something."""
    torch.manual_seed(seed)
    model = apply_lora(GPT(SHAPE).to(dtype), LoRAConfig(r, 6, target_modules="all-linear"))
    if random_B:
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.2)
    return model


def pairs(count=8, length=9, seed=1) -> Batches:
    """A prompt and two answers of lengths of their own, padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SHAPE.vocab_size, (count, 2, length), generator=generator)
    ids[:, 1, :3] = ids[:, 0, :3]
    labels = ids.clone()
    labels[..., :3] = -100
    for number in range(count):
        labels[number, 0, 4 + number % 5 :] = -100
        labels[number, 1, 5 + number % 3 :] = -100
    return Batches(ids, labels)


def rows(count=8, seed=1) -> Batches:
    both = pairs(count // 2, seed=seed)
    return Batches(both.input_ids.flatten(0, 1), both.labels.flatten(0, 1))


def teacher() -> GPT:
    torch.manual_seed(9)
    return GPT(SHAPE).double()


def objective_and_data(name: str):
    if name == "dpo":
        return Preference(BETA), pairs()
    if name == "dpo, reference beforehand":
        return Preference(BETA), with_reference(pairs(), small_model(3))
    return Distillation(teacher(), temperature=2.0), rows()


OBJECTIVES = ["dpo", "dpo, reference beforehand", "distill"]


def by_hand(model, ids, labels) -> torch.Tensor:
    """log π of every label given what stands before it, from all logits, (B, T - 1)."""
    log_p = model(ids).log_softmax(-1)[:, :-1]
    each = log_p.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    return each * (labels[:, 1:] != -100)


def gradients_of_a_step(model, batch, config, objective) -> tuple[float, dict]:
    """The loss of a step, and the gradients that the optimizer is given."""
    kept = {}
    optimizer = SimpleNamespace(zero_grad=lambda set_to_none: model.zero_grad(set_to_none))
    optimizer.step = lambda: kept.update(
        {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    )
    ids, labels, *more = batch
    loss = training_step(model, optimizer, ids, labels, config, None, objective, more)
    return loss.item(), kept


def whole(data) -> tuple:
    return data.input_ids, data.labels, *data.more


def largest_gap(first: dict, second: dict) -> float:
    assert first.keys() == second.keys() and first
    return max((first[name] - second[name]).abs().max().item() for name in first)


# --- formulas --------------------------------------------------------------------------------------------------------


def test_token_log_probs_are_those_of_all_logits():
    model, data = small_model(), rows()
    found, expected = token_log_probs(model, data.input_ids, data.labels), by_hand(model, data.input_ids, data.labels)
    assert found.shape == (8, 8), f"one for each token but the first of a row, (8, 8), not {tuple(found.shape)}"
    gap = (found - expected).abs().max().item()
    assert gap < 1e-12, f"log-probabilities differ from those of all logits by up to {gap:.2e}"
    found.sum().backward()
    assert next(lora_layers(model))[1].lora_A.grad.abs().max() > 0, "they take part in the gradient"


def test_the_dpo_loss_is_equation_7():
    """Two pairs by hand, and many against log σ written out."""
    one = [torch.tensor(values, dtype=torch.float64) for values in ([-4.0], [-6.0], [-5.0], [-5.5])]
    # margin (-4 + 5) - (-6 + 5.5) = 1.5; beta 0.5: -log σ(0.75)
    assert dpo_loss(*one, 0.5).item() == pytest.approx(0.38687, abs=1e-5)
    torch.manual_seed(0)
    values = [(5 * torch.randn(50, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    chosen, rejected, reference_chosen, reference_rejected = values
    loss = dpo_loss(*values, BETA)
    ratio = (chosen - reference_chosen).exp() ** BETA / (rejected - reference_rejected).exp() ** BETA
    expected = (1 + 1 / ratio).log()
    assert abs(loss.item() - expected.mean().item()) < 1e-12, f"{loss.item()}, expected {expected.mean().item()}"
    total = dpo_loss(*values, BETA, reduction="sum").item()
    assert abs(total - expected.sum().item()) < 1e-10, f"the sum is {expected.sum().item()}, not {total}"
    loss.backward()  # Rafailov 2023, below equation 7: β · σ(-β · margin), up for the chosen and down for the rejected
    margin = (chosen - reference_chosen - rejected + reference_rejected).detach()
    weight = BETA / (1 + (BETA * margin).exp()) / 50
    for value, sign in zip(values, (-1, 1, 1, -1), strict=True):
        gap = (value.grad - sign * weight).abs().max().item()
        assert gap < 1e-14, f"the gradient is ±β·σ(-β·margin)/B, and differs from it by {gap:.2e}"


def test_the_dpo_loss_does_not_overflow():
    far = torch.tensor([-1e4])
    loss = dpo_loss(far, -far, far * 0, far * 0, 1.0)
    assert loss.item() == pytest.approx(2e4), f"-log σ(-20,000) is 20,000, not {loss.item()}"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_the_exact_sum_over_the_vocabulary(temperature):
    torch.manual_seed(0)
    student, other = (torch.randn(2, 4, 7, dtype=torch.float64) * 2 for _ in range(2))
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    total = 0.0
    for row, place in mask.nonzero().tolist():
        p = (other[row, place] / temperature).exp()
        q = (student[row, place] / temperature).exp()
        p, q = p / p.sum(), q / q.sum()
        total += temperature**2 * sum(float(p[v]) * math.log(float(p[v] / q[v])) for v in range(7))
    found = distillation_loss(student, other, mask, temperature).item()
    assert found == pytest.approx(total / 5, abs=1e-12), f"{total / 5} nats per counted token, not {found}"
    assert distillation_loss(other, other, mask, temperature).item() == pytest.approx(0, abs=1e-15)


def test_the_gradient_of_distillation_does_not_shrink_with_the_temperature():
    """Softened by a large τ it tends to (logits apart from their mean, student - teacher) / V (Hinton 2015)."""
    torch.manual_seed(0)
    student, other = torch.randn(1, 7, dtype=torch.float64, requires_grad=True), torch.randn(1, 7).double()
    distillation_loss(student, other, None, 1e4).backward()
    gaps = student.detach() - student.mean() - (other - other.mean())
    off = (student.grad - gaps / 7).abs().max().item()
    assert off < 1e-4, f"the gradient is off by {off:.2e}"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_agree_with_finite_differences(name):
    objective, data = objective_and_data(name)
    model = small_model()
    config = replace(CONFIG, batch_size=8, max_grad_norm=math.inf)
    _, gradients = gradients_of_a_step(model, whole(data), config, objective)
    layer, step = dict(lora_layers(model))["model.layers.1.mlp.down_proj"], 1e-5
    for matrix, place in (("lora_A", (1, 2)), ("lora_B", (3, 0))):
        losses = []
        for change in (step, -step):
            getattr(layer, matrix).data[place] += change
            losses.append(evaluate_loss(model, data, 8, objective=objective))
            getattr(layer, matrix).data[place] -= change
        expected = (losses[0] - losses[1]) / (2 * step)
        found = gradients[f"model.layers.1.mlp.down_proj.{matrix}"][place].item()
        assert found == pytest.approx(expected, abs=1e-8), f"{matrix}: {expected} by differences, not {found}"


# --- in the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_dpo_loss_is_ln_2(dtype):
    model, data = small_model(random_B=False, dtype=dtype), pairs()
    loss, _ = gradients_of_a_step(model, whole(data), replace(CONFIG, batch_size=8), Preference(BETA))
    expected = torch.tensor(2, dtype=dtype).log().item()
    assert loss == expected, (
        f"policy and reference agree, so the loss is ln 2 to the last digit, {expected}, not {loss}"
    )


def test_the_reference_is_the_model_with_its_adapter_off():
    model, data = small_model(), pairs()
    ids, labels = data.input_ids.flatten(0, 1), data.labels.flatten(0, 1)
    policy = by_hand(model, ids, labels).sum(1).view(-1, 2)
    with disable_lora(model):
        reference = by_hand(model, ids, labels).sum(1).view(-1, 2)
    expected = dpo_loss(*policy.unbind(1), *reference.unbind(1), BETA).item()
    loss, _ = gradients_of_a_step(model, whole(data), replace(CONFIG, batch_size=8), Preference(BETA))
    assert abs(expected - math.log(2)) > 0.01, "with this adapter policy and reference must differ"
    assert abs(loss - expected) < 1e-12, f"by hand {expected}, in the loop {loss}"
    assert all(layer.enabled for _, layer in lora_layers(model)), "the adapter is on again after a step"


def test_a_reference_beforehand_gives_the_same_steps():
    data, results = pairs(), []
    for beforehand in (False, True):
        model = small_model(random_B=False)
        given = with_reference(data, model) if beforehand else data
        history = train(model, given, CONFIG, given, objective=Preference(BETA), progress=False)
        results.append((history.train_loss, dict(model.named_parameters())))
    gap = largest_gap(results[0][1], results[1][1])
    assert gap < 1e-10, f"the two references should train the same weights, which differ by {gap:.2e}"


@pytest.mark.parametrize(
    "look", [lambda model: with_reference(pairs(), model), lambda model: evaluate_loss(model, rows(), 4)]
)
def test_a_look_at_the_model_that_is_interrupted_leaves_it_in_training(look):
    model = small_model().train()

    def interrupt(*_):
        raise KeyboardInterrupt

    model.lm_head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        look(model)
    assert model.training, "dropout would be off from now on"


def test_full_fine_tuning_needs_no_second_model():
    torch.manual_seed(0)
    model = GPT(SHAPE).double()
    data = with_reference(pairs(), model)
    history = train(model, data, CONFIG, objective=Preference(BETA), progress=False)
    losses = [loss for _, loss in history.train_loss]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-12) and losses[-1] < losses[0] - 0.05, (
        f"from ln 2 downwards, not {losses}"
    )


@pytest.mark.parametrize("pieces", [2, 4, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_accumulation_gives_the_gradient_of_the_whole_batch(name, pieces):
    objective, data = objective_and_data(name)
    model, results = small_model(), []
    for accumulation_steps in (1, pieces):
        config = replace(CONFIG, batch_size=8, accumulation_steps=accumulation_steps, max_grad_norm=math.inf)
        results.append(gradients_of_a_step(model, whole(data), config, objective))
    (loss, gradients), (cut_loss, cut_gradients) = results
    assert abs(loss - cut_loss) < 1e-12, f"{pieces} micro-batches give the loss {cut_loss}, the whole batch {loss}"
    gap = largest_gap(gradients, cut_gradients)
    assert gap < 1e-13, f"{pieces} micro-batches change the gradient by {gap:.2e}"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_makes_the_validation_loss_small(name):
    objective, data = objective_and_data(name)
    model = small_model()
    config = replace(CONFIG, steps=30)
    history = train(model, data, config, data, objective=objective, progress=False)
    first, last = history.validation_loss[0][1], history.validation_loss[-1][1]
    assert last < 0.9 * first, f"from {first:.4f} only to {last:.4f}"
    if isinstance(objective, Preference):
        assert preferred(model, data) > 0.8, (
            f"the chosen answer is likelier in {preferred(model, data):.2f} of the pairs"
        )


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", OBJECTIVES)
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, name):
    path, config = tmp_path / "state.safetensors", replace(CONFIG, save_every=1)

    def run(resume=False, dies_at=None, other=None):
        def after_step(step, optimizer):
            if step == dies_at:
                raise Interrupted

        objective, data = objective_and_data(name)
        model = small_model(dtype=torch.float32)
        if isinstance(objective, Distillation):
            objective.teacher.float()
        train(model, data, config, None, None, path, resume, "", False, None, after_step, other or objective)
        return dict(model.named_parameters())

    uninterrupted = run()
    path.unlink()
    with pytest.raises(Interrupted):
        run(dies_at=3)
    torch.manual_seed(77)
    different = Preference(BETA / 2) if "dpo" in name else Distillation(small_model(4, dtype=torch.float32))
    with pytest.raises(ValueError, match="other settings: (beta|teacher_digest|temperature) was"):
        run(resume=True, other=different)
    gap = largest_gap(uninterrupted, run(resume=True))
    assert gap == 0, f"the resumed run should end with the same weights bit for bit, and differs by {gap:.2e}"


def test_a_run_is_not_resumed_with_another_reference(tmp_path):
    path, objective = tmp_path / "state.safetensors", Preference(BETA)
    for seed in (3, 3, 4):  # the second time there is nothing left to do
        data = with_reference(pairs(), small_model(seed))
        with pytest.raises(ValueError, match="data_digest was") if seed == 4 else nullcontext():
            train(small_model(), data, CONFIG, state_path=path, resume=True, progress=False, objective=objective)


@pytest.mark.parametrize("name", ["dpo", "distill"])
def test_the_step_runs_on_fake_tensors(name):
    with FakeTensorMode():
        model = apply_lora(GPT(SHAPE), LoRAConfig(2, 4, target_modules="all-linear"))
        objective = Preference(BETA) if name == "dpo" else Distillation(GPT(SHAPE))
        ids = torch.zeros(4, 2, 8, dtype=torch.int64) if name == "dpo" else torch.zeros(4, 8, dtype=torch.int64)
        config = replace(CONFIG, accumulation_steps=2)
        loss = training_step(model, make_optimizer(model, config), ids, ids.clone(), config, 5, objective)
    assert loss.shape == () and not loss.requires_grad, f"a scalar without a graph, not {loss}"


def test_absorbed_is_a_plain_model_that_says_the_same_and_the_start_of_a_new_adapter():
    model, ids = small_model(), rows().input_ids
    before = model(ids)
    absorb_lora(model)
    assert not any(lora_layers(model)) and not any(p.requires_grad for p in model.parameters())
    start = model(ids)
    gap = (start - before).abs().max().item()
    assert gap < 1e-12, f"merged and dropped, the adapter should still act; logits differ by {gap:.2e}"
    weights = digest(dict(model.named_parameters()))
    apply_lora(model, LoRAConfig(2, 4, target_modules="all-linear"))
    train(model, pairs(), CONFIG, objective=Preference(BETA), progress=False)
    with disable_lora(model):
        assert torch.equal(model(ids), start), "with the new adapter off, the model is that start bit for bit"
    absorbed = {name.replace("base_layer.", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert digest(absorbed) == weights, "training the new adapter must not touch what was merged"


# --- bad input -------------------------------------------------------------------------------------------------------


def test_pairs_that_prefer_nothing_are_refused():
    model, good = small_model(), pairs()
    same, empty = pairs(), pairs()
    same.input_ids[3, 1], same.labels[3, 1] = same.input_ids[3, 0], same.labels[3, 0]
    empty.labels[5, 1] = -100
    flat = Batches(good.input_ids[:, 0], good.labels[:, 0])
    halves = Batches(good.input_ids.float(), good.labels)
    for data, fault in (
        (same, "the answers of pair 3 are the same"),
        (empty, "an answer of pair 5 has no token that counts"),
        (flat, r"of one shape \(N, 2, T\), not torch.int64 \(8, 9\)"),
        (halves, "torch.float32"),
    ):
        with pytest.raises(ValueError, match=f"the training data: .*{fault}"):
            train(model, data, CONFIG, objective=Preference(BETA), progress=False)


def test_dropout_beside_a_reference_is_refused():
    torch.manual_seed(0)
    model = apply_lora(GPT(SHAPE), LoRAConfig(2, 4, lora_dropout=0.1, target_modules="all-linear"))
    with pytest.raises(ValueError, match="q_proj has dropout 0.1; .* must be 0"):
        train(model, pairs(), CONFIG, objective=Preference(BETA), progress=False)


def test_a_model_without_reference_is_refused():
    with pytest.raises(ValueError, match="no adapter to switch off .* with_reference"):
        train(GPT(SHAPE), pairs(), CONFIG, objective=Preference(BETA), progress=False)


def test_a_teacher_of_another_vocabulary_is_refused():
    other = GPT(replace(SHAPE, vocab_size=24))
    with pytest.raises(ValueError, match="the teacher has a vocabulary of 24 tokens and the student one of 23"):
        train(small_model(), rows(), CONFIG, objective=Distillation(other), progress=False)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_numbers_out_of_range_are_named(value):
    with pytest.raises(ValueError, match="beta is .*; it must be a number above 0"):
        Preference(value)
    with pytest.raises(ValueError, match="temperature is .*; it must be a number above 0"):
        Distillation(teacher(), value)
