// Open-addressing tables. None keeps tombstones: deleting shifts the cluster back, so churn never slows a probe.
#pragma once

#include "memory.hpp"

namespace kvindex {

// Keys need not be uniform (engines may count their blocks), so they are mixed: one multiplication.
inline u32 mixed(u64 key) { return static_cast<u32>(((key ^ (key >> 32)) * 0x9E3779B97F4A7C15ull) >> 32); }

// What the tables have in common: a power of two of slots, at most kTenths tenths of them taken. A Slot knows its mixed
// key (`half`), whether it is `free`, and what a free one looks like (`none`).
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
    Slot& at(u32 i) { return slots_[i]; }
    const Slot& at(u32 i) const { return slots_[i]; }

    void make_room(Memory& m) {
        if (!slots_ || crowded(n_ + 1, lg_)) rehash(m, slots_ ? lg_ + 1 : kLeast);
    }
    // Where there is room, and nothing of that key.
    void put(const Slot& s) {
        u32 i = home(s.half());
        while (!slots_[i].free()) i = next(i);
        fill(i, s);
    }
    void fill(u32 i, const Slot& s) {
        slots_[i] = s;
        ++n_;
    }
    void remove(Memory& m, u32 i) {
        const u32 mask = (1u << lg_) - 1;
        for (u32 j = next(i); !slots_[j].free(); j = next(j)) {
            if (((j - home(slots_[j].half())) & mask) >= ((j - i) & mask)) {
                slots_[i] = slots_[j];
                i = j;
            }
        }
        slots_[i] = Slot::none();
        --n_;
        if (n_ == 0) {
            release(m);
        } else if (lg_ > kLeast && n_ < capacity() / 8) {
            rehash(m, lg_ - 1);
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
        slots_ = static_cast<Slot*>(take_memory(sizeof(Slot) << lg));
        m.add(sizeof(Slot) << lg);
        for (u32 i = 0; i < (1u << lg); ++i) slots_[i] = Slot::none();
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

// 32 bits of the mixed key, 32 bits of reference.
struct RefSlot {
    u64 both;

    RefSlot(u32 half, u32 ref) : both((u64{half} << 32) | ref) {}
    static RefSlot none() { return {0, kNone}; }
    u32 half() const { return static_cast<u32>(both >> 32); }
    u32 ref() const { return static_cast<u32>(both); }
    bool free() const { return ref() == kNone; }
};

// Maps 64-bit keys that already stand somewhere else (in a page, in a set) to the 32-bit reference of that place. The
// kept half is enough to find the home slot again, so neither deleting nor growing touches the places referred to; the
// full key is compared there only when the halves agree (2^-32 by chance). It grows at 0.7: slots are small (8 to a
// cache line), and 0.5 would cost 6 bytes a block more.
class RefTable : public Slots<RefSlot, 7, 3> {
public:
    // `same(ref)` tells whether the place holds the wanted key. Returns kNone when absent.
    template <class Same>
    u32 find(u64 key, Same&& same) const {
        if (!size()) return kNone;
        const u32 h = mixed(key);
        for (u32 i = home(h); !at(i).free(); i = next(i))
            if (at(i).half() == h && same(at(i).ref())) return at(i).ref();
        return kNone;
    }
    // The key must be absent.
    void insert(Memory& m, u64 key, u32 ref) {
        make_room(m);
        put({mixed(key), ref});
    }
    // Inserts unless a place with the same key is there already; false if so.
    template <class Same>
    bool insert_new(Memory& m, u64 key, u32 ref, Same&& same) {
        make_room(m);
        const u32 h = mixed(key);
        u32 i = home(h);
        for (; !at(i).free(); i = next(i))
            if (at(i).half() == h && same(at(i).ref())) return false;
        fill(i, {h, ref});
        return true;
    }
    // Recognises the entry by its reference, without looking at the place: false if (key, ref) is not in the table.
    bool erase(Memory& m, u64 key, u32 ref) {
        const u32 i = slot_of(key, ref);
        if (i == kNone) return false;
        remove(m, i);
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

private:
    u32 slot_of(u64 key, u32 ref) const {
        if (!size()) return kNone;
        const RefSlot want{mixed(key), ref};
        for (u32 i = home(want.half()); !at(i).free(); i = next(i))
            if (at(i).both == want.both) return i;
        return kNone;
    }
};

struct HeadSlot {
    u64 prefix;
    u32 chain, page;

    static HeadSlot none() { return {0, kNone, kNone}; }
    u32 half() const { return mixed(prefix); }
    bool free() const { return chain == kNone; }
};

// Maps the prefix hash of a chain's first block to the chain and to the page where it begins. All three in the slot,
// since a match of a large index waits for memory once here, once for the chain and the page together, and no more.
class HeadTable : public Slots<HeadSlot, 7, 2> {
public:
    // `chain` is kNone when absent. Of two chains whose prefix hashes collide, the one that was inserted first.
    HeadSlot find(u64 prefix) const {
        if (!size()) return HeadSlot::none();
        u32 i = home(mixed(prefix));
        while (!at(i).free() && at(i).prefix != prefix) i = next(i);
        return at(i);
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
        u32 i = home(mixed(prefix));
        while (!at(i).free() && (at(i).prefix != prefix || at(i).chain != chain)) i = next(i);
        return at(i).free() ? kNone : i;
    }
};

struct CountSlot {
    u64 key;
    u32 count;

    static CountSlot none() { return {~0ull, 0}; }
    u32 half() const { return mixed(key); }
    bool free() const { return key == ~0ull; }
};

// Counts small things by a 64-bit key that is never all ones (a chain and a depth). A count of zero is no entry.
class CountTable : public Slots<CountSlot, 5, 2> {
public:
    u32 get(u64 key) const {
        const u32 i = slot_of(key);
        return i == kNone ? 0 : at(i).count;
    }
    void add(Memory& m, u64 key, u32 by = 1) {
        make_room(m);
        u32 i = home(mixed(key));
        while (!at(i).free() && at(i).key != key) i = next(i);
        if (at(i).free()) fill(i, {key, 0});
        at(i).count += by;
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
        u32 i = home(mixed(key));
        while (!at(i).free() && at(i).key != key) i = next(i);
        return at(i).free() ? kNone : i;
    }
};

}  // namespace kvindex
