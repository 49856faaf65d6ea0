"""Soft prompts and prefixes: the model stays as it is, and what stands in front of the text is trained.

    soft prompt    [ p_1 … p_n | embeddings of the text ]       n vectors of width C   (Lester 2021, prompt tuning)
    prefix         [ k_1 v_1 … k_n v_n | keys and values ]      n of each, per layer   (Li & Liang 2021, prefix tuning)

A written prompt steers a model through the embeddings of its words, and so through the keys and values that each layer
makes of them. A soft prompt lets gradient descent choose the embeddings, which need not be those of any word; a prefix
lets it choose every layer's keys and values, which need not come from any embedding.

Both start as a text: given tokens, or random ones. At the start the wrapped model therefore says what the model says
after reading that text, and training moves on from there; both papers report that words are the better start, above
all where there is little to learn from (PEFT's default is normal(0, 1)). Keys from a text carry the rotary positions
0 … n-1 in them; from then on they are free numbers that nothing turns. Real tokens stand at positions n, n+1, … in
both methods.

Li & Liang train the prefix through an MLP, which they throw away afterwards. Here there is none, as in PEFT's default:
what is trained is what is saved. The price of both methods is context: n positions are lost to the text, for good.

Letters in shape comments: B batch, T tokens, n virtual tokens, C hidden_size, L layers, K key/value heads, D head_dim.
"""

from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from minilora.adapters.inject import lora_layers
from minilora.model import GPT, GPTConfig, KVCache


class Prompt(nn.Module):
    """What the two share: a frozen model, `base_model`, and the one parameter in front of it, `prompt_embeddings`.

    For the code around it this is a model: it trains, evaluates and generates as a GPT does, whose sequences are
    shorter by n tokens. The model itself is not changed but frozen; `base_model` is what it was without the prompt.

    length: n; 0 changes nothing. text_ids: the tokens to start from, repeated or cut to n; None: random ones, from
        torch's generator.

    Raises ValueError, before anything is changed, for a model that is no plain GPT (LoRA layers, another prompt), a
    length that leaves no token of the context, an empty text and ids outside the vocabulary.
    """

    def __init__(self, model: GPT, length: int, text_ids: list[int] | None = None):
        super().__init__()
        check_prompt(model, length)
        if text_ids is None:
            ids = torch.randint(model.config.vocab_size, (length,))  # (n,)
        elif not text_ids:
            raise ValueError("text_ids is empty; give the tokens to start from, or None for random ones")
        else:
            ids = torch.tensor([text_ids[place % len(text_ids)] for place in range(length)], dtype=torch.int64)
        device = model.model.embed_tokens.weight.device
        with torch.no_grad():
            numbers = self.start(model, ids[None].to(device)) if length else torch.zeros(0, self.width(model.config))
        self.base_model = model.requires_grad_(False)
        self.prompt_embeddings = nn.Parameter(numbers.float().to(device))  # float32 on any model, cast where it is used
        self.train(model.training)

    @staticmethod
    def width(config: GPTConfig) -> int:
        """Numbers for each virtual token."""
        raise NotImplementedError

    @staticmethod
    def start(model: GPT, ids: Tensor) -> Tensor:
        """ids (1, n) -> what the model makes of them, (n, width)."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        return self.prompt_embeddings.shape[0]

    @property
    def config(self) -> GPTConfig:
        """The model's, with sequences as long as there is room behind the prompt."""
        config = self.base_model.config
        return replace(config, max_position_embeddings=config.max_position_embeddings - self.length)

    @property
    def model(self) -> nn.Module:
        return self.base_model.model

    @property
    def lm_head(self) -> nn.Module:
        return self.base_model.lm_head

    def check_cache(self, cache: KVCache):
        if cache.front != self.length:
            raise ValueError(
                f"the cache begins with {cache.front} columns and not with the {self.length} of the prompt; "
                "new_cache(rows) makes one that does"
            )


class SoftPrompt(Prompt):
    """Prompt tuning (Lester 2021): n trained embeddings (n, C) in front of the text's.

    ids (B, T) -> logits (B, n + T, V), as in PEFT: the first n are those at the prompt. With a cache from `new_cache`,
    which holds the prompt's keys and values already, (B, T, V). Raises ValueError for another cache, and what GPT does.
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

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        if cache is not None:
            self.check_cache(cache)
            return self.base_model(input_ids, cache)
        text = self.model.embed(input_ids)  # (B, T, C)
        return self.base_model(None, inputs_embeds=torch.cat([self.embeddings(len(text)), text], dim=1))

    def new_cache(self, rows: int, padding: Tensor | None = None) -> KVCache:
        """A cache for `rows` rows that begins with the model's keys and values of the prompt, computed once for all."""
        cache = KVCache()
        if self.length:
            self.model(None, cache, self.embeddings(1))
        layers = {layer: tuple(x.expand(rows, -1, -1, -1) for x in pair) for layer, pair in cache.layers.items()}
        return KVCache(padding, layers)


class PrefixTuning(Prompt):
    """Prefix tuning (Li & Liang 2021): n trained keys and values in each layer, (n, L·2·K·D), PEFT's layout.

    ids (B, T) -> logits (B, T, V). Raises ValueError for a cache not from `new_cache`, and what GPT does.
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

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        if cache is None:
            cache = self.new_cache(len(input_ids))
        self.check_cache(cache)
        return self.base_model(input_ids, cache)

    def new_cache(self, rows: int, padding: Tensor | None = None) -> KVCache:
        """A cache for `rows` rows that begins with the prefix; autograd goes through it."""
        shape = self.shape(self.base_model.config)
        prefix = self.prompt_embeddings.view(self.length, *shape).permute(1, 2, 3, 0, 4)  # (L, 2, K, n, D)
        layers = {layer: tuple(x.expand(rows, -1, -1, -1) for x in pair) for layer, pair in enumerate(prefix)}
        return KVCache(padding, layers)


def check_prompt(model: GPT, length: int):
    """Raises ValueError unless `length` virtual tokens can stand in front of the model."""
    if not isinstance(model, GPT):
        raise ValueError(f"a prompt stands in front of a GPT, and this is a {type(model).__name__}")
    if any(lora_layers(model)):
        raise ValueError("the model has LoRA layers; a prompt stands in front of a plain model")
    limit = model.config.max_position_embeddings
    if type(length) is not int or not 0 <= length < limit:
        raise ValueError(f"length is {length!r}; of the model's {limit} positions a prompt can take 0 to {limit - 1}")
