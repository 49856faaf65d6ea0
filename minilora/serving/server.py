"""The process around the routes: a socket, an engine, and an end in order."""

import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from minilora.inference.engine import Engine
from minilora.model import GPT
from minilora.serving.service import Service, open_bank
from minilora.text.tokenizer import AnyTokenizer

MISSING = 'serving needs starlette and uvicorn: pip install starlette uvicorn (or pip install "minilora[serve]")'
GRACE = 10.0  # seconds that running answers have after an interrupt
LOCAL = {"127.0.0.1", "localhost"}


def run_server(
    load: Callable[[], GPT],
    tokenizer: AnyTokenizer,
    base: str,
    adapters: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_size: int = 16,
    max_queue: int = 64,
    max_new_tokens: int = 512,
    force: bool = False,
):
    """Serves until it is interrupted. load: gives the base, once it is known that the rest is there.

    Raises ValueError without the two libraries, OSError for an address that cannot be had, and as `open_bank` does.
    """
    try:
        import uvicorn

        from minilora.serving.app import make_app
    except ImportError:
        raise ValueError(MISSING) from None
    with listening(host, port) as listener:
        bank = open_bank(load(), base, adapters, force)
        engine = Engine(bank, batch_size, max_queue, tokenizer.vocab_size)
        service = Service(engine, tokenizer, base, adapters, max_new_tokens, force=force)
        app = make_app(service, sorted(LOCAL) if host in LOCAL else None)
        config = uvicorn.Config(app, log_level="warning", ws="none", lifespan="on")
        config.timeout_graceful_shutdown = int(2 * GRACE)
        server = uvicorn.Server(config)
        ending(server, engine)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/v1"
        print(
            f"serving {base} and {len(bank.names)} adapters at {address}; Ctrl-C ends it", file=sys.stderr, flush=True
        )
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn's way to hand on what it has dealt with
            pass
        finally:
            engine.close()


def listening(host: str, port: int) -> socket.socket:
    """A socket at the address. OSError, naming it, where it cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None


def ending(server, engine: Engine):
    """From the first interrupt on nothing new comes in, and running answers have GRACE seconds. A second ends all."""
    handle = server.handle_exit

    def handle_exit(signal, frame):
        if not engine.refusing:
            engine.refuse()
            timer = threading.Timer(GRACE, engine.close)
            timer.daemon = True
            timer.start()
        handle(signal, frame)

    server.handle_exit = handle_exit
