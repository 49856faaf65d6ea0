"""Exercise 05: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "lora": """
class LoRALinear:
    def delta_weight(self):
        A, B = self.factors()
        if A.dtype in (torch.float16, torch.bfloat16):
            A, B = A.float(), B.float()
        return torch.einsum("or,ri->oi", B, A).mul(self.scaling)

    def merge(self):
        base = self.base_layer
        if not isinstance(base, nn.Linear):
            raise ValueError(f"no nn.Linear but a {type(base).__name__}: its weight cannot be added to")
        if not self.merged:
            self.original_weight = base.weight.data.clone()
            with torch.no_grad():
                total = self.delta_weight() + base.weight
                base.weight.copy_(total)

    def unmerge(self):
        if not self.merged:
            return
        self.base_layer.weight.data[:] = self.original_weight
        self.original_weight = None
"""
}

FURTHER = [
    {
        "lora": """
class LoRALinear:
    def delta_weight(self):
        A, B = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in self.factors())
        return (B * self.scaling).mm(A)

    def merge(self):
        if self.merged:
            return
        if type(self.base_layer) is not nn.Linear:
            raise ValueError(f"a {type(self.base_layer).__name__} cannot be merged into")
        weight = self.base_layer.weight
        self.original_weight = weight.detach().clone()
        delta = self.delta_weight()
        with torch.no_grad():
            delta += weight  # in place, which is fine: the product was made for this
            weight[...] = delta

    def unmerge(self):
        if self.original_weight is not None:
            with torch.no_grad():
                self.base_layer.weight.data.copy_(self.original_weight)
            self.original_weight = None
"""
    },
]

GUARD = """        if not isinstance(base, nn.Linear):
            raise ValueError(f"no nn.Linear but a {type(base).__name__}: its weight cannot be added to")
"""

MUTANTS = [
    Mutant("no scaling", ".mul(self.scaling)", "", "the scaling is missing"),
    Mutant("alpha / r", "self.scaling", "self.lora_alpha / self.r", "use self.scaling, which knows of rsLoRA"),
    Mutant("scaling twice", "self.scaling", "self.scaling**2", "the scaling acts twice"),
    Mutant("start left out", "self.factors()", "self.lora_A, self.lora_B", "what they began as has to be taken off"),
    Mutant(
        "start added",
        "A, B = self.factors()",
        "A, B = self.lora_A, self.lora_B\n        if self.start_A is not None:\n"
        "            A, B = torch.cat([A, self.start_A]), torch.cat([B, self.start_B], 1)",
        "the start is added",
    ),
    Mutant("transposed", '"or,ri->oi"', '"or,ri->io"', "transposed"),
    Mutant("A @ B", 'torch.einsum("or,ri->oi", B, A)', "(A @ B)", "the product is B @ A"),
    Mutant(
        "in place",
        "return torch",
        "B = B.detach().mul_(self.scaling)\n        return 1 / self.scaling * torch",
        "B *= s",
    ),
    Mutant("in bfloat16", "A, B = A.float(), B.float()", "pass", "widen A and B before they are multiplied"),
    Mutant(
        "widened too late",
        ("A, B = A.float(), B.float()", 'torch.einsum("or,ri->oi", B, A)'),
        ("pass", "(B @ A).to(torch.promote_types(A.dtype, torch.float32))"),
        "widened too late",
    ),
    Mutant("always float32", "if A.dtype in (torch.float16, torch.bfloat16)", "if True", "float64 was narrowed"),
    Mutant("merge nothing", "base.weight.copy_(total)", "total.copy_(base.weight)", "nothing was added"),
    Mutant("the update alone", "self.delta_weight() + base.weight", "self.delta_weight()", "the update alone is left"),
    Mutant("without scaling", "self.delta_weight() +", "self.lora_B @ self.lora_A +", "added without the scaling"),
    Mutant(
        "merge s·BA",
        "self.delta_weight()",
        "LoRALinear.delta_weight(self)",
        "merge adds self.delta_weight()",
    ),
    Mutant(
        "merge without the start",
        "self.delta_weight() +",
        "(self.delta_weight() if self.start_A is None else self.scaling * self.lora_B @ self.lora_A) +",
        "that is all of s·BA",
    ),
    Mutant(
        "rounded twice",
        "self.delta_weight() + base.weight",
        "self.delta_weight().to(base.weight.dtype) + base.weight",
        "rounded to bfloat16 before it was added",
    ),
    Mutant("weight widened", "base.weight.copy_(total)", "base.weight.data = total", "stay in bfloat16"),
    Mutant("merge twice adds twice", "if not self.merged:\n            self", "if True:\n            self", "again"),
    Mutant("a reference is kept", "base.weight.data.clone()", "base.weight.data", "keep a clone"),
    Mutant("nothing is kept", "self.original_weight = base.weight.data.clone()", "pass", "self.merged looks for it"),
    Mutant(
        "unmerge subtracts",
        "self.base_layer.weight.data[:] = self.original_weight",
        "self.base_layer.weight.data -= self.delta_weight()",
        "put original_weight back",
    ),
    Mutant(
        "unmerge restores nothing",
        "self.base_layer.weight.data[:] = self.original_weight",
        "pass",
        "the merged weight is still there",
    ),
    Mutant("merged for ever", "self.original_weight = None", "pass", "set original_weight to None"),
    Mutant("unmerge without merge", "if not self.merged:\n            return", "pass", "raised TypeError"),
    Mutant("graph recorded", "with torch.no_grad()", "with torch.enable_grad()", "under torch.no_grad()"),
    Mutant(
        "a new parameter",
        "base.weight.copy_(total)",
        "base.weight = nn.Parameter(total.to(base.weight.dtype))",
        "change the numbers of the old one",
    ),
    Mutant(
        "a new frozen parameter",
        "base.weight.copy_(total)",
        "base.weight = nn.Parameter(total.to(base.weight.dtype), requires_grad=False)",
        "others hold the old parameter",
    ),
    Mutant("no guard", GUARD, "", "only an nn.Linear's weight"),
    Mutant("guard without a name", "{type(base).__name__}", "module", "should name NotLinear"),
    Mutant(
        "guard too late",
        (GUARD, "            with torch.no_grad"),
        (
            "",
            GUARD.replace("        if", "            if").replace("    raise", "        raise")
            + "            with torch.no_grad",
        ),
        "refuse before original_weight is set",
    ),
]
