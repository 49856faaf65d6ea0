"""The config.json of a Llama-layout folder: its fields, old spelling and new, into a GPTConfig and back.

A config that we could not run is refused by name: another architecture or activation, a rotary type or a quantization
that we lack, a value of the wrong kind. Such a model would load and then speak nonsense.
"""

from pathlib import Path

import torch

from minilora.dtypes import dtype_name
from minilora.model import GPTConfig
from minilora.storage.files import naming, read_json, shown
from minilora.storage.folders import settle
from minilora.storage.gguf import is_gguf, open_gguf
from minilora.storage.quantized import check_quantization

MODEL_CONFIG = "config.json"

# The one value of each of these fields that describes our model. Only model_type must be in the file.
SUPPORTED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}

# Field of config.json: its type, and the value that transformers assumes where the file has none.
REQUIRED = object()
SHAPE_FIELDS: dict[str, tuple[type, object]] = dict.fromkeys(
    ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), (int, REQUIRED)
)
SHAPE_FIELDS |= {"num_key_value_heads": (int, 0), "head_dim": (int, 0), "max_position_embeddings": (int, 2048)}
SHAPE_FIELDS |= {"rms_norm_eps": (float, 1e-6), "tie_word_embeddings": (bool, False)}
SHAPE_FIELDS |= {"attention_bias": (bool, False), "mlp_bias": (bool, False)}
ROPE_FIELDS: dict[str, dict[str, type]] = {
    "default": {},
    "linear": {"factor": float},
    "llama3": dict(factor=float, low_freq_factor=float, high_freq_factor=float, original_max_position_embeddings=int),
}
# Field: more than any model has, and few enough for a model to be built without weights; all other sizes up to 2**20.
LARGEST = {"num_hidden_layers": 1000, "vocab_size": 2**24, "max_position_embeddings": 2**31}
LARGEST |= {"original_max_position_embeddings": 2**31}
# What a field of each type may be in JSON, where true is of type bool and no int.
JSON_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number above 0, up to {largest}"),
    float: ((int, float), "a number above 0, from 1e-30 to 1e+30"),
    bool: ((bool,), "true or false"),
}


def load_config(directory: str | Path) -> GPTConfig:
    """The shape of the model in a folder or GGUF file, without its weights. FileNotFoundError or ValueError as in
    `load_model`."""
    if is_gguf(directory):
        return read_config(open_gguf(directory).settings, Path(directory))
    settle(Path(directory))
    path = Path(directory) / MODEL_CONFIG
    return read_config(read_json(path), path)


def read_config(settings: dict, path: Path) -> GPTConfig:
    """The fields of the config.json at `path` as a GPTConfig; ValueError for a model that we could not run."""
    for name, supported in SUPPORTED.items():
        value = settings.get(name) or (supported if name != "model_type" else None)
        if value != supported:
            raise ValueError(f"{path} has {name} {shown(value)}; only {supported!r} is supported")
    if settings.get("quantization_config"):
        check_quantization(settings["quantization_config"], path)
    fields = {name: _field(settings, name, kind, default, path) for name, (kind, default) in SHAPE_FIELDS.items()}
    # transformers 5 writes rope_parameters, rope_theta among them; before that it was rope_scaling, and theta outside.
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path} has rotary settings {shown(rope)}, where an object with a rope_type is expected")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in list(ROPE_FIELDS):  # a list, because the file's value may be one that cannot be hashed
        raise ValueError(f"{path} has rope_type {shown(rope_type)}; only {', '.join(ROPE_FIELDS)} are supported")
    scaling = {name: _field(rope, name, kind, REQUIRED, path) for name, kind in ROPE_FIELDS[rope_type].items()}
    if scaling.get("high_freq_factor", 2) <= scaling.get("low_freq_factor", 1):
        raise ValueError(f"{path} has a high_freq_factor that is not above its low_freq_factor")
    fields["rope_theta"] = _field({**settings, **rope}, "rope_theta", float, 10000.0, path)
    fields["rope_scaling"] = {"rope_type": rope_type, **scaling} if scaling else None
    with naming(path):
        return GPTConfig(**fields)


def _field(settings: dict, name: str, kind: type, default, path: Path):
    value = settings.get(name)
    if value is None and default is REQUIRED:
        raise ValueError(f"{path} has no {name}")
    if value is None:
        return default
    types, wanted = JSON_TYPES[kind]
    least, largest = (1, LARGEST.get(name, 2**20)) if kind is int else (1e-30, 1e30)
    if type(value) not in types or (kind is not bool and not least <= value <= largest):
        raise ValueError(f"{path} has {name} {shown(value)}, where {wanted.format(largest=largest)} is expected")
    return kind(value)


def config_settings(config: GPTConfig, dtype: torch.dtype) -> dict:
    """The fields of config.json for `transformers`, in both the old and the new spelling where they differ."""
    shape = {name: getattr(config, name) for name in (*SHAPE_FIELDS, "rope_theta", "rope_scaling")}
    rope = {"rope_theta": config.rope_theta, "rope_type": "default", **(config.rope_scaling or {})}
    dtypes = dict.fromkeys(("torch_dtype", "dtype"), dtype_name(dtype))
    return {**SUPPORTED, **shape, "rope_parameters": rope, **dtypes, "bos_token_id": 1, "eos_token_id": 2}
