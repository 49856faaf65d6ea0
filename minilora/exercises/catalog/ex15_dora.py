"""Exercise 15: DoRA, a magnitude and a direction for each row of the weight."""

from unittest.mock import patch

import torch
from torch import Tensor, nn

from minilora.adapters.dora import DoRALinear
from minilora.exercises.checking import SIZES, Draw, Exercise, expect, require
from minilora.exercises.layers import assemble
from minilora.lora import LoRALinear

EXERCISE = Exercise(
    number=15,
    slug="dora",
    title="DoRA: magnitude and direction",
    targets=tuple(f"adapters.dora:DoRALinear.{name}" for name in ("__init__", "norms", "forward", "delta_weight")),
    difficulty=3,
    minutes=50,
    notebook="04_variants",
    section="2. The code of each",
    explanation="""\
DoRA (Liu et al. 2024) takes each row of the weight apart: a length, m, and a direction. A and B turn the rows, and how
long a row is m alone decides:

    V = W + s·BA        y = m ⊙ (V x) / ‖V‖ + b        W, V (out, in)    m, ‖V‖ (out,), by row    g = m / ‖V‖

In backward ‖V‖ counts as a constant (section 4.3 of the paper): no gradient goes through it.

- `__init__`: what LoRALinear does, and the parameter `lora_magnitude_vector`, the row norms of W, in A's dtype.
- `norms`: ‖V‖, in A's dtype. Making V is right; cheaper is ‖W‖² + 2s ⟨W, BA⟩ + s² ‖BA‖², row by row.
- `forward`: y for any leading dimensions. Switched off or merged it is LoRALinear's forward. With dropout, while
  training, only what differs from the base sees the dropped input x_d, the same in both places:
  y = W x + b + (g - 1) ⊙ (W x_d) + g ⊙ s·BA x_d.
- `delta_weight`: what a merge adds to W: g ⊙ V - W.

Take W from `float_weight()`: wide enough for a half-precision base, and the W from before while merged. Take A and B
from `self.factors()`: after a start from W, as PiSSA's, they are more than `lora_A` and `lora_B`, and the formulas are
the same. Keep nothing of W: `quantize_model` may round it later, and ‖W‖ with it. Plain autograd will do: you need
neither `FormedDirection` nor `LowRankTerm`.""",
    hints=(
        "W is (out, in), so the norm of a row is a sum over dim 1. ‖V‖ as a constant: compute it under torch.no_grad, "
        "or detach it.",
        "(V x) is base_layer(x) without its bias, plus s·B(A x). Multiply by g = m / ‖V‖ first, add the bias last. In "
        "norms, ⟨W, BA⟩ by row is ((W @ A.T) * B).sum(1), and ‖BA‖² is ((B @ (A @ A.T)) * B).sum(1).",
        "__init__: super().__init__(all five), then nn.Parameter(self.float_weight().norm(dim=1)). norms: (W + s * B @ "
        "A).norm(dim=1). forward: g * (self.base_layer(x) - b + s * F.linear(F.linear(x, A), B)) + b; with dropout, "
        "d = F.dropout(x, p) once, and the formula. delta_weight: g[:, None] * (W + s * B @ A) - W.",
    ),
    question="Were ‖V‖ not a constant in backward, the gradient of a row of V would have no part along that row. Why, "
    "and what is saved by leaving this out?",
    answer="The output depends on the direction of a row of V alone, since V/‖V‖ stays when the row is made longer. "
    "So moving along the row changes nothing, and a gradient has no part in a direction that changes nothing: it is "
    "projected onto what is perpendicular to the row. With ‖V‖ as a constant this projection is left out: backward "
    "needs no graph through the norm, and neither the products that lead there nor the (out, in) tensors that would "
    "wait for it.",
)


def stand_in(self, base_layer, r, lora_alpha, lora_dropout=0.0, use_rslora=False):
    """LoRALinear.__init__, which is another exercise: what DoRALinear's calls must not depend on it."""
    layer = assemble(Draw(0), base_layer, r, lora_alpha, lora_dropout, DoRALinear)
    layer.scaling = lora_alpha / r**0.5 if use_rslora else lora_alpha / r
    wide = torch.promote_types(base_layer.weight.dtype, torch.float32)
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.to(wide), torch.zeros_like(layer.lora_B, dtype=wide)
    self.__dict__.update(vars(layer))


EXERCISE.beneath["lora:LoRALinear.__init__"] = stand_in


def make(base: nn.Linear, r: int, lora_alpha: float, lora_dropout=0.0, use_rslora=False) -> DoRALinear:
    """DoRALinear(...), on that stand-in, wherever it is computed."""
    with patch.object(LoRALinear, "__init__", stand_in):
        return DoRALinear(base, r, lora_alpha, lora_dropout, use_rslora)


def base_layer(draw: Draw, most: int, bias=True, dtype=torch.float64) -> nn.Linear:
    low = 2 if dtype == torch.float64 else most  # short rows would need more digits
    base = nn.Linear(draw.integer(low, most), draw.integer(low, most), bias=bias)
    for parameter in base.parameters():
        parameter.data = draw.normal(*parameter.shape)
    return base.to(dtype)


def dora_layer(draw: Draw, most: int, bias=True, dtype=torch.float64, dropout=0.0) -> DoRALinear:
    """As if trained: random A and B, and magnitudes that are not the norms any more."""
    base, r = base_layer(draw, most, bias, dtype), draw.integer(2, most)
    alpha = r + draw.choice((-1, 1, 2))  # s is not 1, and not far from it
    layer = make(base, r, alpha, dropout)
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.data = draw.normal(*parameter.shape, dtype=parameter.dtype)
    m = torch.stack([torch.tensor(draw.number(0.3, 3)) for _ in range(base.out_features)])
    layer.lora_magnitude_vector = nn.Parameter(m.to(layer.lora_A.dtype))
    return layer


def parts(layer: DoRALinear):
    """W, V, m as numbers without a history, in A's dtype, and what is shown of them."""
    W = layer.base_layer.weight.detach().clone().to(layer.lora_A.dtype)
    A, B, m = layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_magnitude_vector.detach().clone()
    V = W + layer.scaling * torch.einsum("or,ri->oi", B, A)
    return W, V, m, {"W": W, "s·BA": V - W, "s": layer.scaling, "m": m}


def lengths(matrix: Tensor, dim: int = 1) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=dim)


IN_PLACE = "W was changed in place: float_weight() may be the base's weight itself, so make a new tensor"
MERGED = "while merged, base_layer's weight has the update in it; float_weight() gives the W from before"
COLUMNS = "that is the norm of each column; W is (out, in), and the magnitude is of a row: sum over dim 1"


@EXERCISE.property("__init__: a parameter m (out,), the row norms of W, beside all that LoRALinear has")
def magnitude(draw: Draw):
    for most in SIZES:
        base, r, alpha = base_layer(draw, most), draw.integer(2, most), draw.integer(1, 20)
        W, rslora, dropout = base.weight.detach().clone(), most > 2, draw.number(0.1, 0.9)
        layer = make(base, r, alpha, dropout, rslora)
        m, case = getattr(layer, "lora_magnitude_vector", None), {"W": W}
        slips = {
            COLUMNS: lengths(W, 0),
            "m starts at one; as the row norms of W it makes the layer start as its base": torch.ones(len(W)),
            "those are squares: the root is missing": W.square().sum(1),
            "that is one norm of the whole matrix; m has one for each row": W.square().sum().sqrt().expand(len(W)),
        }
        slip = "m is trained beside A and B: wrap it in nn.Parameter, and it must require a gradient"
        require(isinstance(m, Tensor), "the layer has no tensor lora_magnitude_vector", case)
        expect(m, lengths(W), case, slips, "lora_magnitude_vector")
        require(isinstance(m, nn.Parameter) and m.requires_grad, "lora_magnitude_vector is not trained", case, slip)
        given = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora}
        slip = "pass all five arguments on to super().__init__, use_rslora too"
        expect(layer.scaling, alpha / (r**0.5 if rslora else r), given, {slip: alpha / r}, "scaling")
        expect(layer.lora_dropout, dropout, given, {slip: 0.0}, "lora_dropout")
    base = base_layer(draw, 12, dtype=torch.bfloat16)
    m, W, case = make(base, 2, 2).lora_magnitude_vector, base.weight.detach(), {"W is of": torch.bfloat16}
    slip = "W is in half precision and the norms with it; float_weight() gives W in A's dtype"
    expect(m.dtype, torch.float32, case, {slip: torch.bfloat16}, "the dtype of lora_magnitude_vector")
    expect(m, lengths(W.float()), case, {slip: lengths(W).float()}, "lora_magnitude_vector", 1e-5)


@EXERCISE.property("norms: ‖W + s·BA‖ of each row, (out,), in A's dtype")
def row_norms(draw: Draw):
    for most in SIZES:
        layer = dora_layer(draw, most)
        W, V, _, case = parts(layer)
        s, of_W, mixed, of_BA = layer.scaling, W.square().sum(1), (W * (V - W)).sum(1), (V - W).square().sum(1)
        slips = {
            COLUMNS: lengths(V, 0),
            "that is the norm of W alone; V = W + s·BA is what is divided by its length": lengths(W),
            "the scaling is missing: V = W + s·BA": lengths(W + (V - W) / s),
            "those are squares: the root is missing": V.square().sum(1),
            "the term in the middle is missing: ‖W + s·BA‖² has 2s ⟨W, BA⟩ in it": (of_W + of_BA).sqrt(),
            "⟨W, BA⟩ counts twice: (a + b)² = a² + 2ab + b²": (of_W + mixed + of_BA).sqrt(),
            "‖s·BA‖² = s² ‖BA‖²: square the scaling too": (of_W + 2 * mixed + of_BA / s).clamp(min=0).sqrt(),
        }
        expect(layer.norms(), lengths(V), case, slips, "norms()")
    layer = dora_layer(draw, 12, dtype=torch.bfloat16)
    found, case = layer.norms(), {"W is of": torch.bfloat16, "A and B are of": torch.float32}
    expect(found.dtype, torch.float32, case, what="the dtype of norms()")
    slip = "part of it was computed in half precision; float_weight() gives W in A's dtype"
    require((found - lengths(parts(layer)[1])).abs().max().item() < 1e-4, "norms() is too coarse", case, slip)


@EXERCISE.property("norms: called again, while merged, and after W has changed")
def norms_again(draw: Draw):
    for most in SIZES:
        layer = dora_layer(draw, most)
        W, V, m, case = parts(layer)
        layer.norms()
        grown = (2 * V.square().sum(1) - W.square().sum(1)).clamp(min=0).sqrt()
        slips = {IN_PLACE: lengths(2 * V - W), "‖W‖² was changed in place: make a new tensor": grown}
        expect(layer.norms(), lengths(V), case, slips, "norms(), called again")
        layer.original_weight = W.clone()  # as merge() leaves it
        layer.base_layer.weight.data += V - W
        expect(layer.norms(), lengths(V), {**case, "merged": True}, {MERGED: lengths(2 * V - W)}, "norms()")
        layer.base_layer.weight.data, layer.original_weight = draw.normal(*W.shape), None
        other, V, _, case = parts(layer)
        stale = (lengths(V).square() - lengths(other).square() + lengths(W).square()).clamp(min=0).sqrt()
        slip = "your ‖W‖² is that of the old W: take it anew from float_weight()"
        expect(layer.norms(), lengths(V), {**case, "W before": W}, {slip: stale}, "norms()")


@EXERCISE.property("norms, forward, delta_weight: after a start from W, A and B are those of factors()")
def started_from_weight(draw: Draw):
    for most in SIZES:
        layer = dora_layer(draw, most)
        W, whole, m, _ = parts(layer)
        layer.start_A, layer.start_B = draw.normal(*layer.lora_A.shape), draw.normal(*layer.lora_B.shape)
        start = layer.scaling * torch.einsum("or,ri->oi", layer.start_B, layer.start_A)
        V, b, x = whole - start, layer.base_layer.bias.detach(), draw.normal(2, layer.in_features)
        case = {"W": W, "s·BA": whole - W, "s·B₀A₀": start, "m": m}
        slip = "those are lora_A and lora_B; what they began as has to be taken off: self.factors()"
        expect(layer.norms(), lengths(V), case, {slip: lengths(whole)}, "norms()")
        g, case["x"] = m / lengths(V), x
        expect(layer(x), g * (x @ V.T) + b, case, {slip: g * (x @ whole.T) + b}, "y")
        wrong = g[:, None] * whole - W
        expect(layer.delta_weight(), g[:, None] * V - W, case, {slip: wrong}, "delta_weight()")


@EXERCISE.property("forward: y = m ⊙ (V x) / ‖V‖ + b, with any leading dimensions, with and without a bias")
def formula(draw: Draw):
    for most in SIZES:
        for lead, bias in (((1,), True), ((2,), False), ((), True), ((2, 3, 2), True), ((0,), True)):
            layer = dora_layer(draw, most, bias)
            W, V, m, case = parts(layer)
            x, norm = draw.normal(*lead, layer.in_features), lengths(V)
            b = layer.base_layer.bias.detach() if bias else torch.zeros(1).double()
            before, g, y = x.clone(), m / norm, x @ V.T
            slips = {
                "the bias is scaled with the rest; it is added after the magnitude": g * (y + b),
                "the bias is missing": g * y,
                "you divide by the norm of W alone; divide by that of W + s·BA": m / lengths(W) * y + b,
                "the length of V's rows is not taken away: divide by norms()": m * y + b,
                "the magnitude is missing: multiply by m": y / norm + b,
                "only W x gets the magnitude; s·BA x is part of V x": g * (x @ W.T) + x @ (V - W).T + b,
                "only the update gets the magnitude; W x is part of V x": x @ W.T + g * (x @ (V - W).T) + b,
                "the update is not scaled: V = W + s·BA": g * (x @ (W + (V - W) / layer.scaling).T) + b,
                "that is plain LoRA: m and the norms are missing": y + b,
            }
            case = {"shape of x": tuple(x.shape), **case, "b": b if bias else None}
            expect(layer(x), g * y + b, case, slips, "y")
            require(torch.equal(x, before), "forward changed x in place", case)


def weighted(layer: DoRALinear, x: Tensor, weights: Tensor, constant: bool) -> Tensor:
    """Σ weights ⊙ m ⊙ (V x) / ‖V‖, with or without a gradient through the norm."""
    V = layer.base_layer.weight + layer.scaling * torch.einsum("or,ri->oi", layer.lora_B, layer.lora_A)
    norm = lengths(V.detach() if constant else V)
    return (weights * layer.lora_magnitude_vector * (x @ V.T) / norm).sum()


@EXERCISE.property("forward: gradients of x, A, B and m, the norm being a constant")
def gradients(draw: Draw):
    for most in SIZES:
        for tokens in (2, 2 * most):  # both ways in which a layer may compute
            layer = dora_layer(draw, most)
            x = draw.normal(tokens, layer.in_features).requires_grad_()
            weights = draw.normal(tokens, layer.out_features)  # of the sum that is differentiated
            leaves = {"x": x, "A": layer.lora_A, "B": layer.lora_B, "m": layer.lora_magnitude_vector}
            expected, through = (
                torch.autograd.grad(weighted(layer, x, weights, constant), [*leaves.values()])
                for constant in (True, False)
            )
            found = torch.autograd.grad((layer(x) * weights).sum(), [*leaves.values()], allow_unused=True)
            case = {"in": layer.in_features, "out": layer.out_features, "r": layer.r, "tokens": tokens}
            constant = "the gradient goes through the norm; in backward ‖V‖ is a constant: detach it"
            for name, got, right, wrong in zip(leaves, found, expected, through, strict=True):
                slip = "something on the way is detached, or computed under no_grad, that should not be"
                require(got is not None, f"no gradient reaches {name}", case, slip)
                expect(got, right, case, {constant: wrong}, f"dL/d{name}")


@EXERCISE.property("forward: with dropout W x + b + (g - 1) ⊙ (W x_d) + g ⊙ s·BA x_d, while training")
def dropout(draw: Draw):
    p, layer = 0.25, dora_layer(draw, 4, dropout=0.25)
    W, V, m, _ = parts(layer)
    x, b, g = draw.normal(1, layer.in_features), layer.base_layer.bias.detach(), m / lengths(V)
    case, plain = {"lora_dropout": p, "in": layer.in_features}, x @ W.T + b
    expect(layer.eval()(x), g * (x @ V.T) + b, {**case, "mode": "eval"}, what="y")
    with torch.no_grad():
        ys = layer.train()(x.expand(4000, -1))  # the same token, dropped 4,000 times
    different = ys.unique(dim=0)
    slip = "nothing is dropped while training: F.dropout(x, self.lora_dropout, self.training) gives x_d"
    require(len(different) > 1, "expected different outputs for the same x while training", case, slip)
    # Each output must be that of some x_d, whose entries are 0 or x / (1 - p). `possible` has all of them.
    kept = torch.cartesian_prod(*[torch.tensor([0, 1 / (1 - p)], dtype=x.dtype)] * layer.in_features)
    possible = kept * x  # (2^in, in)
    onto_W, onto_update = possible @ W.T, possible @ (V - W).T  # (2^in, out) each
    pairs = ((g - 1) * onto_W)[:, None] + (g * onto_update)[None]  # two masks, drawn apart
    slips = {
        "": plain + (g - 1) * onto_W + g * onto_update,
        "all of x is dropped; W x + b keeps the whole x": g * (onto_W + onto_update) + b,
        "only A's input is dropped; the (g - 1) ⊙ W x_d is of the dropped x too": g * (x @ W.T + onto_update) + b,
        "W and A see different x_d; draw it once": plain + pairs.flatten(0, 1),
        "the bias gets (g - 1) as well; take it off W x_d + b first": plain + (g - 1) * (onto_W + b) + g * onto_update,
        "what is kept is not divided by 1 - p": plain + ((g - 1) * onto_W + g * onto_update) * (1 - p),
    }
    far = [(different[:, None] - outputs).abs().amax(-1).amin(1).max().item() for outputs in slips.values()]
    near = [distance < 1e-9 * slips[""].abs().max().item() for distance in far]
    recognised = next((slip for slip, fits in zip(slips, near, strict=True) if fits), "")
    message = "expected W x + b + (g - 1) ⊙ (W x_d) + g ⊙ s·BA x_d for an x_d with entries 0 or x / (1 - p)"
    require(near[0], message, case, recognised)
    spread = (ys.std(0) / len(ys) ** 0.5).clamp(min=1e-9)
    off = ((ys.mean(0) - g * (x @ V.T)[0] - b) / spread).abs().max().item()
    require(off < 6, f"on average y should be that without dropout; it is {off:.0f} standard errors off", case)


@EXERCISE.property("forward: switched off or merged it is the base layer")
def switched_off(draw: Draw):
    for most in SIZES:
        layer = dora_layer(draw, most)
        W, V, m, case = parts(layer)
        x, b = draw.normal(2, layer.in_features), layer.base_layer.bias.detach()
        whole = V * (m / lengths(V))[:, None]
        case["x"], off, on = x, x @ W.T + b, x @ whole.T + b
        layer.enabled = False
        slip = "the layer is switched off: super().forward(x) has the base's output then"
        expect(layer(x), off, {"enabled": False, **case}, {slip: on}, "y")
        layer.original_weight = W.clone()  # as merge() leaves it
        layer.base_layer.weight.data = whole
        slip = "while merged, base_layer's weight has the update in it; super().forward(x) knows the W from before"
        expect(layer(x), off, {"enabled": False, "merged": True, **case}, {slip: on}, "y")
        layer.enabled = True
        again = (m / lengths(V)) * (x @ (whole + V - W).T) + b
        slip = "merged, the update lies in W already: you add it a second time"
        expect(layer(x), on, {"merged": True, **case}, {slip: again}, "y")


@EXERCISE.property("delta_weight: g ⊙ (W + s·BA) - W, in float32 at least, merged or not")
def delta_weight(draw: Draw):
    for most in SIZES:
        layer = dora_layer(draw, most)
        W, V, m, case = parts(layer)
        g = (m / lengths(V))[:, None]
        slips = {
            "W is not subtracted: delta_weight() is what is added to W": g * V,
            "that is plain LoRA's ΔW, without the magnitude": V - W,
            "only s·BA gets the magnitude; W's own rows change their length too": g * (V - W),
            "the length of V's rows is not taken away: divide by norms()": m[:, None] * V - W,
            "you divide by the norm of W alone": (m / lengths(W))[:, None] * V - W,
            "that is (m / ‖V‖ - 1) W: s·BA is missing": g * W - W,
            "m / ‖V‖ belongs to the rows: make it (out, 1) first": (g.T if V.shape[0] == V.shape[1] else g) * V - W,
        }
        expect(layer.delta_weight(), g * V - W, case, slips, "delta_weight()")
        require(torch.equal(layer.base_layer.weight, W), "delta_weight() changed the base's weight", case, IN_PLACE)
        layer.original_weight = W.clone()  # as merge() leaves it
        layer.base_layer.weight.data += g * V - W
        wrong = g * (g * V + V - W) - g * V
        expect(layer.delta_weight(), g * V - W, {**case, "merged": True}, {MERGED: wrong}, "delta_weight()")
    layer = dora_layer(draw, 12, dtype=torch.bfloat16)
    W, V, m, _ = parts(layer)
    case = {"W is of": torch.bfloat16, "A and B are of": torch.float32}
    expect(layer.delta_weight().dtype, torch.float32, case, what="the dtype of delta_weight()")
    expect(layer.delta_weight(), (m / lengths(V))[:, None] * V - W, case, what="delta_weight()", tolerance=1e-4)
