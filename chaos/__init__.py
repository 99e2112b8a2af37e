"""Injected faults: the answers of an index while pods, network and its own process fail, and its recovery."""
