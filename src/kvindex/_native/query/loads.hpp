// The load of each worker, and the worker that takes one more prompt at the least cost. A match has the blocks that a
// prompt can reuse. Nothing here changes the index.
#pragma once

#include <cmath>
#include <limits>
#include <tuple>

#include "query/match.hpp"

namespace kvindex {

// The value of a token of each tier, and the weight of work against one token of prefill.
struct Weights {
    std::vector<std::pair<std::string, double>> credits;  // by medium in lower case; contains "gpu", "cpu" and "disk"
    double context = 0;                                   // for each token of a running request's prompt
    double request = 0;                                   // for each running request
    double tie = 0;                                       // share of the prompt within which costs are equal
    double half_life = 1;                                 // seconds until the work of a worker counts half
    bool degraded = true;                                 // whether degraded pods are candidates
};

class Loads {
public:
    struct Choice {
        u32 at = kNone;  // the worker's row, or kNone: no candidate
        u32 candidates = 0;
        u64 pod = 0;
        i64 rank = 0;
        u64 reused = 0;      // tokens
        bool whole = false;  // every complete block of the prompt is held
        double cost = 0;
    };
    struct Load {
        u64 pod = 0;  // Pod::uid; 0: the row is free
        i64 rank = 0;
        u32 next = kNone;    // the pod's next row
        u32 part = 0;        // the place of the pod's index among several
        bool there = false;  // whether the pod has this rank now
        State state = State::stale;
        u64 prefill = 0;  // tokens that requests without a first token still have to compute
        u64 context = 0;  // tokens of all running requests' prompts
        u64 requests = 0;
        double given = 0;  // decayed work, in units that all rows share
        // Blocks of the current prompt.
        u32 reused = 0, held = 0;
        double worth = 0;
    };

    // start: where the search begins among equal workers, so that several routers do not all begin with the same
    // worker.
    Loads(Weights weights, u64 start) : weights_(std::move(weights)), start_(start) { gpu_ = credit_of("gpu"); }

    // An index that is searched, alone or together with others.
    struct Part {
        const Index* ix;
        u32 space;             // the model's number in this index
        const Filter* filter;  // the pods that are allowed; nullptr: all pods that serve the model
        bool lapsed;           // its states have lapsed at this moment, so none of its workers is a candidate
    };

    // The choice of a worker: `look` at every part, each under its lock in either mode, then `settle`, which adds the
    // request to the worker. O(workers + hits) for each part.
    struct Search {
        const Hits& hits;
        u64 n_tokens;
        u32 block_size;
        u32 candidates = 0;
        double least = kNever;
    };
    void look(const Part& one, Search& s) { look<false>(one, 0, s); }
    void look(const Part& one, u32 at, Search& s) { look<true>(one, at, s); }
    void settle(const Search& s, double now, Choice& out) {
        out = Choice();
        out.candidates = s.candidates;
        if (!s.candidates) return;
        const double limit = s.least + weights_.tie * static_cast<double>(s.n_tokens);
        const u32 n = static_cast<u32>(rows_.size()), first = static_cast<u32>(start_ % n);
        for (u32 k = 0; k < n; ++k) {
            const u32 i = first + k < n ? first + k : first + k - n;
            if (costs_[i] > limit || costs_[i] == kNever) continue;
            if (out.at == kNone || rows_[i].given < rows_[out.at].given) out.at = i;
        }
        Load& l = rows_[out.at];
        out.pod = l.pod;
        out.rank = l.rank;
        out.reused = std::min<u64>(u64{l.reused} * s.block_size, s.n_tokens);
        out.whole = l.held >= s.n_tokens / s.block_size;
        out.cost = costs_[out.at];
        begin(l, s.n_tokens - out.reused, s.n_tokens);
        give(l, s.n_tokens - out.reused, s.n_tokens, now);
    }
    // Counts a request that reached a worker in another way. It does not count as recent work: with equal figures of
    // recent work, all routers would break a tie alike, and eight simultaneous requests would go to one worker. Returns
    // kNone if the part does not have the worker.
    u32 reserve(const Index& ix, u32 part, u64 pod, i64 rank, u64 prefill, u64 context) {
        follow(ix, part);
        const std::vector<Known>& pods = seen_[part].pods;
        const u32 slot = static_cast<u32>(pod);
        if (slot >= pods.size() || pods[slot].uid != pod) return kNone;
        const u32 at = find(pods[slot], rank);
        if (at == kNone || !rows_[at].there) return kNone;
        begin(rows_[at], prefill, context);
        return at;
    }
    // The request has its first token. Here and below, a row that now belongs to another worker is left unchanged.
    void prefilled(u32 at, u64 pod, u64 prefill) {
        if (Load* l = row(at, pod)) l->prefill -= prefill;
    }
    void finished(u32 at, u64 pod, u64 prefill, u64 context) {
        Load* l = row(at, pod);
        if (!l) return;
        l->prefill -= prefill;
        l->context -= context;
        --l->requests;
    }
    // Takes over the pods of an index, and frees the rows of removed pods.
    void follow(const Index& ix, u32 part) {
        const u32 n = ix.registry().pod_slots();
        if (seen_.size() <= part) seen_.resize(part + 1);
        Seen& seen = seen_[part];
        // In another index, a pod may have other ranks, even if their number is the same.
        const bool is_other = ix.registry().origin() != seen.origin;
        seen.origin = ix.registry().origin();
        std::vector<Known>& pods = seen.pods;
        if (pods.size() < n) pods.resize(n);
        for (u32 slot = 0; slot < pods.size(); ++slot) {
            Known& k = pods[slot];
            const Pod* p = slot < n ? &ix.registry().pod_at(slot) : nullptr;
            const u64 uid = p ? p->uid : 0;
            if (k.uid != uid) {
                forget(k);
                k.uid = uid;
            }
            if (!uid) continue;
            if (is_other || k.first == kNone || k.streams != p->streams.size() || k.workers != p->workers.size())
                rank(ix, *p, k, part);
            for (u32 i = k.first; i != kNone; i = rows_[i].next) {
                Load& l = rows_[i];
                l.state = p->state;
                l.reused = l.held = 0;
                l.worth = 0;
            }
        }
    }
    const std::vector<Load>& rows() const { return rows_; }

private:
    struct Known {
        u64 uid = 0;
        u32 first = kNone;
        std::size_t streams = 0, workers = 0;
    };
    struct Seen {
        u64 origin = 0;
        std::vector<Known> pods;  // by Pod's slot
    };
    // How far a medium reaches in the prompt.
    struct Reach {
        u32 row;
        bool medium;  // true: alone, independent of other media; false: as a tier, from the end of the tier before
        u32 blocks;
        double credit;
    };

    template <bool kMany>
    void look(const Part& part, u32 at, Search& s) {
        const Index& ix = *part.ix;
        const Filter* const filter = part.filter;
        const u32 space = part.space;
        follow(ix, at);
        take<kMany>(ix, at, s.hits);
        u32 candidates = 0;
        const double per_block = s.block_size;
        const auto cost_of = [&](const Load& l) {
            return static_cast<double>(s.n_tokens) - l.worth * per_block + static_cast<double>(l.prefill) +
                   weights_.context * static_cast<double>(l.context) +
                   weights_.request * static_cast<double>(l.requests);
        };
        costs_.resize(rows_.size());
        double least = s.least;
        for (u32 i = 0; i < rows_.size(); ++i) {
            const Load& l = rows_[i];
            // A free row belongs to no part.
            if (kMany && l.pod && l.part != at) continue;
            costs_[i] = kNever;
            if (kMany && part.lapsed) continue;
            if (!l.there || l.state == State::stale || (!weights_.degraded && l.state != State::exact)) continue;
            if (filter ? !filter->pod(static_cast<u32>(l.pod)) : !l.held && !serves(ix, l, space)) continue;
            ++candidates;
            costs_[i] = cost_of(l);
            least = std::min(least, costs_[i]);
        }
        s.least = least;
        s.candidates += candidates;
    }
    Load* row(u32 at, u64 pod) { return at < rows_.size() && rows_[at].pod == pod ? &rows_[at] : nullptr; }
    static void begin(Load& l, u64 prefill, u64 context) {
        l.prefill += prefill;
        l.context += context;
        ++l.requests;
    }
    void give(Load& l, u64 prefill, u64 context, double now) {
        // Work decays because the unit of later work grows, so no row changes in between.
        double age = (now - epoch_) / weights_.half_life;
        if (!(std::fabs(age) < 512)) {
            const double shrink = age > 0 ? std::exp2(-std::min(age, 4096.0)) : 1;
            for (Load& each : rows_) each.given *= shrink;
            epoch_ = now;
            age = 0;
        }
        l.given += std::exp2(age) *
                   (static_cast<double>(prefill) + weights_.context * static_cast<double>(context) + weights_.request);
    }
    void forget(Known& k) {
        for (u32 i = k.first; i != kNone;) {
            const u32 next = rows_[i].next;
            rows_[i] = Load();
            free_.push_back(i);
            i = next;
        }
        k = Known();
    }
    u32 find(const Known& k, i64 rank) const {
        u32 i = k.first;
        while (i != kNone && rows_[i].rank != rank) i = rows_[i].next;
        return i;
    }
    // A new rank begins with the least work that any other rank was given. With no work, it would win every tie until
    // it had caught up.
    void add(Known& k, i64 rank, u32 part) {
        u32 i = find(k, rank);
        if (i == kNone) {
            double least = kNever;
            for (const Load& l : rows_)
                if (l.pod) least = std::min(least, l.given);
            if (free_.empty()) {
                free_.push_back(static_cast<u32>(rows_.size()));
                rows_.emplace_back();
            }
            i = free_.back();
            free_.pop_back();
            Load& l = rows_[i];
            l.pod = k.uid;
            l.rank = rank;
            l.part = part;
            l.given = least == kNever ? 0 : least;
            l.next = k.first;
            k.first = i;
        }
        rows_[i].there = true;
    }
    // Updates the ranks of a pod: those whose streams are followed, and those with stored blocks.
    void rank(const Index& ix, const Pod& p, Known& k, u32 part) {
        for (u32 i = k.first; i != kNone; i = rows_[i].next) rows_[i].there = false;
        for (const auto& s : p.streams) add(k, s.first, part);
        for (const u32 w : p.workers) add(k, ix.registry().worker_at(w).rank, part);
        if (p.streams.empty() && p.workers.empty()) add(k, 0, part);
        k.streams = p.streams.size();
        k.workers = p.workers.size();
    }
    // A pod without stored blocks may serve any model.
    static bool serves(const Index& ix, const Load& l, u32 space) {
        const Pod& p = ix.registry().pod_at(static_cast<u32>(l.pod));
        return p.workers.empty() || std::any_of(p.workers.begin(), p.workers.end(),
                                                [&](u32 w) { return ix.registry().worker_at(w).space == space; });
    }
    double credit_of(const std::string& medium) const {
        const std::string family = medium.compare(0, 3, "cpu") == 0 ? "cpu" : "disk";
        double found = 0;
        for (const auto& c : weights_.credits) {
            if (c.first == medium) return c.second;
            if (c.first == family) found = c.second;
        }
        return found;
    }
    template <bool kMany>
    double credit(const Index& ix, u32 medium) const {
        if (kMany) medium = Hit::medium_in_part(medium);
        if (medium == 0) return gpu_;
        std::string name = ix.registry().media().name(medium);
        for (char& c : name) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c + 'a' - 'A') : c;
        return credit_of(name);
    }
    template <bool kMany>
    void take(const Index& ix, u32 part, const Hits& hits) {
        std::vector<Known>& pods = seen_[part].pods;
        reaches_.clear();
        for (const Hit& h : hits) {
            const u32 slot = static_cast<u32>(h.pod);
            // The pod belongs to another part, or was removed between the match and now.
            if (slot >= pods.size() || pods[slot].uid != h.pod) continue;
            u32 at = find(pods[slot], h.rank);
            if (at == kNone) {
                rank(ix, ix.registry().pod_at(slot), pods[slot], part);
                at = find(pods[slot], h.rank);
                if (at == kNone) continue;
                rows_[at].state = ix.registry().pod_at(slot).state;
            }
            Load& l = rows_[at];
            if (h.says & kHeld) l.held = std::max(l.held, h.blocks);
            if (h.says == (kReused | kHeld | kMedium | kTier)) {
                if (h.blocks <= l.reused) continue;
                l.reused = h.blocks;
                l.worth = h.blocks * credit<kMany>(ix, h.medium);
                continue;
            }
            if (h.says & kReused) l.reused = std::max(l.reused, h.blocks);
            if (h.medium == kNone || !(h.says & (kTier | kMedium))) continue;
            const double c = credit<kMany>(ix, h.medium);
            if (h.says & kTier) reaches_.push_back({at, false, h.blocks, c});
            if (h.says & kMedium) reaches_.push_back({at, true, h.blocks, c});
        }
        if (reaches_.empty()) return;
        // Tiers before media. Tiers are cumulative, so they are read in the order of their reaches. Of several media
        // that reach far enough, the best is read.
        std::sort(reaches_.begin(), reaches_.end(), [](const Reach& a, const Reach& b) {
            return std::tie(a.row, a.medium, a.blocks, a.credit) < std::tie(b.row, b.medium, b.blocks, b.credit);
        });
        for (auto i = reaches_.begin(); i != reaches_.end();) {
            const u32 row = i->row;
            const auto same = [&](const Reach& r, bool medium) { return r.row == row && r.medium == medium; };
            auto end = i;
            while (end != reaches_.end() && same(*end, i->medium)) ++end;
            const double worst =
                std::min_element(i, end, [](const Reach& a, const Reach& b) { return a.credit < b.credit; })->credit;
            if (i->medium)
                for (auto k = end; --k != i;) (k - 1)->credit = std::max((k - 1)->credit, k->credit);
            Load& l = rows_[row];
            u32 at = 0;
            l.worth = 0;
            for (; i != end; ++i) {
                const u32 to = std::min(i->blocks, l.reused);
                if (to > at) l.worth += (to - at) * i->credit;
                at = std::max(at, to);
            }
            // If no single medium holds the rest of the prefix, several media hold it together.
            l.worth += (l.reused - at) * worst;
            while (i != reaches_.end() && i->row == row) ++i;
        }
    }

    static constexpr double kNever = std::numeric_limits<double>::infinity();

    Weights weights_;
    double gpu_ = 1, epoch_ = 0;
    u64 start_;
    std::vector<Seen> seen_;  // by part
    std::vector<Load> rows_;
    std::vector<u32> free_;
    std::vector<double> costs_;
    std::vector<Reach> reaches_;
};

}  // namespace kvindex
