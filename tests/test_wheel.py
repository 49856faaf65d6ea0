"""The wheel: what `pip install .` puts into another environment works there, data and all."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
PROGRAM = """
from minilora.experiments.claims import report
from minilora.experiments.run import BASE, open_base, tuned_learning_rate
from minilora.places import CHECKOUT, DATA, MODELS
from minilora.text.instruction_sets import shipped_file

assert CHECKOUT is None and DATA.parent.name == "minilora" and not MODELS.is_absolute()
assert shipped_file("pirate").is_file() and tuned_learning_rate("json", "lora") and "holds" in report.page()
print(open_base(BASE).load().config.hidden_size)
"""


@pytest.mark.skipif(not (ROOT / "minilora" / "data").is_symlink(), reason="this system writes no symbolic links")
def test_an_installed_wheel_has_its_data(tmp_path):
    for name in ("minilora", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "out").mkdir()
    subprocess.run([sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "site")
    assert not [name for name in names if name.endswith(".pyc") or name.startswith(("tests", "notebooks"))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path / "out", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "192"
