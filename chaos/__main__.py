"""``python -m chaos FILE...``: run experiments."""

import sys

from .run import main

sys.exit(main(sys.argv[1:]))
