"""The HTTP server of a simulated pod: the endpoints of an OpenAI-compatible server that a router uses, without a model.

Token ids are the UTF-8 bytes of a text. A message is the id of its role, its content, and the id of the end
(:mod:`kvindex.sim.tokenizer`). An answer is made up, and is the same for the same prompt.
``usage.prompt_tokens_details.cached_tokens`` is the true hit of the cache. The addresses of the event streams are
published as the form's engine does it: ``/kv_event_sources`` of vLLM, ``/server_info`` of SGLang. The server needs the
extra ``sim`` (``pip install 'kvindex[sim]'``).
"""

from __future__ import annotations

import json
import random
import socket
import threading
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from itertools import count
from typing import Any

import numpy as np

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise ImportError("an HTTP server needs starlette and uvicorn: pip install 'kvindex[sim]'") from None

from .tokenizer import chat_ids, text_ids

__all__ = ["HttpServer"]

_WORDS = ("the", "cache", "holds", "a", "prefix", "of", "this", "prompt", "and", "reads", "what", "is", "new")
_LONGEST = 1 << 20


class _Refused(Exception):
    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def _answer(ids: list[int], tokens: int) -> str:
    """A text of ``tokens`` token ids, the same for the same prompt."""
    rng = random.Random(zlib.crc32(np.array(ids, dtype="<u4").tobytes()))
    text = ""
    while len(text) < tokens:
        text += rng.choice(_WORDS) + " "
    return text[:tokens]


class HttpServer:
    """The server, in a thread of its own. ``ask(op, ...)`` sends a request to the pod, and is safe from any thread.

    ``facts`` is the map of the pod's :meth:`SimPod.ready`. ``url`` is the server's address.
    """

    def __init__(self, facts: Mapping[str, Any], ask: Callable[..., dict[str, Any]], host: str, port: int) -> None:
        self._facts, self._ask, self._numbers = facts, ask, count(1)
        self._socket = socket.create_server((host, port))
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        told = Route("/kv_event_sources", self._sources)
        if facts["options"]["engine"] == "sglang":
            told = Route("/server_info", self._server_info)
        app = Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                told,
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/v1/tokenize", self._tokenize, methods=["POST"]),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ],
            exception_handlers={_Refused: _refusal},
        )
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", access_log=False))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the server, and cut off the requests that are being served."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(5.0)
        self._socket.close()

    async def _health(self, _: Request) -> Response:
        return Response()

    async def _models(self, _: Request) -> Response:
        model = {"id": self._facts["model"], "object": "model", "max_model_len": _LONGEST}
        return JSONResponse({"object": "list", "data": [model]})

    async def _sources(self, _: Request) -> Response:
        return JSONResponse(
            [
                {"data_parallel_rank": rank, "endpoint": endpoint, "replay_endpoint": replay, "topic": None}
                for rank, (endpoint, replay) in self._facts["ranks"].items()
            ]
        )

    async def _server_info(self, _: Request) -> Response:
        ranks = self._facts["ranks"]
        publishers = [
            {"dp_rank": rank, "endpoint": endpoint, "replay_endpoint": replay}
            for rank, (endpoint, replay) in ranks.items()
        ]
        return JSONResponse(
            {
                "served_model_name": self._facts["model"],
                "is_hybrid_swa": self._facts["options"]["hybrid"],
                "kv_events_config": json.dumps({"publisher": "zmq", "endpoint": ranks[0][0]}),
                "kv_events": {
                    "block_size": self._facts["block_size"], "dp_size": len(ranks), "publishers": publishers,
                },
            }
        )  # fmt: skip

    async def _tokenize(self, request: Request) -> Response:
        ids = _prompt(await _body(request))
        return JSONResponse({"count": len(ids), "max_model_len": _LONGEST, "tokens": ids})

    async def _complete(self, request: Request) -> Response:
        body = await _body(request)
        chat = request.url.path == "/v1/chat/completions"
        if chat != ("messages" in body):
            raise _Refused("a chat has messages, and a completion a prompt")
        ids = _prompt(body)
        wanted = body.get("max_completion_tokens", body.get("max_tokens", 16))
        if not isinstance(wanted, int) or not 0 < wanted <= 65536:
            raise _Refused(f"max_tokens is {wanted!r}; it must be 1 to 65536")
        if not ids:
            raise _Refused("the prompt is empty")
        model = body.get("model", self._facts["model"])
        if model != self._facts["model"] and not str(model).startswith("adapter-"):
            raise _Refused(f"no model {model!r}; there is {self._facts['model']!r}, and adapter-N", 404)
        rank = request.headers.get("x-data-parallel-rank", "0")
        if not rank.isdecimal() or int(rank) not in self._facts["ranks"]:
            raise _Refused(f"no data-parallel rank {rank!r}")
        text = _answer(ids, wanted)
        try:
            hit = (
                await run_in_threadpool(
                    self._ask,
                    "serve",
                    tokens=np.array(ids, dtype="<u4").tobytes(),
                    output=np.array(text_ids(text), dtype="<u4").tobytes(),
                    rank=int(rank),
                    lora_name=None if model == self._facts["model"] else model,
                    cache_salt=body.get("cache_salt"),
                )
            )["hit"]
        except ValueError as error:
            raise _Refused(str(error)) from None
        usage = {
            "prompt_tokens": len(ids),
            "completion_tokens": wanted,
            "total_tokens": len(ids) + wanted,
            "prompt_tokens_details": {"cached_tokens": hit},
        }
        about = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self._facts['name']}-{next(self._numbers)}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        if body.get("stream"):
            with_usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return StreamingResponse(_stream(about, text, usage, chat, with_usage), media_type="text/event-stream")
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        return JSONResponse({**about, "choices": [{"index": 0, "finish_reason": "length", **said}], "usage": usage})


async def _stream(about: dict[str, Any], text: str, usage: Any, chat: bool, with_usage: bool) -> AsyncIterator[str]:
    if chat:
        about = {**about, "object": about["object"] + ".chunk"}
        first = {"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}}
        yield f"data: {json.dumps({**about, 'choices': [first]})}\n\n"
    for at, letter in enumerate(text):
        said: dict[str, Any] = {"delta": {"content": letter}} if chat else {"text": letter}
        choice = {"index": 0, "finish_reason": "length" if at == len(text) - 1 else None, **said}
        yield f"data: {json.dumps({**about, 'choices': [choice]})}\n\n"
    if with_usage:
        yield f"data: {json.dumps({**about, 'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise _Refused("the request is not JSON") from None
    if not isinstance(body, dict):
        raise _Refused("the request is not a JSON object")
    return body


def _prompt(body: dict[str, Any]) -> list[int]:
    prompt = body.get("prompt")
    try:
        if "messages" in body:
            return chat_ids(body["messages"], bool(body.get("add_generation_prompt", True)))
        if isinstance(prompt, str):
            return text_ids(prompt)
    except ValueError as error:
        raise _Refused(str(error)) from None
    if isinstance(prompt, list) and all(type(token) is int and 0 <= token < 2**32 for token in prompt):
        return prompt
    raise _Refused("prompt must be a text or a list of token ids")


async def _refusal(_: Request, refused: Any) -> Response:
    error = {"message": str(refused), "type": "invalid_request_error", "code": refused.status}
    return JSONResponse({"error": error}, status_code=refused.status)
