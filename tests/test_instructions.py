"""Instruction data: what counts in a chat, how lines are split, and one sentence about a line that cannot be used."""

import json

import pytest
import torch

from minilora.inference import evaluate
from minilora.inference.evaluate import answer
from minilora.inference.generate import generate
from minilora.model import GPT, GPTConfig
from minilora.text import tokenizer as tokenizer_file
from minilora.text.batches import example_row
from minilora.text.chat import encode_prompt
from minilora.text.datasets import load_dataset
from minilora.text.instructions import load_instructions
from minilora.train_settings import IGNORE

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTH = 256


def chat_tokenizer(folder, template=CHATML):
    """One token for each byte and three control tokens, the last two of which end an answer."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|stop|>"])
    settings = {"eos_token": "<|im_end|>", "chat_template": template}
    return tokenizer_file.JsonTokenizer(folder / "tokenizer.json", library.to_str().encode(), settings, [258])


@pytest.fixture
def chatty(tmp_path):
    return chat_tokenizer(tmp_path)


def letters(tokenizer, ids) -> str:
    """The text with its control tokens."""
    names = {id: name for name, id in tokenizer.control.items()}
    return "".join(names.get(id) or tokenizer.decode([id]) for id in ids)


def message(role, content):
    return {"role": role, "content": content}


def chat(*contents):
    """User and assistant in turn."""
    return [message(("user", "assistant")[n % 2], content) for n, content in enumerate(contents)]


def write(path, entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


def pairs(count):
    return [{"prompt": f"Question {n}?", "completion": f"Answer {n}."} for n in range(count)]


# -- what counts -----------------------------------------------------------------------------------------------------


def test_the_assistant_counts_with_its_end_tokens_and_nothing_else(chatty):
    messages = [message("system", "Be brief."), *chat("Hi", "Hello!", "Is <|im_end|> a token?", "Yes: <|im_end|>.")]
    ids, labels = example_row(messages[:-1], messages[-1]["content"], chatty)
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nIs <|im_end|> a token?<|im_end|>\n"
        "<|im_start|>assistant\nYes: <|im_end|>.<|im_end|>"
    )
    assert letters(chatty, ids) == text, "the row is the chat, without what the template puts behind the last end token"
    counted = [id for id in labels if id != IGNORE]
    assert letters(chatty, counted) == "Hello!<|im_end|>Yes: <|im_end|>.<|im_end|>"
    assert all(label in (IGNORE, id) for label, id in zip(labels, ids, strict=True)), (
        "a label is the token at its place"
    )
    typed = ids.count(chatty.control["<|im_end|>"])
    assert typed == 5, f"five messages end; that somebody typed the name of the token is no end, but there are {typed}"


@pytest.mark.parametrize("said", [1, 3])
def test_an_answer_begins_where_generation_begins(chatty, said):
    """Each answer of a row stands behind exactly what generation would be given."""
    messages = chat("Hi", "Hello!", "\nHow are you?", " Fine. ")
    ids, labels = example_row(messages[:-1], messages[-1]["content"], chatty)
    prompt = encode_prompt(chatty, messages[:said])
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt) - 1] == IGNORE and labels[len(prompt)] == ids[len(prompt)]


def test_templates_may_choose_white_space_and_the_end_token(tmp_path):
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}[{{ message['content'] }}]"
        "{% else %} {{ message['content'] | trim }} <|stop|>{% endif %}{% endfor %}"
    )
    tokenizer = chat_tokenizer(tmp_path, template)
    ids, labels = example_row(chat("a", " b ", "c"), "d", tokenizer)
    assert letters(tokenizer, ids) == "[a] b <|stop|>[c] d <|stop|>"
    assert letters(tokenizer, [id for id in labels if id != IGNORE]) == " b <|stop|> d <|stop|>"


FORGETS = CHATML.replace(
    "message['content']", "'...' if message['role'] == 'assistant' and not loop.last else message['content']"
)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_end|>\n{% endfor %}", "\n{% endfor %}"),  # no end token
        CHATML.replace("assistant\n{% endif %}", "assistant: {% endif %}"),  # the prompt is written otherwise
        CHATML.replace("{{ message['content'] }}", "<think></think>{{ message['content'] }}"),  # something in between
        FORGETS,  # what was said early is no longer there when the chat goes on
    ],
)
def test_a_template_that_would_not_train_what_is_generated_is_named(tmp_path, template):
    tokenizer = chat_tokenizer(tmp_path, template)
    with pytest.raises(ValueError, match="the chat template of .*tokenizer.json does not write a chat as"):
        example_row(chat("one", "two", "three"), "four", tokenizer)


def test_both_formats_say_the_same_to_a_chat_model(chatty, tmp_path):
    file = write(tmp_path / "both.jsonl", [pairs(1)[0], {"messages": chat("Question 0?", "Answer 0."), "id": 7}])
    write(tmp_path / "both.validation.jsonl", pairs(2)[1:])
    data = load_instructions(file, chatty, LENGTH, 9)
    assert data.train.input_ids[0].tolist() == data.train.input_ids[1].tolist()
    assert data.train_examples[0].prompt == [message("user", "Question 0?")]


def test_without_a_template_a_pair_is_plain_text(tokenizer, tmp_path):
    entries = [{"prompt": "Where?", "completion": "Here."}, {"prompt": "Where? ", "completion": "Here."}]
    entries += [{"prompt": "Where?\nAnswer:", "completion": " Here."}]
    file = write(tmp_path / "plain.jsonl", entries)
    write(tmp_path / "plain.validation.jsonl", pairs(1))
    data = load_instructions(file, tokenizer, LENGTH, 9)
    for row, parts in enumerate((("Where?", " Here."), ("Where? ", "Here."), ("Where?\nAnswer:", " Here."))):
        before, after = [tokenizer.bos_id, *tokenizer.encode(parts[0])], [*tokenizer.encode(parts[1]), tokenizer.eos_id]
        size = len(before + after)
        assert data.train.input_ids[row].tolist()[:size] == before + after, f"row {row}"
        assert data.train.labels[row].tolist()[:size] == [IGNORE] * len(before) + after, f"row {row}"
        assert set(data.train.labels[row].tolist()[size:]) <= {IGNORE}, "padding stands at the end and does not count"


def test_a_chat_without_a_template(tokenizer, tmp_path):
    file = write(tmp_path / "chat.jsonl", [{"messages": chat("Hi", "Hello!")}])
    with pytest.raises(ValueError, match=r"chat.jsonl, line 1: .*tokenizer.model comes without a chat template"):
        load_instructions(file, tokenizer, LENGTH, 9)


# -- lines that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, said",
    [
        ("prompt: hello", "not JSON: Expecting value at character 1"),
        ("[" * 100_000, "not an example: its brackets are nested too deeply"),
        ('["prompt"]', 'an object in braces is needed, not \\["prompt"\\]'),
        ('{"text": "a"}', 'it needs "prompt" and "completion", or "messages"'),
        ('{"prompt": "a"}', 'it needs "prompt" and "completion", or "messages"'),
        ('{"prompt": "a", "completion": " "}', '"completion" is empty'),
        ('{"prompt": "", "completion": "b"}', '"prompt" is empty'),
        ('{"prompt": "a", "completion": 4}', '"completion" is 4, not a string'),
        ('{"prompt": "\\ud83d", "completion": "a"}', '"prompt" holds half a character'),
        ('{"messages": {"role": "user"}}', '"messages" is not a list of objects'),
        ('{"messages": ["hello"]}', '"messages" is not a list of objects'),
        (
            json.dumps({"messages": [message("bot", "a")]}),
            "message 1 has the role 'bot'; known: system, user, assistant",
        ),
        (json.dumps({"messages": [message(["user"], "a")]}), "message 1 has the role"),
        ('{"messages": [{"role": "user"}]}', "the content of message 1 is null, not a string"),
        (json.dumps({"messages": chat("a", "")}), "the content of message 2 is empty"),
        (json.dumps({"messages": chat("a")}), "no message is the assistant's"),
        ('{"messages": []}', "no message is the assistant's"),
        (json.dumps({"messages": chat("a", "b", "c")}), "the last message is the user's; it must be the assistant's"),
    ],
)
def test_a_bad_line_is_named(chatty, tmp_path, line, said):
    file = write(tmp_path / "bad.jsonl", pairs(2))
    file.write_text(file.read_text() + "\n" + line + "\n", encoding="utf-8")  # a blank line counts as one
    with pytest.raises(ValueError, match=f"bad.jsonl, line 4: {said}"):
        load_instructions(file, chatty, LENGTH, 9)


def test_blank_lines_a_byte_order_mark_and_an_empty_system_message_are_fine(chatty, tmp_path):
    file = tmp_path / "windows.jsonl"
    lines = ["", *(json.dumps(pair) for pair in pairs(3)), "  "]
    lines += [json.dumps({"messages": [message("system", ""), *chat("a\u2028b", "c")]}, ensure_ascii=False)]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    data = load_instructions(file, chatty, LENGTH, 9)
    assert len(data.train) + len(data.validation) == 4


@pytest.mark.parametrize(
    "content, said",
    [(b'{"prompt": "\xeb"}', "is not UTF-8 text: byte 12"), (b"\n \n", "is empty"), (b"", "is empty")],
)
def test_a_file_without_examples(chatty, tmp_path, content, said):
    file = tmp_path / "file.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"file.jsonl {said}"):
        load_dataset(str(file), chatty)


def test_long_examples_are_named_and_left_out(chatty, tmp_path):
    entries = pairs(12)
    entries[4]["completion"], entries[7]["completion"] = "x" * 300, "x" * 400
    file = write(tmp_path / "long.jsonl", entries)
    sizes = [len(example_row(chat(each["prompt"]), each["completion"], chatty)[0]) for each in entries]
    assert sizes[4] > LENGTH
    data = load_instructions(file, chatty, LENGTH, 9)
    assert len(data.train) + len(data.validation) == 10
    assert data.notes.splitlines()[1] == (
        f"long.jsonl: left out 2 of 12 examples, which are longer than {LENGTH} tokens, first line 5 with {sizes[4]} "
        f"(--sequence-length {sizes[7]} would keep all)"
    )
    exact = load_instructions(file, chatty, sizes[4], 9)
    assert len(exact.train) + len(exact.validation) == 11, "an example that just fits is kept"
    assert "left out 1 of 12" in exact.notes, exact.notes
    with pytest.raises(ValueError, match="left out 12 of 12 examples"):
        load_instructions(file, chatty, 10, 9)


# -- the split -------------------------------------------------------------------------------------------------------


def held_out(data):
    return [each.completion for each in data.validation_examples]


def test_a_tenth_is_held_out_by_a_seeded_shuffle(chatty, tmp_path):
    file = write(tmp_path / "mine.jsonl", pairs(40))
    data = load_instructions(file, chatty, LENGTH, 9)
    assert (len(data.train), len(data.validation)) == (36, 4)
    assert data.notes == "mine.jsonl: 36 examples to train on, 4 held out (shuffled with seed 0)"
    both = [each.completion for each in data.train_examples] + held_out(data)
    assert sorted(both) == sorted(pair["completion"] for pair in pairs(40)), "each example is on exactly one side"
    assert held_out(data) == held_out(load_instructions(file, chatty, LENGTH, 9))
    other = load_instructions(file, chatty, LENGTH, 9, seed=1)
    assert set(held_out(other)) != set(held_out(data)), "another seed, another split"
    assert len(load_instructions(file, chatty, LENGTH, 2).validation) == 2, "count is the most that are held out"
    few = load_instructions(write(tmp_path / "few.jsonl", pairs(2)), chatty, LENGTH, 9)
    assert (len(few.train), len(few.validation)) == (1, 1)


@pytest.mark.parametrize("seed", range(8))
def test_equal_prompts_stay_on_one_side(chatty, tmp_path, seed):
    entries = [{"messages": chat(f"Question {n % 7}?", f"Answer {n}.", f"And {n}?", "No.")} for n in range(21)]
    data = load_instructions(write(tmp_path / "mine.jsonl", entries), chatty, LENGTH, 9, seed)
    sides = [{each.prompt[0]["content"] for each in side} for side in (data.train_examples, data.validation_examples)]
    assert sides[0] and sides[1] and not sides[0] & sides[1], f"on both sides: {sides[0] & sides[1]}"


def test_a_prompt_asked_often_does_not_fill_the_held_out_side(chatty, tmp_path):
    file = write(tmp_path / "mine.jsonl", pairs(1) * 10 + pairs(11)[1:])
    for seed in range(30):
        size = len(load_instructions(file, chatty, LENGTH, 9, seed).validation)
        assert size == 2, f"a tenth of 20, not {size}, with seed {seed}"


def test_one_prompt_cannot_be_split(chatty, tmp_path):
    file = write(tmp_path / "same.jsonl", pairs(1) * 5)
    with pytest.raises(ValueError, match="same.jsonl has one prompt only"):
        load_instructions(file, chatty, LENGTH, 9)


def test_a_file_of_its_own_holds_out(chatty, tmp_path):
    file = write(tmp_path / "mine.jsonl", pairs(4))
    write(tmp_path / "mine.validation.jsonl", pairs(9)[4:])
    data = load_instructions(file, chatty, LENGTH, 3)
    assert data.notes == "mine.jsonl: 4 examples to train on, 3 held out in mine.validation.jsonl"
    assert held_out(data) == ["Answer 4.", "Answer 5.", "Answer 6."]
    write(tmp_path / "mine.validation.jsonl", pairs(9)[3:])
    with pytest.raises(ValueError, match="mine.validation.jsonl, line 1: its prompt is also in line 4 of mine.jsonl"):
        load_instructions(file, chatty, LENGTH, 3)


# -- as a data set ---------------------------------------------------------------------------------------------------


def test_a_file_of_the_reader_is_a_data_set_without_a_scorer(chatty, tmp_path):
    file = write(tmp_path / "pirate.jsonl", pairs(30))
    dataset = load_dataset(str(file), chatty, LENGTH)
    assert (dataset.name, dataset.task, dataset.floor) == ("pirate.jsonl", None, None)
    assert dataset.notes.startswith("pirate.jsonl: 27 examples") and len(dataset.prompts) == 3
    row = dataset.validation.input_ids[0].tolist()
    prompt = encode_prompt(chatty, dataset.prompts[0])
    assert row[: len(prompt)] == prompt, "samples are drawn from held-out prompts"
    with pytest.raises(ValueError, match="count is 0"):
        load_dataset(str(file), chatty, LENGTH, count=0)


def test_chats_are_answered_up_to_any_end_token(chatty, monkeypatch):
    torch.manual_seed(0)
    model = GPT(GPTConfig(chatty.vocab_size, 16, 32, 1, 2, max_position_embeddings=128)).double()
    asked = []

    def spy(*given, **how):
        asked.append((given[1], how["eos_id"]))
        return generate(*given, **how)

    monkeypatch.setattr(evaluate, "generate", spy)
    answer(model, chatty, [chat("Hi"), "plain"], 4)
    assert sorted(asked[0][0]) == sorted([encode_prompt(chatty, chat("Hi")), encode_prompt(chatty, "plain")])
    assert asked[0][1] == {257, 258}, "both end tokens"
    (long,) = generate(model, [[1, 2, 3]], 6)
    (short,) = generate(model, [[1, 2, 3]], 6, eos_id={long[2], 256})
    assert short == long[: long.index(long[2])], "an answer stops at any of several tokens"
