// The index: events in, chains and holder sets changed. Matching reads what this file keeps (match.hpp).
//
// What each worker knows is a tree closed towards the root: a block is only ever attached below a block that its worker knows by
// name, and a position stays known while anything below it is. Most questions become local through that: "does this worker have
// something below this block" is "does it know a child", in a chain its blocks are a prefix of the chain, and a block that nobody
// knows is the last one of its chain and has no children.
#pragma once

#include <algorithm>
#include <cstdio>
#include <stdexcept>

#include "extra_keys.hpp"
#include "workers.hpp"
#include "xxh3.hpp"

namespace kvindex {

// How extra keys change a block's local hash. A seed of its own keeps the result apart from every rolling step.
inline u64 mix_extra(u64 local, u64 digest, u64 seed) {
    const u64 both[2] = {local, digest};
    return xxh3_64(both, sizeof both, seed ^ 0x9E3779B97F4A7C15ull);
}

// No guess is waiting to expire.
inline constexpr double kNever = 1e300;

inline constexpr u32 kReasons = static_cast<u32>(Reason::COUNT);

struct Report {
    u64 stored = 0, removed = 0, cleared = 0, parked = 0, skipped = 0, errors = 0;
    u64 reasons[kReasons] = {};

    void skip(Reason r, u64 n = 1) {
        skipped += n;
        reasons[static_cast<u32>(r)] += n;
        if (r == Reason::bad_event || r == Reason::bad_token) errors += n;
    }
    void add(const Report& o) {
        stored += o.stored;
        removed += o.removed;
        cleared += o.cleared;
        parked += o.parked;
        skipped += o.skipped;
        errors += o.errors;
        for (u32 i = 0; i < kReasons; ++i) reasons[i] += o.reasons[i];
    }
};

// Consecutive blocks of a path that lie in one chain.
struct Segment {
    u32 chain;
    u32 depth;
    u32 at;  // which block of the path is the first
    u32 n;
};

class Index {
public:
    Index(u32 block_size, u64 seed, bool set_presence, u32 max_parked)
        : sets_(mem_), chains_(mem_, sets_), hasher_(seed, block_size), block_size_(block_size), seed_(seed), max_parked_(max_parked), set_presence_(set_presence) {}
    ~Index() {
        for (auto& w : workers_)
            if (w) release(*w);
        for (Space& s : spaces_) {
            s.heads.release(mem_);
            s.names.release(mem_);
        }
    }
    Index(const Index&) = delete;
    Index& operator=(const Index&) = delete;

    u32 block_size() const { return block_size_; }
    u64 seed() const { return seed_; }
    const BlockHasher& hasher() const { return hasher_; }

    // ---- pods -------------------------------------------------------------------------------------------------------------------

    u32 find_pod(const std::string& name) const {
        const auto it = pod_ids_.find(name);
        return it == pod_ids_.end() ? kNone : it->second;
    }
    u32 pod(const std::string& name) {
        const auto it = pod_ids_.find(name);
        if (it != pod_ids_.end()) return it->second;
        u32 id;
        if (!free_pods_.empty()) {
            id = free_pods_.back();
            free_pods_.pop_back();
        } else {
            id = static_cast<u32>(pods_.size());
            pods_.emplace_back();
        }
        pods_[id] = Pod();
        pods_[id].uid = (++pods_made_ << 32) | id;
        pods_[id].name = name;
        pods_[id].set_presence = set_presence_;
        pod_ids_[name] = id;
        ++pods_version_;
        return id;
    }
    u32 find_space(const std::string& model) const {
        const auto it = space_ids_.find(model);
        return it == space_ids_.end() ? kNone : it->second;
    }
    u64 pods_version() const { return pods_version_; }
    u32 pod_slots() const { return static_cast<u32>(pods_.size()); }
    const Pod& pod_at(u32 id) const { return pods_[id]; }
    // The pod that had this number when it was opened, or kNone if it has been removed since.
    u32 slot(u64 uid) const {
        const u32 id = static_cast<u32>(uid);
        return uid && id < pods_.size() && pods_[id].uid == uid ? id : kNone;
    }
    Pod& pod_at(u32 id) { return pods_[id]; }
    Media& media() { return media_; }
    const Media& media() const { return media_; }

    void remove_pod(u32 id) {
        Pod& p = pods_[id];
        while (!p.workers.empty()) {
            const u32 w = p.workers.back();
            clear_all(w);
            drop_worker(w);
            p.workers.pop_back();
        }
        pod_ids_.erase(p.name);
        p = Pod();
        free_pods_.push_back(id);
        ++pods_version_;
        if (pod_ids_.empty()) {
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
        }
    }
    void mark(u32 pod, i64 rank, Verdict v) {
        pods_[pod].streams[rank] = v;
        judge(pod);
    }
    void set_chunk(u32 pod, u32 tokens) {
        pods_[pod].chunk_tokens = tokens;
        judge(pod);
    }
    // The worst of what the streams say and of what could not be placed.
    void judge(u32 pod) {
        Pod& p = pods_[pod];
        Verdict v = Verdict::exact;
        for (const auto& s : p.streams) v = std::max(v, s.second);
        for (u32 w : p.workers) v = std::max(v, own_verdict(*workers_[w]));
        p.verdict = v;
    }
    Verdict own_verdict(const Worker& w) const {
        bool degraded = w.sticky || w.small_blocks || w.parked() != 0;
        if (!pods_[w.pod].chunk_tokens)
            for (const Group& g : w.groups) degraded |= g.kind == Attention::chunked;
        return degraded ? Verdict::degraded : Verdict::exact;
    }

    // ---- events -----------------------------------------------------------------------------------------------------------------

    // One event of one stream. Never throws for what an engine may send; what could not be applied is in the report.
    void apply(u32 pod, i64 rank, const std::string& model, const Batch& b, const Event& e, Report& r) {
        if (e.bad != Reason::none) {
            r.skip(e.bad);
            if (e.kind == EventKind::stored) {
                spoil(worker(pod, rank, space(model)));
            } else if (e.kind == EventKind::removed) {
                if (const u32 w = find_worker(pod, rank, find_space(model)); w != kNone) spoil(w);
            }
            return;
        }
        switch (e.kind) {
            case EventKind::stored: stored(worker(pod, rank, space(model)), b, e, r); break;
            case EventKind::removed: {
                const u32 w = find_worker(pod, rank, find_space(model));
                const u64* ids = b.hashes.data() + e.hash_at;
                if (w == kNone) {
                    r.skip(Reason::unknown_hash, e.n_hashes);
                } else {
                    removed(w, e, ids, r);
                }
                break;
            }
            case EventKind::cleared:
                cleared(pod, rank);
                ++r.cleared;
                break;
            case EventKind::other: r.skip(Reason::unknown_event); break;
        }
    }
    // A payload of this worker was lost.
    void lost_payload(u32 pod, i64 rank) {
        for (u32 w : pods_[pod].workers)
            if (workers_[w]->rank == rank) spoil(w);
    }
    void cleared(u32 pod, i64 rank) {
        const Pod& p = pods_[pod];
        for (std::size_t i = 0; i < p.workers.size(); ++i) {
            const u32 w = p.workers[i];
            if (workers_[w]->rank != rank) continue;
            if (p.has_clear_media) {
                clear_some(w, p.clear_media);
            } else {
                clear_all(w);
            }
        }
        judge(pod);
    }
    void clear_worker(u32 pod, i64 rank) {
        for (u32 w : pods_[pod].workers)
            if (workers_[w]->rank == rank) clear_all(w);
        judge(pod);
    }

    // ---- entries that no event announced ----------------------------------------------------------------------------------------

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
        if (done < n) {
            const u32 set = sets_.change(kEmptySet, kNone, w.guess);
            extend(w.space, tail, prefixes + done, n - done, set);
            holders_[w.guess].blocks += n - done;
        }
        guesses_.push_back(Guess{id, until, std::vector<u64>(prefixes, prefixes + n)});
        mem_.add(sizeof(Guess) + n * sizeof(u64));
        next_expiry_ = std::min(next_expiry_, until);
    }
    double next_expiry() const { return next_expiry_; }
    void expire(double now) {
        for (std::size_t i = 0; i < guesses_.size();) {
            if (guesses_[i].until <= now) {
                drop_guess(i);
            } else {
                ++i;
            }
        }
        next_expiry_ = kNever;
        for (const Guess& g : guesses_) next_expiry_ = std::min(next_expiry_, g.until);
    }

    // ---- what a match reads -----------------------------------------------------------------------------------------------------

    const SetPool& sets() const { return sets_; }
    const Chains& chains() const { return chains_; }
    const Space& space_at(u32 id) const { return spaces_[id]; }
    const Worker& worker_at(u32 id) const { return *workers_[id]; }
    const Holder& holder(u32 id) const { return holders_[id]; }
    u32 holder_slots() const { return static_cast<u32>(holders_.size()); }
    const std::vector<u64>& simple() const { return simple_; }
    u64 holders_version() const { return holders_version_; }
    u32 child(u32 space, Pos parent, u64 prefix) const {
        const u32 c = spaces_[space].heads.find(prefix, [&](u32 k) { return chains_.head(k) == prefix; });
        if (c == kNone) return kNone;
        const Chain& k = chains_[c];
        // A different place for the same 64-bit prefix hash would be a collision; never follow it.
        return k.parent == parent.chain && k.base == parent.depth + 1 ? c : kNone;
    }

    // ---- figures ----------------------------------------------------------------------------------------------------------------

    struct Figures {
        u64 blocks, chains, sets, holders, pods, workers, parked, guesses, bytes;
    };
    Figures figures() const {
        return {chains_.blocks(), chains_.count(), sets_.live(), holders_.size() - free_holders_.size(), pod_ids_.size(), workers_.size() - free_workers_.size(), parked_,
                guesses_.size(), mem_.bytes};
    }
    u64 held(const Worker& w) const {
        u64 n = 0;
        for (u32 h : w.holders) n += holders_[h].blocks;
        return n;
    }

    // Walks everything and returns the first broken invariant, or an empty string. O(size of the index).
    std::string check() const;

private:
    static u64 kid_key(u32 chain, u32 depth) { return (static_cast<u64>(chain) << 32) | depth; }
    // The two marks of pages are not available as names; 2^-63 by chance, and then a neighbour's name.
    static u64 name_of(u64 id) { return id == kNoName || id == kNameless ? id + 1 : id; }

    u32 space(const std::string& model) {
        const auto it = space_ids_.find(model);
        if (it != space_ids_.end()) return it->second;
        const u32 id = static_cast<u32>(spaces_.size());
        spaces_.emplace_back();
        spaces_[id].model = model;
        space_ids_[model] = id;
        return id;
    }
    u32 find_worker(u32 pod, i64 rank, u32 space) const {
        for (u32 w : pods_[pod].workers)
            if (workers_[w]->rank == rank && workers_[w]->space == space) return w;
        return kNone;
    }
    u32 worker(u32 pod, i64 rank, u32 space) {
        const u32 found = find_worker(pod, rank, space);
        if (found != kNone) return found;
        u32 id;
        if (!free_workers_.empty()) {
            id = free_workers_.back();
            free_workers_.pop_back();
        } else {
            id = static_cast<u32>(workers_.size());
            workers_.emplace_back();
        }
        workers_[id].reset(new Worker());
        mem_.add(sizeof(Worker));
        Worker& w = *workers_[id];
        w.pod = pod;
        w.rank = rank;
        w.space = space;
        pods_[pod].workers.push_back(id);
        return id;
    }
    u32 new_holder(u32 worker, u32 medium, u32 group, u32 factor) {
        u32 id;
        if (!free_holders_.empty()) {
            id = free_holders_.back();
            free_holders_.pop_back();
        } else {
            id = static_cast<u32>(holders_.size());
            holders_.emplace_back();
        }
        holders_[id] = Holder{worker, medium, group, factor, 0};
        ++holders_version_;
        return id;
    }
    void free_holder(u32 id) {
        holders_[id] = Holder();
        free_holders_.push_back(id);
        ++holders_version_;
    }
    static void set_bit(std::vector<u64>& mask, u32 bit, bool on) {
        if (on && mask.size() <= bit >> 6) mask.resize((bit >> 6) + 1);
        if ((bit >> 6) < mask.size()) {
            if (on) {
                mask[bit >> 6] |= 1ull << (bit & 63);
            } else {
                mask[bit >> 6] &= ~(1ull << (bit & 63));
            }
        }
    }
    u32 ghost(u32 id) {
        Worker& w = *workers_[id];
        if (w.ghost == kNone) {
            w.ghost = new_holder(id, 0, 0, 1);
            set_bit(w.mask, w.ghost, true);
        }
        return w.ghost;
    }
    u32 group(Worker& w, const Event& e, u32 factor) {
        const i64 id = e.group < 0 ? 0 : e.group;
        u32 g = 0;
        while (g < w.groups.size() && w.groups[g].id != id) ++g;
        if (g == w.groups.size()) {
            w.groups.emplace_back();
            w.groups[g].id = id;
        }
        Group& to = w.groups[g];
        const Group before = to;
        to.factor = std::max(to.factor, factor);
        if (e.spec_kind.set()) {
            to.kind = attention_of(e.spec_kind.p, e.spec_kind.n);
            to.told_kind = true;
        }
        if (e.window > 0) {
            to.window = static_cast<u32>(std::min<i64>(e.window, 0x7FFFFFFF));
            if (!to.told_kind) to.kind = Attention::sliding;
        }
        if (before.kind != to.kind) judge(w.pod);
        return g;
    }
    u32 holder_for(u32 id, u32 medium, u32 group, u32 factor) {
        Worker& w = *workers_[id];
        for (u32 h : w.holders)
            if (holders_[h].medium == medium && holders_[h].group == group && holders_[h].factor == factor) return h;
        const u32 h = new_holder(id, medium, group, factor);
        w.holders.push_back(h);
        set_bit(w.mask, h, true);
        refresh(id);
        return h;
    }
    // Sorts the worker into "a bit says all" or "its groups and media must be looked at".
    void refresh(u32 id) {
        Worker& w = *workers_[id];
        for (u32 h : w.holders) set_bit(simple_, h, false);
        w.simple = w.holders.size() == 1 && w.groups.size() == 1 && w.groups[0].kind == Attention::full && w.guess == kNone;
        if (w.simple) set_bit(simple_, w.holders[0], true);
        const bool listed = !w.simple && (!w.holders.empty() || w.guess != kNone);
        std::vector<u32>& list = spaces_[w.space].hybrids;
        if (listed && w.in_hybrid_list == kNone) {
            w.in_hybrid_list = static_cast<u32>(list.size());
            list.push_back(id);
        } else if (!listed && w.in_hybrid_list != kNone) {
            list[w.in_hybrid_list] = list.back();
            workers_[list.back()]->in_hybrid_list = w.in_hybrid_list;
            list.pop_back();
            w.in_hybrid_list = kNone;
        }
    }
    void spoil(u32 id) {
        workers_[id]->sticky = true;
        judge(workers_[id]->pod);
    }
    void release(Worker& w) {
        w.own.release(mem_);
        w.chains.release(mem_);
        w.kids.release(mem_);
    }
    void drop_worker(u32 id) {
        Worker& w = *workers_[id];
        if (w.ghost != kNone) free_holder(w.ghost);
        release(w);
        mem_.sub(sizeof(Worker));
        workers_[id].reset();
        free_workers_.push_back(id);
    }

    // ---- knowledge --------------------------------------------------------------------------------------------------------------

    bool knows(const Worker& w, u32 set) const {
        const u32 n = std::min<u32>(static_cast<u32>(w.mask.size()), sets_.words(set));
        const u64* words = sets_.data(set);
        for (u32 i = 0; i < n; ++i)
            if (words[i] & w.mask[i]) return true;
        return false;
    }
    // Whether the worker knows a block with this set by anything but `holder`.
    bool knows_besides(const Worker& w, u32 set, u32 holder) const {
        const u32 n = std::min<u32>(static_cast<u32>(w.mask.size()), sets_.words(set));
        const u64* words = sets_.data(set);
        for (u32 i = 0; i < n; ++i) {
            u64 bits = words[i] & w.mask[i];
            if (holder >> 6 == i) bits &= ~(1ull << (holder & 63));
            if (bits) return true;
        }
        return false;
    }
    u32 set_at(Pos p) const { return chains_.set_at(chains_[p.chain], p.depth); }
    bool knows_child(const Worker& w, Pos p) const {
        const Chain& c = chains_[p.chain];
        if (p.depth + 1 < c.end() && knows(w, chains_.set_at(c, p.depth + 1))) return true;
        return c.kids && w.kids.get(kid_key(p.chain, p.depth)) != 0;
    }
    bool child_has(const Worker& w, Pos p, u32 holder) const {
        const Chain& c = chains_[p.chain];
        if (p.depth + 1 < c.end() && sets_.has(chains_.set_at(c, p.depth + 1), holder)) return true;
        if (!c.kids || !w.kids.get(kid_key(p.chain, p.depth))) return false;
        for (u32 k = c.first_kid; k != kNone; k = chains_[k].kid_after)
            if (chains_[k].base == p.depth + 1 && sets_.has(chains_.set_at(chains_[k], p.depth + 1), holder)) return true;
        return false;
    }
    Pos before(Pos p) const {
        const Chain& c = chains_[p.chain];
        if (p.depth > c.base) return {p.chain, p.depth - 1};
        return {c.parent, c.base - 1};
    }
    void gain_chain(Worker& w, u32 chain) {
        const Chain& c = chains_[chain];
        w.chains.add(mem_, chain);
        if (c.parent != kNone) w.kids.add(mem_, kid_key(c.parent, c.base - 1));
    }
    void lose_chain(Worker& w, u32 chain) {
        const Chain& c = chains_[chain];
        w.chains.sub(mem_, chain);
        if (c.parent != kNone) w.kids.sub(mem_, kid_key(c.parent, c.base - 1));
    }
    u32 with(u32 set, u32 holder, u32 blocks, u32 less = kNone) {
        if (!sets_.has(set, holder)) holders_[holder].blocks += blocks;
        if (less != kNone && sets_.has(set, less)) holders_[less].blocks -= blocks;
        return sets_.change(set, less, holder);
    }
    u32 without(u32 set, u32 holder, u32 blocks) {
        if (sets_.has(set, holder)) holders_[holder].blocks -= blocks;
        return sets_.change(set, holder, kNone);
    }

    // ---- names ------------------------------------------------------------------------------------------------------------------

    u64 own_name(u32 worker, Pos p) const { return chains_.own_name(chains_[p.chain], worker, p.depth); }

    // The block that this worker knows under this name, or kNone.
    u32 find(u32 id, u64 name) const {
        const Worker& w = *workers_[id];
        if (w.own.size()) {
            const u32 r = w.own.find(name, [&](u32 ref) { return own_name(id, chains_.pos(ref)) == name; });
            if (r != kNone) return r;
        }
        const u32 r = spaces_[w.space].names.find(name, [&](u32 ref) { return chains_.name(ref) == name; });
        if (r != kNone) {
            const Pos p = chains_.pos(r);
            if (knows(w, set_at(p)) && own_name(id, p) == kNoName) return r;
        }
        if (!w.second.empty()) {
            const auto it = w.second.find(name);
            if (it != w.second.end()) return it->second;
        }
        return kNone;
    }
    // The name that the worker's copies have where bits alone count them; false if it has none.
    bool first_name(u32 id, Pos p, u32 ref, u64& out) const {
        const u64 own = own_name(id, p);
        if (own == kNameless) return false;
        out = own == kNoName ? chains_.name(ref) : own;
        return out != kNoName;
    }
    // Gives a block its first name in this worker, which knows none for it.
    void give_name(u32 id, Pos p, u32 ref, u64 name) {
        Worker& w = *workers_[id];
        RefTable& names = spaces_[w.space].names;
        const u64 own = own_name(id, p), shared = chains_.name(ref);
        if (shared == kNoName && names.find(name, [&](u32 r) { return chains_.name(r) == name; }) == kNone) {
            chains_.name(ref) = name;
            names.insert(mem_, name, ref);
        } else if (shared != name) {
            chains_.set_own_name(p.chain, id, p.depth, name);
            w.own.insert(mem_, name, ref);
            return;
        }
        if (own != kNoName) chains_.set_own_name(p.chain, id, p.depth, kNoName);
    }
    void drop_names(u32 id, Pos p, u32 ref) {
        Worker& w = *workers_[id];
        const u64 own = own_name(id, p);
        if (own != kNoName) {
            if (own != kNameless) w.own.erase(mem_, own, ref);
            chains_.set_own_name(p.chain, id, p.depth, kNoName);
        }
        if (w.copies.empty()) return;
        const auto it = w.copies.find(ref);
        if (it == w.copies.end()) return;
        for (const Copy& c : it->second)
            if (c.holder == kNone) w.second.erase(c.id);
        w.copies.erase(it);
    }
    // The explicit list of a block's copies, made from the bits when it is first needed.
    std::vector<Copy>& list_copies(u32 id, Pos p, u32 ref) {
        Worker& w = *workers_[id];
        const auto it = w.copies.find(ref);
        if (it != w.copies.end()) return it->second;
        std::vector<Copy>& list = w.copies[ref];
        u64 name;
        if (!first_name(id, p, ref, name)) return list;
        const u32 set = set_at(p);
        for (u32 h : w.holders)
            if (sets_.has(set, h) && (p.depth + 1) % holders_[h].factor == 0) list.push_back({name, h, 1});
        return list;
    }
    // Back to bits when they say the same.
    void tidy_copies(u32 id, Pos p, u32 ref) {
        Worker& w = *workers_[id];
        const auto it = w.copies.find(ref);
        if (it == w.copies.end()) return;
        std::vector<Copy>& list = it->second;
        list.erase(std::remove_if(list.begin(), list.end(), [](const Copy& c) { return c.holder != kNone && c.count == 0; }), list.end());
        u64 name = 0;
        const bool named = first_name(id, p, ref, name);
        for (const Copy& c : list)
            if (c.holder == kNone || c.count > 1 || !named || c.id != name) return;
        w.copies.erase(it);
    }
    // The worker announces this name for something else: the name and its copies go.
    void forget_name(u32 id, u64 name) {
        Worker& w = *workers_[id];
        const u32 ref = find(id, name);
        if (ref == kNone) return;
        const Pos p = chains_.pos(ref);
        std::vector<Copy>& list = list_copies(id, p, ref);
        std::vector<u32> gone;
        for (Copy& c : list) {
            if (c.id != name || c.holder == kNone) continue;
            c.count = 0;
            const u32 h = c.holder;
            if (std::none_of(list.begin(), list.end(), [&](const Copy& o) { return o.holder == h && o.count; })) gone.push_back(h);
        }
        u64 first = 0;
        const bool second = !(first_name(id, p, ref, first) && first == name);
        if (second) {
            list.erase(std::remove_if(list.begin(), list.end(), [&](const Copy& c) { return c.id == name; }), list.end());
            w.second.erase(name);
        } else {
            if (own_name(id, p) != kNoName) w.own.erase(mem_, name, ref);
            chains_.set_own_name(p.chain, id, p.depth, kNameless);
        }
        tidy_copies(id, p, ref);
        // Last, since the block itself may go now.
        for (u32 h : gone) take_copy(id, h, p);
        if (gone.empty()) settle(id, p);
    }

    // ---- copies -----------------------------------------------------------------------------------------------------------------

    // Sets or clears no counts: makes the worker hold (or, `live` false, only know) one engine block that ends at `path[0]`, whose
    // index blocks are path[0], path[1], ... towards the root.
    void hold(u32 id, u32 h, const Pos* path, u32 factor, bool live) {
        Worker& w = *workers_[id];
        for (u32 s = factor; s-- > 0;) {
            const Pos p = path[s];
            const u32 set = set_at(p);
            const bool knew = knows(w, set);
            if (!knew) {
                if (s != 0) chains_.set_own_name(p.chain, id, p.depth, kNameless);
                if (p.depth == chains_[p.chain].base) gain_chain(w, p.chain);
            }
            if (live) {
                chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return with(x, h, k, w.ghost); });
            } else if (!knew) {
                const u32 g = ghost(id);
                chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return with(x, g, k); });
            }
        }
    }
    // Counts one copy of a block under a name. The block may be new to the worker.
    void add_copy(u32 id, u32 h, const Pos* path, u64 name, bool live) {
        Worker& w = *workers_[id];
        const u32 factor = holders_[h].factor;
        const Pos p = path[0];
        const u32 ref = chains_.ref(p);
        const u32 set = set_at(p);
        const bool knew = knows(w, set);
        u64 first;
        if (!knew) {
            give_name(id, p, ref, name);
        } else if (const bool named = first_name(id, p, ref, first); !named && !w.copies.count(ref)) {
            give_name(id, p, ref, name);
        } else if ((!named || first != name) && !w.second.count(name)) {
            list_copies(id, p, ref).push_back({name, kNone, 0});
            w.second[name] = ref;
        }
        if (!live) {
            hold(id, h, path, factor, false);
            return;
        }
        const bool held = sets_.has(set, h);
        if (knew && (held || w.copies.count(ref))) {
            std::vector<Copy>& list = list_copies(id, p, ref);
            auto it = std::find_if(list.begin(), list.end(), [&](const Copy& c) { return c.id == name && c.holder == h; });
            if (it == list.end()) {
                list.push_back({name, h, 1});
            } else if (it->count == 0 || (!pods_[w.pod].set_presence && it->count != 0xFFFFFFFFu)) {
                ++it->count;
            }
            tidy_copies(id, p, ref);
        }
        if (!held) hold(id, h, path, factor, true);
    }
    // Removes one block from what the worker knows.
    void forget_block(u32 id, Pos p, u32 less) {
        Worker& w = *workers_[id];
        drop_names(id, p, chains_.ref(p));
        chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return without(x, less, k); });
        if (p.depth == chains_[p.chain].base) lose_chain(w, p.chain);
    }
    // The last counted copy of an engine block ending at `p` in this holder is gone.
    void take_copy(u32 id, u32 h, Pos p) {
        Worker& w = *workers_[id];
        const u32 bottom = p.chain;
        const u32 factor = holders_[h].factor;
        for (u32 s = 0; s < factor; ++s) {
            // Content may fork inside an engine block; another one that shares this part of it holds it too.
            if (s != 0 && child_has(w, p, h)) break;
            const Pos up = before(p);
            const u32 set = set_at(p);
            if (knows_besides(w, set, h)) {
                chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return without(x, h, k); });
            } else if (knows_child(w, p)) {
                const u32 g = ghost(id);
                chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return with(x, g, k, h); });
            } else {
                forget_block(id, p, h);
            }
            p = up;
        }
        climb(id, p);
        trim(bottom);
    }
    // From `p` towards the root: forgets what was only remembered for the sake of something below.
    void climb(u32 id, Pos p) {
        const Worker& w = *workers_[id];
        if (w.ghost == kNone) return;
        while (p.chain != kNone) {
            const u32 set = set_at(p);
            if (!sets_.has(set, w.ghost) || knows_child(w, p)) return;
            const Pos up = before(p);
            forget_block(id, p, w.ghost);
            p = up;
        }
    }
    void settle(u32 id, Pos p) {
        climb(id, p);
        trim(p.chain);
    }
    // Drops the blocks at the chain's end that nobody holds or remembers, then the chain, then looks at its parent.
    void trim(u32 chain) {
        while (chain != kNone) {
            Chain& c = chains_[chain];
            if (c.len && c.runs.back().set == kEmptySet) {
                const u32 from = c.runs.back().start;
                Space& s = spaces_[c.space];
                for (u32 d = from; d < c.end(); ++d) {
                    const u32 ref = chains_.ref(c, d);
                    if (chains_.name(ref) != kNoName) s.names.erase(mem_, chains_.name(ref), ref);
                }
                if (from == c.base) s.heads.erase(mem_, chains_.head(chain), chain);
                chains_.cut(chain, from);
            }
            if (c.len) {
                join_tail(chain);
                return;
            }
            const u32 parent = c.parent;
            chains_.destroy(chain);
            chain = parent;
        }
    }
    // A chain whose only child at its end goes on where it ends is one chain with it: forks that have gone leave no trace.
    // Chains with very many children are left alone; joining costs time in their number, and gains one lookup per match.
    void join_tail(u32 chain) {
        Chain& c = chains_[chain];
        if (c.kids == 0 || c.kids > 16) return;
        u32 kid = kNone;
        for (u32 k = c.first_kid; k != kNone; k = chains_[k].kid_after) {
            if (chains_[k].base != c.end()) continue;
            if (kid != kNone) return;
            kid = k;
        }
        if (kid == kNone || chains_[kid].kids > 64) return;
        Space& space = spaces_[c.space];
        Chain& k = chains_[kid];
        each_knower(chains_.set_at(k, k.base), [&](u32, Worker& w) {
            w.chains.sub(mem_, kid);
            w.kids.sub(mem_, kid_key(chain, k.base - 1));
        });
        space.heads.erase(mem_, chains_.head(kid), kid);
        chains_.unlink(kid);
        while (k.first_kid != kNone) {
            const u32 g = k.first_kid;
            const u32 depth = chains_[g].base - 1;
            each_knower(chains_.set_at(chains_[g], depth + 1), [&](u32, Worker& w) {
                w.kids.sub(mem_, kid_key(kid, depth));
                w.kids.add(mem_, kid_key(chain, depth));
            });
            chains_.unlink(g);
            chains_[g].parent = chain;
            chains_.link(g);
        }
        chains_.move_own(chain, kid);
        u32 moved[kPageBlocks][2], n = 0;
        chains_.join(chain, kid, [&](u32 from, u32 to) {
            moved[n][0] = from;
            moved[n++][1] = to;
        });
        for (u32 i = 0; i < n; ++i) rename(space, moved[i][0], moved[i][1]);
        k.parent = kNone;
        chains_.destroy(kid);
    }
    // A block has a new reference: every table that had the old one follows.
    void rename(Space& space, u32 from, u32 to) {
        const u64 name = chains_.name(to);
        if (name != kNoName) space.names.move(name, from, to);
        const Pos p = chains_.pos(to);
        each_knower(set_at(p), [&](u32 id, Worker& w) {
            const u64 own = own_name(id, p);
            if (own != kNoName && own != kNameless) w.own.move(own, from, to);
            const auto it = w.copies.find(from);
            if (it == w.copies.end()) return;
            std::vector<Copy> list = std::move(it->second);
            w.copies.erase(it);
            for (const Copy& c : list)
                if (c.holder == kNone) w.second[c.id] = to;
            w.copies[to] = std::move(list);
        });
    }
    // Every worker that knows a block with this set, once.
    template <class F>
    void each_knower(u32 set, F&& f) {
        scratch_ids_.clear();
        sets_.each(set, [&](u32 h) {
            const u32 id = holders_[h].worker;
            if (workers_[id]->guess == h) return;
            if (std::find(scratch_ids_.begin(), scratch_ids_.end(), id) == scratch_ids_.end()) scratch_ids_.push_back(id);
        });
        for (u32 id : scratch_ids_) f(id, *workers_[id]);
    }

    // ---- placing ----------------------------------------------------------------------------------------------------------------

    // Fills segs_ with the part of a path that exists as content already.
    void locate(u32 space, Pos at, const u64* prefixes, u32 n) {
        segs_.clear();
        u32 i = 0;
        while (i < n) {
            u32 chain, depth;
            if (at.chain != kNone && at.depth + 1 < chains_[at.chain].end() && chains_.prefix({at.chain, at.depth + 1}) == prefixes[i]) {
                chain = at.chain;
                depth = at.depth + 1;
            } else {
                chain = child(space, at, prefixes[i]);
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
            spaces_[space].heads.insert(mem_, prefixes[0], chain);
        }
        chains_.append(chain, prefixes, n, set);
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
            hasher_.chain(a.locals, blocks, prev, prefixes_.data());
            locate(w.space, at, prefixes_.data(), blocks);
            if (const u64* other = conflict(a, factor)) {
                // From the start again: the name may have been the parent's, and blocks may have gone with it.
                forget_name(a.worker, *other);
                continue;
            }
            commit(a, factor, blocks, at);
            return Placed::yes;
        }
    }
    // The first of the names that this worker already knows for another block, or nullptr.
    const u64* conflict(const Placing& a, u32 factor) const {
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
        for (u32 k = j; k < a.n; ++k) names.prefetch(a.ids[k]);
        for (; j < a.n; ++j)
            if (find(a.worker, a.ids[j]) != kNone) return a.ids + j;
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
        for (u32 j = 0; j < a.n; ++j) add_copy(a.worker, a.holder, path_.data() + (blocks - (j + 1) * factor), a.ids[j], !a.live || a.live[j]);
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
        for (const Segment& piece : pieces_) {
            const u32 set = piece.chain, from = piece.depth, to = piece.at;
            const u64* ids = a.ids + s.at + (from - s.depth);
            const bool knew = knows(w, set);
            bool bits = !sets_.has(set, a.holder);
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
                    bits = first_name(a.worker, {s.chain, d}, ref, first) && first == ids[d - from] && (w.copies.empty() || !w.copies.count(ref));
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
            const u32 ref = chains_.ref(c, s.depth + i);
            if (names.find(ids[i], [&](u32 r) { return chains_.name(r) == ids[i]; }) == kNone) {
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

    // ---- stored -----------------------------------------------------------------------------------------------------------------

    void stored(u32 id, const Batch& b, const Event& e, Report& r) {
        Worker& w = *workers_[id];
        const bool bare = e.n_tokens == 0;
        u32 factor = 1;
        if (e.block_size != 0) {
            if (e.block_size % block_size_) {
                if (e.n_hashes == 1 && e.block_size < block_size_ && w.placed_full) {
                    r.skip(Reason::partial_block);
                } else {
                    r.skip(Reason::block_size_mismatch);
                    if (e.n_hashes == 1 && e.block_size < block_size_) {
                        w.small_blocks = true;
                    } else {
                        w.sticky = true;
                    }
                    judge(w.pod);
                }
                return;
            }
            const u64 k = e.block_size / block_size_;
            if (k > 0xFFFF) {
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
        ids_.resize(e.n_hashes);
        for (u32 i = 0; i < e.n_hashes; ++i) ids_[i] = name_of(b.hashes[e.hash_at + i]);
        const u32 n = first_repeat(ids_.data(), e.n_hashes);
        if (n < e.n_hashes) {
            r.skip(Reason::duplicate_hash, e.n_hashes - n);
            spoil(id);
        }
        const u32 g = group(w, e, factor);
        if (bare && (e.block_size == 0)) factor = w.groups[g].factor;
        const u32 medium = media_.id(e.medium.p, e.medium.n);
        const u32 h = holder_for(id, medium, g, factor);
        refresh(id);
        // All its blocks masked: that the group exists is all there is to learn, and it limits what the worker can reuse.
        if (n == 0) return;
        if (bare || e.n_tokens != static_cast<u64>(e.n_hashes) * e.block_size) {
            for (u32 i = 0; i < n; ++i) place_known(id, h, ids_[i], r);
            return;
        }
        const u32 blocks = n * factor;
        locals_.resize(blocks);
        if (!hash_event(b, e, n, factor)) {
            r.skip(Reason::bad_event);
            spoil(id);
            return;
        }
        if (!w.placed_full || w.small_blocks) {
            w.placed_full = true;
            w.small_blocks = false;
            judge(w.pod);
        }
        const Placing a{id, h, e.has_parent, name_of(e.parent), ids_.data(), n, locals_.data(), nullptr};
        switch (place(a)) {
            case Placed::yes:
                r.stored += n;
                if (w.lot) {
                    fresh_.assign(ids_.begin(), ids_.begin() + n);
                    work_off(id);
                }
                break;
            case Placed::orphan: park_orphan(a, r); break;
            case Placed::misaligned:
                r.skip(Reason::misaligned);
                spoil(id);
                break;
        }
    }
    // Local hashes of the event's first n engine blocks, adapter and extra keys included.
    bool hash_event(const Batch& b, const Event& e, u32 n, u32 factor) {
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
            BlockHasher(seed_, block_size_, xxh3_64(adapter.p, adapter.n, 0)).locals(tokens, blocks, locals_.data());
        } else {
            hasher_.locals(tokens, blocks, locals_.data());
        }
        if (!e.extra_keys && !e.cache_salt.set()) return true;
        if (!extra_key_digests(e.extra_keys, e.extra_keys_bytes, adapter, e.cache_salt, !e.has_parent, seed_, n, extra_)) return false;
        if (extra_.any)
            for (u32 j = 0; j < n; ++j)
                if (extra_.has[j]) locals_[j * factor] = mix_extra(locals_[j * factor], extra_.digest[j], seed_);
        return true;
    }

    // Index of the first id that occurred before, or n. A bitmap rules repeats out; only what it can't is compared one by one.
    u32 first_repeat(const u64* ids, u32 n) {
        if (n < 2) return n;
        u32 lg = 10;
        while ((1u << lg) < n * 32 && lg < 24) ++lg;
        bitmap_.assign((1u << lg) / 64, 0);
        for (u32 i = 0; i < n; ++i) {
            const u64 h = (ids[i] * 0x9E3779B97F4A7C15ull) >> (64 - lg);
            u64& word = bitmap_[h >> 6];
            if (word >> (h & 63) & 1)
                for (u32 j = 0; j < i; ++j)
                    if (ids[j] == ids[i]) return i;
            word |= 1ull << (h & 63);
        }
        return n;
    }
    // A block without content of its own: one more copy of what the worker knows by this name.
    void place_known(u32 id, u32 h, u64 name, Report& r) {
        const u32 ref = find(id, name);
        if (ref == kNone) {
            park_bare(id, h, name, r);
        } else if (add_known(id, h, name, ref)) {
            ++r.stored;
        } else {
            r.skip(Reason::misaligned);
            spoil(id);
        }
    }
    bool add_known(u32 id, u32 h, u64 name, u32 ref) {
        const u32 factor = holders_[h].factor;
        Pos p = chains_.pos(ref);
        if ((p.depth + 1) % factor) return false;
        path_.clear();
        for (u32 s = 0; s < factor; ++s, p = before(p)) path_.push_back(p);
        add_copy(id, h, path_.data(), name, true);
        return true;
    }

    // ---- parking ----------------------------------------------------------------------------------------------------------------

    ParkingLot& lot(u32 id) {
        Worker& w = *workers_[id];
        if (!w.lot) w.lot.reset(new ParkingLot());
        return *w.lot;
    }
    static std::size_t weight(const Parked& p) { return sizeof(Parked) + 160 + p.ids.size() * (sizeof(u64) + 1 + 48) + p.locals.size() * sizeof(u64); }

    void park(u32 id, Parked&& p, Report& r) {
        // Where copies do not count, a second announcement takes the place of the first.
        if (pods_[workers_[id]->pod].set_presence)
            for (u64 name : p.ids) cancel(id, holders_[p.holder], name);
        ParkingLot& l = lot(id);
        const u64 serial = l.next++;
        u32 live = 0;
        for (u8 x : p.live) live += x;
        for (u64 name : p.ids) l.by_id.emplace(name, serial);
        l.waiting.emplace(p.waits_for, serial);
        l.hashes += live;
        parked_ += live;
        r.parked += p.ids.size();
        mem_.add(weight(p));
        l.records.emplace(serial, std::move(p));
        judge(workers_[id]->pod);
    }
    void park_orphan(const Placing& a, Report& r) {
        if (!room(a.worker, a.holder, a.ids, a.n)) {
            r.skip(Reason::parked_full, a.n);
            spoil(a.worker);
            return;
        }
        const u32 factor = holders_[a.holder].factor;
        Parked p;
        p.waits_for = a.parent;
        p.orphan = true;
        p.holder = a.holder;
        p.ids.assign(a.ids, a.ids + a.n);
        p.locals.assign(a.locals, a.locals + static_cast<std::size_t>(a.n) * factor);
        if (a.live) {
            p.live.assign(a.live, a.live + a.n);
        } else {
            p.live.assign(a.n, 1);
        }
        park(a.worker, std::move(p), r);
    }
    void park_bare(u32 id, u32 h, u64 name, Report& r) {
        if (!room(id, h, &name, 1)) {
            r.skip(Reason::parked_full);
            spoil(id);
            return;
        }
        Parked p;
        p.waits_for = name;
        p.holder = h;
        p.ids.assign(1, name);
        p.live.assign(1, 1);
        park(id, std::move(p), r);
    }
    bool room(u32 id, u32 h, const u64* ids, u32 n) const {
        const Worker& w = *workers_[id];
        u64 after = static_cast<u64>(w.parked()) + n;
        if (after <= max_parked_) return true;
        if (!w.lot || !pods_[w.pod].set_presence) return false;
        for (u32 i = 0; i < n; ++i) after -= find_parked(*w.lot, holders_[h], ids[i]).record != nullptr;
        return after <= max_parked_;
    }
    Parked unpark(ParkingLot& l, u64 serial) {
        const auto it = l.records.find(serial);
        Parked p = std::move(it->second);
        mem_.sub(weight(p));
        l.records.erase(it);
        erase_pair(l.waiting, p.waits_for, serial);
        for (u64 name : p.ids) erase_pair(l.by_id, name, serial);
        for (u8 alive : p.live) {
            l.hashes -= alive;
            parked_ -= alive;
        }
        return p;
    }
    static void erase_pair(std::unordered_multimap<u64, u64>& m, u64 key, u64 value) {
        const auto range = m.equal_range(key);
        for (auto it = range.first; it != range.second; ++it) {
            if (it->second == value) {
                m.erase(it);
                return;
            }
        }
    }
    struct ParkedCopy {
        const Parked* record = nullptr;
        u64 serial = 0;
        std::size_t at = 0;
    };
    // The latest live parked copy of a name in a medium and group.
    ParkedCopy find_parked(const ParkingLot& l, const Holder& tier, u64 name) const {
        ParkedCopy best;
        const auto range = l.by_id.equal_range(name);
        for (auto it = range.first; it != range.second; ++it) {
            const Parked& p = l.records.at(it->second);
            const Holder& h = holders_[p.holder];
            if (h.medium != tier.medium || h.group != tier.group || (best.record && it->second < best.serial)) continue;
            for (std::size_t i = 0; i < p.ids.size(); ++i)
                if (p.ids[i] == name && p.live[i]) best = {&p, it->second, i};
        }
        return best;
    }
    // A removal that found no counted copy takes back the latest parked one. Its position stays for the sake of what follows it.
    bool cancel(u32 id, const Holder& tier, u64 name) {
        Worker& w = *workers_[id];
        if (!w.lot) return false;
        ParkingLot& l = *w.lot;
        const ParkedCopy copy = find_parked(l, tier, name);
        if (!copy.record) return false;
        l.records.at(copy.serial).live[copy.at] = 0;
        --l.hashes;
        --parked_;
        if (!alive(*copy.record)) drop_dead(l, copy.serial);
        if (l.records.empty()) w.lot.reset();
        judge(w.pod);
        return true;
    }
    // A record without live copies is only kept while a live one hangs below it, directly or through other dead ones.
    void drop_dead(ParkingLot& l, u64 serial) {
        std::vector<u64> todo(1, serial);
        while (!todo.empty()) {
            const auto it = l.records.find(todo.back());
            todo.pop_back();
            if (it == l.records.end() || alive(it->second)) continue;
            const u64 above = it->second.waits_for;
            std::vector<u64> below(1, it->first);
            bool needed = false;
            for (std::size_t i = 0; i < below.size() && !needed; ++i) {
                const Parked& p = l.records.at(below[i]);
                if (!p.orphan) continue;
                for (u64 name : p.ids) {
                    const auto range = l.waiting.equal_range(name);
                    for (auto k = range.first; k != range.second && !needed; ++k) {
                        if (std::find(below.begin(), below.end(), k->second) != below.end()) continue;
                        needed = alive(l.records.at(k->second));
                        below.push_back(k->second);
                    }
                }
            }
            if (needed) continue;
            for (u64 s : below) unpark(l, s);
            const auto range = l.by_id.equal_range(above);
            for (auto k = range.first; k != range.second; ++k) todo.push_back(k->second);
        }
    }
    static bool alive(const Parked& p) {
        return std::any_of(p.live.begin(), p.live.end(), [](u8 x) { return x != 0; });
    }
    // Attaches what waited for the names in fresh_, and what waited for those, until nothing moves.
    void work_off(u32 id) {
        Worker& w = *workers_[id];
        std::vector<u64> ends;
        while (w.lot && !fresh_.empty()) {
            const u64 name = fresh_.back();
            fresh_.pop_back();
            std::vector<u64> serials;
            const auto range = w.lot->waiting.equal_range(name);
            for (auto it = range.first; it != range.second; ++it) serials.push_back(it->second);
            std::sort(serials.begin(), serials.end());
            for (u64 serial : serials) {
                if (!w.lot || !w.lot->records.count(serial)) continue;
                const u32 ref = find(id, name);
                if (ref == kNone) break;
                Parked p = unpark(*w.lot, serial);
                if (!p.orphan) {
                    if (p.live[0] && !add_known(id, p.holder, name, ref)) spoil(id);
                    continue;
                }
                const Placing a{id, p.holder, true, p.waits_for, p.ids.data(), static_cast<u32>(p.ids.size()), p.locals.data(), p.live.data()};
                switch (place(a)) {
                    case Placed::yes:
                        fresh_.insert(fresh_.end(), p.ids.begin(), p.ids.end());
                        ends.push_back(p.ids.back());
                        break;
                    case Placed::orphan: {
                        // Still in its place under the bound, which it passed when it came.
                        Report seen;
                        park(id, std::move(p), seen);
                        break;
                    }
                    case Placed::misaligned: spoil(id); break;
                }
            }
        }
        fresh_.clear();
        // Cancelled blocks at a record's end were placed for what waits for them; without that they go again. Only now.
        for (u64 name : ends)
            if (const u32 ref = find(id, name); ref != kNone) settle(id, chains_.pos(ref));
        if (w.lot && w.lot->hashes < w.lot->by_id.size()) {
            // Some are cancelled; those that were kept for one that has its place now need not wait on.
            std::vector<u64> dead;
            for (const auto& rec : w.lot->records)
                if (!alive(rec.second)) dead.push_back(rec.first);
            for (u64 serial : dead) drop_dead(*w.lot, serial);
        }
        if (w.lot && w.lot->records.empty()) w.lot.reset();
        judge(w.pod);
    }

    // ---- removed, cleared -------------------------------------------------------------------------------------------------------

    void removed(u32 id, const Event& e, const u64* ids, Report& r) {
        const Worker& w = *workers_[id];
        Holder tier;
        tier.medium = media_.id(e.medium.p, e.medium.n);
        while (tier.group < w.groups.size() && w.groups[tier.group].id != std::max<i64>(e.group, 0)) ++tier.group;
        for (u32 i = 0; i < e.n_hashes; ++i) {
            const u64 name = name_of(ids[i]);
            if (remove_copy(id, tier, name) || cancel(id, tier, name)) {
                ++r.removed;
            } else {
                r.skip(Reason::unknown_hash);
            }
        }
    }
    bool remove_copy(u32 id, const Holder& tier, u64 name) {
        Worker& w = *workers_[id];
        const u32 ref = find(id, name);
        if (ref == kNone) return false;
        const Pos p = chains_.pos(ref);
        const u32 set = set_at(p);
        for (u32 h : w.holders) {
            const Holder& holder = holders_[h];
            if (holder.medium != tier.medium || holder.group != tier.group || (p.depth + 1) % holder.factor) continue;
            const auto it = w.copies.empty() ? w.copies.end() : w.copies.find(ref);
            if (it == w.copies.end()) {
                u64 first;
                if (!sets_.has(set, h) || !first_name(id, p, ref, first) || first != name) continue;
                take_copy(id, h, p);
                return true;
            }
            std::vector<Copy>& list = it->second;
            auto c = std::find_if(list.begin(), list.end(), [&](const Copy& x) { return x.id == name && x.holder == h && x.count; });
            if (c == list.end()) continue;
            --c->count;
            const bool last = std::none_of(list.begin(), list.end(), [&](const Copy& x) { return x.holder == h && x.count; });
            tidy_copies(id, p, ref);
            if (last) take_copy(id, h, p);
            return true;
        }
        return false;
    }
    // The worker's chains, children before their parents.
    std::vector<u32> own_chains(const Worker& w) const {
        std::vector<u32> list;
        w.chains.each([&](u64 chain, u32) { list.push_back(static_cast<u32>(chain)); });
        std::sort(list.begin(), list.end(), [&](u32 a, u32 b) { return chains_[a].base != chains_[b].base ? chains_[a].base > chains_[b].base : a < b; });
        return list;
    }
    void clear_all(u32 id) {
        Worker& w = *workers_[id];
        drop_guesses(id);
        const std::vector<u32> list = own_chains(w);
        const u32 words = static_cast<u32>(w.mask.size());
        // Chain by chain, children first: a parent must not lose its last holder while a child hangs on it, and joining on the way may
        // have made a child part of its parent, which then comes later.
        for (u32 chain : list) {
            if (!chains_.alive(chain)) continue;
            Chain& c = chains_[chain];
            chains_.change(chain, c.base, c.end(), [&](u32 set, u32) { return sets_.minus(set, w.mask.data(), words); });
            chains_.drop_own(chain, id);
            lose_chain(w, chain);
            trim(chain);
        }
        w.own.release(mem_);
        w.chains.release(mem_);
        w.kids.release(mem_);
        w.second.clear();
        w.copies.clear();
        drop_lot(w);
        for (u32 h : w.holders) {
            set_bit(simple_, h, false);
            free_holder(h);
        }
        w.holders.clear();
        w.mask.clear();
        if (w.ghost != kNone) {
            holders_[w.ghost].blocks = 0;
            set_bit(w.mask, w.ghost, true);
        }
        w.groups.clear();
        w.placed_full = w.small_blocks = w.sticky = false;
        refresh(id);
        judge(w.pod);
    }
    void drop_lot(Worker& w) {
        if (!w.lot) return;
        while (!w.lot->records.empty()) unpark(*w.lot, w.lot->records.begin()->first);
        w.lot.reset();
    }
    void clear_some(u32 id, const std::vector<u32>& media) {
        Worker& w = *workers_[id];
        if (std::find(media.begin(), media.end(), 0u) != media.end()) drop_guesses(id);
        std::vector<u64> mask;
        for (u32 h : w.holders)
            if (std::find(media.begin(), media.end(), holders_[h].medium) != media.end()) set_bit(mask, h, true);
        const auto hit = [&](u32 h) { return (h >> 6) < mask.size() && (mask[h >> 6] >> (h & 63) & 1); };
        if (w.lot) {
            std::vector<u64> dead;
            for (auto& rec : w.lot->records) {
                if (!hit(rec.second.holder)) continue;
                for (u8& alive : rec.second.live) {
                    w.lot->hashes -= alive;
                    parked_ -= alive;
                    alive = 0;
                }
                dead.push_back(rec.first);
            }
            for (u64 serial : dead) drop_dead(*w.lot, serial);
            if (w.lot->records.empty()) w.lot.reset();
        }
        for (auto it = w.copies.begin(); it != w.copies.end();) {
            const u32 ref = (it++)->first;
            for (Copy& c : w.copies[ref])
                if (c.holder != kNone && hit(c.holder)) c.count = 0;
        }
        const u32 g = ghost(id);
        const std::vector<u32> list = own_chains(w);
        for (u32 chain : list) {
            Chain& c = chains_[chain];
            chains_.change(chain, c.base, c.end(), [&](u32 set, u32 k) {
                if (!knows(w, set)) return set;
                for (u32 h : w.holders)
                    if (hit(h) && sets_.has(set, h)) holders_[h].blocks -= k;
                const u32 rest = sets_.minus(set, mask.data(), static_cast<u32>(mask.size()));
                if (knows(w, rest)) return rest;
                holders_[g].blocks += k;
                return sets_.change(rest, kNone, g);
            });
        }
        std::vector<u32> refs;
        for (const auto& rec : w.copies) refs.push_back(rec.first);
        for (u32 ref : refs) tidy_copies(id, chains_.pos(ref), ref);
        // Children first, as in clear_all: a chain's last known block decides whether anything of it must be remembered.
        for (u32 chain : list) {
            if (!chains_.alive(chain)) continue;
            Chain& c = chains_[chain];
            u32 last = kNone;
            for (u32 r = 0; r < c.runs.size() && knows(w, c.runs[r].set); ++r) last = chains_.run_end(c, r) - 1;
            if (last != kNone) climb(id, {chain, last});
            trim(chain);
        }
        judge(w.pod);
    }

    // ---- guesses ----------------------------------------------------------------------------------------------------------------

    void drop_guess(std::size_t i) {
        const Guess g = std::move(guesses_[i]);
        guesses_[i] = std::move(guesses_.back());
        guesses_.pop_back();
        mem_.sub(sizeof(Guess) + g.prefixes.size() * sizeof(u64));
        Worker& w = *workers_[g.worker];
        // What another live guess of the worker covers stays.
        std::size_t keep = 0;
        bool last = true;
        for (const Guess& o : guesses_) {
            if (o.worker != g.worker) continue;
            last = false;
            const std::size_t most = std::min(o.prefixes.size(), g.prefixes.size());
            std::size_t k = 0;
            while (k < most && o.prefixes[k] == g.prefixes[k]) ++k;
            keep = std::max(keep, k);
        }
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
            refresh(g.worker);
        }
    }
    void drop_guesses(u32 id) {
        for (std::size_t i = 0; i < guesses_.size();) {
            if (guesses_[i].worker == id) {
                drop_guess(i);
            } else {
                ++i;
            }
        }
    }

    Memory mem_;
    SetPool sets_;
    Chains chains_;
    BlockHasher hasher_;
    u32 block_size_;
    u64 seed_;
    u32 max_parked_;
    bool set_presence_;

    Media media_;
    std::vector<Pod> pods_;
    std::unordered_map<std::string, u32> pod_ids_;
    std::vector<u32> free_pods_;
    std::vector<std::unique_ptr<Worker>> workers_;
    std::vector<u32> free_workers_;
    std::vector<Holder> holders_;
    std::vector<u32> free_holders_;
    std::vector<u64> simple_;
    std::vector<Space> spaces_;
    std::unordered_map<std::string, u32> space_ids_;
    std::vector<Guess> guesses_;
    double next_expiry_ = kNever;
    u64 pods_version_ = 1;
    u64 pods_made_ = 0;
    u64 holders_version_ = 1;
    u64 parked_ = 0;

    // Scratch of the one writer.
    std::vector<u64> ids_, locals_, prefixes_, fresh_, bitmap_;
    std::vector<Segment> segs_, pieces_;
    std::vector<Pos> path_;
    std::vector<u32> scratch_ids_;
    ExtraDigests extra_;
};

}  // namespace kvindex
