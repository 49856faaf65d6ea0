"""Which numbers a setting may be, each said once: the package checks by it, the command line reads and explains by it.

The upper ends of whole numbers lie far above anything of use. They are there for slips of the keyboard, which would
otherwise end in memory that is not there, in a loop without end, or in a number that torch cannot hold.
"""

import sys
from dataclasses import dataclass
from numbers import Real

LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included unless `above` leaves out low or `below` high. NaN and infinity never are."""

    low: float
    high: float = LARGEST
    whole: bool = False
    above: bool = False
    below: bool = False

    def holds(self, value) -> bool:
        is_number = isinstance(value, int if self.whole else Real) and not isinstance(value, bool)
        if not is_number:
            return False
        fits_low = self.low < value if self.above else self.low <= value
        fits_high = value < self.high if self.below else value <= self.high
        return fits_low and fits_high

    def check(self, name: str, value):
        """Raises ValueError, naming the setting, for a value outside."""
        if not self.holds(value):
            raise ValueError(f"{name} is {value!r}; it must be {self}")

    def __str__(self) -> str:
        low, high = (f"{int(end):,}" if end == int(end) else f"{end:g}" for end in (self.low, self.high))
        least = f"above {low}" if self.above else f"of at least {low}"
        most = f"below {high}" if self.below else f"at most {high}"
        if self.high == LARGEST:
            ends = least
        else:
            ends = f"{least} and {most}" if self.above or self.below else f"from {low} to {high}"
        return f"a {'whole ' * self.whole}number {ends}"


def whole(low: int, high: int) -> Range:
    return Range(low, high, whole=True)


POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)

# Training
STEPS = whole(1, 10**9)
PRETRAINING_STEPS = whole(1, 100_000)  # the text of all steps is held in memory: 16 KiB a step
EVERY = whole(0, 10**9)  # steps between evaluations, or saved states; 0: none but the last
BATCH_SIZE = whole(1, 2**16)
LEARNING_RATE = POSITIVE
SEED = whole(0, 2**32 - 1)  # as NumPy's; rows.py makes a million seeds of each, and torch takes 64 bits
TORCH_SEED = whole(-(2**63), 2**64 - 1)  # what torch itself takes
SEEDS = whole(1, 1000)
PAIRS = whole(2, 10)  # of seeds, for an interval
# LoRA and its relatives
RANK = whole(1, 2**16)
ALPHA = Range(0, 1e9, above=True)  # an update scaled by more is no number
DROPOUT = Range(0, 1, below=True)
VIRTUAL_TOKENS = whole(1, 2**16)
LORAPLUS_RATIO = POSITIVE
# Objectives
GROUP_SIZE = whole(2, 2**16)  # samples of one prompt, which are compared with each other
BETA = POSITIVE  # how much a preference counts against the distance from the reference
# Data
COUNT = whole(1, 100_000)  # of examples held out
ROW = whole(2, 2**20)  # tokens; the first of a row is predicted by nothing
SEQUENCE = whole(1, 2**20)  # tokens, of a batch that is only simulated
COUNTED = whole(0, 2**20 - 1)  # of these tokens
# Text from a model
NEW_TOKENS = whole(1, 2**20)
TEMPERATURE = Range(0)
TOP_K = whole(1, 2**20)
TOP_P = Range(0, 1, above=True)
# A server
PORT = whole(0, 2**16 - 1)
# Measurements
ROUNDS = whole(1, 1000)
SECONDS = Range(0, 3600, above=True)  # of computing
