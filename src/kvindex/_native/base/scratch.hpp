// Arrays that are written once, read once and freed: decoded tokens and names, and the hashes made of them.
//
// An event of a million blocks has 90 MB of them. A vector writes zeros first and takes its pages one by one, which was
// 65 of the 225 ms of such an event. In large pages and without zeros, the event takes 160 ms.
#pragma once

#include <cstddef>
#include <new>
#include <type_traits>
#include <vector>

#include "base/heap.hpp"

namespace kvindex {

template <class T>
class ScratchAllocator {
    static_assert(std::is_trivial_v<T>, "elements are left as they are");

public:
    using value_type = T;

    ScratchAllocator() = default;
    template <class U>
    explicit ScratchAllocator(const ScratchAllocator<U>&) {}

    T* allocate(std::size_t n) {
        const std::size_t bytes = n * sizeof(T);
        return static_cast<T*>(is_mapped(bytes) ? map_memory(Heap::room(bytes), true) : ::operator new(bytes));
    }
    void deallocate(T* p, std::size_t n) noexcept {
        const std::size_t bytes = n * sizeof(T);
        if (!is_mapped(bytes)) return ::operator delete(p);
        munmap(p, Heap::room(bytes));
    }
    // Default-initialises an element, so numbers stay uninitialised.
    template <class U>
    void construct(U* p) {
        ::new (static_cast<void*>(p)) U;
    }
    bool operator==(const ScratchAllocator&) const { return true; }
    bool operator!=(const ScratchAllocator&) const { return false; }

private:
    static bool is_mapped(std::size_t bytes) { return !Heap::kPlain && bytes >= kHugePage; }
};

template <class T>
using Scratch = std::vector<T, ScratchAllocator<T>>;

}  // namespace kvindex
