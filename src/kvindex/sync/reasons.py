"""Every reason for a worker's state: the state, and the text that people read.

A new reason is a member here, a row in ``docs/guides/operating.md`` (a test compares the two), and the code that
detects it. The sockets report why a connection could not be made or was lost, in texts of their own.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from ..answers import Verdict

__all__ = ["Reason"]


class Reason(Enum):
    """A state and a text with its facts in braces: ``Reason.MISSING.text(seq=7)`` returns the text
    with them filled in."""

    # It is unknown whether the content is current.
    NOT_CONNECTED = "stale", "not connected yet"
    LOOKED_UP = "stale", "looking up the address of {endpoint}"
    LIMITED = "stale", "it sends more than its limit allows"
    SAME_PROCESS_ASKED = "stale", "checking whether this is still the same process"
    SAME_PROCESS_UNSHOWN = "stale", "unknown yet whether this is still the same process"
    REPLAYING = "stale", "replaying"
    UNREACHED = "stale", "{replay} accepts no connection, so the history cannot be replayed"
    QUEUED = "stale", "replaying: {replay} has the request and has not begun to answer"
    MISSING = "stale", "batch {seq} is missing"
    SILENT = "stale", "{replay} does not answer, and {endpoint} publishes nothing"
    UNCONFIRMED = "stale", "waiting for a live batch of {endpoint} to check the replay of {replay}"
    LAPSED = "stale", "the time limit of PrefixIndex.trust is over"
    UNREAD = (
        "stale",
        (
            "this process has not read its engines' messages for {seconds} s: it was suspended, or needs more of a"
            " processor"
        ),
    )
    BEING_APPLIED = "stale", "batches are being applied"
    UNCLEARED = "stale", "the index cannot clear the blocks of the former process"
    RESTARTED = "stale", "the engine has restarted"
    REBUILT = "stale", "rebuilding from the whole history"
    DISOWNED = "stale", "the replay belonged to another stream"
    SHARED_SOCKET = "stale", "several ranks publish through one socket"

    # The stream: batches are missing, or may be another process's.
    OTHER_BATCH = (
        "degraded",
        ("{replay} gives another batch {seq} than {endpoint} publishes: it is another process's replay endpoint"),
    )
    ENDS_BEFORE = (
        "degraded",
        ("{replay} ends before batch {seq}, which {endpoint} had published: it is another process's replay endpoint"),
    )
    CHANGES = "degraded", "{replay} gives batches of more than one process: it is not asked any more"
    RESTART_OR_OTHER = (
        "degraded",
        (
            "{replay} does not give batch {seq} as {endpoint} published it: the next one shows whether the engine has"
            " restarted or that is another process's replay endpoint"
        ),
    )
    EMPTY = (
        "degraded",
        (
            "{replay} answers without a batch, though {endpoint} has published {seq}: it keeps none, or is another"
            " process's"
        ),
    )
    OTHER_TOPIC = "degraded", "{replay} answers with topic {topic}, this stream has {expected}"
    OTHER_TOPIC_BEFORE = "degraded", "{replay} answers with topic {topic}, {endpoint} publishes {expected}"
    ONLY_REPLAYS = (
        "degraded",
        ("{endpoint} publishes no batch that {replay} returns: it has another topic, or is another process"),
    )
    OTHER_ENGINE = (
        "degraded",
        (
            "{endpoint} publishes topic {topic}, and {before} before: another engine is there now, or the same with"
            " another model"
        ),
    )
    SWAPPED_RANKS = (
        "degraded",
        (
            "batches of rank {other} come from {endpoint} or {replay}, which are rank {rank}'s: are the endpoints of"
            " these ranks swapped?"
        ),
    )
    RIVAL = (
        "degraded",
        (
            "two publishers send as topic {topic}, rank {rank}: only the later connection is heard; give each pod a"
            " name of its own"
        ),
    )
    HOLES = "degraded", "{count} range(s) of batches are lost"
    UNPROVEN = "degraded", "no replay has shown the batches before the first one"
    CUT_SHORT = "degraded", "a replay stopped without its end marker: batches may be missing after {seq}"

    # The index: the events cannot be followed exactly.
    UNKNOWN_EVENT = "degraded", "an event of kind {kind}, which is not known, may have taken blocks away"
    CLEAR_IN_DOUBT = "degraded", "a clear did not say whether it includes the offloading tiers"
    HYBRID = "degraded", "hybrid=True: evictions outside full attention are not published"
    BLOCK_SIZE = "degraded", "its blocks have {sizes} tokens, the index has blocks of {block_size}"
    NOT_PLACED = "degraded", "the index could not follow all events: {refusals}"

    # Facts that cannot be known or differ from the configuration, though every batch is applied.
    NO_REPLAY = "exact", "without a replay endpoint the loss of the last batches cannot be noticed"
    NO_ANSWER = "exact", "{replay} has not answered: without replays the loss of the last batches cannot be noticed"
    OTHER_MODEL = "exact", "its topic names model {named}, not {model}"
    EAGLE_IDLE = (
        "exact",
        ("eagle has no effect: the hashes of its blocks have a lookahead of {lengths}, so no block is dropped"),
    )
    IGNORED_EVENT = "exact", "{count} event of unknown kind was ignored, and no block is held"
    IGNORED_EVENTS = "exact", "{count} events of unknown kind were ignored, and no block is held"

    def __init__(self, state: Verdict, template: str) -> None:
        self.state: Verdict = state
        self.template = template

    def text(self, **facts: Any) -> str:
        """Return the text with its facts filled in."""
        return self.template.format(**facts)
