"""An adapter apart from any model: its config and its numbers, which a file holds and a bank serves."""

import copy
import math
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from minilora.adapters.dora import DoRALinear
from minilora.adapters.inject import apply_lora, lora_layers, pattern_value, remove_lora, target_list
from minilora.adapters.starts import STARTS_FROM_WEIGHT
from minilora.config import LoRAConfig, lora_scaling
from minilora.lora import LoRALinear


@dataclass
class Adapter:
    """By full layer name the A (r, in) and B (out, r) of each layer, for DoRA also its magnitude (out,)."""

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
        layer.start_A = layer.start_B = None  # an adapter's numbers are plain LoRA, however they were started

    def scaling(self, name: str) -> float:
        """s of one layer, as its LoRALinear has it."""
        alpha = pattern_value(self.config.alpha_pattern, name, self.config.lora_alpha)
        return lora_scaling(self.A[name].shape[0], alpha, self.config.use_rslora)


def plain_config(config: LoRAConfig) -> LoRAConfig:
    """A copy for a plain adapter with the same ΔW: after PiSSA and OLoRA its rank is 2r, its scaling the same."""
    plain = replace(copy.deepcopy(config), init_lora_weights=True)
    if config.init_lora_weights in STARTS_FROM_WEIGHT:
        times = math.sqrt(2) if config.use_rslora else 2  # s = alpha / √r, or alpha / r
        plain.r, plain.lora_alpha = 2 * plain.r, times * plain.lora_alpha
        plain.rank_pattern = {key: 2 * r for key, r in plain.rank_pattern.items()}
        plain.alpha_pattern = {key: times * alpha for key, alpha in plain.alpha_pattern.items()}
    return plain


def extract_adapter(model: nn.Module) -> Adapter:
    """A copy of the model's adapter as plain LoRA, however it started. Raises ValueError for a model without one.

    Where the model's config has a regular expression or "all-linear", the copy lists the layers that were meant.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no LoRA layers; apply_lora(model, config) puts them in")
    adapter = Adapter(plain_config(vars(model)["lora_config"]), {}, {})
    if isinstance(adapter.config.target_modules, str):
        adapter.config.target_modules = target_list(model, list(layers))
    for name, layer in layers.items():
        adapter.A[name], adapter.B[name] = (factor.detach().clone() for factor in layer.factors())
        if isinstance(layer, DoRALinear):
            adapter.magnitude[name] = layer.lora_magnitude_vector.detach().clone()
    return adapter


def apply_adapter(model: nn.Module, adapter: Adapter) -> nn.Module:
    """`apply_lora` with the adapter's config, then the adapter's numbers. Changes and returns the model.

    Raises what apply_lora raises, and ValueError for numbers missing or of another shape; the model is then plain.
    """
    apply_lora(model, replace(adapter.config, init_lora_weights=True))  # the numbers follow
    try:
        for name, layer in lora_layers(model):
            adapter.fill(name, layer)
    except ValueError:
        remove_lora(model)
        raise
    return model
