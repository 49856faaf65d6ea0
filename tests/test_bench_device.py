"""The run on a device, at a tiny shape on the CPU: what it finds, what it keeps, and that its checks can say no."""

import json
import re
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minilora import fast, linear4bit, model
from minilora.__main__ import main
from minilora.adapters import dora
from minilora.adapters.adapter import Adapter
from minilora.adapters.prompts import PrefixTuning, SoftPrompt
from minilora.experiments import bench_device, device_checks, device_report, timing
from minilora.experiments.bench_device import SECTIONS, run_device, small_settings
from minilora.experiments.device_checks import CHECKS, LIMITS, Place, check_paths, largest_deviation
from minilora.inference import prepared
from minilora.lora import LoRALinear

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "data" / "gpu").glob("*.json"))
PAGE = "data/gpu/README.md"
NOT_MEASURED = "Nothing here has been measured on a GPU yet"
SHORT = {"correctness": 4, "memory": 2, "memory of a large model": 0}  # rows of it that a test waits for


@pytest.fixture
def short(monkeypatch):
    """Of each section the first rows."""
    for name, section in list(SECTIONS.items()):
        if name in SHORT:
            monkeypatch.setitem(SECTIONS, name, lambda s, name=name, section=section: islice(section(s), SHORT[name]))


# Correctness


def scaled(function, factor=1.1):
    return lambda *arguments, **more: function(*arguments, **more) * factor


def worse(place: int):
    """An autograd function's `apply` with one argument, the scaling, a tenth too large."""

    def change(function):
        def apply(*arguments):
            wrong = list(arguments)
            wrong[place] = wrong[place] * 1.1
            return function.apply(*wrong)

        return SimpleNamespace(apply=apply)

    return change


def twice(parts):
    return tuple(None if part is None else 2 * part for part in parts)


BREAKS = {  # by path: where, what, and what it becomes
    "LoRA, many tokens": (fast, "FormedWeight", worse(5)),
    "LoRA, few tokens": (fast, "LowRankTerm", worse(4)),
    "LoRA, dropout": (
        fast,
        "AddedInPlace",
        lambda real: SimpleNamespace(apply=lambda *a: real.apply(*a[:6], a[6] | 1)),
    ),
    "DoRA, many tokens": (dora, "FormedDirection", worse(7)),
    "DoRA, few tokens": (dora, "LowRankTerm", worse(4)),
    "DoRA, dropout": (dora.DoRALinear, "norms", scaled),
    "QLoRA, many tokens": (fast, "formed_weight", scaled),
    "QLoRA, few tokens": (linear4bit, "dequantize", scaled),
    "QLoRA with DoRA, dropout": (linear4bit, "dequantize", scaled),
    "dequantized weights": (device_checks, "dequantize", lambda real: scaled(real, 1 + 2**-7)),
    "attention": (model, "apply_rotary", scaled),
    "attention behind a cache": (device_checks, "attention_mask", lambda real: lambda *a: None),
    "training step, checkpointed": (device_checks, "forward", scaled),
    "merged": (LoRALinear, "delta_weight", scaled),
    "cached decoding": (model, "rotary_cos_sin", lambda real: lambda c, p: real(c, p + 3 * (p.shape[1] == 1))),
    "cached decoding, prepared": (prepared, "adapter_of", lambda real: lambda layer: twice(real(layer))),
    "left-padded prompts": (device_checks, "left_pad", lambda real: lambda *a: (real(*a)[0], None)),
    "adapter bank": (Adapter, "scaling", lambda real: scaled(real, 1.5)),
    "soft prompt": (SoftPrompt, "embeddings", lambda real: scaled(real, -1)),
    "prefix": (PrefixTuning, "start", lambda real: staticmethod(scaled(real, -1))),
}


@pytest.mark.parametrize("path", CHECKS)
def test_each_check_says_yes_and_can_say_no(path, monkeypatch):
    place = Place("cpu", 32)
    right = list(check_paths(place, [path]))
    assert [row["dtype"] for row in right] == ["float32", "bfloat16"] and all(row["held"] for row in right), right
    where, name, change = BREAKS[path]
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    wrong = list(check_paths(place, [path]))
    assert not wrong[0]["held"], f"{name} is broken and nothing was seen: {wrong}"
    assert device_report.failed({"sections": {"correctness": {"rows": wrong}}})
    assert f"**no**: {wrong[0]['worst']}" in device_report.checks_table(wrong)


def test_a_deviation_is_relative_and_of_the_worst_tensor():
    one, two = torch.tensor([1.0, -4.0]), torch.tensor([1.0, 0.0])
    worst, off = largest_deviation({"a": (one, one.double()), "b": (one + two, one.double())})
    assert (worst, off) == ("b", 0.25), "one is off by 1 where the largest is 4"
    assert largest_deviation({"a": (one * torch.nan, one.double())})[1] == float("inf")
    assert LIMITS[torch.float32] < 3e-4, "a product in TF32, with 11 bits, must be seen"


# The run


def test_the_run_from_the_command_line_to_the_file_and_its_tables(short, tmp_path, capsys):
    out = tmp_path / "new" / "cpu.json"
    assert main(["bench", "--small", "--device", "cpu", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert list(record["sections"]) == list(SECTIONS)
    for name, section in record["sections"].items():
        assert "error" not in section and section["seconds"] >= 0, f"{name}: {section}"
        assert device_report.section_text(name, section) in said
    machine = record["machine"]
    assert (machine["torch"], machine["float32_products"]) == (torch.__version__, "highest")
    for row in record["sections"]["memory"]["rows"]:
        assert row["metered"] == row["simulated"] and row["deviation"] == 0, f"on a CPU both are the same count: {row}"
    assert [row["checkpointing"] for row in record["sections"]["memory"]["rows"]] == [False, True]
    steps = record["sections"]["steps in float32"]["rows"]
    assert [row["name"] for row in steps] == list(small_settings().methods())
    for row in steps:
        assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["seconds"]) and row["over"] == "full"
    assert main(["bench", "--show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown == device_report.markdown(record) + "\n"
    assert main(["bench", "--small", "--out", str(out)]) == 2, "measurements are not written over"
    assert "exists" in capsys.readouterr().err and json.loads(out.read_text()) == record


def test_a_section_that_fails_is_kept_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def fails(settings):
        yield {"claim": "a", "ratio": 1.0, "lowest": 1.0, "highest": 1.0}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    written, out = [], tmp_path / "x.json"

    def last(settings):
        written.append(json.loads(out.read_text()))
        yield {"claim": "b", "ratio": 2.0, "lowest": 2.0, "highest": 2.0}

    monkeypatch.setattr(bench_device, "SECTIONS", {"first": fails, "second": last})
    assert main(["bench", "--small", "--device", "cpu", "--out", str(out)]) == 1
    assert "Failed: OutOfMemoryError: CUDA out of memory. Tried to allocate\n" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert list(written[0]["sections"]) == ["first"], "the file is written after each section"
    assert record["sections"]["first"]["rows"][0]["claim"] == "a", "the rows up to the error are kept"
    assert record["sections"]["second"]["rows"][0]["claim"] == "b"
    monkeypatch.setattr(bench_device, "SECTIONS", {"second": last})
    assert not device_report.failed(run_device(small_settings(), None))


def test_an_interrupt_ends_the_run_and_leaves_what_was_measured(monkeypatch, tmp_path):
    def interrupted(settings):
        raise KeyboardInterrupt
        yield

    out = tmp_path / "x.json"
    monkeypatch.setattr(bench_device, "SECTIONS", {"first": lambda settings: iter(()), "second": interrupted})
    assert main(["bench", "--small", "--device", "cpu", "--out", str(out)]) == 130
    assert list(json.loads(out.read_text())["sections"]) == ["first"]


def test_what_cannot_be_done_is_refused_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_device, "SECTIONS", {"none": lambda settings: pytest.fail("something was measured")})
    (tmp_path / "file").touch()
    (tmp_path / "other.json").write_text('{"a": 1}')
    small = ["--small", "--device", "cpu"]
    cases = {
        ("--device", "cuda"): "device cuda is not available here",
        (*small, "--out", str(tmp_path / "file" / "x.json")): "cannot write",
        (*small, "--base", "smollm2"): "leave out --base",
        ("--out", str(tmp_path / "x.json")): "--out is for",
        ("--show", str(tmp_path / "none.json")): "there is no file",
        ("--show", str(tmp_path / "other.json")): "is not the file of a run",
    }
    for words, message in cases.items():
        assert main(["bench", *words]) == 2, words
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, f"{words}: {said}"


def test_seconds_are_read_when_the_device_is_done(monkeypatch):
    """Work that is queued takes time after the call returned: the clock is read behind it, before and after."""
    order = []
    monkeypatch.setattr(timing, "wait_for_device", lambda: order.append("wait"))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: order.append("clock") or 0.0))
    timing.seconds_in_turn({"a": lambda: order.append("work")}, timing.Timing(rounds=1, progress=False), "")
    assert order == ["wait", "clock", "work", "wait", "clock"] * 2


# The README


def test_the_page_of_the_runs_shows_the_files_that_there_are():
    text, page = (
        re.sub(r"\s+", " ", (ROOT / name).read_text(encoding="utf-8"))
        for name in ("minilora/experiments/README.md", PAGE)
    )
    assert (NOT_MEASURED in text) == (not FILES), f"{len(FILES)} files in data/gpu"
    for file in FILES:
        shown = re.sub(r"\s+", " ", device_report.show(file))
        assert shown in page, f"{PAGE} does not show what `bench --show {file.relative_to(ROOT)}` prints"
