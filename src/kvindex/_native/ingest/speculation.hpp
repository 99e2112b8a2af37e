// Entries of add_prefix: prefixes that no event has announced, valid until a time. Each worker has one holder for all
// of its entries.
//
// They are no announcements of an engine, so they change no state. Each entry is kept with its whole path, so it is
// found again after any change of the chains. A block stays while any live entry of the worker covers it.
#pragma once

#include <algorithm>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "ingest/insertion.hpp"

namespace kvindex {

// No entry is waiting to expire.
inline constexpr double kNever = 1e300;

struct Guess {
    u32 worker;
    std::vector<u64> prefixes;
};
using Guesses = std::multimap<double, Guess>;  // by the time at which they end

// The number of blocks that two paths have in common. A prefix hash stands for all blocks before it, so halving finds
// the place where the paths part.
inline std::size_t together(const std::vector<u64>& a, const std::vector<u64>& b) {
    std::size_t same = 0;
    for (std::size_t end = std::min(a.size(), b.size()); same < end;) {
        const std::size_t middle = same + (end - same) / 2;
        if (a[middle] == b[middle]) {
            same = middle + 1;
        } else {
            end = middle;
        }
    }
    return same;
}

// In this order, the entry that shares most of a path is next to it, and the entries that continue a path follow it.
struct ByPath {
    using is_transparent = void;
    bool operator()(Guesses::const_iterator x, Guesses::const_iterator y) const {
        const int way = compare(x->second.prefixes, y->second.prefixes);
        return way ? way < 0 : &*x < &*y;
    }
    bool operator()(Guesses::const_iterator x, const std::vector<u64>& path) const {
        return compare(x->second.prefixes, path) < 0;
    }

private:
    static int compare(const std::vector<u64>& a, const std::vector<u64>& b) {
        const std::size_t same = together(a, b);
        if (same < a.size() && same < b.size()) return a[same] < b[same] ? -1 : 1;
        return a.size() == b.size() ? 0 : a.size() < b.size() ? -1 : 1;
    }
};

class Speculation {
public:
    Speculation(Memory& m, Registry& registry, SetPool& sets, Chains& chains, Presence& presence, Insertion& insertion)
        : mem_(m), registry_(registry), sets_(sets), chains_(chains), presence_(presence), insertion_(insertion) {}
    ~Speculation() = default;
    Speculation(const Speculation&) = delete;
    Speculation& operator=(const Speculation&) = delete;

    std::size_t size() const { return entries_.size(); }
    bool empty() const { return entries_.empty(); }
    // The cost of all entries.
    std::size_t bytes() const { return bytes_; }
    // Adds an entry of this worker, along the whole path.
    void add(u32 pod, i64 rank, const std::string& model, const u64* prefixes, u32 n, double until, u32 lookahead) {
        const u32 id = registry_.worker(pod, rank, registry_.space(model));
        Worker& w = registry_.worker_at(id);
        if (n == 0) return;
        if (w.guess == kNone) {
            w.guess = registry_.new_holder(id, 0, 0, 1);
            registry_.refresh(id);
        }
        if (!registry_.learn_length(w, lookahead)) return;
        const std::vector<Segment>& segments = insertion_.locate(w.space, {kNone, kNone}, prefixes, n);
        u32 done = 0;
        Pos tail{kNone, kNone};
        for (const Segment& s : segments) {
            chains_.change(s.chain, s.depth, s.depth + s.n,
                           [&](u32 set, u32 k) { return presence_.with(set, w.guess, k); });
            done += s.n;
            tail = {s.chain, s.depth + s.n - 1};
        }
        chains_.touch(tail.chain);
        if (done < n) {
            const u32 set = sets_.change(kEmptySet, kNone, w.guess);
            insertion_.extend(w.space, tail, prefixes + done, n - done, set, lookahead);
            registry_.holder(w.guess).blocks += n - done;
        }
        const auto it =
            entries_.emplace(until < kNever ? until : kNever, Guess{id, std::vector<u64>(prefixes, prefixes + n)});
        mem_.add(kEntryBytes + n * sizeof(u64));
        paths_[id].insert(it);
        bytes_ += cost(n);
    }
    double next_expiry() const { return entries_.empty() ? kNever : entries_.begin()->first; }
    // Drops a turn's worth of expired entries. Returns false if there are more.
    bool expire(double now) {
        const auto over = [&] { return !entries_.empty() && entries_.begin()->first <= now; };
        for (u32 left = kTurnBlocks; left && over();) {
            left -= std::min(left, 1 + static_cast<u32>(entries_.begin()->second.prefixes.size() / kPageBlocks));
            drop(entries_.begin());
        }
        return !over();
    }

    // Drops one entry of the worker. Returns false if it has no entry.
    bool drop_one(u32 id) {
        const auto all = paths_.find(id);
        if (all == paths_.end()) return false;
        drop(*all->second.begin());
        return true;
    }
    // Drops the worker's entries that go through this block.
    void drop_through(u32 id, Pos through) {
        std::vector<u64> path;
        for (Pos p = through; p.chain != kNone; p = presence_.before(p)) path.push_back(chains_.prefix(p));
        std::reverse(path.begin(), path.end());
        for (auto all = paths_.find(id); all != paths_.end(); all = paths_.find(id)) {
            const auto it = all->second.lower_bound(path);
            if (it == all->second.end() || together((*it)->second.prefixes, path) < path.size()) return;
            drop(*it);
        }
    }

    // Drops the entry that ends first. Returns false if there is no entry.
    bool drop_first() {
        if (entries_.empty()) return false;
        drop(entries_.begin());
        return true;
    }
    // All content is about to be dropped.
    void start_over() noexcept {
        for (const auto& g : entries_) mem_.sub(kEntryBytes + g.second.prefixes.size() * sizeof(u64));
        paths_.clear();
        entries_.clear();
        bytes_ = 0;
    }

    // The cost of one entry with its content, as if it were the only holder: a chain, with its runs and its places in
    // tables, and the blocks.
    static std::size_t cost(std::size_t blocks) {
        return kEntryBytes + sizeof(Chain) + 256 +
               blocks * (sizeof(u64) + (sizeof(Page) + sizeof(PageHome)) / kPageBlocks);
    }

private:
    // With the nodes of the containers that hold the entry.
    static constexpr std::size_t kEntryBytes = sizeof(Guess) + sizeof(double) + 88;

    void drop(Guesses::iterator it) {
        const u32 id = it->second.worker;
        Worker& w = registry_.worker_at(id);
        const auto all = paths_.find(id);
        const auto at = all->second.find(it);
        // Blocks that another live entry of the worker covers stay. The neighbours share more of the path than any
        // other entry.
        std::size_t keep = 0;
        if (at != all->second.begin()) keep = together((*std::prev(at))->second.prefixes, it->second.prefixes);
        if (std::next(at) != all->second.end())
            keep = std::max(keep, together((*std::next(at))->second.prefixes, it->second.prefixes));
        all->second.erase(at);
        const bool last = all->second.empty();
        if (last) paths_.erase(all);
        const Guess g = std::move(it->second);
        entries_.erase(it);
        mem_.sub(kEntryBytes + g.prefixes.size() * sizeof(u64));
        bytes_ -= cost(g.prefixes.size());
        const std::vector<Segment>& segments =
            insertion_.locate(w.space, {kNone, kNone}, g.prefixes.data(), static_cast<u32>(g.prefixes.size()));
        u32 bottom = kNone;
        for (const Segment& s : segments) {
            if (s.at + s.n <= keep) continue;
            const u32 from = s.at < keep ? s.depth + static_cast<u32>(keep) - s.at : s.depth;
            chains_.change(s.chain, from, s.depth + s.n,
                           [&](u32 set, u32 k) { return presence_.without(set, w.guess, k); });
            bottom = s.chain;
        }
        if (bottom != kNone) presence_.trim(bottom);
        if (last) {
            registry_.free_holder(w.guess);
            w.guess = kNone;
            registry_.refresh(id);
        }
    }

    Guesses entries_;
    std::size_t bytes_ = 0;                                               // the cost of all entries
    std::unordered_map<u32, std::set<Guesses::iterator, ByPath>> paths_;  // by worker

    Memory& mem_;
    Registry& registry_;
    SetPool& sets_;
    Chains& chains_;
    Presence& presence_;
    Insertion& insertion_;
};

}  // namespace kvindex
