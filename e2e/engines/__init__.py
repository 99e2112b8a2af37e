"""Real engines without a GPU: their own caches and publishers as pods, to compare the index with their own answers."""
