"""Models held against transformers: the same files, the same logits, the same text."""

import json

import pytest
import torch

from minilora import generate, load_model, save_model

REASON = "held against transformers, peft and bitsandbytes, which `pip install -e '.[parity]'` installs"
transformers = pytest.importorskip("transformers", reason=REASON)

LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=64)
CASES = {
    "grouped-query heads": dict(num_key_value_heads=2),
    "one key head": dict(num_key_value_heads=1),
    "multi-head": dict(num_key_value_heads=4),
    "head_dim": dict(head_dim=24),
    "tied": dict(tie_word_embeddings=True),
    "attention_bias": dict(attention_bias=True),
    "mlp_bias": dict(mlp_bias=True),
    "rms_norm_eps": dict(rms_norm_eps=0.1),
    "long": dict(tokens=1000),
    "linear": dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0), tokens=300),
    "llama3": dict(rope_parameters=LLAMA3, tokens=1000),  # far beyond the 64 positions of before
    "theta": dict(rope_parameters=dict(rope_type="default", rope_theta=5e5), tokens=128),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_both_ways(both, assert_same_logits, tmp_path, case):
    """Their files in ours, and ours in theirs."""
    changes = dict(CASES[case])
    shape = 2, changes.pop("tokens", 32)
    theirs, ours = both(**changes)
    assert_same_logits("float32 logits", ours, theirs, 1e-5, shape)
    save_model(ours, tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(back) is transformers.LlamaForCausalLM and back.dtype == torch.float32
    assert_same_logits("float32 logits of our file", ours, back, 1e-5, shape)


@pytest.mark.parametrize("case", ["rms_norm_eps", "linear", "llama3", "theta"])
def test_each_setting_shows_in_the_logits(both, llama, ids, case):
    """By far more than the bar above: were the setting dropped on the way, that test would fail."""
    changes = dict(CASES[case])
    tokens = ids(2, changes.pop("tokens", 32))
    with torch.no_grad():
        difference = (llama(**changes)(tokens).logits - llama()(tokens).logits).abs().max().item()
    assert difference > 0.1, f"the logits with and without differ by {difference}"


def test_sharded_files(llama, assert_same_logits, tmp_path):
    theirs = llama()
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists(), shards
    assert_same_logits("float32 logits", load_model(tmp_path), theirs, 1e-5)


def test_bfloat16_files(llama, assert_same_logits, tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path)
    load = transformers.LlamaForCausalLM.from_pretrained
    wide = load(tmp_path, dtype=torch.float32)
    assert_same_logits("float32 logits of a bfloat16 file", load_model(tmp_path, dtype=torch.float32), wide, 1e-5)
    logits = assert_same_logits("bfloat16 logits", load_model(tmp_path), load(tmp_path, dtype="auto"), 2**-5)
    assert logits.dtype == torch.bfloat16 and logits.abs().max() < 8, "2**-5 is one step of a bfloat16 below 8"


def test_text_equals_on_ragged_prompts(both, ids):
    """Greedy, token by token, with padding on the left and a cache; and where a row ends."""
    theirs, ours = both(rope_parameters=LLAMA3, seed=5)
    rows = ids(5, 90).tolist()
    prompts = [row[:length] for row, length in zip(rows, (1, 90, 7, 64, 30), strict=True)]
    tokens = torch.tensor([[0] * (90 - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (90 - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = dict(attention_mask=mask, max_new_tokens=40, do_sample=False, pad_token_id=0)
    settings |= dict(return_dict_in_generate=True, output_logits=True)
    said = theirs.generate(tokens, **settings)
    best = torch.stack(said.logits).topk(2).values  # (new tokens, rows, 2)
    margin = (best[..., 0] - best[..., 1]).min().item()
    assert margin > 1e-4, f"two tokens are within {margin} of each other: another seed is needed"
    expected = said.sequences[:, 90:].tolist()
    assert all(len(set(row)) > 10 for row in expected), "the text must not be one loop"
    assert generate(ours, prompts, max_new_tokens=40) == expected
    eos = expected[1][12]
    stopped = theirs.generate(tokens, **settings, eos_token_id=eos).sequences[:, 90:].tolist()
    stopped = [row[: row.index(eos)] if eos in row else row for row in stopped]
    assert min(map(len, stopped)) < 13 < max(map(len, stopped))
    assert generate(ours, prompts, max_new_tokens=40, eos_id=eos) == stopped


def test_end_tokens_survive_the_round_trip(llama, tmp_path):
    llama(bos_token_id=5, eos_token_id=[6, 7]).save_pretrained(tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours")
    settings = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours")]
    for key in ("bos_token_id", "eos_token_id"):
        assert settings[0][key] == settings[1][key], f"{key}: {settings[0][key]} became {settings[1][key]}"
