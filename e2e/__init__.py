"""End-to-end tests: pods, an index and routers in processes of their own, compared with the pods' own answers."""
