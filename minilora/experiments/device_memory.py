"""The bytes of a training step on a device beside those that `simulate` foretells, and what the difference is made of.

    simulated    tensors of the step on fake tensors: no device is asked
    metered      the same count during the real step there, in blocks of 512 bytes: other kernels may keep other tensors
    workspaces   what cuBLAS keeps for itself, whatever the model
    requested    what the allocator was asked for: the tensors, scratch space of kernels, the workspaces
    allocated    what it handed out for that, in its own blocks: `torch.cuda.max_memory_allocated`
    reserved     what it took from the device: free blocks and gaps as well, `torch.cuda.max_memory_reserved`

On a CPU the last four do not exist. All are of the second step: the first makes the optimizer's state.
"""

from typing import Any

import torch

from minilora.adapters.inject import apply_lora
from minilora.config import LoRAConfig
from minilora.experiments.simulate import build, count_base_parameters, simulate
from minilora.linear4bit import quantize_model
from minilora.memory import MemoryMeter
from minilora.model import GPT, GPTConfig
from minilora.train import make_optimizer, set_gradient_checkpointing, training_step
from minilora.train_settings import TrainConfig

BLOCK = 512  # bytes: what CUDA's allocator rounds to


def made(config: GPTConfig, method: str, checkpointing: bool, device: str, r: int) -> GPT:
    """The model with random weights, made on the device and, for "qlora", rounded there."""
    torch.manual_seed(0)
    with torch.device(device):
        model = build(config, torch.bfloat16)
    if method == "qlora":
        quantize_model(model)
    if method != "full":
        apply_lora(model, LoRAConfig(r, 2 * r, target_modules="all-linear"))
    set_gradient_checkpointing(model, checkpointing)
    return model


def memory_row(
    config: GPTConfig, method: str, batch_size: int, tokens: int, checkpointing: bool, device: str, r: int
) -> dict[str, Any]:
    """Bytes at the peak of a step, by the names above; deviation: of what was allocated, or metered, from simulated."""
    sizes = dict(r=r, target_modules="all-linear", gradient_checkpointing=checkpointing)
    simulated = simulate(config, method, batch_size, tokens, "bfloat16", **sizes).peak  # type: ignore[arg-type]
    on_cuda = device == "cuda"
    clear_workspaces()
    held = torch.cuda.memory_allocated() if on_cuda else 0
    model = made(config, method, checkpointing, device, r)
    settings = TrainConfig(1, batch_size, 1e-4, precision="float32")
    optimizer = make_optimizer(model, settings)
    ids = torch.randint(config.vocab_size, (batch_size, tokens), device=device)
    training_step(model, optimizer, ids, ids, settings)
    found: dict[str, Any] = {}
    if on_cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        training_step(model, optimizer, ids, ids, settings)
        torch.cuda.synchronize()
        found["requested"] = torch.cuda.memory_stats().get("requested_bytes.all.peak", held) - held
        found["allocated"] = torch.cuda.max_memory_allocated() - held
        found["reserved"] = torch.cuda.max_memory_reserved()
        found["workspaces"] = clear_workspaces()
    with MemoryMeter(model, optimizer, BLOCK if on_cuda else 1) as meter:
        training_step(model, optimizer, ids, ids, settings)
    metered = meter.peak.total
    case = {"method": method, "checkpointing": checkpointing, "batch_size": batch_size, "tokens": tokens}
    case |= {"parameters": count_base_parameters(config), "simulated": simulated, "metered": metered}
    return {**case, **found, "deviation": found.get("allocated", metered) / simulated - 1}


def clear_workspaces() -> int:
    """Frees what cuBLAS keeps for scratch, a block for each thread that multiplies; returns how many bytes that was."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is None or not torch.cuda.is_initialized():
        return 0
    before = torch.cuda.memory_allocated()
    clear()
    return before - torch.cuda.memory_allocated()
