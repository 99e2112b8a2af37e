// The index as threads share it: the locks, how long they are held, and the memory that each thread has for itself.
#pragma once

#include <atomic>
#include <chrono>
#include <ctime>
#include <limits>
#include <set>
#include <thread>

#include "base/at_fork.hpp"
#include "base/lock.hpp"
#include "index.hpp"
#include "query/loads.hpp"
#include "query/match.hpp"
#include "query/pod_filter.hpp"
#include "query/prompt.hpp"
#include "snapshot/snapshot.hpp"
#include "wire/batches.hpp"
#include "wire/hashed.hpp"

namespace kvindex {

struct PodFigures {
    i64 rank;
    u64 blocks = 0, parked = 0;
    int state = 0;
    i64 last_seq = -1;  // -1: none
    bool in_doubt = false;
    std::set<u32> lookahead;
};

// The position of a batch in its stream. seq -1: not given.
struct Place {
    i64 seq = -1;
    double ts = 0;
    u64 fingerprint = 0;
};

struct StreamPlace {
    i64 rank;
    u64 seq, fingerprint;
    double ts;
    bool whole;
    std::string model;
};

// There was no memory for a change, and all content has been dropped.
struct OutOfMemory : std::bad_alloc {
    const char* what() const noexcept override {
        return "no memory for a change of the index: what it knew of all pods is forgotten, and they are degraded until "
               "their engines clear or restart; give the process more, or the index less by max_bytes";
    }
};

// The outcome of a payload. Two outcomes leave it unapplied: busy, another thread has the index; unknown, the pod does
// not exist.
enum class Taken : u8 { yes, no_batch, busy, unknown };

struct Totals {
    u64 batches, bad_payloads, events_stored, events_removed, events_cleared;
    u64 blocks_stored, blocks_removed, blocks_parked, skipped, errors;
};

// All figures, taken at one moment.
struct Stats {
    Index::Figures figures;
    Totals totals;
    Report report;
};

class ConcurrentIndex {
public:
    // max_bytes 0, ttl 0: no limit.
    ConcurrentIndex(u32 block_size, u64 seed, bool set_presence, u32 max_parked, u64 max_bytes = 0, double ttl = 0)
        : block_size_(block_size),
          seed_(seed),
          max_parked_(max_parked),
          max_bytes_(max_bytes - max_bytes / kScratchShare),
          ttl_(ttl),
          set_presence_(set_presence),
          ix_(made(pods_)),
          batches_(max_bytes ? std::min(kMostScratch, max_bytes / kScratchShare) : kMostScratch) {
        // The reserved share of a budget is for scratch and the spare page. If it is too small for both, no page is
        // prepared.
        if (max_bytes && max_bytes / kScratchShare < kMostScratch + kHugePage) spare_.turn_off();
        note_expiry();
        Forks<ConcurrentIndex>::add(this);
    }
    ~ConcurrentIndex() { Forks<ConcurrentIndex>::drop(this); }
    ConcurrentIndex(const ConcurrentIndex&) = delete;
    ConcurrentIndex& operator=(const ConcurrentIndex&) = delete;

    u64 open_pod(const std::string& name) {
        Writing w(*this);
        return ix_->registry().pod_at(ix_->registry().pod(name)).uid;
    }
    // The name may be opened again before the last of the pod's blocks has been removed.
    bool remove_pod(u64 uid) {
        const bool gone = change(uid, [&](u32 pod, Change& c) { ix_->ingest().begin_end(c, pod); });
        if (gone) {
            const Writing w(*this);
            if (!ix_->registry().any_pods()) batches_.clear();
        }
        return gone;
    }
    void configure(u64 uid, int set_presence, bool has_media, const std::vector<std::string>& media, i64 chunk,
                   i64 max_blocks) {
        Writing w(*this);
        const u32 pod = w.idle(uid);
        if (pod == kNone) return;
        if (set_presence >= 0) ix_->registry().set_presence(pod, set_presence != 0);
        if (has_media) ix_->registry().set_clear_media(pod, media);
        if (max_blocks >= 0) ix_->registry().set_max_blocks(pod, static_cast<u64>(max_blocks));
        if (chunk >= 0) ix_->registry().set_chunk(pod, static_cast<u32>(chunk));
    }
    void ignore_media(u64 uid, const std::vector<std::string>& media) {
        change(uid, [&](u32 pod, Change& c) { ix_->ingest().ignore_media(pod, media, c); });
    }
    // engine, eagle or hybrid -1: unchanged. eagle 0: the engine drops no block; 1: it drops the last matched block in
    // these groups, or in all groups if the list is empty.
    void engine(u64 uid, int engine, int eagle, const std::vector<i64>& groups, int hybrid) {
        Writing w(*this);
        const u32 pod = ix_->registry().slot(uid);
        if (pod == kNone) return;
        const Pod& p = ix_->registry().pod_at(pod);
        ix_->registry().set_engine(pod, engine < 0 ? p.engine : static_cast<Engine>(engine),
                                   eagle < 0 ? p.eagle : eagle == 1, eagle < 0 ? p.eagle_groups : groups,
                                   hybrid < 0 ? p.hybrid : hybrid == 1);
    }
    void mark(u64 uid, i64 rank, int state) {
        Writing w(*this);
        if (const u32 pod = ix_->registry().slot(uid); pod != kNone)
            ix_->registry().mark(pod, rank, static_cast<State>(state));
    }
    void clear_worker(u64 uid, i64 rank) {
        change(uid, [&](u32 pod, Change& c) { ix_->ingest().clear_worker(pod, rank, c); });
    }

    const PodDirectory& directory() const { return pods_; }

    // The whole payload is decoded before the lock is taken, and nothing is applied if it is no batch. rank -1: the
    // batch's own rank. `wait` false: gives up instead of waiting for other threads, so that a caller may try a small
    // batch while it holds the interpreter lock. A pod that was removed before the call waited for anything is
    // `unknown`. If the pod is removed while the call waits, the batch is dropped.
    Taken ingest(u64 uid, const u8* payload, u64 bytes, const std::string& model, i64 rank, i64 seq, bool wait,
                 Report& r, double& ts, i64& dp_rank, DecodeFault& fault) {
        const Batches::Lent lent(batches_);
        Batch& batch = *lent;
        Place place;
        if ((place.seq = seq) >= 0) place.fingerprint = xxh3_64(payload, bytes, 0);
        bool whole = false;
        try {
            whole = decode_batch(payload, bytes, batch, fault, false);
        } catch (const std::bad_alloc&) {
            // The content is unchanged, so it differs from now on from the content of this worker's engine.
            batch = Batch();
            Writing w(*this);
            lose(uid, rank < 0 ? 0 : rank, model, place);
            throw;
        }
        if (!whole) {
            if (!wait) return Taken::busy;
            Writing w(*this);
            ++totals_.bad_payloads;
            lose(uid, rank < 0 ? 0 : rank, model, place);
            return Taken::no_batch;
        }
        place.ts = ts = batch.ts;
        dp_rank = rank >= 0 ? rank : batch.dp_rank >= 0 ? batch.dp_rank : 0;
        if (!uid) return Taken::unknown;
        return apply(uid, dp_rank, model, batch, place, r, wait);
    }
    // Applies consecutive hashed batches, each to its own pod. Counts them, and in `unsound` those whose payload was no
    // batch. Returns false at the first bytes that are no hashed batch.
    bool ingest_hashed(const u8* p, u64 bytes, u64& batches, u64& unsound) {
        const Batches::Lent lent(batches_);
        Batch& batch = *lent;
        for (HashedHead head; bytes; ++batches) {
            const std::size_t n = read_hashed(p, bytes, head, batch);
            if (!n) return false;
            p += n;
            bytes -= n;
            const std::string pod(head.pod.p, head.pod.n), model(head.model.p, head.model.n);
            const Place place{head.seq, head.ts, head.fingerprint};
            u64 uid = pods_.find(pod);
            if (head.sound) {
                Report report;
                if (!uid) uid = open_pod(pod);
                apply(uid, head.rank, model, batch, place, report);
            } else {
                Writing w(*this);
                ++unsound;
                ++totals_.bad_payloads;
                lose(uid, head.rank, model, place);
            }
        }
        return true;
    }
    Taken apply(u64 uid, i64 rank, const std::string& model, const Batch& batch, const Place& place, Report& r,
                bool wait = true) {
        // The lock is released between events, so a reader waits for about this many blocks at most (some
        // microseconds). Taking the lock for each one-block event would double the cost of such an event.
        constexpr u64 kTurn = 128;
        const std::size_t n = batch.events.size();
        std::size_t i = 0;
        Change change;
        bool on = false;
        do {
            change.relax();
            if (!change.on() && i < n && Ingest::is_long(batch.events[i])) {
                if (!wait) return Taken::busy;
                if (!change.prepared) prepare(uid, rank, model, batch, i, on, change);
            }
            if (spare_.wanted()) {
                if (!wait) return Taken::busy;
                spare_.stock();
            }
            u32 pod = kNone;
            if (on) {
                lock_.lock();
            } else if (!wait) {
                if (saving_.load(std::memory_order_relaxed) || !lock_.try_lock()) return Taken::busy;
            } else {
                // A change that has begun goes on: a save waits for its end.
                wait_for_saver();
                lock_.lock();
            }
            Written w(*this);
            half_ -= on;
            if (!on && !wait) {
                pod = ix_->registry().slot(uid);
                if (pod == kNone) return Taken::unknown;
                if (ix_->registry().pod_at(pod).busy || ix_->loose() || is_much(pod, rank, batch)) return Taken::busy;
            } else {
                pod = change.on() ? ix_->registry().slot(uid) : w.idle(uid);
            }
            if (pod == kNone) {
                if (!wait && !on) return Taken::unknown;
                // The pod was removed while the batch waited. A batch never opens a removed pod again.
                r.skip(Reason::pod_removed, n - i + batch.joined);
                return Taken::yes;
            }
            ix_->registry().heard(pod);
            Turn turn(pod, rank, model, ix_->registry().find_space(model), change);
            try {
                if (!change.on()) ix_->ingest().expect_first(turn, batch, i);
                for (u64 work = 0; i < n && work < kTurn; ++i) {
                    if (!change.on()) {
                        const Event& e = batch.events[i];
                        // A long event is prepared before the next turn, without the lock.
                        if (Ingest::is_long(e) && !change.prepared) break;
                        ix_->ingest().expect(turn, batch, i);
                        work += 1 + e.n_hashes;
                        totals_.events_stored += e.kind == EventKind::stored;
                        totals_.events_removed += e.kind == EventKind::removed;
                        totals_.events_cleared += e.kind == EventKind::cleared;
                        ix_->ingest().apply(turn, batch, e, r);
                        change.prepared = false;
                    }
                    if (!finish_now(change, r, pod)) break;
                }
                if (i == n && wait && ix_->loose()) ix_->tie_up();
                ix_->ingest().tidy();
                if (i == n && !(wait && ix_->loose())) {
                    ++totals_.batches;
                    report_.add(r);
                    note_expiry();
                    note(pod, rank, model, place,
                         r.cleared && batch.clears() && !ix_->registry().pod_at(pod).has_clear_media, false);
                    return Taken::yes;
                }
                ++half_;
            } catch (const std::bad_alloc&) {
                give_up(change, pod);
                ix_->ingest().missed(turn, batch, i);
                throw OutOfMemory();
            }
            on = true;
        } while (true);
    }

    // `wait` false: gives up (and returns false) instead of waiting for a writer, so that a caller may try while it
    // holds the interpreter lock.
    KVINDEX_INLINE bool match(const Prompt& prompt, const std::string& model, PodNames* names, bool only_exact,
                              bool wait, MatchResult& out) const {
        if (!find(prompt, model, names, only_exact, wait, out)) return false;
        if (trusted_until_.load(std::memory_order_relaxed) == kForever) return true;
        if (!parts_.empty()) return match_parts(prompt, model, names, only_exact, wait, out);
        if (lapsed()) out.distrust(only_exact);
        return true;
    }
    // From this moment of the steady clock on, in nanoseconds, every state is stale. kForever: no limit.
    static constexpr i64 kForever = std::numeric_limits<i64>::max();
    void trust(i64 until) { trusted_until_.store(until, std::memory_order_relaxed); }
    // From now on, matches and choices cover several other indexes, each with locks and states of its own. These have
    // no pod in common and outlive this index, which stays empty.
    static constexpr u32 kMostParts = Hit::kMostParts;
    void join(std::vector<ConcurrentIndex*> parts) {
        for (u32 i = 0; i < parts.size(); ++i) parts[i]->part_ = i;
        parts_ = std::move(parts);
        // Any limits do: a match without limits returns before it looks for parts, so a single index pays nothing for
        // them.
        trust(kForever - 1);
        expiry_.store(-1.0);
    }
    // `wait` false: gives up, as match() does.
    bool choose(Loads& loads, const Hits& hits, u64 n_tokens, const std::string& model, PodNames* names, double now,
                bool wait, Loads::Choice& out) const {
        if (!parts_.empty()) return choose_of_parts(loads, hits, n_tokens, model, names, now, wait, out);
        Reading g(*this, wait);
        if (!g.on) return false;
        const std::shared_ptr<const Filter> filter = names ? names->compile(*ix_, part_) : nullptr;
        out = Loads::Choice();
        if (lapsed()) return true;
        Loads::Search search{hits, n_tokens, block_size_};
        loads.look({ix_.get(), ix_->registry().find_space(model), filter.get(), false}, search);
        loads.settle(search, now, out);
        return true;
    }
    // Counts one more request, which reached the worker in another way, and returns the worker's row. kNone: there is
    // no such worker.
    u32 reserve(Loads& loads, u64 pod, i64 rank, u64 prefill, u64 context) const {
        for (u32 i = 0; i < parts_.size(); ++i)
            if (const u32 at = parts_[i]->reserve_in(loads, i, pod, rank, prefill, context); at != kNone) return at;
        return parts_.empty() ? reserve_in(loads, 0, pod, rank, prefill, context) : kNone;
    }
    // The load of each worker that still exists.
    std::vector<Loads::Load> loads(Loads& of) const {
        for (u32 i = 0; i < parts_.size(); ++i) {
            const Reading g(*parts_[i], true);
            of.follow(*parts_[i]->ix_, i);
        }
        if (parts_.empty()) {
            const Reading g(*this, true);
            of.follow(*ix_, 0);
        }
        return of.rows();
    }
    // The number of complete blocks of the prompt that do not contain its last token.
    u32 before_last(const Prompt& p) const {
        if (p.n_tokens) return static_cast<u32>((p.n_tokens - 1) / ix_->block_size());
        return static_cast<u32>(p.n_prefixes ? p.n_prefixes - 1 : 0);
    }
    void guess(u64 uid, i64 rank, const std::string& model, const Prompt& prompt, double until) {
        if (prompt.prefixes) {
            const std::vector<u64> given(prompt.prefixes, prompt.prefixes + prompt.n_prefixes);
            return guess(uid, rank, model, given, until, 0);
        }
        for (u32 lookahead : lengths(uid, rank, model)) {
            std::vector<u64> prefixes(prompt.n_tokens < lookahead ? 0 : (prompt.n_tokens - lookahead) / block_size_);
            hash_prompt(prompt, block_size_, seed_, true, prefixes.data(), lookahead);
            guess(uid, rank, model, prefixes, until, lookahead);
        }
    }
    void guess(u64 uid, i64 rank, const std::string& model, const std::vector<u64>& prefixes, double until,
               u32 lookahead = 0) {
        Writing w(*this);
        if (const u32 pod = w.idle(uid); pod != kNone)
            whole([&] {
                ix_->eviction().guess(pod, rank, model, prefixes.data(), static_cast<u32>(prefixes.size()), until,
                                      lookahead);
            });
        note_expiry();
    }
    // The local hashes of the prompt's blocks as events of this worker have them, by length of lookahead.
    std::vector<std::pair<u32, std::vector<u64>>> locals(u64 uid, i64 rank, const std::string& model,
                                                         const Prompt& prompt) const {
        std::vector<std::pair<u32, std::vector<u64>>> all;
        for (u32 lookahead : lengths(uid, rank, model)) {
            all.emplace_back(lookahead, prompt.n_tokens < lookahead ? 0 : (prompt.n_tokens - lookahead) / block_size_);
            hash_prompt(prompt, block_size_, seed_, false, all.back().second.data(), lookahead);
        }
        return all;
    }
    // An entry of add_prefix that another router made, given by its local hashes. They are chained here, so any list of
    // them is a path. Returns false if the call would create more than an entry: a rank, a second model of a rank, or
    // another lookahead.
    bool hint(u64 uid, i64 rank, const std::string& model, u32 lookahead, const u64* locals, u32 n, double until) {
        std::vector<u64> prefixes(n);
        BlockHasher(seed_, block_size_).chain(locals, n, nullptr, prefixes.data());
        Writing w(*this);
        const u32 pod = w.idle(uid);
        if (pod == kNone || !ix_->registry().follows(pod, rank, model, lookahead)) return false;
        whole([&] { ix_->eviction().guess(pod, rank, model, prefixes.data(), n, until, lookahead); });
        note_expiry();
        return true;
    }
    double next_expiry() const { return expiry_.load(std::memory_order_relaxed); }
    void expire(double now) {
        for (bool done = false; !done;) {
            Writing w(*this);
            whole([&] { done = ix_->eviction().expire(now); });
            if (ix_->loose()) whole([&] { ix_->tie_up(); });
            note_expiry();
        }
    }

    int state(u64 uid) const {
        Reading g(*this, true);
        const u32 pod = ix_->registry().slot(uid);
        return pod == kNone ? -1 : static_cast<int>(lapsed() ? State::stale : ix_->registry().pod_at(pod).state);
    }
    std::vector<PodFigures> pod_figures(u64 uid) const {
        Reading g(*this, true);
        std::vector<PodFigures> out;
        const u32 pod = ix_->registry().slot(uid);
        if (pod == kNone) return out;
        const Pod& p = ix_->registry().pod_at(pod);
        for (const auto& s : p.streams) out.push_back({s.first, 0, 0, static_cast<int>(s.second), -1, false, {}});
        for (u32 id : p.workers) {
            const Worker& w = ix_->registry().worker_at(id);
            auto it = std::find_if(out.begin(), out.end(), [&](const PodFigures& f) { return f.rank == w.rank; });
            if (it == out.end()) it = out.insert(out.end(), PodFigures{w.rank, 0, 0, 0, -1, false, {}});
            it->blocks += ix_->registry().held(w);
            it->parked += w.pending;
            it->state = std::max(it->state, static_cast<int>(ix_->registry().own_state(w)));
            it->in_doubt |= w.in_doubt;
            it->lookahead.insert(w.lengths.begin(), w.lengths.end());
        }
        for (const auto& s : p.positions) {
            auto it = std::find_if(out.begin(), out.end(), [&](const PodFigures& f) { return f.rank == s.first; });
            if (it == out.end()) it = out.insert(out.end(), PodFigures{s.first, 0, 0, 0, -1, false, {}});
            it->last_seq = static_cast<i64>(s.second.seq);
        }
        if (lapsed())
            for (PodFigures& f : out) f.state = static_cast<int>(State::stale);
        return out;
    }
    std::vector<StreamPlace> places(u64 uid) const {
        Reading g(*this, true);
        std::vector<StreamPlace> out;
        const u32 pod = ix_->registry().slot(uid);
        if (pod == kNone) return out;
        for (const auto& s : ix_->registry().pod_at(pod).positions)
            out.push_back({s.first, s.second.seq, s.second.fingerprint, s.second.ts, s.second.whole,
                           ix_->registry().space_at(s.second.space).model});
        return out;
    }

    // ---- snapshots --------------------------------------------------------------------------------------------------

    // Matches continue meanwhile. Writers wait at a gate: a writer that waited for the lock would keep new readers out
    // of it. A save waits for batches that have been applied in part, since a replay would repeat them as a whole.
    void save(SnapshotBytes& out) const {
        std::lock_guard<std::mutex> one(saver_);
        copy(out);
        seal_snapshot(out);
    }
    // Replaces all content at once. Matches use the old content until the snapshot has been read and verified, and a
    // refused snapshot changes nothing. Writers wait meanwhile, as during a save. A pod or medium that exists now and
    // in the snapshot keeps its number, so earlier answers, filters and loads stay valid.
    void load(const u8* data, u64 bytes) {
        const std::lock_guard<std::mutex> one(saver_);
        const Gate gate(*this);
        // The new index, and after the swap the old one, whose memory is returned without the lock. A caller that has
        // passed the gate may still open a pod. Then the snapshot is read again, with new numbers.
        std::shared_ptr<Index> other;
        for (bool done = false; !done;) {
            Registry::Numbers before;
            double now = 0;
            {
                const Reading g(*this, true);
                before = ix_->registry().numbers();
                now = ix_->eviction().now();
            }
            PodDirectory aside;
            other = made(aside);
            other->eviction().expire(now);
            Totals totals = {};
            Report report;
            Losses shed, expired;
            const std::vector<u64*> counts = counted(totals, report, shed, expired);
            std::vector<u64> c(counts.size());
            read_snapshot(*other, before, data, bytes, c);
            for (std::size_t i = 0; i < c.size(); ++i) *counts[i] = c[i];
            other->eviction().recount(shed, expired);
            fit_loaded(*other);
            while (!done) {
                {
                    lock_.lock();
                    const Written w(*this);
                    if (!ix_->registry().as_of(before)) break;
                    if (half_ == 0) {
                        other->registry().settle(pods_);
                        ix_.swap(other);
                        totals_ = totals;
                        report_ = report;
                        note_expiry();
                        done = true;
                    }
                }
                if (!done) std::this_thread::sleep_for(std::chrono::microseconds(200));
            }
        }
    }
    Stats stats() const {
        Reading g(*this, true);
        Stats out{ix_->figures(), totals_, report_};
        out.figures.bytes += batches_.bytes();
        Totals& t = out.totals;
        t.blocks_stored = report_.stored;
        t.blocks_removed = report_.removed;
        t.blocks_parked = report_.parked;
        t.skipped = report_.skipped;
        t.errors = report_.errors;
        return out;
    }
    double probes() const {
        Reading g(*this, true);
        return ix_->registry().probes();
    }
    // The names of the hits' media, without the media that have been removed.
    std::map<u32, std::string> media(const Hits& hits) const {
        std::map<u32, std::string> out;
        for (u32 i = 0; i < parts_.size(); ++i)
            parts_[i]->name_media(
                hits, [&](u32 m) { return Hit::part_of(m) == i ? Hit::medium_in_part(m) : kNone; }, out);
        if (parts_.empty()) name_media(hits, [](u32 m) { return m; }, out);
        return out;
    }
    std::string check() {
        for (;;) {
            {
                const Writing w(*this);
                if (at_rest()) return ix_->check();
            }
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    }

    // ---- a process that forks ---------------------------------------------------------------------------------------

    // The child gets the index in the state that a snapshot would have: between batches, and with no other thread
    // inside.
    void before_fork() {
        saver_.lock();
        saving_.store(true);
        for (;;) {
            lock_.lock();
            if (at_rest()) return pods_.before_fork();
            lock_.unlock();
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    }
    void after_fork() {
        pods_.after_fork();
        lock_.unlock();
        open_gate();
        saver_.unlock();
    }
    // The child has no thread that waited for a lock or held one, and no thread that followed a stream: from now on,
    // events reach only the parent.
    void in_child() {
        new (&lock_) TurnLock();
        new (&saver_) std::mutex();
        new (&gate_) std::mutex();
        new (&opened_) std::condition_variable();
        new (&calm_) std::condition_variable();
        saving_.store(false);
        pods_.in_child();
        ix_->registry().nobody_listens();
    }

private:
    // The steady clock in nanoseconds, up to a tick (4 to 10 ms) late. It takes 4 ns here; the exact clock takes 20,
    // which is 7 % of a match of 8 blocks.
    static i64 steady() {
#ifdef CLOCK_MONOTONIC_COARSE
        timespec t{};
        if (clock_gettime(CLOCK_MONOTONIC_COARSE, &t) == 0) return i64{t.tv_sec} * 1000000000 + t.tv_nsec;
#endif
        return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
    }
    std::vector<u32> lengths(u64 uid, i64 rank, const std::string& model) const {
        Reading g(*this, true);
        const u32 pod = ix_->registry().slot(uid);
        return pod == kNone ? std::vector<u32>() : ix_->registry().lengths(pod, rank, model);
    }
    u32 reserve_in(Loads& loads, u32 part, u64 pod, i64 rank, u64 prefill, u64 context) const {
        const Reading g(*this, true);
        return loads.reserve(*ix_, part, pod, rank, prefill, context);
    }
    // `own` maps the medium of a hit to its number in this index, or to kNone.
    template <class F>
    void name_media(const Hits& hits, F&& own, std::map<u32, std::string>& out) const {
        const Reading g(*this, true);
        const Media& media = ix_->registry().media();
        for (const Hit& h : hits)
            if (const u32 m = own(h.medium); media.has(m) && !out.count(h.medium)) out.emplace(h.medium, media.name(m));
    }
    // Kept out of the match of a single index, which is inlined into its callers with everything that it calls: 46
    // instructions.
    __attribute__((noinline)) bool match_parts(const Prompt& prompt, const std::string& model, PodNames* names,
                                               bool only_exact, bool wait, MatchResult& out) const {
        static thread_local MatchResult theirs;
        for (u32 i = 0; i < parts_.size(); ++i) {
            if (!parts_[i]->find(prompt, model, names, only_exact, wait, theirs)) return false;
            if (parts_[i]->lapsed()) theirs.distrust(only_exact);
            out.add(theirs, i);
        }
        return true;
    }
    bool choose_of_parts(Loads& loads, const Hits& hits, u64 n_tokens, const std::string& model, PodNames* names,
                         double now, bool wait, Loads::Choice& out) const {
        Loads::Search search{hits, n_tokens, block_size_};
        // One lock at a time: a fork takes all of them, in an order of its own.
        for (u32 i = 0; i < parts_.size(); ++i) {
            const ConcurrentIndex& part = *parts_[i];
            const Reading g(part, wait);
            if (!g.on) return false;
            const std::shared_ptr<const Filter> filter = names ? names->compile(*part.ix_, i) : nullptr;
            const u32 space = part.ix_->registry().find_space(model);
            loads.look({part.ix_.get(), space, filter.get(), part.lapsed()}, i, search);
        }
        loads.settle(search, now, out);
        return true;
    }
    bool lapsed() const {
        const i64 until = trusted_until_.load(std::memory_order_relaxed);
        return until != kForever && steady() >= until;
    }
    KVINDEX_INLINE bool find(const Prompt& prompt, const std::string& model, PodNames* names, bool only_exact,
                             bool wait, MatchResult& out) const {
        Reading g(*this, wait);
        if (!g.on) return false;
        const std::shared_ptr<const Filter> filter = names ? names->compile(*ix_, part_) : nullptr;
        const u32 space = ix_->registry().find_space(model);
        if (prompt.prefixes) {
            const u32 n = static_cast<u32>(prompt.n_prefixes);
            matcher().match(*ix_, space, HashPath{prompt.prefixes, n}, before_last(prompt), filter.get(), only_exact,
                            out);
            return true;
        }
        const u32 n = static_cast<u32>(prompt.n_tokens / ix_->block_size());
        const BlockHasher& roll = ix_->hasher();
        const ExtraDigests* extra = prompt.keyed ? &prompt.extra : nullptr;
        const auto run = [&](const BlockHasher& local) {
            roll.visit([&](auto bt) {
                const u32 most = before_last(prompt);
                constexpr unsigned BT = decltype(bt)::value;
                const TokenPath<BT> path{roll, local, prompt.tokens, extra, *ix_, n};
                if (space == kNone || ix_->registry().space_at(space).lengths.empty())
                    return matcher().match(*ix_, space, path, most, filter.get(), only_exact, out);
                out.clear();
                if (ix_->registry().space_at(space).plain)
                    matcher().match(*ix_, space, path, most, filter.get(), only_exact, out, true);
                for (const auto& length : ix_->registry().space_at(space).lengths) {
                    const LookaheadPath<BT> ahead{path, length.first, ix_->blocks(prompt.n_tokens, length.first)};
                    matcher().match(*ix_, space, ahead, most, filter.get(), only_exact, out, true);
                }
            });
        };
        if (prompt.adapted) {
            run(BlockHasher(ix_->seed(), ix_->block_size(), xxh3_64(prompt.adapter.data(), prompt.adapter.size(), 0)));
        } else {
            run(roll);
        }
        return true;
    }
    struct Written {
        explicit Written(ConcurrentIndex& s) : s_(s) {}
        Written(const Written&) = delete;
        Written& operator=(const Written&) = delete;
        ~Written() { s_.lock_.unlock(); }
        // The pod with this number, once no long change of it is in progress. kNone: the pod has been removed.
        u32 idle(u64 uid) {
            for (;;) {
                const u32 pod = s_.ix_->registry().slot(uid);
                if (pod == kNone || !s_.ix_->registry().pod_at(pod).busy) return pod;
                s_.lock_.unlock();
                {
                    std::unique_lock<std::mutex> g(s_.gate_);
                    s_.calm_.wait_for(g, std::chrono::milliseconds(1));
                }
                s_.lock_.lock();
            }
        }
        ConcurrentIndex& s_;
    };
    struct Writing : Written {
        explicit Writing(ConcurrentIndex& s) : Written(s) {
            s_.wait_for_saver();
            s_.lock_.lock();
        }
    };
    struct Reading {
        Reading(const ConcurrentIndex& s, bool wait) : s_(s), on(wait || s.lock_.spin_lock_shared()) {
            if (wait) s.lock_.lock_shared();
        }
        Reading(const Reading&) = delete;
        Reading& operator=(const Reading&) = delete;
        ~Reading() {
            if (on) s_.lock_.unlock_shared();
        }
        const ConcurrentIndex& s_;
        bool on;
    };
    // Runs a change that leaves the index consistent even if there is no memory for it.
    template <class F>
    void whole(F&& f) {
        try {
            f();
        } catch (const std::bad_alloc&) {
            ix_->start_over();
            throw OutOfMemory();
        }
    }
    // Does a turn's worth of a change. Returns true if the change is complete.
    bool finish_now(Change& c, Report& r, u32 pod) {
        if (!c.on()) return true;
        if (!ix_->ingest().go_on(c, r)) {
            ix_->ingest().set_busy(pod, true);
            return false;
        }
        ix_->ingest().set_busy(pod, false);
        calm_.notify_all();
        return true;
    }
    // Does the part of a long event that needs no lock. Without memory for this part, the event is lost, like any other
    // change.
    void prepare(u64 uid, i64 rank, const std::string& model, const Batch& batch, std::size_t i, bool on,
                 Change& change) {
        std::shared_ptr<Index> here;
        {
            const Reading g(*this, true);
            here = ix_;
        }
        try {
            here->ingest().prepare(batch, batch.events[i], change);
        } catch (const std::bad_alloc&) {
            lock_.lock();
            const Written w(*this);
            half_ -= on;
            if (const u32 pod = ix_->registry().slot(uid); pod != kNone) {
                ix_->start_over();
                ix_->ingest().missed(Turn(pod, rank, model, ix_->registry().find_space(model), change), batch, i);
            }
            throw OutOfMemory();
        }
    }
    // Drops all content, since there was no memory for a change.
    void give_up(Change& c, u32 pod) {
        ix_->start_over();
        // A clear continues without content, which needs no memory.
        Report unused;
        if (c.on()) ix_->ingest().go_through(c, unused);
        ix_->ingest().set_busy(pod, false);
        calm_.notify_all();
    }
    // Runs a change of one pod that did not begin with an event.
    template <class F>
    bool change(u64 uid, F&& begin) {
        Change c;
        Report unused;
        for (bool on = false;; on = true) {
            c.relax();
            if (on) {
                lock_.lock();
            } else {
                wait_for_saver();
                lock_.lock();
            }
            Written w(*this);
            half_ -= on;
            if (!on) {
                c.pod = w.idle(uid);
                if (c.pod == kNone) return false;
            }
            const u32 pod = c.pod;
            try {
                if (!on) begin(pod, c);
                const bool done = finish_now(c, unused, pod);
                if (done && ix_->loose()) ix_->tie_up();
                if (done && !ix_->loose()) {
                    if (c.goes) ix_->shrink();
                    note_expiry();
                    return true;
                }
            } catch (const std::bad_alloc&) {
                give_up(c, pod);
                if (c.goes) ix_->shrink();
                note_expiry();
                if (!c.goes) throw OutOfMemory();
                return true;
            }
            ++half_;
        }
    }
    // Whether the batch may take longer than a thread may wait that holds the interpreter lock.
    bool is_much(u32 pod, i64 rank, const Batch& b) const {
        u64 work = 0;
        for (const Event& e : b.events) {
            work += e.n_hashes;
            if (e.kind == EventKind::cleared && ix_->ingest().holds_much(pod, rank)) return true;
        }
        return work > kTurnBlocks || ix_->ingest().parks_much(pod, rank);
    }
    // Finishes loose work. Returns true if no batch is half done.
    bool at_rest() {
        while (half_ == 0 && ix_->loose()) ix_->tie_up();
        return half_ == 0;
    }
    static Matcher& matcher() {
        static thread_local Matcher m;
        return m;
    }
    void copy(SnapshotBytes& out) const {
        const Gate gate(*this);
        for (;;) {
            {
                Reading g(*this, true);
                if (half_ == 0 && !ix_->loose()) return write_snapshot(*ix_, counters(), out);
            }
            tidy_up();
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    }
    void tidy_up() const {
        ConcurrentIndex& s = const_cast<ConcurrentIndex&>(*this);
        s.lock_.lock();
        const Written w(s);
        if (half_ == 0 && ix_->loose()) s.ix_->tie_up();
    }
    // Keeps new writers out.
    struct Gate {
        explicit Gate(const ConcurrentIndex& s) : s_(s) { s_.saving_.store(true); }
        Gate(const Gate&) = delete;
        Gate& operator=(const Gate&) = delete;
        ~Gate() { s_.open_gate(); }
        const ConcurrentIndex& s_;
    };
    void open_gate() const {
        std::lock_guard<std::mutex> g(gate_);
        saving_.store(false);
        opened_.notify_all();
    }
    void wait_for_saver() {
        if (!saving_.load(std::memory_order_relaxed)) return;
        std::unique_lock<std::mutex> g(gate_);
        opened_.wait(g, [&] { return !saving_.load(); });
    }
    // Records that a payload of this stream could not be read.
    void lose(u64 uid, i64 rank, const std::string& model, const Place& at) {
        const u32 pod = ix_->registry().slot(uid);
        if (pod == kNone) return;
        ix_->registry().lost_payload(pod, rank);
        note(pod, rank, model, at, false, true);
    }
    void note(u32 pod, i64 rank, const std::string& model, const Place& at, bool clean, bool lost) {
        if (at.seq < 0) {
            ix_->registry().lose_place(pod, rank);
        } else {
            ix_->registry().advance(pod, rank, model, static_cast<u64>(at.seq), at.ts, at.fingerprint, clean, lost);
        }
    }
    // All counters since the start, in the order that a snapshot has them.
    static std::vector<u64*> counted(Totals& t, Report& r, Losses& shed, Losses& expired) {
        std::vector<u64*> all{&t.batches,        &t.bad_payloads, &t.events_stored, &t.events_removed,
                              &t.events_cleared, &r.stored,       &r.removed,       &r.cleared,
                              &r.parked,         &r.skipped,      &r.errors};
        for (u64& n : r.reasons) all.push_back(&n);
        for (Losses* l : {&shed, &expired}) all.insert(all.end(), {&l->blocks, &l->chains, &l->parked, &l->guesses});
        return all;
    }
    std::vector<u64> counters() const {
        Totals t = totals_;
        Report r = report_;
        Losses shed = ix_->eviction().shed(), expired = ix_->eviction().expired();
        std::vector<u64> out;
        for (const u64* n : counted(t, r, shed, expired)) out.push_back(*n);
        return out;
    }
    void note_expiry() { expiry_.store(ix_->eviction().next_expiry(), std::memory_order_relaxed); }

    std::shared_ptr<Index> made(PodDirectory& pods) {
        return std::make_shared<Index>(block_size_, seed_, set_presence_, max_parked_, max_bytes_, ttl_, pods, spare_);
    }

    const u32 block_size_;
    const u64 seed_;
    const u32 max_parked_;
    const u64 max_bytes_;
    const double ttl_;
    const bool set_presence_;
    PodDirectory pods_;
    Spare spare_;
    std::shared_ptr<Index> ix_;  // replaced by a load; a thread without the lock keeps its own reference
    Batches batches_;
    mutable TurnLock lock_;
    Totals totals_ = {};
    Report report_;
    std::atomic<double> expiry_{1e300};
    std::atomic<i64> trusted_until_{kForever};
    std::vector<ConcurrentIndex*> parts_;
    u32 part_ = 0;  // its place among the parts of another index
    // For saving: one save at a time, and the threads that wait for its end.
    mutable std::mutex saver_, gate_;
    mutable std::condition_variable opened_, calm_;
    mutable std::atomic<bool> saving_{false};
    u64 half_ = 0;  // batches that have been applied in part
};

}  // namespace kvindex
