"""Exercise 04: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "adapters.inject": """
def hits(name, entry):
    parts, wanted = name.split("."), entry.split(".")
    return parts[len(parts) - len(wanted):] == wanted if len(wanted) <= len(parts) else False


def find_targets(names, targets):
    if targets == "all-linear":
        return [n for n in names if n.split(".")[-1] != "lm_head"]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as problem:
            raise ValueError(f"{targets} is broken: {problem}")
        result = [n for n in names if pattern.fullmatch(n) is not None]
        if result == []:
            raise ValueError(f"{targets} matches no layer")
        return result
    if len(targets) == 0:
        raise ValueError("no targets given")
    result, used = set(), set()
    for entry in targets:
        for n in names:
            if hits(n, entry):
                result.add(n)
                used.add(entry)
    unused = [entry for entry in targets if entry not in used]
    if unused:
        raise ValueError(f"nothing is called {unused}")
    return [n for n in names if n in result]


def apply_lora(model, config, batches=None):
    chosen = check_targets(model, config)
    for name in chosen:
        old = model.get_submodule(name)
        r = pattern_value(config.rank_pattern, name, config.r)
        if r > old.in_features or r > old.out_features:
            warnings.warn(f"{name} cannot use a rank of {r}")
        *path, last = name.split(".")
        above = model
        for part in path:
            above = getattr(above, part)
        setattr(above, last, make_layer(old, name, config))
    train_adapter_only(model)
    model.lora_config = config
    return model
"""
}

SUFFIX = "return parts[len(parts) - len(wanted):] == wanted if len(wanted) <= len(parts) else False"
CHOSEN = "chosen = check_targets(model, config)"
LAST = "return [n for n in names if n in result]"
MADE = "make_layer(old, name, config)"
TOO_HIGH = "r > old.in_features or r > old.out_features"
FULL = "pattern.fullmatch(n)"

MUTANTS = [
    Mutant("end without a dot", SUFFIX, "return name.endswith(entry)", "an end has to begin after a dot"),
    Mutant("anywhere", SUFFIX, "return entry in name", "anywhere in a name"),
    Mutant("whole names only", SUFFIX, "return name == entry", "only whole names are found"),
    Mutant("ends only", SUFFIX, 'return name.endswith("." + entry)', "a whole name is not found"),
    Mutant("last part only", SUFFIX, "return parts[-1] == entry", "only the last part of a name is compared"),
    Mutant("last parts of both", SUFFIX, "return parts[-1] == wanted[-1]", "only the last part of a name is compared"),
    Mutant(
        "order of the targets",
        LAST,
        "return list(dict.fromkeys(n for entry in targets for n in names if hits(n, entry)))",
        "the order is that of the targets; it should",
    ),
    Mutant(
        "order of the targets, twice",
        LAST,
        "return [n for entry in targets for n in names if hits(n, entry)]",
        "and a layer that two targets name comes twice",
    ),
    Mutant("twice", LAST, "return [n for n in names for entry in targets if hits(n, entry)]", "name comes twice"),
    Mutant("sorted", LAST, "return sorted(result)", "the names are sorted"),
    Mutant("eats the targets", "used.add(entry)\n", "used.add(entry)\n    targets.sort()\n", "lists that were given"),
    Mutant("search", FULL, "pattern.search(n)", "it matches anywhere in a name"),
    Mutant("match", FULL, "pattern.match(n)", "it matches the beginning of a name"),
    Mutant("match up to $", FULL, 're.match(targets + "$", n)', "it matches the beginning of a name"),
    Mutant(
        "a string as an entry",
        "if isinstance(targets, str)",
        "targets = [targets] if isinstance(targets, str) else targets\n    if isinstance(targets, str)",
        "a string is taken for a list entry",
    ),
    Mutant("a string as letters", "if isinstance(targets, str)", "if False", "no list of targets or of letters"),
    Mutant("with the head", 'n.split(".")[-1] != "lm_head"', "True", "the output head is among them"),
    Mutant("the head at the top only", 'n.split(".")[-1] != "lm_head"', 'n != "lm_head"', "the head may lie deeper"),
    Mutant(
        "no lm_head anywhere", 'n.split(".")[-1] != "lm_head"', '"lm_head" not in n', "all with lm_head in the name"
    ),
    Mutant("all-linear unknown", 'targets == "all-linear"', "False", "a word of its own"),
    Mutant("typo ignored", "    if unused:", "    if not used:", "each entry has to match"),
    Mutant("first typo only", "nothing is called {unused}", "nothing is called {unused[0]}", "should name dense"),
    Mutant("empty list", "if len(targets) == 0", "if False", "an empty list chooses nothing"),
    Mutant("expression without a match", "if result == []", "if False", "that matches no name is refused"),
    Mutant("broken expression", "except re.error as", "except OSError as", "a broken expression raises re.error"),
    Mutant(
        "no wrapper put in",
        "setattr(above, last, make_layer(old, name, config))",
        "old = " + MADE,
        "no wrapper is in the",
    ),
    Mutant("a name with dots", "setattr(above, last,", "setattr(model, name,", "no wrapper is in the model"),
    Mutant("all linear layers", CHOSEN, CHOSEN + "\n    chosen = list(linear_layers(model))", "every linear layer is"),
    Mutant(
        "nn.Linear only",
        CHOSEN,
        CHOSEN + "\n    chosen = [n for n in chosen if isinstance(model.get_submodule(n), nn.Linear)]",
        "layers in 4 bits are passed over",
    ),
    Mutant("first only", "for name in chosen", "for name in chosen[:1]", "only the first target is wrapped"),
    Mutant("a copy", MADE, "make_layer(__import__('copy').deepcopy(old), name, config)", "wrap the layer itself"),
    Mutant(
        "weights changed",
        "above = model\n",
        "above = model\n        next(old.parameters()).data.mul_(0.5)\n        next(old.parameters()).data.add_(1)\n",
        "applying LoRA changes no weight",
    ),
    Mutant(
        "no return", "    model.lora_config = config\n    return model", "    model.lora_config = config", "return the"
    ),
    Mutant(
        "rank_pattern ignored",
        MADE,
        "LoRALinear(old, config.r, pattern_value(config.alpha_pattern, name, config.lora_alpha), config.lora_dropout)",
        "rank_pattern is passed over",
    ),
    Mutant(
        "alpha_pattern ignored",
        MADE,
        "LoRALinear(old, r, config.lora_alpha, config.lora_dropout)",
        "alpha_pattern is passed over",
    ),
    Mutant(
        "dropout forgotten",
        MADE,
        "LoRALinear(old, r, pattern_value(config.alpha_pattern, name, config.lora_alpha))",
        "lora_dropout is not passed on",
    ),
    Mutant("config not noted", "    model.lora_config = config\n", "", "note it: model.lora_config = config"),
    Mutant("nothing frozen", "    train_adapter_only(model)\n", "", "nothing is frozen"),
    Mutant(
        "frozen too late", "    train_adapter_only(model)\n", "    model.requires_grad_(False)\n", "A and B are frozen"
    ),
    Mutant(
        "only bases frozen",
        "    train_adapter_only(model)\n",
        "    for _, layer in lora_layers(model):\n        layer.base_layer.requires_grad_(False)\n",
        "the layers with an adapter are frozen, and the rest is not",
    ),
    Mutant(
        "changed before the check",
        CHOSEN,
        "for entry in config.target_modules if isinstance(config.target_modules, list) else []:\n"
        "        for name in find_targets(list(linear_layers(model)), [entry]):\n"
        "            replace_module(model, name, make_layer(model.get_submodule(name), name, config))\n"
        "    chosen = []",
        "first check everything, then change the model",
    ),
    Mutant(
        "frozen before the check", CHOSEN, "model.requires_grad_(False)\n    " + CHOSEN, "has changed requires_grad"
    ),
    Mutant("noted before the check", CHOSEN, "model.lora_config = config\n    " + CHOSEN, "has set lora_config"),
    Mutant(
        "patterns unchecked",
        CHOSEN,
        "chosen = find_targets(list(linear_layers(model)), config.target_modules)",
        "check_targets(model, config) refuses what does not match",
    ),
    Mutant(
        "applied twice",
        CHOSEN,
        "chosen = find_targets(list(linear_layers(model)), config.target_modules) if any(lora_layers(model)) "
        "else check_targets(model, config)",
        "a model that has LoRA layers is refused",
    ),
    Mutant("no warning", TOO_HIGH, "False", "no warning comes"),
    Mutant("warns at the limit", TOO_HIGH, "r >= min(old.in_features, old.out_features)", "no cause for a warning"),
    Mutant("largest as the limit", TOO_HIGH, "r > max(old.in_features, old.out_features)", "the limit is min(in, out)"),
    Mutant("in as the limit", TOO_HIGH, "r > old.in_features", "out limits the rank as well"),
    Mutant("out as the limit", TOO_HIGH, "r > old.out_features", "in limits the rank as well"),
    Mutant(
        "warned about config.r",
        "if " + TOO_HIGH,
        "if config.r > old.in_features or config.r > old.out_features",
        "the r that rank_pattern gives is passed over",
    ),
    Mutant("refused", "warnings.warn(f", "raise ValueError(f", "warn, and go on"),
]
