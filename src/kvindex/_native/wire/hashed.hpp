// Hashed batches: the data that an index reads from a payload, with local hashes in place of tokens, extra keys,
// adapters and salts. A log consists of them, so no prompt is in it and its readers hash nothing. The form is ours: no
// engine writes it.
//
//   batch   u32 bytes behind it, f64 time, u64 fingerprint of the payload, pod, model, rank, number + 1 or 0;
//           sound, joined, number of events, events
//   event   head (bits h_...), fields unless `like`, bad, number of hashes, number of tokens;
//           parent, names, local hashes (of a removal: the copies that stay)
//
// Numbers are little-endian in seven bits a byte (LEB128), hashes in eight bytes, and texts follow their length plus
// one (0: unset). A payload that is no batch is not sound: its worker has lost events. The decoder of payloads has
// verified everything else already, and the reader here applies the same bounds: any bytes give a Batch that an index
// can take, or a fault.
#pragma once

#include <string>
#include <vector>

#include "wire/events.hpp"
#include "wire/msgpack.hpp"

namespace kvindex {

struct HashedHead {
    StrRef pod, model;
    int64_t rank = 0;
    int64_t seq = -1;  // -1: none
    uint64_t fingerprint = 0;
    double ts = 0;
    bool sound = true;
};

namespace hashed_detail {

constexpr unsigned h_kind = 3, h_parent = 4, h_many = 8, h_like = 16, h_hashed = 32, h_bad = 64;

class Writer {
public:
    explicit Writer(std::vector<uint8_t>& out) : out_(out) {}
    void number(uint64_t x) {
        for (; x >= 0x80; x >>= 7) out_.push_back(static_cast<uint8_t>(x | 0x80));
        out_.push_back(static_cast<uint8_t>(x));
    }
    template <class T>
    void raw(const T* from, size_t n) {
        const uint8_t* const p = reinterpret_cast<const uint8_t*>(from);
        out_.insert(out_.end(), p, p + n * sizeof(T));
    }
    void text(StrRef s) {
        number(s.set() ? uint64_t{s.n} + 1 : 0);
        if (s.set()) raw(s.p, s.n);
    }

private:
    std::vector<uint8_t>& out_;
};

class Reader {
public:
    Reader(const uint8_t* p, const uint8_t* end) : p_(p), end_(end) {}
    const uint8_t* at() const { return p_; }
    size_t left() const { return static_cast<size_t>(end_ - p_); }
    bool sound() const { return sound_; }
    bool fail() { return sound_ = false; }
    uint64_t number() {
        uint64_t x = 0;
        for (unsigned shift = 0; shift < 64 && p_ != end_; shift += 7) {
            const uint8_t byte = *p_++;
            x |= uint64_t{byte & 0x7fu} << shift;
            if (byte < 0x80) return x;
        }
        fail();
        return 0;
    }
    // A number up to `most`.
    uint64_t number(uint64_t most) {
        const uint64_t x = number();
        return x <= most ? x : fail();
    }
    // Copies `n` items and steps over them. Returns false if there are not as many.
    template <class T>
    bool raw(T* to, size_t n) {
        if (n > left() / sizeof(T)) return fail();
        if (n) std::memcpy(to, p_, n * sizeof(T));
        p_ += n * sizeof(T);
        return true;
    }
    StrRef text() {
        const uint64_t n = number();
        if (n == 0) return {};
        if (n - 1 > left()) return fail(), StrRef{};
        p_ += n - 1;
        return {reinterpret_cast<const char*>(p_ - (n - 1)), static_cast<uint32_t>(n - 1)};
    }

private:
    const uint8_t* p_;
    const uint8_t* const end_;
    bool sound_ = true;
};

inline uint32_t hashes_of(const Event& e) { return e.n_hashes * (e.hashed == Hashed::local ? 1u + e.factor : 1u); }

// Whether both events have the same fields, which are then written once.
inline bool are_alike(const Event& e, const Event& before) {
    return e.like && e.bad == Reason::none && before.bad == Reason::none && e.lookahead == before.lookahead &&
           e.factor == before.factor;
}

inline void write_event(Writer& to, const Batch& b, const Event& e, const Event* before) {
    const bool like = before && are_alike(e, *before), hashed = e.hashed == Hashed::local;
    to.number(static_cast<unsigned>(e.kind) | (e.has_parent ? h_parent : 0u) | (e.many ? h_many : 0u) |
              (like ? h_like : 0u) | (hashed ? h_hashed : 0u) | (e.bad != Reason::none ? h_bad : 0u));
    if (!like) {
        to.number(e.block_size);
        to.number(static_cast<uint64_t>(e.group) + 1);
        to.number(static_cast<uint64_t>(e.window));
        to.number(e.lookahead);
        to.number(e.factor);
        to.text(e.medium);
        to.text(e.spec_kind);
    }
    if (e.bad != Reason::none) to.number(static_cast<unsigned>(e.bad));
    to.number(e.n_hashes);
    to.number(e.n_tokens);
    if (e.has_parent || e.many) to.raw(&e.parent, 1);
    to.raw(b.hashes.data() + e.hash_at, hashes_of(e));
    if (e.kind == EventKind::removed)
        for (uint32_t i = 0; i < e.n_tokens; ++i) to.number(b.tokens[e.token_at + i]);
}

inline bool read_event(Reader& from, Batch& b) {
    const uint64_t head = from.number(127);
    if ((head & h_like) && b.events.empty()) return from.fail();
    b.events.emplace_back();
    Event& e = b.events.back();
    if (head & h_like) e = b.events[b.events.size() - 2];
    e.like = (head & h_like) != 0;
    e.has_parent = (head & h_parent) != 0;
    e.many = (head & h_many) != 0;
    if (e.like) {
        // No writer marks an event as like one of another kind, or as like a bad one.
        if (e.bad != Reason::none || (head & (h_bad | h_many)) || (head & h_kind) != static_cast<unsigned>(e.kind))
            return from.fail();
    } else {
        e.kind = static_cast<EventKind>(head & h_kind);
        e.block_size = from.number();
        e.group = static_cast<int64_t>(from.number(uint64_t{INT64_MAX} + 1) - 1);
        e.window = static_cast<int64_t>(from.number(INT64_MAX));
        e.lookahead = static_cast<uint32_t>(from.number(kMostLookahead));
        e.factor = static_cast<uint16_t>(from.number(UINT16_MAX));
        e.medium = from.text();
        e.spec_kind = from.text();
        if (head & h_bad) {
            const uint64_t why = from.number(static_cast<uint64_t>(Reason::COUNT) - 1);
            e.bad = static_cast<Reason>(why);
        }
    }
    e.hash_at = static_cast<uint32_t>(b.hashes.size());
    e.token_at = static_cast<uint32_t>(b.tokens.size());
    e.n_hashes = static_cast<uint32_t>(from.number(from.left() / sizeof(uint64_t)));
    e.n_tokens = static_cast<uint32_t>(from.number(UINT32_MAX));
    e.parent = 0;
    if (e.has_parent || e.many) from.raw(&e.parent, 1);
    if (!from.sound()) return false;
    const bool stored = e.kind == EventKind::stored, removed = e.kind == EventKind::removed;
    if ((e.bad != Reason::none || !(stored || removed)) && (e.n_hashes || e.n_tokens)) return from.fail();
    if ((head & h_hashed) && !stored) return from.fail();
    // Blocks that no index of this block size places have no content.
    e.hashed = (head & h_hashed) ? Hashed::local : stored && e.n_tokens ? Hashed::absent : Hashed::tokens;
    const size_t hashes = size_t{e.n_hashes} * (e.hashed == Hashed::local ? size_t{1} + e.factor : 1);
    if (hashes > from.left() / sizeof(uint64_t)) return from.fail();
    b.hashes.resize(e.hash_at + hashes);
    from.raw(b.hashes.data() + e.hash_at, hashes);
    if (removed && e.n_tokens) {
        if (e.n_tokens != e.n_hashes) return from.fail();
        b.tokens.resize(e.token_at + size_t{e.n_tokens});
        for (uint32_t i = 0; i < e.n_tokens; ++i)
            b.tokens[e.token_at + i] = static_cast<uint32_t>(from.number(UINT32_MAX));
    }
    return from.sound();
}

}  // namespace hashed_detail

// Appends a batch whose content has been hashed (hash/content.hpp).
inline void write_hashed(const HashedHead& head, const Batch& b, std::vector<uint8_t>& out) {
    using namespace hashed_detail;
    const size_t at = out.size();
    out.resize(at + sizeof(uint32_t));
    Writer to(out);
    to.raw(&head.ts, 1);
    to.raw(&head.fingerprint, 1);
    to.text(head.pod);
    to.text(head.model);
    to.number(static_cast<uint64_t>(head.rank));
    to.number(static_cast<uint64_t>(head.seq) + 1);
    to.number(head.sound);
    if (head.sound) {
        to.number(b.joined);
        to.number(b.events.size());
        for (size_t i = 0; i < b.events.size(); ++i) write_event(to, b, b.events[i], i ? &b.events[i - 1] : nullptr);
    }
    const uint32_t bytes = static_cast<uint32_t>(out.size() - at - sizeof(uint32_t));
    std::memcpy(out.data() + at, &bytes, sizeof bytes);
}

// Reads the batch at `p`. Its strings point into these bytes. Returns the number of bytes read; 0: they are not such a
// batch.
inline size_t read_hashed(const uint8_t* p, size_t n, HashedHead& head, Batch& b) {
    using namespace hashed_detail;
    b.reset();
    uint32_t bytes = 0;
    if (n < sizeof bytes) return 0;
    std::memcpy(&bytes, p, sizeof bytes);
    if (bytes > n - sizeof bytes) return 0;
    Reader from(p + sizeof bytes, p + sizeof bytes + bytes);
    from.raw(&head.ts, 1);
    from.raw(&head.fingerprint, 1);
    head.pod = from.text();
    head.model = from.text();
    head.rank = static_cast<int64_t>(from.number(INT32_MAX));
    head.seq = static_cast<int64_t>(from.number(uint64_t{INT64_MAX} + 1) - 1);
    head.sound = from.number(1) != 0;
    b.ts = head.ts;
    if (head.sound) {
        b.joined = static_cast<uint32_t>(from.number(UINT32_MAX));
        for (uint64_t events = from.number(from.left()); from.sound() && events != 0; --events) read_event(from, b);
    }
    return from.sound() && from.left() == 0 ? sizeof bytes + bytes : 0;
}

}  // namespace kvindex
