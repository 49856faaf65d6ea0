"""An adapter on disk, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

An adapter is a few megabytes that mean nothing without the gigabytes they were trained on. So the file also carries
the fingerprint of its base, and loading onto another one is refused: it would run, and speak nonsense.

PEFT itself is lenient here: a missing tensor keeps its random start with a warning, an extra one is dropped in
silence. This loader names each difference instead, and checks all of them before it touches the model, so a model is
left exactly as it was when loading fails.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch

from minilora.adapters.inject import Adapter, apply_adapter, apply_lora, extract_adapter, lora_layers
from minilora.lora import LoRAConfig
from minilora.model import GPT
from minilora.quant import check_settings, quantized_layers
from minilora.storage.files import open_safetensors, read_json
from minilora.storage.models import check_directory, check_tensors, check_type, fingerprint, read_header, write_pair

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Our keys in the safetensors metadata; PEFT does not read them.
FINGERPRINT, QUANTIZATION = "base_fingerprint", "base_quantization"

# Fields of PEFT's config that we do not have, and the one value each that describes what we do.
FIXED = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": None,
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
}
# Fields that say where an adapter comes from and how it began, not what it computes.
IGNORED = {"task_type", "base_model_name_or_path", "inference_mode", "auto_mapping", "revision", "peft_version"}
IGNORED |= {"megatron_core", "qalora_group_size", "runtime_config", "eva_config", "init_lora_weights"}
# Starts that leave the base alone. Others (PiSSA, OLoRA, LoftQ, ...) move a part of W into the adapter, so the file
# fits a changed base that is not on disk.
PLAIN_STARTS = [True, False, "gaussian", "eva", "orthogonal"]
TYPES = {"r": int, "lora_alpha": (int, float), "lora_dropout": (int, float), "target_modules": (str, list)}
TYPES |= {"use_rslora": bool, "use_dora": bool, "rank_pattern": dict, "alpha_pattern": dict}


def save_adapter(model: GPT, directory: str | Path):
    """Writes the model's LoRA layers, merged or not: A (r, in) and B (out, r) in float32, as PEFT does.

    The file holds plain LoRA on the base as it was before `apply_lora`; after a start from PiSSA or OLoRA, at twice
    the rank. Raises ValueError for what `extract_adapter` refuses and for a folder that cannot be written.
    """
    adapter = extract_adapter(model)
    parts = {"lora_A": adapter.A, "lora_B": adapter.B, "lora_magnitude_vector": adapter.magnitude}
    tensors = {_tensor_name(name, part): tensor.float() for part in parts for name, tensor in parts[part].items()}
    metadata = {"format": "pt", FINGERPRINT: fingerprint(model)}
    if quantization := quantization_of(model):
        metadata[QUANTIZATION] = json.dumps(quantization)
    write_pair(Path(directory), WEIGHTS, tensors, metadata, CONFIG, {**FIXED, **asdict(adapter.config)})


def quantization_of(model: GPT) -> dict | None:
    """How the model's base is stored in 4 bits, as arguments of quantize_model; None where it is not."""
    for layer in quantized_layers(model).values():
        return {"scheme": layer.scheme, "block_size": layer.block_size, "double_quant": layer.double_quant}
    return None


def base_quantization(directory: str | Path) -> dict | None:
    """How the base of a saved adapter was stored in 4 bits, as the adapter's file says; None if it was not, or if the
    file was written by another library, which keeps no such note. Raises FileNotFoundError and ValueError."""
    path = Path(directory) / WEIGHTS
    with open_safetensors(path) as file:
        note = (file.metadata() or {}).get(QUANTIZATION)
    try:
        quantization = json.loads(note) if note else None
        if quantization is not None:
            check_settings(quantization["scheme"], quantization["block_size"])
            return {key: quantization[key] for key in ("scheme", "block_size", "double_quant")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} has a note of its base's quantization that cannot be read: {error!r}") from None


def load_adapter(model: GPT, directory: str | Path, force: bool = False) -> GPT:
    """Applies a saved adapter to a plain model, or fills the LoRA layers of a model with the same config.

    `force` loads an adapter whose file names another base than this model. Raises what `read_adapter` raises, and
    ValueError for LoRA layers that are merged or have another config. After an error the model is as it was.
    """
    directory, layers = Path(directory), dict(lora_layers(model))
    if not layers:
        return apply_adapter(model, read_adapter(model, directory, force))
    check_directory(directory)
    _check_same_config(model.lora_config, _read_config(directory / CONFIG), directory)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the model's LoRA layers are merged; unmerge_lora(model) before loading an adapter")
    if any(layer.moved for layer in layers.values()):
        raise ValueError(
            f"the model's LoRA layers start from {model.lora_config.init_lora_weights}, which changed the base; "
            "load the adapter onto the plain model"
        )
    adapter = read_adapter(model, directory, force)
    for name, layer in layers.items():
        adapter.fill(name, layer)
    return model


def read_adapter(model: GPT, directory: str | Path, force: bool = False) -> Adapter:
    """Reads an adapter for this model and leaves the model alone, with or without LoRA layers of its own.

    Raises FileNotFoundError for a missing folder or file, and ValueError for another method than LoRA, settings we do
    not have, tensors that are missing, extra or mis-shaped (each by name), a truncated file, or another base than the
    model, unless `force`.
    """
    directory = Path(directory)
    check_directory(directory)
    config = _read_config(directory / CONFIG)
    header = read_header(directory / WEIGHTS)
    # A rehearsal on the meta device, shapes without data: it gives the tensors to expect, and raises what applying
    # would raise (a target that matches nothing, say).
    with torch.device("meta"):
        layers = dict(lora_layers(apply_lora(GPT(model.config), config)))
    expected = {
        _tensor_name(name, matrix): tuple(parameter.shape)
        for name, layer in layers.items()
        for matrix, parameter in layer.named_parameters(recurse=False)
    }
    for name, (kind, _) in header.items():
        check_type(name, kind, directory / WEIGHTS)
    check_tensors(directory, expected, {name: shape for name, (_, shape) in header.items()})
    with open_safetensors(directory / WEIGHTS) as file:
        base = (file.metadata() or {}).get(FINGERPRINT)
        matrices = ("lora_A", "lora_B", "lora_magnitude_vector")
        A, B, magnitude = (
            {name: file.get_tensor(key) for name in layers if (key := _tensor_name(name, matrix)) in expected}
            for matrix in matrices
        )
    if base is not None and not force and base != fingerprint(model):
        raise ValueError(
            f"{directory} was trained on another base than this model{_how(directory, model)}; "
            "force=True loads it all the same"
        )
    return Adapter(config, A, B, magnitude)


def _how(directory: Path, model: GPT) -> str:
    """Where only the storage of the base differs, or perhaps not only: what the two are."""
    theirs, ours = base_quantization(directory), quantization_of(model)
    if theirs == ours:
        return " (both in 4 bits, but of other weights: a LoftQ adapter fits the base saved with it)" if ours else ""
    words = [f"in 4 bits ({base['scheme']})" if base else "in floats" for base in (theirs, ours)]
    return f" (its base was {words[0]}, this model is {words[1]})"


def _tensor_name(module: str, matrix: str) -> str:
    # PEFT's magnitude is a parameter of its own and has no .weight behind it.
    return f"base_model.model.{module}.{matrix}" + (".weight" if matrix in ("lora_A", "lora_B") else "")


def _read_config(path: Path) -> LoRAConfig:
    settings = read_json(path)
    method = settings.get("peft_type")
    if method != "LORA":
        raise ValueError(f"{path} is of an adapter with peft_type {method!r}; only 'LORA' can be loaded")
    start = settings.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ValueError(f"{path} has init_lora_weights {start!r}, which fits a changed base; export it as plain LoRA")
    known = {field.name for field in fields(LoRAConfig)} - IGNORED
    # A field that we lack may stand in the file as long as it is off: then it changes nothing.
    foreign = {key: value for key, value in settings.items() if key not in known | IGNORED}
    on = [f"{key} {value!r}" for key, value in foreign.items() if value and value != FIXED.get(key)]
    if on:
        raise ValueError(f"{path} has settings that are not supported: {', '.join(on)}")
    values = {key: value for key, value in settings.items() if key in known and value is not None}
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in values:
            raise ValueError(f"{path} has no {key}")
    for key, value in values.items():
        if key in TYPES and (not isinstance(value, TYPES[key]) or isinstance(value, bool) != (TYPES[key] is bool)):
            raise ValueError(f"{path} has {key} {value!r}, which is of the wrong type")
    try:
        return LoRAConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _check_same_config(present: LoRAConfig, stored: LoRAConfig, directory: Path):
    """All must agree but dropout, which acts in training only, and the start, which is past; the model's own stay."""
    differing = []
    for field in fields(LoRAConfig):
        ours, theirs = getattr(present, field.name), getattr(stored, field.name)
        if isinstance(ours, list) and isinstance(theirs, list):  # target_modules is a set: its order means nothing
            ours, theirs = sorted(set(ours)), sorted(set(theirs))
        if ours != theirs and field.name not in ("lora_dropout", "init_lora_weights"):
            differing.append(f"{field.name} ({ours!r} in the model, {theirs!r} in the file)")
    if differing:
        raise ValueError(f"{directory} has another config than the model's LoRA layers: {', '.join(differing)}")
