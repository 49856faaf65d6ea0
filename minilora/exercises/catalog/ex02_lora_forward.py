"""Exercise 02: the forward pass of a LoRA layer, its formula."""

import torch
from torch import Tensor, nn

from minilora.exercises.checking import SIZES, Draw, Exercise, Wrong, expect, require
from minilora.exercises.layers import Results, assemble, lora_layer, written_out

EXERCISE = Exercise(
    number=2,
    slug="lora_forward",
    title="The LoRA forward pass",
    targets=("lora:LoRALinear.forward",),
    difficulty=1,
    minutes=20,
    notebook="01_lora_from_scratch",
    section="1. The layer",
    explanation="""\
A linear layer computes y = W x + b. LoRA leaves W (out, in) and b alone and adds a second path beside them, which
squeezes x through a narrow waist of r numbers and widens it again:

    y = W x + b + s·B(A x)        A (r, in), B (out, r), s = lora_alpha / r

Nothing of size (out, in) is made: A x first, r numbers for each token, and then B of that. Inputs have any number of
leading dimensions, (in,), (N, in) or (batch, T, in); only the last one is multiplied.

`LoRALinear.forward` has the parts on the layer: `self.base_layer(x)` is W x + b, whatever kind of layer that is (one in
4 bits has a `forward` and no `weight`); `self.lora_A` and `self.lora_B` are A and B, and `self.scaling` is s.

This is the layer as it is trained. That it can also be switched off, merged, and drop some of its input is exercise 21,
which writes the same function again.""",
    hints=(
        "nn.Linear stores W as (out, in) and computes x @ W.T; F.linear(x, W) does that for any leading dimensions.",
        "The narrow path is F.linear(F.linear(x, A), B), times the scaling, which the layer has as self.scaling.",
        "y = self.base_layer(x), and then y + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B).",
    ),
    question="For one token, how many multiplications does B(A x) take, and how many (BA) x if BA is formed first? For "
    "how many tokens would forming BA pay?",
    answer="B(A x) takes r·in + out·r, so r·(in + out) for each token. Forming BA takes r·in·out, once, and then "
    "in·out for each token. For a layer of 4096 by 4096 and r = 8 that is 65 thousand against 151 million. It never "
    "pays: even once BA is there, in·out for a token is more than r·(in + out), as long as r is small beside in and "
    "out. (What can pay is to form W + s·BA, and spare the second path: exercise 18.)",
    spoilers=("return self.base_layer(x) + self.scaling * F.linear(",),
)


def kinked(x: Tensor, A: Tensor, B: Tensor, s: float) -> dict[str, Tensor]:
    """What is added to W x + b with a nonlinearity between A and B, by its name."""
    kinds = {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": nn.functional.silu}
    kinds |= {"gelu": nn.functional.gelu, "softmax": lambda h: h.softmax(-1)}
    return {name: s * kind(x @ A.T) @ B.T for name, kind in kinds.items()}


@EXERCISE.property("y = W x + b + s·B(A x), with and without a bias")
def formula(draw: Draw):
    for most in SIZES:
        for bias in (True, False):
            layer = lora_layer(draw, most, r=draw.integer(3, most + 3))
            layer.lora_alpha = 3 * layer.r + draw.integer(1, layer.r - 1)  # s from 3 to 4, and no other factor's size
            layer.scaling = layer.lora_alpha / layer.r
            if not bias:
                layer.base_layer.bias = None
            x, s, r = draw.normal(draw.integer(1, most), layer.in_features), layer.scaling, layer.r
            W, b, A, B = layer.base_layer.weight, layer.base_layer.bias, layer.lora_A, layer.lora_B
            case = {"x": x, "W": W, "bias": b, "A": A, "B": B, "scaling": s}
            right, plain = written_out(x, W, b, A, B, s), written_out(x, W, b, A, B, 0)
            slips = {
                "the update is not scaled: multiply B(A x) by the scaling": written_out(x, W, b, A, B, 1),
                "the scaling reaches W x as well; it belongs to the update alone": s * written_out(x, W, b, A, B, 1),
                "W x is missing: the update is added to the layer's output": right - plain,
                "the update is missing: that is the base layer alone": plain,
                "W x is there twice: self.base_layer(x) is all of it": 2 * plain + (right - plain),
                "the update is added twice": written_out(x, W, b, A, B, 2 * s),
                "the update is subtracted; it is added": written_out(x, W, b, A, B, -s),
                "the update goes through W x: A's input is x itself, not the base layer's output": (
                    plain + s * plain @ A.T @ B.T if layer.in_features == layer.out_features else right
                ),
                "your update is r times too large: did you divide alpha by r?": written_out(x, W, b, A, B, s * r),
                "your update is r times too small: self.scaling is divided by r already": written_out(
                    x, W, b, A, B, s / r
                ),
                "the scaling acts twice": written_out(x, W, b, A, B, s * s),
            }
            if b is not None:
                slips["the bias is missing"] = right - b
                slips["the bias is scaled with the update"] = right + (s - 1) * b
                slips["the bias is added twice: self.base_layer(x) has it already"] = right + b
            for name, added in kinked(x, A, B, s).items():
                slips[f"there is a {name} between A and B; nothing is, or ΔW = s·BA would not be a change of W"] = (
                    plain + added
                )
            expect(layer(x), right, case, slips, "y")


@EXERCISE.property("s is the layer's scaling, for r and lora_alpha of any size, and for rsLoRA")
def scaling(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most, r=draw.integer(3, most + 3))
        layer.lora_alpha = layer.r + draw.integer(1, layer.r - 1)
        layer.scaling = layer.lora_alpha / layer.r
        x = draw.normal(2, layer.in_features)
        W, b, A, B, r, alpha = *layer.base_layer.parameters(), layer.lora_A, layer.lora_B, layer.r, layer.lora_alpha
        slips = {
            "your update is r times too large: did you divide alpha by r?": written_out(x, W, b, A, B, alpha),
            "your update is not scaled: s = lora_alpha / r": written_out(x, W, b, A, B, 1),
            "the scaling is upside down: s = lora_alpha / r": written_out(x, W, b, A, B, r / alpha),
            "that is rsLoRA's scaling; plain LoRA divides by r": written_out(x, W, b, A, B, alpha / r**0.5),
            "that is the base layer alone: the update is not added": written_out(x, W, b, A, B, 0),
            "the scaling acts twice": written_out(x, W, b, A, B, (alpha / r) ** 2),
        }
        case = {"x": x, "r": r, "lora_alpha": alpha}
        expect(layer(x), written_out(x, W, b, A, B, alpha / r), case, slips, "y")
        layer.scaling = alpha / r**0.5
        slip = "that is plain LoRA's scaling, and this layer is of rsLoRA: take self.scaling, which knows"
        right, case = written_out(x, W, b, A, B, layer.scaling), {**case, "self.scaling": layer.scaling}
        expect(layer(x), right, case, {slip: written_out(x, W, b, A, B, alpha / r)}, "y")


@EXERCISE.property("any leading dimensions, (in,), (N, in), (batch, T, in)")
def leading_dimensions(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most)
        W, b, A, B, s = *layer.base_layer.parameters(), layer.lora_A, layer.lora_B, layer.scaling
        for lead in ((), (3,), (2, 3), (2, 1, 3), (0,)):
            x = draw.normal(*lead, layer.in_features)
            expect(layer(x), written_out(x, W, b, A, B, s), {"shape of x": tuple(x.shape)}, what="y")


class Bare(nn.Module):
    """A base layer that can be called, and no more, as one in 4 bits."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored = nn.ParameterList(linear.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.stored[0].T + self.stored[1]


@EXERCISE.property("around a base layer that is no nn.Linear and has no weight")
def any_base(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most)
        W, b, A, B, s = *layer.base_layer.parameters(), layer.lora_A, layer.lora_B, layer.scaling
        layer.base_layer = Bare(layer.base_layer)
        x, case = draw.normal(3, layer.in_features), {"base_layer": "has forward, in_features and out_features alone"}
        try:
            y = layer(x)
        except AttributeError as error:
            slip = "call the base layer, self.base_layer(x): in 4 bits it has no weight to multiply with"
            raise Wrong(str(error), case, slip) from None
        expect(y, written_out(x, W, b, A, B, s), case, what="y")


@EXERCISE.property("gradients of x, A and B as the formula has them")
def gradients(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most, r=draw.integer(3, most + 3))
        layer.scaling = 3 + draw.number(0.1, 0.9)
        x = draw.normal(3, layer.in_features).requires_grad_()
        W, b, s = *layer.base_layer.parameters(), layer.scaling
        inputs = {"A": layer.lora_A, "B": layer.lora_B, "x": x}
        weights = draw.normal(3, layer.out_features)  # of the sum that is differentiated
        expected = torch.autograd.grad(
            (written_out(x, W, b, layer.lora_A, layer.lora_B, s) * weights).sum(), [*inputs.values()]
        )
        case = {"in": layer.in_features, "out": layer.out_features, "r": layer.r}
        y = layer(x)
        require(y.requires_grad, "y has no gradient at all", case, CUT)
        found = torch.autograd.grad((y * weights).sum(), [*inputs.values()], allow_unused=True)
        none = [name for name, got in zip(inputs, found, strict=True) if got is None]
        slip = f"{none[0]} is detached on the way, or used under no_grad" if len(none) == 1 else CUT
        require(not none, f"no gradient reaches {' and '.join(none)}", case, slip)
        gx = expected[2]
        slips = {
            "the update's part of the gradient is missing: A gets x itself, not x.detach()": weights @ W,
            "W x has no part in the gradient: the base layer's output is detached": gx - weights @ W,
        }
        for name, got, wanted in zip(inputs, found, expected, strict=True):
            expect(got, wanted, case, slips if name == "x" else None, f"dL/d{name}")


CUT = "the update is cut off from the gradient: .detach(), .data, or computed under no_grad"


@EXERCISE.property("nothing of the size of W is made: A x first, then B of that", inside=True)
def thin(draw: Draw):
    N, d, out, r = 3, 17, 19, 2
    layer = assembled(draw, d, out, r)
    with torch.no_grad(), Results([*layer.parameters()]) as results:
        layer(draw.normal(N, d))
    largest = max(results.sizes, default=0)
    message = f"a new tensor of {largest} numbers was made, where A x has {N * r} and y {N * out}"
    case = {"N": N, "in": d, "out": out, "r": r}
    slip = "B @ A, or W + s·BA, is formed, as large as W: multiply x by A first, and what comes of it by B"
    require(largest < d * out, message, case, slip)


def assembled(draw: Draw, d: int, out: int, r: int):
    base = nn.Linear(d, out).double()
    for parameter in base.parameters():
        parameter.data = draw.normal(*parameter.shape)
    return assemble(draw, base, r, 5)
