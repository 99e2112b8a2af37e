"""The traffic of ``kvindex serve --demo``: conversations through the service's own picks, and pods that are killed."""

from __future__ import annotations

import asyncio
import json
import logging
from itertools import cycle
from typing import Any

from ..errors import KVIndexError
from ..service import Service
from ..service.call import Refused
from ..service.requests import Finished, Pick
from ..sim.process import SimConfig, own_workload
from ..sim.workload import Arrival
from .demo import AWAY, MODEL, Fleet

__all__ = ["Traffic"]

log = logging.getLogger("kvindex.service")

# Seconds between two requests: enough traffic for the page, with little load on the machine.
PAUSE = 0.05


class Traffic:
    """Coroutines for ``service.background``. Each belongs to the event loop of the service."""

    def __init__(self, service: Service, fleet: Fleet, kill_every: float) -> None:
        self._v1, self._index, self._fleet, self._kill_every = service.v1, service.index, fleet, kill_every
        self._pods = {pod.name: pod for pod in fleet.pods}
        # The control socket of a pod takes one call at a time.
        self._turn = asyncio.Lock()

    async def requests(self) -> None:
        """Send conversations to the pods that the service picks; never ends."""
        for arrival in own_workload(SimConfig(salts=2)):
            async with self._turn:
                try:
                    await self._request(arrival)
                except Refused as refused:
                    log.debug("a request of the demo is left out: %s", refused)
                except KVIndexError as error:
                    log.warning("a request of the demo failed: %s", error)
            await asyncio.sleep(PAUSE)

    async def _request(self, arrival: Arrival) -> None:
        prompt = arrival.prompt
        up = [pod.name for pod in self._fleet.pods if pod.up]
        asked = Pick(tokens=prompt.tokens, model=MODEL, pods=up, cache_salt=prompt.cache_salt)  # type: ignore[arg-type]
        picked = json.loads(self._v1.pick(asked))
        cached = None
        try:
            cached = await asyncio.to_thread(self._pods[picked["pod"]].serve, arrival)
            # The page's query has no salt. The best example is a prompt that many pods hold.
            if prompt.cache_salt is None and self._holders(prompt.tokens) >= self._holders(self._v1.example):
                self._v1.example = prompt.tokens.tolist()
        finally:
            self._v1.finished(Finished(id=picked["id"], cached_tokens=cached))

    def _holders(self, tokens: Any) -> int:
        return len(self._index.match_prefix(tokens, model=MODEL))

    async def accidents(self) -> None:
        """Kill the pods in turn, and start each again after a while; never ends."""
        for pod in cycle(self._fleet.pods):
            await asyncio.sleep(self._kill_every)
            async with self._turn:
                pod.kill()
            log.info("%s is killed", pod.name)
            while not pod.up:
                await asyncio.sleep(AWAY)
                try:
                    await asyncio.wrap_future(self._fleet.start_again(pod))
                    pod.greet()
                except KVIndexError as error:
                    log.warning("%s is not started again: %s", pod.name, error)
            log.info("%s is started again, with an empty cache", pod.name)
