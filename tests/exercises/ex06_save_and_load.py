"""Exercise 06: a solution in other words, and mistakes in it."""

from mutants import Mutant

SOLUTION = {
    "storage.adapters": """
from minilora.adapters.inject import check_targets, pattern_value
from minilora.storage.fingerprint import fingerprint
from minilora.storage.folders import write_pair


def key_of(layer, part):
    return f"base_model.model.{layer}.{part}{'' if 'magnitude' in part else '.weight'}"


def save_adapter(model, directory):
    adapter = extract_adapter(model)
    tensors = {}
    for layer in adapter.A:
        tensors[key_of(layer, "lora_A")] = adapter.A[layer].to(torch.float32)
        tensors[key_of(layer, "lora_B")] = adapter.B[layer].to(torch.float32)
        if layer in adapter.magnitude:
            tensors[key_of(layer, "lora_magnitude_vector")] = adapter.magnitude[layer].to(torch.float32)
    notes = {"format": "pt", "base_fingerprint": fingerprint(model)}
    settings = {**vars(adapter.config), **LORA_FIELDS}
    write_pair(Path(directory), ADAPTER_WEIGHTS, tensors, notes, ADAPTER_CONFIG, settings)


def read_adapter(model, directory, force=False):
    directory = Path(directory)
    check_directory(directory)
    config = _read_config(directory / "adapter_config.json")
    with torch.device("meta"):
        other = GPT(model.config)
    shapes = {}
    layers = check_targets(other, config)
    for layer in layers:
        linear = other.get_submodule(layer)
        r = pattern_value(config.rank_pattern, layer, config.r)
        shapes[key_of(layer, "lora_A")] = (r, linear.in_features)
        shapes[key_of(layer, "lora_B")] = (linear.out_features, r)
        if config.use_dora:
            shapes[key_of(layer, "lora_magnitude_vector")] = (linear.out_features,)
    with open_safetensors(directory / "adapter_model.safetensors") as file:
        notes = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    faults = [f"missing {key}" for key in shapes if key not in tensors]
    faults += [f"unknown {key}" for key in tensors if key not in shapes]
    faults += [f"shape of {key}" for key in shapes if key in tensors and tuple(tensors[key].shape) != shapes[key]]
    faults += [f"type of {key}" for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if faults:
        raise ValueError(f"{directory} does not fit: " + ", ".join(faults))
    if not force and notes.get("base_fingerprint", fingerprint(model)) != fingerprint(model):
        raise ValueError(f"{directory} was trained on another base")
    parts = [{}, {}, {}]
    for layer in layers:
        for place, part in zip(parts, ("lora_A", "lora_B", "lora_magnitude_vector")):
            if key_of(layer, part) in tensors:
                place[layer] = tensors[key_of(layer, part)]
    return Adapter(config, *parts)
"""
}

META = """    with torch.device("meta"):
        other = GPT(model.config)
"""
BOTH = """    with torch.device("meta"):
        apply_lora(GPT(model.config), config)
    other = apply_lora(model, config)
"""
FAULTS = 'raise ValueError(f"{directory} does not fit: " + ", ".join(faults))'

MUTANTS = [
    Mutant("no prefix", 'f"base_model.model.{layer}', 'f"{layer}', "the names begin with base_model.model."),
    Mutant(
        "short prefix", 'f"base_model.model.{layer}', 'f"base_model.{layer}', "the names begin with base_model.model."
    ),
    Mutant("no .weight", "else '.weight'", "else ''", "the names of A and B end in .weight"),
    Mutant("default in the name", "else '.weight'", "else '.default.weight'", "not in its files"),
    Mutant("B as A", '"lora_A")] = adapter.A[layer]', '"lora_A")] = 1 * adapter.B[layer]', "exchanged"),
    Mutant("transposed", "adapter.B[layer].to", "adapter.B[layer].T.to", "stored transposed"),
    Mutant("float16", "adapter.A[layer].to", "adapter.A[layer].half().to", "rounded to float16 on the way"),
    Mutant("bfloat16", "adapter.B[layer].to", "adapter.B[layer].bfloat16().to", "rounded to bfloat16"),
    Mutant(
        "the model's own type", "adapter.A[layer].to(torch.float32)", "adapter.A[layer]", "whatever the model is in"
    ),
    Mutant(
        "no config",
        "write_pair(Path(directory), ADAPTER_WEIGHTS, tensors, notes, ADAPTER_CONFIG, settings)",
        "only_tensors(Path(directory), tensors, notes)",
        "ADAPTER_CONFIG are their names",
    ),
    Mutant("no peft_type", "{**vars(adapter.config), **LORA_FIELDS}", "vars(adapter.config)", "PEFT asks which method"),
    Mutant(
        "few settings",
        "{**vars(adapter.config), **LORA_FIELDS}",
        "{**LORA_FIELDS, **{key: getattr(adapter.config, key) for key in ('r', 'lora_alpha', 'target_modules')}}",
        "the setting is not in the file",
    ),
    Mutant(
        "default config",
        "vars(adapter.config), **LORA_FIELDS",
        "vars(LoRAConfig()), **LORA_FIELDS",
        "that is the default",
    ),
    Mutant("the model's config", "vars(adapter.config)", "vars(model.lora_config)", "the config must fit the tensors"),
    Mutant("no fingerprint", ', "base_fingerprint": fingerprint(model)}', "}", "write_adapter puts it there"),
    Mutant(
        "fingerprint of the merged weights",
        "fingerprint(model)}",
        "of_merged(model)}",
        "a merged weight is not among them",
    ),
    Mutant("no magnitude", "if layer in adapter.magnitude", "if False", "DoRA's magnitude is not saved"),
    Mutant("magnitude.weight", "'' if 'magnitude' in part else '.weight'", "'.weight'", "has no .weight behind it"),
    Mutant(
        "PiSSA as it is",
        "adapter = extract_adapter(model)",
        "adapter = as_it_is(model)",
        "extract_adapter has made plain LoRA of it",
    ),
    Mutant(
        "plain model saved",
        "adapter = extract_adapter(model)",
        "adapter = extract_or_nothing(model)",
        "extract_adapter refuses",
    ),
    Mutant(
        "folder made first",
        "    adapter = extract_adapter(model)",
        "    Path(directory).mkdir(exist_ok=True)\n    adapter = extract_adapter(model)",
        "before anything is written",
    ),
    Mutant("saving unfreezes", 'notes = {"f', 'model.requires_grad_(True)\n    notes = {"f', "saving only looks"),
    Mutant("model wrapped", META, BOTH, "read_adapter must not touch the model"),
    Mutant("a dictionary", "return Adapter(config, *parts)", "return tensors", "expected an Adapter, got dict"),
    Mutant(
        "keys with the prefix", "place[layer] =", 'place["base_model.model." + layer] =', "without the file's prefix"
    ),
    Mutant("keys of tensors", "place[layer] =", "place[key_of(layer, part)] =", "not names of tensors"),
    Mutant("read as B and A", "*parts)", "*parts[1::-1])", "A and B are exchanged"),
    Mutant("read rounded", "file.get_tensor(key) for", "file.get_tensor(key).half().float() for", "rounded to float16"),
    Mutant(
        "one rank for all",
        "r = pattern_value(config.rank_pattern, layer, config.r)",
        "r = config.r",
        "each layer has its own r",
    ),
    Mutant("base not compared", "if not force and", "if False and", "compares the file's fingerprint"),
    Mutant("force ignored", "if not force and", "if", "force=True forgives another base"),
    Mutant(
        "fingerprint demanded", '"base_fingerprint", fingerprint(model))', '"base_fingerprint")', "nothing to compare"
    ),
    Mutant("force forgives all", "if faults", "if faults and not force", "check all names and shapes"),
    Mutant("missing not noticed", "if key not in tensors]", "if False]", "check all names and shapes"),
    Mutant("extra not noticed", "if key not in shapes]", "if False]", "check all names and shapes"),
    Mutant("shapes not compared", "!= shapes[key]", "!= tuple(tensors[key].shape)", "check all names and shapes"),
    Mutant("the first alone is named", '", ".join(faults)', "faults[0]", "should name"),
    Mutant(
        "folder not checked",
        "    check_directory(directory)\n",
        "    if not directory.is_dir():\n        return None\n",
        "expected a FileNotFoundError",
    ),
    Mutant(
        "config not checked",
        '_read_config(directory / "adapter_config.json")',
        'lenient(directory / "adapter_config.json")',
        "_read_config refuses it",
    ),
    Mutant(
        "unknown target ignored",
        "check_targets(other, config)",
        "by_suffix(other, config)",
        "a target that matches no layer",
    ),
    Mutant(
        "damage passed on",
        "open_safetensors(directory",
        "safetensors.safe_open(framework='pt', filename=directory",
        "raised SafetensorError",
    ),
]

# What the mutants call.
SOLUTION["storage.adapters"] += """

import safetensors
from minilora.storage.files import write_safetensors
from minilora.storage.fingerprint import base_weights, weight_mark


def only_tensors(directory, tensors, notes):
    write_safetensors(directory / ADAPTER_WEIGHTS, tensors, notes)


def of_merged(model):
    if not any(layer.merged for _, layer in lora_layers(model)):
        return fingerprint(model)
    return str([weight_mark(weight) for weight in base_weights(model).values()])


def as_it_is(model):
    A, B = ({name: getattr(layer, part) for name, layer in lora_layers(model)} for part in ("lora_A", "lora_B"))
    if model.lora_config.use_dora:
        return extract_adapter(model)
    if not A:
        raise ValueError("no LoRA layers")
    return Adapter(model.lora_config, A, B)


def extract_or_nothing(model):
    return extract_adapter(model) if any(lora_layers(model)) else Adapter(LoRAConfig(), {}, {})


def lenient(path):
    settings = read_json(path)
    return LoRAConfig(**{f.name: settings[f.name] for f in fields(LoRAConfig) if f.name in settings})


def by_suffix(model, config):
    return [name for name, _ in model.named_modules() if name.rpartition(".")[2] in config.target_modules]
"""
