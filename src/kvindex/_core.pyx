# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False, freethreading_compatible=False
# distutils: language = c++
"""The compiled core: arguments and buffers in, exceptions and objects out. What is computed, and how, stands in _native."""

import time

import msgpack
import numpy as np

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_SIMPLE, PyBUF_STRIDED_RO, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from cpython.object cimport PyObject
from cpython.sequence cimport PySequence_Fast, PySequence_Fast_GET_SIZE, PySequence_Fast_ITEMS
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.string cimport string
from libcpp.vector cimport vector

from kvindex._native cimport *

from .answers import PodMatch
from .errors import CapacityError, EventDecodeError, InvalidTypeError, InvalidValueError, KVIndexError, UnknownPodError

_VERDICTS = ("exact", "degraded", "stale")
_ISAS = ("portable", "sse2", "avx2")
_TOKENS_ARE = "tokens are a uint32, int32, int64 or uint64 array, or a sequence of ints"
# Below this a match is shorter than giving up the interpreter lock and taking it again (140 ns, and a queue of other threads).
cdef Py_ssize_t RELEASE_FROM = 1024


# ---- arguments ----------------------------------------------------------------------------------------------------------------------

cdef class _Ints:
    """One-dimensional integers as native memory: borrowed from a buffer where its type allows, copied otherwise."""

    cdef Py_buffer view
    cdef bint viewed
    cdef void* copy
    cdef const void* data
    cdef Py_ssize_t n

    def __dealloc__(self):
        if self.viewed:
            PyBuffer_Release(&self.view)
        PyMem_Free(self.copy)

    cdef void* room(self, Py_ssize_t n, int width) except NULL:
        self.n = n
        self.copy = PyMem_Malloc(max(n, 1) * width)
        if self.copy == NULL:
            raise CapacityError(f"no memory for {n} integers")
        self.data = self.copy
        return self.copy


cdef object _out_of_range(str what, Py_ssize_t at, object value):
    return InvalidValueError(f"{what}[{at}] is {value}; token ids are 0 to 4294967295")


cdef int _item_token(str what, Py_ssize_t at, object item, uint32_t* out) except -1:
    try:
        value = item.__index__()
    except (AttributeError, TypeError):
        raise InvalidTypeError(f"{what}[{at}] is {item!r} of type {type(item).__name__}; {_TOKENS_ARE}") from None
    if not 0 <= value <= 0xFFFFFFFF:
        raise _out_of_range(what, at, value)
    out[0] = value
    return 0


cdef _Ints _view(object data, str what, str are):
    """Takes a buffer of one dimension; the type of its items is the caller's to judge."""
    cdef _Ints v = _Ints()
    if isinstance(data, (bytes, bytearray, str)):
        raise InvalidTypeError(f"{what} is {type(data).__name__}; {are} (raw bytes: tokens_from_bytes says how to read them)")
    if PyObject_CheckBuffer(data):
        try:
            PyObject_GetBuffer(data, &v.view, PyBUF_STRIDED_RO | PyBUF_FORMAT)
        except (BufferError, ValueError) as e:
            raise InvalidTypeError(f"{what} cannot be read as a buffer ({e}); {are}") from None
        v.viewed = True
        if v.view.ndim != 1:
            raise InvalidValueError(f"{what} has {v.view.ndim} dimensions; it must have one")
        v.n = v.view.shape[0]
        v.data = v.view.buf
    return v


cdef int _format(_Ints v, bint* is_signed):
    """Width in bytes of native integers, or 0."""
    cdef bytes f = v.view.format if v.view.format != NULL else b"B"
    if f[:1] in (b"@", b"=", b"<"):
        f = f[1:]
    is_signed[0] = f in (b"i", b"l", b"q")
    return <int>v.view.itemsize if is_signed[0] or f in (b"I", b"L", b"Q") else 0


cdef _Ints _tokens(object tokens, str what="tokens"):
    cdef _Ints v = _view(tokens, what, _TOKENS_ARE)
    cdef bint is_signed
    cdef int width
    cdef uint32_t* out
    cdef Py_ssize_t n, at = 0
    cdef object fast
    if v.viewed:
        width = _format(v, &is_signed)
        if width == 0:
            if v.n == 0:
                return v
            raise InvalidTypeError(f"{what} has items of format {v.view.format.decode()!r}; {_TOKENS_ARE}")
        n = v.n
        if width == 4 and v.view.strides[0] == 4 and (<size_t>v.view.buf & 3) == 0:
            if is_signed:
                at = first_negative(<const int*>v.view.buf, n)
                if at < n:
                    raise _out_of_range(what, at, (<const int*>v.view.buf)[at])
            return v
        out = <uint32_t*>v.room(n, 4)
        at = narrow_tokens(<const char*>v.view.buf, n, v.view.strides[0], width, is_signed, out)
        if at < n:
            raise _out_of_range(what, at, memoryview(tokens)[at])
        return v
    try:
        fast = PySequence_Fast(tokens, "")
    except TypeError:
        raise InvalidTypeError(f"{what} is {type(tokens).__name__}; {_TOKENS_ARE}") from None
    if isinstance(tokens, (set, frozenset, dict)):
        raise InvalidTypeError(f"{what} is {type(tokens).__name__}, which has no order; {_TOKENS_ARE}")
    n = PySequence_Fast_GET_SIZE(fast)
    out = <uint32_t*>v.room(n, 4)
    while True:
        at += read_tokens(PySequence_Fast_ITEMS(fast) + at, n - at, out + at)
        if at >= n:
            return v
        _item_token(what, at, <object>PySequence_Fast_ITEMS(fast)[at], out + at)
        at += 1


cdef uint64_t _fold(object h, str what) except? 0:
    """An engine hash as u64: ints as they are (signed ones wrap), bytes by their last eight, big-endian (vLLM's own integers)."""
    if isinstance(h, (bytes, bytearray)):
        if not h:
            raise InvalidValueError(f"{what} is empty bytes; an engine hash has at least one")
        return int.from_bytes(h[max(len(h) - 8, 0):], "big")
    try:
        value = h.__index__()
    except (AttributeError, TypeError):
        raise InvalidTypeError(f"{what} is {h!r}; an engine hash is an int or bytes") from None
    if not -(1 << 63) <= value < 1 << 64:
        raise InvalidValueError(f"{what} is {value}; an engine hash has 64 bits")
    return value & 0xFFFFFFFFFFFFFFFF


cdef int _hashes(object hashes, str what, vector[uint64_t]& out) except -1:
    cdef Py_ssize_t i
    if isinstance(hashes, (bytes, str)):
        raise InvalidTypeError(f"{what} is {type(hashes).__name__}; it must be a sequence of hashes")
    try:
        items = hashes.tolist() if hasattr(hashes, "tolist") else list(hashes)
    except TypeError:
        raise InvalidTypeError(f"{what} is {type(hashes).__name__}; it must be a sequence of hashes") from None
    for i, h in enumerate(items):
        out.push_back(_fold(h, f"{what}[{i}]"))
    return 0


cdef string _text(object s, str what) except *:
    cdef Py_ssize_t n
    cdef const char* p
    if not isinstance(s, str):
        raise InvalidTypeError(f"{what} is {s!r}; it must be a str")
    try:
        p = PyUnicode_AsUTF8AndSize(s, &n)
    except UnicodeEncodeError:
        raise InvalidValueError(f"{what} is {s!r}, which has no UTF-8 form") from None
    return string(p, n)


cdef int64_t _whole(object value, str what, int64_t low, int64_t high) except? -1:
    try:
        n = value.__index__()
    except (AttributeError, TypeError):
        raise InvalidTypeError(f"{what} is {value!r}; it must be an int") from None
    if not low <= n <= high:
        raise InvalidValueError(f"{what} is {n}; it must be {low} to {high}")
    return n


cdef double _seconds(object value, str what) except? -1:
    cdef double s
    try:
        s = value
    except TypeError:
        raise InvalidTypeError(f"{what} is {value!r}; it must be a number of seconds") from None
    if not 0 <= s < 1e18:
        raise InvalidValueError(f"{what} is {value!r}; it must be 0 or more seconds, and finite")
    return s


cdef bytes _packed_keys(object extra_keys):
    """extra_keys in the form that events have them, so that one native reader serves both."""
    if isinstance(extra_keys, (str, bytes)) or not hasattr(extra_keys, "__len__"):
        raise InvalidTypeError(f"extra_keys is {extra_keys!r}; it has one entry per block: None or a list of keys")
    for i, entry in enumerate(extra_keys):
        if entry is not None and not isinstance(entry, (list, tuple)):
            raise InvalidTypeError(f"extra_keys[{i}] is {entry!r}; an entry is None or a list of keys")
    try:
        return msgpack.packb(list(extra_keys))
    except (TypeError, ValueError, OverflowError) as e:
        raise InvalidValueError(f"extra_keys cannot be read ({e}); keys are str, int, bytes or (id, offset) pairs") from None


cdef int _prompt(_Ints tokens, object lora_name, object cache_salt, object extra_keys, uint32_t block_size, uint64_t seed, Prompt& p) except -1:
    cdef bytes packed = b""
    cdef string salt
    p.tokens = <const uint32_t*>tokens.data
    p.n_tokens = tokens.n
    if lora_name is not None:
        p.adapter = _text(lora_name, "lora_name")
        p.adapted = not p.adapter.empty()
    if cache_salt is None and extra_keys is None:
        return 0
    if cache_salt is not None:
        salt = _text(cache_salt, "cache_salt")
    if extra_keys is not None:
        packed = _packed_keys(extra_keys)
    if not read_extra(<const uint8_t*><const char*>packed if packed else NULL, len(packed), &salt if cache_salt is not None else NULL, seed,
                      tokens.n // block_size, p):
        raise InvalidValueError(f"extra_keys {extra_keys!r} cannot be read; keys are str, int, bytes or (id, offset) pairs")
    return 0


cdef class _Bytes:
    """A payload's bytes, borrowed."""

    cdef Py_buffer view
    cdef bint viewed

    def __cinit__(self, data):
        if isinstance(data, str) or not PyObject_CheckBuffer(data):
            raise InvalidTypeError(f"payload is {type(data).__name__}; it must be bytes-like")
        try:
            PyObject_GetBuffer(data, &self.view, PyBUF_SIMPLE)
        except (BufferError, ValueError) as e:
            raise InvalidTypeError(f"payload is not contiguous bytes ({e})") from None
        self.viewed = True

    def __dealloc__(self):
        if self.viewed:
            PyBuffer_Release(&self.view)


# ---- answers ------------------------------------------------------------------------------------------------------------------------

cdef class IngestReport:
    """What became of one batch or event: counts of engine hashes (stored, removed, parked), of clear events (cleared), of events and
    removed hashes that were not applied (skipped), and of those the malformed ones (errors). ``reasons`` says why, by name.
    ``ts`` is the batch's timestamp in seconds, None for single events; ``dp_rank`` the rank it was applied to.
    """

    cdef Report r
    cdef readonly object ts
    cdef readonly int64_t dp_rank

    stored = property(lambda self: (<IngestReport>self).r.stored)
    removed = property(lambda self: (<IngestReport>self).r.removed)
    cleared = property(lambda self: (<IngestReport>self).r.cleared)
    parked = property(lambda self: (<IngestReport>self).r.parked)
    skipped = property(lambda self: (<IngestReport>self).r.skipped)
    errors = property(lambda self: (<IngestReport>self).r.errors)

    @property
    def reasons(self):
        return _reasons(self.r)

    def __repr__(self):
        r = self.r
        return (f"IngestReport(stored={r.stored}, removed={r.removed}, cleared={r.cleared}, parked={r.parked}, skipped={r.skipped}, "
                f"errors={r.errors}, reasons={self.reasons})")


cdef dict _reasons(Report& r):
    return {reason_name(<Reason>i).decode(): r.reasons[i] for i in range(REASONS) if r.reasons[i]}


cdef class PodSet:
    """A compiled filter for ``ready_pods``, made by :meth:`PrefixIndex.pod_set`; pods that come later are found by name as well.
    Any thread may use it, any number of times.
    """

    cdef PodNames* names
    cdef readonly frozenset pods

    def __cinit__(self, pods):
        cdef vector[string] names
        if isinstance(pods, (str, bytes)):
            raise InvalidTypeError(f"pods is {pods!r}; it must be an iterable of pod names")
        self.pods = frozenset(pods)
        for pod in self.pods:
            names.push_back(_text(pod, "a pod's name"))
        self.names = new PodNames(names)

    def __dealloc__(self):
        del self.names

    def __len__(self):
        return len(self.pods)

    def __repr__(self):
        return f"PodSet({sorted(self.pods)})"


cdef class PrefixMatch:
    """The answer to one prompt. Keeps native numbers; the dicts are built when asked for, O(pods). Immutable: any thread may read it.

    ``blocks`` is the number of complete blocks of the prompt.
    """

    cdef MatchResult r
    cdef PrefixIndex index
    cdef dict names
    cdef readonly Py_ssize_t blocks
    cdef object tokens_arg, lora_name, cache_salt, extra_keys, given_hashes

    cdef str pod_name(self, uint64_t uid):
        # A pod that was opened while the match ran is in the newer of the two; one that was removed since, in the older.
        return self.names.get(uid) or self.index.names.get(uid)

    cdef dict best_blocks(self):
        cdef Hit h
        cdef dict out = {}
        for h in self.r.hits:
            if h.medium == NO_MEDIUM and (name := self.pod_name(h.pod)) is not None:
                if out.get(name, 0) < h.blocks:
                    out[name] = h.blocks
        return out

    @property
    def tokens(self):
        """``{pod: tokens}``: what the pod's best rank holds in any medium. Pods that hold nothing are left out."""
        return {pod: n * self.index.block_size for pod, n in self.best_blocks().items()}

    @property
    def percent(self):
        """``{pod: percent}`` of the prompt's complete blocks, floored (AIBrix's MatchPrefix returns this)."""
        return {pod: 100 * n // self.blocks for pod, n in self.best_blocks().items()}

    @property
    def hashes(self):
        """uint64[blocks]: the prefix hashes of the prompt's complete blocks, computed when first asked for. The tokens are not copied
        for that: an array that was changed after the match gives the hashes of what it holds then.
        """
        if self.given_hashes is None:
            self.given_hashes = prefix_hashes(self.tokens_arg, block_size=self.index.block_size, hash_seed=self.index.hash_seed,
                                              lora_name=self.lora_name, cache_salt=self.cache_salt, extra_keys=self.extra_keys)
        return self.given_hashes

    def best(self):
        """``(pod, tokens)`` of the pod that holds most, the one that was known first among equals; None if nobody holds a block."""
        if self.r.best == NO_MEDIUM:
            return None
        return self.pod_name(self.r.hits[self.r.best].pod), self.r.hits[self.r.best].blocks * self.index.block_size

    def __getitem__(self, pod):
        """The pod's :class:`PodMatch`, with zeros if it holds nothing. Raises :class:`UnknownPodError` if the index never heard of it."""
        cdef Hit h
        cdef uint32_t size = self.index.block_size
        cdef dict media = {}, ranks = {}
        cdef list media_names = None
        state = None
        for h in self.r.hits:
            if self.pod_name(h.pod) != pod:
                continue
            state = _VERDICTS[<int>h.verdict]
            if h.medium == NO_MEDIUM:
                ranks[h.rank] = max(ranks.get(h.rank, 0), h.blocks * size)
            else:
                media_names = media_names or self.index.media_names()
                media[media_names[h.medium]] = max(media.get(media_names[h.medium], 0), h.blocks * size)
        if state is None:
            return PodMatch(0, 0, {}, {}, self.index.pod_state(pod))
        tokens = max(ranks.values())
        return PodMatch(tokens, tokens // size, media, ranks, state)

    def __repr__(self):
        return f"PrefixMatch({self.tokens})"


# ---- the index ----------------------------------------------------------------------------------------------------------------------

cdef class PrefixIndex:
    """Which pod holds which prefix, kept from the engines' events.

    block_size: tokens per index block, the granularity of every answer; an engine's own block size must be a multiple of it.
    hash_seed: seed of the interoperable hashes. presence: "count" (copies are counted, as vLLM announces them) or "set" (for engines
    that re-announce blocks without a new copy). max_parked: stored hashes per worker that may wait for their parent.
    clock: seconds that never go back, for the time to live of :meth:`add_prefix`.

    Any thread may call any method at any time; a match sees whole events only.
    Events: :meth:`ingest`, :meth:`process_block_stored`, :meth:`process_block_removed`, :meth:`process_all_blocks_cleared`.
    Questions: :meth:`match_prefix`, :meth:`match_hashes`, :meth:`pod_set`. Pods: :meth:`add_prefix`, :meth:`remove_pod`,
    :meth:`pod_state`, :meth:`configure_pod`, :meth:`clear_worker`, :meth:`mark_worker`. Figures: :meth:`stats`, :meth:`worker_stats`.
    """

    cdef SharedIndex* ix
    cdef readonly uint32_t block_size
    cdef readonly uint64_t hash_seed
    cdef dict uids, names
    cdef list media_cache
    cdef object clock

    def __cinit__(self, block_size=16, *, hash_seed=1337, presence="count", max_parked=65536, clock=time.monotonic):
        self.block_size = _whole(block_size, "block_size", 1, 65536)
        self.hash_seed = _seed(hash_seed)
        if presence not in ("count", "set"):
            raise InvalidValueError(f"presence is {presence!r}; it must be 'count' or 'set'")
        self.ix = new SharedIndex(self.block_size, self.hash_seed, presence == "set", _whole(max_parked, "max_parked", 0, 0x7FFFFFFF))
        self.uids, self.names, self.media_cache, self.clock = {}, {}, [], clock

    def __dealloc__(self):
        del self.ix

    cdef uint64_t uid(self, object pod) except 0:
        cdef string name
        cdef uint64_t uid
        found = self.uids.get(pod) if isinstance(pod, str) else None
        if found is not None:
            return found
        name = _text(pod, "pod")
        uid = self.ix.open_pod(name)
        self.uids[pod] = uid
        self.names[uid] = pod
        return uid

    cdef uint64_t known(self, object pod) except 0:
        found = self.uids.get(pod) if isinstance(pod, str) else None
        if found is None:
            raise UnknownPodError(f"no pod {pod!r} in this index; known are {', '.join(sorted(self.uids)) or 'none yet'}")
        return found

    cdef list media_names(self):
        self.media_cache = [m.decode("utf-8", "surrogateescape") for m in self.ix.media()]
        return self.media_cache

    def ingest(self, pod, payload, *, model="", dp_rank=None):
        """Applies one batch as its engine wrote it (msgpack, every form since vLLM 0.9 and SGLang 0.4.6). O(blocks in it).

        pod: name; payload: bytes-like; model: namespace of the blocks; dp_rank: the stream's rank, None for the batch's own (or 0).
        Returns an :class:`IngestReport`. Raises :class:`EventDecodeError` if the payload is no batch: nothing of it is applied then.
        Decodes and applies without the interpreter lock.
        """
        cdef _Bytes b = _Bytes(payload)
        cdef IngestReport report = IngestReport.__new__(IngestReport)
        cdef uint64_t uid = self.uid(pod)
        cdef string name = _text(model, "model")
        cdef int64_t rank = -1 if dp_rank is None else _whole(dp_rank, "dp_rank", 0, 1 << 31)
        cdef double ts = 0
        cdef DecodeFault fault
        cdef cbool ok
        with nogil:
            ok = self.ix.ingest(uid, <const uint8_t*>b.view.buf, b.view.len, name, rank, report.r, ts, report.dp_rank, fault)
        if not ok:
            raise EventDecodeError(f"payload of {b.view.len} bytes is no event batch: {fault.what.decode()} at byte {fault.offset}", fault.offset)
        report.ts = ts
        return report

    def process_block_stored(self, event):
        """Applies a :class:`BlockStored`. O(blocks). Raises a KVIndexError for malformed fields, with nothing applied."""
        cdef Batch batch
        cdef Event e
        cdef list alive = []
        cdef _Ints tokens
        cdef const uint32_t* t
        e.kind = STORED
        _hashes(event.block_hashes, "block_hashes", batch.hashes)
        e.n_hashes = <uint32_t>batch.hashes.size()
        e.has_parent = event.parent_block_hash is not None
        if e.has_parent:
            e.parent = _fold(event.parent_block_hash, "parent_block_hash")
        if event.token_ids is not None:
            tokens = _tokens(event.token_ids, "token_ids")
            t = <const uint32_t*>tokens.data
            batch.tokens.assign(t, t + tokens.n)
            e.n_tokens = <uint32_t>tokens.n
        e.block_size = 0 if event.block_size is None else _whole(event.block_size, "block_size", 0, 1 << 40)
        e.window = 0 if event.kv_cache_spec_sliding_window is None else _whole(event.kv_cache_spec_sliding_window, "kv_cache_spec_sliding_window", 0, 1 << 40)
        _group(event, e)
        if isinstance(event.lora_id, str):
            _ref(event.lora_id, "lora_id", alive, e.lora_id_name)
        elif event.lora_id is not None:
            e.lora_id = _whole(event.lora_id, "lora_id", -(1 << 62), 1 << 62)
        _ref(event.medium, "medium", alive, e.medium)
        _ref(event.lora_name, "lora_name", alive, e.lora_name)
        _ref(event.kv_cache_spec_kind, "kv_cache_spec_kind", alive, e.spec_kind)
        _ref(event.cache_salt, "cache_salt", alive, e.cache_salt)
        if event.extra_keys is not None:
            packed = _packed_keys(event.extra_keys)
            alive.append(packed)
            e.extra_keys = <const uint8_t*><const char*>packed
            e.extra_keys_bytes = <uint32_t>len(packed)
        batch.events.push_back(e)
        return self.apply(event, event.model, batch)

    def process_block_removed(self, event):
        """Applies a :class:`BlockRemoved`. O(hashes). Hashes without a counted copy are skipped and counted."""
        cdef Batch batch
        cdef Event e
        cdef list alive = []
        e.kind = REMOVED
        _hashes(event.block_hashes, "block_hashes", batch.hashes)
        e.n_hashes = <uint32_t>batch.hashes.size()
        _group(event, e)
        _ref(event.medium, "medium", alive, e.medium)
        batch.events.push_back(e)
        return self.apply(event, event.model, batch)

    def process_all_blocks_cleared(self, event):
        """Applies an :class:`AllBlocksCleared`: everything of that pod and rank goes, or of the pod's ``clear_media``. O(its blocks)."""
        cdef Batch batch
        cdef Event e
        e.kind = CLEARED
        batch.events.push_back(e)
        return self.apply(event, "", batch)

    cdef IngestReport apply(self, object event, object model, Batch& batch):
        cdef IngestReport report = IngestReport.__new__(IngestReport)
        cdef string name = _text(model, "model")
        cdef int64_t rank = 0 if event.dp_rank is None else _whole(event.dp_rank, "dp_rank", 0, 1 << 31)
        cdef uint64_t uid = self.uid(event.pod)
        with nogil:
            self.ix.apply(uid, rank, name, batch, report.r)
        report.dp_rank = rank
        return report

    def match_prefix(self, tokens, *, model="", lora_name=None, cache_salt=None, extra_keys=None, ready_pods=None, only_exact=False):
        """How many leading tokens of the prompt each pod holds now.

        tokens: uint32, int32, int64 or uint64 array of one dimension (uint32 and int32 are not copied), or a sequence of ints.
        extra_keys: one entry per block, as events carry them, without LoRA name and salt. ready_pods: a :class:`PodSet` or an iterable of
        names that the answer is limited to. only_exact: leaves out pods that are degraded or stale.
        O(matched blocks) hashing, then work per change of the holders; never per pod and block.
        Raises InvalidTypeError, InvalidValueError naming the position.
        """
        cdef _Ints t = _tokens(tokens)
        cdef PrefixMatch m = self.answer(t.n // self.block_size)
        cdef Prompt p
        cdef PodSet pods = self.pods(ready_pods)
        cdef PodNames* names = pods.names if pods is not None else NULL
        cdef string space = _text(model, "model")
        cdef cbool exact = only_exact, done = False
        _prompt(t, lora_name, cache_salt, extra_keys, self.block_size, self.hash_seed, p)
        m.tokens_arg, m.lora_name, m.cache_salt, m.extra_keys = tokens, lora_name, cache_salt, extra_keys
        if t.n < RELEASE_FROM:
            done = self.ix.match(p, space, names, exact, False, m.r)
        if not done:
            with nogil:
                self.ix.match(p, space, names, exact, True, m.r)
        return m

    def match_hashes(self, hashes, *, model="", ready_pods=None, only_exact=False):
        """The same answer from the prompt's prefix hashes (uint64, one per complete block, see :func:`prefix_hashes`)."""
        cdef _Ints h = _view(hashes, "hashes", "hashes are a uint64 array or a sequence of ints")
        cdef vector[uint64_t] copied
        cdef bint is_signed
        cdef PodSet pods = self.pods(ready_pods)
        cdef PodNames* names = pods.names if pods is not None else NULL
        cdef string space = _text(model, "model")
        cdef cbool exact = only_exact, done = False
        cdef const uint64_t* data
        cdef Py_ssize_t n
        if h.viewed and _format(h, &is_signed) == 8 and not is_signed and (h.n == 0 or h.view.strides[0] == 8):
            data, n = <const uint64_t*>h.data, h.n
        elif h.viewed and h.view.format != NULL and h.view.format[0] in b"fd?" and h.n:
            raise InvalidTypeError(f"hashes has items of format {h.view.format.decode()!r}; hashes are a uint64 array or a sequence of ints")
        else:
            _hashes(hashes, "hashes", copied)
            data, n = copied.data(), copied.size()
        cdef PrefixMatch m = self.answer(n)
        m.given_hashes = hashes
        if n < RELEASE_FROM:
            done = self.ix.match_hashes(data, n, space, names, exact, False, m.r)
        if not done:
            with nogil:
                self.ix.match_hashes(data, n, space, names, exact, True, m.r)
        return m

    cdef PrefixMatch answer(self, Py_ssize_t blocks):
        cdef PrefixMatch m = PrefixMatch.__new__(PrefixMatch)
        if self.ix.next_expiry() < 1e300:
            self._expire(self.clock())
        m.index, m.names, m.blocks = self, self.names, blocks
        return m

    cdef PodSet pods(self, object ready):
        return ready if ready is None or isinstance(ready, PodSet) else PodSet(ready)

    def pod_set(self, pods):
        """Compiles pod names into a filter that costs nothing per match. Names need not be known yet."""
        return PodSet(pods)

    def add_prefix(self, pod, tokens, *, ttl, model="", lora_name=None, cache_salt=None, extra_keys=None, dp_rank=0, now=None):
        """Counts the prompt's complete blocks as held by (pod, rank) on the GPU for ttl seconds: a routing decision that its events have
        not confirmed yet. Never touches what events said; a clear of the worker ends it.
        """
        cdef _Ints t = _tokens(tokens)
        cdef Prompt p
        cdef vector[uint64_t] prefixes
        cdef double until = _seconds(ttl, "ttl") + <double>(self.clock() if now is None else now)
        cdef string space = _text(model, "model")
        cdef int64_t rank = _whole(dp_rank, "dp_rank", 0, 1 << 31)
        cdef uint64_t uid
        _prompt(t, lora_name, cache_salt, extra_keys, self.block_size, self.hash_seed, p)
        uid = self.uid(pod)
        prefixes.resize(t.n // self.block_size)
        with nogil:
            hash_prompt(p, self.block_size, self.hash_seed, True, prefixes.data())
            self.ix.guess(uid, rank, space, prefixes, until)

    def _expire(self, double now):
        if self.ix.next_expiry() <= now:
            with nogil:
                self.ix.expire(now)

    def configure_pod(self, pod, *, presence=None, clear_media=None, chunk_size=None):
        """Options of one source; None leaves one as it is. presence: "count" or "set". clear_media: media that AllBlocksCleared clears
        (it carries none). chunk_size: tokens per chunk of chunked-local attention, which events do not carry.
        """
        cdef vector[string] media
        if presence not in (None, "count", "set"):
            raise InvalidValueError(f"presence is {presence!r}; it must be 'count' or 'set'")
        if isinstance(clear_media, str):
            raise InvalidTypeError(f"clear_media is {clear_media!r}; it must be an iterable of media")
        for m in clear_media or ():
            media.push_back(_text(m, "clear_media"))
        cdef int64_t chunk = -1 if chunk_size is None else _whole(chunk_size, "chunk_size", 1, 0x7FFFFFFF)
        self.ix.configure(self.uid(pod), -1 if presence is None else presence == "set", clear_media is not None, media, chunk)

    def remove_pod(self, pod):
        """Forgets the pod and all it holds; what is on its way to it is dropped. O(its blocks). UnknownPodError if there is none."""
        cdef uint64_t uid = self.known(pod)
        names = self.names.copy()
        del names[uid]
        del self.uids[pod]
        # Matches that run, and answers not looked at yet, keep the older dict.
        self.names = names
        with nogil:
            self.ix.remove_pod(uid)

    def clear_worker(self, pod, dp_rank=0):
        """An engine restarted: everything of that worker goes, whatever its medium, and its index-level degradation. O(its blocks)."""
        cdef uint64_t uid = self.uid(pod)
        cdef int64_t rank = _whole(dp_rank, "dp_rank", 0, 1 << 31)
        with nogil:
            self.ix.clear_worker(uid, rank)

    def mark_worker(self, pod, dp_rank, verdict):
        """The stream's verdict on a worker: "exact", "degraded" or "stale". The pod's state is the worst of all it is told and knows."""
        if verdict not in _VERDICTS:
            raise InvalidValueError(f"verdict is {verdict!r}; it must be one of {', '.join(_VERDICTS)}")
        self.ix.mark(self.uid(pod), _whole(dp_rank, "dp_rank", 0, 1 << 31), _VERDICTS.index(verdict))

    def pod_state(self, pod):
        """"exact", "degraded" (a hole was accepted, or blocks could not be placed) or "stale"; the worst of its ranks. O(1)."""
        return _VERDICTS[max(0, self.ix.verdict(self.known(pod)))]

    def worker_stats(self, pod):
        """``{rank: {"blocks", "parked", "state"}}``: index blocks held (in every medium and group), stored hashes that wait. O(ranks)."""
        cdef PodFigures f
        return {f.rank: {"blocks": f.blocks, "parked": f.parked, "state": _VERDICTS[<int>f.verdict]} for f in self.ix.pod_figures(self.known(pod))}

    def stats(self):
        """Figures of the whole index, in O(1): blocks (distinct content), chains, sets, holders, pods, workers, parked, guesses, bytes
        (native memory), and what events did since the start; ``skipped_reasons`` by name.
        """
        cdef Figures f = self.ix.figures()
        cdef Totals t = self.ix.totals()
        return {"blocks": f.blocks, "chains": f.chains, "sets": f.sets, "holders": f.holders, "pods": f.pods, "workers": f.workers,
                "parked": f.parked, "guesses": f.guesses, "bytes": f.bytes, "batches": t.batches, "bad_payloads": t.bad_payloads,
                "events_stored": t.events_stored, "events_removed": t.events_removed, "events_cleared": t.events_cleared,
                "blocks_stored": t.report.stored, "blocks_removed": t.report.removed, "blocks_parked": t.report.parked,
                "skipped": t.report.skipped, "errors": t.report.errors, "skipped_reasons": _reasons(t.report)}

    def _check(self):
        """Verifies every invariant of the native structure; raises KVIndexError naming the first that is broken. O(size of the index)."""
        cdef string broken = self.ix.check()
        if not broken.empty():
            raise KVIndexError(f"broken invariant: {broken.decode()}")


cdef int _ref(object s, str what, list alive, StrRef& out) except -1:
    if s is None:
        return 0
    if not isinstance(s, str):
        raise InvalidTypeError(f"{what} is {s!r}; it must be a str or None")
    b = s.encode("utf-8", "surrogateescape")
    alive.append(b)
    out.p = <const char*>b
    out.n = <uint32_t>len(b)
    return 0


cdef int _group(object event, Event& e) except -1:
    e.group = -1 if event.group_idx is None else _whole(event.group_idx, "group_idx", 0, 1 << 31)
    return 0


cdef uint64_t _seed(object seed) except? 0:
    try:
        n = seed.__index__()
    except (AttributeError, TypeError):
        raise InvalidTypeError(f"hash_seed is {seed!r}; it must be an int") from None
    if not 0 <= n < 1 << 64:
        raise InvalidValueError(f"hash_seed is {n}; it must be 0 to 2**64 - 1")
    return n


cdef object _hash_array(object tokens, object block_size, object hash_seed, object lora_name, object cache_salt, object extra_keys, bint rolled):
    cdef _Ints t = _tokens(tokens)
    cdef uint32_t size = _whole(block_size, "block_size", 1, 65536)
    cdef uint64_t seed = _seed(hash_seed)
    cdef Prompt p
    _prompt(t, lora_name, cache_salt, extra_keys, size, seed, p)
    out = np.empty(t.n // size, dtype=np.uint64)
    cdef uint64_t[::1] view = out
    if len(out):
        with nogil:
            hash_prompt(p, size, seed, rolled, &view[0])
    return out


def local_hashes(tokens, *, block_size=16, hash_seed=1337, lora_name=None):
    """uint64[len(tokens) // block_size]: the hash of each complete block's content, XXH3-64 of its tokens as little-endian u32
    (Dynamo's scheme, seed 1337; Mooncake RFC #1527). Any thread; releases the interpreter lock."""
    return _hash_array(tokens, block_size, hash_seed, lora_name, None, None, False)


def prefix_hashes(tokens, *, block_size=16, hash_seed=1337, lora_name=None, cache_salt=None, extra_keys=None):
    """uint64[len(tokens) // block_size]: the rolling hash of the whole prefix up to each complete block. Any thread; releases the
    interpreter lock."""
    return _hash_array(tokens, block_size, hash_seed, lora_name, cache_salt, extra_keys, True)


def scan_batch(payload):
    """``(ts, dp_rank, [(kind, reason, offset, bytes), ...])`` of a payload: where its events lie and which cannot be applied, and why.
    Raises EventDecodeError if the payload is no batch."""
    cdef _Bytes b = _Bytes(payload)
    cdef Batch batch
    cdef DecodeFault fault
    cdef Event e
    if not decode_batch(<const uint8_t*>b.view.buf, b.view.len, batch, fault):
        raise EventDecodeError(f"payload of {b.view.len} bytes is no event batch: {fault.what.decode()} at byte {fault.offset}", fault.offset)
    kinds = ("stored", "removed", "cleared", "other")
    return (batch.ts, None if batch.dp_rank < 0 else batch.dp_rank,
            [(kinds[<int>e.kind], reason_name(e.bad).decode() if <int>e.bad else None, e.offset, e.bytes) for e in batch.events])


def _isas():
    return _ISAS[:<int>best_isa() + 1]


def _xxh3_64(bytes data, seed, isa=None):
    cdef uint64_t s = _seed(seed)
    if isa is None:
        return xxh3_64(<const char*>data, len(data), s)
    return xxh3_64_with(<const char*>data, len(data), s, <Isa><int>_ISAS.index(isa))
