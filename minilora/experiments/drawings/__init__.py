"""Drawings of the ideas, one function each, in one style: a `Figure`, shown where it ends a cell, with its alt text."""

from minilora.experiments.drawings.layers import lora_in_a_block, low_rank_update
from minilora.experiments.drawings.memory import four_bit_block, kept_for_backward, training_loop
from minilora.experiments.drawings.together import adapters_added, adapters_by_row, data_parallel
from minilora.experiments.drawings.variants import length_and_direction, pissa_split

__all__ = [
    "low_rank_update",
    "lora_in_a_block",
    "four_bit_block",
    "training_loop",
    "kept_for_backward",
    "length_and_direction",
    "pissa_split",
    "adapters_added",
    "adapters_by_row",
    "data_parallel",
]
