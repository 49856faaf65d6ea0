"""What a server has at hand, and how it says no: the engine, the names, the limits."""

from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from time import time

from minilora.inference.bank import AdapterBank
from minilora.inference.engine import Engine
from minilora.model import GPT
from minilora.ranges import NEW_TOKENS
from minilora.storage.files import shown
from minilora.storage.folders import WRITTEN
from minilora.storage.peft import ADAPTER_CONFIG
from minilora.text.tokenizer import AnyTokenizer


class Refusal(Exception):
    """A status of HTTP and what OpenAI's clients read beside it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        kinds = {429: "rate_limit_error"} | dict.fromkeys((500, 503), "server_error")
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kinds.get(status, "invalid_request_error")

    def body(self) -> dict:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def unknown_model(name: str, param: str = "model") -> Refusal:
    return Refusal(404, f"there is no model {shown(name)}; GET /v1/models names all", param, "model_not_found")


@dataclass
class Service:
    """base: the name of the base itself. adapters: the folder that holds their folders, the only ones that are read.
    max_new_tokens: of one answer. max_body: bytes of one request."""

    engine: Engine
    tokenizer: AnyTokenizer
    base: str
    adapters: Path | None = None
    max_new_tokens: int = 512
    max_body: int = 2**20
    force: bool = False
    patience: float = 30.0  # seconds that a request's body may take to come

    def __post_init__(self):
        NEW_TOKENS.check("max_new_tokens", self.max_new_tokens)
        self.since = int(time())

    @property
    def bank(self) -> AdapterBank:
        return self.engine.bank

    def adapter_of(self, model: str) -> str | None:
        """The bank's name for a request's `model`; None is the base. Raises Refusal for one that is not here."""
        if model != self.base and model not in self.bank.adapters:
            raise unknown_model(model)
        return None if model == self.base else model

    def models(self) -> list[dict]:
        about = {"object": "model", "created": self.since, "owned_by": "minilora"}
        adapters = [{"id": name, **about, "parent": self.base} for name in self.bank.names]
        return [{"id": self.base, **about, "parent": None}, *adapters]

    def load(self, name: str, path: str) -> Future:
        """Adds the adapter of a folder below `adapters`; path is absolute, or begins there. Raises Refusal."""
        if self.adapters is None:
            raise Refusal(400, "this server has no folder of adapters to load from (serve --adapters FOLDER)")
        if name == self.base or name in self.bank.adapters:
            raise Refusal(400, f"there is a model {shown(name)} already; unload it first", "lora_name")
        home = self.adapters.resolve()
        try:
            folder = (home / path).resolve()
        except (ValueError, OSError, RuntimeError):  # a zero in it, a loop of links
            folder = Path("/")
        if home not in folder.parents:
            raise Refusal(400, "the path leads out of the server's folder of adapters", "lora_path")
        return self.engine.add(name, folder, self.force)

    def unload(self, name: str) -> Future:
        """Removes an adapter. Raises Refusal for the base, and for a name that is not here."""
        if name == self.base:
            raise Refusal(400, f"{shown(name)} is the base, which stays", "lora_name")
        if name not in self.bank.adapters:
            raise unknown_model(name, "lora_name")
        return self.engine.remove(name)


def open_bank(model: GPT, base: str, folder: Path | None, force: bool = False) -> AdapterBank:
    """A bank of all adapters below `folder`, each by its own folder's name.

    Raises FileNotFoundError where there is no such folder, and ValueError, naming the adapter, for one that does not
    load, and for one that is called as the base is.
    """
    bank = AdapterBank(model)
    if folder is None:
        return bank
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; --adapters takes one that holds adapters' folders")
    if is_adapter(folder):
        raise ValueError(f"{folder} is an adapter itself; --adapters takes the folder around it")
    for path in sorted(filter(is_adapter, folder.iterdir())):
        if path.name == base:
            raise ValueError(f"{path} is called as the base is, so nobody could ask for it; rename one of the two")
        bank.add(path.name, path, force)
    return bank


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file() or (folder / WRITTEN / ADAPTER_CONFIG).is_file()
