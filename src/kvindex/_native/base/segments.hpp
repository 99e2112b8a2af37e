// Segments of tables, eight to a large page.
//
// A split moves half of a segment under the write lock. With segments of 2 MB, matches waited 7 to 14 ms when several
// tables split in one turn. Segments of 256 KB take an eighth of that time. They share large pages, so a lookup still
// needs only one page walk.
#pragma once

#include <algorithm>
#include <cassert>
#include <cstdint>
#include <cstring>
#include <vector>

#include "base/heap.hpp"
#include "base/poison.hpp"
#include "base/spare.hpp"

// Tests build with a smaller number to see tables of many segments.
#ifndef KVINDEX_SEGMENT_BYTES
#define KVINDEX_SEGMENT_BYTES (std::size_t{256} << 10)
#endif

namespace kvindex {

inline constexpr std::size_t kSegmentBytes = KVINDEX_SEGMENT_BYTES;

class Segments {
public:
    Segments() = default;
    Segments(const Segments&) = delete;
    Segments& operator=(const Segments&) = delete;
    ~Segments() { assert(pages_.empty()); }

    // Grows the list of pages if the next segment needs a new page.
    void reserve() {
        if (open_page() == pages_.end()) pages_.reserve(pages_.size() + 1);
    }
    // A segment of zeros. Requires a call of reserve() before.
    void* take(Heap& heap, Spare& spare) {
        auto page = open_page();
        if (page == pages_.end()) page = open(heap, spare);
        const auto at = static_cast<std::size_t>(__builtin_ctz(page->free));
        page->free &= page->free - 1;
        char* const segment = page->at + at * kSegmentBytes;
        ASAN_UNPOISON_MEMORY_REGION(segment, kSegmentBytes);
        return segment;
    }
    void give(Heap& heap, Spare& spare, void* segment) noexcept {
        const auto page = std::prev(above(segment));
        if constexpr (kMapped) {
            madvise(segment, kSegmentBytes, MADV_DONTNEED);
        } else {
            std::memset(segment, 0, kSegmentBytes);
        }
        ASAN_POISON_MEMORY_REGION(segment, kSegmentBytes);
        page->free |= 1u << static_cast<std::size_t>(static_cast<char*>(segment) - page->at) / kSegmentBytes;
        if (page->free != kAll) return;
        ASAN_UNPOISON_MEMORY_REGION(page->at, kPageBytes);
        if constexpr (kMapped) {
            munmap(page->at, kPageBytes);
            // A shrinking index needs no page in reserve.
            spare.drop();
        } else {
            heap.give(page->at, kPageBytes);
        }
        pages_.erase(page);
        if (pages_.empty()) std::vector<Page>().swap(pages_);
    }
    // The bytes of the list of pages.
    std::size_t overhead() const { return pages_.capacity() * sizeof(Page); }

private:
    static constexpr std::uint32_t kSegments = 8, kAll = (1u << kSegments) - 1;
    static constexpr std::size_t kPageBytes = kSegments * kSegmentBytes;
    static constexpr bool kMapped = kPageBytes % kHugePage == 0;
    // A large page takes memory as a whole. So large pages are used only after a few full ones, and only if the index
    // may take 2 MB that it does not count (Spare::on).
    static constexpr std::size_t kHugeFrom = 3;

    struct Page {
        char* at;
        std::uint32_t free;  // a bit for each segment
    };

    std::vector<Page>::iterator open_page() {
        return std::find_if(pages_.begin(), pages_.end(), [](const Page& p) { return p.free != 0; });
    }
    // The first page behind the address. Pages are ordered by address.
    std::vector<Page>::iterator above(const void* p) {
        return std::upper_bound(pages_.begin(), pages_.end(), p,
                                [](const void* at, const Page& page) { return at < page.at; });
    }
    std::vector<Page>::iterator open(Heap& heap, Spare& spare) {
        char* at = nullptr;
        if constexpr (kMapped) {
            at = static_cast<char*>(pages_.size() < kHugeFrom || !spare.on() ? map_aligned(kPageBytes)
                                    : kPageBytes == kHugePage                ? spare.take()
                                                                             : map_memory(kPageBytes, true));
        } else {
            at = static_cast<char*>(heap.take_zeros(kPageBytes));
        }
        ASAN_POISON_MEMORY_REGION(at, kPageBytes);
        return pages_.insert(above(at), {at, kAll});
    }

    std::vector<Page> pages_;
};

}  // namespace kvindex
