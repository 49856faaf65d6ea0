"""The command line on a tiny base: every verb does its work, and bad input ends with one sentence and status 2."""

import json
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora import GPT, GPTConfig, load_model, save_model
from minilora import __main__ as command_line
from minilora.__main__ import main, targets_of
from minilora.experiments.run import BASE
from minilora.linear4bit import quantized_layers
from minilora.quant import Quantization
from minilora.storage.peft import base_quantization


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A base of two narrow layers with the shipped tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    config = GPTConfig(3072, 32, 48, 2, 2, 1, max_position_embeddings=160, tie_word_embeddings=True)
    save_model(GPT(config), folder)
    shutil.copyfile(BASE / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog.\n" * 60, encoding="utf-8")
    return file


def small(*words):
    """A short run: few steps, small batches."""
    return [*map(str, words), "--steps", "4", "--batch-size", "2", "--learning-rate", "0.01", "--rank", "2"]


@pytest.fixture(scope="session")
def adapter(tiny, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter")
    assert main(["finetune", *small("--base", tiny, "--data", text, "--sequence-length", 32, "--out", out)]) == 0
    return out


def fails(capsys, arguments, *named):
    """The command ends with status 2 and one line on stderr that names all of `named`."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stopped:  # argparse's own refusals
        status = stopped.code
    said = capsys.readouterr().err.strip().splitlines()
    assert status == 2, f"status {status}, not 2; it said {said}"
    assert "Traceback" not in " ".join(said)
    last = said[-1]
    assert "error: " in last, f"not an error line: {last}"
    for name in named:
        assert str(name) in last, f"{name!r} is not named in {last!r}"


# -- what works ------------------------------------------------------------------------------------------------------


def test_compare_writes_what_it_promises(tiny, text, tmp_path, capsys):
    arguments = small("--base", tiny, "--data", text, "--sequence-length", 32, "--out", tmp_path, "--seeds", 2)
    assert main(arguments) == 0  # no verb: compare
    results = json.loads((tmp_path / "results.json").read_text())
    methods = ("full", "lora", "qlora")
    assert [(row["method"], row["seed"]) for row in results["runs"]] == [(name, s) for name in methods for s in (0, 1)]
    for row in results["runs"]:
        assert set(row["bytes"]) == {"weights", "gradients", "optimizer", "activations", "peak"}
        assert row["validation_loss"][0][0] == 0 and row["validation_loss"][-1][0] == 4
        assert row["best_validation_loss"] == min(loss for _, loss in row["validation_loss"])
        assert row["artifact_bytes"] > 0 and row["score"] is None
    full, lora, qlora = results["runs"][::2]
    assert (full["bits_per_weight"], lora["bits_per_weight"]) == (32, 32) and 4 < qlora["bits_per_weight"] < 4.5
    assert qlora["bytes"]["weights"] < lora["bytes"]["weights"]
    assert qlora["total_parameters"] == lora["total_parameters"], "a weight in 4 bits is one parameter"
    assert full["trainable_parameters"] == full["total_parameters"]
    assert lora["bytes"]["gradients"] < full["bytes"]["gradients"] / 3
    assert lora["bytes"]["optimizer"] < full["bytes"]["optimizer"] / 3
    assert full["validation_loss"][0] == lora["validation_loss"][0], "both start as the base"
    assert results["loss_floor"] is None
    for name in ("loss", "parameters", "memory"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "best validation loss" in said and "base, before" in said and "lora, after" in said


def test_compare_on_a_task_reports_scores_and_floor(tiny, tmp_path, capsys):
    assert main(small("compare", "--base", tiny, "--task", "pirate", "--methods", "lora", "--out", tmp_path)) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["loss_floor"] > 0 and 0 <= results["runs"][0]["score"] <= 1
    assert "above the entropy floor" in capsys.readouterr().out


def test_same_seed_same_result(tiny, text, tmp_path):
    for name in ("one", "two"):
        assert (
            main(
                ["finetune", *small("--base", tiny, "--data", text, "--sequence-length", 32, "--out", tmp_path / name)]
            )
            == 0
        )
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_merge_gives_a_plain_model_that_says_the_same(tiny, adapter, tmp_path, capsys):
    assert main(["merge", "--base", str(tiny), "--adapter", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    said = []
    for base, more in ((tiny, ["--adapter", str(adapter)]), (tmp_path / "merged", [])):
        assert main(["generate", "--base", str(base), "The quick brown", "--max-new-tokens", "12", *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert load_model(tmp_path / "merged").config == load_model(tiny).config


def test_qlora_from_training_to_a_merged_model(tiny, text, tmp_path, capsys):
    """generate quantizes the base as the adapter says; merge writes floats and says why; the quantized base is kept."""
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    common = ["--base", tiny, "--data", text, "--sequence-length", 32, "--method", "qlora", "--scheme", "fp4"]
    assert main(["finetune", *small(*common, "--block-size", 32, "--out", adapter)]) == 0
    assert base_quantization(adapter) == Quantization("fp4", 32), (
        f"not what was asked for: {base_quantization(adapter)}"
    )
    ask = ["generate", "--base", str(tiny), "--adapter", adapter, "The quick brown", "--max-new-tokens", "12"]
    capsys.readouterr()
    assert main(ask) == 0
    said = capsys.readouterr().out
    fails(capsys, [*ask, "--quantize", "none"], "another base", "fp4", "floats")
    assert main([*ask, "--quantize", "none", "--force"]) == 0

    assert main(["merge", "--base", str(tiny), "--adapter", adapter, "--out", merged]) == 0
    report = capsys.readouterr().out
    assert "not lossless" in report and "largest logit difference" in report
    assert main(["generate", "--base", merged, "The quick brown", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == said
    assert not quantized_layers(load_model(merged))


def test_a_base_in_4_bits_on_disk(tiny, text, tmp_path, capsys):
    """It is fine-tuned with qlora as it stands, and refused for full fine-tuning with the reason."""
    base = tmp_path / "base"
    save_model(load_model(tiny, quantization=Quantization("int4", 16)), base)
    shutil.copyfile(tiny / "tokenizer.model", base / "tokenizer.model")
    common = ["--base", base, "--data", text, "--sequence-length", 32, "--out", tmp_path / "out"]
    fails(capsys, ["finetune", *common, "--method", "full"], "4 bits", "no gradient", "qlora")
    assert main(["finetune", *small(*common, "--method", "qlora")]) == 0
    noted = base_quantization(tmp_path / "out")
    assert noted == Quantization("int4", 16), f"the base on disk is int4 in blocks of 16, and the adapter says {noted}"
    assert main(["generate", "--base", str(base), "--adapter", str(tmp_path / "out"), "The quick brown"]) == 0
    assert main(["evaluate", "--base", str(tiny), "--quantize", "nf4", "--count", "2"]) == 0


@pytest.mark.parametrize("method", ["soft-prompt", "prefix"])
def test_a_prompt_from_training_to_text(tiny, text, tmp_path, capsys, method):
    """It changes what the base says, weighs a few kilobytes, is refused on another base, and cannot be merged."""
    common = ["--base", tiny, "--data", text, "--sequence-length", 32, "--method", method, "--virtual-tokens", 3]
    far = ["--learning-rate", "1", "--steps", "20"]  # until it shows
    assert main(["finetune", *small(*common, "--out", tmp_path), *far]) == 0
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4096
    said = []
    for more in ([], ["--adapter", str(tmp_path)]):
        capsys.readouterr()
        ask = ["generate", "--base", str(tiny), "The quick brown", "--temperature", "1", "--max-new-tokens", "40"]
        assert main([*ask, *more]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1], "the prompt changes nothing"
    fails(capsys, ["generate", "--base", BASE, "--adapter", tmp_path, "Hello"], tmp_path)
    fails(capsys, ["merge", "--base", tiny, "--adapter", tmp_path, "--out", tmp_path / "merged"], "nothing to merge")
    assert not (tmp_path / "merged").exists()
    fails(capsys, ["finetune", *common[:-1], 200, "--out", tmp_path / "other"], "200", "160")


def test_loftq_keeps_the_base_that_its_adapter_fits(tiny, text, tmp_path, capsys):
    common = ["--base", tiny, "--data", text, "--sequence-length", 32, "--method", "loftq", "--out", tmp_path]
    assert main(["finetune", *small(*common)]) == 0
    ask = ["generate", "--adapter", str(tmp_path), "The quick brown", "--max-new-tokens", "4"]
    assert main([*ask, "--base", str(tmp_path / "base")]) == 0
    fails(capsys, [*ask, "--base", tiny], "another base", "LoftQ")
    out = tmp_path / "compared"
    assert main([*small("compare", *common[:-4], "--methods", "lora,loftq", "--seeds", 2, "--out", out)]) == 0
    for seed in (0, 1):
        ask[2] = str(out / f"loftq-seed{seed}")
        assert main([*ask, "--base", str(out / "loftq-base")]) == 0


def test_compare_takes_every_method(tiny, text, tmp_path, capsys):
    methods = "lora,dora,adalora,pissa,soft-prompt,prefix"
    arguments = small("--base", tiny, "--data", text, "--sequence-length", 32, "--out", tmp_path, "--methods", methods)
    assert main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [row["method"] for row in rows] == methods.split(",")
    assert (tmp_path / "tradeoff.png").exists()


def test_the_size_of_the_artifact_is_that_of_its_files(tiny, text, tmp_path, capsys):
    """The state of the unfinished run, which lies beside it until the end, is not the artifact."""
    assert main(["finetune", *small("--base", tiny, "--data", text, "--sequence-length", 32, "--out", tmp_path)]) == 0
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert f"artifact_bytes        {size}\n" in capsys.readouterr().out


def test_full_fine_tuning_writes_a_model(tiny, text, tmp_path, capsys):
    more = ["--base", tiny, "--data", text, "--sequence-length", 32, "--method", "full", "--out", tmp_path]
    assert main(["finetune", *small(*more)]) == 0
    assert main(["generate", "--base", str(tmp_path), "The quick"]) == 0
    assert not (tmp_path / "training_state.safetensors").exists(), "a finished run leaves no state"


def test_evaluate_prints_scores_and_floor(tiny, capsys, monkeypatch):
    assert main(["evaluate", "--base", str(tiny), "--count", "4"]) == 0
    assert "answers from memory" in (said := capsys.readouterr().out) and "floor" in said
    with monkeypatch.context() as patch:
        score = lambda model, tokenizer, task: SimpleNamespace(score=len(task.validation))  # noqa: E731
        patch.setattr(command_line, "score_task", score)
        assert main(["evaluate", "--base", str(tiny), "--task", "dialect", "--count", "300"]) == 0
        assert "score 300.000" in capsys.readouterr().out, "300 questions were asked for"
    fails(capsys, ["evaluate", "--base", tiny, "--count", 0], "--count", "from 1 to 100,000")
    assert main(["evaluate", "--base", str(tiny), "--task", "dialect", "--count", "4"]) == 0
    assert "dialect: score" in capsys.readouterr().out


def test_memory_prints_the_known_line(capsys):
    assert main(["memory", "--model", "tinyllama-1.1b", "--sequence-length", "64"]) == 0
    assert "trainable params: 1,126,400 || all params: 1,101,174,784 || trainable%: 0.1023" in capsys.readouterr().out


def test_memory_of_fewer_counted_tokens(capsys):
    command = ["memory", "--model", "tinyllama-1.1b", "--sequence-length", "64"]
    assert main([*command, "--counted-tokens", "16"]) == 0
    assert "batch 1 x 64 tokens (16 counted)" in capsys.readouterr().out
    fails(capsys, [*command, "--counted-tokens", "64"], "counted_tokens is 64", "0 to 63")


def test_memory_of_a_folder_reads_its_config_only(tiny, tmp_path, capsys):
    shutil.copyfile(tiny / "config.json", tmp_path / "config.json")
    assert main(["memory", "--base", str(tmp_path), "--method", "full", "--sequence-length", "16"]) == 0
    count = sum(parameter.numel() for parameter in load_model(tiny).parameters())
    assert f"all params: {count:,d}" in capsys.readouterr().out
    fails(capsys, ["memory", "--base", tmp_path / "nowhere"], "nowhere")


def test_targets_are_a_list_an_expression_or_all():
    assert targets_of("q_proj,v_proj") == ["q_proj", "v_proj"]
    assert targets_of("all-linear") == "all-linear"
    assert targets_of(r".*\.mlp\..*") == r".*\.mlp\..*"


# -- what is refused -------------------------------------------------------------------------------------------------


def test_unknown_task_or_file(tiny, capsys):
    fails(capsys, ["compare", "--base", tiny, "--task", "poetry"], "poetry", "json")
    fails(capsys, ["compare", "--base", tiny, "--data", "nowhere.txt"], "nowhere.txt")
    fails(capsys, ["evaluate", "--base", tiny, "--task", "poetry"], "poetry", "json")


@pytest.mark.parametrize(
    "content, named",
    [(b"", "empty"), (b"\x7fELF\0\0\0", "binary"), ("Zo\xeb".encode("latin-1"), "UTF-8"), (b"too short", "tokens")],
)
def test_files_that_are_no_text(tiny, tmp_path, capsys, content, named):
    file = tmp_path / "file.txt"
    file.write_bytes(content)
    fails(capsys, ["finetune", "--base", tiny, "--data", file, "--out", tmp_path / "out"], file, named)
    assert not (tmp_path / "out").exists()


def broken_base(tiny, tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    change(folder)
    return folder


def change_tensors(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


NORM = "model.norm.weight"
BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config is not JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "config lacks a field": (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model"),
    "broken tokenizer": (lambda folder: (folder / "tokenizer.model").write_bytes(b"no"), "tokenizer.model"),
    "missing tensor": (change_tensors(lambda tensors: tensors.pop(NORM)), NORM),
    "extra tensor": (change_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))), "extra"),
    "mis-shaped tensor": (change_tensors(lambda tensors: tensors.update({NORM: torch.zeros(7)})), NORM),
    "truncated weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50]),
        "model.safetensors",
    ),
    "a header that lies": (
        lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}"),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_bases(tiny, tmp_path, capsys, case):
    change, named = BROKEN[case]
    fails(capsys, ["generate", "--base", broken_base(tiny, tmp_path, change), "Hello"], named)


def test_base_that_is_not_there(tmp_path, capsys):
    fails(capsys, ["compare", "--base", tmp_path / "nowhere"], tmp_path / "nowhere")


def test_ranks_and_targets(tiny, text, tmp_path, capsys):
    common = ["finetune", "--base", tiny, "--data", text, "--sequence-length", 32, "--out", tmp_path / "out"]
    for rank in (0, -3):
        fails(capsys, [*common, "--rank", rank], f"'{rank}' is not a whole number from 1 to")
    fails(capsys, [*common, "--rank", 81], "r=81", "above 80")  # 32 + 48, of the MLP
    fails(capsys, [*common, "--targets", "query"], "query", "q_proj")
    with pytest.warns(UserWarning, match="exceeds the full rank"):
        assert main([str(word) for word in [*common, "--rank", 40, "--steps", 1, "--batch-size", 1]]) == 0


def test_sequence_longer_than_the_model(tiny, text, tmp_path, capsys):
    more = ["--base", tiny, "--data", text, "--out", tmp_path / "out"]
    fails(capsys, ["finetune", *more, "--sequence-length", 200], "200", "160")
    fails(capsys, ["memory", "--model", "base", "--sequence-length", 4096], "4096", "512")
    fails(capsys, ["generate", "--base", tiny, "word " * 200], "160")


def test_output_that_cannot_be_written(tiny, text, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "out"
    for verb in ("compare", "finetune"):
        fails(capsys, [verb, "--base", tiny, "--data", text, "--sequence-length", 32, "--out", out], out)
    assert (tmp_path / "file").read_text() == "in the way"


def test_settings_that_cannot_work(tiny, text, tmp_path, capsys):
    more = ["--base", tiny, "--data", text, "--sequence-length", 32, "--out", tmp_path / "out"]
    fails(capsys, ["compare", *more, "--methods", "full,magic"], "magic")
    fails(capsys, ["compare", *more, "--methods", "qlora", "--block-size", 48], "--block-size", "48", "16, 32")
    fails(capsys, ["finetune", *more, "--method", "qlora", "--scheme", "nf5"], "nf5", "nf4")
    fails(capsys, ["compare", *more, "--steps", 0], "--steps", "'0'")
    fails(capsys, ["compare", *more, "--batch-size", 0], "--batch-size")
    fails(capsys, ["finetune", *more, "--learning-rate", -1], "--learning-rate", "above 0")
    fails(capsys, ["finetune", *more, "--dropout", 1.5], "--dropout", "below 1")
    fails(capsys, ["memory", "--model", "gpt-5"], "gpt-5")
    fails(capsys, ["generate", "--base", tiny, "Hello", "--temperature", -1], "--temperature")


def test_resume_without_a_state_and_from_another_configuration(tiny, text, tmp_path, capsys, monkeypatch):
    run = ["finetune", *small("--base", tiny, "--data", text, "--sequence-length", 32, "--out", tmp_path)]
    fails(capsys, [*run, "--resume"], "nothing to resume")
    monkeypatch.setattr("minilora.experiments.run.Run.save", stop)  # killed when the training is done
    with pytest.raises(RuntimeError):
        main([*run, "--save-every", "2"])
    assert (tmp_path / "training_state.safetensors").exists()
    saved = (tmp_path / "training_state.safetensors").read_bytes()
    fails(capsys, [*run, "--save-every", "2"], "unfinished run", "--resume")
    fails(capsys, [*run, "--save-every", "2", "--resume", "--seed", "7"], "seed", "7")
    fails(capsys, [*run, "--save-every", "2", "--resume", "--group-by-length"], "group_by_length was False", "now True")
    fails(capsys, [*run, "--save-every", "2", "--resume", "--alpha", "9"], "alpha", "9")
    assert (tmp_path / "training_state.safetensors").read_bytes() == saved, "a refusal must not touch the state"
    monkeypatch.undo()
    assert main([*run, "--save-every", "2", "--resume"]) == 0
    assert (tmp_path / "adapter_model.safetensors").exists()


def stop(*_):
    raise RuntimeError("killed")


def test_adapter_of_another_base(tiny, adapter, tmp_path, capsys):
    other = broken_base(tiny, tmp_path, change_tensors(lambda tensors: tensors.update({NORM: tensors[NORM] + 1})))
    fails(capsys, ["generate", "--base", other, "--adapter", adapter, "Hello"], "base")
    assert main(["generate", "--base", str(other), "--adapter", str(adapter), "--force", "Hello"]) == 0
    fails(capsys, ["merge", "--base", tiny, "--adapter", tmp_path / "nowhere", "--out", tmp_path / "m"], "nowhere")
