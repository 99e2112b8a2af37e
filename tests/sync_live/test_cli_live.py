"""The commands for live streams, with publishers in this process and pods in processes of their own."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress

import pytest
import zmq
from rich.console import Console
from sync_support import BRISK, LivePublisher, nothing_left_behind, until

from kvindex import CaptureError, EventManager, PodSource, PrefixIndex
from kvindex.capture import Forget, Message, read_capture
from kvindex.cli import main, top

LONG = 30.0


@pytest.fixture
def command(capsys, monkeypatch):
    """Run ``kvindex ARGUMENTS`` in this process as into a pipe. Returns status, standard output and error."""
    monkeypatch.setenv("COLUMNS", "200")
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]

    def run(*arguments):
        # A replay has no sockets, but may run while the publisher is still losing those of a killed recorder.
        with nullcontext() if arguments[0] == "replay" else nothing_left_behind():
            status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    yield run
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def pod():
    with LivePublisher(name="pod") as made:
        yield made


def port(endpoint):
    return endpoint.rpartition(":")[2]


def word(pod, *, replay=True):
    endpoint, answers = pod.ranks[0]
    return f"{pod.name}={endpoint},{port(answers)}" if replay else f"{pod.name}={endpoint}"


@pytest.fixture
def refusing():
    """Return an endpoint without a listener."""
    with zmq.Context() as context, context.socket(zmq.PUB) as sock:
        number = sock.bind_to_random_port("tcp://127.0.0.1")
    return f"tcp://127.0.0.1:{number}"


# record


def recorded(path):
    header, *records = read_capture(path)
    return header, records


def test_a_recording_has_every_batch_and_its_time(command, pod, tmp_path):
    path = tmp_path / "x.gz"
    pod.publish(30)
    status, out, _ = command("record", word(pod) + ",engine=vllm", "-o", path, "--batches", 30, "--model", "m")
    assert status == 0
    assert "pod: 30 batches" in out
    header, records = recorded(path)
    assert (header["block_size"], header["pods"], header["model"], header["engine"]) == (4, ["pod"], "m", "vllm")
    assert [(each.pod, each.seq, each.rank) for each in records] == [("pod", number, 0) for number in range(30)]
    times = [each.at for each in records]
    assert times == sorted(times)
    index = PrefixIndex(block_size=4)
    for each in records:
        index.ingest(each.pod, each.payload, model="m")
    assert index.match_prefix(pod.chain(), model="m").tokens == {"pod": 120}
    status, out, _ = command("replay", path)
    assert status == 0
    assert re.search(r"pod +│ exact +│ +30 │ +30 │", out)


def test_a_recording_of_live_batches_without_a_replay(command, pod, tmp_path):
    path = tmp_path / "x.gz"
    stop = threading.Event()

    def publish():
        while not stop.wait(0.005):
            pod.publish()

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        status, out, _ = command("record", pod.ranks[0][0], "-o", path, "--batches", 5, "--block-size", 8)
    finally:
        stop.set()
        thread.join()
    assert status == 0
    header, records = recorded(path)
    assert header["block_size"] == 8
    assert len(records) == 5
    assert "engine" not in header
    assert {each.topic for each in records} == {"kv@pod@m"}
    assert [each.seq for each in records] == [records[0].seq + n for n in range(5)]
    assert "degraded" in out or records[0].seq == 0


def test_several_pods_with_the_replay_endpoints_apart(command, pod, tmp_path):
    path = tmp_path / "x.gz"
    with LivePublisher(name="other", ranks=1) as other:
        pod.publish(3)
        other.publish(4)
        replays = [part for each in (pod, other) for part in ("--replay", each.ranks[0][1])]
        words = [word(each, replay=False) for each in (pod, other)]
        status, _, _ = command("record", *words, *replays, "-o", path, "--batches", 7)
    assert status == 0
    assert {name: sum(each.pod == name for each in recorded(path)[1]) for name in ("pod", "other")} == {
        "pod": 3,
        "other": 4,
    }


def test_nothing_to_record_ends_with_1_and_an_empty_capture(command, refusing, tmp_path):
    path = tmp_path / "x.gz"
    status, out, _ = command("record", f"a={refusing}", "-o", path, "--seconds", 0.3)
    assert status == 1
    assert "kvindex doctor" in out
    assert "a: nothing; stale" in out
    assert recorded(path) == (recorded(path)[0], [])


class Recording:
    """``kvindex record`` as a process of its own."""

    def __init__(self, *arguments):
        code = "import sys; from kvindex.cli import main; sys.exit(main())"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "record", *map(str, arguments)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def readable(path):
    """Return the readable records of a capture that may be cut."""
    got = []
    try:
        for each in read_capture(path):
            got.append(each)
    except (CaptureError, FileNotFoundError):
        pass
    return got[1:]


@pytest.mark.parametrize(("number", "restarts"), [(signal.SIGINT, 1), (signal.SIGTERM, 0)])
def test_an_interrupt_ends_a_recording_well_and_a_restart_is_in_it(pod, tmp_path, number, restarts):
    path = tmp_path / "x.gz"
    pod.publish(10)
    with Recording(word(pod), "-o", path, "--model", "m") as recording:
        until(lambda: len(readable(path)) == 10, LONG)
        if restarts:
            pod.restart()
        pod.publish(2)
        until(lambda: len(readable(path)) == 12 + restarts, LONG)
        recording.process.send_signal(number)
        out, _ = recording.process.communicate(timeout=LONG)
        assert recording.process.returncode == 0, out
    assert "12 batches" in out
    assert ("1 restart;" in out) == bool(restarts)
    _, records = recorded(path)
    assert [type(each) for each in records] == [Message] * 10 + [Forget] * restarts + [Message] * 2
    assert [each.seq for each in records[-2:]] == ([0, 1] if restarts else [10, 11])


def test_a_recording_that_is_killed_can_be_read(command, pod, tmp_path):
    path = tmp_path / "x.gz"
    pod.publish(10)
    with Recording(word(pod), "-o", path) as recording:
        until(lambda: len(readable(path)) == 10, LONG)
        recording.process.kill()
        recording.process.wait()
    status, out, _ = command("replay", path)
    assert status == 2
    assert re.search(r"pod +│ exact +│ +10 │", out)
    assert "after a whole record" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no pods"),
        (("nonsense",), "is not [NAME=]ENDPOINT"),
        (("a=tcp://h:1", "a=tcp://h:2"), "named twice"),
        (("a=tcp://h:1,2", "--replay", "3"), "no POD without a replay endpoint"),
        (("http://127.0.0.1:1",), "record: nothing listens at http://127.0.0.1:1\n"),
        (("--pods", "/nonexistent/pods.yaml"), "pods.yaml"),
        (("a=tcp://h:1", "-o", "/nonexistent/x.gz"), "x.gz"),
        (("a=tcp://127.0.0.1:65535", "--ranks", "2"), "65536"),
    ],
)
def test_what_can_not_be_recorded_is_refused_with_2(command, tmp_path, arguments, message):
    more = () if "-o" in arguments else ("-o", tmp_path / "x.gz")
    status, out, err = command("record", *arguments, *more, "--seconds", 0.2)
    assert (status, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize("option", [("--seconds", "0"), ("--seconds", "inf"), ("--batches", "0")])
def test_numbers_that_are_none_are_refused(command, tmp_path, option, capsys):
    with pytest.raises(SystemExit) as caught:
        command("record", "a=tcp://h:1", "-o", tmp_path / "x.gz", *option)
    assert caught.value.code == 2


def test_a_disk_that_is_full_is_an_error(command, pod, tmp_path):
    pod.publish(3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        status, _, err = command("record", word(pod), "-o", tmp_path / "x.gz", "--batches", 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert "File too large" in err


# top


def cells(output, name):
    """Return the cells of a pod's line by their column."""
    table = output.splitlines()
    place, head = next((n, line) for n, line in enumerate(table) if line.strip().startswith("pod "))
    for line in table[place + 1 :]:
        if line.strip().startswith(name):
            values = re.split(r"\s{2,}", line.strip(), maxsplit=9)
            return dict(zip(re.split(r"\s{2,}", head.strip()), values, strict=False))
    raise AssertionError(f"no line of {name} in:\n{output}")


def test_once_prints_a_pod_that_is_exact(command, pod):
    pod.publish(12)
    status, out, _ = command("top", word(pod), "--once", "--block-size", 4, "--wait", LONG, "--interval", 0.01)
    assert status == 0
    line = cells(out, "pod")
    assert (line["state"], line["blocks"], line["gaps"], line["errors"]) == ("exact", "12", "0", "0")
    assert line["lag"] == "-"  # no batch has arrived live
    assert "1 pod: 1 exact; 12 blocks" in out


def test_once_prints_a_pod_that_is_not_there(command, refusing):
    status, out, _ = command("top", f"gone={refusing}", "--once", "--wait", 0.3)
    assert status == 1
    line = cells(out, "gone")
    assert (line["state"], line["lag"], line["blocks"]) == ("stale", "-", "0")
    assert "nothing accepts connections there" in out


def test_pods_of_a_file_with_several_ranks(command, tmp_path):
    path = tmp_path / "pods.json"
    with LivePublisher(name="two", ranks=2) as two:
        two.publish(3)
        two.publish(4, rank=1)
        path.write_text(json.dumps([{"name": "two", "ranks": {r: list(ends) for r, ends in two.ranks.items()}}]))
        status, out, _ = command("top", "--pods", path, "--block-size", 4, "--interval", 0.01)
    assert status == 0
    assert [cells(out, name)["blocks"] for name in ("two", "rank 0", "rank 1")] == ["7", "3", "4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "no pods"), (("--pods", "/nonexistent/x.yaml"), "x.yaml"), (("a=tcp://h:1", "a=tcp://h:2"), "named twice")],
)
def test_a_view_of_nothing_is_refused_with_2(command, arguments, message):
    status, out, err = command("top", *arguments, "--once")
    assert (status, out) == (2, "")
    assert message in err


def test_rates_and_the_lines_that_fit(pod):
    def printed(view, height=None):
        with Console(width=150) as console, console.capture() as capture:
            console.print(view.table(150, height))
        return capture.get()

    with EventManager(PrefixIndex(block_size=4), policy=BRISK) as manager:
        view = top.View(manager)
        assert "0 pods: none yet; 0 blocks" in printed(view)
        manager.add_pod(PodSource.from_string(word(pod)))
        for number in range(8):
            manager.add_pod(PodSource(f"gone{number}", endpoint=f"tcp://127.0.0.1:{number + 1}"))
        assert manager.wait_until_current(LONG, pods="pod")
        assert cells(printed(view), "pod")["events/s"] == "0"
        pod.publish(50)
        until(lambda: manager.status()["pod"].last_seq == 49, LONG)
        assert float(cells(printed(view), "pod")["events/s"].replace(",", "")) > 0
        few = printed(view, 10)
        assert [line.split()[0] for line in few.splitlines() if "stale  " in line] == [f"gone{n}" for n in range(4)]
        assert "exact  " not in few
        assert "9 pods: 1 exact, 8 stale; 50 blocks" in few


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("name", ["p", "prod/deepseek-v3-decode-6b5c8d7f9d-abcd"])
def test_a_hundred_pods_in_a_small_terminal(width, name):
    """Pod, state and reason stay readable for reasons of any length, and no pod is left out silently."""
    with EventManager(PrefixIndex(block_size=4), policy=BRISK) as manager:
        for number in range(100):
            manager.add_pod(PodSource(f"{name}{number}", endpoint=f"tcp://127.0.0.1:{number + 1}"))
        until(lambda: all(pod.reason.startswith("tcp") for pod in manager.status().values()), LONG)
        with Console(width=width, height=24) as console, console.capture() as capture:
            console.print(top.View(manager).table(width, 24))
    shown = capture.get().splitlines()
    assert len(shown) <= 24
    assert max(map(len, shown)) <= width
    rows = [line.split() for line in shown if " stale " in line]
    assert len(rows) == 18
    assert len({row[0] for row in rows}) == 18, "names that are cut can still be told apart"
    assert all(row[1] == "stale" and "tcp://127.0.0.1:" in line for row, line in zip(rows, shown[3:], strict=False))
    assert "100 pods: 100 stale; 0 blocks; 82 rows of 100 left out, the best" in " ".join(" ".join(shown).split())


def test_figures_that_are_not_0_have_their_column_before_those_that_are(pod):
    with EventManager(PrefixIndex(block_size=8), policy=BRISK) as manager:
        pod.publish(3)
        manager.add_pod(PodSource.from_string(word(pod)))
        until(lambda: sum(manager.status()["pod"].errors.values()) == 3, LONG)  # one per batch
        until(lambda: manager.status()["pod"].state == "degraded", LONG)
        with Console(width=80) as console, console.capture() as capture:
            console.print(top.View(manager).table(80, 24))
    line = cells(capture.get(), "pod")
    assert (line["state"], line["errors"]) == ("degraded", "3")
    assert "restarts" not in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT])
def test_whoever_ends_it_gets_the_terminal_back(number, refusing):
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "kvindex", "top", f"a={refusing}", "--interval", "0.05"],
        stdin=child, stdout=child, stderr=child, env={**os.environ, "TERM": "xterm", "COLUMNS": "150"},
    )  # fmt: skip
    os.close(child)
    seen = bytearray()
    try:
        while b"1 stale" not in seen:
            assert select.select([parent], [], [], LONG)[0], seen
            seen.extend(os.read(parent, 1 << 16))
        process.send_signal(number)
        with suppress(OSError):  # error of a terminal whose other end is closed
            while piece := os.read(parent, 1 << 16):
                seen.extend(piece)
        assert process.wait(LONG) == (1 if number == signal.SIGINT else 128 + number)
        assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h"), "the screen"
        assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l"), "the cursor"
        assert b"Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(parent)


def test_a_disk_that_is_full_is_named_with_what_is_left(command, pod):
    pod.publish(20)
    status, _, err = command("record", word(pod), "-o", "/dev/full", "--batches", 5, "--block-size", 4)
    assert status == 2
    assert "/dev/full cannot be written any further: No space left on device" in err
    assert "of the 5 batches until then can be read" in err


def test_a_capture_without_answers_says_that_nothing_was_compared(command, pod, tmp_path):
    pod.publish(5)
    path = tmp_path / "a.gz"
    assert command("record", word(pod), "-o", path, "--batches", 5, "--block-size", 4)[0] == 0
    status, out, _ = command("replay", path)
    assert status == 0
    assert "a.gz has no engine's answers: its batches were applied, nothing was compared" in out


def test_on_a_terminal_it_lives_until_it_is_interrupted():
    with LivePublisher(name="pod") as pod:
        pod.publish(5)
        parent, child = pty.openpty()
        code = "import sys; from kvindex.cli import main; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "top", word(pod), "--block-size", "4", "--interval", "0.05"],
            stdin=child, stdout=child, stderr=child, env={**os.environ, "TERM": "xterm", "COLUMNS": "150"},
        )  # fmt: skip
        os.close(child)
        seen = bytearray()

        def read(*words):
            end = time.monotonic() + LONG  # for everything: a table that is redrawn never falls silent
            while not all(word in seen for word in words):
                assert select.select([parent], [], [], max(0, end - time.monotonic()))[0], seen
                seen.extend(os.read(parent, 1 << 16))
            seen.clear()

        try:
            read(b"1 pod: 1 exact; 5 blocks")
            pod.publish(7)
            read(b"12 blocks")
            process.send_signal(signal.SIGINT)
            read(b"\x1b[?1049l")  # the terminal's own screen is back
            assert process.wait(LONG) == 0
        finally:
            process.kill()
            process.wait()
            os.close(parent)
