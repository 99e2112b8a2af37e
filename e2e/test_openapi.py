"""The service under requests that schemathesis generates from its OpenAPI document: `make test-openapi`."""

import json
import os
import re
import subprocess
import sys
import time
from urllib.request import urlopen

import numpy as np
import pytest

from kvindex.sim import SimProcess

pytest.importorskip("schemathesis", reason="schemathesis is not installed: make test-openapi")

EXAMPLES = os.environ.get("EXAMPLES", "50")
# The checks that are off, with the reasons. positive_data_acceptance: the schema cannot express that exactly one of
# tokens, text and messages is required, or that bytes are whole tokens of four. /dump answers 501, as test_serve.py
# asserts.
# 503 is the documented answer of a pick for which no pod is ready, and of a service that is busy.
CONFIG = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "503"]
"""
OFF = ["--exclude-checks", "positive_data_acceptance", "--exclude-path", "/dump"]


@pytest.fixture(scope="module")
def service():
    with SimProcess(name="a") as pod:
        follow = f"a={','.join(map(str, pod.ranks[0]))}"
        command = [sys.executable, "-m", "kvindex", "serve", "--port=0", "--model=sim", follow]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
            try:
                url = re.search(r"http://\S+", served.stdout.readline())[0]
                pod.serve(np.arange(1000, 1064))
                while held(url) != 64:
                    time.sleep(0.05)
                yield url, served
            finally:
                served.terminate()


def held(url: str) -> int:
    """Tokens of the prompt that the pod holds."""
    body = json.dumps({"model": "sim", "token_ids": list(range(1000, 1064))}).encode()
    with urlopen(f"{url}/query", body) as answer:
        return max((found["longest_matched"] for found in json.load(answer)["instances"].values()), default=0)


def test_every_answer_to_a_valid_or_damaged_request_is_in_the_document(service, tmp_path):
    url, served = service
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(tmp_path / "schemathesis.toml"), "run"]
    run = subprocess.run(
        [*command, f"{url}/openapi.json", "--max-examples", EXAMPLES, *OFF],
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    tested = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert tested is not None, run.stdout
    assert int(tested[2]) >= 25 * 2, run.stdout
    assert served.poll() is None
    assert held(url) == 64
