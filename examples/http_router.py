"""A whole router: OpenAI requests go to the engine at which they cost least. pip install 'kvindex[examples]'

    python examples/http_router.py --pods pods.yaml --model /models/llama

pods.yaml lists the pods with their addresses, and is followed as it changes. The model's directory has tokenizer.json
and chat_template.jinja; otherwise, take PromptEncoder(transformers.AutoTokenizer.from_pretrained(directory)). SIGTERM
lets the requests in flight end. An answer's headers name its pod, and the cached tokens that were expected.

With --workers 8 and KVINDEX_LOG=redis://10.0.0.9:6379, the workers share one subscription to the engines.
"""

import argparse
import asyncio
import json
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from tokenizers import Tokenizer

from kvindex import EventManager, KVIndexError, PrefixIndex
from kvindex.discovery import PodFile
from kvindex.metrics import KVIndexCollector
from kvindex.routing import EndpointPicker
from kvindex.text import PromptEncoder


class Router:
    def __init__(self, pods, model, block_size):
        self.pods, self.block_size, model = pods, block_size, Path(model)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.encoder = PromptEncoder(tokenizer, (model / "chat_template.jinja").read_text())
        self.healthy = set()
        self.app = FastAPI(lifespan=self.lifespan)
        self.app.post("/v1/chat/completions")(self.serve)
        self.app.post("/v1/completions")(self.serve)
        self.app.get("/v1/models")(self.models)
        self.app.get("/metrics")(self.metrics)
        self.app.get("/health")(lambda: Response(status_code=200 if self.healthy else 503))
        self.app.add_exception_handler(KVIndexError, refused)

    @asynccontextmanager
    async def lifespan(self, app):
        timeout, limits = httpx.Timeout(600, connect=2), httpx.Limits(max_connections=None)
        if log := os.environ.get("KVINDEX_LOG"):
            from kvindex.replication import ReplicatedIndex

            self.manager = ReplicatedIndex(log, fleet="router", block_size=self.block_size)
            self.index = self.manager.index
        else:
            self.index = PrefixIndex(block_size=self.block_size)
            self.manager = EventManager(self.index)
        with self.manager, PodFile(self.manager, self.pods):
            self.picker = EndpointPicker(self.index, self.manager)
            self.registry = CollectorRegistry()
            self.registry.register(KVIndexCollector(self.index, self.manager, self.picker))
            async with httpx.AsyncClient(timeout=timeout, limits=limits) as self.client:
                await asyncio.to_thread(self.manager.wait_until_current, 10.0)
                checks = asyncio.create_task(self.check_health())
                yield
                checks.cancel()

    async def check_health(self):
        async def check(name, source):
            try:
                well = (await self.client.get(f"{source.address}/health", timeout=2)).is_success
            except httpx.HTTPError:
                well = False
            (self.healthy.add if well else self.healthy.discard)(name)

        while True:
            await asyncio.gather(*(check(*each) for each in self.manager.pods().items()))
            await asyncio.sleep(1)

    async def serve(self, request: Request, body: dict[str, Any]):
        if request.url.path == "/v1/chat/completions":
            options = given(body, "chat_template_kwargs")
            ids = await asyncio.to_thread(self.encoder.encode_chat, body.get("messages"), body.get("tools"), **options)
        else:  # token ids, or a text: its tokens are without a BOS
            ids = body.get("prompt")
            ids = await asyncio.to_thread(self.encoder.encode, ids) if isinstance(ids, str) else ids
        tried = set()
        while choice := self.pick(ids, body, tried):
            pieces = self.forward(choice, len(ids), request, body)
            try:
                answer = await anext(pieces)
            except httpx.TransportError:  # nothing of an answer has come: another pod can give it
                tried.add(choice.pod)
                continue
            told = {"x-kvindex-pod": choice.pod, "x-kvindex-expected": str(choice.cached_tokens)}
            return StreamingResponse(pieces, answer.status_code, told, answer.headers.get("content-type"))
        raise HTTPException(503, "no pod is ready")

    def pick(self, ids, body, tried):
        sources, model = self.manager.pods(), body.get("model")
        served = {source.model for source in sources.values()}
        base, adapter = (model, None) if model in served else (next(iter(served), ""), model)
        ready = [name for name, source in sources.items() if source.model == base and name in self.healthy - tried]
        return self.picker.pick(ids, pods=ready, model=base, lora_name=adapter, cache_salt=body.get("cache_salt"))

    async def forward(self, choice, length, request, body):
        """The engine's answer, then the pieces of its body. The choice is finished, however that ends."""
        cached, rest = None, b""
        try:
            headers = {"x-data-parallel-rank": str(choice.rank)}
            if "authorization" in request.headers:
                headers["authorization"] = request.headers["authorization"]
            asked = given(body, "stream_options")
            if body.get("stream"):  # the last event has the usage: for us, where the client has not asked for it
                body = {**body, "stream_options": {**asked, "include_usage": True}}
            url = choice.address + request.url.path
            async with self.client.stream("POST", url, json=body, headers=headers) as answer:
                yield answer
                async for piece in answer.aiter_bytes():
                    self.picker.prefilled(choice)
                    *events, rest = (rest + piece).split(b"\n\n")
                    if usage := [event for event in events if b'"prompt_tokens"' in event]:
                        cached = cached_tokens(usage[-1].removeprefix(b"data:"), length)
                        if not asked.get("include_usage"):
                            events = [event for event in events if event not in usage]
                    yield b"".join(event + b"\n\n" for event in events)
                if not body.get("stream"):
                    cached = cached_tokens(rest, length)
                yield rest
        finally:
            self.picker.finished(choice, cached)

    def models(self):
        served = {source.model for source in self.manager.pods().values()}
        return {"object": "list", "data": [{"id": model, "object": "model"} for model in served]}

    def metrics(self):
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


def given(body, name):
    if not isinstance(found := body.get(name) or {}, dict):
        raise HTTPException(400, f"{name} must be an object")
    return found


def cached_tokens(answer, most):
    try:
        return min(max(int(json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"]), 0), most)
    except (ValueError, LookupError, TypeError):
        return None  # the engine does not say


def refused(request, error):
    return JSONResponse({"error": {"message": str(error), "type": type(error).__name__}}, 400)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pods", required=True, help="a YAML or JSON list of pods, with addresses")
    parser.add_argument("--model", required=True, help="directory with tokenizer.json and chat_template.jinja")
    parser.add_argument("--block-size", type=int, default=16, help="the engines' (%(default)s)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    return parser.parse_args()


def app():
    args = arguments()
    return Router(args.pods, args.model, args.block_size).app


if __name__ == "__main__":
    args = arguments()
    uvicorn.run(
        f"{Path(__file__).stem}:app", factory=True, port=args.port, workers=args.workers, access_log=False,
        timeout_graceful_shutdown=60,
    )  # fmt: skip
