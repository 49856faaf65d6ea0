"""What an adapter is made of: `LoRAConfig`, its checks, and the scale s. Field names and meanings are PEFT's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from minilora.ranges import ALPHA, DROPOUT, RANK

LARGEST_LIST = 2000  # entries of target_modules or of a pattern: more than any model has layers
# How A and B can start (`adapters/starts.py` computes each). True: A uniform within ±1/√in; "eva" needs data as well.
STARTS = (True, "gaussian", "pissa", "olora", "eva")


def check_hyperparameters(r: int, lora_alpha: float, lora_dropout: float):
    """Raises ValueError, naming the field, for a value that cannot work."""
    RANK.check("r", r)
    ALPHA.check("lora_alpha", lora_alpha)
    DROPOUT.check("lora_dropout", lora_dropout)


@dataclass
class LoRAConfig:
    """Which layers get an adapter, and of what shape.

    Raises ValueError, naming the field, for a rank, alpha or dropout out of range, targets that are no names, more
    entries than any model has layers, and an unknown start.
    """

    r: int = 8  # rank of the update
    lora_alpha: float = 16  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.0  # on the input of A, while training
    target_modules: Sequence[str] | str = ("q_proj", "v_proj")  # name suffixes, one regular expression, or "all-linear"
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r) (Kalajdzievski 2023), so that a high rank still learns
    rank_pattern: dict[str, int] = field(default_factory=dict)  # name suffix or expression -> r for those layers
    alpha_pattern: dict[str, float] = field(default_factory=dict)  # the same for lora_alpha
    use_dora: bool = False  # magnitude and direction apart (Liu 2024): adapters/dora.py
    init_lora_weights: bool | str = True  # how A and B start, one of STARTS; True: A random, B zero

    def __post_init__(self):
        if not isinstance(self.target_modules, str):
            self.target_modules = list(self.target_modules)
            if not all(isinstance(target, str) for target in self.target_modules):
                raise ValueError("target_modules has an entry that is not a name; all must be strings")
        for name in ("target_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            if not isinstance(value, str) and len(value) > LARGEST_LIST:
                raise ValueError(f"{name} has {len(value):,} entries; at most {LARGEST_LIST:,} are possible")
        check_hyperparameters(self.r, self.lora_alpha, self.lora_dropout)
        for key, r in self.rank_pattern.items():
            RANK.check(f"rank_pattern[{key!r}]", r)
        for key, lora_alpha in self.alpha_pattern.items():
            ALPHA.check(f"alpha_pattern[{key!r}]", lora_alpha)
        if self.init_lora_weights not in STARTS:
            raise ValueError(f"init_lora_weights is {self.init_lora_weights!r}; known are {STARTS}, and apply_loftq")


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool = False) -> float:
    """s = lora_alpha / r, or lora_alpha / √r for rsLoRA."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)
