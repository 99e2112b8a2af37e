// The pods that a question covers.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "index.hpp"

namespace kvindex {

// The pods that an answer may contain, as bits for one state of the index's pods and holders.
struct Filter {
    std::vector<u64> pods;
    std::vector<u64> holders;
    u64 pods_version = 0, holders_version = 0;

    Filter(const Index& ix, const std::vector<std::string>& names)
        : pods_version(ix.registry().pods_version()), holders_version(ix.registry().holders_version()) {
        pods.assign(ix.registry().pod_slots() / 64 + 1, 0);
        holders.assign(ix.registry().holder_slots() / 64 + 1, 0);
        for (const std::string& name : names)
            if (const u32 id = ix.registry().find_pod(name); id != kNone) pods[id >> 6] |= 1ull << (id & 63);
        for (u32 h = 0; h < ix.registry().holder_slots(); ++h)
            if (const u32 w = ix.registry().holder(h).worker; w != kNone && pod(ix.registry().worker_at(w).pod))
                holders[h >> 6] |= 1ull << (h & 63);
    }
    bool pod(u32 id) const { return (id >> 6) < pods.size() && (pods[id >> 6] >> (id & 63) & 1); }
    bool current(const Index& ix) const {
        return pods_version == ix.registry().pods_version() && holders_version == ix.registry().holders_version();
    }
};

// Names of pods, compiled into bits when a match needs them, and kept while the bits are current.
class PodNames {
public:
    explicit PodNames(std::vector<std::string> names) : names_(std::move(names)) {}
    // `part`: the index's place among several that answer together, each of which has bits of its own.
    std::shared_ptr<const Filter> compile(const Index& ix, u32 part) {
        std::lock_guard<std::mutex> g(m_);
        std::shared_ptr<const Filter>& filter = part ? others_[part] : filter_;
        if (!filter || !filter->current(ix)) filter = std::make_shared<const Filter>(ix, names_);
        return filter;
    }

private:
    std::mutex m_;
    std::vector<std::string> names_;
    std::shared_ptr<const Filter> filter_;
    std::map<u32, std::shared_ptr<const Filter>> others_;  // of further parts
};

}  // namespace kvindex
