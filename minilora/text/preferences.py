"""Pairs of answers, one of which is preferred: from a JSONL file, one pair a line in TRL's standard format with an
explicit prompt,

    {"prompt": "Two plus two?", "chosen": "Four.", "rejected": "Five, I think."}

or made from the tiny world:

    voice    a style that the base never uses: a statement as a pirate would say it over the same statement, plain
    wording  two styles that it uses equally: "Mara Hale is a baker." over "Mara Hale works as a baker."
"""

from collections.abc import Callable
from pathlib import Path

from minilora.text.batches import Batches, example_row, padded
from minilora.text.datasets import Dataset
from minilora.text.instructions import Line, as_chat, check_text, parse_object, read_split
from minilora.text.tasks import Example, Task, is_right_pirate, load_task
from minilora.text.tokenizer import AnyTokenizer
from minilora.text.world import FACTS, Dice, World, state

WORLD_PAIRS = 400  # to train on
TRAINING = {"steps": 30, "batch_size": 16, "evaluations": 3}


def is_first_wording(example: Example, answer: str) -> bool:
    """It begins with a fact in its first wording, whatever the fact is."""
    firsts = [sentences[0].removeprefix("{name}").partition("{value}")[0] for _, sentences, _ in FACTS.values()]
    return answer.strip().startswith(tuple(first.strip() + " " for first in firsts))


SCORERS: dict[str, Callable[[Example, str], bool]] = {"voice": is_right_pirate, "wording": is_first_wording}
PAIRS = tuple(SCORERS)  # of the world, by name


def load_preferences(name: str, tokenizer: AnyTokenizer, sequence_length: int, count: int, seed: int = 0) -> Dataset:
    """Pairs of the world by name, or those of a file; `count` is the most that are held out.

    Of a file, pairs with an answer of more than `sequence_length` tokens are left out. Raises ValueError for a name
    that is neither, and, naming file and line, for a line that is no pair, an empty answer, and two answers that are
    the same.
    """
    if name in PAIRS:
        pairs = {"train": WORLD_PAIRS, "validation": count}
        made = {split: world_pairs(name, split, size, seed) for split, size in pairs.items()}
        examples = {split: [example for example, _ in each] for split, each in made.items()}
        lines = {split: [line_of(0, *pair, tokenizer) for pair in each] for split, each in made.items()}
        task = Task(name, examples["train"], examples["validation"], SCORERS[name])
        file_name, notes = name, ""
    else:
        path = Path(name)
        if not path.is_file() or path.suffix.lower() != ".jsonl":
            fault = f"{name!r} is neither pairs of the world ({', '.join(PAIRS)}) nor a file that is called *.jsonl"
            raise ValueError(fault)
        train, held_out, notes = read_split(path, tokenizer, sequence_length, count, seed, read_pair)
        lines, task, file_name = {"train": train, "validation": held_out}, None, path.name
    prompts = [line.example.prompt for line in lines["validation"][:3]]
    train_pairs, validation_pairs = (batches_of(each, tokenizer) for each in lines.values())
    return Dataset(file_name, train_pairs, validation_pairs, None, task, prompts, notes, dict(TRAINING))


def read_pair(number: int, text: str, tokenizer: AnyTokenizer) -> Line:
    entry = parse_object(text)
    if "prompt" not in entry and any(isinstance(entry.get(key), list) for key in ("chosen", "rejected")):
        fault = "a pair of lists of messages has its prompt within"
        raise ValueError(f'{fault}; write what both begin with as "prompt" and each answer, all three as strings')
    for key in ("prompt", "chosen", "rejected"):
        if key not in entry:
            raise ValueError('a pair needs "prompt", "chosen" and "rejected"')
        check_text(entry[key], f'"{key}"')
    if entry["chosen"].strip() == entry["rejected"].strip():
        raise ValueError('"chosen" and "rejected" are the same, which prefers nothing')
    return line_of(number, Example(entry["prompt"], entry["chosen"]), entry["rejected"], tokenizer)


def line_of(number: int, chosen: Example, rejected: str, tokenizer: AnyTokenizer) -> Line:
    both = [as_chat(example, tokenizer) for example in (chosen, Example(chosen.prompt, rejected))]
    rows = [example_row(example.prompt, example.completion, tokenizer) for example in both]
    return Line(number, both[0], *rows)


def batches_of(lines: list[Line], tokenizer: AnyTokenizer) -> Batches:
    """Input_ids and labels (N, 2, T): of each pair the chosen answer's row, then the rejected one's."""
    rows = padded([row for line in lines for row in (line.row, line.rejected or line.row)], tokenizer)
    return Batches(*(part.unflatten(0, (-1, 2)) for part in (rows.input_ids, rows.labels)))


def world_pairs(name: str, split: str, size: int, seed: int = 0) -> list[tuple[Example, str]]:
    """Examples whose completion is the chosen answer, each with the rejected one; no person is on both sides."""
    if name == "voice":
        task = load_task("pirate", size if split == "train" else 1, size if split == "validation" else 1, seed)
        examples = task.train if split == "train" else task.validation
        return [(example, f" {plain_statement(example)}") for example in examples]
    world, dice = World(split), Dice(f"wording {split} {seed}")
    pairs = []
    for _ in range(size):
        kind = dice.pick(list(FACTS))
        person = world.person(dice, [kind])
        chosen, rejected = (state(person, kind, sentence).removeprefix(person.name) for sentence in (0, 1))
        pairs.append((Example(f"Notes: {person.name}", chosen), rejected))
    return pairs


def plain_statement(example: Example) -> str:
    """ "Say it like a pirate: Mara Hale keeps a goat.\\nPirate:" -> "Mara Hale keeps a goat." """
    assert isinstance(example.prompt, str)
    return example.prompt.partition(": ")[2].partition("\n")[0]
