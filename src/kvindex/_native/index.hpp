// The index: events in, chains and holder sets changed. Matching reads what it keeps (query/match.hpp).
//
// It is built in layers, each of which uses only those below: who is there (workers/registry.hpp), what each worker
// knows (workers/presence.hpp), how blocks are put into their place (ingest/insertion.hpp), what waits for a place
// (ingest/pending.hpp), what goes when there is too much (ingest/eviction.hpp), and here what events mean.
#pragma once

#include <algorithm>
#include <cstdio>

#include "hash/extra_keys.hpp"
#include "hash/identity.hpp"
#include "ingest/eviction.hpp"
#include "ingest/repeats.hpp"

namespace kvindex {

// A change that goes on over several turns of the write lock (changes.hpp).
struct Change {
    // In the order in which they come: of a store, of what waited for it, of a removal, of a clear.
    enum class Step : u8 {
        none,
        place,
        copy,
        park,
        turn_away,
        show,
        fold,
        attach,
        settle,
        take,
        forget,
        guesses,
        hide,
        lot,
        dead,
        maps,
        collect,
        sort,
        sweep,
        finish
    };

    Step step = Step::none;
    u32 epoch = 0;
    u32 pod = kNone, worker = kNone;
    i64 rank = 0;
    u32 at = 0;  // how far the step has come, in engine blocks or workers

    // Of an event, made without the lock.
    bool prepared = false, sound = true;
    u32 n = 0;  // engine blocks without repeats
    std::vector<u64> ids, locals;

    // Of a store.
    u32 holder = kNone, twin = kNone, factor = 1;
    bool has_parent = false, rolled = false, whole = false;
    u64 parent = 0;
    u32 lookahead = 0;
    u32 placed = kNone;  // engine blocks that have been placed, where the others were not
    Reason reason = Reason::none;

    // Of what waited.
    Attaching waits;

    // Of a removal: how many copies stay, if the event says so, and the holder that each of the worker's has given what
    // is to go.
    Holder tier;
    const u32* stay = nullptr;
    std::vector<std::pair<u32, u32>> twins;

    // Of a clear.
    std::vector<u32> workers, media;
    std::vector<u8> doubts;  // by worker: whether it will be in doubt
    bool some = false;       // these media only
    bool forgives = false;   // the rank holds nothing afterwards, of no model
    bool goes = false;       // the pod goes too
    u64 serial = 0;
    std::vector<std::pair<u32, u32>> chains;  // base and number
    ChainTable::Cursor cursor;
    u32 swept = kNone;

    u32 left = 0;  // blocks that this turn may still change, or as much work

    bool on() const { return step != Step::none; }
    void spend(u32 blocks) { left -= std::min(left, blocks); }
    // Orders the chains of a clear, which needs no lock.
    void relax() {
        if (step != Step::sort) return;
        std::sort(chains.begin(), chains.end());
        step = Step::sweep;
    }
};

// Events of one stream that are applied under one lock, one after the other, and what need not be looked up for each.
struct Turn {
    u32 pod;
    i64 rank;
    const std::string& model;
    u32 space;
    u32 worker = kNone;
    u32 holder = kNone;  // where the event before stored to, while nothing else was said
    // What the parents of the next events probably are, by the number of the event.
    static constexpr std::size_t kParents = 4;
    u32 parents[kParents] = {kNone, kNone, kNone, kNone};
    Change& change;  // what an event begins and a turn does not end

    Turn(u32 pod, i64 rank, const std::string& model, u32 space, Change& change)
        : pod(pod), rank(rank), model(model), space(space), change(change) {}
};

class Index : public Eviction {
public:
    Index(u32 block_size, u64 seed, bool set_presence, u32 max_parked, u64 max_bytes = 0, double ttl = 0)
        : Eviction(block_size, seed, set_presence, max_parked, max_bytes, ttl), block_size_(block_size), seed_(seed) {}

    u32 block_size() const { return block_size_; }
    u64 seed() const { return seed_; }
    // Complete blocks of a prompt that have so many tokens behind them.
    u32 blocks(u64 tokens, u32 lookahead) const {
        return tokens < lookahead ? 0 : static_cast<u32>((tokens - lookahead) / block_size_);
    }
    // The lengths of lookahead that a worker's blocks have; none where nothing is known of it.
    std::vector<u32> lengths(u32 pod, i64 rank, const std::string& model) const {
        const u32 space = find_space(model);
        const u32 id = space == kNone ? kNone : find_worker(pod, rank, space);
        return id == kNone || workers_[id]->lengths.empty() ? std::vector<u32>(1, 0) : workers_[id]->lengths;
    }

    // A batch of this stream has been applied. `clean`: whatever was lost before it does not matter any more.
    void advance(u32 pod, i64 rank, const std::string& model, u64 seq, double ts, u64 fingerprint, bool clean,
                 bool lost) {
        std::map<i64, Position>& all = pods_[pod].positions;
        const auto it = all.find(rank);
        if (it == all.end() && all.size() >= kMostWorkers) return;
        const bool whole = it == all.end() ? seq == 0 : it->second.whole && seq == it->second.seq + 1;
        const Position at{seq, ts, fingerprint, space(model), !lost && (clean || whole)};
        all[rank] = at;
    }
    // Something came in without a number: how far the stream has been applied cannot be said any more.
    void lose_place(u32 pod, i64 rank) {
        if (!pods_[pod].positions.empty()) pods_[pod].positions.erase(rank);
    }

    // Memory ended in the middle of a change, and nobody knows how far that came. So all content goes, of all workers,
    // as if it had been shed: what is known of a worker stays a part of the truth, and every pod says that it is
    // degraded. What workers are (their groups limit their answers) stays, since that is made as a whole or not at all.
    // Needs no memory, and looks at nothing that may be half done.
    void start_over() noexcept {
        shed_everything();
        for (const auto& g : guesses_) mem_.sub(kGuessBytes + g.second.prefixes.size() * sizeof(u64));
        guess_paths_.clear();
        guesses_.clear();
        guess_bytes_ = 0;
        for (const auto& worker : workers_) {
            if (!worker) continue;
            Worker& w = *worker;
            w.lot.reset();
            release(w);
            w.second = CountedMap<u64, u32>(Counted<char>(mem_));
            w.copies = CountedMap<u32, Copies>(Counted<char>(mem_));
            w.unsure = CountedMap<u64, u8>(Counted<char>(mem_));
            for (const std::vector<u32>* list : {&w.holders, &w.hidden})
                for (u32 h : *list) holders_[h].blocks = 0;
            if (w.ghost != kNone) holders_[w.ghost].blocks = 0;
            if (w.guess != kNone) free_holder(w.guess);
            w.guess = kNone;
            w.shed = w.sticky = true;
        }
        mem_.sub(lot_bytes_);
        lot_bytes_ = parked_ = 0;
        fresh_.clear();
        chains_.clear();
        sets_.clear();
        for (Space& s : spaces_) {
            s.heads.release(mem_);
            s.names.release(mem_);
        }
        pinned_ = kNone;
        loose_blocks_.clear();
        loose_chains_.clear();
        ++epoch_;
        for (u32 id = 0; id < workers_.size(); ++id)
            if (workers_[id]) refresh(id);
        for (u32 p = 0; p < pods_.size(); ++p) judge(p);
    }
    // Gives back what a large event needed, and counts what stays. Scratch grows in these four; the rest follows them.
    void tidy() {
        const std::size_t seen = ids_.capacity() + prefixes_.capacity() + path_.capacity() + extra_.scratch.capacity();
        if (seen == seen_) return;
        std::size_t n = scratch_bytes();
        if (n > most_scratch()) {
            drop_scratch();
            n = 0;
        }
        mem_.bytes += n - scratch_;
        scratch_ = n;
        seen_ = n ? seen : 0;
        fit();
    }
    // Events of this stream from `i` on were lost. Where they said something new of its groups and media, nothing is
    // kept of the worker any more: a group that is not known would object to nothing.
    void missed(const Turn& turn, const Batch& b, std::size_t i) {
        const u32 id = find_worker(turn.pod, turn.rank, find_space(turn.model));
        for (; i < b.events.size(); ++i) {
            const Event& e = b.events[i];
            if (e.kind != EventKind::stored) continue;
            if (id == kNone) return refuse(turn.pod, turn.rank, e);
            bool known = false;
            try {
                known = learned(*workers_[id], e, static_cast<u32>(e.block_size / block_size_));
            } catch (const std::bad_alloc&) {
                // A medium's name is compared in lower case.
                known = false;
            }
            if (!known) workers_[id]->muted = true;
        }
    }

    // ---- long changes (changes.hpp) ---------------------------------------------------------------------------------

    // Whether an event is prepared without the lock, and applied in pieces.
    static bool is_long(const Event& e) {
        return e.bad == Reason::none && (e.kind == EventKind::stored || e.kind == EventKind::removed) &&
               (e.n_hashes > kTurnBlocks || e.n_tokens > u64{kTurnBlocks} * 4096);
    }
    void prepare(const Batch& b, const Event& e, Change& c) const;
    void begin_end(Change& c, u32 pod) noexcept;
    void begin_clear(Change& c, u32 pod, i64 rank, const std::vector<u32>* media);
    bool go_on(Change& c, Report& r);
    void go_through(Change& c, Report& r);
    void abandon(Change& c) noexcept;
    void set_busy(u32 pod, bool busy) {
        if (pod < pods_.size()) pods_[pod].busy = busy;
    }
    // Whether a clear of this rank takes more than one turn.
    bool holds_much(u32 pod, i64 rank) const {
        for (u32 id : pods_[pod].workers)
            if (const Worker& w = *workers_[id];
                w.rank == rank && (held(w) > kTurnBlocks || w.parked() > kTurnBlocks || w.chains.size() > kTurnBlocks))
                return true;
        return false;
    }
    bool parks_much(u32 pod, i64 rank) const {
        for (u32 id : pods_[pod].workers)
            if (const Worker& w = *workers_[id]; w.rank == rank && w.lot && w.lot->by_id.size() > kTurnBlocks)
                return true;
        return false;
    }
    using Eviction::loose;
    using Eviction::tie_up;

    // From here on the pod's number and name lead to nothing; the name may be opened anew.
    void close_pod(u32 id) {
        Pod& p = pods_[id];
        directory_.close(p.name);
        p.uid = 0;
        ++pods_version_;
    }
    void drop_pod(u32 id, const std::vector<u32>& workers) {
        Pod& p = pods_[id];
        for (u32 w : workers) drop_worker(w);
        for (const std::vector<u32>* list : {&p.clear_media, &p.ignore_media})
            for (u32 m : *list) media_.drop(m);
        p = Pod();
        free_pods_.push_back(id);
    }
    // Gives back what was kept for the next pod, once the last one has gone and left nothing.
    void shrink() {
        if (free_pods_.size() != pods_.size() || loose()) return;
        drop_scratch();
        mem_.sub(scratch_);
        scratch_ = seen_ = 0;
        sets_.shrink();
        chains_.shrink();
        pods_.clear();
        pods_.shrink_to_fit();
        free_pods_.clear();
        workers_.clear();
        workers_.shrink_to_fit();
        free_workers_.clear();
        holders_.clear();
        holders_.shrink_to_fit();
        free_holders_.clear();
        simple_.clear();
        guessed_.clear();
        grouped_.clear();
        rooted_.clear();
        faces_.clear();
        stands_for_.clear();
    }

    // ---- events -----------------------------------------------------------------------------------------------------

    // One event of one stream. Never throws for what an engine may send; what could not be applied is in the report.
    void apply(Turn& turn, const Batch& b, const Event& e, Report& r) {
        const u32 holder = e.like ? turn.holder : kNone;
        turn.holder = kNone;
        if (holder == kNone && ignores(turn.pod, e)) return r.skip(Reason::ignored_medium);
        if (e.kind == EventKind::stored && turn.worker == kNone && find_worker(turn) == kNone && !joins(turn.pod)) {
            const Reason why = admits(kWorkerBytes) ? Reason::over_limit : Reason::over_budget;
            r.skip(why, e.bad == Reason::none ? e.n_hashes : 1);
            refuse(turn.pod, turn.rank, e);
            return;
        }
        act(turn, b, e, holder, r);
        fit();
    }
    static constexpr std::size_t kNamesAhead = 6;
    // Ask for what event `i` will need before its turn has come: the places of its names, then its parent's page, then
    // the chain. Each is known only when the one before has come, so several events are on their way at a time. One
    // block an event, each in another chain, after the processor has done something else: 255 ns a block became 190.
    KVINDEX_INLINE void expect_names(const Turn& turn, const Batch& b, std::size_t i) const {
        if (i >= b.events.size() || turn.space == kNone) return;
        const Event& e = b.events[i];
        const RefTable& names = spaces_[turn.space].names;
        if (e.has_parent) names.prefetch(name_of(e.parent));
        for (u32 k = 0; k < e.n_hashes && k < 4; ++k) names.prefetch(name_of(b.hashes[e.hash_at + k]));
    }
    KVINDEX_INLINE void expect_page(Turn& turn, const Batch& b, std::size_t i) const {
        if (i >= b.events.size() || turn.space == kNone) return;
        const Event& e = b.events[i];
        u32& parent = turn.parents[i % Turn::kParents];
        parent = e.has_parent ? spaces_[turn.space].names.guess(name_of(e.parent)) : kNone;
        if (parent != kNone) chains_.prefetch_block(parent);
    }
    KVINDEX_INLINE void expect_chain(const Turn& turn, std::size_t i) const {
        if (const u32 parent = turn.parents[i % Turn::kParents]; parent != kNone) chains_.prefetch_chain(parent);
    }
    KVINDEX_INLINE void expect(Turn& turn, const Batch& b, std::size_t i) const {
        expect_names(turn, b, i + kNamesAhead);
        expect_page(turn, b, i + 4);
        expect_chain(turn, i + 2);
    }
    KVINDEX_INLINE void expect_first(const Turn& turn, const Batch& b, std::size_t i) const {
        for (std::size_t k = i; k < i + kNamesAhead; ++k) expect_names(turn, b, k);
    }
    // A payload of this worker was lost.
    void lost_payload(u32 pod, i64 rank) {
        for (u32 w : pods_[pod].workers)
            if (workers_[w]->rank == rank) spoil(w);
    }
    // The worker's cache is empty, or what of it lies in the medium that the event names.
    void cleared(Change& c, u32 pod, i64 rank, StrRef medium) {
        Pod& p = pods_[pod];
        if (medium.set()) {
            const std::vector<u32> named{media_.find(medium.p, medium.n)};
            begin_clear(c, pod, rank, &named);
        } else if (p.has_clear_media) {
            begin_clear(c, pod, rank, &p.clear_media);
        } else {
            begin_clear(c, pod, rank, nullptr);
            // vLLM's reset_prefix_cache leaves an offloading tier alone; with reset_external, a sleep or a pause the
            // tier goes too. The events are the same. SGLang clears its tree and the host's pool in one step (0.5.23,
            // UnifiedRadixCache._reset_full), and leaves its storage alone.
            for (std::size_t i = 0; i < c.workers.size(); ++i) {
                const Worker& w = *workers_[c.workers[i]];
                c.doubts[i] = w.in_doubt || held_elsewhere(w);
            }
            if (p.refused.elsewhere) c.forgives = false;
        }
    }
    // Events of these media are left out from now on, and what they said before goes.
    void ignore_media(u32 pod, const std::vector<std::string>& media, Change& c) {
        set_media(pods_[pod].ignore_media, media);
        begin_clear(c, pod, kEveryRank, &pods_[pod].ignore_media);
    }
    void clear_worker(u32 pod, i64 rank, Change& c) {
        heard(pod);
        pods_[pod].positions.erase(rank);
        begin_clear(c, pod, rank, nullptr);
    }

    // ---- figures ----------------------------------------------------------------------------------------------------

    struct Figures {
        u64 blocks, chains, sets, holders, pods, workers, parked, guesses, bytes;
        u64 shed_blocks, shed_chains, shed_parked, shed_guesses, expired_blocks, expired_chains, expired_guesses;
    };
    Figures figures() const {
        // clang-format off
        return {chains_.blocks(), chains_.count(), sets_.live(), holders_.size() - free_holders_.size(), directory_.size(),
                workers_.size() - free_workers_.size(), parked_, guesses_.size(), mem_.bytes,
                shed().blocks, shed().chains, shed().parked, shed().guesses,
                expired().blocks, expired().chains, expired().guesses};
        // clang-format on
    }
    // Walks everything and returns the first broken invariant, or an empty string. O(size of the index).
    std::string check() const;

private:
    friend class SnapshotWriter;
    friend class SnapshotReader;

    // The two marks of pages are not available as names; 2^-63 by chance, and then a neighbour's name.
    static u64 name_of(u64 id) { return id == kNoName || id == kNameless ? id + 1 : id; }

    using Eviction::find_worker;
    using Eviction::worker;
    u32 find_worker(Turn& turn) const {
        if (turn.worker == kNone) turn.worker = find_worker(turn.pod, turn.rank, turn.space);
        return turn.worker;
    }
    u32 worker(Turn& turn) {
        if (turn.worker == kNone) turn.worker = worker(turn.pod, turn.rank, turn.space = space(turn.model));
        return turn.worker;
    }
    void act(Turn& turn, const Batch& b, const Event& e, u32 known, Report& r) {
        if (e.bad != Reason::none) {
            if (!e.many) r.skip(e.bad);
            if (e.many && e.parent) r.skip(Reason::unknown_event, e.parent);
            if (e.many && e.block_size) r.skip(Reason::bad_event, e.block_size);
            // An event of a kind that is not known may have taken blocks away.
            if (e.kind == EventKind::stored) {
                spoil(worker(turn));
            } else if (const u32 w = find_worker(turn); w != kNone) {
                spoil(w);
            }
            return;
        }
        switch (e.kind) {
            case EventKind::stored: stored(turn, b, e, known, r); break;
            case EventKind::removed: {
                const u64* ids = b.hashes.data() + e.hash_at;
                if (const u32 w = find_worker(turn); w == kNone) {
                    r.skip(Reason::unknown_hash, e.n_hashes);
                } else {
                    removed(turn.change, w, e, ids, e.n_tokens ? b.tokens.data() + e.token_at : nullptr, r);
                }
                break;
            }
            case EventKind::cleared:
                cleared(turn.change, turn.pod, turn.rank, e.medium);
                ++r.cleared;
                break;
            case EventKind::other: r.skip(Reason::unknown_event); break;
        }
    }

    bool ignores(u32 pod, const Event& e) const {
        const std::vector<u32>& media = pods_[pod].ignore_media;
        if (media.empty()) return false;
        if (!e.medium.set() && (e.kind == EventKind::cleared || e.kind == EventKind::other)) return false;
        return std::find(media.begin(), media.end(), media_.find(e.medium.p, e.medium.n)) != media.end();
    }

    // ---- stored -----------------------------------------------------------------------------------------------------

    // `known`: the holder that events like this one store to, if it is known.
    void stored(Turn& turn, const Batch& b, const Event& e, u32 known, Report& r) {
        const bool hashed = e.hashed != Hashed::tokens, bare = e.n_tokens == 0 && !hashed;
        // It says nothing of any block, not even that one is masked.
        if (bare && e.n_hashes == 0) return;
        const u32 id = worker(turn);
        Worker& w = *workers_[id];
        if (w.muted) return r.skip(w.why_muted, e.n_hashes);
        u32 factor = 1;
        if (e.block_size != 0) {
            // The unfinished end of a prompt: vLLM announces it and again when it is whole, LMCache where it is told
            // to.
            const bool cut = e.n_tokens && e.n_tokens < e.block_size && e.block_size <= u64{block_size_} * 0xFFFF;
            const bool partial = e.n_hashes == 1 && (cut || e.block_size < u64{block_size_} * largest_factor(w));
            if (e.block_size % block_size_ || (partial && cut)) {
                if (partial && w.placed_full) {
                    r.skip(Reason::partial_block);
                } else {
                    r.skip(Reason::block_size_mismatch);
                    if (partial) {
                        w.small_blocks = true;
                    } else {
                        w.sticky = true;
                    }
                    judge(w);
                }
                return;
            }
            const u64 k = e.block_size / block_size_;
            // Hashes of blocks of another size say nothing of these.
            if (k > kMostFactor || (hashed && k != 1)) {
                r.skip(Reason::block_size_mismatch);
                spoil(id);
                return;
            }
            factor = static_cast<u32>(k);
        } else if (!bare) {
            r.skip(Reason::block_size_mismatch);
            spoil(id);
            return;
        }
        Change& change = turn.change;
        if (!change.prepared) {
            ids_.resize(e.n_hashes);
            for (u32 i = 0; i < e.n_hashes; ++i) ids_[i] = name_of(b.hashes[e.hash_at + i]);
        }
        const u64* const ids = change.prepared ? change.ids.data() : ids_.data();
        bool whole = of_whole_blocks(e);
        const u32 n = change.prepared ? change.n : distinct(e, ids);
        if (n < e.n_hashes) {
            r.skip(Reason::duplicate_hash, e.n_hashes - n);
            spoil(id);
        }
        if (known == kNone) {
            if (bounded() && !can_learn(w, e, factor)) {
                r.skip(Reason::over_budget, n);
                mute(id, Reason::over_budget);
                return;
            }
            const u32 g = group(w, e, factor);
            if (g == kNone) {
                // A group that is not known would object to nothing, so the answers of the others would be too large.
                r.skip(Reason::over_limit, std::max(n, 1u));
                mute(id, Reason::over_limit);
                return;
            }
            if (bare && (e.block_size == 0)) factor = w.groups[g].factor;
            known = holder_for(id, e.medium, g, factor);
            refresh(id);
            if (known == kNone) {
                if (n == 0) r.skip(Reason::over_limit);
                return turn_away(id, ids, n, Reason::over_limit, r);
            }
        }
        const u32 h = turn.holder = known;
        factor = holders_[h].factor;
        // All its blocks masked: that the group exists is all there is to learn,
        // and it limits what the worker can reuse.
        if (n == 0) return;
        // A tier's event may lack the salt, adapter or image of a block. Where the worker's own announcement of it may
        // have been evicted, its names alone count: what they meant here, or nothing.
        if (w.shed && holders_[h].medium != 0) whole = false;
        const bool is_over = over_limit(w.pod, static_cast<u64>(n) * factor);
        // Events that only name blocks have no lookahead of their own.
        const auto too_many_lengths = [&] { return e.lookahead != w.length && !learn_length(w, e.lookahead); };
        if (change.prepared) {
            if (whole && !change.sound) {
                r.skip(Reason::bad_event);
                return spoil(id);
            }
            if (whole && hashed) {
                const auto given = b.hashes.begin() + e.hash_at + e.n_hashes;
                change.locals.assign(given, given + n);
            }
            const bool refused = is_over || (whole && too_many_lengths());
            begin_store(change, id, h, e, factor, whole);
            if (refused || !may_fit(n, u64{n} * factor)) {
                change.reason = refused ? Reason::over_limit : Reason::over_budget;
                change.step = Change::Step::turn_away;
            }
            return;
        }
        if (is_over) return turn_away(id, ids, n, Reason::over_limit, r);
        if (!make_room_for(id, e, n, factor, whole)) return turn_away(id, ids, n, Reason::over_budget, r);
        if (!whole) {
            for (u32 i = 0; i < n; ++i) place_known(id, h, ids[i], r);
            count_refused(r);
            return;
        }
        locals_.resize(std::size_t{n} * factor);
        if (hashed) {
            const auto given = b.hashes.begin() + e.hash_at + e.n_hashes;
            std::copy(given, given + n, locals_.begin());
        } else if (!hash_event(b, e, n, factor, locals_.data(), extra_)) {
            r.skip(Reason::bad_event);
            spoil(id);
            return;
        }
        if (too_many_lengths()) return turn_away(id, ids, n, Reason::over_limit, r);
        if (!w.placed_full || w.small_blocks) {
            w.placed_full = true;
            w.small_blocks = false;
            judge(w);
        }
        const Placing a{
            id,         h, e.has_parent, name_of(e.parent), ids, n, locals_.data(), nullptr, e.hashed == Hashed::prefix,
            e.lookahead};
        switch (place(a)) {
            case Placed::yes:
                r.stored += n;
                count_conflicts(id, r);
                count_refused(r);
                if (w.lot && w.lot->by_id.size() > kTurnBlocks) {
                    change.waits.fresh.assign(ids, ids + n);
                    begin_attach(change, id);
                } else if (w.lot) {
                    fresh_.assign(ids, ids + n);
                    work_off(id);
                }
                break;
            case Placed::orphan: park_orphan(a, r); break;
            case Placed::misaligned:
                r.skip(Reason::misaligned);
                spoil(id);
                break;
            case Placed::mixed:
                r.skip(Reason::mixed_lookahead);
                spoil(id);
                break;
        }
    }
    void count_conflicts(u32 id, Report& r) {
        if (!conflicts_) return;
        r.stored -= conflicts_;
        r.skip(Reason::hash_conflict, conflicts_);
        spoil(id);
    }
    void count_refused(Report& r) {
        r.stored -= refused_copies_;
        if (refused_copies_) r.skip(Reason::over_limit, refused_copies_);
        refused_copies_ = 0;
    }
    // Whether so many blocks more are more than this pod may have. What it re-announces counts as new, and what waits
    // as if it were placed, which it will be without being asked again.
    bool over_limit(u32 pod, u64 more) {
        Pod& p = pods_[pod];
        if (p.max_blocks == 0) return false;
        if (more <= p.spare) {
            p.spare -= more;
            return false;
        }
        // At the limit each event counts anew; below it, only one of many.
        for (u32 id : p.workers) {
            const Worker& w = *workers_[id];
            more += held(w) + u64{w.parked()} * largest_factor(w);
        }
        p.spare = p.max_blocks - std::min(p.max_blocks, more);
        return more > p.max_blocks;
    }
    static u32 largest_factor(const Worker& w) {
        u32 factor = 1;
        for (const Group& g : w.groups) factor = std::max(factor, g.factor);
        return factor;
    }
    bool make_room_for(u32 id, const Event& e, u32 n, u32 factor, bool whole) {
        if (!chains_.ages().on()) return true;
        // What is announced by name alone costs a place in a list of copies, or in a lot.
        if (!whole) return make_room(id, 0, 0, static_cast<std::size_t>(n) * 128, kNone);
        const u32 parent = e.has_parent ? find(id, name_of(e.parent)) : kNone;
        if (e.has_parent && parent == kNone)
            return workers_[id]->shed || make_room(id, 0, 0, parked_weight(n, u64{n} * factor), kNone);
        return make_room(id, n, n * factor, 0, parent);
    }
    // Whether what the event says of its worker is known, or may be kept for good.
    bool can_learn(const Worker& w, const Event& e, u32 factor) const {
        return admits(kHolderBytes + sizeof(Group) + 192 + u64{2} * e.medium.n) || learned(w, e, factor);
    }
    bool learned(const Worker& w, const Event& e, u32 factor) const {
        return std::any_of(w.holders.begin(), w.holders.end(), [&](u32 h) {
            const Holder& o = holders_[h];
            const Group& g = w.groups[o.group];
            return g.id == std::max<i64>(e.group, 0) && o.medium == media_.find(e.medium.p, e.medium.n) &&
                   o.factor == (e.block_size ? factor : g.factor);
        });
    }
    void mute(u32 id, Reason why) {
        clear_all(id);
        fall_short(id);
        workers_[id]->muted = true;
        workers_[id]->why_muted = why;
    }
    // Whether the event describes all its blocks, and not only names them.
    static bool of_whole_blocks(const Event& e) {
        if (e.hashed != Hashed::tokens) return true;
        // LMCache 0.5 slices one token too many: 257 tokens for a block of 256. Where blocks are masked, tokens are a
        // whole number of blocks.
        const u64 spanned = static_cast<u64>(e.n_hashes) * e.block_size;
        return e.n_tokens != 0 && e.block_size != 0 &&
               (e.n_tokens == spanned || (e.n_tokens > spanned && e.n_tokens % e.block_size));
    }
    // Of how many engine blocks the names differ, from the first on. What repeats the parent repeats as well: a block
    // cannot lie below itself.
    static u32 distinct(const Event& e, const u64* ids) {
        const u32 n = Repeats::first(ids, e.n_hashes);
        if (!e.has_parent || !of_whole_blocks(e)) return n;
        return static_cast<u32>(std::find(ids, ids + n, name_of(e.parent)) - ids);
    }
    // Local hashes of the event's first n engine blocks, adapter and extra keys included.
    bool hash_event(const Batch& b, const Event& e, u32 n, u32 factor, u64* locals, ExtraDigests& extra) const {
        const u32* tokens = b.tokens.data() + e.token_at;
        const u32 blocks = n * factor;
        char digits[24];
        StrRef adapter = e.lora_name;
        if (!adapter.set() || adapter.n == 0) adapter = e.lora_id_name;
        if ((!adapter.set() || adapter.n == 0) && e.lora_id > 0) {
            const int len = std::snprintf(digits, sizeof digits, "%lld", static_cast<long long>(e.lora_id));
            adapter.p = digits;
            adapter.n = static_cast<u32>(len);
        }
        if (adapter.set() && adapter.n) {
            BlockHasher(seed_, block_size_, xxh3_64(adapter.p, adapter.n, 0)).locals(tokens, blocks, locals);
        } else {
            hasher_.locals(tokens, blocks, locals);
        }
        if (!e.extra_keys && !e.cache_salt.set()) return look_ahead(b, e, n, factor, locals);
        if (!extra_key_digests(e.extra_keys, e.extra_keys_bytes, adapter, e.cache_salt, !e.has_parent, seed_, n, extra))
            return false;
        if (extra.any)
            for (u32 j = 0; j < n; ++j)
                if (u64& h = locals[std::size_t{j} * factor]; extra.has[j]) h = mix_extra(h, extra.digest[j], seed_);
        return look_ahead(b, e, n, factor, locals);
    }
    // What is behind an index block is partly in its own engine block.
    bool look_ahead(const Batch& b, const Event& e, u32 n, u32 factor, u64* locals) const {
        if (e.lookahead == 0) return true;
        const u32* tokens = b.tokens.data() + e.token_at;
        const u32* ahead = tokens + e.n_tokens;
        const std::size_t size = std::size_t{block_size_} * factor;
        std::vector<u32> behind;
        for (u32 j = 0; j < n; ++j, tokens += size, ahead += e.lookahead) {
            behind.assign(tokens, tokens + (factor > 1 ? size : 0));
            behind.insert(behind.end(), ahead, ahead + e.lookahead);
            for (u32 s = 0; s < factor; ++s) {
                u64& h = locals[std::size_t{j} * factor + s];
                h = mix_lookahead(h, behind.data() + (factor > 1 ? std::size_t{block_size_} * (s + 1) : 0), e.lookahead,
                                  seed_);
            }
        }
        return true;
    }

    // ---- removed, cleared -------------------------------------------------------------------------------------------

    // `left`: how many copies stay of each, where the event says so.
    void removed(Change& change, u32 id, const Event& e, const u64* ids, const u32* left, Report& r) {
        Holder tier;
        tier.medium = media_.find(e.medium.p, e.medium.n);
        // Nobody holds anything there.
        if (tier.medium == kNone) return r.skip(Reason::unknown_hash, e.n_hashes);
        tier.group = find_group(*workers_[id], e.group);
        if (change.prepared) return begin_removal(change, id, tier, left);
        for (u32 i = 0; i < e.n_hashes; ++i) {
            const u64 name = name_of(ids[i]);
            if (remove_one(id, tier, name, left ? left + i : nullptr, nullptr)) {
                ++r.removed;
            } else {
                r.skip(Reason::unknown_hash);
            }
        }
    }
    // Of a name that has no copy nothing is known that could stay.
    bool leave_copies(u32 id, const Holder& tier, u64 name, u32 left, Change* change) {
        if (remove_copy(id, tier, name, &left, change)) return true;
        const u32 waiting = parked_copies(id, tier, name);
        for (u32 n = waiting; n > left; --n) cancel(id, tier, name);
        return waiting != 0;
    }
    // What an event that names a block for removal means, with `left` copies that stay or (nullptr) one that goes.
    bool remove_one(u32 id, const Holder& tier, u64 name, const u32* left, Change* change) {
        return left ? leave_copies(id, tier, name, *left, change)
                    : remove_copy(id, tier, name, nullptr, change) || cancel(id, tier, name);
    }
    // Takes away one copy, or, where `left` says how many stay, all others. Of a long removal, what goes waits for the
    // others.
    bool remove_copy(u32 id, const Holder& tier, u64 name, const u32* left, Change* change) {
        const auto take = [&](u32 h, Pos at) {
            if (change) {
                leave(*change, h, at);
            } else {
                take_copy(id, h, at);
            }
        };
        const auto leaves = [&](u32 h) {
            return change && std::any_of(change->twins.begin(), change->twins.end(),
                                         [&](const auto& t) { return t.second == h; });
        };
        Worker& w = *workers_[id];
        const u32 ref = find(id, name);
        if (ref == kNone) return false;
        const Pos p = chains_.pos(ref);
        const u32 set = set_at(p);
        for (u32 h : w.holders) {
            const Holder& holder = holders_[h];
            if (holder.medium != tier.medium || holder.group != tier.group || (p.depth + 1) % holder.factor ||
                leaves(h))
                continue;
            const auto it = w.copies.empty() ? w.copies.end() : w.copies.find(ref);
            if (it == w.copies.end()) {
                u64 first;
                if (!sets_.has(set, h) || !first_name(id, p, ref, first) || first != name) continue;
                if (!left || *left == 0) {
                    take(h, p);
                    return true;
                }
                if (*left == 1 || counts_once(w)) return true;
                list_copies(id, p, ref);
            }
            Copies& list = w.copies.find(ref)->second;
            auto c = std::find_if(list.begin(), list.end(),
                                  [&](const Copy& x) { return x.id == name && x.holder == h && x.count; });
            if (c == list.end()) continue;
            c->count = left ? std::min(*left, counts_once(w) ? 1u : *left) : c->count - 1;
            const bool last =
                std::none_of(list.begin(), list.end(), [&](const Copy& x) { return x.holder == h && x.count; });
            tidy_copies(id, p, ref);
            if (last) take(h, p);
            return true;
        }
        return false;
    }
    bool counts_once(const Worker& w) const { return pods_[w.pod].set_presence; }
    // Whether a medium that the engine's clears may leave alone holds something, or something that was forgotten here.
    bool held_elsewhere(const Worker& w) const {
        const bool sglang = pods_[w.pod].engine == Engine::sglang;
        const auto spared = [&](u32 medium) { return medium != 0 && !(sglang && media_.is_host(medium)); };
        for (u32 h : w.holders)
            if (spared(holders_[h].medium) && (holders_[h].blocks || w.shed)) return true;
        return w.lot && std::any_of(w.lot->by_id.begin(), w.lot->by_id.end(),
                                    [&](const auto& hash) { return !hash.first.dead && spared(hash.first.medium); });
    }
    // The worker's chains, children before their parents.
    std::vector<u32> own_chains(const Worker& w) const {
        std::vector<u32> list;
        w.chains.each([&](u32 chain) { list.push_back(chain); });
        std::sort(list.begin(), list.end(), [&](u32 a, u32 b) {
            return chains_[a].base != chains_[b].base ? chains_[a].base > chains_[b].base : a < b;
        });
        return list;
    }
    void clear_all(u32 id) {
        Change c;
        Report unused;
        begin_clear(c, workers_[id]->pod, workers_[id]->rank, nullptr);
        c.workers.assign(1, id);
        c.forgives = false;
        go_through(c, unused);
    }
    // All but what the worker is: nothing of it is known any more, in any chain.
    void forget_worker(u32 id) {
        Worker& w = *workers_[id];
        release(w);
        w.second = CountedMap<u64, u32>(Counted<char>(mem_));
        w.copies = CountedMap<u32, Copies>(Counted<char>(mem_));
        w.unsure = CountedMap<u64, u8>(Counted<char>(mem_));
        for (const std::vector<u32>* list : {&w.holders, &w.hidden})
            for (u32 h : *list) free_holder(h);
        pods_[w.pod].holders -= static_cast<u32>(w.holders.size());
        w.holders.clear();
        w.hidden.clear();
        w.mask.clear();
        if (w.ghost != kNone) {
            holders_[w.ghost].blocks = 0;
            set_bit(w.mask, w.ghost, true);
        }
        drop_groups(w);
        drop_lengths(w);
        w.placed_full = w.small_blocks = w.sticky = w.in_doubt = w.shed = w.muted = false;
        refresh(id);
        judge(w);
    }

    void start_clear(Change& c, u32 pod, i64 rank) noexcept;
    void do_step(Change& c, Report& r);
    void begin_store(Change& c, u32 id, u32 h, const Event& e, u32 factor, bool whole);
    void begin_removal(Change& c, u32 id, const Holder& tier, const u32* stay);
    void begin_attach(Change& c, u32 id);
    void end_clear(Change& c);
    static u32 piece(const Change& c);
    void place_piece(Change& c, Report& r);
    void orphaned(Change& c, Report& r);
    void copy_piece(Change& c, Report& r);
    void park_piece(Change& c, Report& r);
    void turn_away_piece(Change& c, Report& r);
    void show_store(Change& c);
    void fold(Change& c, u32 chain, u32 from, u32 to);
    void fold_piece(Change& c);
    void attach_piece(Change& c);
    void settle_piece(Change& c);
    void take_piece(Change& c, Report& r);
    void leave(Change& c, u32 h, Pos p);
    void forget_piece(Change& c);
    void forget_holder(u32 id, u32 h);
    void drop_guess_of(Change& c);
    void hide_all(Change& c);
    bool cleared_by(const Change& c, u32 h) const;
    void clear_lot(Change& c);
    void clear_dead(Change& c);
    void clear_maps(Change& c);
    void collect_chains(Change& c);
    void sweep_piece(Change& c);
    u32 known_end(const Worker& w, const Chain& c) const;
    void clear_some_of(const Change& c, u32 id, u32 chain, u32 from, u32 end);
    void finish_clear(Change& c);

    u32 block_size_;
    u64 seed_;

    static constexpr i64 kEveryRank = -1;
    // Blocks of the index in one engine block, which is never split: 65,536 tokens of the usual 16.
    static constexpr u32 kMostFactor = 4096;

    template <class... V>
    static std::size_t bytes_of(const V&... list) {
        return (... + (list.capacity() * sizeof(typename V::value_type)));
    }
    std::size_t scratch_bytes() const {
        return bytes_of(ids_, locals_, prefixes_, taken_, segs_, pieces_, path_, fresh_, extra_.digest, extra_.has,
                        extra_.scratch);
    }
    void drop_scratch() {
        drop_all(ids_, locals_, prefixes_, taken_, segs_, pieces_, path_, fresh_);
        extra_ = {};
    }

    // Changes when all content has gone.
    u32 epoch_ = 0;

    // Scratch of the one writer.
    std::vector<u64> ids_, locals_;
    ExtraDigests extra_;
    std::size_t scratch_ = 0, seen_ = 0;  // its bytes as they are counted, and what it had grown to then
};

}  // namespace kvindex
