"""Exercise 15: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "adapters.dora": """
class DoRALinear:
    def __init__(self, base_layer, r, lora_alpha, lora_dropout=0.0, use_rslora=False):
        super().__init__(base_layer, r, lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora)
        m = torch.linalg.vector_norm(self.float_weight(), dim=1)
        self.lora_magnitude_vector = nn.Parameter(m)

    def norms(self):
        W, (A, B), s = self.float_weight(), self.factors(), self.scaling
        of_W = torch.einsum("oi,oi->o", W, W)
        mixed = torch.einsum("oi,ri,or->o", W, A, B)
        of_BA = torch.einsum("or,ri,ki,ok->o", B, A, A, B)
        return torch.sqrt(torch.relu(of_W + 2 * s * mixed + s * s * of_BA))

    def forward(self, x):
        if not self.enabled or self.merged:
            return super().forward(x)
        b = torch.zeros(()) if self.base_layer.bias is None else self.base_layer.bias
        length = self.norms().detach()
        g = self.lora_magnitude_vector / length
        if self.training and self.lora_dropout:
            d = F.dropout(x, self.lora_dropout)
            both = (g - 1) * (self.base_layer(d) - b) + g * self.narrow(d)
            return self.base_layer(x) + both
        Vx = self.base_layer(x) - b + self.narrow(x)
        return Vx * g + b

    def narrow(self, x):
        A, B = self.factors()
        return (x @ A.T) @ B.T * self.scaling

    def delta_weight(self):
        W = self.float_weight()
        A, B = self.factors()
        V = W + self.scaling * B @ A
        return V * (self.lora_magnitude_vector / self.norms()).unsqueeze(1) - W
"""
}

V_NORM = 'torch.einsum("or,ri->oi", B, A) * s + W'
RETURN_NORMS = "return torch.sqrt(torch.relu(of_W + 2 * s * mixed + s * s * of_BA))"

MUTANTS = [
    Mutant("m: column norms", "self.float_weight(), dim=1)", "self.float_weight(), dim=0)", "norm of each column"),
    Mutant("m: ones", "nn.Parameter(m)", "nn.Parameter(torch.ones_like(m))", "m starts at one"),
    Mutant("m: squares", "nn.Parameter(m)", "nn.Parameter(m**2)", "the root is missing"),
    Mutant("m: a buffer", "nn.Parameter(m)", "m", "wrap it in nn.Parameter"),
    Mutant("m: frozen", "nn.Parameter(m)", "nn.Parameter(m, requires_grad=False)", "must require a gradient"),
    Mutant(
        "m: of the whole matrix", "nn.Parameter(m)", "nn.Parameter(m.norm().repeat(len(m)))", "one norm of the whole"
    ),
    Mutant(
        "m: half precision", "(self.float_weight(), dim=1)", "(base_layer.weight.detach(), dim=1)", "half precision"
    ),
    Mutant("rsLoRA forgotten", ", use_rslora=use_rslora", "", "use_rslora too"),
    Mutant("dropout forgotten in __init__", "lora_dropout=lora_dropout, ", "", "pass all five"),
    Mutant("norms: columns", RETURN_NORMS, f"return ({V_NORM}).norm(dim=0)", "norm of each column"),
    Mutant("norms: W alone", RETURN_NORMS, "return of_W.sqrt()", "the norm of W alone"),
    Mutant("norms: no scaling", "self.factors(), self.scaling\n", "self.factors(), 1\n", "the scaling is missing"),
    Mutant("norms: squares", RETURN_NORMS, f"return ({V_NORM}).square().sum(1)", "the root is missing"),
    Mutant("norms: no cross term", " + 2 * s * mixed", "", "the term in the middle is missing"),
    Mutant("norms: cross term once", "2 * s * mixed", "s * mixed", "counts twice"),
    Mutant("norms: s not squared", "s * s * of_BA", "s * of_BA", "square the scaling too"),
    Mutant(
        "norms: stale after a change of W",
        ("nn.Parameter(m)", RETURN_NORMS),
        ("nn.Parameter(m)\n        self.squares = m.detach() ** 2", RETURN_NORMS.replace("of_W", "self.squares")),
        "that of the old W",
    ),
    Mutant(
        "norms: start left out",
        "self.float_weight(), self.factors(), self.scaling",
        "self.float_weight(), (self.lora_A, self.lora_B), self.scaling",
        "what they began as has to be taken off",
    ),
    Mutant(
        "forward: start left out",
        "A, B = self.factors()\n        return (x",
        "A, B = self.lora_A, self.lora_B\n        return (x",
        "what they began as has to be taken off",
    ),
    Mutant(
        "delta_weight: start left out",
        "A, B = self.factors()\n        V",
        "A, B = self.lora_A, self.lora_B\n        V",
        "what they began as has to be taken off",
    ),
    Mutant(
        "norms: added in place",
        ("nn.Parameter(m)", RETURN_NORMS),
        (
            'nn.Parameter(m)\n        self.register_buffer("squared_norms", m.detach() ** 2)',
            "self.squared_norms += (2 * s * mixed + s * s * of_BA).detach()\n"
            "        return self.squared_norms.clamp(min=0).sqrt()",
        ),
        "‖W‖² was changed in place",
    ),
    Mutant(
        "norms: of the merged weight",
        "W, (A, B), s = self.float_weight()",
        "W, (A, B), s = self.base_layer.weight.to(self.lora_A.dtype)",
        "float_weight() gives the W from before",
    ),
    Mutant("gradient through the norm", "self.norms().detach()", "self.norms()", "in backward ‖V‖ is a constant"),
    Mutant(
        "all of g detached",
        "self.lora_magnitude_vector / length",
        "(self.lora_magnitude_vector / length).detach()",
        "no gradient reaches m",
    ),
    Mutant("bias scaled", ("- b + self.narrow(x)", "Vx * g + b"), ("+ self.narrow(x)", "Vx * g"), "the bias is scaled"),
    Mutant("divided by ‖W‖", "self.norms().detach()", "self.float_weight().norm(dim=1)", "the norm of W alone"),
    Mutant(
        "not divided", "g = self.lora_magnitude_vector / length", "g = self.lora_magnitude_vector", "not taken away"
    ),
    Mutant("no magnitude", "g = self.lora_magnitude_vector / length", "g = 1 / length", "the magnitude is missing"),
    Mutant(
        "magnitude on the update only",
        "return Vx * g + b",
        "return self.base_layer(x) + g * self.narrow(x)",
        "only the update gets the magnitude",
    ),
    Mutant("plain LoRA", "return Vx * g + b", "return Vx + b", "that is plain LoRA"),
    Mutant("update not scaled", " * self.scaling\n\n", "\n\n", "the update is not scaled"),
    Mutant(
        "x doubled in place",
        "Vx = self.base_layer(x) - b + self.narrow(x)",
        "Vx = self.base_layer(x) - b + self.narrow(x)\n        x.mul_(2)",
        "changed x in place",
    ),
    Mutant(
        "dropout: all of x",
        "self.base_layer(x) + both",
        "g * (self.base_layer(d) - b + self.narrow(d)) + b",
        "all of x is dropped",
    ),
    Mutant("dropout: A's input only", "(self.base_layer(d) - b)", "(self.base_layer(x) - b)", "only A's input"),
    Mutant("dropout: two masks", "self.narrow(d)", "self.narrow(F.dropout(x, self.lora_dropout))", "draw it once"),
    Mutant("dropout: bias in (g - 1)", "(self.base_layer(d) - b)", "self.base_layer(d)", "the bias gets (g - 1)"),
    Mutant(
        "dropout: not rescaled",
        "d = F.dropout(x, self.lora_dropout)",
        "d = F.dropout(x, self.lora_dropout) * (1 - self.lora_dropout)",
        "not divided by 1 - p",
    ),
    Mutant("dropout: none", "if self.training and self.lora_dropout", "if False", "nothing is dropped"),
    Mutant("switched off ignored", "if not self.enabled or self.merged", "if self.merged", "switched off"),
    Mutant("merged ignored", "if not self.enabled or self.merged", "if not self.enabled", "a second time"),
    Mutant(
        "switched off: base while merged",
        "return super().forward(x)",
        "return self.base_layer(x)",
        "knows the W from before",
    ),
    Mutant("delta_weight: W not subtracted", ".unsqueeze(1) - W", ".unsqueeze(1)", "W is not subtracted"),
    Mutant(
        "delta_weight: plain LoRA's",
        "return V * (self.lora_magnitude_vector / self.norms()).unsqueeze(1) - W",
        "return V - W",
        "plain LoRA's ΔW",
    ),
    Mutant("delta_weight: by column", ".unsqueeze(1) - W", " - W", "make it (out, 1)"),
    Mutant(
        "delta_weight: of the merged weight",
        "W = self.float_weight()\n        A",
        "W = self.base_layer.weight\n        A",
        "float_weight() gives the W from before",
    ),
    Mutant(
        "delta_weight: half precision",
        "return V * (self.lora_magnitude_vector / self.norms()).unsqueeze(1) - W",
        "g = self.lora_magnitude_vector / self.norms()\n"
        "        return (V * g[:, None] - W).to(self.base_layer.weight.dtype)",
        "the dtype of delta_weight()",
    ),
    Mutant(
        "norms: W added to in place",
        RETURN_NORMS,
        'W += s * torch.einsum("or,ri->oi", B, A).detach()\n        return W.norm(dim=1)',
        "float_weight() may be the base's weight itself",
    ),
    Mutant(
        "delta_weight: W added to in place",
        ("V = W + self.scaling * B @ A", "unsqueeze(1) - W"),
        (
            "V = W.clone().add_(self.scaling * B.detach() @ A.detach())",
            "unsqueeze(1).detach() - W.clone() + 0 * W.add_(V - W)",
        ),
        "changed the base's weight",
    ),
]
