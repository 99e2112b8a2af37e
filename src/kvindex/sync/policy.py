"""The times and bounds of a stream."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StreamPolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPolicy:
    """Times in seconds, and bounds. The defaults are for engines in one data centre."""

    replay_timeout: float = 2.0
    """How long the replay endpoint may take to accept a request, and its answer to begin, before that counts as a try.
    vLLM looks for requests every 100 ms; recorded were 98 to 528 ms."""
    replay_patience: tuple[float, float] = (60.0, 600.0)
    """How long a request that the publisher has accepted stays open until it is sent anew: first and longest. Other
    readers may have their turn before; the answer counts whenever it comes."""
    replay_pause: float = 0.5
    """How long a replay that has begun may pause before its rest is asked for. Doubled each time that this
    was too short."""
    replay_deadline: float = 60.0
    """How long one replay may last from its first batch on."""
    replay_surplus: int = 1000
    """How many batches of one replay may repeat earlier ones before it is given up."""
    replay_confirm: int = 256
    """An answer of this many batches is asked for its end again: a ROUTER drops what its queue (1,000) does not
    take."""
    replay_tries: int = 3
    """How many times ``replay_timeout`` an unanswered replay is waited for. Then its hole is accepted if the endpoint
    is out of reach, and a stream that is silent besides is stale."""
    hole_tries: int = 2
    """How often a hole is asked for that the publisher answers without filling it, before it is accepted."""
    replay_retry: tuple[float, float] = (0.1, 5.0)
    """Back-off between replays: first and longest wait."""
    reconnect: tuple[float, float] = (1.0, 30.0)
    """Back-off between connections: first and longest wait, doubled each time."""
    jitter: float = 0.25
    """Waits grow by a random part of up to this share, so that a fleet does not come back in step."""
    settled: float = 5.0
    """A connection that lasted this long lets the next back-off start from the beginning."""
    idle_probe: tuple[float, float] = (0.5, 30.0)
    """How long a silent stream waits until it asks whether it has missed the end: first and longest wait. Each live
    batch starts with the first anew."""
    heal: tuple[float, float] = (2.0, 8.0)
    """How long a degraded stream waits until it asks whether its history can be had after all: first and longest."""
    clock_step: float = 1.0
    """A batch older than the one before by more than this makes the stream ask whether it is still the same process."""
    restart_rate: float = 1000.0
    """Batches a second that an engine publishes at most: bounds how far a new process can have got meanwhile."""
    seq_jump: int = 1_000_000_000
    """A sequence number further ahead than this is damage: no outage loses so many batches."""
    max_pending: int = 10_000
    """Batches that may wait for a hole to be filled."""
    max_pending_bytes: int = 64 << 20
    """Bytes that may wait for a hole to be filled."""
    memory: int = 256
    """Fingerprints of applied batches that are kept. One would do; more tell duplicates from restarts."""
    burst: float = 2.0
    """How many seconds of its limit a silent pod saves up (:attr:`PodSource.max_event_rate`)."""
    max_conflicts: int = 3
    """Restarts that replays claim within one connection before the replay endpoint counts as another process's."""
