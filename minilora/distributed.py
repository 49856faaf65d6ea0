"""One process for each device, as `torchrun` starts them: rows are shared out, and gradients are added up.

The loss is a sum over rows, divided by what counts in the WHOLE batch. So its gradient is a sum as well, and each
process may compute the part of its own rows:

    L = Σ_rows ℓ(row) / count          ∇L = Σ_processes ∇ Σ_its rows ℓ(row) / count

`train.py` asks this module for this process's rows (`share`), for the count and the loss of all (`total`), for the sum
of the gradients (`sum_gradients`), and for random numbers of its own (`own_randomness`). Every process then clips the
same gradient and takes the same step, so all keep the same weights, and no weight is ever sent. What is sent is one
number for each TRAINED parameter and step, twice that at most where there are many processes: this is what LoRA saves
on the wire. In one process all of these do nothing.

A base that is too large for one device is cut up (`shard`): each process keeps 1/n of every matrix, and a block's
matrices are gathered before they are used, in forward and again in backward, and let go afterwards (Zhao 2023, FSDP).
Then the frozen base travels too, twice a step, and is most of what is sent. Adapters stay whole on every device: they
are small, and a unit of trained and frozen parameters together would gather both.

What each process draws (dropout) differs from process to process. So a run with dropout is another run than that of one
process; all others are equal to it, to rounding.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minilora.linear4bit import Linear4bit, quantized_layers

Number = TypeVar("Number", int, Tensor)
BUCKET = 2**22  # numbers that are sent at once: enough that few messages are needed, few enough to need little memory
PATIENCE = 5  # seconds in which torchrun ends the other processes when one has failed
REST = 0.2  # seconds in which gloo's threads let go of the tensors that were sent last
GONE = ("by peer", "Broken pipe")  # how gloo says that a process no longer answers


def world() -> int:
    """How many processes train together; 1 outside torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0 on. Process 0 writes the files and speaks."""
    return dist.get_rank() if world() > 1 else 0


def started() -> int:
    """How many processes torchrun has started, before they are a group; 1 outside torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def processes(device: str) -> Iterator[None]:
    """The processes that torchrun has started, as a group: nccl where `device` is "cuda", else gloo.

    All but the first are silent. What fails in all of them is said once, by the first. Outside torchrun: nothing.
    Raises ConnectionError where another process is gone.
    """
    if started() == 1:
        yield
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        if rank() == 0:
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except Exception as error:
        if rank() > 0:
            time.sleep(PATIENCE)  # if process 0 has failed as well, it says so, and this process does not live to
            print(f"in process {rank()} of {world()}:", file=sys.stderr)
        if isinstance(error, RuntimeError) and any(words in str(error) for words in GONE):
            raise ConnectionError("another process has ended, and this one cannot go on without it") from error
        raise
    finally:
        if sys.exc_info()[0] is None:  # after a failure the others may never answer
            dist.destroy_process_group()
            time.sleep(
                REST
            )  # gloo's threads need the interpreter for it: a process that ended at once would be aborted


def share(*batch: Tensor) -> tuple[Tensor, ...]:
    """This process's rows of a batch whose parts are (B, ...): every n-th, so that shares differ by one row at most.

    Raises ValueError, in all processes alike, for fewer rows than processes.
    """
    if len(batch[0]) < world():
        raise ValueError(f"a batch of {len(batch[0])} rows cannot be shared by {world()} processes; give each a row")
    return tuple(part[rank() :: world()] for part in batch)


def total(number: Number) -> Number:
    """The sum over all processes, of a count or of a scalar tensor."""
    if world() == 1:
        return number
    device = number.device if isinstance(number, Tensor) else "cuda" if dist.get_backend() == "nccl" else "cpu"
    summed = torch.as_tensor(number, device=device).clone()
    dist.all_reduce(summed)
    return summed if isinstance(number, Tensor) else int(summed)


def sum_gradients(parameters: Iterable[nn.Parameter]):
    """Puts into each .grad the sum over all processes; a gradient that a process does not have counts as zero.

    Small gradients travel together, as one row of numbers. Of sharded parameters FSDP has made the mean already.
    """
    if world() == 1:
        return
    waiting: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if is_sharded(parameter):
            parameter.grad.mul_(world())
            continue
        bucket = waiting.setdefault(parameter.grad.dtype, [])
        bucket.append(parameter.grad)
        if sum(map(Tensor.numel, bucket)) >= BUCKET:
            send(waiting.pop(parameter.grad.dtype))
    for bucket in waiting.values():
        send(bucket)


def send(gradients: list[Tensor]):
    row = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(row)  # Σ over processes
    for gradient, part in zip(gradients, row.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def wait_for_all():
    """Returns when every process has come here."""
    if world() > 1:
        total(0)


def own_randomness(seed: int, step: int):
    """Dropout of this process at this step: a function of seed, step and rank, so that a resumed run draws the same."""
    if world() > 1:
        torch.manual_seed((seed * 1_000_003 + step) * world() + rank())


# A base in pieces


class ShardedLinear4bit(Linear4bit):
    """Its codes are a parameter, since only parameters are sharded; as 8-bit floats, because torch 2.11 shards no whole
    numbers. They are bits all the same: nothing computes with them before they are codes again."""

    packed: nn.Parameter

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors, "codes": self.packed.view(torch.uint8)}


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: str = "cpu") -> nn.Module:
    """Cuts all parameters among the processes, block by block and then the rest, but adapters on a frozen base.

    The model lies on the CPU, where there is room for it; only its pieces, and what stays whole, go to the device. So a
    device never holds more than a block in whole. Changes and returns the model; `unshard` is the way back. In one
    process nothing is cut, and all of it goes to the device.
    """
    if world() == 1:
        return model.to(device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (world(),))
    for layer in quantized_layers(model).values():
        codes = layer.codes
        del layer.codes  # as a buffer
        layer.__class__ = ShardedLinear4bit  # type: ignore[assignment]
        layer.packed = nn.Parameter(codes.view(torch.float8_e4m3fn), requires_grad=False)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    kept = trained if any(not parameter.requires_grad for parameter in model.parameters()) else set()
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    return model


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def gathered(parameter) -> Tensor:
    """The whole of a sharded parameter, of packed codes the codes: 8-bit floats are gathered by no backend."""
    if parameter.dtype != torch.float8_e4m3fn:
        return parameter.full_tensor()
    own, where = parameter.to_local().view(torch.uint8), (parameter.device_mesh, parameter.placements)
    return type(parameter.data).from_local(own, *where, shape=parameter.shape, stride=(1,)).full_tensor()


@torch.no_grad()
def unshard(model: nn.Module) -> nn.Module:
    """A sharded model put together again, on the CPU of the first process, to be saved there; all processes must ask.

    It cannot train or answer any more. Changes and returns the model.
    """
    full: dict[nn.Parameter, nn.Parameter] = {}  # a tied head is one parameter in two places
    units: list[Any] = [module for module in model.modules() if hasattr(module, "reshard")]
    for unit in units:  # what is in no block is whole since the last forward, in every process
        unit.reshard()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_sharded(parameter) and parameter not in full:
                numbers = gathered(parameter).cpu()
                full[parameter] = nn.Parameter(numbers if rank() == 0 else numbers[:0], parameter.requires_grad)
            module._parameters[name] = full.get(parameter, parameter)
        if isinstance(module, ShardedLinear4bit):
            module.register_buffer("codes", module.packed.data)
            del module.packed
            module.__class__ = Linear4bit  # type: ignore[assignment]
    return model
