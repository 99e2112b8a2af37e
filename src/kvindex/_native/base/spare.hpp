// One large page, ready before it is needed.
//
// The system makes a page of 2 MB at its first use, under the write lock: 0.2 ms, and 5 where a virtual machine has to
// ask its host. A writer stocks the next one before it takes the lock.
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

    // The page, or memory that has yet to be used. Nothing is stocked before the first call: a small index needs none.
    void* take() {
        void* const p = ready_.exchange(nullptr, std::memory_order_acquire);
        if (on_) wanted_.store(true, std::memory_order_relaxed);
        return p ? p : map_memory(kHugePage, true);
    }
    bool wanted() const { return wanted_.load(std::memory_order_relaxed); }
    // Needs no lock, and no memory: where there is none, the next to need a page is told.
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
    // Needs no lock either: an index that another one has replaced gives its memory back without one.
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
