"""Where a pod's events come from: :class:`PodSource`, written by hand or asked of the engine's own HTTP server."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import zmq
from zmq.utils import z85

from ..answers import ENGINES
from ..errors import InvalidTypeError, InvalidValueError, StreamError
from .addresses import check_endpoint, join_tcp, offset_endpoint, split_tcp

__all__ = ["Curve", "Endpoints", "PodSource", "check_pair", "is_key", "spelled"]

# The name is all up to the first "=" that a scheme follows: it may be a URL, with "=" in it.
# Not what follows the last comma of a name: there an endpoint comes behind the "=".
_OPTION = r",([a-z_]+)=([^,:/]*)"
_POD = re.compile(r"(?:(?P<name>.+?)=)?(?P<endpoint>[a-z]+://[^,]+)(?:,(?P<answers>[^,]+))?", re.DOTALL)


Presence: TypeAlias = Literal["count", "set"]
Engine: TypeAlias = Literal["vllm", "sglang", "trtllm"]

# What a string and a cluster's annotations may say of a pod's engine.
_OPTIONS = ("engine", "eagle", "hybrid", "ignore_media")


class Endpoints(NamedTuple):
    """The two sockets of one rank: where it publishes, and where it answers replays (None where it does not)."""

    endpoint: str | None
    replay_endpoint: str | None


class Curve(NamedTuple):
    """Keys of one encrypted connection, Z85: whom to believe, and who we are."""

    server: bytes
    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class PodSource:
    """One pod's event streams: where they are, and what their events do not say about themselves.

    Immutable; may be shared between threads. Raises :class:`InvalidValueError` or :class:`InvalidTypeError` naming the
    field, so that a mistake shows where it is made and not as a pod that stays silent.
    """

    name: str
    """The pod's name in the index and in every answer."""
    _: KW_ONLY
    endpoint: str | None = None
    """Where rank 0 publishes: ``tcp://host:port``, ``ipc://path`` or ``inproc://name``. None for a pod that connects to
    :meth:`EventManager.bind` by itself."""
    replay_endpoint: str | None = None
    """Where rank 0 answers replays. Without it a lost batch stays lost, and what was before the first one is not
    known."""
    model: str = ""
    """The model that its blocks belong to: queries name the same."""
    topic: str | None = None
    """The whole topic that its messages carry; None takes the first that arrives on a connection (for a pod that
    connects to a bound endpoint: ``kv@NAME@MODEL``). Events do not name their model, topics do: an address that another
    model's engine takes over is noticed where topics have the form ``kv@POD@MODEL``. Where they are empty, which is
    vLLM's default, it is taken for a restart, and its blocks for those of ``model``."""
    dp_size: int = 1
    """Data-parallel ranks. Rank r publishes at the port r higher, as vLLM and SGLang do, unless ``ranks`` says
    where."""
    ranks: Mapping[int, Endpoints | tuple[str, str | None]] | None = None
    """Endpoints by rank, for engines whose ports do not follow each other (vLLM binding port 0, several hosts)."""
    block_size: int | None = None
    """Tokens per block that the engine is expected to use. Adding a pod whose blocks can not be placed raises at
    once."""
    presence: Presence | None = None
    """``"count"`` or ``"set"``; None is the index's own. ``"set"`` for vLLM's ``kv_cache_report_mode=full``."""
    clear_media: frozenset[str] | None = None
    """The media that an AllBlocksCleared of this pod clears; None is all."""
    chunk_size: int | None = None
    """Tokens per chunk of a model with chunked-local attention, which its events do not say."""
    lora: str | None = None
    """The adapter that the pod is said to serve (a label): for the router's queries; blocks are placed by their
    events."""
    max_blocks: int | None = None
    """Blocks of the index that the pod may hold, over all ranks, media and groups: what it announces beyond that is
    counted as ``over_limit`` and makes it degraded. Some blocks more than the engine has, times its groups, never limit
    an honest one. None is no limit."""
    max_event_rate: float | None = None
    """Events a second that are taken from the pod, over all ranks, live or replayed; every message counts as one at
    least. What comes faster waits where it is, the pod is stale as long, and what no queue on the way keeps is a gap
    that a replay fills. :attr:`StreamPolicy.burst` seconds of it are saved up. None is no limit."""
    max_byte_rate: float | None = None
    """The same for the bytes of its messages."""
    server_key: str | None = None
    """The publisher's CURVE public key (Z85, 40 characters). With it, connections are encrypted, and nobody is believed
    who has not the secret key to it; None takes whatever the network leads to. Of a pod that connects to
    :meth:`EventManager.bind`, the key that it connects with."""
    client_keys: tuple[str, str] | None = field(default=None, repr=False)
    """Our own (public, secret) keys, for publishers that admit only some; None makes a pair."""
    engine: Engine | None = None
    """The engine, whose rules say what of a prefix it reuses: ``"vllm"``, ``"sglang"`` or ``"trtllm"``. None is
    unknown: what is held counts. Nothing guesses it."""
    eagle: bool | frozenset[int] = False
    """vLLM drops the last block that it matches, for its draft model, and puts no lookahead tokens into its hashes
    (EAGLE or MTP before 0.33, or with a KV connector): True, or the groups (``group_idx``) that do."""
    hybrid: bool = False
    """A model of which SGLang announces the full-attention layers only: it has Mamba or sliding-window layers beside
    them, whose evictions are silent. The pod is degraded."""
    ignore_media: frozenset[str] = frozenset()
    """Media whose events are skipped, counted and cost no verdict: a tier that announces no removals."""
    address: str | None = None
    """Where the pod takes requests, such as ``http://10.0.0.1:8000``, for the router; not interpreted."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What else the router wants to know of the pod, such as its role; not interpreted."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InvalidTypeError(f"name must be a str, not {type(self.name).__name__}")
        if not self.name:
            raise InvalidValueError("name must not be empty")
        for name in ("endpoint", "replay_endpoint", "topic", "lora", "server_key", "address"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise InvalidTypeError(f"{name} of pod {self.name!r} must be a str or None, not {type(value).__name__}")
        if not isinstance(self.model, str):
            raise InvalidTypeError(f"model of pod {self.name!r} must be a str, not {type(self.model).__name__}")
        for name, lowest in (("dp_size", 1), ("block_size", 1), ("chunk_size", 1), ("max_blocks", 1)):
            value = getattr(self, name)
            if value is None and name != "dp_size":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise InvalidTypeError(f"{name} of pod {self.name!r} must be an int, not {type(value).__name__}")
            if value < lowest:
                raise InvalidValueError(f"{name} of pod {self.name!r} must be at least {lowest}, not {value}")
        for name in ("max_event_rate", "max_byte_rate"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise InvalidTypeError(f"{name} of pod {self.name!r} must be a number, not {type(value).__name__}")
            if not 0 < value < float("inf"):
                raise InvalidValueError(f"{name} of pod {self.name!r} must be above 0 and finite, not {value}")
        if self.presence not in (None, "count", "set"):
            raise InvalidValueError(f"presence of pod {self.name!r} must be 'count' or 'set', not {self.presence!r}")
        if self.clear_media is not None:
            if isinstance(self.clear_media, str) or not isinstance(self.clear_media, Iterable):
                raise InvalidTypeError(f"clear_media of pod {self.name!r} must be a set of names such as {{'GPU'}}")
            object.__setattr__(self, "clear_media", frozenset(self.clear_media))
        self._check_engine()
        labels = self.labels
        if not isinstance(labels, Mapping) or not all(
            isinstance(each, str) for pair in labels.items() for each in pair
        ):
            raise InvalidTypeError(f"labels of pod {self.name!r} must be a map of str to str, not {labels!r:.60}")
        object.__setattr__(self, "labels", dict(labels))
        if self.ranks is not None:
            if not isinstance(self.ranks, Mapping):
                raise InvalidTypeError(f"ranks of pod {self.name!r} must be a map, not {type(self.ranks).__name__}")
            if not self.ranks:
                raise InvalidValueError(f"ranks of pod {self.name!r} must name at least one rank")
            table = {rank: Endpoints(*self._pair(rank, pair)) for rank, pair in self.ranks.items()}
            object.__setattr__(self, "ranks", table)
            object.__setattr__(self, "dp_size", len(table))
        self._check_keys()
        self.workers()

    def _check_engine(self) -> None:
        whose = f"of pod {self.name!r}"
        if self.engine is not None and self.engine not in ENGINES:
            raise InvalidValueError(f"engine {whose} is {self.engine!r}; it must be one of {', '.join(ENGINES)}")
        if not isinstance(self.eagle, bool):
            if isinstance(self.eagle, (str, bytes)) or not isinstance(self.eagle, Iterable):
                raise InvalidTypeError(f"eagle {whose} must be True, False or a set of groups, not {self.eagle!r:.60}")
            groups = list(self.eagle)
            if any(not isinstance(group, int) or isinstance(group, bool) or group < 0 for group in groups):
                raise InvalidValueError(f"groups in eagle {whose} are numbers from 0 on, not {groups!r:.60}")
            object.__setattr__(self, "eagle", frozenset(groups) if groups else False)
        if self.eagle is not False and self.engine != "vllm":
            raise InvalidValueError(
                f"eagle {whose} says what vLLM drops, and its engine is {self.engine!r}: say engine='vllm', or leave it"
            )
        if not isinstance(self.hybrid, bool):
            raise InvalidTypeError(f"hybrid {whose} must be True or False, not {self.hybrid!r:.60}")
        if isinstance(self.ignore_media, str) or not isinstance(self.ignore_media, Iterable):
            raise InvalidTypeError(f"ignore_media {whose} must be a set of names such as {{'CPU'}}")
        object.__setattr__(self, "ignore_media", frozenset(self.ignore_media))
        if any(not isinstance(name, str) for name in self.ignore_media):
            raise InvalidTypeError(f"ignore_media {whose} must be a set of names such as {{'CPU'}}")

    def _check_keys(self) -> None:
        pair = self.client_keys
        if self.server_key is None:
            if pair is not None:
                raise InvalidValueError(f"client_keys of pod {self.name!r} say nothing without a server_key")
            return
        if not zmq.has("curve"):
            raise StreamError(f"pod {self.name!r} has a server_key, but libzmq is built without CURVE here")
        if not is_key(self.server_key):
            raise InvalidValueError(f"server_key of pod {self.name!r} must be a CURVE key, 40 characters of Z85")
        if pair is None:
            return
        object.__setattr__(self, "client_keys", check_pair(pair, f"client_keys of pod {self.name!r}"))

    def curve(self) -> Curve | None:
        """The keys of its connections, with a pair of our own made anew where it has none; None where they are not
        encrypted."""
        if self.server_key is None:
            return None
        if self.client_keys is None:
            return Curve(self.server_key.encode(), *zmq.curve_keypair())
        public, secret = self.client_keys
        return Curve(self.server_key.encode(), public.encode(), secret.encode())

    def _pair(self, rank: object, pair: object) -> tuple[str | None, str | None]:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise InvalidValueError(f"ranks of pod {self.name!r} are numbers from 0 on, not {rank!r}")
        if isinstance(pair, str) or not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidTypeError(f"rank {rank} of pod {self.name!r} must be (endpoint, replay endpoint or None)")
        return pair[0], pair[1]

    def workers(self) -> dict[int, Endpoints]:
        """The endpoints of every rank. O(ranks)."""
        if self.ranks is not None:
            table = {rank: Endpoints(*pair) for rank, pair in self.ranks.items()}
        else:
            table = {
                rank: Endpoints(self._offset(self.endpoint, rank), self._offset(self.replay_endpoint, rank))
                for rank in range(self.dp_size)
            }
        seen: dict[str, str] = {}
        for rank, pair in table.items():
            for what, endpoint in zip(("publishes", "answers replays"), pair, strict=True):
                if endpoint is None:
                    continue
                check_endpoint(endpoint, f"rank {rank} of pod {self.name!r}")
                use = f"rank {rank} {what}"
                if endpoint in seen:
                    raise InvalidValueError(
                        f"pod {self.name!r} would use {endpoint} twice: {seen[endpoint]} there and {use} there;"
                        f" its {len(table)} ranks need ports that are apart"
                    )
                seen[endpoint] = use
        return table

    def endpoints(self) -> list[tuple[str, str]]:
        """Every endpoint of every rank, and its use, in words. O(ranks)."""
        return [
            (f"rank {rank} of pod {self.name!r} {use}", endpoint)
            for rank, pair in self.workers().items()
            for use, endpoint in zip(("publishes", "answers replays"), pair, strict=True)
            if endpoint is not None
        ]

    def _offset(self, endpoint: str | None, rank: int) -> str | None:
        if endpoint is None or rank == 0:
            return endpoint
        return offset_endpoint(endpoint, rank, f"pod {self.name!r}")

    @classmethod
    def from_string(cls, text: str, **options: Any) -> Self:
        """A source from a command line: ``[NAME=]ENDPOINT[,REPLAY_ENDPOINT][,OPTION=VALUE...]``.

        The name is the endpoint without its scheme unless given, and may be a URL; a replay endpoint at the same host
        may be its port alone, as in ``a=tcp://10.0.0.1:5557,5558,engine=vllm``. OPTION is ``engine``, ``eagle``
        (``true``, or groups: ``0+2``), ``hybrid`` or ``ignore_media`` (``CPU+DISK``), with a VALUE for each.
        ``options`` are further fields; what the text says comes first. Errors as of the class.
        """
        if not isinstance(text, str):
            raise InvalidTypeError(f"a pod is written as [NAME=]ENDPOINT[,REPLAY_ENDPOINT], not as {text!r:.60}")
        plain = re.sub(rf"(?:{_OPTION})+\Z", "", text)
        said = dict(re.findall(_OPTION, text[len(plain) :]))
        if strange := sorted(set(said) - set(_OPTIONS)):
            raise InvalidValueError(
                f"{text!r:.120} has an option {strange[0]!r}; a pod has {', '.join(_OPTIONS)} there"
            )
        options |= spelled(said)
        found = _POD.fullmatch(plain)
        if found is None:
            raise InvalidValueError(
                f"{text!r:.120} is no [NAME=]ENDPOINT[,REPLAY_ENDPOINT], as in a=tcp://10.0.0.1:5557,5558"
            )
        name, endpoint, answers = found["name"], found["endpoint"], found["answers"] or ""
        if answers.isascii() and answers.isdigit() and (at := split_tcp(endpoint)) is not None:
            answers = join_tcp(at[0], int(answers))
        name = name or endpoint.partition("://")[2]
        return cls(name, endpoint=endpoint, replay_endpoint=answers or None, **options)

    @classmethod
    def from_mapping(cls, item: Mapping[str, Any]) -> Self:
        """A source from what a file says; the fields' own names. Raises an error that names what is not a field."""
        if not isinstance(item, Mapping):
            raise InvalidTypeError(f"a pod is described by a map of its fields, not by {item!r:.60}")
        known = {each.name for each in fields(cls)}
        if strange := sorted(map(str, set(item) - known)):
            raise InvalidValueError(f"unknown fields {', '.join(strange)}; a pod has {', '.join(sorted(known))}")
        if "name" not in item:
            raise InvalidValueError(f"a pod without a name: {dict(item)!r:.80}")
        values = dict(item)
        if isinstance(values.get("ranks"), Mapping):
            # Keys are strings where the file is JSON.
            values["ranks"] = {
                int(rank) if str(rank).isdigit() else rank: pair for rank, pair in values["ranks"].items()
            }
        return cls(**values)

    @classmethod
    def from_vllm(
        cls, url: str, *, name: str | None = None, model: str | None = None, timeout: float = 5.0,
        headers: Mapping[str, str] | None = None, **options: Any,
    ) -> Self:  # fmt: skip
        """Ask a vLLM server (``http://host:8000``) where its ranks publish: its ``GET /kv_event_sources``.

        ``name`` is the URL's host and port unless given, ``model`` the first that ``/v1/models`` names; ``headers``
        are sent along (an API key). ``options`` are further fields. Blocks for at most ``timeout`` seconds per
        request. Raises :class:`StreamError` when the server can not be asked or publishes nothing. Source: vLLM pull
        request 55844.
        """
        from ..discovery.engines import describe_vllm

        told, usual = describe_vllm(url, name, model, timeout, headers)
        return cls(**told, **{**usual, **options})

    @classmethod
    def from_sglang(
        cls, url: str, *, name: str | None = None, model: str | None = None, timeout: float = 5.0,
        headers: Mapping[str, str] | None = None, **options: Any,
    ) -> Self:  # fmt: skip
        """Ask an SGLang server (``http://host:30000``) where its ranks publish: its ``GET /server_info``.

        Reads the ``kv_events`` block, and in releases without it the server's own ``kv_events_config`` argument, which
        also is what names the replay endpoint. ``name``, ``model``, ``headers``, ``options``, ``timeout`` and errors
        as in :meth:`from_vllm`. Source: SGLang pull requests 25844, 32729 and 38032.
        """
        from ..discovery.engines import describe_sglang

        told, usual = describe_sglang(url, name, model, timeout, headers)
        return cls(**told, **{**usual, **options})

    def same_streams(self, other: PodSource) -> bool:
        """Whether the other source differs in nothing but ``address`` and ``labels``."""
        return replace(other, address=self.address, labels=self.labels) == self

    def named(self, name: str) -> Self:
        """The same source under another name."""
        return replace(self, name=name)


def spelled(options: Mapping[str, str]) -> dict[str, Any]:
    """The fields that ``engine``, ``eagle``, ``hybrid`` and ``ignore_media`` mean where they are written as text:
    groups and media with ``+`` or ``,`` between them."""
    given: dict[str, Any] = {}
    for name, text in options.items():
        parts = [part.strip() for part in re.split(r"[+,]", text) if part.strip()]
        switch = {"true": True, "false": False}.get(text.strip().lower())
        if name == "engine":
            given[name] = text.strip()
        elif name == "ignore_media":
            given[name] = frozenset(parts)
        elif switch is not None:
            given[name] = switch
        elif name == "eagle" and parts and all(part.isascii() and part.isdigit() for part in parts):
            given[name] = frozenset(map(int, parts))
        else:
            groups = ", or the groups that drop, as in 0+2" if name == "eagle" else ""
            raise InvalidValueError(f"{name} is written {text!r:.60}; it must be true or false{groups}")
    return given


def check_pair(pair: object, what: str) -> tuple[str, str]:
    """A CURVE key pair (public, secret), or an error that says ``what`` is none."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidTypeError(f"{what} must be (public, secret), each a str")
    # Not the keys themselves: one of them is secret, and errors end up in logs.
    if not all(map(is_key, pair)) or zmq.curve_public(pair[1].encode()) != pair[0].encode():
        raise InvalidValueError(f"{what} must be a CURVE key pair: (public, secret), both Z85")
    return pair[0], pair[1]


def is_key(key: object) -> bool:
    try:
        return isinstance(key, str) and len(key) == 40 and len(z85.decode(key.encode())) == 32
    except (KeyError, ValueError, struct.error):
        return False
