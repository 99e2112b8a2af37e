// One field of one event as it is in the payload. The decoder keeps only the fields that an index needs: to the index,
// nil, 0 and -1 are one LoRA id, and a session does not exist. Tools that show an event as it was written find the
// difference here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "wire/events.hpp"
#include "wire/msgpack.hpp"

namespace kvindex {

// The value of the field `name` in the event of `n` bytes at `p`, which is sound msgpack: of a map, the last value with
// that name; of an array, the value at the name's place. Unset if it is missing.
inline StrRef event_field(const uint8_t* p, size_t n, EventKind kind, const char* name, size_t name_bytes) {
    using namespace events_detail;
    MsgReader r(p, n);
    MsgValue v;
    StrRef found;
    if (!r.next(v)) return found;
    const auto value = [&] {
        const uint8_t* const at = r.p;
        if (!r.skip(1)) return false;
        found = {reinterpret_cast<const char*>(at), static_cast<uint32_t>(r.p - at)};
        return true;
    };
    if (v.type == MsgType::map) {
        for (uint32_t i = 0; i < v.n; ++i) {
            MsgValue key;
            if (!r.next(key)) break;
            const bool same = key.type == MsgType::str && key.n == name_bytes && !std::memcmp(key.data, name, key.n);
            if (!(same ? value() : r.skip(key.children() + 1))) break;
        }
    } else if (v.type == MsgType::array) {
        const Field field = field_of(reinterpret_cast<const uint8_t*>(name), static_cast<uint32_t>(name_bytes));
        const bool removed = kind == EventKind::removed;
        const size_t known =
            removed ? sizeof removed_fields / sizeof *removed_fields : sizeof stored_fields / sizeof *stored_fields;
        for (size_t i = 0; i < known && i < v.n; ++i) {
            if ((removed ? removed_fields : stored_fields)[i] == field) {
                value();
                break;
            }
            if (!r.skip(1)) break;
        }
    }
    return found;
}

// The characters of the field, if it is a string.
inline StrRef event_text(const uint8_t* p, size_t n, EventKind kind, const char* name, size_t name_bytes) {
    const StrRef found = event_field(p, n, kind, name, name_bytes);
    MsgReader r(reinterpret_cast<const uint8_t*>(found.p), found.n);
    MsgValue v;
    if (!r.next(v) || v.type != MsgType::str) return {};
    return {reinterpret_cast<const char*>(v.data), v.n};
}

}  // namespace kvindex
