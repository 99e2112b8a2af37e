// Open-addressing tables. None keeps tombstones: deleting shifts the cluster back, so churn never slows a probe.
#pragma once

#include <array>
#include <exception>
#include <random>

#include "memory.hpp"

namespace kvindex {

// Keys are what engines choose, so they are mixed with what no engine knows: of names that all have the same place,
// 32,768 took 1.3 s instead of 2 ms, and other pods' batches beside them 160 times their time.
inline std::array<u64, 2> secret() noexcept {
    try {
        std::random_device random;
        const auto word = [&] { return u64{random()} << 32 | random(); };
        return {word(), word() | 1};
    } catch (const std::exception&) {
        // No source of random numbers: what the golden ratio mixes is right, and as quick for names that nobody chose.
        return {0, 0x9E3779B97F4A7C15ull};
    }
}
inline const std::array<u64, 2> kSecret = secret();
inline u64 mixed64(u64 key) {
    __extension__ typedef unsigned __int128 Wide;
    const Wide product = static_cast<Wide>(key ^ kSecret[0]) * kSecret[1];
    return static_cast<u64>(product) ^ static_cast<u64>(product >> 64);
}
inline u32 mixed(u64 key) { return static_cast<u32>(mixed64(key) >> 32); }
struct Mixed {
    std::size_t operator()(u64 key) const { return mixed64(key); }
};

// What the tables have in common: a power of two of slots, at most kTenths tenths of them taken. A Slot knows its mixed
// key (`half`), whether it is `free`, and what a free one looks like (`none`): zeros, which cost nothing where the
// memory comes from the system.
template <class Slot, u32 kTenths, u32 kLeast>
class Slots {
public:
    u32 size() const { return n_; }
    u32 capacity() const { return slots_ ? 1u << lg_ : 0; }
    // By how many bytes the table would be larger with so many entries more.
    std::size_t growth(u32 more) const {
        u32 lg = slots_ ? lg_ : kLeast;
        while (lg < 31 && crowded(n_ + more, lg)) ++lg;
        return (sizeof(Slot) << lg) - (slots_ ? sizeof(Slot) << lg_ : 0);
    }
    // Makes room for so many entries at once.
    void reserve(Memory& m, u32 n) {
        u32 lg = slots_ ? lg_ : kLeast;
        while (crowded(n, lg)) ++lg;
        if (!slots_ || lg > lg_) rehash(m, lg);
    }
    // Slots that are looked at to find each entry once. O(capacity).
    u64 probes() const {
        u64 n = 0;
        for (u32 i = 0; i < capacity(); ++i)
            if (!slots_[i].free()) n += ((i - home(slots_[i].half())) & ((1u << lg_) - 1)) + 1;
        return n;
    }
    KVINDEX_INLINE void prefetch(u64 key) const {
        if (slots_) __builtin_prefetch(slots_ + home(mixed(key)));
    }
    void release(Memory& m) {
        if (slots_) {
            m.sub(sizeof(Slot) << lg_);
            give_back(slots_, sizeof(Slot) << lg_);
        }
        slots_ = nullptr;
        n_ = lg_ = 0;
    }

protected:
    u32 home(u32 half) const { return half >> (32 - lg_); }
    u32 next(u32 i) const { return (i + 1) & ((1u << lg_) - 1); }
    // The first slot from the home of `half` on that is wanted, or free: then none is. Where there are slots.
    template <class Wanted>
    u32 seek(u32 half, Wanted&& wanted) const {
        u32 i = home(half);
        while (!slots_[i].free() && !wanted(slots_[i])) i = next(i);
        return i;
    }
    Slot& at(u32 i) { return slots_[i]; }
    const Slot& at(u32 i) const { return slots_[i]; }

    bool full() const { return !slots_ || crowded(n_ + 1, lg_); }
    void make_room(Memory& m) {
        if (full()) rehash(m, slots_ ? lg_ + 1 : kLeast);
    }
    // An empty table of so many slots, a power of two. Its memory is touched here and there at first: in large pages,
    // 256 insertions would have the system clear all of it.
    void open(Memory& m, u32 slots) {
        while ((1u << lg_) < slots) ++lg_;
        slots_ = static_cast<Slot*>(take_zeros(sizeof(Slot) << lg_, false));
        m.add(sizeof(Slot) << lg_);
    }
    void filled() {
        if (sizeof(Slot) << lg_ >= kHugePage) make_huge(slots_, sizeof(Slot) << lg_);
    }
    Slot lift(u32 i) {
        const Slot s = slots_[i];
        slots_[i] = Slot::none();
        --n_;
        return s;
    }
    // Where there is room, and nothing of that key.
    void put(const Slot& s) {
        fill(seek(s.half(), [](const Slot&) { return false; }), s);
    }
    void fill(u32 i, const Slot& s) {
        slots_[i] = s;
        ++n_;
    }
    // `keep`: the table as large as it is.
    void remove(Memory& m, u32 i, bool keep = false) {
        const u32 mask = (1u << lg_) - 1;
        for (u32 j = next(i); !slots_[j].free(); j = next(j)) {
            if (((j - home(slots_[j].half())) & mask) >= ((j - i) & mask)) {
                slots_[i] = slots_[j];
                i = j;
            }
        }
        slots_[i] = Slot::none();
        --n_;
        if (keep) return;
        if (n_ == 0) {
            release(m);
        } else if (lg_ > kLeast && n_ < capacity() / 8) {
            try {
                rehash(m, lg_ - 1);
            } catch (const std::bad_alloc&) {
                // It stays as large as it is: what goes must not need memory.
                return;
            }
        }
    }
    template <class F>
    void each_slot(F&& f) const {
        for (u32 i = 0; i < capacity(); ++i)
            if (!slots_[i].free()) f(slots_[i]);
    }

private:
    static bool crowded(u32 n, u32 lg) { return n > (u64{1} << lg) * kTenths / 10; }

    void rehash(Memory& m, u32 lg) {
        if (lg > 31) throw std::bad_alloc();
        Slot* old = slots_;
        const u32 old_cap = capacity();
        slots_ = static_cast<Slot*>(take_zeros(sizeof(Slot) << lg));
        m.add(sizeof(Slot) << lg);
        lg_ = lg;
        n_ = 0;
        for (u32 i = 0; i < old_cap; ++i)
            if (!old[i].free()) put(old[i]);
        if (old) {
            m.sub(sizeof(Slot) * old_cap);
            give_back(old, sizeof(Slot) * old_cap);
        }
    }

    Slot* slots_ = nullptr;
    u32 n_ = 0;
    u32 lg_ = 0;
};

// 32 bits of the mixed key, 32 bits of reference, turned over so that none is zero.
struct RefSlot {
    u64 both;

    RefSlot(u32 half, u32 ref) : both((u64{half} << 32) | static_cast<u32>(~ref)) {}
    static RefSlot none() { return {0, kNone}; }
    u32 half() const { return static_cast<u32>(both >> 32); }
    u32 ref() const { return ~static_cast<u32>(both); }
    bool free() const { return static_cast<u32>(both) == 0; }
};

class RefSlots : public Slots<RefSlot, 7, 3> {
public:
    using Slots::filled;
    using Slots::full;
    using Slots::open;

    template <class Same>
    u32 find(u64 key, Same&& same) const {
        if (!size()) return kNone;
        const u32 h = mixed(key);
        return at(seek(h, [&](const RefSlot& s) { return s.half() == h && same(s.ref()); })).ref();
    }
    // Where a key that is there most probably is.
    u32 guess(u64 key) const {
        if (!size()) return kNone;
        const u32 h = mixed(key);
        return at(seek(h, [&](const RefSlot& s) { return s.half() == h; })).ref();
    }
    void insert(Memory& m, const RefSlot& s) {
        make_room(m);
        put(s);
    }
    template <class Same>
    bool insert_new(Memory& m, u64 key, u32 ref, Same&& same) {
        make_room(m);
        const u32 h = mixed(key);
        const u32 i = seek(h, [&](const RefSlot& s) { return s.half() == h && same(s.ref()); });
        if (!at(i).free()) return false;
        fill(i, {h, ref});
        return true;
    }
    bool erase(Memory& m, u64 key, u32 ref, bool keep) {
        const u32 i = slot_of(key, ref);
        if (i == kNone) return false;
        remove(m, i, keep);
        return true;
    }
    bool contains(u64 key, u32 ref) const { return slot_of(key, ref) != kNone; }
    bool move(u64 key, u32 from, u32 to) {
        const u32 i = slot_of(key, from);
        if (i == kNone) return false;
        at(i) = {at(i).half(), to};
        return true;
    }
    template <class F>
    void each(F&& f) const {
        each_slot([&](const RefSlot& s) { f(s.ref()); });
    }
    // Where a cluster may begin: behind a free slot.
    u32 behind_a_gap() const {
        u32 i = 0;
        while (!at(i).free()) i = next(i);
        return next(i);
    }
    // Takes everything out of the slots from `i` on, `least` of them and then up to a free one, but not of more than
    // `most`: whole clusters, so that what stays is found as before. Returns how many slots that were.
    template <class F>
    u32 drain(u32 i, u32 least, u32 most, F&& f) {
        u32 done = 0;
        for (; done < most && (done < least || !at(i).free()); ++done, i = next(i))
            if (!at(i).free()) f(lift(i));
        return done;
    }

private:
    u32 slot_of(u64 key, u32 ref) const {
        if (!size()) return kNone;
        const RefSlot want{mixed(key), ref};
        const u32 i = seek(want.half(), [&](const RefSlot& s) { return s.both == want.both; });
        return at(i).free() ? kNone : i;
    }
};

// From so many slots on a table grows bit by bit. Smaller ones than in earnest where tests are to see it.
#ifndef KVINDEX_GRADUAL_FROM
#define KVINDEX_GRADUAL_FROM (1u << 16)
#endif

// Maps 64-bit keys that already stand somewhere else (in a page, in a set) to the 32-bit reference of that place. The
// kept half is enough to find the home slot again, so neither deleting nor growing touches the places referred to; the
// full key is compared there only when the halves agree (2^-32 by chance). It grows at 0.7: slots are small (8 to a
// cache line), and 0.5 would cost 6 bytes a block more.
//
// A large table that is full becomes the old one beside a new one of twice the size, and whatever changes it takes some
// of that over: at once, everybody would wait 300 ms at 5.9 million names. A budget has no room for both.
class RefTable {
public:
    u32 size() const { return now_.size() + was_.size(); }
    std::size_t growth(u32 more) const { return now_.growth(more + was_.size()); }
    void reserve(Memory& m, u32 n) {
        take_over(m, was_.capacity());
        now_.reserve(m, n);
    }
    u64 probes() const { return now_.probes() + was_.probes(); }
    KVINDEX_INLINE void prefetch(u64 key) const {
        now_.prefetch(key);
        if (was_.size()) was_.prefetch(key);
    }
    void release(Memory& m) {
        now_.release(m);
        was_.release(m);
    }
    // `same(ref)` tells whether the place holds the wanted key. Returns kNone when absent.
    template <class Same>
    u32 find(u64 key, Same&& same) const {
        const u32 ref = now_.find(key, same);
        return ref == kNone && was_.size() ? was_.find(key, same) : ref;
    }
    u32 guess(u64 key) const {
        const u32 ref = now_.guess(key);
        return ref == kNone ? was_.guess(key) : ref;
    }
    // The key must be absent.
    void insert(Memory& m, u64 key, u32 ref) {
        if (was_.capacity()) {
            take_over(m, kStep);
        } else if (now_.capacity() >= KVINDEX_GRADUAL_FROM && now_.capacity() < (1u << 30) && now_.full() && !m.tight) {
            RefSlots fresh;
            fresh.open(m, 2 * now_.capacity());
            was_ = now_;
            now_ = fresh;
            at_ = was_.behind_a_gap();
            left_ = was_.capacity();
        }
        now_.insert(m, {mixed(key), ref});
    }
    // Inserts unless a place with the same key is there already; false if so.
    template <class Same>
    bool insert_new(Memory& m, u64 key, u32 ref, Same&& same) {
        take_over(m, was_.capacity());
        return now_.insert_new(m, key, ref, same);
    }
    // Recognises the entry by its reference, without looking at the place: false if (key, ref) is not in the table.
    bool erase(Memory& m, u64 key, u32 ref) {
        take_over(m, kStep);
        const bool two = was_.capacity() != 0;
        const bool found = now_.erase(m, key, ref, two) || (two && was_.erase(m, key, ref, true));
        if (two && size() == 0) release(m);
        return found;
    }
    bool contains(u64 key, u32 ref) const { return now_.contains(key, ref) || was_.contains(key, ref); }
    bool move(u64 key, u32 from, u32 to) { return now_.move(key, from, to) || was_.move(key, from, to); }
    template <class F>
    void each(F&& f) const {
        now_.each(f);
        was_.each(f);
    }

private:
    // More than enough to be done before the new one is full: that takes as many insertions as a third of its slots.
    static constexpr u32 kStep = 32;

    void take_over(Memory& m, u32 slots) {
        if (!was_.capacity()) return;
        const u32 done = was_.drain(at_, slots, left_, [&](const RefSlot& s) { now_.insert(m, s); });
        at_ = (at_ + done) & (was_.capacity() - 1);
        left_ -= done;
        if (left_) return;
        was_.release(m);
        now_.filled();
    }

    RefSlots now_, was_;
    u32 at_ = 0, left_ = 0;  // the next slot to take over, and how many there are
};

struct HeadSlot {
    u64 prefix;
    u32 above, page;  // the chain's number and one

    HeadSlot(u64 prefix, u32 chain, u32 page) : prefix(prefix), above(chain + 1), page(page) {}
    static HeadSlot none() { return {0, kNone, 0}; }
    u32 chain() const { return above - 1; }
    u32 half() const { return mixed(prefix); }
    bool free() const { return above == 0; }
};

// Maps the prefix hash of a chain's first block to the chain and to the page where it begins. All three in the slot,
// since a match of a large index waits for memory once here, once for the chain and the page together, and no more.
class HeadTable : public Slots<HeadSlot, 7, 2> {
public:
    // `chain` is kNone when absent. Of two chains whose prefix hashes collide, the one that was inserted first.
    HeadSlot find(u64 prefix) const {
        if (!size()) return HeadSlot::none();
        return at(seek(mixed(prefix), [&](const HeadSlot& s) { return s.prefix == prefix; }));
    }
    // Of those whose prefix hashes collide, the one that is `right`. Apart, since nobody comes here by chance.
    template <class Right>
    [[gnu::noinline, gnu::cold]] HeadSlot find_among(u64 prefix, Right&& right) const {
        return at(seek(mixed(prefix), [&](const HeadSlot& s) { return s.prefix == prefix && right(s); }));
    }
    void insert(Memory& m, u64 prefix, u32 chain, u32 page) {
        make_room(m);
        put({prefix, chain, page});
    }
    void erase(Memory& m, u64 prefix, u32 chain) {
        const u32 i = slot_of(prefix, chain);
        if (i != kNone) remove(m, i);
    }
    bool contains(u64 prefix, u32 chain, u32 page) const {
        const u32 i = slot_of(prefix, chain);
        return i != kNone && at(i).page == page;
    }

private:
    u32 slot_of(u64 prefix, u32 chain) const {
        if (!size()) return kNone;
        const u32 i = seek(mixed(prefix), [&](const HeadSlot& s) { return s.prefix == prefix && s.chain() == chain; });
        return at(i).free() ? kNone : i;
    }
};

struct CountSlot {
    u64 key;
    u32 count;

    static CountSlot none() { return {0, 0}; }
    u32 half() const { return mixed(key); }
    bool free() const { return count == 0; }
};

// Counts small things by a 64-bit key (a chain and a depth). A count of zero is no entry.
class CountTable : public Slots<CountSlot, 5, 2> {
public:
    u32 get(u64 key) const {
        const u32 i = slot_of(key);
        return i == kNone ? 0 : at(i).count;
    }
    void add(Memory& m, u64 key, u32 by = 1) {
        make_room(m);
        const u32 i = seek(mixed(key), [&](const CountSlot& s) { return s.key == key; });
        if (at(i).free()) {
            fill(i, {key, by});
        } else {
            at(i).count += by;
        }
    }
    void sub(Memory& m, u64 key, u32 by = 1) {
        const u32 i = slot_of(key);
        if (i != kNone && (at(i).count -= by) == 0) remove(m, i);
    }
    template <class F>
    void each(F&& f) const {
        each_slot([&](const CountSlot& s) { f(s.key, s.count); });
    }

private:
    u32 slot_of(u64 key) const {
        if (!size()) return kNone;
        const u32 i = seek(mixed(key), [&](const CountSlot& s) { return s.key == key; });
        return at(i).free() ? kNone : i;
    }
};

}  // namespace kvindex
