// The index: its parts, from the ground up, and the functions that concern all of them.
//
// Each part owns its state and has references to the parts below it. Nothing here is thread-safe; concurrent_index.hpp
// adds the locks.
#pragma once

#include <string>
#include <vector>

#include "hash/xxh3.hpp"
#include "ingest/changes.hpp"
#include "ingest/ingest.hpp"

namespace kvindex {

class SectionReader;
class SectionWriter;

class Index {
public:
    // max_bytes 0, ttl 0: no limit. `pods` and `spare` belong to the caller and outlive the index.
    Index(u32 block_size, u64 seed, bool set_presence, u32 max_parked, u64 max_bytes, double ttl, PodDirectory& pods,
          Spare& spare)
        : hasher_(seed, block_size),
          seed_(seed),
          block_size_(block_size),
          memory_(spare),
          sets_(memory_),
          chains_(memory_, sets_),
          registry_(memory_, set_presence, pods),
          presence_(memory_, registry_, sets_, chains_),
          insertion_(memory_, registry_, sets_, chains_, presence_, hasher_),
          speculation_(memory_, registry_, sets_, chains_, presence_, insertion_),
          pending_(memory_, registry_, chains_, presence_, insertion_, max_parked),
          eviction_(memory_, registry_, sets_, chains_, presence_, speculation_, pending_, max_bytes, ttl),
          ingest_(memory_, registry_, sets_, chains_, presence_, insertion_, speculation_, pending_, eviction_,
                  hasher_) {}
    ~Index() = default;
    Index(const Index&) = delete;
    Index& operator=(const Index&) = delete;

    u32 block_size() const { return block_size_; }
    u64 seed() const { return seed_; }
    const BlockHasher& hasher() const { return hasher_; }
    // The number of complete blocks among so many tokens, if each needs `lookahead` further tokens behind it.
    u32 blocks(u64 tokens, u32 lookahead) const {
        return tokens < lookahead ? 0 : static_cast<u32>((tokens - lookahead) / block_size_);
    }

    // For queries.
    const SetPool& sets() const { return sets_; }
    const Chains& chains() const { return chains_; }
    const Registry& registry() const { return registry_; }
    HeadSlot child(u32 space, Pos parent, u64 prefix, u32 pages) const {
        return presence_.child(space, parent, prefix, pages);
    }

    u32 max_parked() const { return pending_.max_parked(); }

    // For changes.
    Registry& registry() { return registry_; }
    Ingest& ingest() { return ingest_; }
    const Ingest& ingest() const { return ingest_; }
    Eviction& eviction() { return eviction_; }
    const Eviction& eviction() const { return eviction_; }

    // Whether a turn has left work to the next one. tie_up() does a turn's worth of this work.
    bool loose() const { return presence_.loose(); }
    void tie_up() { presence_.tie_up(); }

    // Memory ran out in the middle of a change, which may be half done. So all content of all workers is dropped, as if
    // it had been evicted: the known blocks of a worker are still a subset of the true ones, and every pod is degraded.
    // The properties of workers stay, since each is set as a whole or not at all, and the groups among them limit the
    // worker's answers. Needs no memory, and reads nothing that may be half done.
    void start_over() noexcept {
        eviction_.shed_everything();
        speculation_.start_over();
        pending_.start_over();
        chains_.clear();
        sets_.clear();
        presence_.start_over();
        registry_.forget_content();
        ingest_.start_over();
    }
    // Returns memory that was kept for the next pod, once the last pod has been removed.
    void shrink() {
        if (!registry_.deserted() || loose()) return;
        memory_.spare.drop();
        ingest_.shrink();
        pending_.shrink();
        sets_.shrink();
        chains_.shrink();
        registry_.shrink();
    }

    struct Figures {
        u64 blocks, chains, sets, holders, pods, workers, parked, guesses, bytes;
        u64 shed_blocks, shed_chains, shed_parked, shed_guesses, expired_blocks, expired_chains, expired_guesses;
    };
    Figures figures() const {
        const Losses &shed = eviction_.shed(), &expired = eviction_.expired();
        // clang-format off
        return {chains_.blocks(), chains_.count(), sets_.live(), registry_.holders(), registry_.directory().size(),
                registry_.workers(), pending_.blocks(), speculation_.size(), memory_.bytes,
                shed.blocks, shed.chains, shed.parked, shed.guesses,
                expired.blocks, expired.chains, expired.guesses};
        // clang-format on
    }
    // Walks the whole index and returns the first broken invariant, or an empty string. O(size of the index).
    std::string check() const;

    // The sections of a snapshot, without the caller's counters. restore() needs an empty index, and a refused snapshot
    // leaves it half filled. The restored index will replace the index that `before` describes.
    void save(SectionWriter& to) const;
    void restore(SectionReader& in, const Registry::Numbers& before);

private:
    const BlockHasher hasher_;
    const u64 seed_;
    const u32 block_size_;
    Memory memory_;
    SetPool sets_;
    Chains chains_;
    Registry registry_;
    Presence presence_;
    Insertion insertion_;
    Speculation speculation_;
    Pending pending_;
    Eviction eviction_;
    Ingest ingest_;
};

}  // namespace kvindex
