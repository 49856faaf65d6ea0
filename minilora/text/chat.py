"""Chats as a model was trained to read them: messages -> one text by the model's own template -> token ids.

    [{"role": "user", "content": "Hi"}]
    -> "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n"
    -> [1, 4093, ...]

A template is a small program in the jinja2 language that the model's maker ships with the tokenizer. It comes from a
stranger, so it runs in jinja2's sandbox, which lets it build text and nothing else.

Control tokens are the template's alone. A user who types `<|im_end|>` means these ten characters, and a model that took
them for the end of the user's turn could be made to say anything in the system's name. So each name of a control token
inside a message goes through the template under an alias, and becomes letters again when the text is encoded. Where the
first or last letters of a message could be completed to a name by what the template puts beside them, an empty alias
stands between the two.
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilora.text.tokenizer import AnyTokenizer, any_of

Message = dict[str, str]  # "role" and "content"
ChatPrompt = str | list[Message]  # a text to go on from, or a chat to answer
ROLES = ("system", "user", "assistant")
OPEN, CLOSE = "\ue000", "\ue001"  # around the number of an alias: of Unicode's private use, and escaped where typed


def encode_prompt(tokenizer: AnyTokenizer, prompt: ChatPrompt) -> list[int]:
    """What the model is given: a text behind the tokenizer's prefix, or a chat up to where the answer begins."""
    if isinstance(prompt, str):
        return [*tokenizer.prefix, *tokenizer.encode(prompt)]
    return chat_ids(tokenizer, prompt)


def chat_ids(tokenizer: AnyTokenizer, messages: Sequence[Message], answer: bool = True) -> list[int]:
    """The token ids of a chat, by the tokenizer's own template; with `answer`, up to where the assistant's next message
    begins. The template sets all the begin tokens it wants, so none is put in front.

    Raises ValueError for a tokenizer without a template, for a message without a known role and a content, and, naming
    the fault, where the template itself fails.
    """
    names = list(tokenizer.control)
    aliases = {piece: f"{OPEN}{number}{CLOSE}" for number, piece in enumerate(["", OPEN, CLOSE, *names])}
    hidden = [_hidden(message, names, aliases) for message in messages]
    text = render(tokenizer, hidden, answer)
    if hidden == list(messages):
        return tokenizer.encode(text, control=True)
    pieces = {alias: piece for piece, alias in aliases.items()}
    ids: list[int] = []
    # Between two control tokens stands text, in which an alias is what a user typed. The text is encoded in one piece,
    # because the last letters of the template and the first of a message may be one token.
    for place, part in enumerate(re.split(f"({any_of(names)})", text)):
        if part in tokenizer.control:
            ids.append(tokenizer.control[part])
        elif part:
            letters = re.sub(any_of(pieces), lambda alias: pieces[alias[0]], part)
            ids += tokenizer.encode(letters, continues=place > 0 and not tokenizer.blank_after_control)
    return ids


def render(tokenizer: AnyTokenizer, messages: Sequence[Message], answer: bool = True) -> str:
    """The text that the tokenizer's template makes of the messages. ValueError as in `chat_ids`."""
    template = template_of(tokenizer)
    for number, message in enumerate(messages):
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(f"message {number} is {message!r}; it needs a role ({', '.join(ROLES)}) and a content")
    given: dict[str, Any] = {**tokenizer.named_tokens, "messages": list(messages), "add_generation_prompt": answer}
    try:
        return compiled(template).render(given)
    except Exception as error:  # a program of a stranger can fail in any way
        raise ValueError(f"the chat template of {tokenizer.path} fails on these messages: {error}") from None


@lru_cache(maxsize=8)  # a data set renders one template a thousand times
def compiled(source: str) -> Template:
    """The template in the sandbox, with what `transformers` offers to templates, but for the tag `generation`."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])

    def refuse(reason: str):
        raise TemplateError(reason)

    # jinja2's own would write letters beyond ASCII as escapes, and the aliases among them.
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment.from_string(source)


def template_of(tokenizer: AnyTokenizer) -> str:
    """The source of the tokenizer's template. Raises ValueError for a tokenizer without one."""
    if tokenizer.chat_template is None:
        raise ValueError(f"{tokenizer.path} comes without a chat template; give the prompt as plain text")
    return tokenizer.chat_template


def _hidden(message: Message, names: list[str], aliases: dict[str, str]) -> Message:
    content = message.get("content")
    if not isinstance(content, str):
        return message
    content = re.sub(any_of([OPEN, CLOSE, *names]), lambda piece: aliases[piece[0]], content)
    body = content.strip()  # templates strip too
    if body and any(_could_be_completed(body, name) for name in names):
        content = content.replace(body, aliases[""] + body + aliases[""])
    return {**message, "content": content}


def _could_be_completed(text: str, name: str) -> bool:
    """Whether the name can arise from this text and what may stand around it."""
    cuts = range(1, len(name))
    return text in name or any(text.startswith(name[cut:]) or text.endswith(name[:cut]) for cut in cuts)
