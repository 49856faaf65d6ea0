"""From a LoRA layer to a LoRA model: find the linear layers by name, wrap them, freeze the rest.

The model's own code is not changed. `apply_lora` puts a `LoRALinear` where a linear layer stood, and sets
`requires_grad` on every parameter, both ways: off for everything, on for A and B. Freezing matters as much as
wrapping: an optimizer that merely leaves out the base weights still has their gradients computed and held.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from minilora.adapters.dora import DoRALinear
from minilora.adapters.patterns import compile_pattern
from minilora.adapters.starts import check_start, eva_directions, loftq, start_layer
from minilora.config import LoRAConfig
from minilora.fast import FastLoRALinear
from minilora.linear4bit import Linear4bit, float_linears, quantized_layers, replace_module
from minilora.lora import LoRALinear
from minilora.quant import QLORA, Quantization, check_finite, quantize
from minilora.ranges import RANK


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """By full name, every nn.Linear and every layer that behaves as one, such as a Linear4bit."""
    modules = {name: module for name, module in model.named_modules() if not isinstance(module, LoRALinear)}
    return {name: m for name, m in modules.items() if hasattr(m, "in_features") and hasattr(m, "out_features")}


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every LoRALinear with its full name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def find_targets(names: list[str], targets: Sequence[str] | str) -> list[str]:
    """The names that `target_modules` means, by PEFT's rules. Raises ValueError, naming every entry without a match.

    A list holds whole names or suffixes that begin after a dot; one string is a regular expression that must match
    the whole name; "all-linear" is every linear layer but the output head.
    """
    if targets == "all-linear":
        return [name for name in names if name.rpartition(".")[2] != "lm_head"]
    known = f"the linear layers here are {', '.join(sorted({name.rpartition('.')[2] for name in names}))}"
    if isinstance(targets, str):
        try:
            found = [name for name in names if re.fullmatch(compile_pattern(targets), name)]
        except ValueError as error:
            raise ValueError(f"target_modules: {error}") from None
        if not found:
            raise ValueError(f"target_modules {targets!r} matches the whole name of no layer; {known}")
        return found

    def matches(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    missing = [target for target in targets if not any(matches(name, target) for name in names)]
    if missing or not targets:
        named = ", ".join(repr(target[:100]) for target in missing[:8]) or "[]"
        raise ValueError(f"target_modules {named} matches no layer; {known}")
    return [name for name in names if any(matches(name, target) for target in targets)]


def plain_names(model: nn.Module) -> list[str]:
    """The linear layers by the names that they have without LoRA."""
    return [name.removesuffix(".base_layer") for name in linear_layers(model)]


def target_list(model: nn.Module, names: list[str]) -> list[str]:
    """The shortest `target_modules` that means exactly these layers: the last words of their names, or the whole names
    where a last word would mean other layers too."""
    last_words = sorted({name.rpartition(".")[2] for name in names})
    return last_words if set(find_targets(plain_names(model), last_words)) == set(names) else sorted(names)


def matches_pattern(key: str, name: str) -> bool:
    """PEFT's rule for a key of rank_pattern or alpha_pattern: an expression for the name or its end after a dot."""
    return re.match(compile_pattern(rf"(.*\.)?({key})$"), name) is not None


def pattern_value(pattern: dict, name: str, default):
    """The value of the first key that matches the name."""
    return next((value for key, value in pattern.items() if matches_pattern(key, name)), default)


def layer_rank(config: LoRAConfig, name: str) -> int:
    return pattern_value(config.rank_pattern, name, config.r)


def make_layer(layer, name: str, config: LoRAConfig) -> LoRALinear:
    """The wrapper that `config` asks for around the layer of that full name."""
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    kind = DoRALinear if config.use_dora else FastLoRALinear
    return kind(layer, layer_rank(config, name), alpha, config.lora_dropout, config.use_rslora)


def check_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The names of the layers to wrap. Raises ValueError for LoRA layers, targets and keys without a match."""
    if any(lora_layers(model)):
        raise ValueError("the model already has LoRA layers; apply_lora works on a plain model")
    targets = find_targets(list(linear_layers(model)), config.target_modules)
    for pattern in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, pattern):
            if not any(matches_pattern(key, name) for name in targets):
                raise ValueError(f"{pattern} key {key[:100]!r} matches none of the layers that get an adapter")
    return targets


def apply_lora(model: nn.Module, config: LoRAConfig, batches: Tensor | Iterable[Tensor] | None = None) -> nn.Module:
    """Wraps the layers that `config.target_modules` names and freezes everything else. Changes and returns the model.

    batches: token ids (N, T), or several such tensors, from whose activations the start "eva" is computed. Raises
    ValueError, before anything is changed, for a model that already has adapters, a target that matches nothing, a key
    of rank_pattern or alpha_pattern that matches none of the targets, a start that the layers or the data cannot give,
    and an r above in + out of every layer. Warns where r exceeds what the layer can use.
    """
    targets, start = check_targets(model, config), config.init_lora_weights
    layers = {name: layer for name, layer in linear_layers(model).items() if name in targets}
    ranks = {name: layer_rank(config, name) for name in targets}
    most = max(layer.in_features + layer.out_features for layer in layers.values())
    for name, layer in layers.items():
        if ranks[name] > most:  # (in + out)² ≥ 4·in·out
            fault = f"r={ranks[name]} of {name} is above {most}, the most that in + out is in these layers"
            raise ValueError(f"{fault}; the adapter would hold four times as many numbers as the layer, or more")
        check_start(start, name, layer, ranks[name])
    directions: dict[str, Tensor] = {}
    if start == "eva":
        if batches is None:
            raise ValueError("init_lora_weights 'eva' starts from data: apply_lora(model, config, batches) takes it")
        directions = eva_directions(model, layers, ranks, batches)
    for name, layer in layers.items():
        r, full = ranks[name], min(layer.in_features, layer.out_features)
        if r > full:
            warnings.warn(f"r={r} exceeds the full rank {full} of {name}: no freedom is gained", stacklevel=2)
        wrapper = make_layer(layer, name, config)
        start_layer(wrapper, start, directions.get(name))
        replace_module(model, name, wrapper)
    vars(model)["lora_config"] = config
    return train_adapter_only(model)


def apply_loftq(model: nn.Module, config: LoRAConfig, quantization: Quantization = QLORA, rounds: int = 5) -> nn.Module:
    """`quantize_model` and `apply_lora`, with A and B that put back what 4 bits lose. Changes and returns the model.

    `starts.loftq` tells the errors of one weight. PEFT leaves s out, so its start is right only where lora_alpha = r.
    The adapter fits this 4-bit base and no other, so keep both: `save_adapter`, then `remove_lora` and `save_model`.
    Raises ValueError, before anything is changed, for what apply_lora and quantize_model refuse, rounds below 1, an r
    above a layer's full rank, another start in the config, and DoRA, whose magnitude would start from Q alone.
    """
    RANK.check("rounds", rounds)
    if config.init_lora_weights is not True or config.use_dora:
        found = "use_dora" if config.use_dora else f"init_lora_weights {config.init_lora_weights!r}"
        raise ValueError(f"LoftQ is a start of its own and does not go together with {found}")
    targets, in_4_bits, linears = check_targets(model, config), quantized_layers(model), float_linears(model)
    for name in targets:
        if name in in_4_bits:
            raise ValueError(f"{name} is in 4 bits already, and what was rounded away is gone; start on a float model")
        r = layer_rank(config, name)
        if name in linears and r > (full := min(linears[name].weight.shape)):
            raise ValueError(f"LoftQ cannot give r={r} directions of {name}, which has {full}")
    for name, linear in linears.items():
        check_finite(f"{name}.weight", linear.weight)

    apply_lora(model, config)
    layers = dict(lora_layers(model))
    for name in list(linears):
        linear = linears.pop(name)  # the last reference but the model's: its float weight is freed in this round
        if name in layers:
            layer = layers[name]
            quantized, A, B, _ = loftq(linear.weight, layer.r, layer.scaling, quantization, rounds)
            layer.lora_A.data.copy_(A)
            layer.lora_B.data.copy_(B)
            layer.base_layer = Linear4bit.from_linear(linear, quantized)
        else:
            quantized = quantize(linear.weight, **asdict(quantization))
            replace_module(model, name, Linear4bit.from_linear(linear, quantized))
    return model


def train_adapter_only(model: nn.Module) -> nn.Module:
    """Sets `requires_grad` on every parameter, both ways: on for the adapter's, off for all else. Returns the model."""
    model.requires_grad_(False)
    for trained in adapter_parameters(model):
        trained.requires_grad_(True)
    return model


def merge_lora(model: nn.Module):
    """Adds every update to its weight, so that a forward pass costs what the base model's does. Twice is once.

    Raises ValueError, before anything is changed, for a base in 4 bits, where W + ΔW would have to be rounded again,
    and for a weight that another module uses too (a tied output head): the update would reach that module as well.
    """
    users = [(name, p) for name, module in model.named_modules() for p in module.parameters(recurse=False)]
    for name, layer in lora_layers(model):
        if isinstance(layer.base_layer, Linear4bit):
            raise ValueError(f"cannot merge into {name}, which is in 4 bits; dequantize_model(model) and then merge")
        weight = getattr(layer.base_layer, "weight", None)
        if shared := [user for user, p in users if p is weight and user != f"{name}.base_layer"]:
            raise ValueError(f"cannot merge {name}: its weight is shared with {', '.join(shared)}")
    for _, layer in lora_layers(model):
        layer.merge()


def unmerge_lora(model: nn.Module):
    """Puts back the very weights that were there before `merge_lora`."""
    for _, layer in lora_layers(model):
        layer.unmerge()


@contextmanager
def disable_lora(model: nn.Module):
    """`with disable_lora(model):` the model is the base model, merged or not. Layers enabled before are so after it."""
    before = {layer: layer.enabled for _, layer in lora_layers(model)}
    try:
        for layer in before:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in before.items():
            layer.enabled = enabled


def remove_lora(model: nn.Module):
    """Takes the LoRA layers out again: the plain model, bit for bit, still frozen. ValueError while they are merged."""
    layers = dict(lora_layers(model))
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the LoRA layers are merged; unmerge_lora(model) before taking them out")
    for name, layer in layers.items():
        replace_module(model, name, layer.base_layer)
    vars(model).pop("lora_config", None)


def absorb_lora(model: nn.Module) -> nn.Module:
    """Merges the adapter for good: a plain model, frozen, with W + ΔW where W was. Returns it. Raises as merge_lora."""
    merge_lora(model)
    for name, layer in dict(lora_layers(model)).items():
        replace_module(model, name, layer.base_layer)
    vars(model).pop("lora_config", None)
    return model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Of every LoRA layer A and B, and DoRA's magnitude."""
    return [parameter for _, layer in lora_layers(model) for parameter in layer.parameters(recurse=False)]


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all); a parameter that two modules share counts once, a weight in 4 bits as one parameter."""
    parameters = list(model.parameters())
    in_4_bits = sum(layer.in_features * layer.out_features for layer in quantized_layers(model).values())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters) + in_4_bits


def print_trainable_parameters(model: nn.Module):
    """One line, PEFT's: `trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622`."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")
