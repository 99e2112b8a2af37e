"""Discovery of pods: from a file, from Kubernetes, or from your own source with a :class:`Reconciler`.

Each watches in its own thread, and adds and removes pods in an :class:`~kvindex.EventManager` or a
:class:`kvindex.aio.AsyncEventManager`. They are context managers; the pods stay in the manager when they are closed.
"""

from .file import PodFile, read_pods
from .kubernetes import KubernetesPods
from .reconciler import Reconciler

__all__ = ["KubernetesPods", "PodFile", "Reconciler", "read_pods"]
