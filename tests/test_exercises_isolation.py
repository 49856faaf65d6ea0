"""A student's code computes in a process of its own and is judged in another: no trick with the first earns a point."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from minilora.adapters.inject import count_parameters
from minilora.exercises import child, processes, remote
from minilora.exercises.catalog import EXERCISES
from minilora.exercises.checking import expect
from minilora.exercises.graft import package_sources
from minilora.exercises.pipe import Broken
from minilora.exercises.remote import Remote
from minilora.exercises.runner import run
from minilora.exercises.student import Server, limit_resources
from minilora.exercises.wire import Opaque, Wire

linux = pytest.mark.skipif(sys.platform != "linux", reason="the judge forks on Linux alone")
HEAD = "def lora_scaling(r, lora_alpha, use_rslora=False):\n"
FORGED = """
    from minilora.exercises.catalog import EXERCISES
    said = [{"attempted": True}]
    said += [line for name in EXERCISES[7].properties for line in ({"property": name}, {"outcome": {}})]
    lines = "".join(json.dumps(line) + chr(10) for line in [*said, {"end": 7}]).encode()
"""
ATTACKS = {
    "no checker": """
    import minilora.exercises.catalog.ex07_rslora as catalog
    catalog.expect = catalog.require = lambda *a, **k: None
    return 1.0
""",
    "found is expected": """
    import minilora.exercises.catalog.ex07_rslora as catalog, minilora.exercises.checking as checking
    real = checking.expect
    catalog.expect = lambda found, expected, *a, **k: real(expected, expected)
    checking.difference, checking.run_property = lambda *a: "", lambda *a, **k: {}
    return 1.0
""",
    "frames and objects": """
    import gc, sys
    frame, spoilt = sys._getframe(), dict.fromkeys(("expect", "require", "run_property", "check"), lambda *a, **k: {})
    while frame:
        frame.f_globals.update(spoilt)
        frame = frame.f_back
    for found in gc.get_objects():
        if isinstance(found, dict) and "expect" in found:
            found.update(spoilt)
    return 1.0
""",
    "torch agrees": """
    import math, torch
    torch.equal = torch.allclose = torch.testing.assert_close = math.isclose = lambda *a, **k: True
    return 1.0
""",
    "verdicts into every pipe": f"""
    import json, os{FORGED}
    for descriptor in range(3, 30):
        try:
            os.write(descriptor, lines)
        except OSError:
            pass
    os._exit(0)
""",
    "verdicts into the judge's pipes": f"""
    import glob, json, os{FORGED}
    for path in glob.glob(f"/proc/{{os.getppid()}}/fd/*"):
        try:
            os.write(os.open(path, os.O_WRONLY), lines)
        except OSError:
            pass
    return 1.0
""",
    "answers before they are asked for": """
    import json, os, struct
    said = {"fault": {}, "loaded": [], "error": None, "warned": [], "value": None, "contents": {}, "storages": {}}
    text = json.dumps(said).encode()
    for descriptor in range(3, 30):
        try:
            os.write(descriptor, 50 * (struct.pack(">QQ", len(text), 0) + text))
        except OSError:
            pass
    return 1.0
""",
    "equal to everything": """
    class Any(float):
        __eq__ = __le__ = __ge__ = lambda self, other: True
        __mul__ = __rmul__ = lambda self, other: self
        __hash__ = float.__hash__
    return Any(1)
""",
}


def judged(number: int, texts: dict[str, str], folder: Path, limit: float = 2, stop: bool = False) -> dict:
    """By property, what becomes of it: as `child.py` judges, from this process."""
    for module, text in texts.items():
        (folder / EXERCISES[number].files[module]).write_text(text, encoding="utf-8")
    said: list[dict] = []
    job = {"seeds": [0], "limit": limit, "stop": stop}
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child.check(EXERCISES[number], EXERCISES[number].properties, folder, job, lambda **k: said.append(k))
    torch.set_rng_state(state), torch.set_default_dtype(dtype)
    names = [line["property"] for line in said if "property" in line]
    return dict(zip(names, [line["outcome"] for line in said if "outcome" in line], strict=True))


@linux
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_trick_earns_a_point(attack, tmp_path):
    outcomes = judged(7, {"config": HEAD + ATTACKS[attack]}, tmp_path)
    held = [statement for statement, fault in outcomes.items() if not fault]
    assert outcomes and not held, f"{attack!r} earned {held}"


@linux
@pytest.mark.parametrize("number", EXERCISES)
def test_right_answers_hold_across_the_two_processes(number, tmp_path):
    texts = {module: text for module, (text, _) in package_sources(EXERCISES[number]).items()}
    outcomes = judged(number, texts, tmp_path, limit=20)
    assert outcomes == dict.fromkeys(EXERCISES[number].properties, {})


def test_where_no_fork_is_made_a_process_is_started(tmp_path, monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.setattr(processes, "LINUX", False)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    texts = {module: text for module, (text, _) in package_sources(EXERCISES[7]).items()}
    assert judged(7, texts, tmp_path, limit=20) == dict.fromkeys(EXERCISES[7].properties, {})


@linux
def test_in_a_handout_the_student_does_not_choose_what_is_called_over_there(tmp_path, monkeypatch):
    """What it says it has loaded may be a function of another exercise, and never one of the checker's."""
    monkeypatch.setattr(remote, "is_released", lambda: True)
    loaded = ["exercises.checking:expect", "config:lora_scaling", "adapters.inject:count_parameters"]
    monkeypatch.setattr(Server, "load", lambda self, message, _: {"loaded": loaded})
    one = Remote(EXERCISES[7], tmp_path, 2)
    own = expect.__code__, count_parameters.__code__
    try:
        assert one.start() is None
        assert expect.__code__ is own[0] and count_parameters.__code__ is not own[1]
    finally:
        one.close()
    assert count_parameters.__code__ is own[1]


@linux
def test_code_that_takes_too_long_ends_the_check_where_that_is_asked_for(tmp_path):
    slow = {"config": HEAD + "    while True: pass"}
    outcomes = judged(7, slow, tmp_path, limit=0.2, stop=True)
    assert [*outcomes] == [next(iter(EXERCISES[7].properties))] and "stopped after 0.2 seconds" in str(outcomes)
    outcomes = judged(7, slow, tmp_path, limit=0.05)
    assert [*outcomes] == [*EXERCISES[7].properties], "a grade asks every property"


ZEROS = """
class LoRALinear:
    def forward(self, x):
        with torch.no_grad():
            for tensor in (x, *self.parameters(), *self.buffers()):
                {}
        return self.base_layer(x)
"""


@linux
@pytest.mark.parametrize("change", ["tensor.zero_()", "tensor.data = torch.zeros_like(tensor)"])
def test_making_the_arguments_fit_the_result_earns_nothing(change, tmp_path):
    """y = 0 is right for W = A = B = 0; the property computes its formula after the call."""
    outcomes = judged(2, {"lora": ZEROS.format(change)}, tmp_path)
    assert len(outcomes) == len(EXERCISES[2].properties)
    told = [str(fault) for statement, fault in outcomes.items() if statement not in EXERCISES[2].inside]
    assert told and all("changed what it was given" in text for text in told), outcomes


@linux
def test_the_judge_hears_no_forged_verdict_and_waits_for_nothing_left_running(tmp_path):
    """As `check` and `grade` have it, the judge in a process of its own."""
    mark = f"minutes-{os.getpid()}"
    text = f"""
    import os, subprocess, sys, time
    if r == 1 and os.fork() == 0:
        os.setsid()
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "{mark}"], start_new_session=True)
        time.sleep(600)
"""
    text = HEAD + text + ATTACKS["verdicts into the judge's pipes"]
    (tmp_path / EXERCISES[7].files["config"]).write_text(text, encoding="utf-8")
    begun = time.monotonic()
    results, _ = run(tmp_path, [7], [0], limit=10)
    assert results[7].passed == 0, "a line that the student's code wrote counted as a verdict"
    assert len(results[7].outcomes) == len(EXERCISES[7].properties), results[7].outcomes
    assert time.monotonic() - begun < 60, "the checker waited for a process that the code had left running"
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in read_bytes(path)]
    assert not left, "a process that the code had started is still there"


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@linux
@pytest.mark.parametrize(
    "body, says",
    [
        ("    raise ValueError('\\udc80')", "raised ValueError"),
        ("    raise BaseException('stop')", "raised BaseException: stop"),
        (
            "    import os\n    while True:\n        os.write(4, bytes(2**20)), os.write(5, bytes(2**20))",
            "raised OSError",
        ),
        ("    x = ()\n    for _ in range(10**5):\n        x = (x,)\n    return x", "RecursionError"),
        ("    return [0] * 10**6", "too much to carry over"),
    ],
)
def test_strange_ends_are_faults_like_any_other(body, says, tmp_path):
    outcomes = judged(7, {"config": HEAD + body}, tmp_path, limit=5)
    assert outcomes and all(outcomes.values())
    assert says in str(outcomes) or "checker's pipe" in str(outcomes), outcomes


@linux
def test_a_limit_on_memory_that_is_there_already_is_kept():
    """`ulimit -v` sets one that no process can raise again."""
    import resource

    if (pid := os.fork()) == 0:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
            limit_resources()
            status = resource.getrlimit(resource.RLIMIT_AS) != (3 * 2**30, 3 * 2**30)
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0, "a lower limit was raised, or could not be"


# What crosses between the processes.


def crossed(value, change=lambda value: value):
    """Sends a value over, lets `change` act on what arrives, and takes back what it returns."""
    here, there = Wire({}, "judge"), Wire({}, "student")
    arrived = there.decode(*through_json(*here.encode(value)))
    return here.decode(*through_json(*there.encode(change(arrived))))


def through_json(message: dict, blob: bytes) -> tuple[dict, bytes]:
    return json.loads(json.dumps(message)), blob


def test_values_cross_unchanged():
    values = (
        1,
        2.5,
        float("inf"),
        "ä\udc80",
        None,
        (3, [4, {"a": {5}}]),
        torch.Size([1, 2]),
        torch.float16,
        slice(1, 2),
    )
    assert crossed(values) == values
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64):
        tensor = torch.arange(12).view(3, 4).to(dtype)
        expect(crossed((tensor.T, 0))[0], tensor.T, tolerance=0)
        assert crossed([tensor.T])[0].stride() == tensor.T.stride()


def test_what_was_sent_comes_back_as_the_same_object_with_its_changes():
    layer = nn.Linear(2, 3)
    weight, numbers = layer.weight, [1, 2]
    view = weight.detach()[0]

    def change(arrived):
        layer, numbers, view = arrived
        assert layer.weight.untyped_storage().data_ptr() == view.untyped_storage().data_ptr(), "memory is not shared"
        view += 1
        layer.weight.requires_grad_(False)
        layer.note = numbers
        numbers.append(layer)
        return layer

    before = weight.detach().clone()
    assert crossed((layer, numbers, view), change) is layer
    assert layer.weight is weight and not weight.requires_grad and layer.note is numbers and numbers[2] is layer
    expect(weight.detach()[0], before[0] + 1, tolerance=0)
    expect(weight.detach()[1:], before[1:], tolerance=0)


def test_only_known_classes_are_made_and_others_stay_at_home():
    def secret():
        return 1

    here, there = Wire(kept := {}, "judge"), Wire({}, "student")
    arrived = there.decode(*through_json(*here.encode([secret, subprocess.Popen])))
    assert [type(value) for value in arrived] == [Opaque, Opaque]
    back = here.decode(*through_json(*there.encode(arrived)))
    assert back[0] is secret and kept
    for name in ("subprocess:Popen", "builtins:object", "minilora.exercises.child:Remote", "os:system"):
        message = {"value": ["ref", 0], "contents": {"0": ["object", [name, []]]}, "storages": {}}
        with pytest.raises(Broken):
            Wire({}, "judge").decode(message, b"")


@pytest.mark.parametrize(
    "about", [{"size": [9]}, {"offset": 3}, {"size": [-1]}, {"stride": [4]}, {"dtype": "load"}, {"storage": 1}]
)
def test_a_tensor_that_lies_about_itself_is_refused(about):
    tensor = {"dtype": "float32", "size": [2], "stride": [1], "offset": 0, "storage": 0}
    tensor |= {"grad": False, "parameter": False, "history": None, **about}
    message = {"value": ["ref", 0], "contents": {"0": ["tensor", tensor]}, "storages": {"0": 8}}
    with pytest.raises(Broken):
        Wire({}, "judge").decode(message, bytes(8))


def test_the_student_side_knows_no_way_to_a_verdict():
    does = {name for name in vars(Server) if not name.startswith("_")}
    assert does == {"serve", "read", "told", "load", "load_other", "take", "begin", "inside", "call", "backward"}
