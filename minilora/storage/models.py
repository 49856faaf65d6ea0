"""A model on disk, in Hugging Face Llama's layout: `config.json` and `model.safetensors`, or the shards of one.

Our parameters and config fields carry the layout's own names, so nothing is remapped: reading is opening the file and
putting each tensor where its name says. What takes the lines here is refusing. A checkpoint that nearly fits would
load and then speak nonsense, so everything is checked first (architecture, activation, rotary type, the name, shape
and type of every tensor), and each refusal says what is wrong and in which file.

Memory: the model is built on the meta device, where tensors have a shape and no data, and each tensor of the file
replaces its empty twin as it is read. The peak is the model and one tensor, not two models.
"""

import hashlib
import math
import os
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.inject import lora_layers
from minilora.model import GPT, GPTConfig
from minilora.storage.files import open_safetensors, read_json, write_json, write_safetensors

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

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


def load_model(directory: str | Path, dtype: torch.dtype | None = None, device=None) -> GPT:
    """Reads a Llama-layout folder into a GPT whose parameters all require gradients.

    `dtype` None keeps the file's; a file that mixes types is read as the widest of them. `device` None is the CPU.
    Raises FileNotFoundError for a missing folder or file, and ValueError for a config that is broken or describes
    another architecture, for missing, extra and mis-shaped tensors (each by name), and for a truncated file.
    """
    directory = Path(directory)
    check_directory(directory)
    settings = read_json(directory / CONFIG)
    config = read_config(settings, directory / CONFIG)
    files, types, shapes = {}, {}, {}
    for path in _weight_files(directory):
        for name, (kind, shape) in read_header(path).items():
            if name in files:
                raise ValueError(f"tensor {name} is in {files[name]} and again in {path.name}, in {directory}")
            if not name.endswith(".rotary_emb.inv_freq"):  # old checkpoints stored what we compute from rope_theta
                files[name], types[name], shapes[name] = path, kind, shape
    if config.tie_word_embeddings and "lm_head.weight" in shapes:
        _check_second_copy(files)
        del shapes["lm_head.weight"]

    with torch.device("meta"):
        model = GPT(config)
    # A tied head is not among these: the two names are one parameter.
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    check_tensors(directory, expected, shapes)
    dtype = dtype or reduce(torch.promote_types, (FLOAT_TYPES[types[name]] for name in expected))
    for name in expected:
        # Opened anew for each tensor: closing lets go of the pages read so far, which would count as memory in use.
        with open_safetensors(files[name]) as file:
            tensor = file.get_tensor(name).to(device=device, dtype=dtype, copy=True)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # the new parameter, no longer the one on meta
    model.token_ids = {key: settings[key] for key in ("bos_token_id", "eos_token_id") if key in settings}
    return model


def save_model(model: GPT, directory: str | Path):
    """Writes `config.json` and `model.safetensors`, which `transformers` and `load_model` read.

    Merged LoRA layers are written as the plain layers they now are, without the adapter. Raises ValueError for LoRA
    that is not merged, for tensors the layout has no place for, and for a folder that cannot be written.
    """
    unmerged = [name for name, layer in lora_layers(model) if not layer.merged]
    if unmerged:
        raise ValueError(
            f"{len(unmerged)} LoRA layers are not merged ({unmerged[0]} is the first): call merge_lora(model) first, "
            "or save_adapter to keep the adapter apart"
        )
    tensors = base_weights(model)
    config = GPTConfig(**{**vars(model.config), "tie_word_embeddings": "lm_head.weight" not in tensors})
    with torch.device("meta"):
        expected = {name: tuple(parameter.shape) for name, parameter in GPT(config).named_parameters()}
    check_tensors("this model", expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    settings = config_settings(config, tensors["model.embed_tokens.weight"].dtype)
    settings.update(getattr(model, "token_ids", {}))  # a checkpoint's own begin and end tokens outlive the round trip
    write_pair(Path(directory), WEIGHTS, tensors, {"format": "pt"}, CONFIG, settings)


def fingerprint(model: GPT) -> str:
    """64 hex digits that identify the base's weights, with LoRA applied, merged or absent.

    A SHA-256 over the plain name and shape of each weight, every n-th value (about 4096 of each tensor), and a sum of
    all values. So a 7B model is read through once and little of it is hashed: the sum notices a change anywhere, the
    sample notices a change of order. The sum adds bit patterns, four values to a 64-bit integer: unlike a sum of
    floats it is exact, so it does not depend on the machine, the number of threads or the order of adding.

    Values are rounded to bfloat16 first, so a base has one fingerprint whether it is loaded as float32 or bfloat16.
    What that gives up: changes too small to show in bfloat16 (under 1/256 of a weight) pass unnoticed, though hardly
    in all weights at once. A float32 file loaded as float16 is rounded twice and counts as another base.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(base_weights(model, original=True).items()):
        values = weight.detach().to(torch.bfloat16).flatten()
        total = F.pad(values, (0, -len(values) % 4)).view(torch.int64).sum().item()
        sample = values[:: max(1, len(values) // 4096)].view(torch.int16).tolist()
        digest.update(f"{name} {tuple(weight.shape)} {total} {sample}\n".encode())
    return digest.hexdigest()


def base_weights(model: GPT, original: bool = False) -> dict[str, Tensor]:
    """The weights under their plain Llama names, a tied head once, adapters left out.

    Of a merged layer this gives the merged weight, or with `original` the frozen one from before the merge.
    """
    layers = dict(lora_layers(model))
    weights = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in layers:  # what a LoRALinear holds itself is the adapter
            weights[name.replace(".base_layer.", ".")] = parameter
    if original:
        weights.update({f"{name}.weight": layer.original_weight for name, layer in layers.items() if layer.merged})
    return weights


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


def write_pair(directory: Path, weights_name: str, tensors: dict, metadata: dict, config_name: str, settings: dict):
    """Replaces weights and the config that explains them. Killed at any moment, the folder never pairs old with new."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file; saving needs a folder")
    # The slow part first, beside the old pair, which stays whole. Then the old config goes: from here until the new
    # one stands the folder has none and is refused by name. Weights under another model's config might load.
    new_weights = directory / f"{weights_name}.new"
    write_safetensors(new_weights, tensors, metadata)
    (directory / config_name).unlink(missing_ok=True)
    os.replace(new_weights, directory / weights_name)
    write_json(directory / config_name, settings)


def check_directory(directory: Path):
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is {'a file, not' if directory.exists() else 'not'} a folder")


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of every tensor in a safetensors file, read from its header alone."""
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    for name, (kind, _) in header.items():
        if kind not in FLOAT_TYPES:
            raise ValueError(f"tensor {name} in {path} has type {kind}; only {', '.join(FLOAT_TYPES)} can be read")
    return header


def check_tensors(where, expected: dict[str, tuple], found: dict[str, tuple]):
    """Raises ValueError unless both hold the same names and shapes; every difference is named."""
    missing = [f"{name} {shape}" for name, shape in expected.items() if name not in found]
    extra = [f"{name} {shape}" for name, shape in found.items() if name not in expected]
    shared = expected.keys() & found.keys()
    wrong = [f"{n}: expected {expected[n]}, found {found[n]}" for n in sorted(shared) if expected[n] != found[n]]
    faults = {"missing": missing, "not expected": extra, "of the wrong shape": wrong}
    problems = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
    if problems:
        raise ValueError(f"the tensors of {where} do not fit its config: {problems}")


def _weight_files(directory: Path) -> list[Path]:
    """The one weights file, or the shards that the index names."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        raise FileNotFoundError(f"{directory} has neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{directory / INDEX} has no weight_map from tensor names to files")
    shards = list(weight_map.values())
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:  # never a path out of the folder
            raise ValueError(f"{directory / INDEX} maps a tensor to {shard!r}, which is not a plain file name")
    return [directory / shard for shard in sorted(set(shards))]


def _check_second_copy(files: dict[str, Path]):
    """A tied model has one matrix; a file that holds two of them is accepted only if they are the same."""
    copies = []
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if name in files:
            with open_safetensors(files[name]) as file:
                copies.append(file.get_tensor(name))
    if len(copies) == 2 and not torch.equal(*copies):
        raise ValueError(
            f"{files['lm_head.weight']} has an lm_head.weight of its own, but {CONFIG} ties it to the embedding "
            "(tie_word_embeddings)"
        )
