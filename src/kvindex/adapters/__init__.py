"""Events of publishers that do not speak the engines' wire format, translated for a :class:`PrefixIndex`.

TensorRT-LLM's polled events (:mod:`kvindex.adapters.trtllm`), the events of Dynamo's router
(:mod:`kvindex.adapters.dynamo`) and those of Mooncake's store (:mod:`kvindex.adapters.mooncake`). Their transport is
the caller's: an adapter takes what has arrived. :class:`EventManager` needs none of them for vLLM's and SGLang's
streams.
"""

from .dynamo import DynamoEvents
from .mooncake import MooncakeEvents
from .trtllm import TrtllmEvents

__all__ = ["DynamoEvents", "MooncakeEvents", "TrtllmEvents"]
