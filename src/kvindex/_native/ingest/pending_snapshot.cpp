// Pending blocks as bytes, and back.
#include <algorithm>
#include <utility>
#include <vector>

#include "base/sections.hpp"
#include "ingest/pending.hpp"
#include "workers/snapshot_plan.hpp"

namespace kvindex {

void Pending::save(SectionWriter& to, const SavePlan& plan) const {
    to.section(Section::parked, [&](SnapshotBytes& out) {
        for (u32 id : plan.workers) {
            out.put(static_cast<u32>(any(id) ? lots_[id]->records.size() : 0));
            if (!any(id)) continue;
            for (const auto& rec : lots_[id]->records) {
                const Parked& p = rec.second;
                out.put(p.waits_for);
                out.put(u32{p.orphan} | u32{p.rolled} << 1);
                out.put(p.lookahead);
                out.put(plan.holder_no[p.holder]);
                out.put(static_cast<u32>(p.ids.size()));
                out.put(p.ids.data(), u64{8} * p.ids.size());
                out.put(p.live.data(), p.live.size());
                out.put(p.locals.data(), u64{8} * p.locals.size());
            }
        }
    });
}

void Pending::restore(SectionReader& in, const RestorePlan& plan) {
    in.enter(Section::parked);
    for (u32 id = 0; id < registry_.worker_slots(); ++id)
        for (u32 k = in.count(20); k; --k) {
            in.need(!registry_.worker_at(id).shed, "something waits for what was shed");
            Parked p;
            p.waits_for = in.get<u64>();
            const u32 kind = in.get<u32>();
            in.need(kind <= 3 && kind != 2, "what waits is of no known kind");
            p.orphan = kind & 1;
            p.rolled = kind >> 1;
            p.lookahead = in.get<u32>();
            in.need(p.lookahead <= kMostLookahead, "a block has more lookahead than is possible");
            p.holder = read_holder(in, plan, registry_, id);
            const u32 n = in.count(9);
            in.need(p.orphan ? n >= 1 : n == 1, "what waits has no blocks");
            p.ids.resize(n);
            in.take(p.ids.data(), u64{8} * n);
            std::vector<u64> sorted = p.ids;
            std::sort(sorted.begin(), sorted.end());
            in.need(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
                    "a block waits twice in one event");
            p.live.resize(n);
            in.take(p.live.data(), n);
            for (u8 live : p.live) in.need(live <= 1, "a switch is neither on nor off");
            if (p.orphan) {
                const u64 locals = u64{n} * registry_.holder(p.holder).factor;
                in.need(locals <= in.left() / 8, "there are fewer hashes than blocks that wait");
                p.locals.resize(locals);
                in.take(p.locals.data(), locals * 8);
            }
            shelve(id, std::move(p));
        }
    in.done();
}

}  // namespace kvindex
