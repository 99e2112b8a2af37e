"""One view of a fleet for many processes (extra ``redis``): :class:`ReplicatedIndex`.

Data flows one way: engines, ``EventManager``, its ``tap``, ``Collector``, the log, ``Follower``, ``PrefixIndex``.
``entries`` is the wire format. ``collector``, ``follower``, ``replica`` and ``exchange`` are state machines without
socket, clock or thread; ``store`` sends their requests to the server, and ``shard`` applies their effects. ``view`` has
one or more shards, and ``joined`` answers as their one index. Requests that routers share travel in a second stream
beside the log: ``hints`` has its format and state machine, ``sharing`` has the threads.
"""

from .aio import AsyncReplicatedIndex
from .requests import ReplicationPolicy
from .sharing import SharingStatus
from .status import ReplicationStatus
from .view import ReplicatedIndex

__all__ = ["AsyncReplicatedIndex", "ReplicatedIndex", "ReplicationPolicy", "ReplicationStatus", "SharingStatus"]
