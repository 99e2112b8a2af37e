"""Event streams as reported by engines' HTTP servers, for :meth:`PodSource.from_vllm` and ``from_sglang``.

Each function blocks for at most ``timeout`` seconds per request. It returns the fields of a :class:`PodSource` that
the server reports, and defaults that the caller may override.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any, TypeAlias

from ..arguments import sendable
from ..errors import InvalidTypeError, InvalidValueError, StreamError
from ..sync.addresses import WILDCARDS, join_tcp, offset_endpoint

__all__ = ["describe_sglang", "describe_vllm"]

Told: TypeAlias = tuple[dict[str, Any], dict[str, Any]]

# Descriptions of a few ranks take a few hundred bytes; SGLang's /server_info with all its arguments takes some 20 kB.
_LONGEST_ANSWER = 4 << 20
# The fields in which SGLang's /server_info reports that a model has more than full attention.
_HYBRID = ("is_hybrid", "is_hybrid_swa", "is_hybrid_ssm", "is_hybrid_model")


def describe_vllm(
    url: str, name: str | None, model: str | None, timeout: float, headers: Mapping[str, str] | None
) -> Told:  # fmt: skip
    """``GET /kv_event_sources`` of vLLM."""
    host, port = _host(url)
    answer = _get(url, "/kv_event_sources", timeout, headers)
    if not isinstance(answer, list):
        raise StreamError(f"{url}/kv_event_sources gave {answer!r:.80}, which is not a list of sources")
    if not answer:
        raise StreamError(f"{url} publishes no KV events: start vLLM with --kv-events-config")
    ranks: dict[int, tuple[str, str | None]] = {}
    topics = set()
    for item in answer:
        try:
            rank = int(item.get("data_parallel_rank") or 0)
            if rank in ranks:
                raise ValueError(f"rank {rank} is there twice")
            endpoint = _reachable(item["endpoint"], host)
            if endpoint is None:
                raise ValueError("it has no endpoint")
            ranks[rank] = (endpoint, _reachable(item.get("replay_endpoint"), host))
            topics.add(item.get("topic") or None)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StreamError(f"{url}/kv_event_sources gave {item!r:.80}, which is not a source: {error!r}") from error
    if model is None:
        model = _first_model(url, timeout, headers)
    topic = topics.pop() if len(topics) == 1 else None
    told = {"name": name or f"{host}:{port}", "model": model, "topic": topic, "ranks": ranks}
    return told, {"engine": "vllm", "address": url.rstrip("/")}


def describe_sglang(
    url: str, name: str | None, model: str | None, timeout: float, headers: Mapping[str, str] | None
) -> Told:  # fmt: skip
    """``GET /server_info`` of SGLang."""
    host, port = _host(url)
    try:
        info = _get(url, "/server_info", timeout, headers)
    except StreamError as error:
        if "404" not in str(error):
            raise
        info = _get(url, "/get_server_info", timeout, headers)  # its name until 0.5.4
    if not isinstance(info, dict):
        raise StreamError(f"{url}/server_info gave {info!r:.80}, which does not describe a server")
    try:
        config = _sglang_config(info)
        block = info.get("kv_events") or {}
        size = block.get("dp_size") or info.get("dp_size") or 1
        topic = block.get("topic") or config.get("topic") or None
        endpoint = _advertised(block, "endpoint", host) or _reachable(config.get("endpoint"), host)
        answers = _advertised(block, "replay_endpoint", host) or _reachable(config.get("replay_endpoint"), host)
        if endpoint is None:
            raise StreamError(f"{url} publishes no KV events: start SGLang with --kv-events-config")
        found: dict[str, Any] = {"endpoint": endpoint, "replay_endpoint": answers, "dp_size": int(size)}
        if block.get("publishers"):
            found = {"ranks": {int(each["dp_rank"]): _published(each, answers, host) for each in block["publishers"]}}
        tokens = int(block.get("block_size") or info.get("page_size") or 0) or None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, (InvalidValueError, InvalidTypeError)):
            raise StreamError(f"{url}/server_info describes impossible streams: {error}") from error
        raise StreamError(
            f"{url}/server_info describes its events as {info.get('kv_events')!r:.120}: {error!r}"
        ) from error
    if model is None:
        model = info.get("served_model_name") or info.get("model_path") or ""
    usual = {"block_size": tokens, "engine": "sglang", "hybrid": _is_hybrid(info), "address": url.rstrip("/")}
    return {"name": name or f"{host}:{port}", "model": model, "topic": topic, **found}, usual


def _published(publisher: Mapping[str, Any], answers: str | None, host: str) -> tuple[str | None, str | None]:
    """Return where one rank of SGLang publishes and answers replays: at its own endpoints, or counted from rank 0's."""
    own = _reachable(publisher.get("replay_endpoint"), host)
    if own is None and answers is not None:
        own = offset_endpoint(answers, int(publisher["dp_rank"]), "the server")
    return _reachable(publisher["endpoint"], host), own


def _is_hybrid(info: Mapping[str, Any]) -> bool:
    """Whether an SGLang server reports layers other than full attention."""
    places = [info, *(each for each in info.get("internal_states") or () if isinstance(each, Mapping))]
    return any(place.get(name) is True for place in places for name in _HYBRID)


def _host(url: str) -> tuple[str, int]:
    if isinstance(url, str):
        sendable(url, "the URL of a server")
    parts = urllib.parse.urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidValueError(f"{url!r} is not the URL of a server: http://host:port")
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _get(url: str, path: str, timeout: float, headers: Mapping[str, str] | None) -> Any:
    where = url.rstrip("/") + path
    request = urllib.request.Request(where, headers={"Accept": "application/json", **(headers or {})})
    try:
        until = time.monotonic() + timeout
        with urllib.request.urlopen(request, timeout=timeout) as response:
            body = b""
            # In pieces: the timeout applies to each read, and a server may send a byte a second.
            while len(body) <= _LONGEST_ANSWER and (piece := response.read1(1 << 16)):
                body += piece
                if time.monotonic() > until:
                    raise TimeoutError(f"no whole answer within {timeout} s")
            if response.length and len(body) <= _LONGEST_ANSWER:
                raise OSError(f"the answer ends {response.length} bytes early")
    except urllib.error.HTTPError as error:
        hint = ": it may be older than this; name its endpoints to PodSource" if error.code == 404 else ""
        error.close()
        raise StreamError(f"{where} answered {error.code} {error.reason}{hint}") from error
    except (OSError, ValueError) as error:  # no route, no name, no answer in time, no HTTP
        raise StreamError(f"{where} cannot be asked: {getattr(error, 'reason', error)}") from error
    except Exception as error:
        # http.client has no base class below Exception for answers that are not HTTP. Its messages contain the bytes
        # that came instead: at a port of events, these are kilobytes of token ids, which do not belong in a log.
        raise StreamError(f"{where} does not speak HTTP ({type(error).__name__})") from None
    if len(body) > _LONGEST_ANSWER:
        raise StreamError(f"{where} answered with more than {_LONGEST_ANSWER} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise StreamError(f"{where} gave no JSON: {body[:40]!r}") from error


def _first_model(url: str, timeout: float, headers: Mapping[str, str] | None) -> str:
    answer = _get(url, "/v1/models", timeout, headers)
    try:
        return str(answer["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise StreamError(f"{url}/v1/models names no model: give it as model=") from error


def _reachable(endpoint: Any, host: str) -> str | None:
    """A publisher's bound endpoint, as a client on another machine connects to it."""
    if not endpoint:
        return None
    if not isinstance(endpoint, str):
        raise TypeError(f"an endpoint is a string, not {endpoint!r}")
    found = re.fullmatch(r"tcp://(.*):(\d+)", endpoint)
    if found is not None and found[1] in WILDCARDS:
        return join_tcp(host, int(found[2]))
    return endpoint


def _advertised(block: Mapping[str, Any], what: str, host: str) -> str | None:
    port = block.get(f"{what}_port_base")
    if not port:
        return None
    named = block.get(f"{what}_host") or block.get("endpoint_host") or "*"
    return join_tcp(host if named in WILDCARDS else named, int(port))


def _sglang_config(info: Mapping[str, Any]) -> dict[str, Any]:
    config = info.get("kv_events_config")
    if isinstance(config, str) and config.strip():
        config = json.loads(config)
    if not isinstance(config, dict) or config.get("publisher") != "zmq":
        return {}
    # SGLang's own default endpoint.
    return {"endpoint": "tcp://*:5557", **config}
