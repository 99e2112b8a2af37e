# The answer to one prompt, included by _core.pyx.

@freelist(8)
cdef class PrefixMatch:
    """PrefixMatch()
--

    The answer to one prompt: a mapping of the pods that hold any of it to :class:`PodMatch`. Thread-safe.

    Its dicts are built on request, in O(pods). After the first one, ``match[pod]`` is O(ranks and media of the pod).

    Attributes:
        blocks: Complete blocks of the prompt.
    """

    cdef MatchResult r
    cdef Index index
    cdef readonly Py_ssize_t blocks
    cdef object prompt, lora_name, cache_salt, extra_keys, prefixes
    cdef dict hits, media

    def __init__(self): raise InvalidTypeError("a PrefixMatch is created by match_prefix only")

    cdef str pod_name(self, uint64_t uid):
        return self.index.names.get(uid) or self.index.name(uid)

    @critical_section
    cdef dict by_pod(self):
        # The numbers of each pod's hits.
        cdef cmap[uint32_t, string] media
        if self.hits is None:
            hits = {}
            for i in range(self.r.hits.size()):
                if (pod := self.pod_name(self.r.hits[i].pod)) is not None:
                    hits.setdefault(pod, []).append(i)
            with nogil: media = self.index.ix.media(self.r.hits)
            self.media, self.hits = media, hits
        return self.hits

    cdef dict best_ranks(self, uint64_t times, uint64_t over):
        cdef Hit h
        best = {}
        for i in range(self.r.hits.size()):
            h = self.r.hits[i]
            if h.says & REUSED and (pod := self.pod_name(h.pod)) is not None:
                share = h.blocks * times // over
                if best.setdefault(pod, share) < share:
                    best[pod] = share
        return best

    @property
    def tokens(self):
        """``{pod: tokens}``: reuse by the best rank of each pod, as :attr:`PodMatch.tokens`. No zeros."""
        return self.best_ranks(self.index.block_size, 1)

    @property
    def percent(self):
        """``{pod: percent}``: the same in percent of the prompt's complete blocks, rounded down, as AIBrix's MatchPrefix returns it."""
        return self.best_ranks(100, self.blocks)

    @property
    @critical_section
    def hashes(self):
        """uint64[blocks]: the prefix hashes of the prompt.

        They are computed on first access, from the tokens as they are then: do not modify the array before.
        """
        if self.prefixes is None:
            self.prefixes = hash_tokens(self.prompt, self.index.block_size, self.index.hash_seed, self.lora_name, self.cache_salt,
                                        self.extra_keys, True)
        return self.prefixes

    def best(self) -> tuple[str, int] | None:
        """Returns ``(pod, tokens)`` of the pod with the longest reuse, the one that is known longest among equals; None without any reuse."""
        cdef Hit h
        if self.r.best == NO_MEDIUM:
            return None
        h = self.r.hits[self.r.best]
        if (pod := self.pod_name(h.pod)) is not None:
            return pod, h.blocks * self.index.block_size
        return max(self.tokens.items(), key=lambda item: item[1], default=None)

    def __getitem__(self, pod: str) -> PodMatch:
        """Returns the pod's :class:`PodMatch`, with zeros if it holds no block.

        Raises:
            UnknownPodError: The index has no such pod.
        """
        cdef Hits* h = &self.r.hits
        if pod not in self:
            return PodMatch(0, 0, {}, {}, answers.STATES[self.index._state(pod)], 0, {})
        return answers.pod_match([(h[0][i].rank, self.media.get(h[0][i].medium), h[0][i].says, h[0][i].blocks, <int>h[0][i].state)
                                  for i in self.hits[pod]], self.index.block_size)

    def __contains__(self, pod): return isinstance(pod, str) and pod in self.by_pod()
    def __iter__(self): return iter(self.by_pod())
    def __len__(self): return len(self.by_pod())
    get, keys, items, values = Mapping.get, Mapping.keys, Mapping.items, Mapping.values

    def __repr__(self):
        return f"PrefixMatch({self.tokens})"


cdef int _join(Index index, tuple parts) except -1:
    cdef vector[ConcurrentIndex*] joined
    for part in parts: joined.push_back((<Index?>part).ix)
    index.parts = parts
    index.ix.join(joined)
    return 0


cdef str _name_in(tuple parts, uint64_t uid):
    cdef str name = None
    for part in parts or ():
        if (name := (<Index>part).name(uid)) is not None: break
    return name
