// Open-addressing tables without tombstones: a removal shifts its cluster back, so churn never slows a probe.
#pragma once

#include <algorithm>
#include <array>
#include <exception>
#include <random>

#include "base/memory.hpp"

namespace kvindex {

// Engines choose the keys, so a secret of the process is mixed in. With 32,768 names for one slot, an event took 1.3 s
// in place of 2 ms, and batches of other pods took 160 times as long.
inline std::array<u64, 2> secret() noexcept {
    try {
        std::random_device random;
        const auto word = [&] { return u64{random()} << 32 | random(); };
        return {word(), word() | 1};
    } catch (const std::exception&) {
        // No source of random numbers: the golden ratio is as fast for names without an attacker.
        return {0, 0x9E3779B97F4A7C15ull};
    }
}
inline const std::array<u64, 2> kSecret = secret();
inline u64 mixed64(u64 key) {
    __extension__ typedef unsigned __int128 Wide;
    const Wide product = static_cast<Wide>(key ^ kSecret[0]) * kSecret[1];
    // The second multiplication spreads keys in arithmetic progression, such as numbers of chains. Without it, 1.5 % of
    // all secrets put them into one cluster: 78 to 1,282 probes an entry in place of 1.8.
    return (static_cast<u64>(product) ^ static_cast<u64>(product >> 64)) * 0x9E3779B97F4A7C15ull;
}
inline u32 mixed(u64 key) { return static_cast<u32>(mixed64(key) >> 32); }
struct Mixed {
    std::size_t operator()(u64 key) const { return mixed64(key); }
};

// The common part of all tables. Up to the size of a segment, a table is a power of two of slots and doubles at once. A
// larger table consists of segments, selected by the low bits of the mixed key (extendible hashing), and grows by a
// split of the full segment. So an insertion moves at most one segment: doubling 5.9 million names at once stopped all
// matches for 433 ms, and both tables were resident during the copy, 1.23 times a budget of 64 MB.
//
// At most kTenths tenths of a segment's slots are in use. A Slot has the mixed key (`half`) and `free()`. A free slot
// is all zeros, so that fresh memory of the system needs no initialisation.
template <class Slot, u32 kTenths, u32 kLeast>
class Slots {
public:
    Slots() = default;
    // The owner releases it, as with Buf.
    ~Slots() { assert(!slots_); }
    Slots(const Slots&) = delete;
    Slots& operator=(const Slots&) = delete;
    Slots(Slots&& o) noexcept
        : slots_(std::exchange(o.slots_, nullptr)),
          parts_(std::move(o.parts_)),
          ways_(std::move(o.ways_)),
          n_(std::exchange(o.n_, 0)),
          lg_(std::exchange(o.lg_, 0)),
          fullest_(std::exchange(o.fullest_, 0)),
          stamp_(o.stamp_++) {}
    Slots& operator=(Slots&&) = delete;

    u32 size() const { return n_; }
    // An upper bound of the bytes that this many further entries take. While a table doubles, both copies count.
    std::size_t growth(u32 more) const {
        if (parts_.empty()) {
            u32 lg = slots_ ? lg_ : kLeast;
            if (slots_ && !crowded(n_ + more, lg)) return 0;
            while (lg < kMostLg && crowded(n_ + more, lg)) ++lg;
            const u64 rest = n_ + u64{more} > most(kMostLg) ? n_ + u64{more} - most(kMostLg) : 0;
            return bytes(lg) + (2 * rest + most(kMostLg) - 1) / most(kMostLg) * kSegmentBytes;
        }
        if (fullest_ + more <= most(kMostLg)) return 0;
        // The keys of one event are spread over all segments, so no more than these are full at once.
        const u64 likely = 2 + 4 * u64{more} / most(kMostLg);
        u64 splits = more / most(kMostLg);
        for (const Part& p : parts_) {
            if (splits >= likely) return likely * kSegmentBytes;
            splits += p.n + more > most(kMostLg);
        }
        return std::min(splits, likely) * kSegmentBytes;
    }
    // The probes that finding each entry once takes, in all. O(slots).
    u64 probes() const {
        u64 n = 0;
        each_segment([&](const Slot* slots) {
            for (u32 i = 0; i < 1u << lg_; ++i)
                if (!slots[i].free()) n += ((i - home(slots[i].half())) & mask()) + 1;
        });
        return n;
    }
    KVINDEX_INLINE void prefetch(u64 key) const {
        if (!n_) return;
        const u32 h = mixed(key);
        __builtin_prefetch(segment(h) + home(h));
    }
    // Makes room for this number of entries in an empty table.
    void reserve(Memory& m, u32 n) {
        u32 lg = kLeast;
        while (lg < kMostLg && crowded(n, lg)) ++lg;
        assert(!n_);
        if (n && !slots_ && parts_.empty()) rehash(m, lg);
    }
    void release(Memory& m) {
        each_segment([&](Slot* slots) { free_slots(m, slots, lg_); });
        slots_ = nullptr;
        parts_.release(m);
        ways_.release(m);
        n_ = lg_ = fullest_ = 0;
        ++stamp_;
    }
    // A walk over all entries in steps, between which the table may change. A step visits `slots` slots and goes on to
    // the next free one, since no entry moves across a free slot; it returns false at the end. The walk starts again if
    // the table was rebuilt. So an entry that is present all the time is visited at least once.
    struct Cursor {
        u32 part = 0, slot = 0, stamp = 0;
    };
    template <class F>
    bool step(Cursor& at, u32 slots, F&& f) const {
        if (!n_) return false;
        if (at.stamp != stamp_) at = {0, 0, stamp_};
        const u32 parts = parts_.empty() ? 1 : parts_.size();
        for (u32 seen = 0; at.part < parts; ++at.part, at.slot = 0) {
            const Slot* const from = parts_.empty() ? slots_ : parts_[at.part].slots;
            for (; at.slot <= mask(); ++at.slot, ++seen) {
                if (const Slot& s = from[at.slot]; !s.free()) {
                    f(s);
                } else if (seen >= slots) {
                    return true;
                }
            }
        }
        return false;
    }

protected:
    // The first slot from the home of `half` on that is wanted, or free if no slot is. Requires slots.
    template <class Wanted>
    Slot* seek(u32 half, Wanted&& wanted) const {
        Slot* const slots = segment(half);
        u32 i = home(half);
        while (!slots[i].free() && !wanted(slots[i])) i = next(i);
        return slots + i;
    }
    // Makes room for one more entry with this `half`.
    void make_room(Memory& m, u32 half) {
        if (parts_.empty()) {
            if (slots_ && !crowded(n_ + 1, lg_)) return;
            if (!slots_ || lg_ < kMostLg) return rehash(m, slots_ ? lg_ + 1 : kLeast);
            ways_.reserve(m, 2);
            parts_.push(m, {slots_, n_, 0});
            ways_.push(m, {slots_, 0});
            slots_ = nullptr;
        }
        while (crowded(parts_[way(half).part].n + 1, lg_)) split(m, half);
    }
    void fill(Slot* at, const Slot& s) {
        *at = s;
        ++n_;
        if (!parts_.empty()) {
            Part& p = parts_[way(s.half()).part];
            if (++p.n > fullest_) fullest_ = p.n;
        }
    }
    // Requires room, and no entry with that key.
    void put(const Slot& s) {
        fill(seek(s.half(), [](const Slot&) { return false; }), s);
    }
    void remove(Memory& m, Slot* at) {
        const u32 half = at->half();
        Slot* const slots = segment(half);
        u32 i = static_cast<u32>(at - slots);
        for (u32 j = next(i); !slots[j].free(); j = next(j)) {
            if (((j - home(slots[j].half())) & mask()) >= ((j - i) & mask())) {
                slots[i] = slots[j];
                i = j;
            }
        }
        slots[i] = Slot::none();
        --n_;
        if (n_ == 0) return release(m);
        try {
            if (!parts_.empty()) {
                --parts_[way(half).part].n;
                merge(m, half);
            } else if (lg_ > kLeast && n_ < (1u << lg_) / 8) {
                rehash(m, lg_ - 1);
            }
        } catch (const std::bad_alloc&) {
            // The table keeps its size: a removal must not need memory.
            return;
        }
    }
    template <class F>
    void each_slot(F&& f) const {
        each_segment([&](const Slot* slots) {
            for (u32 i = 0; i <= mask(); ++i)
                if (!slots[i].free()) f(slots[i]);
        });
    }

private:
    static constexpr u32 lg_of(std::size_t n) { return 63 - static_cast<u32>(__builtin_clzll(n)); }
    static constexpr u32 kMostLg = lg_of(kSegmentBytes / sizeof(Slot));
    static_assert(kMostLg >= kLeast && kMostLg < 32, "a segment holds at least the smallest table");

    // The segments, and the segment for each value of the keys' low bits.
    struct Part {
        Slot* slots;
        u32 n;
        u32 bits;  // low bits that all its keys have in common
    };
    struct Way {
        Slot* slots;
        u32 part;
    };

    static u64 most(u32 lg) { return (u64{1} << lg) * kTenths / 10; }
    static bool crowded(u64 n, u32 lg) { return n > most(lg); }
    u32 mask() const { return (1u << lg_) - 1; }
    u32 home(u32 half) const { return half >> (32 - lg_); }
    u32 next(u32 i) const { return (i + 1) & mask(); }
    Slot* segment(u32 half) const { return parts_.empty() ? slots_ : way(half).slots; }
    const Way& way(u32 half) const { return ways_[half & (ways_.size() - 1)]; }
    template <class F>
    void each_segment(F&& f) const {
        if (slots_) f(slots_);
        for (const Part& p : parts_) f(p.slots);
    }
    static std::size_t bytes(u32 lg) { return lg < kMostLg ? sizeof(Slot) << lg : kSegmentBytes; }
    static Slot* new_slots(Memory& m, u32 lg) {
        return static_cast<Slot*>(lg < kMostLg ? m.take_zeros(sizeof(Slot) << lg) : m.take_segment());
    }
    static void free_slots(Memory& m, Slot* slots, u32 lg) {
        if (lg < kMostLg) return m.give(slots, sizeof(Slot) << lg);
        m.give_segment(slots);
    }
    static void place(Slot* slots, u32 lg, const Slot& s) {
        u32 i = s.half() >> (32 - lg);
        while (!slots[i].free()) i = (i + 1) & ((1u << lg) - 1);
        slots[i] = s;
    }
    void rehash(Memory& m, u32 lg) {
        Slot* const fresh = new_slots(m, lg);
        if (slots_) {
            for (u32 i = 0; i <= mask(); ++i)
                if (!slots_[i].free()) place(fresh, lg, slots_[i]);
            free_slots(m, slots_, lg_);
        }
        slots_ = fresh;
        lg_ = lg;
        ++stamp_;
    }
    // Moves the keys of a segment with the next bit set to a new segment. The others are inserted again from the first
    // gap on, each at its old slot or before.
    void split(Memory& m, u32 half) {
        const u32 from = way(half).part, bit = parts_[from].bits;
        // The segments already use all bits that the home slots leave. The secret makes so many keys with equal bits
        // improbable.
        if (bit + lg_ >= 32) throw std::bad_alloc();
        const u32 ways = ways_.size();
        parts_.reserve(m, parts_.size() + 1);
        if (1u << bit == ways) ways_.reserve(m, 2 * ways);
        Slot* const fresh = new_slots(m, lg_);
        if (1u << bit == ways) {
            ways_.resize(m, 2 * ways);
            std::memcpy(static_cast<void*>(ways_.data() + ways), ways_.data(), sizeof(Way) * ways);
        }
        Slot* const slots = parts_[from].slots;
        u32 i = 0, moved = 0;
        while (!slots[i].free()) ++i;
        // Free slots and moving entries are random, so branches on them are mispredicted a third to half of the time.
        // These branches were most of 1.7 ms for 2 MB of slots.
        Slot* const to[2] = {slots, fresh};
        constexpr u32 kAtOnce = 64;
        Slot taken[kAtOnce + 1];
        for (u32 k = 0; k <= mask();) {
            u32 n = 0;
            for (const u32 stop = std::min(k + kAtOnce, mask() + 1); k < stop; ++k, i = next(i)) {
                taken[n] = slots[i];
                n += !slots[i].free();
                slots[i] = Slot::none();
            }
            for (u32 j = 0; j < n; ++j) {
                const u32 over = taken[j].half() >> bit & 1;
                place(to[over], lg_, taken[j]);
                moved += over;
            }
        }
        const u32 part = parts_.size();
        parts_[from].n -= moved;
        parts_[from].bits = bit + 1;
        parts_.push(m, {fresh, moved, bit + 1});
        for (u32 w = (half & ((1u << bit) - 1)) | 1u << bit; w < ways_.size(); w += 2u << bit) ways_[w] = {fresh, part};
        fullest_ = 0;
        for (const Part& p : parts_) fullest_ = std::max(fullest_, p.n);
        ++stamp_;
    }
    // Joins two segments of a former split once half a segment is enough for both.
    void merge(Memory& m, u32 half) {
        const u32 to = way(half).part;
        if (parts_[to].n > most(lg_) / 4 || !parts_[to].bits) return;
        const u32 bit = parts_[to].bits - 1;
        const u32 from = way(half ^ 1u << bit).part;
        if (parts_[from].bits != bit + 1 || parts_[from].n + parts_[to].n > most(lg_) / 2) return;
        Slot* const slots = parts_[to].slots;
        for (u32 i = 0; i <= mask(); ++i)
            if (const Slot& s = parts_[from].slots[i]; !s.free()) place(slots, lg_, s);
        free_slots(m, parts_[from].slots, lg_);
        parts_[to].n += parts_[from].n;
        parts_[to].bits = bit;
        parts_[from] = parts_.back();
        parts_.pop();
        ++stamp_;
        if (parts_.size() == 1) {
            slots_ = slots;
            parts_.release(m);
            ways_.release(m);
            return;
        }
        const u32 kept = to == parts_.size() ? from : to;
        for (u32 w = 0; w < ways_.size(); ++w) {
            if ((w & ((1u << bit) - 1)) == (half & ((1u << bit) - 1))) {
                ways_[w] = {slots, kept};
            } else if (ways_[w].part == parts_.size()) {
                ways_[w].part = from;
            }
        }
    }

    Slot* slots_ = nullptr;  // of a table with one segment
    Buf<Part> parts_;        // of a table with several segments
    Buf<Way> ways_;
    u32 n_ = 0;
    u32 lg_ = 0;       // log2 of the slots of a segment
    u32 fullest_ = 0;  // an upper bound of the entries of a segment
    u32 stamp_ = 0;    // changes when entries move across clusters
};

// 32 bits of the mixed key and the complement of a 32-bit reference, which is never zero.
struct RefSlot {
    u64 both;

    RefSlot() = default;
    RefSlot(u32 half, u32 ref) : both((u64{half} << 32) | static_cast<u32>(~ref)) {}
    static RefSlot none() { return {0, kNone}; }
    u32 half() const { return static_cast<u32>(both >> 32); }
    u32 ref() const { return ~static_cast<u32>(both); }
    bool free() const { return static_cast<u32>(both) == 0; }
};

// Maps 64-bit keys that are stored elsewhere (in a page, in a set) to the 32-bit reference of that place. The stored
// half gives the home slot, so neither removal nor growth reads those places. The full key is compared there if the
// halves agree (2^-32 by chance). Load factor 0.7: eight slots share a cache line, and 0.5 would cost 6 bytes a block.
class RefTable : public Slots<RefSlot, 7, 3> {
public:
    // `same(ref)`: whether the place contains the wanted key. Returns kNone if the key is absent.
    template <class Same>
    u32 find(u64 key, Same&& same) const {
        if (!size()) return kNone;
        const u32 h = mixed(key);
        return seek(h, [&](const RefSlot& s) { return s.half() == h && same(s.ref()); })->ref();
    }
    // The most likely reference of a present key.
    u32 guess(u64 key) const {
        if (!size()) return kNone;
        const u32 h = mixed(key);
        return seek(h, [&](const RefSlot& s) { return s.half() == h; })->ref();
    }
    // The key must be absent.
    void insert(Memory& m, u64 key, u32 ref) {
        const u32 h = mixed(key);
        make_room(m, h);
        put({h, ref});
    }
    // Inserts unless the key is present. Returns false if it is.
    template <class Same>
    bool insert_new(Memory& m, u64 key, u32 ref, Same&& same) {
        const u32 h = mixed(key);
        make_room(m, h);
        RefSlot* const at = seek(h, [&](const RefSlot& s) { return s.half() == h && same(s.ref()); });
        if (!at->free()) return false;
        fill(at, {h, ref});
        return true;
    }
    // Finds the entry by its reference, without reading the place that it refers to. Returns false if (key, ref) is
    // absent.
    bool erase(Memory& m, u64 key, u32 ref) {
        RefSlot* const at = slot_of(key, ref);
        if (at) remove(m, at);
        return at != nullptr;
    }
    bool contains(u64 key, u32 ref) const { return slot_of(key, ref) != nullptr; }
    bool move(u64 key, u32 from, u32 to) {
        RefSlot* const at = slot_of(key, from);
        if (at) *at = {at->half(), to};
        return at != nullptr;
    }
    template <class F>
    void each(F&& f) const {
        each_slot([&](const RefSlot& s) { f(s.ref()); });
    }

private:
    RefSlot* slot_of(u64 key, u32 ref) const {
        if (!size()) return nullptr;
        const RefSlot want{mixed(key), ref};
        RefSlot* const at = seek(want.half(), [&](const RefSlot& s) { return s.both == want.both; });
        return at->free() ? nullptr : at;
    }
};

struct HeadSlot {
    u64 prefix;
    u32 above, page;  // number of the chain plus one

    HeadSlot() = default;
    HeadSlot(u64 prefix, u32 chain, u32 page) : prefix(prefix), above(chain + 1), page(page) {}
    static HeadSlot none() { return {0, kNone, 0}; }
    u32 chain() const { return above - 1; }
    u32 half() const { return mixed(prefix); }
    bool free() const { return above == 0; }
};

// Maps the prefix hash of a chain's first block to the chain and to its first page. Since the slot has all three, a
// match of a large index waits for memory only twice: for the slot, then for chain and page together. Load factor 0.8,
// since the table is read once a chain, not once a block. With 0.7 it doubled together with the table of names, and a
// prompt of one block took 156 bytes at most, now 149.
class HeadTable : public Slots<HeadSlot, 8, 2> {
public:
    // `chain` is kNone if absent. Of two chains with colliding prefix hashes, returns the one inserted first.
    HeadSlot find(u64 prefix) const {
        if (!size()) return HeadSlot::none();
        return *seek(mixed(prefix), [&](const HeadSlot& s) { return s.prefix == prefix; });
    }
    // Of chains with colliding prefix hashes, the one that is `right`. A separate function, since it is almost never
    // called.
    template <class Right>
    [[gnu::noinline, gnu::cold]] HeadSlot find_among(u64 prefix, Right&& right) const {
        return *seek(mixed(prefix), [&](const HeadSlot& s) { return s.prefix == prefix && right(s); });
    }
    void insert(Memory& m, u64 prefix, u32 chain, u32 page) {
        make_room(m, mixed(prefix));
        put({prefix, chain, page});
    }
    void erase(Memory& m, u64 prefix, u32 chain) {
        if (HeadSlot* const at = slot_of(prefix, chain)) remove(m, at);
    }
    // Sets the first page of a chain.
    void turn(u64 prefix, u32 chain, u32 page) {
        if (HeadSlot* const at = slot_of(prefix, chain)) at->page = page;
    }
    bool contains(u64 prefix, u32 chain, u32 page) const {
        const HeadSlot* const at = slot_of(prefix, chain);
        return at && at->page == page;
    }

private:
    HeadSlot* slot_of(u64 prefix, u32 chain) const {
        if (!size()) return nullptr;
        HeadSlot* const at =
            seek(mixed(prefix), [&](const HeadSlot& s) { return s.prefix == prefix && s.chain() == chain; });
        return at->free() ? nullptr : at;
    }
};

// Four consecutive numbers of chains: their common bits, and a bit for each number.
struct ChainSlot {
    u32 both;

    static ChainSlot none() { return {0}; }
    u32 four() const { return both >> 4; }
    u32 half() const { return mixed(four()); }
    bool free() const { return both == 0; }
    template <class F>
    void each(F&& f) const {
        for (u32 bits = both & 15; bits; bits &= bits - 1) f(four() * 4 + static_cast<u32>(__builtin_ctz(bits)));
    }
};

// A set of numbers of chains below 2^30. The numbers of one pod are consecutive. A slot for each number took 5.7 to
// 11.4 bytes of a prompt of one block; a slot for four takes 1.4 to 2.9. Numbers that are far apart still take a slot
// each.
class ChainTable : public Slots<ChainSlot, 7, 2> {
public:
    static constexpr u32 kTogether = 4;

    void add(Memory& m, u32 chain) {
        const u32 bit = 1u << (chain & 3);
        if (ChainSlot* const at = slot_of(chain)) return void(at->both |= bit);
        make_room(m, mixed(chain >> 2));
        put({chain >> 2 << 4 | bit});
    }
    void sub(Memory& m, u32 chain) {
        ChainSlot* const at = slot_of(chain);
        const u32 bit = 1u << (chain & 3);
        if (!at || !(at->both & bit)) return;
        if ((at->both & 15) == bit) return remove(m, at);
        at->both &= ~bit;
    }
    bool has(u32 chain) const {
        const ChainSlot* const at = slot_of(chain);
        return at && at->both >> (chain & 3) & 1;
    }
    template <class F>
    void each(F&& f) const {
        each_slot([&](const ChainSlot& s) { s.each(f); });
    }

private:
    ChainSlot* slot_of(u32 chain) const {
        if (!size()) return nullptr;
        ChainSlot* const at = seek(mixed(chain >> 2), [&](const ChainSlot& s) { return s.four() == chain >> 2; });
        return at->free() ? nullptr : at;
    }
};

struct CountSlot {
    u64 key;
    u32 count;

    static CountSlot none() { return {0, 0}; }
    u32 half() const { return mixed(key); }
    bool free() const { return count == 0; }
};

// Counts by a 64-bit key (a chain and a depth). A key with count 0 has no entry.
class CountTable : public Slots<CountSlot, 5, 2> {
public:
    u32 get(u64 key) const {
        const CountSlot* const at = slot_of(key);
        return at ? at->count : 0;
    }
    void add(Memory& m, u64 key, u32 by = 1) {
        const u32 h = mixed(key);
        make_room(m, h);
        CountSlot* const at = seek(h, [&](const CountSlot& s) { return s.key == key; });
        if (at->free()) {
            fill(at, {key, by});
        } else {
            at->count += by;
        }
    }
    void sub(Memory& m, u64 key, u32 by = 1) {
        CountSlot* const at = slot_of(key);
        if (!at) return;
        if (at->count > by) {
            at->count -= by;
        } else {
            remove(m, at);
        }
    }
    template <class F>
    void each(F&& f) const {
        each_slot([&](const CountSlot& s) { f(s.key, s.count); });
    }

private:
    CountSlot* slot_of(u64 key) const {
        if (!size()) return nullptr;
        CountSlot* const at = seek(mixed(key), [&](const CountSlot& s) { return s.key == key; });
        return at->free() ? nullptr : at;
    }
};

}  // namespace kvindex
