"""Fill the fuzzer's corpus (the argument) with recorded vectors, if there are any, simulations and programs of records.

fuzz_ingest.cpp describes the form of an input: a header of eight bytes, then payloads or records.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

from hostile import payloads as hostile

from kvindex.capture import Message, read_capture
from kvindex.sim import KINDS, write_sample

ROOT = Path(__file__).resolve().parents[2]

# libFuzzer mutates its inputs, and mutants of large payloads cost time without reaching other code.
LARGEST = 1500
PER_STREAM = 40
# Index of the block size in an input's header: 4 for the vectors that were written for it, 16 for engines' messages.
FOUR, SIXTEEN = 1, 2


def recorded() -> list[bytes]:
    vectors = ROOT.parent / "shared" / "wire" / "vectors.json"
    if not vectors.exists():
        return []
    return [bytes.fromhex(vector["hex"]) for vector in json.loads(vectors.read_text())["vectors"]]


def simulated() -> Iterator[list[bytes]]:
    """The messages of each kind of engine, one list for each stream."""
    with tempfile.TemporaryDirectory() as directory:
        for kind in KINDS:
            path = Path(directory) / kind
            write_sample(kind, path, requests=12)
            messages = [record.payload for record in read_capture(path) if isinstance(record, Message)]
            yield [message for message in messages if len(message) <= LARGEST][:PER_STREAM]


def framed(size: int, payloads: list[bytes]) -> bytes:
    """The payloads of one stream. Every third has its length before it."""
    stream = bytes([0, size, 0, 0, 0, 0, 0, 0])
    for at, payload in enumerate(payloads):
        stream += bytes([0x80, 0]) + len(payload).to_bytes(2, "little") if at % 3 == 2 else bytes([0, 0])
        stream += payload
    return stream


def inputs() -> Iterator[bytes]:
    vectors = [payload for payload in recorded() if len(payload) <= LARGEST]
    for payload in vectors:
        yield framed(FOUR, [payload])
    for at in range(0, len(vectors), 8):
        yield framed(FOUR, vectors[at : at + 8])
    for stream in simulated():
        for at in range(0, len(stream), 5):
            yield framed(SIXTEEN, stream[at : at + 5])
    for size in (60, LARGEST // 4):
        for payload in hostile(size):
            yield framed(FOUR, [payload])
    yield b'{"model": "m", "tokens": [1, 20, 300, 4294967295, 12345678, 0], "pods": ["a]", {"b": "\\""}]}'
    yield b'{"tokens":[7,77,777,7777,77777,777777,7777777,77777777]}'
    rng = Random(1337)
    for length in (4, 12, 40) * 20:
        yield bytes([1]) + rng.randbytes(7) + rng.randbytes(8 * length)


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    written = 0
    for written, data in enumerate(inputs(), 1):
        (target / f"seed-{written:04}").write_bytes(data)
    print(f"{written} inputs in {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
