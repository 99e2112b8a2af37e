// Functions that concern all parts and are rarely called.
#include "index.hpp"

#include <string>

#include "base/broken.hpp"
#include "base/sections.hpp"
#include "workers/snapshot_plan.hpp"

namespace kvindex {

std::string Index::check() const {
    for (std::string error : {chains_.check(), registry_.check(), presence_.check(), pending_.check()})
        if (!error.empty()) return error;
    if (eviction_.bounded() && eviction_.bytes() > eviction_.budget())
        return broken("over the budget", eviction_.bytes(), eviction_.budget());
    return {};
}

void Index::save(SectionWriter& to) const {
    SavePlan plan;
    registry_.number(plan);
    presence_.plan(plan);
    const u64 blocks = plan.blocks * 2 * sizeof(u64);
    to.expect(blocks + blocks / 8 + (1u << 16));
    registry_.save(to, plan);
    presence_.save(to, plan);
    pending_.save(to, plan);
    if (plan.masks > kFreeMasks + to.size() * 16)
        throw SnapshotRefused("there are more workers than a reader would believe");
}

void Index::restore(SectionReader& in, const Registry::Numbers& before) {
    RestorePlan plan;
    registry_.restore(in, plan, before);
    presence_.restore(in, plan);
    pending_.restore(in, plan);
    for (u32 pod : plan.pods) registry_.judge(pod);
}

}  // namespace kvindex
