"""Tokens -> the text of an answer, and the JSON around it."""

import secrets
from time import time
from typing import Any

from minilora.serving.reading import Asked
from minilora.text.streaming import TextStream
from minilora.text.tokenizer import AnyTokenizer


class StoppedText:
    """The text of tokens that come one after another, up to the stop string that is complete first.

    What could be the beginning of a stop string is held back until it is known:

        stop "END"      "x", "yE", "N", "O"  ->  "x", "y", "", "ENO"
    """

    def __init__(self, tokenizer: AnyTokenizer, stops: list[str]):
        self.stream, self.stops = TextStream(tokenizer), stops
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        return self._cut(self.stream.add(token))

    def rest(self) -> str:
        """What is left when no more tokens come."""
        piece = self._cut(self.stream.rest())
        return piece if self.stopped else piece + self._release()

    def _cut(self, piece: str) -> str:
        text, self.held = self.held + piece, ""
        found = [(place + len(stop), place) for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        begun = [n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])]
        cut = len(text) - max(begun, default=0)
        self.held = text[cut:]
        return text[:cut]

    def _release(self) -> str:
        held, self.held = self.held, ""
        return held


class Answer:
    """The objects that answer one request, in one piece or in many. `count`: tokens so far."""

    def __init__(self, asked: Asked):
        self.asked, self.count = asked, 0
        kind = "chat.completion" if asked.chat else "text_completion"
        chunk = "chat.completion.chunk" if asked.chat else "text_completion"
        self.head: dict[str, Any] = {"id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}"}
        self.head |= {"object": chunk if asked.stream else kind, "created": int(time()), "model": asked.model}

    def usage(self) -> dict:
        prompt = len(self.asked.request.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.count, "total_tokens": prompt + self.count}

    def whole(self, text: str, reason: str) -> dict:
        said = {"message": {"role": "assistant", "content": text}} if self.asked.chat else {"text": text}
        return self._object(said, reason) | {"usage": self.usage()}

    def first(self) -> list[dict]:
        """What a stream begins with."""
        return [self._object({"delta": {"role": "assistant", "content": ""}}, None)] if self.asked.chat else []

    def piece(self, text: str) -> dict:
        return self._object({"delta": {"content": text}} if self.asked.chat else {"text": text}, None)

    def last(self, reason: str) -> list[dict]:
        """What a stream ends with."""
        end = self._object({"delta": {}} if self.asked.chat else {"text": ""}, reason)
        return [end, self.head | {"choices": [], "usage": self.usage()}] if self.asked.usage else [end]

    def _object(self, said: dict, reason: str | None) -> dict:
        return self.head | {"choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}
