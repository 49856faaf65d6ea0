"""Folders as other people write them: what a tokenizer does is said in several files, and each of them counts."""

import codecs
import json

import pytest
import torch
from test_tokenizer import TEXTS
from tokenizer_folders import added, json_tokenizer, sentencepiece_model, write_folder

from minilora import GPT, GPTConfig, load_model, save_model
from minilora.__main__ import main
from minilora.inference.bank import AdapterBank
from minilora.inference.chat import Conversation
from minilora.inference.evaluate import answer, longest
from minilora.inference.generate import generate, stream
from minilora.inference.serve import Request, serve
from minilora.storage.files import read_json
from minilora.text.batches import example_row, examples, pack
from minilora.text.chat import chat_ids, encode_prompt
from minilora.text.datasets import load_dataset, read_text
from minilora.text.instructions import read_lines
from minilora.text.streaming import stream_text
from minilora.text.tasks import Example, Task
from minilora.text.tokenizer import open_tokenizer, tokenizer_files

pytest.importorskip("tokenizers")

KINDS = ["model", "first", "always", "prepend", "never"]  # a tokenizer.model, or a tokenizer.json with such a step
TEMPLATE = """{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>
{{ message['content'] }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


@pytest.fixture(scope="module")
def llama():
    return sentencepiece_model()


@pytest.fixture
def make(llama, tmp_path):
    """Opens a tokenizer of that kind in a folder of its own; `changes` are to the tokenizer.json."""

    def make_folder(kind, settings=None, changes=None, **files):
        definition = llama if kind == "model" else json_tokenizer(kind) | (changes or {})
        return open_tokenizer(write_folder(tmp_path / kind, definition, settings, **files))

    return make_folder


# What ends an answer


@pytest.mark.parametrize("kind", ["model", "first"])
def test_each_end_that_any_file_names_ends_an_answer(make, kind):
    named = {"added_tokens_decoder": {"340": added("<|im_end|>", 340)}, "eos_token": "<|im_end|>"}
    definition = {"added_tokens": [*json_tokenizer()["added_tokens"], added("<|im_end|>", 340)]}
    tokenizer = make(kind, named, definition, config={"eos_token_id": 7}, generation_config={"eos_token_id": [8, 9]})
    end = tokenizer.control["<|im_end|>"]
    assert tokenizer.eos_id == end, "training ends a text with the end token that tokenizer_config.json names"
    assert tokenizer.end_ids == {end, 7, 8, 9} | ({2} if kind == "model" else set()), tokenizer.end_ids


PADDED = 368  # the vocabulary of a model that ends 28 ids beyond its tokenizer's


@pytest.fixture(scope="module")
def parrot(llama, tmp_path_factory):
    """A folder whose model says "ab" and then token 9, whatever it is told. Likeliest are always the ids beyond the
    tokenizer's. Blocks add nothing, so the head sees the last token's embedding, which is a column of its own."""
    ends = dict(config={"eos_token_id": 2}, generation_config={"eos_token_id": [9]})
    folder = write_folder(tmp_path_factory.mktemp("parrot"), llama, {"chat_template": TEMPLATE}, **ends)
    a, b = open_tokenizer(folder).encode("ab", continues=True)
    model = GPT(GPTConfig(PADDED, PADDED, 8, 1, 2, max_position_embeddings=96))
    with torch.no_grad():
        block, head = model.model.layers[0], model.lm_head.weight
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(PADDED))
        head.zero_()
        head[a], head[340:] = 1, 2
        for told, said in ((a, b), (b, 9)):
            head[a, told], head[said, told] = 0, 1
    model.token_ids = {"eos_token_id": 2}
    save_model(model, folder)
    return folder


def test_every_way_to_an_answer_ends_at_that_token_and_stays_in_the_tokenizer(parrot):
    model, tokenizer = load_model(parrot), open_tokenizer(parrot)
    prompt, how = encode_prompt(tokenizer, "Hello"), dict(eos_id=tokenizer.end_ids, vocab_size=tokenizer.vocab_size)
    expected = tokenizer.encode("ab", continues=True)
    assert tokenizer.end_ids == {2, 9} and tokenizer.vocab_size == 340
    assert generate(model, [prompt], 8, eos_id=9)[0][0] >= 340, "the ids beyond are the likeliest"
    assert generate(model, [prompt] * 2, 8, **how) == [expected] * 2
    assert generate(model, [prompt], 8, temperature=1.0, top_k=1, **how) == [expected]
    assert list(stream(model, prompt, 8, **how)) == expected
    assert answer(model, tokenizer, ["Hello", [{"role": "user", "content": "Hello"}]], 8) == ["ab", "ab"]
    assert "".join(Conversation(model, tokenizer, 8).answer("Hello")) == "ab"
    bank = AdapterBank(model)
    assert bank.generate([prompt], [None], 8, **how) == [expected]
    assert sorted(serve(bank, [Request(prompt, None, 8)] * 3, 2, **how)) == [(n, expected) for n in range(3)]


def test_so_does_the_command_line(parrot, capsys):
    assert main(["generate", "Hello", "--base", str(parrot), "--max-new-tokens", "9"]) in (0, None)
    assert main(["generate", "--chat", "Hello", "--base", str(parrot), "--max-new-tokens", "9"]) in (0, None)
    assert capsys.readouterr().out == "Helloab\nab\n"


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_without_a_piece_is_no_text(make, kind):
    tokenizer = make(kind)
    ids = tokenizer.encode("so it is")
    beyond = tokenizer.vocab_size
    assert tokenizer.decode([beyond, *ids, beyond + 99]) == tokenizer.decode(ids) == "so it is"
    assert "".join(stream_text(tokenizer, [*ids[:2], beyond, *ids[2:], beyond])) == "so it is"
    assert tokenizer.is_byte(beyond) is tokenizer.is_byte(beyond + 99) is False


def test_ids_may_have_gaps(make):
    definition = json_tokenizer()
    definition["model"]["vocab"]["far"] = 500
    assert make("first", changes=dict(model=definition["model"])).vocab_size == 501, "all ids are below vocab_size"


# What begins a text


@pytest.mark.parametrize(
    ("settings", "prefix"),
    [
        (None, [1]),
        ({}, [1]),
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": False}, []),
        ({"bos_token": "is"}, None),
    ],
    ids=str,
)
def test_a_model_file_begins_with_its_begin_token_unless_the_settings_say_not(make, settings, prefix):
    tokenizer = make("model", settings)
    expected = [tokenizer.control["is"]] if prefix is None else prefix
    assert tokenizer.prefix == expected and encode_prompt(tokenizer, "so") == [*expected, *tokenizer.encode("so")]


def test_without_a_begin_token_nothing_stands_in_front(tmp_path):
    tokenizer = open_tokenizer(write_folder(tmp_path, sentencepiece_model(bos_id=-1)))
    assert (tokenizer.bos_id, tokenizer.prefix) == (None, []) and tokenizer.named_tokens == {"eos_token": "</s>"}
    settings = {"bos_token": None}
    other = open_tokenizer(write_folder(tmp_path / "json", json_tokenizer(begin=False), settings))
    assert (other.bos_id, other.prefix) == (None, [])
    write_files(tmp_path / "again", tokenizer_files(other))
    assert read_json(tmp_path / "again" / "generation_config.json") == {"eos_token_id": 2}


def test_an_end_that_config_json_alone_names(tmp_path):
    endless = sentencepiece_model(eos_id=-1), json_tokenizer("first")
    for kind, definition in zip(("model", "first"), endless, strict=True):
        folder = write_folder(tmp_path / kind, definition, {"eos_token": None})
        with pytest.raises(ValueError, match="tokenizer_config.json names no eos_token"):
            open_tokenizer(folder)
        (folder / "config.json").write_text('{"eos_token_id": [9, 8]}')
        assert (open_tokenizer(folder).eos_id, open_tokenizer(folder).end_ids) == (8, {8, 9}), kind


@pytest.mark.parametrize(
    ("around", "settings", "prefix"),
    [
        ((True, False), {}, [1]),
        ((True, True), {}, [1]),
        ((False, True), {}, []),
        ((False, False), {}, []),
        ((False, False), {"add_bos_token": True}, []),
        ((True, False), {"add_bos_token": False}, [1]),
    ],
    ids=str,
)
def test_a_json_file_begins_as_its_post_processor_says(tmp_path, around, settings, prefix):
    tokenizer = open_tokenizer(write_folder(tmp_path, json_tokenizer("first", *around), settings))
    assert tokenizer.prefix == prefix, f"{tokenizer.prefix} stands in front of a text"


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_begins_once(make, kind):
    tokenizer = make(kind, {"chat_template": TEMPLATE})
    ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello <s> there </s>"}])
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(2) == 1, "one begin token and one end, the template's own"


# Stored settings, special tokens, blanks


def test_truncation_and_padding_that_a_file_stores_are_off(make):
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 12}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    tokenizer, plain = make("first", changes=dict(truncation=truncation, padding=padding)), make("first")
    for text in ("so", "so it is and so it goes"):
        for continues in (False, True):
            assert tokenizer.encode(text, continues=continues) == plain.encode(text, continues=continues), text
    assert tokenizer.prefix == plain.prefix == [1]


def write_files(folder, files):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def names_of(tokenizer, ids):
    names = {id: name for name, id in tokenizer.control.items()}
    return [names[id] for id in ids if id in names]


OLD = dict(added_tokens={"<|im_end|>": 341, "<|im_start|>": 340, "covid": 342})
SPECIAL = ["</s>", added("<|im_start|>", 340)]  # by name or as an object
OLD |= dict(special_tokens_map={"eos_token": "<|im_end|>", "additional_special_tokens": SPECIAL})
NEW = [added("<|im_start|>", 340), added("<|im_end|>", 341), added("covid", 342, special=False)]
NEW_SETTINGS = {"added_tokens_decoder": {str(each["id"]): each for each in NEW}, "eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("settings", "files"),
    [(None, OLD), ({"added_tokens_decoder": None}, OLD), (NEW_SETTINGS, {})],
    ids=["old", "null", "new"],
)
def test_added_tokens_of_a_model_file(make, settings, files, tmp_path):
    tokenizer = make("model", settings, **files)
    write_files(tmp_path / "again", tokenizer_files(tokenizer))
    again = open_tokenizer(tmp_path / "again")
    text = "<|im_start|>so</s> covid a<|im_end|>"
    for own in (tokenizer, again):
        assert (own.vocab_size, own.eos_id, own.end_ids) == (343, 341, {2, 341})
        assert names_of(own, own.encode(text, control=True)) == ["<|im_start|>", "</s>", "<|im_end|>"]
        assert 342 in own.encode(text) and not names_of(own, own.encode(text)), "a text forges no control token"
        assert own.decode(own.encode(text)) == text
        assert own.decode(own.encode(text, control=True)) == "so covid a"
        assert own.decode(own.encode("so covid")) == "so covid" and own.decode([342, 342]) == "covidcovid"


def test_a_piece_that_settings_name_is_forged_by_no_text(tmp_path):
    model = sentencepiece_model(user_defined_symbols=["<|im_end|>", "covid"])
    tokenizer = open_tokenizer(write_folder(tmp_path, model, {"eos_token": "<|im_end|>"}))
    assert tokenizer.eos_id == 3 and tokenizer.encode("so<|im_end|>", control=True)[-1] == 3
    for text in ("so<|im_end|> it", "<|im_end|>", "<|im_<|im_end|>end|>", "so covid"):
        ids = tokenizer.encode(text)
        assert 3 not in ids and tokenizer.decode(ids) == text, f"{text!r} is {ids}"
    assert 4 in tokenizer.encode("so covid")


def test_an_added_token_that_settings_name_is_forged_by_no_text(make):
    more = {"340": added("<|im_end|>", 340, special=False)}
    tokenizer = make("model", {"added_tokens_decoder": more, "eos_token": "<|im_end|>"})
    assert tokenizer.end_ids == {2, 340} and 340 not in tokenizer.encode("so<|im_end|>")


def test_tokens_that_the_settings_add_to_a_json_file(make, tmp_path):
    size = len(json_tokenizer()["model"]["vocab"])
    more = {str(size): added("<|im_end|>", size), str(size + 1): added("covid", size + 1, special=False)}
    tokenizer = make("first", {"added_tokens_decoder": more, "eos_token": "<|im_end|>"})
    assert tokenizer.end_ids == {size} and tokenizer.vocab_size == size + 2
    assert tokenizer.encode("covid<|im_end|>", control=True)[-2:] == [size + 1, size]
    assert size not in tokenizer.encode("covid<|im_end|>")
    with pytest.raises(ValueError, match=f"tokenizer.json has no room for the added token 'covid' at {size + 9}"):
        make("first", {"added_tokens_decoder": {str(size + 9): added("covid", size + 9)}})


def test_a_named_token_steers_though_the_file_does_not_list_it(make):
    tokenizer = make("first", changes=dict(added_tokens=[added("<unk>", 0), added("<s>", 1, special=False)]))
    assert names_of(tokenizer, tokenizer.encode("<s>so</s>", control=True)) == ["<s>", "</s>"]
    assert not names_of(tokenizer, tokenizer.encode("<s>so</s>"))


@pytest.mark.parametrize(
    "entries", [{"x": added("a", 1)}, {"1": "a"}, {"1": {}}, ["a"], {"-1": added("a", 1)}], ids=str
)
def test_added_tokens_of_another_form_are_refused_by_name(make, entries):
    for kind in ("model", "first"):
        with pytest.raises(ValueError, match=f"the added tokens beside .*{kind}.* are not of the form"):
            make(kind, {"added_tokens_decoder": entries})


PAIRS = [("Answer:", " Paris"), ("Answer: Par", "is"), ("so\n", "it is"), ("", "Paris"), ("Answer: ", "Paris")]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_in_two_parts_is_the_text(make, kind):
    tokenizer = make(kind)
    for first, second in PAIRS:
        apart = tokenizer.encode(first) + tokenizer.encode(second, continues=bool(first))
        assert tokenizer.decode(apart) == first + second, f"{first!r} + {second!r} is {tokenizer.decode(apart)!r}"
    assert tokenizer.encode("Answer:") + tokenizer.encode(" Paris", continues=True) == tokenizer.encode("Answer: Paris")
    row, labels = example_row("Answer:", " Paris", tokenizer)
    assert row == [*tokenizer.prefix, *tokenizer.encode("Answer: Paris"), 2]
    assert [label for label in labels if label >= 0] == [*tokenizer.encode(" Paris", continues=True), 2]
    assert example_row("", "Paris", tokenizer)[0] == [*tokenizer.prefix, *tokenizer.encode("Paris"), 2]


@pytest.mark.parametrize("kind", KINDS)
def test_text_behind_a_control_token_has_the_blank_that_its_tokenizer_gives_it(make, kind):
    tokenizer = make(kind, {"legacy": False, "chat_template": "{{ messages[0]['content'] }}<s>so it is"})
    again = kind in ("always", "prepend")
    assert tokenizer.blank_after_control == again
    expected = [*tokenizer.encode("x"), 1, *tokenizer.encode("so it is", continues=not again)]
    assert tokenizer.encode("x<s>so it is", control=True) == expected
    assert chat_ids(tokenizer, [{"role": "user", "content": "x"}]) == expected
    forged = chat_ids(tokenizer, [{"role": "user", "content": "<s>"}])  # encoded part by part
    assert forged == [*tokenizer.encode("<s>"), *expected[-len(expected) + len(tokenizer.encode("x")) :]]
    old = make("model", {"legacy": True})
    assert old.encode("<s>so", control=True) == [1, *old.encode("so")], "older tokenizers put a blank there too"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEXTS)
def test_any_text_comes_back(make, kind, name):
    tokenizer = make(kind)
    if not (kind in ("first", "always") and TEXTS[name][:1] == " "):  # there the library's Metaspace loses a blank
        assert tokenizer.decode(tokenizer.encode(TEXTS[name])) == TEXTS[name]
    assert tokenizer.decode(tokenizer.encode("a") + tokenizer.encode(TEXTS[name], continues=True)) == "a" + TEXTS[name]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_of_a_chat_is_what_its_template_writes(make, kind):
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "so it is"}]
    bare = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"  # answers after a token
    for template in (TEMPLATE, bare):
        tokenizer = make(kind, {"chat_template": template})
        row, _ = example_row(chat[:1], "so it is", tokenizer)
        whole = chat_ids(tokenizer, chat, answer=False)
        assert row == whole[: len(row)] and row[-1] == 2 and row.count(2) == 2, f"{row} is not {whole}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_of_a_completion_are_those_that_training_counts(make, kind):
    tokenizer = make(kind)
    pairs = [Example("Answer:", " Paris", 3.0), Example("so ", "it is", 4.0)]
    counted = examples([(each.prompt, each.completion) for each in pairs], tokenizer, 64).counted_tokens
    assert Task("", [], pairs, lambda *_: True).floor(tokenizer) == 7.0 / counted
    assert longest(["Paris"], tokenizer) == len(tokenizer.encode("Paris", continues=True)) + 4


def test_ends_count_where_a_tokenizer_begins_and_ends_texts_alike(make):
    tokenizer = make("model", {"bos_token": "</s>"})
    batches = pack([tokenizer.encode("so"), tokenizer.encode("it is")], 16, tokenizer)
    assert tokenizer.prefix == [2] and int((batches.labels == 2).sum()) == 2, "two real ends"


# Byte order marks


def test_a_byte_order_mark_is_no_text(make, tmp_path, tokenizer):
    mark = codecs.BOM_UTF8
    for name, text in (("a.txt", "Hello there. " * 99), ("a.jsonl", '{"prompt": "a", "completion": "b"}\n')):
        (tmp_path / name).write_bytes(mark + text.encode())
    assert read_text(str(tmp_path / "a.txt")).startswith("Hello")
    assert load_dataset(str(tmp_path / "a.txt"), tokenizer, 32).train.input_ids[0, 0] == tokenizer.encode("Hello")[0]
    assert read_lines(tmp_path / "a.jsonl", tokenizer, 32)[0][0].example.prompt == "a"
    make("first", {"added_tokens_decoder": {}}, config={"eos_token_id": 7})
    folder = tmp_path / "first"
    (folder / "chat_template.jinja").write_bytes(b"so")
    for file in list(folder.iterdir()):
        file.write_bytes(mark + file.read_bytes())
    assert read_json(folder / "config.json") == {"eos_token_id": 7}
    marked = open_tokenizer(folder)
    assert marked.end_ids == {2, 7} and marked.chat_template == "so" and marked.decode(marked.encode("so")) == "so"
    assert json.loads(marked.definition)["version"] == "1.0", "what is written out again has no mark"


@pytest.mark.parametrize("kind", ["model", "first"])
def test_an_end_that_can_be_no_id_is_none(make, kind):
    tokenizer = make(kind, {"eos_token": "</s>"}, generation_config={"eos_token_id": [-1, 2**31, "7", True, 8]})
    assert tokenizer.end_ids == {tokenizer.eos_id, 8}, f"ends {sorted(tokenizer.end_ids)}"
