"""Importing the integrations without the routers that they need. tests/integrations has their tests."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(("module", "package"), [("litellm", "litellm"), ("ray", "ray"), ("envoy", "grpc")])
def test_what_is_not_installed_says_what_to_install(module, package):
    code = f"import sys; sys.modules[{package!r}] = None; import kvindex.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith(f"pip install 'kvindex[{module}]'")


def test_the_command_says_so_too():
    code = "import sys; sys.modules['grpc'] = None; from kvindex.cli import main; sys.exit(main(['epp']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = "kvindex epp: kvindex.integrations.envoy needs grpc: pip install 'kvindex[envoy]'\n"
    assert (done.returncode, done.stderr) == (2, said)
