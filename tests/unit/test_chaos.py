"""The chaos harness: it accepts the experiments of Chaos Mesh, and its judges find every violation.

The judges read made-up logs of a pod that is followed without a fault, then the same logs with one fault at a time.
"""

from __future__ import annotations

import copy
import ctypes
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chaos.experiment import ExperimentError, load, seconds
from chaos.faults import fault_of
from chaos.judge import NOTICE, RECOVER, Cycle, Witness, judge, surplus
from chaos.logs import PROBES, STATES, Writer, applied_dtype, latency_dtype, sample_dtype, truth_dtype
from chaos.observer import SMALL, in_heap
from chaos.proxy import Proxy

EXPERIMENTS = sorted((Path(__file__).parents[2] / "chaos" / "experiments").glob("*.yaml"))


def test_every_experiment_can_be_done_here():
    found = [experiment for path in EXPERIMENTS for experiment in load(path)]
    assert len({experiment.name for experiment in found}) == len(found) > 0
    for experiment in found:
        assert 0 < experiment.hold <= 10
    # A partition must outlast the time in which the index has to notice it.
    assert all(e.hold > NOTICE for e in found if fault_of(e).cuts and e.spec["mode"] == "one")


PARTITION = next(
    doc for path in EXPERIMENTS for doc in yaml.safe_load_all(path.read_text()) if doc["kind"] == "NetworkChaos"
)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda doc: doc.update(apiVersion="chaos-mesh.org/v1"), "apiVersion"),
        (lambda doc: doc.update(kind="NetworkChaoss"), "NetworkChaoss"),
        (lambda doc: doc.update(extra=1), "extra"),
        (lambda doc: doc["metadata"].update(name="Not A Name"), "metadata.name"),
        (lambda doc: doc["spec"].update(ports=[5557]), "ports"),
        (lambda doc: doc["spec"].update(action="cut"), "cut"),
        (lambda doc: doc["spec"].update(mode="two"), "two"),
        (lambda doc: doc["spec"].update(mode="fixed"), "spec: 'value' is a required"),
        (lambda doc: doc["spec"].update(duration="4 seconds"), "4 seconds"),
        (lambda doc: doc["spec"].update(action="delay"), "spec: 'delay' is a required"),
        (lambda doc: doc["spec"].update(action="loss", loss={"percent": "50"}), "spec.loss"),
        (lambda doc: doc["spec"].pop("selector"), "spec: 'selector' is a required"),
        (lambda doc: doc["spec"]["target"].update(mode="some"), "spec.target.mode"),
    ],
)
def test_what_chaos_mesh_would_not_take_is_refused_by_name(tmp_path, change, named):
    document = copy.deepcopy(PARTITION)
    change(document)
    path = tmp_path / "experiments.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(ExperimentError, match=named):
        load(path)


@pytest.mark.parametrize(("text", "value"), [("500ms", 0.5), ("1m30s", 90.0), ("-10m", -600.0), ("1.5h", 5400.0)])
def test_durations_are_those_of_go(text, value):
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "5", "s", "5 s", "5sec", None])
def test_other_durations_are_refused(text):
    with pytest.raises(ExperimentError, match="no duration"):
        seconds(text)


class Story:
    """A made-up log: a pod publishes a batch every 10 ms, and an index applies each a millisecond later.

    The pod is killed at second 2 and its successor starts at second 5. The index notices after one second and has
    caught up half a second after the healing. A test may change the lists before they are judged.
    """

    DIES, RETURNS, ENDS = 2.0, 5.0, 8.0

    def __init__(self, where: Path) -> None:
        self.where = where
        first = [(at, 1 << 20 | n, n) for n, at in enumerate(np.arange(0.0, self.DIES, 0.01))]
        second = [(at, 2 << 20 | n, n) for n, at in enumerate(np.arange(self.RETURNS + 0.1, self.ENDS, 0.01))]
        self.truth = [(at, seq, content, seq % 7) for at, content, seq in first + second]
        # (time, kind, content)
        self.applied = [(at + 0.001, 0, content) for at, content, _ in first]
        caught_up = self.RETURNS + 0.5
        self.applied.append((caught_up, 1, 0))
        self.applied += [(max(at + 0.001, caught_up + 0.001), 0, content) for at, content, _ in second]
        self.states: Callable[[float], str] = lambda at: "stale" if self.DIES + 1.0 < at < caught_up + 0.01 else "exact"
        self.lie: Callable[[float], int] = lambda at: 0
        self.question: Callable[[float], float] = lambda at: 1e-5
        self.machine: Callable[[float], float] = lambda at: 1e-5
        self.counters = {"lost_batches": 0}
        self.before = {"threads": 5, "fds": {"socket": 12, "anon_inode": 19}, "rss": 1 << 26, "held": 1 << 24}
        self.after = copy.deepcopy(self.before)
        self.differences: int | None = 0

    def cycle(self, resources: dict[str, Any]) -> Cycle:
        return Cycle(
            injected=self.DIES,
            healing=self.RETURNS,
            healed=self.RETURNS,
            ended=self.ENDS,
            pods=["pod"],
            cuts=True,
            resources=resources,
        )

    def judged(self, *, repetitions: int = 2) -> dict[str, bool]:
        where = self.where
        self._write("truth-pod.bin", truth_dtype, [
            (at, seq, content, 0, 0, [16 * hit] * PROBES) for at, seq, content, hit in self.truth
        ])  # fmt: skip
        self._write("applied-1.bin", applied_dtype, [(at, 0, kind, 0, content) for at, kind, content in self.applied])
        hits = {content: hit for _, _, content, hit in self.truth}
        samples = []
        for at in np.arange(0.5, self.ENDS, 0.02):
            entries = sum(entry[0] <= at for entry in self.applied)
            last = self.applied[entries - 1] if entries else (0.0, 1, 0)
            told = 16 * (hits.get(last[2], 0) if last[1] == 0 else 0) + self.lie(at)
            samples.append((at, 0, STATES.index(self.states(at)), 0, entries, [told] * PROBES))
        self._write("samples-1.bin", sample_dtype, samples)
        times = np.arange(0.0, self.ENDS, 0.005)
        self._write("latency-1.bin", latency_dtype, [(at, self.question(at)) for at in times])
        self._write("metronome.bin", latency_dtype, [(at, self.machine(at)) for at in times])
        # The same repetition twice, because the 99th percentile of a single one is not judged.
        cycles = repetitions * [self.cycle(self.after)]
        verdicts = judge(
            Witness(where, ["pod"]), cycles, baseline=(0.0, self.DIES), resources=self.before,
            counters={"pod": self.counters}, differences=self.differences,
        )  # fmt: skip
        return {name: judgement.passed for name, judgement in vars(verdicts).items()}

    def _write(self, name: str, dtype: np.dtype, records: list[Any]) -> None:
        writer = Writer(self.where / name, dtype)
        writer.write(np.array(records, dtype=dtype))
        writer.close()


def _faultless(story: Story) -> None:
    pass


def _wrong_answer(story: Story) -> None:
    story.lie = lambda at: 16 if 1.0 < at < 1.03 else 0


def _wrong_answer_while_stale(story: Story) -> None:
    story.lie = lambda at: 16 if 4.0 < at < 4.5 else 0


def _skipped_batch(story: Story) -> None:
    story.truth[90] = (*story.truth[90][:3], story.truth[89][3])  # it changes nothing that the questions are about
    del story.applied[90]
    story.counters["lost_batches"] = 1


def _uncounted_loss(story: Story) -> None:
    del story.applied[90]
    states = story.states
    story.states = lambda at: "degraded" if 0.9 < at < story.DIES + 1.0 else states(at)


def _counted_loss(story: Story) -> None:
    _uncounted_loss(story)
    story.counters["lost_batches"] = 1


def _foreign_batch(story: Story) -> None:
    at, kind, _ = story.applied[90]
    story.applied[90] = (at, kind, 12345)
    story.counters["lost_batches"] = 1


def _forgotten_clear(story: Story) -> None:
    story.applied = [entry for entry in story.applied if entry[1] != 1]


def _applied_twice(story: Story) -> None:
    story.applied.insert(91, story.applied[90])


def _notices_late(story: Story) -> None:
    states = story.states
    story.states = lambda at: "exact" if at < story.DIES + 2.5 else states(at)


def _hangs_behind(story: Story) -> None:
    story.applied = [entry for entry in story.applied if entry[0] < story.ENDS - 2.6]


def _never_exact_again(story: Story) -> None:
    story.states = lambda at: "stale" if at > story.DIES + 1.0 else "exact"


def _different_at_rest(story: Story) -> None:
    story.differences = 1


def _never_at_rest(story: Story) -> None:
    story.differences = None


def _leaks_a_descriptor(story: Story) -> None:
    story.after["fds"]["socket"] += 1


def _leaks_a_thread(story: Story) -> None:
    story.after["threads"] += 1


def _slow_questions(story: Story) -> None:
    story.question = lambda at: 1e-4 if at < story.DIES else 5e-4


def _slow_machine(story: Story) -> None:
    _slow_questions(story)
    story.machine = story.question


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        (_faultless, set()),
        (_wrong_answer, {"safety"}),
        (_wrong_answer_while_stale, set()),
        (_skipped_batch, {"safety"}),
        (_uncounted_loss, {"honesty"}),
        (_counted_loss, set()),
        (_foreign_batch, {"safety"}),
        (_forgotten_clear, {"safety", "recovery"}),
        (_applied_twice, {"safety"}),
        (_notices_late, {"honesty"}),
        (_hangs_behind, {"honesty", "recovery"}),
        (_never_exact_again, {"recovery"}),
        (_different_at_rest, {"recovery"}),
        (_never_at_rest, {"recovery"}),
        (_leaks_a_descriptor, {"resources"}),
        (_leaks_a_thread, {"resources"}),
        (_slow_questions, {"others"}),
        (_slow_machine, set()),
    ],
)
def test_each_judge_finds_what_is_his_and_only_that(tmp_path, change, failing):
    story = Story(tmp_path)
    change(story)
    assert {name for name, passed in story.judged().items() if not passed} == failing


def test_a_slow_machine_fails_no_single_repetition(tmp_path):
    story = Story(tmp_path)
    _slow_questions(story)
    assert all(story.judged(repetitions=1).values())


@pytest.mark.parametrize(
    ("held", "rss", "passed"),
    [
        (lambda n: n << 18, lambda n: n << 18, False),
        (lambda n: n << 18, lambda n: 0, False),
        (lambda n: 0, lambda n: n << 20, True),  # fragments in the allocator
        (lambda n: 0, lambda n: n << 21, False),  # memory that another allocator holds
        (lambda n: 9 << 20 if n in (3, 9) else 0, lambda n: 0, True),  # temporary memory at that moment
        (lambda n: -n << 20, lambda n: -n << 20, True),
    ],
)
def test_memory_that_grows_with_repetition_is_found(tmp_path, held, rss, passed):
    story = Story(tmp_path)
    story.judged()
    cycles = [story.cycle({**story.before, "rss": (1 << 28) + rss(n), "held": (1 << 27) + held(n)}) for n in range(10)]
    verdicts = judge(
        Witness(tmp_path, ["pod"]), cycles, baseline=(0.0, 2.0), resources=story.before, counters={}, differences=0
    )
    assert verdicts.resources.passed == passed
    assert verdicts.safety.passed
    assert RECOVER > story.ENDS - story.RETURNS


def test_each_pod_may_come_to_have_a_socket_of_its_own_and_no_more():
    before = {"threads": 5, "fds": {"socket": 12, "anon_inode": 19}}
    for more, passed in (({"anon_inode": 28}, True), ({"anon_inode": 29}, False), ({"pipe": 1}, False)):
        assert (not surplus(before, {"threads": 5, "fds": {**before["fds"], **more}}, pods=4)) == passed


@contextmanager
def _through_a_proxy() -> Iterator[tuple[Proxy, socket.socket, socket.socket]]:
    """Yield a proxy with the pod's end and the index's end of a connection through it."""
    with socket.create_server(("127.0.0.1", 0)) as pod:
        proxy = Proxy("127.0.0.1", pod.getsockname()[1], seed=1)
        try:
            with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as near:
                pod.settimeout(30)
                far, _ = pod.accept()
                with far:
                    yield proxy, far, near
        finally:
            threads = threading.active_count()
            proxy.close()
            assert threading.active_count() == threads - 1


def _all_of(sock: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (data := sock.recv(65536)):
        found += data
    return found


def test_a_proxy_passes_everything_as_it_is_until_it_is_told_otherwise():
    with _through_a_proxy() as (proxy, pod, index):
        data = bytes(range(256)) * 2000
        threading.Thread(target=pod.sendall, args=(data,)).start()
        assert _all_of(index, len(data)) == data
        index.sendall(b"question")
        assert _all_of(pod, 8) == b"question"
        proxy.flip = 1.0
        pod.sendall(data[:4096])
        damaged = _all_of(index, 4096)
        assert len(damaged) == 4096
        assert damaged != data[:4096]
        proxy.flip, proxy.cut = 0.0, 1.0
        pod.sendall(b"a" * 1000)
        assert _all_of(index, 1000) == b"a" * 500
        assert proxy.counts["flipped"] >= 1
        assert proxy.counts["cut"] == 1


def test_a_proxy_holds_back_and_passes_all_the_same():
    with _through_a_proxy() as (proxy, pod, index):
        proxy.delay = 0.2
        pod.sendall(b"late")
        assert _all_of(index, 4) == b"late"
        assert proxy.counts["delayed"] == 1


def test_what_is_held_of_the_heap_is_what_was_asked_for():
    before = in_heap()
    if before is None:
        assert not hasattr(ctypes.CDLL(None), "mallinfo2") or "LD_PRELOAD" in os.environ
        return
    kept = [bytes(20_000) for _ in range(400)]
    assert 8e6 <= in_heap() - before <= 9e6
    small = [object() for _ in range(40_000)]
    assert in_heap() - before >= 8e6 + SMALL * len(small)
    del kept, small
    assert abs(in_heap() - before) < 1e6
