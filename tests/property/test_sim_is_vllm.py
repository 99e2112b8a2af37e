"""The simulated engine compared with a real one: for the requests of a capture, it must publish vLLM's events.

The captures contain the requests and the events, but not how the requests overlapped. One overlap fits all pods and
files: three requests at a time, the oldest finished first. This is no accident, because any other order of eviction or
of freeing gives other removals, of which there are 14,542.
"""

from __future__ import annotations

import copy

import msgpack
import pytest

from kvindex.capture import Message, read_capture
from kvindex.sim import Cleared, Engine, Prompt, Removed, Stored

AT_A_TIME = 3
TAGS = {Stored: "BlockStored", Removed: "BlockRemoved", Cleared: "AllBlocksCleared"}


def served(path, pod):
    """Return the requests of one pod in order, each with the batches that it then published."""
    header, *records = read_capture(path)
    requests, asked = [], None
    for record in records:
        if not isinstance(record, Message):
            asked = record
            continue
        if record.pod == pod:
            if not requests or requests[-1][0] is not asked:
                requests.append((asked, []))
            requests[-1][1].append(msgpack.unpackb(record.payload)[1])
    return header, requests


def decoded(asked, batches):
    """Return the generated tokens that filled blocks. The first batch is the prompt's."""
    tokens = [
        token
        for batch in batches[1:]
        for event in batch
        if event["type"] == "BlockStored" and event["group_idx"] == 0
        for token in event["token_ids"]
    ]
    return tokens[len(asked.tokens) % 16 :] if tokens else []


def theirs(batches):
    for batch in batches:
        for event in batch:
            for h in event.get("block_hashes", [None]):
                yield event["type"], event.get("group_idx"), h


def ours(events):
    for event in events:
        for digest in getattr(event, "block_hashes", [None]):
            yield TAGS[type(event)], getattr(event, "group_idx", None), digest


class Names:
    """A mapping from our hashes to vLLM's. The first time that both store a block, it gets its name."""

    def __init__(self):
        self.known = {None: None}

    def agree(self, their_events, our_events):
        their_events, our_events = list(their_events), list(our_events)
        new = dict(self.known)
        for (tag, group, h), (our_tag, our_group, digest) in zip(their_events, our_events, strict=False):
            if (tag, group) != (our_tag, our_group):
                return False
            if tag == "BlockStored":
                new.setdefault(digest, h)
            if new.get(digest, "unnamed") != h:
                return False
        if len(their_events) != len(our_events):
            return False
        self.known = new
        return True


@pytest.mark.parametrize("pod", ["pod-0", "pod-1", "pod-2", "pod-3"])
@pytest.mark.parametrize(
    "name", ["vllm-0.33-full-attention", "vllm-0.33-lora-salt-bytes-hashes", "vllm-0.33-hybrid-sliding-window"]
)
def test_the_simulated_engine_publishes_what_vllm_published(name, pod, shared):
    header, requests = served(shared / "captures" / f"{name}.msgpack.gz", pod)
    names = Names()
    prompts = [
        Prompt(asked.tokens, lora_name=asked.lora_name, lora_id=asked.lora_id, cache_salt=asked.cache_salt)
        for asked, _ in requests
    ]
    furthest = 0

    def serve(place, engine, running, unseen):
        """Serve one request on copies. Returns None if vLLM published other events."""
        asked, batches = requests[place]
        engine, running = copy.deepcopy((engine, running), {id(prompt): prompt for prompt in prompts})
        while len(running) >= AT_A_TIME:
            engine.finish(running.pop(0))
        request = engine.start(prompts[place])
        if request is None or not engine.decode(request, [*decoded(asked, batches), *[1] * unseen, 1]):
            return None
        running.append(request)
        expected = list(theirs(batches))
        if ("AllBlocksCleared", None, None) in expected:
            while running:
                engine.finish(running.pop(0))
            assert engine.reset()
        return (engine, running) if names.agree(expected, ours(engine.take_events())) else None

    # Generated tokens that fill no block are in no event, and neither is the last token, which is never computed. If
    # there was one of the former, it took a block, but only a later eviction shows this.
    def follow(place, engine, running):
        nonlocal furthest
        furthest = max(furthest, place)
        if place == len(requests):
            return True
        after = (serve(place, engine, running, unseen) for unseen in (1, 0))
        return any(state is not None and follow(place + 1, *state) for state in after)

    # One of vLLM's blocks is the null block, which holds nothing.
    engine = Engine(header["num_blocks"] - 1, header["block_size"], window=header["sliding_window"])
    assert follow(0, engine, []), f"at {requests[furthest][0].id} vLLM does what the simulated engine does not"
    assert len(requests) > 4
