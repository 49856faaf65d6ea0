"""Exercise 08: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "adapters.variants": """
def loraplus_groups(model, lr, ratio=16):
    for name, value in {"lr": lr, "ratio": ratio}.items():
        if value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}")
    quick = {}
    for _, layer in lora_layers(model):
        for name in ("lora_B", "lora_magnitude_vector"):
            if hasattr(layer, name):
                quick[id(getattr(layer, name))] = getattr(layer, name)
    if len(quick) == 0:
        raise ValueError("no LoRA layers in this model")
    groups = [dict(params=[], lr=lr), dict(params=[], lr=lr * ratio)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[id(parameter) in quick]["params"].append(parameter)
    return groups
"""
}

PICK = "groups[id(parameter) in quick]"
LOOP = "    for parameter in model.parameters():\n"

MUTANTS = [
    Mutant("ratio on A", PICK, "groups[id(parameter) not in quick]", "the wrong way round"),
    Mutant("both fast", "dict(params=[], lr=lr),", "dict(params=[], lr=lr * ratio),", "A learns at ratio · lr as well"),
    Mutant("both slow", "lr=lr * ratio", "lr=lr", "B learns no faster than A"),
    Mutant("divided", "lr=lr * ratio", "lr=lr / ratio", "do not divide"),
    Mutant(
        "A slowed down",
        ("dict(params=[], lr=lr),", "lr=lr * ratio"),
        ("dict(params=[], lr=lr / ratio),", "lr=lr"),
        "A is slowed down",
    ),
    Mutant("ratio as the rate", "lr=lr * ratio", "lr=ratio", "B is given ratio alone"),
    Mutant("fast first", "return groups", "return groups[::-1]", "the slow group comes first"),
    Mutant("another default", "ratio=16", "ratio=8", "the default of ratio is 16"),
    Mutant(
        "a group each",
        "return groups",
        "return [dict(params=[p], lr=group['lr']) for group in groups for p in group['params']]",
        "all A's share one group",
    ),
    Mutant("the adapter alone", LOOP, "    for parameter in adapter(model):\n", "does not learn"),
    Mutant("shared weight twice", LOOP, "    for parameter in by_module(model):\n", "gives a shared weight once"),
    Mutant("all but A is fast", PICK, "groups[id(parameter) not in all_A(model)]", "not everything that is not A"),
    Mutant("magnitude slow", '("lora_B", "lora_magnitude_vector")', '("lora_B",)', "lora_magnitude_vector goes with B"),
    Mutant("magnitude missing", LOOP, LOOP + "        if parameter.ndim < 2: continue\n", "missing blocks.0.lora_mag"),
    Mutant("frozen ones too", "if parameter.requires_grad", "if True", "take only parameters with requires_grad"),
    Mutant("unfreezes A", LOOP, "    unfreeze(model)\n" + LOOP, "only sorts the parameters"),
    Mutant("B in both", LOOP, "    groups[0]['params'] += quick.values()\n" + LOOP, "in one group, once"),
    Mutant("copies", "append(parameter)", "append(nn.Parameter(parameter.clone()))", "not copies"),
    Mutant("lists compared", "id(parameter) in quick]", "parameter in list(quick.values())]", "raised RuntimeError"),
    Mutant("another key", "dict(params=[], lr=lr * ratio)", "dict(params=[], rate=lr * ratio)", "KeyError: 'lr'"),
    Mutant("lr not refused", '{"lr": lr, "ratio": ratio}', '{"ratio": ratio}', "lr must be above 0"),
    Mutant("ratio not refused", '{"lr": lr, "ratio": ratio}', '{"lr": lr}', "ratio must be above 0"),
    Mutant("0 not refused", "value <= 0", "value < 0", "0 and negative numbers"),
    Mutant("error without a name", 'f"{name} must be', 'f"This must be', "should name lr"),
    Mutant("plain model not refused", "len(quick) == 0", "False", "without LoRA layers there is no B"),
]

# What the mutants call.
SOLUTION["adapters.variants"] += """

def adapter(model):
    return [p for _, layer in lora_layers(model) for p in layer.parameters(recurse=False)]

def by_module(model):
    return [p for module in model.modules() for p in module.parameters(recurse=False)]

def all_A(model):
    return {id(layer.lora_A) for _, layer in lora_layers(model)}

def unfreeze(model):
    for _, layer in lora_layers(model):
        layer.lora_A.requires_grad_(True)
"""
