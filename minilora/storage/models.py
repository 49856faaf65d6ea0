"""A model on disk, in Hugging Face Llama's layout: `config.json` and `model.safetensors`, or the shards of one.

Our parameters and config fields carry the layout's own names, so nothing is remapped: reading is opening the file and
putting each tensor where its name says. What takes the lines here is refusing. A checkpoint that nearly fits would
load and then speak nonsense, so everything is checked first (architecture, activation, rotary type, the name, shape
and type of every tensor), and each refusal says what is wrong and in which file.

Memory: the model is built on the meta device, where tensors have a shape and no data, and each tensor of the file
replaces its empty twin as it is read. The peak is the model and one tensor, not two models.
"""

import hashlib
import os
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.adapters.factors import weight_mark
from minilora.adapters.inject import lora_layers
from minilora.model import GPT, GPTConfig
from minilora.quant import Linear4bit, float_linears, put, quantize, quantized_layers
from minilora.storage.config import CONFIG, config_settings, read_config
from minilora.storage.files import open_safetensors, read_json, write_json, write_safetensors
from minilora.storage.quantized import (
    layer_tensors,
    quantization_settings,
    quantized_parts,
    read_layer,
)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device=None,
    quantize_to: str | None = None,
    block_size: int = 64,
    double_quant: bool = True,
) -> GPT:
    """Reads a Llama-layout folder into a GPT whose parameters all require gradients.

    dtype: None keeps the file's; a file that mixes types is read as the widest of them. device: None is the CPU.
    quantize_to: "nf4", "fp4" or "int4" turns each block linear into 4 bits as it is read, with block_size and
        double_quant as in `quantize_model`. Layers that the file holds in 4 bits stay as they are, whatever this says.

    Raises FileNotFoundError for a missing folder or file, and ValueError for a config that is broken or describes
    another architecture, for missing, extra and mis-shaped tensors (each by name), damaged 4-bit layers (by name), and
    for a truncated file.
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

    def read(name: str, dtype: torch.dtype | None = None) -> Tensor:
        # Opened anew for each tensor: closing lets go of the pages read so far, which would count as memory in use.
        with open_safetensors(files[name]) as file:
            return file.get_tensor(name).to(device=device, dtype=dtype, copy=True)

    with torch.device("meta"):
        model = GPT(config)
    linears = float_linears(model)
    stored = {name: parts for name, parts in quantized_parts(list(shapes)).items() if name in linears}
    for parts in stored.values():
        for part in parts:
            del shapes[part]
    # A tied head is not among these: the two names are one parameter.
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {name: shape for name, shape in expected.items() if name.removesuffix(".weight") not in stored}
    check_tensors(directory, expected, shapes)
    for name in expected:
        check_type(name, types[name], files[name])
    dtype = dtype or reduce(torch.promote_types, (FLOAT_TYPES[types[name]] for name in expected))
    for name, parts in stored.items():
        linear = linears[name]
        try:
            quantized = read_layer({part.removeprefix(f"{name}."): read(part) for part in parts}, linear.weight.shape)
        except ValueError as error:
            raise ValueError(f"{name} in {files[parts[0]]} {error}") from None
        put(model, name, Linear4bit.from_linear(linear, quantized))
    for name in expected:
        tensor = read(name, dtype)
        module, _, leaf = name.rpartition(".")
        if quantize_to and leaf == "weight" and module in linears:
            try:
                quantized = quantize(tensor, quantize_to, block_size, double_quant)
            except ValueError as error:
                raise ValueError(f"{name} in {files[name]}: {error}") from None
            put(model, module, Linear4bit.from_linear(linears[module], quantized))
        else:
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
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    quantized = {name.replace(".base_layer", ""): layer for name, layer in quantized_layers(model).items()}
    for name, layer in quantized.items():
        for part in layer_tensors(name, layer):
            del shapes[part]
        shapes[f"{name}.weight"] = layer.quantized.shape
    check_tensors("this model", expected, shapes)
    dtype = tensors["model.embed_tokens.weight"].dtype
    settings = config_settings(config, dtype)
    if quantized:
        settings["quantization_config"] = quantization_settings(next(iter(quantized.values())), dtype)
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
    # Where a start moved a part of W into the adapter (PiSSA), W itself is gone, but was marked before.
    marks = {f"{name}.weight": layer.original_mark for name, layer in lora_layers(model)}
    for name, weight in sorted(base_weights(model, original=True).items()):
        digest.update(f"{name} {marks.get(name) or weight_mark(weight)}\n".encode())
    return digest.hexdigest()


def base_weights(model: GPT, original: bool = False) -> dict[str, Tensor]:
    """The tensors under their plain Llama names, as they are written: a tied head once, adapters left out.

    Of a merged layer this gives the merged weight, or with `original` the frozen one from before the merge.
    """
    layers = dict(lora_layers(model))
    weights = {}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[0] not in layers:  # what a LoRALinear holds itself is the adapter
            weights[name.replace(".base_layer.", ".")] = parameter
    for name, layer in quantized_layers(model).items():
        weights |= layer_tensors(name.replace(".base_layer", ""), layer)
    if original:
        weights.update({f"{name}.weight": layer.original_weight for name, layer in layers.items() if layer.merged})
    return weights


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
    return header


def check_type(name: str, kind: str, path: Path):
    """Raises ValueError for a tensor that is not of floating-point numbers."""
    if kind not in FLOAT_TYPES:
        raise ValueError(f"tensor {name} in {path} has type {kind}; only {', '.join(FLOAT_TYPES)} can be read")


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
