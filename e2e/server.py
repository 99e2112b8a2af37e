"""The process with an index: it follows pods, answers queries about them, and routes requests to them.

``python -m e2e.server`` is an index process and a router process at once, like a router that embeds the library. The
methods of its handle, :class:`e2e.fleet.IndexProcess`, send the requests that are answered here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import zmq

from kvindex import EventManager, PodSource, PrefixIndex
from kvindex.sim import PrefixAware, Prompt, wire_form
from kvindex.sim.control import Control, follow_parent
from kvindex.sim.process import prompt_map, prompt_of
from kvindex.sync.policy import StreamPolicy


class Target:
    """A pod for the routing policy: its name, its release's names of adapters, and the tokens that it was given."""

    load = 0  # one request at a time, served to its end

    def __init__(self, name: str, model: str, form: str, control: zmq.Socket[bytes]) -> None:
        self.name = name
        self.model = model
        self.form = wire_form(form)
        self.control = control
        self.served = 0

    def lora_name(self, prompt: Prompt) -> str | None:
        if self.form.says("lora_name"):
            return prompt.lora_name
        return str(prompt.lora_id) if prompt.lora_id else None


class Server:
    def __init__(self, args: argparse.Namespace) -> None:
        if args.snapshot and Path(args.snapshot).exists():
            self.index = PrefixIndex.load(args.snapshot)
        else:
            self.index = PrefixIndex(args.block_size)
        policy = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(args.policy).items()}
        self.context: zmq.Context[Any] = zmq.Context()
        self.control = Control(self.context, self, args.host)
        self.manager = EventManager(self.followed(), policy=StreamPolicy(**policy), heartbeat=args.heartbeat)
        self.manager.start()
        self.targets: dict[str, Target] = {}
        self.stopping = False

    def followed(self) -> Any:
        """The index for the manager. A harness may return a wrapper that sees all applied batches."""
        return self.index

    def run(self) -> None:
        print(json.dumps({"control": self.control.endpoint, "pid": os.getpid()}), flush=True)
        while not self.stopping:
            if self.control.socket.poll(500):
                self.control.answer()
        self.manager.close()
        for target in self.targets.values():
            target.control.close(0)
        self.control.close()
        self.context.term()

    # Pods

    def _op_follow(self, source: dict[str, Any], form: str, control: str) -> dict[str, Any]:
        made = PodSource.from_mapping(source)
        self.manager.add_pod(made)
        socket: zmq.Socket[bytes] = self.context.socket(zmq.REQ)
        socket.linger = 0
        # A killed pod never answers, so the socket must allow another request to its successor at the same port.
        socket.setsockopt(zmq.REQ_RELAXED, 1)
        socket.setsockopt(zmq.REQ_CORRELATE, 1)
        socket.connect(control)
        self.targets[made.name] = Target(made.name, made.model, form, socket)
        return {}

    def _op_forget(self, name: str) -> dict[str, Any]:
        self.manager.remove_pod(name)
        if name in self.targets:
            self._op_drain(name)
        return {}

    def _op_drain(self, name: str) -> dict[str, Any]:
        """Stop routing to a pod, but still follow its stream."""
        self.targets.pop(name).control.close(0)
        return {}

    # Questions

    def _applied(self) -> dict[str, dict[int, int]]:
        return {
            name: {rank: -1 if worker.last_seq is None else worker.last_seq for rank, worker in pod.workers.items()}
            for name, pod in self.manager.status().items()
        }

    def _op_match(
        self, prompts: list[dict[str, Any]], model: str, ready: list[str] | None = None, only_exact: bool = False
    ) -> dict[str, Any]:
        before = self._applied()
        answers = []
        seconds = []
        ready_pods = None if ready is None else self.index.pod_set(ready)
        for item in prompts:
            prompt = prompt_of(item)
            start = time.perf_counter()
            match = self.index.match_prefix(
                prompt.tokens, model=model, lora_name=prompt.lora_name, cache_salt=prompt.cache_salt,
                extra_keys=prompt.extra_keys, ready_pods=ready_pods, only_exact=only_exact,
            )  # fmt: skip
            seconds.append(time.perf_counter() - start)
            answers.append(
                {
                    pod: {
                        "tokens": tokens,
                        "ranks": dict(match[pod].ranks),
                        "media": dict(match[pod].media),
                        "state": match[pod].state,
                    }
                    for pod, tokens in match.tokens.items()
                }
            )
        return {"answers": answers, "seconds": seconds, "before": before, "after": self._applied()}

    def _op_route(self, prompts: list[dict[str, Any]], model: str, outputs: list[bytes], **options: Any) -> Any:
        """Send each prompt to the pod with the least to compute.

        Returns for each prompt the pod, the tokens that the index expected to be reused, and the reused tokens.
        """
        pods = [target for target in self.targets.values() if target.model == model]
        decide = PrefixAware(self.index, model=model, **options)
        routed = []
        for item, output in zip(prompts, outputs, strict=True):
            prompt = prompt_of(item)
            pod: Any = decide(prompt, pods)  # type: ignore[arg-type]
            match = self.index.match_prefix(
                prompt.tokens, model=model, lora_name=pod.lora_name(prompt), cache_salt=prompt.cache_salt,
            )  # fmt: skip
            told = match.tokens.get(pod.name, 0)
            hit = self._serve(pod, prompt, output)
            pod.served += len(prompt)
            routed.append([pod.name, told, hit])
        return {"routed": routed}

    def _serve(self, pod: Target, prompt: Prompt, output: bytes) -> int:
        import msgpack

        pod.control.send(msgpack.packb({"op": "serve", "output": output, **prompt_map(prompt)}))
        if not pod.control.poll(20_000):
            raise TimeoutError(f"{pod.name} does not answer")
        reply = msgpack.unpackb(pod.control.recv(), strict_map_key=False)
        if "error" in reply:
            raise ValueError(reply["error"])
        return int(reply["hit"])

    def _op_status(self) -> dict[str, Any]:
        return {name: status.as_dict() for name, status in self.manager.status().items()}

    def _op_stats(self) -> dict[str, Any]:
        """The figures of the index and of the process: resident bytes, threads, file descriptors."""
        process = psutil.Process()
        return {
            "index": self.index.stats(),
            "rss": process.memory_info().rss,
            "threads": threading.active_count(),
            "fds": process.num_fds(),
        }

    def _op_check(self) -> dict[str, Any]:
        """Verify every invariant of the index."""
        self.index._check()
        return {}

    def _op_save(self, path: str) -> dict[str, Any]:
        start = time.perf_counter()
        self.index.save(path)
        return {"bytes": Path(path).stat().st_size, "seconds": time.perf_counter() - start}

    def _op_stop(self) -> dict[str, Any]:
        self.stopping = True
        return {}


def main(make: Callable[[argparse.Namespace], Server] = Server) -> int:
    parser = argparse.ArgumentParser(prog="python -m e2e.server")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--policy", default="{}", help="fields of a stream's policy, as JSON")
    parser.add_argument("--heartbeat", type=float, default=0.7)
    parser.add_argument("--snapshot", help="to start from, where the file is there")
    server = make(parser.parse_args())

    def stop(*_: object) -> None:
        server.stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    follow_parent(stop)
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
