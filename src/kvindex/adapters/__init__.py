"""Adapters for publishers with another format than the engines' ZMQ streams.

They cover TensorRT-LLM's polled events (:mod:`kvindex.adapters.trtllm`), the events of Dynamo's router
(:mod:`kvindex.adapters.dynamo`) and those of Mooncake's store (:mod:`kvindex.adapters.mooncake`). The caller receives
the events and passes them to an adapter. The streams of vLLM and SGLang need no adapter: :class:`EventManager` follows
them.
"""

from .dynamo import DynamoEvents
from .mooncake import MooncakeEvents
from .trtllm import TrtllmEvents

__all__ = ["DynamoEvents", "MooncakeEvents", "TrtllmEvents"]
