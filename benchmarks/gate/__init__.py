"""Did this change make anything slower or larger? ``make bench-gate BASE=REV`` and ``make bench-check``."""
