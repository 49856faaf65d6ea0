"""Many adapters beside one base, one of them active: change the task without touching the weights.

A merged adapter is part of W, and W must be put back before the next one can be merged: every weight of every adapted
layer is written twice. Here each adapter has LoRA layers of its own around the same frozen linear layers, and a switch
puts another adapter's layers into the model: one assignment for each layer, however large the layers.

    base layer W ─┬─ LoRALinear of "english"
                  ├─ LoRALinear of "code"         model.q_proj is one of these, or W itself
                  └─ LoRALinear of "chess"

`remove_lora` and `apply_adapter` switch as exactly, but make the layers anew, which took 4 to 10 times as long. A model
with an active adapter is the model that `apply_adapter` would have made: it can be trained, saved and merged.
"""

import copy
from dataclasses import replace
from itertools import chain

from torch import nn

from minilora.adapters.adapter import Adapter
from minilora.adapters.inject import find_targets, linear_layers, lora_layers, make_layer, remove_lora
from minilora.config import LoRAConfig
from minilora.linear4bit import replace_module
from minilora.lora import LoRALinear


class AdapterShelf:
    """Keeps adapters by name for a plain model, float or in 4 bits, and freezes it. None is active at first.

    An adapter is copied when it is added. Training changes the shelf's copy, and a switch leaves the copy as it is;
    `extract_adapter(model)` gives the active one. Raises ValueError for a model with LoRA layers.
    """

    def __init__(self, model: nn.Module):
        if any(lora_layers(model)):
            raise ValueError("the model already has LoRA layers; a shelf needs the plain base that its adapters share")
        self.model, self.base = model.requires_grad_(False), linear_layers(model)
        self.active: str | None = None
        self.configs: dict[str, LoRAConfig] = {}
        self.layers: dict[str, dict[str, LoRALinear]] = {}  # by adapter, then by full layer name

    @property
    def names(self) -> list[str]:
        return list(self.layers)

    def add(self, name: str, adapter: Adapter):
        """Raises ValueError, changing nothing, for a name that is empty or taken, and for layers or shapes that are not
        those of the model and of the adapter's own config."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"{name!r} is not a name for an adapter; give a string that is not empty")
        if name in self.layers:
            raise ValueError(f"there already is an adapter {name!r}; remove it first")
        config, layers = replace(copy.deepcopy(adapter.config), init_lora_weights=True), {}
        targets = find_targets(list(self.base), config.target_modules)
        for layer in {**adapter.A, **adapter.B, **dict.fromkeys(targets)}:
            if layer not in self.base:
                raise ValueError(f"adapter {name!r} has a layer {layer}, which the model does not have")
            if not (layer in targets and layer in adapter.A and layer in adapter.B):
                raise ValueError(f"adapter {name!r}: {layer} must be among its target_modules, with A and B")
            layers[layer] = make_layer(self.base[layer], layer, config)
            adapter.fill(layer, layers[layer])
        self.configs[name], self.layers[name] = config, layers

    def switch(self, name: str | None):
        """Makes an adapter the active one; None: the plain base. Raises ValueError, changing nothing, for an unknown
        name and while the active adapter is merged."""
        if name is not None:
            self._check_known(name)
        if self.active is not None and any(layer.merged for layer in self.layers[self.active].values()):
            raise ValueError(f"adapter {self.active!r} is merged into the base; unmerge_lora(model) before switching")
        remove_lora(self.model)
        self.active = name
        if name is None:
            return
        for layer, module in self.layers[name].items():
            base = self.base[layer]
            # Out of the model, the layer missed every train(), eval() and to(device) that reached the base layer.
            module.train(base.training)
            if module.lora_A.device != (device := next(chain(base.parameters(), base.buffers())).device):
                module.to(device)
            replace_module(self.model, layer, module)
        vars(self.model)["lora_config"] = self.configs[name]

    def remove(self, name: str):
        """Raises ValueError for an unknown name and for the active adapter."""
        self._check_known(name)
        if name == self.active:
            raise ValueError(f"adapter {name!r} is active; switch to another one or to None before removing it")
        del self.configs[name], self.layers[name]

    def _check_known(self, name: str):
        if name not in self.layers:
            raise ValueError(f"there is no adapter {name!r}; known: {', '.join(self.layers) or 'none'}")
