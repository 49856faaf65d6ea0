"""From a LoRA layer to a LoRA model: find the linear layers by name, wrap them, freeze the rest.

The model is not rewritten and does not notice. `apply_lora` puts a `LoRALinear` where a linear layer stood, and sets
`requires_grad` on every parameter, both ways: off for everything, on for A and B. Freezing matters as much as
wrapping: an optimizer that merely leaves out the base weights still has their gradients computed and held.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minilora.adapters.dora import DoRALinear
from minilora.adapters.factors import (
    STARTS_FROM_WEIGHT,
    check_original_left,
    check_own_weight,
    plain_config,
    start_layer,
)
from minilora.lora import LoRAConfig, LoRALinear, lora_scaling
from minilora.quant import Linear4bit, put, quantized_layers


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or what behaves as one, such as a quantized layer."""
    return hasattr(module, "in_features") and hasattr(module, "out_features") and not isinstance(module, LoRALinear)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every LoRALinear with its full name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def find_targets(names: list[str], targets: list[str] | str) -> list[str]:
    """The names that `target_modules` means, by PEFT's rules.

    A list holds whole names or suffixes that begin after a dot; one string is a regular expression that must match
    the whole name; "all-linear" is every linear layer but the output head. Raises ValueError naming each entry that
    matches nothing.
    """
    if targets == "all-linear":
        return [name for name in names if name.rpartition(".")[2] != "lm_head"]
    known = f"the linear layers here are {', '.join(sorted({name.rpartition('.')[2] for name in names}))}"
    if isinstance(targets, str):
        try:
            found = [name for name in names if re.fullmatch(targets, name)]
        except re.error as error:
            raise ValueError(f"target_modules {targets!r} is not a regular expression: {error}") from None
        if not found:
            raise ValueError(f"target_modules {targets!r} matches the whole name of no layer; {known}")
        return found

    def matches(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    missing = [target for target in targets if not any(matches(name, target) for name in names)]
    if missing or not targets:
        raise ValueError(f"target_modules {', '.join(map(repr, missing)) or '[]'} matches no layer; {known}")
    return [name for name in names if any(matches(name, target) for target in targets)]


def pattern_value(pattern: dict, name: str, default):
    """The value of the first key that matches the name or its end, by PEFT's rule."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def make_layer(layer: nn.Module, name: str, config: LoRAConfig) -> LoRALinear:
    """The wrapper that `config` asks for around the layer of that full name."""
    r = pattern_value(config.rank_pattern, name, config.r)
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    kind = DoRALinear if config.use_dora else LoRALinear
    return kind(layer, r, alpha, config.lora_dropout, config.use_rslora)


def check_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """The names of the layers that `apply_lora` will wrap. Raises ValueError where it does."""
    if any(lora_layers(model)):
        raise ValueError("the model already has LoRA layers; apply_lora works on a plain model")
    targets = find_targets(list(linear_layers(model)), config.target_modules)
    for pattern in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, pattern):
            if not any(re.match(rf"(.*\.)?({key})$", name) for name in targets):
                raise ValueError(f"{pattern} key {key!r} matches none of the layers that get an adapter")
    return targets


def weight_users(model: nn.Module) -> dict[int, list[str]]:
    """By the id of each parameter, the names of the modules that hold it: more than one for a tied head."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    return users


def apply_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Wraps the layers that `config.target_modules` names and freezes everything else. Changes and returns the model.

    Raises ValueError, before anything is changed, for a model that already has adapters, a target that matches
    nothing, a key of rank_pattern or alpha_pattern that matches none of the targets, and for pissa and olora a layer
    that has no W of its own to take a part from. Warns where r exceeds what the layer can use.

    pissa and olora change the base: see `factors.start_layer`.
    """
    targets = check_targets(model, config)
    layers, users = linear_layers(model), weight_users(model)
    if config.init_lora_weights in STARTS_FROM_WEIGHT:
        for name in targets:
            r = pattern_value(config.rank_pattern, name, config.r)
            check_own_weight(name, layers[name], users, r, config.init_lora_weights)

    for name in targets:
        layer = layers[name]
        r = pattern_value(config.rank_pattern, name, config.r)
        if r > (full := min(layer.in_features, layer.out_features)):
            warnings.warn(
                f"r={r} exceeds the full rank {full} of {name}: more parameters, no more freedom", stacklevel=2
            )
        wrapped = make_layer(layer, name, config)
        start_layer(wrapped, config.init_lora_weights)
        put(model, name, wrapped)
    model.lora_config = config
    return train_adapter_only(model)


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
    for name, layer in lora_layers(model):
        if isinstance(layer.base_layer, Linear4bit):
            raise ValueError(
                f"cannot merge into {name}: it is in 4 bits, and rounding W + ΔW to 4 bits again would change what was "
                "trained; dequantize_model(model) first, and merge into the float weights"
            )
    users = weight_users(model)
    for name, layer in lora_layers(model):
        shared = [
            user
            for user in users.get(id(getattr(layer.base_layer, "weight", None)), [])
            if f"{name}.base_layer" != user
        ]
        if shared:
            raise ValueError(f"cannot merge {name}: its weight is shared with {', '.join(shared)}")
    for _, layer in lora_layers(model):
        layer.merge()


def unmerge_lora(model: nn.Module):
    """Puts back the very weights that were there before `merge_lora`."""
    for _, layer in lora_layers(model):
        layer.unmerge()


@contextmanager
def disable_lora(model: nn.Module):
    """`with disable_lora(model):` the model is the base model, merged or not. What was enabled before is so again."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@dataclass
class Adapter:
    """An adapter apart from any model: its config, and by full layer name the A (r, in) and B (out, r) of each layer,
    for DoRA also its magnitude (out,)."""

    config: LoRAConfig
    A: dict[str, Tensor]
    B: dict[str, Tensor]
    magnitude: dict[str, Tensor] = field(default_factory=dict)

    def fill(self, name: str, layer: LoRALinear):
        """Puts the numbers of one layer into its wrapper. ValueError, naming the layer, where they do not fit it."""
        parts = {"lora_A": self.A, "lora_B": self.B, "lora_magnitude_vector": self.magnitude}
        wanted = dict(layer.named_parameters(recurse=False))
        for part, parameter in wanted.items():
            if name not in parts[part] or parts[part][name].shape != parameter.shape:
                found = tuple(parts[part][name].shape) if name in parts[part] else "none"
                raise ValueError(f"{name} needs a {part} of shape {tuple(parameter.shape)}; the adapter has {found}")
        for part, parameter in wanted.items():
            parameter.data.copy_(parts[part][name])

    def scaling(self, name: str) -> float:
        """s of one layer, as its LoRALinear has it."""
        alpha = pattern_value(self.config.alpha_pattern, name, self.config.lora_alpha)
        return lora_scaling(self.A[name].shape[0], alpha, self.config.use_rslora)


def extract_adapter(model: nn.Module) -> Adapter:
    """A copy of the model's adapter, plain: one for the base as it was before `apply_lora`, however it started.

    PiSSA's and OLoRA's is ΔW = s·(BA - B₀A₀) = s·[B | -B₀]·[A ; A₀], of twice the rank. Raises ValueError for a model
    that has no adapter, and for one that was put into 4 bits after such a start: no base before it fits.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers; apply_lora(model, config) puts them in")
    check_original_left(layers)
    adapter = Adapter(plain_config(model.lora_config), {}, {})
    for name, layer in layers.items():
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        adapter.A[name] = torch.cat([A, layer.start_A]) if layer.moved else A.clone()  # (2r, in)
        adapter.B[name] = torch.cat([B, -layer.start_B], 1) if layer.moved else B.clone()  # (out, 2r)
        if isinstance(layer, DoRALinear):
            adapter.magnitude[name] = layer.lora_magnitude_vector.detach().clone()
    return adapter


def apply_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """`apply_lora` with the adapter's config, then its numbers: the model, changed.

    Raises what apply_lora raises, and ValueError for numbers that are missing or mis-shaped; the model is then plain.
    """
    apply_lora(model, adapter.config)
    try:
        for name, layer in lora_layers(model):
            adapter.fill(name, layer)
    except ValueError:
        remove_lora(model)
        raise
    return model


def remove_lora(model: nn.Module):
    """Takes the LoRA layers out again: the plain model, frozen as it was. Raises ValueError while they are merged.

    What pissa or olora took out of a weight is added again. That gives W up to rounding, not bit for bit: keeping W
    would have cost what the base does. For the very bits, load the base again.
    """
    layers = dict(lora_layers(model))
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the LoRA layers are merged; unmerge_lora(model) before taking them out")
    check_original_left(layers)
    for name, layer in layers.items():
        if layer.moved:
            weight = layer.base_layer.weight.data
            weight.copy_(weight + layer.product(layer.start_A, layer.start_B))
        put(model, name, layer.base_layer)
    vars(model).pop("lora_config", None)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of every LoRA layer: A, B, and DoRA's magnitude."""
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
