# Objects of callers as native memory, and native memory as objects. No pointer into an object is kept across a call
# that may run Python code. A buffer is exported for as long as it is read. Texts are copied, or held by the object that
# refers to them. A list that Python code may change is read as a tuple.

@freelist(8)
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

    cdef uint32_t* room(self, Py_ssize_t n) except NULL:
        self.n = n
        PyMem_Free(self.copy)
        self.copy = PyMem_Malloc(max(n, 1) * sizeof(uint32_t))
        if self.copy == NULL:
            raise CapacityError(f"no memory for {n} tokens")
        self.data = self.copy
        return <uint32_t*>self.copy

    cdef int take(self, object data, str what, int flags) except -1:
        if isinstance(data, (bytes, bytearray)) and flags != PyBUF_SIMPLE:
            raise InvalidTypeError(f"{what} is {type(data).__name__}; tokens_from_bytes says how to read bytes as tokens")
        if flags != PyBUF_SIMPLE and type(data) is not _ARRAY and isinstance(data, _ARRAY):
            arguments.unmasked(data, what)
        try:
            PyObject_GetBuffer(data, &self.view, flags)
        except (BufferError, TypeError, ValueError) as error:
            raise InvalidTypeError(f"{what} is {type(data).__name__} and cannot be read as bytes-like: {error}") from None
        self.viewed = True
        self.data = self.view.buf
        self.n = self.view.len
        if flags != PyBUF_SIMPLE:
            if self.view.ndim != 1:
                raise InvalidValueError(f"{what} has {self.view.ndim} dimensions; it must have one")
            self.n = self.view.shape[0]
        return 0


cdef _Ints _tokens(object tokens, str what="tokens"):
    cdef _Ints v = _Ints()
    cdef cbool is_signed
    cdef uint32_t* out
    cdef Py_ssize_t n, at = 0
    if PyObject_CheckBuffer(tokens):
        v.take(tokens, what, PyBUF_STRIDED_RO | PyBUF_FORMAT)
        n = v.n
        width = int_width(&v.view, &is_signed)
        if n == 0:
            return v
        if width == 0:
            raise InvalidTypeError(f"{what} has items of format {v.view.format.decode()!r}; {arguments.TOKENS_ARE}")
        if width == 4 and v.view.strides[0] == 4 and (<size_t>v.view.buf & 3) == 0:
            at = first_negative(<const int*>v.view.buf, n) if is_signed else n
        else:
            out = v.room(n)
            at = narrow_tokens(<const char*>v.view.buf, n, v.view.strides[0], width, is_signed, out)
        if at < n:
            arguments.token(memoryview(tokens)[at], what, at)
            raise InvalidValueError(f"{what} changed while it was read")
        return v
    if isinstance(tokens, (str, set, frozenset, dict)):
        raise InvalidTypeError(f"{what} is {type(tokens).__name__}; {arguments.TOKENS_ARE}")
    try:
        items = PySequence_Fast(tokens, "")
    except TypeError:
        raise InvalidTypeError(f"{what} is {type(tokens).__name__}; {arguments.TOKENS_ARE}") from None
    if LISTS_MAY_CHANGE and isinstance(items, list):
        items = PyList_AsTuple(items)
    n = PySequence_Fast_GET_SIZE(items)
    out = v.room(n)
    at = read_tokens(PySequence_Fast_ITEMS(items), n, out)
    if at < n and isinstance(items, list):
        # Objects other than plain ints run Python code, which may change a list. No Python code has
        # run before this point.
        items = PyList_AsTuple(items)
    if PySequence_Fast_GET_SIZE(items) != n:
        raise InvalidValueError(f"{what} changed while it was read")
    while at < n:
        out[at] = arguments.token(<object>PySequence_Fast_ITEMS(items)[at], what, at)
        at += 1
        at += read_tokens(PySequence_Fast_ITEMS(items) + at, n - at, out + at)
    return v


cdef _Ints _payload(object payload):
    cdef _Ints v = _Ints()
    v.take(payload, "payload", PyBUF_SIMPLE)
    return v


cdef int _text(object value, str what, string& out) except -1:
    if PyUnicode_CheckExact(value) and PyUnicode_IS_COMPACT_ASCII(value):
        out.assign(<const char*>PyUnicode_DATA(value), <size_t>PyUnicode_GET_LENGTH(value))
    else:
        out = arguments.utf8(value, what)
    return 0


cdef int _prompt(_Ints tokens, object lora_name, object cache_salt, object extra_keys, uint32_t block_size, uint64_t seed, Prompt& p) except -1:
    cdef string salt
    p.tokens = <const uint32_t*>tokens.data
    p.n_tokens = tokens.n
    if lora_name is not None:
        _text(lora_name, "lora_name", p.adapter)
        p.adapted = not p.adapter.empty()
    if cache_salt is None and extra_keys is None:
        return 0
    if cache_salt is not None:
        _text(cache_salt, "cache_salt", salt)
    cdef bytes packed = arguments.packed_keys(extra_keys)
    if not read_extra(<const uint8_t*><const char*>packed, len(packed), salt, seed, tokens.n // block_size, p):
        raise InvalidValueError(f"extra_keys {arguments.shown(extra_keys)} cannot be read; keys are str, int, bytes or (id, offset) pairs")
    return 0


# A Python call costs 0.2 us, and ingest would make two.
cdef int64_t _whole(object value, str what, int64_t high) except? -1:
    cdef int beyond = 0
    cdef int64_t n = PyLong_AsLongLongAndOverflow(value, &beyond) if PyLong_CheckExact(value) else -1
    return n if 0 <= n <= high and not beyond else arguments.whole(value, what, 0, high)


cdef bint _flag(object value, str what) except -1: return value if value is True or value is False else arguments.flag(value, what)


cdef void _refer(bytes text, StrRef* out):
    if text is not None:
        out.p, out.n = <const char*>text, <uint32_t>len(text)


cdef class PodSet:
    """PodSet(pods)
--

    A compiled filter for ``ready_pods``, from :meth:`PrefixIndex.pod_set`. It includes pods that are added later. Thread-safe."""

    cdef PodNames* names
    cdef readonly frozenset pods

    def __cinit__(self, pods):
        names = arguments.names(pods, "pods")
        self.names = new PodNames(names)
        self.pods = frozenset(name.decode("utf-8", "surrogateescape") for name in names)

    def __dealloc__(self): del self.names

    def __repr__(self): return f"PodSet({sorted(self.pods)})"


cdef class _Snapshot:
    """An index as bytes, for the buffer protocol."""

    cdef SnapshotBytes data

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, <void*>self.data.data(), self.data.size(), True, flags)


cdef class IngestReport:
    """IngestReport()
--

    The result of one batch or event. It can be copied and pickled.

    Attributes:
        stored: Engine hashes that were stored.
        removed: Engine hashes of which a copy was removed.
        cleared: Clear events that were applied.
        parked: Stored hashes that wait for their parent.
        skipped: Events and removed hashes that were not applied.
        errors: Those of them that were malformed.
        reasons: ``{reason: count}`` of the skipped ones.
        ts: Timestamp of the batch in seconds since 1970; None for a single event.
        dp_rank: Data-parallel rank that it was applied to.
    """

    cdef Report r
    cdef readonly uint64_t stored, removed, cleared, parked, skipped, errors
    cdef readonly object ts
    cdef readonly int64_t dp_rank

    def __init__(self): raise InvalidTypeError("an IngestReport is created by ingest only")

    def __reduce__(self):
        return _report, (*(getattr(self, name) for name in answers.REPORT), self.ts, self.dp_rank)

    cdef IngestReport done(self):
        self.stored, self.removed, self.cleared = self.r.stored, self.r.removed, self.r.cleared
        self.parked, self.skipped, self.errors = self.r.parked, self.r.skipped, self.r.errors
        return self

    @property
    def reasons(self):
        return _reasons(self.r)

    def __repr__(self):
        return f"IngestReport({', '.join(f'{k}={getattr(self, k)!r}' for k in answers.REPORT)})"


def _report(*values):
    cdef IngestReport report = IngestReport.__new__(IngestReport)
    *counts, reasons, report.ts, report.dp_rank = values
    report.r.stored, report.r.removed, report.r.cleared, report.r.parked, report.r.skipped, report.r.errors = counts
    for i in range(REASONS):
        report.r.reasons[i] = reasons.get(reason_name(<Reason>i).decode(), 0)
    return report.done()


cdef dict _reasons(Report& r): return {reason_name(<Reason>i).decode(): r.reasons[i] for i in range(REASONS) if r.reasons[i]}
