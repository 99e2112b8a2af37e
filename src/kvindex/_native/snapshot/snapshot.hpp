// An index as the bytes of a snapshot, and back. Both are cold, and compiled apart from everything that is counted.
#pragma once

#include <vector>

#include "snapshot/format.hpp"
#include "workers/registry.hpp"

namespace kvindex {

class Index;

// Everything but the seal, which needs no lock (seal_snapshot). The counters are the caller's, and come back as they
// are.
void write_snapshot(const Index& ix, const std::vector<u64>& counters, SnapshotBytes& out);

// Into an index that is empty, and is to take the place of the one that the numbers are of. What is refused leaves that
// index half filled: throw it away.
void read_snapshot(Index& ix, const Registry::Numbers& before, const u8* data, u64 bytes, std::vector<u64>& counters);

// Evicts from an index that was read the content that does not fit into its budget.
void fit_loaded(Index& ix);

}  // namespace kvindex
