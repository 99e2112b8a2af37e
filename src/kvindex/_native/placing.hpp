// SPDX-License-Identifier: Apache-2.0
//
// Puts blocks where they belong: below their parent, on content that exists already or on new content.
#pragma once

#include <iterator>

#include "knowledge.hpp"
#include "xxh3.hpp"

namespace kvindex {

// Consecutive blocks of a path that lie in one chain.
struct Segment {
    u32 chain;
    u32 depth;
    u32 at;  // which block of the path is the first
    u32 n;
};

// No guess is waiting to expire.
inline constexpr double kNever = 1e300;

class Placer : public Knowledge {
public:
    Placer(u32 block_size, u64 seed, bool set_presence) : Knowledge(set_presence), hasher_(seed, block_size) {}

    const BlockHasher& hasher() const { return hasher_; }

    // ---- entries that no event announced ----------------------------------------------------------------------------

    void guess(u32 pod, i64 rank, const std::string& model, const u64* prefixes, u32 n, double until) {
        const u32 id = worker(pod, rank, space(model));
        Worker& w = *workers_[id];
        if (n == 0) return;
        if (w.guess == kNone) {
            w.guess = new_holder(id, 0, 0, 1);
            refresh(id);
        }
        locate(w.space, {kNone, kNone}, prefixes, n);
        u32 done = 0;
        Pos tail{kNone, kNone};
        for (const Segment& s : segs_) {
            chains_.change(s.chain, s.depth, s.depth + s.n, [&](u32 set, u32 k) { return with(set, w.guess, k); });
            done += s.n;
            tail = {s.chain, s.depth + s.n - 1};
        }
        chains_.touch(tail.chain);
        if (done < n) {
            const u32 set = sets_.change(kEmptySet, kNone, w.guess);
            extend(w.space, tail, prefixes + done, n - done, set);
            holders_[w.guess].blocks += n - done;
        }
        const auto it =
            guesses_.emplace(until < kNever ? until : kNever, Guess{id, std::vector<u64>(prefixes, prefixes + n)});
        mem_.add(kGuessBytes + n * sizeof(u64));
        guess_paths_[id].insert(it);
        guess_bytes_ += guess_cost(n);
    }
    double next_expiry() const { return guesses_.empty() ? kNever : guesses_.begin()->first; }
    void expire(double now) {
        while (!guesses_.empty() && guesses_.begin()->first <= now) drop_guess(guesses_.begin());
    }

protected:
    // Fills segs_ with the part of a path that exists as content already.
    void locate(u32 space, Pos at, const u64* prefixes, u32 n) {
        segs_.clear();
        u32 i = 0;
        while (i < n) {
            u32 chain, depth;
            if (at.chain != kNone && at.depth + 1 < chains_[at.chain].end() &&
                chains_.prefix({at.chain, at.depth + 1}) == prefixes[i]) {
                chain = at.chain;
                depth = at.depth + 1;
            } else {
                if (at.chain != kNone && chains_[at.chain].kids == 0) return;
                chain = child(space, at, prefixes[i], 1).chain();
                if (chain == kNone) return;
                depth = chains_[chain].base;
            }
            const Chain& c = chains_[chain];
            const u32 most = std::min(n - i, c.end() - depth);
            u32 k = 0;
            while (k < most) {
                const u64* page = chains_.page(c, depth + k).prefix;
                u32 s = (depth + k) & (kPageBlocks - 1);
                while (s < kPageBlocks && k < most && page[s] == prefixes[i + k]) ++s, ++k;
                if (s < kPageBlocks) break;
            }
            segs_.push_back({chain, depth, i, k});
            i += k;
            at = {chain, depth + k - 1};
        }
    }
    // Adds new content below `at` and returns the position of its first block.
    Pos extend(u32 space, Pos at, const u64* prefixes, u32 n, u32 set) {
        u32 chain = at.chain;
        u32 depth = 0;
        if (chain != kNone && at.depth + 1 == chains_[chain].end()) {
            depth = at.depth + 1;
        } else {
            depth = chain == kNone ? 0 : at.depth + 1;
            chain = chains_.create(space, at.chain, depth);
        }
        chains_.append(chain, prefixes, n, set);
        if (depth == chains_[chain].base)
            spaces_[space].heads.insert(mem_, prefixes[0], chain, chains_.first_page(chain));
        return {chain, depth};
    }

    struct Placing {
        u32 worker, holder;
        bool has_parent;
        u64 parent;
        const u64* ids;
        u32 n;  // engine blocks
        const u64* locals;
        const u8* live;  // nullptr: all
        bool rolled;     // `locals` are prefix hashes already
    };
    enum class Placed : u8 { yes, orphan, misaligned };

    // Puts consecutive engine blocks below their parent.
    Placed place(const Placing& a) {
        Worker& w = *workers_[a.worker];
        const u32 factor = holders_[a.holder].factor;
        const u32 blocks = a.n * factor;
        for (;;) {
            Pos at{kNone, kNone};
            const u64* prev = nullptr;
            u64 parent_prefix = 0;
            const u32 parent = a.has_parent ? find(a.worker, a.parent) : kNone;
            if (a.has_parent && parent != kNone) {
                at = chains_.pos(parent);
                parent_prefix = chains_.prefix(parent);
                prev = &parent_prefix;
            }
            if (a.has_parent && parent == kNone) return Placed::orphan;
            if ((at.depth + 1) % factor) return Placed::misaligned;
            prefixes_.resize(blocks);
            if (a.rolled) {
                std::copy(a.locals, a.locals + blocks, prefixes_.begin());
            } else {
                hasher_.chain(a.locals, blocks, prev, prefixes_.data());
            }
            locate(w.space, at, prefixes_.data(), blocks);
            if (const u64* other = conflict(a, factor)) {
                // From the start again: the name may have been the parent's, and blocks may have
                // gone with it. All such names at once: one at a time, an event whose names all
                // mean something else now would cost the square of its length. The first in any
                // case, for where prefix hashes collide the same hash may be another block's.
                const u32 first = static_cast<u32>(other - a.ids);
                for (u32 j = first; j < a.n; ++j) {
                    const u32 known = find(a.worker, a.ids[j]);
                    if (known == kNone || (j != first && chains_.prefix(known) == prefixes_[(j + 1) * factor - 1]))
                        continue;
                    forget_name(a.worker, a.ids[j]);
                    if (a.has_parent && find(a.worker, a.parent) == kNone) return Placed::orphan;
                }
                continue;
            }
            commit(a, factor, blocks, at);
            return Placed::yes;
        }
    }
    // Names whose places are asked for before they are needed. All names at once would be as good for an event of 64,
    // but of a million the first are forgotten again.
    static constexpr u32 kPlacesAhead = 64;
    // The first of the names that this worker already knows for another block, or nullptr.
    // Notes of the blocks that are new content whether anybody has their names.
    const u64* conflict(const Placing& a, u32 factor) {
        const Worker& w = *workers_[a.worker];
        const RefTable& names = spaces_[w.space].names;
        u32 j = 0;
        const bool plain = factor == 1 && !w.own.size() && w.second.empty();
        for (const Segment& s : segs_) {
            const Chain& c = chains_[s.chain];
            for (; j < a.n && (j + 1) * factor - 1 < s.at + s.n; ++j) {
                const u32 ref = chains_.ref(c, s.depth + (j + 1) * factor - 1 - s.at);
                if (plain && chains_.name(ref) == a.ids[j]) continue;
                const u32 at = find(a.worker, a.ids[j]);
                if (at != kNone && at != ref) return a.ids + j;
            }
        }
        for (u32 k = j; k < a.n && k < j + kPlacesAhead; ++k) names.prefetch(a.ids[k]);
        taken_.resize(a.n);
        for (; j < a.n; ++j) {
            if (j + kPlacesAhead < a.n) names.prefetch(a.ids[j + kPlacesAhead]);
            const u32 shared = find_shared(w, a.ids[j]);
            if (find_own(a.worker, a.ids[j]) != kNone || find_not_own(a.worker, a.ids[j], shared) != kNone)
                return a.ids + j;
            taken_[j] = shared != kNone;
        }
        return nullptr;
    }
    void commit(const Placing& a, u32 factor, u32 blocks, Pos at) {
        Worker& w = *workers_[a.worker];
        const u32 old = segs_.empty() ? 0 : segs_.back().at + segs_.back().n;
        const bool plain = factor == 1 && !a.live;
        const Pos tail = segs_.empty() ? at : Pos{segs_.back().chain, segs_.back().depth + segs_.back().n - 1};
        if (old < blocks) {
            // New content is appended before anything else changes, so that the references of all blocks are settled.
            const u32 set = plain ? sets_.change(kEmptySet, kNone, a.holder) : kEmptySet;
            const Pos first = extend(w.space, tail, prefixes_.data() + old, blocks - old, set);
            segs_.push_back({first.chain, first.depth, old, blocks - old});
        }
        chains_.touch(segs_.back().chain);
        if (plain) {
            const u32 fresh = old < blocks ? static_cast<u32>(segs_.size()) - 1 : static_cast<u32>(segs_.size());
            for (u32 i = 0; i < fresh; ++i) hold_old(a, segs_[i]);
            if (fresh < segs_.size()) name_new(a, segs_[fresh]);
            return;
        }
        path_.resize(blocks);
        for (const Segment& s : segs_)
            for (u32 i = 0; i < s.n; ++i) path_[blocks - 1 - (s.at + i)] = {s.chain, s.depth + i};
        // From the root down, so that what the worker knows is closed towards the root at every step.
        for (u32 j = 0; j < a.n; ++j)
            add_copy(a.worker, a.holder, path_.data() + (blocks - (j + 1) * factor), a.ids[j], !a.live || a.live[j]);
    }
    // Blocks of size 1 that exist already: whole runs at a time where the worker's state is the same.
    void hold_old(const Placing& a, const Segment& s) {
        Worker& w = *workers_[a.worker];
        pieces_.clear();
        {
            const Chain& c = chains_[s.chain];
            const u32 end = s.depth + s.n;
            for (u32 d = s.depth, r = chains_.run_at(c, d); d < end; ++r) {
                const u32 stop = std::min(end, chains_.run_end(c, r));
                pieces_.push_back({c.runs[r].set, d, stop, 0});
                d = stop;
            }
        }
        // Blocks of several sizes in one medium and group have one presence together where it does not count.
        const bool one_of_sizes =
            pods_[w.pod].set_presence && std::any_of(w.holders.begin(), w.holders.end(),
                                                     [&](u32 o) { return o != a.holder && same_tier(o, a.holder); });
        for (const Segment& piece : pieces_) {
            const u32 set = piece.chain, from = piece.depth, to = piece.at;
            const u64* ids = a.ids + s.at + (from - s.depth);
            const bool knew = knows(w, set);
            bool bits = !sets_.has(set, a.holder) && (!knew || !one_of_sizes);
            if (!knew) {
                const Chain& c = chains_[s.chain];
                for (u32 d = from; d < to; ++d) {
                    const u32 ref = chains_.ref(c, d);
                    if (chains_.name(ref) != ids[d - from]) give_name(a.worker, {s.chain, d}, ref, ids[d - from]);
                }
                if (from == c.base) gain_chain(w, s.chain);
            } else if (bits) {
                for (u32 d = from; d < to && bits; ++d) {
                    const u32 ref = chains_.ref(chains_[s.chain], d);
                    u64 first;
                    bits = first_name(a.worker, {s.chain, d}, ref, first) && first == ids[d - from] &&
                           (w.copies.empty() || !w.copies.count(ref));
                }
            }
            if (bits) {
                chains_.change(s.chain, from, to, [&](u32 x, u32 k) { return with(x, a.holder, k, w.ghost); });
            } else {
                for (u32 d = from; d < to; ++d) {
                    const Pos p{s.chain, d};
                    add_copy(a.worker, a.holder, &p, ids[d - from], true);
                }
            }
        }
    }
    void name_new(const Placing& a, const Segment& s) {
        Worker& w = *workers_[a.worker];
        RefTable& names = spaces_[w.space].names;
        const u64* ids = a.ids + s.at;
        const Chain& c = chains_[s.chain];
        for (u32 i = 0; i < s.n; ++i) {
            if (i + kPlacesAhead < s.n) names.prefetch(ids[i + kPlacesAhead]);
            const u32 ref = chains_.ref(c, s.depth + i);
            if (!taken_[s.at + i]) {
                chains_.name(ref) = ids[i];
                names.insert(mem_, ids[i], ref);
            } else {
                chains_.set_own_name(s.chain, a.worker, s.depth + i, ids[i]);
                w.own.insert(mem_, ids[i], ref);
            }
        }
        holders_[a.holder].blocks += s.n;
        if (s.depth == c.base) gain_chain(w, s.chain);
    }

    // ---- guesses ----------------------------------------------------------------------------------------------------

    void drop_guess(Guesses::iterator it) {
        const u32 id = it->second.worker;
        Worker& w = *workers_[id];
        const auto all = guess_paths_.find(id);
        const auto at = all->second.find(it);
        // What another live guess of the worker covers stays; its neighbours cover most.
        std::size_t keep = 0;
        if (at != all->second.begin()) keep = together((*std::prev(at))->second.prefixes, it->second.prefixes);
        if (std::next(at) != all->second.end())
            keep = std::max(keep, together((*std::next(at))->second.prefixes, it->second.prefixes));
        all->second.erase(at);
        const bool last = all->second.empty();
        if (last) guess_paths_.erase(all);
        const Guess g = std::move(it->second);
        guesses_.erase(it);
        mem_.sub(kGuessBytes + g.prefixes.size() * sizeof(u64));
        guess_bytes_ -= guess_cost(g.prefixes.size());
        locate(w.space, {kNone, kNone}, g.prefixes.data(), static_cast<u32>(g.prefixes.size()));
        u32 bottom = kNone;
        for (const Segment& s : segs_) {
            if (s.at + s.n <= keep) continue;
            const u32 from = s.at < keep ? s.depth + static_cast<u32>(keep) - s.at : s.depth;
            chains_.change(s.chain, from, s.depth + s.n, [&](u32 set, u32 k) { return without(set, w.guess, k); });
            bottom = s.chain;
        }
        if (bottom != kNone) trim(bottom);
        if (last) {
            free_holder(w.guess);
            w.guess = kNone;
            refresh(id);
        }
    }
    void drop_guesses(u32 id) {
        for (auto all = guess_paths_.find(id); all != guess_paths_.end(); all = guess_paths_.find(id))
            drop_guess(*all->second.begin());
    }

    // Those that go through this block.
    void drop_guesses(u32 id, Pos through) {
        std::vector<u64> path;
        for (Pos p = through; p.chain != kNone; p = before(p)) path.push_back(chains_.prefix(p));
        std::reverse(path.begin(), path.end());
        for (auto all = guess_paths_.find(id); all != guess_paths_.end(); all = guess_paths_.find(id)) {
            const auto it = all->second.lower_bound(path);
            if (it == all->second.end() || together((*it)->second.prefixes, path) < path.size()) return;
            drop_guess(*it);
        }
    }

    BlockHasher hasher_;
    // With the nodes of what it stands in.
    static constexpr std::size_t kGuessBytes = sizeof(Guess) + sizeof(double) + 88;

    // With the content, as if nobody else held it: a chain, its runs and its place in tables, and its blocks.
    static std::size_t guess_cost(std::size_t blocks) {
        return kGuessBytes + sizeof(Chain) + 256 +
               blocks * (sizeof(u64) + (sizeof(Page) + sizeof(PageHome)) / kPageBlocks);
    }

    Guesses guesses_;
    std::size_t guess_bytes_ = 0;                                               // what all of them cost
    std::unordered_map<u32, std::set<Guesses::iterator, ByPath>> guess_paths_;  // each worker's

    // Scratch of the one writer.
    std::vector<u64> prefixes_;
    std::vector<u8> taken_;  // by block of the event: a worker, whichever, has its name
    std::vector<Segment> segs_, pieces_;
    std::vector<Pos> path_;
};

}  // namespace kvindex
