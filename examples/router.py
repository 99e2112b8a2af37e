"""Which pod holds most of a prompt? router.py NAME=ENDPOINT,REPLAY_ENDPOINT ... < prompts (a JSON list per line)"""

import json
import sys

from kvindex import EventManager, PodSource, PrefixIndex

index = PrefixIndex(block_size=16)  # the engines' --block-size
with EventManager(index) as manager:  # follows all pods from one thread
    for argument in sys.argv[1:]:
        manager.add_pod(PodSource.from_string(argument))
    manager.wait_until_current(timeout=10.0)
    for prompt in map(json.loads, sys.stdin):  # only_exact: no pod that is down or catching up
        print(json.dumps(index.match_prefix(prompt, only_exact=True).best()), flush=True)
