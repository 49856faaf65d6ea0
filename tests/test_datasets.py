"""What a run trains on: tasks and texts, split without overlap, and one sentence about a file that cannot be used."""

import pytest

from minilora.text import datasets, english
from minilora.text.datasets import PYTHON_CODE, VALIDATION_ROWS, load_dataset
from minilora.text.tasks import TASKS, load_task
from minilora.text.world import World

LENGTH = 32


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("\n".join(document.text for document in World().documents(300, seed=0)), encoding="utf-8")
    return path


def test_json_that_is_not_one_example_a_line_is_refused_and_a_name_in_capitals_is_not(tokenizer, tmp_path):
    for name in ("notes.json", "NOTES.JSONL"):
        lines = [f'{{"prompt": "What is {n}?", "completion": "A number."}}' for n in range(12)]
        (tmp_path / name).write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"notes.json: instruction data is one example a line, .* \*.jsonl"):
        load_dataset(str(tmp_path / "notes.json"), tokenizer, LENGTH)
    assert len(load_dataset(str(tmp_path / "NOTES.JSONL"), tokenizer, LENGTH).train) == 11, "read as a plain text"


def test_a_text_is_split_without_overlap(tokenizer, text_file):
    dataset = load_dataset(str(text_file), tokenizer, LENGTH)
    ids = tokenizer.encode(text_file.read_text(encoding="utf-8"))
    train, validation = (split.input_ids.flatten().tolist() for split in (dataset.train, dataset.validation))
    held_out = len(ids) // 10
    assert train == ids[: len(train)]
    assert 0 <= len(ids) - held_out - len(train) < LENGTH, "training should end where the last tenth begins"
    assert validation == ids[-held_out:][: len(validation)]
    assert len(dataset.validation) == min(VALIDATION_ROWS, held_out // LENGTH)
    assert dataset.train.counted_tokens == len(dataset.train) * (LENGTH - 1), "every token of a text counts"
    assert (dataset.name, dataset.floor, dataset.task) == ("story.txt", None, None)


def test_prompts_of_a_text_are_beginnings_of_held_out_rows(tokenizer, text_file):
    dataset = load_dataset(str(text_file), tokenizer, LENGTH)
    assert len(dataset.prompts) == 3
    for prompt, row in zip(dataset.prompts, dataset.validation.input_ids.tolist(), strict=False):
        assert prompt and tokenizer.decode(row).startswith(prompt)


def test_the_shortest_text_that_will_do(tokenizer, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("\n" * 2 * LENGTH + "1", encoding="utf-8")
    size = len(tokenizer.encode(path.read_text(encoding="utf-8")))
    dataset = load_dataset(str(path), tokenizer, size // 2)
    assert len(dataset.train) == len(dataset.validation) == 1, (
        f"one row each, not {len(dataset.train)} and {len(dataset.validation)}"
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_task_counts_completions_only(tokenizer, name, monkeypatch):
    monkeypatch.setattr(
        datasets, "load_task", lambda name, validation_size, seed: load_task(name, 50, validation_size, seed)
    )
    dataset = load_dataset(name, tokenizer, 256, seed=3, count=20)
    task = load_task(name, 50, 20, seed=3)
    assert dataset.task == task, "the task is not that of seed 3"
    for batches, split in ((dataset.train, task.train), (dataset.validation, task.validation)):
        assert len(batches) == len(split)
        assert batches.counted_tokens == sum(len(tokenizer.encode(each.completion)) + 1 for each in split), (
            f"completions and end tokens alone count, not {batches.counted_tokens}"
        )
    assert dataset.floor == task.floor(tokenizer), f"the floor is {task.floor(tokenizer)}, not {dataset.floor}"
    assert dataset.prompts == [each.prompt for each in task.validation[:3]]


@pytest.fixture(scope="module")
def library():
    return english.standard_library_files()


def test_the_standard_library_is_its_modules_without_its_tests(library):
    assert len(library) > 200 and len(set(library)) == len(library)
    inside = [file.relative_to(english.STANDARD_LIBRARY) for file in library]
    assert {"argparse.py", "json/decoder.py"} <= {file.as_posix() for file in inside}
    assert not [file for file in inside if {"test", "tests", "site-packages"} & set(file.parts)]


def test_python_code_is_a_text(tokenizer, library, monkeypatch):
    monkeypatch.setattr(english, "standard_library_files", lambda: list(library))
    code = english.python_code(40_000)
    assert len(code) == 40_000 and code == english.python_code(50_000)[:40_000], "the files should keep their order"
    assert "def " in code and "import " in code
    monkeypatch.setattr(datasets, "python_code", lambda: code)
    dataset = load_dataset(PYTHON_CODE, tokenizer, LENGTH)
    assert (dataset.name, dataset.floor, dataset.task) == (PYTHON_CODE, None, None)
    assert dataset.train.input_ids.flatten()[:100].tolist() == tokenizer.encode(code)[:100]


def test_python_documentation_is_the_topics_and_the_docstrings(tmp_path, monkeypatch):
    good, broken = tmp_path / "good.py", tmp_path / "broken.py"
    good.write_text('"""Of the module."""\n\nclass C:\n    """Of the class."""\n\n    def f(self):\n        "Of f."\n')
    broken.write_text('"""Never read."""\ndef (')
    monkeypatch.setattr(english, "standard_library_files", lambda: [broken, good])
    *topics, module, of_class, of_function = english.python_documentation()
    assert (module, of_class, of_function) == ("Of the module.", "Of the class.", "Of f.")
    assert len(topics) > 50 and sum(map(len, topics)) > 300_000, "the interpreter's help topics are missing"


BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n\t\n", "is empty"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8 text: byte 0"),
    "zeros": (b"MZ\0\0\x03\0", "binary"),
    "latin-1": ("a café".encode("latin-1"), "not UTF-8 text: byte 5"),
    "utf-16": ("hello".encode("utf-16"), "not UTF-8 text: byte 0"),
    "short": (b"Once upon a time.", "at least 64 are needed"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_in_one_sentence_that_names_it(tokenizer, tmp_path, name):
    content, reason = BAD_FILES[name]
    path = tmp_path / f"{name}.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_dataset(str(path), tokenizer, LENGTH)
    message = str(error.value)
    assert message.startswith(str(path)) and reason in message and "\n" not in message, message


def test_a_name_that_is_nothing_and_a_folder_are_refused(tokenizer, tmp_path):
    for name in ("poetry", str(tmp_path), str(tmp_path / "missing.txt")):
        with pytest.raises(ValueError) as error:
            load_dataset(name, tokenizer, LENGTH)
        message = str(error.value)
        assert message.startswith(repr(name)) and all(known in message for known in (*TASKS, PYTHON_CODE)), message


def test_a_task_that_does_not_fit_the_sequence_is_refused(tokenizer):
    with pytest.raises(ValueError, match="tokens .* 16.*Notes: "):
        load_dataset("json", tokenizer, 16)
