// Pods, their workers, the workers' holders, and the blocks of a worker that fit into no chain (yet).
#pragma once

#include <algorithm>
#include <cctype>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "content/chains.hpp"
#include "wire/events.hpp"
#include "workers/media.hpp"

namespace kvindex {

enum class State : u8 { exact, degraded, stale };

enum class Attention : u8 { full, sliding, mamba, chunked };

// A group of a hybrid model, as the worker's own stored events described it.
struct Group {
    i64 id = 0;
    Attention kind = Attention::full;
    bool told_kind = false;
    u32 window = 0;  // tokens; sliding only
    u32 factor = 1;  // the largest block size of the group seen so far, in index blocks
};

// A dense id in the holder sets: one worker's copies in one medium and group, of one block size.
struct Holder {
    u32 worker = kNone;
    u32 medium = 0;
    u32 group = 0;  // index into Worker::groups
    u32 factor = 1;
    u64 blocks = 0;  // index blocks whose set has this holder
};

// The rules for the part of a held prefix that an engine reuses. Only the rules of vLLM and SGLang are known.
enum class Engine : u8 { unknown, vllm, sglang, trtllm };

// Flags of a Face.
inline constexpr u8 kRootless = 1;    // the worker may go on after a hole
inline constexpr u8 kOdd = 2;         // the held prefix is not the answer as it is
inline constexpr u8 kCutsLast = 4;    // the prompt's last token is always computed
inline constexpr u8 kDropsLast = 8;   // the last block of the remaining run is dropped
inline constexpr u8 kDropsEach = 16;  // a group drops the last block of its whole run
inline constexpr u8 kRuled = kCutsLast | kDropsLast | kDropsEach;
inline constexpr u8 kTiers = 32;  // one medium is read where the one before ends

// The properties of a holder's worker that an answer needs, side by side. Reading them from worker and pod costs three
// cache misses for each of 256 pods (3.9 us of an answer to 8 blocks, against 0.4).
struct Face {
    u64 pod = 0;  // Pod::uid
    u32 rank = 0;
    u32 medium = 0;  // kNone: several media
    u32 factor = 1;
    State state = State::exact;
    u8 flags = 0;
    std::uint16_t bits = 0;  // the number of its holders; 0: more than bits must be examined
};

// Copies of one block that "the bit is set, so there is one copy under the block's first name" does not describe.
struct Copy {
    u64 id;
    u32 holder;  // kNone: the entry only keeps a second name known
    u32 count;
};

using Copies = std::vector<Copy, Counted<Copy>>;
template <class K, class V>
using CountedMap = std::unordered_map<K, V, Mixed, std::equal_to<K>, Counted<std::pair<const K, V>>>;

struct Worker {
    explicit Worker(Memory& m) : second(Counted<char>(m)), copies(Counted<char>(m)), unsure(Counted<char>(m)) {}

    u32 pod = 0;
    i64 rank = 0;
    u32 space = 0;
    std::vector<u32> holders;  // real holders; without those of removed groups
    u32 ghost = kNone;         // holds blocks without a copy whose positions are kept
    u32 guess = kNone;         // holds the entries of add_prefix
    std::vector<u32> hidden;   // holders of a long change: their blocks are known, and no match counts them
    std::vector<u64> mask;     // bits of holders, hidden and ghost
    std::vector<Group> groups;
    RefTable own;                    // own names -> block
    CountedMap<u64, u32> second;     // further names of a block -> block
    CountedMap<u32, Copies> copies;  // block -> copies, if bits are not enough
    std::vector<u32> lengths;        // of lookahead tokens in its announcements
    u32 length = kNone;              // the last of these lengths
    CountedMap<u64, u8> unsure;      // names below a name that meant other content than a tier had announced
    ChainTable chains;               // chains in which this worker knows a block
    CountTable kids;                 // (chain, depth) -> child chains there in which it knows a block
    u32 pending = 0;                 // its blocks that wait for their place
    bool placed_full = false;        // has placed a block of a size that fits
    bool small_blocks = false;       // has sent only single blocks that are too small: partial blocks or a wrong size
    bool sticky = false;             // some block could not be placed, permanently
    bool in_doubt = false;           // a clear may or may not have meant media beside the engine's own
    bool shed = false;   // some of its blocks were evicted: no block waits for a parent that may be one of them
    bool muted = false;  // the limits of its answers could not be kept, so its blocks are refused until it starts again
    Reason why_muted = Reason::over_budget;
    State state = State::exact;  // its own state, a part of the pod's
    u32 face = kNone;            // the holder whose bit is all that a match needs, if there is one
    bool rootless = false;       // no group needs every block of a prefix
    u32 in_hybrid_list = kNone;

    void release(Memory& m) {
        own.release(m);
        chains.release(m);
        kids.release(m);
    }
    // Removes all of its blocks. Needs no memory.
    void forget(Memory& m) noexcept {
        release(m);
        second = CountedMap<u64, u32>(Counted<char>(m));
        copies = CountedMap<u32, Copies>(Counted<char>(m));
        unsure = CountedMap<u64, u8>(Counted<char>(m));
    }
};

// How far the stream of one rank has been applied.
struct Position {
    u64 seq = 0;          // of the last batch
    double ts = 0;        // its timestamp, seconds
    u64 fingerprint = 0;  // XXH3 of its payload: another process has other bytes under this number
    u32 space = 0;        // the model that it was applied to
    bool whole = false;   // every batch since a clean start has been applied
};

// Ranks and models of one pod, together. More than any engine has, and few enough for a linear search: an event that
// begins a turn searches for its worker, and a change of a state visits all of them.
inline constexpr std::size_t kMostWorkers = 1024;

// The most groups, media and holders (one for each medium, group and block size that are used together) of a worker,
// and holders of a pod. Engines have fewer than ten groups and media, and 1,024 ranks of two groups on two media have
// 4,096 holders. A match queries each group of each medium, and a set has a bit for each holder: without a limit, 2,000
// empty groups of one pod made each match of its model take 2.9 ms.
inline constexpr u32 kMostGroups = 64, kMostMedia = 32, kMostHolders = 256, kMostHoldersOfPod = 8192;
inline constexpr u32 kLongestMedium = 256;  // bytes of its name

// The ranks that hold more than is known, since there was no room for a worker: no rank, one, or several.
struct Refused {
    bool any = false, several = false;
    bool elsewhere = false;  // some blocks are in a medium that the engine's clears may leave alone
    i64 rank = 0;

    void add(i64 r, bool in_other_medium) {
        several |= any && rank != r;
        any = true;
        elsewhere |= in_other_medium;
        rank = r;
    }
    void add_unknown() { any = several = elsewhere = true; }
    bool of(i64 r) const { return any && (several || rank == r); }
    // This rank now holds no block of any model.
    void forgive(i64 r) {
        if (!several && rank == r) any = elsewhere = false;
    }
};

// Whether a pod's content is known. If it is not, the pod is stale.
enum class Standing : u8 {
    unheard,   // only configured, or with speculative entries: until the first event
    cut_off,   // events may have been missed, after a fork or a restore: until its stream has a state
    followed,  // as exact as its streams and workers are
};

struct Pod {
    u64 uid = 0;  // slot and a count of all pods ever opened: the number of a removed pod never means another pod
    std::string name;
    std::vector<u32> workers;
    std::map<i64, State> streams;       // per rank, from the stream layer
    std::map<i64, Position> positions;  // per rank, if batches came with their sequence numbers
    bool busy = false;                  // a long change is in progress; other changes of this pod wait for its end
    bool set_presence = false;
    bool has_clear_media = false;
    std::vector<u32> clear_media;
    std::vector<u32> ignore_media;  // media whose events are ignored
    Refused refused;
    u32 chunk_tokens = 0;
    u32 holders = 0;  // of all its workers, without ghosts and speculative ones
    Engine engine = Engine::unknown;
    bool eagle = false;  // drops the last matched block: in eagle_groups, or in all groups if that is empty
    std::vector<i64> eagle_groups;
    bool hybrid = false;  // it evicts more than its events contain
    u64 max_blocks = 0;   // index blocks, over all workers, media and groups; 0: no limit
    u64 spare = 0;        // at least so many of max_blocks are free
    Standing standing = Standing::unheard;
    State state = State::stale;  // the worst of all states

    // Whether the engine drops the last block that it matches in this group. Draft models have neither a state nor
    // chunks, and vLLM's look-up of such groups drops no block.
    bool drops(const Group& g) const {
        return engine == Engine::vllm && eagle && (g.kind == Attention::full || g.kind == Attention::sliding) &&
               (eagle_groups.empty() ||
                std::find(eagle_groups.begin(), eagle_groups.end(), g.id) != eagle_groups.end());
    }
};

struct Space {
    std::string model;
    HeadTable heads;             // chains by the prefix hash of their first block
    RefTable names;              // engine hash in a page -> block
    std::map<u32, u32> lengths;  // length of lookahead -> number of workers that have announced such blocks; without 0
    u32 plain = 0;               // workers that have announced blocks without lookahead
    std::vector<u32> hybrids;    // workers whose groups and media must be examined
    u32 rootless = 0;            // the number of workers that may go on after a hole
};

// The group of an event's blocks.
struct GroupSpec {
    i64 id = 0;                  // below 0: no group is named
    const char* kind = nullptr;  // nullptr: not given
    u32 kind_length = 0;
    i64 window = 0;  // tokens; 0: not given
};

inline void set_bit(std::vector<u64>& mask, u32 bit, bool on) {
    if (on && mask.size() <= bit >> 6) mask.resize((bit >> 6) + 1);
    if ((bit >> 6) < mask.size()) {
        if (on) {
            mask[bit >> 6] |= 1ull << (bit & 63);
        } else {
            mask[bit >> 6] &= ~(1ull << (bit & 63));
        }
    }
}

// Reserves room for `n` in all, so that adding one needs no memory. Doubles, which reserve alone does not do.
template <class V>
void widen(V& list, std::size_t n) {
    if (list.capacity() < n) list.reserve(std::max(n, 2 * list.capacity()));
}

inline Attention attention_of(const char* p, std::size_t n) {
    const std::string s = lower(p, n);
    const auto has = [&](const char* part) { return s.find(part) != std::string::npos; };
    if (has("sliding_window")) return Attention::sliding;
    if (has("mamba") || has("linear")) return Attention::mamba;
    if (has("chunked_local")) return Attention::chunked;
    return Attention::full;
}

}  // namespace kvindex
