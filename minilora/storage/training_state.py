"""The state of an unfinished run, so that training can be killed at any moment and go on as if nothing had happened.

What decides every later step is little: the trainable parameters, AdamW's two moments and step count for each, the
state of the random generators (dropout), and the number of steps done (the learning rate and the order of the data
follow from it). All of it goes into ONE safetensors file, because one file can be replaced in one move: with two, a
kill between them would pair the weights of one step with the moments of another.

Frozen parameters are not stored, so the state of an adapter run is as small as the adapter. A digest of them is kept
among the settings: a run resumed on another base would not fail, it would quietly train something else.
A second digest, of all that the file holds, tells a damaged file from a whole one: a flipped bit is a valid number.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.storage.files import (
    check_finite,
    check_tensors,
    open_safetensors,
    parse_json,
    shapes_of,
    write_safetensors,
)
from minilora.train_settings import History

KIND = "minilora training state, version 2"
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter: a count and two moments


def save_training_state(
    path: str | Path, model: nn.Module, optimizer: Optimizer, step: int, history: dict, settings: dict
):
    """Writes the state after `step` optimizer steps, atomically. `optimizer` is an AdamW over the trainable parameters.

    history and settings: dictionaries that JSON can hold. Raises ValueError if the file cannot be written.
    """
    notes = {"kind": KIND, "step": step, "history": history, "settings": settings}
    metadata, tensors = {key: json.dumps(value) for key, value in notes.items()}, state_tensors(model, optimizer)
    write_safetensors(path, tensors, {**metadata, "digest": state_digest(tensors, metadata)})


def load_training_state(path: str | Path, model: nn.Module, optimizer: Optimizer, settings: dict) -> tuple[int, dict]:
    """Puts a saved state into model, optimizer and random generators; returns (steps done, history).

    Everything is checked before anything is changed. Raises FileNotFoundError if there is no file, and ValueError if
    it is damaged, was written by an older version or under other settings (each differing field is named with both
    values), does not hold exactly the tensors that this model and optimizer need, or contradicts itself: its step,
    its history and the optimizer's counts must agree.
    """
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        if metadata.get("kind") != json.dumps(KIND):
            raise ValueError(f"{path} is not a training state of this version of minilora; start the run anew")
        try:
            saved = {name: file.get_tensor(name) for name in sorted(file.keys())}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
    try:
        step, history, old = (parse_json(metadata[key], constants=True) for key in ("step", "history", "settings"))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its header lacks the step, the history or the settings") from error
    if not isinstance(old, dict) or not isinstance(history, dict):
        raise ValueError(f"{path} is damaged: its history or its settings are not an object with named fields")
    check_same_settings(path, old, json.loads(json.dumps(settings)))  # through JSON, where a tuple becomes a list
    needed = state_tensors(model, optimizer)
    check_tensors(path, shapes_of(needed), shapes_of(saved))
    for name, tensor in needed.items():
        if saved[name].dtype != tensor.dtype:
            raise ValueError(f"{path} holds {name} as {saved[name].dtype}, where {tensor.dtype} is needed")
    if metadata.get("digest") != state_digest(saved, metadata):
        raise ValueError(f"{path} is damaged: its content is not what was written (its digest differs)")
    check_consistent(path, step, history, old, saved)

    names = {parameter: name for name, parameter in trainable(model).items()}
    for parameter, name in names.items():
        parameter.data.copy_(saved[f"parameters/{name}"])
    # load_state_dict numbers the parameters in the order of the groups, and moves each moment to its device.
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    moments = [{key: saved[f"optimizer/{name}/{key}"].clone() for key in ADAM_STATE} for name in ordered]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(enumerate(moments))})
    torch.set_rng_state(saved["random/cpu"])
    if "random/device" in saved:
        random_module(model).set_rng_state(saved["random/device"])
    return step, history


def state_digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """Of all that a state holds: the tensors, in the order of their names, and the notes."""
    notes = json.dumps([metadata.get(key) for key in ("step", "history", "settings")]).encode()
    everything = {**dict(sorted(tensors.items())), "notes": torch.tensor(list(notes), dtype=torch.uint8)}
    return digest(everything)


def check_consistent(path: str | Path, step: int, history: dict, settings: dict, saved: dict[str, Tensor]):
    """Raises ValueError for a step that the run does not have, or that history or optimizer contradict, for numbers
    that are not finite or cannot be moments, and for a state that the random generator does not take."""
    if type(step) is not int or not 0 <= step <= settings.get("steps", step):
        raise ValueError(f"{path} says that {step!r} steps are done, of {settings.get('steps', 'no')} in all")
    try:
        past = History(**history)
        done = [number for number, _ in past.train_loss]
        fits = done == list(range(step)) and len(past.step_seconds) == step and type(past.tokens) is int
        fits = fits and all(0 <= number <= step for number, _ in past.validation_loss)
        fits = fits and [number for number, *_ in past.rewards] in ([], done)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(f"{path} says that {step} steps are done, and its history is of another run")
    counts = [count.item() for name, count in saved.items() if name.endswith("/step")]
    if any(not 0 <= count <= step for count in counts) or max(counts, default=step) != step:
        raise ValueError(f"{path} says that {step} steps are done, and its optimizer has counted {max(counts):g}")
    for name, tensor in saved.items():
        if tensor.is_floating_point():
            check_finite(tensor, name, path)
        if name.endswith("/exp_avg_sq") and tensor.min() < 0:
            raise ValueError(f"{path} holds {name} with numbers below 0, where means of squares are expected")
    try:
        torch.Generator().set_state(saved["random/cpu"])
    except RuntimeError as error:
        raise ValueError(f"{path} holds a random/cpu that is not the state of a generator: {error}") from None


def check_resume(path: Path, resume: bool):
    """Raises ValueError where a run is to be resumed that has left no state at `path`, or begun over one that has."""
    if resume and not path.exists():
        raise ValueError(f"nothing to resume: {path} is not there (a finished run removes it)")
    if path.exists() and not resume:
        raise ValueError(f"{path} holds an unfinished run: continue it with --resume, or remove it to begin anew")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def random_module(model: nn.Module):
    """torch.cuda or torch.mps: the generator that dropout draws from on the model's device. None on the CPU."""
    device = next(model.parameters()).device.type
    return None if device == "cpu" else torch.get_device_module(device)


def state_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every tensor of the state under the name it has in the file."""
    tensors = {}
    for name, parameter in trainable(model).items():
        tensors[f"parameters/{name}"] = parameter.data
        state = optimizer.state.get(parameter)
        if not state:  # AdamW makes it at the first step; written as zeros, the names in the file are always the same
            state = {key: torch.zeros_like(parameter.data) for key in ADAM_STATE} | {"step": torch.tensor(0.0)}
        tensors |= {f"optimizer/{name}/{key}": state[key] for key in ADAM_STATE}
    tensors["random/cpu"] = torch.get_rng_state()
    if random_module(model) is not None:
        tensors["random/device"] = random_module(model).get_rng_state()
    return tensors


def check_same_settings(path: str | Path, old: dict, new: dict):
    keys = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    different = [f"{key} was {old.get(key, 'not set')} and is now {new.get(key, 'not set')}" for key in keys]
    if different:
        raise ValueError(f"{path} was written by a run with other settings: {'; '.join(different)}")


def run_identity(model: nn.Module, data, optimizer: Optimizer) -> dict:
    """All that decides a run besides its config and its state, small enough to be kept among the settings.

    data: anything with tensors `.input_ids` and `.labels`, `.more` of them where an objective needs that, and
        `.settings` where it depends on anything else.
    """
    frozen = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    more = {f"more/{number}": tensor for number, tensor in enumerate(getattr(data, "more", ()))}
    return {
        "device": next(model.parameters()).device.type,
        "group_learning_rates": [group["initial_lr"] for group in optimizer.param_groups],
        "group_weight_decays": [group["weight_decay"] for group in optimizer.param_groups],
        **getattr(data, "settings", {}),
        "data_digest": digest({"input_ids": data.input_ids, "labels": data.labels} | more),
        "frozen_digest": digest(frozen | dict(model.named_buffers())),
    }


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and every byte: equal digests mean equal tensors.

    About a second for each gigabyte: paid once per run for what is frozen, and at each save for what is trained.
    """
    total = hashlib.sha256()
    for name, tensor in tensors.items():
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
