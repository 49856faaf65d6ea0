"""GGUF, llama.cpp's file format: weights (often in 4 bits), shape and tokenizer of a model in one file. Read only.

The `gguf` library parses the file and turns its many quantizations back into floats. What is ours is the way from
llama.cpp's conventions to Hugging Face Llama's, so that `load_model` reads a GGUF file as it reads a folder:

    names      blk.0.attn_q.weight                  -> model.layers.0.self_attn.q_proj.weight
    q and k    rows in rotary pairs (0, 1), (2, 3)  -> rows in halves (0, D/2), (1, D/2 + 1)
    head       no output.weight                     -> the head is the embedding (tie_word_embeddings)
    shape      llama.embedding_length, ...          -> config.json
    tokenizer  tokens, merges, types                -> tokenizer.json
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from minilora.model import GPTConfig, rotary_frequencies
from minilora.storage.files import check_file, naming, shown
from minilora.storage.gguf_header import check_header

TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Field of config.json -> key of the GGUF file, behind "llama."; those of OPTIONAL may be absent.
SHAPE = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
OPTIONAL = {
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
}
ROPE_FACTORS = "rope_freqs.weight"  # how llama.cpp writes llama3's stretched frequencies: a divisor for each
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def is_gguf(path: str | Path) -> bool:
    return Path(path).suffix.lower() == ".gguf"


# A base is opened for its tokenizer, its shape and its weights. changed: when the file was written, so that a new file
# of the same name is read anew.
@lru_cache(maxsize=1)
def _open(path: Path, changed: float) -> "GGUFFile":
    return GGUFFile(path)


def open_gguf(path: str | Path) -> "GGUFFile":
    """The file, parsed. FileNotFoundError or ValueError as `GGUFFile` raises them."""
    check_file(path)
    return _open(Path(path), Path(path).stat().st_mtime)


def close_gguf():
    """Lets go of the file that was opened last: Windows removes no file that a program still has in its memory."""
    _open.cache_clear()


class GGUFFile:
    """One GGUF file of the Llama family, under Hugging Face's names: `settings` is its config.json, `shapes` and `read`
    its tensors, `tokenizer()` its tokenizer.json and tokenizer_config.json.

    Raises ValueError, naming the file, without the `gguf` library, for a file that is truncated or no GGUF, and for
    what we could not run: another architecture, a tensor with no place in Llama, an unknown rotary scaling.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            import gguf
        except ImportError:
            raise ValueError(f"reading {path} needs the gguf library: pip install gguf") from None
        self._dequantize = gguf.quants.dequantize
        try:
            check_header(path)
            reader = gguf.GGUFReader(path)
        except Exception as error:  # of many kinds: the library trusts the file
            fault = "truncated, no GGUF, or newer than the library"
            raise ValueError(f"{path} cannot be read by the gguf library ({error}): {fault}") from None
        self._fields = reader.fields
        architecture = self._get("general.architecture", str)
        if architecture != "llama":
            raise ValueError(f"{path} has architecture {architecture!r}; only 'llama' is supported")
        self._parts = {tensor.name: tensor for tensor in reader.tensors}
        self._factors = self._parts.pop(ROPE_FACTORS, None)
        self._sources = {self._hugging_face_name(name): name for name in self._parts}
        # numpy lists the outermost dimension first, GGUF the innermost.
        self.shapes = {ours: tuple(map(int, self._parts[its].shape[::-1])) for ours, its in self._sources.items()}
        with naming(path):
            self.settings = self._config()

    def _get(self, key: str, kind: type | tuple[type, ...], default: Any = None):
        """The value of a key. ValueError for one that is absent and has no default, or of another type."""
        field = self._fields.get(key)
        value = default if field is None else field.contents()
        if not isinstance(value, kind):
            fault = "no" if value is None else f"{shown(value)} as"
            raise ValueError(f"{self.path} has {fault} {key}")
        return value

    def _list(self, key: str, kind: type) -> list:
        values = self._get(key, list)
        if not all(isinstance(value, kind) for value in values):
            raise ValueError(f"{self.path} has {shown(values)} as {key}, where each must be of type {kind.__name__}")
        return values

    def _hugging_face_name(self, name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        block, number, part = (stem.split(".") + ["", ""])[:3]
        if stem in TENSORS:
            return f"{TENSORS[stem]}.{leaf}"
        if block == "blk" and part in BLOCK_TENSORS:
            return f"model.layers.{number}.{BLOCK_TENSORS[part]}.{leaf}"
        raise ValueError(f"{self.path} has a tensor {name}, for which a Llama model has no place")

    def _config(self) -> dict:
        """What config.json says, as `read_config` takes it."""
        fields: dict[str, Any] = {name: self._get(f"llama.{key}", (int, float)) for name, key in SHAPE.items()}
        for name, key in OPTIONAL.items():
            if f"llama.{key}" in self._fields:
                fields[name] = self._get(f"llama.{key}", (int, float))
        # GGUF keeps 1e-5 as a float32, 9.9999997e-06; the shortest decimal of that float32 is what was meant.
        fields = {name: _shortest(value) if isinstance(value, float) else value for name, value in fields.items()}
        for name, value in fields.items():
            if not value > 0:
                raise ValueError(f"{self.path} has {name} {value}, where a number above 0 is expected")
        embedding = self.shapes.get("model.embed_tokens.weight", (0,))
        fields["vocab_size"] = embedding[0]
        fields["tie_word_embeddings"] = "lm_head.weight" not in self.shapes
        fields["attention_bias"] = any(name.endswith("q_proj.bias") for name in self.shapes)
        fields["mlp_bias"] = any(name.endswith("up_proj.bias") for name in self.shapes)
        for name, key in (("bos_token_id", "bos"), ("eos_token_id", "eos")):
            if f"tokenizer.ggml.{key}_token_id" in self._fields:
                fields[name] = self._get(f"tokenizer.ggml.{key}_token_id", int)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta", 10000.0)}
        rope |= self._rope_scaling(
            fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"], rope
        )
        architecture = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
        return {**architecture, **fields, "rope_parameters": rope, "dtype": "float32"}

    def _rope_scaling(self, head_dim: int, rope: dict) -> dict:
        """linear is named; of llama3 the file has what it divides each frequency by, which tells its settings."""
        named = self._get("llama.rope.scaling.type", str, "none")
        if self._factors is not None:
            factors = torch.from_numpy(self._factors.data.copy())
            scaling = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
            plain = GPTConfig(head_dim=head_dim, rope_theta=rope["rope_theta"])
            scaled = GPTConfig(head_dim=head_dim, rope_theta=rope["rope_theta"], rope_scaling=scaling)
            expected = rotary_frequencies(plain) / rotary_frequencies(scaled)
            if factors.shape != expected.shape or not torch.allclose(factors, expected, rtol=1e-3):
                raise ValueError(f"{self.path} has {ROPE_FACTORS} that are not llama3's with the settings of Llama 3.1")
            return scaling
        if named == "none":
            return {}
        if named != "linear":
            raise ValueError(f"{self.path} has the rotary scaling {named!r}; only linear and llama3 are supported")
        return {"rope_type": "linear", "factor": _shortest(self._get("llama.rope.scaling.factor", float))}

    def read(self, name: str) -> Tensor:
        """The tensor of that Hugging Face name in floats. ValueError for a quantization the library cannot undo."""
        part = self._parts[self._sources[name]]
        try:
            values = self._dequantize(part.data, part.tensor_type)
        except NotImplementedError:
            raise ValueError(
                f"tensor {part.name} in {self.path} is in {part.tensor_type.name}, which cannot be read"
            ) from None
        tensor = torch.from_numpy(values.reshape(self.shapes[name]).copy())
        for kind, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f".{kind}." in name:
                tensor = in_halves(tensor, self.settings.get(heads, self.settings["num_attention_heads"]))
        return tensor

    def tokenizer(self) -> tuple[bytes, dict, list[int]]:
        """The bytes of tokenizer.json, tokenizer_config.json, and the ids that end an answer. ValueError for a
        pre-tokenizer that we do not know."""
        kind, split = self._get("tokenizer.ggml.model", str), self._get("tokenizer.ggml.pre", str, "none")
        if kind != "gpt2" or split not in PRE_TOKENIZERS:
            found, known = f"a tokenizer {kind!r} with the pre-tokenizer {split!r}", ", ".join(PRE_TOKENIZERS)
            raise ValueError(f"{self.path} has {found}; only 'gpt2' with {known} is supported")
        tokens: list[str] = self._list("tokenizer.ggml.tokens", str)
        types: list[int] = self._list("tokenizer.ggml.token_type", int)
        if len(types) != len(tokens):
            raise ValueError(f"{self.path} has {len(types)} token types for {len(tokens)} tokens")
        for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
            id = self._get(f"tokenizer.ggml.{name}_token_id", int, 0)
            if not 0 <= id < len(tokens):
                raise ValueError(f"{self.path} names token {id} as {name}, but has {len(tokens)} tokens")
        merges = [merge.split(" ") for merge in self._list("tokenizer.ggml.merges", str)]
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [
            {"id": id, "content": token, **plain, "special": kind == CONTROL}
            for id, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ]
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
        definition = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*PRE_TOKENIZERS[split], byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": model | {"vocab": {token: id for id, token in enumerate(tokens)}, "merges": merges},
        }
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            if f"tokenizer.ggml.{key}_token_id" in self._fields:
                settings[f"{name}_token"] = tokens[self._get(f"tokenizer.ggml.{key}_token_id", int)]
        if self._get("tokenizer.ggml.add_bos_token", (bool, int), False) and "bos_token" in settings:
            definition["post_processor"] = _begin_with(settings["bos_token"], tokens.index(settings["bos_token"]))
        if "tokenizer.chat_template" in self._fields:
            settings["chat_template"] = self._get("tokenizer.chat_template", str)
        settings["model_max_length"] = self.settings["max_position_embeddings"]
        keys = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot", "eom")]
        ends = [self._get(key, int) for key in keys if key in self._fields]
        return json.dumps(definition, ensure_ascii=False).encode(), settings, ends


# How a pre-tokenizer splits a text before byte-level BPE with GPT-2's own expression, as tokenizer.json puts it.
PRE_TOKENIZERS: dict[str, list[dict]] = {"smollm": [{"type": "Digits", "individual_digits": True}]}


def _begin_with(token: str, id: int) -> dict:
    """A post-processor that puts one token in front of a text."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {token: {"id": token, "ids": [id], "tokens": [token]}}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}


def _shortest(value: float) -> float:
    return float(str(numpy.float32(value)))


def in_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection, (H·D, ...), from llama.cpp's rotary pairs (2i, 2i + 1) to halves (i, i + D/2)."""
    pairs = rows.unflatten(0, (heads, -1, 2))  # (H, D/2, 2, ...)
    return pairs.transpose(1, 2).flatten(0, 2)  # (H, 2, D/2, ...) -> (H·D, ...)
