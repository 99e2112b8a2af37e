"""Real engines without a GPU: their own caches and publishers as pods, and the index held against their own answers."""
