// The data that the parts of an index share while they are saved or restored: dense numbers in place of ids.
#pragma once

#include <map>
#include <vector>

#include "base/sections.hpp"
#include "workers/registry.hpp"

namespace kvindex {

struct ChainRecord {
    u32 space, parent, base, len, runs, own, lookahead, zero;
};
struct OwnRecord {
    u32 worker, start, n, zero;
};

struct SavePlan {
    // For the registry.
    std::vector<u32> pods, workers;         // the ones that are written, in order
    std::vector<u32> worker_no, holder_no;  // by id; kNone: left out
    std::map<u32, u32> medium_no;
    u64 masks = 0;         // bytes of all workers' masks
    bool guesses = false;  // whether sets have holders that are left out
    // For content.
    std::vector<u32> chains, chain_no, set_no;
    std::vector<ChainRecord> records;
    std::vector<Run> runs;
    std::vector<u64> sets;
    u64 n_sets = 0;
    std::map<std::vector<u64>, u64> by_words;
    u64 blocks = 0;
};

struct RestorePlan {
    std::vector<u32> pods, media;        // by their numbers in the file
    std::vector<u32> first;              // a worker's first holder, which its other holders and its ghost follow
    std::vector<u64> wide;               // holders of blocks of several index blocks
    std::vector<u32> knower, knower_no;  // workers that have holders, and a worker's number among them
};

// A holder of this worker, by its number in the file.
inline u32 read_holder(SectionReader& in, const RestorePlan& plan, const Registry& registry, u32 worker) {
    const u32 h = in.get<u32>(), first = plan.first[worker];
    in.need(h >= first && h < first + registry.worker_at(worker).holders.size(), "a worker has no such holder");
    return h;
}

}  // namespace kvindex
