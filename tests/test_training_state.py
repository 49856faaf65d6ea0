"""storage/training_state.py: a run that was interrupted ends with exactly the weights of one that was not."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minilora.model import GPT, GPTConfig
from minilora.storage.files import open_safetensors, write_safetensors
from minilora.storage.training_state import digest, load_training_state, save_training_state, state_digest
from minilora.train import make_optimizer, train
from minilora.train_settings import NonFiniteError, TrainConfig

SHAPE = GPTConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
)
CONFIG = TrainConfig(steps=8, batch_size=4, learning_rate=1e-2, warmup_steps=2, eval_every=3, save_every=1)


class Noisy(nn.Module):
    """A GPT whose logits go through dropout, so that the random state matters. The embedding is frozen."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.gpt, self.dropout = GPT(SHAPE), nn.Dropout(0.2)
        self.gpt.model.embed_tokens.weight.requires_grad_(False)

    def forward(self, input_ids, where=None):
        return self.dropout(self.gpt(input_ids, where=where))


def small_data(seed=1) -> SimpleNamespace:
    ids = torch.randint(SHAPE.vocab_size, (10, 9), generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(input_ids=ids, labels=ids.clone())


def run(path, config=CONFIG, model=None, resume=False, **options):
    model = model or Noisy()
    data = options.pop("data", None) or small_data()
    history = train(model, data, config, small_data(2), state_path=path, resume=resume, progress=False, **options)
    return model, history


def assert_same(first: nn.Module, second: nn.Module):
    others = dict(second.named_parameters())
    for name, parameter in first.named_parameters():
        gap = (parameter - others[name]).abs().max().item()
        assert torch.equal(parameter, others[name]), f"{name} should be bit-equal, and differs by up to {gap:.2e}"


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, step: int):
    """The run dies when it is about to apply the gradients of `step`."""
    steps_left, apply = [step], torch.optim.AdamW.step

    def apply_or_die(optimizer):
        if steps_left[0] == 0:
            raise Interrupted
        steps_left[0] -= 1
        apply(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", apply_or_die)


@pytest.mark.parametrize("save_every", [1, 3])
@pytest.mark.parametrize("step", [0, 1, 2, 5, 7])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, monkeypatch, step, save_every):
    config, path = replace(CONFIG, save_every=save_every), tmp_path / "state.safetensors"
    whole, history = run(tmp_path / "whole.safetensors", config)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, step)
        run(path, config)
    torch.manual_seed(77)  # whatever the new process drew before
    resumed, resumed_history = run(path, config, Noisy(), resume=True)
    assert_same(whole, resumed)
    assert resumed_history.train_loss == history.train_loss, (
        f"uninterrupted {history.train_loss}, resumed {resumed_history.train_loss}"
    )
    assert resumed_history.validation_loss == history.validation_loss
    assert resumed_history.tokens == history.tokens and len(resumed_history.step_seconds) == CONFIG.steps


def test_resuming_restores_what_is_trainable_from_any_start(tmp_path):
    """The trained part comes from the file, not from what the new process happens to begin with."""
    model, history = run(tmp_path / "state.safetensors")
    other = Noisy()
    for parameter in other.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    resumed, resumed_history = run(tmp_path / "state.safetensors", model=other, resume=True)
    assert_same(model, resumed)
    assert resumed_history == history


def test_groups_keep_their_moments(tmp_path, monkeypatch):
    """Parameters in another order in the groups than in the model, each with the moments of its own."""

    def groups(model):
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"params": trainable[::-2], "lr": 0.03}, {"params": trainable[-2::-2]}]

    def grouped_run(path, resume=False):
        model = Noisy()
        return run(path, model=model, resume=resume, parameter_groups=groups(model))[0]

    whole = grouped_run(tmp_path / "whole.safetensors")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, 4)
        grouped_run(tmp_path / "state.safetensors")
    assert_same(whole, grouped_run(tmp_path / "state.safetensors", resume=True))


LONG = replace(CONFIG, steps=200, eval_every=0)
CHILD = """
import os, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_training_state as here
fsync = os.fsync
os.fsync = lambda descriptor: (fsync(descriptor), time.sleep(0.01))  # most of the time is spent inside a write
here.run({path!r}, here.LONG)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a signal of POSIX")
def test_kill_minus_nine_at_a_random_moment(tmp_path):
    path = tmp_path / "state.safetensors"
    code = CHILD.format(tests=str(Path(__file__).parent), path=str(path))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        while not path.exists():
            assert child.poll() is None, "the child ended before it saved anything"
            time.sleep(0.001)
        time.sleep(random.uniform(0.0, 0.5))
    finally:
        child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "the run was over before the kill; make it longer"
    with open_safetensors(path) as file:
        reached = int(file.metadata()["step"])
    assert 0 < reached < LONG.steps

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the child: sums in the same order
    try:
        resumed, _ = run(path, LONG, resume=True)
        whole, _ = run(None, replace(LONG, save_every=0))
    finally:
        torch.set_num_threads(threads)
    assert_same(whole, resumed)
    assert os.listdir(tmp_path) == ["state.safetensors"], "the kill left a temporary file that nothing cleared"


def test_a_non_finite_loss_leaves_the_last_good_state(tmp_path):
    class Poisoned(Noisy):
        calls = 0

        def forward(self, input_ids, where=None):
            self.calls += self.training
            return super().forward(input_ids, where) * (math.nan if self.calls == 6 else 1.0)

    path, config = tmp_path / "state.safetensors", replace(CONFIG, save_every=2)
    with pytest.raises(NonFiniteError, match="at step 5 of 8"):
        run(path, config, Poisoned())
    resumed, history = run(path, config, resume=True)
    assert len(history.train_loss) == 8
    assert_same(run(None, replace(config, save_every=0))[0], resumed)


def test_every_field_that_differs_is_named_with_both_values(tmp_path):
    path = tmp_path / "state.safetensors"
    run(path, settings={"r": 8})
    for options, differences in [
        (
            dict(config=replace(CONFIG, learning_rate=0.5, seed=3)),
            ["learning_rate was 0.01 and is now 0.5", "seed was 0"],
        ),
        (dict(config=replace(CONFIG, betas=(0.9, 0.999))), [r"betas was \[0.9, 0.95\] and is now \[0.9, 0.999\]"]),
        (dict(settings={"r": 16}), ["r was 8 and is now 16"]),
        (dict(settings={}), ["r was 8 and is now not set"]),
        (dict(data=small_data(3)), ["data_digest was"]),
        (dict(model=Noisy(seed=1)), ["frozen_digest was"]),
    ]:
        options = dict(settings={"r": 8}) | options
        with pytest.raises(ValueError, match="other settings") as caught:
            run(path, resume=True, **options)
        for difference in differences:
            caught.match(difference)
    assert "steps was" not in str(caught.value), "a field that agrees was named"


def test_nothing_changes_unless_everything_fits(tmp_path):
    """Missing, extra, mis-shaped tensors and the wrong type are each named, and the model stays as it was."""
    path, model = tmp_path / "state.safetensors", Noisy()
    optimizer = make_optimizer(model, CONFIG)
    save_training_state(path, model, optimizer, 0, {}, {})
    with open_safetensors(path) as file:
        metadata, saved = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    name = "parameters/gpt.lm_head.weight"
    saved = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in saved.items()}
    before = [parameter.clone() for parameter in model.parameters()]
    for tensors, complaint in [
        ({key: tensor for key, tensor in saved.items() if key != name}, f"missing: {name}"),
        (saved | {"parameters/more": torch.ones(1)}, "not expected: parameters/more"),
        (saved | {name: torch.ones(2, 3)}, rf"wrong shape: {name}: expected \(23, 16\), found \(2, 3\)"),
        (saved | {name: saved[name].double()}, f"{name} as torch.float64.*torch.float32"),
        (
            {key: t for key, t in saved.items() if "head.weight/exp_avg_sq" not in key},
            "missing: optimizer/.*exp_avg_sq",
        ),
    ]:
        write_safetensors(path, tensors, metadata)
        with pytest.raises(ValueError, match=rf"state\.safetensors.*{complaint}"):
            load_training_state(path, model, optimizer, {})
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)), (
        "a refused state changed the model"
    )
    write_safetensors(path, saved, metadata)
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged.*digest"):
        load_training_state(path, model, optimizer, {})
    saved |= {key: tensor - 1 for key, tensor in saved.items() if key.endswith("/step")}
    write_safetensors(path, saved, metadata | {"digest": state_digest(saved, metadata)})
    load_training_state(path, model, optimizer, {})
    assert not torch.equal(before[-1], list(model.parameters())[-1]), "the state should have been loaded"


def test_files_that_are_not_a_state(tmp_path):
    path, model = tmp_path / "state.safetensors", Noisy()
    optimizer = make_optimizer(model, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors"):
        load_training_state(path, model, optimizer, {})
    write_safetensors(path, {"w": torch.ones(1)}, {"format": "pt"})
    with pytest.raises(ValueError, match=r"state\.safetensors is not a training state"):
        load_training_state(path, model, optimizer, {})
    save_training_state(path, model, optimizer, 0, {}, {})
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            load_training_state(path, model, optimizer, {})
    path.write_bytes(whole)
    with open_safetensors(path) as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    for broken in ({"step": "nonsense"}, {"history": "{"}):
        write_safetensors(path, tensors, metadata | broken)
        with pytest.raises(ValueError, match=r"state\.safetensors is damaged"):
            load_training_state(path, model, optimizer, {})


def test_only_what_is_trained_is_stored(tmp_path):
    path, model = tmp_path / "state.safetensors", Noisy()
    save_training_state(path, model, make_optimizer(model, CONFIG), 0, {"a": [[0, 0.1]]}, {"b": (1, 2)})
    with open_safetensors(path) as file:
        assert not [name for name in file.keys() if "embed_tokens" in name]
        assert json.loads(file.metadata()["history"]) == {"a": [[0, 0.1]]}
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_the_digest_sees_every_byte_name_shape_and_type():
    base = {"a": torch.arange(6.0), "b": torch.ones(2, dtype=torch.bfloat16)}
    changed = base["a"].clone()
    changed[3] = torch.nextafter(changed[3], torch.tensor(9.0))
    others = [
        base | {"a": changed},
        base | {"a": base["a"].view(2, 3)},
        base | {"a": base["a"].flip(0)},
        base | {"a": base["a"].view(torch.int32)},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    assert digest(base) == digest({name: tensor.clone() for name, tensor in base.items()}), "equal tensors, two digests"
    assert len({digest(tensors) for tensors in [base, *others]}) == 1 + len(others), "two of these have the same digest"
    assert digest({"t": torch.arange(6).view(2, 3).t()}) == digest(
        {"t": torch.arange(6).view(2, 3).t().contiguous()}
    ), "strides changed the digest"
