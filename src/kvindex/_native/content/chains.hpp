// Chains: content stored once. A chain is a run of blocks, each the child of the one before. It hangs below a block of
// its parent chain and forks only where content does. The holders of its blocks are kept as runs over interned sets.
#pragma once

#include <string>

#include "base/pool.hpp"
#include "content/generations.hpp"
#include "content/holder_sets.hpp"

namespace kvindex {

inline constexpr u32 kPageBlocks = 8;
inline constexpr u32 kPageShift = 3;
inline constexpr u32 kMostChains = 1u << 30;  // ChainTable

// Eight blocks: one cache line of prefix hashes, which is all that a match reads, and one of the engine hashes that
// name them. Small pages instead of one array per chain: appending never copies, a block's reference never changes
// while its chain grows, and the mean loss at both ends of a chain is one page.
struct alignas(64) Page {
    u64 prefix[kPageBlocks];
    u64 name[kPageBlocks];
};

struct PageHome {
    u32 chain;  // of a shared page: its number among the shared pages
    u32 index;  // depth / kPageBlocks of the page's first slot; kNone: the page is shared
};

// A page whose slots belong to different chains, of one block each.
struct SharedPage {
    u32 chains[kPageBlocks];
    u32 page;
    u32 open_at;  // its place among the shared pages with a free slot
    u32 free;     // a bit for each slot
};

struct Run {
    u32 start;  // depth of its first block; it ends where the next run starts, the last one where the chain ends
    u32 set;
};

// The engine hashes of one worker in one chain, where they differ from the ones in the pages.
struct OwnNames {
    using Relocatable = void;
    u32 worker;
    u32 start;  // depth of ids[0]
    u32 used;   // entries that are not kNoName
    Buf<u64> ids;
};

// "No name" in a page or in OwnNames, and "this worker knows the block, but has no name for it". Both are legal engine
// hashes too, so a reader looks such a name up in the table of names before using it.
inline constexpr u64 kNoName = 0x9B1D5A3C77E0F24Bull;
inline constexpr u64 kNameless = 0x64E2A5C3881F0DB4ull;

// The fields of a chain that hangs below another one, or for which a worker has names of its own. Most prompts of one
// block need none of these fields.
struct Branch {
    u32 before = kNone, after = kNone;  // its neighbours among the parent's children
    u32 kids = 0;                       // of a first child: the number of the parent's children
    Buf<OwnNames> own;                  // ordered by worker
};

// One cache line, which is all that a match reads of a chain.
struct Chain {
    u32 parent = kNone;
    u32 base = 0;  // depth of the first block; the parent's block is at base - 1
    u32 len = 0;
    u32 first_kid = kNone;
    Buf<u32, 2> pages;
    Buf<Run, 1> runs;
    Age age;
    u32 space : 27, named : 1;  // `named`: some worker has names of its own here
    u32 shared : 1;             // its only block lies in a shared page
    u32 shift : 3;              // by how many slots its block lies behind the slot of its depth: 0 unless it is shared
    u16 lookahead = 0;          // tokens behind each block that are in its hash; the same in all chains below
    u16 row = 0;                // how many of the first pages have consecutive numbers, so that no look-up is needed
    u32 branch = kNone;

    Chain() : space(0), named(0), shared(0), shift(0) {}
    u32 end() const { return base + len; }
    u32 slot(u32 depth) const { return (depth + shift) & (kPageBlocks - 1); }
};
static_assert(sizeof(Chain) == 64, "a chain is a cache line");

struct Pos {
    u32 chain;
    u32 depth;
    bool operator==(const Pos& o) const { return chain == o.chain && depth == o.depth; }
    bool operator!=(const Pos& o) const { return !(*this == o); }
};

class Chains {
public:
    Chains(Memory& m, SetPool& sets)
        : m_(m), sets_(sets), chains_(m), branches_(m), pages_(m), homes_(m), shared_(m), ages_(m, chains_) {}
    ~Chains() { clear(); }
    Chains(const Chains&) = delete;
    Chains& operator=(const Chains&) = delete;

    Chain& operator[](u32 c) { return chains_[c]; }
    const Chain& operator[](u32 c) const { return chains_[c]; }
    bool alive(u32 c) const { return chains_.alive(c); }
    u32 count() const { return chains_.size(); }
    u64 blocks() const { return blocks_; }
    Ages<Pool<Chain>>& ages() { return ages_; }
    const Ages<Pool<Chain>>& ages() const { return ages_; }
    // An upper bound of the bytes that this many further blocks in this many further chains take, without the reserve
    // for a chain's length.
    std::size_t growth(u32 blocks, u32 chains) const {
        const u32 pages = blocks / kPageBlocks + 2;
        return pages_.growth(pages) + homes_.growth(pages) + chains_.growth(chains) + branches_.growth(chains) +
               shared_.growth(chains) + ages_.growth(chains);
    }
    template <class F>
    void each(F&& f) const {
        chains_.each(f);
    }

    // A block's reference: 32 bits that stay the same as long as the block exists.
    u32 ref(const Chain& c, u32 depth) const {
        return c.pages[(depth >> kPageShift) - (c.base >> kPageShift)] * kPageBlocks + c.slot(depth);
    }
    u32 ref(Pos p) const { return ref(chains_[p.chain], p.depth); }
    // Whether there is a block with this reference.
    bool is_block(u32 ref) const {
        if (!homes_.alive(ref >> kPageShift)) return false;
        const PageHome& h = homes_[ref >> kPageShift];
        if (h.index == kNone && shared_[h.chain].free >> (ref & (kPageBlocks - 1)) & 1) return false;
        const Pos p = pos(ref);
        return p.depth >= chains_[p.chain].base && p.depth < chains_[p.chain].end();
    }
    Pos pos(u32 ref) const {
        const PageHome& h = homes_[ref >> kPageShift];
        if (h.index == kNone) {
            const u32 chain = shared_[h.chain].chains[ref & (kPageBlocks - 1)];
            return {chain, chains_[chain].base};
        }
        return {h.chain, h.index * kPageBlocks + (ref & (kPageBlocks - 1))};
    }
    u64& name(u32 ref) { return pages_[ref >> kPageShift].name[ref & (kPageBlocks - 1)]; }
    u64 name(u32 ref) const { return pages_[ref >> kPageShift].name[ref & (kPageBlocks - 1)]; }
    u64 prefix(u32 ref) const { return pages_[ref >> kPageShift].prefix[ref & (kPageBlocks - 1)]; }
    u64 prefix(Pos p) const { return prefix(ref(p)); }
    u64 head(u32 c) const { return prefix(ref(chains_[c], chains_[c].base)); }
    u32 first_page(u32 c) const { return chains_[c].pages[0]; }
    // The page with the chain's block at `depth`.
    const Page& page(const Chain& c, u32 depth) const {
        return pages_[c.pages[(depth >> kPageShift) - (c.base >> kPageShift)]];
    }

    // The number of page `i` of a chain that begins with page `first`, and the prefix hashes in it.
    static u32 page_number(const Chain& c, u32 first, u32 i) { return i < c.row ? first + i : c.pages[i]; }
    const u64* prefixes(u32 page) const { return pages_[page].prefix; }

    // Prefetches a chain and its first `pages` pages before their numbers are known. The pages are mostly neighbours,
    // since they were taken for one event.
    KVINDEX_INLINE void prefetch(const HeadSlot& head, u32 pages) const {
        __builtin_prefetch(&chains_[head.chain()]);
        const Page* page = &pages_[head.page];
        pages = pages_.together(head.page, pages);
        for (u32 i = 0; i < pages; ++i) __builtin_prefetch(page[i].prefix);
    }
    // Prefetches a block's page and its holders. When those have arrived, prefetch_chain() prefetches the chain.
    KVINDEX_INLINE void prefetch_block(u32 ref) const {
        const Page& page = pages_[ref >> kPageShift];
        __builtin_prefetch(page.prefix);
        __builtin_prefetch(page.name);
        __builtin_prefetch(&homes_[ref >> kPageShift]);
    }
    KVINDEX_INLINE void prefetch_chain(u32 ref) const {
        // The block may have been removed since its page was prefetched.
        if (!homes_.alive(ref >> kPageShift)) return;
        const PageHome& home = homes_[ref >> kPageShift];
        if (home.index == kNone) return;
        __builtin_prefetch(&chains_[home.chain]);
    }
    // Prefetches pages of prefix hashes ahead of their use.
    KVINDEX_INLINE void prefetch(const Chain& c, u32 first, u32 from, u32 to) const {
        for (u32 i = from; i < to; ++i) __builtin_prefetch(prefixes(page_number(c, first, i)));
    }

    u32 create(u32 space, u32 parent, u32 base, u32 lookahead) {
        const u32 id = chains_.take();
        ages_.add(id);
        if (id >= kMostChains) throw std::bad_alloc();
        Chain& c = chains_[id];
        c.space = space;
        c.base = base;
        c.lookahead = static_cast<u16>(lookahead);
        if (parent == kNone) return id;
        link(id, parent);
        touch(parent);
        return id;
    }
    // An event that stores to the chain also needs all the chains above it.
    void touch(u32 id) {
        if (!ages_.on()) return;
        for (; id != kNone && !ages_.fresh(id); id = chains_[id].parent) ages_.renew(id);
    }
    // Appends nameless blocks that `set` holds to a chain that is not shared. `all`: how many blocks the chain will
    // have. A page of its own took 128 bytes for a prompt of one block.
    void append(u32 id, const u64* prefix, u32 n, u32 set, u32 all) {
        Chain& c = chains_[id];
        assert(n && c.len + n <= all && !c.shared);
        if (all == 1) {
            share(id);
            Page& page = pages_[c.pages[0]];
            page.prefix[c.slot(c.base)] = *prefix;
            page.name[c.slot(c.base)] = kNoName;
            c.runs.push(m_, {c.base, set});
            sets_.ref(set);
            c.len = 1;
            ++blocks_;
            return;
        }
        const u32 first = c.end(), last = first + n;
        const u32 need = ((last - 1) >> kPageShift) - (c.base >> kPageShift) + 1;
        c.pages.reserve(m_, need);
        while (c.pages.size() < need) {
            const u32 p = pages_.take();
            if (const u32 h = homes_.take(); h != p)
                __builtin_trap();  // both pools give the same ids for the same calls
            homes_[p] = {id, (c.base >> kPageShift) + c.pages.size()};
            add_page(c, p);
        }
        for (u32 d = first; d < last;) {
            Page& page = pages_[c.pages[(d >> kPageShift) - (c.base >> kPageShift)]];
            for (u32 s = d & (kPageBlocks - 1); s < kPageBlocks && d < last; ++s, ++d) {
                page.prefix[s] = *prefix++;
                page.name[s] = kNoName;
            }
        }
        if (c.runs.empty() || c.runs.back().set != set) {
            c.runs.push(m_, {first, set});
            sets_.ref(set);
        }
        c.len += n;
        blocks_ += n;
    }
    // Removes the blocks from depth `end` on. The caller has removed their names.
    void cut(u32 id, u32 end) {
        Chain& c = chains_[id];
        assert(end >= c.base && end <= c.end());
        if (c.shared && end == c.base) leave(c);
        blocks_ -= c.end() - end;
        const u32 keep = end == c.base ? 0 : ((end - 1) >> kPageShift) - (c.base >> kPageShift) + 1;
        while (c.pages.size() > keep) {
            pages_.give(c.pages.back());
            homes_.give(c.pages.back());
            c.pages.pop();
        }
        while (!c.runs.empty() && c.runs.back().start >= end) {
            sets_.unref(c.runs.back().set);
            c.runs.pop();
        }
        c.len = end - c.base;
        c.pages.trim(m_);
        c.row = static_cast<u16>(std::min<u32>(c.row, keep));
        c.runs.trim(m_);
    }
    void destroy(u32 id) {
        Chain& c = chains_[id];
        if (c.len) cut(id, c.base);
        if (c.parent != kNone) unlink(id);
        release(c);
        if (c.branch != kNone) branches_.give(c.branch);
        ages_.drop(id);
        chains_.give(id);
    }

    u32 run_at(const Chain& c, u32 depth) const {
        u32 lo = 0, hi = c.runs.size();
        while (hi - lo > 1) {
            const u32 mid = (lo + hi) / 2;
            if (c.runs[mid].start <= depth) {
                lo = mid;
            } else {
                hi = mid;
            }
        }
        return lo;
    }
    u32 set_at(const Chain& c, u32 depth) const { return c.runs[run_at(c, depth)].set; }
    u32 run_end(const Chain& c, u32 run) const { return run + 1 < c.runs.size() ? c.runs[run + 1].start : c.end(); }

    // Replaces the set of every block in [from, to) by f(set, blocks), and joins runs that have become equal.
    template <class F>
    void change(u32 id, u32 from, u32 to, F&& f) {
        Chain& c = chains_[id];
        assert(from >= c.base && from < to && to <= c.end());
        const u32 lo = run_at(c, from);
        u32 hi = lo;
        fresh_.truncate(0);
        auto put = [&](u32 start, u32 set) {
            if (fresh_.empty() ? lo > 0 && c.runs[lo - 1].set == set : fresh_.back().set == set) return;
            fresh_.push(m_, {start, set});
            sets_.ref(set);
        };
        if (c.runs[lo].start < from) put(c.runs[lo].start, c.runs[lo].set);
        for (;; ++hi) {
            const u32 a = c.runs[hi].start > from ? c.runs[hi].start : from;
            const u32 end = run_end(c, hi);
            put(a, f(c.runs[hi].set, (end < to ? end : to) - a));
            if (end >= to) {
                if (end > to) put(to, c.runs[hi].set);
                break;
            }
        }
        u32 stop = hi + 1;
        const u32 last = fresh_.empty() ? (lo ? c.runs[lo - 1].set : kNone) : fresh_.back().set;
        if (stop < c.runs.size() && c.runs[stop].set == last) ++stop;
        for (u32 i = lo; i < stop; ++i) sets_.unref(c.runs[i].set);
        c.runs.splice(m_, lo, stop - lo, fresh_.size());
        if (!fresh_.empty()) std::memcpy(c.runs.data() + lo, fresh_.data(), sizeof(Run) * fresh_.size());
        if (stop - lo > fresh_.size()) c.runs.trim(m_);
    }

    // Gives a chain a page of its own, so that it can grow. The reference of its block changes.
    void unshare(u32 id) {
        Chain& c = chains_[id];
        const u32 page = pages_.take();
        if (const u32 h = homes_.take(); h != page) __builtin_trap();
        homes_[page] = {id, c.base >> kPageShift};
        const u32 from = ref(c, c.base), to = c.base & (kPageBlocks - 1);
        pages_[page].prefix[to] = prefix(from);
        pages_[page].name[to] = name(from);
        leave(c);
        add_page(c, page);
    }
    // Moves all of `kid`, which starts where `id` ends, to the end of `id`. moved(from_ref, to_ref) is called for every
    // block whose reference changes: at most those of one page. The caller has moved names, kids and own names.
    template <class F>
    void join(u32 id, u32 kid, F&& moved) {
        Chain& c = chains_[id];
        Chain& k = chains_[kid];
        assert(k.base == c.end() && !c.shared && !k.shared && !k.named && k.first_kid == kNone);
        u32 i = 0;
        if (k.base & (kPageBlocks - 1)) {
            const u32 from = k.pages[0], to = c.pages.back();
            const u32 stop =
                k.end() < ((k.base | (kPageBlocks - 1)) + 1) ? ((k.end() - 1) & (kPageBlocks - 1)) + 1 : kPageBlocks;
            for (u32 s = k.base & (kPageBlocks - 1); s < stop; ++s) {
                pages_[to].prefix[s] = pages_[from].prefix[s];
                pages_[to].name[s] = pages_[from].name[s];
                moved(from * kPageBlocks + s, to * kPageBlocks + s);
            }
            pages_.give(from);
            homes_.give(from);
            i = 1;
        }
        for (; i < k.pages.size(); ++i) {
            homes_[k.pages[i]].chain = id;
            add_page(c, k.pages[i]);
        }
        u32 r = 0;
        if (c.runs.back().set == k.runs[0].set) {
            sets_.unref(k.runs[0].set);
            r = 1;
        }
        for (; r < k.runs.size(); ++r) c.runs.push(m_, k.runs[r]);
        c.len += k.len;
        k.pages.truncate(0);
        k.row = 0;
        k.runs.truncate(0);
        k.len = 0;
    }
    // The next child of the same parent.
    u32 next_kid(u32 id) const { return branches_[chains_[id].branch].after; }
    u32 kids(const Chain& c) const { return c.first_kid == kNone ? 0 : branch_of(c.first_kid).kids; }
    void link(u32 id, u32 parent) {
        Chain& c = chains_[id];
        Chain& p = chains_[parent];
        if (c.branch == kNone) c.branch = branches_.take();
        c.parent = parent;
        Branch& b = branches_[c.branch];
        b.kids = kids(p) + 1;
        b.before = kNone;
        b.after = p.first_kid;
        if (b.after != kNone) branch_of(b.after).before = id;
        p.first_kid = id;
    }
    void unlink(u32 id) {
        Chain& p = chains_[chains_[id].parent];
        const Branch& b = branch_of(id);
        const u32 left = kids(p) - 1;
        if (b.before != kNone) {
            branch_of(b.before).after = b.after;
        } else {
            p.first_kid = b.after;
        }
        if (b.after != kNone) branch_of(b.after).before = b.before;
        if (left) branch_of(p.first_kid).kids = left;
    }

    // Own names, ordered by worker.
    const Buf<OwnNames>& own(const Chain& c) const { return c.named ? branches_[c.branch].own : kNoOwnNames; }
    // Returns kNoName where the worker uses the page's name.
    u64 own_name(const Chain& c, u32 worker, u32 depth) const {
        if (!c.named) return kNoName;
        const Buf<OwnNames>& own = branches_[c.branch].own;
        const u32 i = own_at(own, worker);
        if (i == own.size() || own[i].worker != worker) return kNoName;
        const OwnNames& o = own[i];
        return depth >= o.start && depth - o.start < o.ids.size() ? o.ids[depth - o.start] : kNoName;
    }
    void set_own_name(u32 id, u32 worker, u32 depth, u64 value) {
        if (value == kNoName && !chains_[id].named) return;
        Buf<OwnNames>& own = named(id);
        const u32 i = own_at(own, worker);
        if (i == own.size() || own[i].worker != worker) {
            if (value == kNoName) return;
            own.reserve(m_, own.size() + 1);
            own.insert(i, OwnNames{worker, depth, 0, {}});
        }
        OwnNames& o = own[i];
        if (depth < o.start) {
            const u32 more = o.start - depth;
            o.ids.splice(m_, 0, 0, more);
            for (u32 j = 0; j < more; ++j) o.ids[j] = kNoName;
            o.start = depth;
        }
        while (depth - o.start >= o.ids.size()) o.ids.push(m_, kNoName);
        u64& slot = o.ids[depth - o.start];
        if (slot == kNoName) ++o.used;
        slot = value;
        if (value != kNoName) return;
        if (--o.used == 0) return drop_own_at(id, i);
        while (o.ids.back() == kNoName) o.ids.pop();
        o.ids.trim(m_);
    }
    // Moves the own names of `kid`, which is about to become the end of `id`.
    void move_own(u32 id, u32 kid) {
        Chain& k = chains_[kid];
        if (!k.named) return;
        Buf<OwnNames>& own = named(id);
        for (OwnNames& o : branches_[k.branch].own) {
            const u32 i = own_at(own, o.worker);
            if (i == own.size() || own[i].worker != o.worker) {
                // First, so that nothing is lost if there is no memory for the entry.
                own.reserve(m_, own.size() + 1);
                own.insert(i, std::move(o));
                continue;
            }
            OwnNames& to = own[i];
            while (to.start + to.ids.size() < o.start) to.ids.push(m_, kNoName);
            const u32 at = to.ids.size();
            to.ids.resize(m_, at + o.ids.size());
            std::memcpy(to.ids.data() + at, o.ids.data(), sizeof(u64) * o.ids.size());
            to.used += o.used;
            o.ids.release(m_);
        }
        branches_[k.branch].own.truncate(0);
        k.named = 0;
    }
    bool has_own(const Chain& c, u32 worker) const {
        if (!c.named) return false;
        const Buf<OwnNames>& own = branches_[c.branch].own;
        const u32 i = own_at(own, worker);
        return i < own.size() && own[i].worker == worker;
    }
    void drop_own(u32 id, u32 worker) {
        if (has_own(chains_[id], worker)) drop_own_at(id, own_at(branch_of(id).own, worker));
    }
    // The own names of a chain that has some or is about to have some.
    Buf<OwnNames>& named(u32 id) {
        Chain& c = chains_[id];
        if (c.branch == kNone) c.branch = branches_.take();
        c.named = 1;
        return branches_[c.branch].own;
    }

    // Drops everything, in any state.
    void clear() {
        chains_.each([&](u32 c) { release(chains_[c]); });
        chains_.clear();
        branches_.clear();
        pages_.clear();
        homes_.clear();
        shared_.clear();
        open_.release(m_);
        ages_.clear();
        fresh_.release(m_);
        blocks_ = 0;
    }
    // Returns memory that only changes need.
    void shrink() {
        fresh_.release(m_);
        chains_.shrink();
        branches_.shrink();
        ages_.shrink();
        pages_.shrink();
        homes_.shrink();
        shared_.shrink();
        open_.release(m_);
    }

    // The first broken invariant, or an empty string.
    std::string check() const;

private:
    static inline const Buf<OwnNames> kNoOwnNames{};

    std::string check_chain(u32 id) const;
    // A slot of a shared page for a chain's first block.
    void share(u32 id) {
        Chain& c = chains_[id];
        open_.reserve(m_, open_.size() + 1);
        if (open_.empty()) {
            const u32 page = pages_.take();
            if (const u32 h = homes_.take(); h != page) __builtin_trap();
            const u32 s = shared_.take();
            homes_[page] = {s, kNone};
            shared_[s].page = page;
            shared_[s].free = (1u << kPageBlocks) - 1;
            shared_[s].open_at = 0;
            open_.push(m_, s);
        }
        SharedPage& s = shared_[open_.back()];
        const u32 slot = static_cast<u32>(__builtin_ctz(s.free));
        add_page(c, s.page);
        s.free &= s.free - 1;
        if (!s.free) open_.pop();
        s.chains[slot] = id;
        c.shared = 1;
        c.shift = (slot - c.base) & (kPageBlocks - 1);
    }
    void leave(Chain& c) {
        const u32 page = c.pages[0], slot = c.slot(c.base), at = homes_[page].chain;
        SharedPage& s = shared_[at];
        if (!s.free) {
            s.open_at = open_.size();
            open_.push(m_, at);
        }
        s.free |= 1u << slot;
        c.pages.truncate(0);
        c.row = c.shared = c.shift = 0;
        if (s.free != (1u << kPageBlocks) - 1) return;
        shared_[open_.back()].open_at = s.open_at;
        open_[s.open_at] = open_.back();
        open_.pop();
        pages_.give(page);
        homes_.give(page);
        shared_.give(at);
    }
    void add_page(Chain& c, u32 page) {
        const u32 at = c.pages.size();
        if (c.row == at && at < 0xFFFF && (at == 0 || page == c.pages[0] + at)) ++c.row;
        c.pages.push(m_, page);
    }
    Branch& branch_of(u32 id) { return branches_[chains_[id].branch]; }
    const Branch& branch_of(u32 id) const { return branches_[chains_[id].branch]; }
    void drop_own_at(u32 id, u32 i) {
        Chain& c = chains_[id];
        Buf<OwnNames>& own = branches_[c.branch].own;
        own[i].ids.release(m_);
        own.splice(m_, i, 1, 0);
        own.trim(m_);
        if (!own.empty()) return;
        c.named = 0;
        if (c.parent == kNone) branches_.give(std::exchange(c.branch, kNone));
    }
    static u32 own_at(const Buf<OwnNames>& own, u32 worker) {
        u32 lo = 0, hi = own.size();
        while (lo < hi) {
            const u32 mid = (lo + hi) / 2;
            if (own[mid].worker < worker) {
                lo = mid + 1;
            } else {
                hi = mid;
            }
        }
        return lo;
    }
    void release(Chain& c) {
        if (c.branch != kNone) {
            Buf<OwnNames>& own = branches_[c.branch].own;
            for (OwnNames& o : own) o.ids.release(m_);
            own.release(m_);
        }
        c.pages.release(m_);
        c.runs.release(m_);
    }

    Memory& m_;
    SetPool& sets_;
    Pool<Chain> chains_;
    Pool<Branch> branches_;
    Pool<Page> pages_;
    Pool<PageHome> homes_;
    Pool<SharedPage> shared_;
    Buf<u32> open_;  // shared pages with a free slot
    Ages<Pool<Chain>> ages_;
    Buf<Run> fresh_;
    u64 blocks_ = 0;
};

}  // namespace kvindex
