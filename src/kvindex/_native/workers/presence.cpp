// The invariants of known blocks.
#include "workers/presence.hpp"

#include <map>
#include <string>

#include "base/broken.hpp"

namespace kvindex {

// The tables of each space contain the names in pages and the heads of chains, and nothing else.
std::string Presence::check_names() const {
    std::string error;
    std::vector<u64> names(registry_.space_slots(), 0), heads(registry_.space_slots(), 0);
    chains_.each([&](u32 id) {
        if (!error.empty()) return;
        const Chain& c = chains_[id];
        const Space& space = registry_.space_at(c.space);
        ++heads[c.space];
        if (!space.heads.contains(chains_.head(id), id, chains_.first_page(id)))
            error = broken("chain without head entry", id, c.base);
        for (u32 d = c.base; d < c.end(); ++d) {
            const u32 ref = chains_.ref(c, d);
            const u64 name = chains_.name(ref);
            if (name == kNoName) continue;
            ++names[c.space];
            if (!space.names.contains(name, ref)) error = broken("name is not in the table", id, d);
        }
    });
    if (!error.empty()) return error;
    for (u32 s = 0; s < registry_.space_slots(); ++s) {
        const Space& space = registry_.space_at(s);
        if (names[s] != space.names.size()) return broken("names miscounted", names[s], space.names.size());
        if (heads[s] != space.heads.size()) return broken("heads miscounted", heads[s], space.heads.size());
    }
    return {};
}

// A worker has names of its own only for blocks that it knows, and they are in its table.
std::string Presence::check_own_names() const {
    std::string error;
    std::vector<u64> own(registry_.worker_slots(), 0);
    const auto check = [&](u32 id, const Chain& c, const OwnNames& o) -> std::string {
        if (!registry_.has_worker(o.worker)) return broken("own names of a dead worker", id, o.worker);
        const Worker& w = registry_.worker_at(o.worker);
        for (u32 k = 0; k < o.ids.size(); ++k) {
            if (o.ids[k] == kNoName) continue;
            const u32 d = o.start + k;
            if (d < c.base || d >= c.end() || !knows(w, chains_.set_at(c, d)))
                return broken("own name of an unknown block", id, d);
            if (o.ids[k] == kNameless) continue;
            ++own[o.worker];
            if (!w.own.contains(o.ids[k], chains_.ref(c, d))) return broken("own name is not in the table", id, d);
        }
        return {};
    };
    chains_.each([&](u32 id) {
        for (const OwnNames& o : chains_.own(chains_[id]))
            if (error.empty()) error = check(id, chains_[id], o);
    });
    if (!error.empty()) return error;
    for (u32 id = 0; id < registry_.worker_slots(); ++id)
        if (registry_.has_worker(id) && own[id] != registry_.worker_at(id).own.size())
            return broken("own names miscounted", own[id], registry_.worker_at(id).own.size());
    return {};
}

// Each holder counts the blocks whose sets contain it.
std::string Presence::check_holders() const {
    std::string error;
    std::vector<u64> held(registry_.holder_slots(), 0);
    chains_.each([&](u32 id) {
        const Chain& c = chains_[id];
        for (u32 r = 0; r < c.runs.size(); ++r)
            sets_.each(c.runs[r].set, [&](u32 h) {
                if (h >= registry_.holder_slots() || registry_.holder(h).worker == kNone) {
                    error = broken("set of a dead holder", id, h);
                } else {
                    held[h] += chains_.run_end(c, r) - c.runs[r].start;
                }
            });
    });
    if (!error.empty()) return error;
    for (u32 h = 0; h < registry_.holder_slots(); ++h)
        if (registry_.holder(h).worker != kNone && held[h] != registry_.holder(h).blocks)
            return broken("holder miscounted", h, held[h]);
    return {};
}

// The known blocks of a worker are closed towards the root, and its tables of chains list them.
std::string Presence::check_chains(u32 id, std::map<u64, u32>& known) const {
    const Worker& w = registry_.worker_at(id);
    std::string error;
    std::map<u64, u32> kids, got;
    chains_.each([&](u32 chain) {
        const Chain& c = chains_[chain];
        if (!error.empty() || c.space != w.space) return;
        bool inside = true;
        for (u32 r = 0; r < c.runs.size(); ++r) {
            const bool k = knows(w, c.runs[r].set);
            if (k && !inside) return void(error = broken("knows a block but not its parent", chain, c.runs[r].start));
            inside = k;
        }
        if (!knows(w, c.runs[0].set)) return;
        ++known[chain];
        if (c.parent == kNone) return;
        ++kids[kid_key(c.parent, c.base - 1)];
        if (!knows(w, set_at({c.parent, c.base - 1})))
            error = broken("knows a chain but not its parent", chain, c.parent);
    });
    if (!error.empty()) return error;
    w.chains.each([&](u32 chain) { ++got[chain]; });
    if (got != known) return broken("list of known chains is wrong", id, got.size());
    got.clear();
    w.kids.each([&](u64 k, u32 n) { got[k] = n; });
    if (got != kids) return broken("list of known children is wrong", id, got.size());
    return {};
}

// For a block that a worker knows: names lead to it, there is a reason to remember it, and bits and lists of copies
// agree.
std::string Presence::check_block(u32 id, Pos p) const {
    const Worker& w = registry_.worker_at(id);
    const u32 set = set_at(p), ref = chains_.ref(p);
    if (w.ghost != kNone && sets_.has(set, w.ghost)) {
        if (knows_besides(w, set, w.ghost)) return broken("held and only remembered at once", p.chain, p.depth);
        if (!knows_child(w, p)) return broken("remembered for nothing", p.chain, p.depth);
    }
    u64 first = 0;
    const bool named = first_name(id, p, ref, first);
    if (named && find(id, first) != ref) return broken("name does not lead to its block", p.chain, p.depth);
    const auto list = w.copies.find(ref);
    for (u32 h : w.holders) {
        const bool bit = sets_.has(set, h);
        if ((p.depth + 1) % registry_.holder(h).factor) {
            if (bit != child_has(w, p, h))
                return broken("part of an engine block disagrees with its end", p.chain, p.depth);
            continue;
        }
        if (list == w.copies.end()) {
            if (bit && !named) return broken("held without a name", p.chain, p.depth);
            continue;
        }
        bool any = false;
        for (const Copy& x : list->second) any |= x.holder == h && x.count;
        if (any != bit) return broken("copies and bits disagree", p.chain, p.depth);
    }
    return {};
}

std::string Presence::check_worker(u32 id) const {
    const Worker& w = registry_.worker_at(id);
    std::map<u64, u32> known;
    if (std::string error = check_chains(id, known); !error.empty()) return error;
    for (const auto& entry : known) {
        const u32 chain = static_cast<u32>(entry.first);
        const Chain& c = chains_[chain];
        for (u32 d = c.base; d < c.end() && knows(w, chains_.set_at(c, d)); ++d)
            if (std::string error = check_block(id, {chain, d}); !error.empty()) return error;
    }
    for (const auto& list : w.copies) {
        if (!chains_.alive(chains_.pos(list.first).chain)) return broken("copies of a dead block", id, list.first);
        for (const Copy& x : list.second)
            if (x.holder == kNone && (!w.second.count(x.id) || w.second.at(x.id) != list.first))
                return broken("second name is lost", id, x.id);
    }
    for (const auto& s : w.second)
        if (!w.copies.count(s.second)) return broken("second name without copies", id, s.first);
    return {};
}

std::string Presence::check() const {
    for (const auto part : {&Presence::check_holders, &Presence::check_names, &Presence::check_own_names})
        if (std::string error = (this->*part)(); !error.empty()) return error;
    for (u32 id = 0; id < registry_.worker_slots(); ++id)
        if (registry_.has_worker(id))
            if (std::string error = check_worker(id); !error.empty()) return error;
    return {};
}

}  // namespace kvindex
