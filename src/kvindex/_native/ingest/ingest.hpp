// The meaning of events: the effect of each on its worker, in one turn of the write lock or (changes.hpp) in several.
//
// An event is applied as a whole or not at all, and the report counts refused events. `apply` runs within a Turn, which
// keeps the values that need not be looked up for each event of a stream. A Change has the work that a turn does not
// finish, and `go_on` does another turn's worth of it.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "hash/content.hpp"
#include "ingest/eviction.hpp"
#include "ingest/repeats.hpp"

namespace kvindex {

// A change that takes several turns of the write lock (changes.hpp).
struct Change {
    // In the order in which they run: of a store, of the blocks that waited for it, of a removal, of a clear.
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
    u32 at = 0;  // the progress of the step, in engine blocks or workers

    // Of an event: prepared without the lock.
    bool prepared = false, sound = true;
    u32 n = 0;  // engine blocks without repeats
    Scratch<u64> ids, locals;

    // Of a store.
    u32 holder = kNone, twin = kNone, factor = 1;
    bool has_parent = false, rolled = false, whole = false;
    u64 parent = 0;
    u32 lookahead = 0;
    u32 placed = kNone;  // engine blocks that have been placed, if the others were not
    Reason reason = Reason::none;

    // Of the blocks that waited.
    Attaching waits;

    // Of a removal: the number of copies that stay, if the event has it; and for each of the worker's holders, the
    // holder that got its blocks to remove.
    Holder tier;
    const u32* stay = nullptr;
    std::vector<std::pair<u32, u32>> twins;

    // Of a clear.
    std::vector<u32> workers, media;
    std::vector<u8> doubts;  // by worker: whether it will be in doubt
    bool some = false;       // only these media
    bool forgives = false;   // afterwards, the rank holds no block of any model
    bool goes = false;       // the pod is removed too
    u64 serial = 0;
    std::vector<std::pair<u32, u32>> chains;  // base and number of each
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

// Events of one stream that are applied one after the other under one lock, and the values that need not be looked up
// for each event.
struct Turn {
    u32 pod;
    i64 rank;
    const std::string& model;
    u32 space;
    u32 worker = kNone;
    u32 holder = kNone;  // the holder that the event before stored to, while the fields are the same
    // The probable parents of the next events, by the number of the event.
    static constexpr std::size_t kParents = 4;
    u32 parents[kParents] = {kNone, kNone, kNone, kNone};
    Change& change;  // work that an event begins and the turn does not finish

    Turn(u32 pod, i64 rank, const std::string& model, u32 space, Change& change)
        : pod(pod), rank(rank), model(model), space(space), change(change) {}
};

class Ingest {
public:
    Ingest(Memory& m, Registry& registry, SetPool& sets, Chains& chains, Presence& presence, Insertion& insertion,
           Speculation& speculation, Pending& pending, Eviction& eviction, const BlockHasher& hasher)
        : mem_(m),
          registry_(registry),
          sets_(sets),
          chains_(chains),
          presence_(presence),
          insertion_(insertion),
          speculation_(speculation),
          pending_(pending),
          eviction_(eviction),
          content_(hasher),
          block_size_(hasher.block_tokens()) {}
    ~Ingest() = default;
    Ingest(const Ingest&) = delete;
    Ingest& operator=(const Ingest&) = delete;

    // All content is about to be dropped. Changes in progress notice it when they continue.
    void start_over() noexcept { ++epoch_; }
    // Returns the memory that a large event needed, and counts the rest. Scratch grows in these four containers; the
    // others follow them.
    void tidy() {
        const std::size_t seen = ids_.capacity() + insertion_.scratch() + extra_.scratch.capacity();
        if (seen == seen_) return;
        std::size_t n = scratch_bytes();
        if (n > eviction_.most_scratch()) {
            drop_scratch();
            n = 0;
        }
        mem_.bytes += n - scratch_;
        scratch_ = n;
        seen_ = n ? seen : 0;
        eviction_.fit();
    }
    // The events of this stream from `i` on were lost. If they had new groups or media, no block of the worker is kept
    // any more: an unknown group would object to nothing.
    void missed(const Turn& turn, const Batch& b, std::size_t i) {
        const u32 id = registry_.find_worker(turn.pod, turn.rank, registry_.find_space(turn.model));
        for (; i < b.events.size(); ++i) {
            const Event& e = b.events[i];
            if (e.kind != EventKind::stored) continue;
            if (id == kNone) return refuse(turn.pod, turn.rank, e);
            bool known = false;
            try {
                known = learned(registry_.worker_at(id), e, static_cast<u32>(e.block_size / block_size_));
            } catch (const std::bad_alloc&) {
                // Comparing the name of a medium in lower case needs memory.
                known = false;
            }
            Worker& w = registry_.worker_at(id);
            if (!known) w.muted = true;
            // Set here, since an earlier clear in the batch has reset the flags of all losses before it.
            w.shed = w.sticky = true;
            registry_.judge(w);
        }
    }

    // ---- long changes (changes.hpp) ---------------------------------------------------------------------------------

    // Whether an event is prepared without the lock and applied in pieces.
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
        if (pod < registry_.pod_slots()) registry_.pod_at(pod).busy = busy;
    }
    // Whether a clear of this rank takes more than one turn.
    bool holds_much(u32 pod, i64 rank) const {
        for (u32 id : registry_.pod_at(pod).workers)
            if (const Worker& w = registry_.worker_at(id);
                w.rank == rank && (registry_.held(w) > kTurnBlocks || w.pending > kTurnBlocks ||
                                   w.chains.size() > kTurnBlocks / ChainTable::kTogether))
                return true;
        return false;
    }
    bool parks_much(u32 pod, i64 rank) const {
        for (u32 id : registry_.pod_at(pod).workers)
            if (registry_.worker_at(id).rank == rank && pending_.size(id) > kTurnBlocks) return true;
        return false;
    }
    // Returns all scratch, once the index has no pod.
    void shrink() {
        drop_scratch();
        mem_.sub(scratch_);
        scratch_ = seen_ = 0;
    }

    // ---- events -----------------------------------------------------------------------------------------------------

    // One event of one stream. Never throws for an event that an engine may send; the report counts refused events.
    KVINDEX_INLINE void apply(Turn& turn, const Batch& b, const Event& e, Report& r) {
        const u32 holder = e.like ? turn.holder : kNone;
        turn.holder = kNone;
        if (holder == kNone && ignores(turn.pod, e)) return r.skip(Reason::ignored_medium);
        if (e.kind == EventKind::stored && turn.worker == kNone && known_worker(turn) == kNone &&
            !eviction_.joins(turn.pod)) {
            const Reason why = eviction_.admits(Registry::kWorkerBytes) ? Reason::over_limit : Reason::over_budget;
            r.skip(why, e.bad == Reason::none ? e.n_hashes : 1);
            refuse(turn.pod, turn.rank, e);
            return;
        }
        act(turn, b, e, holder, r);
        eviction_.fit();
    }
    static constexpr std::size_t kNamesAhead = 6;
    // Prefetches the memory that event `i` will need: the places of its names, then its parent's page, then the chain.
    // Each of them is known only when the one before has arrived, so several events are prefetched at a time. For one
    // block an event, each in another chain, after the processor has done other work, 255 ns a block became 190.
    KVINDEX_INLINE void expect_names(const Turn& turn, const Batch& b, std::size_t i) const {
        if (i >= b.events.size() || turn.space == kNone) return;
        const Event& e = b.events[i];
        const RefTable& names = registry_.space_at(turn.space).names;
        if (e.has_parent) names.prefetch(name_of(e.parent));
        for (u32 k = 0; k < e.n_hashes && k < 4; ++k) names.prefetch(name_of(b.hashes[e.hash_at + k]));
    }
    KVINDEX_INLINE void expect_page(Turn& turn, const Batch& b, std::size_t i) const {
        if (i >= b.events.size() || turn.space == kNone) return;
        const Event& e = b.events[i];
        u32& parent = turn.parents[i % Turn::kParents];
        parent = e.has_parent ? registry_.space_at(turn.space).names.guess(name_of(e.parent)) : kNone;
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
    // The engine has cleared the worker's cache, or its part in the medium that the event names.
    void cleared(Change& c, u32 pod, i64 rank, StrRef medium) {
        Pod& p = registry_.pod_at(pod);
        if (medium.set()) {
            const std::vector<u32> named{registry_.media().find(medium.p, medium.n)};
            begin_clear(c, pod, rank, &named);
        } else if (p.has_clear_media) {
            begin_clear(c, pod, rank, &p.clear_media);
        } else {
            begin_clear(c, pod, rank, nullptr);
            // vLLM's reset_prefix_cache leaves an offloading tier alone. With reset_external, and in a sleep or a
            // pause, the tier is cleared too. The events are the same. SGLang clears its tree and the host's pool in
            // one step (0.5.23, UnifiedRadixCache._reset_full), and leaves its storage alone.
            for (std::size_t i = 0; i < c.workers.size(); ++i) {
                const u32 id = c.workers[i];
                c.doubts[i] = registry_.worker_at(id).in_doubt || held_elsewhere(id);
            }
            if (p.refused.elsewhere) c.forgives = false;
        }
    }
    // Ignores events of these media from now on, and drops the blocks of earlier events.
    void ignore_media(u32 pod, const std::vector<std::string>& media, Change& c) {
        registry_.set_media(registry_.pod_at(pod).ignore_media, media);
        begin_clear(c, pod, kEveryRank, &registry_.pod_at(pod).ignore_media);
    }
    void clear_worker(u32 pod, i64 rank, Change& c) {
        registry_.heard(pod);
        registry_.pod_at(pod).positions.erase(rank);
        begin_clear(c, pod, rank, nullptr);
    }

private:
    // The two marks of pages cannot be names. Such a name becomes its neighbour: 2^-63 by chance.
    static u64 name_of(u64 id) { return id == kNoName || id == kNameless ? id + 1 : id; }

    KVINDEX_INLINE u32 known_worker(Turn& turn) const {
        if (turn.worker == kNone) turn.worker = registry_.find_worker(turn.pod, turn.rank, turn.space);
        return turn.worker;
    }
    KVINDEX_INLINE u32 worker_of(Turn& turn) {
        if (turn.worker == kNone)
            turn.worker = registry_.worker(turn.pod, turn.rank, turn.space = registry_.space(turn.model));
        return turn.worker;
    }
    void act(Turn& turn, const Batch& b, const Event& e, u32 known, Report& r) {
        if (e.bad != Reason::none) {
            if (!e.many) r.skip(e.bad);
            if (e.many && e.parent) r.skip(Reason::unknown_event, e.parent);
            if (e.many && e.block_size) r.skip(Reason::bad_event, e.block_size);
            // An event of an unknown kind may have removed blocks.
            if (e.kind == EventKind::stored) {
                registry_.spoil(worker_of(turn));
            } else if (const u32 w = known_worker(turn); w != kNone) {
                registry_.spoil(w);
            }
            return;
        }
        switch (e.kind) {
            case EventKind::stored: stored(turn, b, e, known, r); break;
            case EventKind::removed: {
                const u64* ids = b.hashes.data() + e.hash_at;
                if (const u32 w = known_worker(turn); w == kNone) {
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

    // A rank whose worker has no room holds more than is known.
    void refuse(u32 pod, i64 rank, const Event& e) {
        registry_.pod_at(pod).refused.add(rank, registry_.media().find(e.medium.p, e.medium.n) != 0);
        registry_.judge(pod);
    }
    bool ignores(u32 pod, const Event& e) const {
        const std::vector<u32>& media = registry_.pod_at(pod).ignore_media;
        if (media.empty()) return false;
        if (!e.medium.set() && (e.kind == EventKind::cleared || e.kind == EventKind::other)) return false;
        return std::find(media.begin(), media.end(), registry_.media().find(e.medium.p, e.medium.n)) != media.end();
    }

    // ---- stored -----------------------------------------------------------------------------------------------------

    // `known`: the holder that events like this one store to, if it has been found already.
    void stored(Turn& turn, const Batch& b, const Event& e, u32 known, Report& r) {
        // The event has no block, not even a masked one.
        if (is_bare(e) && e.n_hashes == 0) return;
        const u32 id = worker_of(turn);
        if (const Worker& w = registry_.worker_at(id); w.muted) return r.skip(w.why_muted, e.n_hashes);
        u32 factor = 1;
        if (!takes_size(id, e, factor, r)) return;
        const Change& change = turn.change;
        if (!change.prepared) {
            ids_.resize(e.n_hashes);
            for (u32 i = 0; i < e.n_hashes; ++i) ids_[i] = name_of(b.hashes[e.hash_at + i]);
        }
        const u64* const ids = change.prepared ? change.ids.data() : ids_.data();
        const u32 n = change.prepared ? change.n : distinct(e, ids);
        if (n < e.n_hashes) {
            r.skip(Reason::duplicate_hash, e.n_hashes - n);
            registry_.spoil(id);
        }
        if (known == kNone) known = learn(id, e, factor, ids, n, r);
        if (known == kNone) return;
        turn.holder = known;
        // All its blocks are masked. The event shows only that the group exists, which limits the blocks that the
        // worker can reuse.
        if (n == 0) return;
        if (change.prepared) {
            store_long(turn, b, e, known, n, r);
        } else {
            store(turn, b, e, known, n, r);
        }
    }
    // Hashed: hashes of content in place of tokens. Bare: neither tokens nor hashes of content, only names.
    static bool is_hashed(const Event& e) { return e.hashed == Hashed::local || e.hashed == Hashed::prefix; }
    static bool is_bare(const Event& e) { return e.n_tokens == 0 && e.hashed == Hashed::tokens; }
    // Whether the event's block size is a multiple of the index's, `factor` times as large. Other sizes are reported.
    bool takes_size(u32 id, const Event& e, u32& factor, Report& r) {
        Worker& w = registry_.worker_at(id);
        const auto mismatch = [&] {
            r.skip(Reason::block_size_mismatch);
            registry_.spoil(id);
            return false;
        };
        if (e.block_size == 0) return is_bare(e) || mismatch();
        // The unfinished end of a prompt. vLLM announces it, and announces it again when it is complete. LMCache does
        // so if it is configured to.
        const bool cut = e.n_tokens && e.n_tokens < e.block_size && e.block_size <= u64{block_size_} * 0xFFFF;
        const bool partial = e.n_hashes == 1 && (cut || e.block_size < u64{block_size_} * largest_factor(w));
        if (e.block_size % block_size_ || (partial && cut)) {
            if (!partial) return mismatch();
            if (w.placed_full) {
                r.skip(Reason::partial_block);
            } else {
                r.skip(Reason::block_size_mismatch);
                w.small_blocks = true;
                registry_.judge(w);
            }
            return false;
        }
        const u64 k = e.block_size / block_size_;
        // Hashes of blocks of another size are not the hashes of these blocks.
        if (k > ContentHasher::kMostFactor || (is_hashed(e) && k != e.factor)) return mismatch();
        factor = static_cast<u32>(k);
        return true;
    }
    // The holder that the event stores to, with the event's group. kNone: the worker cannot have such a holder, which
    // is reported.
    u32 learn(u32 id, const Event& e, u32 factor, const u64* ids, u32 n, Report& r) {
        Worker& w = registry_.worker_at(id);
        if (eviction_.bounded() && !can_learn(w, e, factor)) {
            r.skip(Reason::over_budget, n);
            mute(id, Reason::over_budget);
            return kNone;
        }
        const u32 g = registry_.group(w, {e.group, e.spec_kind.p, e.spec_kind.n, e.window}, factor);
        if (g == kNone) {
            // An unknown group would object to nothing, so the answers of the other groups would be too large.
            r.skip(Reason::over_limit, std::max(n, 1u));
            mute(id, Reason::over_limit);
            return kNone;
        }
        if (is_bare(e) && e.block_size == 0) factor = w.groups[g].factor;
        const u32 h = registry_.holder_for(id, e.medium.p, e.medium.n, g, factor);
        registry_.refresh(id);
        if (h == kNone) {
            if (n == 0) r.skip(Reason::over_limit);
            pending_.turn_away(id, ids, n, Reason::over_limit, r);
        }
        return h;
    }
    // Whether the event's content is to be placed. A tier's event may lack the salt, adapter or image of a block. If
    // the worker's own announcement of the block may have been evicted, only the names count: as copies of their blocks
    // here, or not at all.
    bool places(u32 id, const Event& e, u32 h) const {
        return ContentHasher::of_whole_blocks(e) && !(registry_.worker_at(id).shed && registry_.holder(h).medium != 0);
    }
    // Events that only name blocks have no lookahead of their own.
    bool too_many_lengths(Worker& w, const Event& e) {
        return e.lookahead != w.length && !registry_.learn_length(w, e.lookahead);
    }
    // Begins a store of several turns.
    void store_long(Turn& turn, const Batch& b, const Event& e, u32 h, u32 n, Report& r) {
        Change& change = turn.change;
        const u32 id = turn.worker, factor = registry_.holder(h).factor;
        Worker& w = registry_.worker_at(id);
        const bool whole = places(id, e, h);
        const bool is_over = over_limit(w.pod, u64{n} * factor);
        if (whole && !change.sound) {
            r.skip(Reason::bad_event);
            return registry_.spoil(id);
        }
        if (whole && e.hashed != Hashed::tokens) {
            const auto given = b.hashes.begin() + e.hash_at + e.n_hashes;
            change.locals.assign(given, given + std::ptrdiff_t{n} * factor);
        }
        const bool refused = is_over || (whole && too_many_lengths(w, e));
        begin_store(change, id, h, e, factor, whole);
        if (refused || !eviction_.may_fit(n, u64{n} * factor)) {
            change.reason = refused ? Reason::over_limit : Reason::over_budget;
            change.step = Change::Step::turn_away;
        }
    }
    // Inlined, like `place`: a call of each was 65 of the instructions of an event of one block.
    KVINDEX_INLINE void store(Turn& turn, const Batch& b, const Event& e, u32 h, u32 n, Report& r) {
        const u32 id = turn.worker, factor = registry_.holder(h).factor;
        Worker& w = registry_.worker_at(id);
        const bool whole = places(id, e, h);
        if (over_limit(w.pod, u64{n} * factor)) return pending_.turn_away(id, ids_.data(), n, Reason::over_limit, r);
        if (!make_room_for(id, e, n, factor, whole))
            return pending_.turn_away(id, ids_.data(), n, Reason::over_budget, r);
        if (!whole) {
            for (u32 i = 0; i < n; ++i) pending_.place_known(id, h, ids_[i], r);
            count_refused(r);
            return;
        }
        locals_.resize(std::size_t{n} * factor);
        if (e.hashed != Hashed::tokens) {
            const auto given = b.hashes.begin() + e.hash_at + e.n_hashes;
            std::copy(given, given + std::ptrdiff_t{n} * factor, locals_.begin());
        } else if (!content_.locals(b, e, n, factor, locals_.data(), extra_)) {
            r.skip(Reason::bad_event);
            registry_.spoil(id);
            return;
        }
        if (too_many_lengths(w, e)) return pending_.turn_away(id, ids_.data(), n, Reason::over_limit, r);
        note_full(w);
        place(turn.change, id, h, e, n, r);
    }
    // Records that the worker has placed a block of a size that fits.
    void note_full(Worker& w) {
        if (w.placed_full && !w.small_blocks) return;
        w.placed_full = true;
        w.small_blocks = false;
        registry_.judge(w);
    }
    KVINDEX_INLINE void place(Change& change, u32 id, u32 h, const Event& e, u32 n, Report& r) {
        const Placing a{id,
                        h,
                        e.has_parent,
                        name_of(e.parent),
                        ids_.data(),
                        n,
                        locals_.data(),
                        nullptr,
                        e.hashed == Hashed::prefix,
                        e.lookahead};
        switch (insertion_.place(a)) {
            case Placed::yes:
                r.stored += n;
                count_conflicts(id, r);
                count_refused(r);
                if (!pending_.any(id)) break;
                if (pending_.size(id) > kTurnBlocks) {
                    change.waits.fresh.assign(a.ids, a.ids + n);
                    begin_attach(change, id);
                } else {
                    pending_.work_off(id, a.ids, n);
                }
                break;
            case Placed::orphan: pending_.park_orphan(a, r); break;
            case Placed::misaligned:
                r.skip(Reason::misaligned);
                registry_.spoil(id);
                break;
            case Placed::mixed:
                r.skip(Reason::mixed_lookahead);
                registry_.spoil(id);
                break;
        }
    }
    void count_conflicts(u32 id, Report& r) {
        const u32 conflicts = insertion_.conflicts();
        if (!conflicts) return;
        r.stored -= conflicts;
        r.skip(Reason::hash_conflict, conflicts);
        registry_.spoil(id);
    }
    void count_refused(Report& r) {
        const u32 refused = presence_.take_refused();
        r.stored -= refused;
        if (refused) r.skip(Reason::over_limit, refused);
    }
    // Whether `more` further blocks exceed the pod's limit. A block that is announced again counts as new, and a
    // pending block counts as placed, since it will be placed without another check.
    bool over_limit(u32 pod, u64 more) {
        Pod& p = registry_.pod_at(pod);
        return p.max_blocks != 0 && over_limit(p, more);
    }
    bool over_limit(Pod& p, u64 more) {
        if (more <= p.spare) {
            p.spare -= more;
            return false;
        }
        // At the limit, every event counts the blocks again; below it, only one of many events does.
        for (u32 id : p.workers) {
            const Worker& w = registry_.worker_at(id);
            more += registry_.held(w) + u64{w.pending} * largest_factor(w);
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
        if (!eviction_.on()) return true;
        // An announcement by name alone takes a place in a list of copies, or in a lot.
        if (!whole) return eviction_.make_room(id, 0, 0, static_cast<std::size_t>(n) * 128, kNone);
        const u32 parent = e.has_parent ? presence_.find(id, name_of(e.parent)) : kNone;
        if (e.has_parent && parent == kNone)
            return registry_.worker_at(id).shed ||
                   eviction_.make_room(id, 0, 0, pending_.parked_weight(n, u64{n} * factor), kNone);
        return eviction_.make_room(id, n, n * factor, 0, parent);
    }
    // Whether the event's group and medium are known, or may be kept permanently.
    bool can_learn(const Worker& w, const Event& e, u32 factor) const {
        return eviction_.admits(Registry::kHolderBytes + sizeof(Group) + 192 + u64{2} * e.medium.n) ||
               learned(w, e, factor);
    }
    bool learned(const Worker& w, const Event& e, u32 factor) const {
        return std::any_of(w.holders.begin(), w.holders.end(), [&](u32 h) {
            const Holder& o = registry_.holder(h);
            const Group& g = w.groups[o.group];
            return g.id == std::max<i64>(e.group, 0) && o.medium == registry_.media().find(e.medium.p, e.medium.n) &&
                   o.factor == (e.block_size ? factor : g.factor);
        });
    }
    void mute(u32 id, Reason why) {
        clear_all(id);
        eviction_.fall_short(id);
        registry_.worker_at(id).muted = true;
        registry_.worker_at(id).why_muted = why;
    }
    // The number of engine blocks before the first repeated name. A repeat of the parent's name counts as well: a block
    // cannot lie below itself.
    static u32 distinct(const Event& e, const u64* ids) {
        const u32 n = Repeats::first(ids, e.n_hashes);
        if (!e.has_parent || !ContentHasher::of_whole_blocks(e)) return n;
        return static_cast<u32>(std::find(ids, ids + n, name_of(e.parent)) - ids);
    }

    // ---- removed, cleared -------------------------------------------------------------------------------------------

    // `left`: the number of copies of each block that stay, if the event has it.
    void removed(Change& change, u32 id, const Event& e, const u64* ids, const u32* left, Report& r) {
        Holder tier;
        tier.medium = registry_.media().find(e.medium.p, e.medium.n);
        // No worker holds a block in this medium.
        if (tier.medium == kNone) return r.skip(Reason::unknown_hash, e.n_hashes);
        tier.group = registry_.find_group(registry_.worker_at(id), e.group);
        if (change.prepared) return begin_removal(change, id, tier, left);
        for (u32 i = 0, n; i < e.n_hashes; i += n) {
            const u64 name = name_of(ids[i]);
            const u32 ref = presence_.find(id, name);
            n = left ? 0 : remove_row(id, tier, ref, ids + i, e.n_hashes - i);
            if (n) {
                r.removed += n;
                continue;
            }
            n = 1;
            if (remove_one(id, tier, name, ref, left ? left + i : nullptr, nullptr)) {
                ++r.removed;
            } else {
                r.skip(Reason::unknown_hash);
            }
        }
    }
    // Removes the first of these blocks and those that follow it in the same chain, down or up, while all have the same
    // holders and one name. Returns the number of removed blocks; 0: fewer than two. One at a time, a block above
    // others was kept for them and examined again after each removal. Together, a removal of 20 blocks from the first
    // on takes 36 thousand instructions less.
    u32 remove_row(u32 id, const Holder& tier, u32 ref, const u64* ids, u32 n) {
        const Worker& w = registry_.worker_at(id);
        if (ref == kNone || n < 2 || !w.copies.empty() || !w.second.empty() || !w.unsure.empty()) return 0;
        const Pos p = chains_.pos(ref);
        const Chain& c = chains_[p.chain];
        if (c.first_kid != kNone) return 0;
        const u32 run = chains_.run_at(c, p.depth), first = c.runs[run].start, end = chains_.run_end(c, run);
        const auto is = [&](u32 depth, u64 name) {
            if (depth < first || depth >= end) return false;
            const u64 own = chains_.own_name(c, id, depth);
            return (own == kNoName ? chains_.name(chains_.ref(c, depth)) : own) == name_of(name);
        };
        const bool down = is(p.depth + 1, ids[1]);
        if (!down && (p.depth == 0 || !is(p.depth - 1, ids[1]))) return 0;
        u32 k = 2;
        if (down) {
            while (k < n && is(p.depth + k, ids[k])) ++k;
        } else {
            while (k < n && k <= p.depth && is(p.depth - k, ids[k])) ++k;
        }
        for (u32 h : w.holders) {
            const Holder& holder = registry_.holder(h);
            if (holder.medium != tier.medium || holder.group != tier.group || !sets_.has(c.runs[run].set, h)) continue;
            if (holder.factor != 1) return 0;
            presence_.take_row(id, h, p.chain, down ? p.depth : p.depth + 1 - k, down ? p.depth + k : p.depth + 1);
            return k;
        }
        return 0;
    }
    // Removes all copies of a name but `left`. Returns false if the name has no copy, placed or pending.
    bool leave_copies(u32 id, const Holder& tier, u64 name, u32 ref, u32 left, Change* change) {
        if (remove_copy(id, tier, name, ref, &left, change)) return true;
        const u32 waiting = pending_.parked_copies(id, tier, name);
        for (u32 n = waiting; n > left; --n) pending_.cancel(id, tier, name);
        return waiting != 0;
    }
    // Removes a block by its name and reference (kNone: unknown). `left` copies stay, or (nullptr) one copy is removed.
    bool remove_one(u32 id, const Holder& tier, u64 name, u32 ref, const u32* left, Change* change) {
        return left ? leave_copies(id, tier, name, ref, *left, change)
                    : remove_copy(id, tier, name, ref, nullptr, change) || pending_.cancel(id, tier, name);
    }
    // Removes one copy, or all copies but `left`. In a long removal, a block waits for the others.
    bool remove_copy(u32 id, const Holder& tier, u64 name, u32 ref, const u32* left, Change* change) {
        const auto take = [&](u32 h, Pos at) {
            if (change) {
                leave(*change, h, at);
            } else {
                presence_.take_copy(id, h, at);
            }
        };
        const auto leaves = [&](u32 h) {
            return change && std::any_of(change->twins.begin(), change->twins.end(),
                                         [&](const auto& t) { return t.second == h; });
        };
        Worker& w = registry_.worker_at(id);
        if (ref == kNone) return false;
        const Pos p = chains_.pos(ref);
        const u32 set = presence_.set_at(p);
        for (u32 h : w.holders) {
            const Holder& holder = registry_.holder(h);
            if (holder.medium != tier.medium || holder.group != tier.group || (p.depth + 1) % holder.factor ||
                leaves(h))
                continue;
            const auto it = w.copies.empty() ? w.copies.end() : w.copies.find(ref);
            if (it == w.copies.end()) {
                u64 first;
                if (!sets_.has(set, h) || !presence_.first_name(id, p, ref, first) || first != name) continue;
                if (!left || *left == 0) {
                    take(h, p);
                    return true;
                }
                if (*left == 1 || counts_once(w)) return true;
                presence_.list_copies(id, p, ref);
            }
            Copies& list = w.copies.find(ref)->second;
            auto c = std::find_if(list.begin(), list.end(),
                                  [&](const Copy& x) { return x.id == name && x.holder == h && x.count; });
            if (c == list.end()) continue;
            c->count = left ? std::min(*left, counts_once(w) ? 1u : *left) : c->count - 1;
            const bool last =
                std::none_of(list.begin(), list.end(), [&](const Copy& x) { return x.holder == h && x.count; });
            presence_.tidy_copies(id, p, ref);
            if (last) take(h, p);
            return true;
        }
        return false;
    }
    bool counts_once(const Worker& w) const { return registry_.pod_at(w.pod).set_presence; }
    // Whether a medium that the engine's clears may leave alone holds a block, including blocks that were evicted here.
    bool held_elsewhere(u32 id) const {
        const Worker& w = registry_.worker_at(id);
        const bool sglang = registry_.pod_at(w.pod).engine == Engine::sglang;
        const auto spared = [&](u32 medium) { return medium != 0 && !(sglang && registry_.media().is_host(medium)); };
        for (u32 h : w.holders)
            if (spared(registry_.holder(h).medium) && (registry_.holder(h).blocks || w.shed)) return true;
        return pending_.waits_in(id, spared);
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
        begin_clear(c, registry_.worker_at(id).pod, registry_.worker_at(id).rank, nullptr);
        c.workers.assign(1, id);
        c.forgives = false;
        go_through(c, unused);
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

    static constexpr i64 kEveryRank = -1;

    std::size_t scratch_bytes() const {
        return bytes_of(ids_, locals_, extra_.digest, extra_.has, extra_.scratch) + insertion_.scratch_bytes() +
               pending_.scratch_bytes();
    }
    void drop_scratch() {
        drop_all(ids_, locals_);
        extra_ = {};
        insertion_.drop_scratch();
        pending_.drop_scratch();
    }

    Memory& mem_;
    Registry& registry_;
    SetPool& sets_;
    Chains& chains_;
    Presence& presence_;
    Insertion& insertion_;
    Speculation& speculation_;
    Pending& pending_;
    Eviction& eviction_;
    const ContentHasher content_;
    const u32 block_size_;

    // Changes when all content is dropped.
    u32 epoch_ = 0;

    // Scratch of the single writer.
    std::vector<u64> ids_, locals_;
    ExtraDigests extra_;
    std::size_t scratch_ = 0, seen_ = 0;  // its counted bytes, and its growth when they were counted
};

}  // namespace kvindex
