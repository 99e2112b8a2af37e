"""The five judgements of the logs of a run.

* **Safety**: an exact answer about a pod equals the pod's own answer after the last batch that the index has applied,
  for every probe. Every batch before it was applied too, once and in order. The pod has published this batch, bit for
  bit. The batches in flight are exactly those that the pod has published after it.
* **Honesty**: no batch may be in flight for longer than two seconds while the answer is exact. Over a line that is too
  slow for its stream, the reported lag has to be the real one instead. A pod that cannot be reached (killed, stopped,
  cut off) is not exact from two seconds after that on. The stream's counter of lost batches has at least the batches
  that were left out.
* **Recovery**: within ten seconds of healing, all pods are exact and no batch is in flight for long. At the end, with
  the fleet at rest, every answer equals the pods' own.
* **Resources**: threads and file descriptors are as many as before, except those of a SUB socket for each pod. Memory
  does not grow with repetitions: held memory not at all, and resident memory only by the allocator's fragments.
* **Others**: the 99th percentile of the time of queries about the other pods stays within three times that of before.
  Where the machine itself has become slower, as the metronome shows, the limit grows by the same factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from .logs import STATES, applied_dtype, latency_dtype, read, sample_dtype, truth_dtype

__all__ = ["Cycle", "Judgement", "Judgements", "Samples", "Witness", "judge", "surplus"]

Times: TypeAlias = npt.NDArray[np.float64]
Numbers: TypeAlias = npt.NDArray[np.int64]

#: Seconds until an unreachable pod must not be exact any more: a heartbeat of 0.7 s, its timeout of 1.05 s, a margin.
NOTICE = 2.0
#: Seconds from healing until all pods are exact again.
RECOVER = 10.0
#: Seconds after which a published batch that is not applied means that a pod has not caught up.
FRESH = 0.5
#: The factor by which the 99th percentile of queries may grow, and the seconds below which it means nothing: healthy
#: fleets on a loaded machine had 8 to 54 us.
SLOWER = 3.0
NOISE = 60e-6
#: Bytes by which held memory may be more after all repetitions than after the first ones, and by which resident memory
#: may exceed that. An allocator cannot return free memory between blocks in use. After ten hostile publishers 0.2 MB
#: more were in use, in heaps that had grown from 16 to 30 MB of address space, and 2.7 MB more were resident (the last
#: against the first). So the held memory decides whether anything grows.
GROWTH = 1 << 20
KEPT = 8 << 20
#: Descriptors of a SUB socket and its monitor, which are eventfds. Pods share one socket, but a reconnection makes
#: another one, so after faults each pod may have a socket of its own.
SOCKET = {"anon_inode": 3}
#: Repetitions at each end that are compared by their median, where there are enough: one may include data in transit.
ENDS = 3


#: The place of a stream without applied batches, and of one that began with a snapshot. The last batch of a snapshot is
#: not known, only the pod's blocks.
NOTHING, RESTORED = -1, -2
#: The mark of an answer from an incomplete stream, beside counts of differing probes.
NOT_WHOLE = -1


class Truth:
    """The batches that one pod has published, numbered over all lives of the pod."""

    def __init__(self, records: npt.NDArray[np.void]) -> None:
        self.records, self.at = records, records["at"]
        self.numbers = {int(content): number for number, content in enumerate(records["digest"])}
        self.starts = np.flatnonzero(records["seq"] == 0)
        #: The number of the pod's life in which each batch was published.
        self.life = np.cumsum(records["seq"] == 0) - 1

    def latest(self, at: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The number of the last batch that was published before each time."""
        return np.searchsorted(self.at, at, side="right") - 1

    def behind(self, places: Numbers, at: Times) -> tuple[Times, Numbers]:
        """For each place and time, the waiting time of the first batch between them, and the number of such batches.

        The time is in seconds. The number counts only batches of the place's own life.
        """
        latest = self.latest(at)
        ends = np.append(self.starts, len(self.at))[self.life[places] + 1]
        # A life that is over has no more batches to wait for, so the first batch of the next life counts.
        following = np.where(self.life[latest] > self.life[places], ends, places + 1)
        following = np.where(places == NOTHING, self.starts[self.life[latest]], following)
        waits = (latest >= 0) & (following <= latest)
        since = np.where(waits, self.at[np.minimum(following, len(self.at) - 1)], at)
        return at - since, np.where(places == NOTHING, 0, np.minimum(latest + 1, ends) - places - 1)


class _Applied(NamedTuple):
    """The applied part of a pod's stream after each entry of the index's log.

    ``places`` are the last applied batches, ``whole`` whether there is no gap, ``lost`` all batches that were left out.
    """

    places: Numbers
    whole: npt.NDArray[np.bool_]
    lost: int


def _follow(truth: Truth, entries: npt.NDArray[np.void]) -> _Applied:
    place, whole, lost = NOTHING, True, 0
    done = [(place, whole)]
    for kind, content in zip(entries["kind"].tolist(), entries["digest"].tolist(), strict=True):
        if kind in (1, 3):
            place, whole = NOTHING if kind == 1 else RESTORED, True
        elif (found := truth.numbers.get(content)) is None:
            whole = False
        else:
            refused = kind == 2
            skipped = 0
            if place == NOTHING:
                skipped = found - int(truth.starts[truth.life[found]])
            elif place == RESTORED:
                pass  # a snapshot that ends before this batch shows in the answers
            elif truth.life[found] == truth.life[place] and found > place:
                skipped = found - place - 1
            else:
                whole = False
            lost += skipped + refused
            clears = bool(truth.records["clear"][found])
            whole = not refused and (clears or (whole and not skipped))
            place = found
        done.append((place, whole))
    places, wholes = zip(*done, strict=True)
    return _Applied(np.array(places), np.array(wholes), lost)


@dataclass
class Cycle:
    """One repetition: a fault is injected, held and healed. Times are seconds of CLOCK_MONOTONIC.

    Healing takes time where processes have to start: unreachable pods may be exact again from ``healing`` on, and the
    time of recovery counts from ``healed``. :class:`chaos.faults.Fault` describes the traits.
    """

    injected: float = 0.0
    healing: float = 0.0
    healed: float = 0.0
    ended: float = 0.0
    pods: list[str] = field(default_factory=list)
    cuts: bool = False
    lies: bool = False
    slow: bool = False
    anew: bool = False
    notice: float = NOTICE
    resources: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Samples:
    """The index's answers about a pod, one entry for each sample."""

    at: Times
    state: Numbers
    """Index into ``STATES``."""
    wrong: Numbers
    """The number of differing probes of an exact answer, or ``NOT_WHOLE``."""
    waiting: Times
    """Seconds for which the first batch that is not applied has waited."""
    behind: Numbers
    """Number of batches that are published and not applied."""

    @property
    def exact(self) -> npt.NDArray[np.bool_]:
        return self.state == STATES.index("exact")

    @classmethod
    def of(cls, truth: Truth, applied: _Applied, records: npt.NDArray[np.void]) -> Samples:
        at = records["at"]
        entries = np.minimum(records["entries"].astype(np.int64), len(applied.places) - 1)
        places = applied.places[entries]
        places = np.where(places == RESTORED, truth.latest(at), places)
        expected = np.where((places == NOTHING)[:, None], 0, truth.records["hits"][places])
        differ = (records["hits"] != expected).sum(axis=1)
        made = cls(at, records["state"], np.where(applied.whole[entries], differ, NOT_WHOLE), *truth.behind(places, at))
        made.wrong[~made.exact] = 0
        return made


class Judgement(NamedTuple):
    passed: bool
    figure: str
    problems: list[str]


@dataclass
class Judgements:
    safety: Judgement
    honesty: Judgement
    recovery: Judgement
    resources: Judgement
    others: Judgement

    @property
    def passed(self) -> bool:
        return all(judgement.passed for judgement in vars(self).values())


class Witness:
    """All logs of a directory, by pod."""

    def __init__(self, where: Path, pods: Sequence[str]) -> None:
        self.pods = list(pods)
        questions = [read(path, latency_dtype) for path in sorted(where.glob("latency-*.bin"))]
        self.questions = np.concatenate([np.zeros(0, latency_dtype), *questions])
        self.machine = read(where / "metronome.bin", latency_dtype)
        self.lost = dict.fromkeys(pods, 0)
        #: The gaps between samples, by index process: the machine's part of every delay.
        self.stalls: list[tuple[Times, Times]] = []
        truths = {pod: Truth(read(where / f"truth-{pod}.bin", truth_dtype)) for pod in pods}
        found: dict[str, list[Samples]] = {pod: [] for pod in pods}
        for path in sorted(where.glob("applied-*.bin")):
            entries = read(path, applied_dtype)
            records = read(path.with_name(path.name.replace("applied", "samples")), sample_dtype)
            at = np.unique(records["at"])
            self.stalls.append((at[:-1], np.diff(at)))
            for number, pod in enumerate(pods):
                applied = _follow(truths[pod], entries[entries["pod"] == number])
                self.lost[pod] += applied.lost
                found[pod].append(Samples.of(truths[pod], applied, records[records["pod"] == number]))
        names = [each.name for each in fields(Samples)]
        self.samples = {
            pod: Samples(*(np.concatenate([getattr(each, name) for each in parts]) for name in names))
            for pod, parts in found.items()
        }

    def stall(self, start: float, end: float) -> float:
        """The longest gap between two samples."""
        inside = [gaps[(at >= start) & (at <= end)] for at, gaps in self.stalls]
        return float(np.concatenate([np.zeros(1), *inside]).max())


def judge(
    witness: Witness, cycles: Sequence[Cycle], *, baseline: tuple[float, float], resources: Mapping[str, Any],
    counters: Mapping[str, Mapping[str, int]], differences: int | None, problems: Sequence[str] = (),
) -> Judgements:  # fmt: skip
    """Judge one experiment.

    Args:
        witness: The logs.
        cycles: The repetitions.
        baseline: Start and end of the time before the first fault.
        resources: The index's resources at that time.
        counters: The final counters of the index's streams.
        differences: The number of differing answers at the end; None: the fleet did not come to rest.
        problems: Other problems.
    """
    return Judgements(
        _safety(witness, cycles, problems),
        _honesty(witness, cycles, counters),
        _recovery(witness, cycles, differences),
        _resources(witness, cycles, resources),
        _others(witness, cycles, baseline),
    )


def _within(at: Times, start: float, end: float) -> npt.NDArray[np.bool_]:
    return (at >= start) & (at <= end)


def _during(cycles: Iterable[Cycle], at: Times) -> npt.NDArray[np.bool_]:
    """Whether each time is in one of the cycles, from its fault until the end of its recovery."""
    inside = np.zeros(len(at), dtype=bool)
    for cycle in cycles:
        inside |= _within(at, cycle.injected, cycle.ended)
    return inside


def _safety(witness: Witness, cycles: Sequence[Cycle], problems: Sequence[str]) -> Judgement:
    found = list(problems)
    total = 0
    for pod, samples in witness.samples.items():
        judged = samples.exact & ~_during((c for c in cycles if c.lies and pod in c.pods), samples.at)
        total += int(judged.sum())
        for wrong, count in zip(*np.unique(samples.wrong[judged], return_counts=True), strict=True):
            if wrong:
                what = (
                    "batches are missing, foreign or out of order" if wrong == NOT_WHOLE else f"{wrong} probes differ"
                )
                found.append(f"{pod}: {count} exact answers where {what}")
    if not total:
        found.append("no answer was exact, so nothing was judged")
    return Judgement(not found, f"{total} exact", found)


def _honesty(witness: Witness, cycles: Sequence[Cycle], counters: Mapping[str, Mapping[str, int]]) -> Judgement:
    found = []
    slowest = 0.0
    for pod, samples in witness.samples.items():
        hit = [cycle for cycle in cycles if pod in cycle.pods]
        notice = np.full(len(samples.at), NOTICE)
        for cycle in hit:
            inside = _during([cycle], samples.at)
            notice[inside] = np.maximum(notice[inside], cycle.notice)
        judged = samples.exact & ~_during((cycle for cycle in hit if cycle.lies or cycle.slow), samples.at)
        late = 0.0
        for place in np.flatnonzero(judged & (samples.waiting > notice)):
            at, waiting = samples.at[place], samples.waiting[place]
            waited = waiting - witness.stall(at - waiting, at)
            late = max(late, waited if waited > notice[place] else 0.0)
        if late > 0.0:
            found.append(f"{pod}: exact although a batch had waited for {late:.2f} s")
        for cycle in hit:
            if not cycle.cuts:
                continue
            exact = samples.at[samples.exact & _within(samples.at, cycle.injected, cycle.healing)]
            noticed = exact.max(initial=cycle.injected) - cycle.injected
            slowest = max(slowest, noticed)
            if noticed > cycle.notice + witness.stall(cycle.injected, cycle.healing):
                found.append(f"{pod}: called exact for {noticed:.2f} s after it could not be known any more")
        lost, counted = witness.lost[pod], counters.get(pod, {}).get("lost_batches", 0)
        if lost > counted and not any(cycle.lies or cycle.anew for cycle in hit):
            found.append(f"{pod}: {lost} batches were left out, {counted} were counted")
    total = sum(witness.lost.values())
    figure = f"{slowest:.2f} s" if any(cycle.cuts and cycle.pods for cycle in cycles) else "nobody cut off"
    return Judgement(not found, figure + (f", {total} lost" if total else ""), found)


def _recovery(witness: Witness, cycles: Sequence[Cycle], differences: int | None) -> Judgement:
    found = []
    slowest = 0.0
    for number, cycle in enumerate(cycles, 1):
        for pod, samples in witness.samples.items():
            after = _within(samples.at, cycle.healed, cycle.ended)
            bad = samples.at[after & (~samples.exact | (samples.wrong != 0) | (samples.waiting > FRESH))]
            last = bad.max(initial=cycle.healed)
            took = last - cycle.healed
            slowest = max(slowest, took)
            if took > RECOVER or last >= samples.at[after].max(initial=0.0):
                found.append(f"{pod}: not recovered {took:.1f} s after healing, in repetition {number}")
    if differences is None:
        found.append("the fleet did not come to rest")
    elif differences:
        found.append(f"{differences} answers differ from the pods' own at the end")
    return Judgement(not found, f"{slowest:.1f} s", found)


def surplus(before: Mapping[str, Any], now: Mapping[str, Any], pods: int) -> list[str]:
    """The threads and descriptors beyond those allowed, as messages."""
    found = [f"{now['threads']} threads, {before['threads']} before"] if now["threads"] > before["threads"] else []
    for kind, count in now["fds"].items():
        if count > before["fds"].get(kind, 0) + SOCKET.get(kind, 0) * (pods - 1):
            found.append(f"descriptors {now['fds']}, {before['fds']} before: too many of {kind}")
    return found


def _resources(witness: Witness, cycles: Sequence[Cycle], before: Mapping[str, Any]) -> Judgement:
    found = []
    for number, cycle in enumerate(cycles, 1):
        if cycle.resources and not found:
            over = surplus(before, cycle.resources, len(witness.pods))
            found = [f"{each}, after healing, in repetition {number}" for each in over]
    held, resident = (_grown([int(c.resources[what]) for c in cycles if c.resources]) for what in ("held", "rss"))
    if held > GROWTH:
        found.append(f"{held / 2**20:.1f} MB more held after {len(cycles)} repetitions than after the first")
    if resident > max(held, 0) + KEPT:
        found.append(f"{resident / 2**20:.1f} MB more resident after {len(cycles)} repetitions than after the first")
    return Judgement(not found, f"{held / 2**20:+.1f} MB in {len(cycles)}, resident {resident / 2**20:+.1f}", found)


def _grown(sizes: Sequence[int]) -> float:
    """The growth from the beginning to the end."""
    if len(sizes) < 2 * ENDS:
        return sizes[-1] - sizes[0] if sizes else 0
    return float(np.median(sizes[-ENDS:]) - np.median(sizes[:ENDS]))


def _others(witness: Witness, cycles: Sequence[Cycle], baseline: tuple[float, float]) -> Judgement:
    before, during = _p99(witness.questions, cycles, baseline)
    machine = _p99(witness.machine, cycles, baseline)
    if not before or not during:
        return Judgement(False, "not measured", ["too few questions were asked"])
    slower = max(1.0, machine[1] / machine[0])
    figure = f"{before * 1e6:.0f} -> {during * 1e6:.0f} us"
    if slower > 1.5:
        figure += f", machine x{slower:.1f}"
    # One repetition lasts seconds, so a pause of the machine decides its 99th percentile (28 -> 139 us where the
    # metronome had no pause). A single repetition is therefore reported and not judged.
    if len(cycles) < 2:
        return Judgement(True, figure + ", once", [])
    found = []
    if during > max(NOISE, before * SLOWER * slower):
        found.append(
            f"the 99th percentile grew {during / before:.1f} times ({figure}), the machine's {slower:.1f} times"
        )
    return Judgement(not found, figure, found)


def _p99(measured: npt.NDArray[np.void], cycles: Sequence[Cycle], baseline: tuple[float, float]) -> tuple[float, float]:
    """The 99th percentile before the first fault, and from each fault until its recovery ends; 0: too few values."""
    at, took = measured["at"], measured["seconds"]
    before = took[(at >= baseline[0]) & (at <= baseline[1])]
    during = np.concatenate([took[(at >= cycle.injected) & (at <= cycle.ended)] for cycle in cycles])
    if min(len(before), len(during)) < 100:
        return 0.0, 0.0
    return float(np.percentile(before, 99)), float(np.percentile(during, 99))
