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

How it works. Every operation of torch, forward, backward and optimizer alike, passes through a
`TorchDispatchMode`. There the meter looks at the storages that go in and come out. A new one is written into a diary
(+ bytes), and a weak reference, which does not keep it alive, tells when it dies (- bytes). Reading the
diary again from the start gives the live bytes at any moment, and the peak.

How the kinds are told apart. Weights are known at the start. A gradient is born nameless inside backward; autograd
calls a hook once it has become some parameter's `.grad`. Optimizer state is whatever `optimizer.state` holds after a
step. Since the diary is read afterwards, a storage counts under its final name from its first byte.

What it sees: all that autograd saves, recomputation under checkpointing, custom autograd Functions, in-place
operations, fake tensors (which have sizes and no numbers), and CUDA's backward, whose threads inherit the mode.

What it does not see: scratch memory inside one kernel, blocks that an allocator keeps or loses to fragmentation, the
CUDA context (some hundred MiB), sparse tensors, and inputs before any operation touches them. So this is the sum
of tensors and not what `nvidia-smi` shows. Watching costs about 20 microseconds per operation: never time a step
under the meter.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

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

    bytes: int
    kind: str
    watcher: weakref.ref


class MemoryMeter(TorchDispatchMode):
    """Counts live bytes of tensors by kind inside a `with` block, on any device.

    Each `with` starts a new diary with all that is alive then. Wrap one step, or a few: the diary grows by about
    two lines for each tensor made.

    model: its parameters and buffers at the start of the block are the weights.
    optimizer: give it if it has taken steps already; the state of any optimizer that steps inside is found anyway.
    block: round every storage up to a multiple of this many bytes; 1 counts raw bytes, 512 is what CUDA's allocator
        hands out.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None, block: int = 1):
        super().__init__()
        if block < 1:
            raise ValueError(f"block is {block}; it must be at least 1 byte")
        self.model, self.optimizer, self.block = model, optimizer, block
        self._alive: dict[int, Storage] = {}  # by the storage's address
        self._diary: list[tuple[Storage, int]] = []  # + its bytes where it is born, - its bytes where it dies

    def __enter__(self):
        self._diary = [(storage, storage.bytes) for storage in list(self._alive.values())]
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            self._see(tensor, "weights")
        self._hooks = [register_optimizer_step_post_hook(self._after_optimizer_step)]
        for parameter in self.model.parameters():
            if parameter.grad is not None:
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
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor):
                self._see(value)
        return result

    def _after_gradient(self, parameter: Tensor):
        self._see(parameter.grad, "gradients")

    def _after_optimizer_step(self, optimizer: Optimizer, *_):
        for value in tree_leaves([list(state.values()) for state in optimizer.state.values()]):
            if isinstance(value, Tensor):
                self._see(value, "optimizer")

    def _see(self, tensor: Tensor, kind: str = "activations"):
        """Writes the tensor's storage into the diary if it is new, and names its kind if it had no name yet."""
        if tensor.layout != torch.strided:
            return  # sparse tensors have no storage of their own
        memory = tensor.untyped_storage()
        address = memory._cdata
        size = -(-memory.nbytes() // self.block) * self.block  # rounded up
        if address not in self._alive:
            watcher = weakref.ref(memory, lambda _: self._forget(address))
            self._alive[address] = Storage(size, kind, watcher)
            self._diary.append((self._alive[address], size))
            return
        storage = self._alive[address]
        if storage.kind == "activations":  # not named yet
            storage.kind = kind
        if storage.bytes != size:  # resized in place
            self._diary.append((storage, size - storage.bytes))
            storage.bytes = size

    def _forget(self, address: int):
        storage = self._alive.pop(address)
        self._diary.append((storage, -storage.bytes))

    def timeline(self) -> Iterator[Bytes]:
        """Live bytes after every line of the diary. It begins with what was alive at the start, one by one."""
        live = dict.fromkeys(KINDS, 0)
        for storage, change in self._diary:
            live[storage.kind] += change
            yield Bytes(**live)

    @property
    def now(self) -> Bytes:
        """What is alive at this moment."""
        live = dict.fromkeys(KINDS, 0)
        for storage in self._alive.values():
            live[storage.kind] += storage.bytes
        return Bytes(**live)

    @property
    def peak(self) -> Bytes:
        """The split at the moment when the total was largest."""
        return max(self.timeline(), key=lambda live: live.total, default=Bytes())

    @property
    def highest(self) -> dict[str, int]:
        """Each kind's own largest value, and the largest total as "peak".

        The kinds are largest at different moments (activations before backward, gradients after it), so they add up to
        more than the peak.
        """
        highest = dict.fromkeys([*KINDS, "peak"], 0)
        for live in self.timeline():
            for kind in KINDS:
                highest[kind] = max(highest[kind], getattr(live, kind))
            highest["peak"] = max(highest["peak"], live.total)
        return highest

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
