// The invariants of pending blocks.
#include "ingest/pending.hpp"

#include <string>

#include "base/broken.hpp"

namespace kvindex {

std::string Pending::check_lot(u32 id) const {
    const ParkingLot& lot = *lots_[id];
    if (!registry_.has_worker(id)) return broken("something waits for a worker that is gone", id, lot.records.size());
    const Worker& w = registry_.worker_at(id);
    if (w.shed) return broken("something waits for what was shed", id, w.pending);
    u64 entries = 0, dead = 0, live = 0;
    for (const auto& rec : lot.records) {
        const Parked& p = rec.second;
        const Holder& tier = registry_.holder(p.holder);
        u32 left = 0;
        for (u32 i = 0; i < p.ids.size(); ++i, ++entries) {
            left += p.live[i];
            const auto at = lot.by_id.find(ParkedHash{p.ids[i], !p.live[i], tier.medium, tier.group, rec.first});
            if (at == lot.by_id.end() || at->second != i)
                return broken("parked block is not in the table", id, rec.first);
        }
        if (!lot.waiting.count({p.waits_for, rec.first}))
            return broken("parked record waits for nothing", id, rec.first);
        if (left != p.left || lot.dead.count(rec.first) != (left == 0))
            return broken("parked record miscounted", id, rec.first);
        live += left;
        dead += left == 0;
    }
    if (live != w.pending || lot.records.empty()) return broken("parked blocks of a worker miscounted", id, live);
    if (entries != lot.by_id.size() || dead != lot.dead.size() || lot.records.size() != lot.waiting.size())
        return broken("parking lot's tables are wrong", id, entries);
    return {};
}

std::string Pending::check() const {
    u64 live = 0;
    std::size_t bytes = 0;
    for (u32 id = 0; id < lots_.size(); ++id) {
        if (!lots_[id]) continue;
        if (std::string error = check_lot(id); !error.empty()) return error;
        live += registry_.worker_at(id).pending;
        for (const auto& rec : lots_[id]->records) bytes += weight(rec.second);
    }
    for (u32 id = 0; id < registry_.worker_slots(); ++id)
        if (registry_.has_worker(id) && registry_.worker_at(id).pending && !any(id))
            return broken("a worker waits for nothing", id, registry_.worker_at(id).pending);
    if (live != parked_) return broken("parked blocks miscounted", live, parked_);
    if (bytes != lot_bytes_) return broken("memory of parked blocks miscounted", bytes, lot_bytes_);
    return {};
}

}  // namespace kvindex
