"""The location of a pod's event streams: :class:`PodSource`, written by hand or requested from the engine's HTTP
server.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple, Self, TypeAlias

import zmq
from zmq.utils import z85

from ..answers import ENGINES
from ..arguments import sendable
from ..errors import InvalidTypeError, InvalidValueError, StreamError
from .addresses import check_endpoint, join_tcp, offset_endpoint, split_tcp

__all__ = ["Curve", "Endpoints", "PodSource", "check_pair", "is_key", "spelled"]

# The name is the text before the first "=" that a scheme follows, because a name may be a URL with "=" in it. The text
# after the last comma of such a name is no option: an endpoint follows its "=", and values have no "://".
_OPTION = r",([a-z_]+)=((?:(?!://)[^,])*)"
_POD = re.compile(r"(?:(?P<name>.+?)=)?(?P<endpoint>[a-z]+://[^,]+)(?:,(?P<answers>[^,]+))?", re.DOTALL)


Presence: TypeAlias = Literal["count", "set"]
Engine: TypeAlias = Literal["vllm", "sglang", "trtllm"]

# Fields that a string may set after the endpoints.
_OPTIONS = ("model", "engine", "eagle", "hybrid", "ignore_media")


class Endpoints(NamedTuple):
    """The two endpoints of one rank: its publisher, and its replays (None if it has no replays)."""

    endpoint: str | None
    replay_endpoint: str | None


class Curve(NamedTuple):
    """Keys of one encrypted connection in Z85: the publisher's public key, and our own pair."""

    server: bytes
    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class PodSource:
    """The event streams of one pod: their endpoints, and properties of the pod that its events do not carry.

    ::

        from kvindex import PodSource

        source = PodSource("a", endpoint="tcp://10.0.0.1:5557", replay_endpoint="tcp://10.0.0.1:5558", engine="vllm")
        assert source == PodSource.from_string("a=tcp://10.0.0.1:5557,5558,engine=vllm")

    Immutable, so it may be shared between threads. The constructor checks every field, so that a mistake raises here
    and does not appear as a silent pod later.

    Raises:
        InvalidTypeError: A field has the wrong type. The message has its name and the pod's.
        InvalidValueError: A field is out of range, or contradicts another one.
        StreamError: It has a ``server_key``, and libzmq was built without CURVE.
    """

    name: str
    """The pod's name in the index and in every answer."""
    _: KW_ONLY
    endpoint: str | None = None
    """Endpoint of rank 0's publisher: ``tcp://host:port``, ``ipc://path`` or ``inproc://name``. None for a pod that
    connects to :meth:`EventManager.bind`."""
    replay_endpoint: str | None = None
    """Endpoint of rank 0's replays. Without it, a lost batch stays lost, and blocks from before the first batch are
    unknown."""
    model: str = ""
    """Model of the pod's blocks. Queries must name the same model."""
    topic: str | None = None
    """The complete topic of its messages. None accepts the first topic of each connection (for a pod that connects to
    a bound endpoint: ``kv@NAME@MODEL``). Events do not contain the model, but topics of the form ``kv@POD@MODEL`` do:
    with them, an address that another model's engine takes over is noticed. With empty topics, vLLM's default, it
    looks like a restart."""
    dp_size: int = 1
    """Number of data-parallel ranks. Rank r uses the ports of rank 0 plus r, as in vLLM and SGLang, unless ``ranks``
    is given."""
    ranks: Mapping[int, Endpoints | tuple[str, str | None]] | None = None
    """``{rank: (endpoint, replay endpoint or None)}``, for engines without consecutive ports (vLLM with port 0,
    several hosts)."""
    block_size: int | None = None
    """Expected block size of the engine, in tokens. :meth:`EventManager.add_pod` raises at once if the index cannot
    hold such blocks."""
    presence: Presence | None = None
    """``"count"`` or ``"set"``; None for the index's. Use ``"set"`` with vLLM's ``kv_cache_report_mode=full``."""
    clear_media: frozenset[str] | None = None
    """Media that an AllBlocksCleared event of this pod clears; None for all."""
    chunk_size: int | None = None
    """Tokens per chunk of a model with chunked-local attention. Its events do not contain it."""
    lora: str | None = None
    """Adapter that the pod is labelled with, for the router's queries. Blocks are placed by the adapters in their
    events."""
    max_blocks: int | None = None
    """Index blocks that the pod may hold, over all ranks, media and groups; None for no limit. Blocks beyond it are
    counted as ``over_limit`` and make the pod degraded. The engine's number of blocks times its groups, with some
    reserve, never limits an honest pod."""
    max_event_rate: float | None = None
    """Events per second that are taken from the pod, over all ranks, live and replayed; every message counts as at
    least one. None for no limit. Faster events wait at the socket, and the pod is stale meanwhile. A queue that
    overflows leaves a gap, which a replay fills. An idle pod saves up :attr:`StreamPolicy.burst` seconds."""
    max_byte_rate: float | None = None
    """The same for the bytes of its messages, per second."""
    server_key: str | None = None
    """The publisher's CURVE public key, 40 characters of Z85. Connections are then encrypted, and only a publisher
    with the matching secret key is accepted. None accepts any publisher at the endpoint. For a pod that connects to
    :meth:`EventManager.bind`: the key that it connects with."""
    client_keys: tuple[str, str] | None = field(default=None, repr=False)
    """Our own CURVE keys, (public, secret), for publishers that accept some clients only; None creates a pair."""
    engine: Engine | None = None
    """The engine whose rules determine the reuse of a held prefix: ``"vllm"``, ``"sglang"`` or ``"trtllm"``. With
    None, every held block counts. It is not detected from the events."""
    eagle: bool | frozenset[int] = False
    """True if vLLM drops the last matched block for a draft model without lookahead tokens in its hashes (EAGLE or MTP
    before 0.33, or with a KV connector); or the groups (``group_idx``) for which it does."""
    hybrid: bool = False
    """True for a model with Mamba or sliding-window layers on SGLang, which publishes events of full attention only.
    The pod is degraded."""
    ignore_media: frozenset[str] = frozenset()
    """Media whose events are skipped and counted, without an effect on the state: for a tier without removals."""
    address: str | None = None
    """URL where the pod takes requests, such as ``http://10.0.0.1:8000``, for the router. kvindex does not use it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Further properties of the pod for the router, such as its role. kvindex does not use them."""

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
            if any(not isinstance(name, str) for name in self.clear_media):
                raise InvalidTypeError(f"clear_media of pod {self.name!r} must be a set of names such as {{'GPU'}}")
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
        self._check_text()
        self._check_keys()
        self.workers()

    def _check_text(self) -> None:
        """Check the texts: names also come from files and clusters, where JSON can escape half a character."""
        whose = f"of pod {self.name!r}"
        for name in ("name", "model", "topic", "lora", "address"):
            if (value := getattr(self, name)) is not None:
                sendable(value, f"{name} {whose}")
        for name in ("clear_media", "ignore_media"):
            for medium in getattr(self, name) or ():
                sendable(medium, f"a medium in {name} {whose}")
        for pair in self.labels.items():
            for part in pair:
                sendable(part, f"a label {whose}")

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
                f"eagle {whose} applies to vLLM only, and its engine is {self.engine!r}:"
                " set engine='vllm', or omit eagle"
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
                raise InvalidValueError(f"client_keys of pod {self.name!r} need a server_key")
            return
        if not zmq.has("curve"):
            raise StreamError(f"pod {self.name!r} has a server_key, but libzmq is built without CURVE here")
        if not is_key(self.server_key):
            raise InvalidValueError(f"server_key of pod {self.name!r} must be a CURVE key, 40 characters of Z85")
        if pair is None:
            return
        object.__setattr__(self, "client_keys", check_pair(pair, f"client_keys of pod {self.name!r}"))

    def curve(self) -> Curve | None:
        """Returns the keys of its connections, with a new pair of our own if it has no ``client_keys``.

        Returns:
            The keys; None if its connections are not encrypted.
        """
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
        """Returns the endpoints of every rank. O(ranks).

        Returns:
            ``{rank: Endpoints}``.

        Raises:
            InvalidValueError: Two ranks have the same endpoint, or an endpoint is malformed.
        """
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
        """Returns a description and the address of every endpoint of every rank. O(ranks)."""
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
        """Parses ``[NAME=]ENDPOINT[,REPLAY_ENDPOINT][,OPTION=VALUE...]``, the notation of the command line.

        The default name is the endpoint without its scheme. A name may be a URL. A replay endpoint on the same host
        may be a port alone::

            source = PodSource.from_string("a=tcp://10.0.0.1:5557,5558,model=llama,engine=vllm,eagle=0+2")
            assert source.replay_endpoint == "tcp://10.0.0.1:5558" and source.eagle == {0, 2}

        Args:
            text: The source. OPTION is ``model``, ``engine``, ``eagle`` (``true``, or groups: ``0+2``), ``hybrid`` or
                ``ignore_media`` (``CPU+DISK``).
            options: Further fields. Those in ``text`` take precedence.

        Raises:
            InvalidTypeError: ``text`` is not a str.
            InvalidValueError: ``text`` has another form, or a field is out of range.
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
                f"{text!r:.120} is not [NAME=]ENDPOINT[,REPLAY_ENDPOINT], as in a=tcp://10.0.0.1:5557,5558"
            )
        name, endpoint, answers = found["name"], found["endpoint"], found["answers"] or ""
        if answers.isascii() and answers.isdigit() and (at := split_tcp(endpoint)) is not None:
            answers = join_tcp(at[0], int(answers))
        name = name or endpoint.partition("://")[2]
        return cls(name, endpoint=endpoint, replay_endpoint=answers or None, **options)

    @classmethod
    def from_mapping(cls, item: Mapping[str, Any]) -> Self:
        """Creates a source from a map of its fields, for example from a file.

        Args:
            item: Names and values of fields. Keys of ``ranks`` may be strings, as in JSON.

        Raises:
            InvalidTypeError: ``item`` is not a map, or a field has the wrong type.
            InvalidValueError: A field is unknown or out of range, or the name is missing.
        """
        if not isinstance(item, Mapping):
            raise InvalidTypeError(f"a pod is described by a map of its fields, not by {item!r:.60}")
        known = {each.name for each in fields(cls)}
        if strange := sorted(map(str, set(item) - known)):
            raise InvalidValueError(f"unknown fields {', '.join(strange)}; a pod has {', '.join(sorted(known))}")
        if "name" not in item:
            raise InvalidValueError(f"a pod without a name: {dict(item)!r:.80}")
        values = dict(item)
        if isinstance(values.get("ranks"), Mapping):
            # Keys are strings if the file is JSON.
            values["ranks"] = {
                int(rank) if str(rank).isdigit() else rank: pair for rank, pair in values["ranks"].items()
            }
        return cls(**values)

    @classmethod
    def from_vllm(
        cls, url: str, *, name: str | None = None, model: str | None = None, timeout: float = 5.0,
        headers: Mapping[str, str] | None = None, **options: Any,
    ) -> Self:  # fmt: skip
        """Asks a vLLM server for the endpoints of its ranks (``GET /kv_event_sources``). Blocks during the requests.

        Source: vLLM pull request 55844.

        Args:
            url: URL of the server, such as ``http://host:8000``.
            name: The pod's name; None for the host and port of the URL.
            model: The model; None for the first one of ``/v1/models``.
            timeout: Maximum time of each request in seconds.
            headers: Headers of the requests, for example with an API key.
            options: Further fields.

        Raises:
            StreamError: The server cannot be reached or publishes no events.
            InvalidValueError: The URL is malformed, or a field is out of range.
        """
        from ..discovery.engines import describe_vllm

        told, usual = describe_vllm(url, name, model, timeout, headers)
        return cls(**told, **{**usual, **options})

    @classmethod
    def from_sglang(
        cls, url: str, *, name: str | None = None, model: str | None = None, timeout: float = 5.0,
        headers: Mapping[str, str] | None = None, **options: Any,
    ) -> Self:  # fmt: skip
        """Asks an SGLang server for the endpoints of its ranks (``GET /server_info``). Blocks during the requests.

        It reads the ``kv_events`` block of the answer. Older releases have no such block; it then reads the server's
        argument ``kv_events_config``, which also contains the replay endpoint. Source: SGLang pull requests 25844,
        32729 and 38032.

        Args:
            url: URL of the server, such as ``http://host:30000``.
            name: As for :meth:`from_vllm`.
            model: As for :meth:`from_vllm`.
            timeout: As for :meth:`from_vllm`.
            headers: As for :meth:`from_vllm`.
            options: Further fields.

        Raises:
            StreamError: The server cannot be reached or publishes no events.
            InvalidValueError: The URL is malformed, or a field is out of range.
        """
        from ..discovery.engines import describe_sglang

        told, usual = describe_sglang(url, name, model, timeout, headers)
        return cls(**told, **{**usual, **options})

    def same_streams(self, other: PodSource) -> bool:
        """Returns whether another source differs in ``address`` and ``labels`` at most."""
        return replace(other, address=self.address, labels=self.labels) == self

    def named(self, name: str) -> Self:
        """Returns the same source under another name."""
        return replace(self, name=name)


def spelled(options: Mapping[str, str]) -> dict[str, Any]:
    """Converts fields of a source from text: ``model``, ``engine``, ``eagle``, ``hybrid`` and ``ignore_media``, with
    groups and media separated by ``+`` or ``,``.
    """
    given: dict[str, Any] = {}
    for name, text in options.items():
        parts = [part.strip() for part in re.split(r"[+,]", text) if part.strip()]
        switch = {"true": True, "false": False}.get(text.strip().lower())
        if name in ("model", "engine"):
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
    """Returns a CURVE key pair (public, secret), or raises an error that names ``what``."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidTypeError(f"{what} must be (public, secret), each a str")
    # The error does not contain the keys: one of them is secret, and errors end up in logs.
    if not all(map(is_key, pair)) or zmq.curve_public(pair[1].encode()) != pair[0].encode():
        raise InvalidValueError(f"{what} must be a CURVE key pair: (public, secret), both Z85")
    return pair[0], pair[1]


def is_key(key: object) -> bool:
    try:
        return isinstance(key, str) and len(key) == 40 and len(z85.decode(key.encode())) == 32
    except (KeyError, ValueError, struct.error):
        return False
