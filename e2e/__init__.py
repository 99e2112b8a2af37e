"""End to end: pods, an index and routers in processes of their own, held against what the pods say of themselves."""
