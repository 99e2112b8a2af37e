"""Each kind of fault, as a function that injects it into a scene and heals it.

Such a function is a generator. It injects the fault, yields the seconds for which to hold the fault, and heals. It
yields a second time where something has to be checked after the recovery. Its decorator names the experiments that it
performs, its requirements, and the traits that the judgements need.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, TypeAlias

from kvindex import EventManager, KVIndexError, PodSource, PrefixIndex
from kvindex.capture import Message, read_capture

from .experiment import Experiment, ExperimentError, seconds
from .hosts import missing, run
from .judge import NOTICE
from .logs import read, truth_dtype
from .scene import RATE, Scene

__all__ = ["Fault", "fault_of"]

Steps: TypeAlias = Iterator[float]
Environment: TypeAlias = Callable[[Path], Mapping[str, str]]


@dataclass(kw_only=True)
class Fault:
    """An experiment's fault, with its traits and its targets in a scene."""

    experiment: Experiment
    steps: Callable[[Fault, Scene], Steps]
    #: The required commands, or patterns of files.
    tools: tuple[str, ...] = ()
    needs_hosts: bool = False
    proxied: bool = False
    #: Whether it hits some of the pods. A stressed machine hits all of them, so there are no other pods to judge.
    on_pods: bool = True
    #: Whether its pods cannot be reached: they must not be called exact from ``notice`` seconds on.
    cuts: bool = False
    notice: float = NOTICE
    #: Whether its pods publish invalid messages. Their true answers are undefined then, so only other pods are judged.
    lies: bool = False
    #: Whether its pods are removed and added again, and their counters with them.
    anew: bool = False
    #: Whether batches come late. A stream that never pauses shows no silence, so its lag has to show the delay.
    slow: bool = False
    #: Requests a second of every pod during the measurement.
    rate: float = RATE
    pod_env: Environment = lambda where: {}
    index_env: Environment = lambda where: {}
    pods: list[str] = field(default_factory=list)
    #: Failed checks of the fault itself, beside the five judgements.
    problems: list[str] = field(default_factory=list)

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.experiment.spec

    @property
    def hold(self) -> float:
        return self.experiment.hold

    def missing(self) -> str | None:
        """The reason why the fault cannot be injected here, or None."""
        if self.needs_hosts and (why := missing()):
            return why
        absent = [tool for tool in self.tools if not (glob(tool) if "/" in tool else shutil.which(tool))]
        return f"{Path(absent[0]).name} is not installed" if absent else None

    def choose(self, scene: Scene) -> None:
        """Choose the pods that are hit this time."""
        self.pods = scene.choose(self.spec["mode"], str(self.spec.get("value", "1"))) if self.on_pods else []

    def expect(self, so: object, otherwise: str) -> None:
        """Note the problem ``otherwise`` unless ``so`` is true: above all where a fault had no effect."""
        if not so:
            self.problems.append(otherwise)


#: The faults by kind, action, the annotation ``how``, and whether the index is hit.
_FAULTS: dict[tuple[str, str, str, bool], Callable[..., Fault]] = {}


def _does(
    kind: str, action: str = "", *, how: str = "", index: bool = False, **traits: Any
) -> Callable[[Callable[..., Steps]], Callable[..., Steps]]:
    def listed(steps: Callable[..., Steps]) -> Callable[..., Steps]:
        _FAULTS[kind, action, how, index] = partial(Fault, steps=steps, **{"on_pods": not index, **traits})
        return steps

    return listed


def fault_of(experiment: Experiment) -> Fault:
    """The fault of an experiment. Raises :class:`ExperimentError` for faults that only Chaos Mesh can inject."""
    key = experiment.kind, experiment.action, experiment.local.get("how", ""), experiment.on_index
    if key not in _FAULTS:
        raise ExperimentError(f"{experiment.file}: {experiment.name}: {' '.join(key[:2])} can not be done here")
    return _FAULTS[key](experiment=experiment)


# Networks


_network = partial(_does, "NetworkChaos", needs_hosts=True, tools=("ip", "iptables", "tc"))


def _restore(fault: Fault, scene: Scene) -> None:
    for pod in fault.pods:
        fault.expect(scene.hosts[pod].clear(), f"{pod}: no packet was dropped or held back")


def _drop(fault: Fault, scene: Scene, pod: str, *what: str, port: str | None = None) -> None:
    """Drop packets in the directions of the experiment."""
    for direction, chain, side, number in (("from", "INPUT", "-i", "--dport"), ("to", "OUTPUT", "-o", "--sport")):
        if fault.spec.get("direction", "to") in (direction, "both"):
            only = ["-p", "tcp", number, port] if port else []
            scene.hosts[pod].rule(chain, side, "e0", *only, *what, "-j", "DROP")


@_network("partition", cuts=True)
def _partition(fault: Fault, scene: Scene) -> Steps:
    ports = fault.experiment.local.get("ports")
    for pod in fault.pods:
        endpoint = str(scene.pods[pod].ranks[0][ports == "replay"])
        _drop(fault, scene, pod, port=endpoint.rpartition(":")[2] if ports else None)
    yield fault.hold
    _restore(fault, scene)


@_network("loss")
def _loss(fault: Fault, scene: Scene) -> Steps:
    share = float(fault.spec["loss"]["loss"]) / 100
    for pod in fault.pods:
        _drop(fault, scene, pod, "-m", "statistic", "--mode", "random", "--probability", f"{share:g}")
    yield fault.hold
    _restore(fault, scene)


@_network("bandwidth", slow=True)
def _bandwidth(fault: Fault, scene: Scene) -> Steps:
    scene.rates(float(fault.experiment.local.get("rate", RATE)), fault.pods)
    for pod in fault.pods:
        # tc's units are Chaos Mesh's: bps is bytes a second.
        rate, burst, limit = (str(fault.spec["bandwidth"][name]) for name in ("rate", "buffer", "limit"))
        scene.hosts[pod].shape("tbf", "rate", rate, "burst", burst, "limit", limit)
    yield fault.hold
    for pod in fault.pods:
        published = read(scene.where / f"truth-{pod}.bin", truth_dtype)
        status = scene.index.status()[pod]
        coming = published[published["seq"] == (status["last_seq"] or 0) + 1]
        late = time.monotonic() - float(coming["at"][-1]) if len(coming) else 0.0
        lag = status["lag"] or 0.0
        fault.expect(lag > late - 1.0, f"{pod}: {late:.1f} s behind, and a lag of {lag:.1f} s is told")
    _restore(fault, scene)
    scene.rates(RATE, fault.pods)


def _proxied(fault: Fault, scene: Scene, what: str, value: float) -> Steps:
    """Set a field of the pods' proxies for a while."""
    for pod in fault.pods:
        for proxy in scene.proxies[pod]:
            setattr(proxy, what, value)
    yield fault.hold
    for pod in fault.pods:
        fault.expect(scene.proxies[pod][0].counts.total(), f"{pod}: no effect")
        for proxy in scene.proxies[pod]:
            setattr(proxy, what, 0.0)
            proxy.counts.clear()


@_does("NetworkChaos", "delay", proxied=True)
def _delay(fault: Fault, scene: Scene) -> Steps:
    return _proxied(fault, scene, "delay", seconds(fault.spec["delay"]["latency"]))


@_does("NetworkChaos", "corrupt", proxied=True)
@_does("NetworkChaos", "corrupt", how="truncate", proxied=True)
def _corrupt(fault: Fault, scene: Scene) -> Steps:
    what = "cut" if fault.experiment.local.get("how") == "truncate" else "flip"
    return _proxied(fault, scene, what, float(fault.spec["corrupt"]["corrupt"]) / 100)


# Processes


@_does("PodChaos", "pod-kill", cuts=True)
@_does("PodChaos", "pod-failure", cuts=True)
def _kill(fault: Fault, scene: Scene) -> Steps:
    """Kill pods, and start them again after a while."""
    for pod in fault.pods:
        scene.pods[pod].kill()
    yield fault.hold
    # In parallel: one after the other would prolong the outage, and the index's back-off with it.
    with ThreadPoolExecutor() as starters:
        list(starters.map(lambda pod: scene.pods[pod].launch(), fault.pods))


@_does("PodChaos", "pod-failure", how="stop", cuts=True)
def _stop(fault: Fault, scene: Scene) -> Steps:
    """Suspend pods with their sockets open."""
    for pod in fault.pods:
        scene.pods[pod].pause()
    yield fault.hold
    for pod in fault.pods:
        scene.pods[pod].go_on()


@_does("PodChaos", "pod-kill", index=True)
def _kill_index(fault: Fault, scene: Scene) -> Steps:
    """Kill the index's own process while it applies events, and start another one from the last snapshot."""
    scene.index.ask("save", path=str(scene.snapshot))
    time.sleep(0.5)  # the pods go on, so the snapshot is out of date when it is needed
    scene.index.kill()
    yield fault.hold
    scene.index.launch()
    scene.follow()
    yield 0.0
    for name, status in scene.index.status().items():
        anew = status["batches"] > (status["last_seq"] or 0)
        fault.expect(not anew, f"{name}: its history was applied anew, the snapshot was of no use")


@_does("StressChaos", tools=("stress-ng",), on_pods=False)
def _stress(fault: Fault, scene: Scene) -> Steps:
    command = ["stress-ng", "--quiet", "--timeout", f"{fault.hold + 30:.0f}s"]
    if cpu := fault.spec["stressors"].get("cpu"):
        command += ["--cpu", str(cpu["workers"]), "--cpu-load", str(cpu.get("load", 100))]
    if memory := fault.spec["stressors"].get("memory"):
        command += ["--vm", str(memory["workers"]), "--vm-bytes", str(memory["size"]).removesuffix("B")]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield fault.hold
        fault.expect(process.poll() is None, "the machine was not stressed all the time")
    finally:
        # On SIGTERM, stress-ng ends its workers as well.
        process.terminate()
        process.wait(20)


_FAKETIME = "/usr/lib/*/faketime/libfaketime.so.1"


def _clocks(where: Path) -> Mapping[str, str]:
    return {
        "LD_PRELOAD": min(glob(_FAKETIME)),
        "FAKETIME_TIMESTAMP_FILE": str(where / "clock-{pod}"),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }


@_does("TimeChaos", tools=(_FAKETIME,), pod_env=_clocks)
def _skew(fault: Fault, scene: Scene) -> Steps:
    offset = seconds(fault.spec["timeOffset"])

    def put(pod: str, offset: float) -> None:
        new = scene.where / f"clock-{pod}.new"
        new.write_text(f"{offset:+.3f}\n")
        new.rename(scene.where / f"clock-{pod}")

    for pod in fault.pods:
        put(pod, offset)
    yield fault.hold
    for pod in fault.pods:
        # A batch has the time of its pod's clock. With a clock ten minutes behind, its lag is ten minutes.
        lag = scene.index.status()[pod]["lag"] or 0.0
        fault.expect(abs(lag + offset) < 5.0, f"{pod}: its clock is {lag:.1f} s behind, not {-offset:g} s")
        put(pod, 0.0)


# Publishers


def _publishers(fault: Fault, scene: Scene, **faults: Any) -> None:
    """Set fields of :class:`kvindex.sim.publisher.Faults`."""
    for pod in fault.pods:
        scene.pods[pod].ask("fault", **faults)


def _expect_stale(fault: Fault, scene: Scene, because: str = "") -> None:
    for pod in fault.pods:
        state = scene.index.state(pod)
        fault.expect(state == "stale", f"{pod} is {state}{because}")


@_does("LocalChaos", "flood", rate=5.0)  # low enough for one process to serve a hundred times as many
def _flood(fault: Fault, scene: Scene) -> Steps:
    """Let one pod serve ``rate`` times as much as each of the others."""

    def requests() -> dict[str, int]:
        return {name: pod.ask("status")["requests"] for name, pod in scene.pods.items()}

    before = requests()
    scene.rates(fault.rate * float(fault.spec["rate"]), fault.pods)
    yield fault.hold
    served = {pod: now - before[pod] for pod, now in requests().items()}
    scene.rates(fault.rate, fault.pods)
    most = max(count for pod, count in served.items() if pod not in fault.pods)
    for pod in fault.pods:
        # One process may not reach the whole rate on this machine, but it has to be a flood.
        fault.expect(served[pod] > 20 * most, f"{pod} served {served[pod]} requests, another {most}: no flood")


@_does("LocalChaos", "hostile", lies=True)
def _hostile(fault: Fault, scene: Scene) -> Steps:
    for pod in fault.pods:
        scene.pods[pod].ask("hostile")
    yield fault.hold
    for pod in fault.pods:
        fault.expect(sum(scene.index.status()[pod]["errors"].values()), f"{pod}: nothing was refused")
        scene.pods[pod].kill()
        scene.pods[pod].launch()


def _misled(fault: Fault, scene: Scene, told: Callable[[str], Mapping[str, Any]]) -> Steps:
    """Give the index wrong options for a pod's events, as one wrong letter in a pod file does."""
    for pod in fault.pods:
        scene.index.forget(pod)
        scene.index.follow(scene.pods[pod], **told(pod))
    yield fault.hold
    for pod in fault.pods:
        status = scene.index.status()[pod]
        state, reason = status["state"], status["reason"]
        fault.expect(state == "degraded", f"{pod} is {state}: {reason}")
        fault.expect("tcp://" in reason, f"{pod}: the reason names no address: {reason}")
        scene.index.forget(pod)
        scene.follow(pod)


@_does("LocalChaos", "wrong-topic", anew=True)
def _wrong_topic(fault: Fault, scene: Scene) -> Steps:
    return _misled(fault, scene, lambda pod: {"topic": f"kv@{pod}@another"})


@_does("LocalChaos", "swapped-replay", anew=True)
def _swapped_replay(fault: Fault, scene: Scene) -> Steps:
    names = list(scene.pods)

    def told(pod: str) -> Mapping[str, Any]:
        other = scene.pods[names[(names.index(pod) + 1) % len(names)]]
        # An IPv6 form of the address, because the manager refuses an address that another pod has already.
        host, port = str(other.ranks[0][1]).removeprefix("tcp://").rsplit(":", 1)
        return {"ranks": {0: (scene.pods[pod].ranks[0][0], f"tcp://[::ffff:{host}]:{port}")}}

    return _misled(fault, scene, told)


@_does("LocalChaos", "lost-tail")
def _lost_tail(fault: Fault, scene: Scene) -> Steps:
    """Lose the last batches before a silence in transit."""

    def tails(pod: str) -> int:
        workers = scene.index.status()[pod]["workers"].values()
        return sum(worker["counters"].get("tails_recovered", 0) for worker in workers)

    before = {pod: tails(pod) for pod in fault.pods}
    _publishers(fault, scene, drop=1_000_000)
    time.sleep(0.3)
    scene.rates(0.0, fault.pods)
    yield fault.hold
    for pod in fault.pods:
        fault.expect(tails(pod) > before[pod], f"{pod}: no batch was lost, or none was found")
    _publishers(fault, scene, drop=0)
    scene.rates(fault.rate, fault.pods)


@_does("LocalChaos", "publisher-dead", cuts=True, notice=10.0)
def _dead_publisher(fault: Fault, scene: Scene) -> Steps:
    """Stop the publisher's thread, while its process and connections stay alive and its cache keeps changing."""
    _publishers(fault, scene, mute=True, replay_silent=True)
    yield fault.hold
    _expect_stale(fault, scene)
    _publishers(fault, scene, mute=False, replay_silent=False)


@_does("LocalChaos", "replay-gone")
def _replay_gone(fault: Fault, scene: Scene) -> Steps:
    _publishers(fault, scene, replay_silent=True, drop=int(fault.spec["drop"]))
    yield fault.hold
    # The publisher has the request, so the index does not accept the hole while an answer may still come.
    _expect_stale(fault, scene, ": no batch was lost")
    _publishers(fault, scene, replay_silent=False, drop=0)


@_does("LocalChaos", "herd")
def _herd(fault: Fault, scene: Scene) -> Steps:
    """Start ``readers`` other routers at once, which follow the pod."""
    with ExitStack() as stack:
        managers = []
        for pod in fault.pods:
            endpoint, answers = scene.pods[pod].ranks[0]
            for _ in range(int(fault.spec["readers"])):
                managers.append(stack.enter_context(EventManager(PrefixIndex())))
                managers[-1].add_pod(PodSource(pod, endpoint=endpoint, replay_endpoint=answers, model="sim"))
        yield fault.hold
        for manager in managers:
            missing = manager.wait_until_exact(10.0)
            fault.expect(not missing, f"a reader of the herd is not exact: {missing}")


# Disks


def _slow_disk_env(where: Path) -> Mapping[str, str]:
    source = Path(__file__).with_name("slow_disk.c")
    run("cc", "-shared", "-fPIC", "-O1", "-o", str(where / "slow_disk.so"), str(source), "-ldl")
    return {
        "LD_PRELOAD": str(where / "slow_disk.so"),
        "CHAOS_DISK": str(where / "disk"),
        "CHAOS_DISK_DELAY": str(where / "disk-delay"),
    }


@_does("IOChaos", "latency", index=True, tools=("cc",), index_env=_slow_disk_env)
def _slow_disk(fault: Fault, scene: Scene) -> Steps:
    """Save snapshots to a slow disk, again and again, while a recorder writes every stream to it.

    A save must not hold up answers or streams. A recorder cannot be faster than its disk, but its recording must be the
    beginning of every stream, without a gap.
    """
    delay = seconds(fault.spec["delay"])
    switch, recording = scene.where / "disk-delay", scene.disk / "recording"
    switch.write_text(f"{delay * 1000:.0f}")
    pods = [f"{name}={','.join(map(str, pod.ranks[0]))}" for name, pod in scene.pods.items()]
    recorder = subprocess.Popen(
        [sys.executable, "-m", "kvindex", "record", *pods, "--output", str(recording)],
        env={**os.environ, **_slow_disk_env(scene.where)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + fault.hold
        saved = 0
        while time.monotonic() < end:
            saved += scene.index.ask("save", path=str(scene.snapshot))["seconds"] >= delay
        fault.expect(saved, "saving was not delayed")
        yield 0.0
        recorder.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            recorder.wait(10)
        fault.expect(recorder.returncode == 0, f"the recorder failed, or does not end: {recorder.returncode}")
    finally:
        recorder.kill()
        recorder.wait()
        switch.unlink()
    found = [record for record in read_capture(recording) if isinstance(record, Message)]
    fault.expect(len(found) > 20, "nothing was recorded")
    for name in scene.pods:
        seqs = [message.seq for message in found if message.pod == name]
        fault.expect(seqs == list(range(len(seqs))), f"the recording of {name} has gaps")


@_does("IOChaos", "fault", index=True, needs_hosts=True, tools=("mount", "umount"))
def _full_disk(fault: Fault, scene: Scene) -> Steps:
    """Save snapshots to a full disk. The snapshot from before must stay intact."""
    run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(scene.disk))
    try:
        scene.index.ask("save", path=str(scene.snapshot))
        before = scene.snapshot.read_bytes()
        filler = scene.disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with suppress(KVIndexError):
            scene.index.ask("save", path=str(scene.snapshot))
            fault.problems.append("a snapshot was saved to a full disk")
        fault.expect(scene.snapshot.read_bytes() == before, "the snapshot that was there is damaged")
        left = [path.name for path in scene.disk.iterdir() if path not in (filler, scene.snapshot)]
        fault.expect(not left, f"left on the full disk: {left}")
        yield fault.hold
        filler.unlink()
        scene.index.ask("save", path=str(scene.snapshot))
    finally:
        run("umount", str(scene.disk))
