"""The training loop: one `for`, read from top to bottom, the same for full fine-tuning, LoRA and every variant.

    learning rate -> rows of the batch -> micro-steps -> clip -> step -> log -> evaluate -> save

The loop trains whatever has `requires_grad` and does not know why the rest is frozen; choosing a method is choosing
what is trainable, before the loop begins. Everything that steers a step (learning rate, rows) is a pure function of
the step's number and the seed. So a run that was killed continues from its saved state exactly as if it had never
stopped, and nothing needs to be replayed.
"""

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

from minilora.storage.training_state import load_training_state, run_identity, save_training_state

IGNORE = -100  # the label of a token that does not count, as in Hugging Face


@dataclass
class TrainConfig:
    """How to train. Raises ValueError, naming the field, for a value that cannot work."""

    steps: int  # optimizer steps
    batch_size: int  # sequences per optimizer step
    learning_rate: float  # the peak, reached after the warm-up
    warmup_steps: int = 0
    final_learning_rate: float = 0.1  # where the cosine ends, as a fraction of the peak
    accumulation_steps: int = 1  # micro-batches that a batch is cut into: less memory, the same gradient
    weight_decay: float = 0.0  # of matrices; vectors (norm weights, biases) never decay
    betas: tuple[float, float] = (0.9, 0.95)  # 0.95 and not 0.999: a run of a few hundred steps needs a short memory
    max_grad_norm: float = 1.0  # math.inf: no clipping
    eval_every: int = 0  # steps; 0: only at the start and the end
    save_every: int = 0  # steps; 0: only at the end, and never without a state_path
    precision: str = "auto"  # "auto": bfloat16 autocast on CUDA, float32 elsewhere; or one of the two by name
    gradient_checkpointing: bool = False  # keep less for backward, compute it again: about a third more arithmetic
    seed: int = 0  # of the order of the data and of dropout

    def __post_init__(self):
        self.betas = tuple(self.betas)
        counts = dict(steps=1, batch_size=1, accumulation_steps=1, warmup_steps=0, eval_every=0, save_every=0, seed=0)
        for name, least in counts.items():
            value = getattr(self, name)
            self.require(type(value) is int and value >= least, name, f"a whole number of at least {least}")
        self.require(0 < self.learning_rate < math.inf, "learning_rate", "a number above 0")
        self.require(0 <= self.final_learning_rate <= 1, "final_learning_rate", "a fraction from 0 to 1")
        self.require(0 <= self.weight_decay < math.inf, "weight_decay", "a number of at least 0")
        self.require(self.max_grad_norm > 0, "max_grad_norm", "a number above 0 (math.inf: no clipping)")
        fits = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self.require(fits, "betas", "two numbers from 0 to below 1")
        precisions = ("auto", "float32", "bfloat16")
        self.require(self.precision in precisions, "precision", f"one of {', '.join(precisions)}")
        self.require(self.warmup_steps < self.steps, "warmup_steps", f"below steps, which is {self.steps}")
        divides = self.batch_size % self.accumulation_steps == 0
        self.require(divides, "accumulation_steps", f"a divisor of batch_size, which is {self.batch_size}")

    def require(self, fits: bool, name: str, rule: str):
        if not fits:
            raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {rule}")


@dataclass
class History:
    """What a run leaves behind to plot. A point is [optimizer steps done before it, nats per counted token]."""

    train_loss: list[list[float]] = field(default_factory=list)  # of the batch that the step is about to learn from
    validation_loss: list[list[float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)  # of each step, evaluation and saving left out
    tokens: int = 0  # all that went through the model, counted in the loss or not

    @property
    def seconds_per_step(self) -> float:
        """The median: the first step warms up, and one slow step must not decide."""
        return statistics.median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / sum(self.step_seconds)

    @property
    def best_validation_loss(self) -> float:
        return min(loss for _, loss in self.validation_loss)


class NonFiniteError(ValueError):
    """The loss or a gradient became NaN or infinite. The weights are still those of the last good step."""


def learning_rate_factor(step: int, config: TrainConfig) -> float:
    """The fraction of the peak learning rate at a step: a straight climb, then half a cosine (Loshchilov 2017)."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)  # 0 to 1
    # final + (1 - final) · (1 + cos(π · progress)) / 2
    return config.final_learning_rate + (1 - config.final_learning_rate) * (1 + math.cos(math.pi * progress)) / 2


@lru_cache(maxsize=2)  # a batch can span two epochs
def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of `count` rows that depends on seed and epoch alone, (count,)."""
    # The two are mixed into the low 32 bits, the only ones torch's CPU generator looks at.
    return torch.randperm(count, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


def batch_rows(count: int, step: int, config: TrainConfig) -> Tensor:
    """The rows of step `step`'s batch, (batch_size,): an endless deck, each epoch a fresh shuffle of all rows."""
    places = range(step * config.batch_size, (step + 1) * config.batch_size)
    return torch.stack([epoch_order(count, config.seed, place // count)[place % count] for place in places])


def make_optimizer(model: nn.Module, config: TrainConfig, parameter_groups: list[dict] | None = None) -> AdamW:
    """AdamW over everything trainable (Loshchilov & Hutter 2019), fused where the device has it: no temporaries.

    parameter_groups: dictionaries with "params" and, if wanted, their own "lr" and "weight_decay"; None: one group of
    all. Raises ValueError unless each trainable parameter is in exactly one group, and no frozen one in any.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    trainable = [parameter for parameter in names if parameter.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: no parameter of the model has requires_grad")
    if parameter_groups is None:
        parameter_groups = [{"params": trainable}]
    groups = [group | {"params": list(group["params"])} for group in parameter_groups]
    check_groups(names, groups)
    split = []
    for group in groups:
        group = {"lr": config.learning_rate, "weight_decay": config.weight_decay} | group
        group["initial_lr"] = group["lr"]  # the peak, which the schedule scales
        matrices = [parameter for parameter in group["params"] if parameter.ndim > 1]
        vectors = [parameter for parameter in group["params"] if parameter.ndim <= 1]
        split += [group | {"params": matrices}, group | {"params": vectors, "weight_decay": 0.0}]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in trainable)
    return AdamW([group for group in split if group["params"]], betas=config.betas, fused=fused)


def check_groups(names: dict[nn.Parameter, str], groups: list[dict]):
    """Raises ValueError unless the groups share out the trainable parameters: none twice, none left, none frozen."""
    seen = set()
    for parameter in [parameter for group in groups for parameter in group["params"]]:
        if parameter not in names:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is in a group but not in the model")
        if not parameter.requires_grad:
            raise ValueError(f"{names[parameter]} is frozen and must not be in a parameter group")
        if parameter in seen:
            raise ValueError(f"{names[parameter]} is in more than one parameter group")
        seen.add(parameter)
    left_out = [name for parameter, name in names.items() if parameter.requires_grad and parameter not in seen]
    if left_out:
        raise ValueError(f"in no parameter group, though trainable: {', '.join(left_out)}")


def set_gradient_checkpointing(model: nn.Module, enabled: bool):
    """Sets `gradient_checkpointing` on every module that has it. ValueError if it is wanted and no module has it."""
    switches = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    if enabled and not switches:
        raise ValueError(f"gradient_checkpointing is not supported by {type(model).__name__}")
    for module in switches:
        module.gradient_checkpointing = enabled


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda")


def summed_loss(model: nn.Module, input_ids: Tensor, targets: Tensor, precision: str) -> Tensor:
    """Cross entropy summed over the targets that count. input_ids, targets (B, T); targets[t] follows input_ids[t].

    Matrix products run in bfloat16 if asked, the softmax never: its sum over V terms needs the digits.
    """
    bfloat16 = uses_bfloat16(precision, input_ids.device)
    with torch.autocast(input_ids.device.type, torch.bfloat16) if bfloat16 else nullcontext():
        logits = model(input_ids)  # (B, T, V), or (B, n + T, V)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # A model may put positions of its own in front (a soft prompt does): those predict nothing that counts.
    targets = F.pad(targets, (max(0, logits.shape[1] - targets.shape[1]), 0), value=IGNORE)  # (B, n + T)
    # The targets were shifted, not the logits: these are the largest tensor of all, and a slice would copy them.
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def next_tokens(labels: Tensor) -> Tensor:
    """labels (B, T), each the token AT its place -> targets (B, T), each the token AFTER it; the last has none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def compute_gradients(
    model: nn.Module, input_ids: Tensor, labels: Tensor, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Leaves the clipped gradient of the batch's mean loss in `.grad`; returns the loss and the norm before clipping.

    input_ids, labels (B, T). Each micro-batch's sum is divided by the tokens that count in the WHOLE batch, so that
    any number of micro-batches gives the same gradient: a mean of means would weigh a short answer's tokens more.
    Never waits for the device, and runs on fake tensors.
    """
    targets = next_tokens(labels)
    counted = (targets != IGNORE).sum().clamp(min=1)  # a batch in which nothing counts has loss 0
    loss = torch.zeros((), device=input_ids.device)
    pieces = config.accumulation_steps
    for ids, following in zip(input_ids.chunk(pieces), targets.chunk(pieces), strict=True):
        share = summed_loss(model, ids, following, config.precision) / counted
        share.backward()  # adds to .grad
        loss = loss + share.detach()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return loss, nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)


def apply_gradients(optimizer: Optimizer):
    """One optimizer step. Then the gradients are let go, so that their memory is free for the next forward."""
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def training_step(
    model: nn.Module, optimizer: Optimizer, input_ids: Tensor, labels: Tensor, config: TrainConfig
) -> Tensor:
    """One optimizer step on one batch, without the loop's look at the loss in between; returns the loss, a scalar.

    input_ids, labels (B, T). For measuring bytes and seconds: it never waits for the device, and runs on fake tensors.
    """
    loss, _ = compute_gradients(model, input_ids, labels, config)
    apply_gradients(optimizer)
    return loss


@torch.no_grad()
def evaluate_loss(model: nn.Module, data, batch_size: int, precision: str = "auto") -> float:
    """Mean nats per counted token over all of `data` (`.input_ids` and `.labels`, (N, T)), dropout off."""
    check_data(data, "the data to evaluate")
    device, training = next(model.parameters()).device, model.training
    model.eval()
    total, counted = 0.0, 0
    for ids, labels in zip(data.input_ids.split(batch_size), data.labels.split(batch_size), strict=True):
        targets = next_tokens(labels)
        total += summed_loss(model, ids.to(device), targets.to(device), precision).item()
        counted += int((targets != IGNORE).sum())
    model.train(training)
    return total / counted


def check_data(data, name: str):
    ids, labels = data.input_ids, data.labels
    if ids.ndim != 2 or ids.shape != labels.shape or ids.dtype != torch.int64 or labels.dtype != torch.int64:
        raise ValueError(
            f"{name}: input_ids and labels must be int64 of one shape (N, T), "
            f"not {ids.dtype} {tuple(ids.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    if not (labels[:, 1:] != IGNORE).any():
        raise ValueError(f"{name}: no token counts in the loss (no label after a row's first is other than {IGNORE})")


def train(
    model: nn.Module,
    data,
    config: TrainConfig,
    validation=None,
    parameter_groups: list[dict] | None = None,
    state_path: str | Path | None = None,
    resume: bool = False,
    description: str = "train",
    progress: bool = True,
    settings: dict | None = None,
    after_step: Callable[[int, Optimizer], None] | None = None,
) -> History:
    """Trains, in place, whatever has `requires_grad`; returns the losses and times.

    data, validation: anything with `.input_ids` and `.labels`, int64 (N, T). labels[t] is the token at t, or -100
    where it does not count; the shift by one happens here.
    parameter_groups: see `make_optimizer`; each group's own learning rate follows the same schedule.
    state_path: where to save every `save_every` steps and at the end; with resume, what is there is continued (if
    nothing is there yet, the run begins at the beginning). settings: whatever else must be the same for a resumed
    run (the adapter's config, say); it is stored in the state and compared.
    after_step: called after every optimizer step with the number of steps done and the optimizer. What it decides must
    follow from these, the model and the seed, or a resumed run is another one.

    The model comes back in eval mode. Seeds torch's generator. The same seed gives the same weights bit for bit on a
    CPU; on CUDA some kernels add in an order of their own. Raises NonFiniteError (a ValueError) when the loss or the
    gradient is no longer a finite number; weights and saved state are then those of before.
    """
    check_data(data, "the training data")
    if (resume or config.save_every) and state_path is None:
        raise ValueError("resume and save_every need a state_path, which is not given")
    device = next(model.parameters()).device
    optimizer = make_optimizer(model, config, parameter_groups)
    set_gradient_checkpointing(model, config.gradient_checkpointing)
    torch.manual_seed(config.seed)
    history, start = History(), 0
    if state_path is not None:
        settings = asdict(config) | run_identity(model, data, optimizer) | (settings or {})
        if resume and Path(state_path).exists():
            start, saved = load_training_state(state_path, model, optimizer, settings)
            history = History(**saved)

    def due(step: int, every: int) -> bool:
        return step == config.steps or (every > 0 and step % every == 0)

    def evaluate(step: int):
        if validation is not None:
            loss = evaluate_loss(model, validation, config.batch_size // config.accumulation_steps, config.precision)
            history.validation_loss.append([step, loss])

    model.train()
    if start == 0:
        evaluate(0)
    remaining = range(start, config.steps)
    bar = tqdm(remaining, desc=description, initial=start, total=config.steps, disable=not progress)
    for step in bar:
        began = time.perf_counter()
        factor = learning_rate_factor(step, config)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

        rows = batch_rows(len(data.input_ids), step, config)
        input_ids, labels = data.input_ids[rows].to(device), data.labels[rows].to(device)  # (B, T)
        loss, gradient_norm = compute_gradients(model, input_ids, labels, config)
        loss, gradient_norm = loss.item(), gradient_norm.item()
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            optimizer.zero_grad(set_to_none=True)
            bar.close()
            raise NonFiniteError(
                f"at step {step} of {config.steps} the loss is {loss} and the gradient norm {gradient_norm}: try a "
                f"learning rate below {config.learning_rate:g}, a longer warm-up, or precision float32"
            )
        apply_gradients(optimizer)
        done = step + 1
        if after_step is not None:
            after_step(done, optimizer)

        seconds = time.perf_counter() - began
        history.train_loss.append([step, loss])
        history.step_seconds.append(seconds)
        history.tokens += input_ids.numel()
        bar.set_postfix_str(f"loss {loss:.3f}, {input_ids.numel() / seconds:,.0f} tokens/s", refresh=False)
        if due(done, config.eval_every):
            evaluate(done)
        if state_path is not None and due(done, config.save_every):
            save_training_state(state_path, model, optimizer, done, asdict(history), settings)
    model.eval()
    return history
