"""storage/folders.py: a folder holds one thing, with all that belongs to it, and says so before anything is lost."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from faults.kills import adapted, contents, model, shards

from minilora import (
    GPT,
    GPTConfig,
    LoRAConfig,
    apply_lora,
    load_adapter,
    load_model,
    lora_layers,
    save_adapter,
    save_model,
)
from minilora.__main__ import base_of, build_parser, main
from minilora.experiments.compare import compare
from minilora.experiments.pretrain import pretrain
from minilora.experiments.run import finetune
from minilora.linear4bit import quantize_model
from minilora.quant import Quantization, dequantize
from minilora.storage.files import open_safetensors, write_safetensors
from minilora.storage.models import stored_dtype

COMPANIONS = {
    "tokenizer_config.json": b'{"eos_token": "</s>"}',
    "chat_template.jinja": b"{{ 1 }}",
    "special_tokens_map.json": b"{}",
    "generation_config.json": b'{"eos_token_id": [2, 3]}',
    "added_tokens.json": b"{}",
    "tokenizer.json": b"{}",
    "LICENSE": b"MIT",
}


@pytest.fixture
def base(base_folder, tmp_path):
    """A base with more files than the tests' own: a copy, to be changed."""
    folder = tmp_path / "base"
    shutil.copytree(base_folder.directory, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"pad_token_id": 7, "eos_token_id": [2, 3]}))
    for name, content in COMPANIONS.items():
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("the card of the base")
    return replace(base_folder, directory=folder)


# One thing


@pytest.mark.parametrize("method, other", [("lora", "full"), ("full", "lora"), ("full", "prefix"), ("prefix", "full")])
def test_one_kind_is_not_written_over_another(make_experiment, tmp_path, method, other):
    finetune(make_experiment(other), tmp_path, progress=False)
    before = contents(tmp_path)
    kind = "a model .config.json" if other == "full" else "an adapter .adapter_config.json"
    with pytest.raises(ValueError, match=f"holds {kind}.*one thing.*overwrite"):
        finetune(make_experiment(method), tmp_path, progress=False)
    assert contents(tmp_path) == before, "a refusal changes nothing"
    finetune(make_experiment(method), tmp_path, progress=False, overwrite=True)
    expected = {"full": "model.safetensors"}.get(method, "adapter_model.safetensors")
    weights = [path.name for path in tmp_path.glob("*.safetensors")]
    assert weights == [expected], f"expected {expected} alone, found {weights}"


@pytest.mark.parametrize("save, new", [(save_model, lambda: model(2)), (save_adapter, lambda: adapted(2))])
def test_a_model_in_other_files_goes_only_when_asked_to(tmp_path, save, new):
    folder = tmp_path / "out"
    shards(folder)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    with pytest.raises(ValueError, match=r"holds a model.*one thing.*overwrite"):
        save(new(), folder)
    assert contents(folder) == before
    save(new(), folder, overwrite=True)
    left = sorted(path.name for path in folder.glob("model*"))
    assert left == (["model.safetensors"] if save is save_model else []), left
    assert (folder / "notes.txt").read_text() == "mine", "what is no part of a model stays"


def test_the_output_is_never_what_is_read(base, make_experiment, tmp_path, capsys):
    before = contents(base.directory)
    adapter = tmp_path / "adapter"
    finetune(make_experiment(base=base), adapter, progress=False)
    for out in (base.directory, base.directory / "." / ".." / "base"):
        for method in ("lora", "full"):
            with pytest.raises(ValueError, match="is the base itself"):
                finetune(make_experiment(method, base=base), out, progress=False, overwrite=True)
        with pytest.raises(ValueError, match="is the base itself"):
            compare([make_experiment(base=base)], [0], out, progress=False)
    words = ["merge", "--base", str(base.directory), "--adapter", str(adapter), "--overwrite", "--out"]
    for out, name in ((base.directory, "base"), (adapter, "adapter")):
        assert main([*words, str(out)]) == 2
        assert f"is the {name} itself" in capsys.readouterr().err
    assert contents(base.directory) == before


def test_a_merged_model_is_not_written_into_the_folder_of_an_adapter(base, make_experiment, tmp_path, capsys):
    for name in ("adapter", "other"):
        finetune(make_experiment(base=base), tmp_path / name, progress=False)
    words = ["merge", "--base", str(base.directory), "--adapter", str(tmp_path / "adapter")]
    assert main([*words, "--out", str(tmp_path / "other")]) == 2
    assert "holds an adapter (adapter_config.json)" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "other"), "--overwrite"]) == 0
    assert not list((tmp_path / "other").glob("adapter*"))


# With all that belongs to it


@pytest.mark.parametrize("way", ["finetune", "compare", "merge", "loftq"])
def test_what_belongs_to_the_base_and_is_no_weight_goes_along(base, make_experiment, tmp_path, way):
    out = tmp_path / "out"
    if way == "merge":
        finetune(make_experiment(base=base), tmp_path / "adapter", progress=False)
        words = ["merge", "--base", str(base.directory), "--adapter", str(tmp_path / "adapter"), "--out", str(out)]
        assert main(words) == 0
    elif way == "compare":
        compare([make_experiment("full", base=base)], [0], tmp_path, progress=False)
        out = tmp_path / "full-seed0"
    else:
        finetune(make_experiment("full" if way == "finetune" else way, base=base), out, progress=False)
        out = out / "base" if way == "loftq" else out
    for name, content in {**COMPANIONS, "tokenizer.model": base.tokenizer.definition}.items():
        assert (out / name).read_bytes() == content, f"{name} is not the base's"
    assert not (out / "README.md").exists(), "a model card is of the model that it describes"
    written = json.loads((out / "config.json").read_text())
    assert written["pad_token_id"] == 7 and written["eos_token_id"] == [2, 3], written


def test_what_belonged_to_the_former_model_goes_with_it(tmp_path):
    save_model(model(1), tmp_path, {"tokenizer.json": b"{}", "chat_template.jinja": b"x"})
    save_model(model(2), tmp_path, {"tokenizer.model": b"pieces"})
    assert sorted(contents(tmp_path)) == ["config.json", "model.safetensors", "tokenizer.model"]
    save_model(model(3), tmp_path)
    assert "tokenizer.model" in contents(tmp_path), "without companions nothing is said of them"


# What lies in the way, and what a stranger may have put there


@pytest.fixture
def victim(tmp_path):
    (tmp_path / "victim").mkdir()
    for name in ("precious.txt", "model.safetensors"):
        (tmp_path / "victim" / name).write_text("precious")
    return tmp_path / "victim"


@pytest.mark.parametrize(
    "names",
    [
        ["../victim/precious.txt"],
        ["{victim}/precious.txt"],
        ["notes.txt"],
        ["adapter_model/../../victim/precious.txt"],
        [1],
        {},
        None,
        ["..", "."],
    ],
)
def test_what_a_stranger_left_to_be_moved_touches_no_other_file(tmp_path, victim, names):
    folder = tmp_path / "model"
    save_model(model(1), folder)
    (folder / "notes.txt").write_text("mine")
    (folder / ".written").mkdir()
    if isinstance(names, list):
        names = [name.format(victim=victim) if isinstance(name, str) else name for name in names]
    (folder / ".written" / ".obsolete.json").write_text(json.dumps({"names": names}))
    with pytest.raises(ValueError, match=r"\.written is not what a save"):
        load_model(folder)
    assert (folder / "notes.txt").is_file() and len(contents(victim)) == 2


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege there")
def test_links_in_it_are_not_followed(tmp_path, victim):
    folder = tmp_path / "model"
    save_model(model(1), folder)
    only_weights = tmp_path / "weights"
    shutil.copytree(victim, only_weights, ignore=shutil.ignore_patterns("precious.txt"))
    (folder / ".written").symlink_to(only_weights)
    with pytest.raises(ValueError, match="is not what a save"):
        load_model(folder)
    (folder / ".written").unlink()
    (folder / ".written").mkdir()
    (folder / ".written" / "config.json").symlink_to(victim / "precious.txt")
    with pytest.raises(ValueError, match="is not what a save"):
        load_model(folder)
    assert len(contents(victim)) == 2 and len(contents(only_weights)) == 1


def test_a_list_that_is_no_json_is_named(tmp_path):
    save_model(model(1), tmp_path)
    (tmp_path / ".written").mkdir()
    (tmp_path / ".written" / ".obsolete.json").write_text("{]")
    with pytest.raises(ValueError, match="obsolete.json is not valid JSON"):
        load_model(tmp_path)


def test_files_of_no_model_stay(tmp_path, base, make_experiment, capsys):
    """A project's folder is no model's, though some names are the same."""
    project = tmp_path / "project"
    project.mkdir()
    for name in ("LICENSE", "tokenizer.py", "vocab.txt", "README.md"):
        (project / name).write_text("mine")
    before = contents(project)
    with pytest.raises(ValueError, match="LICENSE that is of no model"):
        finetune(make_experiment("full", base=base), project, progress=False)
    with pytest.raises(ValueError, match="LICENSE that is of no model"):
        save_model(model(1), project, {"LICENSE": b"other"})
    assert contents(project) == before
    (project / "LICENSE").unlink()
    save_model(model(1), project, {"tokenizer.model": b"pieces"})
    assert {name: content for name, content in contents(project).items() if content == b"mine"}.keys() == {
        "tokenizer.py",
        "vocab.txt",
        "README.md",
    }


def test_a_folder_in_the_place_of_a_file_is_found_before_anything_is_changed(tmp_path):
    save_model(model(1), tmp_path)
    (tmp_path / "LICENSE").mkdir()
    with pytest.raises(ValueError, match="LICENSE is a folder, where a file"):
        save_model(model(2), tmp_path, {"LICENSE": b"MIT"})
    assert load_model(tmp_path).config == model(1).config


def test_a_base_below_the_output_is_not_written_over(base, make_experiment, tmp_path):
    for out, name, method in ((tmp_path / "a", "full-seed0", "full"), (tmp_path / "b", "base", "loftq")):
        shutil.copytree(base.directory, out / name)
        experiment = make_experiment(method, base=replace(base, directory=out / name))
        before = contents(out / name)
        with pytest.raises(ValueError, match="is the base itself"):
            if method == "full":
                compare([experiment], [0], out, progress=False)
            else:
                finetune(experiment, out, progress=False)
        assert contents(out / name) == before


def test_pretraining_refuses_the_folder_of_an_adapter_before_it_begins(tmp_path):
    save_adapter(adapted(1), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter"):
        pretrain(tmp_path, 1, progress=False)
    assert contents(tmp_path) == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "training_state.safetensors").touch()
    with pytest.raises(ValueError, match="unfinished run"):
        pretrain(other, 1, progress=False)


def test_an_adapter_over_a_model_takes_the_model_s_tokenizer_away(tmp_path):
    save_model(model(1), tmp_path, {"tokenizer.json": b"{}"})
    save_adapter(adapted(1), tmp_path, overwrite=True)
    assert sorted(contents(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


# Read while it is written


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a writer beside the reader")
def test_a_reader_gets_one_state_of_the_folder(tmp_path):
    written = []
    for value in (1.0, 2.0):
        written.append(GPT(GPTConfig(16, 8, 12, 1, 2, 1, rope_theta=value)))
        for parameter in written[-1].parameters():
            parameter.data.fill_(value)
    save_model(written[0], tmp_path)
    process = os.fork()
    if process == 0:
        try:
            for step in range(80):
                save_model(written[step % 2], tmp_path)
        finally:
            os._exit(0)
    loads = 0
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        found = load_model(tmp_path)
        values = {found.config.rope_theta, *(value for p in found.parameters() for value in p.unique().tolist())}
        assert len(values) == 1, f"one model has the values {values}"
        loads += 1
    assert loads, "the reader should meet the writer"


# In the base's own type


def test_merging_into_four_bits_of_bfloat16_sums_in_float32_too(base, make_experiment, tmp_path):
    save_model(
        quantize_model(load_model(base.directory).to(torch.bfloat16), Quantization(block_size=16)), base.directory
    )
    finetune(make_experiment("qlora", base=base), tmp_path / "adapter", progress=False)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    words = ["merge", "--base", str(base.directory), "--adapter", str(adapter), "--out", str(out), "--dtype", "float32"]
    assert main(words) == 0
    layer = load_adapter(load_model(base.directory, torch.float32), adapter).model.layers[0].self_attn.q_proj
    expected = dequantize(layer.base_layer.quantized, torch.float32) + layer.scaling * layer.lora_B @ layer.lora_A
    found = load_model(out).model.layers[0].self_attn.q_proj.weight
    off = (found - expected).abs().max().item()
    assert off <= 1e-6, f"nothing is rounded to bfloat16 on the way, off by {off:.3g}"


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("asked", ["auto", "float32", "bfloat16"])
def test_merging_sums_in_float32_and_writes_the_type_of_the_base(base, make_experiment, tmp_path, stored, asked):
    half = load_model(base.directory).to(getattr(torch, stored))
    save_model(half, base.directory)
    assert stored_dtype(base.directory) == getattr(torch, stored)
    finetune(make_experiment(base=base), tmp_path / "adapter", progress=False)
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    words = ["merge", "--base", str(base.directory), "--adapter", str(adapter), "--out", str(out), "--dtype", asked]
    assert main(words) == 0
    wanted = getattr(torch, stored if asked == "auto" else asked)
    exact = load_adapter(load_model(base.directory, torch.float32), adapter)
    name = "model.layers.0.self_attn.q_proj"
    layer = exact.get_submodule(name)
    expected = (layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A).to(wanted)
    with open_safetensors(out / "model.safetensors") as file:
        kinds = {file.get_tensor(key).dtype for key in file.keys()}
        found = file.get_tensor(f"{name}.weight")
    assert kinds == {wanted}, f"expected {wanted}, found {kinds}"
    off = (found.float() - expected.float()).abs().max().item()
    assert off <= 1e-7, f"W + sBA is to be rounded once, off by {off:.3g}"


TYPES = [("bfloat16", "lora", "bfloat16"), ("bfloat16", "full", "float32"), ("float16", "lora", "float32")]


@pytest.mark.parametrize("stored, method, used", [*TYPES, ("float32", "lora", "float32")])
def test_a_run_loads_its_base_in_the_base_s_own_type_where_it_can(base, stored, method, used):
    save_model(load_model(base.directory).to(getattr(torch, stored)), base.directory)
    options = build_parser().parse_args(["finetune", "--base", str(base.directory), "--device", "cpu"])
    found = base_of(options, [method]).dtype
    assert found == getattr(torch, used), f"expected {used}, got {found}"


# The same bytes


def test_the_same_contents_are_the_same_bytes(tmp_path):
    notes = {f"é{number}": 'line\n\x01"\\' for number in range(6)}
    for number in range(8):
        write_safetensors(tmp_path / f"{number}", {"b": torch.ones(3), "a": torch.zeros(2, 2)}, notes)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    with open_safetensors(tmp_path / "0") as file:
        assert file.metadata() == notes and torch.equal(file.get_tensor("b"), torch.ones(3))


def test_the_same_run_gives_the_same_bytes(make_experiment, tmp_path):
    for name in "ab":
        finetune(make_experiment("qlora"), tmp_path / name, progress=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# Where an adapter comes from


@pytest.mark.parametrize("method", ["lora", "prefix", "loftq"])
def test_an_adapter_names_its_base_and_the_layers_it_changed(base, make_experiment, tmp_path, method):
    finetune(make_experiment(method, base=base), tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    expected = tmp_path / "out" / "base" if method == "loftq" else base.directory
    assert config["base_model_name_or_path"] == str(expected.resolve())
    if method == "prefix":
        return
    assert config["target_modules"] == "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split()


def test_compare_s_loftq_adapter_names_the_base_that_was_made_for_it(base, make_experiment, tmp_path):
    compare([make_experiment("loftq", base=base)], [0], tmp_path / "out", progress=False)
    config = json.loads((tmp_path / "out" / "loftq-seed0" / "adapter_config.json").read_text())
    made = (tmp_path / "out" / "loftq-base").resolve()
    assert config["base_model_name_or_path"] == str(made) and (made / "config.json").is_file()


@pytest.mark.parametrize(
    "targets, written",
    [
        (r".*\.0\..*q_proj", ["model.layers.0.self_attn.q_proj"]),
        (r".*(k|v)_proj", ["k_proj", "v_proj"]),
        ("all-linear", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj".split()),
        (["v_proj", "q_proj"], ["v_proj", "q_proj"]),
    ],
)
def test_targets_are_written_as_the_layers_that_they_meant(tmp_path, targets, written):
    config = GPTConfig(16, 8, 12, 2, 2, 1)
    wrapped = apply_lora(GPT(config), LoRAConfig(1, 1, target_modules=targets))
    save_adapter(wrapped, tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert found == written, f"expected {written}, got {found}"
    load_adapter(wrapped, tmp_path)  # the model names its layers as before, and they are the same
    names = {name for name, _ in lora_layers(load_adapter(GPT(config), tmp_path, force=True))}
    assert names == {name for name, _ in lora_layers(wrapped)}
    other = apply_lora(GPT(config), LoRAConfig(1, 1, target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="target_modules"):
        load_adapter(other, tmp_path, force=True)
