"""Soft prompts and prefixes, held against the transformer written out by hand and against reading a real text."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from minilora.adapters.inject import apply_lora, count_parameters
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.config import LoRAConfig
from minilora.inference.generate import generate, left_pad
from minilora.model import GPT, GPTConfig, KVCache
from minilora.train import evaluate_loss

VOCABULARY, LIMIT, N = 24, 32, 3
METHODS = [SoftPrompt, PrefixTuning]
SHAPES = {
    "grouped": {},
    "multi-head": dict(num_key_value_heads=4),
    "one key head": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "wide heads, biases": dict(head_dim=6, attention_bias=True),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]
IDS = torch.randint(VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
TEXT = [7, 2, 11]

both = pytest.mark.parametrize("method", METHODS)


SHAPE = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
SHAPE |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LIMIT)


def tiny(dtype=torch.float64, **changes) -> GPT:
    """Weights large enough that every token before a position counts there."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.to(dtype)


def trained(method, model: GPT | None = None, length: int = N):
    """A prompt of random numbers, as if trained; float32's values in the model's type, so that nothing is rounded."""
    prompt = method(model or tiny(), length, TEXT)
    with torch.no_grad():
        prompt.prompt_embeddings.normal_(generator=torch.Generator().manual_seed(3))
    return prompt


def assert_close(found, expected, bar, what):
    assert found.shape == expected.shape, f"{what}: {tuple(found.shape)} and {tuple(expected.shape)}"
    gap = (found - expected).abs()
    assert gap.max() <= bar, f"{what} differ by {gap.max():.1e} at most and {gap.mean():.1e} on average"


def text_logits(prompt, ids, cache=None) -> torch.Tensor:
    """The logits at the text alone, (B, T, V)."""
    with torch.no_grad():
        return prompt(ids, cache)[:, -ids.shape[1] :]


# Against the transformer written out


def written_out(model: GPT, x: torch.Tensor, first: int, prefix=None) -> torch.Tensor:
    """x (T, C), one row's embeddings at positions first, first + 1, … -> logits (T, V). One query at a time.

    prefix: (n, L, 2, K, D), keys and values before x in each layer."""
    config, T = model.config, len(x)
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def norm(x, module):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * module.weight

    def turned(heads, position):  # (heads, D), pair (i, i + D/2) as one complex number
        angle = position * config.rope_theta ** (-torch.arange(0, D, 2).double() / D)
        pairs = torch.complex(heads[:, : D // 2], heads[:, D // 2 :]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], dim=1)

    for number, block in enumerate(model.model.layers):
        attention, y = block.self_attn, norm(x, block.input_layernorm)
        q = [turned(attention.q_proj(y[t]).view(H, D), first + t) for t in range(T)]
        keys = [turned(attention.k_proj(y[t]).view(K, D), first + t) for t in range(T)]
        values = [attention.v_proj(y[t]).view(K, D) for t in range(T)]
        if prefix is not None:
            keys = [*prefix[:, number, 0], *keys]
            values = [*prefix[:, number, 1], *values]
        rows = []
        for t in range(T):
            visible = len(keys) - T + t + 1
            heads = []
            for h in range(H):
                own = h // (H // K)
                scores = torch.stack([q[t][h] @ key[own] for key in keys[:visible]]) / math.sqrt(D)
                weights = scores.softmax(0)
                heads.append(sum(w * value[own] for w, value in zip(weights, values[:visible], strict=True)))
            rows.append(attention.o_proj(torch.cat(heads)))
        x = x + torch.stack(rows)
        y = norm(x, block.post_attention_layernorm)
        x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))
    return model.lm_head(norm(x, model.model.norm))


# cos and sin are float32 in the model, which leaves about 1e-7 of difference between it and the formulas.
@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_soft_prompt_is_more_embeddings_in_front(shape):
    prompt = trained(SoftPrompt, tiny(**SHAPES[shape]))
    logits, model = prompt(IDS), prompt.base_model
    assert logits.shape == (3, N + 9, VOCABULARY)
    for row, ids in enumerate(IDS):
        x = torch.cat([prompt.prompt_embeddings.double(), model.model.embed_tokens.weight[ids]])
        assert_close(logits[row], written_out(model, x, first=0), 1e-5, f"logits of row {row}")


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prefix_is_free_keys_and_values_in_front_and_the_text_begins_at_n(shape):
    prompt = trained(PrefixTuning, tiny(**SHAPES[shape]))
    logits, model, config = prompt(IDS), prompt.base_model, prompt.config
    assert logits.shape == (3, 9, VOCABULARY)
    prefix = prompt.prompt_embeddings.double().reshape(N, 2, 2, config.num_key_value_heads, config.head_dim)
    for row, ids in enumerate(IDS):
        x = model.model.embed_tokens.weight[ids]
        assert_close(logits[row], written_out(model, x, N, prefix), 1e-5, f"logits of row {row}")
        shifted = written_out(model, x, 0, prefix)
        assert (logits[row] - shifted).abs().max() > 1e-2, "the positions of the text must count"


# How they start


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_at_the_start_the_model_has_read_the_text(method, shape):
    model = tiny(**SHAPES[shape])
    with torch.no_grad():
        expected = model(torch.cat([torch.tensor([TEXT] * 3), IDS], dim=1))[:, N:]
        assert (model(IDS) - expected).abs().max() > 0.1, "the text must change what the model says"
    assert_close(text_logits(method(model, N, TEXT), IDS), expected, 1e-5, "logits after a text and after its prompt")


@both
@pytest.mark.parametrize(("length", "tokens"), [(2, [7, 2]), (8, [7, 2, 11, 7, 2, 11, 7, 2])])
def test_a_text_is_cut_or_repeated(method, length, tokens):
    assert torch.equal(method(tiny(), length, TEXT).prompt_embeddings, method(tiny(), length, tokens).prompt_embeddings)


@both
def test_without_a_text_random_tokens_are_drawn(method):
    drawn = []
    for seed in (0, 0, 1):
        model = tiny()
        torch.manual_seed(seed)
        drawn.append(method(model, 6).prompt_embeddings)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (6,)).tolist()
    assert torch.equal(drawn[0], method(tiny(), 6, tokens).prompt_embeddings)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_of_no_tokens_is_the_model_bit_for_bit(method, dtype):
    model = tiny(dtype)
    logits, loss = text_logits(model, IDS), evaluate_loss(model, SimpleNamespace(input_ids=IDS, labels=IDS), 2)
    texts = generate(model, PROMPTS, 8)
    prompt = method(model, 0)
    assert torch.equal(text_logits(prompt, IDS), logits)
    assert evaluate_loss(prompt, SimpleNamespace(input_ids=IDS, labels=IDS), 2) == loss
    assert generate(prompt, PROMPTS, 8) == texts and prompt.config == model.config


# The cache


@both
@pytest.mark.parametrize("chunks", [[1] * 9, [2, 3, 1, 3], [9]])
def test_decoding_over_the_cache_equals_the_full_forward(method, chunks):
    prompt = trained(method)
    cache = prompt.new_cache(3)
    parts = [text_logits(prompt, part, cache) for part in IDS.split(chunks, dim=1)]
    assert_close(torch.cat(parts, dim=1), text_logits(prompt, IDS), 1e-12, f"logits in chunks of {chunks}")
    assert len(cache) == N + 9
    assert len(prompt.new_cache(3)) == N, "a new cache must not hold what another one saw"


@both
@pytest.mark.parametrize("chunks", [[9], [7, 1, 1], [1] * 9])
def test_left_padded_rows_equal_the_rows_alone(method, chunks):
    """The padding lies between the prompt and the text: nobody sees it and no position counts it."""
    prompt, pads = trained(method), [0, 4, 7]
    padding = torch.tensor([[place < pad for place in range(9)] for pad in pads])
    cache = prompt.new_cache(3, padding)
    padded = torch.cat([text_logits(prompt, part, cache) for part in IDS.split(chunks, dim=1)], dim=1)
    for row, pad in enumerate(pads):
        alone = text_logits(prompt, IDS[row : row + 1, pad:])
        assert_close(padded[row : row + 1, pad:], alone, 1e-12, f"row {row} with {pad} pad tokens")
    assert padded.isfinite().all()


@both
@pytest.mark.parametrize("shape", SHAPES)
def test_generate_continues_ragged_prompts_as_the_whole_sequence_would(method, shape):
    prompt = trained(method, tiny(**SHAPES[shape]))
    expected = []
    for ids in PROMPTS:
        ids, start = list(ids), len(ids)
        for _ in range(12):
            ids.append(text_logits(prompt, torch.tensor([ids]))[0, -1].argmax().item())
        expected.append(ids[start:])
    assert generate(prompt, PROMPTS, 12) == expected
    assert expected != generate(prompt.base_model, PROMPTS, 12), "the prompt must change what is said"


@both
def test_a_cache_that_does_not_begin_with_the_prompt_is_refused(method):
    prompt = trained(method)
    for cache in (KVCache(), trained(method, length=N - 1).new_cache(3)):
        message = f"the cache has {len(cache)} columns, so it does not begin with the {N} of the prompt"
        with pytest.raises(ValueError, match=message):
            prompt(IDS, cache)


# What it looks like from outside


@both
def test_parameters_are_the_models_and_one_more(method):
    model = tiny(tie_word_embeddings=True)
    names, total = [name for name, _ in model.named_parameters()], count_parameters(model)[1]
    prompt = trained(method, model)
    numbers = N * (16 if method is SoftPrompt else 2 * 2 * 2 * 4)
    assert prompt.prompt_embeddings.shape == (N, numbers // N) and prompt.length == N
    assert [name for name, _ in prompt.named_parameters()] == [
        "prompt_embeddings",
        *(f"base_model.{name}" for name in names),
    ]
    assert count_parameters(prompt) == (numbers, total + numbers)
    other = method(tiny(tie_word_embeddings=True), N)
    other.load_state_dict(prompt.state_dict())
    assert torch.equal(text_logits(other, IDS), text_logits(prompt, IDS))


@both
def test_the_mode_is_the_models_and_generate_restores_it(method):
    prompt = method(tiny().eval(), N)
    assert not prompt.training
    prompt.train()
    generate(prompt, PROMPTS, 2)
    assert all(module.training for module in prompt.modules())


@both
def test_a_sequence_ends_where_prompt_and_text_fill_the_context(method):
    prompt = trained(method)
    assert prompt.config.max_position_embeddings == LIMIT - N
    assert len(generate(prompt, [[1] * (LIMIT - N - 2)], 2)[0]) == 2
    with pytest.raises(ValueError, match=f"30 tokens and 2 new ones are asked for.* {LIMIT - N}"):
        generate(prompt, [[1] * (LIMIT - N + 1)], 2)
    with pytest.raises(ValueError, match=f"a sequence of {LIMIT + 1} tokens is longer"):
        prompt(torch.ones(1, LIMIT - N + 1, dtype=torch.int64))


@both
@pytest.mark.parametrize(
    ("length", "text_ids", "message"),
    [
        *[(length, None, f"length is {length}; of the model's 32 positions") for length in (-1, LIMIT, 99, 2.0, True)],
        (2, [], "text_ids is empty"),
        (2, [1, VOCABULARY], f"token ids 1 to {VOCABULARY} do not fit the vocabulary"),
        (2, [-1], "token ids -1 to -1"),
    ],
)
def test_bad_input_is_named_and_the_model_is_left_alone(method, length, text_ids, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        method(model, length, text_ids)
    assert all(parameter.requires_grad for parameter in model.parameters())


@both
def test_only_a_plain_model_takes_a_prompt(method):
    with pytest.raises(ValueError, match="the model has LoRA layers"):
        method(apply_lora(tiny(), LoRAConfig(r=2, lora_alpha=2, target_modules=["q_proj"])), N)
    with pytest.raises(ValueError, match="in front of a GPT, and this is a PrefixTuning"):
        method(trained(PrefixTuning), N)


def test_pad_tokens_stand_behind_the_prompt():
    ids, padding = left_pad(PROMPTS[1:], "cpu")
    cache = trained(PrefixTuning).new_cache(2, padding)
    assert len(cache) == N and ids.shape == padding.shape == (2, 4)
    expected = [[False] * N + [True] * 3 + [False], [False] * (N + 4)]
    assert cache.padding.tolist() == expected, f"{cache.padding.tolist()}: True is wanted at the three pad tokens alone"
    assert cache.padding_of(N + 6).tolist() == [row + [False] * 2 for row in expected], "what is decoded is no padding"
    assert trained(PrefixTuning).new_cache(2).padding_of(N) is None
