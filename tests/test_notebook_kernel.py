"""A notebook on a model that is not here ends in one sentence, and no later cell runs."""

import pytest

from minilora.experiments.notebook_kernel import need_model
from minilora.storage import get

IPython = pytest.importorskip("IPython")


@pytest.fixture
def shell(monkeypatch, tmp_path):
    from traitlets.config import Config

    monkeypatch.setattr(get, "MODELS", tmp_path)
    shell = IPython.core.interactiveshell.InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    return shell


def test_without_the_model_further_cells_do_nothing(shell, capsys):
    need_model("smollm2")
    printed = capsys.readouterr().out
    assert "python -m minilora get smollm2" in printed and printed.count("\n") == 1
    for cell in ("1 / 0", "x = 1\n\n\nassert x == 2", "for"):
        assert shell.run_cell(cell).success
    assert "x" not in shell.user_ns
    assert capsys.readouterr().out == ""


def test_with_the_model_cells_run(shell, capsys, tmp_path):
    (tmp_path / "smollm2").mkdir()
    need_model("smollm2")
    assert shell.run_cell("x = 1").success and shell.user_ns["x"] == 1
    assert capsys.readouterr().out == ""
