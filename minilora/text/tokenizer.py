"""The tokenizer: sentencepiece BPE with byte fallback, in the file format that Llama models ship (`tokenizer.model`).

BPE starts from characters and keeps merging the most frequent pair of neighbours into one token, so that common words
become one token each. A character without a token falls back to bytes, so every text encodes, and decodes to itself.

Newer checkpoints come with a `tokenizer.json` only, which the `tokenizers` library reads where it is installed.
"""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from minilora.storage.files import read_json

SPACE = "\u2581"  # "▁", which stands for a space inside sentencepiece's tokens


class Tokenizer:
    """Text to token ids and back. Raises ValueError, naming the file, for a file that is not a tokenizer."""

    def __init__(self, path: str | Path):
        self.path = path = Path(path)
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}: expected a sentencepiece tokenizer.model, or a tokenizer.json")
        self._sentencepiece = sentencepiece.SentencePieceProcessor()
        try:
            self._sentencepiece.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise ValueError(f"{path} is not a sentencepiece tokenizer") from None
        self.vocab_size: int = self._sentencepiece.vocab_size()
        self.bos_id: int = self._sentencepiece.bos_id()
        self.eos_id: int = self._sentencepiece.eos_id()
        self._space_bytes = [self._sentencepiece.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens. A literal "▁" would decode to a space, so it goes in bytes."""
        first, *rest = text.split(SPACE)
        ids = self._sentencepiece.encode(first)
        for part in rest:
            ids += self._space_bytes + self._sentencepiece.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._sentencepiece.decode(list(ids))


class JsonTokenizer:
    """The same for a `tokenizer.json`. Beside it, `tokenizer_config.json` names the begin and end tokens; where no
    begin token is named, the end token serves as one, as in GPT-2. Raises ValueError without the `tokenizers` library,
    for a damaged file, and where no end token is named."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise ValueError(f"reading {self.path} needs the tokenizers library: pip install tokenizers") from None
        try:
            self._reader = Reader.from_file(str(self.path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{self.path} is not a tokenizer: {error}") from None
        self.vocab_size: int = self._reader.get_vocab_size()
        settings = self.path.with_name("tokenizer_config.json")
        named = read_json(settings) if settings.is_file() else {}
        begin, end = (self._special_id(named.get(key)) for key in ("bos_token", "eos_token"))
        if end is None:
            raise ValueError(f"{settings} names no eos_token that {self.path.name} has")
        self.bos_id: int = end if begin is None else begin
        self.eos_id: int = end

    def _special_id(self, token: str | dict | None) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return self._reader.token_to_id(text) if isinstance(text, str) else None

    def encode(self, text: str) -> list[int]:
        return self._reader.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._reader.decode(list(ids))


AnyTokenizer = Tokenizer | JsonTokenizer  # alike in path, vocab_size, bos_id, eos_id, encode and decode


def open_tokenizer(directory: str | Path) -> AnyTokenizer:
    """The tokenizer of a model's folder: `tokenizer.model`, or else `tokenizer.json`."""
    model, other = Path(directory) / "tokenizer.model", Path(directory) / "tokenizer.json"
    return JsonTokenizer(other) if other.is_file() and not model.is_file() else Tokenizer(model)


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int = 2048) -> Tokenizer:
    """Learns a BPE vocabulary from `texts` and writes it to `path`. As in Llama: single digits, unk 0, bos 1, eos 2."""
    settings: dict[str, Any] = dict(model_type="bpe", vocab_size=vocab_size, byte_fallback=True, split_digits=True)
    # What goes in comes out: no text is normalised, no space invented or removed, no character left out.
    settings |= dict(normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)
    settings |= dict(allow_whitespace_only_pieces=True, character_coverage=1.0, required_chars="")
    settings |= dict(max_sentence_length=1 << 20, num_threads=1, minloglevel=1)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, **settings)
    Path(path).write_bytes(model.getvalue())
    return Tokenizer(path)
