"""``python -m e2e.engines.flags`` in the engines' environment: the manifests' flags, read by the engines' own parsers.

The program compares the flags that the engines accept with the list beside the manifests, which the tests use without
engines. ``--record`` writes that list.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MANIFESTS = {"vllm": "vllm-kv-events-deployment.yaml", "sglang": "sglang-kv-events-deployment.yaml"}


def arguments(path: Path) -> list[str]:
    """The arguments of a manifest's engine, with a value for the names that Kubernetes fills in."""
    found: list[str] = []
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == "Deployment":
            (container,) = document["spec"]["template"]["spec"]["containers"]
            found = [argument.replace("$(POD_NAME)", "pod-0") for argument in container["args"]]
    return found


def vllm(args: list[str]) -> tuple[argparse.ArgumentParser, list[str], Any]:
    """The parser, the fields of the events' configuration, and the configuration of these arguments."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    # Defaults of the options depend on the device, and there is no GPU here.
    vllm.platforms._current_platform = CpuPlatform()
    from vllm.config import KVEventsConfig
    from vllm.entrypoints.common.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    parsed = parser.parse_args(args)
    return parser, [field.name for field in dataclasses.fields(KVEventsConfig)], parsed.kv_events_config


def sglang(args: list[str]) -> tuple[argparse.ArgumentParser, list[str], Any]:
    from .standin import stand_in_for_torchvision

    stand_in_for_torchvision()
    from sglang.srt.disaggregation.kv_events import KVEventsConfig
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    parsed = parser.parse_args(args)
    return parser, list(KVEventsConfig.model_fields), KVEventsConfig.from_cli(parsed.kv_events_config)


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m e2e.engines.flags", description=__doc__)
    options.add_argument("engine", choices=list(MANIFESTS))
    options.add_argument("--record", action="store_true", help="write the list instead of comparing with it")
    chosen = options.parse_args()
    args = arguments(FIXTURES / MANIFESTS[chosen.engine])
    parser, fields, config = {"vllm": vllm, "sglang": sglang}[chosen.engine](args)
    accepted = {
        "version": importlib.metadata.version(chosen.engine),
        "flags": sorted({o for action in parser._actions for o in action.option_strings if o.startswith("--")}),
        "kv_events_config": fields,
    }
    path = FIXTURES / "flags" / f"{chosen.engine}.json"
    print(f"{chosen.engine} {accepted['version']} takes {MANIFESTS[chosen.engine]}: {config}")
    if chosen.record:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(accepted, indent=1) + "\n")
        return 0
    same = json.loads(path.read_text()) == accepted
    if not same:
        print(f"{path} is not what {chosen.engine} accepts: write it again with --record", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
