"""From texts to training data: whole documents packed into rows, long text cut, examples padded and masked.

`pack`, `cut` and `examples` each give `Batches` of N rows of T tokens. Labels follow the usual convention: labels[n, t]
is input_ids[n, t], or -100 (IGNORE) where the loss is not to count that token; the loss does the shift by one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.text.chat import ChatPrompt, Message, chat_ids, encode_prompt, render
from minilora.text.tokenizer import AnyTokenizer
from minilora.train_settings import IGNORE


@dataclass
class Batches:
    input_ids: Tensor  # (N, T) int64; of pairs (N, 2, T)
    labels: Tensor  # (N, T) int64
    more: tuple[Tensor, ...] = ()  # what an objective needs besides, each with N entries

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def counted_tokens(self) -> int:
        """How many tokens the loss counts. The first of a row is never among them: nothing stands before it."""
        return int((self.labels[..., 1:] != IGNORE).sum())


def pack(documents: Iterable[list[int]], length: int, tokenizer: AnyTokenizer) -> Batches:
    """Whole documents side by side in rows of `length` tokens, each framed: prefix document <eos>. The prefix is what
    the tokenizer puts in front of a text: <bos> for ours, nothing for some.

    A document that does not fit the rest of a row starts the next row, so that no document is cut in two (a question
    cut off from its notes teaches guessing); only a document longer than a whole row is cut, into row-size pieces.
    The rest of a row is padding. The loss counts neither padding nor the prefix.
    """
    rows: list[list[int]] = [[]]
    labels: list[list[int]] = [[]]
    for document in documents:
        ids = [*tokenizer.prefix, *document, tokenizer.eos_id]
        counted = [IGNORE] * len(tokenizer.prefix) + ids[len(tokenizer.prefix) :]
        for start in range(0, len(ids), length):
            piece = slice(start, start + length)
            if len(rows[-1]) + len(ids[piece]) > length:
                rows.append([])
                labels.append([])
            rows[-1] += ids[piece]
            labels[-1] += counted[piece]
    return Batches(_padded(rows, length, tokenizer.eos_id), _padded(labels, length, IGNORE))


def cut(ids: list[int], length: int) -> Batches:
    """One long text as consecutive rows of `length` tokens, without an incomplete last row. ValueError for no row."""
    if len(ids) < length:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one sequence of {length}")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)  # (N, T)
    return Batches(rows, rows.clone())


def examples(pairs: Iterable[tuple[ChatPrompt, str]], tokenizer: AnyTokenizer, max_length: int) -> Batches:
    """One (prompt, completion) a row, as `example_row` makes it, padded to the longest.

    Raises ValueError for an example of more than `max_length` tokens.
    """
    rows = []
    for prompt, completion in pairs:
        rows.append(example_row(prompt, completion, tokenizer))
        size = len(rows[-1][0])
        if size > max_length:
            raise ValueError(
                f"an example of {size} tokens is longer than the limit of {max_length}: {prompt[:40]!r}..."
            )
    return padded(rows, tokenizer)


Row = tuple[list[int], list[int]]  # input_ids and labels


def example_row(prompt: ChatPrompt, completion: str, tokenizer: AnyTokenizer) -> Row:
    """prefix prompt completion <eos>, or a chat that ends with the completion. The loss counts the completion and
    <eos>; in a chat all that the assistant says.

    Prompt and completion are encoded apart, as generation has to encode a prompt.
    """
    if not isinstance(prompt, str):
        return _chat_row([*prompt, {"role": "assistant", "content": completion}], tokenizer)
    before = encode_prompt(tokenizer, prompt)
    after = [*tokenizer.encode(completion, continues=bool(prompt)), tokenizer.eos_id]
    return before + after, [IGNORE] * len(before) + after


def _chat_row(messages: list[Message], tokenizer: AnyTokenizer) -> Row:
    """A chat as the tokenizer's template writes it, up to its last end token. Counted, marked here with ^:

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n...
                                                           ^^^^^^^^^^^^^^^^

    Raises ValueError for a template under which a prompt does not stay as it was once the chat goes on.
    """
    ids: list[int] = []
    labels: list[int] = []
    steers = set(tokenizer.control.values())
    so_far = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt, answered = render(tokenizer, messages[:turn]), render(tokenizer, messages[: turn + 1], answer=False)
        said, end = _answer_and_end(answered.removeprefix(prompt), message["content"], tokenizer)
        if not (prompt.startswith(so_far) and answered.startswith(prompt) and end):
            raise ValueError(
                f"the chat template of {tokenizer.path} does not write a chat as prompt, answer and end token, one "
                "after the other; generation would see something else than training"
            )
        so_far = prompt + said + end
        # Of the prompt, what comes after the last answer. The end token of that answer is the row's last control token.
        prompt_ids, steered = chat_ids(tokenizer, messages[:turn]), sum(id in steers for id in ids)
        places = [place for place, id in enumerate(prompt_ids) if id in steers]
        new = prompt_ids[places[steered - 1] + 1 :] if ids else prompt_ids
        goes_on = not (tokenizer.blank_after_control and prompt.endswith(tuple(tokenizer.control)))
        answer_ids = [*tokenizer.encode(said, continues=goes_on), tokenizer.control[end]]
        ids += new + answer_ids
        labels += [IGNORE] * len(new) + answer_ids
    return ids, labels


def _answer_and_end(rest: str, content: str, tokenizer: AnyTokenizer) -> tuple[str, str]:
    """What the template writes behind the prompt, up to the end token, and the end token; "" where there is none.

    White space around the content is the template's to choose: some strip it, some put a space in front.
    """
    ends = [name for name, id in tokenizer.control.items() if id in tokenizer.end_ids]
    before, _, after = rest.partition(content.strip())
    end = next((name for name in ends if after.lstrip().startswith(name)), "")
    if before.strip() or not end:
        return "", ""
    return rest[: len(rest) - len(after.lstrip())], end


def answered(prompts: Sequence[list[int]], answers: Sequence[list[int]], tokenizer: AnyTokenizer) -> Batches:
    """Ids of prompts and of their answers as rows in which the answers count."""
    rows = [(prompt + ids, [IGNORE] * len(prompt) + ids) for prompt, ids in zip(prompts, answers, strict=True)]
    return padded(rows, tokenizer)


def padded(rows: list[Row], tokenizer: AnyTokenizer) -> Batches:
    """Rows of different lengths, each padded at its end to the longest."""
    length = max(len(ids) for ids, _ in rows)
    ids, labels = zip(*rows, strict=True)
    return Batches(_padded(ids, length, tokenizer.eos_id), _padded(labels, length, IGNORE))


def _padded(rows: Sequence[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
