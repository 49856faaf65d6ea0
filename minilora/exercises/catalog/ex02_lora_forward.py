"""Exercise 02: the forward pass of a LoRA layer."""

import torch
from torch import Tensor, nn

from minilora.exercises.checking import SIZES, Draw, Exercise, Wrong, expect, require
from minilora.exercises.layers import assemble, lora_layer, written_out

EXERCISE = Exercise(
    number=2,
    slug="lora_forward",
    title="The LoRA forward pass",
    targets=("lora:LoRALinear.forward",),
    difficulty=1,
    minutes=30,
    notebook="01_lora_from_scratch",
    section="2. The layer",
    explanation="""\
A linear layer computes y = W x + b. LoRA leaves W (out, in) and b alone and adds a second path beside them, which
squeezes x through a narrow waist of r numbers and widens it again:

    y = W x + b + s·B(A x)        A (r, in), B (out, r), s = lora_alpha / r

Nothing of size (out, in) is made: A x first, r numbers for each token, and then B of that. Inputs have any number of
leading dimensions, (in,), (N, in) or (batch, T, in); only the last one is multiplied.

`LoRALinear.forward` has the parts on the layer: `self.base_layer(x)` is W x + b, `self.scaling` is s, and
`self.factors()` gives A and B. Mostly these are `lora_A` and `lora_B`; after a start from W (PiSSA, exercise 10) they
have 2r rows and columns, and nothing else changes. The base layer may lack a bias, or be one in 4 bits, which has a
`forward` and no `weight`. Beside a base in half precision A and B are float32: cast what is multiplied to the dtype of
the base's output, which is that of y.

The layer has three states besides. Switched off (`enabled` is False) it gives the base layer's output. Merged, the
update lies in W already; a merged layer that is switched off uses `original_weight`, the W from before, and what is
merged is an `nn.Linear`. While training, dropout acts on the input of A and nowhere else, so that W x keeps all of x.
What dropout keeps it divides by 1 - p.

The layers of a model are of the subclass `FastLoRALinear`, which computes the same faster (exercise 18) and comes here
only when it is switched off or merged. `use("work")` gives them your forward throughout, until 18 is written too.""",
    hints=(
        "nn.Linear stores W as (out, in) and computes x @ W.T; F.linear(x, W) does that for any leading dimensions.",
        "The narrow path is F.linear(F.linear(x, A), B), times the scaling, which the layer has as self.scaling.",
        "If merged and not enabled, return F.linear(x, self.original_weight, self.base_layer.bias). y = "
        "self.base_layer(x). If merged or not enabled, return y. Otherwise y + self.scaling * B(A(dropout(x))), with "
        "A and B of self.factors(), F.dropout(x, self.lora_dropout, self.training), and .to(y.dtype) on all three.",
    ),
    question="Why does LoRA's dropout act on the input of A only, and not on the sum W x + s·B(A x)?",
    spoilers=("return self.base_layer(x) + self.scaling * F.linear(",),
)


@EXERCISE.property("y = W x + b + s·B(A x), with and without a bias")
def formula(draw: Draw):
    for most in SIZES:
        for bias in (True, False):
            layer = lora_layer(draw, most)
            layer.lora_alpha = layer.r + draw.integer(1, 9)
            layer.scaling = layer.lora_alpha / layer.r
            if not bias:
                layer.base_layer.bias = None
            x, s = draw.normal(draw.integer(1, most), layer.in_features), layer.scaling
            W, b, A, B = layer.base_layer.weight, layer.base_layer.bias, layer.lora_A, layer.lora_B
            case = {"x": x, "W": W, "bias": b, "A": A, "B": B, "scaling": s}
            slips = {
                "the update is not scaled: multiply B(A x) by the scaling": written_out(x, W, b, A, B, 1),
                "the scaling reaches W x as well; it belongs to the update alone": s * written_out(x, W, b, A, B, 1),
                "the bias is missing": written_out(x, W, None, A, B, s),
                "the bias is scaled with the update": written_out(x, W, b, A, B, s) + (0 if b is None else (s - 1) * b),
                "W x is missing: the update is added to the layer's output": s * x @ A.T @ B.T,
                "your update is r times too large: did you divide alpha by r?": written_out(x, W, b, A, B, s * layer.r),
            }
            expect(layer(x), written_out(x, W, b, A, B, s), case, slips, "y")


@EXERCISE.property("s is the layer's scaling, for r and lora_alpha of any size, and for rsLoRA")
def scaling(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most, r=draw.integer(2, most))
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


@EXERCISE.property("after a start from W, A and B are those of self.factors()")
def started_from_weight(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most)
        W, b, A, B, s = *layer.base_layer.parameters(), layer.lora_A, layer.lora_B, layer.scaling
        layer.start_A, layer.start_B = draw.normal(*A.shape), draw.normal(*B.shape)
        x, start = draw.normal(2, layer.in_features), s * torch.einsum("or,ri->oi", layer.start_B, layer.start_A)
        plain = written_out(x, W, b, A, B, s)
        slips = {
            "those are lora_A and lora_B; what they began as has to be taken off: self.factors()": plain,
            "the start is added; self.factors() takes it off": plain + x @ start.T,
            "that is the start alone, taken off": written_out(x, W, b, A, B, 0) - x @ start.T,
        }
        case = {"A": A, "B": B, "start_A": layer.start_A, "start_B": layer.start_B, "x": x}
        expect(layer(x), plain - x @ start.T, case, slips, "y")


@EXERCISE.property("in half precision and under autocast, y has the dtype of the base layer's output")
def half_precision(draw: Draw):
    wide, half = torch.float32, torch.bfloat16
    for of_base, of_x, autocast in ((half, half, False), (wide, wide, True), (wide, wide, False)):
        base = nn.Linear(draw.integer(2, 4), draw.integer(2, 4))
        for parameter in base.parameters():
            parameter.data = draw.normal(*parameter.shape).abs().to(of_base)
        layer = assemble(draw, base, 2, 3)  # positive numbers: nothing cancels, so all digits count
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.abs().to(wide), layer.lora_B.data.abs().to(wide)
        x = draw.normal(3, layer.in_features).abs().to(of_x)
        case = {"base_layer": of_base, "x": of_x, "A and B": wide, "autocast": autocast}
        with torch.autocast("cpu", half, enabled=autocast):
            wanted, found = base(x).dtype, layer(x)
        slip = "A and B widen the sum: cast A, B and their input to the dtype of the base layer's output"
        require(found.dtype == wanted, f"y: expected {wanted}, got {found.dtype}", case, slip)
        parts = [t.detach().double() for t in (*base.parameters(), layer.lora_A, layer.lora_B)]
        expect(found, written_out(x.double(), *parts, layer.scaling), case, what="y", tolerance=0.03)


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
        for layer.enabled, expected in ((True, s), (False, 0)):
            try:
                y = layer(x)
            except AttributeError as error:
                slip = "call the base layer, self.base_layer(x): in 4 bits it has no weight to multiply with"
                raise Wrong(str(error), case, slip) from None
            expect(y, written_out(x, W, b, A, B, expected), {**case, "enabled": layer.enabled}, what="y")


@EXERCISE.property("gradients of x, A and B as the formula has them")
def gradients(draw: Draw):
    for most in SIZES:
        layer = lora_layer(draw, most)
        x = draw.normal(3, layer.in_features).requires_grad_()
        inputs = {"x": x, "A": layer.lora_A, "B": layer.lora_B}
        W, b, s = *layer.base_layer.parameters(), layer.scaling
        weights = draw.normal(3, layer.out_features)  # of the sum that is differentiated
        expected = torch.autograd.grad(
            (written_out(x, W, b, *list(inputs.values())[1:], s) * weights).sum(), [*inputs.values()]
        )
        found = torch.autograd.grad((layer(x) * weights).sum(), [*inputs.values()], allow_unused=True)
        for name, got, wanted in zip(inputs, found, expected, strict=True):
            slip = "something on the way is detached, or computed under no_grad"
            require(got is not None, f"no gradient reaches {name}", {"in": layer.in_features, "r": layer.r}, slip)
            expect(got, wanted, {"in": layer.in_features, "out": layer.out_features, "r": layer.r}, what=f"dL/d{name}")


@EXERCISE.property("switched off it is the base layer, merged or not")
def switched_off(draw: Draw):
    for most, bias in [(most, bias) for most in SIZES for bias in (True, False)]:
        layer = lora_layer(draw, most)
        if not bias:
            layer.base_layer.bias = None
        x, W, b = draw.normal(2, layer.in_features), layer.base_layer.weight, layer.base_layer.bias
        original, update = W.detach().clone(), layer.scaling * layer.lora_B @ layer.lora_A
        base = written_out(x, original, b, layer.lora_A, layer.lora_B, 0)
        layer.enabled = False
        expect(layer(x), base, {"x": x, "enabled": False}, what="y")
        layer.original_weight = original  # as merge() leaves it
        W.data += update.detach()
        slip = "while merged, base_layer's weight has the update in it; the W from before is in original_weight"
        wrong = written_out(x, W, b, layer.lora_A, layer.lora_B, 0)
        expect(layer(x), base, {"x": x, "enabled": False, "merged": True}, {slip: wrong}, "y")
        layer.enabled = True
        twice = written_out(x, W, b, layer.lora_A, layer.lora_B, layer.scaling)
        slip = "merged, the update lies in W already: you add it a second time"
        expect(layer(x), wrong, {"x": x, "enabled": True, "merged": True}, {slip: twice}, "y")


@EXERCISE.property("dropout on the input of A only, while training, and right on average")
def dropout(draw: Draw):
    layer = lora_layer(draw, 6, dropout=0.5)
    W, b, A, B, s = *layer.base_layer.parameters(), layer.lora_A, layer.lora_B, layer.scaling
    x = draw.normal(1, layer.in_features)
    case = {"lora_dropout": 0.5, "in": layer.in_features}
    y, right = layer.eval()(x), written_out(x, W, b, A, B, s)
    slip = "it also drops when the layer is in eval mode: F.dropout(x, self.lora_dropout, self.training)"
    many = layer(x.expand(100, -1)).detach()
    same = bool(((many - many[0]).abs() <= 1e-9 * many.abs().max()).all())  # rows of a product may round differently
    require(same, "expected the same output each time in eval mode", {**case, "mode": "eval"}, slip)
    expect(y, right, {**case, "mode": "eval"}, what="y")
    with torch.no_grad():
        ys = layer.train()(x.expand(20000, -1))  # the same token, dropped 20,000 times
    slip = "nothing is dropped while training: F.dropout(x, self.lora_dropout, self.training) is the input of A"
    require(len(ys.unique(dim=0)) > 1, "expected different outputs for the same x while training", case, slip)
    # Whatever is dropped of x, y - (W x + b) stays s·B A of a vector with entries 0 or 2 x.
    possible = torch.cartesian_prod(*[torch.tensor([0.0, 2.0], dtype=x.dtype)] * layer.in_features).view(
        -1, layer.in_features
    )
    outputs = written_out(x, W, b, A, B, 0) + s * (possible * x) @ A.T @ B.T

    def far_from(outputs: Tensor) -> float:
        """The distance of the y that is farthest from all of these, relative to the largest."""
        return ((ys.unique(dim=0)[:, None] - outputs).abs().amax(-1).amin(1).max() / outputs.abs().max()).item()

    halves = written_out(x, W, b, A, B, 0) + s * (possible / 2 * x) @ A.T @ B.T
    require(
        far_from(outputs) < 1e-9 or far_from(halves) > 1e-9,
        "expected what is kept of x to be doubled for p = 0.5, so that the average stays",
        case,
        "what is kept is not divided by 1 - p; F.dropout does both",
    )
    require(
        far_from(outputs) < 1e-9,
        "expected W x + b + s·B(A d) with d an x some of whose entries are 0 and the others doubled",
        case,
        "dropout acts on the sum, on A x or on the input of W as well; it belongs on the input of A alone",
    )
    mean, spread = ys.mean(0), ys.std(0) / len(ys) ** 0.5
    off = ((mean - written_out(x, W, b, A, B, s)[0]).abs() / spread.clamp(min=1e-9)).max().item()
    require(
        off < 6,
        f"expected the average of many passes to be the output without dropout; it is {off:.0f} standard errors off",
        case,
    )
