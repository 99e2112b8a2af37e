// Puts blocks below their parent, on content that exists already or on new content.
//
// A path is a list of prefix hashes: `locate` finds the part of it that exists as content, `extend` adds the rest.
// `place` does both for the blocks of an event and gives them to its worker. It looks everything up before it changes
// anything, so a refused event has changed only names that meant other content.
#pragma once

#include <unordered_set>
#include <vector>

#include "hash/xxh3.hpp"
#include "workers/presence.hpp"

namespace kvindex {

// Consecutive blocks of a path that lie in one chain.
struct Segment {
    u32 chain;
    u32 depth;
    u32 at;  // the number of its first block in the path
    u32 n;
};

// Consecutive engine blocks of one event that are put below their parent.
struct Placing {
    u32 worker, holder;
    bool has_parent;
    u64 parent;
    const u64* ids;
    u32 n;  // engine blocks
    const u64* locals;
    const u8* live;  // nullptr: all are live
    bool rolled;     // `locals` are already prefix hashes
    u32 lookahead;
};
enum class Placed : u8 { yes, orphan, misaligned, mixed };

class Insertion {
public:
    Insertion(Memory& m, Registry& registry, SetPool& sets, Chains& chains, Presence& presence,
              const BlockHasher& hasher)
        : mem_(m), registry_(registry), sets_(sets), chains_(chains), presence_(presence), hasher_(hasher) {}
    ~Insertion() = default;
    Insertion(const Insertion&) = delete;
    Insertion& operator=(const Insertion&) = delete;

    // The part of a path that exists as content. Valid until the next call.
    const std::vector<Segment>& locate(u32 space, Pos at, const u64* prefixes, u32 n) {
        segs_.clear();
        u32 i = 0;
        while (i < n) {
            u32 chain, depth;
            if (at.chain != kNone && at.depth + 1 < chains_[at.chain].end() &&
                chains_.prefix({at.chain, at.depth + 1}) == prefixes[i]) {
                chain = at.chain;
                depth = at.depth + 1;
            } else {
                if (at.chain != kNone && chains_[at.chain].first_kid == kNone) return segs_;
                chain = presence_.child(space, at, prefixes[i], 1).chain();
                if (chain == kNone) return segs_;
                depth = chains_[chain].base;
            }
            const Chain& c = chains_[chain];
            const u32 most = std::min(n - i, c.end() - depth);
            u32 k = depth == c.base;  // The chain was found by this block.
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
        return segs_;
    }
    // Appends new content below `at` and returns the position of its first block.
    Pos extend(u32 space, Pos at, const u64* prefixes, u32 n, u32 set, u32 lookahead) {
        u32 chain = at.chain;
        u32 depth = 0;
        if (chain != kNone && at.depth + 1 == chains_[chain].end()) {
            depth = at.depth + 1;
        } else {
            depth = chain == kNone ? 0 : at.depth + 1;
            chain = chains_.create(space, at.chain, depth, lookahead);
        }
        const u32 all = chains_[chain].len + n;
        if (all > 1 && chains_[chain].shared) presence_.unshare(chain);
        chains_.append(chain, prefixes, n, set, all);
        if (depth == chains_[chain].base)
            registry_.space_at(space).heads.insert(mem_, prefixes[0], chain, chains_.first_page(chain));
        return {chain, depth};
    }

    // Puts consecutive engine blocks below their parent. If a name that the worker holds means other content, the
    // engine's own pool decides: connectors leave out salts, adapters and multimodal keys (vLLM 0.33's self-describing
    // offloading events, Mooncake's, LMCache's).
    Placed place(const Placing& a) {
        conflicts_ = 0;
        const u32 parent = a.has_parent ? presence_.find(a.worker, a.parent) : kNone;
        if (a.has_parent && parent == kNone) return Placed::orphan;
        const u32 factor = registry_.holder(a.holder).factor;
        if (parent != kNone && (chains_.pos(parent).depth + 1) % factor) return Placed::misaligned;
        if (parent != kNone && lookahead_of(parent) != a.lookahead) return Placed::mixed;
        if (find_place(a, factor, parent) == nullptr) {
            commit(a, factor);
        } else if (registry_.holder(a.holder).medium != 0) {
            return place_copies(a, factor);
        } else if (!decide(a, factor)) {
            return Placed::orphan;
        }
        if (registry_.holder(a.holder).medium == 0 && !registry_.worker_at(a.worker).unsure.empty())
            for (u32 j = 0; j < a.n; ++j) presence_.sure_of(registry_.worker_at(a.worker), a.ids[j]);
        return Placed::yes;
    }
    // The number of the current event's names that the same medium holds for other content.
    u32 conflicts() const { return conflicts_; }
    // Adds one more copy of a block that the worker knows under this name. Returns false if it is not the end of a
    // block of that size.
    bool add_known(u32 id, u32 h, u64 name, u32 ref) {
        const u32 factor = registry_.holder(h).factor;
        Pos p = chains_.pos(ref);
        if ((p.depth + 1) % factor) return false;
        chains_.touch(p.chain);
        path_.clear();
        for (u32 s = 0; s < factor; ++s, p = presence_.before(p)) path_.push_back(p);
        presence_.add_copy(id, h, path_.data(), name, true);
        return true;
    }
    // The scratch of a large event: its growth, its bytes, and its release.
    std::size_t scratch() const { return prefixes_.capacity() + path_.capacity(); }
    std::size_t scratch_bytes() const { return bytes_of(prefixes_, taken_, segs_, pieces_, path_); }
    void drop_scratch() { drop_all(prefixes_, taken_, segs_, pieces_, path_); }

private:
    u32 lookahead_of(u32 ref) const { return chains_[chains_.pos(ref).chain].lookahead; }
    // Fills prefixes_ and segs_ for blocks whose parent is known. Returns the first of the names that mean another
    // block, or nullptr.
    const u64* find_place(const Placing& a, u32 factor, u32 parent) {
        const u32 blocks = a.n * factor;
        at_ = {kNone, kNone};
        const u64* prev = nullptr;
        u64 parent_prefix = 0;
        if (a.has_parent) {
            at_ = chains_.pos(parent);
            parent_prefix = chains_.prefix(parent);
            prev = &parent_prefix;
        }
        prefixes_.resize(blocks);
        if (a.rolled) {
            std::copy(a.locals, a.locals + blocks, prefixes_.begin());
        } else {
            hasher_.chain(a.locals, blocks, prev, prefixes_.data());
        }
        locate(registry_.worker_at(a.worker).space, at_, prefixes_.data(), blocks);
        return conflict(a, factor);
    }
    // The event decides the meaning of its names. Copies in other media that were announced before move along. Returns
    // false if the parent's place was removed with the former block of a name.
    bool decide(const Placing& a, u32 factor) {
        moved_.clear();
        expanded_.clear();
        for (;;) {
            const u32 parent = a.has_parent ? presence_.find(a.worker, a.parent) : kNone;
            if (a.has_parent && parent == kNone) {
                if (!moved_.empty()) registry_.spoil(a.worker);
                conflicts_ = 0;
                return false;
            }
            const u64* other = find_place(a, factor, parent);
            if (!other) break;
            // Starts again: the name may have been the parent's, and blocks may have been removed with it. All such
            // names are removed at once. One at a time, an event whose names all mean other content now would cost the
            // square of its length. The first is always removed, since the same prefix hash may belong to another block
            // if prefix hashes collide.
            const u32 first = static_cast<u32>(other - a.ids);
            others_.clear();
            for (u32 j = first; j < a.n; ++j) {
                const u32 known = presence_.find(a.worker, a.ids[j]);
                if (known == kNone || (j != first && chains_.prefix(known) == prefixes_[(j + 1) * factor - 1]))
                    continue;
                take_along(a.worker, a.ids[j], known);
                others_.push_back(a.ids[j]);
            }
            for (u64 name : others_) presence_.forget_name(a.worker, name);
        }
        commit(a, factor);
        for (const Copy& m : moved_) {
            const u32 ref = presence_.find(a.worker, m.id);
            if (ref == kNone || !add_known(a.worker, m.holder, m.id, ref)) {
                registry_.spoil(a.worker);
            } else if (m.count > 1 && !registry_.pod_at(registry_.worker_at(a.worker).pod).set_presence) {
                const Pos p = chains_.pos(ref);
                for (Copy& c : presence_.list_copies(a.worker, p, ref))
                    if (c.id == m.id && c.holder == m.holder) c.count += std::min(m.count - 1, 0xFFFFFFFFu - c.count);
            }
        }
        return true;
    }
    // Collects the copies that the name has now, without those of the engine's own pool: two meanings there are an
    // error of a publisher. Blocks below were placed by the former meaning and are in doubt until the engine announces
    // more.
    void take_along(u32 id, u64 name, u32 ref) {
        Worker& w = registry_.worker_at(id);
        const bool unsure = w.unsure.count(name) != 0;
        const std::size_t before = moved_.size();
        bool own = false;
        presence_.each_copy(id, name, ref, [&](u32 h, u32 count) {
            own |= registry_.holder(h).medium == 0;
            if (unsure || registry_.holder(h).medium != 0) moved_.push_back({name, h, count});
        });
        conflicts_ += own && !unsure;
        if (moved_.size() == before) return;
        std::vector<Pos> above(1, chains_.pos(ref));
        while (!above.empty()) {
            const Pos p = above.back();
            above.pop_back();
            const Chain& c = chains_[p.chain];
            u32 d = p.depth;
            while (d < c.end() && presence_.knows(w, chains_.set_at(c, d)) &&
                   expanded_.insert(presence_.kid_key(p.chain, d)).second)
                ++d;
            const u32 last = std::min(d, c.end() - 1);
            for (u32 k = p.depth + 1; k <= last; ++k) doubt(id, {p.chain, k});
            for (u32 k = d > p.depth ? c.first_kid : kNone; k != kNone; k = chains_.next_kid(k)) {
                const u32 base = chains_[k].base;
                if (base <= p.depth || base > d || !presence_.knows(w, chains_.set_at(chains_[k], base))) continue;
                doubt(id, {k, base});
                above.push_back({k, base});
            }
        }
        registry_.judge(w);
    }
    void doubt(u32 id, Pos p) {
        Worker& w = registry_.worker_at(id);
        if (!presence_.knows(w, presence_.set_at(p))) return;
        presence_.each_name(id, p, [&](u64 name, u32 ref) {
            if (!presence_.held_in(id, name, ref, 0)) w.unsure.emplace(name, u8{1});
        });
    }
    // The event belongs to a tier, and some of its names are held for other content. They are copies of that content,
    // and the names that follow hang below it.
    Placed place_copies(const Placing& a, u32 factor) {
        u64 prev = a.has_parent ? chains_.prefix(presence_.find(a.worker, a.parent)) : 0;
        const Holder& tier = registry_.holder(a.holder);
        known_.assign(a.n, 0);
        bool off = false;  // the block before has another lookahead
        for (u32 j = 0; j < a.n; ++j) {
            const u64* locals = a.locals + std::size_t{j} * factor;
            u64 here = prev;
            for (u32 s = 0; s < factor; ++s)
                here = a.rolled || (j == 0 && s == 0 && !a.has_parent) ? locals[s] : hasher_.roll(here, locals[s]);
            const u32 known = presence_.find(a.worker, a.ids[j]);
            const bool follows = off;
            off = false;
            if (known != kNone && chains_.prefix(known) != here) {
                bool held = false, elsewhere = false;
                presence_.each_copy(a.worker, a.ids[j], known, [&](u32 h, u32) {
                    held = true;
                    elsewhere |= registry_.holder(h).medium != tier.medium || registry_.holder(h).group != tier.group;
                });
                if (!held) {
                    presence_.forget_name(a.worker, a.ids[j]);
                } else {
                    if ((chains_.pos(known).depth + 1) % factor) return Placed::misaligned;
                    conflicts_ += a.rolled || !elsewhere;
                    known_[j] = 1;
                    off = lookahead_of(known) != a.lookahead;
                    here = chains_.prefix(known);
                }
            }
            if (follows && !known_[j]) return Placed::mixed;
            prev = here;
        }
        if (a.has_parent && presence_.find(a.worker, a.parent) == kNone) {
            conflicts_ = 0;
            return Placed::orphan;
        }
        for (u32 j = 0; j < a.n;) {
            if (known_[j]) {
                if (!a.live || a.live[j]) add_known(a.worker, a.holder, a.ids[j], presence_.find(a.worker, a.ids[j]));
                ++j;
                continue;
            }
            u32 end = j + 1;
            while (end < a.n && !known_[end]) ++end;
            Placing run = a;
            if (j) {
                run.has_parent = true;
                run.parent = a.ids[j - 1];
            }
            run.ids += j;
            run.n = end - j;
            run.locals += std::size_t{j} * factor;
            if (run.live) run.live += j;
            // Blocks that were removed while they waited keep their positions for the blocks below. The next known
            // block hangs elsewhere.
            while (run.n && run.live && !run.live[run.n - 1]) --run.n;
            if (run.n && !decide(run, factor)) return Placed::orphan;
            j = end;
        }
        return Placed::yes;
    }
    // The number of names ahead whose places are prefetched. For an event of 64 names, all names at once would be as
    // good. With a million, the first would leave the cache again.
    static constexpr u32 kPlacesAhead = 64;
    // The first of the names that this worker already knows for another block, or nullptr. For blocks that are new
    // content, records in taken_ whether any worker has their names.
    const u64* conflict(const Placing& a, u32 factor) {
        const Worker& w = registry_.worker_at(a.worker);
        const RefTable& names = registry_.space_at(w.space).names;
        u32 j = 0;
        const bool plain = factor == 1 && !w.own.size() && w.second.empty();
        for (const Segment& s : segs_) {
            const Chain& c = chains_[s.chain];
            for (; j < a.n && (j + 1) * factor - 1 < s.at + s.n; ++j) {
                const u32 ref = chains_.ref(c, s.depth + (j + 1) * factor - 1 - s.at);
                if (plain && chains_.name(ref) == a.ids[j]) continue;
                const u32 at = presence_.find(a.worker, a.ids[j]);
                if (at != kNone && at != ref) return a.ids + j;
            }
        }
        const auto expect = [&](u64 name) {
            names.prefetch(name);
            w.own.prefetch(name);
        };
        for (u32 k = j; k < a.n && k < j + kPlacesAhead; ++k) expect(a.ids[k]);
        taken_.resize(a.n);
        for (; j < a.n; ++j) {
            if (j + kPlacesAhead < a.n) expect(a.ids[j + kPlacesAhead]);
            const u32 shared = presence_.find_shared(w, a.ids[j]);
            if (presence_.find_own(a.worker, a.ids[j]) != kNone ||
                presence_.find_not_own(a.worker, a.ids[j], shared) != kNone)
                return a.ids + j;
            taken_[j] = shared != kNone;
        }
        return nullptr;
    }
    void commit(const Placing& a, u32 factor) {
        Worker& w = registry_.worker_at(a.worker);
        const u32 blocks = a.n * factor;
        const u32 old = segs_.empty() ? 0 : segs_.back().at + segs_.back().n;
        const bool plain = factor == 1 && !a.live;
        const Pos tail = segs_.empty() ? at_ : Pos{segs_.back().chain, segs_.back().depth + segs_.back().n - 1};
        if (old < blocks) {
            // New content is appended before anything else changes, so that the references of all blocks are settled.
            const u32 set = plain ? sets_.change(kEmptySet, kNone, a.holder) : kEmptySet;
            const Pos first = extend(w.space, tail, prefixes_.data() + old, blocks - old, set, a.lookahead);
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
        // From the root down, so that the worker's known blocks are closed towards the root at every step.
        for (u32 j = 0; j < a.n; ++j)
            presence_.add_copy(a.worker, a.holder, path_.data() + (blocks - (j + 1) * factor), a.ids[j],
                               !a.live || a.live[j]);
    }
    // Holds existing blocks of size 1: whole runs at a time while the worker's state is the same.
    void hold_old(const Placing& a, const Segment& s) {
        Worker& w = registry_.worker_at(a.worker);
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
        // If copies do not count, blocks of several sizes in one medium and group share one presence.
        const bool one_of_sizes = registry_.pod_at(w.pod).set_presence &&
                                  std::any_of(w.holders.begin(), w.holders.end(),
                                              [&](u32 o) { return o != a.holder && presence_.same_tier(o, a.holder); });
        for (const Segment& piece : pieces_) {
            const u32 set = piece.chain, from = piece.depth, to = piece.at;
            const u64* ids = a.ids + s.at + (from - s.depth);
            const bool knew = presence_.knows(w, set);
            bool bits = !sets_.has(set, a.holder) && (!knew || !one_of_sizes);
            if (!knew) {
                const Chain& c = chains_[s.chain];
                for (u32 d = from; d < to; ++d) {
                    const u32 ref = chains_.ref(c, d);
                    if (chains_.name(ref) != ids[d - from])
                        presence_.give_name(a.worker, {s.chain, d}, ref, ids[d - from]);
                }
                if (from == c.base) presence_.gain_chain(w, s.chain);
            } else if (bits) {
                for (u32 d = from; d < to && bits; ++d) {
                    const u32 ref = chains_.ref(chains_[s.chain], d);
                    u64 first;
                    bits = presence_.first_name(a.worker, {s.chain, d}, ref, first) && first == ids[d - from] &&
                           (w.copies.empty() || !w.copies.count(ref));
                }
            }
            if (bits) {
                chains_.change(s.chain, from, to,
                               [&](u32 x, u32 k) { return presence_.with(x, a.holder, k, w.ghost); });
            } else {
                for (u32 d = from; d < to; ++d) {
                    const Pos p{s.chain, d};
                    presence_.add_copy(a.worker, a.holder, &p, ids[d - from], true);
                }
            }
        }
    }
    void name_new(const Placing& a, const Segment& s) {
        Worker& w = registry_.worker_at(a.worker);
        RefTable& names = registry_.space_at(w.space).names;
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
        registry_.holder(a.holder).blocks += s.n;
        if (s.depth == c.base) presence_.gain_chain(w, s.chain);
    }

    Memory& mem_;
    Registry& registry_;
    SetPool& sets_;
    Chains& chains_;
    Presence& presence_;
    const BlockHasher& hasher_;

    // Scratch of the single writer.
    std::vector<u64> prefixes_;
    std::vector<u8> taken_;  // by block of the event: whether any worker has its name
    std::vector<Segment> segs_, pieces_;
    std::vector<Pos> path_;
    Pos at_{kNone, kNone};     // the parent of the current event
    std::vector<Copy> moved_;  // copies of names that mean other content now
    std::vector<u64> others_;  // those names
    std::vector<u8> known_;    // by block of a tier's event: whether its name is held for other content
    std::unordered_set<u64> expanded_;
    u32 conflicts_ = 0;
};

}  // namespace kvindex
