"""Drawings of the ideas, one function each, in one style: a `Figure`, shown where it ends a cell, with its alt text."""

from minilora.experiments.drawings.layers import lora_in_a_block, low_rank_update
from minilora.experiments.drawings.memory import four_bit_block, kept_for_backward

__all__ = ["low_rank_update", "lora_in_a_block", "four_bit_block", "kept_for_backward"]
