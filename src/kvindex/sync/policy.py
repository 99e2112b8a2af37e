"""The times and bounds of a stream."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["StreamPolicy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPolicy:
    """Timeouts and limits of a stream, in seconds unless noted. The defaults are for engines in one data centre."""

    replay_timeout: float = 2.0
    """Time for a replay endpoint to accept a request, and for its answer to begin; then it counts as a failed try. vLLM
    handles requests every 100 ms; 98 to 528 ms were recorded."""
    replay_patience: tuple[float, float] = (60.0, 600.0)
    """Time until an accepted but unanswered request is sent again: first and longest. The publisher may serve other
    readers first; the answer counts whenever it arrives."""
    replay_pause: float = 0.5
    """Pause within a replay after which the rest is requested again. It doubles each time that it was too short."""
    replay_deadline: float = 60.0
    """Maximum duration of one replay from its first batch."""
    replay_surplus: int = 1000
    """Number of batches of one replay that may repeat earlier ones before it is aborted."""
    replay_confirm: int = 256
    """Number of batches from which the end of an answer is requested again: a ROUTER socket drops messages beyond its
    queue (1,000)."""
    replay_tries: int = 3
    """Number of ``replay_timeout`` periods without an answer. Then the gap is accepted if the endpoint is unreachable;
    if the stream is silent as well, it is stale."""
    hole_tries: int = 2
    """Number of requests for a gap that the publisher answers without filling it, before the gap is accepted."""
    replay_retry: tuple[float, float] = (0.1, 5.0)
    """Back-off between replays: first and longest wait."""
    reconnect: tuple[float, float] = (1.0, 30.0)
    """Back-off between connections: first and longest wait, doubled each time."""
    jitter: float = 0.25
    """Largest random share that is added to each wait, so that a fleet does not reconnect at the same moment."""
    settled: float = 5.0
    """Duration of a connection after which the back-off starts again from its first wait."""
    idle_probe: tuple[float, float] = (0.5, 30.0)
    """Silence after which a stream asks whether it has missed the last batch: first and longest wait. Each live batch
    resets it."""
    silence: float = 0.5
    """Silence of the publisher after which a replay counts without a live batch that confirms it. The first live batch
    shows whether the replay endpoint belongs to another process, so a pod that publishes is not exact before it."""
    heal: tuple[float, float] = (2.0, 8.0)
    """Interval at which a degraded stream asks for its history again: first and longest."""
    renew: tuple[float, float] = (5.0, 600.0)
    """Interval at which a stream replaces an established connection that is of no use: its replays contradict it, or
    bring batches that it does not. First and longest, doubled each time until the stream is exact."""
    clock_step: float = 1.0
    """A batch that is older than the one before by more than this makes the stream check whether the process was
    restarted."""
    restart_rate: float = 1000.0
    """Maximum batches per second of an engine. It bounds the progress of a new process during a disconnection."""
    seq_jump: int = 1_000_000_000
    """A sequence number that is ahead by more than this is damaged: no outage loses so many batches."""
    max_pending: int = 10_000
    """Batches that may wait for a gap to be filled."""
    max_pending_bytes: int = 64 << 20
    """Bytes that may wait for a gap to be filled."""
    memory: int = 256
    """Fingerprints of applied batches that are kept, to distinguish duplicates from restarts."""
    burst: float = 2.0
    """Seconds of its rate limit that an idle pod saves up (:attr:`PodSource.max_event_rate`)."""
    max_conflicts: int = 3
    """Number of restarts found by replays within one connection before the replay endpoint is considered to belong to
    another process."""
