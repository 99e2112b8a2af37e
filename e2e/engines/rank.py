"""The interface of a real engine in a pod: one data-parallel rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any

from kvindex.sim import Prompt


class Rank(ABC):
    """One data-parallel rank: an engine's own cache and publisher.

    ``figures`` counts the events in it, so a run can show that it used its feature.
    """

    endpoint: str
    replay_endpoint: str
    #: The next sequence number.
    seq = 0

    def __init__(self) -> None:
        self.figures: Counter[str] = Counter()

    @abstractmethod
    def add(self, prompt: Prompt, output: list[int]) -> None:
        """Queue a request, and the answer that it will get."""

    @abstractmethod
    def step(self) -> bool:
        """Let the engine do one step of work and publish; ``False`` when there was nothing to do."""

    @abstractmethod
    def hit(self, prompt: Prompt) -> int:
        """The engine's own answer: the number of tokens of this prompt that it would reuse now."""

    def tiers(self, prompt: Prompt) -> dict[str, int]:
        """The tokens that each tier reaches together with the tiers above it, where the engine has several."""
        return {"GPU": self.hit(prompt)}

    @abstractmethod
    def reset(self, connector: bool = False) -> bool:
        """Clear the cache as the engine's own endpoint does; ``False`` when it refuses because it is serving.

        ``connector``: the tiers below as well.
        """

    @abstractmethod
    def blocks(self) -> int:
        """Blocks that a query could find."""

    @abstractmethod
    def close(self) -> None: ...


def endpoints(first: int, ranks: int) -> Mapping[str, str]:
    """The endpoints in the configuration of all ranks; each rank adds its number to the ports, as engines do."""
    return {"endpoint": f"tcp://*:{first}", "replay_endpoint": f"tcp://*:{first + ranks}"}


def reachable(sock: Any) -> str:
    """The local address of a socket that is bound to all interfaces."""
    found: str = sock.last_endpoint.decode().rstrip("\0")
    return found.replace("0.0.0.0", "127.0.0.1")
