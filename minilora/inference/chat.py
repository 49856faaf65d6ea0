"""A conversation: questions and answers so far, an answer that is read while it is written, adapters to switch between.

A model remembers nothing. Each question goes to it with all that was said before, rendered by the model's own template,
and what no longer fits its positions is forgotten, the oldest first.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from minilora.adapters.prompts import Prompt
from minilora.adapters.swap import AdapterShelf
from minilora.inference.generate import stream
from minilora.model import GPT
from minilora.storage.adapters import read_adapter
from minilora.storage.folders import read_whole
from minilora.storage.peft import peft_type
from minilora.storage.prompts import PROMPTS
from minilora.text.chat import Message, chat_ids, template_of
from minilora.text.streaming import stream_text
from minilora.text.tokenizer import AnyTokenizer

COMMANDS = "/adapter NAME, /base, /quit"


class Conversation:
    """`messages` is what was said so far. An answer has at most `max_new_tokens`, and half of the model's positions.

    sampling: temperature, top_k, top_p as in `generate`; the answer to question n draws with seed + n.

    Raises ValueError for a tokenizer without a chat template.
    """

    def __init__(
        self, model: GPT | Prompt, tokenizer: AnyTokenizer, max_new_tokens: int = 512, seed: int = 0, **sampling
    ):
        template_of(tokenizer)
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.limit = model.config.max_position_embeddings
        self.max_new_tokens, self.seed = min(max_new_tokens, self.limit // 2), seed
        self.messages: list[Message] = []
        self.answered = 0  # questions, forgotten ones among them
        self.forgotten = 0  # messages that had to go before the last question

    def answer(self, question: str) -> Iterator[str]:
        """The answer as it comes; once it is complete, question and answer belong to `messages`.

        Raises ValueError, at once, for a question too long for the model, for a template that fails, and as `stream`.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        ids = chat_ids(self.tokenizer, asked)
        while len(ids) + self.max_new_tokens > self.limit and len(asked) > 1:
            asked = asked[2:]  # the oldest question and its answer
            ids = chat_ids(self.tokenizer, asked)
        seed = self.seed + self.answered
        how = dict(eos_id=self.tokenizer.end_ids, vocab_size=self.tokenizer.vocab_size, **self.sampling)
        tokens = stream(self.model, ids, self.max_new_tokens, seed=seed, **how)
        self.forgotten = len(self.messages) + 1 - len(asked)
        return self._answer(asked, tokens)

    def _answer(self, asked: list[Message], tokens: Iterator[int]) -> Iterator[str]:
        pieces = []
        for piece in stream_text(self.tokenizer, tokens):
            pieces.append(piece)
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        self.answered += 1


def open_shelf(model: GPT, folders: Sequence[Path], force: bool = False) -> AdapterShelf:
    """A shelf of saved adapters, each under its folder's name, the first one active.

    Raises ValueError for a prompt and for two folders of one name, and as `read_adapter` does.
    """
    shelf = AdapterShelf(model)
    for folder in folders:
        name = folder.resolve().name
        if peft_type(folder) in PROMPTS:
            raise ValueError(f"{folder} holds a prompt, and a conversation switches between LoRA adapters only")
        if name in shelf.names:
            raise ValueError(f"two adapters are called {name!r}, after their folders; rename one of these")
        shelf.add(name, read_whole(folder, partial(read_adapter, model, folder, force)))
    if shelf.names:
        shelf.switch(shelf.names[0])
    return shelf


def talk(conversation: Conversation, shelf: AdapterShelf, lines: Iterable[str]):
    """Answers line after line on stdout, until /quit or the last line. All else that there is to say is on stderr."""
    for line in lines:
        command, _, name = line.strip().partition(" ")
        try:
            if command == "/quit":
                break
            if command == "/adapter":
                shelf.switch(name.strip())
            elif command == "/base":
                shelf.switch(None)
            elif command.startswith("/"):
                raise ValueError(f"there is no command {command}; known: {COMMANDS}")
            elif command:
                pieces = conversation.answer(line)
                if conversation.forgotten:
                    fault = f"the conversation is longer than the model's {conversation.limit} positions"
                    print(f"{fault}: its oldest {conversation.forgotten} messages are forgotten", file=sys.stderr)
                write(pieces)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def typed_lines() -> Iterator[str]:
    """What is typed on stdin, behind a "> " where that is a terminal."""
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return


def write(pieces: Iterable[str]):
    """Prints a text as it comes, and ends the line."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
