"""Exercise 19: the loss of direct preference optimization."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.exercises.checking import Draw, Exercise, expect
from minilora.objectives import dpo_loss

EXERCISE = Exercise(
    number=19,
    slug="dpo",
    title="Preferences without a reward: DPO's loss",
    targets=("objectives:dpo_loss",),
    difficulty=1,
    minutes=20,
    notebook="09_preferences_rewards_teachers",
    section="1. Preferences",
    explanation="""\
A pair is two answers to one prompt, one chosen and one rejected. π is the model in training, π_ref the model when
training began: with LoRA it is the same model with its adapter switched off. An answer's log-probability is the sum
over its tokens, and how far the model has moved towards an answer is log π - log π_ref. Direct preference optimization
(Rafailov 2023, arXiv 2305.18290, equation 7) wants it to move further towards the chosen one:

    margin = (log π - log π_ref)(chosen) - (log π - log π_ref)(rejected)
    loss   = -log σ(β · margin)          σ(z) = 1 / (1 + exp(-z))

`dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta, reduction)` takes four tensors
(B,) of log-probabilities, a pair in each place, and a number β. It returns a scalar: the mean over the pairs, or with
reduction "sum" their sum. Gradients reach both of the policy's tensors.

While π is π_ref the loss is log 2. It must stay right however large the margin is: at β · margin = -1,000 it is 1,000,
though σ(-1,000) is 0 in every floating-point format.""",
    hints=(
        "Two differences, one difference of these, times β; then -log σ of each pair, and only then the mean.",
        "torch has log σ as one function, which never computes σ: F.logsigmoid. softplus(-z) is -log σ(z) as well.",
        "margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected); then "
        "reduced(-F.logsigmoid(beta * margin), reduction).",
    ),
    question="Nothing in the loss asks that the chosen answer become likely. How can the loss fall to nearly nothing "
    "while the model finds the chosen answer less likely with every step, and where does the probability go?",
    answer="The loss sees the margin alone, the difference of two changes. It falls as well when both answers "
    "become less likely, if only the rejected one does so faster. Chosen and rejected answers often share most of "
    "their words, so pushing the one down takes the other along. The probability goes to answers that are in no "
    "pair, which nothing in the loss holds back: other wordings, other lengths, in bad cases nonsense. Therefore one "
    "watches the log-probability of the chosen answers, keeps β from being too small, or adds a loss on them.",
)


def pairs(draw: Draw, most: int, size: float = 3) -> list[Tensor]:
    """Four times log-probabilities (B,): all negative, as sums over tokens are."""
    count = draw.integer(min(most, 2), most)
    return [-size * draw.normal(count).abs() for _ in range(4)]


def losses(logps: list[Tensor], beta: float) -> Tensor:
    """-log σ(β · margin) of each pair, written as log(1 + exp(-β · margin))."""
    chosen, rejected, reference_chosen, reference_rejected = logps
    return F.softplus(beta * (rejected - reference_rejected - chosen + reference_chosen))


def mistakes(logps: list[Tensor], beta: float) -> dict:
    """What each gives for single pairs, by sentence."""
    chosen, rejected, reference_chosen, reference_rejected = logps
    margin = (chosen - reference_chosen) - (rejected - reference_rejected)
    return {
        "chosen and rejected are the wrong way round": F.softplus(beta * margin),
        "the reference is missing: that compares π(chosen) with π(rejected)": F.softplus(beta * (rejected - chosen)),
        "the reference is added: log π - log π_ref is how far the model has moved": F.softplus(
            -beta * ((chosen + reference_chosen) - (rejected + reference_rejected))
        ),
        "the differences are added: the margin is the chosen one's minus the rejected one's": F.softplus(
            -beta * ((chosen - reference_chosen) + (rejected - reference_rejected))
        ),
        "β is missing": F.softplus(-margin),
        "β stands outside of σ: it multiplies the margin": beta * F.softplus(-margin),
        "β divides: it multiplies the margin": F.softplus(-margin / beta),
        "the logarithm is missing: that is -σ": -torch.sigmoid(beta * margin),
        "the sign: the loss is minus the logarithm": -F.softplus(-beta * margin),
        "the arguments are logarithms already": F.softplus(-beta * (margin.sign() * margin.abs().log())),
    }


@EXERCISE.property("while the policy is the reference it is log 2, whatever the answers and β are")
def at_the_start(draw: Draw):
    for most in (1, 4):
        chosen, rejected, *_ = pairs(draw, most)
        beta = draw.number(0.05, 2)
        case = {"chosen": chosen, "rejected": rejected, "beta": beta}
        slips = {s: wrong.mean() for s, wrong in mistakes([chosen, rejected, chosen, rejected], beta).items()}
        expect(
            dpo_loss(chosen, rejected, chosen, rejected, beta),
            torch.tensor(math.log(2), dtype=torch.float64),
            case,
            slips,
        )


@EXERCISE.property("-log σ(β · margin), the mean over pairs or their sum")
def formula(draw: Draw):
    for most in (1, 2, 8):
        logps, beta = pairs(draw, most), draw.number(0.05, 2)
        case = dict(zip(("chosen", "rejected", "reference chosen", "reference rejected"), logps, strict=True))
        for reduction in ("mean", "sum"):
            reduce, other = (torch.mean, torch.sum) if reduction == "mean" else (torch.sum, torch.mean)
            slips = {sentence: reduce(wrong) for sentence, wrong in mistakes(logps, beta).items()}
            if most > 1:
                slips[f"reduction is {reduction!r}, over the pairs"] = other(losses(logps, beta))
                margins = losses([each.mean(0, keepdim=True) for each in logps], beta)
                slips["the mean comes last: of the pairs' losses, not of their margins"] = reduce(margins)
            about = {**case, "beta": beta, "reduction": reduction}
            expect(dpo_loss(*logps, beta, reduction), reduce(losses(logps, beta)), about, slips)


@EXERCISE.property("without a reduction it is the mean")
def default(draw: Draw):
    logps, beta = pairs(draw, 6), draw.number(0.05, 2)
    slips = {"reduction is 'mean' by default": losses(logps, beta).sum()}
    expect(dpo_loss(*logps, beta), losses(logps, beta).mean(), {"pairs": len(logps[0]), "beta": beta}, slips)


@EXERCISE.property("right for margins of any size, in float32 too")
def large_margins(draw: Draw):
    for dtype in (torch.float64, torch.float32):
        for margin in (-300.0, 2000.0, -2000.0):  # at 40, σ rounds to 1, and log 1 is off by no more than 4e-18
            far, near = torch.tensor([margin], dtype=dtype), torch.zeros(1, dtype=dtype)
            logps = (far, near, near, near) if margin < 0 else (near, -far, near, near)
            expected = torch.tensor(max(0.0, -margin) + math.log1p(math.exp(-abs(margin))), dtype=dtype)
            case = {"margin": margin, "beta": 1.0, "dtype": str(dtype)}
            slips = {"log of σ, which was rounded to 0 or 1 before: take logsigmoid": -torch.sigmoid(far).log()[0]}
            expect(dpo_loss(*logps, 1.0), expected, case, slips, "the loss", 1e-6)


@EXERCISE.property("what both answers gain alike does not matter: only the difference is in the loss")
def only_the_margin(draw: Draw):
    logps, beta, shift = pairs(draw, 4), draw.number(0.05, 2), draw.number(1, 9)
    chosen, rejected, *reference = logps
    case = {"chosen": chosen, "rejected": rejected, "beta": beta, "both less likely by": shift}
    moved = dpo_loss(chosen - shift, rejected - shift, *reference, beta)
    expect(moved, losses(logps, beta).mean(), case, what="the loss, both answers moved down")


@EXERCISE.property("gradients: the chosen answer is pulled up and the rejected pushed down, by β σ(-β · margin) each")
def gradients(draw: Draw):
    for most in (1, 5):
        logps, beta = pairs(draw, most), draw.number(0.05, 2)
        leaves = [each.clone().requires_grad_() for each in logps[:2]]
        found = torch.autograd.grad(dpo_loss(*leaves, *logps[2:], beta, "sum"), leaves, allow_unused=True)
        pull = beta * (-losses(logps, beta)).exp().neg().add(1)  # σ(-z) = 1 - σ(z), and σ(z) = exp(-loss)
        case = dict(zip(("chosen", "rejected", "reference chosen", "reference rejected"), logps, strict=True))
        for name, got, wanted in zip(("chosen", "rejected"), found, (-pull, pull), strict=True):
            slips = {"the wrong way round: gradient descent must make the chosen one likelier": -wanted}
            expect(got, wanted, {**case, "beta": beta}, slips, f"the gradient of the {name} answers")
