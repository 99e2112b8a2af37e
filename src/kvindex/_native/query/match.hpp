// The question: how many leading blocks of this prompt does each worker hold?
//
// A prompt is walked along the chains whose content it shares. The work is per run of equal holder sets, not per block
// or per pod, and blocks are hashed only as far as some worker still holds them. A reader writes only the generation of
// the chains that it passes.
#pragma once

#include <algorithm>
#include <numeric>

#include "hash/identity.hpp"
#include "index.hpp"
#include "query/pod_filter.hpp"

namespace kvindex {

// The meanings of a hit. A hit has all of them if the worker has one medium and reuses everything that it holds.
inline constexpr u8 kReused = 1;  // blocks that the engine reuses
inline constexpr u8 kHeld = 2;    // the prefix that all media together hold
inline constexpr u8 kMedium = 4;  // the prefix that this medium holds alone
inline constexpr u8 kTier = 8;    // how far this medium reaches if it is read where the one before ends

// One worker's answer. medium kNone: all media together.
struct Hit {
    u64 pod;  // Pod::uid
    u32 rank;
    u32 medium;
    u32 blocks;
    State state;
    u8 says;

    // In an answer of several indexes, the number of a medium includes the index's place, since each index numbers its
    // media separately.
    static constexpr u32 kMediumBits = 26;
    static constexpr u32 kMostParts = (kNone >> kMediumBits) + 1;
    void tell_part(u32 part) {
        if (medium >> kMediumBits) {
            // All media together, or a number that is too large: then the blocks count without their medium.
            medium = kNone;
            says &= kReused | kHeld;
        } else {
            medium |= part << kMediumBits;
        }
    }
    static u32 part_of(u32 medium) { return medium >> kMediumBits; }
    static u32 medium_in_part(u32 medium) { return medium & ((1u << kMediumBits) - 1); }
};

// A vector that neither clears memory before it is written nor checks at each step for room: at 256 pods, these were
// half of the time.
class Hits {
public:
    u32 size() const { return n_; }
    const Hit* begin() const { return p_.get(); }
    const Hit* end() const { return p_.get() + n_; }
    Hit* begin() { return p_.get(); }
    Hit* end() { return p_.get() + n_; }
    const Hit& operator[](u32 i) const { return p_[i]; }
    bool full() const { return n_ == room_; }
    void clear() { n_ = 0; }
    void reserve(std::size_t n) {
        if (n <= room_) return;
        Hit* const p = static_cast<Hit*>(std::realloc(static_cast<void*>(p_.get()), n * sizeof(Hit)));
        if (!p) throw std::bad_alloc();
        static_cast<void>(p_.release());
        p_.reset(p);
        room_ = n;
    }
    // Counts the hits that were written from room() up to `end`. Their room must have been reserved.
    Hit* room() { return p_.get() + n_; }
    void grow(const Hit* end) {
        assert(end <= p_.get() + room_);
        n_ = static_cast<u32>(end - p_.get());
    }
    void push(const Hit& hit) {
        assert(!full());
        p_[n_++] = hit;
    }

private:
    struct Free {
        void operator()(Hit* p) const { std::free(p); }
    };
    std::unique_ptr<Hit[], Free> p_;
    u32 n_ = 0;
    std::size_t room_ = 0;
};

struct MatchResult {
    Hits hits;
    u32 best = kNone;  // index of the best hit
    u64 compared = 0;  // blocks compared with a chain
    void clear() {
        hits.clear();
        best = kNone;
        compared = 0;
    }
    // Makes all states stale, since they have lapsed at this moment.
    void distrust(bool only_exact) {
        if (only_exact) return clear();
        for (Hit& h : hits) h.state = State::stale;
    }
    // Adds the hits of another index, whose pods have other numbers. `part`: the index's place among several.
    void add(const MatchResult& other, u32 part) {
        hits.reserve(hits.size() + other.hits.size());
        const u32 first = hits.size();
        for (Hit h : other.hits) {
            h.tell_part(part);
            hits.push(h);
        }
        compared += other.compared;
        if (other.best == kNone) return;
        const Hit& theirs = other.hits[other.best];
        if (best == kNone || theirs.blocks > hits[best].blocks ||
            (theirs.blocks == hits[best].blocks && theirs.pod < hits[best].pod))
            best = first + other.best;
    }
};

// A prompt as tokens. BT: the tokens of a block if the compiler knows them, else 0.
template <unsigned BT>
struct TokenPath {
    const BlockHasher& roll;
    const BlockHasher& local;
    const u32* tokens;
    const ExtraDigests* extra;  // nullptr: none
    const Index& ix;
    u32 n;

    u64 hash(u32 i, u64 prev) const {
        const std::size_t step = BT ? BT : local.block_tokens();
        u64 h = local.template local_fixed<BT>(tokens + step * i);
        if (extra && i < extra->has.size() && extra->has[i]) h = mix_extra(h, extra->digest[i], ix.seed());
        return i ? roll.roll(prev, h) : h;
    }
    // The number of blocks i, i+1, ... that have the prefix hashes `expect`. Each step takes its predecessor from
    // `expect` instead of the step before: once that step agreed, both are the same number, so the steps do not wait
    // for one another. i is not 0: the first block of a chain is not compared, since the chain was found by it.
    u32 agree(const u64* expect, u32 i, u32 count, u64 prev) const {
        const std::size_t step = BT ? BT : local.block_tokens();
        u32 k = 0;
        if (extra) {
            for (; k < count && hash(i + k, prev) == expect[k]; ++k) prev = expect[k];
            return k;
        }
        for (const u32* block = tokens + step * i; k < count; ++k, block += step) {
            if (roll.roll(prev, local.template local_fixed<BT>(block)) != expect[k]) return k;
            prev = expect[k];
        }
        return count;
    }
};

// The same for blocks whose hash covers the tokens behind them. The last blocks, without tokens behind them, match no
// block.
template <unsigned BT>
struct LookaheadPath {
    TokenPath<BT> plain;
    u32 lookahead;
    u32 n;

    u64 hash(u32 i, u64 prev) const {
        const std::size_t step = BT ? BT : plain.local.block_tokens();
        const u32* tokens = plain.tokens + step * i;
        u64 h = plain.local.template local_fixed<BT>(tokens);
        const ExtraDigests* extra = plain.extra;
        if (extra && i < extra->has.size() && extra->has[i]) h = mix_extra(h, extra->digest[i], plain.ix.seed());
        h = mix_lookahead(h, tokens + step, lookahead, plain.ix.seed());
        return i ? plain.roll.roll(prev, h) : h;
    }
    u32 agree(const u64* expect, u32 i, u32 count, u64 prev) const {
        u32 k = 0;
        for (; k < count && hash(i + k, prev) == expect[k]; ++k) prev = expect[k];
        return k;
    }
};

// A prompt as the prefix hashes of its blocks.
struct HashPath {
    const u64* prefixes;
    u32 n;

    u64 hash(u32 i, u64) const { return prefixes[i]; }
    u32 agree(const u64* expect, u32 i, u32 count, u64) const {
        u32 k = 0;
        while (k < count && expect[k] == prefixes[i + k]) ++k;
        return k;
    }
};

class Matcher {
public:
    template <class Path>
    // `most`: the number of the path's blocks that do not contain the prompt's last token. `more`: adds to the hits in
    // `out`.
    void match(const Index& ix, u32 space, const Path& path, u32 most, const Filter* filter, bool only_exact,
               MatchResult& out, bool more = false) {
        if (!more) out.clear();
        if (space == kNone || path.n == 0) return;
        const u32 end = walk(ix, space, path, filter, out);
        const u32 words = static_cast<u32>(alive_.size());
        std::size_t n = ended_.size() + trails_.size();
        for (u32 i = 0; i < words; ++i) n += static_cast<std::size_t>(__builtin_popcountll(alive_[i]));
        out.hits.reserve(out.hits.size() + n);
        const bool led = out.best != kNone;
        u32 longest = led ? out.hits[out.best].blocks : 0;
        u64 first = led ? out.hits[out.best].pod : 0;
        const Hit* best = nullptr;
        Hit* to = out.hits.room();
        odd_.clear();
        const auto show = [&](const Face& f, u32 blocks) {
            if (f.flags & kOdd) {
                if (f.flags & kRuled) return set_aside(f, blocks);
                blocks -= blocks % f.factor;
            }
            if (!blocks || (only_exact && f.state != State::exact)) return;
            if (blocks > longest || (blocks == longest && f.pod < first)) {
                longest = blocks;
                first = f.pod;
                best = to;
            }
            *to++ = {f.pod, f.rank, f.medium, blocks, f.state, kReused | kHeld | kMedium | kTier};
        };
        for (u32 i = 0; i < words; ++i)
            for (u64 bits = alive_[i]; bits; bits &= bits - 1)
                show(ix.registry().face(i * 64 + static_cast<u32>(__builtin_ctzll(bits))), end);
        for (const Ended& e : ended_) show(ix.registry().face(e.holder), e.blocks);
        mixed_.clear();
        for (const Trail& t : trails_) {
            const Face& f = ix.registry().face(t.holder);
            if (f.bits && t.began == f.bits && f.medium != kNone && at_once(t)) {
                show(f, marks_[t.last].before == kNone ? end : pieces_[marks_[t.last].piece].start);
            } else {
                mixed_.push_back(&t);
            }
        }
        out.hits.grow(to);
        if (best) out.best = static_cast<u32>(best - out.hits.begin());
        for (const Odd& o : odd_) answer_odd(*o.face, o.blocks, most, only_exact, out);
        for (const Trail* t : mixed_) answer_hybrid(ix, *t, end, most, only_exact, out);
    }

private:
    // Pages that a walk prefetches before it reaches them: comparing 16 pages takes longer than an access to memory.
    static constexpr u32 kAhead = 16;
    // Pages of a chain that a walk prefetches before their numbers are known.
    static constexpr u32 kGuessed = 8;

    struct Ended {
        u32 holder;
        u32 blocks;
    };
    struct Piece {
        u32 start;  // in blocks of the prompt; the piece ends where the next one starts
        u32 set;
    };
    // A worker with several groups or media, along the prompt.
    struct Trail {
        u32 worker;
        u32 holder;     // one of the worker's holders
        u32 last;       // its newest mark
        u32 began;      // the number of its holders that have the first block
        u32 on;         // the number of its holders that have the current block
        u32 rooted;     // of these, the number that a prefix needs
        bool rootless;  // it may go on after a hole
    };
    // A worker whose engine has rules for reuse, and the prefix that it holds.
    struct Odd {
        const Face* face;
        u32 blocks;
    };
    // A group in vLLM's look-up with a draft model.
    struct Try {
        u32 group;
        bool drops;    // whether it drops the last block that it matches
        bool dropped;  // whether it has done so at the length that is tried
        u32 found;     // how far its look-up has come, or kNone
    };
    // A piece at which the holders of a worker change.
    struct Mark {
        u32 piece;
        u32 before;  // the mark before, or kNone
    };

    // The blocks that a worker reuses if it holds a prefix and nothing else of the prompt.
    static u32 reused(const Face& f, u32 blocks, u32 most) {
        u32 used = blocks;
        if (f.flags & kCutsLast && used > most) used = most - most % f.factor;
        if (f.flags & kDropsLast) used -= std::min(used, f.factor);
        if (f.flags & kDropsEach) used = std::min(used, blocks - f.factor);
        return used;
    }
    // Kept out of the loop that shows all other workers: there, the two kinds of hit would cost each of 256 pods five
    // instructions.
    __attribute__((noinline)) void set_aside(const Face& f, u32 blocks) { odd_.push_back({&f, blocks}); }
    static void answer_odd(const Face& f, u32 blocks, u32 most, bool only_exact, MatchResult& out) {
        blocks -= blocks % f.factor;
        if (!blocks || (only_exact && f.state != State::exact)) return;
        const u32 used = reused(f, blocks, most);
        const u8 held = kHeld | kMedium | kTier;
        emit(f, f.medium, blocks, used == blocks ? held | kReused : held, out);
        if (used != blocks) emit(f, f.medium, used, kReused, out);
    }
    static void emit(const Face& f, u32 medium, u32 blocks, u8 says, MatchResult& out) {
        if (blocks == 0) return;
        if (says & kReused) {
            const Hit* best = out.best == kNone ? nullptr : &out.hits[out.best];
            if (!best || blocks > best->blocks || (blocks == best->blocks && f.pod < best->pod))
                out.best = out.hits.size();
        }
        if (out.hits.full()) out.hits.reserve(2 * out.hits.size() + 4);
        out.hits.push({f.pod, f.rank, medium, blocks, f.state, says});
    }

    // The state of a walk: before block `i` of the prompt, behind a block with this prefix hash and this set.
    struct Step {
        u32 i = 0;
        u32 set = kNone;
        u64 prefix = 0;
    };
    // Walks the prompt as far as there is content with a holder. Fills pieces_, ended_, alive_ and trails_.
    template <class Path>
    u32 walk(const Index& ix, u32 space, const Path& path, const Filter* filter, MatchResult& out) {
        pieces_.clear();
        ended_.clear();
        alive_.clear();
        trails_.clear();
        marks_.clear();
        Step at;
        HeadSlot head = enter(ix, space, {kNone, kNone}, path, 0, 0);
        if (head.chain() == kNone) return 0;
        following_ = 0;
        const Space& model = ix.registry().space_at(space);
        hybrids_ = !model.hybrids.empty();
        rootless_ = model.rootless != 0;
        while (head.chain() != kNone) {
            const u32 depth = walk_chain(ix, head, path, filter, at, out);
            if (depth == kNone || at.i == path.n || ix.chains()[head.chain()].first_kid == kNone) break;
            head = enter(ix, space, {head.chain(), depth - 1}, path, at.i, at.prefix);
        }
        return at.i;
    }
    // Walks along one chain. Returns the depth at which the prompt leaves it, or kNone if no worker is left.
    template <class Path>
    KVINDEX_INLINE u32 walk_chain(const Index& ix, const HeadSlot& head, const Path& path, const Filter* filter,
                                  Step& at, MatchResult& out) {
        const Chains& chains = ix.chains();
        const Chain& c = chains[head.chain()];
        chains.ages().seen(c.age);
        const u32 stop = std::min(c.end(), c.base + (path.n - at.i));
        const auto page_of = [&](u32 d) { return (d >> kPageShift) - (c.base >> kPageShift); };
        const auto prefixes = [&](u32 d) {
            return chains.prefixes(chains.page_number(c, head.page, page_of(d))) + (d & (kPageBlocks - 1));
        };
        const u32 pages = page_of(stop - 1) + 1;
        u32 depth = c.base;
        chains.prefetch(c, head.page, std::min<u32>(c.row, kGuessed), std::min(kAhead, pages));
        for (u32 r = 0; depth < stop; ++r) {
            if (const u32 set = c.runs[r].set; set != at.set) {
                // The set counts only if its block belongs to the prompt. The path may leave the chain right here, but
                // not at the chain's first block, by which it was found.
                if (depth != c.base && !path.agree(prefixes(depth), at.i, 1, at.prefix)) return depth;
                if (!meet(ix, set, at, filter)) return kNone;
            }
            if (depth == c.base) {
                at.prefix = head.prefix;
                ++at.i;
                ++depth;
                ++out.compared;
            }
            const u32 run_stop = std::min(stop, chains.run_end(c, r));
            compare(chains, c, head.page, path, pages, run_stop, depth, at, out);
            if (depth < run_stop) return depth;
        }
        return depth;
    }
    // Compares block by block and page by page, up to `stop` or the first block that differs from the prompt. Changing
    // values are kept in local variables meanwhile: seven instructions a page fewer than through `at` and `out`.
    template <class Path>
    KVINDEX_INLINE static void compare(const Chains& chains, const Chain& c, u32 first, const Path& path, u32 pages,
                                       u32 stop, u32& from, Step& at, MatchResult& out) {
        u32 depth = from, i = at.i;
        u64 prefix = at.prefix;
        while (depth < stop) {
            const u32 page = (depth >> kPageShift) - (c.base >> kPageShift), slot = depth & (kPageBlocks - 1);
            const u32 count = std::min(kPageBlocks - slot, stop - depth);
            if (slot == 0) {
                const u32 next = page + kAhead - 1;
                if (next < pages) chains.prefetch(c, first, next, next + 1);
            }
            const u64* expect = chains.prefixes(chains.page_number(c, first, page)) + slot;
            const u32 k = path.agree(expect, i, count, prefix);
            i += k;
            depth += k;
            if (k) prefix = expect[k - 1];
            if (k < count) break;
        }
        out.compared += depth - from;
        from = depth;
        at.i = i;
        at.prefix = prefix;
    }
    // The next block has another set than the block before. Returns whether any worker is left.
    KVINDEX_INLINE bool meet(const Index& ix, u32 set, Step& at, const Filter* filter) {
        const bool some = narrow(ix, set, at.i, at.set == kNone, filter);
        if (hybrids_) follow(ix, at.set == kNone ? kEmptySet : at.set, set, filter);
        pieces_.push_back({at.i, set});
        at.set = set;
        return some || following_ || rootless_;
    }
    // The chain below `parent` that begins with block `i` of the prompt.
    template <class Path>
    static HeadSlot enter(const Index& ix, u32 space, Pos parent, const Path& path, u32 i, u64 prev) {
        const u32 pages = ((path.n - 1) >> kPageShift) - (i >> kPageShift) + 1;
        return ix.child(space, parent, path.hash(i, prev), std::min(pages, kGuessed));
    }
    // Removes the bits from alive_ that the set lacks. Returns whether any bit is left.
    bool narrow(const Index& ix, u32 set, u32 at, bool first, const Filter* filter) {
        const SetPool& sets = ix.sets();
        const u64* words = sets.data(set);
        u32 n = sets.words(set);
        const std::vector<u64>& simple = ix.registry().simple();
        u64 any = 0;
        if (const std::vector<u64>& guessed = ix.registry().guessed(); !guessed.empty()) {
            for (u32 i = 0; i < n && i < guessed.size(); ++i) any |= words[i] & guessed[i];
            if (any) {
                with_guesses_.assign(words, words + n);
                with_guesses_.resize(std::max<std::size_t>(n, simple.size()));
                for (u32 i = 0; i < n && i < guessed.size(); ++i)
                    for (u64 bits = words[i] & guessed[i]; bits; bits &= bits - 1) {
                        const u32 h = ix.registry().stands_for(i * 64 + static_cast<u32>(__builtin_ctzll(bits)));
                        with_guesses_[h >> 6] |= 1ull << (h & 63);
                    }
                words = with_guesses_.data();
                n = static_cast<u32>(with_guesses_.size());
                any = 0;
            }
        }
        if (first) {
            const u32 m = std::min<u32>(n, static_cast<u32>(simple.size()));
            alive_.resize(m);
            for (u32 i = 0; i < m; ++i) {
                alive_[i] = words[i] & simple[i];
                if (filter) alive_[i] &= i < filter->holders.size() ? filter->holders[i] : 0;
                any |= alive_[i];
            }
            return any != 0;
        }
        for (u32 i = 0; i < alive_.size(); ++i) {
            const u64 now = i < n ? words[i] : 0;
            for (u64 gone = alive_[i] & ~now; gone; gone &= gone - 1)
                ended_.push_back({i * 64 + static_cast<u32>(__builtin_ctzll(gone)), at});
            alive_[i] &= now;
            any |= alive_[i];
        }
        return any != 0;
    }
    // Marks the workers with several groups or media for which this piece adds or removes a holder. So each worker is
    // examined where something changes for it, instead of once a piece (256 workers, 50 pieces: 241 us).
    void follow(const Index& ix, u32 before, u32 set, const Filter* filter) {
        const SetPool& sets = ix.sets();
        const u64 *was = sets.data(before), *now = sets.data(set);
        const u32 n_was = sets.words(before), n_now = sets.words(set);
        const std::vector<u64>&grouped = ix.registry().grouped(), &rooted = ix.registry().rooted();
        const u32 n = std::min(std::max(n_was, n_now), static_cast<u32>(grouped.size()));
        for (u32 i = 0; i < n; ++i) {
            const u64 on = i < n_now ? now[i] : 0;
            u64 changed = (on ^ (i < n_was ? was[i] : 0)) & grouped[i];
            if (filter) changed &= i < filter->holders.size() ? filter->holders[i] : 0;
            for (; changed; changed &= changed - 1) {
                const u64 bit = changed & (0 - changed);
                change(ix, i * 64 + static_cast<u32>(__builtin_ctzll(bit)), on & bit,
                       i < rooted.size() && rooted[i] & bit);
            }
        }
    }
    void change(const Index& ix, u32 holder, bool on, bool rooted) {
        const u32 piece = static_cast<u32>(pieces_.size()), id = ix.registry().holder(holder).worker;
        if (id >= trail_of_.size()) trail_of_.resize(id + 1);
        u32& at = trail_of_[id];
        if (at >= trails_.size() || trails_[at].worker != id) {
            at = static_cast<u32>(trails_.size());
            trails_.push_back({id, holder, static_cast<u32>(marks_.size()), 0, 0, 0,
                               (ix.registry().face(holder).flags & kRootless) != 0});
            marks_.push_back({0, kNone});
        }
        Trail& t = trails_[at];
        if (marks_[t.last].piece != piece) {
            // Beyond a hole in a group that needs every block, no block counts.
            if (!t.rooted && !t.rootless) return;
            marks_.push_back({piece, t.last});
            t.last = static_cast<u32>(marks_.size() - 1);
        }
        t.on += on ? 1 : -1;
        t.began += piece == 0;
        if (!rooted) return;
        if (on) {
            following_ += t.rooted++ == 0;
        } else {
            following_ -= --t.rooted == 0;
        }
    }

    // Whether the blocks of the prompt that the worker holds are, in every group, a beginning with the same end. Then
    // no group objects.
    bool at_once(const Trail& t) const {
        const Mark& m = marks_[t.last];
        return m.before == kNone || (t.on == 0 && marks_[m.before].before == kNone);
    }
    // Several groups, media or kinds of attention: applies the rule of concepts.md ("Hybrid models") group by group,
    // until no group objects.
    void answer_hybrid(const Index& ix, const Trail& t, u32 end, u32 most, bool only_exact, MatchResult& out) {
        const Worker& w = ix.registry().worker_at(t.worker);
        const Face& f = ix.registry().face(t.holder);
        if (only_exact && f.state != State::exact) return;
        own_.clear();
        for (u32 m = t.last; m != kNone; m = marks_[m].before) own_.push_back(pieces_[marks_[m].piece]);
        std::reverse(own_.begin(), own_.end());
        const bool ruled = f.flags & (kTiers | kRuled);
        per_medium_ = ruled;
        const u32 all = agreed(ix, w, end, kNone);
        media_.clear();
        if (w.guess != kNone) media_.push_back(0);
        for (u32 h : w.holders) {
            const u32 m = ix.registry().holder(h).medium;
            if (std::find(media_.begin(), media_.end(), m) == media_.end()) media_.push_back(m);
        }
        // No medium alone gives more than all media together, and a single medium gives as much.
        if (media_.size() == 1 && w.guess == kNone && !ruled)
            return emit(f, media_[0], all, kReused | kHeld | kMedium | kTier, out);
        emit(f, kNone, all, ruled ? kHeld : kReused | kHeld, out);
        const u8 alone = !ruled && media_.size() == 1 ? kMedium | kTier : kMedium;
        for (u32 m : media_) emit(f, m, agreed(ix, w, all, m), alone, out);
        if (!ruled) return;
        std::sort(media_.begin(), media_.end(), [&](u32 a, u32 b) {
            return std::pair(ix.registry().media().tier(a), a) < std::pair(ix.registry().media().tier(b), b);
        });
        u32 reach = 0;
        for (u32 m : media_) {
            const u32 to = beyond(ix, w, m, reach, end);
            if (to > reach) emit(f, m, to, kTier, out);
            reach = to;
        }
        emit(f, kNone, f.flags & kOdd ? reused(ix, w, f, end, most) : reach, kReused, out);
    }

    // ---- reuse by the engine ----------------------------------------------------------------------------------------

    // The prefix that the engine's own pool holds, continued by the blocks of each further medium.
    u32 reused(const Index& ix, const Worker& w, const Face& f, u32 end, u32 most) {
        const u32 cut = f.flags & kCutsLast ? std::min(end, most) : end;
        const bool windows =
            std::any_of(w.groups.begin(), w.groups.end(), [](const Group& g) { return g.kind != Attention::full; });
        const bool drops = f.flags & (kDropsLast | kDropsEach);
        // Engines look up groups in the order of their numbers, while events introduce them in any order.
        if (drops) {
            order_.resize(w.groups.size());
            std::iota(order_.begin(), order_.end(), 0);
            std::sort(order_.begin(), order_.end(), [&](u32 a, u32 b) { return w.groups[a].id < w.groups[b].id; });
        }
        u32 length = 0;
        for (u32 m : media_) {
            if (m == 0) {
                length = drops ? dropped(ix, w, end, cut) : agreed(ix, w, cut, 0, true);
                continue;
            }
            // Connectors leave out the last token only if a window needs it, and drop the same blocks as the engine.
            u32 to = beyond(ix, w, m, length, windows ? cut : end);
            if (drops && to > length) to -= std::min(to - length, in_medium(ix, w, order_[0], m).factor);
            length = to;
        }
        return length;
    }
    // A group with the block size that it has in this medium. The chunks of a connector are larger than its engine's
    // blocks, and each medium is reused in its own size. If no engine's rules apply, the largest size counts
    // everywhere.
    Group in_medium(const Index& ix, const Worker& w, u32 g, u32 medium) const {
        Group group = g < w.groups.size() ? w.groups[g] : Group();
        if (!per_medium_) return group;
        u32 factor = 0;
        for (u32 h : w.holders) {
            const Holder& holder = ix.registry().holder(h);
            if (holder.group != g || (medium != kNone && holder.medium != medium)) continue;
            factor = !factor           ? holder.factor
                     : medium == kNone ? std::min(factor, holder.factor)
                                       : std::max(factor, holder.factor);
        }
        if (factor) group.factor = factor;
        return group;
    }
    // How far a medium reaches if it is read from block `from` on.
    u32 beyond(const Index& ix, const Worker& w, u32 medium, u32 from, u32 length) {
        if (medium == 0) return agreed(ix, w, length, 0, true);
        if (from >= length) return from;
        if (from) {
            const std::size_t i = piece_of(from);
            if (own_[i].start < from)
                own_.insert(own_.begin() + static_cast<std::ptrdiff_t>(i) + 1, {from, own_[i].set});
        }
        base_ = from;
        const u32 to = agreed(ix, w, length, medium, true);
        base_ = 0;
        return std::max(from, to);
    }
    // vLLM's own look-up (HybridKVCacheCoordinator of 0.33) if a draft model makes groups drop the block that they
    // match last. Each such group looks one block further than the others have come, once for every length that is
    // tried.
    u32 dropped(const Index& ix, const Worker& w, u32 end, u32 cut) {
        const Pod& pod = ix.registry().pod_at(w.pod);
        const u32 n = static_cast<u32>(w.groups.size());
        if (n == 1) {
            const u32 run = agreed(ix, w, cut, 0, true);
            return run - std::min(run, in_medium(ix, w, 0, 0).factor);
        }
        // Groups of one kind are looked up together, and full attention comes first.
        tries_.clear();
        u32 align = 1, kinds = 0;
        for (int full = 1; full >= 0; --full) {
            for (u32 i = 0; i < n; ++i) {
                const Group group = in_medium(ix, w, order_[i], 0);
                if ((group.kind == Attention::full) != full) continue;
                align = align / std::gcd(align, group.factor) * group.factor;
                Try made{order_[i], false, false, kNone};
                bool first = true;
                for (u32 o = 0; o < n; ++o) {
                    const Group other = in_medium(ix, w, order_[o], 0);
                    if (other.kind != group.kind || other.window != group.window || other.factor != group.factor)
                        continue;
                    made.drops |= pod.drops(other);
                    first &= o >= i;
                }
                kinds += first;
                tries_.push_back(made);
            }
        }
        const bool once = kinds == 2 && w.groups[tries_[0].group].kind == Attention::full;
        for (u32 hit = cut;;) {
            u32 at = hit;
            for (Try& t : tries_) {
                const Group group = in_medium(ix, w, t.group, 0);
                if (group.kind == Attention::full && t.found != kNone) {
                    at = std::min(at, t.found);
                    continue;
                }
                const bool drop = t.drops && !t.dropped;
                const u32 now = looked_up(ix, w, t.group, drop ? std::min(at + group.factor, end) : at, drop, align);
                if (drop) {
                    t.dropped = true;
                } else if (now < at) {
                    for (Try& o : tries_) o.dropped = false;
                }
                at = t.found = now;
            }
            if (at >= hit) return hit;
            hit = at;
            if (once) return hit;
        }
    }
    u32 looked_up(const Index& ix, const Worker& w, u32 g, u32 length, bool drop, u32 align) {
        const Group group = in_medium(ix, w, g, 0);
        held_.resize(own_.size());
        for (std::size_t i = 0; i < own_.size(); ++i) held_[i] = holds(ix, w, g, 0, own_[i].set);
        if (group.kind == Attention::full || group.window == 0 || !drop) {
            length -= length % group.factor;
            if (group.kind != Attention::full) length -= length % align;
            for (;;) {
                u32 now = longest(ix, w, group, length);
                now -= now % group.factor;
                if (group.kind == Attention::full) {
                    if (drop) now -= std::min(now, group.factor);
                    return now - now % align;
                }
                now -= now % align;
                if (now == length) return now;
                length = now;
            }
        }
        // The window, and behind it the block that is dropped.
        const u32 need = window_blocks(ix, group) + group.factor;
        for (u32 at = length;;) {
            if (at < group.factor) return 0;
            u32 left = at - group.factor;
            left -= left % align;
            if (left == 0) return 0;
            at = left + group.factor;
            if (const u32 held = back_to_held(at); held < at) {
                at = held;
                continue;
            }
            const u32 start = run_start(at);
            if (at - start >= need) return left;
            if (start == 0) {
                // A beginning that is shorter than the window. vLLM aligns it once more before it drops a block.
                at -= at % align;
                at -= std::min(at, group.factor);
                return at - at % align;
            }
            at = start;
        }
    }
    // The blocks before a length that a sliding window needs. vLLM looks for cached blocks from the right and counts
    // them, so a window of one token still needs one block.
    static u32 window_blocks(const Index& ix, const Group& group) {
        const u64 own = static_cast<u64>(ix.block_size()) * group.factor;
        return static_cast<u32>(std::max<u64>(1, (group.window - 1 + own - 1) / own) * group.factor);
    }

    // ---- the length that a worker's groups agree on -----------------------------------------------------------------

    // `every`: groups without a block in this medium object, too.
    u32 agreed(const Index& ix, const Worker& w, u32 length, u32 medium, bool every = false) {
        const u32 groups = std::max<u32>(1, static_cast<u32>(w.groups.size()));
        // A speculative entry has the medium GPU and no group. If it stands alone, the rule of any group applies.
        const bool only_guess = std::none_of(w.holders.begin(), w.holders.end(), [&](u32 h) {
            return medium == kNone || ix.registry().holder(h).medium == medium;
        });
        for (bool changed = true; changed && length;) {
            bool last_held = false;
            changed = false;
            for (u32 g = 0; g < groups; ++g) {
                bool seen = medium == kNone || only_guess || every;
                for (u32 h : w.holders)
                    seen |= ix.registry().holder(h).medium == medium && ix.registry().holder(h).group == g;
                if (!seen) continue;
                const u32 now = fit(ix, w, g, medium, length);
                changed |= now != length;
                length = now;
                last_held |= g >= w.groups.size() || w.groups[g].kind != Attention::chunked;
            }
            // A rule that needs no block at all (chunked attention at the end of a chunk) must not count the blocks of
            // other pods.
            if (last_held) continue;
            const u32 now = back_to_some(ix, w, medium, length);
            changed |= now != length;
            length = now;
        }
        return length;
    }
    // The largest length up to `length` whose last block the worker holds in any of its groups.
    u32 back_to_some(const Index& ix, const Worker& w, u32 medium, u32 length) {
        held_.resize(own_.size());
        for (std::size_t i = 0; i < own_.size(); ++i) {
            held_[i] = own_[i].start < base_ || holds(ix, w, kNone, medium, own_[i].set);
        }
        return back_to_held(length);
    }
    // group kNone: any group.
    bool holds(const Index& ix, const Worker& w, u32 group, u32 medium, u32 set) const {
        if (w.guess != kNone && (medium == kNone || medium == 0) && ix.sets().has(set, w.guess)) return true;
        for (u32 h : w.holders) {
            const Holder& holder = ix.registry().holder(h);
            if ((group == kNone || holder.group == group) && (medium == kNone || holder.medium == medium) &&
                ix.sets().has(set, h))
                return true;
        }
        return false;
    }
    // The longest prefix of at most `length` blocks that this group can use.
    u32 fit(const Index& ix, const Worker& w, u32 g, u32 medium, u32 length) {
        const Group group = in_medium(ix, w, g, medium);
        held_.resize(own_.size());
        for (std::size_t i = 0; i < own_.size(); ++i)
            held_[i] = own_[i].start < base_ || holds(ix, w, g, medium, own_[i].set);
        for (;;) {
            length -= length % group.factor;
            if (length == 0) return 0;
            const u32 now = longest(ix, w, group, length);
            if (now == length) return length;
            length = now;
        }
    }
    u32 longest(const Index& ix, const Worker& w, const Group& group, u32 length) const {
        const u64 block = ix.block_size();
        const u32 chunk = ix.registry().pod_at(w.pod).chunk_tokens;
        u64 from = 0;
        switch (group.kind) {
            case Attention::mamba: return back_to_held(length);
            case Attention::sliding: {
                if (group.window == 0) break;
                const u32 need = window_blocks(ix, group);
                for (;;) {
                    length = back_to_held(length);
                    const u32 start = run_start(length);
                    if (length == 0 || start == 0 || length - start >= need) return length;
                    length = start;
                }
            }
            case Attention::chunked:
                if (chunk) from = length * block / chunk * chunk / block;
                break;
            case Attention::full: break;
        }
        return first_hole(static_cast<u32>(from), length);
    }
    u32 piece_of(u32 b) const {
        u32 i = static_cast<u32>(own_.size()) - 1;
        while (own_[i].start > b) --i;
        return i;
    }
    u32 first_hole(u32 from, u32 length) const {
        for (u32 i = 0; i < own_.size() && own_[i].start < length; ++i) {
            const u32 end = i + 1 < own_.size() ? std::min(length, own_[i + 1].start) : length;
            if (end > from && !held_[i]) return std::max(from, own_[i].start);
        }
        return length;
    }
    // The largest length up to `length` whose last block is held, or 0.
    u32 back_to_held(u32 length) const {
        while (length && !held_[piece_of(length - 1)]) length = own_[piece_of(length - 1)].start;
        return length;
    }
    // The start of the held run that ends at `length`.
    u32 run_start(u32 length) const {
        if (!length) return 0;
        u32 i = piece_of(length - 1);
        while (i > 0 && held_[i - 1]) --i;
        return own_[i].start;
    }

    std::vector<u64> alive_, with_guesses_;
    std::vector<Ended> ended_;
    std::vector<Piece> pieces_;
    std::vector<Piece> own_;  // the pieces that change something for the current worker
    std::vector<Trail> trails_;
    std::vector<u32> trail_of_;  // by worker; valid only if the trail belongs to the worker
    std::vector<Mark> marks_;
    bool hybrids_ = false,
         rootless_ = false;  // whether the model has workers with several groups, and such that go on after a hole
    u32 following_ = 0;      // workers with several groups or media whose prefix goes on
    std::vector<const Trail*> mixed_;
    std::vector<Odd> odd_;
    std::vector<u32> media_;
    std::vector<Try> tries_;
    std::vector<u32> order_;  // of a worker's groups, by number
    bool per_medium_ = false;
    u32 base_ = 0;  // blocks before this count as held
    std::vector<u8> held_;
};

}  // namespace kvindex
