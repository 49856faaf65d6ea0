"""Exercise 19: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "objectives": """
from torch.nn import functional as F


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, reduction="mean"):
    moved_chosen = policy_chosen - reference_chosen
    moved_rejected = policy_rejected - reference_rejected
    each = F.softplus(beta * (moved_rejected - moved_chosen))
    return each.sum() if reduction == "sum" else each.mean()
"""
}

FURTHER = [
    {
        "objectives": """
import torch
from torch.nn import functional as F


def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, reduction="mean"):
    moved = torch.stack([policy_chosen - reference_chosen, policy_rejected - reference_rejected], 1)
    first = torch.zeros(len(moved), dtype=torch.long)
    return F.cross_entropy(beta * moved, first, reduction=reduction)
"""
    },
    {
        "objectives": """
def dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, reduction="mean"):
    total = 0
    for chosen, rejected, *reference in zip(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
        z = beta * ((chosen - rejected) - (reference[0] - reference[1]))
        total = total + (-z).clamp(min=0) + (-z.abs()).exp().log1p()
    return total if reduction == "sum" else total / len(policy_chosen)
"""
    },
]

EACH = "F.softplus(beta * (moved_rejected - moved_chosen))"
LAST = 'each.sum() if reduction == "sum" else each.mean()'

MUTANTS = [
    Mutant("the wrong way round", "moved_rejected - moved_chosen", "moved_chosen - moved_rejected", "wrong way round"),
    Mutant(
        "no reference",
        ("policy_chosen - reference_chosen", "policy_rejected - reference_rejected"),
        ("policy_chosen", "policy_rejected"),
        "the reference is missing",
    ),
    Mutant(
        "reference added",
        ("policy_chosen - reference_chosen", "policy_rejected - reference_rejected"),
        ("policy_chosen + reference_chosen", "policy_rejected + reference_rejected"),
        "the reference is added",
    ),
    Mutant("added", "moved_rejected - moved_chosen", "-moved_rejected - moved_chosen", "the differences are added"),
    Mutant("no beta", "beta * (", "(", "β is missing"),
    Mutant("beta outside", EACH, "beta * F.softplus(moved_rejected - moved_chosen)", "β stands outside of σ"),
    Mutant("beta divides", EACH, "F.softplus((moved_rejected - moved_chosen) / beta)", "β divides"),
    Mutant("no logarithm", EACH, "-(beta * (moved_chosen - moved_rejected)).sigmoid()", "the logarithm is missing"),
    Mutant("the sign", EACH, f"-{EACH}", "the sign"),
    Mutant("log of a rounded σ", EACH, "-(beta * (moved_chosen - moved_rejected)).sigmoid().log()", "logsigmoid"),
    Mutant("always the sum", LAST, "each.sum()", "reduction is 'mean'"),
    Mutant("always the mean", LAST, "each.mean()", "reduction is 'sum'"),
    Mutant("sum by default", 'reduction="mean"', 'reduction="sum"', "by default"),
    Mutant(
        "the mean of margins",
        "beta * (moved_rejected - moved_chosen)",
        "beta * (moved_rejected - moved_chosen).mean(0, keepdim=True)",
        "the mean comes last",
    ),
    Mutant("a list of losses", LAST, "each", "expected shape ()"),
    Mutant("cut off", EACH, EACH + ".detach()", "does not require grad"),
    Mutant("half cut off", "policy_rejected - ref", "policy_rejected.detach() - ref", "gradient of the rejected"),
    Mutant("overflow", EACH, "(beta * (moved_rejected - moved_chosen)).exp().log1p()", "finite numbers"),
    Mutant("clamped", EACH, EACH + ".clamp(0, 9)", "margin = -300"),
]
