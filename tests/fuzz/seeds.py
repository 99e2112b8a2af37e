"""Fill the fuzzer's corpus (the argument), one file a payload: recorded vectors where they are there, and simulations."""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvindex.capture import Message, read_capture
from kvindex.sim import KINDS, write_sample

ROOT = Path(__file__).resolve().parents[2]

# libFuzzer mutates what it reads, and mutants of large payloads cost time without reaching other code.
LARGEST = 4096
PER_STREAM = 40


def payloads() -> Iterator[bytes]:
    vectors = ROOT.parent / "shared" / "wire" / "vectors.json"
    if vectors.exists():
        for vector in json.loads(vectors.read_text())["vectors"]:
            yield bytes.fromhex(vector["hex"])
    with tempfile.TemporaryDirectory() as directory:
        for kind in KINDS:
            path = Path(directory) / kind
            write_sample(kind, path, requests=12)
            messages = [record.payload for record in read_capture(path) if isinstance(record, Message)]
            yield from sorted(messages, key=len)[:PER_STREAM]


def main(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    written = 0
    for payload in payloads():
        if len(payload) <= LARGEST:
            (target / hashlib.sha1(payload).hexdigest()).write_bytes(payload)
            written += 1
    print(f"{written} payloads in {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
