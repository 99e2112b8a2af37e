"""Live streams: order, gaps, restarts and the verdict, from sockets to ``index.ingest``."""
