"""Exercise 02: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "lora": """
def lora_reference(x, W, bias, A, B, scaling):
    y = x @ W.T + (x @ A.T * scaling) @ B.T
    return y if bias is None else bias + y


class LoRALinear:
    def forward(self, x):
        if not self.enabled and self.merged:
            return F.linear(x, self.original_weight, self.base_layer.bias)
        y = self.base_layer(x)
        if self.merged or not self.enabled:
            return y
        dropped = F.dropout(x, p=self.lora_dropout, training=self.training)
        narrow = torch.einsum("...i,ri->...r", dropped, self.lora_A)
        return y + self.lora_alpha / self.r * torch.einsum("...r,or->...o", narrow, self.lora_B)
"""
}

MUTANTS = [
    Mutant("alpha not divided by r", "self.lora_alpha / self.r", "self.lora_alpha", "did you divide alpha by r?"),
    Mutant("scaling upside down", "self.lora_alpha / self.r", "self.r / self.lora_alpha", "upside down"),
    Mutant("rsLoRA's scaling", "self.lora_alpha / self.r", "self.lora_alpha / self.r**0.5", "rsLoRA's scaling"),
    Mutant("update not added", "return y + self.lora_alpha", "return y + 0 * self.lora_alpha", "the base layer alone"),
    Mutant(
        "dropout on the sum",
        'return y + self.lora_alpha / self.r * torch.einsum("...r,or->...o", narrow, self.lora_B)',
        "y = y + self.lora_alpha / self.r * (x @ self.lora_A.T @ self.lora_B.T)\n"
        "        return F.dropout(y, self.lora_dropout, self.training)",
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
    Mutant("reference: unscaled", "(x @ A.T * scaling)", "(x @ A.T)", "the update is not scaled"),
    Mutant("reference: bias scaled", "else bias + y", "else bias * scaling + y", "the bias is scaled"),
    Mutant("reference: bias forgotten", "else bias + y", "else y", "the bias is missing"),
    Mutant("A detached", "dropped, self.lora_A)", "dropped, self.lora_A.detach())", "detached"),
    Mutant("two dimensions only", '"...i,ri->...r", dropped', '"ni,ri->nr", dropped', "RuntimeError"),
    Mutant(
        "a bias is taken for granted",
        "F.linear(x, self.original_weight, self.base_layer.bias)",
        "x @ self.original_weight.T + self.base_layer.bias",
        "raised TypeError",
    ),
    Mutant(
        "the base's weight instead of the base",
        "y = self.base_layer(x)\n",
        "y = F.linear(x, self.base_layer.weight, self.base_layer.bias)\n",
        "call the base layer",
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
