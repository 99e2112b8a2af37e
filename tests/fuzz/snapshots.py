"""Seeds for the fuzzer of snapshots: small files with everything that a snapshot can contain."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from world import World, draw_setup, draw_step

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for seed in range(48):
    rng = Random(seed)
    world = World(draw_setup(rng))
    for _ in range(rng.randrange(40)):
        world.do(draw_step(rng))
    world.index.save(folder / f"{seed:02}")
