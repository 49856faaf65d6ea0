"""Soft prompts and prefixes held against PEFT: the same files, logits, gradients and generated tokens."""

import pytest
import torch
from torch.nn import functional as F

from minilora import PrefixTuning, SoftPrompt, generate, load_prompt, save_prompt

REASON = "held against transformers, peft and bitsandbytes, which `pip install -e '.[parity]'` installs"
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

BAR, N = 1e-5, 6  # of float32 logits, and of gradients over their norm
OURS = {"prompt": SoftPrompt, "prefix": PrefixTuning}
THEIRS = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
SHAPES = {
    "grouped": {},
    "multi-head": dict(num_key_value_heads=4),
    "one key head": dict(num_key_value_heads=1),
    "small heads, tied, biases": dict(head_dim=8, tie_word_embeddings=True, attention_bias=True),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8]]

each_method = pytest.mark.parametrize("method", OURS)
each_shape = pytest.mark.parametrize("shape", SHAPES)


def ours_with(model, method):
    prompt = OURS[method](model, N)
    with torch.no_grad():
        prompt.prompt_embeddings.normal_(generator=torch.Generator().manual_seed(1))
    return prompt


def theirs_with(model, method, **settings):
    torch.manual_seed(1)
    config = THEIRS[method](task_type="CAUSAL_LM", num_virtual_tokens=N, **settings)
    return peft.get_peft_model(model, config).eval()


def assert_it_counts(ids, prompt, logits):
    with torch.no_grad():
        difference = (prompt.base_model(ids(2, 24)) - logits[:, -24:]).abs().max()
    assert difference > 0.05, f"the prompt changes the logits by {difference} only"


@each_method
@each_shape
def test_our_prompts_load_in_peft(both, assert_same_logits, ids, tmp_path, method, shape):
    base, ours = both(**SHAPES[shape])
    prompt = ours_with(ours, method)
    save_prompt(prompt, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    logits = assert_same_logits("float32 logits", prompt, theirs, BAR)
    assert logits.shape[1] == {"prompt": N + 24, "prefix": 24}[method]
    assert_it_counts(ids, prompt, logits)


@each_method
@each_shape
def test_prompts_of_peft_load_here(both, assert_same_logits, ids, tmp_path, method, shape):
    base, ours = both(**SHAPES[shape])
    theirs = theirs_with(base, method)
    theirs.save_pretrained(tmp_path / "adapter")
    prompt = load_prompt(ours, tmp_path / "adapter")
    assert_it_counts(ids, prompt, assert_same_logits("float32 logits", prompt, theirs, BAR))


def test_a_prefix_behind_an_mlp_is_saved_as_what_the_mlp_made(both, assert_same_logits, tmp_path):
    base, ours = both()
    theirs = theirs_with(base, "prefix", prefix_projection=True, encoder_hidden_size=7)
    theirs.save_pretrained(tmp_path / "adapter")
    assert_same_logits("float32 logits", load_prompt(ours, tmp_path / "adapter"), theirs, BAR)


@each_method
@each_shape
def test_gradients_equal(both, ids, assert_close, tmp_path, method, shape):
    base, ours = both(**SHAPES[shape])
    theirs = theirs_with(base, method)
    theirs.save_pretrained(tmp_path / "adapter")
    prompt, tokens = load_prompt(ours, tmp_path / "adapter"), ids(2, 16)
    for logits in (prompt(tokens), theirs(tokens).logits):
        F.cross_entropy(logits[:, -16:-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    found, expected = prompt.prompt_embeddings.grad, theirs.prompt_encoder.default.embedding.weight.grad
    norm = expected.norm()
    assert_close("gradients over their norm", found / norm, expected / norm, BAR)


@each_method
@each_shape
def test_left_padding_equals_transformers_with_mask_and_positions(both, assert_close, method, shape):
    """PEFT counts pad tokens as positions. transformers itself, given what PEFT puts in front, can be told not to."""
    base, ours = both(**SHAPES[shape])
    prompt = ours_with(ours, method)
    longest = max(len(ids) for ids in PROMPTS)
    padding = torch.tensor([longest - len(ids) for ids in PROMPTS])
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in PROMPTS])
    real = torch.arange(longest) >= padding[:, None]
    mask = torch.cat([torch.ones(3, N, dtype=torch.bool), real], dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # the prompt 0 … n-1, the first real token n
    theirs = theirs_with(base, method)
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(prompt.prompt_embeddings)
        front = theirs.get_prompt(batch_size=3)
        if method == "prompt":
            embeds = torch.cat([front, base.get_input_embeddings()(tokens)], dim=1)
            expected = base(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).logits[:, N:]
        else:
            settings = dict(attention_mask=mask, position_ids=positions[:, N:], past_key_values=front)
            expected = base(tokens, **settings).logits
        found = prompt(tokens, prompt.new_cache(3, ~real))
    for row, pad in enumerate(padding.tolist()):
        assert_close(f"float32 logits of the row with {pad} pad tokens", found[row, pad:], expected[row, pad:], BAR)


@each_method
def test_greedy_texts_over_our_cache_equal_their_full_forward(both, method):
    base, ours = both()
    prompt, theirs = ours_with(ours, method), theirs_with(base, method)
    with torch.no_grad():
        theirs.prompt_encoder.default.embedding.weight.copy_(prompt.prompt_embeddings)
    expected = []
    for ids in PROMPTS:
        ids, start = list(ids), len(ids)
        for _ in range(20):  # PEFT's `generate` over a cache gives other tokens than its own forward does
            with torch.no_grad():
                ids.append(theirs(torch.tensor([ids])).logits[0, -1].argmax().item())
        expected.append(ids[start:])
    assert generate(prompt, PROMPTS, 20) == expected
