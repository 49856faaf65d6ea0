"""The routes: HTTP on one side, the engine on the other.

GET  /v1/models   /v1/models/NAME   /health
POST /v1/completions   /v1/chat/completions             as OpenAI's, whole or streamed (server-sent events)
POST /v1/load_lora_adapter   /v1/unload_lora_adapter    as vLLM's
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from minilora.inference.engine import Busy, Closed, End, Event, InUse, Job
from minilora.serving.answering import Answer, StoppedText
from minilora.serving.reading import Asked, check_fields, read_object, read_request, text_of
from minilora.serving.service import Refusal, Service, unknown_model

GONE = 499  # what proxies write down for a client that did not wait; nobody reads it


def make_app(service: Service, hosts: list[str] | None = None) -> Starlette:
    """hosts: the names by which the server may be called; None: any. A page in a browser that calls it by another name,
    which it made point here, is sent away."""

    async def complete(request: Request) -> Response:
        return await answer(service, request, chat=False)

    async def converse(request: Request) -> Response:
        return await answer(service, request, chat=True)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": service.models()})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        for model in service.models():
            if model["id"] == name:
                return JSONResponse(model)
        raise unknown_model(name)

    async def load(request: Request) -> Response:
        body = read_object(await read_body(service, request))
        check_fields(body, {"lora_name", "lora_path"})
        name, path = text_of(body, "lora_name"), text_of(body, "lora_path")
        await changed(lambda: service.load(name, path))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    async def unload(request: Request) -> Response:
        body = read_object(await read_body(service, request))
        check_fields(body, {"lora_name"})
        name = text_of(body, "lora_name")
        await changed(lambda: service.unload(name))
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "closing" if service.engine.refusing else "ok"})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.engine.close)

    routes = [
        *[Route("/health", health), Route("/v1/models", models), Route("/v1/models/{name}", model)],
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", converse, methods=["POST"]),
        Route("/v1/load_lora_adapter", load, methods=["POST"]),
        Route("/v1/unload_lora_adapter", unload, methods=["POST"]),
    ]
    guards = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if hosts else []
    handlers = {Refusal: refused, HTTPException: no_route, ClientDisconnect: gone_early}
    return Starlette(routes=routes, middleware=guards, exception_handlers=handlers, lifespan=lifespan)


async def refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return JSONResponse(refusal.body(), refusal.status)


async def no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    return JSONResponse(refusal.body(), refusal.status, error.headers)


async def gone_early(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


async def changed(change):
    """Waits for a change of the adapters, and gives its errors a status."""
    try:
        await asyncio.wrap_future(change())
    except InUse as error:
        raise Refusal(409, str(error), "lora_name", "adapter_in_use") from None
    except Closed as error:
        raise Refusal(503, str(error), code="shutting_down") from None
    except (ValueError, OSError) as error:
        raise Refusal(400, str(error)) from None


async def read_body(service: Service, request: Request) -> bytes:
    """Raises Refusal for a body that is too large, too slow, or not said to be JSON. A page in a browser can send the
    latter to any server, and JSON only to one that allows it."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "the body must be JSON, and say so: Content-Type: application/json")

    async def read() -> bytes:
        body, announced = bytearray(), request.headers.get("content-length", "")
        too_large = Refusal(413, f"the body is larger than {service.max_body} bytes", code="body_too_large")
        if announced.isdecimal() and int(announced[:20]) > service.max_body:
            raise too_large
        async for piece in request.stream():
            body += piece
            if len(body) > service.max_body:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), service.patience)
    except asyncio.TimeoutError:  # noqa: UP041  (Python 3.10 has another TimeoutError)
        raise Refusal(408, f"the body did not come within {service.patience:g} seconds") from None


async def answer(service: Service, request: Request, chat: bool) -> Response:
    body = await read_body(service, request)
    asked = await run_in_threadpool(read_request, service, body, chat)
    arrived: asyncio.Queue[Event] = asyncio.Queue()
    job = submit(service, asked, arrived)
    answer, text = Answer(asked), StoppedText(service.tokenizer, asked.stops)
    if asked.stream:
        return Streamed(service, job, events(answer, pieces(answer, text, arrived)))
    answering = asyncio.ensure_future(whole(answer, pieces(answer, text, arrived)))
    leaving = asyncio.ensure_future(left(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(answering.result()) if answering.done() else Response(status_code=GONE)
    finally:
        service.engine.cancel(job)
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


class Streamed(StreamingResponse):
    """Events as they come. However it ends, the row is free afterwards: the client may be gone before the first one."""

    def __init__(self, service: Service, job: Job, content: AsyncIterator[str]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.service, self.job = service, job

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.engine.cancel(self.job)


def submit(service: Service, asked: Asked, arrived: asyncio.Queue) -> Job:
    """Queues the request; its events come to `arrived`. Raises Refusal."""
    loop = asyncio.get_running_loop()

    def send(event: Event):
        loop.call_soon_threadsafe(arrived.put_nowait, event)

    try:
        return service.engine.submit(asked.request, send, **asked.sampling)
    except Busy as error:
        raise Refusal(429, str(error), code="queue_full") from None
    except Closed as error:
        raise Refusal(503, str(error), code="shutting_down") from None
    except ValueError as error:
        service.adapter_of(asked.model)  # may be gone since the request was read
        raise Refusal(400, str(error)) from None


async def left(request: Request):
    """Returns when the client is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def pieces(answer: Answer, text: StoppedText, arrived: asyncio.Queue) -> AsyncIterator[tuple[str, str | None]]:
    """The text of every event, which may be empty, and with the last one the reason for the end. Raises Refusal."""
    while not text.stopped:
        event = await arrived.get()
        if not isinstance(event, End):
            answer.count += 1
            piece = text.add(event)
            yield piece, "stop" if text.stopped else None
        elif event.reason in ("stop", "length"):
            piece = text.rest()
            yield piece, "stop" if text.stopped else event.reason
            return
        elif event.reason == "error":
            raise Refusal(500, event.message)
        else:
            raise Refusal(503, "the server is shutting down", code="shutting_down")


async def whole(answer: Answer, pieces) -> dict:
    said = [piece async for piece in pieces]
    return answer.whole("".join(text for text, _ in said), said[-1][1])


async def events(answer: Answer, pieces) -> AsyncIterator[str]:
    """Server-sent events. A fault on the way is one of them: the status has been sent."""

    def event(value: dict) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    try:
        for value in answer.first():
            yield event(value)
        async for text, reason in pieces:
            if text:
                yield event(answer.piece(text))
            if reason:
                for value in answer.last(reason):
                    yield event(value)
    except Refusal as refusal:
        yield event(refusal.body())
    yield "data: [DONE]\n\n"
