"""``kvindex top``: a live view of pods."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from .. import EventManager, PrefixIndex
from ..sync.status import PodStatus, WorkerStatus
from ._pods import add_arguments, followed
from ._terminal import CommandError, add_command, console, counted, positive, seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["add_parser"]

# Columns that get room after the others while all their figures are 0. The first of them gets room first.
SELDOM = ["errors", "lost", "gaps", "restarts", "throttled"]
ROOM = 32  # least characters of a reason
BETWEEN = 3  # characters between two columns

STYLES = {"exact": "green", "degraded": "yellow", "stale": "bold red"}


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "top",
        help="show the state, lag, blocks and losses of pods",
        description="Follow live streams and show the state, lag, blocks and losses of every pod. Without a terminal, "
        "or with --once, print one plain table.",
        status="0 if no pod is stale at the end, 1 otherwise",
        lines=[
            "kvindex top a=tcp://10.0.0.1:5557,5558,engine=vllm b=tcp://10.0.0.2:5557,5558,engine=vllm",
            "kvindex top http://10.0.0.1:8000 --once",
            "kvindex top --pods pods.yaml",
            "kvindex top --url http://10.0.0.2:8090",
        ],
    )
    add_arguments(parser)
    parser.add_argument("--url", metavar="URL",
                        help="read the state of a running kvindex serve (token: KVINDEX_TOKEN)")  # fmt: skip
    parser.add_argument("--once", action="store_true", help="print the table once every pod is current, and exit")
    parser.add_argument("--wait", type=seconds, default=5.0, metavar="SECONDS",
                        help="with --once, longest wait for pods to become current (default %(default)g)")  # fmt: skip
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="SECONDS",
                        help="seconds between two views (default %(default)g)")  # fmt: skip
    parser.add_argument("--block-size", type=positive, default=16, metavar="TOKENS",
                        help="block size of the index (default %(default)s)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.url is not None and (args.pods or args.file):
        raise CommandError("--url reads the pods of a service: name no others")
    if args.url is None and not args.pods and not args.file:
        raise CommandError("no pods: name them as NAME=tcp://HOST:PORT,REPLAY_PORT, or by --pods FILE")
    out = console()
    # The table has the reasons; lines of a log would only break it.
    logging.getLogger("kvindex").addHandler(logging.NullHandler())
    # A signal must leave the terminal as it was before.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, _ended)
    with ExitStack() as stack:
        manager: Any
        if args.url is not None:
            manager = Service(args.url, os.environ.get("KVINDEX_TOKEN"))
        else:
            manager = stack.enter_context(EventManager(PrefixIndex(block_size=args.block_size)))
            stack.enter_context(followed(manager, args))
        view = View(manager)
        try:
            if args.once or not out.is_terminal:
                manager.wait_until_current(args.wait)
                view.table(out.width)
                time.sleep(min(args.interval, args.wait))
                out.print(view.table(out.width))
            else:
                show(out, view, args.interval)
        except KeyboardInterrupt:
            pass
        return 1 if any(pod.state == "stale" for pod in manager.status().values()) else 0


def _ended(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def show(out: Console, view: View, interval: float) -> None:
    """Show the table until an interrupt."""
    from rich.live import Live

    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            live.update(view.table(*out.size), refresh=True)
            time.sleep(interval)


class Service:
    """The state of the pods of a running service, in place of a manager."""

    def __init__(self, url: str, token: str | None) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            self._request = urllib.request.Request(f"{url.rstrip('/')}/v1/pods", headers=headers)
        except ValueError as error:
            raise CommandError(f"--url {url}: {error}") from None

    def status(self) -> dict[str, PodStatus]:
        where = self._request.full_url
        try:
            with urllib.request.urlopen(self._request, timeout=10) as answer:
                pods = json.load(answer)["pods"]
        except (OSError, ValueError, KeyError, TypeError, HTTPException) as error:
            raise CommandError(f"{where} cannot be asked: {error}") from None
        found = {}
        for name, said in pods.items():
            said["workers"] = {int(rank): _made(WorkerStatus, worker) for rank, worker in said["workers"].items()}
            found[name] = _made(PodStatus, said)
        return found

    def wait_until_current(self, timeout: float) -> None:
        ends = time.monotonic() + timeout
        while any(pod.state == "stale" for pod in self.status().values()) and time.monotonic() < ends:
            time.sleep(min(0.2, timeout))


def _made(kind: Any, said: Mapping[str, Any]) -> Any:
    # A newer service may have more fields.
    return kind(**{field.name: said[field.name] for field in fields(kind)})


class View:
    """The table, and the earlier counts for the figures that are rates."""

    def __init__(self, manager: EventManager | Service) -> None:
        self._manager = manager
        self._before: dict[tuple[str, int], int] = {}
        self._at = time.monotonic()

    def table(self, width: int, height: int | None = None) -> Table:
        """A table of the pods now, with rates since the last table.

        ``width`` and ``height`` are those of the terminal, in characters and lines. Pod and state always have a column,
        and a reason has the room that the figures leave.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        now, status = time.monotonic(), self._manager.status()
        elapsed, self._at = max(now - self._at, 1e-9), now
        rates, self._before = self._rates(status, elapsed)
        rows = [row for name in sorted(status) for row in lines(status[name])]
        caption = summed(status)
        if height is not None and len(rows) > height - 6:
            # Without room for all, show the pods that need attention.
            most = max(1, height - 6)
            caption += f"; {counted(len(rows) - most, 'row')} of {len(rows):,} left out, the best"
            rows = sorted(rows, key=lambda row: list(STYLES).index(row[1].state), reverse=True)[:most]
        cells = [figures(row, rates) for _, row in rows]
        longest = max((len(name) for name, _ in rows), default=3)
        pod = max(3, min(longest, max(14, width // 3)))
        columns = fitting(cells, width - pod - len("degraded") - 2 * BETWEEN - ROOM)
        shown = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
        shown.add_column("pod", no_wrap=True, min_width=pod)
        shown.add_column("state", no_wrap=True, min_width=len("degraded"))
        for column, size in columns.items():
            shown.add_column(column, justify="right", no_wrap=True, min_width=size)
        shown.add_column("why", overflow="ellipsis", no_wrap=height is not None, ratio=1)
        for (name, row), cell in zip(rows, cells, strict=True):
            state = Text(row.state, STYLES[row.state])
            shown.add_row(Text(shortened(name, pod)), state, *(cell[column] for column in columns), Text(row.reason))
        return shown

    def _rates(
        self, status: Mapping[str, PodStatus], elapsed: float
    ) -> tuple[dict[tuple[str, int], float], dict[tuple[str, int], int]]:
        """Blocks stored and removed per second, by worker."""
        counts = {
            (name, rank): worker.events.get("stored", 0) + worker.events.get("removed", 0)
            for name, pod in status.items()
            for rank, worker in pod.workers.items()
        }
        # A pod that was removed and added again counts from 0.
        rates = {who: max(0, count - self._before.get(who, count)) / elapsed for who, count in counts.items()}
        return rates, counts


def figures(row: PodStatus | WorkerStatus, rates: Mapping[tuple[str, int], float]) -> dict[str, str]:
    """The figures of one row, by column."""
    ranks = [row.rank] if isinstance(row, WorkerStatus) else list(row.workers)
    return {
        "lag": lag(row.lag),
        "blocks": f"{row.blocks:,}",
        "events/s": f"{sum(rates.get((row.pod, rank), 0.0) for rank in ranks):,.0f}",
        "gaps": f"{row.gaps:,}",
        "lost": f"{row.lost_batches:,}",
        "restarts": f"{row.restarts:,}",
        "errors": f"{sum(row.errors.values()):,}",
        "throttled": f"{row.throttled:,}",
    }


def fitting(cells: Sequence[Mapping[str, str]], width: int) -> dict[str, int]:
    """The columns of figures that ``width`` characters have room for, with their widths, in their usual order."""
    every = ["lag", "blocks", "events/s", "gaps", "lost", "restarts", "errors", "throttled"]
    sizes = {column: max([len(column), *(len(cell[column]) for cell in cells)]) for column in every}
    telling = [column for column in SELDOM if any(cell[column] != "0" for cell in cells)]
    rest = [column for column in SELDOM if column not in telling and column != "throttled"]
    chosen: set[str] = set()
    left = width
    for column in ["lag", "blocks", *telling, "events/s", *rest]:
        if sizes[column] + BETWEEN <= left:
            chosen.add(column)
            left -= sizes[column] + BETWEEN
    return {column: sizes[column] for column in every if column in chosen}


def shortened(name: str, width: int) -> str:
    """A name cut in its middle to ``width`` characters, because pods of one deployment differ at the end."""
    if len(name) <= width:
        return name
    head = width // 3
    return f"{name[:head]}…{name[len(name) - (width - head - 1) :]}"


def lines(pod: PodStatus) -> list[tuple[str, PodStatus | WorkerStatus]]:
    """One line for a pod, and one for each rank where it has several."""
    rows: list[tuple[str, PodStatus | WorkerStatus]] = [(pod.pod, pod)]
    if len(pod.workers) > 1:
        rows += [(f"  rank {rank}", worker) for rank, worker in sorted(pod.workers.items())]
    return rows


def lag(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:,.0f} ms" if abs(value) < 10 else f"{value:,.0f} s"


def summed(status: Mapping[str, PodStatus]) -> str:
    states = [pod.state for pod in status.values()]
    told = ", ".join(f"{states.count(state)} {state}" for state in STYLES if state in states)
    held = counted(sum(pod.blocks for pod in status.values()), "block")
    return f"{counted(len(status), 'pod')}: {told or 'none yet'}; {held}"
