"""A complete router: OpenAI requests go to the engine with the lowest cost. pip install 'kvindex[examples]'

    python examples/http_router.py --pods pods.yaml --model /models/llama

pods.yaml lists the pods with their models and addresses; the router follows changes of the file. --lora sql=llama adds
a LoRA adapter of the model llama, which requests name as their model. The model's directory has tokenizer.json and
chat_template.jinja; otherwise, use PromptEncoder(transformers.AutoTokenizer.from_pretrained(directory)). After SIGTERM
the router completes the requests in flight. An answer's headers have its pod and the expected cached tokens.

With --workers 8 and KVINDEX_LOG=redis://10.0.0.9:6379, the workers share one subscription to the engines.
"""

import argparse
import asyncio
import json
import logging
import os
from contextlib import asynccontextmanager
from pathlib import Path

try:
    import httpx
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.responses import JSONResponse, StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from starlette.requests import ClientDisconnect
    from tokenizers import Tokenizer
except ImportError as error:
    raise SystemExit(f"{error}: pip install 'kvindex[examples]'") from None

from kvindex import EventManager, KVIndexError, PrefixIndex
from kvindex.discovery import PodFile, read_pods
from kvindex.metrics import KVIndexCollector
from kvindex.routing import EndpointPicker
from kvindex.text import PromptEncoder

log = logging.getLogger("kvindex.http_router")


class Router:
    def __init__(self, pods, model, block_size, adapters):
        self.pods, self.block_size, self.adapters, model = pods, block_size, adapters, Path(model)
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.encoder = PromptEncoder(tokenizer, (model / "chat_template.jinja").read_text())
        self.health = {}  # by pod: "", or the reason why it is not healthy
        self.app = FastAPI(lifespan=self.lifespan)
        self.app.post("/v1/chat/completions")(self.serve)
        self.app.post("/v1/completions")(self.serve)
        self.app.get("/v1/models")(self.list_models)
        self.app.get("/metrics")(self.metrics)
        self.app.get("/health")(self.ready)
        self.app.add_exception_handler(KVIndexError, refused)
        self.app.add_exception_handler(HTTPException, refused)

    @asynccontextmanager
    async def lifespan(self, app):
        timeout, limits = httpx.Timeout(600, connect=2), httpx.Limits(max_connections=None)
        if url := os.environ.get("KVINDEX_LOG"):
            from kvindex.replication import ReplicatedIndex

            self.manager = ReplicatedIndex(url, fleet="router", block_size=self.block_size)
            self.index = self.manager.index
        else:
            self.index = PrefixIndex(block_size=self.block_size)
            self.manager = EventManager(self.index)
        with self.manager, PodFile(self.manager, self.pods):
            self.picker = EndpointPicker(self.index, self.manager)
            self.registry = CollectorRegistry()
            self.registry.register(KVIndexCollector(self.index, self.manager, self.picker))
            async with httpx.AsyncClient(timeout=timeout, limits=limits) as self.client:
                self.current = asyncio.create_task(asyncio.to_thread(self.manager.wait_until_current, 10.0))
                checks = asyncio.create_task(self.check_health())
                yield
                checks.cancel()

    async def check_health(self):
        async def check(name, source):
            url, reason = f"{source.address}/health", ""
            try:
                if not (answer := await self.client.get(url, timeout=2)).is_success:
                    reason = f"health check failed: {url} answers {answer.status_code}"
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = f"health check failed: {url}: {type(error).__name__}"
            if bool(reason) != bool(self.health.get(name)):
                level = logging.WARNING if reason else logging.INFO
                log.log(level, "pod %s is %s", name, f"not healthy: {reason}" if reason else "healthy again")
            self.health[name] = reason

        while True:
            pods = self.manager.pods()
            await asyncio.gather(*(check(*each) for each in pods.items()))
            self.health = {name: self.health[name] for name in pods}
            await asyncio.sleep(1)

    def ready(self):
        """200 once a pod is healthy and the histories of all pods are read, or 10 s have passed."""
        return Response(status_code=200 if self.current.done() and "" in self.health.values() else 503)

    def models(self):
        """The models and adapters that requests may name, as {name: (model, adapter)}."""
        served = sorted({source.model for source in self.manager.pods().values()})
        adapters = {name: (model, name) for name, model in self.adapters.items() if model in served}
        return adapters | {model: (model, None) for model in served}

    async def serve(self, request: Request):
        body = await sent(request)
        model, adapter = self.named(body.get("model"))
        if request.url.path == "/v1/chat/completions":
            options = given(body, "chat_template_kwargs")
            ids = await asyncio.to_thread(self.encoder.encode_chat, body.get("messages"), body.get("tools"), **options)
        else:  # token ids, or a text, which is encoded without a BOS
            ids = body.get("prompt")
            ids = await asyncio.to_thread(self.encoder.encode, ids) if isinstance(ids, str) else ids
        tried = {}
        while choice := self.pick(ids, model, adapter, body.get("cache_salt"), tried):
            pieces = self.forward(choice, len(ids), request, body)
            try:
                answer = await anext(pieces)
            except httpx.TransportError as error:  # no part of an answer has arrived, so another pod can serve it
                tried[choice.pod] = f"request failed: {type(error).__name__}"
                continue
            told = {"x-kvindex-pod": choice.pod, "x-kvindex-expected": str(choice.cached_tokens)}
            return StreamingResponse(pieces, answer.status_code, told, answer.headers.get("content-type"))
        why = self.manager.inexact() | {name: reason for name, reason in self.health.items() if reason} | tried
        why = "; ".join(f"{name}: {why.get(name, 'not checked yet')}" for name in self.serving(model))
        raise HTTPException(503, f"no pod of {model!r} is ready: {why}")

    def named(self, name):
        models = self.models()
        if not models:
            raise HTTPException(503, "there are no pods")
        if name is None and len(served := {model for model, _ in models.values()}) == 1:
            return served.pop(), None
        if not isinstance(name, str) or name not in models:
            raise HTTPException(404, f"no model {name!r}; there are {str(sorted(models))[1:-1]}")
        return models[name]

    def serving(self, model):
        return [name for name, source in self.manager.pods().items() if source.model == model]

    def pick(self, ids, model, adapter, cache_salt, tried):
        ready = [name for name in self.serving(model) if self.health.get(name) == "" and name not in tried]
        return self.picker.pick(ids, pods=ready, model=model, lora_name=adapter, cache_salt=cache_salt)

    async def forward(self, choice, length, request, body):
        """Yield the engine's answer, then the pieces of its body. The choice is finished in any case."""
        cached, rest = None, b""
        try:
            headers = {"x-data-parallel-rank": str(choice.rank)}
            if "authorization" in request.headers:
                headers["authorization"] = request.headers["authorization"]
            asked = given(body, "stream_options")
            if body.get("stream"):  # request the usage in the last event, even where the client does not
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

    def list_models(self):
        return {"object": "list", "data": [{"id": name, "object": "model"} for name in self.models()]}

    def metrics(self):
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


async def sent(request):
    """The JSON body of a request, of any content type."""
    try:
        if isinstance(body := await request.json(), dict):
            return body
    except (ValueError, RecursionError, ClientDisconnect):
        pass
    raise HTTPException(400, "the body must be a JSON object")


def given(body, name):
    if not isinstance(found := body.get(name) or {}, dict):
        raise HTTPException(400, f"{name} must be an object")
    return found


def cached_tokens(answer, most):
    try:
        return min(max(int(json.loads(answer)["usage"]["prompt_tokens_details"]["cached_tokens"]), 0), most)
    except (ValueError, LookupError, TypeError):
        return None  # the engine does not report it


def refused(request, error):
    """An error in OpenAI's format."""
    status, message = getattr(error, "status_code", 400), getattr(error, "detail", str(error))
    kind = "server_error" if status >= 500 else "invalid_request_error"
    code = "model_not_found" if status == 404 else None
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": code}}, status)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pods", required=True, help="a YAML or JSON list of pods, with models and addresses")
    parser.add_argument("--model", required=True, help="directory with tokenizer.json and chat_template.jinja")
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=MODEL", help="a LoRA adapter of MODEL")
    parser.add_argument("--block-size", type=int, default=16, help="the engines' (%(default)s)")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--workers", type=int, default=1, help="processes (%(default)s)")
    args = parser.parse_args()
    if wrong := [text for text in args.lora if not all(text.partition("="))]:
        parser.exit(2, f"--lora {wrong[0]}: name the adapter's model, as NAME=MODEL\n")
    try:
        for name, source in read_pods(args.pods).items():
            for field in ("model", "address"):
                if not getattr(source, field):
                    parser.exit(2, f"{args.pods}: pod {name!r} has no {field}\n")
        for file in ("tokenizer.json", "chat_template.jinja"):
            Path(args.model, file).read_bytes()
    except (KVIndexError, OSError) as error:
        parser.exit(2, f"{error}\n")
    return args


def app():
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kvindex").setLevel(logging.INFO)
    args = arguments()
    adapters = dict(text.split("=", 1) for text in args.lora)
    return Router(args.pods, args.model, args.block_size, adapters).app


if __name__ == "__main__":
    args = arguments()
    uvicorn.run(
        f"{Path(__file__).stem}:app", factory=True, port=args.port, workers=args.workers, access_log=False,
        timeout_graceful_shutdown=60,
    )  # fmt: skip
