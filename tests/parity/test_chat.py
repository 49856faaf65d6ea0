"""A chat has the ids that transformers gives it: by the folder's own template, and by a GGUF file's."""

import json
import os
from pathlib import Path

import pytest

from minilora.text.chat import chat_ids
from minilora.text.tokenizer import open_tokenizer

REASON = "held against transformers, which `pip install -e '.[parity]'` installs"
tokenizers = pytest.importorskip("tokenizers", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

CHATML = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] | trim }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{%- elif message['role'] == 'assistant' %} {{ message['content'] + ' ' + eos_token }}
{%- else %}<<SYS>>{{ message['content'] }}<</SYS>>{% endif %}
{% if loop.index > 9 %}{% break %}{% endif %}{% endfor %}"""
CHATS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "  What is 12 + 345?\n\n"), ("assistant", "357"), ("user", "Naïve café 🙂")],
    [("user", "def f(x):\n    return x  # <html>&amp;"), ("assistant", ""), ("user", "")],
]


def write_tokenizer(folder: Path, template: str, begin: bool):
    """Byte-level BPE without merges; with `begin`, the file's own post-processor puts <s> in front of a plain text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    maker = tokenizers.Tokenizer(tokenizers.models.BPE({letter: 4 + n for n, letter in enumerate(letters)}, []))
    maker.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    maker.decoder = tokenizers.decoders.ByteLevel()
    definition = json.loads(maker.to_str())
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    definition["added_tokens"] = [dict(id=id, content=name, **plain) for id, name in enumerate(names)]
    definition["model"]["vocab"] |= {name: id for id, name in enumerate(names)}
    if begin:
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
        definition["post_processor"] = dict(type="TemplateProcessing", single=single, pair=[], special_tokens=special)
    (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
    settings = dict(bos_token="<s>", eos_token="</s>", chat_template=template)
    settings |= dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def assert_same_ids(ours, theirs):
    for chat in CHATS:
        messages = [dict(role=role, content=content) for role, content in chat]
        for answer in (True, False):
            how = dict(tokenize=True, add_generation_prompt=answer, return_dict=False)
            expected = theirs.apply_chat_template(messages, **how)
            assert chat_ids(ours, messages, answer) == expected, f"{messages}, up to the answer: {answer}"


@pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["chatml", "llama"])
@pytest.mark.parametrize("begin", [False, True])
def test_chat_ids_are_those_of_transformers(tmp_path, template, begin):
    write_tokenizer(tmp_path, template, begin)
    assert_same_ids(open_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_chat_ids_of_a_gguf_file_are_those_of_transformers():
    """MINILORA_GGUF: a real file, such as SmolLM2-135M-Instruct.Q4_1.gguf."""
    file = Path(os.environ.get("MINILORA_GGUF", "nowhere"))
    if not file.is_file():
        pytest.skip("MINILORA_GGUF names no file")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert_same_ids(open_tokenizer(file), theirs)
