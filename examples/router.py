"""Which pod holds most of a prompt? Reads prompts from standard input: a JSON list of token ids per line."""

import argparse
import json
import sys

from kvindex import EventManager, PodSource, PrefixIndex

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pods", nargs="+", metavar="NAME=ENDPOINT,REPLAY_ENDPOINT", help="a pod's event streams")
index = PrefixIndex(block_size=16)  # the engines' --block-size
with EventManager(index) as manager:  # follows all pods from one thread
    for pod in parser.parse_args().pods:
        manager.add_pod(PodSource.from_string(pod))
    manager.wait_until_current(timeout=10.0)
    for prompt in map(json.loads, sys.stdin):  # only_exact: no pod that is down or catching up
        print(json.dumps(index.match_prefix(prompt, only_exact=True).best()), flush=True)
