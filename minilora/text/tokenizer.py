"""The tokenizer: sentencepiece BPE with byte fallback, in the file format that Llama models ship (`tokenizer.model`).

BPE starts from characters and keeps merging the most frequent pair of neighbours into one token, so that common words
become one token each. A character without a token falls back to bytes, so every text encodes, and decodes to itself.

Newer checkpoints come with a `tokenizer.json` only, which the `tokenizers` library reads where it is installed.

Control tokens (`<|im_start|>`, `</s>`) steer the model, and no text may forge them: `encode` takes such a name for
letters like any others. `encode(text, control=True)`, meant for a rendered chat template, takes it for the token.
"""

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from minilora.storage.files import json_text, read_json, replacing
from minilora.storage.folders import settle
from minilora.storage.gguf import is_gguf, open_gguf

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
SPACE = "\u2581"  # "▁", which stands for a space inside sentencepiece's tokens


class Tokenizer:
    """Text to token ids and back. Raises ValueError, naming the file, for a file that is not a tokenizer."""

    file_name = "tokenizer.model"

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}: expected a sentencepiece tokenizer.model, or a tokenizer.json")
        self._sentencepiece = sentencepiece.SentencePieceProcessor()
        try:
            self.definition = path.read_bytes()
            self._sentencepiece.LoadFromSerializedProto(self.definition)
        except (RuntimeError, UnicodeDecodeError):  # the second, of a message with a damaged piece in it
            raise ValueError(f"{path} is not a sentencepiece tokenizer") from None
        self.vocab_size: int = self._sentencepiece.vocab_size()
        self.bos_id: int = self._sentencepiece.bos_id()
        self.eos_id: int = self._sentencepiece.eos_id()
        self.prefix = [self.bos_id]  # in front of every text
        self.settings = settings = _settings_beside(path)
        self.chat_template = _chat_template(settings)
        self.control = {self._sentencepiece.id_to_piece(id): id for id in (self.bos_id, self.eos_id) if id >= 0}
        self.named_tokens = _named_tokens(settings) or dict(zip(("bos_token", "eos_token"), self.control, strict=False))
        self.end_ids = frozenset({self.eos_id, *_end_ids_beside(path)})
        self._space_bytes = [self._sentencepiece.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode(self, text: str, control: bool = False) -> list[int]:
        """The ids of `text`; names of control tokens in it are letters unless `control` says otherwise.

        A literal "▁" would decode to a space, so it goes in bytes.
        """
        if control:
            parts = re.split(f"({'|'.join(map(re.escape, self.control)) or '(?!)'})", text)
            return [
                id for part in parts for id in ([self.control[part]] if part in self.control else self.encode(part))
            ]
        first, *rest = text.split(SPACE)
        ids = self._sentencepiece.encode(first)
        for part in rest:
            ids += self._space_bytes + self._sentencepiece.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._sentencepiece.decode(list(ids))

    def is_byte(self, id: int) -> bool:
        return self._sentencepiece.is_byte(id)


class JsonTokenizer:
    """The same for a `tokenizer.json`, whose bytes are `definition`. `settings`, its `tokenizer_config.json`,
    names the begin and end tokens; where no begin token is named, the end token serves as one, as in GPT-2.

    Raises ValueError without the `tokenizers` library, for a damaged file, and where no end token is named.
    """

    file_name = "tokenizer.json"

    def __init__(self, path: Path, definition: bytes, settings: dict, more_ends: Iterable[int] = ()):
        self.path, self.definition, self.settings = path, definition, settings
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise ValueError(f"reading {path} needs the tokenizers library: pip install tokenizers") from None
        try:
            self._reader = Reader.from_buffer(definition)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer: {error}") from None
        self.vocab_size: int = self._reader.get_vocab_size()
        self.named_tokens = _named_tokens(settings)
        begin, end = (self._reader.token_to_id(self.named_tokens.get(key, "")) for key in ("bos_token", "eos_token"))
        if end is None:
            raise ValueError(f"{path.with_name(TOKENIZER_CONFIG)} names no eos_token that {path.name} has")
        self.bos_id: int = end if begin is None else begin
        self.eos_id: int = end
        # What stands in front of a text is the file's own post-processor's to say: a begin token, or nothing.
        self.prefix: list[int] = self._reader.encode("").ids
        added = self._reader.get_added_tokens_decoder()
        self.control = {token.content: id for id, token in added.items() if token.special}
        self.chat_template = _chat_template(settings)
        self.end_ids = frozenset({end, *more_ends})

    def encode(self, text: str, control: bool = False) -> list[int]:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("a text holds half a character (a lone surrogate): it is not valid Unicode")
        self._reader.encode_special_tokens = not control  # True: in letters, like any other text
        return self._reader.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._reader.decode(list(ids))

    def is_byte(self, id: int) -> bool:
        return re.fullmatch("<0x[0-9A-F]{2}>", self._reader.id_to_token(id) or "") is not None


# Alike in path, settings, vocab_size, bos_id, eos_id, encode and decode, and in:
#   is_byte         whether an id stands for one byte of a character that has no token of its own
#   prefix          the ids in front of every text
#   end_ids         the ids that end an answer, eos_id among them
#   control         control tokens by name
#   named_tokens    "bos_token", "eos_token" and so on by name, which a chat template may ask for
#   chat_template   its source, or None
AnyTokenizer = Tokenizer | JsonTokenizer


def open_tokenizer(base: str | Path) -> AnyTokenizer:
    """The tokenizer of a model's folder, `tokenizer.model` or else `tokenizer.json`; or the one inside a GGUF file."""
    if is_gguf(base):
        return JsonTokenizer(Path(base), *open_gguf(base).tokenizer())
    settle(Path(base))
    model, other = Path(base) / "tokenizer.model", Path(base) / "tokenizer.json"
    if model.is_file() or not other.is_file():
        return Tokenizer(model)
    return JsonTokenizer(other, other.read_bytes(), _settings_beside(other), _end_ids_beside(other))


def tokenizer_files(tokenizer: AnyTokenizer) -> dict[str, bytes]:
    """By name, the files that a tokenizer is in a model's folder: a model without its tokenizer is of no use.

    Beside the tokenizer `generation_config.json` names the tokens that end an answer, as `transformers` reads it.
    """
    ends: list[int] = sorted(tokenizer.end_ids)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends}
    beside = {GENERATION_CONFIG: generation, TOKENIZER_CONFIG: tokenizer.settings}
    files = {name: json_text(name, settings).encode() for name, settings in beside.items() if settings}
    return {tokenizer.file_name: tokenizer.definition, **files}


def _settings_beside(path: Path) -> dict:
    """The `tokenizer_config.json` beside a tokenizer, {} where there is none. Newer folders keep the chat template in a
    file of its own."""
    file, template = path.with_name(TOKENIZER_CONFIG), path.with_name("chat_template.jinja")
    settings = read_json(file) if file.is_file() else {}
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings


def _named_tokens(settings: dict) -> dict[str, str]:
    """The entries such as "eos_token", each a name or an object that holds the name as its content."""
    named = {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in settings.items()
        if key.endswith("_token")
    }
    return {key: value for key, value in named.items() if isinstance(value, str)}


def _chat_template(settings: dict) -> str | None:
    """The template's source; of several, each with a name, the one called default."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _end_ids_beside(path: Path) -> set[int]:
    """A model may end its answers with more tokens than one: those of `generation_config.json` and `config.json`."""
    ends: set[int] = set()
    for file in (path.with_name(GENERATION_CONFIG), path.with_name("config.json")):
        named = read_json(file).get("eos_token_id") if file.is_file() else None
        ends |= {id for id in (named if isinstance(named, list) else [named]) if type(id) is int}
    return ends


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int = 2048) -> Tokenizer:
    """Learns a BPE vocabulary from `texts` and writes it to `path`. As in Llama: single digits, unk 0, bos 1, eos 2."""
    settings: dict[str, Any] = dict(model_type="bpe", vocab_size=vocab_size, byte_fallback=True, split_digits=True)
    # What goes in comes out: no text is normalised, no space invented or removed, no character left out.
    settings |= dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)
    settings |= dict(allow_whitespace_only_pieces=True, character_coverage=1.0, required_chars="")
    settings |= dict(max_sentence_length=1 << 20, num_threads=1, minloglevel=1)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings)
    with replacing(path) as temporary:
        temporary.write_bytes(model.getvalue())
    return Tokenizer(path)
