"""Which pods there are, without anybody saying so to :meth:`EventManager.add_pod`: a watched file, Kubernetes, or a
kind of discovery of one's own by :class:`Reconciler`.

Each watches in a thread of its own and adds and removes pods in an :class:`~kvindex.EventManager`, or in a
:class:`kvindex.aio.AsyncEventManager`. Both are context managers; when one is closed, the pods it has added stay.
"""

from .file import PodFile, read_pods
from .kubernetes import KubernetesPods
from .reconciler import Reconciler

__all__ = ["KubernetesPods", "PodFile", "Reconciler", "read_pods"]
