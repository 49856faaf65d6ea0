"""storage/files.py: what is read back is what was written, and the old file survives whatever goes wrong."""

import json
import os
import stat

import pytest
import torch

from minilora.storage import files
from minilora.storage.files import open_safetensors, read_json, write_json, write_safetensors
from minilora.storage.folders import write_pair

TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4).t(),  # not contiguous
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "empty": torch.zeros(0),
}


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    write_safetensors(path, TENSORS, {"note": "é"})
    with open_safetensors(path) as file:
        assert file.metadata() == {"note": "é"}
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor), f"{name}: {found} is not {tensor}"
    assert os.listdir(path.parent) == ["a.safetensors"], "a temporary file was left behind"


def test_json_comes_back(tmp_path):
    value = {"name": "Zoë", "list": [1, 2.5, None], "nested": {"yes": True}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_others_may_read_what_the_user_lets_them(tmp_path):
    (tmp_path / "plain").touch()
    write_safetensors(tmp_path / "a.safetensors", TENSORS)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.safetensors")]
    assert modes[0] == modes[1], f"a plain file gets {modes[0]:o}, the safetensors file {modes[1]:o}"


@pytest.mark.parametrize("broken", ["save_file", "os.fsync", "os.replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"old": torch.ones(2)})

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files if broken == "save_file" else os, broken.split(".")[-1], fail)
    with pytest.raises(ValueError, match=r"cannot write a\.safetensors.*No space left"):
        write_safetensors(path, {"new": torch.ones(2)})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    with open_safetensors(path) as file:
        assert list(file.keys()) == ["old"]


def test_what_a_killed_run_left_is_cleared_by_the_next_write(tmp_path):
    litter = tmp_path / ".a.json.tmp"
    litter.mkdir()
    (litter / "a.json").write_text("half a fi")
    (litter / ".tmpXYZ").write_text("safetensors' own temporary file")
    write_json(tmp_path / "a.json", {"whole": True})
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_new_file_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda source, target: (order.append("replace"), replace(source, target)))
    write_json(tmp_path / "a.json", {"a": 1})
    assert order == ["fsync", "replace"]
    order.clear()
    write_pair(tmp_path, "model.safetensors", TENSORS, {}, "config.json", {}, {"tokenizer.model": b"pieces"})
    assert order == ["fsync"] * 4 + ["replace"] * 4, f"three files and a list, then the moment that counts: {order}"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for write in (write_json, write_safetensors):
        with pytest.raises(ValueError, match="cannot write x in the folder .*file"):
            write(tmp_path / "file" / "x", {})


def test_json_that_json_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="a.json.*nan"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b"3"])
def test_json_that_is_none_is_named(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match="bad.json"):
        read_json(tmp_path / "bad.json")


def test_a_missing_file_is_named(tmp_path):
    for read in (read_json, open_safetensors):
        with pytest.raises(FileNotFoundError, match="there is no file .*absent"):
            read(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read(tmp_path)  # a folder


def test_every_truncation_of_a_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.ones(3)}, {"a": "b"})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a.safetensors is not a whole safetensors file"):
            open_safetensors(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(ValueError, match="not a whole"):
        open_safetensors(path)


@pytest.mark.parametrize("change", [{"shape": [4]}, {"dtype": "F16"}, {"dtype": "F99"}, {"data_offsets": [0, 1200]}])
def test_a_lying_header_is_refused(tmp_path, change):
    path = tmp_path / "a.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} | change}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(12))
    with pytest.raises(ValueError, match="a.safetensors is not a whole safetensors file"):
        open_safetensors(path)
