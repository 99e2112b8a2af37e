// Batches to decode into. One is kept for the next payload and counted, but only while it is small.
#pragma once

#include <atomic>
#include <memory>

#include "wire/events.hpp"

namespace kvindex {

class Batches {
public:
    explicit Batches(std::size_t most) : most_(most) {}
    Batches(const Batches&) = delete;
    Batches& operator=(const Batches&) = delete;
    ~Batches() { clear(); }

    // A batch on loan for the lifetime of this object.
    class Lent {
    public:
        explicit Lent(Batches& from) : from_(from), batch_(from.take()) {}
        Lent(const Lent&) = delete;
        Lent& operator=(const Lent&) = delete;
        ~Lent() { from_.give(std::move(batch_)); }
        Batch& operator*() const { return *batch_; }

    private:
        Batches& from_;
        std::unique_ptr<Batch> batch_;
    };

    std::size_t bytes() const { return bytes_.load(std::memory_order_relaxed); }
    void clear() { drop(spare_.exchange(nullptr)); }

private:
    static std::size_t weight(const Batch& b) {
        return sizeof(Batch) + b.events.capacity() * sizeof(Event) + b.tokens.capacity() * sizeof(uint32_t) +
               b.hashes.capacity() * sizeof(uint64_t);
    }
    std::unique_ptr<Batch> take() {
        std::unique_ptr<Batch> b(spare_.exchange(nullptr));
        if (!b) return std::make_unique<Batch>();
        bytes_ -= weight(*b);
        return b;
    }
    void give(std::unique_ptr<Batch> b) noexcept {
        const std::size_t n = weight(*b);
        if (n > most_) return;
        bytes_ += n;
        drop(spare_.exchange(b.release()));
    }
    void drop(Batch* b) noexcept {
        if (b) bytes_ -= weight(*b);
        delete b;
    }

    const std::size_t most_;
    std::atomic<Batch*> spare_{nullptr};
    std::atomic<std::size_t> bytes_{0};
};

}  // namespace kvindex
