"""kvindex beside others in one process: ``make bench-peers``."""
