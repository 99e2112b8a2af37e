// The whole index as bytes, and back.
//
// A snapshot has everything that cannot be computed: content, names, holders, pending blocks. Tables, counts, masks and
// lists of children are rebuilt while it is read, so most of the structure's invariants hold by construction; the rest
// is verified. Checksums are no protection against intent: any file that is accepted passes Index::check(), and memory
// is allocated in proportion to the file. Nothing is replayed: content goes back into its pages by memcpy.
//
//   header    magic, version, file size, XXH3 of all that follows, seed, block size ..., sizes of the sections
//   sections  in the order of `Section`, each from a multiple of 8 bytes on; little-endian
#pragma once

#include <algorithm>
#include <cstring>

#include "base/sections.hpp"
#include "hash/xxh3.hpp"

namespace kvindex {

struct SnapshotHeader {
    char magic[8];
    u32 version;
    u32 zero;
    u64 bytes;     // of the whole file
    u64 checksum;  // of everything behind it
    u64 seed;
    u32 block_size, max_parked, set_presence, sections;
};
inline constexpr char kSnapshotMagic[8] = {'k', 'v', 'i', 'n', 'd', 'e', 'x', '\n'};
inline constexpr u32 kSnapshotVersion = 3;
inline constexpr u64 kChecksumFrom = 32;

inline constexpr u64 kSnapshotHead = sizeof(SnapshotHeader) + u64{8} * kSections;

// The last step of writing. It reads only the bytes, so it needs no lock.
inline void seal_snapshot(SnapshotBytes& out) {
    SnapshotHeader h{};
    std::memcpy(&h, out.data(), sizeof h);
    h.checksum = xxh3_64(out.data() + kChecksumFrom, out.size() - kChecksumFrom, 0);
    std::memcpy(out.at(0), &h, sizeof h);
}

// The header, which is checked before the rest is read: the magic, the size, and the kind of the index.
inline SnapshotHeader snapshot_head(const u8* data, u64 bytes, u64 file_bytes) {
    SnapshotHeader h = {};
    if (bytes) std::memcpy(&h, data, std::min<u64>(bytes, sizeof h));
    if (std::memcmp(h.magic, kSnapshotMagic, std::min<u64>(bytes, sizeof h.magic)) != 0)
        refuse_snapshot("it is no snapshot of an index", 0);
    if (bytes < sizeof h) refuse_snapshot("it ends within its header", bytes);
    if (h.version > kSnapshotVersion) refuse_snapshot("it was written by a newer version of kvindex", 8);
    if (h.version != kSnapshotVersion) refuse_snapshot("its version is none", 8);
    if (h.zero != 0) refuse_snapshot("its header is damaged", 12);
    if (h.bytes > file_bytes) refuse_snapshot("it is cut short", file_bytes);
    if (h.bytes < file_bytes) refuse_snapshot("something follows its end", h.bytes);
    if (h.sections != kSections || h.bytes < kSnapshotHead || h.set_presence > 1 || h.block_size == 0 ||
        h.block_size > 65536 || h.max_parked > 0x7FFFFFFF)
        refuse_snapshot("its header is damaged", kChecksumFrom);
    return h;
}
}  // namespace kvindex
