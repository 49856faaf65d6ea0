"""Exercise 18: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "fast": """
def rows(t):
    return t.reshape(-1, t.shape[-1])


def formed(W, A, B, s):
    return W + torch.einsum("or,ri->oi", B, s * A)


class FormedWeight:
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scaling):
        ctx.save_for_backward(x, W, A, B)
        ctx.s = scaling
        y = x @ formed(W, A, B, scaling).T
        return y if bias is None else bias + y

    @staticmethod
    def backward(ctx, g):
        x, W, A, B = ctx.saved_tensors
        gx = None
        if ctx.needs_input_grad[0]:
            gx = torch.einsum("...o,oi->...i", g, formed(W, A, B, ctx.s))
        x, g = rows(x), rows(g)
        gB_ = ctx.s * g @ B  # (N, r)
        grad_A = gB_.T @ x
        grad_B = ctx.s * g.T @ (x @ A.T)
        return gx, None, None, grad_A, grad_B, None


class LowRankTerm:
    @staticmethod
    def forward(ctx, base, x, A, B, scaling, mask):
        ctx.s = scaling
        kind = base.dtype
        d = x if mask is None else torch.where(mask, x, torch.zeros_like(x))
        narrow = torch.einsum("...i,ri->...r", d.to(kind), A.to(kind))
        saved_x = x if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(saved_x, narrow, A, B, mask)
        update = torch.einsum("...r,or->...o", narrow, B.to(kind))
        return base + scaling * update

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, narrow, A, B, mask = ctx.saved_tensors
        h = ctx.s * torch.einsum("...o,or->...r", g, B.to(g.dtype))
        to_x = torch.einsum("...r,ri->...i", h, A.to(g.dtype))
        if mask is not None:
            to_x = to_x * mask
        to_A = None
        if ctx.needs_input_grad[2]:
            seen = x.masked_fill(~mask, 0) if mask is not None else x
            to_A = rows(h).T @ rows(seen).to(g.dtype)
        to_B = ctx.s * rows(g).T @ rows(narrow)
        return g, to_x, to_A, to_B, None, None
"""
}

MUTANTS = [
    Mutant(
        "term: BA formed in forward",
        "return base + scaling * update",
        "return base + scaling * F.linear(d.to(kind), B.to(kind) @ A.to(kind))",
        "B A is formed, as large as W",
    ),
    Mutant("formed: update unscaled", "B, s * A)", "B, A)", "the update is not scaled: M"),
    Mutant("formed: scales W", "return W + torch", "return s * W + torch", "the scaling reaches W as well"),
    Mutant("formed: bias forgotten", "else bias + y", "else y", "the bias is missing"),
    Mutant("formed: not transposed", "formed(W, A, B, scaling).T", "formed(W, A, B, scaling)", "stored as (out, in)"),
    Mutant("gx without the low-rank part", "g, formed(W, A, B, ctx.s))", "g, W)", "gx goes through W alone"),
    Mutant("gx unscaled", "g, formed(W, A, B, ctx.s))", "g, formed(W, A, B, 1))", "not scaled in gx"),
    Mutant("gx transposed", '"...o,oi->...i", g, formed', '"...o,io->...i", g, formed', "gx = g M, without .T"),
    Mutant("gA unscaled", "gB_ = ctx.s * g @ B", "gB_ = g @ B", "the scaling is missing in gA"),
    Mutant("gA scaled twice", "grad_A = gB_", "grad_A = ctx.s * gB_", "the scaling acts twice in gA"),
    Mutant("gB unscaled", "ctx.s * g.T", "g.T", "the scaling is missing in gB"),
    Mutant("gA and gB swapped", "grad_A, grad_B, None", "grad_B, grad_A, None", "gA and gB are swapped"),
    Mutant("gA transposed", "grad_A = gB_.T @ x", "grad_A = x.T @ gB_", "gA is transposed"),
    Mutant("too few gradients", "None, None, grad_A", "None, grad_A", "one gradient for each argument"),
    Mutant("not flattened", "x, g = rows(x), rows(g)", "pass", "any leading dimensions"),
    Mutant("flattened by view", "return t.reshape(-1", "return t.view(-1", "view size is not compatible"),
    Mutant(
        "gA and gB through gW",
        ("grad_A = gB_.T @ x", "grad_B = ctx.s * g.T @ (x @ A.T)"),
        ("grad_A = ctx.s * B.T @ (g.T @ x)", "grad_B = ctx.s * (g.T @ x) @ A.T"),
        "multiply by the thin matrix first",
    ),
    Mutant("W gets a gradient", "gx, None, None, grad_A", "gx, g.T @ x, None, grad_A", "the product gᵀ x"),
    Mutant("gx though nobody asks", "if ctx.needs_input_grad[0]:", "if True:", "only if ctx.needs_input_grad[0]"),
    Mutant(
        "M kept",
        ("y = x @ formed(W, A, B, scaling).T", "g, formed(W, A, B, ctx.s))"),
        ("ctx.M = formed(W, A, B, scaling)\n        y = x @ ctx.M.T", "g, ctx.M)"),
        "a second copy of every weight",
    ),
    Mutant("term: mask forgotten", "d = x if mask is None else", "d = x if True else", "A gets m ⊙ x"),
    Mutant("term: unscaled", "base + scaling * update", "base + update", "the term is not scaled"),
    Mutant("term: in place", "base + scaling * update", "base.add_(scaling * update)", "base is added to in place"),
    Mutant("term: x masked in place", "torch.where(mask, x, torch.zeros_like(x))", "x.mul_(mask)", "on x in place"),
    Mutant("term: base forgotten", "base + scaling * update", "scaling * update", "base is missing"),
    Mutant("term: mask turned", "torch.where(mask, x, torch.zeros_like(x))", "x * ~mask", "the wrong way round"),
    Mutant("term: mask forgotten in gx", "to_x = to_x * mask", "pass", "the mask is forgotten in gx"),
    Mutant("term: mask forgotten in gA", "x.masked_fill(~mask, 0) if", "x if", "the mask is forgotten in gA"),
    Mutant("term: gB by whole x", "@ rows(narrow)", "@ (rows(x) @ A.T)", "the mask is forgotten in gB"),
    Mutant("term: gx unscaled", '"...r,ri->...i", h,', '"...r,ri->...i", h / ctx.s,', "the scaling is missing in gx"),
    Mutant("term: gA unscaled", "to_A = rows(h).T", "to_A = rows(h / ctx.s).T", "the scaling is missing in gA"),
    Mutant("term: base's gradient scaled", "return g, to_x", "return ctx.s * g, to_x", "base is not scaled in y"),
    Mutant("term: base gets none", "return g, to_x", "return None, to_x", "None for base"),
    Mutant("term: gradients without base's", "return g, to_x", "return to_x", "one gradient for each argument"),
    Mutant("term: A and B in float32", ("d.to(kind)", "A.to(kind)"), ("d.float()", "A.float()"), "expected"),
    Mutant("term: dtypes mixed", "A.to(kind)", "A", "dtype"),
    Mutant("term: result widened", "return base + scaling", "return base.to(A.dtype) + scaling", "widen the result"),
    Mutant(
        "term: x kept with A frozen",
        "saved_x = x if ctx.needs_input_grad[2] else None",
        "saved_x = x",
        "serves gA alone",
    ),
    Mutant("term: gA though A is frozen", "if ctx.needs_input_grad[2]:", "if True:", "raised"),
    Mutant(
        "term: dropped x kept",
        ("ctx.save_for_backward(saved_x,", "x.masked_fill(~mask, 0) if mask is not None else x"),
        ("ctx.save_for_backward(d if saved_x is not None else None,", "x"),
        "m ⊙ x, or a copy of x, is kept",
    ),
    Mutant(
        "term: BA formed",
        '"...r,ri->...i", h, A.to(g.dtype)',
        '"...o,oi->...i", g, ctx.s * B.to(g.dtype) @ A.to(g.dtype)',
        "B A, or gᵀ x, is made",
    ),
]
