"""What the training loop is given and leaves behind: `Objective`, `TrainConfig`, `History`, the checks of its input."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.optim import Optimizer

from minilora.ranges import BATCH_SIZE, EVERY, LEARNING_RATE, SEED, STEPS, Range

IGNORE = -100  # the label of a token that does not count in the loss, as in Hugging Face


class Rows(Protocol):
    """What the loop trains on. labels[n, t] is the token at t, or IGNORE."""

    input_ids: Tensor  # (N, T) int64
    labels: Tensor  # (N, T) int64


@dataclass
class Piece:
    """A micro-batch, with the places that count. A pair is two rows, one below the other."""

    input_ids: Tensor  # (b, T)
    targets: Tensor  # (b, T): the token after each place, or IGNORE
    where: tuple[Tensor, ...]  # rows and columns of the N places that count, each (N,)
    more: tuple[Tensor, ...] = ()  # what the data brings along, an entry for each row or pair


class Objective:
    """What training makes small: a mean over all that counts in a batch. This one, the default, is cross entropy.

    The loop makes the trained model's logits at the places that count, and cuts a batch into pieces. What it makes of
    them is the objective's: the others, in `objectives.py`, differ from this one in some of its methods.
    """

    @property
    def settings(self) -> dict:
        """All that a resumed run must find the same, as JSON holds it."""
        return {}

    def check(self, model: nn.Module, data: Rows, name: str):
        """Raises ValueError for a model or data that do not fit. Called before training and evaluation."""
        check_data(data, name)

    def count(self, piece: Piece) -> int:
        """How many things count: here tokens."""
        return len(piece.where[0])

    def before(self, model: nn.Module, piece: Piece, precision: str) -> Any:
        """What must be known before the model's forward pass and takes no gradient, such as another model's logits."""

    def loss(self, logits: Tensor, piece: Piece, known: Any) -> Tensor:
        """logits (N, V), and what `before` gave -> the SUM over the things that count, so that pieces add up."""
        return F.cross_entropy(logits, piece.targets[piece.where], reduction="sum")  # Σ -log p(target), in nats

    def rewards(self, step: int, more: Sequence[Tensor]) -> list:
        """What `History.rewards` gets of a batch; `more` as the data gave it. Here nothing is rewarded."""
        return []


CROSS_ENTROPY = Objective()


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
    group_by_length: bool = False  # batches of rows of like length: less padding, and a less random order
    seed: int = 0  # of the order of the data and of dropout

    def __post_init__(self):
        self.betas = tuple(self.betas)
        ranges = dict(steps=STEPS, batch_size=BATCH_SIZE, accumulation_steps=BATCH_SIZE, seed=SEED)
        ranges |= dict.fromkeys(("warmup_steps", "eval_every", "save_every"), EVERY)
        ranges |= dict(learning_rate=LEARNING_RATE, final_learning_rate=Range(0, 1), weight_decay=Range(0))
        for name, allowed in ranges.items():
            allowed.check(name, getattr(self, name))
        self.require(self.max_grad_norm > 0, "max_grad_norm", "a number above 0 (math.inf: no clipping)")
        two = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self.require(two, "betas", "two numbers from 0 to below 1")
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
    """The losses and times of a run. A point is [optimizer steps done before it, nats per counted token]."""

    train_loss: list[list[float]] = field(default_factory=list)  # of the batch that the step is about to learn from
    validation_loss: list[list[float]] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)  # of each step, evaluation and saving left out
    tokens: int = 0  # all that went through the model, counted in the loss or not, trimmed columns left out
    # [step, mean reward of its samples, fraction of samples whose group agrees and gives no gradient]
    rewards: list[list[float]] = field(default_factory=list)

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


def check_data(data: Rows, name: str):
    """Raises ValueError unless input_ids and labels are int64 of one shape (N, T) and some token counts."""
    ids, labels = data.input_ids, data.labels
    if ids.ndim != 2 or ids.shape != labels.shape or {str(ids.dtype), str(labels.dtype)} != {"torch.int64"}:
        raise ValueError(
            f"{name}: input_ids and labels must be int64 of one shape (N, T), "
            f"not {ids.dtype} {tuple(ids.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    if not (labels[:, 1:] != IGNORE).any():
        raise ValueError(f"{name}: no token counts in the loss (no label after a row's first is other than {IGNORE})")


def check_groups(model: nn.Module, groups: list[dict]) -> list[dict]:
    """The groups with their parameters as lists. Raises ValueError unless each trainable parameter is in exactly one
    group, and no other parameter in any."""
    groups = [group | {"params": list(group["params"])} for group in groups]
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = set()
    for parameter in [parameter for group in groups for parameter in group["params"]]:
        if parameter not in names:
            raise ValueError(f"a parameter of shape {tuple(parameter.shape)} is in a group but not in the model")
        if not parameter.requires_grad:
            raise ValueError(f"{names[parameter]} is frozen and must not be in a parameter group")
        if parameter in grouped:
            raise ValueError(f"{names[parameter]} is in more than one parameter group")
        grouped.add(parameter)
    left_out = [name for parameter, name in names.items() if parameter.requires_grad and parameter not in grouped]
    if left_out:
        raise ValueError(f"in no parameter group, though trainable: {', '.join(left_out)}")
    return groups


def check_finite(loss: Tensor, norm: Tensor, optimizer: Optimizer, config: TrainConfig):
    """Raises NonFiniteError, with the gradients let go, unless loss and gradient norm are finite."""
    if isinstance(loss, FakeTensor) or (math.isfinite(loss.item()) and math.isfinite(norm.item())):
        return
    optimizer.zero_grad(set_to_none=True)
    raise NonFiniteError(
        f"the loss is {loss.item()} and the gradient norm {norm.item()}: try a learning rate below "
        f"{config.learning_rate:g}, a longer warm-up, or precision float32"
    )
