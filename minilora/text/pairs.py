"""Random pairs of a key and a value: a text that can only be learned by heart, whose bits can be counted.

    harbour green lamp  ->  seven old pond the          each word one of 1,024, all equally likely

A word of a value is 10 bits, a value of 4 words 40. A key is given when its value is asked for and no two are alike, so
keys cost nothing, nor does the order of the pairs. Nothing but the row itself tells a value, so whatever a model knows
of it, it has stored.
"""

import random
import re

import torch

from minilora.text.batches import Batches
from minilora.text.tokenizer import AnyTokenizer
from minilora.train_settings import IGNORE

BITS = 10  # of a word
KEY, VALUE = 3, 4  # words


def words(tokenizer: AnyTokenizer) -> list[int]:
    """Ids of the first 1,024 tokens that are a blank and two letters or more. ValueError for a tokenizer with fewer."""
    found = [id for id in range(tokenizer.vocab_size) if re.fullmatch(" [A-Za-z]{2,}", tokenizer.decode([id]))]
    if len(found) < 2**BITS:
        raise ValueError(f"the tokenizer has {len(found)} words of its own; random pairs need {2**BITS}")
    return found[: 2**BITS]


def pairs(count: int, seed: int, tokenizer: AnyTokenizer) -> Batches:
    """`count` rows, each the tokenizer's prefix, a key and a value; the loss counts the value: 40 bits each to learn.

    Raises ValueError as `words`.
    """
    dice, known = random.Random(f"pairs {seed}"), words(tokenizer)

    def spelled(number: int, length: int) -> list[int]:
        """The digits of a number to the base 1,024, as words."""
        return [known[number >> BITS * place & 2**BITS - 1] for place in range(length)]

    keys = dice.sample(range(2 ** (BITS * KEY)), count)  # no two alike
    values = [dice.randrange(2 ** (BITS * VALUE)) for _ in range(count)]
    rows = [
        [*tokenizer.prefix, *spelled(key, KEY), *spelled(value, VALUE)] for key, value in zip(keys, values, strict=True)
    ]
    ids = torch.tensor(rows)  # (count, prefix + 7)
    return Batches(ids, ids.where(torch.arange(ids.shape[1]) >= ids.shape[1] - VALUE, IGNORE))
