// SPDX-License-Identifier: Apache-2.0
//
// One event batch, as an engine wrote it, decoded into flat scratch arrays.
//
// A whole payload is decoded before anything of it is applied: a payload that turns out to be cut short in its
// last event must not have changed the index by its first. That needs somewhere to keep the decoded batch, and the
// batch below is that place: events point into two shared arrays (hashes, tokens) and into the payload (strings),
// so a scratch batch that is used again costs no allocation at all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace kvindex {

// A string of the payload. It is valid as long as the payload's buffer is; it may hold any bytes, not only UTF-8.
struct StrRef {
    const char* p = nullptr;
    uint32_t n = 0;

    bool set() const { return p != nullptr; }
};

enum class EventKind : uint8_t { stored, removed, cleared, other };

// Why an event, or a part of it, was not applied. The first four after `none` are found by decoding, the others by
// placing; they share one enum because reports count them side by side.
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
        case Reason::COUNT: break;
    }
    return "?";
}

struct Event {
    EventKind kind = EventKind::other;
    Reason bad = Reason::none;  // not `none`: nothing of the event is to be applied, and it has no hashes and no tokens
    bool has_parent = false;
    uint32_t offset = 0;  // where the event starts in the payload, and how long it is there
    uint32_t bytes = 0;
    uint32_t hash_at = 0;  // its part of Batch::hashes
    uint32_t n_hashes = 0;
    uint32_t token_at = 0;  // its part of Batch::tokens
    uint32_t n_tokens = 0;
    uint64_t parent = 0;
    uint64_t block_size = 0;  // 0: nil, absent or 0
    int64_t group = -1;       // -1: unset
    int64_t window = 0;       // 0: unset
    int64_t lora_id = 0;      // 0: unset
    StrRef medium;
    StrRef lora_name;
    StrRef lora_id_name;  // a lora_id that is a string is a name
    StrRef spec_kind;
    StrRef cache_salt;
    const uint8_t* extra_keys = nullptr;  // the list as it lies in the payload, header included; nullptr: nil or absent
    uint32_t extra_keys_bytes = 0;
};

struct Batch {
    double ts = 0.0;       // seconds
    int64_t dp_rank = -1;  // -1: unset
    std::vector<Event> events;
    std::vector<uint32_t> tokens;
    std::vector<uint64_t> hashes;

    void reset() {
        ts = 0.0;
        dp_rank = -1;
        events.clear();
        tokens.clear();
        hashes.clear();
    }
};

// What is wrong with a payload that is no batch, and at which of its bytes.
struct DecodeFault {
    const char* what = nullptr;
    size_t offset = 0;
};

bool decode_batch(const uint8_t* p, size_t n, Batch& out, DecodeFault& fault);

}  // namespace kvindex
