"""The router of vLLM's production-stack with kvindex in the place of its prefix-aware policy.

    python examples/production_stack.py --routing-logic prefixaware --service-discovery static \\
        --static-backends http://10.0.0.1:8000,http://10.0.0.2:8000 --static-models llama,llama --port 8080

production-stack has no interface for policies, so this program replaces its class before the start. It asks each
backend for the addresses of its events (vLLM 0.33 and later: /kv_event_sources), and one of them for token ids
(/tokenize). It needs vllm-router of the production-stack repository, which is not the package of that name, and pip
install 'kvindex[text]'.
"""

import asyncio
import logging
import time

from vllm_router.routers import routing_logic

from kvindex import EventManager, KVIndexError, PodSource, PrefixIndex
from kvindex.discovery import Reconciler
from kvindex.routing import EndpointPicker
from kvindex.text import RemoteEncoder

log = logging.getLogger("kvindex.examples")


class KVIndexRouter(routing_logic.PrefixAwareRouter):
    """The replacement. It is a subclass, because the router passes a request's body only to instances of that class."""

    def __init__(self):
        if hasattr(self, "picker"):  # the metaclass returns the same object again
            return
        super().__init__()
        self.index = PrefixIndex(block_size=16)
        self.manager = EventManager(self.index)
        # The router does not report the end of a request, so only recent picks count as load.
        self.picker = EndpointPicker(self.index, self.manager)
        self.pods = Reconciler(self.manager)
        self.sources, self.asked = {}, {}
        self.encoders = {}

    async def route_request(self, endpoints, engine_stats, request_stats, request, request_json):
        urls = [endpoint.url for endpoint in endpoints]
        choice = await asyncio.to_thread(self.choose, urls, request_json)
        return self._qps_routing(endpoints, request_stats) if choice is None else choice

    def choose(self, urls, body):
        """The URL with the lowest cost for the request; None where the index has no events."""
        try:
            for url in set(urls) - set(self.sources):
                if self.asked.get(url, 0) < time.monotonic() - 30:
                    self.asked[url] = time.monotonic()
                    self.sources[url] = PodSource.from_vllm(url, name=url, timeout=2.0)
            self.pods.reconcile({url: self.sources[url] for url in urls if url in self.sources})
            encoder = self.encoders.setdefault(urls[0], RemoteEncoder(urls[0], model=body.get("model")))
            if "messages" in body:
                tokens = encoder.encode_chat(body["messages"], body.get("tools"))
            else:
                prompt = body.get("prompt")
                tokens = encoder.encode(prompt) if isinstance(prompt, str) else prompt
            choice = self.picker.pick(tokens, pods=urls, model=body.get("model", ""), cache_salt=body.get("cache_salt"))
        except KVIndexError as error:
            log.warning("a request is balanced by load: %s", error)
            return None
        if choice is not None:
            self.picker.finished(choice)
        return choice and choice.pod


routing_logic.PrefixAwareRouter = KVIndexRouter

if __name__ == "__main__":
    from vllm_router.app import main

    main()
