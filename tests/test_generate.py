"""Generation, held against the loop it replaces: the whole sequence through the model again for every token."""

import pytest
import torch

from minilora.inference.generate import choose_tokens, generate, row_generators
from minilora.model import GPT, GPTConfig

VOCABULARY, LIMIT = 24, 32
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]


@pytest.fixture
def model() -> GPT:
    """In float64, with weights large enough that the next token depends on the whole prompt."""
    torch.manual_seed(0)
    shape = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    model = GPT(GPTConfig(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LIMIT))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.double()


def last_logits(model: GPT, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def greedy_without_cache(model: GPT, prompt: list[int], new: int) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        ids.append(last_logits(model, ids).argmax().item())
    return ids[len(prompt) :]


def test_greedy_is_the_likeliest_token_of_the_whole_sequence(model):
    found = generate(model, PROMPTS[:1], max_new_tokens=20)
    assert found == [greedy_without_cache(model, PROMPTS[0], 20)]
    assert len(set(found[0])) > 3, "a model that repeats itself would prove little"


def test_rows_of_a_ragged_batch_equal_the_rows_alone(model):
    together = generate(model, PROMPTS, max_new_tokens=20)
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == greedy_without_cache(model, prompt, 20), f"row {row}"


def test_a_row_stops_at_its_end_token_and_the_others_go_on(model):
    free = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    end = free[0][4]
    expected = [row[: row.index(end)] if end in row else row for row in free]
    assert len({len(row) for row in expected}) > 1, "the rows must stop at different places"
    assert generate(model, PROMPTS, max_new_tokens=12, eos_id=end) == expected


def test_it_stops_when_every_row_is_done(model):
    end = greedy_without_cache(model, PROMPTS[1], 1)[0]
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    assert generate(model, [PROMPTS[1], PROMPTS[1]], max_new_tokens=20, eos_id=end) == [[], []]
    assert len(calls) == 1, f"one pass should do, and {len(calls)} were made"


def test_each_new_token_costs_one_token_and_the_head_sees_the_last_position_only(model):
    embedded, heads = [], []
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: embedded.append(inputs[0].shape))
    model.lm_head.register_forward_hook(lambda module, inputs, output: heads.append(inputs[0].shape))
    generate(model, PROMPTS, max_new_tokens=4)
    assert embedded == [(3, 7), (3, 1), (3, 1), (3, 1)]
    assert heads == [(3, 16)] * 4


# Sampling


def frequencies(model: GPT, **settings) -> torch.Tensor:
    """How often each token follows PROMPTS[2], over 4000 rows of one batch."""
    rows = generate(model, [PROMPTS[2]] * 4000, max_new_tokens=1, **settings)
    return torch.bincount(torch.tensor(rows).flatten(), minlength=VOCABULARY) / 4000


def assert_drawn_from(found: torch.Tensor, expected: torch.Tensor):
    """Within five standard deviations of the binomial, and never where the probability is 0."""
    limit = 5 * (expected * (1 - expected) / 4000).sqrt()
    worst = ((found - expected).abs() - limit).argmax().item()
    assert ((found - expected).abs() <= limit + 1e-9).all(), (
        f"token {worst}: drawn with frequency {found[worst]:.4f}, expected {expected[worst]:.4f} ± {limit[worst]:.4f}"
    )


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_samples_follow_the_softmax_at_that_temperature(model, temperature):
    expected = (last_logits(model, PROMPTS[2]) / temperature).softmax(-1)
    assert_drawn_from(frequencies(model, temperature=temperature), expected)


def test_top_k_keeps_the_k_likeliest(model):
    logits = last_logits(model, PROMPTS[2]) / 2
    kept = logits.topk(3).indices
    expected = torch.zeros(VOCABULARY).double()
    expected[kept] = logits[kept].softmax(-1)
    assert_drawn_from(frequencies(model, temperature=2.0, top_k=3), expected)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(model, top_p):
    probabilities = (last_logits(model, PROMPTS[2]) / 2).softmax(-1).tolist()
    expected, mass = torch.zeros(VOCABULARY).double(), 0.0
    for token in sorted(range(VOCABULARY), key=lambda token: -probabilities[token]):
        if mass < top_p:
            expected[token] = probabilities[token]
            mass += probabilities[token]
    assert_drawn_from(frequencies(model, temperature=2.0, top_p=top_p), expected / mass)


def test_top_p_that_is_reached_exactly_takes_no_token_more():
    drawn = choose_tokens(torch.zeros(200, 4), 1.0, None, 0.5, row_generators(200, 0))
    assert set(drawn.tolist()) == {0, 1}, f"two of four equal tokens make a half, and {set(drawn.tolist())} were drawn"


def test_ids_that_stand_for_no_text_are_never_chosen(model):
    for settings in (dict(), dict(temperature=3.0)):
        free, cut = (generate(model, PROMPTS, 20, vocab_size=size, **settings) for size in (None, 9))
        assert max(map(max, free)) >= 9, "the model would choose them"
        assert max(map(max, cut)) < 9, f"{max(map(max, cut))} was chosen, and ids from 9 on are no tokens"


def test_top_p_counts_what_top_k_left(model):
    """Of three tokens with masses renormalised to one, the two likeliest reach 0.6."""
    logits = last_logits(model, PROMPTS[2]) / 5
    masses = logits.topk(3).values.softmax(-1)
    assert masses[0] < 0.6 <= masses[:2].sum() and logits.softmax(-1).topk(3).values.sum() < 0.6, masses
    found = frequencies(model, temperature=5.0, top_k=3, top_p=0.6)
    assert found.count_nonzero() == 2, f"two tokens should be left, not {found}"


@pytest.mark.parametrize("settings", [dict(temperature=1e-300), dict(temperature=1.0, top_k=1), dict(top_k=3)])
def test_what_leaves_one_choice_is_greedy(model, settings):
    expected = [greedy_without_cache(model, prompt, 8) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_new_tokens=8, **settings) == expected


def test_a_temperature_beyond_the_whole_numbers_of_torch_is_that_float(model):
    drawn = [generate(model, PROMPTS, max_new_tokens=8, temperature=high) for high in (10**30, 1e30)]
    assert drawn[0] == drawn[1]


def test_a_top_k_beyond_the_vocabulary_keeps_all(model):
    settings = dict(max_new_tokens=8, temperature=1.0)
    assert generate(model, PROMPTS, top_k=10**6, **settings) == generate(model, PROMPTS, **settings)


def test_a_seed_fixes_the_draws_and_leaves_the_global_generator_alone(model):
    settings = dict(max_new_tokens=16, temperature=1.0)
    before = torch.get_rng_state()
    first, again, other = (generate(model, PROMPTS, seed=seed, **settings) for seed in (1, 1, 2))
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator was drawn from"


def test_a_row_draws_the_same_whoever_stands_beside_it(model):
    settings = dict(max_new_tokens=16, temperature=1.0, seed=5)
    alone = generate(model, PROMPTS[:1], **settings)[0]
    assert generate(model, PROMPTS, **settings)[0] == alone
    assert generate(model, [PROMPTS[0], [7] * 12], **settings)[0] == alone


def test_the_same_prompt_twice_gives_two_samples(model):
    first, second = generate(model, [PROMPTS[0]] * 2, max_new_tokens=16, temperature=1.0)
    assert first != second


def test_a_seed_is_not_the_next_seed_shifted_by_a_row(model):
    settings = dict(max_new_tokens=16, temperature=1.0)
    rows = [tuple(row) for seed in (0, 1, 2) for row in generate(model, [PROMPTS[0]] * 4, seed=seed, **settings)]
    assert len(set(rows)) == 12


# The model's state, and bad input


def test_the_mode_of_every_module_is_restored(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    during = []
    model.lm_head.register_forward_hook(lambda module, *_: during.append((model.training, torch.is_grad_enabled())))
    generate(model, PROMPTS, max_new_tokens=1)
    assert during == [(False, False)]
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits hold NaN"):
        generate(model, PROMPTS, max_new_tokens=1)
    assert [module.training for module in model.modules()] == modes, "after an error"


def test_no_prompts_give_no_rows(model):
    assert generate(model, []) == []


def test_the_last_position_can_be_filled(model):
    assert len(generate(model, [[1] * (LIMIT - 2)], max_new_tokens=2)[0]) == 2


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([[1, 2], []], {}, "prompt 1 is empty"),
        ([[1], [2, 24]], {}, r"prompt 1 holds token id 24, outside the vocabulary of 24 \(0 to 23\)"),
        ([[1], [-1, 2]], {}, "prompt 1 holds token id -1"),
        ([[1], [2] * 31], dict(max_new_tokens=2), "prompt 1 has 31 tokens and 2 new ones are asked for.* 32"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens is 0"),
        ([[1]], dict(temperature=-0.1), "temperature is -0.1"),
        ([[1]], dict(temperature=float("nan")), "temperature is nan"),
        ([[1]], dict(temperature=float("inf")), "temperature is inf"),
        ([[1]], dict(temperature=1.0, top_p=0.0), "top_p is 0.0"),
        ([[1]], dict(temperature=1.0, top_p=1.5), "top_p is 1.5"),
        ([[1]], dict(temperature=1.0, top_k=0), "top_k is 0"),
    ],
)
def test_bad_input_is_named(model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 4, **settings})
