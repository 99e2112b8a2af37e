// The index: the parts that it is composed of, from the ground up, and the functions that concern all of them.
//
// Each part owns its state and has references to the parts below it. Nothing here is for several threads:
// concurrent_index.hpp is.
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
    // max_bytes 0, ttl 0: without a limit. `pods` and `spare` are the caller's, and outlive this.
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
    // Complete blocks of a prompt that have so many tokens behind them.
    u32 blocks(u64 tokens, u32 lookahead) const {
        return tokens < lookahead ? 0 : static_cast<u32>((tokens - lookahead) / block_size_);
    }

    // Read by queries.
    const SetPool& sets() const { return sets_; }
    const Chains& chains() const { return chains_; }
    const Registry& registry() const { return registry_; }
    HeadSlot child(u32 space, Pos parent, u64 prefix, u32 pages) const {
        return presence_.child(space, parent, prefix, pages);
    }

    u32 max_parked() const { return pending_.max_parked(); }

    // Changed.
    Registry& registry() { return registry_; }
    Ingest& ingest() { return ingest_; }
    const Ingest& ingest() const { return ingest_; }
    Eviction& eviction() { return eviction_; }
    const Eviction& eviction() const { return eviction_; }

    // Whether a turn has left something to the next one, and a turn's worth of that.
    bool loose() const { return presence_.loose(); }
    void tie_up() { presence_.tie_up(); }

    // Memory ended in the middle of a change, which may be half done. So all content goes, of all workers, as if it had
    // been evicted: the known blocks of a worker stay a part of the true ones, and every pod is degraded. The
    // properties of workers stay (their groups limit their answers), since they are made as a whole or not at all.
    // Needs no memory, and reads nothing that may be half done.
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
    // Gives back memory that was kept for the next pod, once the last one has gone.
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
    // Walks everything and returns the first broken invariant, or an empty string. O(size of the index).
    std::string check() const;

    // The sections of a snapshot, but for the caller's counters. An index that is restored has to be empty, and what is
    // refused leaves it half filled. It is to take the place of the one that the numbers are of.
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
