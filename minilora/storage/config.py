"""The config.json of a Llama-layout folder: its fields, old spelling and new, into a GPTConfig and back.

What we could not run is refused by name: another architecture or activation, a rotary type or a quantization that we
lack, a value of the wrong kind. Such a model would load and then speak nonsense.
"""

import math
from pathlib import Path

import torch

from minilora.model import GPTConfig
from minilora.storage.files import read_json
from minilora.storage.quantized import check_quantization

CONFIG = "config.json"

# Field of config.json: its type, and the value that transformers assumes where the file has none.
REQUIRED = object()
FIELDS = {
    "vocab_size": (int, REQUIRED),
    "hidden_size": (int, REQUIRED),
    "intermediate_size": (int, REQUIRED),
    "num_hidden_layers": (int, REQUIRED),
    "num_attention_heads": (int, REQUIRED),
    "num_key_value_heads": (int, None),
    "head_dim": (int, None),
    "max_position_embeddings": (int, 2048),
    "rms_norm_eps": (float, 1e-6),
    "tie_word_embeddings": (bool, False),
    "attention_bias": (bool, False),
    "mlp_bias": (bool, False),
}
LLAMA3_ROPE = {
    "factor": float,
    "low_freq_factor": float,
    "high_freq_factor": float,
    "original_max_position_embeddings": int,
}
ROPE_FIELDS = {"default": {}, "linear": {"factor": float}, "llama3": LLAMA3_ROPE}


def load_config(directory: str | Path) -> GPTConfig:
    """The shape of the model in a folder, without its weights. FileNotFoundError or ValueError as in `load_model`."""
    path = Path(directory) / CONFIG
    return read_config(read_json(path), path)


def read_config(settings: dict, path: Path) -> GPTConfig:
    """The fields of a config.json, in old or new spelling, as a GPTConfig; ValueError for what we could not run."""
    architectures = settings.get("architectures") or ["LlamaForCausalLM"]
    for name, value, supported in (
        ("model_type", settings.get("model_type"), "llama"),
        ("architectures", architectures, ["LlamaForCausalLM"]),
        ("hidden_act", settings.get("hidden_act", "silu"), "silu"),
    ):
        if value != supported:
            raise ValueError(f"{path} has {name} {value!r}; only {supported!r} is supported")
    if settings.get("quantization_config"):
        check_quantization(settings["quantization_config"], path)
    fields = {name: _field(settings, name, kind, default, path) for name, (kind, default) in FIELDS.items()}
    # transformers 5 writes rope_parameters, rope_theta among them; before that it was rope_scaling, and theta outside.
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path} has rotary settings {rope!r}, where an object with a rope_type is expected")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in list(ROPE_FIELDS):
        raise ValueError(f"{path} has rope_type {rope_type!r}; only {', '.join(ROPE_FIELDS)} are supported")
    theta = _field({**settings, **rope}, "rope_theta", float, 10000.0, path)
    scaling = {name: _field(rope, name, kind, REQUIRED, path) for name, kind in ROPE_FIELDS[rope_type].items()}
    if scaling.get("high_freq_factor", 2) <= scaling.get("low_freq_factor", 1):
        raise ValueError(f"{path} has a high_freq_factor that is not above its low_freq_factor")
    try:
        return GPTConfig(
            **fields, rope_theta=theta, rope_scaling={"rope_type": rope_type, **scaling} if scaling else None
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _field(settings: dict, name: str, kind: type, default, path: Path):
    value = settings.get(name)
    if value is None and default is REQUIRED:
        raise ValueError(f"{path} has no {name}")
    if value is None:
        return default
    if kind is bool:
        right, wanted = isinstance(value, bool), "true or false"
    else:
        number = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        right, wanted = number and 0 < value < math.inf, f"{'a whole' if kind is int else 'a'} number above 0"
    if not right:
        raise ValueError(f"{path} has {name} {value!r}, where {wanted} is expected")
    return kind(value)


def config_settings(config: GPTConfig, dtype: torch.dtype) -> dict:
    """What config.json holds for `transformers`, with both the old and the new spelling where they differ."""
    rope = {"rope_theta": config.rope_theta, "rope_type": "default", **(config.rope_scaling or {})}
    type_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **{name: getattr(config, name) for name in FIELDS},
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling,
        "rope_parameters": rope,
        "torch_dtype": type_name,
        "dtype": type_name,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
