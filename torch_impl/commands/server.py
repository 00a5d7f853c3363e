"""The HTTP server of `losa serve`: transformers' handlers of OpenAI's API, for one model that is loaded already.

Requests cannot name another model, load code or change the server. Bad ones are answered with status 400 and OpenAI's
`{"error": {"message": …}}`. Needs the extra `serve`.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import uuid
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import jinja2
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from torch_impl.commands import requests
from torch_impl.commands.sampling import ASKED, COLDEST, AsAsked, Asked
from torch_impl.commands.stop_text import cut, cut_stream, read_answers_alone
from torch_impl.experiment.continued import stream_after, text_after

# What checks, chat templates and generation raise for requests that they cannot use.
BAD = (ValueError, TypeError, KeyError, IndexError, AttributeError, jinja2.TemplateError)


class _Manager(GenerateManager):  # type: ignore[misc]
    """Generates answers one after the other, each with the seed and the penalties of its request."""

    def generate_streaming(self, *given: Any, **named: Any) -> Any:
        ready = threading.Event()
        queue, streamer = super().generate_streaming(*_as_asked(ready, *given), **named)
        *_, inputs, config = given
        if config.continues:
            streamer._decode_stream = stream_after(inputs["input_ids"][0])
        ready.set()
        return queue, streamer

    async def generate_non_streaming(self, *given: Any, **named: Any) -> Any:
        ready = threading.Event()
        ready.set()
        text, count, ids = await super().generate_non_streaming(*_as_asked(ready, *given), **named)
        _, tokenizer, inputs, config = given
        return text_after(tokenizer, inputs["input_ids"][0], ids) if config.continues else text, count, ids


def _as_asked(ready: threading.Event, model: Any, tokenizer: Any, inputs: Any, config: Any) -> tuple[Any, ...]:
    """Return the arguments with a processor of the logits, as the request asks, among the inputs of `generate`."""
    own = LogitsProcessorList([AsAsked(config.asked, ready)])
    return model, tokenizer, {**inputs, "logits_processor": own}, config


class _State(GenerationState):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self._manager = _Manager()

    def get_manager(self, *_: Any, **__: Any) -> GenerateManager:
        return self._manager


class _OneModel:
    """What both handlers do in another way than transformers': one model, stricter checks, sampling by temperature."""

    continues: ClassVar[bool]
    """Whether the answer continues the text of the prompt."""

    def __init__(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: Any) -> None:
        # A class instead of a manager of models, because only its static method is used.
        super().__init__(ModelManager, state)  # type: ignore[call-arg]
        self.name, self.model, self.tokenizer = name, model, tokenizer

    def ids(self, body: dict[str, Any]) -> torch.Tensor:
        """Check what a request gives to continue; return its tokens (1, n)."""
        raise NotImplementedError

    async def answer(self, body: dict[str, Any], request_id: str) -> Response:
        """Check a request and compute the answer. Errors: those of BAD."""
        if body.get("model") not in (None, self.name):
            raise HTTPException(
                404, f"model {str(body['model'])[:80]!r} is not served here; the model is {self.name!r}"
            )
        requests.check_fields(body, self.model.config.get_text_config().vocab_size)
        requests.check_length(self.model, self.tokenizer, self.ids(body), body)
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
        # It follows the text that is cut.
        suffix = body.pop("suffix", "") if stops else ""
        response: Response = await self.handle_request(body, request_id)  # type: ignore[attr-defined]
        if isinstance(response, StreamingResponse):
            parts = response.body_iterator
            response.body_iterator = _ended(cut_stream(parts, stops, suffix) if stops else parts)
        elif stops:
            answer = json.loads(bytes(response.body))
            cut(answer, stops, suffix)
            response = JSONResponse(answer)
        return response

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
        return self.name, self.model, self.tokenizer

    def _build_generation_config(self, body: dict[str, Any], *arguments: Any, **options: Any) -> GenerationConfig:
        plain = {name: value for name, value in body.items() if name not in ASKED}
        config: Any = super()._build_generation_config(plain, *arguments, **options)  # type: ignore[misc]
        config.continues = self.continues
        config.asked = Asked(**{name: body[name] for name in ASKED if name in body})
        if "temperature" in body:
            # Some clients send 1e-8 for the likeliest token.
            config.do_sample = body["temperature"] >= COLDEST
        if not config.do_sample:
            # Settings of sampling that greedy decoding warns about.
            config.temperature = config.top_p = config.top_k = None
        elif config.top_k is None:
            # transformers would sample from the likeliest 50 alone.
            config.top_k = 0
        config.sequence_bias = {(int(token),): bias for token, bias in body.get("logit_bias", {}).items()} or None
        # Beams cannot be streamed.
        config.num_beams = 1
        return config  # type: ignore[no-any-return]


class _Chat(_OneModel, ChatCompletionHandler):  # type: ignore[misc]
    continues = False

    def ids(self, body: dict[str, Any]) -> torch.Tensor:
        return requests.chat_ids(self.tokenizer, body)


class _Completion(_OneModel, CompletionHandler):  # type: ignore[misc]
    continues = True

    def ids(self, body: dict[str, Any]) -> torch.Tensor:
        return requests.prompt_ids(self.tokenizer, body)


async def _ended(parts: Any) -> AsyncIterator[Any]:
    """Add the line with which OpenAI's streams end. If the client leaves, close the stream: that stops generation."""
    async with contextlib.aclosing(parts):
        async for part in parts:
            yield part
    yield "data: [DONE]\n\n"


def build(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> FastAPI:
    """Build the application. name: of the model, for clients.

    Errors: ValueError if the tokenizer is not a fast one, which streaming needs.
    """
    if not tokenizer.is_fast:
        raise ValueError("serving needs a fast tokenizer; save the model with its tokenizer.json")
    read_answers_alone(model)
    # Reads no documentation from elsewhere, and tells nobody the routes.
    app = FastAPI(title="losa serve", docs_url=None, redoc_url=None, openapi_url=None)
    state = _State()
    chat, completion = _Chat(name, model, tokenizer, state), _Completion(name, model, tokenizer, state)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: dict[str, Any]) -> Response:
        return await chat.answer(body, f"chatcmpl-{uuid.uuid4().hex}")

    @app.post("/v1/completions")
    async def completions(body: dict[str, Any]) -> Response:
        return await completion.answer(body, f"cmpl-{uuid.uuid4().hex}")

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "losa"}]}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    _answer_errors(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    """Answer errors in OpenAI's format."""

    def answer(status: int, message: str) -> JSONResponse:
        kind = "invalid_request_error" if status < 500 else "server_error"
        text = " ".join(message.split())[:1000]
        return JSONResponse({"error": {"message": text, "type": kind, "param": None, "code": None}}, status)

    def bad(request: Request, error: Exception) -> JSONResponse:
        words = f"unknown or missing key {error}" if isinstance(error, KeyError) else str(error)
        return answer(400, words or type(error).__name__)

    def malformed(request: Request, error: Exception) -> JSONResponse:
        return answer(400, "the body is not a JSON object; send one, with content-type application/json")

    def refused(request: Request, error: Any) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(500, f"{type(error).__name__}: {error}")

    for kind in BAD:
        app.add_exception_handler(kind, bad)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, refused)
    app.add_exception_handler(404, refused)
    app.add_exception_handler(405, refused)
    app.add_exception_handler(Exception, failed)


def run(app: FastAPI, listening: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM."""
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
