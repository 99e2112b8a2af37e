// Pods, workers and holders as bytes, and back. Speculative entries are left out.
#include <algorithm>
#include <cassert>
#include <set>
#include <string>
#include <tuple>

#include "base/sections.hpp"
#include "workers/registry.hpp"
#include "workers/snapshot_plan.hpp"

namespace kvindex {

namespace {

bool factor(u32 f) { return f >= 1 && f <= 0xFFFF; }

}  // namespace

// Pods in the order in which they were opened (which breaks ties), their workers, and each worker's holders one after
// another, its ghost last.
void Registry::number(SavePlan& plan) const {
    u32 n_holders = 0;
    for (u32 i = 0; i < pods_.size(); ++i)
        if (pods_[i].uid && find_pod(pods_[i].name) == i) plan.pods.push_back(i);
    std::sort(plan.pods.begin(), plan.pods.end(), [&](u32 a, u32 b) { return pods_[a].uid < pods_[b].uid; });
    plan.worker_no.assign(workers_.size(), kNone);
    plan.holder_no.assign(holders_.size(), kNone);
    for (u32 pod : plan.pods) {
        for (u32 id : pods_[pod].workers) {
            const Worker& w = *workers_[id];
            plan.worker_no[id] = static_cast<u32>(plan.workers.size());
            plan.workers.push_back(id);
            for (u32 h : w.holders) plan.holder_no[h] = n_holders++;
            plan.masks += n_holders / 8 + 8;
            if (w.ghost != kNone) plan.holder_no[w.ghost] = n_holders++;
            plan.guesses |= w.guess != kNone;
        }
    }
}

void Registry::save(SectionWriter& to, SavePlan& plan) const {
    to.section(Section::media, [&](SnapshotBytes& out) {
        out.put(media_.size());
        media_.each([&](u32 id, const std::string& shown, u64) {
            plan.medium_no.emplace(id, static_cast<u32>(plan.medium_no.size()));
            out.text(shown);
        });
    });
    to.section(Section::models, [&](SnapshotBytes& out) {
        out.put(static_cast<u32>(spaces_.size()));
        for (const Space& s : spaces_) out.text(s.model);
    });
    to.section(Section::pods, [&](SnapshotBytes& out) {
        out.put(static_cast<u32>(plan.pods.size()));
        for (u32 id : plan.pods) {
            const Pod& p = pods_[id];
            out.text(p.name);
            out.put(static_cast<u32>(p.set_presence));
            out.put(p.chunk_tokens);
            out.put(p.max_blocks);
            out.put(static_cast<u32>(p.engine) | p.hybrid * 256u | p.eagle * 512u);
            out.put(static_cast<u32>(p.eagle_groups.size()));
            for (i64 g : p.eagle_groups) out.put(g);
            out.put(static_cast<u32>(p.refused.any));
            out.put(static_cast<u32>(p.has_clear_media));
            out.put(static_cast<u32>(p.clear_media.size()));
            for (u32 m : p.clear_media) out.put(plan.medium_no.at(m));
            out.put(static_cast<u32>(p.ignore_media.size()));
            for (u32 m : p.ignore_media) out.put(plan.medium_no.at(m));
            std::set<i64> ranks;
            for (const auto& s : p.streams) ranks.insert(s.first);
            for (const auto& s : p.positions) ranks.insert(s.first);
            for (u32 w : p.workers) ranks.insert(workers_[w]->rank);
            out.put(static_cast<u32>(ranks.size()));
            for (i64 rank : ranks) out.put(rank);
            out.put(static_cast<u32>(p.positions.size()));
            for (const auto& s : p.positions) {
                out.put(s.first);
                out.put(s.second.seq);
                out.put(s.second.ts);
                out.put(s.second.fingerprint);
                out.put(s.second.space);
                out.put(static_cast<u32>(s.second.whole));
            }
        }
    });
    to.section(Section::workers, [&](SnapshotBytes& out) {
        out.put(static_cast<u32>(plan.workers.size()));
        std::vector<u32> pod_no(pods_.size(), kNone);
        for (u32 i = 0; i < plan.pods.size(); ++i) pod_no[plan.pods[i]] = i;
        for (u32 id : plan.workers) {
            const Worker& w = *workers_[id];
            out.put(pod_no[w.pod]);
            out.put(w.space);
            out.put(w.rank);
            out.put(w.placed_full | w.small_blocks * 2u | w.sticky * 4u | (w.ghost != kNone) * 8u | w.shed * 16u |
                    w.muted * 32u | w.in_doubt * 64u);
            out.put(static_cast<u32>(w.groups.size()));
            for (const Group& g : w.groups) {
                out.put(g.id);
                out.put(static_cast<u32>(g.kind) | g.told_kind * 256u);
                out.put(g.window);
                out.put(g.factor);
            }
            out.put(static_cast<u32>(w.holders.size()));
            for (u32 h : w.holders) {
                out.put(plan.medium_no.at(holders_[h].medium));
                out.put(holders_[h].group);
                out.put(holders_[h].factor);
            }
            // The remaining blocks need not have every announced length, and a length of lookahead decides whether the
            // engine drops a block for its draft model.
            out.put(static_cast<u32>(w.lengths.size()));
            for (u32 length : w.lengths) out.put(length);
            std::vector<u64> unsure;
            for (const auto& entry : w.unsure) unsure.push_back(entry.first);
            std::sort(unsure.begin(), unsure.end());
            out.put(static_cast<u32>(unsure.size()));
            out.put(unsure.data(), u64{8} * unsure.size());
        }
    });
}

void Registry::restore_media(SectionReader& in, RestorePlan& plan, const Numbers& before) {
    media_.follow(before.media);
    in.enter(Section::media);
    const u32 n = in.count(4);
    in.need(n >= 1, "there are no media");
    for (u32 i = 0; i < n; ++i) {
        const std::string name = in.text();
        in.need(!name.empty(), "a medium has no name");
        const u32 id = media_.id(name.data(), name.size());
        in.need((i == 0) == (id == 0) && std::find(plan.media.begin(), plan.media.end(), id) == plan.media.end(),
                "a medium is there twice");
        plan.media.push_back(id);
    }
    in.done();
}

void Registry::restore_models(SectionReader& in) {
    in.enter(Section::models);
    const u32 n = in.count(4);
    for (u32 i = 0; i < n; ++i) in.need(space(in.text()) == i, "a model is there twice");
    in.done();
}

void Registry::restore_pods(SectionReader& in, RestorePlan& plan, const Numbers& before) {
    in.enter(Section::pods);
    const u32 n = in.count(32);
    first_standing_ = before.first_standing;
    pods_.resize(before.pod_slots);
    free_pods_ = before.free_pods;
    u64 last = 0;
    for (u32 i = 0; i < n; ++i) {
        const std::string name = in.text();
        in.need(find_pod(name) == kNone, "a pod is there twice");
        // A pod that exists keeps its number, since calls in progress and the loads of workers have this number. The
        // exception is a pod that follows one opened since: numbers give the order in which pods were opened.
        const auto was = before.pods.find(name);
        if (was != before.pods.end() && was->second > last) {
            open_pod(name, was->second);
        } else {
            pod(name);
        }
        const u32 id = find_pod(name);
        plan.pods.push_back(id);
        last = pods_[id].uid;
        Pod& p = pods_[id];
        p.standing = Standing::cut_off;
        p.set_presence = in.flag();
        p.chunk_tokens = in.get<u32>();
        p.max_blocks = in.get<u64>();
        const u32 rules = in.get<u32>();
        in.need((rules & 255) <= static_cast<u32>(Engine::trtllm) && rules < 1024, "there is no such engine");
        std::vector<i64> eagle_groups(in.count(8));
        for (i64& g : eagle_groups) g = in.get<i64>();
        set_engine(id, static_cast<Engine>(rules & 255), rules & 512, std::move(eagle_groups), rules & 256);
        if (in.flag()) p.refused.add_unknown();
        p.has_clear_media = in.flag();
        for (std::vector<u32>* media : {&p.clear_media, &p.ignore_media}) {
            media->resize(in.count(4));
            for (u32& m : *media) {
                in.need((m = in.get<u32>()) < plan.media.size(), "there is no such medium");
                media_.take(m = plan.media[m]);
            }
        }
        // No stream has been followed since the snapshot was written, so all are stale until their events are known.
        for (u32 k = in.count(8); k; --k) p.streams[read_rank(in)] = State::stale;
        for (u32 k = in.count(40); k; --k) {
            const i64 r = read_rank(in);
            Position at;
            at.seq = in.get<u64>();
            at.ts = in.get<double>();
            at.fingerprint = in.get<u64>();
            at.space = in.get<u32>();
            at.whole = in.flag();
            in.need(at.space < spaces_.size(), "a stream's model is not there");
            in.need(p.streams.count(r) && p.positions.emplace(r, at).second, "a rank is there twice");
        }
    }
    free_pods_.clear();
    widen(free_pods_, pods_.size());
    for (u32 id = 0; id < pods_.size(); ++id)
        if (!pods_[id].uid) free_pods_.push_back(id);
    in.done();
}

void Registry::restore_workers(SectionReader& in, RestorePlan& plan) {
    in.enter(Section::workers);
    const u32 n = in.count(28);
    std::set<std::tuple<u32, i64, u32>> seen;
    u64 masks = 0;
    for (u32 i = 0; i < n; ++i) {
        const u32 pod_no = in.get<u32>(), space = in.get<u32>();
        const i64 r = read_rank(in);
        in.need(pod_no < plan.pods.size() && space < spaces_.size(), "a worker's pod or model is not there");
        const u32 pod = plan.pods[pod_no];
        in.need(pods_[pod].streams.count(r) && seen.emplace(pod, r, space).second, "a worker is there twice");
        in.need(pods_[pod].workers.size() < kMostWorkers, "a pod has too many workers");
        in.need(add_worker(pod, r, space) == i, "a worker is out of order");
        Worker& w = *workers_[i];
        const u32 flags = in.get<u32>();
        in.need(flags < 128, "a worker's flags are none");
        w.placed_full = flags & 1;
        w.small_blocks = flags & 2;
        w.sticky = flags & 4;
        w.shed = flags & 16;
        w.muted = flags & 32;
        w.in_doubt = flags & 64;
        in.need((!w.shed || w.sticky) && (!w.muted || w.shed), "a worker's flags are none");
        const u32 groups = in.count(20);
        in.need(groups <= kMostGroups, "a worker has too many groups");
        charge(sizeof(Group) * groups);
        w.groups.resize(groups);
        std::set<i64> ids;
        for (Group& g : w.groups) {
            g.id = in.get<i64>();
            const u32 kind = in.get<u32>();
            g.window = in.get<u32>();
            g.factor = in.get<u32>();
            in.need((kind & 255) <= static_cast<u32>(Attention::chunked) && kind < 512 && ids.insert(g.id).second &&
                        factor(g.factor),
                    "a group is none");
            g.kind = static_cast<Attention>(kind & 255);
            g.told_kind = kind >> 8;
        }
        std::set<std::tuple<u32, u32, u32>> tiers;
        plan.first.push_back(holder_slots());
        for (u32 k = in.count(12); k; --k) {
            const u32 medium = in.get<u32>(), group = in.get<u32>(), size = in.get<u32>();
            in.need(medium < plan.media.size() && group < w.groups.size() && factor(size),
                    "a holder's medium, group or size is none");
            in.need(tiers.emplace(medium, group, size).second, "a holder is there twice");
            in.need(holder_fits(w, plan.media[medium]), "a worker has too many holders");
            add_holder(w, new_holder(i, plan.media[medium], group, size));
            if (size > 1) set_bit(plan.wide, w.holders.back(), true);
        }
        for (u32 k = in.count(4); k; --k) {
            const u32 length = in.get<u32>();
            in.need(length <= kMostLookahead && learn_length(w, length), "a model has too many lengths of lookahead");
        }
        for (u32 k = in.count(8); k; --k)
            in.need(w.unsure.emplace(in.get<u64>(), u8{1}).second, "a name is unsure twice");
        // Charged before the mask is made.
        masks += holder_slots() / 8 + 8;
        in.need(masks <= kFreeMasks + in.bytes() * 16, "there are more workers than its size allows");
        if (flags & 8) ghost(i);
        refresh(i);
        plan.knower_no.push_back(static_cast<u32>(plan.knower.size()));
        if (holder_slots() != plan.first.back()) plan.knower.push_back(i);
    }
    media_.sweep();
    in.done();
}

void Registry::restore(SectionReader& in, RestorePlan& plan, const Numbers& before) {
    assert(pods_.empty());
    restore_media(in, plan, before);
    restore_models(in);
    restore_pods(in, plan, before);
    restore_workers(in, plan);
}

}  // namespace kvindex
