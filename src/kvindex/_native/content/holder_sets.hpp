// Holder sets: interned bitsets over dense holder ids. Equal sets have equal ids, so a run of blocks stores one number,
// and a walk looks into a set only where the number changes.
#pragma once

#include <memory>

#include "base/table.hpp"

namespace kvindex {

inline constexpr u32 kEmptySet = 0;

class SetPool {
public:
    explicit SetPool(Memory& m) : m_(m) {
        recs_.push(m_, Rec{nullptr, 0, 1, 0});
        ++live_;
    }
    ~SetPool() {
        for (Rec& r : recs_) drop_words(r);
        recs_.release(m_);
        free_.release(m_);
        table_.release(m_);
        scratch_.release(m_);
    }
    SetPool(const SetPool&) = delete;
    SetPool& operator=(const SetPool&) = delete;

    u32 live() const { return live_; }
    u32 words(u32 set) const { return recs_[set].n; }
    const u64* data(u32 set) const { return recs_[set].w; }
    bool has(u32 set, u32 holder) const {
        const Rec& r = recs_[set];
        return (holder >> 6) < r.n && (r.w[holder >> 6] >> (holder & 63) & 1);
    }
    u32 refs(u32 set) const { return recs_[set].refs; }
    void ref(u32 set) { ++recs_[set].refs; }
    void unref(u32 set) {
        assert(recs_[set].refs);
        if (--recs_[set].refs == 0 && set != kEmptySet) drop(set);
    }

    // The set without holder `less` and with holder `plus` (kNone for neither). The result may be new and unreferenced:
    // the caller references it.
    u32 change(u32 set, u32 less, u32 plus) {
        Memo& memo = memo_at(set, less, plus);
        if (memo.set == set && memo.less == less && memo.plus == plus && memo.from_gen == recs_[set].gen &&
            memo.to_gen == recs_[memo.to].gen)
            return memo.to;
        load(set, plus == kNone ? 0 : (plus >> 6) + 1);
        if (less != kNone && (less >> 6) < scratch_.size()) scratch_[less >> 6] &= ~(1ull << (less & 63));
        if (plus != kNone) scratch_[plus >> 6] |= 1ull << (plus & 63);
        const u32 to = intern();
        memo = Memo{set, less, plus, to, recs_[set].gen, recs_[to].gen};
        return to;
    }
    // The set without any holder of `mask`, and with `plus` (kNone for none).
    u32 minus(u32 set, const u64* mask, u32 words, u32 plus = kNone) {
        load(set, plus == kNone ? 0 : (plus >> 6) + 1);
        for (u32 i = 0; i < words && i < scratch_.size(); ++i) scratch_[i] &= ~mask[i];
        if (plus != kNone) scratch_[plus >> 6] |= 1ull << (plus & 63);
        return intern();
    }
    // The set with these bits: new and unreferenced, unless it exists already.
    u32 intern(const u64* words, u32 n) {
        scratch_.resize(m_, n);
        if (n) std::memcpy(scratch_.data(), words, sizeof(u64) * n);
        return intern();
    }
    template <class F>
    void each(u32 set, F&& f) const {
        const Rec& r = recs_[set];
        for (u32 i = 0; i < r.n; ++i)
            for (u64 w = r.w[i]; w; w &= w - 1) f(i * 64 + static_cast<u32>(__builtin_ctzll(w)));
    }
    // For _check(): every live set and the number of its references.
    template <class F>
    void each_live(F&& f) const {
        for (u32 i = 0; i < recs_.size(); ++i)
            if (recs_[i].refs) f(i, recs_[i].refs);
    }
    bool interned(u32 set) const { return set == kEmptySet || find(recs_[set].w, recs_[set].n) == set; }
    // Returns the slack of the tables once only the empty set is left.
    void shrink() {
        if (live_ == 1) clear();
    }
    // Drops all sets, regardless of users.
    void clear() {
        for (u32 i = 1; i < recs_.size(); ++i) drop_words(recs_[i]);
        // The memo refers to sets that no longer exist, and generations start again.
        memo_.reset();
        recs_.truncate(1);
        recs_.shrink(m_, 1);
        recs_[kEmptySet].refs = live_ = 1;
        free_.release(m_);
        table_.release(m_);
        scratch_.release(m_);
    }

private:
    struct Rec {
        u64* w;
        u32 n;
        u32 refs;
        u32 gen;
    };
    // A direct-mapped memo of transitions: one event usually makes the same change to the same few sets over and over.
    struct Memo {
        u32 set = kNone, less = kNone, plus = kNone, to = 0, from_gen = 0, to_gen = 0;
    };
    static constexpr u32 kMemo = 256;

    Memo& memo_at(u32 set, u32 less, u32 plus) {
        if (!memo_) memo_ = std::make_unique<Memo[]>(kMemo);
        const u64 h = (static_cast<u64>(set) * 0x9E3779B97F4A7C15ull) ^
                      (static_cast<u64>(less) * 0xC2B2AE3D27D4EB4Full) ^
                      (static_cast<u64>(plus) * 0x165667B19E3779F9ull);
        Memo& memo = memo_[(h >> 32) & (kMemo - 1)];
        if (memo.to >= recs_.size() || (memo.set != kNone && memo.set >= recs_.size())) memo = Memo();
        return memo;
    }
    void load(u32 set, u32 at_least) {
        const Rec& r = recs_[set];
        const u32 n = r.n > at_least ? r.n : at_least;
        scratch_.truncate(0);
        scratch_.resize(m_, n);
        if (r.n) std::memcpy(scratch_.data(), r.w, sizeof(u64) * r.n);
        for (u32 i = r.n; i < n; ++i) scratch_[i] = 0;
    }
    static u64 digest(const u64* w, u32 n) {
        u64 h = 0x27D4EB2F165667C5ull + n;
        for (u32 i = 0; i < n; ++i) {
            h = (h ^ w[i]) * 0x9E3779B97F4A7C15ull;
            h ^= h >> 29;
        }
        return h;
    }
    u32 find(const u64* w, u32 n) const {
        return table_.find(digest(w, n),
                           [&](u32 s) { return recs_[s].n == n && std::memcmp(recs_[s].w, w, sizeof(u64) * n) == 0; });
    }
    u32 intern() {
        u32 n = scratch_.size();
        while (n && scratch_[n - 1] == 0) --n;
        if (n == 0) return kEmptySet;
        u32 set = find(scratch_.data(), n);
        if (set != kNone) return set;
        recs_.reserve(m_, recs_.size() + free_.empty());
        u64* w = static_cast<u64*>(m_.take(sizeof(u64) * n));
        std::memcpy(w, scratch_.data(), sizeof(u64) * n);
        if (!free_.empty()) {
            set = free_.back();
            free_.pop();
        } else {
            set = recs_.size();
            recs_.push(m_, Rec{nullptr, 0, 0, 0});
        }
        Rec& r = recs_[set];
        r.w = w;
        r.n = n;
        r.refs = 0;
        table_.insert(m_, digest(w, n), set);
        ++live_;
        return set;
    }
    void drop(u32 set) {
        Rec& r = recs_[set];
        table_.erase(m_, digest(r.w, r.n), set);
        drop_words(r);
        ++r.gen;
        free_.push(m_, set);
        --live_;
    }
    void drop_words(Rec& r) {
        if (!r.w) return;
        m_.give(r.w, sizeof(u64) * r.n);
        r.w = nullptr;
        r.n = 0;
    }

    Memory& m_;
    Buf<Rec> recs_;
    Buf<u32> free_;
    RefTable table_;
    Buf<u64> scratch_;
    std::unique_ptr<Memo[]> memo_;
    u32 live_ = 0;
};

}  // namespace kvindex
