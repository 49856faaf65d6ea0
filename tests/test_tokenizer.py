"""The tokenizer loses nothing: whatever text goes in comes out, and prompt and completion can be encoded apart."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

from minilora.text import words
from minilora.text.tasks import TASKS, load_task
from minilora.text.tokenizer import Tokenizer, open_tokenizer, train_tokenizer
from minilora.text.world import World

SHIPPED = Path(__file__).parents[1] / "data" / "base" / "tokenizer.model"

TEXTS = {
    "nothing": "",
    "one space": " ",
    "spaces": "  two  three   and at the end    ",
    "lines": "unix\nwindows\r\nold mac\rblank\n\n\n",
    "tabs": "\tindented\t\tfour    spaces\n",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "NUL": "a\0b\0",
    "literal ▁": "▁",
    "▁ among words": "a▁b ▁c▁ d▁▁e ▁",
    "emoji": "🙂 👩‍👩‍👧‍👦 🇫🇷 ❤️",
    "accents, composed and not": "caf\u00e9 cafe\u0301 \ufb01 \u212b \u00bd",
    "other scripts": "Ωμέγα Привет 你好 こんにちは שלום مرحبا",
    "odd spaces": "\u00a0\u2003\u200b\u3000\ufeff\u2028\u2029",
    "noncharacters": "\ufffd\ufffe\uffff\U0010ffff",
    "special tokens": "<s>hello</s> <unk> <pad> <0x41><0x0A> ⁇ [INST] <|endoftext|>",
    "code": "def f(x):\n    return {'a': x ** 2}  # 12345\n",
}


@pytest.mark.parametrize("name", TEXTS)
def test_any_text_comes_back(tokenizer, name):
    assert tokenizer.decode(tokenizer.encode(TEXTS[name])) == TEXTS[name]


def test_random_unicode_comes_back(tokenizer):
    dice = random.Random(0)
    for _ in range(300):
        # any code point but the surrogates, which are no characters and have no place in UTF-8
        points = [dice.choice((dice.randrange(0xD800), dice.randrange(0xE000, 0x110000))) for _ in range(20)]
        text = "".join(map(chr, points))
        assert tokenizer.decode(tokenizer.encode(text)) == text, f"{text!r} came back changed"


def test_world_text_comes_back(tokenizer):
    for document in World("validation").documents(50, seed=1):
        assert tokenizer.decode(tokenizer.encode(document.text)) == document.text


def test_special_ids_are_those_of_llama_and_never_come_out_of_text(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.vocab_size == 800
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids), f"{name}: a special id in {ids}"
        assert all(0 <= id < tokenizer.vocab_size for id in ids)


def test_prompt_and_completion_can_be_encoded_apart(tokenizer):
    pairs = [(each.prompt, each.completion) for name in TASKS for each in load_task(name, 20, 20).validation]
    for document in World().documents(50, seed=2, kind="notes"):
        before, mark, answer = document.text.rpartition("Answer:")
        pairs.append((before + mark, answer))
    for prompt, completion in pairs:
        assert completion[0] == " " and prompt[-1] != " ", f"the space belongs to the completion: {prompt!r}"
        apart = tokenizer.encode(prompt) + tokenizer.encode(completion)
        assert apart == tokenizer.encode(prompt + completion), f"{prompt + completion!r} is split in another way"


def test_digits_stay_single(tokenizer):
    assert len(tokenizer.encode("a1234567890")) == 11


def test_training_is_repeatable(tmp_path):
    texts = [document.text for document in World().documents(50, seed=3)]
    files = [train_tokenizer(texts, tmp_path / name, vocab_size=400).path for name in ("first", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("content", [b"", b"not a tokenizer\n", None], ids=["empty", "text", "truncated"])
def test_a_broken_file_is_refused(tokenizer, tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError) as error:
        Tokenizer(path)
    assert str(error.value) == f"{path} is not a sentencepiece tokenizer"


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "tokenizer.model", tmp_path):
        with pytest.raises(ValueError) as error:
            Tokenizer(path)
        assert str(error.value).startswith(f"no tokenizer at {path}")


def test_each_word_of_the_world_is_one_token_of_the_shipped_tokenizer():
    # Copying a name from the notes is then copying one token. (The newcomers are meant to be new, and may be several.)
    shipped = Tokenizer(SHIPPED)
    lists = {name: values for name, values in vars(words).items() if isinstance(values, tuple)}
    del lists["NEWCOMER_NAMES"]
    (quote,) = shipped.encode('"')
    for name, values in lists.items():
        for word in values:
            after_space, after_quote = shipped.encode(f" {word}"), shipped.encode(f'"{word}')
            assert len(after_space) == 1, f"{name}: {word!r} after a space is {len(after_space)} tokens"
            assert after_quote[0] == quote and len(after_quote) == 2, f"{name}: {word!r} after a quote is {after_quote}"


# -- tokenizer.json --------------------------------------------------------------------------------------------------


def save_json_tokenizer(folder: Path, **named):
    """A byte-level BPE without merges, as newer checkpoints have it, and the special tokens its config names."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<begin>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def test_a_json_tokenizer_where_there_is_no_other(tmp_path):
    save_json_tokenizer(tmp_path, bos_token="<begin>", eos_token={"content": "<end>"})
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    for name, text in TEXTS.items():
        assert tokenizer.decode(tokenizer.encode(text)) == text, name
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("so"), tokenizer.eos_id]) == "so"
    shutil.copyfile(SHIPPED, tmp_path / "tokenizer.model")
    assert isinstance(open_tokenizer(tmp_path), Tokenizer), "tokenizer.model comes first"


def test_half_a_character_is_refused_by_name(tmp_path):
    save_json_tokenizer(tmp_path, eos_token="<end>")
    with pytest.raises(ValueError, match="half a character"):
        open_tokenizer(tmp_path).encode("so \ud83d")


def test_special_tokens_of_a_json_tokenizer(tmp_path):
    save_json_tokenizer(tmp_path, eos_token="<end>")
    assert (open_tokenizer(tmp_path).bos_id, open_tokenizer(tmp_path).eos_id) == (None, 257)
    save_json_tokenizer(tmp_path, bos_token="<begin>", eos_token="<absent>")
    with pytest.raises(ValueError, match="tokenizer_config.json names no eos_token"):
        open_tokenizer(tmp_path)


def test_a_json_tokenizer_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{")
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    with pytest.raises(ValueError, match="tokenizer.json needs the tokenizers library: pip install tokenizers"):
        open_tokenizer(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        open_tokenizer(tmp_path)
