"""Training soft prompts and prefixes: the gradients, and the loop, which does not know what it trains."""

from types import SimpleNamespace

import pytest
import torch
from test_fast import assert_derivatives
from test_prompts import IDS, PROMPTS, SHAPE, TEXT, N, assert_close, both, text_logits, tiny, trained
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from minilora.adapters.inject import count_parameters
from minilora.inference.generate import generate
from minilora.linear4bit import quantize_model
from minilora.memory import MemoryMeter
from minilora.model import GPT, GPTConfig
from minilora.quant import Quantization
from minilora.train import evaluate_loss, make_optimizer, train, training_step
from minilora.train_settings import TrainConfig


def data() -> SimpleNamespace:
    labels = IDS.clone()
    labels[0, :4] = -100
    return SimpleNamespace(input_ids=IDS, labels=labels)


def loss_of(prompt) -> torch.Tensor:
    return F.cross_entropy(prompt(IDS)[:, -9:-1].flatten(0, 1), IDS[:, 1:].flatten())


@both
def test_gradients_are_those_of_finite_differences(method):
    prompt = trained(method).double()

    assert_derivatives(lambda prompt_embeddings: prompt(IDS)[:, -9:].sin(), prompt_embeddings=prompt.prompt_embeddings)


@both
def test_every_number_of_the_prompt_gets_a_gradient_and_nothing_else_does(method):
    prompt = trained(method)
    loss_of(prompt).backward()
    gradients = {name: p.grad for name, p in prompt.named_parameters() if p.grad is not None}
    assert list(gradients) == ["prompt_embeddings"] and (gradients["prompt_embeddings"] != 0).all()
    assert gradients["prompt_embeddings"].dtype == torch.float32


@both
def test_checkpointing_gives_the_same_gradients_step_after_step(method):
    """A checkpointed block runs again in backward. It must not find its own tokens in the cache then."""
    prompt, gradients = trained(method), []
    for checkpointing in (False, True, True):
        prompt.model.gradient_checkpointing = checkpointing
        prompt.zero_grad()
        loss_of(prompt).backward()
        gradients.append(prompt.prompt_embeddings.grad.clone())
    for time in (1, 2):
        off = (gradients[time] - gradients[0]).abs().max()
        assert off == 0, f"step {time} with checkpointing: gradient off by {off:.1e}, none is allowed"


@both
def test_a_cache_grows_under_checkpointing_too(method):
    prompt = trained(method)
    expected, found = [], []
    for checkpointing, parts in ((False, expected), (True, found)):
        prompt.zero_grad()
        prompt.model.gradient_checkpointing = checkpointing
        cache = prompt.new_cache(3)
        logits = torch.cat([prompt(part, cache) for part in IDS.split([2, 3, 4], dim=1)], dim=1)
        logits.sin().sum().backward()
        parts += [logits.detach(), prompt.prompt_embeddings.grad.clone()]
        assert len(cache) == N + 9
    for a, b in zip(found, expected, strict=True):
        assert_close(a, b, 1e-12, "with and without checkpointing")


@both
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loop_trains_the_prompt_and_leaves_the_base_bit_for_bit(method, checkpointing):
    model = tiny(torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    prompt = method(model, N, TEXT)
    config = TrainConfig(steps=30, batch_size=3, learning_rate=0.1, gradient_checkpointing=checkpointing)
    history = train(prompt, data(), config, validation=data(), progress=False)
    assert history.validation_loss[-1][1] < history.validation_loss[0][1] - 0.3, history.validation_loss
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@both
def test_the_loss_is_the_mean_over_the_text_alone(method):
    prompt, total = trained(method), []
    log_p = text_logits(prompt, IDS).log_softmax(-1)
    for row in range(3):
        for t in range(8):
            if data().labels[row, t + 1] != -100:
                total.append(-log_p[row, t, IDS[row, t + 1]].item())
    assert abs(evaluate_loss(prompt, data(), 2) - sum(total) / len(total)) < 1e-12
    config = TrainConfig(steps=1, batch_size=3, learning_rate=1.0, accumulation_steps=3)
    loss = training_step(prompt, make_optimizer(prompt, config), IDS, data().labels, config).item()
    off = abs(loss - sum(total) / len(total))
    assert off < 1e-6, f"the loss of a step is {loss}, off by {off:.1e}"


@both
def test_a_killed_run_goes_on_bit_for_bit(method, tmp_path):
    config = TrainConfig(steps=6, batch_size=2, learning_rate=0.05, save_every=3)

    def stop(done, _):
        if done == 5:
            raise KeyboardInterrupt

    whole = trained(method, tiny(torch.float32))
    train(whole, data(), config, state_path=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(
            trained(method, tiny(torch.float32)),
            data(),
            config,
            state_path=tmp_path / "state",
            progress=False,
            after_step=stop,
        )
    resumed = method(tiny(torch.float32), N, TEXT)
    train(resumed, data(), config, state_path=tmp_path / "state", resume=True, progress=False)
    assert torch.equal(resumed.prompt_embeddings, whole.prompt_embeddings)


@both
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_step_runs_on_fake_tensors(method, precision):
    with FakeTensorMode():
        prompt = method(GPT(GPTConfig(**SHAPE)), N)
        config = TrainConfig(steps=1, batch_size=2, learning_rate=0.1, precision=precision)
        ids = torch.zeros(2, 8, dtype=torch.int64)
        assert training_step(prompt, make_optimizer(prompt, config), ids, ids, config).shape == ()


@both
def test_half_precision_bases_and_autocast_train_a_float32_prompt(method):
    reference = trained(method, tiny(torch.float32))
    loss_of(reference).backward()
    for prompt, autocast in (
        (trained(method, tiny(torch.bfloat16)), False),
        (trained(method, tiny(torch.float32)), True),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert prompt(IDS).dtype == torch.bfloat16
            loss = loss_of(prompt)
        loss.backward()
        grad, expected = prompt.prompt_embeddings.grad, reference.prompt_embeddings.grad
        assert grad.dtype == torch.float32
        assert (grad - expected).norm() < 0.2 * expected.norm(), (grad - expected).norm() / expected.norm()
        assert generate(prompt, PROMPTS, 4)


@both
def test_a_base_in_four_bits_carries_a_prompt(method):
    model = quantize_model(tiny(torch.float32, hidden_size=64), Quantization("nf4", double_quant=False))
    prompt = method(model, N, TEXT)
    loss_of(prompt).backward()
    assert prompt.prompt_embeddings.grad.abs().max() > 0
    assert count_parameters(prompt)[0] == prompt.prompt_embeddings.numel()


@both
def test_the_meter_sees_the_prompt_among_the_weights(method):
    prompt = trained(method, tiny(torch.float32))
    config = TrainConfig(steps=1, batch_size=3, learning_rate=0.1)
    optimizer = make_optimizer(prompt, config)
    with MemoryMeter(prompt, optimizer) as meter:
        training_step(prompt, optimizer, IDS, IDS, config)
    highest, trainable = meter.highest, 4 * prompt.prompt_embeddings.numel()
    assert highest["weights"] == 4 * sum(parameter.numel() for parameter in prompt.parameters())
    assert highest["gradients"] == trainable and 2 * trainable <= highest["optimizer"] < 2 * trainable + 16
