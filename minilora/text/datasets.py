"""What a run trains on: a task of the world, an instruction set, the standard library, or the reader's own file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.ranges import COUNT, ROW
from minilora.text.batches import Batches, cut, examples
from minilora.text.chat import ChatPrompt
from minilora.text.english import python_code
from minilora.text.instruction_sets import SCORERS, scored_task, shipped_file
from minilora.text.instructions import load_instructions
from minilora.text.tasks import TASKS, Task, load_task
from minilora.text.tokenizer import AnyTokenizer

PYTHON_CODE = "python-code"
HELD_OUT = 200  # examples at most, unless asked otherwise
VALIDATION_ROWS = 64  # at most, of a text: enough for a loss with two steady digits, few enough to evaluate often
TRAINING = {"steps": 150, "batch_size": 16}
# A real model knows most of what an answer needs, and each of its steps and evaluations is dear. Rows differ in length.
INSTRUCTION_TRAINING = {"steps": 30, "batch_size": 8, "evaluations": 3, "group_by_length": True}
PASSES = 4  # at most, over instruction data: a few dozen examples are soon known by heart


@dataclass
class Dataset:
    name: str
    train: Batches
    validation: Batches
    floor: float | None  # the least possible loss, in nats per counted token; None where nobody knows it
    task: Task | None  # None where there is no scorer
    prompts: list[ChatPrompt]  # beginnings to generate from, for samples before and after
    notes: str = ""  # what a reader of the results should know of the data
    training: dict[str, Any] = field(default_factory=lambda: dict(TRAINING))  # of `schedule`, unless asked otherwise


def data_named(name: str) -> str:
    """What `--data` means: the path of an instruction set that ships ("orders"), or the name as it is."""
    return str(shipped_file(name)) if name in SCORERS else name


def load_dataset(
    name: str, tokenizer: AnyTokenizer, sequence_length: int = 256, seed: int = 0, count: int = HELD_OUT
) -> Dataset:
    """`name` is a task ("json", ...), "python-code", or the path of a text file or of instruction data (.jsonl).

    A text is cut into rows of `sequence_length` tokens, the last tenth for validation. `count` is the most examples or
    rows that are held out, to validate on and to score. Raises ValueError for a name that is none of these, and for a
    file that is empty, too short, or not UTF-8 text.
    """
    COUNT.check("count", count)
    ROW.check("sequence_length", sequence_length)
    if name in TASKS:
        task = load_task(name, validation_size=count, seed=seed)
        train, validation = (
            examples([(each.prompt, each.completion) for each in split], tokenizer, sequence_length)
            for split in (task.train, task.validation)
        )
        prompts = [each.prompt for each in task.validation[:3]]
        return Dataset(name, train, validation, task.floor(tokenizer), task, prompts)
    file = Path(name)
    if file.suffix.lower() == ".json":
        raise ValueError(f"{name}: instruction data is one example a line, in a file that is called *.jsonl")
    if file.suffix.lower() == ".jsonl" and file.is_file():
        data = load_instructions(file, tokenizer, sequence_length, count, seed)
        scored = scored_task(file, data.train_examples, data.validation_examples)
        beginnings = [each.prompt for each in data.validation_examples[:3]]
        steps = -(-PASSES * len(data.train) // INSTRUCTION_TRAINING["batch_size"])  # rounded up
        training = INSTRUCTION_TRAINING | {"steps": min(INSTRUCTION_TRAINING["steps"], steps)}
        return Dataset(file.name, data.train, data.validation, None, scored, beginnings, data.notes, training)
    text = python_code() if name == PYTHON_CODE else read_text(name)
    ids = tokenizer.encode(text)
    if len(ids) < 2 * sequence_length:
        raise ValueError(
            f"{name} has {len(ids)} tokens; at least {2 * sequence_length} are needed, one sequence of "
            f"{sequence_length} to train on and one to validate (a shorter --sequence-length needs less)"
        )
    held_out = max(sequence_length, len(ids) // 10)
    train = cut(ids[:-held_out], sequence_length)
    validation = cut(ids[-held_out:][: min(count, VALIDATION_ROWS) * sequence_length], sequence_length)
    starts = validation.input_ids[:3, : sequence_length // 4].tolist()
    return Dataset(file.name, train, validation, None, None, [tokenizer.decode(start) for start in starts])


def read_text(path: str) -> str:
    """The file's text. Raises ValueError, naming the file, if it is missing, empty or not UTF-8 text."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(
            f"{path!r} is no task ({', '.join(TASKS)}), no data ({', '.join(SCORERS)}, {PYTHON_CODE}), and no file"
        )
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    if "\0" in text:
        raise ValueError(f"{path} is a binary file: it holds zero bytes, which text does not")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
