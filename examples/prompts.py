"""Prompts that `kvindex sim --seed N` serves: prints a JSON list of token ids per line."""

import argparse
import itertools
import json

from kvindex.sim.process import SimConfig, own_workload

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("seeds", nargs="+", type=int, metavar="N", help="--seed of a simulated pod; two prompts for each")
for seed in parser.parse_args().seeds:
    for arrival in itertools.islice(own_workload(SimConfig(name="", seed=seed)), 2):
        print(json.dumps(arrival.prompt.tokens.tolist()))
