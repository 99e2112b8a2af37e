// Open-addressing tables. Neither keeps tombstones: deleting shifts the cluster back, so churn never slows a probe.
#pragma once

#include "memory.hpp"

namespace kvindex {

// Maps 64-bit keys that already stand somewhere else (in a page, in a chain's head, in a set) to the 32-bit reference
// of that place. A slot is 8 bytes: 32 bits of the mixed key, 32 bits of reference. The kept half is enough to find the
// home slot again, so neither deleting nor growing touches the places referred to; the full key is compared there only
// when the halves agree (2^-32 by chance).
class RefTable {
public:
    u32 size() const { return n_; }
    u32 capacity() const { return slots_ ? 1u << lg_ : 0; }
    // By how many bytes the table would be larger with so many entries more.
    std::size_t growth(u32 more) const {
        u32 lg = slots_ ? lg_ : 3;
        while (lg < 31 && crowded(n_ + more, lg)) ++lg;
        return (sizeof(u64) << lg) - (slots_ ? sizeof(u64) << lg_ : 0);
    }

    void prefetch(u64 key) const {
        if (slots_) __builtin_prefetch(slots_ + (half(key) >> shift()));
    }

    // `same(ref)` tells whether the place holds the wanted key. Returns kNone when absent.
    template <class Same>
    u32 find(u64 key, Same&& same) const {
        if (!n_) return kNone;
        const u32 h = half(key), mask = (1u << lg_) - 1;
        for (u32 i = h >> shift();; i = (i + 1) & mask) {
            const u64 s = slots_[i];
            if (ref_of(s) == kNone) return kNone;
            if (half_of(s) == h && same(ref_of(s))) return ref_of(s);
        }
    }
    // The key must be absent.
    void insert(Memory& m, u64 key, u32 ref) {
        if (!slots_ || crowded(n_ + 1, lg_)) rehash(m, slots_ ? lg_ + 1 : 3);
        put(pack(half(key), ref));
        ++n_;
    }
    // Inserts unless a place with the same key is there already; false if so.
    template <class Same>
    bool insert_new(Memory& m, u64 key, u32 ref, Same&& same) {
        if (!slots_ || crowded(n_ + 1, lg_)) rehash(m, slots_ ? lg_ + 1 : 3);
        const u32 h = half(key), mask = (1u << lg_) - 1;
        u32 i = h >> shift();
        for (; ref_of(slots_[i]) != kNone; i = (i + 1) & mask)
            if (half_of(slots_[i]) == h && same(ref_of(slots_[i]))) return false;
        slots_[i] = pack(h, ref);
        ++n_;
        return true;
    }
    // Makes room for so many entries at once.
    void reserve(Memory& m, u32 n) {
        u32 lg = slots_ ? lg_ : 3;
        while (crowded(n, lg)) ++lg;
        if (!slots_ || lg > lg_) rehash(m, lg);
    }
    // Recognises the entry by its reference, without looking at the place: false if (key, ref) is not in the table.
    bool erase(Memory& m, u64 key, u32 ref) {
        const u32 i = slot_of(key, ref);
        if (i == kNone) return false;
        close_gap(i);
        --n_;
        if (n_ == 0) {
            release(m);
        } else if (lg_ > 3 && n_ < capacity() / 8) {
            rehash(m, lg_ - 1);
        }
        return true;
    }
    bool contains(u64 key, u32 ref) const { return slot_of(key, ref) != kNone; }
    bool move(u64 key, u32 from, u32 to) {
        const u32 i = slot_of(key, from);
        if (i == kNone) return false;
        slots_[i] = pack(half_of(slots_[i]), to);
        return true;
    }
    template <class F>
    void each(F&& f) const {
        if (!slots_) return;
        for (u32 i = 0; i < capacity(); ++i)
            if (ref_of(slots_[i]) != kNone) f(ref_of(slots_[i]));
    }
    void release(Memory& m) {
        if (slots_) {
            m.sub(sizeof(u64) << lg_);
            std::free(slots_);
        }
        slots_ = nullptr;
        n_ = lg_ = 0;
    }

private:
    // Engine hashes need not be uniform (small counters are legal), so keys are mixed: one multiplication.
    static u32 half(u64 key) { return static_cast<u32>(((key ^ (key >> 32)) * 0x9E3779B97F4A7C15ull) >> 32); }
    static u64 pack(u32 half, u32 ref) { return (static_cast<u64>(half) << 32) | ref; }
    static u32 half_of(u64 s) { return static_cast<u32>(s >> 32); }
    static u32 ref_of(u64 s) { return static_cast<u32>(s); }
    // Grows at 0.7: slots are small (8 to a cache line), and 0.5 would cost 6 bytes a block more.
    static bool crowded(u32 n, u32 lg) { return n > ((1u << lg) / 10) * 7 + (lg < 4 ? 4 : 0); }
    u32 shift() const { return 32 - lg_; }

    u32 slot_of(u64 key, u32 ref) const {
        if (!n_) return kNone;
        const u32 h = half(key), mask = (1u << lg_) - 1;
        const u64 want = pack(h, ref);
        for (u32 i = h >> shift();; i = (i + 1) & mask) {
            if (slots_[i] == want) return i;
            if (ref_of(slots_[i]) == kNone) return kNone;
        }
    }
    void put(u64 s) {
        const u32 mask = (1u << lg_) - 1;
        u32 i = half_of(s) >> shift();
        while (ref_of(slots_[i]) != kNone) i = (i + 1) & mask;
        slots_[i] = s;
    }
    void close_gap(u32 i) {
        const u32 mask = (1u << lg_) - 1;
        for (u32 j = (i + 1) & mask; ref_of(slots_[j]) != kNone; j = (j + 1) & mask) {
            const u32 home = half_of(slots_[j]) >> shift();
            if (((j - home) & mask) >= ((j - i) & mask)) {
                slots_[i] = slots_[j];
                i = j;
            }
        }
        slots_[i] = pack(0, kNone);
    }
    void rehash(Memory& m, u32 lg) {
        if (lg > 31) throw std::bad_alloc();
        u64* old = slots_;
        const u32 old_cap = capacity();
        u64* fresh = static_cast<u64*>(std::malloc(sizeof(u64) << lg));
        if (!fresh) throw std::bad_alloc();
        m.add(sizeof(u64) << lg);
        for (u32 i = 0; i < (1u << lg); ++i) fresh[i] = pack(0, kNone);
        slots_ = fresh;
        lg_ = lg;
        for (u32 i = 0; i < old_cap; ++i)
            if (ref_of(old[i]) != kNone) put(old[i]);
        if (old) {
            m.sub(sizeof(u64) * old_cap);
            std::free(old);
        }
    }

    u64* slots_ = nullptr;
    u32 n_ = 0;
    u32 lg_ = 0;
};

// Counts small things by a 64-bit key that is never all ones (a chain and a depth). A count of zero is no entry.
class CountTable {
public:
    u32 size() const { return n_; }
    u32 get(u64 key) const {
        if (!n_) return 0;
        for (u32 i = home(key);; i = (i + 1) & mask()) {
            if (slots_[i].key == key) return slots_[i].count;
            if (slots_[i].key == kEmpty) return 0;
        }
    }
    std::size_t growth(u32 more) const {
        u32 lg = slots_ ? lg_ : 2;
        while (n_ + more > (1u << lg) / 2) ++lg;
        return (sizeof(Slot) << lg) - (slots_ ? sizeof(Slot) << lg_ : 0);
    }
    void add(Memory& m, u64 key, u32 by = 1) {
        if (!slots_ || n_ + 1 > (1u << lg_) / 2) rehash(m, slots_ ? lg_ + 1 : 2);
        u32 i = home(key);
        while (slots_[i].key != kEmpty && slots_[i].key != key) i = (i + 1) & mask();
        if (slots_[i].key == kEmpty) {
            slots_[i] = {key, 0};
            ++n_;
        }
        slots_[i].count += by;
    }
    void sub(Memory& m, u64 key, u32 by = 1) {
        if (!n_) return;
        u32 i = home(key);
        while (slots_[i].key != key) {
            if (slots_[i].key == kEmpty) return;
            i = (i + 1) & mask();
        }
        if ((slots_[i].count -= by) != 0) return;
        for (u32 j = (i + 1) & mask(); slots_[j].key != kEmpty; j = (j + 1) & mask()) {
            if (((j - home(slots_[j].key)) & mask()) >= ((j - i) & mask())) {
                slots_[i] = slots_[j];
                i = j;
            }
        }
        slots_[i].key = kEmpty;
        --n_;
        if (n_ == 0) {
            release(m);
        } else if (lg_ > 2 && n_ < (1u << lg_) / 8) {
            rehash(m, lg_ - 1);
        }
    }
    template <class F>
    void each(F&& f) const {
        if (!slots_) return;
        for (u32 i = 0; i < (1u << lg_); ++i)
            if (slots_[i].key != kEmpty) f(slots_[i].key, slots_[i].count);
    }
    void release(Memory& m) {
        if (slots_) {
            m.sub(sizeof(Slot) << lg_);
            std::free(slots_);
        }
        slots_ = nullptr;
        n_ = lg_ = 0;
    }

private:
    struct Slot {
        u64 key;
        u32 count;
    };
    static constexpr u64 kEmpty = ~0ull;
    u32 mask() const { return (1u << lg_) - 1; }
    u32 home(u64 key) const { return static_cast<u32>(((key ^ (key >> 29)) * 0x9E3779B97F4A7C15ull) >> (64 - lg_)); }
    void rehash(Memory& m, u32 lg) {
        Slot* old = slots_;
        const u32 old_cap = slots_ ? 1u << lg_ : 0;
        Slot* fresh = static_cast<Slot*>(std::malloc(sizeof(Slot) << lg));
        if (!fresh) throw std::bad_alloc();
        m.add(sizeof(Slot) << lg);
        for (u32 i = 0; i < (1u << lg); ++i) fresh[i] = {kEmpty, 0};
        slots_ = fresh;
        lg_ = lg;
        for (u32 k = 0; k < old_cap; ++k) {
            if (old[k].key == kEmpty) continue;
            u32 i = home(old[k].key);
            while (slots_[i].key != kEmpty) i = (i + 1) & mask();
            slots_[i] = old[k];
        }
        if (old) {
            m.sub(sizeof(Slot) * old_cap);
            std::free(old);
        }
    }

    Slot* slots_ = nullptr;
    u32 n_ = 0;
    u32 lg_ = 0;
};

}  // namespace kvindex
