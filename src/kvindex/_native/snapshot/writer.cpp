// An index into the bytes of a snapshot: dense numbers in place of ids, and what can be computed left out.
#include "index.hpp"
#include "snapshot/snapshot.hpp"

namespace kvindex {

class SnapshotWriter {
public:
    SnapshotWriter(const Index& ix, SnapshotBytes& out) : ix_(ix), out_(out) {}

    void write(const std::vector<u64>& counters) {
        number();
        collect();
        const u64 blocks = blocks_ * 2 * sizeof(u64);
        out_.reserve(kSnapshotHead + blocks + blocks / 8 + (1u << 16));
        std::memset(out_.room(kSnapshotHead), 0, kSnapshotHead);
        section(Section::media, [&] {
            out_.put(ix_.media_.size());
            ix_.media_.each([&](u32 id, const std::string& shown, u64) {
                medium_no_.emplace(id, static_cast<u32>(medium_no_.size()));
                out_.text(shown);
            });
        });
        section(Section::models, [&] {
            out_.put(static_cast<u32>(ix_.spaces_.size()));
            for (const Space& s : ix_.spaces_) out_.text(s.model);
        });
        section(Section::pods, [&] { write_pods(); });
        section(Section::workers, [&] { write_workers(); });
        section(Section::sets, [&] {
            out_.put(n_sets_);
            out_.put(sets_.data(), sets_.size() * sizeof(u64));
        });
        section(Section::chains, [&] { out_.put(records_.data(), records_.size() * sizeof(ChainRecord)); });
        section(Section::runs, [&] { out_.put(runs_.data(), runs_.size() * sizeof(Run)); });
        section(Section::prefixes, [&] { write_blocks(&Page::prefix); });
        section(Section::names, [&] { write_blocks(&Page::name); });
        section(Section::own, [&] {
            each_own([&](u32 worker, const OwnNames& o) {
                const OwnRecord r{worker, o.start, o.ids.size(), 0};
                out_.put(&r, sizeof r);
            });
        });
        section(Section::own_ids,
                [&] { each_own([&](u32, const OwnNames& o) { out_.put(o.ids.data(), u64{8} * o.ids.size()); }); });
        section(Section::copies, [&] { write_copies(); });
        section(Section::parked, [&] { write_parked(); });
        section(Section::counters, [&] { out_.put(counters.data(), counters.size() * sizeof(u64)); });
        SnapshotHeader h = {};
        std::memcpy(h.magic, kSnapshotMagic, sizeof h.magic);
        h.version = kSnapshotVersion;
        h.bytes = out_.size();
        h.seed = ix_.seed();
        h.block_size = ix_.block_size();
        h.max_parked = ix_.max_parked();
        h.set_presence = ix_.set_presence_;
        h.sections = kSections;
        std::memcpy(out_.at(0), &h, sizeof h);
        if (masks_ > kFreeMasks + out_.size() * 16)
            throw SnapshotRefused("there are more workers than a reader would believe");
    }

private:
    // Dense numbers in place of ids: pods in the order in which they were opened (which decides between equals), their
    // workers, and each worker's holders one after another, its ghost last. Guesses are left out.
    void number() {
        for (u32 i = 0; i < ix_.pods_.size(); ++i)
            if (ix_.pods_[i].uid && ix_.find_pod(ix_.pods_[i].name) == i) pods_.push_back(i);
        std::sort(pods_.begin(), pods_.end(), [&](u32 a, u32 b) { return ix_.pods_[a].uid < ix_.pods_[b].uid; });
        worker_no_.assign(ix_.workers_.size(), kNone);
        holder_no_.assign(ix_.holders_.size(), kNone);
        for (u32 pod : pods_) {
            for (u32 id : ix_.pods_[pod].workers) {
                const Worker& w = *ix_.workers_[id];
                worker_no_[id] = static_cast<u32>(workers_.size());
                workers_.push_back(id);
                for (u32 h : w.holders) holder_no_[h] = n_holders_++;
                masks_ += n_holders_ / 8 + 8;
                if (w.ghost != kNone) holder_no_[w.ghost] = n_holders_++;
                guesses_ |= w.guess != kNone;
            }
        }
    }
    // Parents before their children, so that reading needs to look back only.
    void collect() {
        std::vector<u32> stack, kids;
        ix_.chains_.each([&](u32 c) {
            if (ix_.chains_[c].parent == kNone) stack.push_back(c);
        });
        std::reverse(stack.begin(), stack.end());
        while (!stack.empty()) {
            const u32 id = stack.back();
            stack.pop_back();
            const Chain& c = ix_.chains_[id];
            const u32 first = static_cast<u32>(runs_.size());
            u32 end = c.base;
            for (u32 r = 0; r < c.runs.size(); ++r) {
                const u32 set = set_no(c.runs[r].set);
                if (set == kEmptySet) break;  // from here on only guessed
                end = ix_.chains_.run_end(c, r);
                if (runs_.size() == first || runs_.back().set != set) runs_.push_back({c.runs[r].start, set});
            }
            if (end == c.base) continue;
            const u32 parent = c.parent == kNone ? kNone : chain_no_[c.parent];
            if (id >= chain_no_.size()) chain_no_.resize(id + 1, kNone);
            chain_no_[id] = static_cast<u32>(chains_.size());
            chains_.push_back(id);
            records_.push_back({c.space, parent, c.base, end - c.base, static_cast<u32>(runs_.size()) - first,
                                c.own.size(), c.lookahead, 0});
            blocks_ += end - c.base;
            kids.clear();
            for (u32 k = c.first_kid; k != kNone; k = ix_.chains_[k].kid_after) kids.push_back(k);
            stack.insert(stack.end(), kids.rbegin(), kids.rend());
        }
    }
    u32 set_no(u32 set) {
        if (set >= set_no_.size()) set_no_.resize(set + 1, kNone);
        if (set_no_[set] != kNone) return set_no_[set];
        std::vector<u64> words;
        ix_.sets_.each(set, [&](u32 h) {
            const u32 to = holder_no_[h];
            if (to == kNone) return;
            if (words.size() <= to >> 6) words.resize((to >> 6) + 1);
            words[to >> 6] |= 1ull << (to & 63);
        });
        if (words.empty()) return set_no_[set] = kEmptySet;
        if (guesses_) {
            // Sets that differ only in guesses are one.
            const auto known = by_words_.emplace(words, n_sets_ + 1);
            if (!known.second) return set_no_[set] = known.first->second;
        }
        sets_.push_back(words.size());
        sets_.insert(sets_.end(), words.begin(), words.end());
        return set_no_[set] = static_cast<u32>(++n_sets_);
    }

    template <class F>
    void section(Section s, F&& f) {
        out_.align();
        const u64 from = out_.size();
        f();
        const u64 bytes = out_.size() - from;
        std::memcpy(out_.at(sizeof(SnapshotHeader) + u64{8} * static_cast<u32>(s)), &bytes, sizeof bytes);
    }
    void write_pods() {
        out_.put(static_cast<u32>(pods_.size()));
        for (u32 id : pods_) {
            const Pod& p = ix_.pods_[id];
            out_.text(p.name);
            out_.put(static_cast<u32>(p.set_presence));
            out_.put(p.chunk_tokens);
            out_.put(p.max_blocks);
            out_.put(static_cast<u32>(p.engine) | p.hybrid * 256u | p.eagle * 512u);
            out_.put(static_cast<u32>(p.eagle_groups.size()));
            for (i64 g : p.eagle_groups) out_.put(g);
            out_.put(static_cast<u32>(p.refused.any));
            out_.put(static_cast<u32>(p.has_clear_media));
            out_.put(static_cast<u32>(p.clear_media.size()));
            for (u32 m : p.clear_media) out_.put(medium_no_.at(m));
            out_.put(static_cast<u32>(p.ignore_media.size()));
            for (u32 m : p.ignore_media) out_.put(medium_no_.at(m));
            std::set<i64> ranks;
            for (const auto& s : p.streams) ranks.insert(s.first);
            for (const auto& s : p.positions) ranks.insert(s.first);
            for (u32 w : p.workers) ranks.insert(ix_.workers_[w]->rank);
            out_.put(static_cast<u32>(ranks.size()));
            for (i64 rank : ranks) out_.put(rank);
            out_.put(static_cast<u32>(p.positions.size()));
            for (const auto& s : p.positions) {
                out_.put(s.first);
                out_.put(s.second.seq);
                out_.put(s.second.ts);
                out_.put(s.second.fingerprint);
                out_.put(s.second.space);
                out_.put(static_cast<u32>(s.second.whole));
            }
        }
    }
    void write_workers() {
        out_.put(static_cast<u32>(workers_.size()));
        std::vector<u32> pod_no(ix_.pods_.size(), kNone);
        for (u32 i = 0; i < pods_.size(); ++i) pod_no[pods_[i]] = i;
        for (u32 id : workers_) {
            const Worker& w = *ix_.workers_[id];
            out_.put(pod_no[w.pod]);
            out_.put(w.space);
            out_.put(w.rank);
            out_.put(w.placed_full | w.small_blocks * 2u | w.sticky * 4u | (w.ghost != kNone) * 8u | w.shed * 16u |
                     w.muted * 32u | w.in_doubt * 64u);
            out_.put(static_cast<u32>(w.groups.size()));
            for (const Group& g : w.groups) {
                out_.put(g.id);
                out_.put(static_cast<u32>(g.kind) | g.told_kind * 256u);
                out_.put(g.window);
                out_.put(g.factor);
            }
            out_.put(static_cast<u32>(w.holders.size()));
            for (u32 h : w.holders) {
                out_.put(medium_no_.at(ix_.holders_[h].medium));
                out_.put(ix_.holders_[h].group);
                out_.put(ix_.holders_[h].factor);
            }
            // The blocks that are left need not have every length that was announced, and one with lookahead decides
            // whether the engine drops a block for its draft model.
            out_.put(static_cast<u32>(w.lengths.size()));
            for (u32 length : w.lengths) out_.put(length);
            std::vector<u64> unsure;
            for (const auto& entry : w.unsure) unsure.push_back(entry.first);
            std::sort(unsure.begin(), unsure.end());
            out_.put(static_cast<u32>(unsure.size()));
            out_.put(unsure.data(), u64{8} * unsure.size());
        }
    }
    void write_blocks(u64 (Page::*what)[kPageBlocks]) {
        for (std::size_t i = 0; i < chains_.size(); ++i) {
            const Chain& c = ix_.chains_[chains_[i]];
            const u32 end = c.base + records_[i].len;
            u8* to = out_.room(u64{8} * records_[i].len);
            for (u32 d = c.base; d < end;) {
                const u32 slot = ix_.chains_[chains_[i]].slot(d), n = std::min(kPageBlocks - slot, end - d);
                std::memcpy(to, (ix_.chains_.page(c, d).*what) + slot, u64{8} * n);
                to += u64{8} * n;
                d += n;
            }
        }
    }
    template <class F>
    void each_own(F&& f) const {
        // In the order of the new numbers, which need not be that of the ids.
        std::vector<std::pair<u32, const OwnNames*>> list;
        for (u32 id : chains_) {
            list.clear();
            for (const OwnNames& o : ix_.chains_[id].own) list.emplace_back(worker_no_[o.worker], &o);
            std::sort(list.begin(), list.end());
            for (const auto& o : list) f(o.first, *o.second);
        }
    }
    void write_copies() {
        for (u32 id : workers_) {
            const Worker& w = *ix_.workers_[id];
            std::vector<std::pair<u64, const Copies*>> list;
            for (const auto& entry : w.copies) {
                const Pos p = ix_.chains_.pos(entry.first);
                list.emplace_back(static_cast<u64>(chain_no_[p.chain]) << 32 | p.depth, &entry.second);
            }
            std::sort(list.begin(), list.end());
            out_.put(static_cast<u32>(list.size()));
            for (const auto& entry : list) {
                out_.put(entry.first);
                out_.put(static_cast<u32>(entry.second->size()));
                for (const Copy& c : *entry.second) {
                    out_.put(c.id);
                    out_.put(c.holder == kNone ? kNone : holder_no_[c.holder]);
                    out_.put(c.count);
                }
            }
        }
    }
    void write_parked() {
        for (u32 id : workers_) {
            const Worker& w = *ix_.workers_[id];
            out_.put(static_cast<u32>(w.lot ? w.lot->records.size() : 0));
            if (!w.lot) continue;
            for (const auto& rec : w.lot->records) {
                const Parked& p = rec.second;
                out_.put(p.waits_for);
                out_.put(u32{p.orphan} | u32{p.rolled} << 1);
                out_.put(p.lookahead);
                out_.put(holder_no_[p.holder]);
                out_.put(static_cast<u32>(p.ids.size()));
                out_.put(p.ids.data(), u64{8} * p.ids.size());
                out_.put(p.live.data(), p.live.size());
                out_.put(p.locals.data(), u64{8} * p.locals.size());
            }
        }
    }

    const Index& ix_;
    SnapshotBytes& out_;
    std::vector<u32> pods_, workers_, chains_;  // what is written, in order
    std::vector<u32> worker_no_, holder_no_, set_no_, chain_no_;
    std::map<u32, u32> medium_no_;
    u32 n_holders_ = 0;
    u64 masks_ = 0;
    bool guesses_ = false;
    std::vector<u64> sets_;
    u64 n_sets_ = 0;
    std::map<std::vector<u64>, u64> by_words_;
    std::vector<ChainRecord> records_;
    std::vector<Run> runs_;
    u64 blocks_ = 0;
};

void write_snapshot(const Index& ix, const std::vector<u64>& counters, SnapshotBytes& out) {
    SnapshotWriter(ix, out).write(counters);
}

}  // namespace kvindex
