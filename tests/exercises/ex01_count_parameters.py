"""Exercise 01: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "adapters.inject": """
def size_of(tensor):
    n = 1
    for length in tensor.shape:
        n = n * length
    return n


def count_parameters(model):
    seen, trainable, frozen = set(), 0, 0
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in seen:
                continue
            seen.add(id(p))
            if p.requires_grad:
                trainable = trainable + size_of(p)
            else:
                frozen = frozen + size_of(p)
        if isinstance(module, Linear4bit):
            frozen = frozen + module.out_features * module.in_features
    return trainable, trainable + frozen
"""
}

FOUR_BITS = "frozen = frozen + module.out_features * module.in_features"

MUTANTS = [
    Mutant(
        "a list", "return trainable, trainable + frozen", "return [trainable, trainable + frozen]", "expected a tuple"
    ),
    Mutant("tensors counted", "    return n\n\n\ndef", "    return 1\n\n\ndef", "the number of tensors"),
    Mutant("bytes", "return n\n", "return n * tensor.element_size()\n", "those are bytes"),
    Mutant(
        "matrices only",
        "    n = 1\n",
        "    n = 1\n    if tensor.dim() != 2:\n        return 0\n",
        "only matrices are counted",
    ),
    Mutant("frozen as trainable", "if p.requires_grad", "if True", "frozen parameters are counted as trainable"),
    Mutant("swapped pair", "trainable, trainable + frozen", "trainable + frozen, trainable", "the wrong way round"),
    Mutant("frozen instead of all", "trainable, trainable + frozen", "trainable, frozen", "of the frozen ones"),
    Mutant("requires_grad inverted", "if p.requires_grad", "if not p.requires_grad", "the first number is that of the"),
    Mutant("frozen left out", "trainable, trainable + frozen", "trainable, trainable", "are left out of the second"),
    Mutant(
        "unfreezes",
        "    return trainable, trainable",
        "    model.requires_grad_(True)\n    return trainable, trainable",
        "has changed requires_grad",
    ),
    Mutant("tied twice", "if id(p) in seen", "if False", "the shared weight is counted twice"),
    Mutant(
        "shared layer twice",
        "in model.modules():",
        "in (m for _, m in model.named_modules(remove_duplicate=False)):\n        seen = set()",
        "the shared weight is counted twice",
    ),
    Mutant(
        "equal for shared",
        ("= set(), 0, 0", "if id(p) in seen", "seen.add(id(p))"),
        (
            "= [], 0, 0",
            "if any(p.shape == q.shape and bool((p == q).all()) for q in seen)",
            "seen.append(p)",
        ),
        "happen to hold the same numbers",
    ),
    Mutant(
        "told apart by address",
        ("if id(p) in seen", "seen.add(id(p))"),
        ("if p.data_ptr() in seen", "seen.add(p.data_ptr())"),
        "tell parameters apart by object",
    ),
    Mutant(
        "buffers counted",
        "        if isinstance(module, Linear4bit):",
        "        frozen = frozen + sum(b.numel() for b in module.buffers(recurse=False))\n"
        "        if isinstance(module, Linear4bit):",
        "the buffers are counted: the batch norm",
    ),
    Mutant("4 bits forgotten", FOUR_BITS, "pass", "is not counted: it is in buffers"),
    Mutant("4 bits as bytes", FOUR_BITS, "frozen += module.codes.numel()", "the codes are counted, two weights"),
    Mutant("4 bits as twice the bytes", FOUR_BITS, "frozen += 2 * module.codes.numel()", "one too many for an odd"),
    Mutant("4 bits as stored", FOUR_BITS, "frozen += sum(b.numel() for b in module.buffers())", "the buffers of the"),
    Mutant("4 bits trainable", FOUR_BITS, FOUR_BITS.replace("frozen", "trainable"), "counted as trainable; it is"),
    Mutant(
        "4 bits around and inside",
        "if isinstance(module, Linear4bit)",
        "if isinstance(getattr(module, 'base_layer', module), Linear4bit)",
        "are both counted",
    ),
]
