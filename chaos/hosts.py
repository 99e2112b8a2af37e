"""Hosts on one machine: network namespaces, each joined to the index's by a veth pair, and the faults of their network.

Only this run uses these namespaces: :func:`enter` starts the program again in new network, mount and process namespaces
(and a new user namespace, unless the user is root). When the run ends, even by SIGKILL, the kernel removes all of them,
with every process, interface, rule, qdisc and mount in them, so no clean-up is needed. The addresses exist nowhere
else.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["Host", "enter", "inside", "missing", "refuse", "run"]

_MARK = "CHAOS_NAMESPACES"


def run(*command: str) -> str:
    """Run a tool. Raises OSError with its output when it fails."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip() or done.returncode}")
    return done.stdout


def inside() -> bool:
    """Whether this process is in namespaces of its own."""
    return os.environ.get(_MARK) == "made"


def refuse(why: str) -> None:
    """Make no namespaces in this process."""
    os.environ[_MARK] = why


def enter(module: str, argv: Sequence[str]) -> None:
    """Replace this process by the same program in namespaces of its own.

    Returns where that is not possible; :func:`missing` then gives the reason.
    """
    if _MARK in os.environ:
        return
    # The tools' files under /run (names of namespaces, a lock of iptables) must belong to this run alone.
    prepare = "mount -t tmpfs tmpfs /run && ip link set lo up"
    refused = ""
    for rights in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *rights, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        try:
            run(*command, "sh", "-c", f"{prepare} && ip netns add try && ip netns del try")
            break
        except (OSError, subprocess.TimeoutExpired) as error:
            refused = str(error)
    else:
        os.environ[_MARK] = f"no rights to make namespaces: {refused}"
        return
    os.environ[_MARK] = "made"
    again = [sys.executable, "-m", module, *argv]
    os.execvp(command[0], [*command, "sh", "-c", f'{prepare} && exec "$@"', "sh", *again])


def missing() -> str | None:
    """The reason why there can be no hosts here, or None."""
    return None if inside() else os.environ.get(_MARK) or "namespaces are switched off"


class Host:
    """One pod's host: a network namespace with one interface, which leads to the index."""

    def __init__(self, number: int) -> None:
        self.name = f"pod-{number}"
        self.address = f"10.77.{number}.2"
        self._near = f"10.77.{number}.1"
        self._link = f"v{number}"
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "e0", "netns", self.name)
        run("ip", "addr", "add", f"{self._near}/30", "dev", self._link)
        run("ip", "link", "set", self._link, "up")
        for arguments in (("addr", "add", f"{self.address}/30", "dev", "e0"), ("link", "set", "e0", "up"),
                          ("link", "set", "lo", "up")):  # fmt: skip
            run("ip", "-n", self.name, *arguments)

    @property
    def prefix(self) -> list[str]:
        """The prefix of a command that runs on this host. The process keeps its id, because ip uses exec."""
        return ["ip", "netns", "exec", self.name]

    def rule(self, chain: str, *what: str) -> None:
        """Add a rule for packets; :meth:`clear` removes all rules."""
        run(*self.prefix, "iptables", "-w", "5", "-A", chain, *what)

    def shape(self, *what: str) -> None:
        """Put a queueing discipline on the pod's outgoing packets; :meth:`clear` removes it."""
        run(*self.prefix, "tc", "qdisc", "add", "dev", "e0", "root", *what)

    def clear(self) -> int:
        """Remove all rules and disciplines, and return the number of packets that were dropped or held back."""
        rules = run(*self.prefix, "iptables", "-w", "5", "-nvxL")
        hit = sum(int(count) for count in re.findall(r"^\s*(\d+)\s+\d+\s+DROP", rules, re.MULTILINE))
        run(*self.prefix, "iptables", "-w", "5", "-F")
        queues = run(*self.prefix, "tc", "-s", "qdisc", "show", "dev", "e0")
        if "qdisc noqueue" not in queues:
            hit += sum(int(count) for count in re.findall(r"overlimits (\d+)", queues))
            run(*self.prefix, "tc", "qdisc", "del", "dev", "e0", "root")
        return hit

    def remove(self) -> None:
        run("ip", "link", "del", self._link)
        run("ip", "netns", "del", self.name)
