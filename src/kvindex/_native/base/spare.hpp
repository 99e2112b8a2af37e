// One large page in reserve.
//
// The system clears a page of 2 MB at its first use. Under the write lock, this would take 0.2 ms, or 5 ms in a virtual
// machine that has to ask its host. So a writer prepares the next page before it takes the lock.
#pragma once

#include <atomic>

#include "base/heap.hpp"

namespace kvindex {

class Spare {
public:
    Spare() = default;
    Spare(const Spare&) = delete;
    Spare& operator=(const Spare&) = delete;
    ~Spare() { drop(); }

    // The prepared page, or fresh memory. No page is prepared before the first call: a small index needs none.
    void* take() {
        void* const p = ready_.exchange(nullptr, std::memory_order_acquire);
        if (on_) wanted_.store(true, std::memory_order_relaxed);
        return p ? p : map_memory(kHugePage, true);
    }
    bool wanted() const { return wanted_.load(std::memory_order_relaxed); }
    // Needs no lock. Without memory, it prepares nothing, and the next take() raises.
    void stock() noexcept {
        if (!wanted_.exchange(false, std::memory_order_relaxed)) return;
        char* p = nullptr;
        try {
            p = static_cast<char*>(map_memory(kHugePage, true));
        } catch (const std::bad_alloc&) {
            return;
        }
        for (std::size_t i = 0; i < kHugePage; i += kSmallest) static_cast<volatile char*>(p)[i] = 0;
        if (void* const old = ready_.exchange(p, std::memory_order_acq_rel)) munmap(old, kHugePage);
    }
    // Needs no lock either: an index that has been replaced returns its memory without a lock.
    void drop() noexcept {
        wanted_.store(false, std::memory_order_relaxed);
        if (void* const p = ready_.exchange(nullptr, std::memory_order_acquire)) munmap(p, kHugePage);
    }
    void turn_off() { on_ = false; }
    // Whether the index may take 2 MB that it does not count.
    bool on() const { return on_; }

private:
    static constexpr std::size_t kSmallest = 4096;

    std::atomic<void*> ready_{nullptr};
    std::atomic<bool> wanted_{false};
    bool on_ = true;
};

}  // namespace kvindex
