"""A model on disk, in Hugging Face Llama's layout: `config.json` and `model.safetensors`, or the shards of one.

Our parameters and config fields carry the layout's own names, so nothing is remapped: reading is opening the file and
putting each tensor where its name says. Most lines here check. A checkpoint that nearly fits would load and then speak
nonsense, so everything is checked first (architecture, activation, rotary type, the name, shape and type of every
tensor), and each refusal names the fault and the file.

Memory: the model is built on the meta device, where tensors have a shape and no data, and each tensor of the file
replaces its empty twin as it is read. The peak is the model and one tensor, not two models.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.adapters.inject import lora_layers
from minilora.linear4bit import Linear4bit, float_linears, quantized_layers, replace_module
from minilora.model import GPT
from minilora.quant import Quantization, quantize
from minilora.storage.config import MODEL_CONFIG, config_settings, read_config
from minilora.storage.files import (
    check_finite,
    check_tensors,
    naming,
    open_safetensors,
    pickle_advice,
    read_json,
    shapes_of,
    shown,
)
from minilora.storage.fingerprint import base_weights
from minilora.storage.folders import read_whole, settle, write_pair
from minilora.storage.gguf import is_gguf, open_gguf
from minilora.storage.quantized import layer_tensors, quantization_settings, quantized_parts, read_layer

MODEL_WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKEN_IDS = "bos_token_id", "eos_token_id", "pad_token_id"  # fields of config.json that are the tokenizer's
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(
    directory: str | Path, dtype: torch.dtype | None = None, device=None, quantization: Quantization | None = None
) -> GPT:
    """Reads a Llama-layout folder, or a GGUF file, into a GPT whose parameters all require gradients.

    dtype: None keeps the file's; a file that mixes types is read as the widest of them. device: None is the CPU.
    quantization: turns each block linear into 4 bits as it is read. Layers that the file holds in 4 bits stay as they
        are, whatever this says.

    Raises FileNotFoundError for a missing folder or file, and ValueError for a config that is broken or describes
    another architecture, for missing, extra and mis-shaped tensors (each by name), tensors with NaN or infinity in them
    and damaged 4-bit layers (by name), and for a truncated file.
    """
    if is_gguf(directory):
        return _read_model(directory, dtype, device, quantization)
    return read_whole(Path(directory), lambda: _read_model(directory, dtype, device, quantization))


def _read_model(directory: str | Path, dtype: torch.dtype | None, device, quantization: Quantization | None) -> GPT:
    checkpoint = open_checkpoint(directory)
    config = read_config(checkpoint.settings, checkpoint.config_path)
    files, types, shapes = checkpoint.files, checkpoint.types, dict(checkpoint.shapes)

    def read(name: str, dtype: torch.dtype | None = None) -> Tensor:
        tensor = checkpoint.read(name).to(dtype=dtype, copy=True)
        check_finite(tensor, name, files[name])
        return tensor.to(device)

    if config.tie_word_embeddings and HEAD in shapes:  # the one matrix, under the head's name alone or a second time
        if EMBEDDING not in shapes:
            checkpoint.rename(HEAD, EMBEDDING)
            shapes[EMBEDDING] = shapes[HEAD]
        elif types[HEAD] != types[EMBEDDING] or not torch.equal(read(HEAD), read(EMBEDDING)):
            tied = f"{MODEL_CONFIG} ties it to the embedding (tie_word_embeddings)"
            raise ValueError(f"{files[HEAD]} has an lm_head.weight of its own, but {tied}")
        del shapes[HEAD]
    if (layers := config.num_hidden_layers) > len(shapes):  # before so many are built
        raise ValueError(f"{checkpoint.config_path} has num_hidden_layers {layers}, for {len(shapes)} tensors in all")
    with torch.device("meta"):
        model = GPT(config)
    linears = float_linears(model)
    in_4_bits = {name: parts for name, parts in quantized_parts(list(shapes)).items() if name in linears}
    for parts in in_4_bits.values():
        for part in parts:
            del shapes[part]
    # named_parameters gives a tied head under the embedding's name alone.
    expected = shapes_of(dict(model.named_parameters()))
    expected = {name: shape for name, shape in expected.items() if name.removesuffix(".weight") not in in_4_bits}
    check_tensors(checkpoint.path, expected, shapes)
    for name in expected:
        check_type(name, types[name], files[name])
    asked, dtype = dtype, dtype or _widest(types[name] for name in expected)

    def stored(part: str) -> Tensor:  # of a 4-bit layer, which checks its own numbers
        return checkpoint.read(part).to(device=device, copy=True)

    for name, parts in in_4_bits.items():
        linear = linears[name]
        with naming(f"{name} in {files[parts[0]]}"):
            quantized = read_layer({part.removeprefix(f"{name}."): stored(part) for part in parts}, linear.weight.shape)
        quantized = replace(quantized, dtype=asked or quantized.dtype)  # of the weight that the codes stand for
        replace_module(model, name, Linear4bit.from_linear(linear, quantized))
    for name in expected:
        module, _, leaf = name.rpartition(".")
        if quantization and leaf == "weight" and module in linears:
            weight = read(name)  # the file's values: one base for any dtype
            with naming(f"{name} in {files[name]}"):
                quantized = quantize(weight, **asdict(quantization))
            quantized = replace(quantized, dtype=dtype)
            replace_module(model, module, Linear4bit.from_linear(linears[module], quantized))
        else:
            setattr(model.get_submodule(module), leaf, nn.Parameter(read(name, dtype)))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight  # the new parameter, no longer the one on meta
    vars(model)["token_ids"] = {key: checkpoint.settings[key] for key in TOKEN_IDS if key in checkpoint.settings}
    vars(model)["name_or_path"] = str(Path(directory).resolve())  # where an adapter says that its base came from
    return model


def stored_dtype(directory: str | Path) -> torch.dtype:
    """The type that `load_model` reads a folder or a GGUF file in by itself: the widest of its tensors in floats."""
    checkpoint = open_checkpoint(directory)
    in_4_bits = {part for parts in quantized_parts(list(checkpoint.shapes)).values() for part in parts}
    for name, kind in checkpoint.types.items():
        if name not in in_4_bits:
            check_type(name, kind, checkpoint.files[name])
    return _widest(kind for name, kind in checkpoint.types.items() if name not in in_4_bits)


def _widest(kinds: Iterable[str]) -> torch.dtype:
    """float32 of none, a file without tensors, which is refused where their names are checked."""
    known = [FLOAT_TYPES[kind] for kind in kinds]
    return reduce(torch.promote_types, known) if known else torch.float32


@dataclass
class Checkpoint:
    """What a model is read from, whatever its format: the fields of config.json, and each tensor by name."""

    path: Path  # for messages: the folder or the file
    config_path: Path  # where `settings` stand
    settings: dict
    files: dict[str, Path]  # by tensor name, where it lies
    types: dict[str, str]  # as safetensors spells them
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]

    def rename(self, old: str, new: str):
        """Lets a tensor be known, and read, under another name."""
        read = self.read
        self.files[new], self.types[new], self.shapes[new] = self.files[old], self.types[old], self.shapes[old]
        self.read = lambda name: read(old if name == new else name)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A Llama-layout folder or a GGUF file, headers read. Raises FileNotFoundError and ValueError as `load_model`."""
    path = Path(path)
    if is_gguf(path):
        file = open_gguf(path)
        files, types = dict.fromkeys(file.shapes, path), dict.fromkeys(file.shapes, "F32")
        return Checkpoint(path, path, file.settings, files, types, file.shapes, file.read)
    check_directory(path)
    settings = read_json(path / MODEL_CONFIG)
    files, types, shapes = {}, {}, {}
    for weights in _weight_files(path):
        for name, (kind, shape) in read_header(weights).items():
            if name in files:
                raise ValueError(f"tensor {name} is in {files[name]} and again in {weights.name}, in {path}")
            if not name.endswith(".rotary_emb.inv_freq"):  # in old checkpoints; we compute it from rope_theta
                files[name], types[name], shapes[name] = weights, kind, shape

    def read(name: str) -> Tensor:
        # Opened anew for each tensor: closing lets go of the pages read so far, which would count as memory in use.
        with open_safetensors(files[name]) as file:
            return file.get_tensor(name)

    return Checkpoint(path, path / MODEL_CONFIG, settings, files, types, shapes, read)


def save_model(
    model: GPT, directory: str | Path, companions: Mapping[str, bytes] | None = None, overwrite: bool = False
):
    """Writes `config.json` and `model.safetensors`, which `transformers` and `load_model` read.

    companions: by name, the other files of the model, such as its tokenizer (`BaseFolder.companions`). overwrite: also
    in place of an adapter, or of a model in other files. Killed at any moment, the folder holds the old or the new.

    Merged LoRA layers are written as the plain layers they now are, without the adapter. Raises ValueError for LoRA
    that is not merged, for tensors the layout has no place for, for a folder that holds another thing, and for one that
    cannot be written.
    """
    unmerged = [name for name, layer in lora_layers(model) if not layer.merged]
    if unmerged:
        ways = "call merge_lora(model) first, or save_adapter to keep the adapter apart"
        raise ValueError(f"{len(unmerged)} LoRA layers are not merged ({unmerged[0]} is the first): {ways}")
    tensors = base_weights(model)
    config = replace(model.config, tie_word_embeddings="lm_head.weight" not in tensors)
    with torch.device("meta"):
        expected = shapes_of(dict(GPT(config).named_parameters()))
    shapes = shapes_of(tensors)
    quantized = {name.replace(".base_layer", ""): layer for name, layer in quantized_layers(model).items()}
    for name, layer in quantized.items():
        for part in layer_tensors(name, layer.quantized):
            del shapes[part]
        shapes[f"{name}.weight"] = layer.quantized.shape
    check_tensors("this model", expected, shapes)
    dtype = tensors[EMBEDDING].dtype
    settings = config_settings(config, dtype)
    if quantized:
        settings["quantization_config"] = quantization_settings(next(iter(quantized.values())), dtype)
    settings |= vars(model).get("token_ids", {})  # a checkpoint's own begin and end tokens outlive the round trip
    about = {"format": "pt"}
    write_pair(Path(directory), MODEL_WEIGHTS, tensors, about, MODEL_CONFIG, settings, companions, overwrite)


def check_directory(directory: Path):
    if not directory.is_dir():
        found = "a file, not" if directory.exists() else "not"
        raise FileNotFoundError(f"{directory} is {found} a folder{hub_advice(directory)}")
    settle(directory)


def hub_advice(path: str | Path) -> str:
    """What to do where a path that is not there looks like the name of a repository on the Hugging Face hub."""
    name = Path(path).as_posix()
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return ""
    return f"; if {name} is on the Hugging Face hub, download it first: hf download {name} --local-dir FOLDER"


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (type, shape) of every tensor in a safetensors file, read from its header alone."""
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def check_type(name: str, kind: str, path: Path):
    """Raises ValueError for a tensor that is not of floating-point numbers."""
    if kind not in FLOAT_TYPES:
        raise ValueError(f"tensor {name} in {path} has type {kind}; only {', '.join(FLOAT_TYPES)} can be read")


def _weight_files(directory: Path) -> list[Path]:
    """The one weights file, or the shards that the index names."""
    if (directory / MODEL_WEIGHTS).is_file():
        return [directory / MODEL_WEIGHTS]
    if not (directory / INDEX).is_file():
        raise FileNotFoundError(f"{directory} has neither {MODEL_WEIGHTS} nor {INDEX}{pickle_advice(directory)}")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{directory / INDEX} has no weight_map from tensor names to files")
    for shard in weight_map.values():
        # never a path out of the folder; the longest name that a file system takes has 255 bytes
        if not isinstance(shard, str) or Path(shard).name != shard or len(shard) > 255:
            raise ValueError(f"{directory / INDEX} maps a tensor to {shown(shard)}, which is not a plain file name")
    return [directory / shard for shard in sorted(set(weight_map.values()))]
