"""What a run trains on: a task of the world, the standard library's source, or any UTF-8 file of the reader's own."""

from dataclasses import dataclass
from pathlib import Path

from minilora.text.batches import Batches, cut, examples
from minilora.text.english import python_code
from minilora.text.tasks import TASKS, Task, load_task
from minilora.text.tokenizer import AnyTokenizer

PYTHON_CODE = "python-code"
VALIDATION_ROWS = 64  # at most, of a text: enough for a loss with two steady digits, few enough to evaluate often


@dataclass
class Dataset:
    name: str
    train: Batches
    validation: Batches
    floor: float | None  # the least possible loss, in nats per counted token; None for a text, where nobody knows it
    task: Task | None  # None for a text
    prompts: list[str]  # beginnings to generate from, for samples before and after


def load_dataset(name: str, tokenizer: AnyTokenizer, sequence_length: int = 256, seed: int = 0) -> Dataset:
    """`name` is a task ("json", ...), "python-code", or the path of a text file.

    A text is cut into rows of `sequence_length` tokens, the last tenth for validation. Raises ValueError for a name
    that is none of these, and for a file that is empty, too short, or not UTF-8 text.
    """
    if name in TASKS:
        task = load_task(name, seed=seed)
        train, validation = (
            examples([(each.prompt, each.completion) for each in split], tokenizer, sequence_length)
            for split in (task.train, task.validation)
        )
        prompts = [each.prompt for each in task.validation[:3]]
        return Dataset(name, train, validation, task.floor(tokenizer), task, prompts)
    text = python_code() if name == PYTHON_CODE else read_text(name)
    ids = tokenizer.encode(text)
    if len(ids) < 2 * sequence_length:
        raise ValueError(
            f"{name} has {len(ids)} tokens; at least {2 * sequence_length} are needed, one sequence of "
            f"{sequence_length} to train on and one to validate (a shorter --sequence-length needs less)"
        )
    held_out = max(sequence_length, len(ids) // 10)
    train = cut(ids[:-held_out], sequence_length)
    validation = cut(ids[-held_out:][: VALIDATION_ROWS * sequence_length], sequence_length)
    starts = validation.input_ids[:3, : sequence_length // 4].tolist()
    return Dataset(Path(name).name, train, validation, None, None, [tokenizer.decode(start) for start in starts])


def read_text(path: str) -> str:
    """The file's text. Raises ValueError, naming the file, if it is missing, empty or not UTF-8 text."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{path!r} is no task ({', '.join(TASKS)}), not {PYTHON_CODE}, and no file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    if "\0" in text:
        raise ValueError(f"{path} is a binary file: it holds zero bytes, which text does not")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
