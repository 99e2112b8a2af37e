// Growable arrays that report what they allocate, so that the index knows its own size at any moment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

namespace kvindex {

using u8 = std::uint8_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;

inline constexpr u32 kNone = 0xFFFFFFFFu;

// One counter per index. Everything native goes through it, so `bytes` is exact without asking the allocator.
struct Memory {
    std::size_t bytes = 0;
    void add(std::size_t n) { bytes += n; }
    void sub(std::size_t n) { bytes -= n; }
};

// 16 bytes against std::vector's 24, and growth of a quarter instead of doubling: chains keep several of these, and half-empty
// tails would cost more than the copies do (a chain that grows block by block copies each element about five times).
// Elements are moved with realloc, hence the restriction.
template <class T>
class Buf {
    static_assert(std::is_trivially_copyable<T>::value, "Buf relocates with realloc");

public:
    T* data() { return p_; }
    const T* data() const { return p_; }
    u32 size() const { return n_; }
    bool empty() const { return n_ == 0; }
    T& operator[](std::size_t i) { return p_[i]; }
    const T& operator[](std::size_t i) const { return p_[i]; }
    T& back() { return p_[n_ - 1]; }
    const T& back() const { return p_[n_ - 1]; }
    T* begin() { return p_; }
    T* end() { return p_ + n_; }
    const T* begin() const { return p_; }
    const T* end() const { return p_ + n_; }

    void reserve(Memory& m, u32 need) {
        if (need <= cap_) return;
        u32 cap = cap_ + cap_ / 4 + 1;
        if (cap < need) cap = need;
        regrow(m, cap);
    }
    void push(Memory& m, const T& v) {
        T copy = v;
        reserve(m, n_ + 1);
        p_[n_++] = copy;
    }
    void resize(Memory& m, u32 n) {
        reserve(m, n);
        n_ = n;
    }
    // Opens or closes a gap: `erase` elements at `at` become `insert` uninitialised ones.
    void splice(Memory& m, u32 at, u32 erase, u32 insert) {
        const u32 tail = n_ - at - erase;
        if (insert > erase) reserve(m, n_ + insert - erase);
        if (tail) std::memmove(p_ + at + insert, p_ + at + erase, sizeof(T) * tail);
        n_ = at + insert + tail;
    }
    void pop() { --n_; }
    void truncate(u32 n) { n_ = n; }
    // Gives back slack once half of the space is unused; called where things shrink, so that memory follows the content down.
    void trim(Memory& m) {
        if (n_ == 0) {
            release(m);
        } else if (cap_ > 4 && n_ <= cap_ / 2) {
            regrow(m, n_ + n_ / 8);
        }
    }
    void release(Memory& m) {
        std::free(p_);
        m.sub(sizeof(T) * cap_);
        p_ = nullptr;
        n_ = cap_ = 0;
    }

private:
    void regrow(Memory& m, u32 cap) {
        void* q = std::realloc(static_cast<void*>(p_), sizeof(T) * cap);
        if (!q) throw std::bad_alloc();
        m.add(sizeof(T) * cap);
        m.sub(sizeof(T) * cap_);
        p_ = static_cast<T*>(q);
        cap_ = cap;
    }

    T* p_ = nullptr;
    u32 n_ = 0;
    u32 cap_ = 0;
};

}  // namespace kvindex
