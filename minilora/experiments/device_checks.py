"""Every fast path on a device, held against the plain formula in float64 on the same device.

A path is run in float32 and in bfloat16 with random A and B, large enough that s·BA weighs as much as W. What is
compared are its outputs and every gradient: max |fast - plain| / max |plain|, the largest over all of them. The plain
formula is written out here or runs through other code: no cache, no mask, no bank, each row alone.

Letters in the shape comments: N tokens, in and out features, r rank; B rows, T tokens, H heads, D head_dim.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.adapter import Adapter, apply_adapter, extract_adapter
from minilora.adapters.dora import DoRALinear
from minilora.adapters.inject import adapter_parameters, apply_lora, lora_layers, merge_lora, remove_lora
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.config import LoRAConfig
from minilora.experiments.simulate import build
from minilora.fast import FastLoRALinear, dropout_mask
from minilora.inference.bank import AdapterBank
from minilora.inference.generate import left_pad
from minilora.inference.prepared import Prepared
from minilora.levels import LEVELS, unpack_codes
from minilora.linear4bit import Linear4bit
from minilora.lora import LoRALinear
from minilora.model import GPT, Attention, GPTConfig, KVCache, attention_mask, rotary_cos_sin
from minilora.quant import dequantize, quantize
from minilora.rows import counted_places
from minilora.train import forward, next_token_targets, set_gradient_checkpointing

Pairs = dict[str, tuple[Tensor, Tensor]]  # by name, what the fast path gives and what is right
LIMITS = {torch.float32: 3e-5, torch.bfloat16: 5e-2}  # 250 roundings, and 13; products in TF32 are off by 3e-4
R = 8


@dataclass
class Place:
    """Where and how large. width: of the layers and the model, a multiple of 32."""

    device: str
    width: int

    def randn(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def ids(self, rows: int, length: int) -> Tensor:
        return torch.randint(256, (rows, length), device=self.device)

    def model(self, dtype: torch.dtype) -> GPT:
        """Two layers with grouped heads."""
        config = GPTConfig(256, self.width, 2 * self.width, 2, 8, 2, max_position_embeddings=128)
        with torch.device(self.device):
            return build(config, dtype).requires_grad_(False)

    def adapted(self, dtype: torch.dtype) -> GPT:
        model = self.model(dtype)
        apply_lora(model, LoRAConfig(R, 2 * R, target_modules="all-linear"))
        return randomized(model)


def randomized(model: GPT) -> GPT:
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def wide(tensor: Tensor) -> Tensor:
    """A float64 leaf with the same numbers."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def plain(model: GPT) -> GPT:
    """A float64 copy whose LoRA layers compute the plain formula."""
    copied = copy.deepcopy(model).double()
    for _, layer in lora_layers(copied):
        layer.forward = partial(LoRALinear.forward, layer)  # type: ignore[method-assign]
    return copied


def layer_of(place: Place, dtype: torch.dtype, many=False, dropout=0.0, dora=False, in_4_bits=False) -> Pairs:
    """One LoRA layer, with its bias: y, and the gradients of x, A, B and m."""
    features, out = place.width, place.width + place.width // 2
    linear = nn.Linear(features, out, device=place.device, dtype=dtype)
    base: nn.Module = linear
    W, bias = linear.weight.detach(), linear.bias.detach().double()
    if in_4_bits:
        quantized = quantize(W, "nf4", double_quant=True)
        base, W = Linear4bit.from_linear(linear, quantized), dequantize(quantized, torch.float32)
    layer = (DoRALinear if dora else FastLoRALinear)(base.requires_grad_(False), R, 2 * R, dropout)
    nn.init.normal_(layer.lora_B, std=0.2)
    x = place.randn(2 * features if many else 16, features, dtype=dtype).requires_grad_()  # (N, in)
    trained = {"x": x, **dict(layer.named_parameters(recurse=False))}
    torch.manual_seed(1)
    y = layer(x)
    torch.manual_seed(1)  # the same draws again
    mask, kept = dropout_mask(x, dropout)

    leaves = {name: wide(tensor) for name, tensor in trained.items()}
    X, A, B = leaves["x"], leaves["lora_A"], leaves["lora_B"]
    W, update, dropped = W.double(), layer.scaling * B @ A, X * mask / kept
    right = X @ W.T + bias + dropped @ update.T  # W x + b + s·BA x_d
    if dora:
        g = leaves["lora_magnitude_vector"] / (W + update).norm(dim=1).detach()
        right = X @ W.T + bias + (g - 1) * (dropped @ W.T) + g * (dropped @ update.T)
    return {"y": (y, right)} | gradients(y, right, trained, leaves)


def gradients(y: Tensor, right: Tensor, trained: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> Pairs:
    weights = torch.randn_like(y)
    ours = torch.autograd.grad((y * weights).sum(), list(trained.values()))
    theirs = torch.autograd.grad((right * weights.double()).sum(), list(leaves.values()))
    return {f"gradient of {name}": pair for name, pair in zip(trained, zip(ours, theirs, strict=True), strict=True)}


def dequantized(place: Place, dtype: torch.dtype) -> Pairs:
    """Each scheme, against a look-up in the table, one code after the other, on the CPU; the last block is short."""
    pairs = {}
    for scheme in LEVELS:
        q = quantize(place.randn(place.width * 33 + 7, dtype=torch.float32), scheme, double_quant=True)
        values = dequantize(q, dtype)
        for name, tensor in q.tensors.items():
            setattr(q, name, tensor.cpu())
        levels = LEVELS[scheme][unpack_codes(q.codes).int()][: values.numel()]
        pairs[scheme] = values.cpu(), (levels * q.absmax().repeat_interleave(q.block_size)[: len(levels)]).to(dtype)
    return pairs


def attention(place: Place, dtype: torch.dtype, past: int = 0) -> Pairs:
    """Grouped heads, causal; with keys and values of earlier tokens a mask says so. Output and gradient of x."""
    config = GPTConfig(256, place.width, place.width, 1, 8, 2, max_position_embeddings=128)
    layer = Attention(config).to(place.device, dtype).requires_grad_(False)
    x = place.randn(2, past + 24, place.width, dtype=dtype).requires_grad_()
    rotary = rotary_cos_sin(config, torch.arange(past + 24, device=place.device)[None])
    before, after = (tuple(part[:, :, span] for part in rotary) for span in (slice(past), slice(past, None)))
    cached = layer(x[:, :past], before)[1] if past else None
    y = layer(x[:, past:], after, attention_mask(24, past, None, x.device), cached)[0]

    X, exact = wide(x), copy.deepcopy(layer).double()
    q, k, v = (
        projection(X).view(2, past + 24, -1, config.head_dim).transpose(1, 2)
        for projection in (exact.q_proj, exact.k_proj, exact.v_proj)
    )
    q, k = (turn(part, *rotary) for part in (q, k))
    k, v = (part.repeat_interleave(4, dim=1) for part in (k, v))  # (B, H, T, D)
    scores = q @ k.transpose(2, 3) / math.sqrt(config.head_dim)
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    heads = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    right = exact.o_proj(heads.transpose(1, 2).flatten(2))[:, past:]
    return {"y": (y, right)} | gradients(y, right, {"x": x}, {"x": X})


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos.double() + torch.cat([-second, first], dim=-1) * sin.double()


def training_step(place: Place, dtype: torch.dtype) -> Pairs:
    """The loop's own forward, checkpointed: logits where they count, for bfloat16 under autocast. Loss, gradients."""
    model = place.adapted(torch.float32)
    ids, labels, exact = place.ids(2, 48), place.ids(2, 48), plain(model)
    labels[:, :20] = -100
    targets = next_token_targets(labels)
    set_gradient_checkpointing(model, True)
    where = counted_places(targets)
    logits = forward(model, ids, where, "float32" if dtype == torch.float32 else "bfloat16")
    loss = F.cross_entropy(logits, targets[where])
    right = F.cross_entropy(exact(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
    ours, theirs = (
        torch.cat([gradient.flatten() for gradient in torch.autograd.grad(value, adapter_parameters(of))])
        for value, of in ((loss, model), (right, exact))
    )
    return {"loss": (loss, right), "gradient": (ours, theirs)}


@torch.no_grad()
def merged(place: Place, dtype: torch.dtype) -> Pairs:
    model, ids = place.adapted(dtype), place.ids(2, 32)
    right = plain(model)(ids)
    merge_lora(model)
    return {"logits": (model(ids), right)}


@torch.no_grad()
def cached(place: Place, dtype: torch.dtype, prepare: Callable = lambda model: nullcontext()) -> Pairs:
    """A prompt, then token by token, against all tokens at once."""
    model, ids, cache = place.adapted(dtype), place.ids(2, 32), KVCache()
    with prepare(model):
        pieces = [model(ids[:, :20], cache)] + [model(ids[:, place : place + 1], cache) for place in range(20, 32)]
    return {"logits": (torch.cat(pieces, dim=1), plain(model)(ids))}


@torch.no_grad()
def padded(place: Place, dtype: torch.dtype) -> Pairs:
    """Prompts of several lengths in one batch, and one more token each, against each alone."""
    model, ids = place.adapted(dtype), place.ids(3, 24).tolist()
    prompts, exact = [row[: 24 - 5 * number] for number, row in enumerate(ids)], plain(model)
    together, padding = left_pad([row[:-1] for row in prompts], place.device)
    cache = KVCache(padding)
    model(together, cache)
    last = model(torch.tensor([row[-1:] for row in prompts], device=place.device), cache)
    alone = torch.cat([exact(torch.tensor([row], device=place.device))[:, -1:] for row in prompts])
    return {"logits": (last, alone)}


@torch.no_grad()
def banked(place: Place, dtype: torch.dtype) -> Pairs:
    """Rows with an adapter each, and one with none, against each alone with its adapter applied."""
    model, adapters = place.adapted(dtype), {}
    for number in range(3):
        adapters[f"adapter {number}"] = extract_adapter(randomized(model))
    remove_lora(model)
    names, ids, exact = [*adapters, None], place.ids(4, 24), copy.deepcopy(model).double()

    def alone(adapter: Adapter | None, row: Tensor) -> Tensor:
        model = copy.deepcopy(exact)
        if adapter is not None:
            apply_adapter(model, adapter)
        return plain(model)(row)

    right = torch.cat([alone(adapters.get(name or ""), ids[row, None]) for row, name in enumerate(names)])
    return {"logits": (AdapterBank(model, adapters).forward(ids, names), right)}


def prompted(place: Place, dtype: torch.dtype, kind: type[SoftPrompt | PrefixTuning]) -> Pairs:
    """A prompt that starts as a text, against the model that reads the text first."""
    model, text, ids = place.model(dtype), place.ids(1, 8), place.ids(2, 24)
    right = copy.deepcopy(model).double()(torch.cat([text.expand(2, -1), ids], dim=1))[:, 8:]
    prompt = kind(model, 8, text[0].tolist())
    exact = copy.deepcopy(prompt).double()
    logits, wider = prompt(ids)[:, -24:], exact(ids)[:, -24:]
    trained, leaves = {"prompt": prompt.prompt_embeddings}, {"prompt": exact.prompt_embeddings}
    with torch.no_grad():
        served = prompt(ids, prompt.new_cache(2))
    return {"logits": (logits, right), "from a cache": (served, right)} | gradients(logits, wider, trained, leaves)


CHECKS: dict[str, Callable[[Place, torch.dtype], Pairs]] = {
    "LoRA, many tokens": partial(layer_of, many=True),
    "LoRA, few tokens": layer_of,
    "LoRA, dropout": partial(layer_of, many=True, dropout=0.25),
    "DoRA, many tokens": partial(layer_of, many=True, dora=True),
    "DoRA, few tokens": partial(layer_of, dora=True),
    "DoRA, dropout": partial(layer_of, many=True, dora=True, dropout=0.25),
    "QLoRA, many tokens": partial(layer_of, many=True, in_4_bits=True),
    "QLoRA, few tokens": partial(layer_of, in_4_bits=True),
    "QLoRA with DoRA, dropout": partial(layer_of, dora=True, in_4_bits=True, dropout=0.25),
    "dequantized weights": dequantized,
    "attention": attention,
    "attention behind a cache": partial(attention, past=8),
    "training step, checkpointed": training_step,
    "merged": merged,
    "cached decoding": cached,
    "cached decoding, prepared": partial(cached, prepare=Prepared),
    "left-padded prompts": padded,
    "adapter bank": banked,
    "soft prompt": partial(prompted, kind=SoftPrompt),
    "prefix": partial(prompted, kind=PrefixTuning),
}


def largest_deviation(pairs: Pairs) -> tuple[str, float]:
    """The tensor that is farthest off, and max |fast - right| / max |right| of it; not finite: infinity."""
    off = {}
    for name, (fast, right) in pairs.items():
        assert fast.shape == right.shape, f"{name} is of shape {tuple(fast.shape)}, expected {tuple(right.shape)}"
        value = ((fast.double() - right).abs().max() / right.abs().max()).item()
        off[name] = value if math.isfinite(value) else math.inf
    worst = max(off, key=lambda name: off[name])
    return worst, off[worst]


def check_paths(place: Place, names: list[str] | None = None) -> Iterator[dict]:
    """A row for each path and dtype. A deviation of None is not a finite number; bits that are copied have limit 0."""
    for name in CHECKS if names is None else names:
        for dtype, limit in LIMITS.items():
            torch.manual_seed(0)
            worst, deviation = largest_deviation(CHECKS[name](place, dtype))
            limit = 0.0 if CHECKS[name] is dequantized else limit
            found = {"deviation": deviation if math.isfinite(deviation) else None, "worst": worst, "limit": limit}
            yield {"path": name, "dtype": str(dtype).removeprefix("torch."), **found, "held": deviation <= limit}
