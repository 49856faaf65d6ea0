"""Exercise 20: learning from rewards, with a group for a baseline."""

import torch
from torch import Tensor

from minilora.exercises.checking import Draw, Exercise, expect
from minilora.objectives import group_advantages, grpo_loss, kl_estimate

EXERCISE = Exercise(
    number=20,
    slug="policy_gradient",
    title="Rewards: groups, a clipped ratio, a KL penalty",
    targets=("objectives:group_advantages", "objectives:kl_estimate", "objectives:grpo_loss"),
    difficulty=2,
    minutes=40,
    notebook="09_preferences_rewards_teachers",
    section="2. Rewards",
    explanation="""\
The model answers each prompt several times, a group, and every answer gets a reward. Good is what is better than the
group's mean, so no second network has to guess what a prompt is worth (GRPO, Shao 2024, arXiv 2402.03300).

- `group_advantages(rewards, group_size, normalize)`: rewards (B,), the answers of a prompt side by side -> (B,). The
  reward minus its group's mean; normalized, divided by the group's standard deviation plus 1e-4 (`std` of torch, over
  n - 1). A group whose rewards are all equal gets exact zeros, also where the mean of equal numbers is rounded; a group
  whose rewards differ, however little, does not.
- `kl_estimate(log_probs, reference_log_probs)`: for tokens that were drawn from π, an estimate of KL(π ‖ π_ref), one
  number for each: with q/p = π_ref(token) / π(token) it is q/p - log(q/p) - 1. Its mean over π is the divergence
  exactly, and it is never negative. Gradients reach log_probs, for it becomes a part of the loss.
- `grpo_loss(log_probs, old_log_probs, advantages, mask, clip, kl, reduction)`: log_probs and old_log_probs (B, T), of
  each token now and when it was drawn; advantages (B,), one for all tokens of an answer. Each token's loss is

      -min(ρ A, clip(ρ, 1 - clip, 1 + clip) A) + kl        ρ = π(token) / π_old(token)

  kl (B, T) is a penalty that is ready to be added, or None. The result is the mean over the tokens at which mask (B, T)
  is 1, or over all for mask None; with reduction "sum" their sum.

The minimum makes the clip one-sided: it stops an answer from being pushed further once ρ has left the interval on the
side that the push goes to, and never stops it from coming back. While π is π_old, ρ is 1, nothing is clipped, and the
gradient is -A ∇ log π.""",
    hints=(
        "Rewards as (groups, group_size) make it one mean along dimension 1. ρ is exp of a difference of logarithms.",
        "Advantages (B,) need a dimension for the tokens: view(-1, 1). torch.minimum takes the smaller of two tensors, "
        "place by place, and ratio.clamp(1 - clip, 1 + clip) the clipped ratio. "
        "masked_fill sets agreeing groups to 0.",
        "better = groups - groups.mean(1, keepdim=True); zeros where (groups == groups[:, :1]).all(1). "
        "kl_estimate: d = reference - log_probs; d.exp() - d - 1. "
        "grpo_loss: -torch.minimum(ratio * A, clipped * A), plus kl, then only losses[mask.bool()].",
    ),
    question="A group in which every answer is right gets no gradient at all. Is that a loss of information? And what "
    "does it mean for a prompt that the model never answers rightly?",
    answer="Nothing is lost that a policy gradient could use: it learns from differences within a group, and there "
    "are none; the prompt is mastered for now. With the standard deviation as divisor, noise would even be blown up. "
    "But compute was spent on it, so one samples prompts that are of middling difficulty. A prompt whose answers are "
    "all wrong has no gradient either, and stays so: the model cannot learn what it never does. It needs easier "
    "steps towards it, a reward for parts, examples to imitate first, or more and more varied samples.",
)

SIZES = (2, 3, 5)


# Groups


def draw_rewards(draw: Draw, most: int) -> tuple[Tensor, int]:
    """(B,) and the size of a group. No two groups are alike."""
    groups, size = draw.integer(2, most + 1), draw.integer(2, most)
    return draw.normal(groups, size).flatten() + torch.arange(groups).repeat_interleave(size), size


def by_hand(rewards: Tensor, size: int, normalize: bool) -> Tensor:
    found = []
    for group in rewards.split(size):
        mean = sum(group.tolist()) / size
        spread = (sum((each - mean) ** 2 for each in group.tolist()) / (size - 1)) ** 0.5 + 1e-4 if normalize else 1
        found += [(each - mean) / spread for each in group.tolist()]
    return rewards.new_tensor(found)


def of_groups(rewards: Tensor, size: int, normalize: bool) -> dict:
    """Mistakes, by sentence."""
    groups, better = rewards.view(-1, size), by_hand(rewards, size, False)
    across = rewards.view(size, -1)  # as if the answers of a prompt did not lie side by side
    plain = better.view(-1, size)
    whole = rewards - rewards.mean()
    slips = {
        "the mean is each group's own, not that of all": whole / (rewards.std() + 1e-4) if normalize else whole,
        "the mean is missing": rewards / (groups.std(1).repeat_interleave(size) + 1e-4) if normalize else rewards,
        "a group's answers lie side by side: view(-1, group_size), and the mean over dimension 1": (
            (across - across.mean(0)) / (across.std(0) + 1e-4 if normalize else 1)
        ).flatten(),
        "the mean is subtracted from the reward, not the other way round": -by_hand(rewards, size, normalize),
    }
    if normalize:
        slips |= {
            "the standard deviation is missing": better,
            "the variance is not the standard deviation": (plain / (plain.var(1, keepdim=True) + 1e-4)).flatten(),
            "std of torch divides by n - 1, not by n": (
                plain / (plain.std(1, correction=0, keepdim=True) + 1e-4)
            ).flatten(),
            "each group has its own standard deviation": better / (rewards.std() + 1e-4),
            "1e-4 is added to the standard deviation": (plain / plain.std(1, keepdim=True)).flatten(),
        }
    else:
        slips["normalize is False: nothing is divided"] = by_hand(rewards, size, True)
    return slips


@EXERCISE.property("advantages: the reward minus its group's mean, and normalized in standard deviations of the group")
def advantages(draw: Draw):
    for most in SIZES:
        rewards, size = draw_rewards(draw, most)
        for normalize in (False, True):
            case = {"rewards": rewards, "group_size": size, "normalize": normalize}
            wanted, slips = by_hand(rewards, size, normalize), of_groups(rewards, size, normalize)
            expect(group_advantages(rewards, size, normalize), wanted, case, slips, "the advantages")
    rewards, size = draw_rewards(draw, 3)
    slips = {"normalize is True by default": by_hand(rewards, size, False)}
    case = {"rewards": rewards, "group_size": size}
    expect(group_advantages(rewards, size), by_hand(rewards, size, True), case, slips, "the advantages")


@EXERCISE.property("a group that agrees has exact zeros, whatever it agrees on, and no other group has")
def agreeing(draw: Draw):
    for reward in (0.0, 1.0, 0.1, draw.number(0.01, 0.99)):
        other = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
        rewards = torch.cat([torch.full((7,), reward), other])  # 0.1 in float32: the mean of seven is not 0.1
        for normalize in (True, False):
            case = {"rewards": rewards[:7], "beside": other, "group_size": 7, "normalize": normalize}
            found = group_advantages(rewards, 7, normalize)
            slip = {"where all rewards of a group are equal, set 0: the rounded mean is not": rewards - rewards.mean()}
            expect(found[:7], torch.zeros(7), case, slip, "the advantages of the group that agrees", 0)
    for apart in (1e-3, 1e-7):
        rewards = 1 + apart * torch.tensor([0.0, 1.0, 0.0, 1.0]).double()
        case = {"rewards": "0 and 1 in turn, times the difference, plus 1", "difference": apart, "normalize": False}
        slip = {"rewards that are close are not equal: only where all are equal, set 0": torch.zeros(4).double()}
        wanted = by_hand(rewards, 2, False)
        expect(group_advantages(rewards, 2, False), wanted, case, slip, "the advantages of close rewards", 1e-6)


# The divergence


@EXERCISE.property("kl_estimate: q/p - log(q/p) - 1 of every token, and 0 where both models agree")
def estimate(draw: Draw):
    for most in SIZES:
        shape = draw.integer(1, most), draw.integer(1, most)
        p, q = -draw.normal(*shape).abs(), -draw.normal(*shape).abs()
        case = {"log_probs": p, "reference_log_probs": q}
        slips = {
            "q/p is the reference's over the model's, not the other way round": (p - q).exp() - (p - q) - 1,
            "that is log(p/q) alone: its mean is right, but it can be negative": p - q,
            "the 1 is missing: it is 0 where both agree": (q - p).exp() - (q - p),
            "the sign of the logarithm": (q - p).exp() + (q - p) - 1,
            "that is half of the squared logarithm, another estimate": (q - p).square() / 2,
            "the arguments are logarithms already": q / p - (q / p).log() - 1,
        }
        expect(kl_estimate(p, q), (q - p).exp() + p - q - 1, case, slips, "the estimate")
        expect(kl_estimate(p, p), torch.zeros(shape).double(), {"log_probs, both": p}, None, "the estimate")


@EXERCISE.property("kl_estimate: its mean over the model's own distribution is the divergence, and none is negative")
def exact_mean(draw: Draw):
    for most in SIZES:
        p, q = (draw.normal(most + 1).log_softmax(0) for _ in range(2))
        found = kl_estimate(p, q)
        case = {"log p": p, "log q": q}
        expect((p.exp() * found).sum(), (p.exp() * (p - q)).sum(), case, what="Σ p · estimate")
        expect(found.clamp(max=0), torch.zeros_like(p), case, what="what is negative among the estimates")


@EXERCISE.property("kl_estimate: its gradient is 1 - q/p, which pulls the model back to the reference")
def gradient_of_the_estimate(draw: Draw):
    for most in SIZES:
        p, q = (-draw.normal(most).abs() for _ in range(2))
        leaf = p.clone().requires_grad_()
        (found,) = torch.autograd.grad(kl_estimate(leaf, q).sum(), leaf, allow_unused=True)
        case = {"log_probs": p, "reference_log_probs": q}
        slips = {
            "q/p is cut off from the gradient": torch.ones_like(p),
            "log(q/p) is cut off from the gradient": -(q - p).exp(),
        }
        expect(found, 1 - (q - p).exp(), case, slips, "the gradient of the estimates' sum")


# The loss


def draw_tokens(draw: Draw, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """log_probs, old_log_probs (B, T), their ratios within the clip and beyond, and advantages (B,) of either sign."""
    B, T = draw.integer(2, most), draw.integer(2, most + 1)
    old = -draw.normal(B, T).abs() - 1
    advantages = draw.normal(B).abs() + 0.2
    advantages[draw.integer(0, B - 1)] *= -1
    return old + 0.5 * draw.normal(B, T), old, advantages


def token_losses(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """-min(ρ A, clip(ρ) A), case by case: up to 1 + clip where A is above 0, down to 1 - clip where it is below."""
    ratio, A = (new - old).exp(), advantages[:, None]
    return torch.where(A > 0, -A * ratio.clamp(max=1 + clip), -A * ratio.clamp(min=1 - clip))


def of_tokens(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> dict:
    """Mistakes, by sentence."""
    ratio, A = (new - old).exp(), advantages[:, None]
    clipped, back = ratio.clamp(1 - clip, 1 + clip), (-(new - old)).exp()
    return {
        "nothing is clipped": -ratio * A,
        "the smaller of the two, not the clipped one alone": -clipped * A,
        "the smaller of the two gains, not the larger, which is the smaller of the losses": -torch.maximum(
            ratio * A, clipped * A
        ),
        "the minimum is of the products with A, not of the ratios": -torch.minimum(ratio, clipped) * A,
        "the sign: what is made small is minus the minimum": torch.minimum(ratio * A, clipped * A),
        "ρ is the policy's over the old one's": -torch.minimum(back * A, back.clamp(1 - clip, 1 + clip) * A),
        "ρ is exp of the difference: the arguments are logarithms": (
            -torch.minimum(new / old * A, (new / old).clamp(1 - clip, 1 + clip) * A)
        ),
        "ρ is missing: that is REINFORCE's loss": -A * new,
        "the interval is 1 ± clip": -torch.minimum(ratio * A, ratio.clamp(-clip, clip) * A),
    }


@EXERCISE.property("grpo_loss: -min(ρ A, clip(ρ) A), for either sign of A; the mean over all tokens, or their sum")
def clipped_loss(draw: Draw):
    for most in SIZES:
        new, old, A = draw_tokens(draw, most)
        for clip, reduction in ((0.2, "mean"), (draw.number(0.05, 0.4), "sum")):
            reduce, other = (torch.mean, torch.sum) if reduction == "mean" else (torch.sum, torch.mean)
            right = token_losses(new, old, A, clip)
            slips = {sentence: reduce(wrong) for sentence, wrong in of_tokens(new, old, A, clip).items()}
            slips[f"reduction is {reduction!r}, over the tokens"] = other(right)
            case = {"log_probs": new, "old_log_probs": old, "advantages": A, "clip": clip, "reduction": reduction}
            expect(grpo_loss(new, old, A, None, clip, None, reduction), reduce(right), case, slips, "the loss")
    new, old, A = draw_tokens(draw, 3)
    case = {"log_probs": new, "old_log_probs": old, "advantages": A}
    slips = {"clip is 0.2 by default, reduction 'mean'": token_losses(new, old, A, 0.2).sum()}
    expect(grpo_loss(new, old, A), token_losses(new, old, A, 0.2).mean(), case, slips, "the loss")


@EXERCISE.property("grpo_loss: only tokens with mask 1 count, and the mean or the sum is over these")
def masked(draw: Draw):
    for most in SIZES:
        new, old, A = draw_tokens(draw, most)
        mask = (draw.normal(*new.shape) > 0).double()
        mask[0, 0], mask[-1, -1] = 1, 0
        each = token_losses(new, old, A, 0.2)
        case = {"log_probs": new, "old_log_probs": old, "advantages": A, "mask": mask}
        answers = (each * mask).sum(1) / mask.sum(1).clamp(min=1)
        for reduction, reduce in (("mean", torch.mean), ("sum", torch.sum)):
            slips = {
                "the mean is over the tokens that count, not over all": (each * mask).mean(),
                "the mask is left out": reduce(each),
                "the mask is the wrong way round: 1 counts": reduce(each[mask == 0]),
                "the mean is over all tokens of the batch, not first over each answer": reduce(answers),
            }
            for kind in (mask, mask.bool()):
                about = {**case, "mask of": str(kind.dtype), "reduction": reduction}
                found = grpo_loss(new, old, A, kind, reduction=reduction)
                expect(found, reduce(each[mask == 1]), about, slips, "the loss")


@EXERCISE.property("grpo_loss: kl is added to every token's loss, as it is")
def with_penalty(draw: Draw):
    for most in SIZES:
        new, old, A = draw_tokens(draw, most)
        kl, mask = draw.normal(*new.shape).abs(), torch.ones(new.shape).double()
        mask[0, -1] = 0
        each = token_losses(new, old, A, 0.2)
        case = {"log_probs": new, "old_log_probs": old, "advantages": A, "mask": mask, "kl": kl}
        for reduction, reduce in (("mean", torch.mean), ("sum", torch.sum)):
            plain, penalty = reduce(each[mask == 1]), kl[mask == 1]
            slips = {
                "kl is left out": plain,
                "kl is added to the loss, not subtracted": plain - reduce(penalty),
                "kl is masked like the rest": plain + reduce(kl),
                "kl is added once a token, not summed over the batch": reduce((each + penalty.sum())[mask == 1]),
            }
            about = {**case, "reduction": reduction}
            policy, leaf = new.clone().requires_grad_(), kl.clone().requires_grad_()
            found = grpo_loss(policy, old, A, mask, 0.2, leaf, reduction)
            expect(found, plain + reduce(penalty), about, slips, "the loss")
        (found,) = torch.autograd.grad(found, leaf, allow_unused=True)
        expect(found, mask, about, None, "the gradient of kl")


@EXERCISE.property("on policy the gradient is that of REINFORCE, -A at every token; beyond the clip there is none")
def gradients(draw: Draw):
    for most in SIZES:
        _, old, A = draw_tokens(draw, most)
        new = old.clone().requires_grad_()
        (found,) = torch.autograd.grad(grpo_loss(new, old, A, reduction="sum"), new, allow_unused=True)
        case = {"log_probs and old_log_probs": old, "advantages": A}
        wanted = -A[:, None].expand_as(old)
        slips = {"the gradient goes the wrong way: what is better than its group must become likelier": -wanted}
        expect(found, wanted, case, slips, "the gradient")
        far = old + torch.where(A > 0, 1.0, -1.0)[:, None]  # each pushed beyond its bound
        far[:, 0] = old[:, 0]
        far.requires_grad_()
        (found,) = torch.autograd.grad(grpo_loss(far, old, A, reduction="sum"), far, allow_unused=True)
        case = {"log_probs, beyond the clip but for the first of each answer": far.detach()}
        case |= {"old_log_probs": old, "advantages": A}
        wanted = torch.cat([-A[:, None], torch.zeros_like(old[:, 1:])], 1)
        slips = {"nothing is clipped": -A[:, None] * (far.detach() - old).exp()}
        expect(found, wanted, case, slips, "the gradient")
