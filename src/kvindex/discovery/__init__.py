"""Which pods there are, without anybody saying so to :meth:`EventManager.add_pod`: a watched file, or Kubernetes.

Each watches in a thread of its own and adds and removes pods in an :class:`~kvindex.EventManager`; the streams
themselves are the manager's business. Both are context managers; when one is closed, the pods it has added stay. With
:class:`kvindex.aio.EventManager`, give its ``manager``.
"""

from .file import PodFile, read_pods
from .kubernetes import KubernetesPods

__all__ = ["KubernetesPods", "PodFile", "read_pods"]
