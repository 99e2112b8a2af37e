// The parts of a block's identity besides its tokens: extra keys and the tokens behind it, mixed into the local hash.
#pragma once

#include "base/memory.hpp"
#include "hash/xxh3.hpp"

namespace kvindex {

// How extra keys change a block's local hash. A seed of its own keeps the result apart from every rolling step.
inline u64 mix_extra(u64 local, u64 digest, u64 seed) {
    const u64 both[2] = {local, digest};
    return xxh3_64(both, sizeof both, seed ^ 0x9E3779B97F4A7C15ull);
}

// How the tokens behind a block change its local hash, where they are in the engine's hash. Mixed in last.
inline u64 mix_lookahead(u64 local, const u32* tokens, u32 n, u64 seed) {
    const u64 both[2] = {local, xxh3_64(tokens, std::size_t{n} * sizeof(u32), seed)};
    return xxh3_64(both, sizeof both, seed ^ 0xC2B2AE3D27D4EB4Full);
}

}  // namespace kvindex
