"""Exercise 21: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "lora": """
class LoRALinear:
    def forward(self, x):
        if not self.enabled and self.merged:
            return F.linear(x, self.original_weight, self.base_layer.bias)
        y = self.base_layer(x)
        if self.merged or not self.enabled:
            return y
        A, B = self.factors()
        dropped = F.dropout(x, p=self.lora_dropout, training=self.training)
        narrow = torch.einsum("...i,ri->...r", dropped.to(y.dtype), A.to(y.dtype))
        update = torch.einsum("...r,or->...o", narrow, B.to(y.dtype))
        return y + self.scaling * update
"""
}

RETURN = "return y + self.scaling * update"
MUTANTS = [
    Mutant(
        "dropout on the sum",
        ("training=self.training", RETURN),
        ("training=False", "return F.dropout(y + self.scaling * update, self.lora_dropout, self.training)"),
        "dropout acts on the sum",
    ),
    Mutant("dropout forgotten", "training=self.training", "training=False", "nothing is dropped while training"),
    Mutant("merged twice", "if self.merged or not self.enabled", "if not self.enabled", "you add it a second time"),
    Mutant(
        "switched off, still merged",
        "if not self.enabled and self.merged",
        "if False",
        "the W from before is in original_weight",
    ),
    Mutant("start left out", "self.factors()", "self.lora_A, self.lora_B", "what they began as has to be taken off"),
    Mutant(
        "start added",
        RETURN,
        RETURN + " if self.start_A is None else y + self.scaling * (update + 2 * x @ self.start_A.T @ self.start_B.T)",
        "the start is added",
    ),
    Mutant(
        "float32 in half precision",
        ("dropped.to(y.dtype), A.to(y.dtype)", "B.to(y.dtype)"),
        ("dropped.to(A.dtype), A", "B"),
        "A and B widen the sum",
    ),
    Mutant(
        "dtypes mixed", ("dropped.to(y.dtype), A.to(y.dtype)", "B.to(y.dtype)"), ("dropped, A", "B"), "raised Runtime"
    ),
    Mutant(
        "a bias is taken for granted",
        "F.linear(x, self.original_weight, self.base_layer.bias)",
        "x @ self.original_weight.T + self.base_layer.bias",
        "raised TypeError",
    ),
    Mutant(
        "dropped in eval mode", "training=self.training", "training=True", "it also drops when the layer is in eval"
    ),
    Mutant(
        "kept and not divided",
        "narrow = ",
        "dropped = x * (torch.rand_like(x) < 1 - self.lora_dropout) if self.training else x\n        narrow = ",
        "not divided by 1 - p",
    ),
]
