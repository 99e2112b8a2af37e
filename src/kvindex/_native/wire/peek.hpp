// The few fields that a stream needs from a batch before it is decoded: its time, its number of events and its rank.
// Time and rank follow the decoder's own rules, so no batch belongs to one worker here and to another there.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "wire/events.hpp"
#include "wire/msgpack.hpp"

namespace kvindex {

struct BatchPeek {
    bool timed = false;   // it has a time that is a number
    double ts = 0.0;      // seconds
    uint64_t events = 0;  // the declared number, but at most as many as there is room for
    int64_t rank = -1;    // -1: no rank is named, or the payload is no sound batch
};

// Reads the time and the number of events. O(1) if the batch is an array, as in every released engine. `whole`: also
// reads the rank, which lies behind the events: O(bytes), without reading the events themselves.
inline BatchPeek peek_batch(const uint8_t* p, size_t n, bool whole) {
    using namespace events_detail;
    BatchPeek found;
    MsgReader r(p, n);
    MsgValue outer;
    if (!r.next(outer)) return found;
    // Each of these readers leaves `r` behind its value.
    bool listed = false;
    const auto time = [&] {
        MsgValue v;
        if (!r.next(v)) return false;
        found.timed = seconds(v, found.ts) && !std::isnan(found.ts);
        return r.skip(v.children());
    };
    const auto events = [&] {
        MsgValue v;
        if (!r.next(v)) return false;
        listed = v.type == MsgType::array;
        // An event is an array or a map with a name in it: three bytes. A damaged length must not cost a pod years.
        if (listed) found.events = v.n < n / 3 ? v.n : n / 3;
        return !whole || r.skip(v.children());
    };
    const auto rank = [&] {
        MsgValue v;
        if (!r.next(v)) return false;
        if (!rank_of(v, found.rank)) found.rank = -1;
        return r.skip(v.children());
    };
    bool sound = false;
    if (outer.type == MsgType::array) {
        sound = outer.n >= 1 && time() && (outer.n < 2 || events());
        if (!whole || outer.n < 3) return found;
        sound = sound && rank() && r.skip(outer.n - 3);
    } else if (outer.type == MsgType::map) {
        sound = true;
        for (uint32_t i = 0; sound && i < outer.n; ++i) {
            MsgValue key;
            sound = r.next(key);
            if (!sound) break;
            const bool text = key.type == MsgType::str;
            if (text && key.n == 2 && is(key.data, "ts")) {
                sound = time();
            } else if (text && key.n == 6 && is(key.data, "events")) {
                const bool all = whole;
                whole = true;  // other keys follow
                sound = events();
                whole = all;
            } else if (text && key.n == 18 && is(key.data, "data_parallel_rank")) {
                sound = rank();
            } else {
                sound = r.skip(key.children() + 1);
            }
        }
    }
    // A damaged batch must not be taken for another worker's batch.
    if (!sound || !listed || r.p != r.end) found.rank = -1;
    return found;
}

}  // namespace kvindex
