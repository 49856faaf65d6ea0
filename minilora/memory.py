"""Where the bytes go: a meter that counts the live bytes of tensors while anything at all runs.

    meter = MemoryMeter(model, optimizer)
    with meter:
        training_step(...)
    print(meter.report())

Training holds four kinds of tensors:

    weights      the model's parameters and buffers, frozen or not
    gradients    one tensor as large as the weight for each trainable parameter
    optimizer    what the optimizer remembers: for AdamW two tensors as large as the weight
    activations  all else: what backward will need again, the logits, every temporary in between

A tensor is only a view: shape and strides over a *storage*, the block of memory that holds the numbers. `x.T` and
`x[0]` are tensors without memory of their own, so the meter counts storages, each once.

How it works. Every operation of torch, forward, backward and optimizer alike, passes through a `TorchDispatchMode`.
There the meter looks at the storages that go in and come out. It writes a new one into a diary (+ bytes), and a weak
reference, which does not keep the storage alive, tells when it dies (- bytes). Reading the diary from its start gives
the live bytes at any moment, and the peak.

How the kinds are told apart. Weights are known at the start. A gradient is born nameless inside backward; autograd
calls a hook once it has become some parameter's `.grad`. Optimizer state is whatever `optimizer.state` holds after a
step. Because the diary is read afterwards, a storage counts under its final name from its first byte.

What the meter sees: all that autograd saves, recomputation under checkpointing, custom autograd Functions, in-place
operations, fake tensors (which have sizes and no numbers), and CUDA's backward, whose threads inherit the mode.

What it does not see: scratch memory inside one kernel, blocks that an allocator keeps or loses to fragmentation, the
CUDA context (some hundred MiB), sparse tensors, and inputs before any operation touches them; `nvidia-smi` shows more.
Watching costs about 20 microseconds per operation: never time a step under the meter.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("weights", "gradients", "optimizer", "activations")


@dataclass
class Bytes:
    """Live bytes at one moment, by kind."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(eq=False)
class Storage:
    """One block of memory that the meter follows: its size, its kind, and a weak reference that notices its death."""

    size: int  # bytes
    kind: str
    watcher: weakref.ref


class MemoryMeter(TorchDispatchMode):
    """Counts live bytes of tensors by kind inside a `with` block, on any device.

    Each `with` starts a new diary with all that is alive then. Wrap one step or a few: each tensor adds two entries.

    model: its parameters and buffers at the start of the block are the weights.
    optimizer: needed if it has taken steps already; the state of any optimizer that steps inside is found anyway.
    block: every storage is rounded up to a multiple of this many bytes; CUDA's allocator hands out 512 at a time.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None, block: int = 1):
        super().__init__()
        if block < 1:
            raise ValueError(f"block is {block}; it must be at least 1 byte")
        self.model, self.optimizer, self.block = model, optimizer, block
        self._alive: dict[int, Storage] = {}  # by the storage's address
        self._diary: list[tuple[Storage, int]] = []  # + its bytes where it is born, - its bytes where it dies

    def __enter__(self):
        self._diary = [(storage, storage.size) for storage in list(self._alive.values())]
        self._see([*self.model.parameters(), *self.model.buffers()], "weights")
        self._hooks = [register_optimizer_step_post_hook(self._after_optimizer_step)]
        for parameter in self.model.parameters():
            self._after_gradient(parameter)
            if parameter.requires_grad:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._after_gradient))
        if self.optimizer is not None:
            self._after_optimizer_step(self.optimizer)
        return super().__enter__()

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self._see((args, kwargs, result), "activations")
        return result

    def _after_gradient(self, parameter: Tensor):
        self._see(parameter.grad, "gradients")

    def _after_optimizer_step(self, optimizer: Optimizer, *_):
        self._see([list(state.values()) for state in optimizer.state.values()], "optimizer")

    def _see(self, values, kind: str):
        """Follows the storage of each tensor in these nested values. "activations" gives way to any other kind."""
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                continue  # sparse tensors have no storage of their own
            memory = tensor.untyped_storage()
            address = memory._cdata
            if address not in self._alive:
                self._alive[address] = Storage(0, kind, weakref.ref(memory, partial(self._forget, address)))
            storage = self._alive[address]
            if storage.kind == "activations":
                storage.kind = kind
            size = -(-memory.nbytes() // self.block) * self.block  # rounded up
            if storage.size != size:  # new, or resized in place
                self._diary.append((storage, size - storage.size))
                storage.size = size

    def _forget(self, address: int, _):
        storage = self._alive.pop(address)
        self._diary.append((storage, -storage.size))

    def timeline(self) -> Iterator[Bytes]:
        """Live bytes after every line of the diary. It begins with what was alive at the start, one by one."""
        live = dict.fromkeys(KINDS, 0)
        for storage, change in self._diary:
            live[storage.kind] += change
            yield Bytes(**live)

    @property
    def now(self) -> Bytes:
        """What is alive at this moment."""
        alive = list(self._alive.values())  # a copy, because storages may die meanwhile
        return Bytes(**{kind: sum(storage.size for storage in alive if storage.kind == kind) for kind in KINDS})

    @property
    def peak(self) -> Bytes:
        """The split at the moment when the total was largest."""
        return max(self.timeline(), key=lambda live: live.total, default=Bytes())

    @property
    def highest(self) -> dict[str, int]:
        """Each kind's own largest value, and the largest total as "peak". The kinds are largest at different moments
        (activations before backward, gradients after it), so they can add up to more than the peak."""
        moments = [Bytes(), *self.timeline()]
        own = {kind: max(getattr(live, kind) for live in moments) for kind in KINDS}
        return own | {"peak": self.peak.total}

    def report(self) -> str:
        """A table: each kind now, at the peak, and at its own largest."""
        now, peak, highest = self.now, self.peak, self.highest
        lines = [f"{'bytes of tensors':18}{'now':>14}{'at the peak':>14}{'own largest':>14}"]
        for kind in KINDS:
            columns = getattr(now, kind), getattr(peak, kind), highest[kind]
            lines.append(f"{kind:18}" + "".join(f"{format_bytes(value):>14}" for value in columns))
        lines.append(f"{'total':18}{format_bytes(now.total):>14}{format_bytes(peak.total):>14}")
        return "\n".join(lines)


def format_bytes(count: int) -> str:
    """12345678 -> "11.77 MiB", in binary units: 1 KiB is 1024 bytes, 1 MiB 1024 KiB, 1 GiB 1024 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count} B"
