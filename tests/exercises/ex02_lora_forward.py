"""Exercise 02: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "lora": """
class LoRALinear:
    def forward(self, x):
        y = self.base_layer(x)
        narrow = torch.einsum("...i,ri->...r", x, self.lora_A)
        update = torch.einsum("...r,or->...o", narrow, self.lora_B)
        return y + self.scaling * update
"""
}

FURTHER = [
    {
        "lora": """
class LoRALinear:
    def forward(self, x):
        A, B = self.factors()
        return torch.add(self.base_layer(x), x @ A.mT @ B.mT, alpha=self.scaling)
"""
    },
    {
        "lora": """
class LoRALinear:
    def forward(self, x):
        rows = x.reshape(-1, self.in_features)
        update = (self.lora_B @ (self.scaling * self.lora_A @ rows.T)).T
        return self.base_layer(x) + update.reshape(*x.shape[:-1], self.out_features)
"""
    },
    {
        "lora": """
class LoRALinear:
    def forward(self, x):
        update = sum((x @ a)[..., None] * b for a, b in zip(self.lora_A, self.lora_B.T))
        return self.base_layer(x) + update * self.scaling
"""
    },
]

RETURN = "return y + self.scaling * update"
MUTANTS = [
    Mutant("alpha not divided by r", "self.scaling", "self.lora_alpha", "did you divide alpha by r?"),
    Mutant("scaling upside down", "self.scaling", "self.r / self.lora_alpha", "upside down"),
    Mutant("rsLoRA's scaling", "self.scaling", "self.lora_alpha / self.r**0.5", "rsLoRA's scaling"),
    Mutant("alpha / r", "self.scaling", "self.lora_alpha / self.r", "take self.scaling, which knows"),
    Mutant("scaling twice", "self.scaling", "self.scaling**2", "the scaling acts twice"),
    Mutant("update not added", RETURN, "return y + 0 * update", "the base layer alone"),
    Mutant("unscaled", RETURN, "return y + update", "the update is not scaled"),
    Mutant("all of it scaled", RETURN, "return self.scaling * (y + update)", "the scaling reaches W x as well"),
    Mutant("W x forgotten", RETURN, "return self.scaling * update", "W x is missing"),
    Mutant(
        "bias scaled",
        RETURN,
        "return y + self.scaling * update + (self.scaling - 1) * self.base_layer.bias",
        "the bias is scaled",
    ),
    Mutant(
        "bias forgotten", "y = self.base_layer(x)", "y = F.linear(x, self.base_layer.weight)", "the bias is missing"
    ),
    Mutant("bias taken off", RETURN, RETURN + " - self.base_layer.bias", "the bias is missing"),
    Mutant("A detached", "self.lora_A)", "self.lora_A.detach())", "A is detached on the way"),
    Mutant("B detached", "self.lora_B)", "self.lora_B.detach())", "B is detached on the way"),
    Mutant("the term detached", RETURN, RETURN + ".detach()", "the update is cut off from the gradient"),
    Mutant("the x of the term detached", 'r", x, ', 'r", x.detach(), ', "the update's part of the gradient"),
    Mutant("W x detached", "self.base_layer(x)", "self.base_layer(x).detach()", "W x has no part in the gradient"),
    Mutant("no gradient", "y = self", "torch.set_grad_enabled(False)\n        y = self", "cut off from the gradient"),
    Mutant("relu between", ", narrow,", ", narrow.relu(),", "there is a relu between A and B"),
    Mutant("gelu between", ", narrow,", ", F.gelu(narrow),", "there is a gelu between A and B"),
    Mutant("softmax between", ", narrow,", ", narrow.softmax(-1),", "there is a softmax between A and B"),
    Mutant("doubled", RETURN, "return y + 2 * self.scaling * update", "the update is added twice"),
    Mutant("subtracted", RETURN, "return y - self.scaling * update", "the update is subtracted"),
    Mutant("W x twice", RETURN, RETURN + " + y", "W x is there twice"),
    Mutant("bias twice", RETURN, RETURN + " + self.base_layer.bias", "the bias is added twice"),
    Mutant("divided by r", RETURN, "return y + self.scaling / self.r * update", "r times too small"),
    Mutant(
        "BA formed",
        RETURN,
        "return y + self.scaling * F.linear(x, self.lora_B @ self.lora_A)",
        "B @ A, or W + s·BA, is formed",
    ),
    Mutant(
        "BA formed by another name",
        RETURN,
        "return y + self.scaling * x @ torch.einsum('or,ri->io', self.lora_B, self.lora_A)",
        "B @ A, or W + s·BA, is formed",
    ),
    Mutant("two dimensions only", '"...i,ri->...r"', '"ni,ri->nr"', "RuntimeError"),
    Mutant(
        "the base's weight instead of the base",
        "y = self.base_layer(x)\n",
        "y = F.linear(x, self.base_layer.weight, self.base_layer.bias)\n",
        "call the base layer",
    ),
]
