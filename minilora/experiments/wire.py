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

import json
import socket
import subprocess
import sys
from collections import Counter
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from minilora.adapters.inject import apply_lora
from minilora.config import LoRAConfig
from minilora.distributed import processes, shard, world
from minilora.experiments.run import open_base
from minilora.linear4bit import quantized_layers
from minilora.quant import QLORA
from minilora.train import make_optimizer, training_step
from minilora.train_settings import TrainConfig

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


def measure(base: str, method: str, devices: int, sharded: bool, rows: int = 8, length: int = 64) -> dict[str, Any]:
    """Starts `devices` processes on this machine, each of which takes a step; what one sends in it, and the formula."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = ["-m", "torch.distributed.run", f"--nproc-per-node={devices}", f"--master-port={port}"]
    step = ["-m", "minilora.experiments.wire", base, method, str(int(sharded)), str(rows), str(length)]
    done = subprocess.run([sys.executable, *run, *step], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the processes failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def step_in_company(base: str, method: str, sharded: bool, rows: int, length: int) -> dict[str, Any]:
    """What `measure` has each process do: the second step is counted, the first gathers what stays whole."""
    folder = open_base(base)
    model = folder.load(QLORA if method == "qlora" else None)
    if method == "full":
        model.requires_grad_(True)
    else:
        apply_lora(model, LoRAConfig(8, 16, target_modules="all-linear"))
    tensors = [*model.parameters(), *(code for layer in quantized_layers(model).values() for code in [layer.codes])]
    trained = sum(tensor.nbytes for tensor in tensors if tensor.requires_grad)
    outside = sum(p.nbytes for name, p in model.named_parameters() if ".layers." not in name)
    frozen = sum(tensor.nbytes for tensor in tensors) - trained
    if sharded:
        shard(model, model.model.layers)
    config = TrainConfig(2, rows, 1e-5)
    optimizer = make_optimizer(model, config)
    ids = torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        with Wire() as wire:
            training_step(model, optimizer, ids, ids, config)
    formula = bytes_of_a_step(trained, frozen, outside, world(), sharded)
    return {"sent": wire.total, "by": dict(wire.sent), "formula": formula, "trained": trained, "frozen": frozen}


if __name__ == "__main__":
    with processes("cpu"):
        base, method, *numbers = sys.argv[1:]
        sharded, rows, length = map(int, numbers)
        print(json.dumps(step_in_company(base, method, bool(sharded), rows, length)))
