"""Each kind of fault, done to a scene and taken back.

A fault says beforehand what it needs (:meth:`Fault.missing`), and which pods can not be known while it lasts
(``cut``): those must not be called exact from two seconds after it began until it is healed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from kvindex import EventManager, KVIndexError, PodSource, PrefixIndex
from kvindex.capture import Message, read_capture

from .experiment import Experiment, ExperimentError, seconds
from .hosts import missing, run
from .judge import NOTICE
from .logs import read, truth_dtype
from .scene import RATE, Scene

__all__ = ["Fault", "fault_of"]


class Fault(ABC):
    """What an experiment's document says, in this scene. :meth:`heal` is called once for each :meth:`inject`, also
    when that one has failed half way."""

    tools: tuple[str, ...] = ()
    needs_hosts = False
    proxied = False
    cuts = False
    #: A liar's truth is not defined: what it says of itself meanwhile is not judged, only everybody else.
    lies = False
    #: Its pods are removed and added anew, and their counters with them.
    anew = False
    #: Seconds until what can not be known has to be called so.
    notice = NOTICE
    #: Batches come, but late: a stream that never pauses shows no silence, and its lag is what has to say so.
    slow = False

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.spec = experiment.spec
        self.pods: list[str] = []
        self._problems: list[str] = []

    def missing(self) -> str | None:
        """Why it can not be done here, or None."""
        if self.needs_hosts and (why := missing(*self.tools)):
            return why
        for tool in self.tools:
            if shutil.which(tool) is None:
                return f"{tool} is not installed"
        return None

    def pod_env(self, where: Path) -> Mapping[str, str]:
        return {}

    def index_env(self, where: Path) -> Mapping[str, str]:
        return {}

    @property
    def cut(self) -> list[str]:
        """The pods that can not be known while it lasts."""
        return self.pods if self.cuts else []

    #: Requests a second of every pod while it is measured.
    rate = RATE

    def choose(self, scene: Scene) -> None:
        """Decide who is hit this time."""
        self.pods = scene.choose(self.spec["mode"], str(self.spec.get("value", "1")))

    @abstractmethod
    def inject(self, scene: Scene) -> None: ...

    def hold(self, scene: Scene) -> None:
        scene.quiet(self.experiment.hold)

    @abstractmethod
    def heal(self, scene: Scene) -> None: ...

    def recovered(self, scene: Scene) -> None:
        """Everything is well again, or its time is over."""
        self.pods = []

    def expect(self, so: object, otherwise: str) -> None:
        """Note a problem unless it is so: above all where a fault turns out to have done nothing."""
        if not so:
            self._problems.append(otherwise)

    def problems(self) -> list[str]:
        """What did not go as this fault demands, beside the five judgements."""
        return self._problems


class _Network(Fault):
    needs_hosts = True
    tools = ("iptables", "tc")

    def heal(self, scene: Scene) -> None:
        assert scene.hosts is not None
        for pod in self.pods:
            self.expect(scene.hosts[pod].clear(), f"{pod}: no packet was dropped or held back")


class Partition(_Network):
    cuts = True

    def inject(self, scene: Scene) -> None:
        assert scene.hosts is not None
        direction = self.spec.get("direction", "to")
        ports = self.experiment.local.get("ports")
        for pod in self.pods:
            into: list[str] = []
            out: list[str] = []
            if ports is not None:
                endpoint = scene.pods[pod].ranks[0][("events", "replay").index(ports)]
                port = str(endpoint).rpartition(":")[2]
                into, out = ["-p", "tcp", "--dport", port], ["-p", "tcp", "--sport", port]
            if direction in ("from", "both"):
                scene.hosts[pod].rule("INPUT", "-i", "e0", *into, "-j", "DROP")
            if direction in ("to", "both"):
                scene.hosts[pod].rule("OUTPUT", "-o", "e0", *out, "-j", "DROP")


class Loss(_Network):
    def inject(self, scene: Scene) -> None:
        assert scene.hosts is not None
        share = float(self.spec["loss"]["loss"]) / 100
        direction = self.spec.get("direction", "to")
        for pod in self.pods:
            for chain, side in (("OUTPUT", "-o"), ("INPUT", "-i")):
                if direction == "both" or (chain == "OUTPUT") == (direction == "to"):
                    scene.hosts[pod].rule(
                        chain, side, "e0", "-m", "statistic", "--mode", "random", "--probability", f"{share:g}",
                        "-j", "DROP",
                    )  # fmt: skip


class Bandwidth(_Network):
    slow = True

    def inject(self, scene: Scene) -> None:
        assert scene.hosts is not None
        limits = self.spec["bandwidth"]
        rate = float(self.experiment.local.get("rate", RATE))
        scene.rates(rate, self.pods)
        for pod in self.pods:
            # tc's units are Chaos Mesh's: bps is bytes a second.
            scene.hosts[pod].shape(
                "tbf", "rate", limits["rate"], "burst", str(limits["buffer"]), "limit", str(limits["limit"])
            )

    def heal(self, scene: Scene) -> None:
        for pod in self.pods:
            published = read(scene.where / f"truth-{pod}.bin", truth_dtype)
            status = scene.index.status()[pod]
            coming = published[published["seq"] == (status["last_seq"] or 0) + 1]
            late = time.monotonic() - float(coming["at"][-1]) if len(coming) else 0.0
            lag = status["lag"] or 0.0
            self.expect(lag > late - 1.0, f"{pod}: {late:.1f} s behind, and a lag of {lag:.1f} s is told")
        super().heal(scene)
        scene.rates(RATE, self.pods)


class _Proxied(Fault):
    proxied = True

    def heal(self, scene: Scene) -> None:
        for pod in self.pods:
            events, _ = scene.proxies[pod]
            self.expect(events.counts["delayed"] + events.counts["flipped"] + events.counts["cut"], f"{pod}: no effect")
            events.counts.clear()
            for proxy in scene.proxies[pod]:
                proxy.delay = proxy.flip = proxy.cut = 0.0


class Delay(_Proxied):
    def inject(self, scene: Scene) -> None:
        for pod in self.pods:
            for proxy in scene.proxies[pod]:
                proxy.delay = seconds(self.spec["delay"]["latency"])


class Corrupt(_Proxied):
    def inject(self, scene: Scene) -> None:
        share = float(self.spec["corrupt"]["corrupt"]) / 100
        for pod in self.pods:
            for proxy in scene.proxies[pod]:
                if self.experiment.local.get("how") == "truncate":
                    proxy.cut = share
                else:
                    proxy.flip = share


class Kill(Fault):
    """Pods are killed, and others take their places after a while."""

    cuts = True

    def inject(self, scene: Scene) -> None:
        for pod in self.pods:
            scene.pods[pod].kill()

    def heal(self, scene: Scene) -> None:
        # Side by side: one after the other would stretch the outage, and the index's back-off with it.
        with ThreadPoolExecutor() as starters:
            for _ in starters.map(lambda pod: scene.pods[pod].launch(), self.pods):
                pass


class Stop(Fault):
    """Pods hang with their sockets open."""

    cuts = True

    def inject(self, scene: Scene) -> None:
        for pod in self.pods:
            scene.pods[pod].pause()

    def heal(self, scene: Scene) -> None:
        for pod in self.pods:
            scene.pods[pod].go_on()


class IndexKill(Fault):
    """The index's own process is killed while it applies events, and another one starts from the last snapshot."""

    def choose(self, scene: Scene) -> None:
        self.pods = []

    def inject(self, scene: Scene) -> None:
        scene.index.ask("save", path=str(scene.snapshot))
        scene.quiet(0.5)  # the pods go on: the snapshot is old when it is needed
        scene.index.kill()

    def heal(self, scene: Scene) -> None:
        if not scene.index.alive:
            scene.index.launch()
            scene.follow()

    def recovered(self, scene: Scene) -> None:
        for name, status in scene.index.status().items():
            anew = status["batches"] > (status["last_seq"] or 0)
            self.expect(not anew, f"{name}: its history was applied anew, the snapshot was of no use")


class Stress(Fault):
    tools = ("stress-ng",)

    def choose(self, scene: Scene) -> None:
        # It is the machine that is stressed, with everybody on it: nobody is another's other.
        self.pods = []

    def inject(self, scene: Scene) -> None:
        stressors = self.spec["stressors"]
        command = ["stress-ng", "--quiet", "--timeout", f"{self.experiment.hold + 30:.0f}s"]
        if cpu := stressors.get("cpu"):
            command += ["--cpu", str(cpu["workers"]), "--cpu-load", str(cpu.get("load", 100))]
        if memory := stressors.get("memory"):
            command += ["--vm", str(memory["workers"]), "--vm-bytes", str(memory["size"]).removesuffix("B")]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)

    def heal(self, scene: Scene) -> None:
        self.expect(self._process.poll() is None, "the machine was not stressed all the time")
        # It ends its own workers when it is asked to.
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)


class TimeSkew(Fault):
    def _library(self) -> Path | None:
        return next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)

    def missing(self) -> str | None:
        return None if self._library() else "libfaketime is not installed"

    def pod_env(self, where: Path) -> Mapping[str, str]:
        for pod in where.glob("clock-*"):
            pod.unlink()
        return {
            "LD_PRELOAD": str(self._library()),
            "FAKETIME_TIMESTAMP_FILE": str(where / "clock-{pod}"),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "DONT_FAKE_MONOTONIC": "1",
        }

    def inject(self, scene: Scene) -> None:
        for pod in self.pods:
            self._set(scene, pod, seconds(self.spec["timeOffset"]))

    def heal(self, scene: Scene) -> None:
        for pod in self.pods:
            # A batch's time is its pod's: one that is made ten minutes ago has been on its way for as long.
            lag = scene.index.status()[pod]["lag"] or 0.0
            skew = -seconds(self.spec["timeOffset"])
            self.expect(abs(lag - skew) < 5.0, f"{pod}: its clock is {lag:.1f} s behind, not {skew:g} s")
            self._set(scene, pod, 0.0)

    def _set(self, scene: Scene, pod: str, offset: float) -> None:
        new = scene.where / f"clock-{pod}.new"
        new.write_text(f"{offset:+.3f}\n")
        new.rename(scene.where / f"clock-{pod}")


class Flood(Fault):
    """One pod serves ``rate`` times as much as each of the others."""

    # So few that one process can serve a hundred times as many.
    rate = 5.0

    def inject(self, scene: Scene) -> None:
        self._served = self._requests(scene)
        scene.rates(self.rate * float(self.spec["rate"]), self.pods)

    def heal(self, scene: Scene) -> None:
        served = {pod: now - self._served[pod] for pod, now in self._requests(scene).items()}
        scene.rates(self.rate, self.pods)
        most = max(count for pod, count in served.items() if pod not in self.pods)
        for pod in self.pods:
            # How much of the wanted rate one process reaches is the machine's affair; a flood it has to be.
            self.expect(served[pod] > 20 * most, f"{pod} served {served[pod]} requests, another {most}: no flood")

    def _requests(self, scene: Scene) -> dict[str, int]:
        return {name: pod.ask("status")["requests"] for name, pod in scene.pods.items()}


class Hostile(Fault):
    lies = True

    def inject(self, scene: Scene) -> None:
        for pod in self.pods:
            scene.pods[pod].ask("hostile")

    def heal(self, scene: Scene) -> None:
        errors = {pod: scene.index.status()[pod]["errors"] for pod in self.pods}
        for pod in self.pods:
            self.expect(sum(errors[pod].values()), f"{pod}: nothing was refused")
            scene.pods[pod].kill()
            scene.pods[pod].launch()


class _Misled(Fault):
    """The index is told something wrong about where a pod's events are, as one letter in a pod file does."""

    anew = True

    @abstractmethod
    def told(self, scene: Scene, pod: str) -> Mapping[str, Any]: ...

    def inject(self, scene: Scene) -> None:
        for pod in self.pods:
            scene.index.forget(pod)
            scene.index.follow(scene.pods[pod], **self.told(scene, pod))

    def heal(self, scene: Scene) -> None:
        status = scene.index.status()
        for pod in self.pods:
            state, reason = status[pod]["state"], status[pod]["reason"]
            self.expect(state == "degraded", f"{pod} is {state}: {reason}")
            self.expect("tcp://" in reason, f"{pod}: the reason names no address: {reason}")
            scene.index.forget(pod)
            scene.follow(pod)


class WrongTopic(_Misled):
    def told(self, scene: Scene, pod: str) -> Mapping[str, Any]:
        return {"topic": f"kv@{pod}@another"}


class SwappedReplay(_Misled):
    def told(self, scene: Scene, pod: str) -> Mapping[str, Any]:
        names = list(scene.pods)
        other = names[(names.index(pod) + 1) % len(names)]
        # By another address that leads there, for one that is another pod's already is refused.
        host, port = scene.pods[other].ranks[0][1].removeprefix("tcp://").rsplit(":", 1)
        behind = f"tcp://[::ffff:{host}]:{port}"
        return {"ranks": {0: (scene.pods[pod].ranks[0][0], behind)}}


class LostTail(Fault):
    """The last batches before a silence are lost on the way."""

    def inject(self, scene: Scene) -> None:
        self._recovered = self._tails(scene)
        for pod in self.pods:
            scene.pods[pod].ask("fault", drop=1_000_000)
        scene.quiet(0.3)
        scene.rates(0.0, self.pods)

    def heal(self, scene: Scene) -> None:
        for pod, count in self._tails(scene).items():
            self.expect(count > self._recovered[pod], f"{pod}: no batch was lost, or none was found")
            scene.pods[pod].ask("fault", drop=0)
        scene.rates(self.rate, self.pods)

    def _tails(self, scene: Scene) -> dict[str, int]:
        status = scene.index.status()
        return {
            pod: sum(worker["counters"].get("tails_recovered", 0) for worker in status[pod]["workers"].values())
            for pod in self.pods
        }


class PublisherDead(Fault):
    """The publisher's thread is dead, its process and connections live, and its cache goes on changing."""

    cuts = True
    notice = 10.0

    def inject(self, scene: Scene) -> None:
        for pod in self.pods:
            scene.pods[pod].ask("fault", mute=True, replay_silent=True)

    def heal(self, scene: Scene) -> None:
        status = scene.index.status()
        for pod in self.pods:
            self.expect(status[pod]["state"] == "stale", f"{pod} is {status[pod]['state']}")
            scene.pods[pod].ask("fault", mute=False, replay_silent=False)


class Herd(Fault):
    """So many other routers start at once and follow the pod."""

    def inject(self, scene: Scene) -> None:
        self._managers = []
        for pod in self.pods:
            endpoint, answers = scene.pods[pod].ranks[0]
            for _ in range(int(self.spec["readers"])):
                manager = EventManager(PrefixIndex())
                self._managers.append(manager)
                manager.add_pod(PodSource(pod, endpoint=endpoint, replay_endpoint=answers, model="sim"))

    def heal(self, scene: Scene) -> None:
        for manager in self._managers:
            missing = manager.wait_until_exact(10.0)
            self.expect(not missing, f"a reader of the herd is not exact: {missing}")
            manager.close()


class ReplayGone(Fault):
    def inject(self, scene: Scene) -> None:
        for pod in self.pods:
            scene.pods[pod].ask("fault", replay_silent=True, drop=int(self.spec["drop"]))

    def heal(self, scene: Scene) -> None:
        status = scene.index.status()
        for pod in self.pods:
            # The publisher has the request: the hole is not accepted while it may still answer.
            self.expect(status[pod]["state"] == "stale", f"{pod} is {status[pod]['state']}: no batch was lost")
            scene.pods[pod].ask("fault", replay_silent=False, drop=0)


class SlowDisk(Fault):
    """The index saves snapshots to a slow disk, again and again, and a recorder writes every stream to it.

    Saving must not hold up answers or streams. A recorder can not be faster than its disk, but what it has must be the
    beginning of every stream, without a gap.
    """

    tools = ("cc",)

    def choose(self, scene: Scene) -> None:
        self.pods = []

    def index_env(self, where: Path) -> Mapping[str, str]:
        source = Path(__file__).with_name("slow_disk.c")
        run("cc", "-shared", "-fPIC", "-O1", "-o", str(where / "slow_disk.so"), str(source), "-ldl")
        return {
            "LD_PRELOAD": str(where / "slow_disk.so"),
            "CHAOS_DISK": str(where / "disk"),
            "CHAOS_DISK_DELAY": str(where / "disk-delay"),
        }

    def inject(self, scene: Scene) -> None:
        (scene.where / "disk-delay").write_text(f"{seconds(self.spec['delay']) * 1000:.0f}")
        self._recording = scene.disk / "recording"
        pods = [f"{name}={','.join(map(str, pod.ranks[0]))}" for name, pod in scene.pods.items()]
        self._recorder = subprocess.Popen(
            [sys.executable, "-m", "kvindex", "record", *pods, "--output", str(self._recording)],
            env={**os.environ, **self.index_env(scene.where)}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip

    def hold(self, scene: Scene) -> None:
        end = time.monotonic() + self.experiment.hold
        saved = 0
        while time.monotonic() < end:
            took = scene.index.ask("save", path=str(scene.snapshot))["seconds"]
            saved += took >= seconds(self.spec["delay"])
        self.expect(saved, "saving was not delayed")

    def heal(self, scene: Scene) -> None:
        self._recorder.send_signal(signal.SIGINT)
        try:
            self.expect(self._recorder.wait(10) == 0, "the recorder failed")
        except subprocess.TimeoutExpired:
            self.expect(False, "the recorder does not end")
            self._recorder.kill()
            self._recorder.wait()
        (scene.where / "disk-delay").unlink()
        found = [record for record in read_capture(self._recording) if isinstance(record, Message)]
        self.expect(len(found) > 20, "nothing was recorded")
        for name in scene.pods:
            seqs = [message.seq for message in found if message.pod == name]
            self.expect(seqs == list(range(len(seqs))), f"the recording of {name} has gaps")


class DiskFull(Fault):
    """Snapshots are saved to a disk that has no room for them. What was there before must stay whole."""

    needs_hosts = True
    tools = ("mount", "umount")

    def choose(self, scene: Scene) -> None:
        self.pods = []

    def inject(self, scene: Scene) -> None:
        run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(scene.disk))
        scene.index.ask("save", path=str(scene.snapshot))
        self._before = scene.snapshot.read_bytes()
        filler = scene.disk / "filler"
        with suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()

    def hold(self, scene: Scene) -> None:
        with suppress(KVIndexError):
            scene.index.ask("save", path=str(scene.snapshot))
            self._problems.append("a snapshot was saved to a full disk")
        if scene.snapshot.read_bytes() != self._before:
            self._problems.append("the snapshot that was there is damaged")
        if left := [path.name for path in scene.disk.iterdir() if path.name not in ("filler", scene.snapshot.name)]:
            self._problems.append(f"left on the full disk: {left}")
        super().hold(scene)

    def heal(self, scene: Scene) -> None:
        try:
            (scene.disk / "filler").unlink(missing_ok=True)
            scene.index.ask("save", path=str(scene.snapshot))
        finally:
            run("umount", str(scene.disk))


_FAULTS: Mapping[tuple[str, str], Callable[[Experiment], Fault]] = {
    ("NetworkChaos", "partition"): Partition,
    ("NetworkChaos", "loss"): Loss,
    ("NetworkChaos", "bandwidth"): Bandwidth,
    ("NetworkChaos", "delay"): Delay,
    ("NetworkChaos", "corrupt"): Corrupt,
    ("PodChaos", "pod-kill"): Kill,
    ("StressChaos", ""): Stress,
    ("TimeChaos", ""): TimeSkew,
    ("LocalChaos", "flood"): Flood,
    ("LocalChaos", "hostile"): Hostile,
    ("LocalChaos", "replay-gone"): ReplayGone,
    ("LocalChaos", "wrong-topic"): WrongTopic,
    ("LocalChaos", "swapped-replay"): SwappedReplay,
    ("LocalChaos", "lost-tail"): LostTail,
    ("LocalChaos", "publisher-dead"): PublisherDead,
    ("LocalChaos", "herd"): Herd,
}


def fault_of(experiment: Experiment) -> Fault:
    """How an experiment is done here. Raises :class:`ExperimentError` for what Chaos Mesh can do and this can not."""
    key = (experiment.kind, experiment.action)
    if experiment.on_index:
        table: Mapping[tuple[str, str], Callable[[Experiment], Fault]] = {
            ("PodChaos", "pod-kill"): IndexKill,
            ("IOChaos", "fault"): DiskFull,
            ("IOChaos", "latency"): SlowDisk,
        }
    elif key == ("PodChaos", "pod-failure"):
        return Stop(experiment) if experiment.local.get("how") == "stop" else Kill(experiment)
    else:
        table = _FAULTS
    if key not in table:
        raise ExperimentError(f"{experiment.file}: {experiment.name}: {' '.join(key)} can not be done here")
    return table[key](experiment)
