"""The training loop, the same for full fine-tuning, LoRA and every variant. `training_step` is one step of it:

    forward -> loss -> backward -> clip -> step

The loop trains whatever has `requires_grad` and does not know why the rest is frozen: choosing a method is choosing
what is trainable, before the loop begins. Nor does it know what is made small: an objective says how many things of a
batch count, and their sum. Cross entropy is the default; `objectives.py` has others.

Learning rate and rows of a step are pure functions of the step's number and the seed, and the generator that dropout
draws from is saved with the weights. So a run that was killed continues from its saved state exactly as if it had never
stopped, and nothing needs to be replayed.

Logits are the largest tensor of all, and in instruction data most tokens do not count. So the loop first finds the
places that count, and the model makes logits there and nowhere else.

Under torchrun each process trains on its share of a batch's rows, and all take the same step (`distributed.py`).

Letters in the shape comments: B rows of a batch, b of a micro-batch, T tokens, V vocab_size, N places that count.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from minilora.distributed import own_randomness, rank, share, sum_gradients, total, world
from minilora.dtypes import HALF_PRECISION, computing_in
from minilora.modes import in_eval_mode
from minilora.rows import batch_of, pieces_of, row_lengths, taken
from minilora.storage.training_state import load_training_state, run_identity, save_training_state
from minilora.train_settings import (
    CROSS_ENTROPY,
    IGNORE,
    History,
    NonFiniteError,
    Objective,
    Rows,
    TrainConfig,
    check_finite,
    check_groups,
)


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """The fraction of the peak learning rate at a step: a straight climb, then half a cosine (Loshchilov 2017)."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)  # from 0 towards 1
    # final + (1 - final) · (1 + cos(π · progress)) / 2
    return config.final_learning_rate + (1 - config.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: nn.Module, config: TrainConfig, parameter_groups: list[dict] | None = None) -> AdamW:
    """AdamW over everything trainable (Loshchilov & Hutter 2019), fused where the device has it: no temporaries.

    parameter_groups: dictionaries with "params" and, if wanted, their own "lr" and "weight_decay"; None: one group of
    all. Raises ValueError unless each trainable parameter is in exactly one group, and no frozen one in any.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: no parameter of the model has requires_grad")
    split: list[dict] = []
    groups = [{"params": trainable}] if parameter_groups is None else parameter_groups
    for group in check_groups(model, groups):
        group = {"lr": config.learning_rate, "weight_decay": config.weight_decay} | group
        group["initial_lr"] = group["lr"]  # the peak, which the schedule scales
        matrices = [parameter for parameter in group["params"] if parameter.ndim > 1]
        vectors = [parameter for parameter in group["params"] if parameter.ndim <= 1]
        split += [group | {"params": matrices}, group | {"params": vectors, "weight_decay": 0.0}]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trainable)
    return AdamW([group for group in split if group["params"]], betas=config.betas, fused=fused)


def set_gradient_checkpointing(model: nn.Module, enabled: bool):
    """Sets `gradient_checkpointing` on every module that has it. ValueError if it is wanted and no module has it."""
    switches: list[Any] = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if enabled and not switches:
        raise ValueError(f"gradient_checkpointing is not supported by {type(model).__name__}")
    for module in switches:
        module.gradient_checkpointing = enabled


def next_token_targets(labels: Tensor) -> Tensor:
    """labels (B, T), each the token AT its place -> targets (B, T), each the token AFTER it; the last has none."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORE)


def forward(model: nn.Module, input_ids: Tensor, where: tuple[Tensor, ...], precision: str) -> Tensor:
    """input_ids (b, T) -> logits (N, V) at the places `where`, in float32 at least, as a softmax's sum over V needs."""
    with computing_in(precision, input_ids.device.type):
        logits = model(input_ids, where=where)
    return logits.float() if logits.dtype in HALF_PRECISION else logits


def training_step(
    model: nn.Module,
    optimizer: Optimizer,
    input_ids: Tensor,
    labels: Tensor,
    config: TrainConfig,
    counted_tokens: int | None = None,
    objective: Objective = CROSS_ENTROPY,
    more: Sequence[Tensor] = (),
) -> Tensor:
    """One optimizer step on one batch, input_ids and labels (B, T); returns the batch's mean loss, a scalar.

    Each micro-batch's sum is divided by the tokens that count in the WHOLE batch, so that any number of micro-batches
    gives the same gradient: a mean of means would weigh a short answer's tokens more. Runs on fake tensors too, as
    `experiments/simulate.py` does; they have no numbers, and `counted_tokens` says how many tokens of each row count
    (None: all but the first). An objective may count pairs, input_ids and labels (B, 2, T), and need `more` of each.
    Raises NonFiniteError, before the step is taken, when the loss or the gradient is not a finite number.
    """
    # All places before any forward: finding them waits for the device, which has nothing to do yet.
    count = min(config.accumulation_steps, len(input_ids) // world())  # a sharded base is gathered as often by each
    pieces = pieces_of(count, counted_tokens, *share(input_ids, next_token_targets(labels), *more))
    counted = max(1, total(sum(map(objective.count, pieces))))  # a batch in which nothing counts has loss 0
    mean_loss = torch.zeros((), device=input_ids.device)
    for piece in pieces:
        known = objective.before(model, piece, config.precision)  # what takes no gradient
        logits = forward(model, piece.input_ids, piece.where, config.precision)  # forward: (N, V)
        loss = objective.loss(logits, piece, known) / counted  # loss: a sum over what counts in this piece
        del logits  # backward needs the log-probabilities, which the loss has kept
        loss.backward()  # backward: adds to .grad
        mean_loss = mean_loss + loss.detach()  # in the loss's own dtype
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mean_loss = total(mean_loss)  # of all processes, as are the gradients from here on
    sum_gradients(trainable)
    norm = nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)  # clip: returns the norm before clipping
    check_finite(mean_loss, norm, optimizer, config)
    optimizer.step()  # step
    optimizer.zero_grad(set_to_none=True)  # frees the gradients' memory for the next forward
    return mean_loss


@torch.no_grad()
def evaluate_loss(
    model: nn.Module, data: Rows, batch_size: int, precision: str = "auto", objective: Objective = CROSS_ENTROPY
) -> float:
    """The mean loss over all of `data`, dropout off: by default nats per counted token."""
    objective.check(model, data, "the data to evaluate")
    device, total, counted = next(model.parameters()).device, 0.0, 0
    with in_eval_mode(model):
        for rows in row_lengths(data.labels).argsort().split(batch_size):  # rows of like length have little padding
            ids, labels, *more = (part.to(device) for part in taken(data, rows))
            (piece,) = pieces_of(1, None, ids, next_token_targets(labels), *more)
            known = objective.before(model, piece, precision)
            logits = forward(model, piece.input_ids, piece.where, precision)  # (N, V)
            total += objective.loss(logits, piece, known).item()
            counted += objective.count(piece)
    return total / counted


def train(
    model: nn.Module,
    data: Rows,
    config: TrainConfig,
    validation: Rows | None = None,
    parameter_groups: list[dict] | None = None,
    state_path: str | Path | None = None,
    resume: bool = False,
    description: str = "train",
    progress: bool = True,
    settings: dict | None = None,
    after_step: Callable[[int, Optimizer], None] | None = None,
    objective: Objective = CROSS_ENTROPY,
) -> History:
    """Trains, in place, whatever has `requires_grad`; returns the losses and times.

    model: called as model(input_ids, where=(rows, columns)), it returns the logits at these places, (N, V).
    data, validation: anything with `.input_ids` and `.labels`, int64 (N, T). labels[t] is the token at t, or -100
        where it does not count; the shift by one happens here. What an objective needs besides is in `.more`.
    parameter_groups: see `make_optimizer`; each group's own learning rate follows the same schedule.
    state_path: where to save every `save_every` steps and at the end; with resume, a run saved there goes on.
    settings: what else must be the same for a resumed run (the adapter's config, say); stored in the state, compared.
    after_step: called after every optimizer step with the number of steps done and the optimizer. Its decisions must
        follow from these, the model and the seed, or a resumed run is another run.
    objective: what is made small, and validated; cross entropy by default.

    After the last step the model is in eval mode. Seeds torch's generator. The same seed gives the same weights bit for
    bit on a CPU; on CUDA some kernels add in an order of their own. Raises NonFiniteError (a ValueError) when the loss
    or the gradient is no longer a finite number: the weights are then those of the last good step.
    """
    objective.check(model, data, "the training data")
    if (resume or config.save_every) and state_path is None:
        raise ValueError("resume and save_every need a state_path, which is not given")
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, config, parameter_groups)
    set_gradient_checkpointing(model, config.gradient_checkpointing)
    optimizer.zero_grad(set_to_none=True)  # of gradients left over from elsewhere
    torch.manual_seed(config.seed)
    history, start, settings = History(), 0, settings or {}
    if state_path is not None:
        settings = asdict(config) | run_identity(model, data, optimizer) | objective.settings | settings
        if resume and Path(state_path).exists():
            start, saved = load_training_state(state_path, model, optimizer, settings)
            history = History(**saved)

    def due(step: int, every: int) -> bool:
        return step == config.steps or (every > 0 and step % every == 0)

    def evaluate(step: int):
        if validation is not None:
            size = config.batch_size // config.accumulation_steps
            loss = evaluate_loss(model, validation, size, config.precision, objective)
            history.validation_loss.append([step, loss])

    model.train()
    if start == 0:
        evaluate(0)
    with tqdm(range(start, config.steps), description, config.steps, initial=start, disable=not progress) as bar:
        for step in bar:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * learning_rate_factor(step, config)
            own_randomness(config.seed, step)
            try:
                input_ids, labels, *more = (part.to(device) for part in batch_of(data, step, config, model))  # (B, T)
                loss = training_step(model, optimizer, input_ids, labels, config, None, objective, more).item()
            except NonFiniteError as error:
                raise NonFiniteError(f"at step {step} of {config.steps} {error}") from None
            steps_done = step + 1
            if after_step is not None:
                after_step(steps_done, optimizer)
            seconds = time.perf_counter() - began
            history.train_loss.append([step, loss])
            history.rewards += objective.rewards(step, more)
            history.step_seconds.append(seconds)
            history.tokens += input_ids.numel()
            bar.set_postfix_str(f"loss {loss:.3f}, {input_ids.numel() / seconds:,.0f} tokens/s", refresh=False)
            if due(steps_done, config.eval_every):
                evaluate(steps_done)
            if state_path is not None and rank() == 0 and due(steps_done, config.save_every):
                save_training_state(state_path, model, optimizer, steps_done, asdict(history), settings)
    model.eval()
    return history
