"""Exercise 03: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "lora": """
from itertools import chain as all_of


class LoRALinear:
    def __init__(self, base_layer, r, lora_alpha, lora_dropout=0.0, use_rslora=False):
        nn.Module.__init__(self)
        check_hyperparameters(r, lora_alpha, lora_dropout)
        d, out = base_layer.in_features, base_layer.out_features
        self.base_layer = base_layer
        self.in_features, self.out_features, self.enabled = d, out, True
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        root = r**0.5
        self.scaling = lora_alpha / root if use_rslora else lora_alpha / r
        tensor = list(all_of(base_layer.parameters(), base_layer.buffers()))[0]
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        A = torch.rand(r, d, dtype=wide, device=tensor.device)
        A = (2 * A - 1) / d**0.5
        B = torch.zeros((out, r), dtype=wide, device=tensor.device)
        self.lora_A = nn.Parameter(A)
        self.lora_B = nn.Parameter(B)
        self.register_buffer("original_weight", None, persistent=False)
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        if not base_layer.training:
            self.eval()
""",
    "adapters.inject": """
def train_adapter_only(model):
    chosen = {id(parameter) for parameter in adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = id(parameter) in chosen
    return model
""",
}

DRAWN = "A = (2 * A - 1) / d**0.5"
CHOSEN = "parameter.requires_grad = id(parameter) in chosen"

MUTANTS = [
    Mutant(
        "A and B swapped",
        ("A = torch.rand(r, d,", "zeros((out, r)"),
        ("A = torch.rand(out, r,", "zeros((r, d)"),
        "A and B have changed places",
    ),
    Mutant("A as (in, r)", "torch.rand(r, d,", "torch.rand(d, r,", "A lies on its side"),
    Mutant("B as (r, out)", "zeros((out, r)", "zeros((r, out)", "B lies on its side"),
    Mutant(
        "both on their side",
        ("torch.rand(r, d,", "zeros((out, r)"),
        ("torch.rand(d, r,", "zeros((r, out)"),
        "both lie on their side",
    ),
    Mutant(
        "in and out swapped",
        "d, out = base_layer.in_features, base_layer.out_features",
        "out, d = base_layer.in_features, base_layer.out_features",
        "in_features: expected",
    ),
    Mutant("no parameters", "= nn.Parameter(A)", "= A", "the layer's own parameters"),
    Mutant(
        "a copy of the base",
        "self.base_layer = base_layer",
        "import copy\n        self.base_layer = copy.deepcopy(base_layer)",
        "no copy of it",
    ),
    Mutant("alpha not divided", "else lora_alpha / r", "else float(lora_alpha)", "lora_alpha is not divided"),
    Mutant("rsLoRA for all", " if use_rslora else lora_alpha / r", "", "square root of r is for use_rslora"),
    Mutant("rsLoRA forgotten", "if use_rslora else", "if False else", "use_rslora changes nothing"),
    Mutant("A zero, B random", (DRAWN, "zeros((out"), ("A = 0 * A", "randn((out"), "it is the other way round"),
    Mutant("both zero", DRAWN, "A = 0 * A", "both are zero"),
    Mutant("both random", "torch.zeros((out", "torch.randn((out", "both are random"),
    Mutant("A all alike", DRAWN, "A = torch.ones_like(A) / d**0.5", "draw each number of A by itself"),
    Mutant("seeded", "A = torch.rand(r", "torch.manual_seed(0)\n        A = torch.rand(r", "do not seed"),
    Mutant("fan is r", DRAWN, "A = (2 * A - 1) / r**0.5", "the bound is 1/sqrt(r)"),
    Mutant("kaiming without a", DRAWN, "nn.init.kaiming_uniform_(A)", "without a=math.sqrt(5)"),
    Mutant(
        "kaiming over (in, r)",
        DRAWN,
        "A = nn.init.kaiming_uniform_(A.T.clone(), a=5**0.5).T.contiguous()",
        "the bound is 1/sqrt(r)",
    ),
    Mutant("normal 1/sqrt(in)", DRAWN, "A = torch.randn_like(A) / d**0.5", "the spread is 1/sqrt(in) itself"),
    Mutant("normal of the right spread", DRAWN, "A = torch.randn_like(A) / (3 * d) ** 0.5", "the numbers are normal"),
    Mutant("unit normal", DRAWN, "A = torch.randn_like(A)", "as large as 1"),
    Mutant("no negative numbers", DRAWN, "A = A / d**0.5", "without negative numbers"),
    Mutant("from 0 to 1", DRAWN, "pass", "uniform from 0 to 1"),
    Mutant(
        "half precision",
        "torch.float64 if tensor.dtype == torch.float64 else torch.float32",
        "tensor.dtype if tensor.is_floating_point() else torch.float32",
        "the small steps of training round away",
    ),
    Mutant("always float32", "torch.float64 if", "torch.float32 if", "the wider of the base's dtype"),
    Mutant(
        "weight of the base",
        "list(all_of(base_layer.parameters(), base_layer.buffers()))[0]",
        "base_layer.weight",
        "has no weight",
    ),
    Mutant(
        "on the CPU",
        "A = torch.rand(r, d, dtype=wide, device=tensor.device)",
        "A = torch.rand(r, d, dtype=wide)",
        "on the device of what the base stores",
    ),
    Mutant("always training", "if not base_layer.training", "if False", "take the base's mode"),
    Mutant("plain attribute", 'self.register_buffer("start_A", None)', "self.start_A = None", "does not move with"),
    Mutant("saved twice", "None, persistent=False", "None", "the W from before merging is saved"),
    Mutant("unchecked", "        check_hyperparameters(r, lora_alpha, lora_dropout)\n", "", "call check_hyper"),
    Mutant("nothing frozen", CHOSEN, "parameter.requires_grad |= id(parameter) in chosen", "nothing is frozen"),
    Mutant("one way only", CHOSEN, "parameter.requires_grad &= id(parameter) in chosen", "is not switched on"),
    Mutant("by the name lora", CHOSEN, 'parameter.requires_grad = "lora" in name', "go by the modules"),
    Mutant(
        "magnitude forgotten", CHOSEN, 'parameter.requires_grad = name.endswith(("lora_A", "lora_B"))', "DoRA's mag"
    ),
    Mutant(
        "base inside trainable",
        "parameter in adapter_parameters(model)",
        "_, layer in lora_layers(model) for parameter in layer.parameters()",
        "the base weights inside the LoRA layers",
    ),
    Mutant("only bases frozen", CHOSEN, 'parameter.requires_grad = ".base_layer." not in name', "only the bases"),
    Mutant("norm left", CHOSEN, CHOSEN + ' or "norm" in name', "the norm is left trainable"),
    Mutant("embedding and norm left", CHOSEN, CHOSEN + ' or name[0] in "en"', "the embedding and the norm are left"),
    Mutant("biases left", CHOSEN, CHOSEN + ' or name.endswith("bias")', "biases have to be as well"),
    Mutant("no return", "    return model", "    pass", "return the model"),
    Mutant("root forgotten", "id(parameter) in chosen\n", 'id(parameter) in chosen and "." in name\n', "may be a LoRA"),
    Mutant("starts afresh", CHOSEN, CHOSEN + "\n        parameter.data.mul_(0.5)", "values have changed"),
]
