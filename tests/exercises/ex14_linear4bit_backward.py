"""Exercise 14: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "linear4bit": """
class DequantizedLinear:
    @staticmethod
    def forward(ctx, x, bias, quantized):
        ctx.weight_in_4_bits = quantized
        W = dequantize(quantized, x.dtype)
        y = torch.einsum("...i,oi->...o", x, W)
        if bias is not None:
            y = y + bias
        return y

    @staticmethod
    def backward(ctx, g):
        x_wanted, bias_wanted, _ = ctx.needs_input_grad
        of_x = of_bias = None
        if x_wanted:
            W = dequantize(ctx.weight_in_4_bits, dtype=g.dtype)
            of_x = torch.einsum("...o,oi->...i", g, W)
        if bias_wanted:
            of_bias = g.sum(dim=tuple(range(g.dim() - 1))) if g.dim() > 1 else g
        return of_x, of_bias, None
"""
}

OF_X = (
    "            W = dequantize(ctx.weight_in_4_bits, dtype=g.dtype)\n"
    '            of_x = torch.einsum("...o,oi->...i", g, W)\n'
)
KEEP = "        ctx.weight_in_4_bits = quantized\n        W = dequantize(quantized, x.dtype)\n"
OF_BIAS = "g.sum(dim=tuple(range(g.dim() - 1))) if g.dim() > 1 else g"
MUTANTS = [
    Mutant("the first dimension alone", OF_BIAS, "g.sum(0) if g.dim() > 1 else g", "over all leading dimensions"),
    Mutant("bias missing", "y = y + bias", "pass", "the bias is missing"),
    Mutant("forward: not transposed", 'torch.einsum("...i,oi->...o", x, W)', "x @ W", "W is (out, in)"),
    Mutant("no gradient of x", "if x_wanted:", "if False:", "expected a gradient of x"),
    Mutant("no gradient of the bias", "if bias_wanted:", "if False:", "expected a gradient of the bias"),
    Mutant("gradient transposed", 'torch.einsum("...o,oi->...i", g, W)', "g @ W.T", "W is transposed"),
    Mutant(
        "two values returned", "return of_x, of_bias, None", "return of_x, of_bias", "incorrect number of gradients"
    ),
    Mutant("mean over tokens", "g.sum(dim", "g.mean(dim", "you take the mean"),
    Mutant("ones for the bias", OF_BIAS, "torch.ones_like(g).reshape(-1, g.shape[-1]).sum(0)", "1 for each token"),
    Mutant("no leading dimensions", OF_BIAS, "g.sum(0)", "invalid gradient"),
    Mutant("two dimensions only", '"...o,oi->...i"', '"no,oi->ni"', "einsum"),
    Mutant("view", OF_BIAS, "g.view(-1, g.shape[-1]).sum(0)", "view size is not compatible"),
    Mutant("x frozen", "if x_wanted:", "if True:", "W is made for nothing"),
    Mutant("bias frozen", "if bias_wanted:", "if True:", "the bias wants no gradient"),
    Mutant("the weight's dtype", "dequantize(quantized, x.dtype)", "dequantize(quantized)", "ask for the dtype"),
    Mutant("backward: the weight's dtype", ", dtype=g.dtype)", ")", "ask for the dtype"),
    Mutant(
        "rounded first",
        "dequantize(quantized, x.dtype)",
        "dequantize(quantized).to(x.dtype)",
        "is rounded to quantized",
    ),
    Mutant("backward: rounded first", ", dtype=g.dtype)", ").to(g.dtype)", "is rounded to quantized"),
    Mutant(
        "dtype written into quantized",
        KEEP,
        "        quantized.dtype = x.dtype\n" + KEEP.replace(", x.dtype", ""),
        "quantized belongs to the layer",
    ),
    Mutant(
        "float32",
        'torch.einsum("...i,oi->...o", x, W)',
        'torch.einsum("...i,oi->...o", x.float(), W.float()).to(x.dtype)',
        "the product is taken in float32",
    ),
    Mutant(
        "float weight saved",
        (KEEP, "dequantize(ctx.weight_in_4_bits, dtype=g.dtype)"),
        ("        W = dequantize(quantized, x.dtype)\n        ctx.save_for_backward(W)\n", "ctx.saved_tensors[0]"),
        "a float weight waits",
    ),
    Mutant(
        "float weight on ctx",
        (KEEP, "dequantize(ctx.weight_in_4_bits, dtype=g.dtype)"),
        ("        W = ctx.W = dequantize(quantized, x.dtype)\n", "ctx.W"),
        "a float weight waits",
    ),
    Mutant(
        "float weight kept in quantized",
        (KEEP, OF_X),
        (
            "        ctx.quantized = quantized\n        W = quantized.made = dequantize(quantized, x.dtype)\n",
            "            of_x = g @ ctx.quantized.made\n",
        ),
        "a float weight waits",
    ),
    Mutant("x saved", KEEP, KEEP + "        ctx.save_for_backward(x)\n", "x waits for backward"),
    Mutant("x on ctx", KEEP, KEEP + "        ctx.x = x\n", "x waits for backward"),
]
