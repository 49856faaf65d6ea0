"""Text from a model: one token at a time, each sampled from the last position's logits and fed back in.

A key/value cache keeps the keys and values of the tokens already seen, so a new token costs one token's work and
not the whole sequence's. The price is memory: 2 · layers · K · D numbers for every token of every row.

Prompts of different lengths share a batch by padding on the left, so that every row ends at the same place:

    . . . a b | c d        row 0: three pad tokens, a prompt of two
    v w x y z | p q        row 1: no padding, a prompt of five

The cache knows which tokens are padding; attention never looks at them and positions do not count them, so a row's
logits are those of the row on its own. For a model behind a soft prompt or a prefix the cache begins with the keys and
values of the prompt, which every row sees.

Letters in the shape comments: B batch, T tokens, V vocab_size.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from minilora.adapters.prompts import Prompt
from minilora.inference.prepared import Prepared
from minilora.model import GPT, KVCache
from minilora.modes import in_eval_mode
from minilora.ranges import NEW_TOKENS, TEMPERATURE, TOP_K, TOP_P, TORCH_SEED

BROKEN_LOGITS = "the model's logits hold NaN or infinity, so no token can be chosen; its weights are broken"


def generate(
    model: GPT | Prompt,
    prompts: list[list[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    *,
    new_cache: Callable[[int, Tensor | None], KVCache] | None = None,
    virtual: Sequence[int] = (),
) -> list[list[int]]:
    """Continues each prompt (token ids) by up to `max_new_tokens`; returns the new tokens only, without the end token.

    temperature 0 takes the likeliest token; above 0 it samples from softmax(logits / temperature), after keeping the
    `top_k` likeliest tokens and, of those, the fewest whose probabilities add up to `top_p` (Holtzman 2020). A row
    stops at `eos_id`, or at any of several. Each row draws from its own generator, seeded by `seed` and the row's place
    in the batch: the same prompt twice gives two samples, and what a row draws does not depend on which rows stand
    beside it.

    vocab_size: the tokenizer's. Checkpoints often pad their vocabulary to a round number, and ids from `vocab_size` on
    stand for no text: they are never chosen.

    model: a GPT, or one behind a SoftPrompt or a PrefixTuning, whose tokens count among the model's positions.

    new_cache, virtual: where rows have prompts of their own, as in an AdapterBank: the cache that they begin with, made
    from their number and padding, and the virtual tokens of each row in it.

    Raises ValueError for an empty prompt, an id outside the vocabulary, more tokens than the model's positions, or a
    sampling setting out of range.
    """
    check_prompts(model, prompts, max_new_tokens, temperature, top_k, top_p, virtual=virtual)
    continuations: list[list[int]] = [[] for _ in prompts]
    if prompts:
        how = temperature, top_k, top_p, seed, eos_id, vocab_size, new_cache
        for row, token in _new_tokens(model, prompts, max_new_tokens, *how):
            continuations[row].append(token)
    return continuations


def stream(
    model: GPT | Prompt,
    prompt: list[int],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """The tokens that `generate` gives for this one prompt, each as soon as it is chosen.

    Until the last one is taken, or the iterator is dropped, the model is in eval mode. Raises as `generate` does, at
    once and not at the first token.
    """
    check_prompts(model, [prompt], max_new_tokens, temperature, top_k, top_p)
    TORCH_SEED.check("seed", seed)
    rows = _new_tokens(model, [prompt], max_new_tokens, temperature, top_k, top_p, seed, eos_id, vocab_size)
    return (token for _, token in rows)


@torch.no_grad()
def _new_tokens(
    model: GPT | Prompt, prompts, max_new_tokens, temperature, top_k, top_p, seed, eos_id, vocab_size, new_cache=None
) -> Iterator[tuple[int, int]]:
    """The loop: yields (row, token) for every new token of every row that has not ended."""
    device = model.model.embed_tokens.weight.device
    ids, padding = left_pad(prompts, device)  # (B, T) both
    generators, ends = row_generators(len(prompts), seed), end_ids(eos_id)
    running = set(range(len(prompts)))
    with in_eval_mode(model):
        new_cache = model.new_cache if isinstance(model, Prompt) else new_cache
        cache, prepared = KVCache(padding) if new_cache is None else new_cache(len(prompts), padding), Prepared(model)
        for _ in range(max_new_tokens):
            with prepared:
                hidden = model.model(ids, cache)  # (B, T, C)
                logits = model.lm_head(hidden[:, -1])  # (B, V): only the last position predicts something new
            tokens = choose_tokens(logits[:, :vocab_size], temperature, top_k, top_p, generators).tolist()
            for row in sorted(running):  # a finished row stays in the batch, and its tokens are dropped
                if tokens[row] in ends:
                    running.remove(row)
                else:
                    yield row, tokens[row]
            if not running:
                break
            ids = torch.tensor([[token] for token in tokens], device=device)  # (B, 1)


def end_ids(eos_id: int | Collection[int] | None) -> Collection[int]:
    """The tokens that end a row: none, one, or several."""
    if eos_id is None:
        return ()
    return (eos_id,) if isinstance(eos_id, int) else eos_id


def left_pad(prompts: list[list[int]], device) -> tuple[Tensor, Tensor | None]:
    """Prompts of any lengths -> ids, each row ending at the right edge, and a mask, True at padding, both (B, T).

    The mask is None where all prompts are of one length.
    """
    T = max(len(prompt) for prompt in prompts)
    ids = [[0] * (T - len(prompt)) + list(prompt) for prompt in prompts]  # 0 or any other id: nothing looks at it
    padding = [[place < T - len(prompt) for place in range(T)] for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(padding, device=device) if any(map(any, padding)) else None


def row_generators(rows: int, seed: int) -> list[torch.Generator]:
    """One generator for each row, on the CPU, so that a seed means the same draws on every device."""
    TORCH_SEED.check("seed", seed)
    seeds = torch.randint(2**62, (rows,), generator=torch.Generator().manual_seed(seed))
    return [torch.Generator().manual_seed(row_seed) for row_seed in seeds.tolist()]


def choose_tokens(logits: Tensor, temperature: float, top_k, top_p, generators: list[torch.Generator]) -> Tensor:
    """logits (B, V) -> one token id for each row, (B,)."""
    if not logits.isfinite().all():
        raise ValueError(BROKEN_LOGITS)
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, order = logits.double().cpu().sort(dim=-1, descending=True, stable=True)  # likeliest first
    # 0 and below: even the smallest temperature makes no infinity - ∞. A float: torch has no whole numbers like 10^30.
    logits = (logits - logits[:, :1]) / float(temperature)
    if top_k is not None:
        logits[:, top_k:] = -math.inf
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        likelier = probabilities.cumsum(dim=-1) - probabilities  # the mass of all tokens likelier than this one
        probabilities[likelier >= top_p] = 0  # never the first: nothing is likelier than it
    draws = [torch.multinomial(probabilities[row], 1, generator=own) for row, own in enumerate(generators)]
    return order.gather(1, torch.stack(draws))[:, 0]


def check_prompts(
    model: GPT | Prompt, prompts, max_new_tokens, temperature, top_k, top_p, first: int = 0, virtual: Sequence[int] = ()
):
    """Raises ValueError as `generate` does; the prompts are counted from `first`.

    virtual: of each, its own virtual tokens, beside those that a Prompt as the model has.
    """
    vocabulary, limit = model.config.vocab_size, model.config.max_position_embeddings
    NEW_TOKENS.check("max_new_tokens", max_new_tokens)
    TEMPERATURE.check("temperature", temperature)
    if top_k is not None:
        TOP_K.check("top_k", top_k)
    if top_p is not None:
        TOP_P.check("top_p", top_p)
    for number, (prompt, taken) in enumerate(zip(prompts, virtual or [0] * len(prompts), strict=True), first):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; it needs at least one token, such as the begin token")
        for token in prompt:
            if not 0 <= token < vocabulary:
                known = f"the vocabulary of {vocabulary} (0 to {vocabulary - 1})"
                raise ValueError(f"prompt {number} holds token id {token}, outside {known}")
        if len(prompt) + max_new_tokens > limit - taken:
            wanted = f"{len(prompt)} tokens and {max_new_tokens} new ones are asked for"
            raise ValueError(f"prompt {number} has {wanted}, but the model's sequences end at {limit - taken}")
