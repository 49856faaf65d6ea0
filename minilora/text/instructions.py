"""Instruction data from a JSONL file: questions with the answers that a model is to give. One example a line, either of

    {"prompt": "Two plus two?", "completion": "Four."}
    {"messages": [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."}]}

Where the tokenizer has a chat template, a prompt is what the user says and its completion what the assistant answers.
Where it has none, both are plain text, and a line of messages cannot be used.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minilora.text.batches import Batches, Row, example_row, padded
from minilora.text.chat import ROLES
from minilora.text.tasks import Example
from minilora.text.tokenizer import AnyTokenizer


@dataclass
class Line:
    """One example with where it stood and its tokens."""

    number: int
    example: Example
    row: Row
    rejected: Row | None = None  # of a pair: the tokens of the answer that is not wanted

    @property
    def size(self) -> int:
        return max(len(ids) for ids, _ in (self.row, self.rejected or self.row))

    @property
    def opening(self) -> str:
        """All up to the first answer. Lines that open alike must not be parted by the split."""
        prompt = self.example.prompt
        if isinstance(prompt, str):
            return prompt
        roles = [message["role"] for message in prompt] + ["assistant"]
        return json.dumps(prompt[: roles.index("assistant")])


@dataclass
class Instructions:
    train: Batches
    validation: Batches
    train_examples: list[Example]
    validation_examples: list[Example]
    notes: str  # how the data was split, and what was left out


def load_instructions(path: Path, tokenizer: AnyTokenizer, max_length: int, count: int, seed: int = 0) -> Instructions:
    """The examples of a file, and up to `count` held out: the first of FILE.validation.jsonl where that stands beside
    FILE.jsonl, else a tenth, after a shuffle.

    Examples of more than `max_length` tokens are left out. Raises ValueError, naming file and line, for a line that is
    no example, and for a file without enough of them.
    """
    train, held_out, notes = read_split(path, tokenizer, max_length, count, seed, read_example)
    batches = [padded([line.row for line in lines], tokenizer) for lines in (train, held_out)]
    examples = [[line.example for line in lines] for lines in (train, held_out)]
    return Instructions(batches[0], batches[1], examples[0], examples[1], notes)


Reader = Callable[[int, str, AnyTokenizer], Line]  # of a line and its number


def read_split(
    path: Path, tokenizer: AnyTokenizer, max_length: int, count: int, seed: int, read: Reader
) -> tuple[list[Line], list[Line], str]:
    """The lines to train on, those held out, and notes. Raises as `load_instructions` does."""
    held_out_file = path.with_suffix(f".validation{path.suffix}")
    train, notes = read_lines(path, tokenizer, max_length, read)
    if held_out_file.is_file():
        held_out, more_notes = read_lines(held_out_file, tokenizer, max_length, read)
        check_apart(path, train, held_out_file, held_out)
        held_out, notes = held_out[:count], notes + more_notes
        how = f"held out in {held_out_file.name}"
    else:
        train, held_out = split(path, train, count, seed)
        how = f"held out (shuffled with seed {seed})"
    notes = [f"{path.name}: {len(train)} examples to train on, {len(held_out)} {how}", *notes]
    return train, held_out, "\n".join(notes)


def read_example(number: int, line: str, tokenizer: AnyTokenizer) -> Line:
    example = as_chat(parse(line), tokenizer)
    return Line(number, example, example_row(example.prompt, example.completion, tokenizer))


def read_lines(
    path: Path, tokenizer: AnyTokenizer, max_length: int, read: Reader = read_example
) -> tuple[list[Line], list[str]]:
    """The examples that fit `max_length` tokens, and a note on those that do not."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                lines.append(read(number, line, tokenizer))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not lines:
        raise ValueError(f"{path} is empty")
    long = [line for line in lines if line.size > max_length]
    if not long:
        return lines, []
    longest = max(line.size for line in long)
    note = (
        f"{path.name}: left out {len(long)} of {len(lines)} examples, which are longer than {max_length} tokens, "
        f"first line {long[0].number} with {long[0].size} (--sequence-length {longest} would keep all)"
    )
    if len(long) == len(lines):
        raise ValueError(note)
    return [line for line in lines if line.size <= max_length], [note]


def parse_object(line: str) -> dict[str, Any]:
    """The object in braces on a line. ValueError for anything else."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not an example: its brackets are nested too deeply") from None
    if not isinstance(entry, dict):
        raise ValueError(f"an object in braces is needed, not {line.strip()[:40]}")
    return entry


def parse(line: str) -> Example:
    """The example on a line; the last answer of a chat is its completion. ValueError says what is wrong with it."""
    entry = parse_object(line)
    if "messages" in entry:
        messages = check_messages(entry["messages"])
        return Example(messages[:-1], messages[-1]["content"])
    for key in ("prompt", "completion"):
        if key not in entry:
            raise ValueError('it needs "prompt" and "completion", or "messages"')
        check_text(entry[key], f'"{key}"')
    return Example(entry["prompt"], entry["completion"])


def check_messages(messages: Any) -> list[dict[str, str]]:
    """The messages with role and content alone; the last is the assistant's."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('"messages" is not a list of objects')
    for number, message in enumerate(messages, 1):
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}; known: {', '.join(ROLES)}")
        if role != "system" or message.get("content") != "":  # many a template has a system message that "" replaces
            check_text(message.get("content"), f"the content of message {number}")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError("no message is the assistant's, so there is nothing to learn")
    if roles[-1] != "assistant":
        raise ValueError(f"the last message is the {roles[-1]}'s; it must be the assistant's")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def check_text(value: Any, name: str):
    if not isinstance(value, str):
        raise ValueError(f"{name} is {json.dumps(value)[:40]}, not a string")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{name} holds half a character (a lone surrogate), which no text has")


def as_chat(example: Example, tokenizer: AnyTokenizer) -> Example:
    """A prompt becomes a user's message. Without a template it stays, and a space parts it from its completion."""
    prompt, completion = example.prompt, example.completion
    if not isinstance(prompt, str):
        return example
    if tokenizer.chat_template is not None:
        return replace(example, prompt=[{"role": "user", "content": prompt}])
    parted = prompt[-1].isspace() or completion[0].isspace()
    return example if parted else replace(example, completion=f" {completion}")


def split(path: Path, lines: list[Line], count: int, seed: int) -> tuple[list[Line], list[Line]]:
    """A tenth, at least 1 and at most `count`, is held out. Lines that open alike stay on one side."""
    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line.opening, []).append(line)
    if len(groups) < 2:
        raise ValueError(f"{path} has one prompt only; at least two different ones are needed, one to hold out")
    dice = random.Random(seed)
    shuffled = sorted(groups.values(), key=lambda _: dice.random())
    wanted = max(1, min(len(lines) // 10, count))
    held_out: list[Line] = []
    for group in shuffled:
        if len(held_out) + len(group) <= wanted:
            held_out += group
    held_out = held_out or min(shuffled, key=len)
    numbers = {line.number for line in held_out}
    return [line for line in lines if line.number not in numbers], held_out


def check_apart(path: Path, train: list[Line], held_out_file: Path, held_out: list[Line]):
    known = {line.opening: line.number for line in train}
    for line in held_out:
        if line.opening in known:
            where = f"line {known[line.opening]} of {path.name}"
            raise ValueError(
                f"{held_out_file}, line {line.number}: its prompt is also in {where}, so it is not held out"
            )
