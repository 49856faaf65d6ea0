"""Soft prompts and prefixes in a batch in which each row has its own, or none: keys and values in front of its text.

    . . p p | . a b        a prompt of two virtual tokens, a text of two
    . . . . | x y z        no prompt, a text of three
    q q q q | . . c        a prompt of four, a text of one

What a row does not have is padding, here also in its middle. Attention never looks at it and positions do not count it,
so the text of a row is at the positions that it has alone.

Letters in shape comments: B rows, n virtual tokens, L layers, K key/value heads, D head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minilora.adapters.prompts import Prompt, check_prompt
from minilora.model import GPT, KVCache


@torch.no_grad()
def keys_values(prompt: Prompt, model: GPT) -> Tensor:
    """Those of the prompt's virtual tokens in front of this plain model, (L, 2, K, n, D), on the CPU.

    Raises ValueError for a prompt of another width, or one that leaves no position to the text.
    """
    config, (n, width) = model.config, prompt.prompt_embeddings.shape
    if width != prompt.width(config):
        raise ValueError(f"it has {width} numbers for each virtual token, and this model needs {prompt.width(config)}")
    check_prompt(model, n)
    if n == 0:
        return torch.zeros(config.num_hidden_layers, 2, config.num_key_value_heads, 0, config.head_dim)
    own = type(prompt)(model, 0)
    own.prompt_embeddings = nn.Parameter(prompt.prompt_embeddings.to(own.prompt_embeddings.device))
    pairs = own.new_cache(1).layers.values()  # each (1, K, n, D)
    return torch.stack([torch.cat(pair) for pair in pairs]).cpu()


def mixed_cache(prompts: Sequence[Tensor | None], padding: Tensor | None, like: Tensor) -> KVCache:
    """The cache that B rows begin with: row b with prompts[b], (L, 2, K, n, D), or None; each at the right edge.

    padding (B, T): that of the texts to come, None where they have none. like: a tensor of the model.
    """
    lengths = torch.tensor([0 if prompt is None else prompt.shape[3] for prompt in prompts])  # (B,)
    if (longest := int(lengths.max())) == 0:
        return KVCache(padding)
    L, _, K, _, D = next(prompt for prompt in prompts if prompt is not None).shape
    front = like.new_zeros(L, 2, len(prompts), K, longest, D)
    for row, prompt in enumerate(prompts):
        if prompt is not None:
            front[:, :, row, :, longest - prompt.shape[3] :] = prompt
    missing = (torch.arange(longest) < longest - lengths[:, None]).to(like.device)  # (B, longest)
    if padding is not None or missing.any():
        padding = missing if padding is None else torch.cat([missing, padding], dim=1)
    return KVCache(padding, {layer: (k, v) for layer, (k, v) in enumerate(front)})
