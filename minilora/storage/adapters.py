"""A LoRA adapter on disk, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

PEFT is lenient on loading: a missing tensor keeps its random start with a warning, an extra one is dropped in silence.
This loader names each difference instead, and checks all of them before it touches the model, so a model is left
exactly as it was when loading fails. Loading onto another base than the adapter's own is refused (`peft.check_base`),
because the model would run and speak nonsense.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from minilora.adapters.adapter import Adapter, apply_adapter, extract_adapter
from minilora.adapters.inject import apply_lora, find_targets, lora_layers, plain_names
from minilora.config import LoRAConfig
from minilora.model import GPT
from minilora.storage.files import check_finite, check_tensors, naming, open_safetensors, read_json, shapes_of, shown
from minilora.storage.fingerprint import base_weights
from minilora.storage.folders import read_whole
from minilora.storage.models import EMBEDDING, HEAD, check_directory, check_type, read_header
from minilora.storage.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_base, check_foreign, write_adapter

# Fields of PEFT's config that we do not have, and the one value of each that describes what we do.
LORA_FIELDS = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "modules_to_save": None}
# Fields that say where an adapter comes from and how it began, not what it computes.
PAST_FIELDS = {"megatron_core", "qalora_group_size", "runtime_config", "eva_config", "init_lora_weights"}
# Starts after which PEFT's file holds plain LoRA for the base as it was. Others (PiSSA, OLoRA, LoftQ, ...) move a part
# of W into the adapter there, so such a file fits a changed base that is not on disk.
PLAIN_STARTS = [True, False, "gaussian", "eva", "orthogonal"]
# All other fields of LoRAConfig, each with the types that it may have.
FIELD_TYPES: dict[str, list[type]] = {"r": [int], "lora_alpha": [int, float], "lora_dropout": [int, float]}
FIELD_TYPES |= {"target_modules": [str, list], "rank_pattern": [dict], "alpha_pattern": [dict]}
FIELD_TYPES |= {"use_rslora": [bool], "use_dora": [bool]}
LAYER_FIELDS = {"layers_to_transform", "layers_pattern"}  # which become part of target_modules
MATRICES = ("lora_A", "lora_B", "lora_magnitude_vector")


def save_adapter(model: GPT, directory: str | Path, overwrite: bool = False):
    """Writes the model's LoRA layers, merged or not: A (r, in) and B (out, r) in float32, as PEFT does.

    The file holds plain LoRA on the model's base; after a start from PiSSA or OLoRA, at twice the rank. overwrite: also
    in place of a model. Raises ValueError for a model without LoRA layers, for a folder that holds a model, and for one
    that cannot be written.
    """
    adapter = extract_adapter(model)
    tensors: dict[str, Tensor] = {}
    for matrix, part in zip(MATRICES, (adapter.A, adapter.B, adapter.magnitude), strict=True):
        tensors |= {_tensor_name(name, matrix): tensor.float() for name, tensor in part.items()}
    write_adapter(model, directory, tensors, {**LORA_FIELDS, **asdict(adapter.config)}, overwrite)


def load_adapter(model: GPT, directory: str | Path, force: bool = False) -> GPT:
    """Applies a saved adapter to a plain model, or fills the LoRA layers of a model with the same config.

    `force` loads an adapter whose file names another base than this model. Raises as `read_adapter` does, and
    ValueError for LoRA layers that are merged or have another config. After an error the model is as it was.
    """
    directory, layers = Path(directory), dict(lora_layers(model))
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the model's LoRA layers are merged; unmerge_lora(model) before loading an adapter")

    def read() -> Adapter:
        check_directory(directory)
        if layers:
            _check_same_config(model, _read_config(directory / ADAPTER_CONFIG), directory)
        return read_adapter(model, directory, force)

    adapter = read_whole(directory, read)
    if not layers:
        apply_adapter(model, adapter)
        return model
    for name, layer in layers.items():
        adapter.fill(name, layer)
    vars(model)["lora_config"] = replace(vars(model)["lora_config"], init_lora_weights=True)
    return model


def read_adapter(model: GPT, directory: str | Path, force: bool = False) -> Adapter:
    """Reads an adapter for this model and leaves the model alone, with or without LoRA layers of its own.

    Raises FileNotFoundError for a missing folder or file, and ValueError for another method than LoRA, settings we do
    not have, another base than the model, unless `force`, tensors that are missing, extra, mis-shaped or not finite
    (each by name), and a truncated file.
    """
    directory = Path(directory)
    check_directory(directory)
    config, path = _read_config(directory / ADAPTER_CONFIG), directory / ADAPTER_WEIGHTS
    header = read_header(path)
    if not force:
        check_base(model, directory)  # first: of another base, the tensors differ by the hundred
    # A rehearsal on the meta device, shapes without data: it gives the tensors to expect, and raises the errors of
    # apply_lora, such as a target that matches nothing.
    with torch.device("meta"), naming(directory / ADAPTER_CONFIG):
        layers = dict(lora_layers(apply_lora(GPT(model.config), config)))
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        shapes = shapes_of(dict(layer.named_parameters(recurse=False)))
        expected |= {_tensor_name(name, matrix): shape for matrix, shape in shapes.items()}
    for name, (kind, _) in header.items():
        check_type(name, kind, path)
    for copy in _check_copies(model, path, header.keys() - expected.keys()):
        del header[copy]
    check_tensors(directory, expected, {name: shape for name, (_, shape) in header.items()})
    with open_safetensors(path) as file:
        tensors = {key: file.get_tensor(key) for key in expected}
    for key, tensor in tensors.items():
        check_finite(tensor, key, path)
    A, B, magnitude = (
        {name: tensors[key] for name in layers if (key := _tensor_name(name, matrix)) in expected}
        for matrix in MATRICES
    )
    return Adapter(config, A, B, magnitude)


def _check_copies(model: GPT, path: Path, extra: Iterable[str]) -> list[str]:
    """The tensors beside A and B that are copies of the base's own weights: PEFT writes one of the output head where
    that has an adapter. ValueError for one that differs, since the adapter then belongs to another base."""
    weights = base_weights(model, original=True)
    weights.setdefault(HEAD, weights[EMBEDDING])  # tied: the one matrix under two names
    own = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    copies = {name: name.replace(".base_layer.", ".") for name in extra if name.replace(".base_layer.", ".") in own}
    with open_safetensors(path) as file:
        for name, plain in copies.items():
            copy, weight = file.get_tensor(name), own[plain].detach().cpu()
            if copy.shape != weight.shape or not torch.equal(copy.to(weight.dtype), weight):
                raise ValueError(f"{path} holds {name}, a copy of its base's weight, and this model has another")
    return list(copies)


def _tensor_name(module: str, matrix: str) -> str:
    # PEFT's magnitude is a parameter of its own and has no .weight behind it.
    return f"base_model.model.{module}.{matrix}" + (".weight" if matrix in ("lora_A", "lora_B") else "")


def _read_config(path: Path) -> LoRAConfig:
    """adapter_config.json as a LoRAConfig. ValueError, naming the file, for a method or a setting that we lack."""
    settings = read_json(path)
    if (method := settings.get("peft_type")) != "LORA":
        raise ValueError(f"{path} is of an adapter with peft_type {shown(method)}; only 'LORA' can be loaded")
    start = settings.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{path} has init_lora_weights {shown(start)}, which fits a changed base; export it as plain LoRA"
        )
    differing = {key: value for key, value in settings.items() if value != LORA_FIELDS.get(key)}
    check_foreign(differing, FIELD_TYPES.keys() | PAST_FIELDS | LAYER_FIELDS, path)
    values = {key: settings[key] for key in FIELD_TYPES if settings.get(key) is not None}
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in values:
            raise ValueError(f"{path} has no {key}")
    for key, value in values.items():
        if type(value) not in FIELD_TYPES[key]:
            raise ValueError(f"{path} has {key} {shown(value)}, which is of the wrong type")
    if (layers := settings.get("layers_to_transform")) not in (None, []):
        values["target_modules"] = _targets_in(layers, settings.get("layers_pattern"), values["target_modules"], path)
    with naming(path):
        return LoRAConfig(**values)


def _targets_in(layers, pattern, targets, path: Path) -> str:
    """`layers_to_transform` and a list of targets as the one expression that means the same."""
    layers = layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int and layer >= 0 for layer in layers):
        raise ValueError(f"{path} has layers_to_transform {shown(layers)}, where numbers of layers are expected")
    if pattern not in (None, "", [], "layers", ["layers"]):
        raise ValueError(f"{path} has layers_pattern {shown(pattern)}; a Llama model's are called 'layers'")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"{path} has layers_to_transform, which needs target_modules as a list of names")
    numbers, names = "|".join(map(str, layers)), "|".join(map(re.escape, targets))
    return rf"(?=model\.layers\.({numbers})\.)(.*\.)?({names})"


def _check_same_config(model: GPT, stored: LoRAConfig, directory: Path):
    """All fields must agree but dropout, which acts in training only, and the start, which is past."""
    present, differing = vars(model)["lora_config"], []
    for field in fields(LoRAConfig):
        ours, theirs = getattr(present, field.name), getattr(stored, field.name)
        same = ours == theirs
        if field.name == "target_modules" and not same:  # two ways to name the same layers
            names = plain_names(model)
            with naming(directory):
                same = find_targets(names, ours) == find_targets(names, theirs)
        if not same and field.name not in ("lora_dropout", "init_lora_weights"):
            differing.append(f"{field.name} ({ours!r} in the model, {theirs!r} in the file)")
    if differing:
        raise ValueError(f"{directory} has another config than the model's LoRA layers: {', '.join(differing)}")
