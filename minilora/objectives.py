"""What else than the next token can be trained for: preferences, rewards, another model's opinion.

First the formulas, each with its source, then what the training loop is handed: objectives that differ from cross
entropy (`train_settings.Objective`) in what they count, what they must know before the forward pass, and the loss.

All of them compare the model in training with another: a reference that it must not leave, or a teacher. On adapters a
reference costs no memory. The base is frozen, and where ΔW is 0 at the start it was the model when training began. So
with the adapter switched off the model IS the reference, and a forward pass without gradients is all that it takes.
Where ΔW is not 0, as with LoftQ or a loaded adapter, `with_reference` asks the model as it starts.

Letters in the shape comments: B rows or pairs, T tokens, V vocab_size, N places that count.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.inject import disable_lora, lora_layers
from minilora.lora import LoRALinear
from minilora.modes import in_eval_mode
from minilora.ranges import BETA, NOT_NEGATIVE, POSITIVE
from minilora.rows import counted_places, taken
from minilora.storage.training_state import digest
from minilora.train import forward, next_token_targets
from minilora.train_settings import IGNORE, Objective, Piece, Rows


def reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses.sum() if reduction == "sum" else losses.mean()


def token_log_probs(model: nn.Module, input_ids: Tensor, labels: Tensor, precision: str = "auto") -> Tensor:
    """log π(label | all before it), (B, T - 1), for input_ids and labels (B, T); 0 where the label is -100."""
    targets = next_token_targets(labels)  # (B, T)
    where = counted_places(targets)
    logits = forward(model, input_ids, where, precision)  # (N, V)
    log_probs = logits.new_zeros(targets.shape).index_put(where, log_probs_of(logits, targets[where]))
    return log_probs[:, :-1]


def log_probs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (N, V), targets (N,) -> log softmax(logits)[target], (N,)."""
    return -F.cross_entropy(logits, targets, reduction="none")


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    reduction: str = "mean",
) -> Tensor:
    """Direct preference optimization (Rafailov 2023, equation 7), a scalar; each argument (B,) holds log-probabilities
    of whole answers, the sums over their tokens:

        -log σ( β · [ (log π - log π_ref)(chosen) - (log π - log π_ref)(rejected) ] )

    While policy and reference agree it is log 2. Nothing in it keeps the chosen answer likely: it falls as well when
    both fall and the rejected one faster.
    """
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return reduced(-F.logsigmoid(beta * margin), reduction)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """KL(teacher ‖ student) in nats per counted token, a scalar (Hinton 2015); logits (..., V), mask (...), None: all.

        τ² · Σ p · (log p - log q)        p, q: softmax of the teacher's and the student's logits / τ

    A gradient with respect to the logits shrinks by 1/τ twice, once on either side; τ² puts that right.
    """
    log_q = (student_logits / temperature).log_softmax(-1)
    log_p = (teacher_logits / temperature).log_softmax(-1)
    divergence = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)  # (...)
    return reduced(divergence if mask is None else divergence[mask.bool()], reduction)


def group_advantages(rewards: Tensor, group_size: int, normalize: bool = True) -> Tensor:
    """rewards (B,), the groups side by side -> by how much each is better than its group's mean, (B,); normalized, in
    standard deviations of the group (Shao 2024, section 4.1.2). A group that agrees gets 0, and so no gradient."""
    groups = rewards.view(-1, group_size)  # (groups, group_size)
    better = groups - groups.mean(1, keepdim=True)
    better = better.masked_fill((groups == groups[:, :1]).all(1, keepdim=True), 0.0)
    return (better / (groups.std(1, keepdim=True) + 1e-4) if normalize else better).flatten()


def kl_estimate(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """KL(π ‖ π_ref) from samples of π, one number for each: q/p - log(q/p) - 1, whose mean over π is exact and which
    never is negative (Schulman 2020; Shao 2024, equation 4)."""
    ratio = reference_log_probs - log_probs
    return ratio.exp() - ratio - 1


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    clip: float = 0.2,
    kl: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Shao 2024, equation 3, with the mean over all counted tokens of the batch (Yu 2025), a scalar:

        -min(ρ A, clip(ρ, 1 ± clip) A) + kl        ρ = π(token) / π_old(token)

    log_probs, old_log_probs, mask and kl, the penalty of each token, (B, T); advantages (B,). On policy ρ is 1, and the
    gradient is REINFORCE's with the group's mean for a baseline: -A ∇ log π.
    """
    A = advantages.view(-1, *[1] * (log_probs.ndim - 1))  # (B, 1)
    ratio = (log_probs - old_log_probs).exp()
    losses = -torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)  # (B, T)
    losses = losses if kl is None else losses + kl
    return reduced(losses if mask is None else losses[mask.bool()], reduction)


class Preference(Objective):
    """DPO on pairs: data (N, 2, T), in each the chosen answer's row and then the rejected one's.

    The reference is the model with its adapter switched off: the start of training where ΔW is 0 then. Else, as with
    LoftQ or a loaded adapter, and where nothing can be switched off, as in full fine-tuning, the data brings the
    reference's log-probabilities along: `with_reference`.
    """

    def __init__(self, beta: float = 0.1):
        BETA.check("beta", beta)
        self.beta = beta

    @property
    def settings(self) -> dict:
        return {"objective": "dpo", "beta": self.beta}

    def check(self, model: nn.Module, data: Rows, name: str):
        """Raises ValueError for data that is no pairs, an answer without a counted token, a pair of equal answers,
        dropout, and a model without reference."""
        check_pairs(data, name)
        if not getattr(data, "more", ()) and not any(lora_layers(model)):
            raise ValueError("this model has no adapter to switch off for a reference: use with_reference(data, model)")
        check_no_dropout(model)

    def count(self, piece: Piece) -> int:
        return len(piece.targets) // 2  # pairs

    @torch.no_grad()
    def before(self, model: nn.Module, piece: Piece, precision: str) -> Tensor:
        """The reference's log-probabilities, (b, 2); its logits are gone again before the policy's come."""
        if piece.more:
            return piece.more[0]
        with disable_lora(model):
            return answer_log_probs(forward(model, piece.input_ids, piece.where, precision), piece)

    def loss(self, logits: Tensor, piece: Piece, known: Tensor) -> Tensor:
        policy = answer_log_probs(logits, piece)  # (b, 2)
        (chosen, rejected), (reference_chosen, reference_rejected) = policy.unbind(1), known.unbind(1)
        return dpo_loss(chosen, rejected, reference_chosen, reference_rejected, self.beta, reduction="sum")


def answer_log_probs(logits: Tensor, piece: Piece) -> Tensor:
    """logits (N, V) of a piece of pairs -> the log-probability of each whole answer, (b, 2)."""
    each = log_probs_of(logits, piece.targets[piece.where])  # (N,)
    return each.new_zeros(len(piece.targets)).index_add(0, piece.where[0], each).view(-1, 2)


def check_pairs(data: Rows, name: str):
    """Raises ValueError unless input_ids and labels are int64 of one shape (N, 2, T), each answer has a token that
    counts, and the two answers of a pair differ."""
    ids, labels = data.input_ids, data.labels
    fits = ids.ndim == 3 and ids.shape == labels.shape and ids.shape[1] == 2 and len(ids) > 0
    if not fits or {str(ids.dtype), str(labels.dtype)} != {"torch.int64"}:
        raise ValueError(
            f"{name}: pairs are input_ids and labels, int64 of one shape (N, 2, T), "
            f"not {ids.dtype} {tuple(ids.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    if (empty := (labels[..., 1:] == IGNORE).all(-1).any(1).nonzero()).numel():
        raise ValueError(f"{name}: an answer of pair {int(empty[0])} has no token that counts")
    if (equal := (labels[:, 0] == labels[:, 1]).all(1).nonzero()).numel():
        raise ValueError(f"{name}: the answers of pair {int(equal[0])} are the same, which prefers nothing")


def check_no_dropout(model: nn.Module):
    """Raises ValueError for a model that would drop anything in training: the reference would not, and the two would
    differ by noise."""
    for name, module in model.named_modules():
        p = module.lora_dropout if isinstance(module, LoRALinear) else getattr(module, "p", 0)
        if isinstance(module, LoRALinear | nn.Dropout) and p > 0:
            raise ValueError(f"{name} has dropout {p:g}; beside a reference, which has none, dropout must be 0")


@torch.no_grad()
def with_reference(data: Any, model: nn.Module, batch_size: int = 16, precision: str = "auto") -> Any:
    """The same pairs with the log-probabilities that `model`, as it is now, gives them, (N, 2): a reference computed
    beforehand. A step then costs what one of cross entropy does, and no second model is needed, whatever is trained.
    """
    device, parts = next(model.parameters()).device, []
    with in_eval_mode(model):
        for rows in torch.arange(len(data.input_ids)).split(batch_size):
            ids, labels = (part.to(device).flatten(0, 1) for part in taken(data, rows)[:2])  # (2b, T)
            parts.append(token_log_probs(model, ids, labels, precision).sum(1).view(-1, 2).cpu())
    return type(data)(data.input_ids, data.labels, (torch.cat(parts),))


@torch.no_grad()
def preferred(model: nn.Module, data: Rows, batch_size: int = 16, precision: str = "auto") -> float:
    """The fraction of pairs in which the model finds the chosen answer likelier than the rejected one."""
    log_probs = with_reference(data, model, batch_size, precision).more[0]  # (N, 2)
    return (log_probs[:, 0] > log_probs[:, 1]).float().mean().item()


class Distillation(Objective):
    """A frozen teacher's distribution over the next token, at the places that count, in place of the one token that
    the data has there."""

    def __init__(self, teacher: Any, temperature: float = 1.0):
        POSITIVE.check("temperature", temperature)
        self.teacher, self.temperature = teacher.requires_grad_(False).eval(), temperature

    @property
    def settings(self) -> dict:
        weights = dict(self.teacher.named_parameters()) | dict(self.teacher.named_buffers())
        return {"objective": "distill", "temperature": self.temperature, "teacher_digest": digest(weights)}

    def check(self, model: Any, data: Rows, name: str):
        """Raises ValueError for a teacher of another vocabulary, besides what cross entropy refuses."""
        super().check(model, data, name)
        ours, theirs = (each.config.vocab_size for each in (model, self.teacher))
        if ours != theirs:
            raise ValueError(f"the teacher has a vocabulary of {theirs} tokens and the student one of {ours}")

    @torch.no_grad()
    def before(self, model: nn.Module, piece: Piece, precision: str) -> Tensor:
        return forward(self.teacher, piece.input_ids, piece.where, precision)  # (N, V)

    def loss(self, logits: Tensor, piece: Piece, known: Tensor) -> Tensor:
        return distillation_loss(logits, known, None, self.temperature, reduction="sum")


class GroupPolicy(Objective):
    """GRPO on samples of the model itself, data `inference.rollouts.Rollouts`, whose batches bring along advantages,
    rewards and which groups agree. One update a batch, so that the old policy is the present one.

    beta: the weight of the KL divergence from the reference, which is the model with its adapter off. temperature and
    vocab_size: with which the samples were drawn.
    """

    def __init__(self, beta: float = 0.0, temperature: float = 1.0, vocab_size: int | None = None):
        NOT_NEGATIVE.check("beta", beta)
        POSITIVE.check("temperature", temperature)
        self.beta, self.temperature, self.vocab_size = beta, temperature, vocab_size

    @property
    def settings(self) -> dict:
        return {"objective": "grpo", "beta": self.beta, "temperature": self.temperature}

    def check(self, model: nn.Module, data: Rows, name: str):
        """Raises ValueError for data that draws no samples or at another temperature, for dropout, and for a KL
        divergence without an adapter to switch off."""
        if not hasattr(data, "draw"):
            raise ValueError(f"{name}: a group policy learns from samples of the model, inference.rollouts.Rollouts")
        if (drawn := getattr(data, "temperature", self.temperature)) != self.temperature:
            raise ValueError(
                f"{name}: samples are drawn at temperature {drawn:g}, the policy's is {self.temperature:g}"
            )
        super().check(model, data, name)
        check_no_dropout(model)
        if self.beta > 0 and not any(lora_layers(model)):
            raise ValueError("this model has no adapter to switch off for a reference; without one beta must be 0")

    def log_probs(self, logits: Tensor, piece: Piece) -> Tensor:
        """log π of the drawn tokens, (N,), under the distribution that they were drawn from."""
        return log_probs_of(logits[:, : self.vocab_size] / self.temperature, piece.targets[piece.where])

    @torch.no_grad()
    def before(self, model: nn.Module, piece: Piece, precision: str) -> Tensor | None:
        if self.beta == 0:
            return None
        with disable_lora(model):
            return self.log_probs(forward(model, piece.input_ids, piece.where, precision), piece)

    def loss(self, logits: Tensor, piece: Piece, known: Tensor | None) -> Tensor:
        log_probs, advantages = self.log_probs(logits, piece), piece.more[0][piece.where[0]]  # (N,) both
        kl = None if known is None else self.beta * kl_estimate(log_probs, known)
        return grpo_loss(log_probs, log_probs.detach(), advantages, kl=kl, reduction="sum")

    def rewards(self, step: int, more: Sequence[Tensor]) -> list:
        _, rewards, agrees = more
        return [[step, rewards.mean().item(), agrees.float().mean().item()]]
