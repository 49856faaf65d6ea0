"""What the files beside a tokenizer say: which tokens begin and end a text, which were added, how a chat is written.

tokenizer_config.json     named tokens, added tokens with their ids, the chat template
special_tokens_map.json   named tokens, in older folders
added_tokens.json         added tokens with their ids, in older folders
chat_template.jinja       the chat template, in newer folders
generation_config.json    ids that end an answer; so does config.json
"""

from pathlib import Path

from minilora.storage.files import read_json

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"


def settings_beside(path: Path) -> dict:
    """The `tokenizer_config.json` beside a tokenizer, {} where there is none, with what the other files add to it."""

    def read(name: str) -> dict:
        file = path.with_name(name)
        return read_json(file) if file.is_file() else {}

    settings = read(TOKENIZER_CONFIG)
    if not settings.get("added_tokens_decoder"):  # as older folders have it, and as `transformers` reads these
        settings |= read("special_tokens_map.json")
        more = settings.get("additional_special_tokens")
        special = {*named_tokens(settings).values(), *(map(_name_of, more) if isinstance(more, list) else [])}
        added = {str(id): dict(content=name, special=name in special) for name, id in read("added_tokens.json").items()}
        settings |= {"added_tokens_decoder": added} if added else {}
    template = path.with_name("chat_template.jinja")
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8-sig")
    return settings


def named_tokens(settings: dict) -> dict[str, str]:
    """The entries such as "eos_token", each a name or an object that holds the name as its content."""
    named = {key: _name_of(value) for key, value in settings.items() if key.endswith("_token")}
    return {key: name for key, name in named.items() if name is not None}


def _name_of(token) -> str | None:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def added_tokens(settings: dict, path: Path) -> dict[int, tuple[str, bool]]:
    """The tokens that came to those of the tokenizer's own file, by id: (name, whether it steers the model).

    Raises ValueError, naming the folder, for entries of another form.
    """
    try:
        entries = {int(id): entry for id, entry in (settings.get("added_tokens_decoder") or {}).items()}
        added = {id: (entry["content"], bool(entry.get("special"))) for id, entry in entries.items()}
        if all(id >= 0 and isinstance(name, str) and name for id, (name, _) in added.items()):
            return added
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise ValueError(f'the added tokens beside {path} are not of the form {{id: {{"content": name}}}}')


def chat_template(settings: dict) -> str | None:
    """The template's source; of several, each with a name, the one called default."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def end_ids_beside(path: Path) -> set[int]:
    """A model may end its answers with more tokens than one: those of `generation_config.json` and `config.json`."""
    ends: set[int] = set()
    for file in (path.with_name(GENERATION_CONFIG), path.with_name("config.json")):
        named = read_json(file).get("eos_token_id") if file.is_file() else None
        ends |= {id for id in (named if isinstance(named, list) else [named]) if type(id) is int and 0 <= id < 2**31}
    return ends
