"""Measurements: the asv suite, the comparison with others, and one command for each figure with a target."""
