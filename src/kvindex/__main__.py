"""``python -m kvindex`` is the ``kvindex`` command."""

import sys

from kvindex.cli import main

if __name__ == "__main__":
    sys.exit(main())
