"""The tokenizer of newer checkpoints: a `tokenizer.json`, which the `tokenizers` library reads, if it is installed."""

import json
import re
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from minilora.text.tokenizer_settings import TOKENIZER_CONFIG, added_tokens, chat_template, named_tokens

SPACE = "\u2581"  # "▁", which stands for a space inside sentencepiece's tokens


class JsonTokenizer:
    """As `Tokenizer`, from the bytes of a tokenizer.json, `definition`. `settings`, its `tokenizer_config.json`, names
    the begin and end tokens; more_ends are ids that end an answer too.

    Raises ValueError without the `tokenizers` library, for a damaged file, and where no end is named.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: Path, definition: bytes, settings: dict, more_ends: Collection[int] = ()):
        self.path, self.definition, self.settings = path, definition, settings
        self._added = added_tokens(settings, path)
        self.named_tokens = named_tokens(settings)
        self._first = self._read(definition)
        added = self._first.get_added_tokens_decoder()
        self.control = {token.content: id for id, token in added.items() if token.special}
        self.vocab_size: int = max(self._first.get_vocab().values()) + 1  # ids may have gaps
        begin, end = (self._first.token_to_id(self.named_tokens.get(key, "")) for key in ("bos_token", "eos_token"))
        end = min(more_ends, default=None) if end is None else end
        if end is None:
            raise ValueError(f"{path.with_name(TOKENIZER_CONFIG)} names no eos_token that {path.name} has")
        self.bos_id: int | None = begin
        self.eos_id: int = end
        # What stands in front of a text is the file's own post-processor's to say: a begin token, or nothing.
        encoding = self._first.encode("a")
        marked = takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        self.prefix: list[int] = [id for id, _ in marked]
        self.chat_template = chat_template(settings)
        self.end_ids = frozenset({end, *more_ends})
        self._literal: list[int] = []
        literal = [self._first.token_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        if None not in literal and self.decode(self.encode(f"a{SPACE}a")) != f"a{SPACE}a":
            self._literal = literal

    def _read(self, definition: bytes):
        try:
            from tokenizers import AddedToken
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise ValueError(f"reading {self.path} needs the tokenizers library: pip install tokenizers") from None
        try:
            reader = Reader.from_buffer(definition)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{self.path} is not a tokenizer: {error}") from None
        # The file may hold how a training run cut and filled its rows, which would act on every text.
        reader.no_truncation()
        reader.no_padding()
        for id, (name, special) in sorted(self._added.items()):
            if reader.token_to_id(name) is None:
                reader.add_tokens([AddedToken(name, special=special, normalized=False)])
                if reader.token_to_id(name) != id:
                    raise ValueError(f"{self.path} has no room for the added token {name!r} at {id}")
        known = {token.content for token in reader.get_added_tokens_decoder().values() if token.special}
        for name in self.named_tokens.values():
            if name not in known and reader.token_to_id(name) is not None:
                reader.add_special_tokens([AddedToken(name, normalized=False)])
        return reader

    @cached_property
    def _next(self):
        """Reads what goes on from another text: the same without the blank that some put in front."""
        parts = json.loads(self.definition)
        steps = {key: parts.get(key) for key in ("normalizer", "pre_tokenizer")}
        changed = {key: _without_blank(step) for key, step in steps.items()}
        return self._first if changed == steps else self._read(json.dumps(parts | changed).encode())

    @cached_property
    def blank_after_control(self) -> bool:
        name = next(iter(self.control), "")
        return self._ids(self._first, f"{name}a", control=True)[bool(name) :] != self._ids(self._next, "a")

    def _ids(self, reader, text: str, control: bool = False) -> list[int]:
        reader.encode_special_tokens = not control  # True: in letters, like any other text
        return reader.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, control: bool = False, continues: bool = False) -> list[int]:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("a text holds half a character (a lone surrogate): it is not valid Unicode")
        first = self._next if continues else self._first
        readers = (lambda part: self._ids(first, part, control)), (lambda part: self._ids(self._next, part, control))
        return encode_in_parts(text, *readers, self._literal)

    def decode(self, ids: Sequence[int]) -> str:
        return self._first.decode(list(ids))

    def is_byte(self, id: int) -> bool:
        return re.fullmatch("<0x[0-9A-F]{2}>", self._first.id_to_token(id) or "") is not None


Encode = Callable[[str], list[int]]


def encode_in_parts(text: str, first: Encode, rest: Encode, literal: list[int]) -> list[int]:
    """The ids of a text in which each "▁", which would decode to a space, stands for itself: `literal` is its bytes."""
    head, *parts = text.split(SPACE) if literal else [text]
    ids = first(head)
    for part in parts:
        ids += literal + rest(part)
    return ids


def _without_blank(step):
    """A normalizer or pre-tokenizer of a tokenizer.json, without the blank that it puts in front of a text."""
    if isinstance(step, list):
        return [_without_blank(each) for each in step]
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    off = {"add_prefix_space": False, "prepend_scheme": "never"}
    return {key: off.get(key, _without_blank(value)) for key, value in step.items()}
