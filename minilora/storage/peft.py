"""The common part of all adapter folders in PEFT's layout: two files, a note of the base, fields of origin.

An adapter is a few megabytes that mean nothing without the gigabytes they were trained on. So the file of tensors also
carries the fingerprint of its base, and how that base was stored, if in 4 bits. PEFT does not read these notes.
"""

import json
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from minilora.linear4bit import quantized_layers
from minilora.model import GPT
from minilora.quant import Quantization
from minilora.storage.files import open_safetensors, parse_json, read_json, shown
from minilora.storage.fingerprint import fingerprint
from minilora.storage.folders import write_pair
from minilora.storage.models import check_directory

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_FINGERPRINT, BASE_QUANTIZATION = "base_fingerprint", "base_quantization"  # our keys in safetensors' metadata

# Fields of every adapter_config.json that we write, beside the method's own.
COMMON_FIELDS = {"task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True}
# Fields that say where an adapter comes from, not what it computes.
ORIGIN_FIELDS = {*COMMON_FIELDS, "auto_mapping", "revision", "peft_version"}


def peft_type(directory: str | Path) -> str:
    """The method of a saved adapter: "LORA", "PROMPT_TUNING", "PREFIX_TUNING", or one that nothing here loads.

    Raises FileNotFoundError for a missing folder or config, and ValueError for a config that names no method.
    """
    check_directory(Path(directory))
    path = Path(directory) / ADAPTER_CONFIG
    method = read_json(path).get("peft_type")
    if not isinstance(method, str):
        raise ValueError(f"{path} has the peft_type {shown(method)}, which is not the name of a method")
    return method


def check_foreign(settings: dict, known: set[str], path: Path):
    """Raises ValueError for fields not `known` here that are switched on. One that is off changes nothing."""
    foreign = {key: value for key, value in settings.items() if key not in known | ORIGIN_FIELDS}
    # 0 may be the number of a layer or a token, so it is not off, as false, null and what is empty are.
    on = [f"{key[:100]} {shown(value)}" for key, value in foreign.items() if value or type(value) is int]
    if on:
        raise ValueError(f"{path} has settings that are not supported: {', '.join(on)}")


def write_adapter(
    model: GPT, directory: str | Path, tensors: dict[str, Tensor], settings: dict, overwrite: bool = False
):
    """Writes tensors and settings of an adapter, with the notes of its base, `model`. ValueError as `write_pair`."""
    metadata = {"format": "pt", BASE_FINGERPRINT: fingerprint(model)}
    if quantization := quantization_of(model):
        metadata[BASE_QUANTIZATION] = json.dumps(asdict(quantization))
    # PEFT's auto classes look here for the base: the path it was loaded from.
    origin = {"base_model_name_or_path": vars(model).get("name_or_path")}
    all_settings = {**COMMON_FIELDS, **origin, **settings}
    write_pair(Path(directory), ADAPTER_WEIGHTS, tensors, metadata, ADAPTER_CONFIG, all_settings, overwrite=overwrite)


def quantization_of(model: GPT) -> Quantization | None:
    """How the model's base is stored in 4 bits; None where it is not."""
    return next((layer.quantization for layer in quantized_layers(model).values()), None)


def base_quantization(directory: str | Path) -> Quantization | None:
    """How the base of a saved adapter was stored in 4 bits, by the note in the adapter's file; None where it was not,
    or where another library wrote the file, without a note. Raises FileNotFoundError and ValueError."""
    check_directory(Path(directory))
    path = Path(directory) / ADAPTER_WEIGHTS
    note = _note(path, BASE_QUANTIZATION)
    if note is None:
        return None
    try:
        settings = parse_json(note)
        return Quantization(*(settings[key] for key in ("scheme", "block_size", "double_quant")))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} has a note of its base's quantization that cannot be read: {error!r}") from None


def check_base(model: GPT, directory: Path):
    """Raises ValueError for an adapter that was trained on another base than this model, and says how they differ."""
    noted = _note(directory / ADAPTER_WEIGHTS, BASE_FINGERPRINT)
    if noted is None or noted == fingerprint(model):
        return
    theirs, ours = base_quantization(directory), quantization_of(model)
    difference = ""
    if theirs != ours:
        was, now = (f"in 4 bits ({base.scheme})" if base else "in floats" for base in (theirs, ours))
        difference = f" (its base was {was}, this model is {now})"
    elif ours:
        difference = " (both in 4 bits, but of other weights: a LoftQ adapter fits the base saved with it)"
    fault = f"was trained on another base than this model{difference}"
    own = directory / "base"  # written by the run that made the adapter, where that began elsewhere than its base
    if own.is_dir() and vars(model).get("name_or_path") != str(own.resolve()):
        raise ValueError(f"{directory} {fault}; use the one beside it (--base {own})")
    raise ValueError(f"{directory} {fault}; force=True (generate --force) loads it all the same")


def _note(path: Path, key: str) -> str | None:
    with open_safetensors(path) as file:
        return (file.metadata() or {}).get(key)
