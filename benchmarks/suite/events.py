"""Times of storing, removing and decoding, and of content that comes and goes."""

from __future__ import annotations

from typing import Any

from kvindex import PrefixIndex

from ..data import BLOCK, chains, payloads
from ..workloads import WIRE_FORMS, ingest, remove, store_objects
from ._sampled import Sampled


class Ingest(Sampled):
    """One batch: 256 or 4 x 64 blocks, or 64 events of one block, in the newest wire form."""

    params = ([256, 64, 1],)
    param_names = ("blocks_an_event",)
    make = staticmethod(ingest)

    def time_ingest(self, *_: Any) -> None:
        self.run()


class IngestKnown(Ingest):
    """The same batches, with content that another pod holds already."""

    options = {"known": True}  # noqa: RUF012


def _in_form(form: str) -> Any:
    return ingest(64, form=form)


class IngestForm(Sampled):
    """A batch of 4 x 64 blocks in every form that engines have written."""

    params = (list(WIRE_FORMS),)
    param_names = ("form",)
    make = staticmethod(_in_form)

    def time_ingest(self, *_: Any) -> None:
        self.run()


class Remove(Sampled):
    """One batch of removals, from the ends of chains."""

    params = ([256, 64, 1],)
    param_names = ("blocks_an_event",)
    make = staticmethod(remove)

    def time_ingest(self, *_: Any) -> None:
        self.run()


class StoreObjects(Sampled):
    """One ``BlockStored``."""

    params = ([64, 1],)
    param_names = ("blocks",)
    make = staticmethod(store_objects)

    def time_process_block_stored(self, *_: Any) -> None:
        self.run()


class Churn:
    """Content that comes and goes: each wave stores 16,384 blocks and removes those of the wave before."""

    number = 1
    repeat = (3, 10, 5.0)
    warmup_time = 0.0

    def setup(self) -> None:
        self.index = PrefixIndex(block_size=BLOCK)
        self.batches: list[bytes] = []
        before = None
        for wave in range(4):
            contents = chains(40 + wave, 32, 512)
            self.batches += payloads(contents, 64)
            if before is not None:
                self.batches += payloads(before, 64, back=True)
            before = contents

    def time_waves(self) -> None:
        for payload in self.batches:
            self.index.ingest("pod", payload)
