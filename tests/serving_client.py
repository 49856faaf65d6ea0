"""A server on a free port of this machine, and a client that can misbehave."""

import http.client
import json
import socket
import threading
from contextlib import contextmanager

import torch

from minilora.adapters.inject import adapter_parameters, apply_lora
from minilora.config import LoRAConfig
from minilora.inference.engine import Engine
from minilora.model import GPT, GPTConfig
from minilora.serving.service import Service, open_bank
from minilora.storage.adapters import save_adapter
from minilora.text.chat import encode_prompt

LIMIT = 160
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def a_base(vocab_size: int) -> GPT:
    """In float64, so that an answer is the same beside any others; its weights are float32's, as its adapters are."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, 16, 24, 2, 4, 2, max_position_embeddings=LIMIT))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.double()


def write_adapters(folder, vocab_size: int, count: int):
    for number in range(count):
        config = LoRAConfig(1 + number % 4, 4, target_modules=["q_proj", "v_proj"] if number % 2 else "all-linear")
        model = apply_lora(a_base(vocab_size), config)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapter_parameters(model):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        save_adapter(model, folder / f"skill-{number}")


class Client:
    """One request a connection, with nothing but the standard library."""

    def __init__(self, port: int):
        self.port = port

    def send(self, method: str, path: str, body=None, **headers) -> tuple[int, object]:
        """Status, and what came: JSON where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else text

    def post(self, path: str, body, **headers) -> tuple[int, object]:
        return self.send("POST", path, body, **headers)

    def events(self, path: str, body: dict) -> list:
        """The data of a stream's events."""
        status, text = self.post(path, body | {"stream": True})
        assert status == 200 and text.endswith("\n\n"), (status, text)
        lines = text[:-2].split("\n\n")
        assert all(line.startswith("data: ") for line in lines), lines
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def raw(self, path: str, body: dict) -> socket.socket:
        """A connection on which a request was sent and nothing is read yet."""
        content = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection


@contextmanager
def running(tokenizer, adapters=None, batch_size=8, max_queue=64, model=None, **settings):
    """A server in a thread of this process: the client and the service."""
    import uvicorn

    from minilora.serving.app import make_app

    bank = open_bank(a_base(tokenizer.vocab_size) if model is None else model, "tiny", adapters)
    engine = Engine(bank, batch_size, max_queue, tokenizer.vocab_size)
    service = Service(engine, tokenizer, "tiny", adapters, **settings)
    config = uvicorn.Config(make_app(service, ["127.0.0.1", "localhost"]), log_level="error", ws="none", lifespan="on")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield Client(listener.getsockname()[1]), service
        finally:
            server.should_exit = True
            engine.close()
            thread.join(timeout=30)
    assert not thread.is_alive(), "the server did not end"


def text_alone(bank, tokenizer, prompt, adapter: str | None, max_tokens: int, **sampling) -> tuple[str, str]:
    """What a request must be answered: `generate` with this prompt alone; and the reason for its end."""
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) or isinstance(prompt[0], dict) else prompt
    how = dict(eos_id=tokenizer.end_ids, vocab_size=tokenizer.vocab_size, **sampling)
    tokens = bank.generate([ids], [adapter], max_tokens, **how)[0]
    return tokenizer.decode(tokens), "length" if len(tokens) == max_tokens else "stop"
