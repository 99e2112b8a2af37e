// Eviction, by size (max_bytes) and by the time since the last use (ttl).
//
// Content is evicted for all workers at once: the chain that was stored to or matched longest ago, from its end,
// children before parents. Its holders are degraded from then on, since they hold more than is known here. The known
// blocks of a worker are a subset of those without a budget, so an answer can be too small and never too large:
//   - a removal of evicted blocks finds no copy, and removes none;
//   - a store below evicted blocks is refused instead of parked, and the former blocks of its names are removed
//     (see Pending::turn_away);
//   - the group of an event is learned even if its blocks are refused: an unknown group would object to nothing.
// Entries of add_prefix are no announcements of an engine, so their eviction changes no state. They have a small share
// of the budget for themselves, which they leave in the order in which they end. Events have the rest.
//
// Room is made before an event, for the most that it may need. So tables do not double and pages are not taken one by
// one, and about as much is evicted as is stored. Only the part that the estimate misses is evicted afterwards.
#pragma once

#include <algorithm>
#include <vector>

#include "ingest/pending.hpp"
#include "ingest/speculation.hpp"

namespace kvindex {

struct Losses {
    u64 blocks = 0, chains = 0, parked = 0, guesses = 0;
};

class Eviction {
public:
    // max_bytes 0: no budget. ttl 0: no expiry.
    Eviction(Memory& m, Registry& registry, SetPool& sets, Chains& chains, Presence& presence, Speculation& speculation,
             Pending& pending, u64 max_bytes, double ttl)
        : mem_(m),
          registry_(registry),
          sets_(sets),
          chains_(chains),
          presence_(presence),
          speculation_(speculation),
          pending_(pending),
          max_(max_bytes),
          ttl_(ttl) {
        if (max_ || ttl_ > 0) chains_.ages().open(ttl_);
    }
    ~Eviction() = default;
    Eviction(const Eviction&) = delete;
    Eviction& operator=(const Eviction&) = delete;

    // The time at which expire() has work to do. The reader that finds it overdue calls expire(), so that its answer
    // counts no expired content.
    double next_expiry() const {
        const double guesses = speculation_.next_expiry();
        if (!(ttl_ > 0)) return guesses;
        const double step = chains_.ages().next_step();
        return std::min(guesses, chains_.count() ? std::min(step, chains_.ages().began_oldest() + ttl_) : step);
    }
    // Evicts a turn's worth of expired content. Returns false if there is more.
    bool expire(double now) {
        if (!speculation_.expire(now)) return false;
        if (!(ttl_ > 0)) return true;
        for (u32 left = kTurnBlocks / kPiece + 1;
             chains_.ages().oldest() != kNone && chains_.ages().began_oldest() + ttl_ <= now; --left) {
            if (left == 0) return false;
            if (!shed_oldest(kPiece, expired_)) break;
        }
        if (chains_.ages().due(now)) chains_.ages().advance(now);
        return true;
    }

    // The last time that was seen here, to a hundredth of ttl.
    double now() const { return ttl_ > 0 ? chains_.ages().began_newest() : 0; }

    // Adds an entry of add_prefix, if there is room for it.
    void guess(u32 pod, i64 rank, const std::string& model, const u64* prefixes, u32 n, double until, u32 lookahead) {
        const u32 id = registry_.find_worker(pod, rank, registry_.find_space(model));
        // If the worker's groups are unknown, a speculative entry may count more blocks than they would agree to.
        const bool able = id == kNone ? !registry_.pod_at(pod).refused.of(rank) && joins(pod) &&
                                            admits(Registry::kWorkerBytes + Registry::kHolderBytes)
                                      : !registry_.worker_at(id).muted;
        if (!able || !make_guess_room(id, n)) {
            ++shed_.guesses;
            return;
        }
        speculation_.add(pod, rank, model, prefixes, n, until, lookahead);
        fit();
    }

    // Sets the losses from before this index was loaded.
    void recount(const Losses& shed, const Losses& expired) {
        shed_ = shed;
        expired_ = expired;
    }
    const Losses& shed() const { return shed_; }
    const Losses& expired() const { return expired_; }

    bool bounded() const { return max_ != 0; }
    u64 budget() const { return max_; }
    // The bytes that the budget limits: everything that streams can grow.
    std::size_t bytes() const { return mem_.bytes; }
    // Whether ages are kept, so that room has to be made.
    bool on() const { return chains_.ages().on(); }
    // Whether memory may be taken that only a clear returns. Half of the budget is reserved for content.
    bool admits(std::size_t more) const { return !max_ || registry_.fixed() + more <= max_ / 2; }

    // Whether a pod may have one more worker.
    bool joins(u32 pod) const {
        return registry_.pod_at(pod).workers.size() < kMostWorkers && admits(Registry::kWorkerBytes);
    }

    // Makes room for an event that may add these numbers of names and index blocks below a known parent, and `more`
    // bytes besides. Returns false if there is not enough room: then nothing may be added.
    bool make_room(u32 id, u32 names, u32 blocks, std::size_t more, u32 parent) {
        if (!chains_.ages().on()) return true;
        grow_older(blocks);
        presence_.follow(parent == kNone ? kNone : chains_.pos(parent).chain);
        chains_.touch(presence_.followed());
        if (!max_) return true;
        // A share is kept free for memory without an estimate: sets, runs, tables of chains.
        const std::size_t limit = max_ - max_ / 32;
        if (!may_fit(names, blocks, more)) return false;
        if (announced() + growth(id, names, blocks) + more <= limit) return true;
        for (bool renewed = false; announced() + growth(id, names, blocks) + more > limit;) {
            if (pending_.bytes() > max_ / 8 && shed_waiting()) continue;
            if (!renewed && chains_.ages().all_fresh()) {
                // The event's parents are evicted last: if they are, there is no room for the event.
                for (u32 chain = presence_.followed(); chain != kNone; chain = chains_[chain].parent)
                    chains_.ages().renew(chain);
                renewed = true;
            }
            if (!shed_oldest(kPiece, shed_, true) && !shed_waiting()) return false;
        }
        return true;
    }
    // Whether an event can fit at all. If not, it is refused before anything is evicted for it.
    bool may_fit(u32 names, u64 blocks, std::size_t more = 0) const {
        return !max_ || registry_.fixed() + more + blocks * (sizeof(Page) + sizeof(PageHome)) / kPageBlocks +
                                RefTable().growth(names) <=
                            max_ - max_ / 32;
    }
    // Called after an event: evicts for the part that was not estimated.
    void fit() {
        if (!max_) return;
        // Pending blocks contribute to no answer, and take ten times the room of placed blocks.
        while (pending_.bytes() > max_ / 8 && shed_waiting()) {
        }
        while (bytes() > max_ && (shed_guess() || shed_oldest(kPiece, shed_) || shed_waiting())) {
        }
    }
    // The bytes of scratch that the writer may keep.
    std::size_t most_scratch() const { return max_ ? std::min(kMostScratch, max_ / kScratchShare) : kMostScratch; }
    // Counts the losses, since all content is about to be dropped.
    void shed_everything() {
        shed_.blocks += chains_.blocks();
        shed_.chains += chains_.count();
        shed_.parked += pending_.blocks();
        shed_.guesses += speculation_.size();
        recent_ = 0;
    }
    // The worker holds more than is known from now on.
    void fall_short(u32 id) {
        Worker& w = registry_.worker_at(id);
        if (w.shed) return;
        w.shed = true;
        shed_.parked += w.pending;
        pending_.drop_lot(id);
        registry_.spoil(id);
    }

private:
    // Blocks that are evicted at a time: enough to make the search for the oldest chain cheap, few enough to leave most
    // of a long chain.
    static constexpr u32 kPiece = std::min(128u, kTurnBlocks);
    // Speculative entries get the share of the budget that is kept free. Memory without an estimate takes it from them.
    static constexpr std::size_t kGuessShare = 32;

    // Without a clock, stored blocks measure the time: while all content is replaced once, as many generations begin as
    // there are rings.
    void grow_older(u32 blocks) {
        recent_ += blocks;
        if (ttl_ > 0 || recent_ * 128 <= chains_.blocks()) return;
        chains_.ages().advance(0);
        recent_ = 0;
    }
    // A lower bound of the bytes that events take: an entry is counted with its blocks, which an event may have
    // announced too.
    std::size_t announced() const { return bytes() - std::min(bytes(), speculation_.bytes()); }
    // Only other speculative entries make room for a new one.
    bool make_guess_room(u32 id, u32 blocks) {
        if (!max_) return true;
        if (Speculation::cost(blocks) > max_ / kGuessShare) return false;
        grow_older(blocks);
        while (speculation_.bytes() + Speculation::cost(blocks) > max_ / kGuessShare ||
               bytes() + growth(id, 0, blocks) + Speculation::cost(blocks) > max_)
            if (!shed_guess()) return false;
        return true;
    }
    bool shed_guess() {
        if (!speculation_.drop_first()) return false;
        ++shed_.guesses;
        return true;
    }

    std::size_t growth(u32 id, u32 names, u32 blocks) const {
        std::size_t n = chains_.growth(blocks, 1);
        if (id == kNone) return n;
        const Worker& w = registry_.worker_at(id);
        n += registry_.space_at(w.space).names.growth(names) + registry_.space_at(w.space).heads.growth(1) +
             w.chains.growth(1) + w.kids.growth(1);
        if (w.own.size()) n += w.own.growth(names) + names * sizeof(u64) * 5 / 4;
        return n;
    }
    // The chain that was touched longest ago, among those without a child.
    u32 oldest_leaf() {
        u32 id = chains_.ages().oldest();
        // No child is younger than its parent, so all children are as old as the oldest chain.
        while (id != kNone && chains_[id].first_kid != kNone) {
            id = chains_[id].first_kid;
            chains_.ages().next(id);
        }
        return id;
    }
    // Evicts at most `piece` blocks of the oldest chain. Returns false if there is no chain. `but_pinned`: also if only
    // the pinned chain is left, which is renewed and therefore the last.
    bool shed_oldest(u32 piece, Losses& losses, bool but_pinned = false) {
        const u32 id = oldest_leaf();
        if (id == kNone || (but_pinned && id == presence_.followed())) return false;
        const Chain& c = chains_[id];
        const u32 from = c.len <= piece ? c.base : c.end() - piece;
        if (find_guessers(id, from)) {
            // Entries through these blocks end with the chain. If room is needed, the entry that ends first is dropped
            // instead.
            if (&losses == &shed_) return shed_guess();
            const std::size_t n = speculation_.size();
            for (u32 worker : guessers_) speculation_.drop_through(worker, {id, from});
            losses.guesses += n - speculation_.size();
            return true;
        }
        const u64 blocks = chains_.blocks();
        const u32 chains = chains_.count();
        shed_tail(id, from);
        losses.blocks += blocks - chains_.blocks();
        losses.chains += chains - chains_.count();
        return true;
    }
    bool find_guessers(u32 chain, u32 from) {
        guessers_.clear();
        sets_.each(chains_.set_at(chains_[chain], from), [&](u32 h) {
            if (registry_.worker_at(registry_.holder(h).worker).guess == h)
                guessers_.push_back(registry_.holder(h).worker);
        });
        return !guessers_.empty();
    }
    // Removes the blocks from `from` on for all holders. The chain has no children.
    void shed_tail(u32 chain, u32 from) {
        const Chain& c = chains_[chain];
        // Each worker knows a beginning of the chain, so every worker that knows one of these blocks knows the first of
        // them.
        const u32 set = chains_.set_at(c, from);
        straddling_.clear();
        sets_.each(set, [&](u32 h) {
            if (from % registry_.holder(h).factor) straddling_.push_back(h);
        });
        losers_.clear();
        presence_.each_knower(set, [&](u32 id, Worker&) { losers_.push_back(id); });
        for (u32 id : losers_) {
            const Worker& w = registry_.worker_at(id);
            if (w.copies.empty() && w.unsure.empty() && !chains_.has_own(c, id)) continue;
            for (u32 d = c.end(); d-- > from;)
                if (presence_.knows(w, chains_.set_at(c, d))) presence_.drop_names(id, {chain, d}, chains_.ref(c, d));
        }
        chains_.change(chain, from, c.end(), [&](u32 s, u32 k) {
            sets_.each(s, [&](u32 h) { registry_.holder(h).blocks -= k; });
            return kEmptySet;
        });
        const Pos above = presence_.before({chain, from});
        for (u32 id : losers_)
            if (from == c.base) presence_.lose_chain(registry_.worker_at(id), chain);
        // An engine block of several index blocks is removed as a whole, including its part before the cut or in a
        // parent.
        for (u32 h : straddling_) {
            const u32 id = registry_.holder(h).worker;
            Pos p = above;
            while ((p.depth + 1) % registry_.holder(h).factor && !presence_.child_has(registry_.worker_at(id), p, h)) {
                const Pos up = presence_.before(p);
                presence_.lose_bit(id, h, p);
                p = up;
            }
            presence_.climb(id, p);
        }
        for (u32 id : losers_) presence_.climb(id, above);
        presence_.trim(chain);
        for (u32 id : losers_) fall_short(id);
    }
    // Drops the blocks of the fullest lot, or else a speculative entry. Returns false if there is neither.
    bool shed_waiting() {
        if (const u32 fullest = pending_.fullest(); fullest != kNone) {
            fall_short(fullest);
            return true;
        }
        return shed_guess();
    }

    Memory& mem_;
    Registry& registry_;
    SetPool& sets_;
    Chains& chains_;
    Presence& presence_;
    Speculation& speculation_;
    Pending& pending_;
    const u64 max_;
    const double ttl_;
    u64 recent_ = 0;  // blocks since the generation began
    Losses shed_, expired_;
    // Scratch of the single writer.
    std::vector<u32> guessers_, straddling_, losers_;
};

}  // namespace kvindex
