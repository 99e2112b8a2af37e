"""``kvindex top``: a live view of pods."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import EventManager, PrefixIndex
from ..sync.status import PodStatus, WorkerStatus
from ._pods import add_arguments, followed
from ._terminal import CommandError, add_command, console, counted, positive, seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["add_parser"]

STYLES = {"exact": "green", "degraded": "yellow", "stale": "bold red"}


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands,
        "top",
        help="a live view of pods: states, lag, blocks, losses",
        description="Follow live streams and show what state every pod is in, how far behind, what it holds and what "
        "was lost. Where there is no terminal, or with --once, one plain table.",
        status="0 when no pod is stale at the end, 1 when one is",
        lines=[
            "kvindex top a=tcp://10.0.0.1:5557,5558 b=tcp://10.0.0.2:5557,5558",
            "kvindex top http://10.0.0.1:8000 --once",
            "kvindex top --pods pods.yaml",
        ],
    )
    add_arguments(parser)
    parser.add_argument("--once", action="store_true", help="print the table once, when every pod is current")
    parser.add_argument("--wait", type=seconds, default=5.0, metavar="SECONDS",
                        help="how long pods may take to become current, with --once (default %(default)g)")  # fmt: skip
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="SECONDS",
                        help="between two views (default %(default)g)")  # fmt: skip
    parser.add_argument("--block-size", type=positive, default=16, metavar="TOKENS",
                        help="block size of the index (default %(default)s)")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.pods and not args.file:
        raise CommandError("no pods: name them as NAME=tcp://HOST:PORT,REPLAY_PORT, or by --pods FILE")
    out = console()
    # The table has a reason for everything; lines of a log would only tear it.
    logging.getLogger("kvindex").addHandler(logging.NullHandler())
    index = PrefixIndex(block_size=args.block_size)
    with EventManager(index) as manager, followed(manager, args):
        view = View(manager)
        try:
            if args.once or not out.is_terminal:
                manager.wait_until_current(args.wait)
                view.table()
                time.sleep(min(args.interval, args.wait))
                out.print(view.table())
            else:
                show(out, view, args.interval)
        except KeyboardInterrupt:
            pass
        return 1 if any(pod.state == "stale" for pod in manager.status().values()) else 0


def show(out: Console, view: View, interval: float) -> None:
    """Until it is interrupted."""
    from rich.live import Live

    with Live(console=out, screen=True, auto_refresh=False) as live:
        while True:
            live.update(view.table(out.size.height), refresh=True)
            time.sleep(interval)


class View:
    """The table, and what it has to remember for the figures that are rates."""

    def __init__(self, manager: EventManager) -> None:
        self._manager = manager
        self._before: dict[tuple[str, int], int] = {}
        self._at = time.monotonic()

    def table(self, height: int | None = None) -> Table:
        """The pods as they are now, with rates since the last table; ``height`` is that of the terminal, in lines."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        now, status = time.monotonic(), self._manager.status()
        elapsed, self._at = max(now - self._at, 1e-9), now
        rates, self._before = self._rates(status, elapsed)
        shown = Table(box=SIMPLE_HEAD, caption=summed(status), caption_justify="left", pad_edge=False)
        for column in ("pod", "state"):
            shown.add_column(column, no_wrap=True)
        limited = any(pod.throttled for pod in status.values())
        columns = ["lag", "blocks", "events/s", "gaps", "lost", "restarts", "errors"]
        for column in [*columns, "throttled"] if limited else columns:
            shown.add_column(column, justify="right", no_wrap=True, min_width=len(column))
        shown.add_column("why", overflow="ellipsis", no_wrap=height is not None)
        rows = [row for name in sorted(status) for row in lines(status[name])]
        if height is not None and len(rows) > height - 6:
            # Those that need somebody to look at them, where not all can be shown.
            rows = sorted(rows, key=lambda row: list(STYLES).index(row[1].state), reverse=True)[: max(1, height - 6)]
        for name, row in rows:
            ranks = [row.rank] if isinstance(row, WorkerStatus) else list(row.workers)
            rate = sum(rates.get((row.pod, rank), 0.0) for rank in ranks)
            shown.add_row(
                Text(name), Text(row.state, STYLES[row.state]), lag(row.lag), f"{row.blocks:,}", f"{rate:,.0f}",
                f"{row.gaps:,}", f"{row.lost_batches:,}", f"{row.restarts:,}", f"{sum(row.errors.values()):,}",
                *([f"{row.throttled:,}"] if limited else []), Text(row.reason),
            )  # fmt: skip
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
        # A pod that was followed anew counts from 0 again.
        rates = {who: max(0, count - self._before.get(who, count)) / elapsed for who, count in counts.items()}
        return rates, counts


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
