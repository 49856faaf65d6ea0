"""Small GGUF files, written with the gguf library the way llama.cpp's converter writes them."""

from pathlib import Path

import numpy
import torch
from torch import Tensor

from minilora.model import GPT

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
CONTROL = ("<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's order of q and k: row h·D + 2i + j holds what Hugging Face has at row h·D + j·D/2 + i."""
    D, result = len(rows) // heads, torch.empty_like(rows)
    for h in range(heads):
        for i in range(D // 2):
            for j in range(2):
                result[h * D + 2 * i + j] = rows[h * D + j * D // 2 + i]
    return result


def alphabet() -> list[str]:
    """The 256 letters by which byte-level BPE writes the 256 bytes, in the order of the bytes (GPT-2's)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def tokens_and_merges() -> tuple[list[str], list[str]]:
    letters = alphabet()
    return [*CONTROL, *letters, "th", "the", "12"], ["t h", "th e", "1 2"]


def write_gguf(
    path: Path, model: GPT, kind: str = "F32", changes: dict | None = None, more: dict | None = None
) -> Path:
    """kind: how the block linears are stored, a name of GGMLQuantizationType. changes: keys of the file to write
    otherwise, None to leave one out; more: further tensors."""
    import gguf

    config, changes = model.config, changes or {}
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    tokens, merges = tokens_and_merges()
    values = {
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in CONTROL else 1 for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    for key, value in {**values, **changes}.items():
        if key == "architecture" or value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in {**dict(model.named_parameters()), **(more or {})}.items():
        stem, _, leaf = name.rpartition(".")
        part = stem.rpartition(".")[2]
        tensor = in_pairs(tensor.detach(), heads[part]) if part in heads else tensor.detach()
        if stem.startswith("model.layers."):
            _, _, number, inner = stem.split(".", 3)
            stem = f"blk.{number}.{NAMES[inner]}"
        array = numpy.ascontiguousarray(tensor.float().numpy())
        linear = array.ndim == 2 and stem.startswith("blk.")
        quantization = gguf.GGMLQuantizationType[kind if linear else "F32"]
        stored = array if quantization.name == "F32" else gguf.quants.quantize(array, quantization)
        writer.add_tensor(f"{OUTSIDE.get(stem, stem)}.{leaf}", stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
