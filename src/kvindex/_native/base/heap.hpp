// Memory for small and growing arrays, in slabs that return to the system when they are empty.
//
// malloc kept 274 of 875 MB after everything had been removed: it returns only the end of its heap, and one live item
// there keeps all memory below it. Here, each slab of 64 KB holds items of one size. The caller passes the size to
// `give`, so items have no header.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace kvindex {

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

inline void make_huge([[maybe_unused]] void* p, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_HUGEPAGE
    madvise(p, bytes, MADV_HUGEPAGE);
#endif
}
inline void* map_pages(std::size_t bytes) {
    void* const got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (got == MAP_FAILED) throw std::bad_alloc();
    return got;
}
// Aligned to the size of a large page. `bytes` must be a multiple of the page size, or munmap of the rest fails.
inline void* map_aligned(std::size_t bytes) {
    char* const from = static_cast<char*>(map_pages(bytes + kHugePage));
    const std::size_t before = (kHugePage - reinterpret_cast<std::uintptr_t>(from) % kHugePage) % kHugePage;
    if (before) munmap(from, before);
    munmap(from + before + bytes, kHugePage - before);
    return from + before;
}

// Address space from the system, which takes memory only where it is touched. `huge`: in large pages, if the system has
// some. In an index of 10 million blocks nearly every access misses the TLB, and page walks were a quarter of the time
// of a short match.
inline void* map_memory(std::size_t bytes, bool huge) {
    if (!huge) return map_pages(bytes);
    void* const p = map_aligned(bytes);
    make_huge(p, bytes);
    return p;
}

class Heap {
public:
    // The address sanitizer checks only memory from malloc, so the heap uses malloc there. The heap's own test uses the
    // slabs all the same.
#if defined(__SANITIZE_ADDRESS__)
#define KVINDEX_ADDRESSES 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVINDEX_ADDRESSES 1
#endif
#endif
#if defined(KVINDEX_ADDRESSES) && !defined(KVINDEX_SLABS)
    static constexpr bool kPlain = true;
#else
    static constexpr bool kPlain = false;
#endif

    Heap() = default;
    Heap(const Heap&) = delete;
    Heap& operator=(const Heap&) = delete;
    ~Heap() {
        while (all_) unmap(all_);
        while (room_) unmap(room_);
    }

    // The size of the item that holds this many bytes.
    static std::size_t room(std::size_t n) {
        if (n > kLargest) return (n + kPage - 1) / kPage * kPage;
        return n <= kFineBytes ? (n + 15) / 16 * 16 : size_of(class_of(n));
    }
    void* take(std::size_t n) {
        if (n > kLargest) return map_pages(room(n));
        if (kPlain) return plain(std::malloc(room(n)));
        const u32 c = class_of(n);
        Slab* s = open_[c];
        if (!s) s = open(c);
        void* p = s->free;
        if (p) {
            std::memcpy(&s->free, p, sizeof p);
        } else {
            p = reinterpret_cast<char*>(s) - kHeader + s->fresh;
            s->fresh += size_of(c);
        }
        if (++s->used == s->most) unlink(open_[c], s);
        return p;
    }
    void* take_zeros(std::size_t n) {
        void* const p = take(n);
        if (n <= kLargest) std::memset(p, 0, n);
        return p;
    }
    void give(void* p, std::size_t n) noexcept {
        if (n > kLargest) return void(munmap(p, room(n)));
        if (kPlain) return std::free(p);
        Slab* const s = slab_of(p);
        std::memcpy(p, &s->free, sizeof p);
        s->free = p;
        if (s->used-- == s->most) link_behind(open_[s->kind], s);
        if (s->used == 0) close(s);
    }
    void* resize(void* p, std::size_t from, std::size_t to) {
        if (room(from) == room(to)) return p;
#ifdef MREMAP_MAYMOVE
        if (from > kLargest && to > kLargest) {
            void* const moved = mremap(p, room(from), room(to), MREMAP_MAYMOVE);
            if (moved == MAP_FAILED) throw std::bad_alloc();
            return moved;
        }
#endif
        void* const q = take(to);
        std::memcpy(q, p, from < to ? from : to);
        give(p, from);
        return q;
    }

private:
    using u32 = std::uint32_t;

    static constexpr std::size_t kPage = 4096, kSlab = std::size_t{64} << 10, kLargest = std::size_t{8} << 10;
    static constexpr std::size_t kHeader = 64, kItems = 128;  // offsets of a slab's header and of its first item
    static constexpr std::size_t kFineBytes = 256;
    static constexpr u32 kFine = kFineBytes / 16, kClasses = kFine + 5 * 8, kSlabs = kHugePage / kSlab, kSpare = 8;

    struct Slab {
        void* free;  // list of freed items, linked through their first bytes
        u32 fresh;   // offset of the first item that has never been handed out
        u32 used, most;
        u32 kind;
        Slab *before, *after;  // in the list of slabs of this size with a free item
    };
    // 2 MB with 32 slabs. Its header lies before that of its first slab.
    struct Chunk {
        Chunk *before, *after;
        u32 free;     // a bit for each slab
        u32 touched;  // free slabs that still have memory
    };
    static_assert(sizeof(Chunk) <= kHeader && kHeader + sizeof(Slab) <= kItems, "headers lie before the items");

    static void* plain(void* p) {
        if (!p) throw std::bad_alloc();
        return p;
    }
    // 16 sizes up to 256 bytes, then eight per doubling.
    static u32 class_of(std::size_t n) {
        if (n <= kFineBytes) return n ? static_cast<u32>((n - 1) / 16) : 0;
        const u32 lg = 63 - static_cast<u32>(__builtin_clzll(n - 1));
        return kFine + (lg - 8) * 8 + static_cast<u32>((n - 1) >> (lg - 3)) - 8;
    }
    static u32 size_of(u32 c) {
        if (c < kFine) return (c + 1) * 16;
        return ((c - kFine) % 8 + 9) << ((c - kFine) / 8 + 5);
    }
    static char* start(void* p, std::size_t unit) {
        return static_cast<char*>(p) - reinterpret_cast<std::uintptr_t>(p) % unit;
    }
    static Slab* slab_of(void* p) { return reinterpret_cast<Slab*>(start(p, kSlab) + kHeader); }
    static Chunk* chunk_of(void* p) { return reinterpret_cast<Chunk*>(start(p, kHugePage)); }
    static u32 place(const Chunk* c, const Slab* s) {
        return static_cast<u32>((reinterpret_cast<const char*>(s) - reinterpret_cast<const char*>(c)) / kSlab);
    }
    template <class T>
    static void link(T*& list, T* item) {
        item->before = nullptr;
        item->after = list;
        if (list) list->before = item;
        list = item;
    }
    // Behind the first slab, from which items are taken until it is full. Taking from the slab with the last freed item
    // kept every slab in use: each got a new item as its old ones went.
    static void link_behind(Slab*& list, Slab* s) {
        if (!list) return link(list, s);
        s->before = list;
        s->after = list->after;
        if (s->after) s->after->before = s;
        list->after = s;
    }
    template <class T>
    static void unlink(T*& list, T* item) {
        if (item->before) item->before->after = item->after;
        if (item->after) item->after->before = item->before;
        if (list == item) list = item->after;
    }

    Slab* open(u32 kind) {
        if (!room_) {
            Chunk* const fresh = static_cast<Chunk*>(map_aligned(kHugePage));
            fresh->free = ~0u;
            link(room_, fresh);
        }
        Chunk* const c = room_;
        const u32 from = c->free & c->touched ? c->free & c->touched : c->free;
        const u32 at = static_cast<u32>(__builtin_ctz(from));
        if (c->touched >> at & 1) --spare_;
        c->free &= ~(1u << at);
        c->touched |= 1u << at;
        if (!c->free) {
            unlink(room_, c);
            link(all_, c);
        }
        Slab* const s = slab_of(reinterpret_cast<char*>(c) + at * kSlab);
        s->free = nullptr;
        s->fresh = kItems;
        s->used = 0;
        s->kind = kind;
        s->most = static_cast<u32>((kSlab - kItems) / size_of(kind));
        link(open_[kind], s);
        return s;
    }
    // A few empty slabs keep their memory for later items. A chunk returns as a whole.
    void close(Slab* s) noexcept {
        unlink(open_[s->kind], s);
        Chunk* const c = chunk_of(s);
        const u32 at = place(c, s);
        if (!c->free) {
            unlink(all_, c);
            link(room_, c);
        }
        c->free |= 1u << at;
        if (~c->free == 0) {
            // Every slab is counted but the one that is being closed.
            spare_ -= static_cast<u32>(__builtin_popcount(c->touched)) - 1;
            unlink(room_, c);
            munmap(c, kHugePage);
        } else if (spare_ < kSpare || at == 0) {
            // The page of the first slab contains the chunk's header.
            ++spare_;
        } else {
            c->touched &= ~(1u << at);
            madvise(reinterpret_cast<char*>(c) + at * kSlab, kSlab, MADV_DONTNEED);
        }
    }
    void unmap(Chunk*& list) {
        Chunk* const c = list;
        unlink(list, c);
        munmap(c, kHugePage);
    }

    Slab* open_[kClasses] = {};
    Chunk* room_ = nullptr;  // chunks with a free slab
    Chunk* all_ = nullptr;   // chunks without a free slab
    u32 spare_ = 0;          // free slabs that still have memory, in all chunks
    static_assert(kSlabs == 32, "a chunk's slabs are the bits of a word");
};

}  // namespace kvindex
