"""Live streams: order, gaps, restarts and states, from sockets to ``index.ingest``."""
