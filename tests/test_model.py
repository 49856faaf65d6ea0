"""The transformer, held against its formulas written out a second time, and against what it must never do."""

import math

import pytest
import torch
from torch.nn import functional as F

from minilora.model import (
    GPT,
    PRESETS,
    Attention,
    GPTConfig,
    KVCache,
    RMSNorm,
    apply_rotary,
    attention_mask,
    rotary_cos_sin,
    rotary_frequencies,
)

SHAPE = dict(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


def tiny(**changes) -> GPT:
    """A small model in float64 whose weights are large enough that attention and MLP are far from linear."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))


def left_padding(pads: list[int], columns: int) -> torch.Tensor:
    """True at the first columns of each row, as many as `pads` says, (B, columns)."""
    return torch.arange(columns) < torch.tensor(pads)[:, None]


def assert_close(found: torch.Tensor, expected: torch.Tensor, limit: float, what: str):
    difference = (found - expected).abs().max().item()
    assert difference <= limit, f"{what}: largest difference {difference:.3g}, allowed {limit:.3g}"


# The parts, each against a formula that shares no code with them


def test_rmsnorm_is_its_formula():
    torch.manual_seed(0)
    norm, x = RMSNorm(5, eps=0.1).double(), torch.randn(3, 5).double()
    torch.nn.init.normal_(norm.weight)
    rows = []
    for row in x.tolist():
        root = math.sqrt(sum(value**2 for value in row) / 5 + 0.1)
        rows.append([value / root * weight for value, weight in zip(row, norm.weight.tolist(), strict=True)])
    assert_close(norm(x), torch.tensor(rows, dtype=torch.float64), 1e-12, "RMSNorm")


def test_rmsnorm_squares_half_precision_in_float32():
    x = torch.full((1, 8), 300.0, dtype=torch.float16)  # 300² is beyond float16
    y = RMSNorm(8, eps=1e-5).half()(x)
    assert y.dtype == torch.float16, f"the input is float16, and the output {y.dtype}"
    assert_close(y, torch.ones_like(y), 1e-3, "RMSNorm of a constant row")


def test_rotary_turns_each_pair_as_a_complex_number():
    config = GPTConfig(**SHAPE, rope_theta=50.0, head_dim=8)
    positions = torch.tensor([[0, 1, 5, 19]])
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # (B, H, T, D)
    turned = apply_rotary(x, *rotary_cos_sin(config, positions))
    for t, position in enumerate(positions[0].tolist()):
        for i in range(4):
            angle = position * 50.0 ** (-2 * i / 8)
            expected = torch.complex(x[..., t, i], x[..., t, i + 4]) * complex(math.cos(angle), math.sin(angle))
            found = torch.complex(turned[..., t, i], turned[..., t, i + 4])
            assert_close(found, expected, 1e-5, f"pair {i} at position {position}")  # angles are float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float16], ids=str)
def test_rotary_angles_are_float32_whatever_the_model_computes_in(dtype):
    """bfloat16 cannot count beyond 256, nor float16 beyond 2048, and an angle of theirs is off by radians."""
    config = GPTConfig(**SHAPE, head_dim=8)
    exact = {torch.bfloat16: [0, 200, 256, 264, 1008], torch.float16: [0, 257, 1001, 2000]}  # what the dtype can hold
    positions = torch.tensor([exact.get(dtype, [0, 255, 257, 1001, 2049, 4001])])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if dtype == torch.int64 else dtype)  # as a model built in half precision has
    try:
        cos, sin = rotary_cos_sin(config, positions.to(dtype))
    finally:
        torch.set_default_dtype(before)
    assert cos.dtype == sin.dtype == torch.float32, f"cos and sin are {cos.dtype} and {sin.dtype}, not float32"
    for t, position in enumerate(positions[0].tolist()):
        for i in range(8):
            angle = position * 10000.0 ** (-2 * (i % 4) / 8)
            for name, found, expected in (("cos", cos, math.cos(angle)), ("sin", sin, math.sin(angle))):
                off = abs(found[0, 0, t, i].item() - expected)
                assert off < 5e-4, (
                    f"{name} of feature {i} at position {position}: expected {expected:.5f}, off by {off:.2g}"
                )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_half_precision_tells_positions_apart_beyond_256(dtype):
    """The angles that a half-precision model gives its layers are those of the formula."""
    model, seen = tiny(max_position_embeddings=600).to(dtype), []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        model(random_ids(1, 600))
    angles = torch.arange(600.0).double()[:, None] * 10000.0 ** (-torch.arange(0, 4, 2).double() / 4)  # (T, D/2)
    angles = torch.cat([angles, angles], dim=-1)
    for name, found, right in zip(("cos", "sin"), seen[0], (angles.cos(), angles.sin()), strict=True):
        found, right = found.double()[0, 0, 257:], right[257:]
        assert_close(found, right, 5e-4, f"{name} of the angles beyond position 256, in {dtype}")


def test_linear_rope_divides_every_frequency():
    plain = rotary_frequencies(GPTConfig(**SHAPE))
    slow = rotary_frequencies(GPTConfig(**SHAPE, rope_scaling={"rope_type": "linear", "factor": 4.0}))
    assert_close(slow * 4, plain, 1e-7, "linear rope")


def test_llama3_rope_is_the_piecewise_rule():
    config = GPTConfig.preset("llama-3.1-8b")
    factor, low, high, original = 8, 1, 4, 8192
    regions = {"kept": 0, "blended": 0, "stretched": 0}
    for i, found in enumerate(rotary_frequencies(config).tolist()):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength > original / low:
            expected, region = plain / factor, "stretched"
        elif wavelength < original / high:
            expected, region = plain, "kept"
        else:
            t = (original / wavelength - low) / (high - low)
            expected, region = (1 - t) * plain / factor + t * plain, "blended"
        regions[region] += 1
        assert abs(found / expected - 1) < 1e-5, f"pair {i} ({region}): expected {expected:.8g}, found {found:.8g}"
    assert all(regions.values()), f"each part of the rule must be met, got {regions}"


def written_out(model: GPT, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of one sequence, a token and a head at a time, by the formulas."""
    config, weights = model.config, model.state_dict()
    H, K, D, T = config.num_attention_heads, config.num_key_value_heads, config.head_dim, len(ids)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[f"{name}.weight"]

    def turn(x, position):  # x (D,)
        angles = position * config.rope_theta ** (-torch.arange(0, D, 2).double() / D)
        a, b = x[: D // 2], x[D // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()])

    x = weights["model.embed_tokens.weight"][ids]  # (T, C)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        y = norm(x, at + "input_layernorm")
        q = linear(y, at + "self_attn.q_proj").view(T, H, D)
        k = linear(y, at + "self_attn.k_proj").view(T, K, D)
        v = linear(y, at + "self_attn.v_proj").view(T, K, D)
        mixed = torch.zeros(T, H, D).double()
        for t in range(T):
            for h in range(H):
                group = h // (H // K)
                query = turn(q[t, h], t)
                scores = torch.stack([query @ turn(k[s, group], s) / math.sqrt(D) for s in range(t + 1)])
                mixed[t, h] = scores.softmax(0) @ v[: t + 1, group]
        x = x + linear(mixed.view(T, H * D), at + "self_attn.o_proj")
        y = norm(x, at + "post_attention_layernorm")
        gate, up = linear(y, at + "mlp.gate_proj"), linear(y, at + "mlp.up_proj")
        x = x + linear(gate / (1 + (-gate).exp()) * up, at + "mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize(
    "changes", [{}, dict(attention_bias=True, mlp_bias=True, head_dim=6, tie_word_embeddings=True)]
)
def test_the_model_is_its_formulas_written_out(changes):
    model, ids = tiny(**changes), random_ids(1, 7)
    # cos and sin are float32 in the model, which leaves about 1e-8 of difference here.
    with torch.no_grad():
        assert_close(model(ids)[0], written_out(model, ids[0].tolist()), 1e-6, "logits")


# What holds for any weights


def test_no_token_sees_a_later_one():
    model, ids = tiny(), random_ids(2, 12)
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % SHAPE["vocab_size"]
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert_close(after[:, :7], before[:, :7], 1e-12, "logits before the changed token")
    assert ((after - before).abs().amax(-1)[:, 7:] > 1e-3).all(), "logits from the changed token on must change"


def test_rotary_scores_depend_on_distance_only():
    D, theta = 8, 100.0
    q, k = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def turned(x, position):
        angles = position * theta ** (-torch.arange(0, D, 2).double() / D)
        return apply_rotary(x.view(1, 1, 1, D), torch.cat([angles, angles]).cos(), torch.cat([angles, angles]).sin())

    scores = [(turned(q, shift + 9) * turned(k, shift + 2)).sum() for shift in range(0, 4000, 250)]
    assert_close(torch.stack(scores), scores[0].expand(len(scores)), 1e-11, "scores at distance 7, shifted")
    other = (turned(q, 10) * turned(k, 2)).sum()
    assert (other - scores[0]).abs() > 1e-3, "distance 8 must score unlike distance 7"


def test_attention_is_the_same_wherever_the_sequence_starts():
    torch.manual_seed(0)
    config = GPTConfig(**SHAPE)
    attention, x = Attention(config).double(), torch.randn(1, 9, 24).double() * 3
    positions = torch.arange(9)[None]
    here, _ = attention(x, rotary_cos_sin(config, positions))
    there, _ = attention(x, rotary_cos_sin(config, positions + 20))
    stretched, _ = attention(x, rotary_cos_sin(config, positions * 2))
    assert_close(there, here, 1e-5, "attention 20 positions further on")
    assert (stretched - here).abs().max() > 1e-3, "doubled distances must change attention"


def test_grouped_query_equals_multi_head_with_repeated_keys_and_values():
    grouped, full = tiny(num_key_value_heads=2), tiny(num_key_value_heads=6)
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            heads = weight.view(2, 4, 24)  # (K, D, C)
            weights[name] = heads.repeat_interleave(3, dim=0).reshape(24, 24)  # H/K = 3 query heads share one
    full.load_state_dict(weights)
    ids = random_ids(2, 10)
    with torch.no_grad():
        assert_close(grouped(ids), full(ids), 1e-12, "grouped-query against repeated heads")


@pytest.mark.parametrize("chunks", [[1] * 12, [2, 3, 1, 6], [12]])
def test_a_cache_changes_nothing(chunks):
    model, ids, cache = tiny(), random_ids(3, 12), KVCache()
    with torch.no_grad():
        parts = [model(part, cache) for part in ids.split(chunks, dim=1)]
        assert_close(torch.cat(parts, dim=1), model(ids), 1e-12, f"cached in chunks of {chunks}")
    assert len(cache) == 12, f"12 tokens were put in, and the cache says {len(cache)}"


@pytest.mark.parametrize("chunks", [[12], [7, 1, 1, 3], [1] * 12])
def test_left_padded_rows_equal_the_rows_alone(chunks):
    model, ids, pads = tiny(), random_ids(3, 12), [0, 4, 9]
    cache = KVCache(left_padding(pads, 9))  # columns behind the mask's end are real
    with torch.no_grad():
        padded = torch.cat([model(part, cache) for part in ids.split(chunks, dim=1)], dim=1)
        for row, pad in enumerate(pads):
            alone = model(ids[row : row + 1, pad:])
            assert_close(padded[row : row + 1, pad:], alone, 1e-12, f"row {row} with {pad} pad tokens")


def test_no_query_is_left_without_a_key():
    """A softmax over nothing is NaN on some backends, also at pad positions that nobody reads."""
    mask = attention_mask(new=5, past=0, padding=left_padding([0, 3], 5), device=None)
    assert mask.shape == (2, 1, 5, 5) and mask.any(-1).all(), f"(2, 1, 5, 5) with a key in every line, not {mask}"
    assert not mask[1, 0, 3:, :3].any(), "a real token must not look at padding"


def test_embeddings_in_place_of_ids():
    model, ids = tiny(), random_ids(2, 6)
    with torch.no_grad():
        of_embeddings = model.lm_head(model.model.run_blocks(model.model.embed_tokens(ids)))
        assert_close(of_embeddings, model(ids), 0, "the blocks on the embeddings of the ids")


def test_padding_of_a_cache_covers_as_many_columns_as_are_asked_for():
    assert KVCache().padding_of(4) is None, "a cache without padding should say None"
    found = KVCache(left_padding([0, 2], 3)).padding_of(5)
    expected = left_padding([0, 2], 5)
    assert torch.equal(found, expected), f"columns behind the mask are real: {expected}, not {found}"


def test_checkpointing_gives_the_same_gradients_and_computes_blocks_twice():
    ids, calls, gradients = random_ids(2, 8), {}, {}
    for checkpointing in (False, True):
        model = tiny().train()
        model.model.gradient_checkpointing = checkpointing
        runs = calls[checkpointing] = []
        model.model.layers[1].mlp.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        logits = model(ids)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert [len(calls[False]), len(calls[True])] == [1, 2], "a checkpointed block runs again in backward"
    for name, gradient in gradients[False].items():
        assert_close(gradients[True][name], gradient, 1e-12, f"gradient of {name}")


# Shapes and counts


def count_in_closed_form(config: GPTConfig) -> int:
    C, inner, D = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    attention = 2 * C * queries + 2 * C * keys + (queries + 2 * keys + C) * config.attention_bias
    mlp = 3 * C * inner + (2 * inner + C) * config.mlp_bias
    matrices = 1 if config.tie_word_embeddings else 2
    return matrices * config.vocab_size * C + config.num_hidden_layers * (attention + mlp + 2 * C) + C


PUBLISHED = {
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-2-70b": 68_976_648_192,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_of_a_preset(name):
    config = GPTConfig.preset(name)
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in GPT(config).parameters())
    assert counted == count_in_closed_form(config) == PUBLISHED.get(name, counted), (
        f"counted {counted:,d}, by formula {count_in_closed_form(config):,d}, published {PUBLISHED.get(name)}"
    )


@pytest.mark.parametrize("changes", [dict(attention_bias=True), dict(mlp_bias=True), dict(head_dim=10)])
def test_parameter_count_with_biases_and_other_head_sizes(changes):
    model = tiny(**changes)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_in_closed_form(model.config)


def test_a_tied_head_is_the_embedding_itself():
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "a tied head is a copy"
    assert tiny().lm_head.weight is not tiny().model.embed_tokens.weight, "an untied head is the embedding"


def test_a_new_model_starts_with_small_residual_writes():
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("base"))
    weights = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.ndim == 2}
    for name, std in weights.items():
        small = "o_proj" in name or "down_proj" in name
        expected = 0.02 / math.sqrt(12) if small else dict(model.named_parameters())[name].shape[1] ** -0.5
        assert abs(std / expected - 1) < 0.05, (
            f"{name} starts with standard deviation {std:.4f}, expected {expected:.4f}"
        )


# Bad input


@pytest.mark.parametrize("wrong", [40, -1])
def test_ids_outside_the_vocabulary_are_named(wrong):
    ids = random_ids(1, 4)
    ids[0, 2] = wrong
    with pytest.raises(ValueError, match=rf"{wrong}.*vocabulary of 40 \(0 to 39\)"):
        tiny()(ids)


def test_a_sequence_that_is_too_long_is_refused():
    model = tiny()
    with torch.no_grad():
        assert model(random_ids(1, 32)).shape == (1, 32, 40)
        with pytest.raises(ValueError, match="33 tokens.*32"):
            model(random_ids(1, 33))
        cache = KVCache()
        model(random_ids(1, 30), cache)
        with pytest.raises(ValueError, match="33 tokens.*32"):
            model(random_ids(1, 3), cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden_size=25), "hidden_size 25 is not divisible by num_attention_heads 6"),
        (dict(num_key_value_heads=4), "num_attention_heads 6 is not divisible by num_key_value_heads 4"),
        (dict(head_dim=5), "head_dim 5 is odd"),
        (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "'yarn' is not supported"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SHAPE, **changes})


def test_presets_by_name_and_with_changes():
    assert GPTConfig.preset("llama-2-7b", num_hidden_layers=2).num_hidden_layers == 2
    assert GPTConfig.preset("llama-2-7b").num_hidden_layers == 32, "a change must not reach the preset itself"
    with pytest.raises(ValueError, match="unknown preset 'gpt-5'; known: base"):
        GPTConfig.preset("gpt-5")
