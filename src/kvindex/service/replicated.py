"""The calls that a service makes on a manager, answered by a :class:`~kvindex.replication.ReplicatedIndex`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ..sync.source import PodSource
from ..sync.status import PodsChange, PodStatus
from .call import Refused

__all__ = ["ReplicatedPods"]


class ReplicatedPods:
    """The pods of a log. The log's collector follows them, so pods cannot be added or removed here."""

    def __init__(self, view: Any) -> None:
        self.view = view

    def pods(self) -> dict[str, PodSource]:
        found: dict[str, PodSource] = self.view.pods()
        return found

    def status(self) -> dict[str, PodStatus]:
        found: dict[str, PodStatus] = self.view.pod_status()
        return found

    def on_pods(self, callback: Callable[[PodsChange], None]) -> Callable[[], None]:
        end: Callable[[], None] = self.view.on_pods(callback)
        return end

    def log(self) -> dict[str, Any]:
        """The role and the state of the log, for JSON."""
        return asdict(self.view.status())

    def refused(self) -> Refused:
        """Return the error that a registration gets."""
        return Refused(
            409, "replicated",
            f"this service follows the log of fleet {self.view.fleet!r}, which has the pods of its collector: change"
            " those of kvindex collect (--pods, --kubernetes)",
        )  # fmt: skip
