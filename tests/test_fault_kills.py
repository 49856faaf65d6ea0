"""A portion of `faults/kills.py`: a writer killed before each of its steps leaves the old thing or the new one."""

import os

import pytest
from faults.kills import kill_everywhere, writers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a kill in the middle needs a fork of the process")
@pytest.mark.parametrize("name", ["a model with its tokenizer", "an adapter over a model", "a store"])
def test_a_killed_writer_leaves_the_old_or_the_new(name, tmp_path):
    counts = kill_everywhere(name, writers()[name], tmp_path)
    assert min(counts.values()) > 2, f"{name}: the kills should fall before and after the moment that counts: {counts}"
