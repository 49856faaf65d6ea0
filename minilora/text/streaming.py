"""Text as it comes: tokens in, one after another, and whole characters out as soon as no later token can change them.

Tokens cannot be decoded one by one. A character may be spread over several of them, none of which is text on its own
(an emoji has four bytes), and sentencepiece drops the space in front of a piece that is decoded alone.
"""

from collections.abc import Iterable, Iterator

from minilora.text.tokenizer import AnyTokenizer

INCOMPLETE = "\ufffd"  # "�", which decoders put for bytes that are no character, or not yet one


def stream_text(tokenizer: AnyTokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens in pieces, none of them empty; together they are `tokenizer.decode(all tokens)`."""
    ids: list[int] = []
    done = 0  # characters given so far
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        # Of a run of bytes some decoders make characters or, if the run as a whole is broken, none at all.
        if len(text) > done and not text.endswith(INCOMPLETE) and not tokenizer.is_byte(token):
            yield text[done:]
            done = len(text)
    if len(text) > done:
        yield text[done:]
