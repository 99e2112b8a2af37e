// The first repeat among the names of one event, in time linear in their number, for any choice of names.
#pragma once

#include "base/table.hpp"

namespace kvindex {

class Repeats {
public:
    // The index of the first name that occurred before, or n.
    static u32 first(const u64* names, u32 n) {
        if (n < 2) return n;
        return n <= kFew ? among_few(names, n) : among_many(names, n);
    }

private:
    // A bitmap with 32 bits or more for each name rules out most repeats, and a scan of the names before decides the
    // rest: of 512 distinct names 8 are examined again, which is 4 comparisons a name.
    static constexpr u32 kFew = 512, kLgBits = 14;

    static u32 among_few(const u64* names, u32 n) {
        u64 bits[(1u << kLgBits) / 64];
        u32 lg = 10;
        while ((1u << lg) < n * 32) ++lg;
        std::memset(bits, 0, (std::size_t{1} << lg) / 8);
        for (u32 i = 0; i < n; ++i) {
            const u64 h = mixed64(names[i]) >> (64 - lg);
            u64& word = bits[h >> 6];
            if (word >> (h & 63) & 1)
                for (u32 j = 0; j < i; ++j)
                    if (names[j] == names[i]) return i;
            word |= 1ull << (h & 63);
        }
        return n;
    }
    // For more names, a table of numbers that is at most half full and is dropped after the call. A bitmap of 2^24 bits
    // took 12.6 s for a million names, and 12.3 s for 300,000 names that were chosen against its mixing constant.
    static u32 among_many(const u64* names, u32 n) {
        const u32 lg = 64 - static_cast<u32>(__builtin_clzll(u64{n} * 2 - 1));
        const u64 mask = (u64{1} << lg) - 1;
        const Zeros<u32> table(u64{1} << lg);  // a name's number plus one
        for (u32 i = 0; i < n; ++i) {
            if (i + kAhead < n) __builtin_prefetch(table.data() + (mixed64(names[i + kAhead]) >> (64 - lg)), 1);
            u64 at = mixed64(names[i]) >> (64 - lg);
            for (; table.data()[at]; at = (at + 1) & mask)
                if (names[table.data()[at] - 1] == names[i]) return i;
            table.data()[at] = i + 1;
        }
        return n;
    }
    static constexpr u32 kAhead = 8;

    template <class T>
    class Zeros {
    public:
        explicit Zeros(u64 n) : bytes_(n * sizeof(T)), p_(static_cast<T*>(map_memory(bytes_, bytes_ >= kHugePage))) {}
        Zeros(const Zeros&) = delete;
        Zeros& operator=(const Zeros&) = delete;
        ~Zeros() { munmap(p_, bytes_); }
        T* data() const { return p_; }

    private:
        std::size_t bytes_;
        T* p_;
    };
};

}  // namespace kvindex
