"""Soft prompts and prefixes: the model stays as it is, and n virtual tokens in front of the text are trained.

    soft prompt    [ p_1 … p_n | embeddings of the text ]       n vectors of width C   (Lester 2021, prompt tuning)
    prefix         [ k_1 v_1 … k_n v_n | keys and values ]      n of each, per layer   (Li & Liang 2021, prefix tuning)

A written prompt steers a model through the embeddings of its words, and so through the keys and values that each layer
makes of them. A soft prompt lets gradient descent choose the embeddings, which need not be those of any word. A prefix
lets it choose every layer's keys and values, which need not come from any embedding.

Both start as a text: given tokens, or random ones. So at the start the wrapped model says what the model says after
reading that text. Both papers report that words are the better start, above all where there is little to learn from
(PEFT's default is normal(0, 1)). Keys from a text carry the rotary positions 0 … n-1 in them; from then on they are
free numbers that nothing turns. Real tokens are at positions n, n+1, … in both methods, and this is the price of both:
the text loses n positions of the context for good. Li & Liang train the prefix through an MLP and throw the MLP away
afterwards; here, as by default in PEFT, there is none.

Letters in shape comments: B batch, T tokens, n virtual tokens, C hidden_size, L layers, K key/value heads, D head_dim.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.adapters.inject import lora_layers
from minilora.model import GPT, Decoder, GPTConfig, KVCache


class Prompt(nn.Module):
    """A frozen GPT, `base_model`, and the one trained parameter in front of it, `prompt_embeddings`.

    It trains, evaluates and generates as a GPT does whose sequences are shorter by n tokens. length: n; 0 changes
    nothing. text_ids: the tokens to start from, repeated or cut to n; None: random ones.

    Raises ValueError, before anything is changed, for a model that is no plain GPT (LoRA layers, another prompt), a
    length that leaves no token of the context, an empty text and ids outside the vocabulary.
    """

    base_model: GPT
    # Each of the two methods defines:
    width: Callable[[GPTConfig], int]  # numbers for each virtual token
    start: Callable[[GPT, Tensor], Tensor]  # ids (1, n) -> what the model makes of them, as (n, width)
    new_cache: Callable[..., KVCache]  # (rows, padding): the prompt for each row; padding (rows, T) True at pad tokens

    def __init__(self, model: GPT, length: int, text_ids: list[int] | None = None):
        super().__init__()
        check_prompt(model, length)
        if text_ids is None:
            ids = torch.randint(model.config.vocab_size, (length,))  # (n,)
        elif not text_ids:
            raise ValueError("text_ids is empty; give the tokens to start from, or None for random ones")
        else:
            ids = torch.tensor(list(islice(cycle(text_ids), length)), dtype=torch.int64)
        device = model.model.embed_tokens.weight.device
        with torch.no_grad():
            numbers = self.start(model, ids[None].to(device)) if length else torch.zeros(0, self.width(model.config))
        self.base_model = model.requires_grad_(False)
        self.prompt_embeddings = nn.Parameter(numbers.float().to(device))  # float32 on any model, cast where it is used
        self.train(model.training)

    @property
    def length(self) -> int:
        return self.prompt_embeddings.shape[0]

    @property
    def config(self) -> GPTConfig:
        """The model's, with sequences as long as there is room behind the prompt."""
        config = self.base_model.config
        return replace(config, max_position_embeddings=config.max_position_embeddings - self.length)

    @property
    def model(self) -> Decoder:
        return self.base_model.model

    @property
    def lm_head(self) -> nn.Linear:
        return self.base_model.lm_head

    def check_cache(self, cache: KVCache):
        if len(cache) < self.length:
            found = f"the cache has {len(cache)} columns, so it does not begin with the {self.length} of the prompt"
            raise ValueError(f"{found}; new_cache(rows) makes one that does")

    def cache_of(self, layers: dict[int, tuple[Tensor, Tensor]], rows: int, padding: Tensor | None) -> KVCache:
        """The prompt's keys and values, (1, K, n, D) in each layer, in front of every row; none of them is padding."""
        expanded = {layer: (k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for layer, (k, v) in layers.items()}
        return KVCache(None if padding is None else F.pad(padding, (self.length, 0)), expanded)


class SoftPrompt(Prompt):
    """Prompt tuning (Lester 2021): n trained embeddings (n, C) in front of the text's.

    ids (B, T) -> logits (B, n + T, V), as in PEFT: the first n are those at the prompt. With a cache from `new_cache`,
    which holds the prompt's keys and values already, (B, T, V). where: places in the text, as in GPT, -> (N, V).

    Raises ValueError for another cache, and what GPT does.
    """

    @staticmethod
    def width(config: GPTConfig) -> int:
        return config.hidden_size  # C

    @staticmethod
    def start(model: GPT, ids: Tensor) -> Tensor:
        return model.model.embed(ids)[0]  # (n, C)

    def embeddings(self, rows: int) -> Tensor:
        """The prompt for every row, (B, n, C), in the model's type."""
        return self.prompt_embeddings.to(self.model.embed_tokens.weight.dtype).expand(rows, -1, -1)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, where: tuple | None = None) -> Tensor:
        if cache is not None:
            self.check_cache(cache)
            return self.base_model(input_ids, cache, where)
        text = self.model.embed(input_ids)  # (B, T, C)
        x = self.model.run_blocks(torch.cat([self.embeddings(len(text)), text], dim=1))  # (B, n + T, C)
        return self.lm_head(x if where is None else x[:, self.length :][where])

    def new_cache(self, rows: int, padding: Tensor | None = None) -> KVCache:
        """The model's keys and values of the prompt, computed once for all rows."""
        cache = KVCache()
        if self.length:
            self.model.run_blocks(self.embeddings(1), cache)
        return self.cache_of(cache.layers, rows, padding)


class PrefixTuning(Prompt):
    """Prefix tuning (Li & Liang 2021): n trained keys and values in each layer, (n, L·2·K·D), PEFT's layout.

    ids (B, T) -> logits (B, T, V), or (N, V) at the places `where`, as in GPT.

    Raises ValueError for a cache not from `new_cache`, and what GPT does.
    """

    @staticmethod
    def shape(config: GPTConfig) -> tuple[int, int, int, int]:
        """Of one virtual token: in each layer a key and a value for each head, (L, 2, K, D)."""
        return config.num_hidden_layers, 2, config.num_key_value_heads, config.head_dim

    @classmethod
    def width(cls, config: GPTConfig) -> int:
        return prod(cls.shape(config))  # L·2·K·D

    @staticmethod
    def start(model: GPT, ids: Tensor) -> Tensor:
        cache = KVCache()
        model.model(ids, cache)
        pairs = torch.stack([torch.cat(pair) for pair in cache.layers.values()])  # (L, 2, K, n, D)
        return pairs.permute(3, 0, 1, 2, 4).flatten(1)  # (n, L·2·K·D)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, where: tuple | None = None) -> Tensor:
        if cache is None:
            cache = self.new_cache(len(input_ids))
        self.check_cache(cache)
        return self.base_model(input_ids, cache, where)

    def new_cache(self, rows: int, padding: Tensor | None = None) -> KVCache:
        """The trained keys and values; autograd goes through the cache to them."""
        shape = self.shape(self.base_model.config)
        prefix = self.prompt_embeddings.view(self.length, *shape).permute(1, 2, 3, 0, 4)  # (L, 2, K, n, D)
        return self.cache_of({layer: (k[None], v[None]) for layer, (k, v) in enumerate(prefix)}, rows, padding)


def check_prompt(model: GPT, length: int):
    """Raises ValueError unless `length` virtual tokens can stand in front of the model."""
    if not isinstance(model, GPT):
        raise ValueError(f"a prompt stands in front of a GPT, and this is a {type(model).__name__}")
    if any(lora_layers(model)):
        raise ValueError("the model has LoRA layers; a prompt stands in front of a plain model")
    limit = model.config.max_position_embeddings
    if type(length) is not int or not 0 <= length < limit:
        raise ValueError(f"length is {length!r}; of the model's {limit} positions a prompt can take 0 to {limit - 1}")
