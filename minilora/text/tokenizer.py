"""The tokenizer: sentencepiece BPE with byte fallback, in the file format that Llama models ship (`tokenizer.model`).

BPE starts from characters and keeps merging the most frequent pair of neighbours into one token, so that common words
become one token each. A character without a token falls back to bytes, so every text encodes, and decodes to itself.

Newer checkpoints come with a `tokenizer.json` only, which the `tokenizers` library reads where it is installed.

Control tokens (`<|im_start|>`, `</s>`) steer the model, and no text may forge them: `encode` takes such a name for
letters like any others. `encode(text, control=True)`, meant for a rendered chat template, takes it for the token.

Many tokenizers, Llama 2's among them, put a blank in front of a text, so that its first word is the token that it is
in the middle of another. A text that goes on from another, as a completion does, must get none: `continues=True`.
"""

import codecs
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from minilora.storage.files import json_text, replacing
from minilora.storage.folders import settle
from minilora.storage.gguf import is_gguf, open_gguf
from minilora.text.json_tokenizer import SPACE, JsonTokenizer, encode_in_parts
from minilora.text.tokenizer_settings import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    added_tokens,
    chat_template,
    end_ids_beside,
    named_tokens,
    settings_beside,
)

# Two serialized messages in a row are read as one, and of a field that is in both the later value counts. These bytes
# are a normalizer_spec (field 3 of a model) with add_dummy_prefix (3) and remove_extra_whitespaces (4) false.
BLANKS_AS_THEY_ARE = bytes([0x1A, 4, 0x18, 0, 0x20, 0])


class Tokenizer:
    """Text to token ids and back. Raises ValueError, naming the file, for a file that is not a tokenizer."""

    file_name = "tokenizer.model"

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}: expected a sentencepiece tokenizer.model, or a tokenizer.json")
        self.definition = path.read_bytes()
        pieces = self._first = self._read(self.definition)
        self._next = self._read(self.definition + BLANKS_AS_THEY_ARE)
        self.settings = settings = settings_beside(path)
        added = added_tokens(settings, path)
        self.vocab_size: int = max([pieces.vocab_size(), *(id + 1 for id in added)])
        ids = {pieces.id_to_piece(id): id for id in range(pieces.vocab_size())}
        ids |= {name: id for id, (name, _) in added.items()}
        own = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id()}
        self.named_tokens = {key: pieces.id_to_piece(id) for key, id in own.items() if id >= 0} | named_tokens(settings)
        steer = {pieces.id_to_piece(id) for id in range(pieces.vocab_size()) if pieces.is_control(id)}
        steer |= {name for name, special in added.values() if special} | set(self.named_tokens.values())
        self.control = {name: id for name, id in ids.items() if name in steer}
        self._words = {name: id for id, (name, _) in added.items() if name not in steer}
        # A name that the file makes a piece of its own ("user-defined") is spelled in two, so that no text forges it.
        spell = self._next.encode
        forged = [name for name, id in self.control.items() if id in spell(name)]
        self._spelled = {name: spell(name[:1]) + spell(name[1:]) for name in forged}
        ends = end_ids_beside(path)
        begin, end = (self.control.get(self.named_tokens.get(key, ""), id) for key, id in own.items())
        end = min(ends, default=-1) if end < 0 else end
        if end < 0:
            raise ValueError(f"{path} has no end token, and {TOKENIZER_CONFIG} names no eos_token that it has")
        self.bos_id: int | None = begin if begin >= 0 else None
        self.eos_id: int = end
        self.prefix = [begin] if begin >= 0 and settings.get("add_bos_token", True) else []
        self.blank_after_control = bool(settings.get("legacy"))
        self.chat_template = chat_template(settings)
        self.end_ids = frozenset({end, pieces.eos_id(), *ends} - {-1})
        literal = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._literal = literal if all(map(pieces.is_byte, literal)) else []

    def _read(self, definition: bytes) -> sentencepiece.SentencePieceProcessor:
        pieces = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(definition)
        except (RuntimeError, UnicodeDecodeError):  # the second, of a message with a damaged piece in it
            raise ValueError(f"{self.path} is not a sentencepiece tokenizer") from None
        return pieces

    def encode(self, text: str, control: bool = False, continues: bool = False) -> list[int]:
        """The ids of `text`; names of control tokens in it are letters unless `control` says otherwise.

        Where it `continues` another text, it gets no blank in front.
        """
        single = self._words | (self.control if control else {})
        tokens = ({} if control else self._spelled) | {name: [id] for name, id in single.items()}
        ids: list[int] = []
        for place, part in enumerate(re.split(f"({any_of(tokens)})", text)):  # text, token, text, ..., text
            if place % 2:
                ids += tokens[part]
            else:
                goes_on = continues if place == 0 else not self.blank_after_control
                first = self._next if goes_on else self._first
                ids += encode_in_parts(part, first.encode, self._next.encode, self._literal)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, in which control tokens, and ids that stand for nothing, leave no trace."""
        words = {id: name for name, id in self._words.items()}
        parts: list[tuple[str, list[int]]] = [("", [])]  # a word that was added, and the pieces behind it
        for id in ids:
            if id in words:
                parts.append((words[id], []))
            elif 0 <= id < self._first.vocab_size():
                parts[-1][1].append(id)
        readers = [self._first] + [self._next] * len(parts[1:])
        return "".join(word + reader.decode(run) for reader, (word, run) in zip(readers, parts, strict=True))

    def is_byte(self, id: int) -> bool:
        return 0 <= id < self._first.vocab_size() and self._first.is_byte(id)


# Alike in path, settings, vocab_size, encode and decode, and in:
#   bos_id, eos_id  the ids that begin and end a text; bos_id is None where there is none
#   is_byte         whether an id stands for one byte of a character that has no token of its own
#   prefix          the ids in front of every text
#   end_ids         the ids that end an answer, eos_id among them
#   control         control tokens by name
#   blank_after_control  whether a text behind a control token gets the blank that some put in front of a text
#   named_tokens    "bos_token", "eos_token" and so on by name, which a chat template may ask for
#   chat_template   its source, or None
AnyTokenizer = Tokenizer | JsonTokenizer


def open_tokenizer(base: str | Path) -> AnyTokenizer:
    """The tokenizer of a model's folder, `tokenizer.model` or else `tokenizer.json`; or the one inside a GGUF file.

    Raises ValueError, naming the file, for one that is damaged and where no end token is named.
    """
    if is_gguf(base):
        return JsonTokenizer(Path(base), *open_gguf(base).tokenizer())
    settle(Path(base))
    model, other = Path(base) / "tokenizer.model", Path(base) / "tokenizer.json"
    if model.is_file() or not other.is_file():
        return Tokenizer(model)
    definition = other.read_bytes().removeprefix(codecs.BOM_UTF8)
    return JsonTokenizer(other, definition, settings_beside(other), end_ids_beside(other))


def tokenizer_files(tokenizer: AnyTokenizer) -> dict[str, bytes]:
    """By name, the files that a tokenizer is in a model's folder: a model without its tokenizer is of no use.

    Beside the tokenizer `generation_config.json` names the tokens that end an answer, as `transformers` reads it.
    """
    ends: list[int] = sorted(tokenizer.end_ids)
    generation: dict[str, Any] = {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
    generation |= {"eos_token_id": ends[0] if len(ends) == 1 else ends}
    beside = {GENERATION_CONFIG: generation, TOKENIZER_CONFIG: tokenizer.settings}
    files = {name: json_text(name, settings).encode() for name, settings in beside.items() if settings}
    return {tokenizer.file_name: tokenizer.definition, **files}


def any_of(names: Iterable[str]) -> str:
    """An expression for any of these names, the longest first, because one may begin another."""
    return "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)"


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
