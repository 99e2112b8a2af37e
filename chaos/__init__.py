"""Faults, on purpose: what an index claims while pods, network and its own process fail, and how it recovers."""
