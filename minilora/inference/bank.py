"""One base, many adapters, and a different one for each row of a batch.

Merging is free at run time and serves one adapter. Kept apart, adapters of one base can share a batch, because the
large product is the same for all rows; only the small ones differ (Punica, Chen 2023; S-LoRA, Sheng 2023):

    y_b = W x_b + B_b (A_b x_b)        for row b with its own adapter, s folded into B

Every adapted layer keeps the adapters in slots, A (slots, r, in) and B (slots, r, out). When a batch begins, each row's
pair is gathered once, (batch, r, in) and (batch, r, out). Every forward pass of the batch is then one product for all
rows and two batched small ones. The cost depends on the rows, not on how many adapters are resident.

Slot 0 holds zeros: the row without an adapter. A smaller rank is padded with zeros, and a layer that an adapter leaves
alone is zeros throughout. Adapters that do not fit into the slots wait on the CPU and are paged in when a batch names
them; the one unused for longest goes out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.adapter import Adapter
from minilora.adapters.inject import linear_layers, lora_layers
from minilora.inference.generate import generate
from minilora.linear4bit import replace_module
from minilora.model import GPT, KVCache
from minilora.storage.adapters import read_adapter
from minilora.storage.folders import read_whole


class BankedLinear(nn.Module):
    """A frozen linear layer and its slots. x (batch, T, in) -> (batch, T, out), or both without T."""

    A: Tensor  # (slots, r, in)
    B: Tensor  # (slots, r, out), s·Bᵀ of each adapter

    def __init__(self, base_layer, slots: int, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        for name, features in (("A", self.in_features), ("B", self.out_features)):
            self.register_buffer(name, torch.zeros(slots, 0, features, device=device, dtype=dtype), persistent=False)
        self.rows: tuple[Tensor, Tensor] | None = None  # A (batch, r, in) and B (batch, r, out) of the batch's rows
        self.train(base_layer.training)

    @property
    def r(self) -> int:
        return self.A.shape[1]

    def store(self, slot: int, A: Tensor | None, B: Tensor | None):
        """Puts A (r, in) and s·Bᵀ (r, out) into a slot; None, None: zeros. Both stacks grow with the largest rank."""
        r = 0 if A is None else len(A)
        if r > self.r:
            self.A, self.B = (F.pad(stack, (0, 0, 0, r - self.r)) for stack in (self.A, self.B))
        for stack, factor in ((self.A, A), (self.B, B)):
            stack[slot, r:] = 0
            if factor is not None:
                stack[slot, :r] = factor

    def gather(self, slots: Tensor | None):
        """Picks each row's A and B by slots (batch,); None: the layer is plain again."""
        self.rows = None if slots is None or not self.r else (self.A[slots], self.B[slots])

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.rows is None:
            return y
        return self.add(x, y) if x.dim() == 3 else self.add(x[:, None], y[:, None])[:, 0]

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x (batch, T, in), y (batch, T, out) -> y + B (A x), each row with its own."""
        assert self.rows is not None
        A, B = self.rows
        h = torch.bmm(x, A.transpose(1, 2).to(x.dtype))  # (batch, T, r)
        # In place where no gradients are kept: y is this layer's own, and a second array of its size is half the cost.
        add = torch.baddbmm if torch.is_grad_enabled() else Tensor.baddbmm_
        return add(y, h.to(y.dtype), B.to(y.dtype))


class AdapterBank:
    """Serves a plain model with many adapters. The model's adapted layers are wrapped; outside `rows` it is the base.

    adapters: by name, an `Adapter` (kept, not copied) or the folder of a saved one. slots: adapters resident at a time.

    Raises ValueError for a model with LoRA layers or in another bank, and as `add` does; the model then stays plain.
    """

    def __init__(self, model: GPT, adapters: Mapping[str, Adapter | str | Path] | None = None, slots: int = 64):
        if any(lora_layers(model)):
            raise ValueError("the model has LoRA layers; a bank needs the plain base, which it shares among adapters")
        if any(isinstance(module, BankedLinear) for module in model.modules()):
            raise ValueError("the model is in another bank already; close() that one first")
        if type(slots) is not int or slots < 1:
            raise ValueError(f"slots is {slots!r}; at least 1 adapter must be resident")
        self.model, self.slots = model.requires_grad_(False).eval(), slots
        self.adapters: dict[str, Adapter] = {}
        self.resident: dict[str, int] = {}  # name -> slot, the one unused for longest first
        self.layers: dict[str, BankedLinear] = {}
        self.linears = linear_layers(model)
        self.running: list[str | None] | None = None  # the rows of the batch under way
        try:
            for name, adapter in (adapters or {}).items():
                self.add(name, adapter)
        except BaseException:
            self.close()
            raise

    @property
    def device(self) -> torch.device:
        return self.model.model.embed_tokens.weight.device

    @property
    def names(self) -> list[str]:
        return list(self.adapters)

    def add(self, name: str, adapter: Adapter | str | Path, force: bool = False):
        """Adds an adapter, or replaces the one of this name; `force` as in `load_adapter`.

        Raises ValueError, before anything is changed, for a name that is not plain, one that the batch under way uses,
        layers that the model does not have, shapes that do not fit; and for a folder as `read_adapter` does.
        """
        if not isinstance(name, str) or not name or "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"{name!r} is not a name for an adapter; a plain word without slashes is")
        self._check_unused(name)
        if not isinstance(adapter, Adapter):
            folder = Path(adapter)
            adapter = read_whole(folder, lambda: read_adapter(self.model, folder, force))
        if adapter.magnitude:
            raise ValueError(f"adapter {name!r} is DoRA's, which scales rows of W; a bank shares W among all rows")
        for layer in adapter.A.keys() | adapter.B.keys():
            if (linear := self.linears.get(layer)) is None:
                raise ValueError(f"adapter {name!r} has a layer {layer}, which the model does not have")
            A, B = (tuple(part[layer].shape) if layer in part else None for part in (adapter.A, adapter.B))
            if A is None or (A, B) != ((A[0], linear.in_features), (linear.out_features, A[0])):
                sizes = f"{linear.in_features} to {linear.out_features} features"
                raise ValueError(f"adapter {name!r} has A {A} and B {B} for {layer} of {sizes}")
        embeddings = self.model.model.embed_tokens.weight  # of the device and dtype that activations have
        for layer in adapter.A.keys() - self.layers.keys():
            linear = self.linears[layer]
            self.layers[layer] = BankedLinear(linear, self.slots + 1, embeddings.device, embeddings.dtype)
            replace_module(self.model, layer, self.layers[layer])
        self.adapters[name] = adapter
        self.resident.pop(name, None)

    def remove(self, name: str):
        """Raises ValueError for a name that is not there, and for one that the batch under way uses."""
        self.check_known(name)
        self._check_unused(name)
        del self.adapters[name]
        self.resident.pop(name, None)

    def close(self):
        """Gives the model back as it was, plain. The bank is empty afterwards."""
        for name, layer in self.layers.items():
            replace_module(self.model, name, layer.base_layer)
        self.layers, self.adapters, self.resident, self.running = {}, {}, {}, None

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[GPT]:
        """`with bank.rows(names) as model:` row b of every batch goes through adapter names[b]; None: the base.

        Raises ValueError for an unknown name, for more different adapters than there are slots, and inside another
        such block.
        """
        if self.running is not None:
            raise ValueError("a batch is under way; end it before the next one begins")
        self.select(names)
        try:
            yield self.model
        finally:
            self.select(None)

    def select(self, names: Sequence[str | None] | None):
        """The rows from now on, for a batch whose rows come and go (serve.py); None ends the batch."""
        slots = None
        if names is not None:
            self.check_known(*names)
            slots = torch.tensor(self._page_in(names), dtype=torch.int64, device=self.device)
        self.running = None if names is None else list(names)
        for layer in self.layers.values():
            layer.gather(slots)

    def forward(self, input_ids: Tensor, adapters: Sequence[str | None], cache: KVCache | None = None) -> Tensor:
        """ids (batch, T) -> logits (batch, T, V), row b with adapters[b]."""
        if len(adapters) != len(input_ids):
            raise ValueError(f"{len(input_ids)} rows and {len(adapters)} adapters; each row needs one, or None")
        with self.rows(adapters) as model, torch.no_grad():
            return model(input_ids, cache)

    __call__ = forward

    def generate(self, prompts: list[list[int]], adapters: Sequence[str | None], *settings, **more) -> list[list[int]]:
        """`inference.generate.generate`, prompt b with adapters[b]; the settings are the same."""
        if len(adapters) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(adapters)} adapters; each prompt needs one, or None")
        with self.rows(adapters) as model:
            return generate(model, prompts, *settings, **more)

    def _page_in(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each row's adapter; those that are not resident take a free slot, or that of the least recent."""
        needed = list(dict.fromkeys(name for name in names if name is not None))
        if (count := len(needed)) > self.slots:
            raise ValueError(f"the batch names {count} different adapters, and {self.slots} can be resident at once")
        for name in needed:
            if name in self.resident:
                self.resident[name] = self.resident.pop(name)  # the most recent from now on
        for name in needed:
            if name not in self.resident:
                free = set(range(1, self.slots + 1)) - set(self.resident.values())
                slot = min(free) if free else self.resident.pop(next(iter(self.resident)))  # the least recent goes
                self._load(slot, self.adapters[name])
                self.resident[name] = slot
        return [0 if name is None else self.resident[name] for name in names]

    def _load(self, slot: int, adapter: Adapter):
        for name, layer in self.layers.items():
            A, B = adapter.A.get(name), adapter.B.get(name)
            if B is not None:
                B = adapter.scaling(name) * B.T.to(torch.promote_types(B.dtype, layer.B.dtype))
            layer.store(slot, A, B)

    def check_known(self, *names: str | None):
        """Raises ValueError for a name that no adapter has; None is the base."""
        unknown = [name for name in names if name is not None and name not in self.adapters]
        if unknown:
            raise ValueError(f"there is no adapter {unknown[0]!r}; known: {', '.join(self.adapters) or 'none'}")

    def _check_unused(self, name: str):
        if self.running is not None and name in self.running:
            raise ValueError(f"adapter {name!r} is in use by the batch under way")
