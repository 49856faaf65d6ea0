"""Policy gradients: GRPO's formulas against exact sums, sampling against its distribution, and runs that sample."""

import itertools
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from minilora import LoRAConfig, apply_lora, disable_lora
from minilora.__main__ import main
from minilora.adapters.inject import lora_layers
from minilora.experiments.run import run
from minilora.inference.rollouts import Rollouts, sample
from minilora.model import GPT, GPTConfig
from minilora.objectives import GroupPolicy, group_advantages, grpo_loss, kl_estimate, token_log_probs
from minilora.text.batches import Batches
from minilora.text.tasks import Example, Task
from minilora.train import make_optimizer, train, training_step
from minilora.train_settings import NonFiniteError, TrainConfig

CONFIG = TrainConfig(steps=6, batch_size=8, learning_rate=1e-2, warmup_steps=1)
EXAMPLES = [Example(f"Question: what is {n}?\nAnswer:", f" {n}") for n in range(6)]


@pytest.fixture
def make_model(tokenizer):
    def make(dtype=torch.float32, dropout=0.0, random_B=False) -> GPT:
        torch.manual_seed(0)
        model = GPT(GPTConfig(tokenizer.vocab_size + 5, 16, 24, 1, 2, max_position_embeddings=64)).to(dtype)
        apply_lora(model, LoRAConfig(3, 6, dropout, target_modules="all-linear"))
        if random_B:
            for _, layer in lora_layers(model):
                nn.init.normal_(layer.lora_B, std=0.2)
        return model

    return make


def length_of(example: Example, answer: str) -> float:
    return len(answer) / 10


@pytest.fixture
def rollouts(tokenizer):
    return Rollouts(EXAMPLES, length_of, tokenizer, max_new_tokens=5, group_size=4)


# --- formulas --------------------------------------------------------------------------------------------------------


def test_advantages_are_distances_from_the_groups_mean():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    plain = group_advantages(rewards, 4, normalize=False)
    assert plain.tolist() == [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0], f"a group that agrees has 0: {plain.tolist()}"
    for value in (0.1, 0.3, 0.7, 1 / 3):  # whose means are rounded
        same = group_advantages(torch.full((14,), value), 7)
        assert same.abs().max() == 0, f"seven rewards of {value} agree: {same.tolist()}"
    normal = group_advantages(rewards, 4)  # standard deviation 0.5
    assert normal.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5, 0, 0, 0, 0], abs=1e-3)


def test_the_clip_takes_away_what_leads_too_far():
    """ρ = 1.5 and 0.5, either advantage: min(ρ A, clip(ρ) A) is 1.2, -1.5, 0.5 and -0.8."""
    ratios = torch.tensor([[1.5], [1.5], [0.5], [0.5]], dtype=torch.float64)
    log_probs = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    each = [
        grpo_loss(log_probs[row : row + 1], log_probs[row : row + 1].detach() * 0, advantages[row : row + 1])
        for row in range(4)
    ]
    assert [loss.item() for loss in each] == pytest.approx([-1.2, 1.5, -0.5, 0.8])
    sum(each).backward()
    assert log_probs.grad[:, 0].tolist() == pytest.approx([0, 1.5, -0.5, 0]), "clipped, there is no gradient"


def test_the_loss_is_a_mean_over_counted_tokens_and_the_penalty_is_added():
    log_probs, mask = torch.zeros(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    kl = torch.tensor([[0.3, 0.0, 9.0], [0.6, 9.0, 9.0]])
    loss = grpo_loss(log_probs, log_probs, torch.tensor([1.0, -2.0]), mask, kl=kl).item()
    assert loss == pytest.approx((-1 - 1 + 2 + 0.9) / 3), f"three tokens count; {loss}"


def sequences_and_log_probs(table) -> tuple[list, torch.Tensor]:
    """A policy over two tokens of three: all nine answers, and log π of their tokens, (9, 2)."""
    answers = list(itertools.product(range(3), repeat=2))
    log_p = table.log_softmax(-1)  # (4, 3): for the first token, and for the second after each first
    return answers, torch.stack([torch.stack([log_p[0, a], log_p[1 + a, b]]) for a, b in answers])


def test_on_policy_the_expected_gradient_is_the_exact_one():
    """Over all 81 groups of two answers, each as probable as it is. A group's mean holds the answer itself, which
    shrinks the gradient by 1 - 1/G; the loss is a mean over two tokens, which halves it."""
    torch.manual_seed(0)
    table = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    answers, each = sequences_and_log_probs(table)
    reward = torch.tensor([float(a * 2 + b == 5) + 0.3 * a for a, b in answers], dtype=torch.float64)
    (exact,) = torch.autograd.grad((each.sum(1).exp() * reward).sum(), table, retain_graph=True)
    expected = torch.zeros_like(exact)
    for pair in itertools.product(range(9), repeat=2):
        rows = list(pair)
        log_probs, probability = each[rows], each[rows].sum().exp().item()
        advantages = group_advantages(reward[rows], 2, normalize=False)
        loss = grpo_loss(log_probs, log_probs.detach(), advantages)
        expected += probability * torch.autograd.grad(loss, table, retain_graph=True)[0]
    gap = (expected + exact * (1 - 1 / 2) / 2).abs().max().item()
    assert exact.abs().max() > 0.01 and gap < 1e-12, f"GRPO's expected gradient is off the exact one by {gap:.2e}"


def test_on_policy_it_is_reinforce_with_a_baseline():
    torch.manual_seed(0)
    log_probs = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    mask, rewards = torch.rand(8, 5) < 0.7, torch.rand(8, dtype=torch.float64)
    grpo_loss(log_probs, log_probs.detach(), group_advantages(rewards, 4, normalize=False), mask).backward()
    better = rewards - rewards.view(2, 4).mean(1).repeat_interleave(4)
    expected = -better[:, None] * mask / mask.sum()
    gap = (log_probs.grad - expected).abs().max().item()
    assert gap < 1e-15, f"the gradient should be -(reward - baseline)/tokens, and differs by {gap:.2e}"


def test_the_kl_estimate_is_exact_on_average_and_never_negative():
    torch.manual_seed(0)
    log_p, log_q = (torch.randn(7, dtype=torch.float64).log_softmax(0) for _ in range(2))
    each = kl_estimate(log_p, log_q)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    assert (log_p.exp() * each).sum().item() == pytest.approx(exact, abs=1e-14) and each.min() >= 0


# --- sampling --------------------------------------------------------------------------------------------------------


def test_samples_follow_the_distribution_at_the_temperature(make_model, tokenizer):
    model, count, prompt = make_model(random_B=True), 4000, [5, 6, 7]
    allowed = 40  # of the vocabulary, so that each token is drawn often
    drawn = sample(model, [prompt] * count, 1, 0.7, allowed, (), seed=3)
    frequency = torch.bincount(torch.tensor(drawn)[:, 0], minlength=allowed) / count
    with torch.no_grad():
        p = (model(torch.tensor([prompt]))[0, -1, :allowed] / 0.7).softmax(0)
    far = ((frequency - p).abs() / (p * (1 - p) / count).sqrt()).max().item()
    assert far < 4.5, f"a token is drawn {far:.1f} standard deviations too often or too rarely"


def test_a_sample_is_a_function_of_seed_and_weights_and_ends_with_the_end_token(make_model):
    model = make_model(dropout=0.5, random_B=True).train()
    torch.manual_seed(1)
    prompts, ends = [[4, 5], [6, 7, 8, 9], [10]] * 8, set(range(0, 800, 8))
    first = sample(model, prompts, 9, 1.0, 800, ends, seed=5)
    torch.manual_seed(2)
    assert sample(model, prompts, 9, 1.0, 800, ends, seed=5) == first, "the same seed draws the same"
    assert sample(model, prompts, 9, 1.0, 800, ends, seed=6) != first, "another seed draws something else"
    assert model.training, "the model is in training mode again"
    lengths = {len(ids) for ids in first}
    for ids in first:
        assert not ends & set(ids[:-1]), f"nothing comes after an end token: {ids}"
        assert ids[-1] in ends or len(ids) == 9, f"an answer ends with the end token or is cut: {ids}"
    assert len(lengths) > 2, f"answers of several lengths were expected, not {lengths}"


def test_sampling_that_fails_leaves_every_module_in_its_mode(make_model):
    model = make_model().train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        sample(model, [[4, 5]], 3, 1.0, 800, (), seed=5)
    changed = [name for name, module in model.named_modules() if module.training != before[name]]
    assert not changed, f"{len(changed)} of {len(before)} modules are in another mode after an error"


def test_a_batch_holds_exactly_what_was_drawn(make_model, rollouts, tokenizer):
    """Two prompts, four samples each; no answer is encoded again, and none that was cut has an end token."""
    seen = []
    rollouts.reward = lambda example, answer: seen.append((example, answer)) or length_of(example, answer)
    model = make_model(random_B=True)
    ids, labels, advantages, rewards, agrees = rollouts.draw(model, 3, replace(CONFIG, seed=2))
    assert len(ids) == 8 and [seen[n][0] for n in range(8)] == [seen[0][0]] * 4 + [seen[4][0]] * 4
    for row, (example, answer) in enumerate(seen):
        counted = labels[row] != -100
        drawn = labels[row][counted].tolist()
        prompt = rollouts.prompts[EXAMPLES.index(example)]
        assert ids[row, : len(prompt)].tolist() == prompt and not counted[: len(prompt)].any()
        assert ids[row, len(prompt) : len(prompt) + len(drawn)].tolist() == drawn, "the drawn ids follow the prompt"
        ended = drawn[-1] == tokenizer.eos_id
        assert len(drawn) <= 5 and (ended or len(drawn) == 5), f"neither ended nor cut at 5 tokens: {drawn}"
        assert tokenizer.decode(drawn[:-1] if ended else drawn) == answer
        assert rewards[row].item() == pytest.approx(length_of(example, answer))
    assert torch.equal(advantages, group_advantages(rewards, 4)) and not agrees.any()
    assert max(labels.max(), ids.max()) < tokenizer.vocab_size, "ids that stand for no text are never drawn"


def test_an_answer_that_is_cut_has_no_end_token_and_each_step_draws_anew(make_model, tokenizer):
    one = Rollouts(EXAMPLES[:1], length_of, tokenizer, max_new_tokens=2, group_size=8)
    model, steps = make_model(random_B=True), []
    for step in (0, 1):
        _, labels, *_ = one.draw(model, step, CONFIG)
        steps.append([row[row != -100].tolist() for row in labels])
        cut = [ids for ids in steps[-1] if tokenizer.eos_id not in ids]
        assert cut and all(len(ids) == 2 for ids in cut), f"cut at two tokens, without an end token: {steps[-1]}"
    assert steps[0] != steps[1], "the same prompt and weights at another step give other samples"


@pytest.mark.parametrize("precision, kinds", [("bfloat16", {torch.bfloat16}), ("float32", {torch.float32})])
def test_samples_are_drawn_in_the_precision_of_the_loss(make_model, rollouts, precision, kinds):
    model, found = make_model(), set()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: found.add(logits.dtype))
    rollouts.draw(model, 0, replace(CONFIG, precision=precision))
    assert found == kinds, f"precision {precision}: the logits to draw from are {found}"


# --- in the loop -----------------------------------------------------------------------------------------------------


def gradients_of_a_step(model, batch, config, objective) -> dict:
    kept = {}
    optimizer = SimpleNamespace(zero_grad=lambda set_to_none: model.zero_grad(set_to_none))
    optimizer.step = lambda: kept.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    training_step(model, optimizer, *batch[:2], config, None, objective, batch[2:])
    return kept


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("pieces", [1, 2, 8])
def test_the_gradient_of_a_step_is_that_of_the_formulas(make_model, rollouts, tokenizer, beta, pieces):
    """However the batch is cut, divided by all drawn tokens, those of groups that agree included."""
    model, temperature = make_model(torch.float64, random_B=True), 1.5
    config = replace(CONFIG, accumulation_steps=pieces, max_grad_norm=math.inf)
    ids, labels, _, rewards, _ = rollouts.draw(model, 0, config)
    rewards[4:] = 0.5
    advantages = group_advantages(rewards.double(), 4)
    objective = GroupPolicy(beta, temperature, tokenizer.vocab_size)
    batch = ids, labels, advantages, rewards, rewards > 2
    found = gradients_of_a_step(model, batch, config, objective)

    class Cool(nn.Module):  # logits as they are sampled from
        def forward(self, input_ids, where):
            return model(input_ids, where=where)[:, : tokenizer.vocab_size] / temperature

    log_probs = token_log_probs(Cool(), ids, labels)
    with torch.no_grad(), disable_lora(model):
        reference = token_log_probs(Cool(), ids, labels)
    mask = labels[:, 1:] != -100
    loss = grpo_loss(log_probs, log_probs.detach(), advantages, mask, kl=beta * kl_estimate(log_probs, reference))
    loss.backward()
    gap = max((found[name] - p.grad).abs().max().item() for name, p in model.named_parameters() if p.requires_grad)
    assert gap < 1e-13, f"{pieces} micro-batches, beta {beta}: the gradient is off by {gap:.2e}"


def test_groups_that_all_agree_change_nothing_and_are_shown(make_model, rollouts):
    rollouts.reward = lambda example, answer: 0.3
    model = make_model(random_B=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    history = train(model, rollouts, CONFIG, objective=GroupPolicy(), progress=False)
    gap = max((before[name] - p).abs().max().item() for name, p in model.named_parameters())
    assert gap == 0, f"nothing was better than anything else, and weights moved by {gap:.2e}"
    assert history.rewards == [[step, pytest.approx(0.3), 1.0] for step in range(6)], history.rewards


def test_rewards_rise(make_model, rollouts):
    rollouts.reward = lambda example, answer: answer.startswith(" ")
    config = replace(CONFIG, steps=25, batch_size=32, learning_rate=3e-2)
    model = make_model().requires_grad_(True)
    history = train(model, rollouts, config, objective=GroupPolicy(), progress=False)
    first, last = (sum(mean for _, mean, _ in part) / 5 for part in (history.rewards[:5], history.rewards[-5:]))
    assert last > first + 0.3, f"a blank in front is rewarded, and the mean reward went from {first:.3f} to {last:.3f}"


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_interrupted_and_resumed_is_uninterrupted(make_model, rollouts, tmp_path, beta):
    """Also what is sampled: the draws follow from step, seed and weights."""
    config, path = replace(CONFIG, save_every=1), tmp_path / "state.safetensors"

    def go(resume=False, dies_at=None, other=None):
        def after_step(step, optimizer):
            if step == dies_at:
                raise InterruptedError

        model = make_model(random_B=True)
        objective = other or GroupPolicy(beta)
        history = train(model, rollouts, config, None, None, path, resume, "", False, None, after_step, objective)
        return dict(model.named_parameters()), history.rewards

    whole, rewards = go()
    path.unlink()
    with pytest.raises(InterruptedError):
        go(dies_at=4)
    torch.manual_seed(77)
    with pytest.raises(ValueError, match="beta was"):
        go(resume=True, other=GroupPolicy(0.7))
    rollouts.max_new_tokens = 4
    with pytest.raises(ValueError, match="rollouts was"):
        go(resume=True)
    rollouts.max_new_tokens = 5
    resumed, resumed_rewards = go(resume=True)
    gap = max((whole[name] - resumed[name]).abs().max().item() for name in whole)
    assert gap == 0, f"the resumed run should end bit for bit with the same weights, and differs by {gap:.2e}"
    assert rewards == resumed_rewards and len(rewards) == 6, f"rewards {rewards}, resumed {resumed_rewards}"


def test_the_step_runs_on_fake_tensors():
    with FakeTensorMode():
        model = apply_lora(GPT(GPTConfig(23, 16, 24, 1, 2)), LoRAConfig(2, 4, target_modules="all-linear"))
        ids, each, config = torch.zeros(4, 8, dtype=torch.int64), torch.zeros(4), replace(CONFIG, accumulation_steps=2)
        optimizer = make_optimizer(model, config)
        loss = training_step(model, optimizer, ids, ids.clone(), config, 5, GroupPolicy(0.1), (each, each, each))
    assert loss.shape == ()


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_refused(make_model, rollouts, value):
    rollouts.reward = lambda example, answer: value
    with pytest.raises(ValueError, match=f"the reward of .* is {value}; it must be a finite number"):
        train(make_model(), rollouts, CONFIG, objective=GroupPolicy(), progress=False)


def test_a_policy_that_diverges_is_named_with_its_step(make_model, rollouts):
    config = replace(CONFIG, learning_rate=1e30, warmup_steps=0)
    with pytest.raises(NonFiniteError, match="at step 1 of 6 the logits to draw from are not finite: .* learning rate"):
        train(make_model(random_B=True), rollouts, config, objective=GroupPolicy(), progress=False)


def test_what_does_not_fit_is_refused(make_model, rollouts, tokenizer, make_experiment):
    with pytest.raises(ValueError, match="batch_size is 6; it must be whole groups of group_size, which is 4"):
        train(make_model(), rollouts, replace(CONFIG, batch_size=6), objective=GroupPolicy(), progress=False)
    with pytest.raises(ValueError, match="the training data: samples are drawn at temperature 1, the policy's is 0.5"):
        train(make_model(), rollouts, CONFIG, objective=GroupPolicy(temperature=0.5), progress=False)
    rows = Batches(rollouts.input_ids, rollouts.labels)
    with pytest.raises(ValueError, match="the training data: a group policy learns from samples"):
        train(make_model(), rows, CONFIG, objective=GroupPolicy(), progress=False)
    with pytest.raises(ValueError, match="has dropout 0.1"):
        train(make_model(dropout=0.1), rollouts, CONFIG, objective=GroupPolicy(), progress=False)
    with pytest.raises(ValueError, match="group_size is 1; it must be a whole number from 2"):
        Rollouts(EXAMPLES, length_of, tokenizer, 5, group_size=1)
    with pytest.raises(ValueError, match="no adapter to switch off"):
        train(GPT(GPTConfig(900, 16, 24, 1, 2)), rollouts, CONFIG, objective=GroupPolicy(0.1), progress=False)
    with pytest.raises(ValueError, match="nothing scores words"):
        make_experiment(objective="grpo")
    task = Task("count", EXAMPLES, EXAMPLES[:2], lambda example, answer: answer == example.completion)
    scored = replace(make_experiment().dataset, task=task)
    with pytest.raises(ValueError, match="batch_size is 4; .* whole groups of group_size, which is 3"):
        make_experiment(objective="grpo", dataset=scored, group_size=3)
    with pytest.raises(ValueError, match="beta 0.1: method full leaves no adapter"):
        make_experiment("full", objective="grpo", dataset=scored, group_size=2, beta=0.1)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "soft-prompt"])
def test_any_method_learns_from_rewards(make_experiment, method):
    task = Task("length", EXAMPLES, EXAMPLES[:2], lambda example, answer: len(answer) % 2 == 0)
    data = replace(make_experiment().dataset, task=task)
    history = run(make_experiment(method, objective="grpo", dataset=data, group_size=2), progress=False).history
    assert len(history.rewards) == 3 and not history.validation_loss, f"{history.rewards}, {history.validation_loss}"


def test_the_command_line_shows_rewards(base_folder, tmp_path, capsys):
    goal = ["--objective", "grpo", "--task", "facts", "--group-size", "2", "--batch-size", "4", "--steps", "1"]
    where = ["--base", str(base_folder.directory), "--out", str(tmp_path), "--rank", "2", "--count", "2"]
    assert main(["finetune", *where, *goal]) == 0
    said, noted = capsys.readouterr()
    assert "last_reward" in said and "agreeing_fraction" in said, said
    line = "nothing was learned: in every group of every step all rewards were the same"
    assert re.search("agreeing_fraction +1.0", said) and line in noted, (
        f"an untrained model has no answer: {said} {noted}"
    )
