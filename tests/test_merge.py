"""What merging an adapter for good does to the logits, measured here a second time without the package's own merge."""

import copy

import pytest
import torch
from torch import nn

from minilora import GPT, GPTConfig, LoRAConfig, apply_lora, load_model, lora_layers
from minilora.experiments.merge import MergeReport, merge_adapter, random_logits
from minilora.linear4bit import dequantize_model, quantize_model, quantized_layers
from minilora.quant import Quantization, dequantize, quantize

CONFIG = GPTConfig(64, 48, 80, 2, 4, 2, max_position_embeddings=80, attention_bias=True)
SETTINGS = Quantization("nf4", 16, False)


def make_model(scheme: Quantization | None, dropout=0.0, config=CONFIG) -> GPT:
    """A model, its linears in 4 bits if asked for, with an adapter that does something."""
    torch.manual_seed(0)
    model = GPT(config)
    if scheme:
        quantize_model(model, scheme)
    apply_lora(model, LoRAConfig(r=2, lora_alpha=4, lora_dropout=dropout, target_modules="all-linear"))
    for _, layer in lora_layers(model):
        layer.lora_A.data.normal_(std=0.1)
        layer.lora_B.data.normal_(std=0.1)
    return model


def merged_by_hand(model: GPT, again: Quantization | None) -> GPT:
    """A plain model of the weights W + s·BA, or of what is left of them in 4 bits."""
    model = copy.deepcopy(model)
    for name, layer in list(lora_layers(model)):
        base = layer.base_layer
        weight = base.weight if type(base) is nn.Linear else dequantize(base.quantized)
        weight = weight + layer.scaling * layer.lora_B @ layer.lora_A
        linear = nn.Linear(layer.in_features, layer.out_features, bias=base.bias is not None)
        if again:
            weight = dequantize(quantize(weight, again.scheme, again.block_size, again.double_quant))
        linear.weight.data, linear.bias = weight.detach(), base.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    return model


@torch.no_grad()
def logits(model: GPT, length=64) -> torch.Tensor:
    ids = torch.randint(64, (4, length), generator=torch.Generator().manual_seed(0))
    return model.eval()(ids)


def assert_number(name: str, found: float, expected: float, digits=1e-3):
    assert found == pytest.approx(expected, rel=digits), (
        f"{name}: expected {expected:.6g}, off by {found - expected:.3g}"
    )


def test_on_4_bits_it_measures_merging_and_rounding_again(tmp_path):
    model = make_model(SETTINGS, dropout=0.3)  # dropout must be off for the comparison
    apart, rounded = logits(copy.deepcopy(model)), logits(merged_by_hand(model, SETTINGS))
    merged = (logits(merged_by_hand(model, None)) - apart).abs().max().item()
    report = merge_adapter(model.train(), tmp_path / "merged")
    assert_number("the largest logit", report.largest_logit, apart.abs().max().item())
    assert_number("rounded again", report.rounded, (rounded - apart).abs().max().item())
    # At most last digits; of so many tokens nothing, because apart the layer adds W and s·BA as merging does.
    assert report.merged < 1e-5, f"merging into floats costs last digits, such as {merged:.2g}: {report.merged:.2g}"
    assert report.rounded > 1000 * report.merged, report
    written = load_model(tmp_path / "merged")
    assert not quantized_layers(written), "what is written is in floats"
    off = (logits(written) - apart).abs().max().item()
    assert off < 1e-5, f"the merged model differs by {off:.2g}"
    assert report.merged == pytest.approx(off, abs=1e-6), f"as written it differs by {off:.2g}, not {report.merged:.2g}"


def test_on_floats_nothing_is_rounded(tmp_path):
    model = make_model(None)
    apart = logits(model)
    report = merge_adapter(model, tmp_path / "merged")
    assert_number("the largest logit", report.largest_logit, apart.abs().max().item())
    assert report.rounded is None, f"a base in floats is not rounded: {report.rounded}"
    off = (logits(load_model(tmp_path / "merged")) - apart).abs().max().item()
    assert report.merged < 1e-5, f"merging should cost last digits at most: {report.merged}"
    assert report.merged == pytest.approx(off, abs=1e-6), f"as written it differs by {off:.2g}, not {report.merged:.2g}"


def test_what_is_written_in_half_precision_is_reported_as_it_was_written(tmp_path):
    model = make_model(None)
    apart = logits(model)
    report = merge_adapter(model, tmp_path / "merged", torch.bfloat16)
    assert load_model(tmp_path / "merged").lm_head.weight.dtype == torch.bfloat16
    off = (logits(load_model(tmp_path / "merged", torch.float32)) - apart).abs().max().item()
    assert_number("merged", report.merged, off)


def test_a_large_loss_in_merging_would_be_seen(tmp_path, monkeypatch):
    """A merge that forgets the adapter shows in the report as what the adapter does."""
    from minilora.experiments import merge

    monkeypatch.setattr(merge, "merge_lora", lambda model: [setattr(x, "scaling", 0.0) for _, x in lora_layers(model)])
    monkeypatch.setattr(merge, "save_model", lambda *_: None)
    model = make_model(None)
    apart = logits(model)
    base = copy.deepcopy(model)
    for _, layer in lora_layers(base):
        layer.lora_B.data.zero_()
    report = merge.merge_adapter(model, tmp_path)
    assert_number("merged", report.merged, (logits(base) - apart).abs().max().item())


def test_the_tokens_are_the_same_at_every_call_and_fit_the_model():
    model = make_model(None)
    torch.manual_seed(5)
    first = random_logits(model)
    assert torch.equal(first, random_logits(model)), "two calls, two sets of tokens"
    off = (first - logits(model)).abs().max().item()
    assert off == 0, f"four rows of 64 tokens of seed 0, not off by {off:.2g}"
    short = make_model(None, config=GPTConfig(64, 48, 80, 1, 4, 2, max_position_embeddings=10)).bfloat16()
    found = random_logits(short)
    assert found.shape == (4, 10, 64) and found.dtype == torch.float32, f"{found.dtype} {tuple(found.shape)}"
    assert not quantized_layers(dequantize_model(short))


def test_the_report_says_each_number_where_it_belongs():
    lines = MergeReport(largest_logit=12.345, merged=1.26e-6, rounded=0.6789).text().splitlines()
    expected = [
        "largest logit difference to base and adapter kept apart: 1.3e-06 (the largest logit is 12.3)",
        "with the merged weights rounded to 4 bits again: 0.68",
    ]
    assert lines[:2] == expected, f"expected {expected}, got {lines[:2]}"
    assert "not lossless" in lines[2], lines
    plain = MergeReport(12.345, 1.26e-6, None).text().splitlines()
    assert plain == expected[:1], f"a base in floats has one line, not {plain}"
