// Writer and reader of the sections of a snapshot. Each part of the index writes and reads its own sections; the header
// before them is in snapshot/format.hpp.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "base/memory.hpp"

namespace kvindex {

// The index cannot be saved, or the snapshot is refused. Derived from a standard exception, which Cython translates.
using SnapshotRefused = std::invalid_argument;

[[noreturn]] inline void refuse_snapshot(const std::string& what, u64 offset) {
    throw SnapshotRefused(what + ", seen at byte " + std::to_string(offset));
}

// In the order of the file. Each section begins at a multiple of 8 bytes.
enum class Section : u8 {
    media,
    models,
    pods,
    workers,
    sets,
    chains,
    runs,
    prefixes,
    names,
    own,
    own_ids,
    copies,
    parked,
    counters,
    COUNT
};
inline constexpr u32 kSections = static_cast<u32>(Section::COUNT);

// A worker's mask spans the holders up to its last one, so memory grows with the square of the number of workers. Real
// fleets stay far below this limit; a forged file may not.
inline constexpr u64 kFreeMasks = 64ull << 20;

class SnapshotBytes {
public:
    const u8* data() const { return p_.get(); }
    u64 size() const { return n_; }
    void reserve(u64 cap) {
        if (cap <= cap_) return;
        // mremap extends the memory without a copy where the system can.
        u8* const q = static_cast<u8*>(std::realloc(p_.get(), cap));
        if (!q) throw std::bad_alloc();
        static_cast<void>(p_.release());
        p_.reset(q);
        cap_ = cap;
    }
    u8* room(u64 n) {
        if (n_ + n > cap_) reserve(std::max(n_ + n, cap_ + cap_ / 2));
        n_ += n;
        return p_.get() + n_ - n;
    }
    void put(const void* from, u64 n) {
        if (n) std::memcpy(room(n), from, n);
    }
    template <class T>
    void put(T value) {
        static_assert(std::is_arithmetic<T>::value, "only what has no padding");
        std::memcpy(room(sizeof value), &value, sizeof value);
    }
    void text(const std::string& s) {
        put(static_cast<u32>(s.size()));
        put(s.data(), s.size());
    }
    void align() {
        static const u8 zeros[8] = {};
        put(zeros, -n_ & 7);
    }
    u8* at(u64 offset) { return p_.get() + offset; }

private:
    struct Free {
        void operator()(u8* p) const { std::free(p); }
    };
    std::unique_ptr<u8[], Free> p_;
    u64 n_ = 0, cap_ = 0;
};

// Writes sections, and the length of each into the header.
class SectionWriter {
public:
    // `sizes`: the offset of the first section's size in `out`.
    SectionWriter(SnapshotBytes& out, u64 sizes) : out_(out), sizes_(sizes) {}

    template <class F>
    void section(Section s, F&& f) {
        out_.align();
        const u64 from = out_.size();
        f(out_);
        const u64 bytes = out_.size() - from;
        std::memcpy(out_.at(sizes_ + u64{8} * static_cast<u32>(s)), &bytes, sizeof bytes);
    }
    // Reserves the expected bytes of all sections.
    void expect(u64 bytes) { out_.reserve(out_.size() + bytes); }
    u64 size() const { return out_.size(); }

private:
    SnapshotBytes& out_;
    const u64 sizes_;
};

// Reads the sections of an untrusted file. Each inconsistency is refused, with its place in the message.
class SectionReader {
public:
    // `sizes`: the offset of the first section's size in `data`; the first section begins at `head`.
    SectionReader(const u8* data, u64 bytes, u64 sizes, u64 head) : data_(data), bytes_(bytes) {
        u64 at = head;
        for (u32 s = 0; s < kSections; ++s) {
            at_ = sizes + u64{8} * s;
            u64 n;
            std::memcpy(&n, data_ + at_, sizeof n);
            at = (at + 7) & ~u64{7};
            need(at <= bytes_ && n <= bytes_ - at, "a section is longer than the file");
            from_[s] = at;
            to_[s] = at += n;
        }
        need(at == bytes_, "something follows the last section");
    }

    void need(bool ok, const char* what) const {
        if (!ok) refuse_snapshot(std::string("it contradicts itself: ") + what, at_);
    }
    u64 bytes() const { return bytes_; }
    // The place of the value that is verified next, for the message.
    void stand_at(Section s, u64 offset) { at_ = from_[static_cast<u32>(s)] + offset; }
    void enter(Section s) {
        at_ = from_[static_cast<u32>(s)];
        end_ = to_[static_cast<u32>(s)];
    }
    u64 left() const { return end_ - at_; }
    void done() const { need(at_ == end_, "a section is longer than what is in it"); }
    void take(void* to, u64 n) {
        need(n <= left(), "a section is shorter than what is in it");
        if (n) std::memcpy(to, data_ + at_, n);
        at_ += n;
    }
    template <class T>
    T get() {
        T value;
        take(&value, sizeof value);
        return value;
    }
    bool flag() {
        const u32 f = get<u32>();
        need(f <= 1, "a switch is neither on nor off");
        return f != 0;
    }
    // The number of entries that follow, each of at least `each` bytes. A number that the file has no room for is
    // refused before any allocation.
    u32 count(u64 each) {
        const u32 n = get<u32>();
        need(n <= left() / each, "there are fewer entries than it says");
        return n;
    }
    std::string text() {
        const u32 n = count(1);
        std::string s(reinterpret_cast<const char*>(data_ + at_), n);
        at_ += n;
        return s;
    }
    // The array that is the whole content of a section.
    template <class T>
    std::vector<T> all(Section s) {
        enter(s);
        need(left() % sizeof(T) == 0, "a section is cut");
        std::vector<T> list(left() / sizeof(T));
        take(list.data(), left());
        return list;
    }
    // The address of a section that consists of `n` numbers.
    const u8* raw(Section s, u64 n) {
        enter(s);
        need(left() == n * sizeof(u64), "a section is not as long as it must be");
        return data_ + at_;
    }
    const u8* peek(u64 n) const {
        need(n <= left(), "a section is shorter than what is in it");
        return data_ + at_;
    }
    void skip(u64 n) {
        static_cast<void>(peek(n));
        at_ += n;
    }

private:
    const u8* data_;
    u64 bytes_;
    u64 at_ = 0, end_ = 0;
    u64 from_[kSections] = {}, to_[kSections] = {};
};

// A rank, which is at least 0.
inline i64 read_rank(SectionReader& in) {
    const i64 r = in.get<i64>();
    in.need(r >= 0 && r <= (i64{1} << 31), "a rank is out of range");
    return r;
}

}  // namespace kvindex
