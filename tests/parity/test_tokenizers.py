"""Token ids are those that transformers gives, for tokenizers of both kinds and what the files beside them say."""

import json

import pytest

REASON = "held against transformers, which `pip install -e '.[parity]'` installs"
pytest.importorskip("tokenizers", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)
from tokenizer_folders import added, json_tokenizer, sentencepiece_model, write_folder  # noqa: E402

from minilora.text.chat import chat_ids, encode_prompt  # noqa: E402
from minilora.text.tokenizer import open_tokenizer  # noqa: E402

# No blank at the beginning, nor behind a control token: transformers' Metaspace drops one that sentencepiece keeps.
TEXTS = ["Answer: Paris", "so it is", "", "a  b\n\n c ", "naïve 🙂", "x<y", "so covid<|im_end|>or</s>so"]
CHAT = [dict(role="user", content="Hello"), dict(role="assistant", content="so it is"), dict(role="user", content="x")]
TEMPLATE = """{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]
{{ message['content'] }}{{ eos_token }}{% endfor %}"""


def assert_same(folder, kind=None):
    theirs = (kind or transformers.AutoTokenizer).from_pretrained(folder)
    ours = open_tokenizer(folder)
    for text in TEXTS:
        plain = theirs(text, split_special_tokens=True, add_special_tokens=False, truncation=False)["input_ids"]
        if kind is None:  # in letters
            assert ours.encode(text) == plain, f"{text!r}: {ours.encode(text)} is not {plain}"
        ids = theirs(text, add_special_tokens=False, truncation=False)["input_ids"]
        assert ours.encode(text, control=True) == ids, f"{text!r}: {ours.encode(text, control=True)} is not {ids}"
        expected = theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids) == expected, f"{ids}: {ours.decode(ids)!r} is not {expected!r}"
    assert encode_prompt(ours, "so") == theirs("so", truncation=False)["input_ids"], "what stands in front of a text"
    assert ours.eos_id == theirs.eos_token_id
    expected = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert chat_ids(ours, CHAT, answer=False) == expected, f"{chat_ids(ours, CHAT, answer=False)} is not {expected}"
    half = ours.encode("Answer:") + ours.encode(" Paris", continues=True)
    assert half == theirs("Answer: Paris", add_special_tokens=False)["input_ids"], "a text in two parts"


@pytest.mark.parametrize("step", ["first", "always", "prepend", "never"])
@pytest.mark.parametrize("begin", [True, False])
def test_a_json_file(tmp_path, step, begin):
    # Where there is a tokenizer.json, add_bos_token says nothing.
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", chat_template=TEMPLATE, add_bos_token=not begin)
    definition = json_tokenizer(step, begin)
    size = len(definition["model"]["vocab"])
    definition["truncation"] = dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)
    more = added("<|im_end|>", size), added("covid", size + 1, special=False)
    definition["added_tokens"] += more[:1]
    settings |= {"added_tokens_decoder": {str(each["id"]): without_id(each) for each in more}}
    write_folder(tmp_path, definition, settings)
    assert_same(tmp_path)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize("files", ["old", "new"])
def test_a_model_file(tmp_path, legacy, begin, files):
    pytest.importorskip("google.protobuf", reason="transformers reads a tokenizer.model with it")
    settings = dict(tokenizer_class="LlamaTokenizer", chat_template=TEMPLATE, legacy=legacy, add_bos_token=begin)
    settings |= dict(bos_token="<s>", eos_token="</s>")
    more, beside = (added("<|im_end|>", 340), added("covid", 341, special=False)), {}
    if files == "new":
        settings["added_tokens_decoder"] = {str(each["id"]): without_id(each) for each in more}
        settings["eos_token"] = "<|im_end|>"
    else:
        beside["added_tokens"] = {each["content"]: each["id"] for each in more}
        beside["special_tokens_map"] = {"eos_token": "<|im_end|>"}
    write_folder(tmp_path, sentencepiece_model(), settings, **beside)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert_same(tmp_path, transformers.LlamaTokenizer)


def without_id(token: dict) -> dict:
    return {key: value for key, value in token.items() if key != "id"}
