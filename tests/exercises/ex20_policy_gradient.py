"""Exercise 20: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "objectives": """
import torch


def group_advantages(rewards, group_size, normalize=True):
    groups = rewards.reshape(len(rewards) // group_size, group_size)
    spread = groups.std(dim=1, keepdim=True) + 1e-4 if normalize else 1.0
    found = (groups - groups.mean(dim=1, keepdim=True)) / spread
    agree = groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)
    return torch.where(agree, torch.zeros_like(found), found).reshape(-1)


def kl_estimate(log_probs, reference_log_probs):
    log_ratio = reference_log_probs - log_probs
    return torch.expm1(log_ratio) - log_ratio


def grpo_loss(log_probs, old_log_probs, advantages, mask=None, clip=0.2, kl=None, reduction="mean"):
    ratio = torch.exp(log_probs - old_log_probs)
    A = advantages.unsqueeze(1)
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    each = -gain + (0 if kl is None else kl)
    counts = torch.ones_like(each) if mask is None else mask.to(each.dtype)
    total = (each * counts).sum()
    return total if reduction == "sum" else total / counts.sum()
"""
}

FURTHER = [
    {
        "objectives": """
import torch


def group_advantages(rewards, group_size, normalize=True):
    found = torch.zeros_like(rewards)
    for first in range(0, len(rewards), group_size):
        group = rewards[first : first + group_size]
        if (group != group[0]).any():
            better = group - sum(group) / group_size
            spread = (better.square().sum() / (group_size - 1)).sqrt() + 1e-4
            found[first : first + group_size] = better / spread if normalize else better
    return found


def kl_estimate(log_probs, reference_log_probs):
    ratio = reference_log_probs.exp() / log_probs.exp()
    return ratio - ratio.log() - 1


def grpo_loss(log_probs, old_log_probs, advantages, mask=None, clip=0.2, kl=None, reduction="mean"):
    total, count = 0, 0
    for row, A in enumerate(advantages):
        for at in range(log_probs.shape[1]):
            if mask is None or mask[row, at]:
                ratio = (log_probs[row, at] - old_log_probs[row, at]).exp()
                gain = min(ratio * A, (1 + clip) * A if A > 0 else (1 - clip) * A)
                total, count = total - gain + (0 if kl is None else kl[row, at]), count + 1
    return total if reduction == "sum" else total / count
"""
    }
]

FOUND = "(groups - groups.mean(dim=1, keepdim=True)) / spread"
GAIN = "torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)"
MEAN = "total / counts.sum()"

MUTANTS = [
    Mutant("mean of all", "groups.mean(dim=1, keepdim=True)", "groups.mean()", "not that of all"),
    Mutant("no mean", FOUND, "groups / spread", "the mean is missing"),
    Mutant("negative", FOUND, f"-{FOUND}", "not the other way round"),
    Mutant(
        "never normalized",
        "groups.std(dim=1, keepdim=True) + 1e-4 if normalize else 1.0",
        "1.0",
        "deviation is missing",
    ),
    Mutant("always normalized", " if normalize else 1.0", "", "normalize is False"),
    Mutant("variance", "groups.std(", "groups.var(", "the variance is not"),
    Mutant("over n", "groups.std(dim=1", "groups.std(correction=0, dim=1", "n - 1"),
    Mutant("one deviation", "groups.std(dim=1, keepdim=True)", "groups.std()", "its own standard deviation"),
    Mutant("no 1e-4", " + 1e-4", "", "1e-4 is added"),
    Mutant("normalize off by default", "normalize=True", "normalize=False", "True by default"),
    Mutant(
        "groups apart",
        (
            "rewards.reshape(len(rewards) // group_size, group_size)",
            "torch.where(agree, torch.zeros_like(found), found).reshape(-1)",
        ),
        (
            "rewards.reshape(group_size, -1).T",
            "torch.where(agree, torch.zeros_like(found), found).T.reshape(-1)",
        ),
        "side by side",
    ),
    Mutant("rounded zeros", "torch.where(agree, torch.zeros_like(found), found)", "found", "the group that agrees"),
    Mutant(
        "close is equal",
        "groups.amax(dim=1, keepdim=True) == groups.amin(dim=1, keepdim=True)",
        "torch.isclose(groups.amax(dim=1, keepdim=True), groups.amin(dim=1, keepdim=True))",
        "close are not equal",
    ),
    Mutant("small is nothing", "torch.where(agree,", "torch.where(found.abs() < 1e-3,", "close are not equal"),
    Mutant(
        "q over p reversed", "reference_log_probs - log_probs", "log_probs - reference_log_probs", "not the other way"
    ),
    Mutant("log ratio", "torch.expm1(log_ratio) - log_ratio", "-log_ratio", "it can be negative"),
    Mutant("no minus one", "torch.expm1(log_ratio)", "torch.exp(log_ratio)", "the 1 is missing"),
    Mutant("sign of the logarithm", "(log_ratio) - log_ratio", "(log_ratio) + log_ratio", "the sign of the logarithm"),
    Mutant("squared", "torch.expm1(log_ratio) - log_ratio", "log_ratio**2 / 2", "squared logarithm"),
    Mutant(
        "estimate cut off", "torch.expm1(log_ratio) - log_ratio", "log_ratio.detach().expm1() - log_ratio", "cut off"
    ),
    Mutant("no clip", GAIN, "ratio * A", "nothing is clipped"),
    Mutant("only clipped", GAIN, "ratio.clamp(1 - clip, 1 + clip) * A", "not the clipped one alone"),
    Mutant("maximum", "torch.minimum", "torch.maximum", "not the larger"),
    Mutant("minimum of ratios", GAIN, "torch.minimum(ratio, ratio.clamp(1 - clip, 1 + clip)) * A", "products with A"),
    Mutant("gain", "-gain", "gain", "the sign"),
    Mutant(
        "ratio upside down", "log_probs - old_log_probs)", "old_log_probs - log_probs)", "the policy's over the old"
    ),
    Mutant("ratio of logarithms", "torch.exp(log_probs - old_log_probs)", "log_probs / old_log_probs", "logarithms"),
    Mutant("clip around 0", "clamp(1 - clip, 1 + clip)", "clamp(-clip, clip)", "the interval is 1 ± clip"),
    Mutant("mean over all", MEAN, "total / each.numel()", "not over all"),
    Mutant("mask left out", "mask.to(each.dtype)", "torch.ones_like(each)", "the mask is left out"),
    Mutant("mask reversed", "mask.to(each.dtype)", "1 - mask.to(each.dtype)", "the wrong way round"),
    Mutant("always the sum", 'total if reduction == "sum" else total / counts.sum()', "total", "reduction is 'mean'"),
    Mutant("answers first", MEAN, "((each * counts).sum(1) / counts.sum(1).clamp(min=1)).mean()", "over each answer"),
    Mutant("kl subtracted", "(0 if kl is None else kl)", "(0 if kl is None else -kl)", "not subtracted"),
    Mutant("sum over all", "return total if", "return each.sum() if", "the mask is left out"),
    Mutant("kl cut off", "(0 if kl is None else kl)", "(0 if kl is None else kl.detach())", "the gradient of kl"),
    Mutant(
        "sum with all of kl",
        "(each * counts).sum()",
        '(each * counts).sum() + (0 if kl is None or reduction == "mean" else (kl * (1 - counts)).sum())',
        "kl is masked like the rest",
    ),
    Mutant("kl left out", "(0 if kl is None else kl)", "0", "kl is left out"),
    Mutant(
        "no gradient", "torch.exp(log_probs - old_log_probs)", "torch.exp(log_probs - old_log_probs).detach()", "grad"
    ),
]
