"""Text as it comes: tokens in, one after another, and whole characters out as soon as no later token can change them.

Tokens cannot be decoded one by one. A character may be spread over several of them, none of which is text on its own
(an emoji has four bytes), and sentencepiece drops the space in front of a piece that is decoded alone.
"""

from collections.abc import Iterable, Iterator

from minilora.text.tokenizer import AnyTokenizer

INCOMPLETE = "\ufffd"  # "�", which decoders put for bytes that are no character, or not yet one


class TextStream:
    """The text of tokens that come one after another, in pieces that no later token changes. All that `add` gives, and
    at the end `rest`, is together `tokenizer.decode(all tokens)`."""

    def __init__(self, tokenizer: AnyTokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        self.done = 0  # characters given so far

    def add(self, token: int) -> str:
        """What can be read now and could not before; often nothing."""
        self.ids.append(token)
        self.text = self.tokenizer.decode(self.ids)
        # Of a run of bytes some decoders make characters or, if the run as a whole is broken, none at all.
        if self.text.endswith(INCOMPLETE) or self.tokenizer.is_byte(token):
            return ""
        return self.rest()

    def rest(self) -> str:
        """What is left when no more tokens come."""
        piece, self.done = self.text[self.done :], max(self.done, len(self.text))
        return piece


def stream_text(tokenizer: AnyTokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens in pieces, none of them empty; together they are `tokenizer.decode(all tokens)`."""
    text = TextStream(tokenizer)
    for token in tokens:
        if piece := text.add(token):
            yield piece
    if piece := text.rest():
        yield piece
