// The approximate time at which each chain was last stored to or matched, which gives the order of eviction.
//
// Time is divided into generations. A touch of a chain writes the generation's number into it, unless the number is
// there already. A reader writes nothing else, and at most once per chain and generation. The lists by age belong to
// the writer. It moves a chain to the list of its number only when it meets the chain at the old end. So a touch costs
// a comparison, and finding the oldest chain is O(1) amortised: each chain is moved at most once per generation in
// which it was touched.
//
// A parent is never older than its children: a touch of a chain touches its parents, too.
#pragma once

#include <memory>

#include "base/pool.hpp"

namespace kvindex {

// The age of a chain. Its neighbours in a list by age lie apart: only a writer needs them, and only with limits.
struct Age {
    mutable u32 touched = 0;  // generation
};

// Items: a container of things with a member `age`, addressed by number.
template <class Items>
class Ages {
public:
    Ages(Memory& m, Items& items) : m_(m), items_(items), links_(m) {}
    ~Ages() {
        if (rings_) m_.sub(sizeof(Ring) * kRings);
    }
    Ages(const Ages&) = delete;
    Ages& operator=(const Ages&) = delete;

    // Call it before the first item. span: the seconds that the generations must cover in steps of a hundredth, or 0.
    void open(double span) {
        rings_ = std::make_unique<Ring[]>(kRings);
        m_.add(sizeof(Ring) * kRings);
        for (u32 i = 0; i < kRings; ++i) rings_[i].link.older = rings_[i].link.newer = kSentinel + i;
        step_ = span / 100;
        oldest_ = now_ = 1;
        rings_[slot(now_)].began = kLongAgo;
    }
    bool on() const { return rings_ != nullptr; }
    // The bytes that this many further items take.
    std::size_t growth(u32 more) const { return on() ? links_.growth(more) : 0; }
    // Removes all items.
    void clear() {
        links_.clear();
        for (u32 i = 0; on() && i < kRings; ++i) rings_[i].link.older = rings_[i].link.newer = kSentinel + i;
    }

    // Returns memory that is kept for later items.
    void shrink() { links_.shrink(); }

    // Must be called directly after an item was taken.
    void add(u32 id) {
        if (!on()) return;
        if (links_.take() != id) __builtin_trap();  // both pools give the same ids for the same calls
        items_[id].age.touched = now_;
        put(id, newest_end(now_));
    }
    // Must be called directly before an item is returned.
    void drop(u32 id) {
        if (!on()) return;
        unlink(id);
        links_.give(id);
    }
    // Called under the read lock, by any number of threads at once.
    void seen(const Age& age) const {
        if (__atomic_load_n(&age.touched, __ATOMIC_RELAXED) != now_)
            __atomic_store_n(&age.touched, now_, __ATOMIC_RELAXED);
    }
    bool fresh(u32 id) const { return __atomic_load_n(&items_[id].age.touched, __ATOMIC_RELAXED) == now_; }
    // Makes a chain that the writer touches the newest at once.
    void renew(u32 id) {
        if (!on()) return;
        items_[id].age.touched = now_;
        unlink(id);
        put(id, newest_end(now_));
    }

    // Begins a new generation.
    void advance(double time) {
        ++now_;
        if (now_ - oldest_ == kRings) {
            // The two oldest lists become one, and keep their order.
            const u32 end = kSentinel + slot(oldest_), into = kSentinel + slot(oldest_ + 1);
            const u32 first = at(end).newer, last = at(end).older, then = at(into).newer;
            if (first != end) {
                at(first).older = into;
                at(into).newer = first;
                at(last).newer = then;
                at(then).older = last;
                at(end).older = at(end).newer = end;
            }
            ++oldest_;
        }
        rings_[slot(now_)].began = time;
    }
    // By the clock: a generation is a hundredth of the span, so an age is at most that much too large.
    bool due(double time) const { return time >= next_step(); }
    double next_step() const { return rings_[slot(now_)].began + step_; }
    double began_newest() const { return rings_[slot(now_)].began; }
    double began_oldest() const { return rings_[slot(oldest_)].began; }

    // The item that was touched longest ago, or kNone. Of two items in one generation, the one that was older in the
    // generation before, or that came first.
    u32 oldest() {
        for (;;) {
            const u32 end = kSentinel + slot(oldest_), id = at(end).newer;
            if (id == end) {
                if (oldest_ == now_) return kNone;
                ++oldest_;
                continue;
            }
            const u32 age = now_ - items_[id].age.touched;  // modulo 2^32: numbers may start over
            if (age >= now_ - oldest_) return id;
            unlink(id);
            put(id, newest_end(now_ - age));
        }
    }
    // Whether no item is older than this generation.
    bool all_fresh() { return oldest() == kNone || oldest_ == now_; }
    // Makes `id`, which is as old as the oldest item, the oldest.
    void next(u32 id) {
        unlink(id);
        put(id, kSentinel + slot(oldest_));
    }

    // For _check().
    bool younger(u32 id, u32 than) const {
        return on() && now_ - items_[id].age.touched < now_ - items_[than].age.touched;
    }
    // For _check(): the number of items in the lists. Returns false if a list is broken.
    bool count(u32& n) const {
        n = 0;
        if (!on()) return true;
        for (u32 g = oldest_; g != now_ + 1; ++g) {
            const u32 end = kSentinel + slot(g);
            u32 before = end;
            for (u32 id = at(end).newer; id != end; before = id, id = at(id).newer, ++n)
                if (at(id).older != before || (g != oldest_ && now_ - items_[id].age.touched > now_ - g)) return false;
            if (at(end).older != before) return false;
        }
        return true;
    }

private:
    // Enough for the hundred steps of a span. Without a span, it is the number of distinct generations.
    static constexpr u32 kRings = 128;
    static constexpr u32 kSentinel = kNone - kRings;
    static constexpr double kLongAgo = -1e300;

    struct Link {
        u32 older = kNone, newer = kNone;
    };
    struct Ring {
        double began = 0;
        Link link;
    };
    static u32 slot(u32 generation) { return generation % kRings; }
    // A chain's neighbours, or a list's two ends. At an end "newer" is the first, so every list is a circle.
    Link& at(u32 id) { return id >= kSentinel ? rings_[id - kSentinel].link : links_[id]; }
    const Link& at(u32 id) const { return id >= kSentinel ? rings_[id - kSentinel].link : links_[id]; }
    // The item behind which the newest of a generation is put.
    u32 newest_end(u32 generation) const { return at(kSentinel + slot(generation)).older; }
    void put(u32 id, u32 after) {
        Link &left = at(after), &it = at(id);
        it.older = after;
        it.newer = left.newer;
        at(it.newer).older = id;
        left.newer = id;
    }
    void unlink(u32 id) {
        const Link it = at(id);
        at(it.older).newer = it.newer;
        at(it.newer).older = it.older;
    }

    Memory& m_;
    Items& items_;
    Pool<Link> links_;
    std::unique_ptr<Ring[]> rings_;
    double step_ = 0;
    u32 now_ = 0, oldest_ = 0;
};

}  // namespace kvindex
