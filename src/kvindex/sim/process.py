"""A simulated pod as a process of its own: engines that serve, publishers of their events, and a control socket.

:class:`SimPod` runs inside the process (``kvindex sim``); :class:`SimProcess` starts, asks, pauses and kills the
process from outside. The pod reports its true hits, so a test, a demo or a harness can compare an index with it over
any network.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt
import zmq
import zmq.auth

from ..errors import InvalidValueError
from .control import Control, Teller, ToldProcess
from .engine import Engine, Prompt, Request
from .publisher import Faults, Publisher, offset_port, topic_in_replay
from .wire import HashForm, encode_batch, wire_form
from .workload import Arrival, chat

__all__ = ["SimConfig", "SimPod", "SimProcess", "own_workload", "prompt_map", "prompt_of"]

Tokens = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimConfig:
    """Options of a simulated pod. Port 0 takes a free port; the port of rank r is r higher than that of rank 0."""

    name: str = "pod-0"
    model: str = "sim"
    form: str = "vllm-0.33.0"
    hashes: HashForm | None = None
    ranks: int = 1
    blocks: int = 4000
    block_size: int = 16
    window: int | None = None
    """Size of the window of a second, sliding-window group, in tokens; None: no such group."""
    window_block_size: int | None = None
    """Tokens per block of the window's group, a multiple of ``block_size``; None: the same."""
    window_interval: int | None = None
    """Keep only those of the window's blocks that a hit at a multiple of so many tokens needs; None: keep all."""
    hash_seed: str = ""
    offload_blocks: int = 0
    """Blocks of a second tier; 0: no second tier."""
    offload_medium: str = "CPU"
    offload_tokens: bool = False
    """Whether the second tier's events contain the tokens."""
    offload_keyless: bool = False
    """Whether events with tokens then leave out adapter, salt and extra keys, as connectors do."""
    lookahead: int = 0
    """Tokens behind each block that its hash covers: speculative decoding in vLLM 0.33; 1 for SGLang, as pairs."""
    eagle: bool = False
    """Speculative decoding as in vLLM before 0.33: the last matching block is not reused."""
    window_blocks: int | None = None
    """Blocks of the pool of SGLang's ``window``, whose evictions are in no event."""
    host: str = "127.0.0.1"
    port: int = 0
    replay_port: int | None = 0
    """None: no replay socket."""
    control_port: int = 0
    http: int | None = None
    """Port of the pod's OpenAI-compatible server (:mod:`kvindex.sim.http`); None: no server."""
    connect: str | None = None
    """An endpoint that the pod connects to instead of binding ``port``."""
    topic: str | None = None
    """None: ``kv@NAME@MODEL``."""
    buffer_steps: int = 10_000
    rate: float = 0.0
    """Requests a second that the pod serves by itself; 0: only the requests that it gets."""
    concurrent: int = 4
    """Requests that are being served at a time."""
    seed: int = 0
    """Seed of the workload; pods with the same seed serve the same conversations."""
    adapters: int = 0
    """Number of LoRA adapters in the workload, beside the base model."""
    salts: int = 0
    """Number of cache salts in the workload, beside requests without a salt."""
    curve: str | None = None
    """File of a CURVE certificate with a secret key, from ``zmq.auth.create_certificates``. With it the pod encrypts
    its streams, and the line it prints has the public key."""
    server_key: str | None = None
    """CURVE public key of the endpoint that the pod connects to; None: an endpoint without encryption."""

    def keys(self) -> tuple[bytes | None, bytes | None]:
        """(public, secret) of ``curve``. Raises :class:`InvalidValueError` where the file has no secret key."""
        if self.curve is None:
            return None, None
        try:
            public, secret = zmq.auth.load_certificate(self.curve)
        except (OSError, ValueError) as error:
            raise InvalidValueError(f"{self.curve} is not a CURVE certificate: {error}") from None
        if secret is None:
            raise InvalidValueError(f"{self.curve} has no secret key: name the .key_secret file of the pair")
        return public, secret


def own_workload(config: SimConfig) -> Iterator[Arrival]:
    """The endless workload that a pod serves by itself. It is the same at every call."""
    adapters = [None, *(f"adapter-{number}" for number in range(1, config.adapters + 1))]
    salts = [None, *(f"salt-{number}" for number in range(1, config.salts + 1))]
    for cycle in count():
        yield from chat(
            conversations=32, turns=4, system_tokens=256, rate=8.0, seed=config.seed * 1000 + cycle, adapters=adapters,
            salts=salts,
        )  # fmt: skip


class SimPod:
    """One pod: an engine and a publisher per rank, its own workload, and the control socket.

    :meth:`run` is the loop of the process, :meth:`step` one turn of it. For one thread.
    """

    def __init__(self, config: SimConfig) -> None:
        if config.ranks < 1 or config.blocks < 1 or config.rate < 0 or config.concurrent < 1:
            raise InvalidValueError(f"ranks, blocks and concurrent must be positive and rate not negative: {config}")
        self.config = config
        self.form = wire_form(config.form, config.hashes)
        self.requests = 0
        self.rate = config.rate
        self.stopping = False
        self._public_key, self._secret_key = config.keys()
        self._context: zmq.Context[Any] = zmq.Context()
        self._engines = [self._engine() for _ in range(config.ranks)]
        self._running: list[deque[tuple[Request, Tokens]]] = [deque() for _ in range(config.ranks)]
        try:
            self._publishers = [self._publisher(rank) for rank in range(config.ranks)]
            self._control = Control(self._context, self, config.host, config.control_port)
        except BaseException:
            self._context.destroy(linger=0)  # also closes the sockets opened so far
            raise
        self._poller = zmq.Poller()
        self._poller.register(self._control.socket, zmq.POLLIN)
        self._watch()
        self._workload = own_workload(config)
        self._next_request = time.monotonic()
        for rank in range(config.ranks):
            self._flush(rank)
        self._http: Any = None
        if config.http is not None:
            try:
                from .http import HttpServer

                self._teller = Teller(self._context, self._control.endpoint)
                self._http = HttpServer(self.ready(), self._teller.ask, config.host, config.http)
            except BaseException:
                self._context.destroy(linger=0)
                raise

    def _engine(self) -> Engine:
        config = self.config
        return Engine(
            config.blocks,
            config.block_size,
            flavor=self.form.engine,
            hash_seed=config.hash_seed.encode(),
            window=config.window,
            window_block_size=config.window_block_size,
            window_interval=config.window_interval,
            offload_blocks=config.offload_blocks,
            offload_medium=config.offload_medium,
            offload_tokens=config.offload_tokens,
            offload_keyless=config.offload_keyless,
            lookahead=config.lookahead,
            eagle=config.eagle,
            window_blocks=config.window_blocks,
        )

    def _publisher(self, rank: int) -> Publisher:
        config = self.config
        topic = f"kv@{config.name}@{config.model}" if config.topic is None else config.topic
        own = offset_port(f"tcp://{config.host}:{config.port or '*'}", rank)
        answers = None
        if config.replay_port is not None:
            answers = offset_port(f"tcp://{config.host}:{config.replay_port or '*'}", rank)
        return Publisher(
            self._context, config.connect or own, answers, topic=topic, buffer_steps=config.buffer_steps,
            with_topic=topic_in_replay(config.form), connect=config.connect is not None,
            secret_key=self._secret_key, server_key=None if config.server_key is None else config.server_key.encode(),
        )  # fmt: skip

    def _watch(self) -> None:
        for publisher in self._publishers:
            if publisher.router is not None:
                self._poller.register(publisher.router, zmq.POLLIN)

    def ready(self) -> dict[str, Any]:
        """The pod's addresses and options, for the process that started it."""
        return {
            "name": self.config.name,
            "model": self.config.model,
            "block_size": self.config.block_size,
            "options": self._engines[0].options,
            "ranks": {
                rank: [None if self.config.connect else publisher.endpoint, publisher.replay_endpoint]
                for rank, publisher in enumerate(self._publishers)
            },
            "control": self._control.endpoint,
            "http": None if self._http is None else self._http.url,
            "pid": os.getpid(),
            "server_key": None if self._public_key is None else self._public_key.decode(),
        }

    # Serving

    def serve(self, prompt: Prompt, output: Tokens, rank: int, *, finish: bool = True) -> int:
        """Serve one request, and return the number of its tokens that were cached already."""
        engine, running = self._engines[rank], self._running[rank]
        while (request := engine.start(prompt)) is None:
            if not running:
                raise InvalidValueError(
                    f"a prompt of {len(prompt)} tokens does not fit into {self.config.blocks} blocks"
                )
            self._finish(rank)
        self.requests += 1
        self._flush(rank)
        running.append((request, output))
        while running and (finish or len(running) > self.config.concurrent):
            self._finish(rank)
        return request.hit

    def _finish(self, rank: int) -> None:
        engine = self._engines[rank]
        request, output = self._running[rank].popleft()
        if len(output):
            engine.decode(request, output)
        self._flush(rank)
        engine.finish(request)
        self._flush(rank)

    def _flush(self, rank: int) -> None:
        events = self._engines[rank].take_events()
        if events:
            self._publishers[rank].publish(encode_batch(events, self.form, ts=time.time(), dp_rank=rank))

    def serve_next(self) -> None:
        """Serve the next request of the pod's own workload."""
        arrival = next(self._workload)
        self.serve(arrival.prompt, arrival.output, self.requests % self.config.ranks, finish=False)

    # The process

    def step(self, longest: float = 1.0) -> None:
        """Wait for work, at most ``longest`` seconds, and do it."""
        now = time.monotonic()
        waits = [longest, *(wait for wait in [publisher.serve() for publisher in self._publishers] if wait is not None)]
        if self.rate > 0:
            waits.append(max(0.0, self._next_request - now))
        for sock, _ in self._poller.poll(math.ceil(min(waits) * 1000)):
            if sock is self._control.socket:
                self._control.answer()
        now = time.monotonic()
        while self.rate > 0 and self._next_request <= now:
            self.serve_next()
            # Requests that are more than 0.1 seconds late are left out, so a paused process does not burst.
            self._next_request = max(self._next_request + 1.0 / self.rate, now - 0.1)

    def run(self) -> None:
        """Serve until a request to stop arrives, or until the parent process is gone."""
        while not self.stopping:
            self.step()
        self.close()

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._teller.close()
        for publisher in self._publishers:
            publisher.close()
        self._control.close()
        self._context.term()

    # Operations of the control socket

    def _op_status(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "seqs": {rank: publisher.seq for rank, publisher in enumerate(self._publishers)},
            "blocks": {rank: engine.cached_blocks for rank, engine in enumerate(self._engines)},
            "replays": {rank: publisher.replays for rank, publisher in enumerate(self._publishers)},
        }

    def _op_truths(self, prompts: list[dict[str, Any]]) -> dict[str, Any]:
        hits, media = [], []
        tiers = ["GPU"] if not self.config.offload_blocks else ["GPU", self.config.offload_medium]
        for item in prompts:
            prompt = prompt_of(item)
            hits.append({rank: engine.hit_prompt(prompt) for rank, engine in enumerate(self._engines)})
            media.append({tier: max(engine.held_prompt(prompt, tier) for engine in self._engines) for tier in tiers})
        return {"hits": hits, "media": media, "seqs": self._op_status()["seqs"]}

    def _op_serve(
        self, tokens: bytes, output: bytes = b"", rank: int = 0, lora_name: str | None = None,
        lora_id: int | None = None, cache_salt: str | None = None, extra_keys: list[Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        prompt = Prompt(
            np.frombuffer(tokens, dtype="<u4"), lora_name=lora_name, lora_id=lora_id, cache_salt=cache_salt,
            extra_keys=extra_keys,
        )  # fmt: skip
        hit = self.serve(prompt, np.frombuffer(output, dtype="<u4").astype(np.uint32), rank)
        return {"hit": hit, "seqs": self._op_status()["seqs"]}

    def _op_run(self, requests: int) -> dict[str, Any]:
        for _ in range(requests):
            self.serve_next()
        return self._op_status()

    def _op_rate(self, rate: float) -> dict[str, Any]:
        self.rate = rate
        self._next_request = time.monotonic()
        return self._op_status()

    def _op_fault(self, rank: int | None = None, **what: Any) -> dict[str, Any]:
        known = {each.name for each in fields(Faults)}
        if strange := set(what) - known:
            raise InvalidValueError(f"no faults {sorted(strange)}; there are {sorted(known)}")
        for number, publisher in enumerate(self._publishers):
            if rank in (None, number):
                for name, value in what.items():
                    setattr(publisher.faults, name, value)
        return {"faults": [asdict(publisher.faults) for publisher in self._publishers]}

    def _op_reset(self, offloaded: bool = True) -> dict[str, Any]:
        done = []
        for rank, engine in enumerate(self._engines):
            while self._running[rank]:
                self._finish(rank)
            done.append(engine.reset(offloaded=offloaded))
            self._flush(rank)
        return {"reset": done}

    def _op_restart(self) -> dict[str, Any]:
        for publisher in self._publishers:
            if publisher.router is not None:
                self._poller.unregister(publisher.router)
            publisher.restart()
        self._watch()
        self._engines = [self._engine() for _ in range(self.config.ranks)]
        for rank, running in enumerate(self._running):
            running.clear()
            self._flush(rank)
        return self.ready()

    def _op_stop(self) -> dict[str, Any]:
        self.stopping = True
        return {}


class SimProcess(ToldProcess):
    """The parent's handle of a ``kvindex sim`` process, which keeps its ports when it is started again.

    ``options`` are the fields of a :class:`SimConfig`; the rest is as for a :class:`ToldProcess`.
    """

    #: The arguments of Python before the options. A harness may put a pod of its own here.
    program: Sequence[str] = ("-c", "import sys; from kvindex.cli.sim import main; sys.exit(main())")

    def __init__(
        self, config: SimConfig | None = None, *, timeout: float = 20.0, prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.config = config or SimConfig(**options)
        super().__init__(self.config.name, [], timeout=timeout, prefix=prefix, env=env)

    def launch(self) -> None:
        """Start the process, at the ports of this object's earlier process."""
        config = self.config
        options = ["--follow-parent"]
        for each in fields(config):
            value = getattr(config, each.name)
            option = f"--{each.name.replace('_', '-')}"
            if value is None:
                options += ["--no-replay"] if each.name == "replay_port" else []
            elif not isinstance(value, bool):
                options.append(f"{option}={value}")
            elif value:
                options.append(option)
        self._command = [sys.executable, *self.program, *options]
        super().launch()
        ports = {}
        if self.ready["control"].startswith("tcp://"):
            ports["control_port"] = _port(self.ready["control"])
        if self.url is not None:
            ports["http"] = _port(self.url)
        endpoint, answers = self.ready["ranks"]["0"]
        # The free ports of several ranks need not be consecutive, and only consecutive ports can be requested again.
        if endpoint and config.ranks == 1:
            ports["port"] = _port(endpoint)
        if answers and config.ranks == 1:
            ports["replay_port"] = _port(answers)
        self.config = SimConfig(**{**asdict(config), **ports})

    @property
    def options(self) -> dict[str, Any]:
        """The facts about the engine that its events lack: fields of a :class:`PodSource`."""
        found: dict[str, Any] = self.ready["options"]
        return found

    @property
    def ranks(self) -> dict[int, tuple[str, str | None]]:
        """Endpoint and replay endpoint of every rank, as a :class:`PodSource` takes them."""
        return {int(rank): (pair[0], pair[1]) for rank, pair in self.ready["ranks"].items()}

    @property
    def url(self) -> str | None:
        """Address of the pod's OpenAI-compatible server, with ``SimProcess(http=0)``."""
        found: str | None = self.ready.get("http")
        return found

    def truth(self, tokens: npt.ArrayLike, **context: Any) -> dict[int, int]:
        """The number of tokens of the prompt that each rank would reuse."""
        found: dict[int, int] = self.truths([Prompt(tokens, **context)])["hits"][0]
        return found

    def truths(self, prompts: Iterable[Prompt]) -> dict[str, Any]:
        """The true answers to many prompts at one moment.

        The map has the lists ``hits``, as :meth:`truth` returns them, and ``media`` (tokens held by tier, of the best
        rank). ``seqs`` is the next sequence number of every rank at that moment.
        """
        return self.ask("truths", prompts=[prompt_map(prompt) for prompt in prompts])

    def serve(self, tokens: npt.ArrayLike, output: npt.ArrayLike = (), **context: Any) -> dict[str, Any]:
        """Serve one request to its end."""
        return self.ask(
            "serve", tokens=np.asarray(tokens, dtype="<u4").tobytes(),
            output=np.asarray(output, dtype="<u4").tobytes(), **context,
        )  # fmt: skip

    def seqs(self) -> Mapping[int, int]:
        """The next sequence number of every rank."""
        found: dict[int, int] = self.ask("status")["seqs"]
        return found


def prompt_map(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a map for the control socket."""
    return {
        "tokens": np.asarray(prompt.tokens, dtype="<u4").tobytes(),
        "lora_name": prompt.lora_name,
        "lora_id": prompt.lora_id,
        "cache_salt": prompt.cache_salt,
        "extra_keys": prompt.extra_keys,
    }


def prompt_of(item: Mapping[str, Any]) -> Prompt:
    """The inverse of :func:`prompt_map`."""
    return Prompt(
        np.frombuffer(item["tokens"], dtype="<u4"), lora_name=item.get("lora_name"), lora_id=item.get("lora_id"),
        cache_salt=item.get("cache_salt"), extra_keys=item.get("extra_keys"),
    )  # fmt: skip


def _port(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])
