"""A base whose weights are bfloat16: adapters on it are float32, and fit the same base in float32."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from minilora import GPT, GPTConfig, load_adapter, load_model, load_prompt, save_model
from minilora.__main__ import main
from minilora.adapters.inject import adapter_parameters
from minilora.experiments.methods import METHODS, PROMPT_METHODS, Experiment
from minilora.experiments.run import BASE, run
from minilora.quant import Quantization
from minilora.storage.fingerprint import fingerprint
from minilora.storage.peft import base_quantization


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A base in float32 whose weights bfloat16 has to round."""
    folder = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(3072, 32, 48, 2, 2, 1, max_position_embeddings=96, tie_word_embeddings=True)), folder)
    shutil.copyfile(BASE / "tokenizer.model", folder / "tokenizer.model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 40, encoding="utf-8")
    return folder


def finetune(tiny, out, method, dtype):
    words = ["finetune", "--base", tiny, "--data", tiny / "text.txt", "--sequence-length", 32, "--rank", 2]
    words += ["--method", method, "--dtype", dtype, "--steps", 3, "--batch-size", 2, "--learning-rate", 0.01]
    return main([*map(str, words), "--out", str(out), "--virtual-tokens", "2"])


WAYS = [(name, "bfloat16", "float32") for name in METHODS if name != "full"]
WAYS += [(name, "float32", "bfloat16") for name in ("lora", "qlora", "prefix")]


@pytest.mark.parametrize("method, trained, used", WAYS)
def test_what_was_trained_on_one_dtype_fits_the_base_in_the_other(tiny, tmp_path, method, trained, used):
    assert finetune(tiny, tmp_path, method, trained) == 0
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    folder = tmp_path / "base" if method == "loftq" else tiny  # LoftQ makes a base of its own
    model = load_model(folder, getattr(torch, used), quantization=base_quantization(tmp_path))
    adapted = (load_prompt if method in PROMPT_METHODS else load_adapter)(model, tmp_path)
    with torch.no_grad():
        assert adapted(torch.arange(8)[None]).dtype == getattr(torch, used)


@pytest.mark.parametrize("quantization", [None, Quantization("nf4", 16), Quantization("int4", 16, True)])
def test_a_base_has_one_fingerprint_in_every_dtype(tiny, quantization):
    """In 4 bits too: the codes are made from the file's values, not from those that bfloat16 has rounded."""
    marks = {fingerprint(load_model(tiny, dtype, None, quantization)) for dtype in (torch.float32, torch.bfloat16)}
    assert len(marks) == 1


def test_bases_in_4_bits_are_quantized_alike_and_computed_as_asked(tiny):
    exact, half = (load_model(tiny, dtype, None, Quantization()) for dtype in (torch.float32, torch.bfloat16))
    codes = [[b for _, b in sorted(model.named_buffers())] for model in (exact, half)]
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True)) and codes[0]
    with torch.no_grad():
        assert half(torch.arange(8)[None]).dtype == torch.bfloat16


def test_a_step_on_bfloat16_trains_the_adapter_in_float32(make_experiment, base_folder, tmp_path):
    base = replace(base_folder, dtype=torch.bfloat16)
    finished = run(make_experiment("lora", base=base), progress=False)
    assert {parameter.dtype for parameter in adapter_parameters(finished.model)} == {torch.float32}
    frozen = {name: p for name, p in finished.model.named_parameters() if not p.requires_grad}
    plain = dict(base.load().named_parameters())
    for name, parameter in frozen.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, plain[name.replace(".base_layer", "")]), f"{name} was trained"
    losses = [loss for _, loss in finished.history.train_loss + finished.history.validation_loss]
    exact = run(make_experiment("lora"), progress=False).history
    for half, full in zip(losses, (loss for _, loss in exact.train_loss + exact.validation_loss), strict=True):
        assert half == pytest.approx(full, rel=0.02)


def test_full_fine_tuning_in_bfloat16_is_refused_before_anything_runs(tiny, tmp_path, capsys, make_experiment):
    assert finetune(tiny, tmp_path / "out", "full", "bfloat16") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "rounds away" in said and "float32" in said
    assert not (tmp_path / "out").exists()
    words = ["compare", "--base", tiny, "--data", tiny / "text.txt", "--sequence-length", 32, "--dtype", "bfloat16"]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert isinstance(make_experiment("full"), Experiment)


def test_the_reason_for_the_refusal_is_true():
    """A step of a thousandth of a weight is lost in bfloat16, however often it is taken."""
    weight = torch.ones(4, dtype=torch.bfloat16)
    for _ in range(100):
        weight -= 0.001
    assert torch.equal(weight, torch.ones(4, dtype=torch.bfloat16))


def test_compare_evaluate_and_generate_take_a_dtype(tiny, tmp_path, capsys):
    words = ["compare", "--base", tiny, "--data", tiny / "text.txt", "--sequence-length", 32, "--dtype", "bfloat16"]
    words += ["--methods", "lora,qlora", "--steps", 2, "--batch-size", 2, "--learning-rate", 0.01]
    assert main([*map(str, words), "--out", str(tmp_path)]) == 0
    assert main(["evaluate", "--base", str(tiny), "--dtype", "bfloat16", "--count", "2"]) == 0
    adapter = ["--adapter", str(tmp_path / "lora-seed0")]
    for dtype in ("float32", "bfloat16"):
        assert main(["generate", "--base", str(tiny), "--dtype", dtype, "--max-new-tokens", "4", "The", *adapter]) == 0
    capsys.readouterr()
