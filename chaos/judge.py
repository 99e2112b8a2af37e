"""The five judgements, from what was written down.

* **Safety**: while a pod's answer is called exact, it is what the pod itself held after the last batch that the index
  has applied, for every probe; every batch before it was applied too, once and in order; and that batch is one that
  the pod has published, bit for bit. What is in flight is exactly what the pod has published after it.
* **Honesty**: nothing may be in flight for longer than two seconds while the answer is called exact (over a line that
  is too slow for its stream the lag that is told has to be the real one instead), a pod that can not be known (killed,
  stopped, cut off) is not called exact from two seconds after that on, and at least as many batches as were left out
  are in the stream's counter of lost ones.
* **Recovery**: within ten seconds of healing all pods are exact and nothing is in flight for long; and at the end, with
  the fleet at rest, every answer equals the pods' own.
* **Resources**: threads and file descriptors are as many as before, memory does not grow with repetition: neither what
  is held, nor, by more than an allocator keeps in pieces, what is resident.
* **Others**: the 99th percentile of the time that questions about the other pods take stays within three times that of
  before. Where the machine itself has become slower (a process that does nothing else finds out), by that much more.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .logs import STATES, applied_dtype, latency_dtype, read, sample_dtype, truth_dtype

__all__ = ["Cycle", "Judgement", "Judgements", "Sample", "Witness", "judge"]

#: Seconds until what can not be known has to be called so: three heartbeats of half a second, and the half second
#: until the first of them.
NOTICE = 2.0
#: Seconds from healing to everything being exact again.
RECOVER = 10.0
#: A batch that is published more than this ago and not applied means that a pod has not caught up.
FRESH = 0.5
#: What the 99th percentile of questions may grow by, and the seconds up to which it says nothing: unharmed fleets on a
#: loaded machine had 8 to 54 us.
SLOWER = 3.0
NOISE = 60e-6
#: Bytes that a process may hold more after all repetitions than after the first ones, and that may be resident beyond
#: those. What an allocator keeps between that which is held can not be given back: ten hostile publishers left 0.2 MB
#: more in use, in heaps that had grown from 16 to 30 MB of address space, and 2.7 MB more resident (the last against
#: the first). So it is what is held that says whether anything grows.
GROWTH = 1 << 20
KEPT = 8 << 20
#: Repetitions at either end that are compared by their median, where there are enough: something may be on its way.
ENDS = 3


class _Place(NamedTuple):
    """A batch of a pod: which life of it, and which of that life's batches."""

    life: int
    number: int


#: What a snapshot had: which batch was the last in it is not known, only what the pod held.
_RESTORED = _Place(-1, -1)


class Truth:
    """What one pod has published: its lives, each with its batches."""

    def __init__(self, records: npt.NDArray[np.void]) -> None:
        starts = np.flatnonzero(records["seq"] == 0)
        self.lives = [records[start:end] for start, end in zip(starts, [*starts[1:], len(records)], strict=True)]
        self.begins = [float(life["at"][0]) for life in self.lives]
        self.places = {
            int(content): _Place(number, place)
            for number, life in enumerate(self.lives)
            for place, content in enumerate(life["digest"])
        }

    def hits(self, place: _Place) -> npt.NDArray[np.int32]:
        found: npt.NDArray[np.int32] = self.lives[place.life]["hits"][place.number]
        return found

    def clears(self, place: _Place) -> bool:
        return bool(self.lives[place.life]["clear"][place.number])

    def latest(self, at: float) -> _Place | None:
        """The last batch that was published before ``at``."""
        now = bisect_right(self.begins, at) - 1
        return None if now < 0 else _Place(now, int(np.searchsorted(self.lives[now]["at"], at, side="right")) - 1)

    def waiting_since(self, place: _Place | None, at: float) -> float | None:
        """When the first batch was published that comes after this one and before ``at``."""
        now = bisect_right(self.begins, at) - 1
        if place is not None and place.life == now:
            after = self.lives[now]
            if place.number + 1 < len(after) and after["at"][place.number + 1] <= at:
                return float(after["at"][place.number + 1])
            return None
        if now < 0:
            return None
        return self.begins[0 if place is None and now == 0 else now if place is None else place.life + 1]


@dataclass
class _Applied:
    """What the index holds of a pod after each entry of its log."""

    places: list[_Place | None] = field(default_factory=lambda: [None])
    whole: list[bool] = field(default_factory=lambda: [True])
    lost: int = 0
    lives: int = 0
    foreign: int = 0
    twice: int = 0


def _follow(truth: Truth, entries: npt.NDArray[np.void]) -> _Applied:
    done = _Applied()
    place: _Place | None = None
    whole = True
    for entry in entries:
        if entry["kind"] == 1:
            place, whole = None, True
        elif entry["kind"] == 3:
            place, whole = _RESTORED, True
        elif (found := truth.places.get(int(entry["digest"]))) is None:
            done.foreign += 1
            whole = False
        else:
            refused = entry["kind"] == 2
            if place is None:
                skipped = found.number
            elif place is _RESTORED:
                skipped = 0  # if the snapshot ended earlier than here, the answers show it
            elif found.life == place.life and found.number > place.number:
                skipped = found.number - place.number - 1
            else:
                skipped = 0
                whole = False
                done.twice += 1
            done.lost += skipped + refused
            whole = (whole and not skipped and not refused) or (truth.clears(found) and not refused)
            if place is None or place.life != found.life:
                done.lives += 1
            place = found
        done.places.append(place)
        done.whole.append(whole)
    return done


@dataclass
class Cycle:
    """One time that a fault was injected, held and healed. Times in seconds of CLOCK_MONOTONIC.

    Healing takes its time where processes have to start: what can not be known may be known again from ``healing`` on,
    and the time of recovery counts from ``healed``.
    """

    injected: float = 0.0
    healing: float = 0.0
    healed: float = 0.0
    ended: float = 0.0
    pods: list[str] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    lies: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)
    notice: float = NOTICE
    resources: Mapping[str, Any] = field(default_factory=dict)


class Sample(NamedTuple):
    at: float
    state: str
    wrong: str | None
    waiting: float
    """Seconds that the first batch that is not applied has waited."""
    behind: int
    """Batches that are published and not applied."""


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

    def __iter__(self) -> Iterable[tuple[str, Judgement]]:  # type: ignore[override]
        return iter(vars(self).items())

    @property
    def passed(self) -> bool:
        return all(judgement.passed for judgement in vars(self).values())


class Witness:
    """Everything that was written down in a directory, by pod."""

    def __init__(self, where: Path, pods: Sequence[str]) -> None:
        self.pods = list(pods)
        self.truths = {pod: Truth(read(where / f"truth-{pod}.bin", truth_dtype)) for pod in pods}
        self.applied: dict[str, list[_Applied]] = {pod: [] for pod in pods}
        self.samples: dict[str, list[Sample]] = {pod: [] for pod in pods}
        self.questions = np.concatenate(
            [read(path, latency_dtype) for path in sorted(where.glob("latency-*.bin"))] or [np.zeros(0, latency_dtype)]
        )
        self.machine = read(where / "metronome.bin", latency_dtype)
        times: list[npt.NDArray[np.float64]] = []
        for path in sorted(where.glob("applied-*.bin")):
            entries = read(path, applied_dtype)
            samples = read(path.with_name(path.name.replace("applied", "samples")), sample_dtype)
            times.append(np.unique(samples["at"]))
            for number, pod in enumerate(pods):
                applied = _follow(self.truths[pod], entries[entries["pod"] == number])
                self.applied[pod].append(applied)
                self.samples[pod] += [self._sample(pod, applied, each) for each in samples[samples["pod"] == number]]
        #: How late the sampler itself was, at worst, by index process: the machine's part of every delay.
        self.stalls = [(each[:-1], np.diff(each)) for each in times if len(each) > 1]

    def stall(self, start: float, end: float) -> float:
        """The longest time in which nothing was sampled, though it should have been."""
        worst = 0.0
        for at, gaps in self.stalls:
            inside = gaps[(at >= start) & (at <= end)]
            if len(inside):
                worst = max(worst, float(inside.max()))
        return worst

    def _sample(self, pod: str, applied: _Applied, record: np.void) -> Sample:
        truth, state, at = self.truths[pod], STATES[record["state"]], float(record["at"])
        entries = min(int(record["entries"]), len(applied.places) - 1)
        place = applied.places[entries]
        if place is _RESTORED:
            place = truth.latest(at)
        since = truth.waiting_since(place, at)
        behind = 0
        if place is not None:
            life = truth.lives[place.life]
            behind = int(np.searchsorted(life["at"], at, side="right")) - place.number - 1
        wrong = None
        if state == "exact":
            expected = truth.hits(place) if place is not None else np.zeros(len(record["hits"]), dtype=np.int32)
            differ = int((record["hits"] != expected).sum())
            if not applied.whole[entries]:
                wrong = "batches are missing, foreign or out of order"
            elif differ:
                wrong = f"{differ} probes differ"
        return Sample(at, state, wrong, 0.0 if since is None else at - since, behind)


def judge(
    witness: Witness, cycles: Sequence[Cycle], *, baseline: tuple[float, float], resources: Mapping[str, Any],
    counters: Mapping[str, Mapping[str, int]], differences: int | None, problems: Sequence[str] = (),
) -> Judgements:  # fmt: skip
    """Judge one experiment. ``baseline`` is the time before the first fault, ``resources`` what the index had then,
    ``counters`` what its streams counted in all, ``differences`` the answers that differed at the end (None: the fleet
    did not come to rest), ``problems`` what else went wrong."""
    return Judgements(
        _safety(witness, cycles, problems),
        _honesty(witness, cycles, counters),
        _recovery(witness, cycles, differences),
        _resources(cycles, resources),
        _others(witness, cycles, baseline),
    )


def _slow(cycles: Sequence[Cycle], pod: str, at: float) -> bool:
    return any(pod in cycle.slow and cycle.injected <= at <= cycle.ended for cycle in cycles)


def _lying(cycles: Sequence[Cycle], pod: str, at: float) -> bool:
    return any(pod in cycle.lies and cycle.injected <= at <= cycle.ended for cycle in cycles)


def _notice(cycles: Sequence[Cycle], pod: str, at: float) -> float:
    during = (cycle.notice for cycle in cycles if pod in cycle.pods and cycle.injected <= at <= cycle.ended)
    return max(during, default=NOTICE)


def _safety(witness: Witness, cycles: Sequence[Cycle], problems: Sequence[str]) -> Judgement:
    found = list(problems)
    exact = 0
    for pod in witness.pods:
        wrong = Counter()
        for sample in witness.samples[pod]:
            if sample.state == "exact" and not _lying(cycles, pod, sample.at):
                exact += 1
                if sample.wrong:
                    wrong[sample.wrong] += 1
        found += [f"{pod}: {count} exact answers where {what}" for what, count in wrong.items()]
    if not exact:
        found.append("no answer was exact, so nothing was judged")
    return Judgement(not found, f"{exact} exact", found)


def _honesty(witness: Witness, cycles: Sequence[Cycle], counters: Mapping[str, Mapping[str, int]]) -> Judgement:
    found = []
    slowest = 0.0
    for pod in witness.pods:
        samples = witness.samples[pod]
        late = 0.0
        for sample in samples:
            if sample.state != "exact" or sample.waiting <= _notice(cycles, pod, sample.at):
                continue
            if not _lying(cycles, pod, sample.at) and not _slow(cycles, pod, sample.at):
                waited = sample.waiting - witness.stall(sample.at - sample.waiting, sample.at)
                if waited > _notice(cycles, pod, sample.at):
                    late = max(late, waited)
        if late > 0.0:
            found.append(f"{pod}: exact although a batch had waited for {late:.2f} s")
        for cycle in cycles:
            if pod not in cycle.cut:
                continue
            exact = [s.at for s in samples if cycle.injected <= s.at <= cycle.healing and s.state == "exact"]
            noticed = max(exact, default=cycle.injected) - cycle.injected
            slowest = max(slowest, noticed)
            if noticed > cycle.notice + witness.stall(cycle.injected, cycle.healing):
                found.append(f"{pod}: called exact for {noticed:.2f} s after it could not be known any more")
        lost = sum(applied.lost for applied in witness.applied[pod])
        counted = counters.get(pod, {}).get("lost_batches", 0)
        if lost > counted and not any(pod in [*cycle.lies, *cycle.anew] for cycle in cycles):
            found.append(f"{pod}: {lost} batches were left out, {counted} were counted")
    total = sum(applied.lost for each in witness.applied.values() for applied in each)
    figure = f"{slowest:.2f} s" if any(cycle.cut for cycle in cycles) else "nobody cut off"
    return Judgement(not found, figure + (f", {total} lost" if total else ""), found)


def _recovery(witness: Witness, cycles: Sequence[Cycle], differences: int | None) -> Judgement:
    found = []
    slowest = 0.0
    for number, cycle in enumerate(cycles, 1):
        for pod in witness.pods:
            bad = [
                sample.at
                for sample in witness.samples[pod]
                if cycle.healed <= sample.at <= cycle.ended
                and (sample.state != "exact" or sample.wrong or sample.waiting > FRESH)
            ]
            after = [sample.at for sample in witness.samples[pod] if cycle.healed <= sample.at <= cycle.ended]
            last = max(bad, default=cycle.healed)
            took = last - cycle.healed
            slowest = max(slowest, took)
            if took > RECOVER or not after or last >= max(after):
                found.append(f"{pod}: not recovered {took:.1f} s after healing, in repetition {number}")
    if differences is None:
        found.append("the fleet did not come to rest")
    elif differences:
        found.append(f"{differences} answers differ from the pods' own at the end")
    return Judgement(not found, f"{slowest:.1f} s", found)


def _resources(cycles: Sequence[Cycle], before: Mapping[str, Any]) -> Judgement:
    found = []
    for what in ("threads", "fds"):
        most = max((int(cycle.resources[what]) for cycle in cycles if cycle.resources), default=before[what])
        if most > before[what]:
            kinds = next((c.resources["kinds"] for c in cycles if c.resources and c.resources[what] == most), {})
            found.append(f"{most} {what} after healing, {before[what]} before (now {kinds}, then {before['kinds']})")
    held, resident = (_grown([int(c.resources[what]) for c in cycles if c.resources]) for what in ("held", "rss"))
    if held > GROWTH:
        found.append(f"{held / 2**20:.1f} MB more held after {len(cycles)} repetitions than after the first")
    if resident > max(held, 0) + KEPT:
        found.append(f"{resident / 2**20:.1f} MB more resident after {len(cycles)} repetitions than after the first")
    return Judgement(not found, f"{held / 2**20:+.1f} MB in {len(cycles)}, resident {resident / 2**20:+.1f}", found)


def _grown(sizes: Sequence[int]) -> float:
    """What there is more at the end than at the beginning."""
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
    # One repetition lasts seconds. A pause of the machine decides its 99th percentile (28 -> 139 us where the metronome
    # noticed nothing), so that a single one is reported and not judged.
    if len(cycles) < 2:
        return Judgement(True, figure + ", once", [])
    found = []
    if during > max(NOISE, before * SLOWER * slower):
        found.append(
            f"the 99th percentile grew {during / before:.1f} times ({figure}), the machine's {slower:.1f} times"
        )
    return Judgement(not found, figure, found)


def _p99(measured: npt.NDArray[np.void], cycles: Sequence[Cycle], baseline: tuple[float, float]) -> tuple[float, float]:
    """The 99th percentile before the first fault, and from each fault until everything was well again; 0 where there
    are too few to say."""
    at, took = measured["at"], measured["seconds"]
    before = took[(at >= baseline[0]) & (at <= baseline[1])]
    during = np.concatenate([took[(at >= cycle.injected) & (at <= cycle.ended)] for cycle in cycles])
    if min(len(before), len(during)) < 100:
        return 0.0, 0.0
    return float(np.percentile(before, 99)), float(np.percentile(during, 99))
