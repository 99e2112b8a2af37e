// The invariants of content: chains, their pages and runs, holder sets, ages.
#include "content/chains.hpp"

#include <string>
#include <unordered_map>

#include "base/broken.hpp"

namespace kvindex {

std::string Chains::check_chain(u32 id) const {
    const Chain& c = chains_[id];
    if (!c.len || c.runs.empty()) return broken("empty chain", id, c.len);
    if (c.parent != kNone) {
        if (!chains_.alive(c.parent)) return broken("parent chain is gone", id, c.parent);
        const Chain& p = chains_[c.parent];
        if (c.base <= p.base || c.base > p.end() || p.space != c.space || p.lookahead != c.lookahead)
            return broken("chain hangs outside its parent", id, c.parent);
        if (ages_.younger(id, c.parent)) return broken("touched after its parent", id, c.parent);
    } else if (c.base) {
        return broken("root chain does not start at 0", id, c.base);
    }
    u32 n = 0;
    if ((c.branch != kNone) != (c.parent != kNone || c.named)) return broken("branch without a need", id, c.branch);
    if (c.branch != kNone && (!branches_.alive(c.branch) || c.named == branches_[c.branch].own.empty()))
        return broken("branch is gone, or its own names are not marked", id, c.branch);
    for (u32 k = c.first_kid, last = kNone; k != kNone; last = k, k = next_kid(k), ++n)
        if (!chains_.alive(k) || chains_[k].parent != id || branch_of(k).before != last)
            return broken("broken list of children", id, k);
    if (n != kids(c)) return broken("wrong number of children", id, n);
    if (c.pages.size() != ((c.end() - 1) >> kPageShift) - (c.base >> kPageShift) + 1)
        return broken("wrong number of pages", id, c.pages.size());
    u32 row = 0;
    while (row < 0xFFFF && row < c.pages.size() && c.pages[row] == c.pages[0] + row) ++row;
    if (row != c.row) return broken("wrong row of pages", id, c.row);
    for (u32 r = 0; r < c.runs.size(); ++r) {
        const Run& run = c.runs[r];
        if (r == 0 ? run.start != c.base : run.start <= c.runs[r - 1].start) return broken("runs out of order", id, r);
        if (r && run.set == c.runs[r - 1].set) return broken("equal runs not joined", id, r);
        if (run.start >= c.end()) return broken("run beyond the chain", id, r);
        if (run.set == kEmptySet) return broken("blocks that nobody knows", id, run.start);
    }
    for (u32 d = c.base; d < c.end(); ++d)
        if (pos(ref(c, d)) != Pos{id, d}) return broken("reference does not lead back", id, d);
    const Buf<OwnNames>& own_names = own(c);
    for (u32 i = 0; i < own_names.size(); ++i) {
        const OwnNames& o = own_names[i];
        if (i && o.worker <= own_names[i - 1].worker) return broken("own names out of order", id, o.worker);
        u32 used = 0;
        for (u32 k = 0; k < o.ids.size(); ++k) used += o.ids[k] != kNoName;
        if (used != o.used || !used) return broken("own names miscounted", id, o.worker);
    }
    return {};
}

std::string Chains::check() const {
    std::string error;
    u64 blocks = 0;
    std::unordered_map<u32, u32> refs;
    chains_.each([&](u32 id) {
        if (!error.empty()) return;
        error = check_chain(id);
        blocks += chains_[id].len;
        for (const Run& run : chains_[id].runs) ++refs[run.set];
    });
    if (!error.empty()) return error;
    if (blocks != blocks_) return broken("blocks miscounted", blocks, blocks_);
    sets_.each_live([&](u32 set, u32 n) {
        if (set != kEmptySet && (n != refs[set] || !sets_.interned(set)))
            error = broken("set miscounted or not interned", set, n);
    });
    if (!error.empty()) return error;
    for (const auto& s : refs)
        if (sets_.refs(s.first) < s.second) return broken("set in use is dead", s.first, s.second);
    if (sets_.live() != refs.size() + 1) return broken("set that nothing uses", sets_.live(), refs.size());
    u32 listed = 0;
    if (!ages_.count(listed) || (ages_.on() && listed != count()))
        return broken("lists of ages are wrong", listed, count());
    return {};
}

}  // namespace kvindex
