"""The index as an HTTP service: :class:`Service` is an ASGI application, and ``kvindex serve`` runs it.

::

    from kvindex import EventManager, PrefixIndex
    from kvindex.service import Service

    index = PrefixIndex(block_size=16)
    manager = EventManager(index)
    app = Service(index, manager)                       # uvicorn.run(app, port=8090), or mount it in your own
    manager.close()

It needs the extra ``serve`` (``pip install 'kvindex[serve]'``).
"""

try:
    import msgspec as _msgspec
    import prometheus_client as _prometheus_client
    import starlette as _starlette
except ImportError as error:
    raise ImportError(f"kvindex.service needs {error.name}: pip install 'kvindex[serve]'") from None

from .app import Service
from .call import Limits

__all__ = ["Limits", "Service"]

del _msgspec, _prometheus_client, _starlette
