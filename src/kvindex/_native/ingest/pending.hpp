// Stored blocks that cannot be placed yet: orphans wait for their parent, copies without content for their own name.
//
// A worker with such blocks has a lot. The lot has every record under the name that it waits for, and each block under
// its own name. `Worker::pending` is the number of live blocks in the lot, and the worker is degraded while it is not
// zero. Blocks of a worker with evicted blocks do not wait.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "ingest/insertion.hpp"
#include "ingest/report.hpp"

namespace kvindex {

// Stored blocks that cannot be placed yet. An orphan event waits for its parent, any other event for its own hash.
struct Parked {
    u64 waits_for = 0;
    bool orphan = false;
    u32 lookahead = 0;
    bool rolled = false;  // `locals` are prefix hashes
    u32 holder = 0;
    u32 left = 0;  // number of live entries
    std::vector<u64> ids;
    std::vector<u64> locals;  // orphans: ids.size() * factor local hashes
    std::vector<u8> live;     // 0: its copy has been removed since, but its position still counts
};

// One hash of one record, in an order that finds the latest live hash of a medium and group without looking at others:
// a lot may have thousands of one hash, in one record or in one record each.
struct ParkedHash {
    u64 name;
    bool dead;
    u32 medium, group;
    u64 serial;
    bool operator<(const ParkedHash& o) const {
        if (name != o.name) return name < o.name;
        if (dead != o.dead) return dead < o.dead;
        if (medium != o.medium) return medium < o.medium;
        if (group != o.group) return group < o.group;
        return serial < o.serial;
    }
};

struct ParkingLot {
    u64 next = 0;
    std::map<u64, Parked> records;
    std::set<std::pair<u64, u64>> waiting;  // awaited hash, record
    std::map<ParkedHash, u32> by_id;        // parked hash -> its place in the record
    std::set<u64> dead;                     // records without a live entry
};

// The blocks that waited for the blocks of an event, and the progress of placing them.
struct Attaching {
    std::vector<u64> fresh;  // names that became known
    std::vector<u64> ends;   // the last name of each record that was placed
    std::vector<u64> moved;  // names that something waited for
};

class SectionReader;
class SectionWriter;
struct RestorePlan;
struct SavePlan;

class Pending {
public:
    Pending(Memory& m, Registry& registry, Chains& chains, Presence& presence, Insertion& insertion, u32 max_parked)
        : mem_(m),
          registry_(registry),
          chains_(chains),
          presence_(presence),
          insertion_(insertion),
          max_parked_(max_parked) {}
    ~Pending() = default;
    Pending(const Pending&) = delete;
    Pending& operator=(const Pending&) = delete;

    u32 max_parked() const { return max_parked_; }
    // The blocks of all workers, and the bytes of all records.
    u64 blocks() const { return parked_; }
    std::size_t bytes() const { return lot_bytes_; }
    // The blocks in a worker's records, including cancelled ones.
    std::size_t size(u32 id) const { return any(id) ? lots_[id]->by_id.size() : 0; }
    // Whether a worker has records.
    bool any(u32 id) const { return id < lots_.size() && lots_[id]; }
    // Whether any of a worker's blocks waits in one of the wanted media.
    template <class F>
    bool waits_in(u32 id, F&& wanted) const {
        return any(id) && std::any_of(lots_[id]->by_id.begin(), lots_[id]->by_id.end(),
                                      [&](const auto& hash) { return !hash.first.dead && wanted(hash.first.medium); });
    }
    // The worker with the most such blocks, or kNone.
    u32 fullest() const {
        u32 found = kNone;
        for (u32 id = 0; id < lots_.size(); ++id)
            if (lots_[id] && (found == kNone || size(id) > size(found))) found = id;
        return found;
    }
    // A block without content of its own is one more copy of the block that the worker knows by this name.
    void place_known(u32 id, u32 h, u64 name, Report& r) {
        const u32 ref = presence_.find(id, name);
        if (ref == kNone) {
            park_bare(id, h, name, r);
        } else if (registry_.worker_at(id).shed && !presence_.held_anywhere(id, name, ref)) {
            // A name without a held block may have a new meaning, which has not been read.
            turn_away(id, &name, 1, Reason::shed, r);
        } else if (insertion_.add_known(id, h, name, ref)) {
            ++r.stored;
        } else {
            r.skip(Reason::misaligned);
            registry_.spoil(id);
        }
    }
    static std::size_t parked_weight(std::size_t ids, std::size_t locals) {
        return sizeof(Parked) + 160 + ids * (sizeof(u64) + 1 + 96) + locals * sizeof(u64);
    }

    // After an eviction, new blocks of the worker do not wait: their parent was most likely evicted, and the engine
    // will not announce it again. If the names have a meaning here, it is outdated: keeping the former blocks would
    // make answers too large.
    void turn_away(u32 id, const u64* ids, u32 n, Reason why, Report& r) {
        for (u32 i = 0; i < n; ++i) presence_.forget_name(id, ids[i]);
        r.skip(why, n);
        registry_.spoil(id);
    }
    void drop_lot(u32 id) {
        if (!any(id)) return;
        while (!lots_[id]->records.empty()) unpark(id, lots_[id]->records.begin()->first);
        lots_[id].reset();
    }
    // All content is about to be dropped.
    void start_over() noexcept {
        for (u32 id = 0; id < lots_.size(); ++id) {
            if (!lots_[id]) continue;
            lots_[id].reset();
            registry_.worker_at(id).pending = 0;
        }
        mem_.sub(lot_bytes_);
        lot_bytes_ = parked_ = 0;
        fresh_.clear();
    }
    // One part of clearing a lot, of the media that `cleared` selects by a record's holder, or (`all`) of all media.
    // Does work of at most `left`, and reduces `left` by it. Returns false if there is more, from record `serial` on.
    template <class Cleared>
    bool clear(u32 id, bool all, Cleared&& cleared, u64& serial, u32& left) {
        const auto spend = [&](std::size_t n) { left -= std::min(left, static_cast<u32>(n)); };
        if (!any(id)) return true;
        ParkingLot& l = *lots_[id];
        if (all) {
            while (left && !l.records.empty()) {
                spend(l.records.begin()->second.ids.size() + 1);
                unpark(id, l.records.begin()->first);
            }
            if (!l.records.empty()) return false;
            lots_[id].reset();
            return true;
        }
        auto rec = l.records.lower_bound(serial);
        for (; rec != l.records.end() && left; ++rec) {
            for (u32 i = 0; i < rec->second.ids.size() && cleared(rec->second.holder); ++i)
                if (rec->second.live[i]) take_back(id, {&rec->second, rec->first, i});
            spend(rec->second.ids.size() + 1);
        }
        serial = rec == l.records.end() ? 0 : rec->first;
        return rec == l.records.end();
    }
    // The other part: drops the records that had only cleared blocks.
    bool drop_cleared(u32 id, u64& serial, u32& left) {
        for (; any(id) && left; left -= std::min(left, 8u)) {
            const auto next = lots_[id]->dead.lower_bound(serial);
            if (next == lots_[id]->dead.end()) break;
            serial = *next + 1;
            drop_dead(id, serial - 1);
        }
        if (any(id) && left == 0) return false;
        drop_empty(id);
        return true;
    }

    void shelve(u32 id, Parked&& p) {
        if (lots_.size() <= id) lots_.resize(id + 1);
        if (!lots_[id]) lots_[id] = std::make_unique<ParkingLot>();
        ParkingLot& l = *lots_[id];
        const u64 serial = l.next++;
        const Holder& tier = registry_.holder(p.holder);
        p.left = 0;
        for (u32 i = 0; i < p.ids.size(); ++i) {
            p.left += p.live[i];
            l.by_id.emplace(ParkedHash{p.ids[i], !p.live[i], tier.medium, tier.group, serial}, i);
        }
        l.waiting.emplace(p.waits_for, serial);
        if (!p.left) l.dead.insert(serial);
        registry_.worker_at(id).pending += p.left;
        parked_ += p.left;
        mem_.add(weight(p));
        lot_bytes_ += weight(p);
        l.records.emplace(serial, std::move(p));
    }
    void park_orphan(const Placing& a, Report& r) {
        if (registry_.worker_at(a.worker).shed) return turn_away(a.worker, a.ids, a.n, Reason::shed, r);
        if (!room(a.worker, a.holder, a.ids, a.n)) {
            r.skip(Reason::parked_full, a.n);
            registry_.spoil(a.worker);
            return;
        }
        const u32 factor = registry_.holder(a.holder).factor;
        Parked p;
        p.waits_for = a.parent;
        p.orphan = true;
        p.rolled = a.rolled;
        p.lookahead = a.lookahead;
        p.holder = a.holder;
        p.ids.assign(a.ids, a.ids + a.n);
        p.locals.assign(a.locals, a.locals + static_cast<std::size_t>(a.n) * factor);
        p.live.assign(a.n, 1);
        park_new(a.worker, std::move(p), r);
    }
    bool room(u32 id, u32 h, const u64* ids, u32 n) const {
        const Worker& w = registry_.worker_at(id);
        // Including the blocks that were cancelled and are kept for the blocks below them.
        if (size(id) + n > u64{2} * max_parked_ + 4096) return false;
        u64 after = u64{w.pending} + n;
        if (after <= max_parked_) return true;
        if (!any(id) || !registry_.pod_at(w.pod).set_presence) return false;
        for (u32 i = 0; i < n; ++i) after -= find_parked(*lots_[id], registry_.holder(h), ids[i]).record != nullptr;
        return after <= max_parked_;
    }
    u32 parked_copies(u32 id, const Holder& tier, u64 name) const {
        if (!any(id)) return 0;
        u32 n = 0;
        const auto end = lots_[id]->by_id.upper_bound(ParkedHash{name, false, tier.medium, tier.group, ~0ull});
        for (auto it = lots_[id]->by_id.lower_bound(ParkedHash{name, false, tier.medium, tier.group, 0}); it != end;
             ++it)
            ++n;
        return n;
    }
    // A removal that found no counted copy cancels the latest pending copy. Its position stays for the blocks behind
    // it.
    bool cancel(u32 id, const Holder& tier, u64 name) {
        if (!any(id)) return false;
        const ParkedCopy copy = find_parked(*lots_[id], tier, name);
        if (!copy.record) return false;
        take_back(id, copy);
        if (!copy.record->left) drop_dead(id, copy.serial);
        drop_empty(id);
        registry_.judge(registry_.worker_at(id));
        return true;
    }
    // Attaches the blocks that waited for the fresh names, then those that waited for these blocks, until nothing
    // moves. Returns false if `left` blocks have been placed before that.
    bool attach(u32 id, Attaching& to, u32 left) {
        while (any(id) && !to.fresh.empty()) {
            const u64 name = to.fresh.back();
            const auto waits = lots_[id]->waiting.lower_bound({name, 0});
            const u32 ref =
                waits != lots_[id]->waiting.end() && waits->first == name ? presence_.find(id, name) : kNone;
            if (ref == kNone) {
                to.fresh.pop_back();
                continue;
            }
            if (left == 0) return false;
            Parked p = unpark(id, waits->second);
            if (to.moved.empty() || to.moved.back() != name) to.moved.push_back(name);
            left -= std::min(left, static_cast<u32>(std::max(p.ids.size(), p.locals.size())));
            if (!p.orphan) {
                if (p.live[0] && !insertion_.add_known(id, p.holder, name, ref)) registry_.spoil(id);
                continue;
            }
            const Placing a{id,
                            p.holder,
                            true,
                            p.waits_for,
                            p.ids.data(),
                            static_cast<u32>(p.ids.size()),
                            p.locals.data(),
                            p.live.data(),
                            p.rolled,
                            p.lookahead};
            switch (insertion_.place(a)) {
                case Placed::yes:
                    if (insertion_.conflicts()) registry_.spoil(id);
                    to.fresh.insert(to.fresh.end(), p.ids.begin(), p.ids.end());
                    to.ends.push_back(p.ids.back());
                    break;
                case Placed::orphan:
                    // Its parent has been removed again. The record keeps its place under the limit, which it passed
                    // when it arrived.
                    shelve(id, std::move(p));
                    break;
                case Placed::misaligned:
                case Placed::mixed: registry_.spoil(id); break;
            }
        }
        to.fresh.clear();
        return true;
    }
    // Cancelled blocks at a record's end were placed for the blocks that wait for them. Without such blocks they are
    // removed again, but not before now.
    bool settle_ends(u32 id, Attaching& to, u32 left) {
        for (; left && !to.ends.empty(); --left) {
            if (const u32 ref = presence_.find(id, to.ends.back()); ref != kNone)
                presence_.settle(id, chains_.pos(ref));
            to.ends.pop_back();
        }
        return to.ends.empty();
    }
    // Drops cancelled records that were kept for a record that has its place now.
    bool drop_spent(u32 id, Attaching& to, u32 left) {
        for (; left && any(id) && !lots_[id]->dead.empty() && !to.moved.empty(); --left) {
            std::vector<u64> dead;
            drop_above(*lots_[id], to.moved.back(), dead);
            to.moved.pop_back();
            for (u64 serial : dead) drop_dead(id, serial);
        }
        if (any(id) && !lots_[id]->dead.empty() && !to.moved.empty()) return false;
        to.moved.clear();
        drop_empty(id);
        registry_.judge(registry_.worker_at(id));
        return true;
    }
    // Attaches everything that waits for these names at once, if little waits.
    void work_off(u32 id, const u64* names, u32 n) {
        fresh_.assign(names, names + n);
        Attaching to;
        to.fresh.swap(fresh_);
        attach(id, to, kNone);
        settle_ends(id, to, kNone);
        drop_spent(id, to, kNone);
        to.fresh.swap(fresh_);
    }

    std::size_t scratch_bytes() const { return bytes_of(fresh_); }
    void drop_scratch() { drop_all(fresh_); }
    // Returns memory that was kept for the next worker.
    void shrink() { drop_all(lots_); }

    // The first broken invariant, or an empty string.
    std::string check() const;
    // The snapshot sections of this part, which are verified while they are read.
    void save(SectionWriter& to, const SavePlan& plan) const;
    void restore(SectionReader& in, const RestorePlan& plan);

private:
    std::string check_lot(u32 id) const;
    Parked unpark(u32 id, u64 serial) {
        ParkingLot& l = *lots_[id];
        const auto it = l.records.find(serial);
        Parked p = std::move(it->second);
        mem_.sub(weight(p));
        lot_bytes_ -= weight(p);
        l.records.erase(it);
        const Holder& tier = registry_.holder(p.holder);
        for (u32 i = 0; i < p.ids.size(); ++i)
            l.by_id.erase(ParkedHash{p.ids[i], !p.live[i], tier.medium, tier.group, serial});
        l.waiting.erase({p.waits_for, serial});
        if (!p.left) l.dead.erase(serial);
        registry_.worker_at(id).pending -= p.left;
        parked_ -= p.left;
        return p;
    }
    struct ParkedCopy {
        Parked* record = nullptr;
        u64 serial = 0;
        u32 at = 0;
    };
    // The latest live parked copy of a name in a medium and group.
    ParkedCopy find_parked(ParkingLot& l, const Holder& tier, u64 name) const {
        auto it = l.by_id.upper_bound(ParkedHash{name, false, tier.medium, tier.group, ~0ull});
        if (it == l.by_id.begin()) return {};
        const ParkedHash& last = (--it)->first;
        if (last.name != name || last.dead || last.medium != tier.medium || last.group != tier.group) return {};
        return {&l.records.at(last.serial), last.serial, it->second};
    }
    void take_back(u32 id, const ParkedCopy& copy) {
        ParkingLot& l = *lots_[id];
        Parked& p = *copy.record;
        const Holder& tier = registry_.holder(p.holder);
        const u64 name = p.ids[copy.at];
        l.by_id.erase(ParkedHash{name, false, tier.medium, tier.group, copy.serial});
        l.by_id.emplace(ParkedHash{name, true, tier.medium, tier.group, copy.serial}, copy.at);
        p.live[copy.at] = 0;
        if (--p.left == 0) l.dead.insert(copy.serial);
        --registry_.worker_at(id).pending;
        --parked_;
    }
    // A record without live copies is kept only while a live record hangs below it, directly or through other dead
    // records. If many records hang on one another, removals one by one would search all of them each time. So the rest
    // stays after this many steps, and the worker is degraded, since the names that it frees are not those of its
    // engine.
    void drop_dead(u32 id, u64 serial) {
        ParkingLot& l = *lots_[id];
        std::vector<u64> todo(1, serial);
        const auto first = l.records.find(serial);
        std::size_t steps = kMostSteps + (first == l.records.end() ? 0 : first->second.ids.size());
        while (!todo.empty()) {
            const auto it = l.records.find(todo.back());
            todo.pop_back();
            if (it == l.records.end() || it->second.left) continue;
            const u64 above = it->second.waits_for;
            std::vector<u64> below(1, it->first);
            std::set<u64> seen{it->first};
            bool needed = false;
            for (std::size_t i = 0; i < below.size() && !needed; ++i) {
                const Parked& p = l.records.at(below[i]);
                if (!p.orphan) continue;
                for (u64 name : p.ids) {
                    if (needed) break;
                    if (steps == 0) return registry_.spoil(id);
                    --steps;
                    for (auto k = l.waiting.lower_bound({name, 0}); k != l.waiting.end() && k->first == name && !needed;
                         ++k) {
                        if (steps == 0) return registry_.spoil(id);
                        --steps;
                        if (!seen.insert(k->second).second) continue;
                        needed = l.records.at(k->second).left != 0;
                        below.push_back(k->second);
                    }
                }
            }
            if (needed) continue;
            for (u64 s : below) unpark(id, s);
            drop_above(l, above, todo);
        }
    }
    // The dead records that have this name.
    static void drop_above(const ParkingLot& l, u64 name, std::vector<u64>& todo) {
        for (auto k = l.by_id.lower_bound(ParkedHash{name, true, 0, 0, 0});
             k != l.by_id.end() && k->first.name == name && todo.size() < kMostSteps; ++k)
            todo.push_back(k->first.serial);
    }
    // Parks a new announcement. If copies do not count, it replaces the announcement before.
    void park_new(u32 id, Parked&& p, Report& r) {
        Worker& w = registry_.worker_at(id);
        std::vector<u64> replaced;
        if (any(id) && registry_.pod_at(w.pod).set_presence)
            for (u64 name : p.ids)
                if (const ParkedCopy old = find_parked(*lots_[id], registry_.holder(p.holder), name); old.record) {
                    take_back(id, old);
                    replaced.push_back(old.serial);
                }
        r.parked += p.ids.size();
        shelve(id, std::move(p));
        registry_.judge(w);
        for (u64 serial : replaced) drop_dead(id, serial);
    }
    void park_bare(u32 id, u32 h, u64 name, Report& r) {
        if (registry_.worker_at(id).shed) return turn_away(id, &name, 1, Reason::shed, r);
        if (!room(id, h, &name, 1)) {
            r.skip(Reason::parked_full);
            registry_.spoil(id);
            return;
        }
        Parked p;
        p.waits_for = name;
        p.holder = h;
        p.ids.assign(1, name);
        p.live.assign(1, 1);
        park_new(id, std::move(p), r);
    }
    static std::size_t weight(const Parked& p) { return parked_weight(p.ids.size(), p.locals.size()); }
    void drop_empty(u32 id) {
        if (any(id) && lots_[id]->records.empty()) lots_[id].reset();
    }
    // The most records and names that are examined for one cancelled record.
    static constexpr std::size_t kMostSteps = 1024;

    Memory& mem_;
    Registry& registry_;
    Chains& chains_;
    Presence& presence_;
    Insertion& insertion_;
    const u32 max_parked_;
    std::vector<std::unique_ptr<ParkingLot>> lots_;  // by worker
    u64 parked_ = 0;
    std::size_t lot_bytes_ = 0;
    std::vector<u64> fresh_;  // names that became known by the current event
};

}  // namespace kvindex
