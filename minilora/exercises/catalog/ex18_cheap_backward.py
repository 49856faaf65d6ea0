"""Exercise 18: LoRA's cheap backward by hand."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.exercises.checking import SIZES, Draw, Exercise, Wrong, expect, require
from minilora.exercises.layers import Results, written_out
from minilora.fast import FormedWeight, LowRankTerm

EXERCISE = Exercise(
    number=18,
    slug="cheap_backward",
    title="LoRA's cheap backward, by hand",
    targets=(
        "fast:FormedWeight.forward",
        "fast:FormedWeight.backward",
        "fast:LowRankTerm.forward",
        "fast:LowRankTerm.backward",
    ),
    also=("adapters.dora:FormedDirection.forward", "adapters.dora:FormedDirection.backward"),
    difficulty=3,
    minutes=75,
    notebook="02_full_vs_lora",
    section="3. Speed",
    explanation="""\
A `torch.autograd.Function` has two halves. `forward(ctx, ...)` computes y and notes on ctx what will be needed later.
`backward(ctx, g)` gets g = dL/dy and returns one gradient for each argument behind ctx, in their order; None
where there is none. By hand, both can be cheaper than what autograd records. With the tokens as rows, x (N, in) and
g (N, out):

    FormedWeight    y = x Mᵀ + b, M = W + s·BA        gx = g M      gA = s·Bᵀ gᵀ x      gB = s·gᵀ x Aᵀ
    LowRankTerm     y = base + s·(m ⊙ x) Aᵀ Bᵀ        m: a dropout mask of x's shape, or None

- W and b are frozen: None. gᵀ x, the product as large as W's own gradient, is never made; nor is B A in LowRankTerm. A
  thin matrix comes first. Where x needs no gradient (`ctx.needs_input_grad`), FormedWeight spares itself gx.
- Kept for backward are x, W, A, B, the mask and A x. Neither M nor m ⊙ x is kept: they are made again. Where A is
  frozen, LowRankTerm needs x no longer, and does not keep it.
- Here W is a tensor of floats. The package's own takes one in 4 bits as well: its `formed_weight(W, A, B, s)` gives M.
- LowRankTerm computes in base's dtype, whatever x, A and B have. s has 1 / (1 - p) for the dropout in it already.
- Any leading dimensions, (in,), (N, in), (batch, T, in); x and g may be views that are not contiguous. No argument is
  changed in place.""",
    hints=(
        "Work on rows: x.reshape(-1, x.shape[-1]) makes (N, in) of any leading dimensions. The gradient of a matrix "
        "has its shape, (r, in) for A and (out, r) for B, which leaves few ways to multiply.",
        "g B is (N, r), and gA = s·(g B)ᵀ x. x Aᵀ is (N, r), and gB = s·gᵀ (x Aᵀ). For LowRankTerm, d = m ⊙ x takes "
        "the place of x in both, and gx is m ⊙ (s·(g B) A).",
        "FormedWeight returns gx, None, None, gA, gB, None, with gx = g @ (W + s * B @ A) in g's own shape. "
        "LowRankTerm returns g, gx, gA, gB, None, None. Its forward saves `x if ctx.needs_input_grad[2] else None`, "
        "A x, A, B and the mask. Use .to(base.dtype) on d, A and B before multiplying, and in backward .to(g.dtype).",
    ),
    question="Of the three large products of full fine-tuning LoRA spares one. Why not gx = g M as well, although no "
    "weight of this layer needs it?",
    answer="gx is not for this layer's weight. It is the gradient of what the layer below computed, and without it "
    "no A and B below would learn anything. It can be left out in one place alone, the lowest layer with an adapter, "
    "below which nothing is trained; there `ctx.needs_input_grad[0]` is False. What LoRA spares is the product that "
    "is for W's own gradient.",
)

FEW = (
    "backward returns one gradient for each argument of forward behind ctx, in that order, and each has the shape of "
    "its argument; None where there is none"
)


def gradients(y: Tensor, inputs: dict[str, Tensor], g: Tensor) -> dict[str, Tensor | None]:
    total = (y * g).sum()  # so dL/dy = g; to hand g over as grad_outputs makes torch load sympy, which takes a second
    try:
        return dict(zip(inputs, torch.autograd.grad(total, [*inputs.values()], allow_unused=True), strict=True))
    except RuntimeError as error:
        if "returned an in" not in str(error):  # an invalid gradient, an incorrect number of gradients
            raise
        raise Wrong(str(error), {name: tuple(tensor.shape) for name, tensor in inputs.items()}, FEW) from None


def low_rank(base: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, mask: Tensor | None) -> Tensor:
    return base + s * torch.einsum("...i,ri,or->...o", x if mask is None else x * mask, A, B)


def numbers(draw: Draw, most: int, *lead: int) -> dict[str, Tensor]:
    """x, W, A, B and g; the smallest are square, so that a matrix the wrong way round shows in the numbers."""
    d, out, r = (most, most, most) if most == SIZES[0] else (draw.integer(2, most) for _ in range(3))
    shapes = {"x": (*lead, d), "W": (out, d), "A": (r, d), "B": (out, r), "g": (*lead, out)}
    return {name: draw.normal(*shape).requires_grad_(name in "xAB") for name, shape in shapes.items()}


def some(draw: Draw, x: Tensor) -> Tensor:
    """A mask that keeps something of x and drops something."""
    mask = draw.normal(*x.shape) > 0
    mask[..., 0], mask[..., 1] = True, False
    return mask


def thin_slips(name: str, wanted: dict[str, Tensor], s: float) -> dict[str, Tensor]:
    """What goes wrong with the gradients of A and B in both classes."""
    other = "B" if name == "A" else "A"
    return {
        f"the scaling is missing in g{name}: y has s·B(A x), so every gradient of A and B has the factor s": wanted[
            name
        ]
        / s,
        f"the scaling acts twice in g{name}": s * wanted[name],
        f"that is g{other}: gA and gB are swapped": wanted[other],
        f"g{name} is transposed: it has the shape of {name}": wanted[name].T,
    }


@EXERCISE.property("FormedWeight.forward: y = (W + s·BA) x + b, with and without a bias")
def formed_forward(draw: Draw):
    for most in SIZES:
        x, W, A, B, _ = numbers(draw, most, draw.integer(1, 2)).values()
        s, bias = draw.number(0.3, 3), draw.normal(len(W))
        for b in (None, bias):
            slips = {
                "the update is not scaled: M = W + s·BA": written_out(x, W, b, A, B, 1),
                "that is the frozen layer alone: s·BA is missing": written_out(x, W, b, A, B, 0),
                "the scaling reaches W as well": written_out(x, s * W, b, A, B, s),
                "the bias is missing": written_out(x, W, None, A, B, s),
            }
            if most == SIZES[0]:
                slips["W, and so M, is stored as (out, in): y = x @ M.T"] = written_out(x, W.T, b, B.T, A.T, s)
            case = {"x": x, "W": W, "bias": b, "A": A, "B": B, "scaling": s}
            expect(FormedWeight.apply(x, W, b, A, B, s), written_out(x, W, b, A, B, s), case, slips, "y")


@EXERCISE.property("FormedWeight.backward: the gradients of x, A and B are autograd's")
def formed_backward(draw: Draw):
    for most in SIZES:
        parts, s = numbers(draw, most, draw.integer(2, 3)), draw.number(0.3, 3)
        x, W, A, B, g = parts.values()
        inputs, case = {"x": x, "A": A, "B": B}, {**parts, "scaling": s}
        wanted = gradients(written_out(x, W, None, A, B, s), inputs, g)
        found = gradients(FormedWeight.apply(x, W, None, A, B, s), inputs, g)
        of_x = {
            "gx goes through W alone; y = (W + s·BA) x, so gx = g (W + s·BA)": g @ W,
            "the update is not scaled in gx": g @ W + g @ B @ A,
            "gx lacks W: that is the way through A and B alone": s * g @ B @ A,
        }
        if most == SIZES[0]:
            of_x["M stands the wrong way round: gx = g M, without .T"] = g @ (W.T + s * A.T @ B.T)
        for name in inputs:
            require(found[name] is not None, f"backward gives None for {name}", case, FEW)
            expect(found[name], wanted[name], case, of_x if name == "x" else thin_slips(name, wanted, s), f"g{name}")


@EXERCISE.property("LowRankTerm.forward: y = base + s·(m ⊙ x) Aᵀ Bᵀ, with and without a mask; base stays as it is")
def term_forward(draw: Draw):
    for most in SIZES:
        x, _, A, B, base = numbers(draw, most, draw.integer(1, 2)).values()
        s, before, own = draw.number(0.3, 3), base.clone(), x.detach().clone()
        for mask in (None, some(draw, x)):
            case = {"base": before, "x": x, "A": A, "B": B, "scaling": s, "mask": mask}
            expected = low_rank(before, x, A, B, s, mask)
            y = LowRankTerm.apply(base, x, A, B, s, mask)
            slip = "base is added to in place; it belongs to the caller, make a new tensor"
            require(torch.equal(base, before), "base was changed", case, slip)
            slip = "the mask acts on x in place; x belongs to the caller, make a new tensor"
            require(torch.equal(x, own), "x was changed", {**case, "x": own}, slip)
            slips = {
                "the mask is forgotten: A gets m ⊙ x": low_rank(base, x, A, B, s, None),
                "the term is not scaled": low_rank(base, x, A, B, 1, mask),
                "base is missing: the term is added to it": expected - base,
                "base is scaled as well": low_rank(s * base, x, A, B, s, mask),
                "the mask is the wrong way round: True keeps": low_rank(
                    base, x, A, B, s, None if mask is None else ~mask
                ),
            }
            expect(y, expected, case, slips, "y")


@EXERCISE.property("LowRankTerm.backward: the gradients of base, x, A and B are autograd's, with and without a mask")
def term_backward(draw: Draw):
    for most in SIZES:
        parts, s = numbers(draw, most, draw.integer(2, 3)), draw.number(0.3, 3)
        x, _, A, B, g = parts.values()
        base = draw.normal(*g.shape).requires_grad_()
        inputs = {"base": base, "x": x, "A": A, "B": B}
        for mask in (None, some(draw, x)):
            case = {"x": x, "A": A, "B": B, "scaling": s, "mask": mask, "g": g}
            wanted = gradients(low_rank(base, x, A, B, s, mask), inputs, g)
            whole = gradients(low_rank(base, x, A, B, s, None), inputs, g)
            found = gradients(LowRankTerm.apply(base, x, A, B, s, mask), inputs, g)
            of_base = {"base is not scaled in y, so its gradient is g itself": s * g}
            of_x = {
                "the mask is forgotten in gx: what it dropped had no part in y and gets 0": whole["x"],
                "the scaling is missing in gx": wanted["x"] / s,
                "the scaling acts twice in gx": s * wanted["x"],
            }
            for name in inputs:
                require(found[name] is not None, f"backward gives None for {name}", case, FEW)
                unmasked = {f"the mask is forgotten in g{name}: it was m ⊙ x that A saw": whole[name]}
                slips = {"base": of_base, "x": of_x}.get(name) or unmasked | thin_slips(name, wanted, s)
                expect(found[name], wanted[name], case, slips, f"g{name}")


@EXERCISE.property("both: any leading dimensions, and x and g that are not contiguous")
def leading_dimensions(draw: Draw):
    for lead in ((3,), (2, 3), (), (2, 1, 3)):
        for turned in (False, True):
            x, W, A, B, g = numbers(draw, 4, *lead).values()
            if turned:  # the same numbers in another order in memory
                x, g = (turn(turn(t.detach()).contiguous()) for t in (x, g))
            x, s, base, mask = x.requires_grad_(), draw.number(0.3, 3), draw.normal(*g.shape), some(draw, x)
            inputs = {"x": x, "A": A, "B": B}
            case = {"shape of x": tuple(x.shape), "contiguous": x.is_contiguous() and g.is_contiguous()}
            for kind, y, formula in (
                ("FormedWeight", FormedWeight.apply(x, W, None, A, B, s), written_out(x, W, None, A, B, s)),
                ("LowRankTerm", LowRankTerm.apply(base, x, A, B, s, mask), low_rank(base, x, A, B, s, mask)),
            ):
                expect(y, formula, case, what=f"{kind}: y")
                found, wanted = gradients(y, inputs, g), gradients(formula, inputs, g)
                for name in inputs:
                    expect(found[name], wanted[name], case, what=f"{kind}: g{name}")


def turn(t: Tensor) -> Tensor:
    return t.permute(*range(t.dim())[::-1])


@EXERCISE.property("LowRankTerm: computes in base's dtype, whatever x, A and B have")
def dtypes(draw: Draw):
    half, wide = torch.bfloat16, torch.float32
    for of_base, of_x, of_A in ((half, half, wide), (half, wide, wide), (wide, half, half)):
        x, _, A, B, g = (t.detach().abs() for t in numbers(draw, 4, 3).values())  # no cancelling: all digits count
        base, x, A, B, g = draw.normal(*g.shape).abs().to(of_base), x.to(of_x), A.to(of_A), B.to(of_A), g.to(of_base)
        inputs = {"x": x.requires_grad_(), "A": A.requires_grad_(), "B": B.requires_grad_()}
        for mask in (None, some(draw, x)):
            y = LowRankTerm.apply(base, x, A, B, 1.5, mask)
            case = {"base": of_base, "x": of_x, "A and B": of_A, "mask": mask is not None}
            slip = "A and B widen the result: take A.to(base.dtype) and B.to(base.dtype), and x as well"
            require(y.dtype == of_base, f"y: expected type {of_base}, got {y.dtype}", case, slip)
            exact = [t.detach().double().requires_grad_() for t in (x, A, B)]
            formula = low_rank(base.double(), *exact, 1.5, mask)
            expect(y, formula, case, what="y", tolerance=0.03)
            found = gradients(y, inputs, g)
            for name, wanted in gradients(formula, dict(zip(inputs, exact, strict=True)), g.double()).items():
                expect(found[name], wanted, case, what=f"g{name}", tolerance=0.03)


@EXERCISE.property("LowRankTerm: with A frozen the others have their gradients, and x is not kept", inside=True)
def frozen_A(draw: Draw):
    for most in SIZES[1:]:
        parts, s = numbers(draw, most, 3), draw.number(0.3, 3)
        x, _, A, B, g = parts.values()
        A, base, inputs = A.detach(), draw.normal(*g.shape).requires_grad_(), {"x": x, "B": B}
        for mask in (None, some(draw, x)):
            case = {"in": x.shape[1], "out": len(B), "r": len(A), "mask": mask is not None}
            y = LowRankTerm.apply(base, x, A, B, s, mask)
            keeps, found = held(y.grad_fn), gradients(y, inputs, g)
            wanted = gradients(low_rank(base, x, A, B, s, mask), inputs, g)
            for name in inputs:
                expect(found[name], wanted[name], case, what=f"A frozen: g{name}")
            slip = "x serves gA alone: save it only if ctx.needs_input_grad[2]; A x is enough for gB"
            require(all(address(t) != address(x) for t in keeps), "x is kept with A frozen", case, slip)


@EXERCISE.property("both: no more is multiplied than must be; LowRankTerm never forms BA", inside=True)
def cost(draw: Draw):
    N, d, out, r, s = 96, 64, 48, 2, 1.5
    x, W, A, B, g = (draw.normal(*shape) for shape in ((N, d), (out, d), (r, d), (out, r), (N, out)))
    base, A, B, case = (
        draw.normal(N, out),
        A.requires_grad_(),
        B.requires_grad_(),
        {"N": N, "in": d, "out": out, "r": r},
    )
    y = FormedWeight.apply(x, W, None, A, B, s)
    large = products(y, {"A": A, "B": B}, g) / (N * d * out)
    slip = "the product gᵀ x, or one with M, is made: multiply by the thin matrix first, (g B)ᵀ x and gᵀ (x Aᵀ)"
    slip += "; and gx only if ctx.needs_input_grad[0]"
    message = f"FormedWeight, x needs no gradient: {large:.2f} times N·in·out multiplications, where less than 0.2 do"
    require(large < 0.5, message, case, slip)
    x.requires_grad_()
    y = FormedWeight.apply(x, W, None, A, B, s)
    large = products(y, {"x": x, "A": A, "B": B}, g) / (N * d * out)
    slip = "a second large product beside gx: W is frozen and gᵀ x is not needed, for nothing"
    require(large < 1.5, f"FormedWeight: {large:.2f} times N·in·out multiplications, where 1.2 do", case, slip)
    few = draw.normal(3, d), draw.normal(3, out)
    with torch.no_grad(), Results([*few, A, B]) as results:
        LowRankTerm.apply(few[1], few[0], A, B, s, None)
    message = f"LowRankTerm.forward made a tensor of {max(results.sizes)} numbers, the size of W"
    slip = "B A is formed, as large as W; through r numbers a token it is far less: A x first, then B of that"
    require(max(results.sizes) < d * out, message, {**case, "N": 3}, slip)
    y = LowRankTerm.apply(base, x, A, B, s, None)
    large = products(y, {"x": x, "A": A, "B": B}, g) / (N * d * out)
    slip = "B A, or gᵀ x, is made; through r numbers a token it is far less: (g B) A, (g B)ᵀ x, gᵀ (x Aᵀ)"
    require(large < 0.5, f"LowRankTerm: {large:.2f} times N·in·out multiplications, where 0.2 do", case, slip)


def products(y: Tensor, inputs: dict[str, Tensor], g: Tensor) -> int:
    with Multiplications() as counter:
        gradients(y, inputs, g)
    return counter.count


class Multiplications(TorchDispatchMode):
    """Counts those of the matrix products that run inside."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm"):
            left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
            self.count += left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # otherwise torch loads its compiler first, for a second or more
        return False


@EXERCISE.property("both: neither W + s·BA nor the dropped x is kept for backward", inside=True)
def kept(draw: Draw):
    N, d, out, r, s = 7, 20, 24, 1, 1.5
    x, W, A, B, base = (draw.normal(*shape) for shape in ((N, d), (out, d), (r, d), (out, r), (N, out)))
    x, A, B, case = x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), {"N": N, "in": d, "out": out, "r": r}
    mask = some(draw, x)
    for kind, y, given in (
        ("FormedWeight", FormedWeight.apply(x, W, None, A, B, s), (x, W, A, B)),
        ("LowRankTerm without a mask", LowRankTerm.apply(base, x, A, B, s, None), (x, A, B)),
        ("LowRankTerm", LowRankTerm.apply(base, x, A, B, s, mask), (x, A, B, mask)),
    ):
        known = {address(t) for t in given}
        for t in held(y.grad_fn):
            slips = {
                d * out: "W + s·BA is kept: a second copy of every weight until backward. Form it again there",
                N * d: "m ⊙ x, or a copy of x, is kept: keep x and the mask, and multiply again in backward",
                N * out: "an array as large as the output is kept; no gradient needs one",
            }
            fine = address(t) in known or t.numel() <= r * (N + d + out)  # A x and the like are small
            require(fine, f"{kind} keeps a new tensor {tuple(t.shape)} for backward", case, slips.get(t.numel(), ""))


def address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def held(node) -> list[Tensor]:
    """The tensors that a Function's ctx holds, by save_for_backward or as attributes."""
    values = [*node.saved_tensors, *vars(node).values()]
    for value in values:  # grows on the way
        values += value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else ()
    return [value for value in values if isinstance(value, Tensor)]
