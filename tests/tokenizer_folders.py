"""Small tokenizers as other people's folders have them, of both kinds, with the files that lie beside them."""

import io
import json
from pathlib import Path

import sentencepiece

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:.,!<>|/_0123456789"
WORDS = ["Question: where is Paris? Answer: Paris. Hello there, old friend.", "abc def\n\n  ghi"]


def sentencepiece_model(**changes) -> bytes:
    """As Llama 2's: bytes for what has no piece, and a blank in front of every text."""
    model = io.BytesIO()
    how = dict(model_type="bpe", vocab_size=340, byte_fallback=True, normalization_rule_name="identity")
    how |= dict(add_dummy_prefix=True, remove_extra_whitespaces=False, minloglevel=2, num_threads=1)
    texts = iter([*WORDS * 20, " ".join(LETTERS)])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=texts, model_writer=model, **how | changes)
    return model.getvalue()


def added(name: str, id: int, special: bool = True) -> dict:
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(id=id, content=name, special=special, **plain)


def json_tokenizer(step: str = "first", begin: bool = True, end: bool = False) -> dict:
    """The same in a tokenizer.json. step: how it puts a blank in front of a text; begin, end: whether its
    post-processor puts <s> and </s> around a text."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *LETTERS]
    vocabulary += ["▁P", "is", "ar", "▁Par", "▁Paris", "Par"]
    merges = [["▁", "P"], ["i", "s"], ["a", "r"], ["▁P", "ar"], ["▁Par", "is"], ["P", "ar"]]
    model = {"type": "BPE", "vocab": {name: id for id, name in enumerate(vocabulary)}, "merges": merges}
    model |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "dropout": None}
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    if step == "prepend":
        steps = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blank]}, None
    else:
        steps = None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": step, "split": False}
    back = [blank | {"pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if step != "never":
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    around = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("<s>", "</s>")]
    single = [*around[: int(begin)], {"Sequence": {"id": "A", "type_id": 0}}, *around[1 : 1 + int(end)]]
    special = {name: {"id": name, "ids": [id], "tokens": [name]} for id, name in enumerate(["<s>", "</s>"], 1)}
    after = dict(type="TemplateProcessing", single=single, pair=single, special_tokens=special)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(name, id) for id, name in enumerate(vocabulary[:3])],
        "normalizer": steps[0],
        "pre_tokenizer": steps[1],
        "post_processor": after if begin or end else None,
        "decoder": {"type": "Sequence", "decoders": back},
        "model": model,
    }


def write_folder(folder: Path, definition: bytes | dict, settings: dict | None = None, **files: dict) -> Path:
    """A tokenizer with its tokenizer_config.json; files: more of them, by their names without .json."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(definition, bytes):
        (folder / "tokenizer.model").write_bytes(definition)
    else:
        (folder / "tokenizer.json").write_text(json.dumps(definition), encoding="utf-8")
        settings = {"bos_token": "<s>", "eos_token": "</s>"} | (settings or {})
    for name, content in {"tokenizer_config": settings, **files}.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
