// One event batch, as an engine wrote it, decoded into flat scratch arrays.
//
// A whole payload is decoded before any of it is applied: if its last event is cut short, its first must not have
// changed the index. The batch below holds the decoded payload. Its events point into two shared arrays (hashes,
// tokens) and into the payload (strings), so a scratch batch that is used again costs no allocation at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/scratch.hpp"
#include "wire/msgpack.hpp"

namespace kvindex {

// A string of the payload, valid as long as the payload's buffer. It may contain any bytes, not only UTF-8.
struct StrRef {
    const char* p = nullptr;
    uint32_t n = 0;

    bool set() const { return p != nullptr; }
};

// The most tokens behind a block that its hash may cover: multi-token prediction looks some tokens ahead.
inline constexpr uint32_t kMostLookahead = 64;

enum class EventKind : uint8_t { stored, removed, cleared, other };

// The reason why an event, or a part of it, was not applied. Decoding finds the first four after `none`, placing finds
// the others. They share one enum because reports count them side by side.
enum class Reason : uint8_t {
    none,
    unknown_event,
    bad_event,
    bad_token,
    block_size_mismatch,
    partial_block,
    unknown_hash,
    duplicate_hash,
    parked_full,
    misaligned,
    over_budget,
    shed,
    over_limit,
    ignored_medium,
    pod_removed,
    hash_conflict,
    mixed_lookahead,
    COUNT
};

inline const char* reason_name(Reason r) {
    switch (r) {
        case Reason::none: return "none";
        case Reason::unknown_event: return "unknown_event";
        case Reason::bad_event: return "bad_event";
        case Reason::bad_token: return "bad_token";
        case Reason::block_size_mismatch: return "block_size_mismatch";
        case Reason::partial_block: return "partial_block";
        case Reason::unknown_hash: return "unknown_hash";
        case Reason::duplicate_hash: return "duplicate_hash";
        case Reason::parked_full: return "parked_full";
        case Reason::misaligned: return "misaligned";
        case Reason::over_budget: return "over_budget";
        case Reason::shed: return "shed";
        case Reason::over_limit: return "over_limit";
        case Reason::ignored_medium: return "ignored_medium";
        case Reason::pod_removed: return "pod_removed";
        case Reason::hash_conflict: return "hash_conflict";
        case Reason::mixed_lookahead: return "mixed_lookahead";
        case Reason::COUNT: break;
    }
    return "?";
}

// The form of a stored event's content: tokens, or hashes of the interoperable scheme. The hashes follow the event's
// names in Batch::hashes, `factor` for each, and no payload of an engine has them. Absent: the event had tokens, which
// no index of this block size places (wire/hashed.hpp).
enum class Hashed : uint8_t { tokens, local, prefix, absent };

struct Event {
    EventKind kind = EventKind::other;
    Reason bad = Reason::none;  // not `none`: nothing of the event is applied, and it has no hashes and no tokens
    bool has_parent = false;
    bool many = false;    // several events of kind `other`: `parent` of them are unknown, `block_size` bad
    bool like = false;    // equal to the event before except for hashes, parent and tokens
    uint32_t offset = 0;  // the place of the event in the payload, and its length there
    uint32_t bytes = 0;
    uint32_t hash_at = 0;  // its part of Batch::hashes
    uint32_t n_hashes = 0;
    uint32_t token_at = 0;  // its part of Batch::tokens; of a removed event: the remaining copies of each hash
    uint32_t n_tokens = 0;
    uint32_t lookahead = 0;  // tokens behind each block that its hash covers: behind the event's tokens, block by block
    uint64_t parent = 0;
    uint64_t block_size = 0;  // 0: nil, absent or 0
    int64_t group = -1;       // -1: unset
    int64_t window = 0;       // 0: unset
    int64_t lora_id = 0;      // 0: unset
    StrRef medium;
    StrRef lora_name;
    StrRef lora_id_name;  // a lora_id that is a string, which is a name
    StrRef spec_kind;
    StrRef cache_salt;
    const uint8_t* extra_keys = nullptr;  // the list as it is in the payload, with its header; nullptr: nil or absent
    uint32_t extra_keys_bytes = 0;
    Hashed hashed = Hashed::tokens;
    uint16_t factor = 1;  // index blocks in one of the event's blocks, if hashes are given
};

struct Batch {
    double ts = 0.0;       // seconds
    int64_t dp_rank = -1;  // -1: unset
    std::vector<Event> events;
    Scratch<uint32_t> tokens;
    Scratch<uint64_t> hashes;
    uint32_t joined = 0;  // elements without an Event of their own

    void reset() {
        joined = 0;
        ts = 0.0;
        dp_rank = -1;
        events.clear();
        tokens.clear();
        hashes.clear();
    }
    // Whether any of its events clears a whole worker instead of one medium.
    bool clears() const {
        for (const Event& e : events)
            if (e.kind == EventKind::cleared && e.bad == Reason::none && !e.medium.set()) return true;
        return false;
    }
};

// The fault of a payload that is not a batch, and its offset.
struct DecodeFault {
    const char* what = nullptr;
    size_t offset = 0;
};

namespace events_detail {

// The fields that are read, in the order of BlockStored's array form (vLLM 0.9-0.23, SGLang <= 0.5.19).
enum Field : uint8_t {
    f_type,
    f_hashes,
    f_parent,
    f_tokens,
    f_block_size,
    f_lora_id,
    f_medium,
    f_lora_name,
    f_extra_keys,
    f_group,
    f_spec_kind,
    f_window,
    f_cache_salt,
    f_remaining,
    f_lookahead,
    f_unknown
};

constexpr uint32_t bit(Field f) { return 1u << f; }

constexpr Field stored_fields[] = {f_type,   f_hashes,    f_parent,     f_tokens, f_block_size, f_lora_id,
                                   f_medium, f_lora_name, f_extra_keys, f_group,  f_spec_kind,  f_window};
constexpr Field removed_fields[] = {f_type, f_hashes, f_medium, f_group};
constexpr uint32_t removed_mask = bit(f_type) | bit(f_hashes) | bit(f_medium) | bit(f_group) | bit(f_remaining);

template <size_t N>
bool is(const uint8_t* p, const char (&name)[N]) {
    return std::memcmp(p, name, N - 1) == 0;
}

// The lengths of the names distinguish them almost completely, so a key costs a jump and one or two comparisons, whose
// length the compiler knows.
inline Field field_of(const uint8_t* p, uint32_t n) {
    switch (n) {
        case 4: return is(p, "type") ? f_type : f_unknown;
        case 6: return is(p, "medium") ? f_medium : f_unknown;
        case 7: return is(p, "lora_id") ? f_lora_id : f_unknown;
        case 9:
            if (is(p, "token_ids")) return f_tokens;
            if (is(p, "lora_name")) return f_lora_name;
            return is(p, "group_idx") ? f_group : f_unknown;
        case 10:
            if (is(p, "block_size")) return f_block_size;
            if (is(p, "extra_keys")) return f_extra_keys;
            return is(p, "cache_salt") ? f_cache_salt : f_unknown;
        case 12: return is(p, "block_hashes") ? f_hashes : f_unknown;
        case 17: return is(p, "parent_block_hash") ? f_parent : f_unknown;
        case 18: return is(p, "kv_cache_spec_kind") ? f_spec_kind : f_unknown;
        case 19: return is(p, "lookahead_token_ids") ? f_lookahead : f_unknown;
        case 21: return is(p, "remaining_copy_counts") ? f_remaining : f_unknown;
        case 28: return is(p, "kv_cache_spec_sliding_window") ? f_window : f_unknown;
        default: return f_unknown;
    }
}

inline EventKind kind_of(const uint8_t* p, uint32_t n) {
    switch (n) {
        case 11: return is(p, "BlockStored") ? EventKind::stored : EventKind::other;
        case 12: return is(p, "BlockRemoved") ? EventKind::removed : EventKind::other;
        case 16: return is(p, "AllBlocksCleared") ? EventKind::cleared : EventKind::other;
        default: return EventKind::other;
    }
}

// An engine hash as u64. Of bytes (vLLM's sha256 and xxhash digests, of 16, 32 or 64) the last eight count, because
// vLLM itself makes its integers from these. So a stream in either form names the same blocks.
inline bool fold_hash(const MsgValue& v, uint64_t& hash) {
    switch (v.type) {
        case MsgType::uint:
        case MsgType::negative: hash = v.u; return true;
        case MsgType::bin: {
            if (v.n == 0) return false;
            if (v.n >= 8) {
                hash = load_be64(v.data + v.n - 8);
                return true;
            }
            hash = 0;
            for (uint32_t i = 0; i < v.n; ++i) hash = hash << 8 | v.data[i];
            return true;
        }
        default: return false;
    }
}

// A batch's time in seconds. Returns false if it is not a number.
inline bool seconds(const MsgValue& v, double& ts) {
    // Seconds reach 1e11 in the year 5138, milliseconds did in 1973. So a larger integer is in milliseconds.
    constexpr uint64_t ms_from = 100000000000u;
    switch (v.type) {
        case MsgType::real: ts = v.d; return true;
        case MsgType::uint:
            ts = v.u > ms_from ? static_cast<double>(v.u) / 1000.0 : static_cast<double>(v.u);
            return true;
        case MsgType::negative: ts = static_cast<double>(static_cast<int64_t>(v.u)); return true;
        default: return false;
    }
}

// The data-parallel rank that a batch names, or -1 for nil. Returns false if it is not a rank.
inline bool rank_of(const MsgValue& v, int64_t& rank) {
    if (!v.is_nil() && (!v.is_uint() || v.u > INT32_MAX)) return false;
    rank = v.is_nil() ? -1 : static_cast<int64_t>(v.u);
    return true;
}

// Reads one batch. Every member returns false only if the payload itself is unsound (the reader then has the fault). A
// fault of one field is kept in bad_ and judged when the event's type is known. A map may name its type last, and a
// fault in a field that this type does not have does not matter.
class BatchDecoder {
public:
    BatchDecoder(const uint8_t* p, size_t n, Batch& out, bool others) : r_(p, n), out_(out), others_(others) {}

    bool batch() {
        if (r_.left() == 0) return r_.fail("the payload is empty", r_.p);
        if (r_.left() > UINT32_MAX) return r_.fail("the payload is longer than 4 GiB", r_.p);
        const uint8_t* const at = r_.p;
        MsgValue v;
        if (!r_.next(v)) return false;
        if (v.type == MsgType::array) {
            if (v.n < 2) return r_.fail("a batch array has a timestamp and events, this one is shorter", at);
            if (!timestamp() || !events()) return false;
            if (v.n > 2 && !rank()) return false;
            if (v.n > 3 && !r_.skip(v.n - 3)) return false;
        } else if (v.type == MsgType::map) {
            if (!batch_map(v.n, at)) return false;
        } else {
            return r_.fail("a batch is an array or a map, this is neither", at);
        }
        return r_.p == r_.end || r_.fail("bytes follow the end of the batch", r_.p);
    }

    const MsgReader& reader() const { return r_; }

private:
    bool batch_map(uint32_t pairs, const uint8_t* map_at) {
        bool has_ts = false;
        bool has_events = false;
        for (uint32_t i = 0; i < pairs; ++i) {
            MsgValue key;
            if (!r_.next(key)) return false;
            if (key.type == MsgType::str && key.n == 2 && is(key.data, "ts")) {
                has_ts = true;
                if (!timestamp()) return false;
            } else if (key.type == MsgType::str && key.n == 6 && is(key.data, "events")) {
                has_events = true;
                out_.events.clear();
                out_.tokens.clear();
                out_.hashes.clear();
                out_.joined = 0;
                if (!events()) return false;
            } else if (key.type == MsgType::str && key.n == 18 && is(key.data, "data_parallel_rank")) {
                if (!rank()) return false;
            } else if (!r_.skip(key.children() + 1)) {
                return false;
            }
        }
        if (!has_ts) return r_.fail("a batch map has a key ts, this one has none", map_at);
        if (!has_events) return r_.fail("a batch map has a key events, this one has none", map_at);
        return true;
    }

    bool timestamp() {
        const uint8_t* const at = r_.p;
        MsgValue v;
        if (!r_.next(v)) return false;
        return seconds(v, out_.ts) || r_.fail("the batch's timestamp is no number", at);
    }

    bool rank() {
        const uint8_t* const at = r_.p;
        MsgValue v;
        if (!r_.next(v)) return false;
        return rank_of(v, out_.dp_rank) ||
               r_.fail("the batch's data_parallel_rank is neither nil nor a non-negative 32-bit integer", at);
    }

    bool events() {
        const uint8_t* const at = r_.p;
        MsgValue v;
        if (!r_.next(v)) return false;
        if (v.type != MsgType::array) return r_.fail("the batch's events are no array", at);
        before_ = nullptr;
        for (uint32_t i = 0; i < v.n; ++i) {
            if (!event()) return false;
        }
        return true;
    }

    bool event() {
        const uint8_t* const at = r_.p;
        if (before_ != nullptr && alike()) return true;
        out_.events.emplace_back();
        begin(at);
        MsgValue v;
        if (!r_.next(v)) return false;
        if (v.type == MsgType::array) {
            if (!event_array(v.n)) return false;
        } else if (v.type == MsgType::map) {
            if (!event_map(v.n)) return false;
        } else {
            e_->bad = Reason::bad_event;
        }
        e_->bytes = static_cast<uint32_t>(r_.p - at);
        judge();
        if (e_->kind == EventKind::other && !others_ && !e_->medium.set()) {
            join_others();
            before_ = nullptr;
            return true;
        }
        const bool fit = e_->kind == EventKind::stored && e_->bad == Reason::none && !repeated_ && parts_.ordered();
        before_ = fit ? at : nullptr;
        return true;
    }

    void begin(const uint8_t* at) {
        e_ = &out_.events.back();
        e_->offset = static_cast<uint32_t>(at - r_.begin);
        e_->hash_at = static_cast<uint32_t>(out_.hashes.size());
        e_->token_at = static_cast<uint32_t>(out_.tokens.size());
        seen_ = 0;
        bad_ = 0;
        bad_token_ = false;
        repeated_ = false;
        remaining_ = lookahead_ = nullptr;
        pairs_ = false;
        parts_ = Parts();
    }

    // Consecutive events of unknown kinds that name no medium are kept as one. Kept separately, two million nils in 1.9
    // MB took 320 MB.
    void join_others() {
        const bool unknown = e_->bad == Reason::unknown_event;
        const size_t n = out_.events.size();
        if (n > 1 && out_.events[n - 2].many) {
            out_.events.pop_back();
            ++out_.joined;
        } else {
            e_->many = true;
            e_->has_parent = false;
            e_->parent = e_->block_size = 0;
        }
        Event& all = out_.events.back();
        ++(unknown ? all.parent : all.block_size);
    }

    // The events of a batch differ in hashes, parent and tokens, and their other bytes are the same. Comparing those
    // bytes with the event before is faster than reading them: it saves 39 of 217 ns for one block an event, all
    // included.
    bool alike() {
        if (patience_ != 0) return --patience_, false;
        const uint8_t* const at = r_.p;
        const Parts was = parts_;
        const uint8_t* const before = before_;
        const Event last = out_.events.back();
        out_.events.push_back(last);
        begin(at);
        e_->like = true;
        const auto same = [&](const uint8_t* from, const uint8_t* to) {
            const size_t n = static_cast<size_t>(to - from);
            if (r_.left() < n || std::memcmp(r_.p, from, n) != 0) return false;
            r_.p += n;
            return true;
        };
        if (same(before, was.at[0]) && field(f_hashes) && same(was.at[1], was.at[2]) && field(f_parent) &&
            same(was.at[3], was.at[4]) && field(f_tokens) &&
            (!was.at[6] || (same(was.at[5], was.at[6]) && field(f_lookahead))) && bad_ == 0 && !bad_token_ &&
            same(was.at[was.at[6] ? 7 : 5], before + last.bytes) && look_ahead()) {
            e_->bytes = static_cast<uint32_t>(r_.p - at);
            e_->n_hashes = static_cast<uint32_t>(out_.hashes.size()) - e_->hash_at;
            e_->n_tokens = static_cast<uint32_t>(out_.tokens.size()) - e_->token_at;
            if (e_->lookahead) e_->n_tokens -= e_->n_hashes * e_->lookahead;
            before_ = at;
            return true;
        }
        // If groups take turns, no two consecutive events are alike.
        patience_ = 8;
        r_.p = at;
        r_.fault = nullptr;
        out_.hashes.resize(e_->hash_at);
        out_.tokens.resize(e_->token_at);
        out_.events.pop_back();
        return false;
    }

    bool event_array(uint32_t n) {
        if (n == 0) {
            e_->bad = Reason::bad_event;
            return true;
        }
        MsgValue tag;
        if (!r_.next(tag)) return false;
        if (!set_kind(tag)) return r_.skip(tag.children() + n - 1);
        // Every release writes every element up to block_size, so a shorter array was cut.
        if (e_->kind == EventKind::stored && n < 5) e_->bad = Reason::bad_event;
        const Field* fields = stored_fields;
        size_t known = 1;
        if (e_->kind == EventKind::stored) known = sizeof stored_fields / sizeof *stored_fields;
        if (e_->kind == EventKind::removed) {
            fields = removed_fields;
            known = sizeof removed_fields / sizeof *removed_fields;
        }
        uint32_t i = 1;
        for (; i < n && i < known; ++i) {
            if (!(fields[i] == f_lora_name ? array_element_7() : field(fields[i]))) return false;
        }
        return r_.skip(n - i);
    }

    bool event_map(uint32_t pairs) {
        for (uint32_t i = 0; i < pairs; ++i) {
            MsgValue key;
            // All names are shorter than 32 bytes, and every encoder writes such a header in one byte.
            if (r_.p != r_.end && (*r_.p & 0xe0) == 0xa0 && r_.left() > (*r_.p & 0x1fu)) {
                key.type = MsgType::str;
                key.n = *r_.p & 0x1fu;
                key.data = r_.p + 1;
                r_.p += 1 + key.n;
            } else if (!r_.next(key)) {
                return false;
            }
            const Field f = key.type == MsgType::str ? field_of(key.data, key.n) : f_unknown;
            if (f == f_unknown) {
                if (!r_.skip(key.children() + 1)) return false;
            } else if (f == f_type) {
                MsgValue tag;
                if (!r_.next(tag)) return false;
                seen_ |= bit(f_type);
                if (!set_kind(tag) && !r_.skip(tag.children())) return false;
            } else if (!field(f)) {
                return false;
            }
        }
        // Mooncake's store publishes maps that name their kind differently. They are not broken, but of an unknown
        // kind.
        if (!(seen_ & bit(f_type))) e_->bad = Reason::unknown_event;
        return true;
    }

    bool set_kind(const MsgValue& tag) {
        const bool text = tag.type == MsgType::str;
        e_->kind = text ? kind_of(tag.data, tag.n) : EventKind::other;
        e_->bad = e_->kind == EventKind::other ? Reason::unknown_event : Reason::none;
        return text;
    }

    // Keeps the valid part of an event, now that its type and all its fields have been read.
    void judge() {
        Event& e = *e_;
        if (e.bad == Reason::none) {
            const bool hashes = (seen_ & bit(f_hashes)) != 0;
            if (e.kind == EventKind::stored) {
                if (bad_token_) e.bad = Reason::bad_token;
                if (bad_ != 0 || !hashes || (!bad_token_ && !look_ahead())) e.bad = Reason::bad_event;
            } else if (e.kind == EventKind::removed) {
                out_.tokens.resize(e.token_at);
                if ((bad_ & removed_mask) != 0 || !hashes || !remaining()) e.bad = Reason::bad_event;
            }
        }
        const bool sound = e.bad == Reason::none;
        if (!sound || e.kind == EventKind::cleared) out_.hashes.resize(e.hash_at);
        if (!sound || e.kind == EventKind::cleared) out_.tokens.resize(e.token_at);
        e.n_hashes = static_cast<uint32_t>(out_.hashes.size()) - e.hash_at;
        e.n_tokens = static_cast<uint32_t>(out_.tokens.size()) - e.token_at;
        if (e.lookahead) e.n_tokens -= e.n_hashes * e.lookahead;
    }

    // Of a repeated key, the last value counts, as in every decoder that fills a dictionary.
    bool field(Field f) {
        repeated_ |= (seen_ & bit(f)) != 0;
        seen_ |= bit(f);
        bad_ &= ~bit(f);
        switch (f) {
            case f_hashes: return part(0, &BatchDecoder::hashes);
            case f_parent: return part(2, &BatchDecoder::parent);
            case f_tokens: return part(4, &BatchDecoder::tokens);
            case f_block_size: return number(f, e_->block_size);
            case f_lora_id: return lora_id();
            case f_medium: return text(f, e_->medium);
            case f_lora_name: return text(f, e_->lora_name);
            case f_extra_keys: return extra_keys();
            case f_group: return number(f, e_->group, -1);
            case f_spec_kind: return text(f, e_->spec_kind);
            case f_window: return number(f, e_->window, 0);
            case f_cache_salt: return text(f, e_->cache_salt);
            case f_remaining:
                // Read once the event is certain to be a removal: a map may name its type last.
                remaining_ = r_.take_nil() ? nullptr : r_.p;
                if (!remaining_) return true;
                break;
            case f_lookahead: return part(6, &BatchDecoder::skip_lookahead);
            case f_type:
            case f_unknown: break;
        }
        return r_.skip(1);
    }

    // The beginning and end of a part that differs from event to event.
    bool part(size_t i, bool (BatchDecoder::*read)()) {
        parts_.at[i] = r_.p;
        const bool sound = (this->*read)();
        parts_.at[i + 1] = r_.p;
        return sound;
    }

    // In BlockStored's array form, element 7 is the LoRA name in vLLM; SGLang puts a map with the cache salt there.
    bool array_element_7() {
        if (r_.p == r_.end || ((*r_.p & 0xf0) != 0x80 && *r_.p != 0xde && *r_.p != 0xdf)) return field(f_lora_name);
        MsgValue v;
        if (!r_.next(v)) return false;
        for (uint32_t i = 0; i < v.n; ++i) {
            MsgValue key;
            if (!r_.next(key)) return false;
            const Field f = key.type == MsgType::str ? field_of(key.data, key.n) : f_unknown;
            const bool ours = f == f_cache_salt || f == f_lora_name;
            if (!(ours ? field(f) : r_.skip(key.children() + 1))) return false;
        }
        return true;
    }

    bool wrong(Field f, const MsgValue& v) {
        bad_ |= bit(f);
        return r_.skip(v.children());
    }

    bool text(Field f, StrRef& s) {
        s = StrRef{};
        if (r_.take_nil()) return true;
        MsgValue v;
        if (!r_.next(v)) return false;
        if (v.type == MsgType::str) {
            s.p = reinterpret_cast<const char*>(v.data);
            s.n = v.n;
            return true;
        }
        return wrong(f, v);
    }

    bool number(Field f, uint64_t& x) {
        x = 0;
        if (r_.take_nil()) return true;
        MsgValue v;
        if (!r_.next(v)) return false;
        if (!v.is_uint()) return wrong(f, v);
        x = v.u;
        return true;
    }

    bool number(Field f, int64_t& x, int64_t unset) {
        x = unset;
        if (r_.take_nil()) return true;
        MsgValue v;
        if (!r_.next(v)) return false;
        if (!v.is_uint() || v.u > INT64_MAX) return wrong(f, v);
        x = static_cast<int64_t>(v.u);
        return true;
    }

    bool parent() {
        e_->parent = 0;
        e_->has_parent = false;
        if (r_.take_nil()) return true;
        MsgValue v;
        if (!r_.next(v)) return false;
        e_->has_parent = fold_hash(v, e_->parent);
        return e_->has_parent || wrong(f_parent, v);
    }

    // Zero and negative ids mean "no LoRA" (AIBrix writes -1).
    bool lora_id() {
        e_->lora_id = 0;
        e_->lora_id_name = StrRef{};
        if (r_.take_nil()) return true;
        MsgValue v;
        if (!r_.next(v)) return false;
        switch (v.type) {
            case MsgType::negative: return true;
            case MsgType::uint:
                if (v.u > INT64_MAX) return wrong(f_lora_id, v);
                e_->lora_id = static_cast<int64_t>(v.u);
                return true;
            case MsgType::str:
                e_->lora_id_name.p = reinterpret_cast<const char*>(v.data);
                e_->lora_id_name.n = v.n;
                return true;
            default: return wrong(f_lora_id, v);
        }
    }

    bool hashes() {
        out_.hashes.resize(e_->hash_at);
        MsgValue v;
        if (!r_.next(v)) return false;
        if (v.type != MsgType::array) return wrong(f_hashes, v);
        const uint32_t n = v.n;
        out_.hashes.resize(e_->hash_at + size_t{n});
        uint64_t* const hash = out_.hashes.data() + e_->hash_at;
        for (uint32_t i = 0; i < n; ++i) {
            // Hashes fill the range, so all unsigned ones but one in 2^32 come in this form.
            if (r_.left() >= 9 && *r_.p == 0xcf) {
                hash[i] = load_be64(r_.p + 1);
                r_.p += 9;
                continue;
            }
            if (!r_.next(v)) return false;
            if (!fold_hash(v, hash[i])) {
                bad_ |= bit(f_hashes);
                return r_.skip(v.children() + n - i - 1);
            }
        }
        return true;
    }

    bool tokens() {
        out_.tokens.resize(e_->token_at);
        bad_token_ = pairs_ = false;
        MsgValue v;
        if (!r_.next(v)) return false;
        if (v.is_nil()) return true;
        if (v.type != MsgType::array) return wrong(f_tokens, v);
        const uint32_t n = v.n;
        out_.tokens.resize(e_->token_at + size_t{n});
        uint32_t* const token = out_.tokens.data() + e_->token_at;
        for (uint32_t i = 0; i < n;) {
            i += static_cast<uint32_t>(read_u32s(r_.p, r_.begin, r_.end, token + i, n - i));
            if (i == n) break;
            // A form that is longer than the number needs, a pair, a string or a sign; or the payload ends here.
            if (!r_.next(v)) return false;
            if (i == 0 && v.type == MsgType::array && v.n == 2) return pairs(n);
            if (!v.is_uint() || v.u > UINT32_MAX) {
                bad_token_ = true;
                return r_.skip(v.children() + n - i - 1);
            }
            token[i++] = static_cast<uint32_t>(v.u);
        }
        return true;
    }

    // SGLang with EAGLE writes pairs of a token and the token behind it. The header of the first pair has been read.
    // The first token of each pair is kept, and the second token of the last pair.
    bool pairs(uint32_t n) {
        uint32_t* const token = out_.tokens.data() + e_->token_at;
        MsgValue v;
        for (uint32_t i = 0; i < n; ++i) {
            if (i != 0) {
                if (!r_.next(v)) return false;
                if (v.type != MsgType::array || v.n != 2) return no_pair(v.children() + n - i - 1);
            }
            if (!r_.next(v)) return false;
            if (!v.is_uint() || v.u > UINT32_MAX || (i != 0 && v.u != behind_)) return no_pair(v.children() + n - i);
            token[i] = static_cast<uint32_t>(v.u);
            if (!r_.next(v)) return false;
            if (!v.is_uint() || v.u > UINT32_MAX) return no_pair(v.children() + n - i - 1);
            behind_ = static_cast<uint32_t>(v.u);
        }
        pairs_ = true;
        return true;
    }
    bool no_pair(uint64_t rest) {
        bad_token_ = true;
        return r_.skip(rest);
    }

    bool skip_lookahead() {
        lookahead_ = r_.take_nil() ? nullptr : r_.p;
        return !lookahead_ || r_.skip(1);
    }
    // Appends the lookahead tokens of every block to the event's tokens. Returns false unless there is one list for
    // each block and all lists have the same length.
    bool look_ahead() {
        e_->lookahead = 0;
        const uint32_t hashes = static_cast<uint32_t>(out_.hashes.size()) - e_->hash_at;
        const uint32_t n = static_cast<uint32_t>(out_.tokens.size()) - e_->token_at;
        if (pairs_) {
            if (lookahead_ != nullptr) return false;
            for (uint64_t j = 1; j <= hashes; ++j) {
                const uint64_t at = j * e_->block_size;
                out_.tokens.push_back(at < n ? out_.tokens[e_->token_at + at] : behind_);
            }
            e_->lookahead = hashes ? 1 : 0;
            return true;
        }
        if (lookahead_ == nullptr) return true;
        MsgReader r = r_;
        r.p = lookahead_;
        MsgValue v;
        if (!r.next(v) || v.type != MsgType::array || v.n != hashes) return false;
        for (uint32_t j = 0; j < hashes; ++j) {
            if (!r.next(v) || v.type != MsgType::array) return false;
            if (j != 0 && v.n != e_->lookahead) return false;
            if (v.n > kMostLookahead) return false;
            e_->lookahead = v.n;
            for (uint32_t left = v.n; left != 0; --left) {
                if (!r.next(v) || !v.is_uint() || v.u > UINT32_MAX) return false;
                out_.tokens.push_back(static_cast<uint32_t>(v.u));
            }
        }
        return true;
    }

    // The remaining copies of each removed hash, if given.
    bool remaining() {
        if (remaining_ == nullptr) return true;
        MsgReader r = r_;
        r.p = remaining_;
        MsgValue v;
        if (!r.next(v) || v.type != MsgType::array || v.n != out_.hashes.size() - e_->hash_at) return false;
        for (uint32_t left = v.n; left != 0; --left) {
            if (!r.next(v) || !v.is_uint()) return false;
            out_.tokens.push_back(v.u < UINT32_MAX ? static_cast<uint32_t>(v.u) : UINT32_MAX);
        }
        return true;
    }

    // A list with nil or a list for each block. The keys are read where they are used. This function verifies that they
    // can be read: strings, integers, bytes, floats, nil and lists of these.
    bool extra_keys() {
        e_->extra_keys = nullptr;
        e_->extra_keys_bytes = 0;
        if (r_.take_nil()) return true;
        const uint8_t* const at = r_.p;
        MsgValue v;
        if (!r_.next(v)) return false;
        if (v.type != MsgType::array) return wrong(f_extra_keys, v);
        for (uint32_t entries = v.n; entries != 0;) {
            const size_t nils = nil_run(r_.p, r_.left() < entries ? r_.left() : entries);
            r_.p += nils;
            entries -= static_cast<uint32_t>(nils);
            if (entries == 0) break;
            --entries;
            if (!r_.next(v)) return false;
            if (v.type != MsgType::array) {
                bad_ |= bit(f_extra_keys);
                return r_.skip(v.children() + entries);
            }
            for (uint64_t keys = v.n; keys != 0;) {
                if (!r_.next(v)) return false;
                --keys;
                if (v.type == MsgType::map || v.type == MsgType::ext) {
                    bad_ |= bit(f_extra_keys);
                    return r_.skip(v.children() + keys + entries);
                }
                keys += v.children();
                if (keys > r_.left()) return r_.fail("more items are declared than there are bytes left", r_.p);
            }
        }
        e_->extra_keys = at;
        e_->extra_keys_bytes = static_cast<uint32_t>(r_.p - at);
        return true;
    }

    // The beginning and end of an event's hashes, parent, tokens and lookahead tokens.
    struct Parts {
        const uint8_t* at[8] = {};
        bool ordered() const {
            return at[0] && at[1] <= at[2] && at[3] <= at[4] && at[4] && (!at[6] || at[5] <= at[6]);
        }
    };

    MsgReader r_;
    Batch& out_;
    const bool others_;
    Event* e_ = nullptr;
    uint32_t seen_ = 0;
    uint32_t bad_ = 0;
    bool bad_token_ = false;
    bool repeated_ = false;               // a field occurred twice
    const uint8_t* remaining_ = nullptr;  // the list of remaining copies, if there is one
    const uint8_t* lookahead_ = nullptr;  // the lists of lookahead tokens, if there are any
    bool pairs_ = false;                  // the tokens are pairs
    uint32_t behind_ = 0;                 // the second token of the last pair
    const uint8_t* before_ = nullptr;     // the event before, if the next event may be compared with it
    Parts parts_;                         // of the event that was read last or is being read
    uint32_t patience_ = 0;               // events that are read without a comparison first
};

}  // namespace events_detail

// Decodes one payload, [ts, events, data_parallel_rank] or a map of them, into `out`, in one pass over the bytes.
// Events are arrays that start with their tag or maps with a key `type`, in any mixture. Each event is judged
// separately: sound msgpack that is no sound event has `bad` set and does not affect the other events. Returns false if
// the bytes are not a batch: then `fault` has the reason and the place, and `out` must not be used. `others` false:
// events of unknown kinds are counted but not kept.
inline bool decode_batch(const uint8_t* p, size_t n, Batch& out, DecodeFault& fault, bool others = true) {
    out.reset();
    events_detail::BatchDecoder decoder(p, n, out, others);
    if (decoder.batch()) return true;
    const MsgReader& r = decoder.reader();
    fault.what = r.fault;
    fault.offset = static_cast<size_t>(r.fault_at - r.begin);
    return false;
}

}  // namespace kvindex
