"""Answers that a model draws itself, judged by a reward: the batches of policy gradients (`objectives.GroupPolicy`).

A step's batch is a pure function of the weights, the seed and the number of the step, so a resumed run draws what it
would have drawn. Log-probabilities are later those of exactly the ids that were drawn: an answer decoded and encoded
again can come back as other tokens. An answer that is cut at `max_new_tokens` gets no end token, because none was
drawn.

Letters in the shape comments: B samples, T tokens, V vocab_size.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minilora.adapters.prompts import Prompt
from minilora.dtypes import computing_in
from minilora.inference.generate import end_ids, left_pad
from minilora.inference.prepared import Prepared
from minilora.model import KVCache
from minilora.modes import in_eval_mode
from minilora.objectives import group_advantages
from minilora.ranges import GROUP_SIZE, NEW_TOKENS, POSITIVE
from minilora.rows import batch_rows
from minilora.text.batches import answered, examples
from minilora.text.chat import encode_prompt
from minilora.text.tasks import Example
from minilora.text.tokenizer import AnyTokenizer
from minilora.train_settings import NonFiniteError, TrainConfig


@torch.no_grad()
def sample(
    model: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    vocab_size: int,
    ends: Collection[int],
    seed: int,
    precision: str = "auto",
) -> list[list[int]]:
    """What softmax(logits / temperature) draws after each prompt, up to and with an end token; one draw for all rows.

    The draws come from a generator of their own, on the CPU: the same on every device, as far as the logits are. Raises
    NonFiniteError for logits that nothing can be drawn from."""
    dice = torch.Generator().manual_seed(seed)
    ids, padding = left_pad(prompts, model.model.embed_tokens.weight.device)  # (B, T) both
    cache = model.new_cache(len(prompts), padding) if isinstance(model, Prompt) else KVCache(padding)
    prepared = Prepared(model)
    drawn: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    with in_eval_mode(model):
        for _ in range(max_new_tokens):
            with computing_in(precision, ids.device.type), prepared:  # in the precision of the loss
                logits = model.lm_head(model.model(ids, cache)[:, -1])[:, :vocab_size]  # (B, V)
            if not logits.isfinite().all():
                raise NonFiniteError("the logits to draw from are not finite: try a lower learning rate")
            tokens = torch.multinomial((logits.double().cpu() / temperature).softmax(-1), 1, generator=dice)  # (B, 1)
            for row in list(running):
                drawn[row].append(int(tokens[row]))
                if drawn[row][-1] in ends:
                    running.remove(row)
            if not running:
                break
            ids = tokens.to(ids.device)
    return drawn


def text_of(ids: list[int], tokenizer: AnyTokenizer) -> str:
    """What drawn ids say, without the end token."""
    return tokenizer.decode(ids[:-1] if ids[-1] in end_ids(tokenizer.end_ids) else ids)


class Rollouts:
    """Data for policy gradients: examples whose prompts the model answers, and `reward(example, answer)`, a number.

    A batch has `batch_size` samples, `group_size` of them for each prompt, side by side. `input_ids` and `labels`
    (N, T) are the examples themselves, which nothing is trained on. Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        some: Sequence[Example],
        reward: Callable[[Example, str], float],
        tokenizer: AnyTokenizer,
        max_new_tokens: int,
        group_size: int = 8,
        temperature: float = 1.0,
    ):
        GROUP_SIZE.check("group_size", group_size)
        NEW_TOKENS.check("max_new_tokens", max_new_tokens)
        POSITIVE.check("temperature", temperature)
        self.examples, self.reward, self.tokenizer = some, reward, tokenizer
        self.max_new_tokens, self.group_size, self.temperature = max_new_tokens, group_size, temperature
        self.prompts = [encode_prompt(tokenizer, example.prompt) for example in some]
        rows = examples([(example.prompt, example.completion) for example in some], tokenizer, 2**20)
        self.input_ids, self.labels = rows.input_ids, rows.labels

    @property
    def settings(self) -> dict:
        """What the samples depend on besides the weights, the seed, and the examples."""
        return {"rollouts": [self.max_new_tokens, self.group_size, self.temperature]}

    def draw(self, model: Any, step: int, config: TrainConfig) -> tuple[Tensor, ...]:
        """Input_ids and labels (B, T) of the samples, and of each, (B,), its advantage, its reward, and
        whether its group agrees.

        Raises ValueError for a batch that is no whole number of groups, and for a reward that is not finite."""
        size = self.group_size
        if config.batch_size % size:
            raise ValueError(
                f"batch_size is {config.batch_size}; it must be whole groups of group_size, which is {size}"
            )
        chosen = batch_rows(
            len(self.prompts), step, replace(config, batch_size=config.batch_size // size, accumulation_steps=1)
        )
        numbers = [number for number in chosen.tolist() for _ in range(size)]
        ends, seed = end_ids(self.tokenizer.end_ids), 1_000_003 * config.seed + step
        prompts = [self.prompts[number] for number in numbers]
        how = self.max_new_tokens, self.temperature, self.tokenizer.vocab_size, ends, seed, config.precision
        drawn = sample(model, prompts, *how)
        rewards = []
        for number, ids in zip(numbers, drawn, strict=True):
            answer = text_of(ids, self.tokenizer)
            rewards.append(float(self.reward(self.examples[number], answer)))
            if not math.isfinite(rewards[-1]):
                raise ValueError(f"the reward of {answer[:60]!r} is {rewards[-1]}; it must be a finite number")
        batch, given = answered(prompts, drawn, self.tokenizer), torch.tensor(rewards)
        agrees = (given.view(-1, size) == given.view(-1, size)[:, :1]).all(1).repeat_interleave(size)
        return batch.input_ids, batch.labels, group_advantages(given, size), given, agrees
