// The blocks that each worker knows, with their names and the number of copies.
//
// They are a tree that is closed towards the root: a block is only ever attached below a block that its worker knows by
// name, and a position stays known while any block below it is. So most questions become local. "Does this worker have
// a block below this one" is "does it know a child". In a chain, a worker's blocks are a prefix of the chain. A block
// that no worker knows is the last one of its chain and has no children.
//
// Content is dropped when no worker knows it any more (`trim`), and removed forks leave no trace. Both stop after a
// turn's worth: the rest is `loose` until `tie_up` has done it.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "workers/registry.hpp"

namespace kvindex {

class SectionReader;
class SectionWriter;
struct RestorePlan;
struct SavePlan;

class Presence {
public:
    Presence(Memory& m, Registry& registry, SetPool& sets, Chains& chains)
        : mem_(m), registry_(registry), sets_(sets), chains_(chains) {}
    ~Presence() = default;
    Presence(const Presence&) = delete;
    Presence& operator=(const Presence&) = delete;

    // The chain that begins with this block below `parent`, and its first page. `pages`: how many pages may be needed.
    HeadSlot child(u32 space, Pos parent, u64 prefix, u32 pages) const {
        const HeadTable& heads = registry_.space_at(space).heads;
        const HeadSlot head = heads.find(prefix);
        if (head.chain() == kNone) return head;
        chains_.prefetch(head, pages);
        const auto here = [&](const HeadSlot& slot) {
            const Chain& k = chains_[slot.chain()];
            return k.parent == parent.chain && k.base == parent.depth + 1;
        };
        // The same 64-bit prefix hash in another place is a collision, which is never followed. But the content in this
        // place must be found: a speculative entry is known only by its path, and its blocks would otherwise stay after
        // its end.
        return here(head) ? head : heads.find_among(prefix, here);
    }

    static u64 kid_key(u32 chain, u32 depth) { return (static_cast<u64>(chain) << 32) | depth; }

    bool knows(const Worker& w, u32 set) const {
        const u32 n = std::min<u32>(static_cast<u32>(w.mask.size()), sets_.words(set));
        const u64* words = sets_.data(set);
        for (u32 i = 0; i < n; ++i)
            if (words[i] & w.mask[i]) return true;
        return false;
    }
    // Whether the worker knows a block with this set through any holder but `holder`.
    bool knows_besides(const Worker& w, u32 set, u32 holder) const {
        const u32 n = std::min<u32>(static_cast<u32>(w.mask.size()), sets_.words(set));
        const u64* words = sets_.data(set);
        for (u32 i = 0; i < n; ++i) {
            u64 bits = words[i] & w.mask[i];
            if (holder >> 6 == i) bits &= ~(1ull << (holder & 63));
            if (bits) return true;
        }
        return false;
    }
    bool knows_without(const Worker& w, u32 set, const std::vector<u64>& mask) const {
        const u32 n = std::min<u32>(static_cast<u32>(w.mask.size()), sets_.words(set));
        const u64* words = sets_.data(set);
        for (u32 i = 0; i < n; ++i)
            if (words[i] & w.mask[i] & ~(i < mask.size() ? mask[i] : 0)) return true;
        return false;
    }
    u32 set_at(Pos p) const { return chains_.set_at(chains_[p.chain], p.depth); }
    bool knows_child(const Worker& w, Pos p) const {
        const Chain& c = chains_[p.chain];
        if (p.depth + 1 < c.end() && knows(w, chains_.set_at(c, p.depth + 1))) return true;
        return c.first_kid != kNone && w.kids.get(kid_key(p.chain, p.depth)) != 0;
    }
    bool child_has(const Worker& w, Pos p, u32 holder) const {
        const Chain& c = chains_[p.chain];
        if (p.depth + 1 < c.end() && sets_.has(chains_.set_at(c, p.depth + 1), holder)) return true;
        if (c.first_kid == kNone || !w.kids.get(kid_key(p.chain, p.depth))) return false;
        for (u32 k = c.first_kid; k != kNone; k = chains_.next_kid(k))
            if (chains_[k].base == p.depth + 1 && sets_.has(chains_.set_at(chains_[k], p.depth + 1), holder))
                return true;
        return false;
    }
    Pos before(Pos p) const {
        const Chain& c = chains_[p.chain];
        if (p.depth > c.base) return {p.chain, p.depth - 1};
        return {c.parent, c.base - 1};
    }
    void gain_chain(Worker& w, u32 chain) {
        const Chain& c = chains_[chain];
        w.chains.add(mem_, chain);
        if (c.parent != kNone) w.kids.add(mem_, kid_key(c.parent, c.base - 1));
    }
    void lose_chain(Worker& w, u32 chain) {
        const Chain& c = chains_[chain];
        w.chains.sub(mem_, chain);
        if (c.parent != kNone) w.kids.sub(mem_, kid_key(c.parent, c.base - 1));
    }
    u32 with(u32 set, u32 holder, u32 blocks, u32 less = kNone) {
        if (!sets_.has(set, holder)) registry_.holder(holder).blocks += blocks;
        if (less != kNone && sets_.has(set, less)) registry_.holder(less).blocks -= blocks;
        return sets_.change(set, less, holder);
    }
    u32 without(u32 set, u32 holder, u32 blocks) {
        if (sets_.has(set, holder)) registry_.holder(holder).blocks -= blocks;
        return sets_.change(set, holder, kNone);
    }

    // ---- names ------------------------------------------------------------------------------------------------------

    u64 own_name(u32 worker, Pos p) const { return chains_.own_name(chains_[p.chain], worker, p.depth); }

    // The block that this worker knows under this name, or kNone.
    u32 find(u32 id, u64 name) const {
        const Worker& w = registry_.worker_at(id);
        const u32 own = find_own(id, name);
        return own != kNone ? own : find_not_own(id, name, find_shared(w, name));
    }
    // The block with this name in the pages, for any worker that knows it.
    u32 find_shared(const Worker& w, u64 name) const {
        return registry_.space_at(w.space).names.find(name, [&](u32 ref) { return chains_.name(ref) == name; });
    }
    u32 find_own(u32 id, u64 name) const {
        const Worker& w = registry_.worker_at(id);
        if (!w.own.size()) return kNone;
        return w.own.find(name, [&](u32 ref) { return own_name(id, chains_.pos(ref)) == name; });
    }
    u32 find_not_own(u32 id, u64 name, u32 shared) const {
        const Worker& w = registry_.worker_at(id);
        if (shared != kNone) {
            const Pos p = chains_.pos(shared);
            if (knows(w, set_at(p)) && own_name(id, p) == kNoName) return shared;
        }
        if (!w.second.empty()) {
            const auto it = w.second.find(name);
            if (it != w.second.end()) return it->second;
        }
        return kNone;
    }
    // The name of the worker's copies if bits alone count them. Returns false if there is no such name.
    bool first_name(u32 id, Pos p, u32 ref, u64& out) const {
        const u64 own = own_name(id, p);
        if (own == kNameless) return false;
        out = own == kNoName ? chains_.name(ref) : own;
        return out != kNoName;
    }
    // Gives a block its first name in this worker, which has no name for it yet.
    void give_name(u32 id, Pos p, u32 ref, u64 name) {
        Worker& w = registry_.worker_at(id);
        RefTable& names = registry_.space_at(w.space).names;
        const u64 own = own_name(id, p), shared = chains_.name(ref);
        if (shared == kNoName && names.find(name, [&](u32 r) { return chains_.name(r) == name; }) == kNone) {
            chains_.name(ref) = name;
            names.insert(mem_, name, ref);
        } else if (shared != name) {
            chains_.set_own_name(p.chain, id, p.depth, name);
            w.own.insert(mem_, name, ref);
            return;
        }
        if (own != kNoName) chains_.set_own_name(p.chain, id, p.depth, kNoName);
    }
    void drop_names(u32 id, Pos p, u32 ref) {
        Worker& w = registry_.worker_at(id);
        const u64 own = own_name(id, p);
        if (own != kNoName) {
            if (own != kNameless) w.own.erase(mem_, own, ref);
            chains_.set_own_name(p.chain, id, p.depth, kNoName);
        }
        if (!w.unsure.empty() && own != kNameless) sure_of(w, own == kNoName ? chains_.name(ref) : own);
        if (w.copies.empty()) return;
        const auto it = w.copies.find(ref);
        if (it == w.copies.end()) return;
        for (const Copy& c : it->second)
            if (c.holder == kNone) {
                w.second.erase(c.id);
                sure_of(w, c.id);
            }
        drop_copies(w, it);
    }
    // An emptied map keeps its table, so an empty map is replaced by a new one, which has no table.
    void drop_copies(Worker& w, CountedMap<u32, Copies>::iterator it) {
        w.copies.erase(it);
        if (w.copies.empty()) w.copies = CountedMap<u32, Copies>(Counted<char>(mem_));
        if (w.second.empty() && w.second.bucket_count() > 1) w.second = CountedMap<u64, u32>(Counted<char>(mem_));
    }
    // The worker's holders of an engine block that ends at `p`, including those of a long change.
    template <class F>
    void each_holder(const Worker& w, Pos p, F&& f) const {
        const u32 set = set_at(p);
        for (const std::vector<u32>* list : {&w.holders, &w.hidden})
            for (u32 h : *list)
                if (sets_.has(set, h) && (p.depth + 1) % registry_.holder(h).factor == 0) f(h);
    }
    // The explicit list of a block's copies. It is made from the bits when it is first needed.
    Copies& list_copies(u32 id, Pos p, u32 ref) {
        Worker& w = registry_.worker_at(id);
        const auto it = w.copies.find(ref);
        if (it != w.copies.end()) return it->second;
        Copies& list = w.copies.try_emplace(ref, Counted<Copy>(mem_)).first->second;
        u64 name;
        if (!first_name(id, p, ref, name)) return list;
        each_holder(w, p, [&](u32 h) { list.push_back({name, h, 1}); });
        return list;
    }
    // Returns to bits if they are enough.
    void tidy_copies(u32 id, Pos p, u32 ref) {
        Worker& w = registry_.worker_at(id);
        const auto it = w.copies.find(ref);
        if (it == w.copies.end()) return;
        Copies& list = it->second;
        list.erase(
            std::remove_if(list.begin(), list.end(), [](const Copy& c) { return c.holder != kNone && c.count == 0; }),
            list.end());
        u64 name = 0;
        const bool named = first_name(id, p, ref, name);
        for (const Copy& c : list)
            if (c.holder == kNone || c.count > 1 || !named || c.id != name) return;
        drop_copies(w, it);
    }
    // The name no longer has two meanings.
    void sure_of(Worker& w, u64 name) {
        if (w.unsure.empty() || !w.unsure.erase(name) || !w.unsure.empty()) return;
        w.unsure = CountedMap<u64, u8>(Counted<char>(mem_));
        registry_.judge(w);
    }
    // Calls f(holder, count) for every copy that the worker holds of a block under this name.
    template <class F>
    void each_copy(u32 id, u64 name, u32 ref, F&& f) const {
        const Worker& w = registry_.worker_at(id);
        const auto it = w.copies.find(ref);
        if (it != w.copies.end()) {
            for (const Copy& c : it->second)
                if (c.id == name && c.holder != kNone && c.count) f(c.holder, c.count);
            return;
        }
        const Pos p = chains_.pos(ref);
        u64 first;
        if (!first_name(id, p, ref, first) || first != name) return;
        each_holder(w, p, [&](u32 h) { f(h, 1u); });
    }
    bool held_in(u32 id, u64 name, u32 ref, u32 medium) const {
        bool any = false;
        each_copy(id, name, ref, [&](u32 h, u32) { any |= registry_.holder(h).medium == medium; });
        return any;
    }
    bool held_anywhere(u32 id, u64 name, u32 ref) const {
        bool any = false;
        each_copy(id, name, ref, [&](u32, u32) { any = true; });
        return any;
    }
    // Calls f(name) for each name that the worker has for a block.
    template <class F>
    void each_name(u32 id, Pos p, F&& f) const {
        const Worker& w = registry_.worker_at(id);
        const u32 ref = chains_.ref(p);
        u64 first;
        if (first_name(id, p, ref, first)) f(first, ref);
        if (w.copies.empty()) return;
        const auto it = w.copies.find(ref);
        if (it == w.copies.end()) return;
        for (const Copy& c : it->second)
            if (c.holder == kNone) f(c.id, ref);
    }
    // The worker announces this name for another block. Removes the name and its copies.
    void forget_name(u32 id, u64 name) {
        Worker& w = registry_.worker_at(id);
        const u32 ref = find(id, name);
        if (ref == kNone) return;
        sure_of(w, name);
        const Pos p = chains_.pos(ref);
        Copies& list = list_copies(id, p, ref);
        std::vector<u32> gone;
        for (Copy& c : list) {
            if (c.id != name || c.holder == kNone) continue;
            c.count = 0;
            const u32 h = c.holder;
            if (std::none_of(list.begin(), list.end(), [&](const Copy& o) { return o.holder == h && o.count; }))
                gone.push_back(h);
        }
        u64 first = 0;
        const bool second = !(first_name(id, p, ref, first) && first == name);
        if (second) {
            list.erase(std::remove_if(list.begin(), list.end(), [&](const Copy& c) { return c.id == name; }),
                       list.end());
            w.second.erase(name);
        } else {
            if (own_name(id, p) != kNoName) w.own.erase(mem_, name, ref);
            chains_.set_own_name(p.chain, id, p.depth, kNameless);
        }
        tidy_copies(id, p, ref);
        // Last, since this may remove the block itself.
        for (u32 h : gone) take_copy(id, h, p);
        if (gone.empty()) settle(id, p);
    }

    // ---- copies -----------------------------------------------------------------------------------------------------

    // Makes the worker hold (`live` false: only know) one engine block that ends at `path[0]`, whose index blocks are
    // path[0], path[1], ... towards the root. Changes no counts of copies.
    void hold(u32 id, u32 h, const Pos* path, u32 factor, bool live) {
        Worker& w = registry_.worker_at(id);
        for (u32 s = factor; s-- > 0;) {
            const Pos p = path[s];
            const u32 set = set_at(p);
            const bool knew = knows(w, set);
            if (!knew) {
                if (s != 0) chains_.set_own_name(p.chain, id, p.depth, kNameless);
                if (p.depth == chains_[p.chain].base) gain_chain(w, p.chain);
            }
            if (live) {
                chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return with(x, h, k, w.ghost); });
            } else if (!knew) {
                const u32 g = registry_.ghost(id);
                chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return with(x, g, k); });
            }
        }
    }
    bool same_tier(u32 a, u32 b) const {
        return registry_.holder(a).medium == registry_.holder(b).medium &&
               registry_.holder(a).group == registry_.holder(b).group;
    }
    // Whether a block of another size has a copy under this name in the same medium and group. If copies do not count,
    // that is the same copy.
    bool counted_otherwise(u32 id, u32 h, Pos p, u32 ref, u64 name) const {
        const Worker& w = registry_.worker_at(id);
        const auto list = w.copies.find(ref);
        const u32 set = set_at(p);
        u64 first;
        for (u32 o : w.holders) {
            if (o == h || !same_tier(o, h) || (p.depth + 1) % registry_.holder(o).factor) continue;
            if (list == w.copies.end()) {
                if (sets_.has(set, o) && first_name(id, p, ref, first) && first == name) return true;
                continue;
            }
            for (const Copy& c : list->second)
                if (c.id == name && c.holder == o && c.count) return true;
        }
        return false;
    }
    // Counts one copy of a block under a name. The worker may not know the block yet.
    void add_copy(u32 id, u32 h, const Pos* path, u64 name, bool live) {
        Worker& w = registry_.worker_at(id);
        const u32 factor = registry_.holder(h).factor;
        const Pos p = path[0];
        const u32 ref = chains_.ref(p);
        const u32 set = set_at(p);
        const bool knew = knows(w, set);
        u64 first;
        if (!knew) {
            give_name(id, p, ref, name);
        } else if (const bool named = first_name(id, p, ref, first); !named && !w.copies.count(ref)) {
            give_name(id, p, ref, name);
        } else if ((!named || first != name) && !w.second.count(name)) {
            Copies& list = list_copies(id, p, ref);
            if (list.size() >= kMostCopies) return refuse_copy(id, p, ref);
            list.push_back({name, kNone, 0});
            w.second[name] = ref;
        }
        if (live && registry_.pod_at(w.pod).set_presence && counted_otherwise(id, h, p, ref, name)) live = false;
        if (!live) {
            hold(id, h, path, factor, false);
            return;
        }
        const bool held = sets_.has(set, h);
        if (knew && (held || w.copies.count(ref))) {
            Copies& list = list_copies(id, p, ref);
            auto it =
                std::find_if(list.begin(), list.end(), [&](const Copy& c) { return c.id == name && c.holder == h; });
            if (it == list.end()) {
                if (list.size() >= kMostCopies) return refuse_copy(id, p, ref);
                list.push_back({name, h, 1});
            } else if (it->count == 0 || (!registry_.pod_at(w.pod).set_presence && it->count != 0xFFFFFFFFu)) {
                ++it->count;
            }
            tidy_copies(id, p, ref);
        }
        if (!held) hold(id, h, path, factor, true);
    }
    // This block has one copy or name more than are kept, so the worker holds more than is known.
    void refuse_copy(u32 id, Pos p, u32 ref) {
        ++refused_copies_;
        registry_.spoil(id);
        tidy_copies(id, p, ref);
    }
    // Removes one block from those that the worker knows.
    void forget_block(u32 id, Pos p, u32 less) {
        Worker& w = registry_.worker_at(id);
        drop_names(id, p, chains_.ref(p));
        chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return without(x, less, k); });
        if (p.depth == chains_[p.chain].base) lose_chain(w, p.chain);
    }
    // Handles the removal of the last counted copy of an engine block ending at `p` in this holder.
    void take_copy(u32 id, u32 h, Pos p) {
        Worker& w = registry_.worker_at(id);
        const u32 bottom = p.chain;
        const u32 factor = registry_.holder(h).factor;
        for (u32 s = 0; s < factor; ++s) {
            // Content may fork inside an engine block: another engine block that shares this part also holds it.
            if (s != 0 && child_has(w, p, h)) break;
            const Pos up = before(p);
            lose_bit(id, h, p);
            p = up;
        }
        climb(id, p);
        trim(bottom);
    }
    // `take_copy` of all blocks in [from, to) of a chain, which have the same holders. The chain has no children, and
    // this worker has one name for each block and no list of copies.
    void take_row(u32 id, u32 h, u32 chain, u32 from, u32 to) {
        Worker& w = registry_.worker_at(id);
        const Chain& c = chains_[chain];
        const bool goes = !knows_besides(w, chains_.set_at(c, from), h);
        if (goes && to < c.end() && knows(w, chains_.set_at(c, to))) {
            const u32 g = registry_.ghost(id);
            chains_.change(chain, from, to, [&](u32 x, u32 k) { return with(x, g, k, h); });
            return;
        }
        const Pos up = before({chain, from});
        if (goes && chains_.has_own(c, id)) {
            for (u32 d = from; d < to; ++d) w.own.prefetch(chains_.own_name(c, id, d));
            for (u32 d = to; d-- > from;) drop_names(id, {chain, d}, chains_.ref(c, d));
        }
        chains_.change(chain, from, to, [&](u32 x, u32 k) { return without(x, h, k); });
        if (!goes) return;
        if (from == c.base) lose_chain(w, chain);
        climb(id, up);
        trim(chain);
    }
    // The worker no longer holds this block through `h`. It may hold it through another holder, or may have to remember
    // it.
    void lose_bit(u32 id, u32 h, Pos p) {
        const Worker& w = registry_.worker_at(id);
        if (knows_besides(w, set_at(p), h)) {
            chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return without(x, h, k); });
        } else if (knows_child(w, p)) {
            const u32 g = registry_.ghost(id);
            chains_.change(p.chain, p.depth, p.depth + 1, [&](u32 x, u32 k) { return with(x, g, k, h); });
        } else {
            forget_block(id, p, h);
        }
    }
    // Removes positions that were kept only for a block below them, from `p` towards the root.
    void climb(u32 id, Pos p) {
        const Worker& w = registry_.worker_at(id);
        if (w.ghost == kNone) return;
        for (u32 left = kTurnBlocks; p.chain != kNone; --left) {
            const u32 set = set_at(p);
            if (!sets_.has(set, w.ghost) || knows_child(w, p)) return;
            if (left == 0) return loose_blocks_.push_back({id, chains_.ref(p)});
            const Pos up = before(p);
            forget_block(id, p, w.ghost);
            p = up;
        }
    }
    void settle(u32 id, Pos p) {
        climb(id, p);
        trim(p.chain);
    }
    // Drops the blocks at the chain's end that no worker knows, then the chain itself, and continues with its parent.
    void trim(u32 chain) {
        for (u32 left = kTurnBlocks; chain != kNone;) {
            Chain& c = chains_[chain];
            if (c.len && c.runs.back().set == kEmptySet) {
                const u32 live = std::max(c.runs.back().start, loose_chains_.empty() ? 0 : deepest_fork(c));
                // A child that no worker knows is also being dropped. After it, dropping continues here.
                if (live == c.end()) return;
                if (left == 0) return loose_chains_.push_back(chain);
                const u32 dead = std::min(left, c.end() - live);
                left -= dead;
                const u32 from = c.end() - dead;
                Space& s = registry_.space_at(c.space);
                for (u32 d = from; d < c.end(); ++d) s.names.prefetch(chains_.name(chains_.ref(c, d)));
                for (u32 d = from; d < c.end(); ++d) {
                    const u32 ref = chains_.ref(c, d);
                    if (chains_.name(ref) != kNoName) s.names.erase(mem_, chains_.name(ref), ref);
                }
                if (from == c.base) s.heads.erase(mem_, chains_.head(chain), chain);
                chains_.cut(chain, from);
                if (c.len && c.runs.back().set == kEmptySet) continue;
            }
            if (c.len) {
                if (c.first_kid != kNone) join_tail(chain);
                return;
            }
            const u32 parent = c.parent;
            if (chain == followed_) followed_ = kNone;
            chains_.destroy(chain);
            chain = parent;
        }
    }
    // The depth below which there is no child. O(children).
    u32 deepest_fork(const Chain& c) const {
        u32 depth = 0;
        for (u32 k = c.first_kid; k != kNone; k = chains_.next_kid(k)) depth = std::max(depth, chains_[k].base);
        return depth;
    }
    // Joins a chain with the only child at its end, so removed forks leave no trace. Chains with very many children are
    // left alone: joining costs time in their number, and saves one lookup per match.
    void join_tail(u32 chain) {
        Chain& c = chains_[chain];
        if (chains_.kids(c) > 16) return;
        u32 kid = kNone;
        for (u32 k = c.first_kid; k != kNone; k = chains_.next_kid(k)) {
            if (chains_[k].base != c.end()) continue;
            if (kid != kNone) return;
            kid = k;
        }
        // A long child is left alone too: moving it page by page would take longer than a turn.
        if (kid == kNone || chains_.kids(chains_[kid]) > 64 || chains_[kid].len > kTurnBlocks * 64) return;
        Space& space = registry_.space_at(c.space);
        Chain& k = chains_[kid];
        if (k.runs[0].set == kEmptySet) return;
        for (u32 id : {chain, kid})
            if (chains_[id].shared) unshare(id);
        std::replace(loose_chains_.begin(), loose_chains_.end(), kid, chain);
        each_knower(chains_.set_at(k, k.base), [&](u32, Worker& w) {
            w.chains.sub(mem_, kid);
            w.kids.sub(mem_, kid_key(chain, k.base - 1));
        });
        space.heads.erase(mem_, chains_.head(kid), kid);
        chains_.unlink(kid);
        while (k.first_kid != kNone) {
            const u32 g = k.first_kid;
            const u32 depth = chains_[g].base - 1;
            each_knower(chains_.set_at(chains_[g], depth + 1), [&](u32, Worker& w) {
                w.kids.sub(mem_, kid_key(kid, depth));
                w.kids.add(mem_, kid_key(chain, depth));
            });
            chains_.unlink(g);
            chains_.link(g, chain);
        }
        chains_.move_own(chain, kid);
        u32 moved[kPageBlocks][2], n = 0;
        chains_.join(chain, kid, [&](u32 from, u32 to) {
            moved[n][0] = from;
            moved[n++][1] = to;
        });
        for (u32 i = 0; i < n; ++i) rename(space, moved[i][0], moved[i][1]);
        k.parent = kNone;
        if (kid == followed_) followed_ = chain;
        chains_.destroy(kid);
    }
    void unshare(u32 chain) {
        const Chain& c = chains_[chain];
        Space& space = registry_.space_at(c.space);
        const u32 from = chains_.ref(c, c.base);
        chains_.unshare(chain);
        space.heads.turn(chains_.head(chain), chain, chains_.first_page(chain));
        rename(space, from, chains_.ref(c, c.base));
    }
    // A block has a new reference. Every table with the old one is updated.
    void rename(Space& space, u32 from, u32 to) {
        const u64 name = chains_.name(to);
        if (name != kNoName) space.names.move(name, from, to);
        for (LooseBlock& loose : loose_blocks_)
            if (loose.ref == from) loose.ref = to;
        const Pos p = chains_.pos(to);
        each_knower(set_at(p), [&](u32 id, Worker& w) {
            const u64 own = own_name(id, p);
            if (own != kNoName && own != kNameless) w.own.move(own, from, to);
            const auto it = w.copies.find(from);
            if (it == w.copies.end()) return;
            Copies list = std::move(it->second);
            w.copies.erase(it);
            for (const Copy& c : list)
                if (c.holder == kNone) w.second[c.id] = to;
            w.copies.insert_or_assign(to, std::move(list));
        });
    }
    // Calls f once for every worker that knows a block with this set.
    template <class F>
    void each_knower(u32 set, F&& f) {
        scratch_ids_.clear();
        marks_.resize(registry_.worker_slots());
        ++mark_;
        sets_.each(set, [&](u32 h) {
            const u32 id = registry_.holder(h).worker;
            if (registry_.worker_at(id).guess == h || marks_[id] == mark_) return;
            marks_[id] = mark_;
            scratch_ids_.push_back(id);
        });
        for (u32 id : scratch_ids_) f(id, registry_.worker_at(id));
    }

    // Whether a turn has left work to the next one.
    bool loose() const { return !loose_blocks_.empty() || !loose_chains_.empty(); }
    // Does a turn's worth of this work. Blocks and chains may have changed meanwhile: if a number now belongs to
    // another block or chain without such work, nothing is done.
    void tie_up() {
        if (!loose_blocks_.empty()) {
            const LooseBlock at = loose_blocks_.back();
            loose_blocks_.pop_back();
            if (registry_.has_worker(at.worker) && chains_.is_block(at.ref)) settle(at.worker, chains_.pos(at.ref));
        } else if (!loose_chains_.empty()) {
            const u32 chain = loose_chains_.back();
            loose_chains_.pop_back();
            if (chains_.alive(chain)) trim(chain);
        }
    }

    // Follows a chain through joins while it exists. followed() is kNone once the chain has been removed.
    void follow(u32 chain) { followed_ = chain; }
    u32 followed() const { return followed_; }
    // The number of refused copies since the last call.
    u32 take_refused() { return std::exchange(refused_copies_, 0); }
    // All content is about to be dropped.
    void start_over() noexcept {
        followed_ = kNone;
        loose_blocks_.clear();
        loose_chains_.clear();
    }
    // The first broken invariant, or an empty string.
    std::string check() const;
    // The snapshot sections of this part, which are verified while they are read.
    void save(SectionWriter& to, const SavePlan& plan) const;
    void restore(SectionReader& in, const RestorePlan& plan);
    void plan(SavePlan& plan) const;

private:
    u32 plan_set(SavePlan& plan, u32 set) const;
    std::string check_holders() const;
    std::string check_names() const;
    std::string check_own_names() const;
    std::string check_chains(u32 id, std::map<u64, u32>& known) const;
    std::string check_block(u32 id, Pos p) const;
    std::string check_worker(u32 id) const;

    // The most names and counts of one block on one worker. Engines have as many as the block has holders. A stream
    // that announced 100,000 names for one block had all of them searched each time.
    static constexpr u32 kMostCopies = 2 * kMostHolders;

    struct LooseBlock {
        u32 worker, ref;
    };
    Memory& mem_;
    Registry& registry_;
    SetPool& sets_;
    Chains& chains_;
    std::vector<LooseBlock> loose_blocks_;  // where a worker may remember more than it must, and up from there
    std::vector<u32> loose_chains_;         // chains with blocks at their ends that no worker knows
    u32 refused_copies_ = 0;
    u32 followed_ = kNone;
    std::vector<u32> scratch_ids_;
    std::vector<u64> marks_;  // by worker: the mark of its last visit
    u64 mark_ = 0;
};

}  // namespace kvindex
