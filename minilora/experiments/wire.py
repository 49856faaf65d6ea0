"""Bytes on the wire: what the collectives of a training step send, counted, and the closed form beside it.

Counted is what one process sends when n of them work as a ring (Patarasuk & Yuan 2009), S bytes being the whole tensor:

    all_reduce       2 (n-1)/n · S      reduce_scatter and then all_gather: a gradient that everybody has in the end
    all_gather         (n-1)/n · S      a matrix in pieces, before a block uses it
    reduce_scatter     (n-1)/n · S      a gradient of which everybody keeps a piece

Other algorithms send as much or more. P bytes are trained and F frozen; of both, O stand in no block (embedding, head)
and are gathered for forward and kept until backward is done. A step sends, times (n-1)/n:

    data parallel     2 P                     every device has all weights; gradients are summed
    sharded, full     2 (P - O) + O + P       weights gathered in forward and in backward; gradients summed in pieces
    sharded, LoRA     2 (F - O) + O + 2 P     the frozen base is gathered twice; adapters are whole, as above
"""

from collections import Counter
from types import TracebackType
from typing import Any

import torch.distributed as dist

# By collective, how often (n-1)/n of its tensor is sent, and the place and the name of the argument that is the whole.
# The last two are what torch 2.13 calls the two above them.
RING = {
    "all_reduce": (2, 0, "tensor"),
    "all_gather_into_tensor": (1, 0, "output_tensor"),
    "reduce_scatter_tensor": (1, 1, "input"),
    "all_gather_single": (1, 0, "output_tensor"),
    "reduce_scatter_single": (1, 1, "input"),
}


class Wire:
    """`with Wire() as wire:` counts, in `sent`, the bytes that this process sends, by collective."""

    def __init__(self):
        self.sent: Counter[str] = Counter()
        self.originals: dict[str, Any] = {}

    def __enter__(self) -> "Wire":
        for name in [name for name in RING if hasattr(dist, name)]:
            self.originals[name] = getattr(dist, name)
            setattr(dist, name, self.counting(name))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None):
        for name, original in self.originals.items():
            setattr(dist, name, original)

    def counting(self, name: str):
        original, (times, place, keyword) = self.originals[name], RING[name]
        kind = name.removesuffix("_into_tensor").removesuffix("_tensor").removesuffix("_single")

        def collective(*tensors, **settings):
            whole = tensors[place] if place < len(tensors) else settings[keyword]
            n = dist.get_world_size()
            self.sent[kind] += times * (n - 1) * whole.nbytes // n
            return original(*tensors, **settings)

        return collective

    @property
    def total(self) -> int:
        return sum(self.sent.values())


def bytes_of_a_step(trained: int, frozen: int, outside: int, devices: int, sharded: bool = False) -> int:
    """The closed form, of P, F and O in bytes; full fine-tuning has nothing frozen."""
    travels = 2 * trained
    if sharded:
        gathered = 2 * (frozen or trained) - outside
        travels = gathered + (2 * trained if frozen else trained)
    return travels * (devices - 1) // devices
