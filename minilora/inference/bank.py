"""One base, many adapters, and a different one for each row of a batch.

Merging is free at run time and serves one adapter. Kept apart, adapters of one base can share a batch, because the
large product is the same for all rows; only the small ones differ (Punica, Chen 2023; S-LoRA, Sheng 2023):

    y_b = W x_b + B_b (A_b x_b)        for row b with its own adapter, s folded into B

`bank_layers.py` has this layer, with slots for the adapters that are resident. The others wait on the CPU and are paged
in when a batch names them; the one unused for longest goes out. Ranks may differ, and DoRA may stand beside LoRA.

A soft prompt or a prefix has no slot. It is keys and values in front of its row, computed when it is added, and enters
the batch with the cache that `new_cache` makes. Rows of one batch have prompts of different lengths, or none:

    . . p p | . a b        a prompt of two virtual tokens, a text of two
    . . . . | x y z        no prompt, a text of three
    q q q q | . . c        a prompt of four, a text of one

What a row does not have is padding, which attention never looks at and positions do not count: so a text is at the
positions that it has alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from minilora.adapters.adapter import Adapter
from minilora.adapters.inject import linear_layers, lora_layers
from minilora.adapters.prompts import Prompt
from minilora.config import LoRAConfig
from minilora.inference.bank_layers import BankedLinear, norms
from minilora.inference.bank_prompts import keys_values, mixed_cache
from minilora.inference.generate import generate
from minilora.linear4bit import replace_module
from minilora.model import GPT, KVCache
from minilora.storage.adapters import read_adapter
from minilora.storage.files import naming
from minilora.storage.folders import read_whole
from minilora.storage.peft import peft_type
from minilora.storage.prompts import PROMPTS, load_prompt

AnyAdapter = Adapter | Prompt  # LoRA, rsLoRA and DoRA of any rank; a SoftPrompt or a PrefixTuning
NONE = Adapter(LoRAConfig(), {}, {})  # of a row without a LoRA adapter


class AdapterBank:
    """Serves a plain model with many adapters. The model's adapted layers are wrapped; outside a batch it is the base.

    adapters: by name, an `Adapter` (kept, not copied), a SoftPrompt or a PrefixTuning (as it is when added), or the
    folder of a saved one. slots: adapters resident at a time; prompts need none.

    Raises ValueError for a model with LoRA layers or in another bank, and as `add` does; the model then stays plain.
    """

    def __init__(self, model: GPT, adapters: Mapping[str, AnyAdapter | str | Path] | None = None, slots: int = 64):
        if any(lora_layers(model)):
            raise ValueError("the model has LoRA layers; a bank needs the plain base, which it shares among adapters")
        if any(isinstance(module, BankedLinear) for module in model.modules()):
            raise ValueError("the model is in another bank already; close() that one first")
        if type(slots) is not int or slots < 1:
            raise ValueError(f"slots is {slots!r}; at least 1 adapter must be resident")
        self.model, self.slots = model.requires_grad_(False).eval(), slots
        self.adapters: dict[str, AnyAdapter] = {}
        self.resident: dict[str, int] = {}  # name -> slot, the one unused for longest first
        self.layers: dict[str, BankedLinear] = {}
        self.prompts: dict[str, Tensor] = {}  # name -> the keys and values of its n virtual tokens, (L, 2, K, n, D)
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

    def add(self, name: str, adapter: AnyAdapter | str | Path, force: bool = False):
        """Adds an adapter, or replaces the one of this name; `force` as in `load_adapter`.

        Raises ValueError, before anything is changed, for a name that is not plain, one that the batch under way uses,
        layers that the model does not have, shapes that do not fit; and for a folder as `read_adapter` and
        `load_prompt` do.
        """
        if not isinstance(name, str) or not name or "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError(f"{name!r} is not a name for an adapter; a plain word without slashes is")
        self._check_unused(name)
        if not isinstance(adapter, AnyAdapter):
            folder = Path(adapter)
            adapter = read_whole(folder, lambda: self._read(folder, force))
        if isinstance(adapter, Prompt):
            with naming(f"prompt {name!r}"), self._base_alone():
                prompt = keys_values(adapter, self.model)
            self._forget(name)
            self.prompts[name] = prompt
        else:
            self._check_fits(name, adapter)
            self._wrap(adapter)
            self._forget(name)
        self.adapters[name] = adapter

    def _read(self, folder: Path, force: bool) -> AnyAdapter:
        read = load_prompt if peft_type(folder) in PROMPTS else read_adapter
        return read(self.model, folder, force)

    def _check_fits(self, name: str, adapter: Adapter):
        """Raises ValueError for a layer that the model does not have, or one of other shapes."""
        for layer in adapter.A.keys() | adapter.B.keys() | adapter.magnitude.keys():
            if (linear := self.linears.get(layer)) is None:
                raise ValueError(f"adapter {name!r} has a layer {layer}, which the model does not have")
            parts = adapter.A, adapter.B, adapter.magnitude
            A, B, m = (tuple(part[layer].shape) if layer in part else None for part in parts)
            sizes = f"{linear.in_features} to {linear.out_features} features"
            if A is None or (A, B) != ((A[0], linear.in_features), (linear.out_features, A[0])):
                raise ValueError(f"adapter {name!r} has A {A} and B {B} for {layer} of {sizes}")
            if adapter.magnitude and m != (linear.out_features,):
                raise ValueError(f"adapter {name!r} has the magnitude {m} for {layer} of {sizes}")

    def _wrap(self, adapter: Adapter):
        """Gives slots to the layers that have none yet."""
        embeddings = self.model.model.embed_tokens.weight  # of the device and dtype that activations have
        for layer in adapter.A.keys() - self.layers.keys():
            linear = self.linears[layer]
            self.layers[layer] = BankedLinear(linear, self.slots + 1, embeddings.device, embeddings.dtype)
            replace_module(self.model, layer, self.layers[layer])

    def _forget(self, name: str):
        self.resident.pop(name, None)
        self.prompts.pop(name, None)

    def remove(self, name: str):
        """Raises ValueError for a name that is not there, and for one that the batch under way uses."""
        self.check_known(name)
        self._check_unused(name)
        del self.adapters[name]
        self._forget(name)

    def close(self):
        """Gives the model back as it was, plain. The bank is empty afterwards."""
        for name, layer in self.layers.items():
            replace_module(self.model, name, layer.base_layer)
        self.layers, self.adapters, self.resident, self.prompts, self.running = {}, {}, {}, {}, None

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[GPT]:
        """`with bank.rows(names) as model:` row b of every batch goes through adapter names[b]; None: the base.

        Raises ValueError for an unknown name, for more different adapters than there are slots, inside another such
        block, and for a prompt, which is no part of the model: `forward` and `generate` know where it goes.
        """
        for name in names:
            if self.virtual_tokens(name):
                raise ValueError(f"{name!r} is a prompt, which stands in front of its row: use forward or generate")
        with self._batch(names) as model:
            yield model

    @contextmanager
    def _batch(self, names: Sequence[str | None]) -> Iterator[GPT]:
        if self.running is not None:
            raise ValueError("a batch is under way; end it before the next one begins")
        self.select(names)
        try:
            yield self.model
        finally:
            self.select(None)

    def select(self, names: Sequence[str | None] | None):
        """The rows from now on, for a batch whose rows come and go (serve.py); None ends the batch."""
        if names is None:
            self.running = None
            for layer in self.layers.values():
                layer.end()
            return
        self.check_known(*names)
        slots = torch.tensor(self._page_in(names), dtype=torch.int64, device=self.device)
        self.running = list(names)
        adapters = [self.adapters.get(name or "") for name in names]
        loras = [adapter if isinstance(adapter, Adapter) else NONE for adapter in adapters]
        for name, layer in self.layers.items():
            ranks = [len(adapter.A.get(name, ())) for adapter in loras]
            layer.begin(slots, ranks, scaled=any(name in adapter.magnitude for adapter in loras))

    def virtual_tokens(self, name: str | None) -> int:
        """The positions that the prompt of this name takes in front of its row: 0 for LoRA, and for None."""
        prompt = self.prompts.get(name or "")  # one look: another thread may remove it (engine.py)
        return 0 if prompt is None else prompt.shape[3]

    def new_cache(self, names: Sequence[str | None], padding: Tensor | None = None) -> KVCache:
        """The cache that rows with these adapters begin with, their prompts in it; padding (batch, T) is the texts'."""
        prompts = [self.prompts.get(name or "") for name in names]
        return mixed_cache(prompts, padding, self.model.model.embed_tokens.weight)

    def forward(self, input_ids: Tensor, adapters: Sequence[str | None], cache: KVCache | None = None) -> Tensor:
        """ids (batch, T) -> logits (batch, T, V), row b with adapters[b]. A cache begins as `new_cache(adapters)`.

        Raises ValueError as `rows` does, for another number of rows, and for a cache without the prompts.
        """
        if len(adapters) != len(input_ids):
            raise ValueError(f"{len(input_ids)} rows and {len(adapters)} adapters; each row needs one, or None")
        with self._batch(adapters) as model, torch.no_grad():
            if longest := max(map(self.virtual_tokens, adapters), default=0):
                cache = self.new_cache(adapters) if cache is None else cache
                if len(cache) < longest:
                    raise ValueError(f"the cache does not begin with the prompts of {longest} columns, as new_cache's")
            return model(input_ids, cache)

    __call__ = forward

    def generate(self, prompts: list[list[int]], adapters: Sequence[str | None], *settings, **more) -> list[list[int]]:
        """`inference.generate.generate`, prompt b with adapters[b]; the settings are the same."""
        if len(adapters) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(adapters)} adapters; each prompt needs one, or None")
        with self._batch(adapters) as model:
            virtual = [self.virtual_tokens(name) for name in adapters]
            more |= {"virtual": virtual, "new_cache": lambda rows, padding: self.new_cache(adapters, padding)}
            return generate(model, prompts, *settings, **more)

    @contextmanager
    def _base_alone(self) -> Iterator[None]:
        """Inside, the model is the base, also while a batch is under way."""
        batch = {layer: (layer.rows, layer.rest) for layer in self.layers.values()}  # without both a layer is plain
        try:
            for layer in batch:
                layer.rows = layer.rest = None
            yield
        finally:
            for layer, (rows, rest) in batch.items():
                layer.rows, layer.rest = rows, rest

    def _page_in(self, names: Sequence[str | None]) -> list[int]:
        """The slot of each row's adapter; those that are not resident take a free slot, or that of the least recent."""
        needed = list(dict.fromkeys(name for name in names if name is not None and name not in self.prompts))
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
        return [self.resident.get(name or "", 0) for name in names]

    def _load(self, slot: int, adapter: AnyAdapter):
        assert isinstance(adapter, Adapter)
        for name, layer in self.layers.items():
            A, B, g = adapter.A.get(name), adapter.B.get(name), None
            if A is not None and B is not None:
                B = adapter.scaling(name) * B.T.to(torch.promote_types(B.dtype, layer.B.dtype))
                if name in adapter.magnitude:
                    g = adapter.magnitude[name].to(self.device) / norms(layer.base_layer, A, B)
            layer.store(slot, A, B)
            layer.store_g(slot, g)

    def check_known(self, *names: str | None):
        """Raises ValueError for a name that no adapter has; None is the base."""
        unknown = [name for name in names if name is not None and name not in self.adapters]
        if unknown:
            raise ValueError(f"there is no adapter {unknown[0]!r}; known: {', '.join(self.adapters) or 'none'}")

    def _check_unused(self, name: str):
        if self.running is not None and name in self.running:
            raise ValueError(f"adapter {name!r} is in use by the batch under way")
