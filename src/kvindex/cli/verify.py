"""``kvindex verify``: compare the index's answers with the cached tokens that an engine reports."""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import BlockStored, EventDecodeError, EventManager, PodMatch, PodSource, PrefixIndex, decode_batch
from ..sync.status import Batch, Configured, Forgotten, IndexChange, PodStatus
from ..text import EncodeError, PromptEncoder, RemoteEncoder
from ._facts import EXAMPLES, Facts
from ._pods import add_arguments, one_source
from ._terminal import CommandError, add_command, console, counted, missing, positive, seconds

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["add_parser"]

# Seconds: for a stream to become current, and for an answer of one token.
PATIENCE = 10.0
ANSWER = 120.0
SHOWN = 10
WORDS = ("the", "a", "of", "and", "to", "in", "is", "was", "for", "on", "as", "it", "one", "cat", "sun", "red", "sea")
RULES: tuple[tuple[str | None, bool], ...] = (("vllm", False), ("vllm", True), ("sglang", False), (None, False))


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        help="compare the index's answers with an engine's cached tokens",
        description="Send prompts to an engine's OpenAI endpoint (new, growing, repeated, branching and block-aligned "
        "ones; one output token each), ask an index that follows the engine's events just before each, and compare "
        "the answer with the response's cached_tokens. If they differ, name the option or the template that explains "
        "it. vLLM reports cached tokens with --enable-prompt-tokens-details, SGLang with --enable-cache-report. Other "
        "requests to the engine may cause differences.",
        status="0 if all are equal, 1 otherwise",
        lines=[
            "kvindex verify http://10.0.0.1:8000",
            "kvindex verify http://10.0.0.1:8000 tcp://10.0.0.1:5557,5558,engine=vllm,eagle=true",
            "kvindex verify http://10.0.0.1:8000 --tokenizer tokenizer.json --chat-template chat_template.jinja",
        ],
    )
    parser.add_argument("url", metavar="URL", help="the engine's server: http://HOST:PORT")
    add_arguments(parser, several=False)
    parser.add_argument("--requests", type=positive, default=60, metavar="N",
                        help="prompts to send (default %(default)s)")  # fmt: skip
    parser.add_argument("--block-size", type=positive, default=16, metavar="TOKENS",
                        help="block size of the router's index (default %(default)s)")  # fmt: skip
    parser.add_argument("--lora-name", metavar="NAME", help="LoRA adapter of the prompts")
    parser.add_argument("--cache-salt", metavar="SALT", help="cache salt of the prompts")
    parser.add_argument("--tokenizer", metavar="FILE", help="the router's tokenizer.json, or a directory or name for "
                        "transformers (default: the engine's own /tokenize)")  # fmt: skip
    parser.add_argument("--chat-template", metavar="FILE", help="the router's Jinja template, with --tokenizer")
    parser.add_argument("--api-key", metavar="KEY", help="bearer token for the server")
    parser.add_argument("--settle", type=seconds, default=0.5, metavar="N",
                        help="seconds without an event after which a request's events count as complete, unless its "
                        "blocks are there before (default %(default)g)")  # fmt: skip
    parser.set_defaults(run=run)


class Asked(NamedTuple):
    """One request, with the cached tokens that the index expected and those that the engine reported."""

    kind: str
    prompt: int
    expected: int
    reported: int


class Guess(NamedTuple):
    """A possible configuration of the router: the rules of the pod's engine, and the parameters of the query."""

    engine: str | None
    eagle: bool
    first: int | None
    """None: the prompt as it is; -1: the prompt without its first token; else a token that is put before it."""
    lora_name: str | None
    cache_salt: str | None

    def differs(self, other: Guess) -> str:
        said = [
            f"{name}={mine!r}"
            for name, mine, theirs in zip(self._fields, self, other, strict=True)
            if mine != theirs and name != "first"
        ]
        if self.first == -1:
            said.append("prompts without their first token, which the engine does not add (BOS)")
        elif self.first is not None:
            said.append(f"token {self.first} before each prompt, which the engine adds (BOS)")
        return " and ".join(said)


class Guesses:
    """Every configuration that is possible after the events so far, with its answers to all requests."""

    def __init__(self, index: PrefixIndex, source: PodSource, args: argparse.Namespace) -> None:
        self.index, self.pod, self.model = index, source.name, source.model
        self.facts = Facts()
        self.given = Guess(source.engine, bool(source.eagle), None, args.lora_name, args.cache_salt)
        self.indexes = {rules: PrefixIndex(args.block_size) for rules in RULES}
        self.firsts: set[int] = set()
        self.right: dict[Guess, int] = {}
        self.nothing = 0

    def apply(self, change: IndexChange) -> None:
        """Apply a change of the manager's index to the other indexes."""
        if isinstance(change, Batch):
            self.facts.add(change.payload)
            self._note_firsts(change.payload)
        for (engine, eagle), index in self.indexes.items():
            if isinstance(change, Batch):
                index.ingest(change.pod, change.payload, model=change.model, dp_rank=change.rank)
            elif isinstance(change, Forgotten):
                index.clear_worker(change.pod, change.rank)
            elif isinstance(change, Configured):
                index.configure_pod(change.pod, **{**change.options, "engine": engine, "eagle": eagle})

    def _note_firsts(self, payload: bytes) -> None:
        try:
            events = decode_batch(payload).events
        except EventDecodeError:
            return
        for event in events:
            if not isinstance(event, BlockStored) or event.parent_block_hash is not None:
                continue
            if len(event.token_ids) and len(self.firsts) < EXAMPLES:
                self.firsts.add(int(event.token_ids[0]))

    def held(self, ids: list[int]) -> bool:
        """Whether the index has every whole block of a prompt, in some configuration.

        Every medium seen so far must have the blocks. An engine copies blocks to a tier later than it announces its
        own, and it reuses the last block of a prompt of whole blocks from the tier only.
        """
        ahead = max(self.facts.lookahead, default=0)
        unit = max(self.index.block_size, *(size for sizes in list(self.facts.sizes.values()) for size in sizes), 1)
        whole = (len(ids) - ahead) // unit * unit
        media = list(self.facts.media)
        return any(
            found.held >= whole and all(found.media.get(medium, 0) >= whole for medium in media)
            for guess in self._all()
            if guess.engine is None and (found := self._match(self.index, guess, ids)) is not None
        )

    def answers(self, ids: list[int], rank: int) -> dict[Guess, int]:
        found = {}
        for guess in self._all():
            match = self._match(self.indexes[guess.engine, guess.eagle], guess, ids)
            found[guess] = 0 if match is None else match.ranks.get(rank, 0)
        return found

    def count(self, answers: dict[Guess, int], reported: int) -> None:
        for guess, answer in answers.items():
            # Before its first answer, a new configuration would have answered 0.
            self.right[guess] = self.right.get(guess, self.nothing) + (answer == reported)
        self.nothing += reported == 0

    def best(self) -> tuple[str, int] | None:
        """The configuration with most right answers, and their number; None where the given one has as many."""
        given = self.right.get(self.given, 0)
        near = {guess: sum(a != b for a, b in zip(guess, self.given, strict=True)) for guess in self.right}
        best = max(self.right, key=lambda guess: (self.right[guess], -near[guess]), default=self.given)
        return (best.differs(self.given), self.right[best]) if self.right.get(best, 0) > given else None

    def _all(self) -> Iterator[Guess]:
        names = {self.given.lora_name, None, *self.facts.adapters}
        salts = {self.given.cache_salt, None, *self.facts.salts}
        for engine, eagle in RULES:
            for first in (None, -1, *tuple(self.firsts)):
                yield from (Guess(engine, eagle, first, name, salt) for name in names for salt in salts)

    def _match(self, index: PrefixIndex, guess: Guess, ids: list[int]) -> PodMatch | None:
        tokens = ids if guess.first is None else ids[1:] if guess.first == -1 else [guess.first, *ids]
        match = index.match_prefix(
            tokens, model=self.model, lora_name=guess.lora_name, cache_salt=guess.cache_salt
        )  # fmt: skip
        found: PodMatch | None = match.get(self.pod)
        return found


class Server:
    """The engine's HTTP server: the token ids of prompts, and the cached tokens of the requests that it has served."""

    def __init__(self, args: argparse.Namespace, source: PodSource) -> None:
        try:
            import urllib3
        except ImportError:
            raise missing("urllib3") from None
        headers = {} if args.api_key is None else {"Authorization": f"Bearer {args.api_key}"}
        self.url = args.url.rstrip("/")
        self._errors = urllib3.exceptions.HTTPError
        self._http = urllib3.PoolManager(headers=headers)
        self.model = args.lora_name or args.model or source.model or self._first_model()
        self._salt = {} if args.cache_salt is None else {"cache_salt": args.cache_salt}
        self._theirs = RemoteEncoder(self.url, model=self.model, headers=headers, timeout=30.0)
        self._ours = _router_encoder(args)
        self.chats = True
        self.tokens_differ = ""
        self.lengths_differ = ""
        self.reports = False

    def request(self, messages: list[dict[str, str]], whole_blocks_of: int) -> tuple[list[int], str, dict[str, Any]]:
        """The token ids of a conversation, and the path and the body of its request.

        The request is a chat. It has token ids where the prompt must end with a block or the model has no chat
        template.
        """
        ids = self._encoded(messages)
        if whole_blocks_of:
            ids = ids[: len(ids) // whole_blocks_of * whole_blocks_of]
        if self.chats and not whole_blocks_of:
            return ids, "/v1/chat/completions", {"messages": messages}
        return ids, "/v1/completions", {"prompt": ids}

    def send(self, ids: list[int], path: str, body: dict[str, Any], rank: int | None) -> int:
        """Send one request, and return the cached tokens that the engine reports."""
        headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
        answer = self._ask("POST", path, headers, {"model": self.model, "max_tokens": 1, **self._salt, **body})
        try:
            length = int(answer["usage"]["prompt_tokens"])
            found = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens")
            cached = int(found or 0)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise CommandError(f"{self.url}{path} answered {answer!r:.120}, which has no usage") from None
        self.reports |= found is not None
        if length != len(ids) and not self.lengths_differ:
            self.lengths_differ = f"the engine counts {length:,} tokens in a prompt of {len(ids):,}"
        return cached

    def _encoded(self, messages: list[dict[str, str]]) -> list[int]:
        text = "\n".join(message["content"] for message in messages)
        if self.chats:
            try:
                theirs: list[int] = self._theirs.encode_chat(messages).tolist()
            except EncodeError:
                # A base model has no template.
                self.chats = False
        if not self.chats:
            theirs = self._theirs.encode(text).tolist()
        if self._ours is None:
            return theirs
        ours: list[int] = (self._ours.encode_chat(messages) if self.chats else self._ours.encode(text)).tolist()
        if ours != theirs and not self.tokens_differ:
            at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            at = min(len(ours), len(theirs)) if at is None else at
            self.tokens_differ = (
                f"from token {at} on the router's ids are {ours[at : at + 3]}, the engine's {theirs[at : at + 3]}"
            )
        return ours

    def _first_model(self) -> str:
        try:
            return str(self._ask("GET", "/v1/models", {}, None)["data"][0]["id"])
        except (LookupError, TypeError):
            raise CommandError(f"{self.url}/v1/models names no model: give --model") from None

    def _ask(self, method: str, path: str, headers: dict[str, str], body: Any) -> Any:
        headers = {**self._http.headers, **headers}
        try:
            answer = self._http.request(
                method, self.url + path, json=body, headers=headers, timeout=ANSWER, retries=False, redirect=False
            )
            if answer.status != 200:
                raise CommandError(f"{self.url}{path} answered {answer.status}: {answer.data[:200].decode()!r}")
            return answer.json()
        except (self._errors, OSError) as error:
            raise CommandError(f"{self.url}{path} does not answer: {error}") from None
        except (ValueError, RecursionError):
            raise CommandError(f"{self.url}{path} answered {answer.data[:80]!r}, which is not JSON") from None

    def close(self) -> None:
        self._theirs.close()
        self._http.clear()


def run(args: argparse.Namespace) -> int:
    out = console()
    if args.pods is None and args.file is None:
        args.pods = args.url
    source = one_source(args)
    # The reasons at the end report the same things, so the log's lines are not shown.
    logging.getLogger("kvindex").addHandler(logging.NullHandler())
    index = PrefixIndex(args.block_size)
    guesses = Guesses(index, source, args)
    server = Server(args, source)
    with EventManager(index) as manager:
        manager.tap(guesses.apply)
        manager.add_pod(source)
        try:
            if not manager.wait_until_current(PATIENCE):
                raise CommandError(f"no events can be followed: {source.name} is {manager.inexact()[source.name]}")
            with out.status(f"sending {counted(args.requests, 'prompt')} to {args.url}"):
                asked = list(islice(verified(manager, index, source, guesses, server, args), args.requests))
        finally:
            server.close()
        status = manager.status()[source.name]
    return conclude(out, asked, [*reasons(asked, guesses, server, status, args.block_size)])


def verified(
    manager: EventManager, index: PrefixIndex, source: PodSource, guesses: Guesses, server: Server,
    args: argparse.Namespace,
) -> Iterator[Asked]:  # fmt: skip
    """Send requests one after another, each with the answers of index and engine."""
    ranks = sorted(source.workers())
    unit = source.block_size or guesses.facts.block_size or args.block_size
    for number, kind, messages, aligned in prompts(random.Random(), unit):
        rank = ranks[number % len(ranks)]
        ids, path, body = server.request(messages, unit if aligned else 0)
        match = index.match_prefix(
            ids, model=source.model, lora_name=args.lora_name, cache_salt=args.cache_salt
        ).get(source.name)  # fmt: skip
        expected = 0 if match is None else match.ranks.get(rank, 0)
        answers = guesses.answers(ids, rank)
        reported = server.send(ids, path, body, rank if len(ranks) > 1 else None)
        guesses.count(answers, reported)
        yield Asked(kind, len(ids), expected, reported)
        settle(manager, source, lambda ids=ids: guesses.held(ids), args.settle)


def prompts(rng: random.Random, unit: int) -> Iterator[tuple[int, str, list[dict[str, str]], bool]]:
    """Endless tuples (conversation, kind, messages, whether cut at a block). A word has one token or more."""

    def said(role: str, least: int, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(least * unit, most * unit)))}

    for number in count():
        new = [said("system", 1, 2), said("user", 1, 3)]
        grown = [*new, said("assistant", 1, 2), said("user", 1, 2)]
        yield number, "new", new, False
        yield number, "growing", grown, False
        yield number, "repeated", grown, False
        yield number, "branching", [*new, said("assistant", 1, 2), said("user", 1, 2)], False
        aligned = [*grown, said("assistant", 1, 2)]
        yield number, "block-aligned", aligned, True
        yield number, "block-aligned, repeated", aligned, True


def settle(manager: EventManager, source: PodSource, held: Any, quiet: float) -> None:
    """Wait until the events of the last request are applied: its blocks are held, or no event came for a while."""
    batches, since, latest = -1, time.monotonic(), time.monotonic() + 10 * quiet
    while (now := time.monotonic()) < min(since + quiet, latest) and not held():
        if (applied := manager.status()[source.name].batches) != batches:
            batches, since = applied, now
        time.sleep(0.002)


def reasons(
    asked: list[Asked], guesses: Guesses, server: Server, status: PodStatus, block_size: int
) -> Iterator[str]:  # fmt: skip
    """The possible causes of different answers, or of no reuse at all."""
    if not server.reports:
        yield (
            "the engine does not report cached tokens: start vLLM with --enable-prompt-tokens-details, SGLang with "
            "--enable-cache-report"
        )
        return
    if server.tokens_differ:
        yield f"the router's tokenizer or chat template differs from the engine's: {server.tokens_differ}"
    if status.errors.get("block_size_mismatch"):
        size = guesses.facts.block_size
        yield f"the engine's blocks have {size} tokens, the index has blocks of {block_size}: use --block-size {size}"
    if (best := guesses.best()) is not None:
        said, right = best
        yield f"with {said}, {right} of {len(asked)} are equal"
    if server.lengths_differ and not server.tokens_differ:
        yield f"{server.lengths_differ}: a BOS token, or another chat template"
    if not any(each.reported for each in asked):
        yield "the engine reuses nothing: is its prefix caching off, or does each request get a cache salt of its own?"
    if status.state != "exact":
        yield f"its stream is {status.state}: {status.reason}"


def conclude(out: Console, asked: list[Asked], said: list[str]) -> int:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column()
    for _ in range(3):
        table.add_column(justify="right")
    table.add_row("prompts", "sent", "equal", "tokens reused", style="bold")
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for each in asked:
        rows[each.kind].update(sent=1, equal=each.expected == each.reported, reused=each.reported)
    for kind, row in rows.items():
        table.add_row(kind, f"{row['sent']:,}", f"{row['equal']:,}", f"{row['reused']:,}")
    out.print(table)
    wrong = [each for each in asked if each.expected != each.reported]
    for each in wrong[:SHOWN]:
        by = each.expected - each.reported
        out.print(
            f"{each.kind}, {each.prompt:,} tokens: the index expected {each.expected:,}, the engine reported "
            f"{each.reported:,} ({abs(by):,} {'less' if by > 0 else 'more'})"
        )
    if len(wrong) > SHOWN:
        out.print(f"and {len(wrong) - SHOWN:,} more")
    reused = any(each.reported for each in asked)
    if wrong or not reused:
        for reason in said:
            out.print(Text(reason, "yellow"))
    if not reused:
        out.print(
            f"nothing was reused in {counted(len(asked), 'request')}, so there is nothing to compare", style="bold red"
        )
        return 1
    equal = f"equal: {len(asked) - len(wrong):,} of {len(asked):,}"
    out.print(equal, style="bold red" if wrong else "bold green")
    return 1 if wrong else 0


def _router_encoder(args: argparse.Namespace) -> PromptEncoder | None:
    """The router's encoder; None where the engine's own is used."""
    if args.tokenizer is None:
        if args.chat_template is not None:
            raise CommandError("--chat-template needs --tokenizer")
        return None
    template = None if args.chat_template is None else Path(args.chat_template).read_text()
    try:
        if args.tokenizer.endswith(".json"):
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(args.tokenizer)
        else:
            from transformers import AutoTokenizer  # type: ignore[import-not-found, unused-ignore]

            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except ImportError as error:
        raise CommandError(f"--tokenizer needs {error.name}, which is not installed") from None
    except Exception as error:
        raise CommandError(f"{args.tokenizer} is not a tokenizer: {error}") from None
    return PromptEncoder(tokenizer, template)
