// Growable arrays that count the bytes they allocate, so that the size of the index is exact at any moment.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/heap.hpp"
#include "base/segments.hpp"
#include "base/spare.hpp"

namespace kvindex {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

inline constexpr u32 kNone = 0xFFFFFFFFu;

// Blocks that one turn of the write lock changes, about 0.1 ms. Longer changes continue in the next turn. Tests build
// with a smaller number to see several turns.
#ifndef KVINDEX_TURN_BLOCKS
#define KVINDEX_TURN_BLOCKS 512
#endif
inline constexpr u32 kTurnBlocks = KVINDEX_TURN_BLOCKS;

// For functions that only prefetch. If GCC 12 does not inline such a function, it treats the function as one without
// effects and drops the call.
#define KVINDEX_INLINE [[gnu::always_inline]] inline

// The counter of an index. Every native allocation is counted, so `bytes` is exact.
struct Memory {
    explicit Memory(Spare& s) : spare(s) {}
    std::size_t bytes = 0;
    void add(std::size_t n) { bytes += n; }
    void sub(std::size_t n) {
        assert(n <= bytes);
        bytes -= n;
    }

    // Counted with the rounded size.
    void* take(std::size_t n) {
        void* const p = heap.take(n);
        add(Heap::room(n));
        return p;
    }
    void* take_zeros(std::size_t n) {
        void* const p = heap.take_zeros(n);
        add(Heap::room(n));
        return p;
    }
    void* take_segment() {
        const std::size_t before = segments.overhead();
        segments.reserve();
        add(segments.overhead() - before);
        void* const p = segments.take(heap, spare);
        add(kSegmentBytes);
        return p;
    }
    void give_segment(void* p) noexcept {
        const std::size_t before = segments.overhead();
        segments.give(heap, spare, p);
        sub(kSegmentBytes + before - segments.overhead());
    }
    void* resize(void* p, std::size_t from, std::size_t to) {
        void* const q = heap.resize(p, from, to);
        bytes += Heap::room(to) - Heap::room(from);
        return q;
    }
    void give(void* p, std::size_t n) noexcept {
        heap.give(p, n);
        sub(Heap::room(n));
    }

    Heap heap;
    Spare& spare;
    Segments segments;
};

// Bytes of scratch that are kept from one payload or event to the next: enough for an event of 10,000 blocks. With a
// budget, at most this share of it is kept.
inline constexpr std::size_t kMostScratch = std::size_t{1} << 20, kScratchShare = 64;

// Whether a value may be moved with memcpy, without a destructor call for its old place. This holds for trivial types
// and for types with a member type Relocatable.
template <class T, class = void>
struct IsRelocatable : std::is_trivially_copyable<T> {};
template <class T>
struct IsRelocatable<T, std::void_t<typename T::Relocatable>> : std::true_type {};

// A vector of 16 bytes (std::vector has 24) that grows by a quarter. Each chain has several: half-empty tails would
// cost more than the copies (a chain that grows block by block copies each element about five times). Elements are
// moved with memcpy and never destroyed, so their type must allow that. A Buf can be moved but not copied, and its
// owner releases it, since only the owner has the counter. Up to kHere elements lie in the place of the pointer: most
// chains of a busy fleet are short, and each allocation is a cache miss for a reader.
template <class T, u32 kHere = 0>
class Buf {
    static_assert(IsRelocatable<T>::value, "Buf relocates bytes");
    static_assert(kHere * sizeof(T) <= sizeof(T*), "what lies in the pointer's place must fit there");

public:
    Buf() = default;
    ~Buf() { assert(!owns()); }
    Buf(const Buf&) = delete;
    Buf& operator=(const Buf&) = delete;
    Buf(Buf&& o) noexcept { steal(o); }
    Buf& operator=(Buf&& o) noexcept {
        assert(!owns());
        steal(o);
        return *this;
    }

    T* data() { return here() ? reinterpret_cast<T*>(place_) : heap(); }
    const T* data() const { return here() ? reinterpret_cast<const T*>(place_) : heap(); }
    u32 size() const { return n_; }
    bool empty() const { return n_ == 0; }
    T& operator[](std::size_t i) {
        assert(i < n_);
        return data()[i];
    }
    const T& operator[](std::size_t i) const {
        assert(i < n_);
        return data()[i];
    }
    T& back() { return (*this)[n_ - 1]; }
    const T& back() const { return (*this)[n_ - 1]; }
    T* begin() { return data(); }
    T* end() { return data() + n_; }
    const T* begin() const { return data(); }
    const T* end() const { return data() + n_; }

    void reserve(Memory& m, u32 need) {
        if (need <= cap_) return;
        u32 cap = cap_ + cap_ / 4 + 1;
        if (cap < need) cap = need;
        regrow(m, cap);
    }
    void push(Memory& m, T v) {
        reserve(m, n_ + 1);
        new (static_cast<void*>(data() + n_++)) T(std::move(v));
    }
    // Requires room for one more element.
    void insert(u32 at, T v) {
        assert(at <= n_ && n_ < cap_);
        std::memmove(static_cast<void*>(data() + at + 1), static_cast<const void*>(data() + at), sizeof(T) * (n_ - at));
        new (static_cast<void*>(data() + at)) T(std::move(v));
        ++n_;
    }
    void resize(Memory& m, u32 n) {
        reserve(m, n);
        n_ = n;
    }
    // Replaces `erase` elements at `at` with `insert` uninitialised ones.
    void splice(Memory& m, u32 at, u32 erase, u32 insert) {
        assert(at + erase <= n_);
        const u32 tail = n_ - at - erase;
        if (insert > erase) reserve(m, n_ + insert - erase);
        if (tail)
            std::memmove(static_cast<void*>(data() + at + insert), static_cast<const void*>(data() + at + erase),
                         sizeof(T) * tail);
        n_ = at + insert + tail;
    }
    void pop() {
        assert(n_);
        --n_;
    }
    void truncate(u32 n) {
        assert(n <= n_);
        n_ = n;
    }
    // Returns slack once half of the space is unused. Called after removals, so that memory follows the content.
    void trim(Memory& m) {
        if (n_ == 0) {
            release(m);
        } else if (cap_ > 4 && n_ <= cap_ / 2) {
            shrink(m, n_ + n_ / 8);
        }
    }
    // If there is no memory, the capacity stays: a removal must not fail.
    void shrink(Memory& m, u32 cap) {
        try {
            if (cap < cap_) regrow(m, cap);
        } catch (const std::bad_alloc&) {
            return;
        }
    }
    void release(Memory& m) {
        if (!here()) {
            if (owns()) m.give(heap(), sizeof(T) * cap_);
        }
        point(nullptr);
        n_ = 0;
        cap_ = kHere;
    }

private:
    static constexpr std::size_t kFitted = 4096;

    bool here() const { return kHere && cap_ <= kHere; }
    bool owns() const { return cap_ > kHere; }
    // Requires a Buf that owns nothing.
    void steal(Buf& o) noexcept {
        std::memcpy(place_, o.place_, sizeof place_);
        n_ = o.n_;
        cap_ = o.cap_;
        o.point(nullptr);
        o.n_ = 0;
        o.cap_ = kHere;
    }
    void regrow(Memory& m, u32 cap) {
        if constexpr (kHere > 0) {
            if (here() || cap <= kHere) {
                Buf to;
                if (cap > kHere) to.regrow_heap(m, cap);
                std::memcpy(static_cast<void*>(to.data()), static_cast<const void*>(data()), sizeof(T) * n_);
                to.n_ = n_;
                release(m);
                steal(to);
                return;
            }
        }
        regrow_heap(m, cap);
    }
    void regrow_heap(Memory& m, u32 cap) {
        // The capacity fills the rounded size.
        const std::size_t bytes = sizeof(T) * cap;
        if (bytes <= kFitted) cap = static_cast<u32>(Heap::room(bytes) / sizeof(T));
        void* const q = owns() ? m.resize(heap(), sizeof(T) * cap_, bytes) : m.take(bytes);
        point(static_cast<T*>(q));
        cap_ = cap;
    }

    // The pointer, or the items themselves. Copied with memcpy, since both are the same memory for the compiler.
    T* heap() const {
        T* p;
        std::memcpy(&p, place_, sizeof(T*));
        return p;
    }
    void point(T* p) { std::memcpy(place_, &p, sizeof(T*)); }

    alignas(T*) unsigned char place_[sizeof(T*)] = {};
    u32 n_ = 0;
    u32 cap_ = kHere;
};

// Empties vectors and returns their memory. Assigning {} keeps it.
template <class... V>
void drop_all(V&... list) {
    (V().swap(list), ...);
}
// The bytes that vectors have allocated.
template <class... V>
std::size_t bytes_of(const V&... list) {
    return (... + (list.capacity() * sizeof(typename V::value_type)));
}

// An allocator for containers of the standard library that grow with the engines' events.
template <class T>
struct Counted {
    using value_type = T;
    Memory* m;

    explicit Counted(Memory& memory) : m(&memory) {}
    template <class U>
    Counted(const Counted<U>& o) : m(o.m) {}  // NOLINT(misc-explicit-constructor): containers convert allocators
    T* allocate(std::size_t n) { return static_cast<T*>(m->take(n * sizeof(T))); }
    void deallocate(T* p, std::size_t n) { m->give(p, n * sizeof(T)); }
    using propagate_on_container_move_assignment = std::true_type;
    template <class U>
    bool operator==(const Counted<U>& o) const {
        return m == o.m;
    }
    template <class U>
    bool operator!=(const Counted<U>& o) const {
        return m != o.m;
    }
};

}  // namespace kvindex
