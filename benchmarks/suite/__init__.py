"""The benchmarks that asv runs over the history of the project: ``make bench``."""
