// The header, the checksum and the counters. The parts of the index write and read everything in between.
#include "snapshot/snapshot.hpp"

#include <cstring>
#include <string>

#include "index.hpp"

namespace kvindex {

namespace {

constexpr u64 kSizes = sizeof(SnapshotHeader);  // where the sizes of the sections stand

}  // namespace

void write_snapshot(const Index& ix, const std::vector<u64>& counters, SnapshotBytes& out) {
    std::memset(out.room(kSnapshotHead), 0, kSnapshotHead);
    SectionWriter to(out, kSizes);
    ix.save(to);
    to.section(Section::counters, [&](SnapshotBytes& o) { o.put(counters.data(), counters.size() * sizeof(u64)); });
    SnapshotHeader h = {};
    std::memcpy(h.magic, kSnapshotMagic, sizeof h.magic);
    h.version = kSnapshotVersion;
    h.bytes = out.size();
    h.seed = ix.seed();
    h.block_size = ix.block_size();
    h.max_parked = ix.max_parked();
    h.set_presence = ix.registry().counts_once();
    h.sections = kSections;
    std::memcpy(out.at(0), &h, sizeof h);
}

void read_snapshot(Index& ix, const Registry::Numbers& before, const u8* data, u64 bytes, std::vector<u64>& counters) {
    const SnapshotHeader h = snapshot_head(data, bytes, bytes);
    if (xxh3_64(data + kChecksumFrom, bytes - kChecksumFrom, 0) != h.checksum)
        refuse_snapshot("its content does not fit its checksum, so it is damaged", kChecksumFrom);
    if (h.block_size != ix.block_size() || h.seed != ix.seed() || ix.registry().pod_slots())
        refuse_snapshot("it contradicts itself: it is of another index", 0);
    SectionReader in(data, bytes, kSizes, kSnapshotHead);
    ix.restore(in, before);
    in.enter(Section::counters);
    in.need(in.left() == counters.size() * sizeof(u64), "its counters are others");
    in.take(counters.data(), in.left());
}

void fit_loaded(Index& ix) {
    ix.eviction().fit();
    if (ix.eviction().bounded() && ix.eviction().bytes() > ix.eviction().budget())
        throw SnapshotRefused("it does not fit into max_bytes, with nothing left to shed");
}

}  // namespace kvindex
