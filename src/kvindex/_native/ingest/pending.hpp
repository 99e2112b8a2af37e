// Stored blocks that cannot be placed yet: orphans wait for their parent, copies without content for their own name.
#pragma once

#include "ingest/insertion.hpp"
#include "ingest/report.hpp"

namespace kvindex {

// What waited for blocks of an event, and how far its placing has come.
struct Attaching {
    std::vector<u64> fresh;  // names that became known
    std::vector<u64> ends;   // the last name of each record that was placed
    std::vector<u64> moved;  // names for which something waited
};

class Pending : public Insertion {
public:
    Pending(u32 block_size, u64 seed, bool set_presence, u32 max_parked)
        : Insertion(block_size, seed, set_presence), max_parked_(max_parked) {}

    u32 max_parked() const { return max_parked_; }

protected:
    // A block without content of its own: one more copy of what the worker knows by this name.
    void place_known(u32 id, u32 h, u64 name, Report& r) {
        const u32 ref = find(id, name);
        if (ref == kNone) {
            park_bare(id, h, name, r);
        } else if (workers_[id]->shed && !held_anywhere(id, name, ref)) {
            // A name of which nothing is held may mean something new, and what it means now was not read.
            turn_away(id, &name, 1, Reason::shed, r);
        } else if (add_known(id, h, name, ref)) {
            ++r.stored;
        } else {
            r.skip(Reason::misaligned);
            spoil(id);
        }
    }
    ParkingLot& lot(u32 id) {
        Worker& w = *workers_[id];
        if (!w.lot) w.lot.reset(new ParkingLot());
        return *w.lot;
    }
    static std::size_t parked_weight(std::size_t ids, std::size_t locals) {
        return sizeof(Parked) + 160 + ids * (sizeof(u64) + 1 + 96) + locals * sizeof(u64);
    }
    static std::size_t weight(const Parked& p) { return parked_weight(p.ids.size(), p.locals.size()); }

    // Of a worker of which something was shed nothing is parked: what it would wait for is most likely what was shed,
    // and its engine will not announce that again. The names mean something else now than what they meant here, if
    // anything: keeping that would be answering too much.
    void turn_away(u32 id, const u64* ids, u32 n, Reason why, Report& r) {
        for (u32 i = 0; i < n; ++i) forget_name(id, ids[i]);
        r.skip(why, n);
        spoil(id);
    }
    void drop_lot(Worker& w) {
        if (!w.lot) return;
        while (!w.lot->records.empty()) unpark(*w.lot, w.lot->records.begin()->first);
        w.lot.reset();
    }

    // Parks something newly announced. Where copies do not count, it takes the place of what was announced before.
    void park_new(u32 id, Parked&& p, Report& r) {
        Worker& w = *workers_[id];
        std::vector<u64> replaced;
        if (w.lot && pods_[w.pod].set_presence)
            for (u64 name : p.ids)
                if (const ParkedCopy old = find_parked(*w.lot, holders_[p.holder], name); old.record) {
                    take_back(*w.lot, old);
                    replaced.push_back(old.serial);
                }
        r.parked += p.ids.size();
        shelve(id, std::move(p));
        judge(w);
        for (u64 serial : replaced) drop_dead(id, serial);
    }
    void shelve(u32 id, Parked&& p) {
        ParkingLot& l = lot(id);
        const u64 serial = l.next++;
        const Holder& tier = holders_[p.holder];
        p.left = 0;
        for (u32 i = 0; i < p.ids.size(); ++i) {
            p.left += p.live[i];
            l.by_id.emplace(ParkedHash{p.ids[i], !p.live[i], tier.medium, tier.group, serial}, i);
        }
        l.waiting.emplace(p.waits_for, serial);
        if (!p.left) l.dead.insert(serial);
        l.hashes += p.left;
        parked_ += p.left;
        mem_.add(weight(p));
        lot_bytes_ += weight(p);
        l.records.emplace(serial, std::move(p));
    }
    void park_orphan(const Placing& a, Report& r) {
        if (workers_[a.worker]->shed) return turn_away(a.worker, a.ids, a.n, Reason::shed, r);
        if (!room(a.worker, a.holder, a.ids, a.n)) {
            r.skip(Reason::parked_full, a.n);
            spoil(a.worker);
            return;
        }
        const u32 factor = holders_[a.holder].factor;
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
    void park_bare(u32 id, u32 h, u64 name, Report& r) {
        if (workers_[id]->shed) return turn_away(id, &name, 1, Reason::shed, r);
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
        park_new(id, std::move(p), r);
    }
    bool room(u32 id, u32 h, const u64* ids, u32 n) const {
        const Worker& w = *workers_[id];
        // With those that were cancelled and are kept for what hangs below them.
        if (w.lot && w.lot->by_id.size() + n > u64{2} * max_parked_ + 4096) return false;
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
        lot_bytes_ -= weight(p);
        l.records.erase(it);
        const Holder& tier = holders_[p.holder];
        for (u32 i = 0; i < p.ids.size(); ++i)
            l.by_id.erase(ParkedHash{p.ids[i], !p.live[i], tier.medium, tier.group, serial});
        l.waiting.erase({p.waits_for, serial});
        if (!p.left) l.dead.erase(serial);
        l.hashes -= p.left;
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
    u32 parked_copies(u32 id, const Holder& tier, u64 name) const {
        const Worker& w = *workers_[id];
        if (!w.lot) return 0;
        u32 n = 0;
        const auto end = w.lot->by_id.upper_bound(ParkedHash{name, false, tier.medium, tier.group, ~0ull});
        for (auto it = w.lot->by_id.lower_bound(ParkedHash{name, false, tier.medium, tier.group, 0}); it != end; ++it)
            ++n;
        return n;
    }
    void take_back(ParkingLot& l, const ParkedCopy& copy) {
        Parked& p = *copy.record;
        const Holder& tier = holders_[p.holder];
        const u64 name = p.ids[copy.at];
        l.by_id.erase(ParkedHash{name, false, tier.medium, tier.group, copy.serial});
        l.by_id.emplace(ParkedHash{name, true, tier.medium, tier.group, copy.serial}, copy.at);
        p.live[copy.at] = 0;
        if (--p.left == 0) l.dead.insert(copy.serial);
        --l.hashes;
        --parked_;
    }
    // A removal that found no counted copy takes back the latest parked one.
    // Its position stays for the sake of what follows it.
    bool cancel(u32 id, const Holder& tier, u64 name) {
        Worker& w = *workers_[id];
        if (!w.lot) return false;
        ParkingLot& l = *w.lot;
        const ParkedCopy copy = find_parked(l, tier, name);
        if (!copy.record) return false;
        take_back(l, copy);
        if (!copy.record->left) drop_dead(id, copy.serial);
        if (l.records.empty()) w.lot.reset();
        judge(w);
        return true;
    }
    // A record without live copies is only kept while a live one hangs below it, directly or through other dead ones.
    // Where many hang on one another, who removes them one by one would have them looked through each time: after so
    // many steps what is left stays, and the worker is degraded, since names that it frees are not what it says.
    void drop_dead(u32 id, u64 serial) {
        ParkingLot& l = *workers_[id]->lot;
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
                    if (steps == 0) return spoil(id);
                    --steps;
                    for (auto k = l.waiting.lower_bound({name, 0}); k != l.waiting.end() && k->first == name && !needed;
                         ++k) {
                        if (steps == 0) return spoil(id);
                        --steps;
                        if (!seen.insert(k->second).second) continue;
                        needed = l.records.at(k->second).left != 0;
                        below.push_back(k->second);
                    }
                }
            }
            if (needed) continue;
            for (u64 s : below) unpark(l, s);
            drop_above(l, above, todo);
        }
    }
    // The dead records that have this name.
    static void drop_above(const ParkingLot& l, u64 name, std::vector<u64>& todo) {
        for (auto k = l.by_id.lower_bound(ParkedHash{name, true, 0, 0, 0});
             k != l.by_id.end() && k->first.name == name && todo.size() < kMostSteps; ++k)
            todo.push_back(k->first.serial);
    }
    // Attaches what waited for the fresh names, and what waited for those, until nothing moves or so many blocks have
    // been placed: then it returns false.
    bool attach(u32 id, Attaching& to, u32 left) {
        Worker& w = *workers_[id];
        while (w.lot && !to.fresh.empty()) {
            const u64 name = to.fresh.back();
            const auto waits = w.lot->waiting.lower_bound({name, 0});
            const u32 ref = waits != w.lot->waiting.end() && waits->first == name ? find(id, name) : kNone;
            if (ref == kNone) {
                to.fresh.pop_back();
                continue;
            }
            if (left == 0) return false;
            Parked p = unpark(*w.lot, waits->second);
            if (to.moved.empty() || to.moved.back() != name) to.moved.push_back(name);
            left -= std::min(left, static_cast<u32>(std::max(p.ids.size(), p.locals.size())));
            if (!p.orphan) {
                if (p.live[0] && !add_known(id, p.holder, name, ref)) spoil(id);
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
            switch (place(a)) {
                case Placed::yes:
                    if (conflicts_) spoil(id);
                    to.fresh.insert(to.fresh.end(), p.ids.begin(), p.ids.end());
                    to.ends.push_back(p.ids.back());
                    break;
                case Placed::orphan:
                    // Its parent has gone again. Still in its place under the bound, which it passed when it came.
                    shelve(id, std::move(p));
                    break;
                case Placed::misaligned:
                case Placed::mixed: spoil(id); break;
            }
        }
        to.fresh.clear();
        return true;
    }
    // Cancelled blocks at a record's end were placed for what waits for them; without that they go again. Only now.
    bool settle_ends(u32 id, Attaching& to, u32 left) {
        for (; left && !to.ends.empty(); --left) {
            if (const u32 ref = find(id, to.ends.back()); ref != kNone) settle(id, chains_.pos(ref));
            to.ends.pop_back();
        }
        return to.ends.empty();
    }
    // Cancelled records that were kept for one that has its place now need not wait on.
    bool drop_spent(u32 id, Attaching& to, u32 left) {
        Worker& w = *workers_[id];
        for (; left && w.lot && !w.lot->dead.empty() && !to.moved.empty(); --left) {
            std::vector<u64> dead;
            drop_above(*w.lot, to.moved.back(), dead);
            to.moved.pop_back();
            for (u64 serial : dead) drop_dead(id, serial);
        }
        if (w.lot && !w.lot->dead.empty() && !to.moved.empty()) return false;
        to.moved.clear();
        if (w.lot && w.lot->records.empty()) w.lot.reset();
        judge(w);
        return true;
    }
    // All of it at once, where little waits.
    void work_off(u32 id) {
        Attaching to;
        to.fresh.swap(fresh_);
        attach(id, to, kNone);
        settle_ends(id, to, kNone);
        drop_spent(id, to, kNone);
        to.fresh.swap(fresh_);
    }

    u64 parked_ = 0;
    std::size_t lot_bytes_ = 0;
    // Names that became known by the event at hand.
    std::vector<u64> fresh_;

private:
    // Records and names that are looked at for one that was cancelled.
    static constexpr std::size_t kMostSteps = 1024;

    u32 max_parked_;
};

}  // namespace kvindex
