"""A simulated pod that logs its true answers with every batch, before it publishes the batch.

``python -m chaos.pod`` has the options of ``kvindex sim``. The environment has the path of the log (``CHAOS_TRUTH``)
and of a control socket that works during faults of the network (``CHAOS_CONTROL``).
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np

from kvindex.cli.sim import main
from kvindex.sim import Arrival
from kvindex.sim.process import SimConfig, SimPod, SimProcess, own_workload
from kvindex.sim.publisher import Publisher
from kvindex.sim.wire import Cleared, encode_batch

from .logs import Writer, digest, probes, truth_dtype

#: Conversations repeat in a cache that cannot hold them all, so the true answers keep growing and shrinking.
WORKLOAD = 128


class LoggingPod(SimPod):
    def __init__(self, config: SimConfig) -> None:
        self._log = Writer(os.environ["CHAOS_TRUTH"], truth_dtype)
        self._probes = probes()
        self._lies = 0
        super().__init__(config)
        self._workload = self._again()
        path = os.environ["CHAOS_CONTROL"]
        if os.path.exists(path):
            os.unlink(path)
        self._control.socket.bind(f"ipc://{path}")

    def _again(self) -> Iterator[Arrival]:
        return itertools.cycle(itertools.islice(own_workload(self.config), WORKLOAD))

    def ready(self) -> dict[str, Any]:
        return {**super().ready(), "control": f"ipc://{os.environ['CHAOS_CONTROL']}"}

    def _flush(self, rank: int) -> None:
        engine = self._engines[rank]
        events = engine.take_events()
        if not events:
            return
        payload = encode_batch(events, self.form, ts=time.time(), dp_rank=rank)
        publisher = self._publishers[rank]
        record = np.zeros(1, dtype=truth_dtype)
        clear = any(isinstance(event, Cleared) for event in events)
        record[["at", "seq", "digest", "clear"]] = time.monotonic(), publisher.seq, digest(payload), clear
        record["hits"] = [engine.hit_prompt(prompt) for prompt in self._probes]
        self._log.write(record)
        if self._lies:
            self._lie(publisher)
        publisher.publish(payload)

    def _op_hostile(self) -> dict[str, Any]:
        """Publish an invalid message beside every batch from now on."""
        self._lies = 1
        return {}

    def _lie(self, publisher: Publisher) -> None:
        """Publish the next invalid message."""
        self._lies += 1
        dice = random.Random(self._lies)
        topic = f"kv@{self.config.name}@{self.config.model}".encode()
        seq = publisher.seq.to_bytes(8, "big")
        noise = dice.randbytes(dice.randrange(1, 4096))
        blocks = {"type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": None, "block_size": 16}
        frames: list[list[bytes]] = [
            [noise],
            [topic, seq],
            [topic, seq, b"", noise, noise],
            [topic, seq[1:], noise],
            [topic, seq, noise],
            [b"kv@another@sim", seq, noise],
            [topic, b"\xff" * 8, noise],
            [topic, seq, b"\x93\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff"],  # declares 4,294,967,295 events
            [topic, seq, b"\x92\xcb" + bytes(8) + b"\x91\xdf\xff\xff\xff\xff"],  # declares as many fields of one event
            [topic, seq, b"\x92\xcb" + bytes(8) + b"\x91\xc6\xff\xff\xff\xff"],  # declares as many bytes
            [topic, seq, b"\x91" * 200_000],
            [topic, seq, msgpack.packb([time.time(), [{**blocks, "token_ids": ["a", -1, 2**40]}]])],
            [topic, seq, msgpack.packb([time.time(), [{**blocks, "token_ids": list(range(32)), "block_size": 7}]])],
            [topic, seq, msgpack.packb([time.time(), [{**blocks, "parent_block_hash": 2, "token_ids": [1] * 32}]])],
            [topic, seq, msgpack.packb([time.time(), [{"type": "BlockRemoved", "block_hashes": list(range(5000))}]])],
            [topic, seq, msgpack.packb([time.time(), [{**blocks, "token_ids": list(range(32))}]])],
        ]  # fmt: skip
        publisher.send_raw(frames[self._lies % len(frames)])


class PodProcess(SimProcess):
    """The parent's handle of a :class:`LoggingPod`."""

    program = ("-m", "chaos.pod")


if __name__ == "__main__":
    sys.exit(main(make=LoggingPod))
