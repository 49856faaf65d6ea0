"""A request's body -> what is asked for. Everything in it comes from a stranger.

A parameter that this server does not have is refused by name, unless it is given the value that asks for nothing: an
answer that ignores half of the question looks like an answer.
"""

import json
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from minilora import ranges
from minilora.inference.serve import Request
from minilora.serving.service import Refusal, Service
from minilora.storage.files import parse_json, shown
from minilora.text.chat import ROLES, chat_ids, encode_prompt, template_of

SHARED = {"model", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids"}
SHARED |= {"stream", "stream_options"}
KNOWN = {False: SHARED | {"prompt"}, True: SHARED | {"messages", "max_completion_tokens"}}  # by whether it is a chat
UNHEARD = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key"}  # change no answer
# Of the parameters that this server does not have, the values that ask for nothing, as JSON.
NOTHING = {"n": ["1"], "best_of": ["1"], "echo": ["false"], "suffix": ['""'], "logprobs": ["false"]}
NOTHING |= dict.fromkeys(("presence_penalty", "frequency_penalty"), ["0", "0.0"])
NOTHING |= {"logit_bias": ["{}"], "tools": ["[]"], "response_format": ['{"type": "text"}']}
NOTHING |= {"load_inplace": ["false"], "include_obfuscation": ["false"]}
SHORT = 16  # tokens of a completion that names no number, as at OpenAI
STOPS, STOP_LENGTH = 16, 1000  # stop strings at most, and their letters


@dataclass
class Asked:
    """A request that can be answered."""

    model: str
    chat: bool
    request: Request
    sampling: dict[str, Any]  # of `Engine.submit`
    stops: list[str]
    stream: bool
    usage: bool  # of a stream: whether its last piece tells the tokens


def read_object(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object, those that are null left out. Raises Refusal."""
    try:
        value = parse_json(body.decode())
    except ValueError as error:
        raise Refusal(400, f"the body is not valid JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"the body is a JSON {type(value).__name__}; an object with named fields is expected")
    return {name: field for name, field in value.items() if field is not None}


def check_fields(body: dict, known: Collection[str]):
    """Raises Refusal for a field that is not known, and asks for something."""
    for name, value in body.items():
        if name not in known and json.dumps(value) not in NOTHING.get(name, ()):
            fault = f"{name[:100]} {shown(value)} is not supported here"
            raise Refusal(400, fault, name[:100], "unsupported_parameter")


def text_of(body: dict, name: str) -> str:
    if not isinstance(text := body.get(name), str):
        raise Refusal(400, f"{name} is {shown(text)}; a string is required", name)
    return text


def read_request(service: Service, content: bytes, chat: bool) -> Asked:
    """Raises Refusal for everything that is wrong with it."""
    body = read_object(content)
    check_fields(body, KNOWN[chat] | UNHEARD)
    model = text_of(body, "model")
    adapter = service.adapter_of(model)
    options = _typed(body, "stream_options", {}, lambda it: isinstance(it, dict), "an object")
    check_fields(options, {"include_usage"})
    prompt = _messages(service, body) if chat else _prompt(service, body)
    room = service.bank.model.config.max_position_embeddings - service.bank.virtual_tokens(adapter) - len(prompt)
    stop = body.get("stop", [])
    stops = _typed(
        {"stop": [stop] if isinstance(stop, str) else stop},
        "stop",
        [],
        _is_stops,
        f"at most {STOPS} strings, none empty or over {STOP_LENGTH} letters",
    )
    ids = _typed(body, "stop_token_ids", [], lambda it: isinstance(it, list) and all(map(_is_id, it)), "token ids")
    return Asked(
        model,
        chat,
        Request(prompt, adapter, _new_tokens(service, body, chat, len(prompt), room)),
        dict(
            temperature=_number(body, "temperature", ranges.TEMPERATURE, 1.0),
            top_p=_number(body, "top_p", ranges.TOP_P, None),
            top_k=_number(body, "top_k", ranges.TOP_K, None),
            seed=_number(body, "seed", ranges.TORCH_SEED, secrets.randbits(63)),
            ends=service.tokenizer.end_ids | set(ids),
        ),
        stops,
        stream=_typed(body, "stream", False, _is_bool, "true or false"),
        usage=_typed(options, "include_usage", False, _is_bool, "true or false"),
    )


def _typed(body: dict, name: str, default, fits: Callable[[Any], bool], expected: str):
    value = body.get(name, default)
    if not fits(value):
        raise Refusal(400, f"{name} is {shown(value)}; it must be {expected}", name)
    return value


def _is_bool(value) -> bool:
    return isinstance(value, bool)


def _is_id(value) -> bool:
    return type(value) is int


def _is_stops(value) -> bool:
    fits = isinstance(value, list) and len(value) <= STOPS
    return fits and all(isinstance(stop, str) and 0 < len(stop) <= STOP_LENGTH for stop in value)


def _number(body: dict, name: str, allowed: ranges.Range, default):
    if name not in body:
        return default
    return _typed(body, name, default, allowed.holds, str(allowed))


def _new_tokens(service: Service, body: dict, chat: bool, length: int, room: int) -> int:
    """max_tokens, which must fit behind the prompt; without it, as many as fit, of a plain completion at most SHORT."""
    most = service.max_new_tokens
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    wanted = _number(body, name, ranges.NEW_TOKENS, None)
    if wanted is not None and wanted > most:
        raise Refusal(400, f"{name} is {wanted}; this server gives at most {most}", name)
    if room < (wanted or 1):
        new = f" and {wanted} new ones are asked for" if wanted else ""
        fault = f"the prompt has {length} tokens{new}, and the model's sequences end at {length + room}"
        raise Refusal(400, fault, "messages" if chat else "prompt", "context_length_exceeded")
    return min(most, room, most if chat else SHORT) if wanted is None else wanted


def _prompt(service: Service, body: dict) -> list[int]:
    """A text, or token ids; also as the one member of a list."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        prompt = encode_prompt(service.tokenizer, prompt)
    elif not isinstance(prompt, list) or not all(map(_is_id, prompt)):
        raise Refusal(400, f"prompt is {shown(prompt)}; it must be one text, or a list of token ids", "prompt")
    V = service.bank.model.config.vocab_size
    if not prompt or not all(0 <= id < V for id in prompt):
        raise Refusal(400, f"the prompt must have at least one token, and ids from 0 to {V - 1}", "prompt")
    return prompt


def _messages(service: Service, body: dict) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, f"messages is {shown(messages)}; it must be a list of messages", "messages")
    plain = [_message(number, message) for number, message in enumerate(messages)]
    try:
        template_of(service.tokenizer)
        return chat_ids(service.tokenizer, plain)
    except ValueError as error:
        raise Refusal(400, str(error), "messages") from None


def _message(number: int, message: Any) -> dict[str, str]:
    """role and content; the content is a text, or parts that are texts."""
    role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    role = "system" if role == "developer" else role
    if role not in ROLES or not isinstance(content, str):
        fault = f"message {number} is {shown(message)}; it needs a role ({', '.join(ROLES)}) and a content of text"
        raise Refusal(400, fault, f"messages[{number}]")
    return {"role": role, "content": content}
