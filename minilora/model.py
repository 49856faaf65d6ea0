"""The transformer: a Llama-shaped GPT in one file, read from the bottom of the network to the top.

    token ids -> embedding -> [ RMSNorm -> attention -> +  RMSNorm -> MLP -> + ] x layers -> RMSNorm -> logits

Every parameter and every config field carries Hugging Face Llama's own name
(`model.layers.0.self_attn.q_proj.weight`, `num_key_value_heads`), so a real checkpoint loads as it stands.
This file knows nothing of LoRA, quantization or training, which work on it from outside. Letters in shape comments:
    B batch   T new tokens   S all tokens, past ones included   C hidden_size
    H query heads   K key/value heads   D head_dim   V vocab_size
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minilora.presets import PRESETS


@dataclass
class GPTConfig:
    """The shape of a model. Raises ValueError on a shape that cannot be built."""

    vocab_size: int = 32000
    hidden_size: int = 4096  # C, the width of the residual stream
    intermediate_size: int = 11008  # the width inside the MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32  # H
    num_key_value_heads: int = 0  # K; fewer than H is grouped-query attention. 0: as many as H
    head_dim: int = 0  # D; 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 4096  # the longest sequence
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0  # the slowest rotary wavelength is about 2 pi times this, in tokens
    rope_scaling: dict | None = None  # {"rope_type": "linear" | "llama3", "factor": ...} to reach longer sequences
    tie_word_embeddings: bool = False  # True: the output head is the embedding matrix itself
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        H, K = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if not self.head_dim and self.hidden_size % H:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {H}")
        self.num_key_value_heads, self.head_dim = K, self.head_dim or self.hidden_size // H
        if H % K:
            raise ValueError(f"num_attention_heads {H} is not divisible by num_key_value_heads {K}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs of features")
        if self.rope_scaling and self.rope_scaling.get("rope_type") not in ("linear", "llama3"):
            raise ValueError(f"rope_type {self.rope_scaling.get('rope_type')!r} is not supported (linear, llama3)")

    @classmethod
    def preset(cls, name: str, **changes) -> "GPTConfig":
        """A named shape, with fields changed at will: `GPTConfig.preset("llama-2-7b", num_hidden_layers=2)`."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, computed in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary_frequencies(config: GPTConfig, device=None) -> Tensor:
    """Angle per token of each feature pair: theta^(-2i/D), (D/2,), stretched for long contexts where asked."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1 / config.rope_theta**exponents  # not theta**-exponents: its last bit is not transformers'
    if (scaling := config.rope_scaling) is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    # llama3: long wavelengths are stretched by `factor`, short ones stay, between the two a straight blend.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - blend) * frequencies / scaling["factor"] + blend * frequencies


def rotary_cos_sin(config: GPTConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """positions (B or 1, T) -> cos and sin of every feature's angle, each (B or 1, 1, T, D)."""
    angles = positions[..., None].float() * rotary_frequencies(config, positions.device)  # (B, T, D/2)
    angles = torch.cat([angles, angles], dim=-1)[:, None]  # (B, 1, T, D): one angle per pair, the same for each head
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns feature pairs (i, i + D/2) of x (B, H, T, D) by their angle, so q·k depends on distance only (Su 2021)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin.to(x.dtype)


class KVCache:
    """Keys and values of the tokens that were computed before, per layer (B, K, S, D).

    A forward pass fills it, by concatenation, which keeps autograd intact: a trained prefix is a cache that does not
    start empty. `padding` (B, up to S) is True at pad tokens, which stand in front of a shorter row's own tokens;
    columns beyond the width of `padding` are real tokens.
    """

    def __init__(self, padding: Tensor | None = None, layers: dict[int, tuple[Tensor, Tensor]] | None = None):
        self.padding, self.layers = padding, layers or {}

    def __len__(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def padding_of(self, length: int) -> Tensor | None:
        """`padding` of the first `length` columns, (B, length); None where no row has any."""
        return None if self.padding is None else F.pad(self.padding, (0, length - self.padding.shape[1]))


def attention_mask(new: int, past: int, padding: Tensor | None, device) -> Tensor | None:
    """True where a query may look, (B or 1, 1, T, S); None where plain causal attention says it all."""
    if padding is None and (past == 0 or new == 1):
        return None
    key = torch.arange(past + new, device=device)
    query = torch.arange(past, past + new, device=device)[:, None]
    mask = (key <= query)[None, None]  # (1, 1, T, S)
    if padding is not None:
        mask = mask & ~padding[:, None, None] | (key == query)  # a pad token sees itself, or its softmax is 0/0
    return mask


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: softmax(q kᵀ / sqrt(D)) v, each k and v shared by H/K queries.

    `past`: keys and values (B, K, S - T, D) of earlier tokens. Returns y (B, T, C) and keys and values of all S tokens.
    The layer keeps none of them, because gradient checkpointing runs it twice on the same past."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_dim = config.head_dim
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None = None, past: tuple | None = None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = apply_rotary(q, *rotary), apply_rotary(k, *rotary)
        if past is not None:
            k = torch.cat([past[0].to(k.dtype), k], dim=2)  # (B, K, S, D)
            v = torch.cat([past[1].to(v.dtype), v], dim=2)  # (B, K, S, D)
        causal = mask is None and T > 1  # then the mask is the plain one, which the kernel makes itself
        keys, values, times = k, v, q.shape[1] // k.shape[1]
        if times > 1 and q.is_cuda and (mask is not None or q.dtype.itemsize > 2):
            # Of CUDA's kernels that keep no (T, S) scores, the one that shares k and v takes no mask and no float32.
            keys, values = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)  # (B, H, S, D)
        shared = q.shape[1] != keys.shape[1]
        y = F.scaled_dot_product_attention(q, keys, values, mask, is_causal=causal, enable_gqa=shared)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1)), (k, v)  # (B, H, T, D) -> (B, T, H·D) -> (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) ⊙ up(x)) (Shazeer 2020)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(C, inner, bias=bias)
        self.up_proj = nn.Linear(C, inner, bias=bias)
        self.down_proj = nn.Linear(inner, C, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each on a normalised copy and added back to the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None = None, past: tuple | None = None):
        y, keys_values = self.self_attn(self.input_layernorm(x), rotary, mask, past)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


class Decoder(nn.Module):
    """Embedding, blocks and the last norm: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False  # True: keep only each block's input, compute the rest again in backward

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        return self.run_blocks(self.embed(input_ids), cache)

    def run_blocks(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        """Embeddings (B, T, C) -> hidden states (B, T, C). The cache gets the keys and values of all layers."""
        T, past, limit = x.shape[1], 0 if cache is None else len(cache), self.config.max_position_embeddings
        padding = None if cache is None else cache.padding_of(past + T)  # (B, S)
        if past + T > limit and (padding is None or (~padding).sum(1).max() > limit):  # padding takes no position
            raise ValueError(f"a sequence of {past + T} tokens is longer than the model's {limit}")
        positions = torch.arange(past, past + T, device=x.device)[None]  # (1, T)
        if padding is not None:  # pad tokens have no position: a row's first real token is at 0
            positions = ((~padding).int().cumsum(1) - 1).clamp(min=0)[:, past:]  # (B, T)
        rotary = rotary_cos_sin(self.config, positions)
        mask = attention_mask(T, past, padding, x.device)
        for number, layer in enumerate(self.layers):
            run = partial(checkpoint, layer, use_reentrant=False) if self.gradient_checkpointing else layer
            x, keys_values = run(x, rotary, mask, None if cache is None else cache.layers.get(number))
            if cache is not None:
                cache.layers[number] = keys_values
        return self.norm(x)

    def embed(self, input_ids: Tensor) -> Tensor:
        try:
            return self.embed_tokens(input_ids)
        except IndexError:
            low, high, V = int(input_ids.min()), int(input_ids.max()), self.config.vocab_size
            raise ValueError(f"token ids {low} to {high} do not fit the vocabulary of {V} (0 to {V - 1})") from None


class GPT(nn.Module):
    """The language model: ids (B, T) -> logits (B, T, V); the loss is outside. Raises ValueError for sequences over
    `max_position_embeddings` and, on a CPU, for ids outside the vocabulary (a GPU stops at an assertion of its own).

    where: rows and columns of the N places whose logits are wanted, each (N,) -> logits (N, V)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.init_weights()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self):
        """Normal(0, 1/width), so that a product keeps its input's scale. o_proj and down_proj write to the residual
        stream and start small, as in GPT-2, so that each block starts near the identity. Biases start at 0, norms at 1.
        """
        residual = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=residual if small else weight.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, where: tuple | None = None) -> Tensor:
        x = self.model(input_ids, cache)  # (B, T, C)
        return self.lm_head(x if where is None else x[where])
