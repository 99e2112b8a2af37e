// Every invariant of the structure, verified from scratch. Tests call it after each step.
#include <set>
#include <sstream>

#include "index.hpp"

namespace kvindex {

std::string Index::check() const {
    std::ostringstream bad;
    const auto fail = [&](const char* what, u64 a, u64 b) {
        bad << what << " (" << a << ", " << b << ")";
        return bad.str();
    };
    u64 blocks = 0;
    std::vector<u64> refs(1, 0), held(holders_.size(), 0), own(workers_.size(), 0), names(spaces_.size(), 0),
        heads(spaces_.size(), 0);
    std::vector<std::unordered_map<u64, u32>> kids(workers_.size()), chains(workers_.size());
    std::unordered_map<u32, u32> set_refs;
    std::string error;
    chains_.each([&](u32 id) {
        if (!error.empty()) return;
        const Chain& c = chains_[id];
        if (!c.len || c.runs.empty()) return void(error = fail("empty chain", id, c.len));
        blocks += c.len;
        ++heads[c.space];
        if (!spaces_[c.space].heads.contains(chains_.head(id), id, chains_.first_page(id)))
            return void(error = fail("chain without head entry", id, c.base));
        if (c.parent != kNone) {
            if (!chains_.alive(c.parent)) return void(error = fail("parent chain is gone", id, c.parent));
            const Chain& p = chains_[c.parent];
            if (c.base <= p.base || c.base > p.end() || p.space != c.space || p.lookahead != c.lookahead)
                return void(error = fail("chain hangs outside its parent", id, c.parent));
        } else if (c.base) {
            return void(error = fail("root chain does not start at 0", id, c.base));
        }
        u32 n = 0;
        for (u32 k = c.first_kid, last = kNone; k != kNone; last = k, k = chains_[k].kid_after, ++n)
            if (!chains_.alive(k) || chains_[k].parent != id || chains_[k].kid_before != last)
                return void(error = fail("broken list of children", id, k));
        if (n != c.kids) return void(error = fail("wrong number of children", id, n));
        if (c.pages.size() != ((c.end() - 1) >> kPageShift) - (c.base >> kPageShift) + 1)
            return void(error = fail("wrong number of pages", id, c.pages.size()));
        u32 row = 0;
        while (row < 0xFFFF && row < c.pages.size() && c.pages[row] == c.pages[0] + row) ++row;
        if (row != c.row) return void(error = fail("wrong row of pages", id, c.row));
        for (u32 r = 0; r < c.runs.size(); ++r) {
            const Run& run = c.runs[r];
            ++set_refs[run.set];
            if (r == 0 ? run.start != c.base : run.start <= c.runs[r - 1].start)
                return void(error = fail("runs out of order", id, r));
            if (r && run.set == c.runs[r - 1].set) return void(error = fail("equal runs not joined", id, r));
            if (run.start >= c.end()) return void(error = fail("run beyond the chain", id, r));
            if (run.set == kEmptySet) return void(error = fail("blocks that nobody knows", id, run.start));
            sets_.each(run.set, [&](u32 h) {
                if (h >= holders_.size() || holders_[h].worker == kNone) {
                    error = fail("set of a dead holder", id, h);
                } else {
                    held[h] += chains_.run_end(c, r) - run.start;
                }
            });
            if (!error.empty()) return;
        }
        for (u32 d = c.base; d < c.end(); ++d) {
            const u32 ref = chains_.ref(c, d);
            if (chains_.pos(ref) != Pos{id, d}) return void(error = fail("reference does not lead back", id, d));
            const u64 name = chains_.name(ref);
            if (name == kNoName) continue;
            ++names[c.space];
            if (!spaces_[c.space].names.contains(name, ref))
                return void(error = fail("name is not in the table", id, d));
        }
        for (u32 i = 0; i < c.own.size(); ++i) {
            const OwnNames& o = c.own[i];
            if (i && o.worker <= c.own[i - 1].worker) return void(error = fail("own names out of order", id, o.worker));
            if (o.worker >= workers_.size() || !workers_[o.worker])
                return void(error = fail("own names of a dead worker", id, o.worker));
            u32 used = 0;
            for (u32 k = 0; k < o.ids.size(); ++k) {
                if (o.ids[k] == kNoName) continue;
                ++used;
                const u32 d = o.start + k;
                if (d < c.base || d >= c.end() || !knows(*workers_[o.worker], chains_.set_at(c, d)))
                    return void(error = fail("own name of an unknown block", id, d));
                if (o.ids[k] == kNameless) continue;
                ++own[o.worker];
                if (!workers_[o.worker]->own.contains(o.ids[k], chains_.ref(c, d)))
                    return void(error = fail("own name is not in the table", id, d));
            }
            if (used != o.used || !used) return void(error = fail("own names miscounted", id, o.worker));
        }
    });
    if (!error.empty()) return error;
    if (blocks != chains_.blocks()) return fail("blocks miscounted", blocks, chains_.blocks());
    for (std::size_t s = 0; s < spaces_.size(); ++s) {
        if (names[s] != spaces_[s].names.size()) return fail("names miscounted", names[s], spaces_[s].names.size());
        if (heads[s] != spaces_[s].heads.size()) return fail("heads miscounted", heads[s], spaces_[s].heads.size());
    }
    sets_.each_live([&](u32 set, u32 n) {
        if (set != kEmptySet && (n != set_refs[set] || !sets_.interned(set)))
            error = fail("set miscounted or not interned", set, n);
    });
    if (!error.empty()) return error;
    for (const auto& s : set_refs)
        if (sets_.refs(s.first) < s.second) return fail("set in use is dead", s.first, s.second);
    if (sets_.live() != set_refs.size() + 1) return fail("set that nothing uses", sets_.live(), set_refs.size());

    u32 listed = 0;
    if (!chains_.ages().count(listed) || (chains_.ages().on() && listed != chains_.count()))
        return fail("lists of ages are wrong", listed, chains_.count());
    chains_.each([&](u32 id) {
        if (chains_[id].parent != kNone && chains_.ages().younger(id, chains_[id].parent))
            error = fail("touched after its parent", id, chains_[id].parent);
    });
    if (!error.empty()) return error;

    u64 parked = 0;
    std::size_t fixed = 0, lots = 0;
    std::vector<u32> rootless_of(spaces_.size());
    for (u32 id = 0; id < workers_.size(); ++id) {
        if (!workers_[id]) continue;
        const Worker& w = *workers_[id];
        if (own[id] != w.own.size()) return fail("own names miscounted", own[id], w.own.size());
        fixed += kWorkerBytes + sizeof(Group) * w.groups.size();
        if (w.shed && (w.lot || !w.sticky))
            return fail("something waits for what was shed, or it goes unsaid", id, w.parked());
        for (u32 h : w.holders)
            if (holders_[h].worker != id || held[h] != holders_[h].blocks) return fail("holder miscounted", h, held[h]);
        if (w.ghost != kNone && held[w.ghost] != holders_[w.ghost].blocks)
            return fail("remembered blocks miscounted", w.ghost, held[w.ghost]);
        if (w.guess != kNone && held[w.guess] != holders_[w.guess].blocks)
            return fail("guessed blocks miscounted", w.guess, held[w.guess]);
        std::vector<u64> mask;
        for (u32 h : w.holders) set_bit(mask, h, true);
        if (w.ghost != kNone) set_bit(mask, w.ghost, true);
        for (u32 i = 0; i < std::max(mask.size(), w.mask.size()); ++i)
            if ((i < mask.size() ? mask[i] : 0) != (i < w.mask.size() ? w.mask[i] : 0))
                return fail("mask is wrong", id, i);
        if (face_of(w) != w.face) return fail("worker sorted wrongly", id, w.face);
        if (own_verdict(w) != w.verdict) return fail("verdict is out of date", id, static_cast<u64>(w.verdict));
        const auto bit = [](const std::vector<u64>& mask, u32 h) {
            return (h >> 6) < mask.size() && (mask[h >> 6] >> (h & 63) & 1);
        };
        std::vector<u32> all = w.holders;
        if (w.guess != kNone) all.push_back(w.guess);
        for (u32 h : all) {
            if (bit(simple_, h) != (h == w.face)) return fail("face is not the bit that says all", id, h);
            const bool stands = w.face != kNone && h == w.guess && h != w.face;
            if (bit(guessed_, h) != stands || (stands && stands_for_[h] != w.face))
                return fail("guess stands for the wrong holder", id, h);
        }
        for (u32 h : all) {
            const bool full = h == w.guess || w.groups[holders_[h].group].kind == Attention::full;
            if (bit(grouped_, h) != (w.face == kNone) || bit(rooted_, h) != (w.face == kNone && full))
                return fail("holder sorted wrongly", id, h);
        }
        const Face right = describe(w);
        for (u32 h : all) {
            const Face& f = faces_[h];
            if (f.pod != right.pod || f.rank != right.rank || f.medium != right.medium || f.factor != right.factor ||
                f.verdict != right.verdict || f.flags != right.flags || f.bits != right.bits)
                return fail("face is not the worker's", id, h);
        }
        const std::vector<u32>& hybrids = spaces_[w.space].hybrids;
        const bool listed = w.in_hybrid_list != kNone;
        if (listed != (w.face == kNone && (!w.holders.empty() || w.guess != kNone)) ||
            (listed && hybrids[w.in_hybrid_list] != id))
            return fail("list of hybrids is wrong", id, listed);
        if (w.rootless != (listed && right.flags & kRootless))
            return fail("worker without a full group missorted", id, listed);
        rootless_of[w.space] += w.rootless;

        std::map<u64, u32> known_chains, known_kids;
        chains_.each([&](u32 chain) {
            const Chain& c = chains_[chain];
            if (!error.empty() || c.space != w.space) return;
            bool inside = true;
            for (u32 r = 0; r < c.runs.size(); ++r) {
                const bool k = knows(w, c.runs[r].set);
                if (k && !inside) return void(error = fail("knows a block but not its parent", chain, c.runs[r].start));
                inside = k;
            }
            if (!knows(w, c.runs[0].set)) return;
            ++known_chains[chain];
            if (c.parent == kNone) return;
            ++known_kids[kid_key(c.parent, c.base - 1)];
            if (!knows(w, set_at({c.parent, c.base - 1})))
                error = fail("knows a chain but not its parent", chain, c.parent);
        });
        if (!error.empty()) return error;
        std::map<u64, u32> got;
        w.chains.each([&](u32 chain) { ++got[chain]; });
        if (got != known_chains) return fail("list of known chains is wrong", id, got.size());
        got.clear();
        w.kids.each([&](u64 k, u32 n) { got[k] = n; });
        if (got != known_kids) return fail("list of known children is wrong", id, got.size());
        for (const auto& entry : known_chains) {
            const u32 chain = static_cast<u32>(entry.first);
            const Chain& c = chains_[chain];
            for (u32 d = c.base; d < c.end() && knows(w, chains_.set_at(c, d)); ++d) {
                const Pos p{chain, d};
                const u32 set = set_at(p), ref = chains_.ref(p);
                if (w.ghost != kNone && sets_.has(set, w.ghost)) {
                    if (knows_besides(w, set, w.ghost)) return fail("held and only remembered at once", chain, d);
                    if (!knows_child(w, p)) return fail("remembered for nothing", chain, d);
                }
                u64 first = 0;
                const bool named = first_name(id, p, ref, first);
                if (named && find(id, first) != ref) return fail("name does not lead to its block", chain, d);
                const auto list = w.copies.find(ref);
                for (u32 h : w.holders) {
                    const bool bit = sets_.has(set, h);
                    if ((d + 1) % holders_[h].factor) {
                        if (bit != child_has(w, p, h))
                            return fail("part of an engine block disagrees with its end", chain, d);
                        continue;
                    }
                    if (list == w.copies.end()) {
                        if (bit && !named) return fail("held without a name", chain, d);
                        continue;
                    }
                    bool any = false;
                    for (const Copy& x : list->second) any |= x.holder == h && x.count;
                    if (any != bit) return fail("copies and bits disagree", chain, d);
                }
            }
        }
        for (const auto& list : w.copies) {
            if (!chains_.alive(chains_.pos(list.first).chain)) return fail("copies of a dead block", id, list.first);
            for (const Copy& x : list.second)
                if (x.holder == kNone && (!w.second.count(x.id) || w.second.at(x.id) != list.first))
                    return fail("second name is lost", id, x.id);
        }
        for (const auto& s : w.second)
            if (!w.copies.count(s.second)) return fail("second name without copies", id, s.first);
        if (w.lot) {
            const ParkingLot& lot = *w.lot;
            u32 n = 0;
            u64 entries = 0, dead = 0;
            for (const auto& rec : lot.records) {
                const Parked& p = rec.second;
                const Holder& tier = holders_[p.holder];
                u32 left = 0;
                for (u32 i = 0; i < p.ids.size(); ++i, ++entries) {
                    left += p.live[i];
                    const auto at =
                        lot.by_id.find(ParkedHash{p.ids[i], !p.live[i], tier.medium, tier.group, rec.first});
                    if (at == lot.by_id.end() || at->second != i)
                        return fail("parked block is not in the table", id, rec.first);
                }
                if (!lot.waiting.count({p.waits_for, rec.first}))
                    return fail("parked record waits for nothing", id, rec.first);
                if (left != p.left || lot.dead.count(rec.first) != (left == 0))
                    return fail("parked record miscounted", id, rec.first);
                n += left;
                lots += weight(p);
                dead += left == 0;
            }
            if (n != lot.hashes || lot.records.empty()) return fail("parked blocks miscounted", id, n);
            if (entries != lot.by_id.size() || dead != lot.dead.size() || lot.records.size() != lot.waiting.size())
                return fail("parking lot's tables are wrong", id, entries);
            parked += n;
        }
    }
    for (std::size_t s = 0; s < spaces_.size(); ++s)
        if (rootless_of[s] != spaces_[s].rootless)
            return fail("workers without a full group miscounted", s, rootless_of[s]);
    std::vector<std::map<u32, u32>> lengths(spaces_.size());
    for (const auto& w : workers_)
        for (u32 lookahead : w ? w->lengths : std::vector<u32>()) ++lengths[w->space][lookahead];
    for (std::size_t s = 0; s < spaces_.size(); ++s) {
        if (spaces_[s].plain != lengths[s][0]) return fail("workers without lookahead miscounted", s, lengths[s][0]);
        lengths[s].erase(0);
        if (spaces_[s].lengths != lengths[s]) return fail("workers with lookahead miscounted", s, lengths[s].size());
    }
    if (parked != parked_) return fail("parked blocks miscounted", parked, parked_);
    std::map<u32, u64> users;
    for (const Holder& h : holders_)
        if (h.worker != kNone) ++users[h.medium];
    for (const Pod& p : pods_) {
        u64 n = 0;
        for (u32 id : p.workers) n += workers_[id]->holders.size();
        if (n != p.holders) return fail("holders of a pod miscounted", n, p.holders);
        for (const auto* media : {&p.clear_media, &p.ignore_media})
            for (u32 m : *media) ++users[m];
    }
    media_.each([&](u32 id, const std::string&, u64 n) {
        if (id && (n == 0 || n != users[id])) error = fail("users of a medium miscounted", id, n);
        users.erase(id);
    });
    if (error.empty() && !users.empty()) error = fail("medium in use is gone", users.begin()->first, 0);
    if (!error.empty()) return error;
    fixed += kHolderBytes * (holders_.size() - free_holders_.size());
    if (fixed != fixed_ || lots != lot_bytes_) return fail("memory miscounted", fixed, lots);
    if (bounded() && bytes() > budget()) return fail("over the budget", bytes(), budget());
    return std::string();
}

}  // namespace kvindex
