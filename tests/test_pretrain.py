"""Pretraining in small: a few steps of a narrow model on little text, and the record it leaves."""

import json

import pytest
import torch

from minilora import load_model
from minilora.experiments import pretrain
from minilora.presets import PRESETS
from minilora.text.english import python_documentation
from minilora.text.tokenizer import Tokenizer


@pytest.fixture
def little(monkeypatch):
    """Twenty help texts in place of all documentation, and a narrow base."""
    texts = [f"The {word} statement does what its name says. See also the reference of {word}." for word in range(20)]
    monkeypatch.setattr(pretrain, "python_documentation", lambda: texts)
    narrow = PRESETS["base"] | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=1500)
    monkeypatch.setitem(PRESETS, "base", narrow | dict(num_attention_heads=2, num_key_value_heads=1))


def test_pretraining_leaves_a_base_and_its_record(little, tmp_path):
    pretrain.pretrain(tmp_path, steps=3, progress=False)
    record = json.loads((tmp_path / "record.json").read_text())
    full = 3 * 8 * pretrain.ROW  # less the columns in which a batch has nothing but padding
    assert record["steps"] == 3 and 0.95 * full < record["tokens"] <= full, f"3 steps of 8 rows, {full}, not {record}"
    assert record["validation_loss"][-1][1] < record["validation_loss"][0][1], "three steps should lower the loss"
    assert 0 < record["evaluation"]["floor"] < record["evaluation"]["loss"], (
        f"the loss lies above its floor: {record['evaluation']}"
    )
    assert record["parameters"] == sum(weight.numel() for weight in load_model(tmp_path).parameters())
    assert not (tmp_path / "training_state.safetensors").exists()
    assert Tokenizer(tmp_path / "tokenizer.model").vocab_size == 1500


def test_rows_hold_the_share_of_english_and_are_a_function_of_the_seed(little, tokenizer):
    first, again, other = (pretrain.pretraining_rows(tokenizer, 60_000, seed) for seed in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids), "the same seed should give the same rows"
    assert not torch.equal(first.input_ids[:50], other.input_ids[:50]), "another seed gave the same rows"
    text = tokenizer.decode(first.input_ids.flatten().tolist())
    english = text.count("statement does what") * len(tokenizer.encode(pretrain.python_documentation()[0]))
    share = english / 60_000  # of the tokens asked for; the world's text comes by the ten thousand documents
    assert abs(share - pretrain.ENGLISH_SHARE) < 0.03, f"{share:.3f} of the tokens are English, not 0.14"
    assert first.counted_tokens > 60_000, f"60,000 tokens were asked for, and {first.counted_tokens} count"


def test_documentation_is_on_every_disk():
    assert sum(map(len, python_documentation())) > 500_000
