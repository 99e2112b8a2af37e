// The parts of a block's identity besides its tokens: extra keys and the tokens behind it, mixed into the local hash.
#pragma once

#include "base/memory.hpp"
#include "hash/xxh3.hpp"

namespace kvindex {

// Mixes extra keys into a block's local hash. A separate seed keeps the result apart from every rolling step.
inline u64 mix_extra(u64 local, u64 digest, u64 seed) {
    const u64 both[2] = {local, digest};
    return xxh3_64(both, sizeof both, seed ^ 0x9E3779B97F4A7C15ull);
}

// Mixes the tokens behind a block into its local hash, if the engine's hash covers them. Always the last step.
inline u64 mix_lookahead(u64 local, const u32* tokens, u32 n, u64 seed) {
    const u64 both[2] = {local, xxh3_64(tokens, std::size_t{n} * sizeof(u32), seed)};
    return xxh3_64(both, sizeof both, seed ^ 0xC2B2AE3D27D4EB4Full);
}

}  // namespace kvindex
