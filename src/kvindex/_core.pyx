# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, annotation_typing=False
"""The compiled core: arguments and buffers in, objects and exceptions out. What is computed, and how, stands in _native."""

import time
from collections.abc import Mapping

import numpy as np

from cpython.buffer cimport *
from cpython.list cimport PyList_AsTuple
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.sequence cimport PySequence_Fast, PySequence_Fast_GET_SIZE, PySequence_Fast_ITEMS
from cpython.unicode cimport PyUnicode_CheckExact
from cython cimport critical_section, freelist
from libc.string cimport memcpy

from kvindex._native cimport *

from . import answers, arguments
from .answers import PodMatch
from .errors import CapacityError, EventDecodeError, InvalidTypeError, InvalidValueError, UnknownPodError

_ISAS, _KINDS = ("portable", "sse2", "avx2"), ("stored", "removed", "cleared", "other")
# Tokens, and bytes of a payload, up to which the interpreter lock is kept: getting it back from a busy thread took 10 ms at p99.9.
cdef type _ARRAY = np.ndarray
cdef Py_ssize_t RELEASE_FROM = 16384, INGEST_RELEASE_FROM = 4096


include "_objects.pxi"


@freelist(8)
cdef class PrefixMatch:
    """PrefixMatch()
--

    The answer to one prompt of ``blocks`` complete blocks: a mapping of the pods that hold any of it to :class:`PodMatch`.

    Dicts are built when asked for, O(pods); after the first, ``match[pod]`` is O(ranks and media of the pod). Any thread may read it.
    """

    cdef MatchResult r
    cdef Index index
    cdef readonly Py_ssize_t blocks
    cdef object prompt, lora_name, cache_salt, extra_keys, prefixes
    cdef dict hits, media

    def __init__(self): raise InvalidTypeError("a PrefixMatch is what match_prefix returns, and is not made by hand")

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
        """``{pod: tokens}`` that the pod's best rank reuses: by its engine's rules where configure_pod names it, otherwise what any medium holds."""
        return self.best_ranks(self.index.block_size, 1)

    @property
    def percent(self):
        """``{pod: percent}`` of the prompt's complete blocks, floored (what AIBrix's MatchPrefix returns)."""
        return self.best_ranks(100, self.blocks)

    @property
    def hashes(self):
        """uint64[blocks]: the prompt's prefix hashes, computed when first asked for, from the tokens as they are then (not copied)."""
        if self.prefixes is None:
            self.prefixes = hash_tokens(self.prompt, self.index.block_size, self.index.hash_seed, self.lora_name, self.cache_salt,
                                        self.extra_keys, True)
        return self.prefixes

    def best(self) -> tuple[str, int] | None:
        """``(pod, tokens)`` of the pod that holds most, the one known first among equals; None if nobody holds a block."""
        cdef Hit h
        if self.r.best == NO_MEDIUM:
            return None
        h = self.r.hits[self.r.best]
        if (pod := self.pod_name(h.pod)) is not None:
            return pod, h.blocks * self.index.block_size
        return max(self.tokens.items(), key=lambda item: item[1], default=None)

    def __getitem__(self, pod: str) -> PodMatch:
        """The pod's :class:`PodMatch`, zeros if it holds nothing. Raises :class:`UnknownPodError` for a pod that the index does not know."""
        cdef Hits* h = &self.r.hits
        if pod not in self:
            return PodMatch(0, 0, {}, {}, answers.VERDICTS[self.index._verdict(pod)], 0, {})
        return answers.pod_match([(h[0][i].rank, self.media.get(h[0][i].medium), h[0][i].says, h[0][i].blocks, <int>h[0][i].verdict)
                                  for i in self.hits[pod]], self.index.block_size)

    def __contains__(self, pod): return isinstance(pod, str) and pod in self.by_pod()
    def __iter__(self): return iter(self.by_pod())
    def __len__(self): return len(self.by_pod())
    get, keys, items, values = Mapping.get, Mapping.keys, Mapping.items, Mapping.values

    def __repr__(self):
        return f"PrefixMatch({self.tokens})"


cdef class Index:
    """What of :class:`PrefixIndex` is compiled: the calls that are made for every prompt and batch, and primitives for the rest of it."""

    cdef ConcurrentIndex* ix
    cdef object __weakref__
    cdef readonly uint32_t block_size
    cdef readonly uint64_t hash_seed
    # What the core has said of names: for ever right, since no number is used twice. Which pods there are is asked of it.
    cdef dict uids, names
    cdef readonly object _clock
    cdef bint timed

    def __cinit__(self, block_size=16, *, hash_seed=1337, presence="count", max_parked=65536, max_bytes=None, ttl=None, clock=time.monotonic):
        self.block_size = arguments.whole(block_size, "block_size", 1, 65536)
        self.hash_seed = arguments.seed(hash_seed)
        self.ix = new ConcurrentIndex(self.block_size, self.hash_seed, arguments.choice(presence, "presence", ("count", "set")),
                                      arguments.whole(max_parked, "max_parked", 0, 0x7FFFFFFF), arguments.budget(max_bytes), arguments.lifetime(ttl))
        self.uids, self.names, self._clock, self.timed = {}, {}, arguments.called(clock, "clock"), ttl is not None

    def __dealloc__(self):
        with nogil: del self.ix

    cdef uint64_t remembered(self, object pod) except? 0: return self.uids.get(pod, 0) if PyUnicode_CheckExact(pod) else 0

    # The pod's number, a new one if there is none. It is asked for before the call waits for anything: a pod that is removed meanwhile
    # takes with it whatever was on its way.
    cdef uint64_t uid(self, object pod) except 0:
        cdef string name
        cdef uint64_t found = self.remembered(pod)
        if found == 0 or not self.ix.directory().has(found):
            _text(pod, "pod", name)
            with nogil: found = self.ix.open_pod(name)
            if PyUnicode_CheckExact(pod):
                self.uids[pod] = found
                # Whoever removes a pod forgets it here afterwards, and may have been faster.
                if not self.ix.directory().has(found):
                    self.uids.pop(pod, None)
        return found

    cdef uint64_t known(self, object pod) except 0:
        cdef string name
        cdef uint64_t found = 0
        if isinstance(pod, str):
            _text(pod, "pod", name)
            found = self.ix.directory().find(name)
        if found == 0:
            raise self.unknown(pod)
        return found

    cdef object unknown(self, object pod):
        cdef size_t pods = 0
        cdef vector[string] some = self.ix.directory().some(8, pods)
        return UnknownPodError(f"no pod {arguments.shown(pod)} in this index; {arguments.listed(some, pods)}")

    cdef str name(self, uint64_t uid):
        cdef cbool is_known = False
        cdef string text = self.ix.directory().name(uid, is_known)
        if not is_known:
            return None
        name = text.decode("utf-8", "surrogateescape")
        self.names[uid] = name
        if not self.ix.directory().has(uid):
            self.names.pop(uid, None)
        return name

    cdef double now(self) except? -1: return arguments.moment(self._clock(), "what clock returns")

    def ingest(self, pod: str, payload: Buffer, *, model: str = "", dp_rank: int | None = None, seq: int | None = None) -> IngestReport:
        """Applies one batch as its engine wrote it (msgpack, every form since vLLM 0.9 and SGLang 0.4.6), without the interpreter lock.

        payload: bytes-like; model: namespace of the blocks; dp_rank: the stream's rank, None for the batch's own (or 0). O(its blocks).
        seq: the batch's number in its stream, from which a snapshot that is taken later can be continued; without one it cannot.
        Returns an :class:`IngestReport`. Raises :class:`EventDecodeError` if the payload is no batch; nothing of it is applied then.
        """
        cdef _Ints b = _payload(payload)
        cdef IngestReport report = IngestReport.__new__(IngestReport)
        cdef string name
        _text(model, "model", name)
        cdef int64_t rank = -1 if dp_rank is None else _whole(dp_rank, "dp_rank", 0x80000000)
        if not isinstance(pod, str):
            arguments.utf8(pod, "pod")
        cdef uint64_t uid = self.remembered(pod)
        cdef int64_t number = -1 if seq is None else _whole(seq, "seq", 0x7FFFFFFFFFFFFFFF)
        cdef double ts = 0
        cdef DecodeFault fault
        cdef Taken taken = BUSY
        if self.timed: self._expire(self.now())
        if b.n < INGEST_RELEASE_FROM:
            taken = self.ix.ingest(uid, <const uint8_t*>b.data, b.n, name, rank, number, False, report.r, ts, report.dp_rank, fault)
        while taken == BUSY or taken == UNKNOWN:
            # A pod that is not there begins with its first batch, not with garbage in its name.
            if taken == UNKNOWN:
                uid = self.uid(pod)
            elif not self.ix.directory().has(uid):
                uid = 0
            with nogil:
                taken = self.ix.ingest(uid, <const uint8_t*>b.data, b.n, name, rank, number, True, report.r, ts, report.dp_rank, fault)
        if taken == NO_BATCH:
            raise _no_batch(b, fault)
        report.ts = ts
        return report.done()

    def _apply(self, str kind, pod, int64_t rank, string model, const uint64_t[::1] hashes, int64_t group, bytes medium, object numbers,
               tuple stored):
        cdef IngestReport report = IngestReport.__new__(IngestReport)
        cdef Batch batch
        cdef Event e
        cdef Place unnumbered
        cdef _Ints ahead, tokens = _tokens(numbers, "remaining_copy_counts" if stored is None else "token_ids")
        cdef StrRef* texts[4]
        e.kind, e.n_hashes, e.group = <EventKind><int>_KINDS.index(kind), <uint32_t>len(hashes), group
        _refer(medium, &e.medium)
        if e.n_hashes: batch.hashes.assign(&hashes[0], &hashes[0] + e.n_hashes)
        e.n_tokens = <uint32_t>tokens.n
        batch.tokens.assign(<const uint32_t*>tokens.data, <const uint32_t*>tokens.data + tokens.n)
        if stored is not None:
            e.has_parent, e.parent, e.block_size, e.window, e.lora_id, alive = stored[:6]
            e.hashed, e.n_hashes = <Hashed><int>stored[6], e.n_hashes >> (stored[6] != 0)
            ahead = _tokens(stored[7], "lookahead_token_ids")
            if ahead.n: e.lookahead = <uint32_t>(ahead.n // e.n_hashes)
            batch.tokens.insert(batch.tokens.end(), <const uint32_t*>ahead.data, <const uint32_t*>ahead.data + ahead.n)
            texts[:] = [&e.lora_id_name, &e.lora_name, &e.spec_kind, &e.cache_salt]
            for i in range(4): _refer(alive[i], texts[i])
            if alive[4] is not None: e.extra_keys, e.extra_keys_bytes = <const uint8_t*><const char*><bytes>alive[4], <uint32_t>len(alive[4])
        batch.events.push_back(e)
        if self.timed: self._expire(self.now())
        cdef uint64_t uid = self.uid(pod)
        with nogil: self.ix.apply(uid, rank, model, batch, unnumbered, report.r)
        report.dp_rank = rank
        return report.done()

    def match_prefix(self, tokens: _Tokens, *, model: str = "", lora_name: str | None = None, cache_salt: str | None = None,
                     extra_keys: _ExtraKeys | None = None, ready_pods: PodSet | Iterable[str] | None = None,
                     only_exact: bool = False) -> PrefixMatch:
        """How many leading tokens of the prompt each pod holds now. O(matched blocks), then work per change of holders, never per pod and block.

        tokens: uint32, int32, int64 or uint64 array of one dimension (uint32 and int32 are not copied), or a sequence of ints.
        extra_keys: one entry per block, as events carry them, without LoRA name and salt. ready_pods: a :class:`PodSet` or an iterable of
        names that the answer is limited to. only_exact: leaves out pods that are degraded or stale.
        Raises InvalidTypeError, InvalidValueError naming the position.
        """
        cdef _Ints t = _tokens(tokens)
        cdef Prompt p
        _prompt(t, lora_name, cache_salt, extra_keys, self.block_size, self.hash_seed, p)
        cdef PrefixMatch m = self.ask(p, t.n, t.n // self.block_size, model, ready_pods, _flag(only_exact, "only_exact"))
        m.prompt, m.lora_name, m.cache_salt, m.extra_keys = tokens, lora_name, cache_salt, extra_keys
        return m

    def match_hashes(self, hashes: _Hashes, *, model: str = "", ready_pods: PodSet | Iterable[str] | None = None, only_exact: bool = False,
                     n_tokens: int | None = None) -> PrefixMatch:
        """The same answer from the prompt's prefix hashes (uint64, one per complete block, see :func:`prefix_hashes`).

        They cover no lookahead: workers whose blocks do (vLLM 0.33 and SGLang with EAGLE or MTP) are left out of this answer;
        :meth:`match_prefix` finds them.
        n_tokens: the prompt's length, from which vLLM's rule for the last token begins; None for a prompt of just these blocks.
        """
        cdef _Ints h = _Ints()
        cdef cbool is_signed
        cdef Prompt p
        if PyObject_CheckBuffer(hashes):
            h.take(hashes, "hashes", PyBUF_STRIDED_RO | PyBUF_FORMAT)
        if not h.viewed or int_width(&h.view, &is_signed) != 8 or is_signed or h.view.strides[0] != 8 or <size_t>h.data & 7:
            hashes = arguments.hash_array(hashes, "hashes")
            h = _Ints()
            h.take(hashes, "hashes", PyBUF_STRIDED_RO | PyBUF_FORMAT)
        p.prefixes = <const uint64_t*>h.data
        p.n_prefixes = h.n
        if n_tokens is not None:
            least = h.n * self.block_size
            p.n_tokens = arguments.whole(n_tokens, "n_tokens", least, least + self.block_size - 1)
        cdef PrefixMatch m = self.ask(p, h.n, h.n, model, ready_pods, _flag(only_exact, "only_exact"))
        m.prefixes = hashes
        return m

    def match_many(self, prompts: Iterable[_Tokens], *, model: str = "", lora_name: str | None = None, cache_salt: str | None = None,
                   extra_keys: _ExtraKeys | None = None, ready_pods: PodSet | Iterable[str] | None = None,
                   only_exact: bool = False) -> list[PrefixMatch]:
        """A :class:`PrefixMatch` for each prompt, as :meth:`match_prefix` gives it, with one release of the interpreter lock for all.

        prompts: an iterable of what match_prefix takes as tokens; the keywords go for all of them. Each answer is of some moment during
        the call. Raises what match_prefix raises, naming the prompt; nothing is asked then.
        """
        cdef PodSet pods = ready_pods if ready_pods is None or isinstance(ready_pods, PodSet) else PodSet(ready_pods)
        cdef PodNames* names = pods.names if pods is not None else NULL
        cdef cbool exact = _flag(only_exact, "only_exact")
        cdef vector[Prompt] asked
        cdef vector[MatchResult*] results
        cdef PrefixMatch m
        cdef _Ints t
        cdef string space
        cdef size_t i
        _text(model, "model", space)
        kept, matches = [], []
        for tokens in arguments.each(prompts, "prompts"):
            asked.resize(asked.size() + 1)
            try:
                t = _tokens(tokens)
                _prompt(t, lora_name, cache_salt, extra_keys, self.block_size, self.hash_seed, asked.back())
            except (InvalidTypeError, InvalidValueError) as error:
                raise type(error)(f"prompt {len(matches)}: {error}") from None
            m = self.open(t.n // self.block_size)
            m.prompt, m.lora_name, m.cache_salt, m.extra_keys = tokens, lora_name, cache_salt, extra_keys
            kept.append(t)
            matches.append(m)
            results.push_back(&m.r)
        with nogil:
            for i in range(asked.size()):
                self.ix.match(asked[i], space, names, exact, True, results[i][0])
        return matches

    cdef PrefixMatch open(self, Py_ssize_t blocks):
        cdef PrefixMatch m = PrefixMatch.__new__(PrefixMatch)
        if self.ix.next_expiry() < NEVER: self._expire(self.now())
        m.index, m.blocks = self, blocks
        return m

    cdef PrefixMatch ask(self, Prompt& p, Py_ssize_t size, Py_ssize_t blocks, object model, object ready, cbool only_exact):
        cdef PrefixMatch m = self.open(blocks)
        cdef PodSet pods = ready if ready is None or isinstance(ready, PodSet) else PodSet(ready)
        cdef PodNames* names = pods.names if pods is not None else NULL
        cdef string space
        _text(model, "model", space)
        if size >= RELEASE_FROM or not self.ix.match(p, space, names, only_exact, False, m.r):
            with nogil: self.ix.match(p, space, names, only_exact, True, m.r)
        return m

    def _guess(self, pod, int64_t rank, string model, const uint64_t[::1] hashes, double until):
        cdef Prompt p
        if len(hashes): p.prefixes, p.n_prefixes = &hashes[0], len(hashes)
        self.ix.guess(self.uid(pod), rank, model, p, until)

    def _expect(self, pod, int64_t rank, string model, tokens, tuple keys, double until):
        cdef _Ints t = _tokens(tokens)
        cdef Prompt p
        _prompt(t, keys[0], keys[1], keys[2], self.block_size, self.hash_seed, p)
        cdef uint64_t uid = self.uid(pod)
        if self.timed: self._expire(self.now())
        with nogil: self.ix.guess(uid, rank, model, p, until)

    def _expire(self, double now):
        if self.ix.next_expiry() <= now:
            with nogil: self.ix.expire(now)

    # Primitives of index.py, which checks what it hands over.
    def _configure(self, pod, int counted, cbool has_media, vector[string] media, int64_t chunk, int64_t max_blocks):
        cdef uint64_t uid = self.uid(pod)
        with nogil: self.ix.configure(uid, counted, has_media, media, chunk, max_blocks)

    def _engine(self, pod, int engine, int eagle, vector[int64_t] groups, int hybrid):
        cdef uint64_t uid = self.uid(pod)
        with nogil: self.ix.engine(uid, engine, eagle, groups, hybrid)

    def _remove(self, pod):
        cdef uint64_t uid = self.known(pod)
        cdef cbool was_there
        with nogil: was_there = self.ix.remove_pod(uid)
        self.names.pop(uid, None)
        if PyUnicode_CheckExact(pod) and self.uids.get(pod) == uid:
            self.uids.pop(pod, None)
        if not was_there:
            raise self.unknown(pod)

    def _clear(self, pod, int64_t rank):
        cdef uint64_t uid = self.uid(pod)
        with nogil: self.ix.clear_worker(uid, rank)

    def _ignore(self, pod, vector[string] media):
        cdef uint64_t uid = self.uid(pod)
        with nogil: self.ix.ignore_media(uid, media)

    def _mark(self, pod, int64_t rank, int verdict):
        cdef uint64_t uid = self.uid(pod)
        with nogil: self.ix.mark(uid, rank, verdict)

    def _trust(self, int64_t until): self.ix.trust(until)

    def _pods(self):
        cdef size_t pods = 0
        return [name.decode("utf-8", "surrogateescape") for name in self.ix.directory().some(<size_t>-1, pods)]

    def _verdict(self, pod):
        cdef uint64_t uid = self.known(pod)
        cdef int verdict
        with nogil: verdict = self.ix.verdict(uid)
        if verdict < 0:
            raise self.unknown(pod)
        return verdict

    def _workers(self, pod):
        cdef uint64_t uid = self.known(pod)
        cdef vector[PodFigures] workers
        with nogil: workers = self.ix.pod_figures(uid)
        return workers

    def _places(self, pod):
        cdef uint64_t uid = self.known(pod)
        cdef vector[StreamPlace] places
        with nogil: places = self.ix.places(uid)
        return places

    def _broken(self):
        cdef string broken
        with nogil: broken = self.ix.check()
        return broken

    def _probes(self):
        cdef double probes
        with nogil: probes = self.ix.probes()
        return probes

    def _compared(self, PrefixMatch match not None): return match.r.compared

    def _saved(self):
        cdef _Snapshot out = _Snapshot.__new__(_Snapshot)
        with nogil: self.ix.save(out.data)
        return out

    def _load(self, const uint8_t[::1] data):
        with nogil: self.ix.load(&data[0], len(data))

    def _figures(self):
        cdef Stats s
        with nogil: s = self.ix.stats()
        return {**s.figures, **s.totals, "skipped_reasons": _reasons(s.report)}


include "_loads.pxi"
include "_decode.pxi"


def hash_tokens(tokens, block_size, hash_seed, lora_name, cache_salt, extra_keys, bint rolled):
    cdef _Ints t = _tokens(tokens)
    cdef uint32_t size = arguments.whole(block_size, "block_size", 1, 65536)
    cdef uint64_t seed = arguments.seed(hash_seed)
    cdef uint64_t[::1] view
    cdef Prompt p
    _prompt(t, lora_name, cache_salt, extra_keys, size, seed, p)
    out = np.empty(t.n // size, dtype=np.uint64)
    view = out
    if len(view):
        with nogil: hash_prompt(p, size, seed, rolled, &view[0])
    return out


def peek_batch(bytes data, cbool whole):
    """``(seconds or None, events, rank or None)`` as a batch says at first sight; the rank only with ``whole``."""
    cdef BatchPeek found = native_peek(<const uint8_t*><const char*>data, len(data), whole)
    return (found.ts if found.timed else None, found.events, found.rank if found.rank >= 0 else None)


def snapshot_head(bytes data, uint64_t file_bytes): return native_head(<const uint8_t*><const char*>data, len(data), file_bytes)


cdef object _no_batch(_Ints payload, DecodeFault& fault):
    return EventDecodeError(f"payload of {payload.n} bytes is no event batch: {fault.what.decode()} at byte {fault.offset}", fault.offset)


Mapping.register(PrefixMatch)


def _isas(): return _ISAS[:<int>best_isa() + 1]


def _xxh3_64(bytes data, seed, isa=None):
    return xxh3_64(<const char*>data, len(data), arguments.seed(seed), best_isa() if isa is None else <Isa><int>_ISAS.index(isa))
