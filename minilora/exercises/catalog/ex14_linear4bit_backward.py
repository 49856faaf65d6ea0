"""Exercise 14: a linear layer on 4-bit codes, and its backward, which keeps no float weight."""

import torch
from torch import Tensor, nn

from minilora.exercises.checking import SIZES, Draw, Exercise, Wrong, difference, expect, require
from minilora.levels import LEVELS
from minilora.linear4bit import DequantizedLinear
from minilora.memory import MemoryMeter
from minilora.quant import QuantizedTensor, dequantize

EXERCISE = Exercise(
    number=14,
    slug="linear4bit_backward",
    title="A linear layer in 4 bits that keeps no float copy",
    targets=("linear4bit:DequantizedLinear.forward", "linear4bit:DequantizedLinear.backward"),
    difficulty=3,
    minutes=40,
    notebook="03_qlora",
    section="Where the arithmetic happens",
    explanation="""\
QLoRA computes nothing in 4 bits. W (out, in) is made from its codes, used and thrown away:

    y = x Wᵀ + b        W = dequantize(quantized, dtype of x), x (..., in), b (out,) or None, y (..., out)

Under plain autograd, F.linear keeps W for the gradient of x, so the float weights of all layers wait for backward, and
the 4 bits save nothing. A `torch.autograd.Function` decides itself what waits. `forward` gets a `ctx`, on which you
leave what backward needs: the QuantizedTensor, by reference. `backward` gets that ctx and g = dL/dy, (..., out), and
returns one value for each argument of forward:

    of x           g W, (..., in), with W made a second time
    of bias        g summed over all leading dimensions, (out,)
    of quantized   None: it is frozen

`ctx.needs_input_grad` says of each argument whether its gradient is wanted; return None where it is not, and make no W
for it. W has no gradient, so x is not needed in backward and should not wait either.

There may be any number of leading dimensions, none too, and g need not be contiguous. All is computed in x's dtype,
float64 or bfloat16 as well, and `quantized`, whose own dtype may be another, stays as it is.""",
    hints=(
        "What is wanted of x is dL/dx[i] = sum over o of g[o] W[o, i]: a plain product without a transpose. W is in "
        "neither argument of backward, but the codes can be turned into it again.",
        "forward: put quantized on ctx, as an attribute, then F.linear. Whatever else you put there or into "
        "save_for_backward waits. backward: g.reshape(-1, out).sum(0) sums over any leading dimensions, none as well.",
        "backward: the gradient of x is g @ dequantize(the quantized on ctx, g.dtype) if ctx.needs_input_grad[0], "
        "else None; that of the bias likewise with needs_input_grad[1]; the third value is None.",
    ),
    question="In full fine-tuning x has to wait for backward, here it need not. Which gradient makes the difference? "
    "And what does not keeping W cost?",
    answer="The gradient of W, gᵀ x, is the one that needs x; W is frozen, so nobody asks for it. Not keeping W "
    "costs making it from its codes a second time in backward: some time for each step, a lookup and a product for "
    "each weight, and no memory beyond one layer's W at a time.",
)

ROUGH = 1e-6  # where digits are not the point: float32 in place of float64 is told by the property on dtypes


class Stored(QuantizedTensor):
    """Scales as they are, whatever has been written for double quantization."""

    def absmax(self) -> Tensor:
        return self.scales


def drawn(draw: Draw, out: int, d: int, dtype=torch.float64) -> tuple[QuantizedTensor, Tensor]:
    """A weight (out, d) in fp4, from random codes and scales, and the same in float32."""
    n = out * d
    scales = 0.5 + torch.rand(-(-n // 16), generator=draw.generator)
    pairs = torch.randint(0, 256, (-(-n // 2),), generator=draw.generator, dtype=torch.uint8)
    codes = [half for byte in pairs.tolist() for half in divmod(byte, 16)][:n]
    W = LEVELS["fp4"][codes] * scales[torch.arange(n) // 16]
    return Stored(pairs, scales, "fp4", 16, (out, d), dtype), W.view(out, d)


def case_of(draw: Draw, most: int, lead: tuple[int, ...] = (3,), square: bool = False):
    """x, bias, quantized, W and a gradient g of y, in float64."""
    d = draw.integer(2, most)
    out = d if square else draw.integer(1, most)
    quantized, W = drawn(draw, out, d)
    return draw.normal(*lead, d), draw.normal(out), quantized, W.double(), draw.normal(*lead, out)


@EXERCISE.property("forward: y = x Wᵀ + b, with and without a bias")
def formula(draw: Draw):
    for square in (True, False):
        for most in SIZES:
            x, bias, quantized, W, _ = case_of(draw, most, square=square)
            for b in (bias, None):
                b_or_0 = 0 if b is None else b
                y = torch.einsum("ni,oi->no", x, W) + b_or_0
                slips = {
                    "the bias is missing": y - b_or_0,
                    "W is (out, in), so it must be transposed: F.linear(x, W)": x @ W + b_or_0 if square else y,
                }
                case = {"x": x, "W": W, "bias": b}
                expect(DequantizedLinear.apply(x, b, quantized), y, case, slips, "y", ROUGH)


@EXERCISE.property("backward: the gradient of x is g W, that of the bias the sum of g")
def gradients(draw: Draw):
    for square in (True, False):
        for most in SIZES:
            x, bias, quantized, W, g = case_of(draw, most, square=square)
            x.requires_grad_(), bias.requires_grad_()
            y = DequantizedLinear.apply(x, bias, quantized)
            gx, gb = torch.autograd.grad(y, (x, bias), g, allow_unused=True)
            case = {"g": g, "W": W}
            require(gx is not None, "expected a gradient of x, got None", case, "the first value returned is that of x")
            require(
                gb is not None, "expected a gradient of the bias, got None", case, "the bias may be trained as well"
            )
            right = torch.einsum("no,oi->ni", g, W)
            slips = {
                "W is transposed: dL/dx[i] sums g[o] W[o, i] over o, which is g W": g @ W.T if square else right,
                "that is dL/dy; it has to go through W": g if square else right,
            }
            expect(gx, right, case, slips, "dL/dx", ROUGH)
            slips = {
                "you take the mean; every token adds to the same bias, so the gradients are summed": g.mean(0),
                "only the first token is counted; the gradients of all are summed": g[0],
                "that is 1 for each token, as if y were summed; g says how much each counts": len(g) + 0 * g[0],
            }
            expect(gb, g.sum(0), case, slips, "dL/db", ROUGH)


@EXERCISE.property("any leading dimensions, (in,), (N, in), (batch, T, in), and a g that is not contiguous")
def leading_dimensions(draw: Draw):
    for most in SIZES:
        for lead in ((), (3,), (2, 3), (2, 1, 3), (0,)):
            x, bias, quantized, W, _ = case_of(draw, most, lead)
            g = draw.normal(len(bias), *reversed(lead))
            g = g.permute(*reversed(range(g.dim())))  # (*lead, out)
            x.requires_grad_(), bias.requires_grad_()
            case = {"shape of x": tuple(x.shape), "shape of W": tuple(W.shape)}
            y = DequantizedLinear.apply(x, bias, quantized)
            expect(y, torch.einsum("...i,oi->...o", x, W) + bias, case, what="y", tolerance=ROUGH)
            gx, gb = torch.autograd.grad(y, (x, bias), g, allow_unused=True)
            none = [name for name, found in (("x", gx), ("bias", gb)) if found is None]
            require(not none, f"no gradient reaches {' and '.join(none)}", case)
            expect(gx, torch.einsum("...o,oi->...i", g, W), case, what="dL/dx", tolerance=ROUGH)
            expect(gb, torch.einsum("...o->o", g), case, what="dL/db", tolerance=ROUGH)


@EXERCISE.property(
    "backward: None for whatever needs no gradient, and each gradient in its argument's shape", inside=True
)
def needs(draw: Draw):
    for lead in ((3,), (2, 3), (2, 1, 3)):
        x, bias, quantized, _, g = case_of(draw, 4, lead)
        y = DequantizedLinear.apply(x.requires_grad_(), bias.requires_grad_(), quantized)
        # Asked directly: autograd sums up what has a dimension too many, and says nothing.
        returned = DequantizedLinear.backward(y.grad_fn, g)
        case = {"shape of x": tuple(x.shape), "shape of g": tuple(g.shape)}
        slip = "sum over all leading dimensions, not over the first alone: g.reshape(-1, out).sum(0)"
        if isinstance(returned, tuple) and len(returned) > 1 and isinstance(returned[1], Tensor):
            fits = returned[1].shape == bias.shape
            require(fits, f"of the bias {tuple(bias.shape)} backward gives {tuple(returned[1].shape)}", case, slip)
    for most in SIZES:
        for of_x, of_bias in ((True, False), (False, True), (True, None)):
            x, bias, quantized, W, g = case_of(draw, most)
            x.requires_grad_(of_x)
            bias = None if of_bias is None else bias.requires_grad_(of_bias)
            y = DequantizedLinear.apply(x, bias, quantized)
            returned = []
            y.grad_fn.register_hook(lambda values, _, returned=returned: returned.extend(values))
            y.backward(g)
            case = {
                "x needs a gradient": of_x,
                "bias": "frozen" if of_bias is False else "trained" if of_bias else None,
            }
            if not of_x:
                slip = "W is made for nothing: see whether ctx.needs_input_grad[0]"
                require(returned[0] is None, "expected None for x, got a gradient", case, slip)
                expect(bias.grad, g.sum(0), case, what="dL/db", tolerance=ROUGH)
                continue
            slip = "frozen or absent, the bias wants no gradient: see whether ctx.needs_input_grad[1]"
            require(returned[1:] in ([], [None]), "expected None for the bias, got a gradient", case, slip)
            expect(x.grad, torch.einsum("no,oi->ni", g, W), case, what="dL/dx", tolerance=ROUGH)


@EXERCISE.property("all is computed in the dtype of x, whatever that of the weight was")
def dtypes(draw: Draw):
    for dtype, own in (
        (torch.float64, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        out, d = draw.integer(2, 5), draw.integer(2, 5)
        quantized, W = drawn(draw, out, d, own)
        x, g = draw.normal(3, d, dtype=dtype).requires_grad_(), draw.normal(3, out, dtype=dtype)
        case = {"dtype of x": dtype, "quantized.dtype": own}
        try:
            y = DequantizedLinear.apply(x, None, quantized)
            gx = torch.autograd.grad(y, x, g)[0]
        except RuntimeError as error:
            if "dtype" not in str(error) and "scalar type" not in str(error):
                raise
            slip = "ask for the dtype that you need: dequantize(quantized, x.dtype), and g.dtype in backward"
            raise Wrong(f"raised RuntimeError: {error}", case, slip) from None
        slip = "quantized belongs to the layer; dequantize takes the dtype as its second argument"
        require(quantized.dtype == own, f"quantized.dtype has become {quantized.dtype}", case, slip)
        for what, found, a, b in (("y", y, x, W.T), ("dL/dx", gx, g, W)):
            require(found.dtype == dtype, f"{what}: expected {dtype}, got {found.dtype}", case)
            a, right = a.detach().double(), a.detach().double() @ b.to(dtype).double()
            slips = {
                "the weight is rounded to quantized.dtype first; ask dequantize for x's dtype": a @ b.to(own).double(),
            }
            tolerance = 1e-9 if dtype == torch.float64 else 0.02
            if difference(found, right, tolerance) and not difference(found, right, ROUGH):
                slip = "the product is taken in float32; take it in x's dtype"
                raise Wrong(f"{what}: {difference(found, right, tolerance)}", case, slip)
            expect(found, right, case, slips, what, tolerance)


def waiting(draw: Draw, tokens: int, d: int) -> tuple[int, int, int]:
    """Bytes that wait between forward and backward beside the output and what was there before; those of W and of x."""
    quantized, W = drawn(draw, d, d, torch.float32)
    leaf = draw.normal(tokens, d, dtype=torch.float32).requires_grad_()
    with MemoryMeter(nn.Module()) as meter:
        x = leaf.clone()
        dequantize(quantized)  # so that the tables of levels, which are kept, count as there before
        before = meter.now.total - x.nbytes
        y = DequantizedLinear.apply(x, None, quantized)
        del x
        kept = meter.now.total - before - y.nbytes
    return kept, W.nbytes, leaf.nbytes


@EXERCISE.property("no float weight waits for backward, and no x", inside=True)
def memory(draw: Draw):
    kept, of_weight, _ = waiting(draw, draw.integer(1, 4), draw.choice((64, 80, 96)))
    case = {"bytes of the float weight": of_weight, "bytes that wait": kept}
    slip = "a float weight waits for backward: leave `quantized` on ctx, and dequantize again in backward"
    require(kept < of_weight / 3, "expected only codes and scales to wait between forward and backward", case, slip)
    kept, _, of_x = waiting(draw, draw.choice((256, 512)), 16)
    case = {"bytes of x": of_x, "bytes that wait": kept}
    slip = "x waits for backward; only a gradient of W would need it, and W is frozen"
    require(kept < of_x / 3, "expected x not to wait between forward and backward", case, slip)
