# Every declaration of native code, and nothing else.
from cpython.buffer cimport Py_buffer
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool as cbool
from libcpp.map cimport map as cmap
from libcpp.pair cimport pair
from libcpp.set cimport set as cset
from libcpp.string cimport string
from libcpp.vector cimport vector

cdef extern from "_tokens.hpp" namespace "kvindex":
    const cbool LISTS_MAY_CHANGE "kvindex::kListsMayChange"
    int int_width(const Py_buffer*, cbool* is_signed)
    Py_ssize_t read_tokens(PyObject** items, Py_ssize_t n, uint32_t* out)
    Py_ssize_t narrow_tokens(const char* p, Py_ssize_t n, Py_ssize_t stride, int width, cbool is_signed, uint32_t* out)
    Py_ssize_t first_negative(const int* p, Py_ssize_t n)

cdef extern from "_native/concurrent_index.hpp" namespace "kvindex" nogil:
    ctypedef enum Reason "kvindex::Reason":
        pass
    ctypedef enum EventKind "kvindex::EventKind":
        pass
    ctypedef enum Hashed "kvindex::Hashed":
        pass
    EventKind STORED "kvindex::EventKind::stored"
    EventKind REMOVED "kvindex::EventKind::removed"
    EventKind CLEARED "kvindex::EventKind::cleared"
    ctypedef enum State "kvindex::State":
        pass
    const char* reason_name(Reason)
    const uint32_t REASONS "kvindex::kReasons"
    const uint32_t NO_MEDIUM "kvindex::kNone"
    const uint8_t REUSED "kvindex::kReused"
    const double NEVER "kvindex::kNever"

    cppclass StrRef:
        const char* p
        uint32_t n

    cppclass Event:
        Event()
        EventKind kind
        Reason bad
        cbool has_parent
        uint32_t offset, bytes, hash_at, n_hashes, token_at, n_tokens, lookahead
        uint64_t parent, block_size
        int64_t group, window, lora_id
        StrRef medium, lora_name, lora_id_name, spec_kind, cache_salt
        const uint8_t* extra_keys
        uint32_t extra_keys_bytes
        Hashed hashed

    cppclass Batch:
        double ts
        int64_t dp_rank
        vector[Event] events
        vector[uint32_t] tokens
        vector[uint64_t] hashes

    cppclass DecodeFault:
        const char* what
        size_t offset

    cbool decode_batch(const uint8_t*, size_t, Batch&, DecodeFault&) except +

    cppclass Report:
        uint64_t stored, removed, cleared, parked, skipped, errors
        uint64_t* reasons

    cppclass Hit:
        uint64_t pod
        uint32_t rank, medium, blocks
        State state
        uint8_t says

    cppclass Hits:
        uint32_t size()
        const Hit& operator[](uint32_t)

    cppclass MatchResult:
        Hits hits
        uint32_t best
        uint64_t compared

    cppclass Weights:
        vector[pair[string, double]] credits
        double context, request, tie, half_life
        cbool degraded

    cppclass LoadChoice "kvindex::Loads::Choice":
        uint32_t at, candidates
        uint64_t pod, reused
        int64_t rank
        cbool whole
        double cost

    cppclass WorkerLoad "kvindex::Loads::Load":
        uint64_t pod, prefill, context, requests
        int64_t rank
        cbool there

    cppclass NativeLoads "kvindex::Loads":
        NativeLoads(Weights, uint64_t start) except +
        void prefilled(uint32_t at, uint64_t pod, uint64_t prefill)
        void finished(uint32_t at, uint64_t pod, uint64_t prefill, uint64_t context)

    cppclass Prompt:
        const uint32_t* tokens
        uint64_t n_tokens
        cbool adapted, keyed
        string adapter
        const uint64_t* prefixes
        uint64_t n_prefixes

    cbool read_extra(const uint8_t*, uint64_t, const string& salt, uint64_t seed, uint64_t blocks, Prompt&) except +
    void hash_prompt(const Prompt&, uint32_t block_size, uint64_t seed, cbool rolled, uint64_t* out) except +

    cppclass PodNames:
        PodNames(vector[string]) except +

    ctypedef enum Taken "kvindex::Taken":
        NO_BATCH "kvindex::Taken::no_batch"
        BUSY "kvindex::Taken::busy"
        UNKNOWN "kvindex::Taken::unknown"

    struct PodFigures:
        int64_t rank
        uint64_t blocks, parked
        int state
        int64_t last_seq
        cbool in_doubt
        cset[uint32_t] lookahead

    cppclass Place:
        pass

    struct HashedHead:
        StrRef pod, model
        int64_t rank, seq

    void hash_payload(uint32_t block_size, uint64_t seed, HashedHead, const uint8_t*, size_t, Batch&, vector[uint8_t]&) except +

    struct StreamPlace:
        int64_t rank
        uint64_t seq, fingerprint
        double ts
        cbool whole
        string model

    cppclass SnapshotBytes:
        const uint8_t* data()
        uint64_t size()

    struct SnapshotHeader:
        uint64_t seed
        uint32_t block_size, max_parked, set_presence

    SnapshotHeader native_head "kvindex::snapshot_head" (const uint8_t*, uint64_t, uint64_t file_bytes) except +

    struct Totals:
        uint64_t batches, bad_payloads, events_stored, events_removed, events_cleared
        uint64_t blocks_stored, blocks_removed, blocks_parked, skipped, errors

    struct Figures "kvindex::Index::Figures":
        uint64_t blocks, chains, sets, holders, pods, workers, parked, guesses, bytes
        uint64_t shed_blocks, shed_chains, shed_parked, shed_guesses, expired_blocks, expired_chains, expired_guesses

    struct Stats:
        Figures figures
        Totals totals
        Report report

    # Never waits.
    cppclass PodDirectory:
        uint64_t find(const string&) except +
        cbool has(uint64_t) except +
        string name(uint64_t, cbool& known) except +
        vector[string] some(size_t most, size_t& all) except +

    cppclass ConcurrentIndex:
        ConcurrentIndex(uint32_t block_size, uint64_t seed, cbool set_presence, uint32_t max_parked, uint64_t max_bytes, double ttl) except +
        uint64_t open_pod(const string&) except +
        cbool remove_pod(uint64_t) except +
        void configure(uint64_t, int set_presence, cbool has_media, const vector[string]&, int64_t chunk, int64_t max_blocks) except +
        void ignore_media(uint64_t, const vector[string]&) except +
        void engine(uint64_t, int engine, int eagle, const vector[int64_t]& groups, int hybrid) except +
        void mark(uint64_t, int64_t rank, int state) except +
        void trust(int64_t until)
        void join(vector[ConcurrentIndex*]) except +
        void clear_worker(uint64_t, int64_t rank) except +
        Taken ingest(uint64_t, const uint8_t*, uint64_t, const string& model, int64_t rank, int64_t seq, cbool wait, Report&, double& ts,
                     int64_t& dp_rank, DecodeFault&) except +
        cbool ingest_hashed(const uint8_t*, uint64_t, uint64_t& batches, uint64_t& unsound) except +
        Taken apply(uint64_t, int64_t rank, const string& model, const Batch&, const Place&, Report&) except +
        cbool match(const Prompt&, const string& model, PodNames*, cbool only_exact, cbool wait, MatchResult&) except +
        cbool choose(NativeLoads&, const Hits&, uint64_t n_tokens, const string& model, PodNames*, double now, cbool wait, LoadChoice&) except +
        uint32_t reserve(NativeLoads&, uint64_t, int64_t rank, uint64_t prefill, uint64_t context) except +
        vector[WorkerLoad] loads(NativeLoads&) except +
        void guess(uint64_t, int64_t rank, const string& model, const Prompt&, double until) except +
        vector[pair[uint32_t, vector[uint64_t]]] locals(uint64_t, int64_t rank, const string& model, const Prompt&) except +
        cbool hint(uint64_t, int64_t rank, const string& model, uint32_t lookahead, const uint64_t*, uint32_t, double until) except +
        double next_expiry()
        double probes()
        void expire(double now) except +
        int state(uint64_t) except +
        vector[PodFigures] pod_figures(uint64_t) except +
        vector[StreamPlace] places(uint64_t) except +
        void save(SnapshotBytes&) except +
        void load(const uint8_t*, uint64_t) except +
        const PodDirectory& directory()
        Stats stats() except +
        cmap[uint32_t, string] media(const Hits&) except +
        string check() except +

cdef extern from "_native/wire/json_tokens.hpp" namespace "kvindex" nogil:
    cdef struct JsonTokens:
        size_t n
        size_t begin
        size_t end
    JsonTokens json_tokens(const char*, size_t, const char* name, size_t name_bytes, uint32_t* out)

cdef extern from "_native/wire/peek.hpp" namespace "kvindex" nogil:
    struct BatchPeek:
        cbool timed
        double ts
        uint64_t events
        int64_t rank

    BatchPeek native_peek "kvindex::peek_batch" (const uint8_t*, size_t, cbool whole)

cdef extern from "_native/wire/fields.hpp" namespace "kvindex" nogil:
    StrRef event_field(const uint8_t*, size_t, EventKind, const char* name, size_t)
    StrRef event_text(const uint8_t*, size_t, EventKind, const char* name, size_t)

cdef extern from "_native/hash/xxh3.hpp" namespace "kvindex" nogil:
    ctypedef enum Isa "kvindex::Isa":
        pass
    Isa best_isa()
    uint64_t xxh3_64(const void*, size_t, uint64_t, Isa)

cdef extern from "Python.h":
    bint PyUnicode_IS_COMPACT_ASCII(object)
    void* PyUnicode_DATA(object)
    Py_ssize_t PyUnicode_GET_LENGTH(object)
