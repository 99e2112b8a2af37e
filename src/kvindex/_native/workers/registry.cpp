// The invariants of pods, workers and holders.
#include "workers/registry.hpp"

#include <map>
#include <string>

#include "base/broken.hpp"

namespace kvindex {

namespace {

bool has_bit(const std::vector<u64>& mask, u32 bit) {
    return (bit >> 6) < mask.size() && (mask[bit >> 6] >> (bit & 63) & 1);
}

bool same(const Face& a, const Face& b) {
    return a.pod == b.pod && a.rank == b.rank && a.medium == b.medium && a.factor == b.factor && a.state == b.state &&
           a.flags == b.flags && a.bits == b.bits;
}

}  // namespace

// Whether the faces that a match reads agree with the worker.
std::string Registry::check_faces(u32 id) const {
    const Worker& w = *workers_[id];
    if (face_of(w) != w.face) return broken("worker sorted wrongly", id, w.face);
    std::vector<u32> all = w.holders;
    if (w.guess != kNone) all.push_back(w.guess);
    const Face right = describe(w);
    for (u32 h : all) {
        if (has_bit(simple_, h) != (h == w.face)) return broken("face is not the bit that says all", id, h);
        const bool stands = w.face != kNone && h == w.guess && h != w.face;
        if (has_bit(guessed_, h) != stands || (stands && stands_for_[h] != w.face))
            return broken("guess stands for the wrong holder", id, h);
        const bool full = h == w.guess || w.groups[holders_[h].group].kind == Attention::full;
        if (has_bit(grouped_, h) != (w.face == kNone) || has_bit(rooted_, h) != (w.face == kNone && full))
            return broken("holder sorted wrongly", id, h);
        if (!same(faces_[h], right)) return broken("face is not the worker's", id, h);
    }
    const bool listed = w.in_hybrid_list != kNone;
    if (listed != (w.face == kNone && !all.empty()) || (listed && spaces_[w.space].hybrids[w.in_hybrid_list] != id))
        return broken("list of hybrids is wrong", id, listed);
    if (w.rootless != (listed && right.flags & kRootless))
        return broken("worker without a full group missorted", id, listed);
    return {};
}

std::string Registry::check_worker(u32 id) const {
    const Worker& w = *workers_[id];
    for (u32 h : w.holders)
        if (holders_[h].worker != id) return broken("holder of another worker", id, h);
    std::vector<u64> mask;
    for (u32 h : w.holders) set_bit(mask, h, true);
    if (w.ghost != kNone) set_bit(mask, w.ghost, true);
    for (u32 i = 0; i < std::max(mask.size(), w.mask.size()); ++i)
        if ((i < mask.size() ? mask[i] : 0) != (i < w.mask.size() ? w.mask[i] : 0))
            return broken("mask is wrong", id, i);
    if (own_state(w) != w.state) return broken("state is out of date", id, static_cast<u64>(w.state));
    if (w.shed && !w.sticky) return broken("something was shed, and it goes unsaid", id, 0);
    return check_faces(id);
}

// The numbers of workers in spaces.
std::string Registry::check_spaces() const {
    std::vector<u32> rootless(spaces_.size());
    std::vector<std::map<u32, u32>> lengths(spaces_.size());
    for (const auto& w : workers_) {
        if (!w) continue;
        rootless[w->space] += w->rootless;
        for (u32 lookahead : w->lengths) ++lengths[w->space][lookahead];
    }
    for (std::size_t s = 0; s < spaces_.size(); ++s) {
        if (rootless[s] != spaces_[s].rootless)
            return broken("workers without a full group miscounted", s, rootless[s]);
        if (spaces_[s].plain != lengths[s][0]) return broken("workers without lookahead miscounted", s, lengths[s][0]);
        lengths[s].erase(0);
        if (spaces_[s].lengths != lengths[s]) return broken("workers with lookahead miscounted", s, lengths[s].size());
    }
    return {};
}

std::string Registry::check_media() const {
    std::string error;
    std::map<u32, u64> users;
    for (const Holder& h : holders_)
        if (h.worker != kNone) ++users[h.medium];
    for (const Pod& p : pods_) {
        u64 n = 0;
        for (u32 id : p.workers) n += workers_[id]->holders.size();
        if (n != p.holders) return broken("holders of a pod miscounted", n, p.holders);
        for (const auto* media : {&p.clear_media, &p.ignore_media})
            for (u32 m : *media) ++users[m];
    }
    media_.each([&](u32 id, const std::string&, u64 n) {
        if (id && (n == 0 || n != users[id])) error = broken("users of a medium miscounted", id, n);
        users.erase(id);
    });
    if (error.empty() && !users.empty()) error = broken("medium in use is gone", users.begin()->first, 0);
    return error;
}

std::string Registry::check() const {
    std::size_t fixed = kHolderBytes * holders();
    for (u32 id = 0; id < workers_.size(); ++id) {
        if (!workers_[id]) continue;
        fixed += kWorkerBytes + sizeof(Group) * workers_[id]->groups.size();
        if (std::string error = check_worker(id); !error.empty()) return error;
    }
    for (const auto part : {&Registry::check_spaces, &Registry::check_media})
        if (std::string error = (this->*part)(); !error.empty()) return error;
    if (fixed != fixed_) return broken("memory of workers miscounted", fixed, fixed_);
    return {};
}

}  // namespace kvindex
