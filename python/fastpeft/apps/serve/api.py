"""The HTTP application: OpenAI's endpoints over an `Engine`, `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from . import schemas
from .adapters import Adapters
from .answers import DONE, Piece, Shape, event
from .bodies import Bodies, went_away
from .engine import Engine
from .errors import ApiError, bad, short
from .limits import BodyLimits
from .text import Decoder, Stops, encode

logger = logging.getLogger("fastpeft.apps.serve")

_LAST_WORDS = 1.0  # seconds for sending that time is up
_GONE = went_away().status
_VALUES = 8  # of JSON for each token that a request may have; messages of one token take four
_MESSAGE = 32  # bytes that a message is counted as, beside its text


class Service:
    """engine, tokenizer: of one model, whose name is `adapters.base`."""

    def __init__(
        self, engine: Engine, tokenizer: Any, adapters: Adapters, bodies: BodyLimits = BodyLimits()  # noqa: B008
    ) -> None:
        self.engine, self.tokenizer, self.adapters = engine, tokenizer, adapters
        self.metrics = engine.metrics
        self.bodies = Bodies(bodies, 1000 + _VALUES * engine.limits.max_length, self.metrics)
        self.longest = max(len(token.encode()) for token in tokenizer.get_vocab())  # bytes of a token
        self.metrics.watch("fastpeft_open_requests", "Requests that are not answered yet.", lambda: engine.open)
        self.metrics.watch("fastpeft_queue_requests", "Of them, those without a token yet.", lambda: engine.waiting)
        if engine.pool is not None:
            self.metrics.watch_pool(engine.pool.stats)

    def app(self) -> FastAPI:
        """The application. Starting it starts the engine's loop, ending it stops that."""

        @contextlib.asynccontextmanager
        async def life(_: FastAPI) -> AsyncIterator[None]:
            self.engine.start()
            looking = asyncio.ensure_future(self.adapters.keep_looking())
            try:
                yield
            finally:
                looking.cancel()
                self.bodies.close()
                await asyncio.to_thread(self.engine.stop)

        app = FastAPI(title="fastpeft", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/metrics", self.show_metrics, methods=["GET"])
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        app.add_api_route("/v1/completions", self.completions, methods=["POST"])
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        if self.adapters.by_request:
            app.add_api_route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"])
            app.add_api_route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"])
        app.add_exception_handler(ApiError, _refused)  # type: ignore[arg-type]
        app.add_exception_handler(HTTPException, _no_route)  # type: ignore[arg-type]
        app.add_exception_handler(Exception, _defect)
        return app

    async def health(self) -> Response:
        engine = self.engine
        if engine.draining or not engine.alive:
            return JSONResponse({"status": "shutting down" if engine.draining else "engine down"}, 503)
        return JSONResponse({"status": "ok", "model": self.adapters.base, "open_requests": engine.open})

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": self.adapters.entries()})

    async def model(self, name: str) -> Response:
        if name != self.adapters.base:
            await self.adapters.find(name)
        return JSONResponse(self.adapters.entry(name))

    async def completions(self, request: Request) -> Response:
        return await Call(self, request, "completions").respond(schemas.Completion)

    async def chat(self, request: Request) -> Response:
        return await Call(self, request, "chat").respond(schemas.Chat)

    async def load_adapter(self, request: Request) -> Response:
        asked: schemas.LoadAdapter = await self.bodies.read(request, partial(schemas.parse, schemas.LoadAdapter))
        await self.adapters.load(asked.lora_name, asked.lora_path)
        return Response(f"Success: adapter {asked.lora_name!r} added.", media_type="text/plain")

    async def unload_adapter(self, request: Request) -> Response:
        asked: schemas.UnloadAdapter = await self.bodies.read(request, partial(schemas.parse, schemas.UnloadAdapter))
        self.adapters.unload(asked.lora_name)
        return Response(f"Success: adapter {asked.lora_name!r} removed.", media_type="text/plain")

    async def tokenize(self, asked: schemas.Completion | schemas.Chat) -> list[int]:
        """The prompt's tokens, as training has them. What is long is done on a thread; `asked` loses its prompt."""
        if isinstance(asked, schemas.Completion):
            prompt = asked.take_prompt()
            if isinstance(prompt, list):
                return prompt
            return await self.bodies.beside(lambda: self._encode(prompt, "prompt"), len(prompt))
        messages = asked.take_prompt()
        size = sum(_MESSAGE + len(message["content"]) for message in messages)
        return await self.bodies.beside(lambda: self._encode(self._text(messages), "messages"), size)

    def _text(self, messages: list[dict[str, str]]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise bad(f"model {self.adapters.base!r} has no chat template; use /v1/completions", "messages")
        try:
            text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return text
        except Exception as error:  # templates raise what they like at conversations they do not take
            raise bad(f"messages: the model's chat template refuses them: {short(str(error))}", "messages") from error

    def _encode(self, text: str, field: str) -> list[int]:
        size, tokens = len(text.encode()), self.engine.limits.max_length
        if size > tokens * self.longest:  # they are more tokens than that; to count how many would take seconds
            self.metrics.refused.labels("prompt_bytes").inc()
            told = f"the prompt has {size} bytes; {tokens} tokens of this model have at most {tokens * self.longest}"
            raise bad(told, field, "context_length_exceeded")
        return encode(self.tokenizer, text, field == "prompt")


class Call:
    """One POST for text, from its body to its last byte."""

    def __init__(self, service: Service, http: Request, endpoint: str) -> None:
        self.service, self.http, self.endpoint = service, http, endpoint
        self.engine, self.metrics = service.engine, service.metrics
        self.served_by = "unknown"
        self.began = time.monotonic()
        self.made = self.prompt = 0
        self.counted = False

    async def respond(self, schema: type[schemas.Completion] | type[schemas.Chat]) -> Response:
        try:
            asked = await self.service.bodies.read(self.http, partial(schemas.parse, schema))
            return await self._answer(asked)
        except ApiError as error:
            self._count(error.status)
            return JSONResponse(error.body(), error.status, headers=error.headers)
        except BaseException as error:
            self._count(_GONE if isinstance(error, asyncio.CancelledError) else 500)
            raise

    async def _answer(self, asked: Any) -> Response:
        service, engine = self.service, self.engine
        adapter = None if asked.model == service.adapters.base else asked.model
        if adapter is not None:
            await service.adapters.find(adapter)
        self.served_by = "base" if adapter is None else "adapter"
        ids = await service.tokenize(asked)
        most = engine.check(ids, asked.most())
        self.prompt = len(ids)
        chat = isinstance(asked, schemas.Chat)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        shape = Shape(name, int(time.time()), asked.model, chat, asked.wants_logprobs(), asked.wants_usage)
        self.open = engine.admit(self.served_by, most)
        handed_over = False
        try:
            await self._or_gone(engine.begin(self.open, ids, adapter, asked.sampling(), asked.most()))
            self.metrics.prompt.labels(self.served_by).inc(self.prompt)
            pieces = self._pieces(asked.stops(), shape.logprobs)
            if asked.stream:
                handed_over = True
                return EventStream(self._events(pieces, shape), lambda: engine.left(self.open), self._end_of_stream)
            collected = await self._or_gone(_all(pieces))
            self._count(200)
            return JSONResponse(shape.whole(collected, self.prompt, self.made))
        finally:
            if not handed_over:
                engine.leave(self.open)

    async def _or_gone(self, work: Any) -> Any:
        """The result of `work`, which ends when the client goes away."""
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_disconnected(self.http.receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise went_away()
            return task.result()
        finally:
            for each in (task, gone):
                each.cancel()
            # what a cancelled task still has to put right (an adapter that arrives late) is done when this returns
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _pieces(self, stops: list[str], spell: bool) -> AsyncIterator[Piece]:
        decoder, stop = Decoder(self.service.tokenizer), Stops(stops)
        async for token in self.engine.tokens(self.open):
            self.made += 1
            text = decoder.push(token.id) if token.end != "stop" else ""
            if token.end is not None:
                text += decoder.flush()
            piece = Piece(stop.push(text, last=token.end is not None), end="stop" if stop.hit else token.end)
            if spell:
                piece.tokens.append((decoder.spell(token.id), token.logprob))
            yield piece
            if stop.hit:
                return

    async def _events(self, pieces: AsyncIterator[Piece], shape: Shape) -> AsyncIterator[str]:
        status = _GONE
        try:
            first = shape.first()
            if first is not None:
                yield first
            sent = 0
            async for piece in pieces:
                if piece.text or piece.tokens or piece.end is not None:
                    yield shape.part(piece, sent)
                    sent += len(piece.text)
            if shape.stream_usage:
                yield shape.totals(self.prompt, self.made)
            status = 200
        except ApiError as error:
            status = error.status
            yield event(error.body())
        except Exception as error:  # the stream's own end, as `_defect` is a whole answer's
            status = 500
            yield event(_unexpected(error).body())
        finally:
            self._count(status)
        yield DONE

    def _end_of_stream(self) -> None:
        self.engine.leave(self.open)
        self._count(_GONE)  # unless it was counted

    def _count(self, status: int) -> None:
        if not self.counted:
            self.counted = True
            self.metrics.requests.labels(self.endpoint, str(status), self.served_by).inc()
            self.metrics.latency.labels(self.served_by).observe(time.monotonic() - self.began)


class EventStream(StreamingResponse):
    """Server-sent events. left: the seconds that it may still take; a client that does not read until then is taken
    for one that went away. ended: called in any case, also when nothing was sent."""

    def __init__(self, content: AsyncIterator[str], left: Callable[[], float], ended: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._left, self._ended = left, ended

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        async def gone_or_late() -> Any:
            try:
                return await asyncio.wait_for(receive(), self._left() + _LAST_WORDS)
            except asyncio.TimeoutError:
                return {"type": "http.disconnect"}

        try:
            await super().__call__(scope, gone_or_late, send)
        finally:
            self._ended()


async def _all(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: ApiError) -> Response:
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def _no_route(request: Request, error: HTTPException) -> Response:
    refused = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", "no_such_route")
    return JSONResponse(refused.body(), error.status_code, headers=error.headers)


async def _defect(_: Request, error: Exception) -> Response:
    return JSONResponse(_unexpected(error).body(), 500)


def _unexpected(error: Exception) -> ApiError:
    logger.error("unexpected error", exc_info=error)
    return ApiError(500, f"unexpected {type(error).__name__}", "internal_error")
