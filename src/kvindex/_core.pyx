# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: annotation_typing=False, freethreading_compatible=True
"""The compiled core: arguments and buffers in, objects and exceptions out. The algorithms are in _native."""

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
# Tokens, and bytes of a payload, up to which the interpreter lock is kept. Getting it back from a busy thread took
# 10 ms at p99.9.
cdef type _ARRAY = np.ndarray
cdef Py_ssize_t RELEASE_FROM = 16384, INGEST_RELEASE_FROM = 4096


include "_objects.pxi"


cdef class Index:
    """The compiled part of :class:`PrefixIndex`: the calls for every prompt and batch, and primitives for the others."""

    cdef ConcurrentIndex* ix
    cdef object __weakref__
    cdef readonly uint32_t block_size
    cdef readonly uint64_t hash_seed
    # Numbers by name. They stay valid, because no number is used twice. The core has the list of pods.
    cdef dict uids, names
    cdef readonly object _clock
    cdef bint timed
    cdef readonly tuple parts  # indexes that answer in its place: see replication/joined.py

    def __cinit__(self, block_size=16, *, hash_seed=1337, presence="count", max_parked=65536, max_bytes=None, ttl=None, clock=time.monotonic):
        self.block_size = arguments.whole(block_size, "block_size", 1, 65536)
        self.hash_seed = arguments.seed(hash_seed)
        self.ix = new ConcurrentIndex(self.block_size, self.hash_seed, arguments.choice(presence, "presence", ("count", "set")),
                                      arguments.whole(max_parked, "max_parked", 0, 0x7FFFFFFF), arguments.budget(max_bytes), arguments.lifetime(ttl))
        self.uids, self.names, self._clock, self.timed = {}, {}, arguments.called(clock, "clock"), ttl is not None

    def __dealloc__(self):
        with nogil: del self.ix

    cdef uint64_t remembered(self, object pod) except? 0: return self.uids.get(pod, 0) if PyUnicode_CheckExact(pod) else 0

    # The pod's number, or a new one if the pod is not known. It is found before the call waits for anything: calls that
    # are on their way to a pod have no effect if the pod is removed meanwhile.
    cdef uint64_t uid(self, object pod) except 0:
        cdef string name
        cdef uint64_t found = self.remembered(pod)
        if found == 0 or not self.ix.directory().has(found):
            _text(pod, "pod", name)
            with nogil: found = self.ix.open_pod(name)
            if PyUnicode_CheckExact(pod):
                self.uids[pod] = found
                # A call that removes the pod drops its number here afterwards, and may have been faster.
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
            return _name_in(self.parts, uid)
        name = text.decode("utf-8", "surrogateescape")
        self.names[uid] = name
        if not self.ix.directory().has(uid):
            self.names.pop(uid, None)
        return name

    cdef double now(self) except? -1: return arguments.moment(self._clock(), "what clock returns")

    def ingest(self, pod: str, payload: Buffer, *, model: str = "", dp_rank: int | None = None, seq: int | None = None) -> IngestReport:
        """Applies one batch, exactly as an engine published it. O(blocks of the batch). Releases the GIL for batches of 4 KB and more.

        An event that cannot be applied does not affect the others: the report counts it by reason.

        Args:
            pod: The pod's name. A new name creates a pod.
            payload: The msgpack payload, bytes-like, in any format since vLLM 0.9 and SGLang 0.4.6.
            model: Model of the blocks.
            dp_rank: Data-parallel rank of the stream; None for the rank in the batch, or 0 if it has no rank.
            seq: Sequence number of the batch in its stream. A stream can be continued from a snapshot only if it is given.

        Returns:
            The counts of stored, removed, parked and skipped hashes.

        Raises:
            EventDecodeError: The payload is not a batch. Nothing was applied.
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range.
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
            # A pod that does not exist yet begins with its first batch, not with a payload that is no batch.
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

    def _ingest_hashed(self, const uint8_t[::1] data not None):
        """Applies batches of :func:`hash_batch`, one behind the other: ``(batches, those whose payload was no batch)``."""
        cdef uint64_t batches = 0, unsound = 0
        cdef cbool whole = True
        if self.timed: self._expire(self.now())
        if len(data):
            with nogil: whole = self.ix.ingest_hashed(&data[0], len(data), batches, unsound)
        if not whole:
            raise EventDecodeError(f"no hashed batch follows the first {batches} in {len(data)} bytes", batches)
        return batches, unsound

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
        """Returns how many leading tokens of a prompt each pod would reuse now.

        O(matched blocks), plus the changes of holders along the prompt, never pods times blocks. Releases the GIL for prompts of 16,384 tokens
        and more. The result refers to ``tokens`` for its ``hashes``.

        Args:
            tokens: Token ids, 0 to 2**32 - 1: a one-dimensional array or buffer of uint32, int32 (both without a copy), int64 or uint64, or a
                sequence of ints. An incomplete block at the end does not count.
            model: Model of the request.
            lora_name: LoRA adapter of the request, None for the base model.
            cache_salt: Cache salt of the request.
            extra_keys: One entry per block, as in the events but without LoRA name and salt: None or a list.
            ready_pods: Pods to which the answer is limited: an iterable of names, or a :class:`PodSet`.
            only_exact: Whether to leave out pods that are ``degraded`` or ``stale``.

        Returns:
            The answer, a mapping of pod names.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range; for tokens, the message has the position.
        """
        cdef _Ints t = _tokens(tokens)
        cdef Prompt p
        _prompt(t, lora_name, cache_salt, extra_keys, self.block_size, self.hash_seed, p)
        cdef PrefixMatch m = self.ask(p, t.n, t.n // self.block_size, model, ready_pods, _flag(only_exact, "only_exact"))
        m.prompt, m.lora_name, m.cache_salt, m.extra_keys = tokens, lora_name, cache_salt, extra_keys
        return m

    def match_hashes(self, hashes: _Hashes, *, model: str = "", ready_pods: PodSet | Iterable[str] | None = None, only_exact: bool = False,
                     n_tokens: int | None = None) -> PrefixMatch:
        """Returns the answer of :meth:`match_prefix` for prefix hashes in place of tokens. O(matched blocks).

        The hashes cover no lookahead tokens. Workers with lookahead hashes (vLLM 0.33 and SGLang with EAGLE or MTP) are left out.

        Args:
            hashes: Prefix hashes (:func:`prefix_hashes`), one per complete block: a uint64 array or buffer, or a sequence of ints.
            model: Model of the request.
            ready_pods: As for :meth:`match_prefix`.
            only_exact: As for :meth:`match_prefix`.
            n_tokens: Length of the prompt in tokens, for vLLM's rule of the last token; None for a prompt of complete blocks.

        Returns:
            The answer, a mapping of pod names.

        Raises:
            InvalidTypeError: An argument has the wrong type.
            InvalidValueError: An argument is out of range; for hashes, the message has the position.
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
        """Returns the answers of :meth:`match_prefix` for many prompts, with the GIL released once for all of them.

        Args:
            prompts: An iterable of token ids, each as for :meth:`match_prefix`.
            model: As for :meth:`match_prefix`, for all prompts; the other arguments likewise.

        Returns:
            One answer per prompt, each of a moment during the call.

        Raises:
            InvalidTypeError: An argument has the wrong type; the message has the number of the prompt. Nothing was matched.
            InvalidValueError: An argument is out of range; the message has the number of the prompt. Nothing was matched.
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

    def _locals(self, pod, int64_t rank, string model, tokens, tuple keys):
        """``[(lookahead, local hashes)]`` of a prompt, as the blocks of this worker have them."""
        cdef _Ints t = _tokens(tokens)
        cdef Prompt p
        cdef vector[pair[uint32_t, vector[uint64_t]]] found
        cdef uint64_t uid = self.known(pod)
        _prompt(t, keys[0], keys[1], keys[2], self.block_size, self.hash_seed, p)
        with nogil: found = self.ix.locals(uid, rank, model, p)
        return [(each.first, (<const char*>each.second.data())[:8 * each.second.size()]) for each in found]

    def _hint(self, pod, int64_t rank, string model, uint32_t lookahead, bytes locals, double until):
        """As :meth:`add_prefix`, with another router's :meth:`_locals`; False if no such worker is followed."""
        cdef vector[uint64_t] hashes
        cdef uint64_t uid = self.known(pod)
        cdef cbool taken
        hashes.resize(len(locals) // 8)
        memcpy(hashes.data(), <const char*>locals, 8 * hashes.size())
        if self.timed: self._expire(self.now())
        with nogil: taken = self.ix.hint(uid, rank, model, lookahead, hashes.data(), <uint32_t>hashes.size(), until)
        return taken

    def _expire(self, double now):
        if self.ix.next_expiry() <= now:
            with nogil: self.ix.expire(now)

    # Primitives of index.py, which checks the arguments.
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

    def _mark(self, pod, int64_t rank, int state):
        cdef uint64_t uid = self.uid(pod)
        with nogil: self.ix.mark(uid, rank, state)

    def _trust(self, int64_t until): self.ix.trust(until)

    def _join(self, *parts): _join(self, parts)

    def _pods(self):
        cdef size_t pods = 0
        return [name.decode("utf-8", "surrogateescape") for name in self.ix.directory().some(<size_t>-1, pods)]

    def _state(self, pod):
        cdef uint64_t uid = self.known(pod)
        cdef int state
        with nogil: state = self.ix.state(uid)
        if state < 0:
            raise self.unknown(pod)
        return state

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
        # The numbers of pods that no longer exist would otherwise stay here.
        self.uids.clear()
        self.names.clear()

    def _figures(self):
        cdef Stats s
        with nogil: s = self.ix.stats()
        return {**s.figures, **s.totals, "skipped_reasons": _reasons(s.report)}


include "_match.pxi"
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


def hash_batch(pod, int64_t rank, model, seq, payload, uint32_t block_size, uint64_t hash_seed):
    """A payload with hashes in place of tokens, for an index of this block size and seed; ``seq`` None: without a place in its stream."""
    cdef _Ints b = _payload(payload)
    cdef HashedHead head
    cdef Batch scratch
    cdef vector[uint8_t] out
    cdef bytes name = arguments.utf8(pod, "pod"), space = arguments.utf8(model, "model")
    _refer(name, &head.pod)
    _refer(space, &head.model)
    head.rank, head.seq = rank, -1 if seq is None else seq
    hash_payload(block_size, hash_seed, head, <const uint8_t*>b.data, b.n, scratch, out)
    return (<const char*>out.data())[:out.size()]


def peek_batch(bytes data, cbool whole):
    """``(seconds or None, events, rank or None)`` from the beginning of a batch; the rank only with ``whole``."""
    cdef BatchPeek found = native_peek(<const uint8_t*><const char*>data, len(data), whole)
    return (found.ts if found.timed else None, found.events, found.rank if found.rank >= 0 else None)


def snapshot_head(bytes data, uint64_t file_bytes): return native_head(<const uint8_t*><const char*>data, len(data), file_bytes)


cdef object _no_batch(_Ints payload, DecodeFault& fault):
    return EventDecodeError(f"payload of {payload.n} bytes is not an event batch: {fault.what.decode()} at byte {fault.offset}", fault.offset)


Mapping.register(PrefixMatch)


def _isas(): return _ISAS[:<int>best_isa() + 1]


def _xxh3_64(bytes data, seed, isa=None):
    return xxh3_64(<const char*>data, len(data), arguments.seed(seed), best_isa() if isa is None else <Isa><int>_ISAS.index(isa))
