# The loads of workers, for routing.py: numbers in, numbers out. Calls never overlap, because routing.py has the lock.

cdef class Loads:
    """The load of each worker, and the choice of a worker."""

    cdef NativeLoads* loads
    cdef Index index

    def __cinit__(self, Index index not None, list credits, double context, double request, double tie, double half_life, bint degraded,
                  uint64_t start):
        cdef Weights w
        w.credits = credits
        w.context, w.request, w.tie, w.half_life, w.degraded = context, request, tie, half_life, degraded
        self.index, self.loads = index, new NativeLoads(w, start)

    def __dealloc__(self): del self.loads

    def choose(self, PrefixMatch match not None, uint64_t n_tokens, model, PodSet pods, double now):
        """``(row, pod's number, pod, rank, tokens reused, whether all is held, candidates, cost)``, or None without a candidate.

        The request counts from now on as the worker's.
        """
        cdef PodNames* names = pods.names if pods is not None else NULL
        cdef LoadChoice c
        cdef string space
        _text(model, "model", space)
        if not self.index.ix.choose(self.loads[0], match.r.hits, n_tokens, space, names, now, False, c):
            with nogil: self.index.ix.choose(self.loads[0], match.r.hits, n_tokens, space, names, now, True, c)
        if c.at == NO_MEDIUM:
            return None
        return c.at, c.pod, self.index.names.get(c.pod) or self.index.name(c.pod), c.rank, c.reused, c.whole, c.candidates, c.cost

    def expect(self, uint64_t pod, int64_t rank, model, tokens, lora_name, cache_salt, extra_keys, double until):
        """As PrefixIndex.add_prefix, except for a pod that was removed since the choice, which
        add_prefix would create again."""
        cdef _Ints t = _tokens(tokens)
        cdef Prompt p
        cdef string space
        cdef Index index = self.index
        for part in index.parts or ():
            if (<Index>part).ix.directory().has(pod): index = part
        _text(model, "model", space)
        _prompt(t, lora_name, cache_salt, extra_keys, self.index.block_size, self.index.hash_seed, p)
        with nogil: index.ix.guess(pod, rank, space, p, until)

    def reserve(self, pod, int64_t rank, uint64_t prefill, uint64_t context):
        """Returns ``(row, pod's number)`` of a worker that got a request from another router, or None
        if there is no such worker."""
        cdef string name
        cdef uint32_t at
        _text(pod, "pod", name)
        cdef uint64_t uid = self.index.ix.directory().find(name)
        for part in self.index.parts or ():
            uid = uid or (<Index>part).ix.directory().find(name)
        if uid == 0:
            return None
        with nogil: at = self.index.ix.reserve(self.loads[0], uid, rank, prefill, context)
        return None if at == NO_MEDIUM else (at, uid)

    def prefilled(self, uint32_t at, uint64_t pod, uint64_t prefill): self.loads.prefilled(at, pod, prefill)

    def finished(self, uint32_t at, uint64_t pod, uint64_t prefill, uint64_t context): self.loads.finished(at, pod, prefill, context)

    def rows(self):
        """Returns ``[(pod, rank, tokens to prefill, tokens of context, requests)]`` of the existing workers."""
        cdef vector[WorkerLoad] rows
        with nogil: rows = self.index.ix.loads(self.loads[0])
        out = []
        for i in range(rows.size()):
            if rows[i].pod and (name := self.index.names.get(rows[i].pod) or self.index.name(rows[i].pod)) is not None:
                out.append((name, rows[i].rank, rows[i].prefill, rows[i].context, rows[i].requests))
        return out
