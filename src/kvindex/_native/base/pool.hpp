// Items of one type with dense numbers and stable addresses.
#pragma once

#include <algorithm>

#include "base/memory.hpp"
#include "base/poison.hpp"

namespace kvindex {

// An item's number is its place in a few large arenas, so an access reads no other memory outside the cache. With an
// array of pointers to slabs, a match in 10 million blocks waited for that array too. Memory is counted by slabs of 64
// items. An arena is address space that takes memory where it is touched, and it is returned with its last slab.
template <class T>
class Pool {
public:
    explicit Pool(Memory& m) : m_(m) {}
    ~Pool() { clear(); }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    T& operator[](u32 id) { return arenas_[id >> kLg].items[id & kMask]; }
    const T& operator[](u32 id) const { return arenas_[id >> kLg].items[id & kMask]; }
    bool alive(u32 id) const { return (id >> 6) < slabs_.size() && !(slabs_[id >> 6].free >> (id & 63) & 1); }
    u32 size() const { return n_; }
    // How many numbers from `id` on are neighbours in memory, at most `most`.
    u32 together(u32 id, u32 most) const { return most < kMask + 1 - (id & kMask) ? most : kMask + 1 - (id & kMask); }
    // The bytes that this many further items take.
    std::size_t growth(u32 more) const {
        const u32 spare = (slabs_.size() - holes_.size()) * 64 - n_;
        return more > spare ? static_cast<std::size_t>((more - spare + 63) / 64) * (sizeof(T) * 64 + sizeof(Slab)) : 0;
    }

    u32 take() {
        if (open_.empty()) open();
        // Items come from one slab until it is full. Taking from the slab with the last freed item kept every slab in
        // use: each got a new item as its old ones went.
        const u32 s = open_[0];
        Slab& slab = slabs_[s];
        const u32 id = s * 64 + static_cast<u32>(__builtin_ctzll(slab.free));
        slab.free &= slab.free - 1;
        if (!slab.free) leave(slab);
        ++n_;
        T* item = &(*this)[id];
        ASAN_UNPOISON_MEMORY_REGION(item, sizeof(T));
        new (item) T();
        return id;
    }
    void give(u32 id) {
        const u32 s = id >> 6;
        Slab& slab = slabs_[s];
        if (!slab.free) {
            slab.open_at = open_.size();
            open_.push(m_, s);
        }
        const u64 free = slab.free | 1ull << (id & 63);
        // Before the other changes, since it may fail: clear() relies on the count.
        if (!~free) holes_.push(m_, s);
        slab.free = free;
        ASAN_POISON_MEMORY_REGION(&(*this)[id], sizeof(T));
        --n_;
        if (~free) return;
        leave(slab);
        m_.sub(sizeof(T) * 64);
        Arena& arena = arenas_[id >> kLg];
        // The first arena stays while little of it was touched, so that a small index can be emptied and filled without
        // system calls.
        if (--arena.used == 0 && (id >> kLg || arena.touched > kKept)) unmap(arena);
        // A pool may shrink while others grow. With a budget of 64 MB, prompts of one block and then of 64 blocks left
        // 78 MB resident, most of it in arenas with a few chains each.
        if (holes_.size() - cold_ > kKept + slabs_.size() / kKeptShare) cool(holes_[cold_++]);
        if (n_ == 0) {
            cold_ = 0;
            slabs_.release(m_);
            open_.release(m_);
            holes_.release(m_);
        }
    }
    // Does not visit the items.
    void clear() {
        for (u32 i = 0; i < slabs_.size(); ++i)
            if (~slabs_[i].free) m_.sub(sizeof(T) * 64);
        n_ = 0;
        shrink();
    }
    // Returns memory that is kept for later items.
    void shrink() {
        if (n_) return;
        for (Arena& arena : arenas_)
            if (arena.items) unmap(arena);
        slabs_.release(m_);
        open_.release(m_);
        holes_.release(m_);
        cold_ = 0;
        arenas_.release(m_);
    }
    template <class F>
    void each(F&& f) const {
        for (u32 s = 0; s < slabs_.size(); ++s)
            for (u64 used = ~slabs_[s].free; used; used &= used - 1)
                f(s * 64 + static_cast<u32>(__builtin_ctzll(used)));
    }

private:
    struct Slab {
        u64 free;     // a bit for each item
        u32 open_at;  // its place in open_
    };
    struct Arena {
        T* items;
        u32 used;     // slabs
        u32 touched;  // slabs, ever
    };
    // Items that fit into a large page, rounded down to a power of two.
    static constexpr u32 kLg = 63 - static_cast<u32>(__builtin_clzll(kHugePage / sizeof(T))), kMask = (1u << kLg) - 1;
    static constexpr std::size_t kArenaBytes = sizeof(T) << kLg;
    // Large pages take memory as a whole, so they are used only after three arenas, and only if the index may take 2 MB
    // that it does not count (Spare::on).
    static constexpr u32 kHugeFrom = 3;
    // Empty slabs that keep their memory for later items: this number, plus this share of all slabs. With a 32nd,
    // prompts that change their length twice peaked at 1.01 of a budget of 32 MB, now at 0.99.
    static constexpr u32 kKept = 8, kKeptShare = 128;
    static constexpr std::size_t kSlabBytes = sizeof(T) * 64, kPageBytes = 4096;
    static_assert(kLg >= 6, "a slab lies in one arena");

    void open() {
        const bool again = !holes_.empty();
        const u32 s = again ? holes_.back() : slabs_.size(), a = s >> (kLg - 6);
        if (a == arenas_.size()) arenas_.push(m_, {nullptr, 0, 0});
        Arena& arena = arenas_[a];
        if (!arena.items) {
            const bool huge = a >= kHugeFrom && m_.spare.on();
            arena.items =
                static_cast<T*>(huge && kArenaBytes == kHugePage ? m_.spare.take() : map_memory(kArenaBytes, huge));
            arena.touched = 0;
            ASAN_POISON_MEMORY_REGION(arena.items, kArenaBytes);
        }
        open_.reserve(m_, open_.size() + 1);
        if (again) {
            holes_.pop();
            cold_ = std::min(cold_, holes_.size());
        } else {
            slabs_.push(m_, {~0ull, 0});
        }
        open_.push(m_, s);
        slabs_[s].open_at = open_.size() - 1;
        const u32 place = (s & (kMask >> 6)) + 1;
        if (arena.touched < place) arena.touched = place;
        ++arena.used;
        m_.add(sizeof(T) * 64);
    }
    void leave(const Slab& slab) {
        const u32 last = open_.back();
        open_[slab.open_at] = last;
        slabs_[last].open_at = slab.open_at;
        open_.pop();
    }
    // Returns the pages of an empty slab, including those that it shares with empty slabs only: eight slabs of small
    // items share a page.
    void cool(u32 s) {
        const Arena& arena = arenas_[s >> (kLg - 6)];
        if (!arena.items) return;
        constexpr std::size_t kSlabs = std::size_t{1} << (kLg - 6);
        const u32 first = s & ~static_cast<u32>(kSlabs - 1);
        const auto empty = [&](std::size_t from, std::size_t to) {
            for (std::size_t i = from / kSlabBytes; i < std::min((to + kSlabBytes - 1) / kSlabBytes, kSlabs); ++i)
                if (first + i < slabs_.size() && ~slabs_[first + i].free) return false;
            return true;
        };
        const std::size_t start = kSlabBytes * (s - first), end = start + kSlabBytes;
        std::size_t from = start / kPageBytes * kPageBytes, to = (end + kPageBytes - 1) / kPageBytes * kPageBytes;
        if (!empty(from, start)) from += kPageBytes;
        if (!empty(end, to)) to -= kPageBytes;
        if (from < to) madvise(reinterpret_cast<char*>(arena.items) + from, to - from, MADV_DONTNEED);
    }
    void unmap(Arena& arena) {
        ASAN_UNPOISON_MEMORY_REGION(arena.items, kArenaBytes);
        munmap(static_cast<void*>(arena.items), kArenaBytes);
        arena.items = nullptr;
        // A shrinking index needs no page in reserve.
        m_.spare.drop();
    }

    Memory& m_;
    Buf<Arena> arenas_;
    Buf<Slab> slabs_;
    Buf<u32> open_;   // slabs with a free item
    Buf<u32> holes_;  // slabs without an item, for reuse
    u32 cold_ = 0;    // the first of these, which are reused last and whose memory was returned
    u32 n_ = 0;
};

}  // namespace kvindex
