"""The command line: its output and its exit status."""

import argparse
import gzip
import itertools
import json
import random
import re
import shlex
import signal
import socket
import subprocess
import sys

import msgpack
import numpy as np
import psutil
import pytest
from sync_support import until

import kvindex
from kvindex.capture import CaptureWriter, Forget, Message, Query, read_capture
from kvindex.cli import _pods, _timed, demo, main, parser
from kvindex.cli._terminal import counted
from kvindex.sim import write_sample
from kvindex.sim.wire import Stored, encode_batch, wire_form


@pytest.fixture
def command(capsys, monkeypatch):
    """Run ``kvindex ARGUMENTS`` in this process with output as to a pipe. Returns status, standard output and error."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def row(output, *cells):
    """Return the cells of the table row that starts with these cells."""
    for line in output.splitlines():
        found = [cell.strip() for cell in line.strip("│┃ ").split("│")]
        if found[: len(cells)] == list(cells):
            return found
    raise AssertionError(f"no row starts with {cells} in:\n{output}")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """A capture of simulated engines."""
    path = tmp_path_factory.mktemp("samples") / "sample.msgpack.gz"
    write_sample("full-attention", path, seed=3, requests=25)
    return path


def rewritten(source, target, change):
    """Copy a capture with every record passed through ``change``."""
    header, *records = read_capture(source)
    with CaptureWriter(target, header) as writer:
        for record in records:
            writer.write(change(record))


def write_trace(path, requests, opener=open, seed=1):
    """Write conversations in the format of a Mooncake trace, in which every prompt extends an earlier one."""
    rng = random.Random(seed)
    chains = [[0]]
    fresh = 1
    with opener(path, "wt") as file:
        for number in range(requests):
            chain = list(rng.choice(chains))
            grow = rng.randint(1, 3)
            chain += range(fresh, fresh + grow)
            fresh += grow
            chains.append(chain)
            length = len(chain) * 512 - rng.randrange(512)
            request = {"timestamp": number * 900, "input_length": length, "output_length": 20, "hash_ids": chain}
            file.write(json.dumps(request) + "\n")
    return path


# A capture


def test_a_good_capture_has_no_difference_and_ends_with_0(command, sample):
    status, out, err = command("replay", sample)
    assert (status, err) == (0, "")
    header, *records = read_capture(sample)
    assert header["pods"] == ["pod-0", "pod-1", "pod-2"]
    queries = [record for record in records if isinstance(record, Query)]
    batches = {pod: sum(not isinstance(r, Query) and r.pod == pod for r in records) for pod in header["pods"]}
    assert all(batches.values())
    for pod in header["pods"]:
        assert row(out, pod, "exact", str(batches[pod]))[4:6] == [str(len(queries)), "0"]
    assert row(out, "all", "")[2] == str(sum(batches.values()))
    assert row(out, "all", "")[4:6] == [str(3 * len(queries)), "0"]
    assert f"{len(queries)} prompts" in out


def test_every_recorded_capture_agrees_with_its_engine(command, shared):
    paths = sorted((shared / "captures").glob("*.gz"))
    status, out, _ = command("replay", *paths)
    assert status == 0
    totals = [line.split("│") for line in out.splitlines() if line.startswith("│ all")]
    assert len(totals) == len(paths)
    assert sum(int(cells[5].strip().replace(",", "")) for cells in totals) > 0
    assert {cells[6].strip() for cells in totals} == {"0"}


def test_a_difference_is_named_and_ends_with_1(command, sample, tmp_path):
    path = tmp_path / "wrong.msgpack.gz"
    truth = {}

    def change(record):
        if isinstance(record, Query) and record.id == "q30":
            truth.update(record.hits)
            return record._replace(hits={**record.hits, "pod-1": record.hits["pod-1"] + 16})
        return record

    rewritten(sample, path, change)
    status, out, _ = command("replay", path)
    assert status == 1
    assert "1 difference from" in out
    true = truth["pod-1"]
    assert f"wrong.msgpack.gz: query q30, pod pod-1: expected {true + 16} tokens, got {true}" in out
    assert row(out, "pod-1", "exact")[5] == "1"
    assert row(out, "pod-0", "exact")[5] == "0"


def test_answers_are_compared_by_the_rules_of_the_recorded_engine(command, tmp_path):
    """For a prompt of exactly two blocks, vLLM reuses one of them and SGLang both."""
    tokens = np.arange(32, dtype=np.uint32)
    event = Stored([b"1" * 8, b"2" * 8], None, tokens, 16)
    for engine, form, hit in (
        ("vllm", "vllm-0.33.0", 16),
        ("sglang", "sglang-0.5.22", 32),
        ("other", "vllm-0.33.0", 32),
    ):
        path = tmp_path / f"{engine}.msgpack.gz"
        with CaptureWriter(path, {"engine": engine, "block_size": 16}) as writer:
            writer.write(Message("a", "", 0, encode_batch([event], wire_form(form))))
            writer.write(Query("q", tokens, {"a": hit}))
        assert command("replay", path)[0] == 0, engine


def test_a_capture_may_name_an_adapter_by_its_number_and_forget_a_worker(command, tmp_path):
    tokens = np.arange(32, dtype=np.uint32)
    form = wire_form("sglang-0.5.22")
    path = tmp_path / "forgotten.msgpack.gz"
    with CaptureWriter(path, {"engine": "sglang", "block_size": 16}) as writer:
        for rank, adapter in ((0, None), (1, 3)):
            event = Stored([b"1" * 8, b"2" * 8], None, tokens, 16, lora_id=adapter)
            writer.write(Message("a", "", 0, encode_batch([event], form), rank=rank))
        writer.write(Query("by number", tokens, {"a": 32}, lora_id=3))
        writer.write(Forget("a", 1))
        writer.write(Query("forgotten", tokens, {"a": 0}, lora_id=3))
        writer.write(Query("the other rank", tokens, {"a": 32}))
    status, out, _ = command("replay", path)
    assert status == 0, out
    assert row(out, "a")[4] == "3"


def test_a_capture_that_is_cut_off_counts_until_then_and_ends_with_2(command, sample, tmp_path):
    path = tmp_path / "cut.msgpack.gz"
    data = sample.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    status, out, _ = command("replay", path)
    assert status == 2
    assert int(row(out, "all", "")[4].replace(",", "")) > 0
    assert re.search(r"cut\.msgpack\.gz is cut off at byte \d+ of its uncompressed stream", out)


def test_a_batch_that_is_none_is_counted_and_the_replay_goes_on(command, sample, tmp_path):
    path = tmp_path / "bad.msgpack.gz"
    seen = []

    def change(record):
        if not isinstance(record, Query):
            seen.append(record)
            if len(seen) == 5:
                return record._replace(payload=b"\xc1 no batch")
        return record

    rewritten(sample, path, change)
    status, out, _ = command("replay", path)
    assert status in (0, 1)
    assert "undecodable_batch 1" in out
    assert row(out, seen[4].pod, "degraded")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off at byte 0"),
        (b"hello", "is not a gzip file"),
        (gzip.compress(b"\x01"), "starts with a header map"),
        (gzip.compress(b"\x80")[:12] + b"\xff" * 20, "is not a gzip file"),
    ],
    ids=["empty", "text", "number", "damaged"],
)
def test_what_is_no_capture_is_refused_with_2(command, tmp_path, content, message):
    path = tmp_path / "x"
    path.write_bytes(content)
    status, _, err = command("replay", path)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_a_file_that_is_not_there_is_refused_with_2(command, tmp_path):
    status, _, err = command("replay", tmp_path / "absent.gz")
    assert status == 2
    assert "absent.gz" in err


# A trace


@pytest.mark.parametrize("opener", [open, gzip.open], ids=["plain", "gzip"])
def test_a_trace_is_served_under_three_routings(command, tmp_path, opener):
    path = write_trace(tmp_path / "trace", 80, opener)
    status, out, _ = command("replay", path, "--pods", 3, "--limit", 60)
    assert status == 0
    with opener(path, "rt") as lines:
        lengths = [json.loads(line)["input_length"] for line in lines][:60]
    rates = {}
    for routing in ("round-robin", "random", "prefix-aware"):
        cells = row(out, routing)
        assert cells[1] == f"{sum(lengths):,}"
        rates[routing] = int(cells[3].replace(",", "")) / sum(lengths)
        assert cells[2] == f"{rates[routing]:.1%}"
    assert rates["prefix-aware"] > max(rates["round-robin"], rates["random"])
    assert "answers equal to the engines': 180 of 180" in out
    assert "60 requests, 3 pods" in out


def test_the_same_seed_gives_the_same_table(command, tmp_path):
    path = write_trace(tmp_path / "trace", 30)
    tables = []
    for seed in (1, 1, 2):
        out = command("replay", path, "--pods", 4, "--seed", seed)[1]
        tables.append([row(out, routing) for routing in ("round-robin", "random", "prefix-aware")])
    assert tables[0] == tables[1]
    assert tables[0][1] != tables[2][1]


def test_a_pod_with_a_small_cache_reuses_less(command, tmp_path):
    path = write_trace(tmp_path / "trace", 60)
    saved = []
    for blocks in (400, 40_000):
        out = command("replay", path, "--pods", 1, "--block-size", 32, "--blocks-per-pod", blocks)[1]
        saved.append(int(row(out, "prefix-aware")[3].replace(",", "")))
    assert saved[0] < saved[1]


def test_plot_draws_a_picture(command, tmp_path):
    path = write_trace(tmp_path / "trace", 20)
    picture = tmp_path / "rates.png"
    status, out, _ = command("replay", path, "--pods", 2, "--plot", picture)
    assert status == 0
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_an_unknown_kind_is_refused(command, tmp_path):
    path = write_trace(tmp_path / "trace", 5)
    status, _, err = command("replay", path, "--pods", 1, "--plot", tmp_path / "rates.nonsense")
    assert status == 2
    assert "rates.nonsense" in err


def test_plot_needs_one_trace(command, tmp_path, sample):
    status, _, err = command("replay", sample, "--plot", tmp_path / "x.png")
    assert status == 2
    assert "--plot draws one trace" in err


@pytest.mark.parametrize(
    "line",
    [
        '{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}',
        '{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 100, "output_length": 1, "hash_ids": ["a"]}',
        '{"timestamp": 0, "input_length": 100, "output_length": 1}',
        '{"timestamp": 0, "input_length',
    ],
)
def test_a_line_that_is_no_request_is_named(command, tmp_path, line):
    path = write_trace(tmp_path / "trace", 2)
    with open(path, "a") as file:
        file.write(line + "\n")
    status, _, err = command("replay", path, "--pods", 1)
    assert status == 2
    assert "line 3" in err


def test_a_prompt_that_no_pod_could_hold_is_refused(command, tmp_path):
    path = write_trace(tmp_path / "trace", 3)
    status, _, err = command("replay", path, "--pods", 1, "--blocks-per-pod", 4)
    assert status == 2
    assert "a prompt of" in err


@pytest.mark.parametrize("option", ["--pods", "--limit", "--block-size", "--blocks-per-pod"])
def test_numbers_below_one_are_refused(command, tmp_path, option, capsys):
    with pytest.raises(SystemExit) as caught:
        command("replay", tmp_path / "trace", option, 0)
    assert caught.value.code == 2
    assert "0 is not at least 1" in capsys.readouterr().err


# The demo


@pytest.fixture
def short_absence(monkeypatch):
    """Bring the killed pod back as soon as its loss was noticed."""
    monkeypatch.setattr(demo, "AWAY", 0.0)


def test_the_demo_ends_with_every_answer_equal(command, short_absence):
    status, out, _ = command("demo", "--conversations", 12, "--seconds", 0, "--pods", 5)
    assert status == 0
    ((right, asked),) = set(re.findall(r"answers equal to the engines': ([\d,]+) of ([\d,]+)", out))
    assert right == asked != "0"
    rates = dict(re.findall(r"([a-z-]+) routing +hit rate +([\d.]+)%", out))
    assert float(rates["prefix-aware"]) > float(rates["round-robin"])
    assert len({row(out, f"pod-{number}")[1] for number in range(5)}) >= 4, "several wire forms at once"
    changes = ["pod-1 is killed", "pod-1: exact -> stale", "pod-1 is started again", "pod-1: stale -> exact"]
    assert sorted(changes, key=out.index) == changes
    assert {row(out, f"pod-{number}")[3] for number in range(5)} == {"exact"}
    # That pod could not be compared for a while, and the output reports this.
    assert re.search(r"\([1-9]\d* not asked: that pod was stale\)", out)


def test_the_live_table_shows_a_pod_go_stale_and_come_back(command, short_absence, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # lets a pipe count as a terminal
    monkeypatch.setenv("TERM", "xterm")  # a dumb terminal shows a table only once, at the end
    status, out, _ = command("demo", "--conversations", 4, "--seconds", 1, "--pods", 2)
    assert status == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    states = {pod: re.findall(rf"{pod} +│[^│]+│[^│]+│ (\w+)", plain) for pod in ("pod-0", "pod-1")}
    assert [state for state, _ in itertools.groupby(states["pod-0"])] == ["exact", "stale", "exact"]
    assert set(states["pod-1"]) == {"exact"}


def running(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_demo_leaves_no_process_behind(number):
    command = [sys.executable, "-m", "kvindex", "demo", "--pods", "2", "--seconds", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as shown:
        for line in shown.stdout:
            if "requests" in line:
                break
        pods = psutil.Process(shown.pid).children()
        assert len(pods) == 2
        shown.send_signal(number)
        _, err = shown.communicate(timeout=60)
    assert (shown.returncode, err) == (130 if number == signal.SIGINT else -number, "")
    until(lambda: not any(map(running, pods)))


def test_the_demo_fails_when_an_answer_differs(command, short_absence, monkeypatch):
    """An index without removal events answers too many tokens sooner or later."""

    class Deaf:
        def __init__(self, **options):
            self._index = kvindex.PrefixIndex(**options)

        def __getattr__(self, name):
            return getattr(self._index, name)

        def ingest(self, pod, payload, **options):
            ts, events, rank = msgpack.unpackb(payload)
            tags = [event["type"] if isinstance(event, dict) else event[0] for event in events]
            kept = [event for tag, event in zip(tags, events, strict=True) if tag != "BlockRemoved"]
            return self._index.ingest(pod, msgpack.packb([ts, kept, rank]), **options)

    monkeypatch.setattr(_timed, "PrefixIndex", Deaf)
    status, out, _ = command("demo", "--conversations", 30, "--seconds", 0, "--pods", 2, "--blocks-per-pod", 400)
    assert status == 1
    assert re.search(r"prompt \d+, pod pod-\d: expected \d+ tokens, got \d+", out)


# Other commands


def test_the_model_option_is_for_pods_without_a_model():
    args = parser().parse_args(["top", "a=tcp://h:1,2,model=org/own", "b=tcp://h:3", "--model", "m"])
    assert {source.name: source.model for source in _pods.sources(args)} == {"a": "org/own", "b": "m"}


def test_a_simulated_pod_that_can_not_be_is_refused(command):
    status, out, err = command("sim", "--port", 0, "--ranks", 0)
    assert (status, out) == (2, "")
    assert "must be positive" in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, out, err = command("sim", "--port", taken.getsockname()[1], "--no-replay")
    assert (status, out) == (2, "")
    assert "cannot use the ports" in err


def test_a_missing_extra_is_told_with_what_to_install(command, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = write_trace(tmp_path / "trace", 3)
    status, _, err = command("replay", path, "--plot", tmp_path / "x.png")
    assert status == 2
    assert 'pip install "kvindex[cli]"' in err
    monkeypatch.setitem(sys.modules, "rich.console", None)
    status, _, err = command("demo")
    assert status == 2
    assert "needs rich" in err
    assert 'pip install "kvindex[cli]"' in err
    monkeypatch.delitem(sys.modules, "kvindex.sim.http", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, out, err = command("sim", "--port", 0, "--http", 0)
    assert (status, out) == (2, "")
    assert err == "kvindex sim: an HTTP server needs starlette and uvicorn: pip install 'kvindex[sim]'\n"


def subcommands():
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices


COMMANDS = ["demo", "sim", "serve", "collect", "epp", "top", "doctor", "verify", "record", "replay"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_each_option_is_and_its_examples_are_understood(name):
    found = subcommands()[name]
    assert all(action.help for action in found._actions)
    text = found.format_help()
    assert "exit status: 0 " in text
    lines = re.findall(r"^  kvindex (.*)$", text.partition("\nexamples:\n")[2], re.M)
    assert lines
    for line in lines:
        assert parser().parse_args(shlex.split(line)).command == name


def test_every_command_is_in_the_help_above():
    assert sorted(subcommands()) == sorted(COMMANDS)


def test_no_command_is_an_error_that_lists_them(command):
    status, out, err = command()
    assert (status, out) == (2, "")
    assert err == parser().format_help()


def test_python_m_kvindex_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "kvindex", "--help"], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert "replay" in done.stdout


@pytest.mark.parametrize(
    ("number", "words", "told"),
    [
        (0, ("pod",), "0 pods"),
        (1, ("pod",), "1 pod"),
        (2000, ("pod",), "2,000 pods"),
        (1, ("batch was", "batches were"), "1 batch was"),
        (3, ("batch was", "batches were"), "3 batches were"),
    ],
)
def test_numbers_agree_with_their_words(number, words, told):
    assert counted(number, *words) == told
