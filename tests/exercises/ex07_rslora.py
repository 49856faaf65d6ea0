"""Exercise 07: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "config": """
def lora_scaling(r, lora_alpha, use_rslora=False):
    power = 0.5 if use_rslora else 1
    return lora_alpha * r ** -power
"""
}

RETURN = "return lora_alpha * r ** -power"

MUTANTS = [
    Mutant("root over alpha too", RETURN, "return (lora_alpha / r) ** power", "not over alpha / r"),
    Mutant("root over alpha alone", RETURN, "return lora_alpha**power / r", "the root is over r alone, not over alpha"),
    Mutant("always the root", "0.5 if use_rslora else 1", "0.5", "that is rsLoRA's scaling, and use_rslora is False"),
    Mutant("never the root", "0.5 if use_rslora else 1", "1", "that is plain LoRA's scaling, and use_rslora is True"),
    Mutant("squared", "0.5 if use_rslora else 1", "2 if use_rslora else 1", "that is alpha / r²"),
    Mutant("integer division", RETURN, "return lora_alpha // r**power", "use /, not //"),
    Mutant("the wrong way round", "0.5 if use_rslora else 1", "1 if use_rslora else 0.5", "that is rsLoRA's scaling"),
    Mutant("rsLoRA by default", "use_rslora=False", "use_rslora=True", "is use_rslora False by default"),
    Mutant("upside down", RETURN, "return r**power / lora_alpha", "upside down"),
    Mutant("alpha forgotten", RETURN, "return r**-power", "alpha is missing"),
    Mutant("multiplied", "-power", "power", "alpha is divided by it"),
    Mutant("whole root", RETURN, "return lora_alpha / int(r**power)", "rounded to a whole number"),
    Mutant("int", RETURN, "return int(lora_alpha / r**power)", "rounded down"),
    Mutant("a tensor", RETURN, "import torch\n    return torch.tensor(lora_alpha / r**power)", "got Tensor"),
    Mutant("no scaling at r = 1", "    power", "    if r == 1:\n        return 1.0\n    power", "r = 1, lora_alpha"),
    Mutant(
        "high ranks turned up",
        "    power",
        "    if r == 64:\n        return float(lora_alpha)\n    power",
        "depends on the rank in another way",
    ),
]
