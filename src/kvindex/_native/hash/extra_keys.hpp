// The keys that an engine hashed into a block besides its tokens (multimodal items, cache salt, prompt-embedding
// digests), as one 64-bit digest for each block that has any.
//
// vLLM's events carry these keys without their meanings, so the digest covers the list as it is. Strings, integers,
// bytes and (id, offset) pairs are encoded one after the other, each with a letter for its type and with its length, so
// no two lists have the same encoding. Two keys are treated separately. The LoRA name is left out, because the seed of
// the block's local hash contains it already. A salt that comes as a separate field (from SGLang, and in every query)
// is put where vLLM has it: behind the multimodal keys, before the prompt-embedding digests.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "hash/xxh3.hpp"
#include "wire/events.hpp"
#include "wire/msgpack.hpp"

namespace kvindex {

struct ExtraDigests {
    bool any = false;              // false: no block has extra keys, and the contents of the vectors are meaningless
    std::vector<uint64_t> digest;  // for each block
    std::vector<uint8_t> has;      // for each block: 0 or 1
    std::vector<uint8_t> scratch;
};

namespace extra_keys_detail {

inline void put_u32(std::vector<uint8_t>& out, uint32_t x) {
    for (int shift = 0; shift < 32; shift += 8) out.push_back(static_cast<uint8_t>(x >> shift));
}

inline void put_u64(std::vector<uint8_t>& out, uint64_t x) {
    for (int shift = 0; shift < 64; shift += 8) out.push_back(static_cast<uint8_t>(x >> shift));
}

inline void put_bytes(std::vector<uint8_t>& out, uint8_t type, const uint8_t* p, uint32_t n) {
    out.push_back(type);
    put_u32(out, n);
    out.insert(out.end(), p, p + n);
}

// Appends one value. Of a list, only the head: its items follow and are appended in turn.
inline bool put(std::vector<uint8_t>& out, const MsgValue& v) {
    switch (v.type) {
        case MsgType::str: put_bytes(out, 's', v.data, v.n); return true;
        case MsgType::bin: put_bytes(out, 'b', v.data, v.n); return true;
        case MsgType::boolean:
        case MsgType::uint:
        case MsgType::negative:
            out.push_back('i');
            put_u64(out, v.u);
            return true;
        case MsgType::real: {
            uint64_t bits;
            std::memcpy(&bits, &v.d, sizeof bits);
            out.push_back('f');
            put_u64(out, bits);
            return true;
        }
        case MsgType::array:
            out.push_back('(');
            put_u32(out, v.n);
            return true;
        case MsgType::nil: out.push_back('n'); return true;
        default: return false;
    }
}

// Appends the keys of one block, without the LoRA name at the head. `tail`: the place where the bytes keys at the end
// begin.
inline bool put_entry(MsgReader& r, uint32_t keys, StrRef lora_name, std::vector<uint8_t>& out, size_t& tail) {
    for (uint32_t k = 0; k < keys; ++k) {
        MsgValue v;
        if (!r.next(v)) return false;
        if (k == 0 && lora_name.set() && v.type == MsgType::str && v.n == lora_name.n &&
            std::memcmp(v.data, lora_name.p, v.n) == 0) {
            continue;
        }
        const bool bytes = v.type == MsgType::bin;
        if (!put(out, v)) return false;
        for (uint64_t inner = v.children(); inner != 0; --inner) {
            if (inner > r.left() || !r.next(v) || !put(out, v)) return false;
            inner += v.children();
        }
        if (!bytes) tail = out.size();
    }
    return true;
}

}  // namespace extra_keys_detail

// The digests of n_blocks blocks.
//
// raw, bytes: a msgpack list with nil or a list of keys for each block (nullptr, or nil: no block has keys; missing
// entries are nil, entries beyond n_blocks are not read). lora_name: left out of a block's keys if it is the first of
// them. cache_salt: goes to block 0, and only if block 0 is the first of its prompt (starts_at_root); an empty salt
// counts as no salt, as in vLLM. Returns false if `raw` is not such a list.
inline bool extra_key_digests(const uint8_t* raw, size_t bytes, StrRef lora_name, StrRef cache_salt,
                              bool starts_at_root, uint64_t seed, size_t n_blocks, ExtraDigests& out) {
    out.any = false;
    const bool salted = starts_at_root && cache_salt.n != 0 && n_blocks != 0;
    MsgReader r(raw, raw == nullptr ? 0 : bytes);
    size_t entries = 0;
    if (raw != nullptr) {
        MsgValue v;
        if (!r.next(v)) return false;
        if (v.type != MsgType::array && !v.is_nil()) return false;
        if (v.type == MsgType::array) entries = v.n < n_blocks ? v.n : n_blocks;
    }
    // A text request without a salt has only nils, one for each block.
    size_t i = nil_run(r.p, r.left() < entries ? r.left() : entries);
    if (i == entries && !salted) return true;

    std::vector<uint8_t>& enc = out.scratch;
    const auto keep = [&](size_t block) {
        if (enc.empty()) return;
        out.digest[block] = xxh3_64(enc.data(), enc.size(), seed);
        out.has[block] = 1;
        out.any = true;
    };
    const uint8_t* const salt = reinterpret_cast<const uint8_t*>(cache_salt.p);
    out.digest.assign(n_blocks, 0);
    out.has.assign(n_blocks, 0);
    if (salted && (i > 0 || entries == 0)) {
        enc.clear();
        extra_keys_detail::put_bytes(enc, 's', salt, cache_salt.n);
        keep(0);
    }
    r.p += i;
    for (; i < entries; ++i) {
        MsgValue v;
        if (!r.next(v)) return false;
        if (v.is_nil()) continue;
        if (v.type != MsgType::array) return false;
        enc.clear();
        size_t tail = 0;
        if (!extra_keys_detail::put_entry(r, v.n, lora_name, enc, tail)) return false;
        if (i == 0 && salted) {
            // Encoded behind the digests first and then rotated to their front, so no second buffer is needed.
            const size_t before = enc.size();
            extra_keys_detail::put_bytes(enc, 's', salt, cache_salt.n);
            const auto at = [&](size_t k) { return enc.begin() + static_cast<std::ptrdiff_t>(k); };
            std::rotate(at(tail), at(before), enc.end());
        }
        keep(i);
    }
    return true;
}

}  // namespace kvindex
