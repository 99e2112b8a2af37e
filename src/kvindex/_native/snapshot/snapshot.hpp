// An index as the bytes of a snapshot, and back. Both directions run rarely, and are compiled apart from the measured
// code.
#pragma once

#include <vector>

#include "snapshot/format.hpp"
#include "workers/registry.hpp"

namespace kvindex {

class Index;

// Writes everything but the seal, which needs no lock (seal_snapshot). The counters belong to the caller, and are read
// back unchanged.
void write_snapshot(const Index& ix, const std::vector<u64>& counters, SnapshotBytes& out);

// Reads into an empty index, which will replace the index that `before` describes. A refused snapshot leaves the index
// half filled: throw it away.
void read_snapshot(Index& ix, const Registry::Numbers& before, const u8* data, u64 bytes, std::vector<u64>& counters);

// Evicts the content that does not fit into the budget from an index that was read.
void fit_loaded(Index& ix);

}  // namespace kvindex
