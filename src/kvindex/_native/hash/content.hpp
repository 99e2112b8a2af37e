// The local hashes of an event's blocks, from tokens, adapter, extra keys, salt and the tokens behind the blocks.
#pragma once

#include <cstdio>
#include <vector>

#include "hash/extra_keys.hpp"
#include "hash/identity.hpp"
#include "hash/xxh3.hpp"
#include "wire/events.hpp"
#include "wire/hashed.hpp"

namespace kvindex {

class ContentHasher {
public:
    // The most index blocks in one engine block, which is never split: 65,536 tokens with the usual 16 tokens a block.
    static constexpr u32 kMostFactor = 4096;

    // `hasher` is for blocks without an adapter, and must outlive this object.
    explicit ContentHasher(const BlockHasher& hasher)
        : hasher_(hasher), block_size_(hasher.block_tokens()), seed_(hasher.seed()) {}

    // Whether the event describes all its blocks instead of only naming them.
    static bool of_whole_blocks(const Event& e) {
        if (e.hashed != Hashed::tokens) return e.hashed != Hashed::absent;
        // LMCache 0.5 slices one token too many: 257 tokens for a block of 256. If blocks are masked, the tokens are a
        // whole number of blocks.
        const u64 spanned = static_cast<u64>(e.n_hashes) * e.block_size;
        return e.n_tokens != 0 && e.block_size != 0 &&
               (e.n_tokens == spanned || (e.n_tokens > spanned && e.n_tokens % e.block_size));
    }
    // The number of index blocks in one of the event's blocks. 0: the block size does not fit.
    u32 factor(const Event& e) const {
        const u64 k = e.block_size / block_size_;
        return e.block_size % block_size_ || k > kMostFactor ? 0 : static_cast<u32>(k);
    }
    // Local hashes of the event's first n engine blocks, including adapter and extra keys.
    bool locals(const Batch& b, const Event& e, u32 n, u32 factor, u64* locals, ExtraDigests& extra) const {
        const u32* tokens = b.tokens.data() + e.token_at;
        const u32 blocks = n * factor;
        char digits[24];
        StrRef adapter = e.lora_name;
        if (!adapter.set() || adapter.n == 0) adapter = e.lora_id_name;
        if ((!adapter.set() || adapter.n == 0) && e.lora_id > 0) {
            const int len = std::snprintf(digits, sizeof digits, "%lld", static_cast<long long>(e.lora_id));
            adapter.p = digits;
            adapter.n = static_cast<u32>(len);
        }
        if (adapter.set() && adapter.n) {
            BlockHasher(seed_, block_size_, xxh3_64(adapter.p, adapter.n, 0)).locals(tokens, blocks, locals);
        } else {
            hasher_.locals(tokens, blocks, locals);
        }
        if (!e.extra_keys && !e.cache_salt.set()) return look_ahead(b, e, n, factor, locals);
        if (!extra_key_digests(e.extra_keys, e.extra_keys_bytes, adapter, e.cache_salt, !e.has_parent, seed_, n, extra))
            return false;
        if (extra.any)
            for (u32 j = 0; j < n; ++j)
                if (u64& h = locals[std::size_t{j} * factor]; extra.has[j]) h = mix_extra(h, extra.digest[j], seed_);
        return look_ahead(b, e, n, factor, locals);
    }
    // Replaces the tokens of each event that an index of this block size can place by local hashes, behind the event's
    // names.
    void replace_tokens(Batch& b) const {
        Scratch<u64> all;
        ExtraDigests extra;
        all.reserve(b.hashes.size() * 2);
        for (Event& e : b.events) {
            const auto names = b.hashes.begin() + e.hash_at;
            const std::size_t at = all.size();
            all.insert(all.end(), names, names + e.n_hashes);
            const u32 k = factor(e);
            if (e.kind == EventKind::stored && e.bad == Reason::none && e.hashed == Hashed::tokens && k &&
                of_whole_blocks(e)) {
                all.resize(at + std::size_t{e.n_hashes} * (k + 1));
                if (locals(b, e, e.n_hashes, k, all.data() + at + e.n_hashes, extra)) {
                    e.hashed = Hashed::local;
                    e.factor = static_cast<uint16_t>(k);
                } else {
                    e.bad = Reason::bad_event;
                    e.n_hashes = e.n_tokens = 0;
                    all.resize(at);
                }
            }
            e.hash_at = static_cast<u32>(at);
        }
        b.hashes.swap(all);
    }

private:
    // The tokens behind an index block are partly in the same engine block.
    bool look_ahead(const Batch& b, const Event& e, u32 n, u32 factor, u64* locals) const {
        if (e.lookahead == 0) return true;
        const u32* tokens = b.tokens.data() + e.token_at;
        const u32* ahead = tokens + e.n_tokens;
        const std::size_t size = std::size_t{block_size_} * factor;
        std::vector<u32> behind;
        for (u32 j = 0; j < n; ++j, tokens += size, ahead += e.lookahead) {
            behind.assign(tokens, tokens + (factor > 1 ? size : 0));
            behind.insert(behind.end(), ahead, ahead + e.lookahead);
            for (u32 s = 0; s < factor; ++s) {
                u64& h = locals[std::size_t{j} * factor + s];
                h = mix_lookahead(h, behind.data() + (factor > 1 ? std::size_t{block_size_} * (s + 1) : 0), e.lookahead,
                                  seed_);
            }
        }
        return true;
    }

    const BlockHasher& hasher_;
    const u32 block_size_;
    const u64 seed_;
};

// Appends the hashed batch of a payload, for indexes of this block size and seed. The rest of its head is taken from
// the payload.
inline void hash_payload(u32 block_size, u64 seed, HashedHead head, const uint8_t* payload, std::size_t bytes,
                         Batch& scratch, std::vector<uint8_t>& out) {
    DecodeFault unused;
    head.fingerprint = head.seq < 0 ? 0 : xxh3_64(payload, bytes, 0);
    head.sound = decode_batch(payload, bytes, scratch, unused, false);
    head.ts = head.sound ? scratch.ts : 0;
    const BlockHasher hasher(seed, block_size);
    if (head.sound) ContentHasher(hasher).replace_tokens(scratch);
    write_hashed(head, scratch, out);
}

}  // namespace kvindex
