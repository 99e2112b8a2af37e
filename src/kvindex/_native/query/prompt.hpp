// A prompt as the caller gives it, and its hashes.
#pragma once

#include <string>
#include <vector>

#include "hash/extra_keys.hpp"
#include "hash/identity.hpp"
#include "hash/xxh3.hpp"

namespace kvindex {

// A prompt: its tokens, adapter and extra keys, or its prefix hashes.
struct Prompt {
    const u64* prefixes = nullptr;
    u64 n_prefixes = 0;
    const u32* tokens = nullptr;
    u64 n_tokens = 0;
    bool adapted = false;
    std::string adapter;
    bool keyed = false;
    ExtraDigests extra;
};

// The local (`rolled`: prefix) hashes of the prompt's complete blocks that are followed by `lookahead` tokens.
inline void hash_prompt(const Prompt& p, u32 block_size, u64 seed, bool rolled, u64* out, u32 lookahead = 0) {
    const u64 n = p.n_tokens < lookahead ? 0 : (p.n_tokens - lookahead) / block_size;
    const BlockHasher h(seed, block_size, p.adapted ? xxh3_64(p.adapter.data(), p.adapter.size(), 0) : 0);
    h.locals(p.tokens, n, out);
    if (p.keyed)
        for (u64 i = 0; i < n && i < p.extra.has.size(); ++i)
            if (p.extra.has[i]) out[i] = mix_extra(out[i], p.extra.digest[i], seed);
    if (lookahead)
        for (u64 i = 0; i < n; ++i) out[i] = mix_lookahead(out[i], p.tokens + block_size * (i + 1), lookahead, seed);
    if (rolled) h.chain(out, n, nullptr, out);
}

// Reads the extra keys of a prompt, which are packed by msgpack. Returns false if they are malformed.
inline bool read_extra(const u8* packed, u64 bytes, const std::string& salt, u64 seed, u64 blocks, Prompt& p) {
    StrRef s;
    s.p = salt.data();
    s.n = static_cast<u32>(salt.size());
    // The keys of an event may begin with the adapter. A caller that passes these keys on for a prompt means the same.
    StrRef adapter;
    adapter.p = p.adapted ? p.adapter.data() : nullptr;
    adapter.n = static_cast<u32>(p.adapter.size());
    if (!extra_key_digests(bytes ? packed : nullptr, bytes, adapter, s, true, seed, blocks, p.extra)) return false;
    p.keyed = p.extra.any;
    return true;
}

}  // namespace kvindex
