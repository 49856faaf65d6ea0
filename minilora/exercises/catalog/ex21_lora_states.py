"""Exercise 21: the same forward pass with all the states of the layer."""

import torch
from torch import Tensor, nn

from minilora.exercises.checking import SIZES, Draw, Exercise, expect, require
from minilora.exercises.layers import assemble, lora_layer, written_out

EXERCISE = Exercise(
    number=21,
    slug="lora_states",
    title="Switched off, merged, dropping: the layer's states",
    targets=("lora:LoRALinear.forward",),
    again=2,
    difficulty=2,
    minutes=25,
    notebook="01_lora_from_scratch",
    section="5. Merging",
    explanation="""\
Exercise 02 was the formula, y = W x + b + s·B(A x). Now the same function again, from its first line, for a layer that
is used: begin with your own lines of exercise 02. (Where both are written, this one counts.)

Switched off (`enabled` is False) the layer gives the base layer's output.

Merged (`self.merged`), the update lies in the base layer's weight already, and the base layer is an `nn.Linear`. A
merged layer that is switched off uses `original_weight`, the W from before.

While training, dropout acts on the input of A and nowhere else, with probability `lora_dropout`, so that W x keeps all
of x. What dropout keeps it divides by 1 - p.

A and B are those that `self.factors()` gives. Mostly these are `lora_A` and `lora_B`; after a start from W (PiSSA,
exercise 10) they have 2r rows and columns, because what they began as is subtracted.

Beside a base in half precision A and B are float32: cast what is multiplied to the dtype of the base layer's output,
which is that of y, also under autocast.

The layers of a model are of the subclass `FastLoRALinear`, which computes the same faster (exercise 18) and comes here
only when it is switched off or merged. `use("work")` gives them your forward throughout, until 18 is written too.""",
    hints=(
        "First ask which state it is; two of them never come to A and B. Of a merged layer that is switched off not "
        "even self.base_layer(x) is right.",
        "F.dropout(x, self.lora_dropout, self.training) drops, divides, and does nothing in eval mode. The casts: "
        "y = self.base_layer(x) first, then .to(y.dtype) on A, B and the dropped x.",
        "If merged and not enabled, return F.linear(x, self.original_weight, self.base_layer.bias). y = "
        "self.base_layer(x). If merged or not enabled, return y. Otherwise y + self.scaling * B(A(dropout(x))), with "
        "A and B of self.factors(), and .to(y.dtype) on all three.",
    ),
    question="Why does LoRA's dropout act on the input of A only, and not on the sum W x + s·B(A x)?",
    answer="W x is what the frozen layer has to say, and the model was trained with all of it. Dropping parts of "
    "the sum would damage the base, whose weights cannot adapt to that: the loss would rise for a reason that "
    "training A and B cannot remove. Dropout is there to keep the part that is trained from leaning on single "
    "features, and that part sees x through A alone. On the average over masks the output is the same, for B(A x) is "
    "linear in x.",
)


@EXERCISE.property("training or not, with nothing to drop: y = W x + b + s·B(A x)")
def formula(draw: Draw):
    for most in SIZES:
        for training in (True, False):
            layer = lora_layer(draw, most, r=draw.integer(3, most + 3)).train(training)
            layer.scaling = 3 + draw.number(0.1, 0.9)
            W, b, A, B, s = *layer.base_layer.parameters(), layer.lora_A, layer.lora_B, layer.scaling
            x, case = draw.normal(2, 1, layer.in_features), {"training": training, "r": layer.r, "scaling": s}
            right, plain = written_out(x, W, b, A, B, s), written_out(x, W, b, A, B, 0)
            slips = {
                "that is the base layer alone": plain,
                "the update is not scaled": written_out(x, W, b, A, B, 1),
                "W x + b is missing": right - plain,
            }
            expect(layer(x), right, case, slips, "y")


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
