"""``python -m benchmarks.service``: requests a second of ``kvindex serve``, by wrk.

Four simulated pods hold eight prompts of 2,048 blocks. wrk asks about these in turn: as JSON (``/query``) and as bytes
(``/v1/match``). ``/healthz`` is the server alone. With several connections, p50 and p99 include the wait for others.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

from kvindex.sim import SimProcess

from .data import BLOCK, beginning
from .router import wrk

__all__ = ["main"]

DEPTH, PROMPTS = 2048, 8
LUA = """
local made, at = {}, 0
init = function()
  for n = 0, %d do
    local file = io.open("%s" .. n, "rb")
    made[n] = wrk.format("POST", nil, {["Content-Type"] = "application/%s"}, file:read("*a"))
    file:close()
  end
end
request = function() at = (at + 1) %% (#made + 1); return made[at] end
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--seconds", type=int, default=5, help="of each row (%(default)s)")
    options = parser.parse_args()
    prompts = [beginning(1, number, DEPTH) for number in range(PROMPTS)]
    bodies = [json.dumps({"model": "sim", "token_ids": prompt.tolist()}).encode() for prompt in prompts]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pods = [stack.enter_context(SimProcess(name=name, blocks=2 * PROMPTS * DEPTH)) for name in "abcd"]
        followed = [f"{pod.name}={','.join(map(str, pod.ranks[0]))}" for pod in pods]
        command = [sys.executable, "-m", "kvindex", "serve", "--port=0", "--model=sim", *followed]
        served = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(served.kill)
        assert served.stdout is not None
        found = re.search(r"http://\S+", served.stdout.readline())
        assert found is not None
        for pod in pods:
            for prompt in prompts:
                pod.serve(prompt)
        while not all(held(found[0], body) == [DEPTH * BLOCK] * len(pods) for body in bodies):
            time.sleep(0.1)
        (folder / "healthz").write_text("")
        for name, media, contents in (("query", "json", bodies), ("match", "octet-stream", prompts)):
            for number, content in enumerate(contents):
                (folder / f"{name}{number}").write_bytes(content)
            (folder / name).write_text(LUA % (PROMPTS - 1, folder / name, media))
        for options.connections in (1, 16):
            for name, path in (("healthz", "/healthz"), ("query", "/query"), ("match", "/v1/match?model=sim")):
                what = f"{path}, {options.connections} at a time"
                wrk(what, f"{found[0]}{path}", served.pid, folder / name, options)


def held(url: str, body: bytes) -> list[int]:
    with urlopen(f"{url}/query", body) as answer:
        return [instance["longest_matched"] for instance in json.load(answer)["instances"].values()]


if __name__ == "__main__":
    main()
