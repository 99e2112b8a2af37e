"""Prompts that `kvindex sim --seed N` has served: prompts.py N ... prints a JSON list of token ids per line"""

import itertools
import json
import sys

from kvindex.sim.process import SimConfig, own_workload

for seed in map(int, sys.argv[1:]):
    for arrival in itertools.islice(own_workload(SimConfig(name="", seed=seed)), 2):
        print(json.dumps(arrival.prompt.tokens.tolist()))
