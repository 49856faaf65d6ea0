"""storage/locks.py: one writer at a time, named to the others, and no lock that outlives its holder."""

import os
import stat
import subprocess
import sys
import threading
import time

import pytest
from faults.kills import adapted

from minilora.experiments.run import finetune
from minilora.storage import locks
from minilora.storage.adapters import save_adapter
from minilora.storage.files import read_json, write_json
from minilora.storage.locks import locked

HOLD = """
import sys, time
from minilora.storage.locks import locked
with locked(sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""
ADD = """
import sys
from minilora.storage.files import read_json, write_json
from minilora.storage.locks import locked
for number in range(20):
    with locked(sys.argv[1]):
        write_json(sys.argv[1], read_json(sys.argv[1]) | {f"{sys.argv[2]}{number}": number})
"""
WRITE = """
import sys
from minilora.storage.files import write_json
for number in range(50):
    write_json(sys.argv[1], {"number": number})
"""


@pytest.fixture
def holder(tmp_path):
    """Another program that holds the lock of the folder."""
    command = [sys.executable, "-c", HOLD, "finetune", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_other_run_is_named_and_a_killed_one_holds_nothing(tmp_path, holder, make_experiment):
    for write in (
        lambda: locked(tmp_path, patience=0).__enter__(),
        lambda: finetune(make_experiment(), tmp_path, progress=False),
    ):
        with pytest.raises(ValueError, match=f"being written by another run .process {holder.pid}: finetune"):
            write()
    holder.kill()
    holder.wait()
    with locked(tmp_path, patience=0):
        pass
    assert os.listdir(tmp_path) == [], "the lock's file goes with the lock"


def test_a_lock_is_taken_once_by_one_thread_and_waited_for_by_another(tmp_path):
    order = []

    def second():
        with locked(tmp_path):
            order.append("second")

    with locked(tmp_path), locked(tmp_path, patience=0):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_no_change_of_two_programs_is_lost(tmp_path):
    path = tmp_path / "store.json"
    write_json(path, {})
    programs = [subprocess.Popen([sys.executable, "-c", ADD, str(path), name]) for name in "ab"]
    assert [program.wait() for program in programs] == [0, 0]
    lost = {f"{name}{number}" for name in "ab" for number in range(20)} - read_json(path).keys()
    assert not lost, f"lost: {sorted(lost)}"
    assert os.listdir(tmp_path) == ["store.json"]


def test_two_programs_may_write_one_file(tmp_path):
    path = tmp_path / "store.json"
    programs = [subprocess.Popen([sys.executable, "-c", WRITE, str(path)]) for _ in range(2)]
    assert [program.wait() for program in programs] == [0, 0], "each write should wait for the other"
    assert read_json(path) == {"number": 49} and os.listdir(tmp_path) == ["store.json"]


@pytest.mark.skipif(os.name == "nt", reason="a file that is open cannot be removed there")
def test_the_lock_is_of_the_file_that_has_the_name(tmp_path, monkeypatch):
    """Its last holder removes the file while the next one waits with the same file open."""
    take, file = locks._take, tmp_path / ".lock"

    def removed_meanwhile(descriptor):
        monkeypatch.setattr(locks, "_take", take)
        file.unlink()
        return take(descriptor)

    monkeypatch.setattr(locks, "_take", removed_meanwhile)
    with locked(tmp_path):
        descriptor = os.open(file, os.O_RDWR)
        assert not take(descriptor), "another program could take the lock too"
        os.close(descriptor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child of the holder")
def test_a_child_of_the_holder_does_not_hold_the_lock(tmp_path):
    with locked(tmp_path):
        process = os.fork()
        if process == 0:
            try:
                with locked(tmp_path, patience=0):
                    os._exit(1)
            except ValueError:
                os._exit(0)
        assert os.waitpid(process, 0)[1] == 0, "the child should be refused"


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege there")
def test_one_folder_by_two_names_is_one_folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with locked(tmp_path / "folder"), locked(tmp_path / "link", patience=0):
        pass


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_what_a_killed_holder_leaves_locks_no_other_user_out(tmp_path, holder):
    holder.kill()
    holder.wait()
    mode = stat.S_IMODE((tmp_path / ".lock").stat().st_mode)
    assert mode == 0o666, f"whoever may write the folder may take its lock; the file has {mode:o}"


def test_a_full_disk_takes_the_note_and_not_the_lock(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for _ in range(2):
        with locked(tmp_path, patience=0):
            pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="two writers without a second start of torch")
def test_two_adapters_saved_at_once_are_never_mixed(tmp_path):
    states = {}
    for seed in (1, 2):
        save_adapter(adapted(seed), tmp_path / str(seed))
        states[seed] = [path.read_bytes() for path in sorted((tmp_path / str(seed)).iterdir())]
    models = {seed: adapted(seed) for seed in (1, 2)}
    for trial in range(8):
        out, processes = tmp_path / f"both{trial}", []
        for model in models.values():
            process = os.fork()
            if process == 0:
                try:
                    save_adapter(model, out)
                finally:
                    os._exit(0)
            processes.append(process)
        for process in processes:
            os.waitpid(process, 0)
        found = [path.read_bytes() for path in sorted(out.iterdir())]
        assert found in states.values(), f"trial {trial}: {[path.name for path in out.iterdir()]} is of neither writer"
