"""``kvindex doctor``: find the cause of a hit rate of zero."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import zmq

from .. import EventManager, PodSource, PrefixIndex
from ..sync.addresses import split_tcp
from ..sync.source import Endpoints
from ..sync.status import Batch, IndexChange, WorkerStatus
from ._facts import Facts
from ._pods import add_arguments, one_source
from ._probe import what_answers
from ._terminal import CommandError, add_command, console, counted, positive, seconds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_parser"]

PUBLISHERS = ("PUB", "XPUB")

# Seconds: the timeout of a probe, the time for a stream to become current, and the lag of events that is worth a note.
PROBE = 2.0
PATIENCE = 10.0
LATE = 5.0

# The counters of a stream, explained for a reader who looks for a cause.
ERRORS = {
    "undecodable": "payloads are not batches of KV events: is this another publisher, or an unknown engine?",
    "refused": "batches were refused by the index",
    "bad_frame_count": "messages do not have the 3 frames of KV events: another publisher?",
    "bad_seq_size": "messages have no sequence number of 8 bytes: another publisher?",
    "bad_seq": "messages have invalid sequence numbers",
    "bad_event": "events were malformed",
    "unknown_event": "events were of a kind that this version does not know, and may have removed blocks",
    "bad_token": "events have tokens that are not integers (TensorRT-LLM's strings), so their blocks cannot be placed",
    "misaligned": "events start inside a block",
    "parked_full": "blocks were refused because too many wait for their parents",
    "duplicate_hash": "events name one block twice",
    "foreign_topic": "messages have another topic than the first: are several engines behind this endpoint?",
    "late_frames": "messages arrived over a connection that was already replaced",
}  # fmt: skip

# Counters without effect on matches: promotions of vLLM's partial blocks, removals of blocks that were never counted.
HARMLESS = frozenset({"partial_block", "unknown_hash", "block_size_mismatch", "ignored_medium"})


class Finding(NamedTuple):
    level: Literal["ok", "note", "WRONG", "so"]
    text: str
    replays: bool = False
    """Whether the replay endpoint is the cause."""


# "so" is a consequence of the WRONG before it.
STYLES = {"ok": "green", "note": "cyan", "WRONG": "bold red", "so": "red"}


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "doctor",
        help="find the cause of a hit rate of zero",
        description="Connect to one pod, watch its events, and report the causes of missing matches: addresses, "
        "topics, block sizes, adapters, salts, gaps.",
        status="0 if no problem was found, 1 otherwise",
        lines=[
            "kvindex doctor tcp://10.0.0.1:5557,5558",
            "kvindex doctor http://10.0.0.1:8000 --seconds 30 --tokens prompt.json",
        ],
    )
    add_arguments(parser, several=False)
    parser.add_argument("--block-size", type=positive, default=16, metavar="TOKENS",
                        help="block size of the router's index (default %(default)s)")  # fmt: skip
    parser.add_argument("--topic", help="topic of the router's subscription, if it has one")
    parser.add_argument("--seconds", type=seconds, default=5.0, metavar="N",
                        help="seconds to watch live events (default %(default)g)")  # fmt: skip
    parser.add_argument(
        "--tokens",
        metavar="FILE",
        help="file with a JSON list of token ids, the prompt to look for; - for standard input",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    out = console()
    source = one_source(args)
    tokens = None if args.tokens is None else read_tokens(args.tokens)
    # The findings report the same things in order, so the log's lines are not shown.
    logging.getLogger("kvindex").addHandler(logging.NullHandler())
    patients = [Patient(rank, at, source.server_key is not None) for rank, at in source.workers().items()]
    for patient in patients:
        patient.probe()
        patient.findings += addresses(patient)
    about_prompt: list[Finding] = []
    if any(patient.publishes for patient in patients):
        about_prompt += watch(out, source, patients, tokens, args)
    findings = [found for patient in patients for found in patient.report(len(patients))]
    return conclude(out, source, findings + about_prompt)


def read_tokens(path: str) -> list[int]:
    try:
        with sys.stdin if path == "-" else open(path) as file:
            tokens = json.load(file)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} is not JSON: {error}") from None
    if not isinstance(tokens, list):
        raise CommandError(f"{path} is not a list of token ids: {tokens!r:.60}")
    return tokens


@dataclass
class Patient:
    """One rank: its addresses, the answers of their sockets, and the facts of its events."""

    rank: int
    at: Endpoints
    keyed: bool = False
    """Whether the source has a server_key, so only the publisher with its secret key is accepted."""
    answers: str = ""
    replay_answers: str = ""
    next_answers: str = ""
    """The socket at the next port, where vLLM's examples have the replays, and where a second rank would be."""
    facts: Facts = field(default_factory=Facts)
    topics: Counter[str] = field(default_factory=Counter)
    live: int = 0
    next_topics: set[str] = field(default_factory=set)
    """Topics of the publisher at the next port."""
    findings: list[Finding] = field(default_factory=list)

    def probe(self) -> None:
        self.answers = ask(self.at.endpoint)
        self.replay_answers = ask(self.at.replay_endpoint)
        if self.publishes and (behind := self.behind()) not in (None, self.at.replay_endpoint):
            self.next_answers = ask(behind)

    @property
    def publishes(self) -> bool:
        return self.answers in (("CURVE", "") if self.keyed else (*PUBLISHERS, ""))

    def behind(self) -> str | None:
        found = split_tcp(self.at.endpoint or "")
        return None if found is None or found[1] == 65535 else f"tcp://{found[0]}:{found[1] + 1}"

    def blames_replays(self, worker: WorkerStatus) -> bool:
        """Whether the stream is not exact because of its replay endpoint.

        This is the case when no endpoint is given, something else answers there, or the stream's reason names it.
        """
        replays = self.at.replay_endpoint
        if worker.state == "exact":
            return False
        return replays is None or any(found.replays for found in self.findings) or replays in worker.reason

    def report(self, ranks: int) -> list[Finding]:
        """The findings, with the consequences behind their cause."""
        found = [each for each in self.findings if each.level != "so"]
        causes = [at for at, each in enumerate(found) if each.level == "WRONG"]
        behind = next((at for at in causes if found[at].replays), causes[-1] if causes else len(found) - 1)
        found[behind + 1 : behind + 1] = [each for each in self.findings if each.level == "so"]
        label = f"rank {self.rank}: " if ranks > 1 else ""
        return [each._replace(text=label + each.text) for each in found]


def ask(endpoint: str | None) -> str:
    found = split_tcp(endpoint or "")
    return "" if found is None else what_answers(*found, PROBE)


@contextmanager
def subscribed(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.SUB) as sock:
        sock.linger, sock.rcvhwm, sock.maxmsgsize, sock.ipv6 = 0, 64, 1 << 26, True
        sock.subscribe(b"")
        sock.connect(endpoint)
        yield sock


def topics_of(sock: zmq.Socket[bytes]) -> set[str]:
    """The topics of the messages that have arrived, of at most 64 messages."""
    found = set()
    with suppress(zmq.Again):
        for _ in range(64):
            found.add(sock.recv_multipart(zmq.NOBLOCK)[0].decode("utf-8", "replace"))
    return found


def watch(
    out: Console, source: PodSource, patients: list[Patient], tokens: list[int] | None, args: argparse.Namespace
) -> Iterator[Finding]:
    """Follow the streams for a while. Yields the findings about the prompt, and adds the others to their patients."""
    by_rank = {patient.rank: patient for patient in patients}
    current = False

    def show(item: IndexChange) -> None:
        if isinstance(item, Batch):
            patient = by_rank.get(item.rank) or by_rank[min(by_rank)]  # another rank that shares its publisher
            patient.facts.add(item.payload)
            patient.live += current
            if item.topic is not None:
                patient.topics[item.topic.decode("utf-8", "replace")] += 1

    index = PrefixIndex(block_size=args.block_size)
    expected = args.topic or source.topic
    with EventManager(index) as manager, ExitStack() as stack:
        manager.tap(show)
        last = patients[-1]
        behind = last.behind() if last.next_answers in PUBLISHERS else None
        neighbour = None if behind is None else stack.enter_context(subscribed(behind))
        # Any topic and any block size are accepted, because the findings report them.
        manager.add_pod(replace(source, topic=None, block_size=None))
        try:
            with out.status(f"watching {source.name} for {args.seconds:g} s; Ctrl-C ends it"):
                manager.wait_until_current(PATIENCE)
                current = True
                time.sleep(args.seconds)
        except KeyboardInterrupt:
            pass
        status = manager.status()[source.name]
        if neighbour is not None:
            last.next_topics = topics_of(neighbour)
        for patient in patients:
            worker = status.workers[patient.rank]
            shared = set(status.workers) - set(by_rank)
            patient.findings += list(events(patient, worker, expected, args, patient is last, shared))
            patient.findings += list(contents(patient, worker, source, args.block_size))
            patient.findings += list(engine(patient, source))
            patient.findings += list(losses(patient, worker))
        if tokens is not None:
            yield from prompt(index, source.model, tokens, patients)


# Findings


def addresses(patient: Patient) -> Iterator[Finding]:
    """The findings about the sockets at the addresses of the streams."""
    endpoint, answers = patient.at.endpoint, patient.answers
    host, port = split_tcp(endpoint or "") or ("", 0)
    wrong = {
        "refused": f"nothing listens at {endpoint}: the engine is down, publishes at another port, or only to its own "
        "machine (it should bind tcp://*:PORT)",
        "no answer": f"{endpoint} does not answer: a wrong address, or a firewall",
        "unknown host": f"the host name {host!r} cannot be resolved",
        "silence": f"{endpoint} accepts connections and sends nothing: it is not a ZMQ socket",
        "something else": f"the server at {endpoint} is not a ZMQ socket",
        "CURVE": f"{endpoint} is encrypted: give its public key (--server-key, or server_key= of PodSource)",
        "HTTP": f"{endpoint} speaks HTTP: it is the engine's API, not an event endpoint; kvindex doctor "
        f"http://{host}:{port} asks it for the endpoints",
        "ROUTER": f"{endpoint} is a replay endpoint (ZMQ ROUTER), not an event endpoint: swap the two",
    }
    if patient.keyed:
        unkeyed = "is not encrypted, so it does not have the secret key of the server_key, and is ignored"
        wrong.update(dict.fromkeys(PUBLISHERS, f"the publisher at {endpoint} {unkeyed}"))
    if patient.publishes and answers == "CURVE":
        yield Finding("ok", f"an encrypted socket is at {endpoint}")
    elif patient.publishes:
        yield Finding("ok", f"a publisher is at {endpoint}" if answers else f"connecting to {endpoint}")
    else:
        yield Finding("WRONG", wrong.get(answers, f"{endpoint} is a ZMQ {answers} socket, not a publisher"))
    if (replays := patient.at.replay_endpoint) is None:
        return
    answers = patient.replay_answers
    if answers and (answers == "CURVE") != patient.keyed and answers in ("ROUTER", "CURVE"):
        how = "is not encrypted, but a server_key is given" if patient.keyed else "is encrypted, the publisher is not"
        yield Finding("WRONG", f"the replay endpoint {replays} {how}: no replay can be received", True)
    elif answers in ("ROUTER", "CURVE", ""):
        yield Finding("ok", f"replays are requested from {replays}")
    elif answers in PUBLISHERS:
        yield Finding("WRONG", f"the replay endpoint {replays} is a publisher, not a ZMQ ROUTER", True)
    elif answers in ("refused", "no answer", "unknown host"):
        yield Finding("WRONG", f"the replay endpoint {replays} does not answer ({answers}): is it configured?", True)
    else:
        yield Finding("WRONG", f"the replay endpoint {replays} is not a ZMQ ROUTER, but {answers}", True)


def events(
    patient: Patient, worker: WorkerStatus, expected: str | None, args: argparse.Namespace, last: bool,
    shared: set[int],
) -> Iterator[Finding]:  # fmt: skip
    """The findings about the arrival of events, their topics and their ranks."""
    facts = patient.facts
    unchecked = ""
    if worker.state == "exact" and patient.at.replay_endpoint is not None and not patient.live:
        unchecked = "while the engine is idle, its replays cannot be checked against live batches"
    if not facts.batches and not worker.errors:
        if worker.connected:
            yield Finding(
                "note" if worker.state == "exact" else "WRONG",
                f"no event in {args.seconds:g} s: the engine is idle, or does not publish; send it a prompt of more "
                "than a block (vLLM needs --kv-events-config with enable_kv_cache_events, and prefix caching)"
                f"{unchecked and '; ' + unchecked}",
            )
        return
    live = f"{patient.live:,} of them live" if patient.live else f"none of them in the {args.seconds:g} s of watching"
    yield Finding(
        "ok",
        f"{counted(facts.batches, 'batch', 'batches')}, {live}: {counted(facts.blocks, 'block')} stored, "
        f"{facts.removed:,} removed, {counted(facts.cleared, 'clear')}",
    )
    if unchecked:
        yield Finding("note", unchecked)
    if facts.unknown and not facts.blocks:
        named = ", ".join(sorted(facts.kinds))
        yield Finding(
            "WRONG",
            f"no block was stored, and {counted(facts.unknown, 'event')} of unknown kind came ({named}): another "
            "publisher, or an engine that is newer than this version and has other events",
        )
    elif facts.batches and not facts.blocks and not facts.undecodable:
        yield Finding("WRONG", "no block was stored: nothing can be found until the engine caches a whole block")
    if patient.topics:
        seen = ", ".join(repr(topic) for topic in sorted(patient.topics))
        if expected is not None and expected not in patient.topics:
            yield Finding(
                "WRONG", f"its topic is {seen}, not {expected!r}: a subscription to {expected!r} receives nothing"
            )
        elif len(patient.topics) > 1:
            level: Literal["so", "WRONG"] = "so" if patient.blames_replays(worker) else "WRONG"
            yield Finding(level, f"its batches have topics of several engines: {seen}")
        else:
            yield Finding("ok", f"topic {seen}")
    strange = {rank for rank in facts.ranks if rank is not None and rank != patient.rank}
    if others := sorted(strange - shared):
        yield Finding(
            "WRONG",
            f"its batches are of rank {', '.join(map(str, others))}, not {patient.rank}: each rank has an endpoint of "
            "its own (--ranks, or ranks= of PodSource)",
        )
    if others := sorted(strange & shared):
        yield Finding("note", f"rank {', '.join(map(str, others))} publishes here too, and is counted separately")
    # The topic of another pod shows that it is no rank of this one.
    others_topic = patient.next_topics and patient.topics and not patient.next_topics & set(patient.topics)
    if last and patient.next_answers in PUBLISHERS and not others_topic:
        yield Finding(
            "note",
            f"{patient.behind()} publishes events as well. If it is a data-parallel rank of this pod, add --ranks "
            f"{patient.rank + 2}",
        )


def contents(patient: Patient, worker: WorkerStatus, source: PodSource, size: int) -> Iterator[Finding]:
    """The findings about the contents of events that a prompt must agree with."""
    facts = patient.facts
    if not facts.blocks:
        return
    mismatched = worker.errors.get("block_size_mismatch", 0)
    usual = sorted({sizes.most_common(1)[0][0] for sizes in facts.sizes.values()})
    named = " and ".join(map(str, usual))
    if mismatched:
        yield Finding(
            "WRONG",
            f"its blocks have {named} tokens, the index has blocks of {size}: {counted(mismatched, 'event')} could not "
            f"be placed; use PrefixIndex(block_size={facts.block_size})",
        )
    elif usual == [size]:
        yield Finding("ok", f"its blocks have {size} tokens, like the index")
    elif usual:
        yield Finding("ok", f"its blocks have {named} tokens, which the index splits into blocks of {size}")
    if source.block_size is not None and usual and source.block_size not in usual:
        yield Finding(
            "WRONG", f"its server reports blocks of {source.block_size} tokens, its events have blocks of {named}"
        )
    if facts.hashes:
        yield Finding("ok", f"hashes are {' and '.join(sorted(facts.hashes))}")
    if facts.without_tokens:
        yield Finding("note", f"{counted(facts.without_tokens, 'block')} came without tokens: copies in another tier")
    media = sorted(facts.media)
    if media != ["GPU"]:
        yield Finding("note", f"blocks are in {', '.join(media)}")
    kinds = {group: each for group, each in sorted(facts.groups.items()) if each.kind or each.window}
    if len(facts.groups) > 1 or any(each.window for each in kinds.values()):
        told = ", ".join(
            f"{group}: {each.kind or 'full attention'}" + (f" of {each.window} tokens" if each.window else "")
            for group, each in sorted(facts.groups.items())
        )
        yield Finding("note", f"a hybrid model, whose groups have to agree on a match ({told})")
    if any((each.kind or "").startswith("chunked_local") for each in kinds.values()) and source.chunk_size is None:
        yield Finding("WRONG", "it has chunked-local attention, but its events have no chunk size: set chunk_size=")
    of = f"of {counted(facts.blocks, 'block')} came under"
    if facts.adapters:
        names = ", ".join(sorted(facts.adapters))
        yield Finding(
            "note", f"{facts.under_adapter:,} {of} an adapter ({names}): found by prompts with the same lora_name only"
        )
    if facts.salts:
        yield Finding("note", f"{facts.under_salt:,} {of} cache salts: found by prompts with the same cache_salt only")
    if facts.other_keys:
        yield Finding(
            "note",
            f"{counted(facts.other_keys, 'block has', 'blocks have')} further keys (images, prompt embeddings): found "
            "by prompts with the same extra_keys only",
        )


def engine(patient: Patient, source: PodSource) -> Iterator[Finding]:
    """The findings about the source's description of the engine, compared with its events."""
    facts = patient.facts
    if not facts.blocks:
        return
    described = any(each.kind or each.window for each in facts.groups.values()) or len(facts.groups) > 1
    if source.engine is None:
        yield Finding(
            "note",
            "no engine given: a match counts all held tokens, although an engine recomputes the last one; add "
            "engine=vllm, engine=sglang or engine=trtllm",
        )
    elif source.engine == "sglang" and described:
        yield Finding("WRONG", "engine=sglang, but its events describe groups of layers, as vLLM's do: engine=vllm?")
    elif source.engine == "vllm" and (
        others_own := [name for name in facts.media if name == "CPU_PINNED"] + ["cache_salt"] * (facts.salt_fields > 0)
    ):
        yield Finding(
            "WRONG", f"engine=vllm, but its events have {' and '.join(others_own)}, as SGLang's do: engine=sglang?"
        )
    elif source.engine == "trtllm":
        yield Finding("note", "the rules of TensorRT-LLM's reuse are not known: a match counts all held tokens")
    if source.hybrid:
        told = "its events describe every group: hybrid= is for SGLang, whose events do not" if described else ""
        yield Finding("WRONG" if told else "note", told or "hybrid=true: evictions are silent, so it is never exact")
    if source.eagle and max(facts.lookahead, default=0):
        yield Finding(
            "note",
            "eagle= is for hashes without lookahead, and those of its blocks have one: it has no effect, leave it out",
        )
    if isinstance(source.eagle, frozenset) and (absent := sorted(source.eagle - set(facts.groups))):
        yield Finding(
            "WRONG",
            f"eagle names {'group' if len(absent) == 1 else 'groups'} {', '.join(map(str, absent))}, its events "
            f"{', '.join(map(str, sorted(facts.groups)))}",
        )
    others = sorted(set(facts.media) - {"GPU"} - {name.upper() for name in source.ignore_media})
    if others and source.engine == "vllm" and source.clear_media is None:
        yield Finding(
            "note",
            f"its clears do not show whether they include {', '.join(others)}, so it is degraded after one: set "
            "clear_media to the media that they clear",
        )
    if unseen := sorted({name.upper() for name in source.ignore_media} - set(facts.media)):
        yield Finding("note", f"ignore_media names {', '.join(unseen)}, of which no event has arrived")


def losses(patient: Patient, worker: WorkerStatus) -> Iterator[Finding]:
    """The findings about losses of the stream, and its state at the end."""
    counters = worker.counters
    replays = patient.at.replay_endpoint
    blamed = patient.blames_replays(worker)
    follows: Literal["so", "WRONG"] = "so" if blamed else "WRONG"
    verdict = f"its stream is {worker.state}: {worker.reason}"
    if replays is None:
        hint = f" ({patient.behind()} looks like one)" if patient.next_answers == "ROUTER" else ""
        yield Finding(
            "note" if worker.state == "exact" else "WRONG",
            f"no replay endpoint was given{hint}: earlier blocks are unknown, and lost batches stay lost",
            True,
        )
    elif blamed and not any(found.replays for found in patient.findings):
        yield Finding("WRONG", verdict, True)
        verdict = ""
    if worker.lost_batches:
        yield Finding(follows, f"{counted(worker.lost_batches, 'batch is', 'batches are')} lost")
    elif worker.gaps:
        yield Finding("note", f"{counted(worker.gaps, 'gap')} in the stream, filled by replays")
    if worker.restarts:
        yield Finding("WRONG", f"the engine has restarted {counted(worker.restarts, 'time')} while it was watched")
    if counters.get("disconnects"):
        yield Finding("WRONG", f"the connection was lost {counted(counters['disconnects'], 'time')}")
    for reason, count in sorted(worker.errors.items()):
        if reason not in HARMLESS:
            known = ERRORS.get(reason.removeprefix("replay_"), "could not be applied")
            yield Finding(
                follows if reason.startswith(("replay_", "foreign_topic")) else "WRONG",
                f"{reason} ({count:,}): {known}",
            )
    if worker.parked:
        waiting = counted(worker.parked, "block waits", "blocks wait")
        yield Finding("so" if worker.lost_batches else follows, f"{waiting} for a parent whose event is lost")
    if counters.get("replays_unanswered") and replays is not None:
        yield Finding(follows, f"{replays} did not answer {counted(counters['replays_unanswered'], 'replay')}")
    if worker.lag is not None and abs(worker.lag) > LATE and patient.live:
        yield Finding("note", f"the last event was {worker.lag:,.0f} s old: it is late, or the clocks do not agree")
    if worker.state == "exact" and worker.reason:
        yield Finding("note", f"its stream is exact, but {worker.reason}")
    elif worker.state == "exact":
        yield Finding("ok", f"its stream is exact: {counted(worker.blocks, 'block is', 'blocks are')} held")
    elif verdict:
        caused = blamed or any(found.level == "WRONG" for found in patient.findings)
        yield Finding("so" if caused or worker.lost_batches or set(worker.errors) - HARMLESS else "WRONG", verdict)


def prompt(index: PrefixIndex, model: str, tokens: list[int], patients: list[Patient]) -> Iterator[Finding]:
    """The findings about one prompt: its match, or the adapter or salt under which it would match."""

    def found(lora_name: str | None = None, cache_salt: str | None = None) -> int:
        best = index.match_prefix(tokens, model=model, lora_name=lora_name, cache_salt=cache_salt).best()
        return best[1] if best else 0

    plain = found()
    if plain:
        yield Finding("ok", f"{plain:,} of the prompt's {len(tokens):,} tokens are found")
        return
    if len(tokens) < index.block_size:
        yield Finding("WRONG", f"the prompt's {len(tokens)} tokens are fewer than a block of {index.block_size}")
        return
    nothing = f"nothing of the prompt's {len(tokens):,} tokens is found"
    roots = [root for patient in patients for root in patient.facts.roots]
    if causes := list(shifted(index, model, tokens, roots)):
        yield from causes
        yield Finding("so", nothing)
    under = []
    for name in sorted({name for patient in patients for name in patient.facts.adapters}):
        if count := found(lora_name=name):
            under.append(Finding("note", f"with lora_name={name!r} {count:,} tokens would be found"))
    if count := max((found(cache_salt=salt) for patient in patients for salt in patient.facts.salts), default=0):
        under.append(Finding("note", f"with another tenant's cache_salt {count:,} tokens would be found"))
    if under and not causes:
        yield Finding("WRONG", nothing)
    elif not causes:
        yield Finding(
            "WRONG",
            f"{nothing}: the engine computes other token ids for it, or has evicted the prompt. Send the prompt to the "
            "engine once more, and repeat this command",
        )
    yield from under


def shifted(
    index: PrefixIndex, model: str, tokens: list[int], roots: list[tuple[int, ...]]
) -> Iterator[Finding]:  # fmt: skip
    """A finding when the prompt would match with fewer or more tokens in front.

    The causes are a BOS that is added twice or not at all, another chat template, or a prompt that was cut on the left.
    """

    def found(ids: list[int]) -> int:
        best = index.match_prefix(ids, model=model).best()
        return best[1] if best else 0

    for count in range(1, min(index.block_size, len(tokens)) + 1):
        if rest := found(tokens[count:]):
            many = "token" if count == 1 else f"{count} tokens"
            yield Finding(
                "WRONG",
                f"its tokens are shifted by {count}: without its first {many} ({listed(tokens[:count])}) {rest:,} would"
                " be found; is a BOS added twice, or another chat template used than the engine's?",
            )
            return
    # The fewest tokens first: a whole block in front would fit every prompt that continues from it.
    for count in range(1, max(map(len, roots), default=0) + 1):
        for root in roots:
            if count > len(root) or list(root[count:]) != tokens[: len(root) - count]:
                continue
            whole = found([*root[:count], *tokens])
            # The tokens put in front match themselves.
            if whole - count < (index.block_size + 1) // 2:
                continue
            many = "token" if count == 1 else f"{count} tokens"
            yield Finding(
                "WRONG",
                f"its tokens are shifted by {count}: with the {many} {listed(root[:count])} in front {whole:,} would be"
                " found; is a BOS or a chat template left out, or the prompt cut on the left?",
            )
            return


def listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:4])) + (", ..." if len(ids) > 4 else "")


def conclude(out: Console, source: PodSource, findings: list[Finding]) -> int:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for level, text, _ in findings:
        table.add_row(Text(level, STYLES[level]), Text(text))
    out.print(Text(source.name, "bold"))
    out.print(table)
    wrong = sum(found.level == "WRONG" for found in findings)
    if wrong:
        out.print(f"{counted(wrong, 'problem')}: prompts will be missed, always or sometimes", style="bold red")
        return 1
    out.print("no problems found", style="bold green")
    return 0
