// Changes that take more than one turn of the write lock: events of very many blocks, clears, removals of pods, and
// pending blocks whose parent has arrived.
//
// No match sees half of such a change. A long store gives its blocks to a hidden holder, which is shown when it has all
// of them, and is then folded into the worker's own holder. A long removal moves the last copies to a second holder,
// which is hidden when it has all of them, and then removes the blocks. A clear hides all holders first. So matches see
// one step of O(1), and all work in proportion to the number of blocks happens before or after it. Other changes of the
// same pod wait meanwhile (Pod::busy), while changes of other pods run between the turns.
#pragma once

#include "ingest/ingest.hpp"

namespace kvindex {

// ---- without the lock -----------------------------------------------------------------------------------------------

inline void Ingest::prepare(const Batch& b, const Event& e, Change& c) const {
    c.ids.resize(e.n_hashes);
    for (u32 i = 0; i < e.n_hashes; ++i) c.ids[i] = name_of(b.hashes[e.hash_at + i]);
    c.n = e.n_hashes;
    c.prepared = true;
    c.sound = true;
    if (e.kind != EventKind::stored) return;
    c.n = distinct(e, c.ids.data());
    const u32 factor = content_.factor(e);
    if (e.hashed != Hashed::tokens || !ContentHasher::of_whole_blocks(e) || factor == 0) return;
    c.locals.resize(std::size_t{c.n} * factor);
    ExtraDigests extra;
    c.sound = content_.locals(b, e, c.n, factor, c.locals.data(), extra);
}

// ---- beginnings -----------------------------------------------------------------------------------------------------

inline void Ingest::begin_store(Change& c, u32 id, u32 h, const Event& e, u32 factor, bool whole) {
    c.worker = id;
    c.holder = h;
    c.twin = registry_.hidden_like(id, h);
    c.factor = factor;
    c.has_parent = e.has_parent;
    c.parent = name_of(e.parent);
    c.rolled = e.hashed == Hashed::prefix;
    c.lookahead = e.lookahead;
    c.whole = whole;
    c.at = 0;
    c.placed = kNone;
    c.reason = Reason::over_budget;
    c.step = whole ? Change::Step::place : Change::Step::copy;
    c.epoch = epoch_;
}
inline void Ingest::begin_removal(Change& c, u32 id, const Holder& tier, const u32* stay) {
    c.worker = id;
    c.stay = stay;
    c.tier = tier;
    c.twins.clear();
    c.at = 0;
    c.step = Change::Step::take;
    c.epoch = epoch_;
}
// Clears the workers of one rank or of every rank, in some media or (nullptr) in all media.
inline void Ingest::begin_clear(Change& c, u32 pod, i64 rank, const std::vector<u32>* media) {
    c.workers.clear();
    for (u32 w : registry_.pod_at(pod).workers)
        if (rank == kEveryRank || registry_.worker_at(w).rank == rank) c.workers.push_back(w);
    c.doubts.assign(c.workers.size(), 0);
    c.some = media != nullptr;
    if (media) c.media = *media;
    c.forgives = media == nullptr;
    c.goes = false;
    start_clear(c, pod, rank);
}
// Removes a pod. Needs no memory to begin, so it also works after memory has run out.
inline void Ingest::begin_end(Change& c, u32 pod) noexcept {
    try {
        c.workers = registry_.pod_at(pod).workers;
    } catch (const std::bad_alloc&) {
        c.workers.swap(registry_.pod_at(pod).workers);
    }
    c.some = c.forgives = false;
    c.goes = true;
    c.doubts.clear();
    start_clear(c, pod, 0);
}
inline void Ingest::start_clear(Change& c, u32 pod, i64 rank) noexcept {
    c.pod = pod;
    c.rank = rank;
    c.at = 0;
    c.serial = 0;
    c.swept = kNone;
    c.step = Change::Step::guesses;
    c.epoch = epoch_;
}
inline void Ingest::begin_attach(Change& c, u32 id) {
    c.worker = id;
    c.waits.ends.clear();
    c.waits.moved.clear();
    c.step = Change::Step::attach;
    c.epoch = epoch_;
}

// ---- one turn -------------------------------------------------------------------------------------------------------

// Does one turn's worth. Returns false if there is more to do.
inline bool Ingest::go_on(Change& c, Report& r) {
    using Step = Change::Step;
    if (c.epoch != epoch_) {
        // Memory ran out in another change, and all content was dropped. A clear has less to do; other changes are
        // lost.
        c.epoch = epoch_;
        if (c.step < Step::guesses) {
            abandon(c);
            c.step = Step::none;
        } else {
            c.at = 0;
            c.step = Step::finish;
        }
    }
    for (c.left = kTurnBlocks; c.on() && c.left;) {
        do_step(c, r);
        eviction_.fit();
        if (c.step == Step::sort) {
            if (c.chains.size() > kTurnBlocks) break;
            c.relax();
        }
    }
    return !c.on();
}
inline void Ingest::do_step(Change& c, Report& r) {
    using Step = Change::Step;
    switch (c.step) {
        case Step::none: break;
        case Step::place: place_piece(c, r); break;
        case Step::copy: copy_piece(c, r); break;
        case Step::park: park_piece(c, r); break;
        case Step::turn_away: turn_away_piece(c, r); break;
        case Step::show: show_store(c); break;
        case Step::fold: fold_piece(c); break;
        case Step::attach: attach_piece(c); break;
        case Step::settle: settle_piece(c); break;
        case Step::take: take_piece(c, r); break;
        case Step::forget: forget_piece(c); break;
        case Step::guesses: drop_guess_of(c); break;
        case Step::hide: hide_all(c); break;
        case Step::lot: clear_lot(c); break;
        case Step::dead: clear_dead(c); break;
        case Step::maps: clear_maps(c); break;
        case Step::collect: collect_chains(c); break;
        case Step::sort: break;  // by Change::relax
        case Step::sweep: sweep_piece(c); break;
        case Step::finish: finish_clear(c); break;
    }
}
// For callers that cannot wait, or whose change is small.
inline void Ingest::go_through(Change& c, Report& r) {
    while (!go_on(c, r)) c.relax();
}
// Ends a long store or removal early. Its blocks have been dropped, or are dropped with all other content.
inline void Ingest::abandon(Change& c) noexcept {
    const auto drop = [&](u32 h) {
        if (h != kNone && h < registry_.holder_slots() && registry_.holder(h).worker == c.worker)
            registry_.drop_holder(c.worker, h);
    };
    drop(c.twin);
    for (const auto& t : c.twins) drop(t.second);
    c.twin = kNone;
    c.twins.clear();
}

// ---- a long store ---------------------------------------------------------------------------------------------------

inline u32 Ingest::piece(const Change& c) { return std::min(c.n - c.at, std::max(1u, c.left / c.factor)); }
inline void Ingest::place_piece(Change& c, Report& r) {
    Worker& w = registry_.worker_at(c.worker);
    const u32 m = piece(c);
    c.spend(m * c.factor);
    const bool has_parent = c.has_parent || c.at != 0;
    const u64 parent = c.at ? c.ids[c.at - 1] : c.parent;
    const u32 ref = has_parent ? presence_.find(c.worker, parent) : kNone;
    if (has_parent && ref == kNone) return orphaned(c, r);
    if (!eviction_.make_room(c.worker, m, m * c.factor, 0, ref)) {
        c.step = Change::Step::turn_away;
        return;
    }
    const Placing a{
        c.worker, c.twin,   has_parent, parent, c.ids.data() + c.at, m, c.locals.data() + std::size_t{c.at} * c.factor,
        nullptr,  c.rolled, c.lookahead};
    const Placed placed = insertion_.place(a);
    switch (placed) {
        case Placed::yes:
            r.stored += m;
            count_refused(r);
            count_conflicts(c.worker, r);
            c.at += m;
            if (!w.placed_full || w.small_blocks) {
                w.placed_full = true;
                w.small_blocks = false;
                registry_.judge(w);
            }
            break;
        case Placed::orphan: return orphaned(c, r);
        case Placed::misaligned:
        case Placed::mixed:
            r.skip(placed == Placed::mixed ? Reason::mixed_lookahead : Reason::misaligned);
            registry_.spoil(c.worker);
            c.n = c.at;
            break;
    }
    if (c.at == c.n) c.step = Change::Step::show;
}
inline void Ingest::orphaned(Change& c, Report& r) {
    if (registry_.worker_at(c.worker).shed) {
        c.reason = Reason::shed;
        c.step = Change::Step::turn_away;
    } else if (!pending_.room(c.worker, c.holder, c.ids.data() + c.at, c.n - c.at)) {
        r.skip(Reason::parked_full, c.n - c.at);
        registry_.spoil(c.worker);
        c.n = c.at;
        c.step = Change::Step::show;
    } else {
        c.placed = c.at;
        c.step = Change::Step::park;
    }
}
// Copies of blocks whose names are known, or will be.
inline void Ingest::copy_piece(Change& c, Report& r) {
    const u32 m = piece(c);
    c.spend(m * c.factor);
    if (!eviction_.make_room(c.worker, 0, 0, std::size_t{m} * 128, kNone)) {
        c.step = Change::Step::turn_away;
        return;
    }
    for (const u32 end = c.at + m; c.at < end; ++c.at) {
        const u32 ref = presence_.find(c.worker, c.ids[c.at]);
        pending_.place_known(c.worker, ref == kNone ? c.holder : c.twin, c.ids[c.at], r);
    }
    count_refused(r);
    if (c.at == c.n) c.step = Change::Step::show;
}
inline void Ingest::park_piece(Change& c, Report& r) {
    const u32 m = piece(c);
    c.spend(m * c.factor);
    if (registry_.worker_at(c.worker).shed) c.reason = Reason::shed;
    if (registry_.worker_at(c.worker).shed ||
        !eviction_.make_room(c.worker, 0, 0, pending_.parked_weight(m, u64{m} * c.factor), kNone)) {
        c.step = Change::Step::turn_away;
        return;
    }
    const Placing a{c.worker,
                    c.holder,
                    true,
                    c.at ? c.ids[c.at - 1] : c.parent,
                    c.ids.data() + c.at,
                    m,
                    c.locals.data() + std::size_t{c.at} * c.factor,
                    nullptr,
                    c.rolled,
                    c.lookahead};
    pending_.park_orphan(a, r);
    c.at += m;
    if (c.at < c.n) return;
    c.n = c.placed;
    c.step = Change::Step::show;
}
inline void Ingest::turn_away_piece(Change& c, Report& r) {
    const u32 m = piece(c);
    c.spend(m * c.factor);
    const u32 placed = c.placed == kNone ? c.at : c.placed;
    pending_.turn_away(c.worker, c.ids.data() + c.at, m, c.reason, r);
    c.placed = placed;
    c.at += m;
    if (c.at < c.n) return;
    c.n = placed;
    c.step = Change::Step::show;
}
inline void Ingest::show_store(Change& c) {
    // The twin may have lost all its blocks again: names were turned away, or a change of another worker evicted them.
    c.at = registry_.holder(c.twin).blocks ? c.n : 0;
    registry_.show(c.worker, c.twin);
    c.step = Change::Step::fold;
}
// Gives the twin's blocks in [from, to) of a chain to the holder.
inline void Ingest::fold(Change& c, u32 chain, u32 from, u32 to) {
    const u32 id = c.worker, twin = c.twin, h = c.holder;
    Worker& w = registry_.worker_at(id);
    bool both = false;
    chains_.change(chain, from, to, [&](u32 set, u32 k) {
        if (!sets_.has(set, twin)) return set;
        both |= sets_.has(set, h);
        return sets_.has(set, h) ? set : presence_.with(set, h, k, twin);
    });
    if (!both && w.copies.empty()) return;
    for (u32 d = from; d < to; ++d) {
        const Pos p{chain, d};
        const u32 ref = chains_.ref(p), set = presence_.set_at(p);
        const bool two = sets_.has(set, twin) && sets_.has(set, h);
        const bool ends = (d + 1) % c.factor == 0;
        if (ends && (two || w.copies.count(ref))) {
            Copies& list = presence_.list_copies(id, p, ref);
            for (std::size_t i = list.size(); i-- > 0;) {
                if (list[i].holder != twin) continue;
                const Copy more = list[i];
                list.erase(list.begin() + static_cast<std::ptrdiff_t>(i));
                const auto it = std::find_if(list.begin(), list.end(),
                                             [&](const Copy& x) { return x.id == more.id && x.holder == h; });
                if (it == list.end()) {
                    list.push_back({more.id, h, more.count});
                } else {
                    it->count = it->count > 0xFFFFFFFFu - more.count ? 0xFFFFFFFFu : it->count + more.count;
                }
            }
            presence_.tidy_copies(id, p, ref);
        }
        if (two) chains_.change(chain, d, d + 1, [&](u32 x, u32 k) { return presence_.without(x, twin, k); });
    }
}
// Folds from the last placed block towards the first.
inline void Ingest::fold_piece(Change& c) {
    while (c.at && c.left) {
        const u32 ref = presence_.find(c.worker, c.ids[c.at - 1]);
        if (ref == kNone) {
            --c.at;
            c.spend(1);
            continue;
        }
        const u32 m = c.whole ? std::min(c.at, std::max(1u, c.left / c.factor)) : 1;
        Pos p = chains_.pos(ref);
        for (u32 blocks = m * c.factor; blocks && p.chain != kNone;) {
            const u32 k = std::min(blocks, p.depth + 1 - chains_[p.chain].base);
            fold(c, p.chain, p.depth + 1 - k, p.depth + 1);
            blocks -= k;
            p = presence_.before({p.chain, p.depth + 1 - k});
        }
        c.at -= m;
        c.spend(m * c.factor);
    }
    if (c.at) return;
    if (registry_.holder(c.twin).blocks)
        for (u32 chain : own_chains(registry_.worker_at(c.worker)))
            fold(c, chain, chains_[chain].base, chains_[chain].end());
    registry_.drop_holder(c.worker, c.twin);
    c.twin = kNone;
    registry_.judge(registry_.worker_at(c.worker));
    if (c.whole && pending_.any(c.worker)) {
        c.waits.fresh.assign(c.ids.begin(), c.ids.begin() + c.n);
        begin_attach(c, c.worker);
    } else {
        c.step = Change::Step::none;
    }
}

// ---- pending blocks -------------------------------------------------------------------------------------------------

inline void Ingest::attach_piece(Change& c) {
    if (pending_.attach(c.worker, c.waits, c.left)) c.step = Change::Step::settle;
    c.spend(kTurnBlocks);
}
inline void Ingest::settle_piece(Change& c) {
    if (pending_.settle_ends(c.worker, c.waits, c.left) && pending_.drop_spent(c.worker, c.waits, c.left))
        c.step = Change::Step::none;
    c.spend(kTurnBlocks);
}

// ---- a long removal -------------------------------------------------------------------------------------------------

inline void Ingest::take_piece(Change& c, Report& r) {
    for (; c.at < c.n && c.left; ++c.at, c.spend(1)) {
        const u32 ref = presence_.find(c.worker, c.ids[c.at]);
        if (remove_one(c.worker, c.tier, c.ids[c.at], ref, c.stay ? c.stay + c.at : nullptr, &c)) {
            ++r.removed;
        } else {
            r.skip(Reason::unknown_hash);
        }
    }
    if (c.at < c.n) return;
    for (const auto& t : c.twins) registry_.hide(c.worker, t.second);
    c.at = 0;
    c.step = Change::Step::forget;
}
// The last copy in `h` of the engine block that ends at `p` will be removed. Until then, the twin holds it.
inline void Ingest::leave(Change& c, u32 h, Pos p) {
    const Worker& w = registry_.worker_at(c.worker);
    auto t = std::find_if(c.twins.begin(), c.twins.end(), [&](const auto& x) { return x.first == h; });
    if (t == c.twins.end()) {
        c.twins.reserve(c.twins.size() + 1);
        const u32 twin = registry_.hidden_like(c.worker, h);
        c.twins.push_back({h, twin});
        registry_.show(c.worker, twin);
        t = std::prev(c.twins.end());
    }
    const u32 twin = t->second, factor = registry_.holder(h).factor;
    bool shared = false;
    for (u32 s = 0; s < factor; ++s) {
        // Content may fork inside an engine block: another engine block that shares this part also holds it.
        shared = shared || (s != 0 && presence_.child_has(w, p, h));
        chains_.change(p.chain, p.depth, p.depth + 1,
                       [&](u32 x, u32 k) { return presence_.with(x, twin, k, shared ? kNone : h); });
        p = presence_.before(p);
    }
}
inline void Ingest::forget_piece(Change& c) {
    for (; c.at < c.n && c.left; ++c.at, c.spend(1)) {
        for (const auto& t : c.twins) {
            const u32 ref = presence_.find(c.worker, c.ids[c.at]);
            if (ref == kNone) break;
            const Pos p = chains_.pos(ref);
            if (sets_.has(presence_.set_at(p), t.second) && (p.depth + 1) % registry_.holder(t.second).factor == 0)
                presence_.take_copy(c.worker, t.second, p);
        }
    }
    if (c.at < c.n) return;
    for (const auto& t : c.twins) {
        if (registry_.holder(t.second).blocks) forget_holder(c.worker, t.second);
        registry_.drop_holder(c.worker, t.second);
    }
    c.twins.clear();
    registry_.judge(registry_.worker_at(c.worker));
    c.step = Change::Step::none;
}
// Removes the remaining blocks of a hidden holder.
inline void Ingest::forget_holder(u32 id, u32 h) {
    for (u32 chain : own_chains(registry_.worker_at(id))) {
        if (!chains_.alive(chain)) continue;
        for (u32 d = chains_[chain].end(); d-- > chains_[chain].base;)
            if (sets_.has(chains_.set_at(chains_[chain], d), h)) presence_.lose_bit(id, h, {chain, d});
        presence_.trim(chain);
    }
}

// ---- a clear --------------------------------------------------------------------------------------------------------

inline void Ingest::drop_guess_of(Change& c) {
    const bool gpu = !c.some || std::find(c.media.begin(), c.media.end(), 0u) != c.media.end();
    for (; gpu && c.at < c.workers.size(); ++c.at)
        if (speculation_.drop_one(c.workers[c.at])) return c.spend(kTurnBlocks / 16 + 1);
    c.at = 0;
    c.step = Change::Step::hide;
}
// From here on, no match counts the cleared blocks.
inline void Ingest::hide_all(Change& c) {
    for (u32 id : c.workers)
        widen(registry_.worker_at(id).hidden,
              registry_.worker_at(id).hidden.size() + registry_.worker_at(id).holders.size());
    for (u32 id : c.workers) {
        const std::vector<u32> all = registry_.worker_at(id).holders;
        for (u32 h : all)
            if (cleared_by(c, h)) registry_.hide(id, h);
    }
    if (c.goes) registry_.close_pod(c.pod);
    c.step = Change::Step::lot;
    if (!c.workers.empty()) return;
    c.at = 0;
    end_clear(c);
}
inline bool Ingest::cleared_by(const Change& c, u32 h) const {
    return !c.some || std::find(c.media.begin(), c.media.end(), registry_.holder(h).medium) != c.media.end();
}
inline void Ingest::clear_lot(Change& c) {
    const auto cleared = [&](u32 h) { return cleared_by(c, h); };
    if (pending_.clear(c.workers[c.at], !c.some, cleared, c.serial, c.left)) c.step = Change::Step::dead;
}
// Drops the records in which only cleared copies waited.
inline void Ingest::clear_dead(Change& c) {
    if (pending_.drop_cleared(c.workers[c.at], c.serial, c.left)) c.step = Change::Step::maps;
}
// Names and copies have no meaning any more. The maps have an allocation for each, so they are emptied in pieces.
inline void Ingest::clear_maps(Change& c) {
    Worker& w = registry_.worker_at(c.workers[c.at]);
    if (!c.some) {
        for (; c.left && !(w.second.empty() && w.copies.empty() && w.unsure.empty()); c.spend(1)) {
            if (!w.second.empty()) w.second.erase(w.second.begin());
            if (!w.copies.empty()) w.copies.erase(w.copies.begin());
            if (!w.unsure.empty()) w.unsure.erase(w.unsure.begin());
        }
        if (!w.second.empty() || !w.copies.empty() || !w.unsure.empty()) return;
        w.second = CountedMap<u64, u32>(Counted<char>(mem_));
        w.copies = CountedMap<u32, Copies>(Counted<char>(mem_));
    }
    c.chains.clear();
    c.cursor = {};
    c.step = Change::Step::collect;
}
inline void Ingest::collect_chains(Change& c) {
    const Worker& w = registry_.worker_at(c.workers[c.at]);
    const u32 stamp = c.cursor.stamp;
    const bool more = w.chains.step(c.cursor, kTurnBlocks * 8 / ChainTable::kTogether, [&](const ChainSlot& s) {
        s.each([&](u32 chain) { c.chains.push_back({chains_[chain].base, chain}); });
    });
    c.spend(kTurnBlocks / 4);
    if (stamp != c.cursor.stamp && stamp) {
        // The table was rebuilt meanwhile, and the walk has started again.
        c.chains.clear();
        c.cursor = {};
        return;
    }
    if (!more) c.step = Change::Step::sort;
}
// Sweeps chains from the deepest to the root, so that a parent does not lose its last holder while a child hangs on it.
// A join may have made a child a part of its parent, which comes later.
inline void Ingest::sweep_piece(Change& c) {
    const u32 id = c.workers[c.at];
    Worker& w = registry_.worker_at(id);
    while (c.left) {
        if (c.chains.empty()) {
            c.step = Change::Step::finish;
            return;
        }
        const u32 chain = c.chains.back().second;
        if (!chains_.alive(chain) || !w.chains.has(chain)) {
            c.chains.pop_back();
            c.spend(1);
            continue;
        }
        const u32 base = chains_[chain].base, end = std::min(c.swept, known_end(w, chains_[chain]));
        const u32 from = end - base > c.left ? end - c.left : base;
        if (c.some) {
            clear_some_of(c, id, chain, from, end);
        } else {
            chains_.drop_own(chain, id);
            if (end > from)
                chains_.change(chain, from, end, [&](u32 set, u32) {
                    return sets_.minus(set, w.mask.data(), static_cast<u32>(w.mask.size()));
                });
            if (from == base) presence_.lose_chain(w, chain);
            presence_.trim(chain);
        }
        c.spend(end - from + 1);
        if (from == base || !chains_.alive(chain)) {
            c.chains.pop_back();
            c.swept = kNone;
        } else {
            c.swept = c.some ? from : kNone;
        }
    }
}
// The end of the part of a chain that the worker knows. This part is a beginning of the chain, or empty.
inline u32 Ingest::known_end(const Worker& w, const Chain& c) const {
    u32 lo = 0, hi = c.runs.size();
    while (lo < hi) {
        const u32 mid = (lo + hi) / 2;
        if (presence_.knows(w, c.runs[mid].set)) {
            lo = mid + 1;
        } else {
            hi = mid;
        }
    }
    return lo ? chains_.run_end(c, lo - 1) : c.base;
}
// Keeps the position of a block that only cleared media hold if a block below it is known. Otherwise, removes it.
inline void Ingest::clear_some_of(const Change& c, u32 id, u32 chain, u32 from, u32 end) {
    Worker& w = registry_.worker_at(id);
    if (end == from) return;
    const u32 g = registry_.ghost(id);
    std::vector<u64> mask;
    for (u32 h : w.hidden)
        if (cleared_by(c, h)) set_bit(mask, h, true);
    chains_.change(chain, from, end, [&](u32 set, u32 k) {
        if (!presence_.knows(w, set)) return set;
        for (u32 h : w.hidden)
            if (cleared_by(c, h) && sets_.has(set, h)) registry_.holder(h).blocks -= k;
        const bool rest = presence_.knows_without(w, set, mask);
        if (!rest) registry_.holder(g).blocks += k;
        return sets_.minus(set, mask.data(), static_cast<u32>(mask.size()), rest ? kNone : g);
    });
    if (!w.copies.empty()) {
        for (u32 d = from; d < end; ++d) {
            const u32 ref = chains_.ref({chain, d});
            const auto it = w.copies.find(ref);
            if (it == w.copies.end()) continue;
            for (Copy& x : it->second)
                if (x.holder != kNone && cleared_by(c, x.holder)) x.count = 0;
            presence_.tidy_copies(id, {chain, d}, ref);
        }
    }
    presence_.climb(id, {chain, end - 1});
    presence_.trim(chain);
}
inline void Ingest::finish_clear(Change& c) {
    const u32 id = c.workers[c.at];
    if (c.some) {
        while (!registry_.worker_at(id).hidden.empty()) registry_.show(id, registry_.worker_at(id).hidden.back());
        registry_.judge(registry_.worker_at(id));
    } else {
        registry_.reset_worker(id);
        registry_.worker_at(id).in_doubt = c.at < c.doubts.size() && c.doubts[c.at];
        registry_.judge(registry_.worker_at(id));
    }
    c.swept = kNone;
    c.serial = 0;
    c.step = Change::Step::lot;
    if (++c.at == c.workers.size()) end_clear(c);
}
inline void Ingest::end_clear(Change& c) {
    if (c.goes) {
        if (registry_.pod_at(c.pod).uid) registry_.close_pod(c.pod);
        registry_.drop_pod(c.pod, c.workers);
    } else {
        if (c.forgives) registry_.pod_at(c.pod).refused.forgive(c.rank);
        registry_.sum_up(c.pod);
    }
    c.step = Change::Step::none;
}

}  // namespace kvindex
