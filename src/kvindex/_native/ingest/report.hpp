// The outcome of a batch, counted.
#pragma once

#include "base/memory.hpp"
#include "wire/events.hpp"

namespace kvindex {

inline constexpr u32 kReasons = static_cast<u32>(Reason::COUNT);

struct Report {
    u64 stored = 0, removed = 0, cleared = 0, parked = 0, skipped = 0, errors = 0;
    u64 reasons[kReasons] = {};

    void skip(Reason r, u64 n = 1) {
        skipped += n;
        reasons[static_cast<u32>(r)] += n;
        if (r == Reason::bad_event || r == Reason::bad_token) errors += n;
    }
    void add(const Report& o) {
        stored += o.stored;
        removed += o.removed;
        cleared += o.cleared;
        parked += o.parked;
        skipped += o.skipped;
        errors += o.errors;
        for (u32 i = 0; i < kReasons; ++i) reasons[i] += o.reasons[i];
    }
};

}  // namespace kvindex
