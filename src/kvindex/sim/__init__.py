"""A simulated fleet: engines that allocate, share, evict and publish as the real ones do, and report their true hits.

- :class:`Engine` is one worker's paged KV cache; :meth:`Engine.hit` is its own answer to a query.
- :func:`encode_batch` writes its events in any wire form of :data:`FORMS`.
- :func:`chat` and :func:`mooncake` produce the requests of users.
- :class:`Fleet` serves these requests with a routing policy and compares an index with every engine.
- :func:`write_sample` records such a run as a capture.

They use no clock, no socket and no thread, and all randomness comes from seeds: the same arguments give the same run.
"""

from .engine import Engine, Prompt, Request
from .fleet import (
    Comparison,
    Difference,
    Fleet,
    Pod,
    PrefixAware,
    RandomChoice,
    RoundRobin,
    Served,
)
from .process import SimConfig, SimPod, SimProcess
from .sample import KINDS, write_sample
from .wire import FORMS, Cleared, Event, Removed, Stored, WireForm, encode_batch, wire_form
from .workload import Arrival, chat, endless_hit_rate, mooncake

__all__ = [
    "FORMS",
    "KINDS",
    "Arrival",
    "Cleared",
    "Comparison",
    "Difference",
    "Engine",
    "Event",
    "Fleet",
    "Pod",
    "PrefixAware",
    "Prompt",
    "RandomChoice",
    "Removed",
    "Request",
    "RoundRobin",
    "Served",
    "SimConfig",
    "SimPod",
    "SimProcess",
    "Stored",
    "WireForm",
    "chat",
    "encode_batch",
    "endless_hit_rate",
    "mooncake",
    "wire_form",
    "write_sample",
]
