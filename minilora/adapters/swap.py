"""Many adapters beside one base, one of them active: change the task without touching the weights.

Merged, an adapter is part of W, and the next one needs W back first: every weight of every adapted layer is written,
twice. Here each adapter has LoRA layers of its own, all around the same frozen linear layers, and to switch is to say
which of them stands in the model: one assignment for each layer, however large the layers and however many adapters.

    base layer W ─┬─ LoRALinear of "english"
                  ├─ LoRALinear of "code"         model.q_proj is one of these, or W itself
                  └─ LoRALinear of "chess"

What an adapter costs is its A and B. The model with an active one is what `apply_adapter` would have made of it: it can
be trained, saved and merged. With none active it is the plain base.
"""

import copy
from itertools import chain

from torch import nn

from minilora.adapters.inject import Adapter, find_targets, linear_layers, lora_layers, make_layer, remove_lora
from minilora.lora import LoRAConfig, LoRALinear
from minilora.quant import put


class AdapterShelf:
    """Keeps adapters by name for a plain model, float or in 4 bits, and freezes it. None is active at first.

    An adapter is copied when it is added. Training changes the shelf's copy, which stays as it was left when another
    is active; `extract_adapter(model)` gives the active one. Raises ValueError for a model with LoRA layers.
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
        """Raises ValueError, before anything is changed, for a name that is empty or taken and for an adapter that does
        not fit: layers that the model or the adapter's own config does not have, or the other way round, and shapes."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"{name!r} is not a name for an adapter; a string that is not empty is")
        if name in self.layers:
            raise ValueError(f"there already is an adapter {name!r}; remove it first")
        for layer in chain(adapter.A, adapter.B):
            if layer not in self.base:
                raise ValueError(f"adapter {name!r} has a layer {layer}, which the model does not have")
        config, layers = copy.deepcopy(adapter.config), {}
        targets = find_targets(list(self.base), config.target_modules)
        for layer in dict.fromkeys(chain(targets, adapter.A, adapter.B)):
            if not (layer in targets and layer in adapter.A and layer in adapter.B):
                raise ValueError(
                    f"adapter {name!r} does not fit its config: {layer} must be among its target_modules, with A and B"
                )
            layers[layer] = make_layer(self.base[layer], layer, config)
            try:
                adapter.fill(layer, layers[layer])
            except ValueError as error:
                raise ValueError(f"adapter {name!r} does not fit: {error}") from None
        self.configs[name], self.layers[name] = config, layers

    def switch(self, name: str | None):
        """Makes an adapter the active one; None: the plain base.

        Raises ValueError, before anything is changed, for an unknown name and while the active adapter is merged.
        """
        if name is not None:
            self._check_known(name)
        if any(layer.merged for layer in self.layers.get(self.active, {}).values()):
            raise ValueError(f"adapter {self.active!r} is merged into the base; unmerge_lora(model) before switching")
        remove_lora(self.model)
        self.active = name
        if name is None:
            return
        for layer, module in self.layers[name].items():
            base = self.base[layer]
            # Off the model, it heard of no train(), eval() or to(device). The base layer did.
            module.train(base.training)
            if module.lora_A.device != (device := next(chain(base.parameters(), base.buffers())).device):
                module.to(device)
            put(self.model, layer, module)
        self.model.lora_config = self.configs[name]

    def remove(self, name: str):
        """Raises ValueError for an unknown name and for the active adapter."""
        self._check_known(name)
        if name == self.active:
            raise ValueError(f"adapter {name!r} is active; switch to another one or to None before removing it")
        del self.configs[name], self.layers[name]

    def _check_known(self, name: str):
        if name not in self.layers:
            raise ValueError(f"there is no adapter {name!r}; known: {', '.join(self.layers) or 'none'}")
