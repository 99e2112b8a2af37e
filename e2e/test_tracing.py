"""``kvindex serve`` under OpenTelemetry's own command: each request is a span with its route and status."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

pytest.importorskip(
    "opentelemetry.instrumentation.starlette", reason="OpenTelemetry is not installed: make test-kv-sync-e2e"
)


def test_a_request_is_a_span():
    run = [Path(sys.executable).with_name("opentelemetry-instrument"), "--traces_exporter", "console",
           "--metrics_exporter", "none", "--logs_exporter", "none"]  # fmt: skip
    serve = [sys.executable, "-m", "kvindex", "serve", "--port=0", "--model=sim"]
    with subprocess.Popen([*run, *serve], stdout=subprocess.PIPE, text=True) as served:
        try:
            url = re.search(r"http://\S+", served.stdout.readline())[0]
            with pytest.raises(HTTPError):
                urlopen(f"{url}/v1/match", json.dumps({"tokens": [1, 2, 3]}).encode())
        finally:
            served.terminate()
        said = served.stdout.read()
    spans = [json.loads(text) for text in re.findall(r"^\{$.*?^\}$", said, re.M | re.S)]
    [whole] = [span for span in spans if span["kind"] == "SpanKind.SERVER"]
    assert whole["name"] == "POST /v1/match"
    assert whole["attributes"]["http.status_code"] == 400
