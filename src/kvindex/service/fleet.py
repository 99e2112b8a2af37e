"""The pods of a manager as the service's callers name them: by model and routing group, as instances with ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from .._core import PodSet
from ..errors import UnknownPodError
from ..index import PrefixIndex
from ..sync.source import PodSource
from .call import Refused

__all__ = ["DEFAULT", "GROUP", "INSTANCE", "REGISTERED", "SALT", "TYPE", "Fleet", "Group", "Member"]

# Labels of a pod's source. A list of pods in a file may have them too.
INSTANCE: Final = "kvindex.io/instance"
GROUP: Final = "kvindex.io/routing-group"
REGISTERED: Final = "kvindex.io/registered"
TYPE: Final = "kvindex.io/type"
SALT: Final = "kvindex.io/additional-salt"

DEFAULT: Final = "default"


class Member(NamedTuple):
    """A pod as a part of an instance."""

    pod: str
    instance: str
    ranks: tuple[int, ...]
    source: PodSource


class Group:
    """The pods of one model and routing group."""

    def __init__(self, model: str, name: str) -> None:
        self.model, self.name = model, name
        self.members: dict[str, Member] = {}
        self.pods = PodSet(())
        self.instances: dict[str, list[Member]] = {}

    def add(self, member: Member) -> None:
        self.members[member.pod] = member
        self.instances.setdefault(member.instance, []).append(member)


class View(NamedTuple):
    groups: dict[tuple[str, str], Group]
    models: dict[str, PodSet]
    sources: dict[str, PodSource]


class Fleet:
    """The followed pods, arranged at the first request after a change. Any thread may call it."""

    def __init__(self, index: PrefixIndex, manager: Any) -> None:
        self._index, self._manager = index, manager
        self._changes = object()  # replaced after each change, by any thread
        self._known: tuple[object, View] | None = None
        manager.on_pods(self._changed)

    def _changed(self, _: object) -> None:
        self._changes = object()

    def view(self) -> View:
        """Return the arranged pods. O(1), and O(pods) after a change."""
        known = self._known
        if known is not None and known[0] == self._changes:
            return known[1]
        changes = self._changes
        sources = self._manager.pods()
        groups: dict[tuple[str, str], Group] = {}
        models: dict[str, list[str]] = {}
        for name, source in sources.items():
            group = source.labels.get(GROUP, DEFAULT)
            found = groups.setdefault((source.model, group), Group(source.model, group))
            found.add(Member(name, source.labels.get(INSTANCE, name), tuple(source.workers()), source))
            models.setdefault(source.model, []).append(name)
        for found in groups.values():
            found.pods = PodSet(found.members)
        view = View(groups, {model: PodSet(names) for model, names in models.items()}, sources)
        self._known = changes, view
        return view

    def model(self, given: str | None, field: str = "model") -> str:
        """Return the model that a request means. Raises :class:`Refused` if no pod serves it."""
        models = self.view().models
        if given is None:
            if len(models) == 1:
                return next(iter(models))
            raise Refused(
                400,
                "missing",
                f"{field} is missing, and {len(models)} models are served: {_listed(models)}",
                field=field,
            )
        if given not in models:
            raise Refused(
                404, "unknown", f"no pod serves {field} {given[:120]!r}; served are {_listed(models)}", field=field
            )
        return given

    def group(self, model: str, name: str) -> Group:
        """Return the pods of a model and routing group. Raises :class:`Refused` if the group does not exist."""
        found = self.view().groups.get((model, name))
        if found is None:
            raise Refused(
                404, "unknown", f"no indexer for model={model[:120]} routing_group={name[:120]}", field="model_name"
            )
        return found

    def state(self, pod: str) -> str:
        try:
            return self._index.pod_state(pod)
        except UnknownPodError:  # it has just been removed
            return "stale"

    def inexact(self, pods: Iterable[str]) -> dict[str, str]:
        """States of the pods whose part of an answer is not exact, also if the answer is that they hold nothing."""
        return {pod: state for pod in pods if (state := self.state(pod)) != "exact"}


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(map(repr, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "") or "none yet"
