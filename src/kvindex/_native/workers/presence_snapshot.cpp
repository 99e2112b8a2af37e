// The known blocks of workers as bytes, and back: content, names, copies.
#include <algorithm>
#include <cassert>
#include <map>
#include <vector>

#include "base/sections.hpp"
#include "workers/presence.hpp"
#include "workers/snapshot_plan.hpp"

namespace kvindex {

// Parents come before their children, so that a reader needs to look back only.
void Presence::plan(SavePlan& plan) const {
    std::vector<u32> stack, kids;
    chains_.each([&](u32 c) {
        if (chains_[c].parent == kNone) stack.push_back(c);
    });
    std::reverse(stack.begin(), stack.end());
    while (!stack.empty()) {
        const u32 id = stack.back();
        stack.pop_back();
        const Chain& c = chains_[id];
        const u32 first = static_cast<u32>(plan.runs.size());
        u32 end = c.base;
        for (u32 r = 0; r < c.runs.size(); ++r) {
            const u32 set = plan_set(plan, c.runs[r].set);
            if (set == kEmptySet) break;  // from here on only speculative entries
            end = chains_.run_end(c, r);
            if (plan.runs.size() == first || plan.runs.back().set != set) plan.runs.push_back({c.runs[r].start, set});
        }
        if (end == c.base) continue;
        const u32 parent = c.parent == kNone ? kNone : plan.chain_no[c.parent];
        if (id >= plan.chain_no.size()) plan.chain_no.resize(id + 1, kNone);
        plan.chain_no[id] = static_cast<u32>(plan.chains.size());
        plan.chains.push_back(id);
        plan.records.push_back({c.space, parent, c.base, end - c.base, static_cast<u32>(plan.runs.size()) - first,
                                chains_.own(c).size(), c.lookahead, 0});
        plan.blocks += end - c.base;
        kids.clear();
        for (u32 k = c.first_kid; k != kNone; k = chains_.next_kid(k)) kids.push_back(k);
        stack.insert(stack.end(), kids.rbegin(), kids.rend());
    }
}
u32 Presence::plan_set(SavePlan& plan, u32 set) const {
    if (set >= plan.set_no.size()) plan.set_no.resize(set + 1, kNone);
    if (plan.set_no[set] != kNone) return plan.set_no[set];
    std::vector<u64> words;
    sets_.each(set, [&](u32 h) {
        const u32 to = plan.holder_no[h];
        if (to == kNone) return;
        if (words.size() <= to >> 6) words.resize((to >> 6) + 1);
        words[to >> 6] |= 1ull << (to & 63);
    });
    if (words.empty()) return plan.set_no[set] = kEmptySet;
    if (plan.guesses) {
        // Sets that differ only in speculative entries are one.
        const auto known = plan.by_words.emplace(words, plan.n_sets + 1);
        if (!known.second) return plan.set_no[set] = known.first->second;
    }
    plan.sets.push_back(words.size());
    plan.sets.insert(plan.sets.end(), words.begin(), words.end());
    return plan.set_no[set] = static_cast<u32>(++plan.n_sets);
}

void Presence::save(SectionWriter& to, const SavePlan& plan) const {
    const auto save_blocks = [&](SnapshotBytes& out, u64(Page::* what)[kPageBlocks]) {
        for (std::size_t i = 0; i < plan.chains.size(); ++i) {
            const Chain& c = chains_[plan.chains[i]];
            const u32 end = c.base + plan.records[i].len;
            u8* to = out.room(u64{8} * plan.records[i].len);
            for (u32 d = c.base; d < end;) {
                const u32 slot = chains_[plan.chains[i]].slot(d), n = std::min(kPageBlocks - slot, end - d);
                std::memcpy(to, (chains_.page(c, d).*what) + slot, u64{8} * n);
                to += u64{8} * n;
                d += n;
            }
        }
    };
    const auto each_own = [&](auto&& f) {
        // In the order of the new numbers, which may differ from the order of the ids.
        std::vector<std::pair<u32, const OwnNames*>> list;
        for (u32 id : plan.chains) {
            list.clear();
            for (const OwnNames& o : chains_.own(chains_[id])) list.emplace_back(plan.worker_no[o.worker], &o);
            std::sort(list.begin(), list.end());
            for (const auto& o : list) f(o.first, *o.second);
        }
    };
    const auto save_copies = [&](SnapshotBytes& out) {
        for (u32 id : plan.workers) {
            const Worker& w = registry_.worker_at(id);
            std::vector<std::pair<u64, const Copies*>> list;
            for (const auto& entry : w.copies) {
                const Pos p = chains_.pos(entry.first);
                list.emplace_back(static_cast<u64>(plan.chain_no[p.chain]) << 32 | p.depth, &entry.second);
            }
            std::sort(list.begin(), list.end());
            out.put(static_cast<u32>(list.size()));
            for (const auto& entry : list) {
                out.put(entry.first);
                out.put(static_cast<u32>(entry.second->size()));
                for (const Copy& c : *entry.second) {
                    out.put(c.id);
                    out.put(c.holder == kNone ? kNone : plan.holder_no[c.holder]);
                    out.put(c.count);
                }
            }
        }
    };
    to.section(Section::sets, [&](SnapshotBytes& out) {
        out.put(plan.n_sets);
        out.put(plan.sets.data(), plan.sets.size() * sizeof(u64));
    });
    to.section(Section::chains,
               [&](SnapshotBytes& out) { out.put(plan.records.data(), plan.records.size() * sizeof(ChainRecord)); });
    to.section(Section::runs, [&](SnapshotBytes& out) { out.put(plan.runs.data(), plan.runs.size() * sizeof(Run)); });
    to.section(Section::prefixes, [&](SnapshotBytes& out) { save_blocks(out, &Page::prefix); });
    to.section(Section::names, [&](SnapshotBytes& out) { save_blocks(out, &Page::name); });
    to.section(Section::own, [&](SnapshotBytes& out) {
        each_own([&](u32 worker, const OwnNames& o) {
            const OwnRecord r{worker, o.start, o.ids.size(), 0};
            out.put(&r, sizeof r);
        });
    });
    to.section(Section::own_ids, [&](SnapshotBytes& out) {
        each_own([&](u32, const OwnNames& o) { out.put(o.ids.data(), u64{8} * o.ids.size()); });
    });
    to.section(Section::copies, [&](SnapshotBytes& out) { save_copies(out); });
}

namespace {

// Everything is verified: when it is read, or at the end if it depends on everything else.
class PresenceReader {
public:
    PresenceReader(Memory& m, Registry& registry, SetPool& sets, Chains& chains, const Presence& presence,
                   SectionReader& in, const RestorePlan& plan)
        : mem_(m), registry_(registry), sets_(sets), chains_(chains), presence_(presence), in_(in), plan_(plan) {}

    void read() {
        read_sets();
        read_chains();
        read_own();
        read_copies();
        look_around();
    }

private:
    void read_sets() {
        in_.enter(Section::sets);
        n_sets_ = in_.get<u64>();
        in_.need(n_sets_ <= in_.left() / 16, "there are fewer sets than it says");
        set_at_.assign(1, 0);
        std::vector<u64> words;
        for (u32 i = 1; i <= n_sets_; ++i) {
            const u64 n = in_.get<u64>();
            in_.need(n >= 1 && n <= in_.left() / 8, "a set is longer than the file");
            words.resize(n);
            in_.take(words.data(), n * 8);
            in_.need(words.back() != 0, "a set has empty words at its end");
            const u32 top = static_cast<u32>(n * 64 - 1) - static_cast<u32>(__builtin_clzll(words.back()));
            in_.need(n <= registry_.holder_slots() / 64 + 1 && top < registry_.holder_slots(),
                     "a set has holders that are not there");
            in_.need(sets_.intern(words.data(), static_cast<u32>(n)) == i, "a set is there twice");
            // Workers with holders are numbered in the order of their holders, so these bits need no more room than the
            // set.
            const std::size_t at = knowers_.size();
            set_at_.push_back(at);
            knowers_.resize(at + n, 0);
            sets_.each(i, [&](u32 h) {
                const u32 w = registry_.holder(h).worker, k = plan_.knower_no[w];
                knowers_[at + (k >> 6)] |= 1ull << (k & 63);
                if (registry_.worker_at(w).ghost != h) return;
                for (u32 o = plan_.first[w]; o < h; ++o)
                    in_.need(!sets_.has(i, o), "a block is held and only remembered at once");
            });
        }
        set_at_.push_back(knowers_.size());
        in_.done();
    }
    u64 knowers(u32 set, std::size_t word) const {
        const std::size_t at = set_at_[set] + word;
        return at < set_at_[set + 1] ? knowers_[at] : 0;
    }
    std::size_t words(u32 set) const { return set_at_[set + 1] - set_at_[set]; }

    // ---- content ----------------------------------------------------------------------------------------------------

    void read_chains() {
        const std::vector<Run> runs = in_.all<Run>(Section::runs);
        in_.enter(Section::chains);
        in_.need(in_.left() % sizeof(ChainRecord) == 0 && in_.left() / sizeof(ChainRecord) < kNone, "a section is cut");
        const u32 n = static_cast<u32>(in_.left() / sizeof(ChainRecord));
        u64 blocks = 0, pages = 0, own = 0, run = 0;
        std::vector<u64> heads(registry_.space_slots(), 0), named(registry_.space_slots(), 0);
        records_.resize(n);
        for (ChainRecord& r : records_) {
            in_.take(&r, sizeof r);
            in_.need(r.space < registry_.space_slots() && r.len && r.runs && u64{r.base} + r.len < (1u << 31) &&
                         r.lookahead <= kMostLookahead && r.zero == 0,
                     "a chain is none");
            blocks += r.len;
            pages += r.len / kPageBlocks + 2;
            own += r.own;
            run += r.runs;
            ++heads[r.space];
        }
        in_.need(run == runs.size(), "there are more or fewer runs than the chains have");
        in_.need(pages < (1u << 29), "there is more content than an index can hold");
        in_.enter(Section::own);
        in_.need(own <= in_.left() / sizeof(OwnRecord) && in_.left() == own * sizeof(OwnRecord),
                 "there are more or fewer names than the chains have");
        const u8* prefix = in_.raw(Section::prefixes, blocks);
        const u8* name = in_.raw(Section::names, blocks);
        u64 block = 0;
        for (const ChainRecord& r : records_)
            for (u32 k = 0; k < r.len; ++k) {
                u64 v;
                std::memcpy(&v, name + 8 * block++, sizeof v);
                named[r.space] += v != kNoName;
            }
        for (u32 s = 0; s < registry_.space_slots(); ++s) {
            in_.need(named[s] < (1u << 30), "there are more names than an index can hold");
            if (heads[s]) registry_.space_at(s).heads.reserve(mem_, static_cast<u32>(heads[s]));
            if (named[s]) registry_.space_at(s).names.reserve(mem_, static_cast<u32>(named[s]));
        }
        Chains& chains = chains_;
        run = 0;
        u32 alike = 0;
        for (u32 i = 0; i < n; ++i) {
            in_.stand_at(Section::chains, u64{i} * sizeof(ChainRecord));
            const ChainRecord& r = records_[i];
            in_.need(chains.create(r.space, kNone, r.base, r.lookahead) == i, "a chain is out of order");
            Chain& c = chains[i];
            const u32 end = r.base + r.len;
            c.pages.reserve(mem_, ((end - 1) >> kPageShift) - (r.base >> kPageShift) + 1);
            c.runs.reserve(mem_, r.runs);
            for (u32 k = 0; k < r.runs; ++k) {
                const Run& at = runs[run++];
                const u32 stop = k + 1 < r.runs ? runs[run].start : end;
                in_.need(at.start < stop && stop <= end && (k || at.start == r.base), "runs are out of order");
                in_.need(at.set != kEmptySet && at.set <= n_sets_, "a set is not there");
                in_.need(!k || c.runs.back().set != at.set, "equal runs are not joined");
                // Aligned: sections are aligned, and so are the bytes that come from Python and from files.
                assert(reinterpret_cast<std::uintptr_t>(prefix) % alignof(u64) == 0);
                chains.append(i, reinterpret_cast<const u64*>(prefix), stop - at.start, at.set, r.len);
                prefix += u64{8} * (stop - at.start);
                sets_.each(at.set, [&](u32 h) { registry_.holder(h).blocks += stop - at.start; });
            }
            Space& space = registry_.space_at(r.space);
            const u64 head = chains.head(i);
            // If prefix hashes collide, only the same place means the same content. A publisher that has the seed can
            // make them collide, and a table full of collisions is slow. More than these are no accident.
            const auto same = [&](const HeadSlot& s) {
                return records_[s.chain()].parent == r.parent && records_[s.chain()].base == r.base;
            };
            if (space.heads.find(head).chain() != kNone)
                in_.need(++alike <= kMostAlike && space.heads.find_among(head, same).chain() == kNone,
                         "content is there twice");
            space.heads.insert(mem_, head, i, chains.first_page(i));
            read_names(space, c, name);
            name += u64{8} * r.len;
            attach(i, r);
        }
        // In reverse, so that children keep their order.
        for (u32 i = n; i-- > 0;) {
            if (records_[i].parent != kNone) chains.link(i, records_[i].parent);
        }
        bool unused = false;
        sets_.each_live([&](u32 set, u32 refs) { unused |= set != kEmptySet && refs == 0; });
        for (u32 s = 1; s <= n_sets_; ++s) unused |= sets_.refs(s) == 0;
        in_.need(!unused, "a set is used by nobody");
    }
    void read_names(Space& space, Chain& c, const u8* name) {
        constexpr u32 kAhead = 24;
        u64 v;
        for (u32 d = c.base, i = 0; d < c.end(); ++d, ++i) {
            if (i + kAhead < c.len) {
                std::memcpy(&v, name + u64{8} * (i + kAhead), sizeof v);
                space.names.prefetch(v);
            }
            std::memcpy(&v, name + u64{8} * i, sizeof v);
            if (v == kNoName) continue;
            const u32 ref = chains_.ref(c, d);
            chains_.name(ref) = v;
            in_.need(
                v != kNameless && space.names.insert_new(mem_, v, ref, [&](u32 o) { return chains_.name(o) == v; }),
                "a name is there twice");
        }
    }
    // Attaches a chain below its parent, which has been read, and verifies that known blocks are closed towards the
    // root.
    void attach(u32 i, const ChainRecord& r) {
        const Chain& c = chains_[i];
        u32 above = kNone;
        if (r.parent == kNone) {
            in_.need(r.base == 0, "a chain without a parent starts below the root");
        } else {
            in_.need(r.parent < i, "a chain is before its parent");
            const Chain& p = chains_[r.parent];
            in_.need(r.base > p.base && r.base <= p.end() && p.space == c.space && p.lookahead == c.lookahead,
                     "a chain hangs outside its parent");
            above = chains_.set_at(p, r.base - 1);
        }
        for (u32 k = 0; k < c.runs.size(); ++k) {
            const u32 set = c.runs[k].set;
            for (std::size_t x = 0; x < words(set); ++x)
                in_.need(above == kNone || !(knowers(set, x) & ~knowers(above, x)),
                         "a worker knows a block, but not the one before it");
            above = set;
        }
        each_bit(c.runs[0].set, [&](u32 id) {
            Worker& w = registry_.worker_at(id);
            in_.need(w.space == c.space, "a worker holds blocks of another model");
            w.chains.add(mem_, i);
            if (r.parent != kNone) w.kids.add(mem_, Presence::kid_key(r.parent, r.base - 1));
        });
    }
    template <class F>
    void each_bit(u32 set, F&& f) const {
        for (std::size_t x = 0; x < words(set); ++x)
            for (u64 bits = knowers(set, x); bits; bits &= bits - 1)
                f(plan_.knower[x * 64 + static_cast<u32>(__builtin_ctzll(bits))]);
    }

    // ---- names of one's own -----------------------------------------------------------------------------------------

    void read_own() {
        const std::vector<OwnRecord> list = in_.all<OwnRecord>(Section::own);
        u64 ids = 0;
        std::vector<u64> size(registry_.worker_slots(), 0);
        for (const OwnRecord& o : list) {
            in_.need(o.worker < registry_.worker_slots() && o.zero == 0, "names of a worker that is not there");
            ids += o.n;
        }
        const u8* id = in_.raw(Section::own_ids, ids);
        u64 at = 0;
        for (const OwnRecord& o : list)
            for (u32 k = 0; k < o.n; ++k) {
                u64 v;
                std::memcpy(&v, id + 8 * at++, sizeof v);
                size[o.worker] += v != kNoName && v != kNameless;
            }
        for (u32 w = 0; w < size.size(); ++w) {
            in_.need(size[w] < (1u << 30), "there are more names than an index can hold");
            if (size[w]) registry_.worker_at(w).own.reserve(mem_, static_cast<u32>(size[w]));
        }
        u64 next = 0;
        for (u32 i = 0; i < records_.size(); ++i) {
            if (!records_[i].own) continue;
            const Chain& c = chains_[i];
            Buf<OwnNames>& own = chains_.named(i);
            own.reserve(mem_, records_[i].own);
            for (u32 k = 0; k < records_[i].own; ++k) {
                in_.stand_at(Section::own, next * sizeof(OwnRecord));
                const OwnRecord& o = list[next++];
                in_.need(!k || o.worker > own.back().worker, "names are out of order");
                in_.need(o.start >= c.base && o.n && u64{o.start} + o.n <= c.end(),
                         "names of blocks that are not there");
                own.push(mem_, OwnNames{o.worker, o.start, 0, {}});
                OwnNames& to = own.back();
                to.ids.resize(mem_, o.n);
                std::memcpy(to.ids.data(), id, u64{8} * o.n);
                id += u64{8} * o.n;
                enlist(c, to);
            }
        }
    }
    void enlist(const Chain& c, OwnNames& o) {
        constexpr u32 kAhead = 24;
        RefTable& table = registry_.worker_at(o.worker).own;
        for (u32 i = 0; i < o.ids.size(); ++i) {
            if (i + kAhead < o.ids.size()) table.prefetch(o.ids[i + kAhead]);
            const u64 v = o.ids[i];
            if (v == kNoName) continue;
            ++o.used;
            if (v == kNameless) continue;
            const auto same = [&](u32 ref) { return presence_.own_name(o.worker, chains_.pos(ref)) == v; };
            in_.need(table.insert_new(mem_, v, chains_.ref(c, o.start + i), same),
                     "a name of a worker's own is there twice");
        }
        in_.need(o.used, "there are no names in a list of names");
    }

    void read_copies() {
        in_.enter(Section::copies);
        for (u32 id = 0; id < registry_.worker_slots(); ++id) {
            Worker& w = registry_.worker_at(id);
            for (u32 k = in_.count(12); k; --k) {
                const u64 where = in_.get<u64>();
                const Pos p{static_cast<u32>(where >> 32), static_cast<u32>(where)};
                in_.need(p.chain < records_.size(), "copies of a block that is not there");
                const Chain& c = chains_[p.chain];
                in_.need(p.depth >= c.base && p.depth < c.end() && presence_.knows(w, presence_.set_at(p)),
                         "copies of a block that is not there");
                const u32 ref = chains_.ref(p);
                in_.need(!w.copies.count(ref), "a block's copies are there twice");
                Copies& list = w.copies.try_emplace(ref, Counted<Copy>(mem_)).first->second;
                list.resize(in_.count(16));
                for (Copy& copy : list) {
                    copy.id = in_.get<u64>();
                    copy.holder = kNone;
                    u32 h;
                    std::memcpy(&h, in_.peek(4), 4);
                    if (h == kNone) {
                        in_.skip(4);
                        in_.need(w.second.emplace(copy.id, ref).second, "a second name is there twice");
                    } else {
                        copy.holder = read_holder(in_, plan_, registry_, id);
                        in_.need((p.depth + 1) % registry_.holder(copy.holder).factor == 0,
                                 "a copy of part of a block");
                    }
                    copy.count = in_.get<u32>();
                }
                for (u32 h : w.holders) {
                    if ((p.depth + 1) % registry_.holder(h).factor) continue;
                    const bool any =
                        std::any_of(list.begin(), list.end(), [&](const Copy& x) { return x.holder == h && x.count; });
                    in_.need(any == sets_.has(presence_.set_at(p), h), "copies and holders disagree");
                }
                for (const Copy& copy : list)
                    in_.need(presence_.find(id, copy.id) == ref, "a copy's name is another block's");
            }
        }
        in_.done();
    }
    // Verifies, once everything is in place, that each worker's names lead to its blocks, that no block is remembered
    // without a reason, and that blocks of larger sizes are whole.
    void look_around() {
        std::vector<std::pair<u32, u32>> ends;  // workers that know a part of a chain, and the end of that part
        for (u32 i = 0; i < records_.size(); ++i) {
            in_.stand_at(Section::chains, u64{i} * sizeof(ChainRecord));
            const Chain& c = chains_[i];
            ends.clear();
            bool unnamed = false;
            for (u32 d = c.base; d < c.end() && !unnamed; ++d) unnamed = chains_.name(chains_.ref(c, d)) == kNoName;
            for (u32 r = 0; r < c.runs.size(); ++r) {
                const u32 set = c.runs[r].set, next = r + 1 < c.runs.size() ? c.runs[r + 1].set : kEmptySet,
                          stop = chains_.run_end(c, r);
                for (std::size_t x = 0; x < words(set); ++x)
                    for (u64 bits = knowers(set, x) & ~(next ? knowers(next, x) : 0); bits; bits &= bits - 1)
                        ends.emplace_back(plan_.knower[x * 64 + static_cast<u32>(__builtin_ctzll(bits))], stop);
            }
            if (!plan_.wide.empty()) whole(c);
            std::sort(ends.begin(), ends.end());
            const Buf<OwnNames>& names = chains_.own(c);
            u32 o = 0;
            for (const auto& e : ends) {
                const Worker& w = registry_.worker_at(e.first);
                const Pos last{i, e.second - 1};
                if (w.ghost != kNone && sets_.has(presence_.set_at(last), w.ghost))
                    in_.need(presence_.knows_child(w, last), "a block is remembered for nothing");
                const bool own = o < names.size() && names[o].worker == e.first;
                named(e.first, i, e.second, own ? &names[o] : nullptr, unnamed);
                o += own;
            }
            in_.need(o == names.size(), "names of a worker that does not know the chain");
        }
    }
    // An engine block of several index blocks is held as a whole: a part of it is held exactly if a block below it is.
    // This is certain where the set does not change from a block to the next and no chain forks off.
    void whole(const Chain& c) const {
        std::map<u32, std::vector<u64>> below;  // depth -> the workers that have a block below it
        const auto join = [&](std::vector<u64>& to, u32 set) {
            if (to.size() < plan_.wide.size()) to.resize(plan_.wide.size());
            for (u32 x = 0; x < sets_.words(set) && x < plan_.wide.size(); ++x)
                to[x] |= sets_.data(set)[x] & plan_.wide[x];
        };
        for (u32 r = 0; r < c.runs.size(); ++r)
            join(below[chains_.run_end(c, r) - 1], r + 1 < c.runs.size() ? c.runs[r + 1].set : kEmptySet);
        for (u32 k = c.first_kid; k != kNone; k = chains_.next_kid(k)) {
            const u32 base = chains_[k].base;
            std::vector<u64>& to = below[base - 1];
            if (to.empty() && base < c.end()) join(to, chains_.set_at(c, base));
            join(to, chains_[k].runs[0].set);
        }
        for (const auto& at : below) {
            const u32 set = chains_.set_at(c, at.first);
            for (u32 x = 0; x < plan_.wide.size(); ++x)
                for (u64 bits = ((x < sets_.words(set) ? sets_.data(set)[x] & plan_.wide[x] : 0) ^ at.second[x]); bits;
                     bits &= bits - 1)
                    in_.need(
                        (at.first + 1) % registry_.holder(x * 64 + static_cast<u32>(__builtin_ctzll(bits))).factor == 0,
                        "part of a block is held without the rest");
        }
    }
    void named(u32 id, u32 chain, u32 end, const OwnNames* o, bool unnamed) const {
        const Worker& w = registry_.worker_at(id);
        const Chain& c = chains_[chain];
        if (o)
            for (u32 k = end > o->start ? end - o->start : 0; k < o->ids.size(); ++k)
                in_.need(o->ids[k] == kNoName, "a name for a block that its worker does not know");
        if (!o && !unnamed && !w.own.size()) return;
        for (u32 r = 0; r < c.runs.size() && c.runs[r].start < end; ++r) {
            const u32 stop = std::min(end, chains_.run_end(c, r));
            for (u32 d = c.runs[r].start; d < stop; ++d) {
                const u64 own = o && d >= o->start && d - o->start < o->ids.size() ? o->ids[d - o->start] : kNoName;
                if (own != kNoName && own != kNameless) continue;
                const u32 ref = chains_.ref(c, d);
                const u64 name = own == kNameless ? kNoName : chains_.name(ref);
                if (name != kNoName) {
                    if (w.own.size()) in_.need(presence_.find(id, name) == ref, "a name leads to another block");
                    continue;
                }
                if (w.copies.count(ref)) continue;
                for (u32 h : w.holders)
                    in_.need((d + 1) % registry_.holder(h).factor || !sets_.has(c.runs[r].set, h),
                             "a block is held without a name");
            }
        }
    }

    static constexpr u32 kMostAlike = 4096;

    Memory& mem_;
    Registry& registry_;
    SetPool& sets_;
    Chains& chains_;
    const Presence& presence_;
    SectionReader& in_;
    const RestorePlan& plan_;
    u64 n_sets_ = 0;
    std::vector<std::size_t> set_at_;  // the start of each set's words in knowers_
    std::vector<u64> knowers_;         // the workers that know a block with a set, as bits
    std::vector<ChainRecord> records_;
};

}  // namespace

void Presence::restore(SectionReader& in, const RestorePlan& plan) {
    PresenceReader(mem_, registry_, sets_, chains_, *this, in, plan).read();
}

}  // namespace kvindex
