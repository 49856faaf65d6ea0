"""A short portion of `faults/mutations.py`: damaged files of every kind, each refused by name or read whole."""

from faults.mutations import FAULTS, run


def test_no_damaged_file_hangs_crashes_or_is_taken_with_nan():
    faults = [
        f"{name} trial {trial}, {file}: {outcome}: {message[:200]}"
        for name, trial, file, outcome, message in run(count=112, seed=7)
        if outcome in FAULTS
    ]
    assert not faults, "\n".join(faults)
