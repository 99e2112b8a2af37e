// The bytes of a snapshot into an index. Everything is verified:
// where it is used, or at the end where it needs everything else.
#include "index.hpp"
#include "snapshot/snapshot.hpp"

namespace kvindex {

// Reads a snapshot into an index that is empty. What is refused leaves that index half filled: throw it away.
class SnapshotReader {
public:
    SnapshotReader(Index& ix, const u8* data, u64 bytes) : ix_(ix), data_(data), bytes_(bytes) {}

    void read(std::vector<u64>& counters) {
        const SnapshotHeader h = snapshot_head(data_, bytes_, bytes_);
        if (xxh3_64(data_ + kChecksumFrom, bytes_ - kChecksumFrom, 0) != h.checksum)
            refuse_snapshot("its content does not fit its checksum, so it is damaged", kChecksumFrom);
        need(h.block_size == ix_.block_size() && h.seed == ix_.seed() && ix_.pods_.empty(), "it is of another index");
        split();
        read_media();
        read_models();
        read_pods();
        read_workers();
        read_sets();
        read_chains();
        read_own();
        read_copies();
        read_parked();
        look_around();
        enter(Section::counters);
        need(left() == counters.size() * sizeof(u64), "its counters are others");
        take(counters.data(), left());
    }

    static void fit(Index& ix) {
        ix.fit();
        if (ix.bounded() && ix.bytes() > ix.budget())
            throw SnapshotRefused("it does not fit into max_bytes, with nothing left to shed");
    }

private:
    void need(bool ok, const char* what) const {
        if (!ok) refuse_snapshot(std::string("it contradicts itself: ") + what, at_);
    }

    // ---- sections ---------------------------------------------------------------------------------------------------

    void split() {
        u64 at = kSnapshotHead;
        for (u32 s = 0; s < kSections; ++s) {
            at_ = sizeof(SnapshotHeader) + u64{8} * s;
            u64 n;
            std::memcpy(&n, data_ + at_, sizeof n);
            at = (at + 7) & ~u64{7};
            need(at <= bytes_ && n <= bytes_ - at, "a section is longer than the file");
            from_[s] = at;
            to_[s] = at += n;
        }
        need(at == bytes_, "something follows the last section");
    }
    void enter(Section s) {
        at_ = from_[static_cast<u32>(s)];
        end_ = to_[static_cast<u32>(s)];
    }
    u64 left() const { return end_ - at_; }
    void done() const { need(at_ == end_, "a section is longer than what is in it"); }
    void take(void* to, u64 n) {
        need(n <= left(), "a section is shorter than what is in it");
        if (n) std::memcpy(to, data_ + at_, n);
        at_ += n;
    }
    template <class T>
    T get() {
        T value;
        take(&value, sizeof value);
        return value;
    }
    bool flag() {
        const u32 f = get<u32>();
        need(f <= 1, "a switch is neither on nor off");
        return f != 0;
    }
    // How many entries follow, each of at least so many bytes: nothing is allocated for more than what is there.
    u32 count(u64 each) {
        const u32 n = get<u32>();
        need(n <= left() / each, "there are fewer entries than it says");
        return n;
    }
    std::string text() {
        const u32 n = count(1);
        std::string s(reinterpret_cast<const char*>(data_ + at_), n);
        at_ += n;
        return s;
    }
    // A section that is one array: where it lies, and how many.
    template <class T>
    std::vector<T> all(Section s) {
        enter(s);
        need(left() % sizeof(T) == 0, "a section is cut");
        std::vector<T> list(left() / sizeof(T));
        take(list.data(), left());
        return list;
    }
    const u8* raw(Section s, u64 n) {
        enter(s);
        need(left() == n * sizeof(u64), "a section is not as long as it must be");
        return data_ + at_;
    }

    // ---- who is there -----------------------------------------------------------------------------------------------

    void read_media() {
        enter(Section::media);
        const u32 n = count(4);
        need(n >= 1, "there are no media");
        for (u32 i = 0; i < n; ++i) {
            const std::string name = text();
            need(!name.empty() && ix_.media_.id(name.data(), name.size()) == i, "a medium is there twice");
        }
        done();
    }
    void read_models() {
        enter(Section::models);
        const u32 n = count(4);
        for (u32 i = 0; i < n; ++i) need(ix_.space(text()) == i, "a model is there twice");
        done();
    }
    void read_pods() {
        enter(Section::pods);
        const u32 n = count(32);
        for (u32 i = 0; i < n; ++i) {
            const std::string name = text();
            need(ix_.find_pod(name) == kNone && ix_.pod(name) == i, "a pod is there twice");
            Pod& p = ix_.pods_[i];
            p.standing = Standing::cut_off;
            p.set_presence = flag();
            p.chunk_tokens = get<u32>();
            p.max_blocks = get<u64>();
            const u32 rules = get<u32>();
            need((rules & 255) <= static_cast<u32>(Engine::trtllm) && rules < 1024, "there is no such engine");
            std::vector<i64> eagle_groups(count(8));
            for (i64& g : eagle_groups) g = get<i64>();
            ix_.set_engine(i, static_cast<Engine>(rules & 255), rules & 512, std::move(eagle_groups), rules & 256);
            if (flag()) p.refused.add_unknown();
            p.has_clear_media = flag();
            for (std::vector<u32>* media : {&p.clear_media, &p.ignore_media}) {
                media->resize(count(4));
                for (u32& m : *media) {
                    need((m = get<u32>()) < ix_.media_.size(), "there is no such medium");
                    ix_.media_.take(m);
                }
            }
            // Nobody has listened since this was written: until somebody shows what has happened, nothing is current.
            for (u32 k = count(8); k; --k) p.streams[rank()] = Verdict::stale;
            for (u32 k = count(40); k; --k) {
                const i64 r = rank();
                Position at;
                at.seq = get<u64>();
                at.ts = get<double>();
                at.fingerprint = get<u64>();
                at.space = get<u32>();
                at.whole = flag();
                need(at.space < ix_.spaces_.size(), "a stream's model is not there");
                need(p.streams.count(r) && p.positions.emplace(r, at).second, "a rank is there twice");
            }
        }
        done();
    }
    i64 rank() {
        const i64 r = get<i64>();
        need(r >= 0 && r <= (i64{1} << 31), "a rank is out of range");
        return r;
    }
    void read_workers() {
        enter(Section::workers);
        const u32 n = count(28);
        std::set<std::tuple<u32, i64, u32>> seen;
        u64 masks = 0;
        for (u32 i = 0; i < n; ++i) {
            const u32 pod = get<u32>(), space = get<u32>();
            const i64 r = rank();
            need(pod < ix_.pods_.size() && space < ix_.spaces_.size(), "a worker's pod or model is not there");
            need(ix_.pods_[pod].streams.count(r) && seen.emplace(pod, r, space).second, "a worker is there twice");
            need(ix_.pods_[pod].workers.size() < kMostWorkers, "a pod has too many workers");
            need(ix_.add_worker(pod, r, space) == i, "a worker is out of order");
            Worker& w = *ix_.workers_[i];
            const u32 flags = get<u32>();
            need(flags < 128, "a worker's flags are none");
            w.placed_full = flags & 1;
            w.small_blocks = flags & 2;
            w.sticky = flags & 4;
            w.shed = flags & 16;
            w.muted = flags & 32;
            w.in_doubt = flags & 64;
            need((!w.shed || w.sticky) && (!w.muted || w.shed), "a worker's flags are none");
            const u32 groups = count(20);
            need(groups <= kMostGroups, "a worker has too many groups");
            ix_.charge(sizeof(Group) * groups);
            w.groups.resize(groups);
            std::set<i64> ids;
            for (Group& g : w.groups) {
                g.id = get<i64>();
                const u32 kind = get<u32>();
                g.window = get<u32>();
                g.factor = get<u32>();
                need((kind & 255) <= static_cast<u32>(Attention::chunked) && kind < 512 && ids.insert(g.id).second &&
                         factor(g.factor),
                     "a group is none");
                g.kind = static_cast<Attention>(kind & 255);
                g.told_kind = kind >> 8;
            }
            std::set<std::tuple<u32, u32, u32>> tiers;
            first_.push_back(ix_.holder_slots());
            for (u32 k = count(12); k; --k) {
                const u32 medium = get<u32>(), group = get<u32>(), size = get<u32>();
                need(medium < ix_.media_.size() && group < w.groups.size() && factor(size),
                     "a holder's medium, group or size is none");
                need(tiers.emplace(medium, group, size).second, "a holder is there twice");
                need(ix_.holder_fits(w, medium), "a worker has too many holders");
                ix_.add_holder(w, ix_.new_holder(i, medium, group, size));
                if (size > 1) Index::set_bit(wide_, w.holders.back(), true);
            }
            for (u32 k = count(4); k; --k) {
                const u32 length = get<u32>();
                need(length <= kMostLookahead && ix_.learn_length(w, length),
                     "a model has too many lengths of lookahead");
            }
            for (u32 k = count(8); k; --k) need(w.unsure.emplace(get<u64>(), u8{1}).second, "a name is unsure twice");
            // Charged before the mask is made.
            masks += ix_.holder_slots() / 8 + 8;
            need(masks <= kFreeMasks + bytes_ * 16, "there are more workers than its size allows");
            if (flags & 8) ix_.ghost(i);
            ix_.refresh(i);
            knower_no_.push_back(static_cast<u32>(knower_.size()));
            if (ix_.holder_slots() != first_.back()) knower_.push_back(i);
        }
        ix_.media_.sweep();
        done();
    }
    static bool factor(u32 f) { return f >= 1 && f <= 0xFFFF; }

    // ---- who holds --------------------------------------------------------------------------------------------------

    void read_sets() {
        enter(Section::sets);
        n_sets_ = get<u64>();
        need(n_sets_ <= left() / 16, "there are fewer sets than it says");
        set_at_.assign(1, 0);
        std::vector<u64> words;
        for (u32 i = 1; i <= n_sets_; ++i) {
            const u64 n = get<u64>();
            need(n >= 1 && n <= left() / 8, "a set is longer than the file");
            words.resize(n);
            take(words.data(), n * 8);
            need(words.back() != 0, "a set has empty words at its end");
            const u32 top = static_cast<u32>(n * 64 - 1) - static_cast<u32>(__builtin_clzll(words.back()));
            need(n <= ix_.holder_slots() / 64 + 1 && top < ix_.holder_slots(), "a set has holders that are not there");
            need(ix_.sets_.intern(words.data(), static_cast<u32>(n)) == i, "a set is there twice");
            // Who has holders is numbered as those are, so that these bits need no more room than those.
            const std::size_t at = knowers_.size();
            set_at_.push_back(at);
            knowers_.resize(at + n, 0);
            ix_.sets_.each(i, [&](u32 h) {
                const u32 w = ix_.holders_[h].worker, k = knower_no_[w];
                knowers_[at + (k >> 6)] |= 1ull << (k & 63);
                if (ix_.workers_[w]->ghost != h) return;
                for (u32 o = first_[w]; o < h; ++o)
                    need(!ix_.sets_.has(i, o), "a block is held and only remembered at once");
            });
        }
        set_at_.push_back(knowers_.size());
        done();
    }
    u64 knowers(u32 set, std::size_t word) const {
        const std::size_t at = set_at_[set] + word;
        return at < set_at_[set + 1] ? knowers_[at] : 0;
    }
    std::size_t words(u32 set) const { return set_at_[set + 1] - set_at_[set]; }

    // ---- content ----------------------------------------------------------------------------------------------------

    void read_chains() {
        const std::vector<Run> runs = all<Run>(Section::runs);
        enter(Section::chains);
        need(left() % sizeof(ChainRecord) == 0 && left() / sizeof(ChainRecord) < kNone, "a section is cut");
        const u32 n = static_cast<u32>(left() / sizeof(ChainRecord));
        u64 blocks = 0, pages = 0, own = 0, run = 0;
        std::vector<u64> heads(ix_.spaces_.size(), 0), named(ix_.spaces_.size(), 0);
        records_.resize(n);
        for (ChainRecord& r : records_) {
            take(&r, sizeof r);
            at_ -= sizeof r;
            need(r.space < ix_.spaces_.size() && r.len && r.runs && u64{r.base} + r.len < (1u << 31) &&
                     r.lookahead <= kMostLookahead && r.zero == 0,
                 "a chain is none");
            at_ += sizeof r;
            blocks += r.len;
            pages += r.len / kPageBlocks + 2;
            own += r.own;
            run += r.runs;
            ++heads[r.space];
        }
        need(run == runs.size(), "there are more or fewer runs than the chains have");
        need(pages < (1u << 29), "there is more content than an index can hold");
        enter(Section::own);
        need(own <= left() / sizeof(OwnRecord) && left() == own * sizeof(OwnRecord),
             "there are more or fewer names than the chains have");
        const u8* prefix = raw(Section::prefixes, blocks);
        const u8* name = raw(Section::names, blocks);
        u64 block = 0;
        for (const ChainRecord& r : records_)
            for (u32 k = 0; k < r.len; ++k) {
                u64 v;
                std::memcpy(&v, name + 8 * block++, sizeof v);
                named[r.space] += v != kNoName;
            }
        for (u32 s = 0; s < ix_.spaces_.size(); ++s) {
            need(named[s] < (1u << 30), "there are more names than an index can hold");
            if (heads[s]) ix_.spaces_[s].heads.reserve(ix_.mem_, static_cast<u32>(heads[s]));
            if (named[s]) ix_.spaces_[s].names.reserve(ix_.mem_, static_cast<u32>(named[s]));
        }
        Chains& chains = ix_.chains_;
        run = 0;
        u32 alike = 0;
        const u64 start = from_[static_cast<u32>(Section::chains)];
        for (u32 i = 0; i < n; ++i) {
            at_ = start + u64{i} * sizeof(ChainRecord);
            const ChainRecord& r = records_[i];
            need(chains.create(r.space, kNone, r.base, r.lookahead) == i, "a chain is out of order");
            Chain& c = chains[i];
            const u32 end = r.base + r.len;
            c.pages.reserve(ix_.mem_, ((end - 1) >> kPageShift) - (r.base >> kPageShift) + 1);
            c.runs.reserve(ix_.mem_, r.runs);
            for (u32 k = 0; k < r.runs; ++k) {
                const Run& at = runs[run++];
                const u32 stop = k + 1 < r.runs ? runs[run].start : end;
                need(at.start < stop && stop <= end && (k || at.start == r.base), "runs are out of order");
                need(at.set != kEmptySet && at.set <= n_sets_, "a set is not there");
                need(!k || c.runs.back().set != at.set, "equal runs are not joined");
                // Aligned: sections are, and so are the bytes that come from Python and from files.
                assert(reinterpret_cast<std::uintptr_t>(prefix) % alignof(u64) == 0);
                chains.append(i, reinterpret_cast<const u64*>(prefix), stop - at.start, at.set, r.len);
                prefix += u64{8} * (stop - at.start);
                ix_.sets_.each(at.set, [&](u32 h) { ix_.holders_[h].blocks += stop - at.start; });
            }
            Space& space = ix_.spaces_[r.space];
            const u64 head = chains.head(i);
            // Where prefix hashes collide, it is the same content only in the same place. Whoever knows the seed can
            // make them collide, and a table that is full of such is slow: more than these are nobody's accident.
            const auto same = [&](const HeadSlot& s) {
                return records_[s.chain()].parent == r.parent && records_[s.chain()].base == r.base;
            };
            if (space.heads.find(head).chain() != kNone)
                need(++alike <= kMostAlike && space.heads.find_among(head, same).chain() == kNone,
                     "content is there twice");
            space.heads.insert(ix_.mem_, head, i, chains.first_page(i));
            read_names(space, c, name);
            name += u64{8} * r.len;
            attach(i, r);
        }
        // Backwards, so that children stand in their order.
        for (u32 i = n; i-- > 0;) {
            if (records_[i].parent == kNone) continue;
            chains[i].parent = records_[i].parent;
            chains.link(i);
        }
        bool unused = false;
        ix_.sets_.each_live([&](u32 set, u32 refs) { unused |= set != kEmptySet && refs == 0; });
        for (u32 s = 1; s <= n_sets_; ++s) unused |= ix_.sets_.refs(s) == 0;
        need(!unused, "a set is used by nobody");
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
            const u32 ref = ix_.chains_.ref(c, d);
            ix_.chains_.name(ref) = v;
            need(v != kNameless &&
                     space.names.insert_new(ix_.mem_, v, ref, [&](u32 o) { return ix_.chains_.name(o) == v; }),
                 "a name is there twice");
        }
    }
    // Below its parent, which has been read; and what workers know is closed towards the root.
    void attach(u32 i, const ChainRecord& r) {
        const Chain& c = ix_.chains_[i];
        u32 above = kNone;
        if (r.parent == kNone) {
            need(r.base == 0, "a chain without a parent starts below the root");
        } else {
            need(r.parent < i, "a chain is before its parent");
            const Chain& p = ix_.chains_[r.parent];
            need(r.base > p.base && r.base <= p.end() && p.space == c.space && p.lookahead == c.lookahead,
                 "a chain hangs outside its parent");
            above = ix_.chains_.set_at(p, r.base - 1);
        }
        for (u32 k = 0; k < c.runs.size(); ++k) {
            const u32 set = c.runs[k].set;
            for (std::size_t x = 0; x < words(set); ++x)
                need(above == kNone || !(knowers(set, x) & ~knowers(above, x)),
                     "a worker knows a block, but not the one before it");
            above = set;
        }
        each_bit(c.runs[0].set, [&](u32 id) {
            Worker& w = *ix_.workers_[id];
            need(w.space == c.space, "a worker holds blocks of another model");
            w.chains.add(ix_.mem_, i);
            if (r.parent != kNone) w.kids.add(ix_.mem_, Index::kid_key(r.parent, r.base - 1));
        });
    }
    template <class F>
    void each_bit(u32 set, F&& f) const {
        for (std::size_t x = 0; x < words(set); ++x)
            for (u64 bits = knowers(set, x); bits; bits &= bits - 1)
                f(knower_[x * 64 + static_cast<u32>(__builtin_ctzll(bits))]);
    }

    // ---- names of one's own -----------------------------------------------------------------------------------------

    void read_own() {
        const std::vector<OwnRecord> list = all<OwnRecord>(Section::own);
        u64 ids = 0;
        std::vector<u64> size(ix_.workers_.size(), 0);
        for (const OwnRecord& o : list) {
            need(o.worker < ix_.workers_.size() && o.zero == 0, "names of a worker that is not there");
            ids += o.n;
        }
        const u8* id = raw(Section::own_ids, ids);
        u64 at = 0;
        for (const OwnRecord& o : list)
            for (u32 k = 0; k < o.n; ++k) {
                u64 v;
                std::memcpy(&v, id + 8 * at++, sizeof v);
                size[o.worker] += v != kNoName && v != kNameless;
            }
        for (u32 w = 0; w < size.size(); ++w) {
            need(size[w] < (1u << 30), "there are more names than an index can hold");
            if (size[w]) ix_.workers_[w]->own.reserve(ix_.mem_, static_cast<u32>(size[w]));
        }
        u64 next = 0;
        const u64 start = from_[static_cast<u32>(Section::own)];
        for (u32 i = 0; i < records_.size(); ++i) {
            Chain& c = ix_.chains_[i];
            c.own.reserve(ix_.mem_, records_[i].own);
            for (u32 k = 0; k < records_[i].own; ++k) {
                at_ = start + next * sizeof(OwnRecord);
                const OwnRecord& o = list[next++];
                need(!k || o.worker > c.own.back().worker, "names are out of order");
                need(o.start >= c.base && o.n && u64{o.start} + o.n <= c.end(), "names of blocks that are not there");
                c.own.push(ix_.mem_, OwnNames{o.worker, o.start, 0, {}});
                OwnNames& to = c.own.back();
                to.ids.resize(ix_.mem_, o.n);
                std::memcpy(to.ids.data(), id, u64{8} * o.n);
                id += u64{8} * o.n;
                enlist(c, to);
            }
        }
    }
    void enlist(const Chain& c, OwnNames& o) {
        constexpr u32 kAhead = 24;
        RefTable& table = ix_.workers_[o.worker]->own;
        for (u32 i = 0; i < o.ids.size(); ++i) {
            if (i + kAhead < o.ids.size()) table.prefetch(o.ids[i + kAhead]);
            const u64 v = o.ids[i];
            if (v == kNoName) continue;
            ++o.used;
            if (v == kNameless) continue;
            const auto same = [&](u32 ref) { return ix_.own_name(o.worker, ix_.chains_.pos(ref)) == v; };
            need(table.insert_new(ix_.mem_, v, ix_.chains_.ref(c, o.start + i), same),
                 "a name of a worker's own is there twice");
        }
        need(o.used, "there are no names in a list of names");
    }

    // ---- what fits no chain -----------------------------------------------------------------------------------------

    u32 holder_of(u32 worker) {
        const u32 h = get<u32>();
        const Worker& w = *ix_.workers_[worker];
        need(h >= first_[worker] && h < first_[worker] + w.holders.size(), "a worker has no such holder");
        return h;
    }
    void read_copies() {
        enter(Section::copies);
        for (u32 id = 0; id < ix_.workers_.size(); ++id) {
            Worker& w = *ix_.workers_[id];
            for (u32 k = count(12); k; --k) {
                const u64 where = get<u64>();
                const Pos p{static_cast<u32>(where >> 32), static_cast<u32>(where)};
                need(p.chain < records_.size(), "copies of a block that is not there");
                const Chain& c = ix_.chains_[p.chain];
                need(p.depth >= c.base && p.depth < c.end() && ix_.knows(w, ix_.set_at(p)),
                     "copies of a block that is not there");
                const u32 ref = ix_.chains_.ref(p);
                need(!w.copies.count(ref), "a block's copies are there twice");
                Copies& list = w.copies.try_emplace(ref, Counted<Copy>(ix_.mem_)).first->second;
                list.resize(count(16));
                for (Copy& copy : list) {
                    copy.id = get<u64>();
                    copy.holder = kNone;
                    u32 h;
                    std::memcpy(&h, peek(4), 4);
                    if (h == kNone) {
                        at_ += 4;
                        need(w.second.emplace(copy.id, ref).second, "a second name is there twice");
                    } else {
                        copy.holder = holder_of(id);
                        need((p.depth + 1) % ix_.holders_[copy.holder].factor == 0, "a copy of part of a block");
                    }
                    copy.count = get<u32>();
                }
                for (u32 h : w.holders) {
                    if ((p.depth + 1) % ix_.holders_[h].factor) continue;
                    const bool any =
                        std::any_of(list.begin(), list.end(), [&](const Copy& x) { return x.holder == h && x.count; });
                    need(any == ix_.sets_.has(ix_.set_at(p), h), "copies and holders disagree");
                }
                for (const Copy& copy : list) need(ix_.find(id, copy.id) == ref, "a copy's name is another block's");
            }
        }
        done();
    }
    const u8* peek(u64 n) const {
        need(n <= left(), "a section is shorter than what is in it");
        return data_ + at_;
    }
    void read_parked() {
        enter(Section::parked);
        for (u32 id = 0; id < ix_.workers_.size(); ++id)
            for (u32 k = count(20); k; --k) {
                need(!ix_.workers_[id]->shed, "something waits for what was shed");
                Parked p;
                p.waits_for = get<u64>();
                const u32 kind = get<u32>();
                need(kind <= 3 && kind != 2, "what waits is of no known kind");
                p.orphan = kind & 1;
                p.rolled = kind >> 1;
                p.lookahead = get<u32>();
                need(p.lookahead <= kMostLookahead, "a block has more lookahead than is possible");
                p.holder = holder_of(id);
                const u32 n = count(9);
                need(p.orphan ? n >= 1 : n == 1, "what waits has no blocks");
                p.ids.resize(n);
                take(p.ids.data(), u64{8} * n);
                std::vector<u64> sorted = p.ids;
                std::sort(sorted.begin(), sorted.end());
                need(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(),
                     "a block waits twice in one event");
                p.live.resize(n);
                take(p.live.data(), n);
                for (u8 live : p.live) need(live <= 1, "a switch is neither on nor off");
                if (p.orphan) {
                    const u64 locals = u64{n} * ix_.holders_[p.holder].factor;
                    need(locals <= left() / 8, "there are fewer hashes than blocks that wait");
                    p.locals.resize(locals);
                    take(p.locals.data(), locals * 8);
                }
                ix_.shelve(id, std::move(p));
            }
        done();
    }

    // ---- what must agree --------------------------------------------------------------------------------------------

    // Once everything is in place: each worker's names lead to its blocks,
    // nothing is remembered for nothing, and blocks of larger sizes are whole.
    void look_around() {
        const u64 start = from_[static_cast<u32>(Section::chains)];
        std::vector<std::pair<u32, u32>> ends;  // workers that know something of a chain, and where that ends
        for (u32 i = 0; i < records_.size(); ++i) {
            at_ = start + u64{i} * sizeof(ChainRecord);
            const Chain& c = ix_.chains_[i];
            ends.clear();
            bool unnamed = false;
            for (u32 d = c.base; d < c.end() && !unnamed; ++d)
                unnamed = ix_.chains_.name(ix_.chains_.ref(c, d)) == kNoName;
            for (u32 r = 0; r < c.runs.size(); ++r) {
                const u32 set = c.runs[r].set, next = r + 1 < c.runs.size() ? c.runs[r + 1].set : kEmptySet,
                          stop = ix_.chains_.run_end(c, r);
                for (std::size_t x = 0; x < words(set); ++x)
                    for (u64 bits = knowers(set, x) & ~(next ? knowers(next, x) : 0); bits; bits &= bits - 1)
                        ends.emplace_back(knower_[x * 64 + static_cast<u32>(__builtin_ctzll(bits))], stop);
            }
            if (!wide_.empty()) whole(c);
            std::sort(ends.begin(), ends.end());
            u32 o = 0;
            for (const auto& e : ends) {
                const Worker& w = *ix_.workers_[e.first];
                const Pos last{i, e.second - 1};
                if (w.ghost != kNone && ix_.sets_.has(ix_.set_at(last), w.ghost))
                    need(ix_.knows_child(w, last), "a block is remembered for nothing");
                const bool own = o < c.own.size() && c.own[o].worker == e.first;
                named(e.first, i, e.second, own ? &c.own[o] : nullptr, unnamed);
                o += own;
            }
            need(o == c.own.size(), "names of a worker that does not know the chain");
        }
        for (u32 p = 0; p < ix_.pods_.size(); ++p) ix_.judge(p);
    }
    // An engine block of several index blocks is held as one: a part of it is held exactly if a block below it is.
    // Where nothing changes from a block to the next and nothing forks, that is so.
    void whole(const Chain& c) const {
        std::map<u32, std::vector<u64>> below;  // depth -> who has a block below it
        const auto join = [&](std::vector<u64>& to, u32 set) {
            if (to.size() < wide_.size()) to.resize(wide_.size());
            for (u32 x = 0; x < ix_.sets_.words(set) && x < wide_.size(); ++x)
                to[x] |= ix_.sets_.data(set)[x] & wide_[x];
        };
        for (u32 r = 0; r < c.runs.size(); ++r)
            join(below[ix_.chains_.run_end(c, r) - 1], r + 1 < c.runs.size() ? c.runs[r + 1].set : kEmptySet);
        for (u32 k = c.first_kid; k != kNone; k = ix_.chains_[k].kid_after) {
            const u32 base = ix_.chains_[k].base;
            std::vector<u64>& to = below[base - 1];
            if (to.empty() && base < c.end()) join(to, ix_.chains_.set_at(c, base));
            join(to, ix_.chains_[k].runs[0].set);
        }
        for (const auto& at : below) {
            const u32 set = ix_.chains_.set_at(c, at.first);
            for (u32 x = 0; x < wide_.size(); ++x)
                for (u64 bits = ((x < ix_.sets_.words(set) ? ix_.sets_.data(set)[x] & wide_[x] : 0) ^ at.second[x]);
                     bits; bits &= bits - 1)
                    need((at.first + 1) % ix_.holders_[x * 64 + static_cast<u32>(__builtin_ctzll(bits))].factor == 0,
                         "part of a block is held without the rest");
        }
    }
    void named(u32 id, u32 chain, u32 end, const OwnNames* o, bool unnamed) const {
        const Worker& w = *ix_.workers_[id];
        const Chain& c = ix_.chains_[chain];
        if (o)
            for (u32 k = end > o->start ? end - o->start : 0; k < o->ids.size(); ++k)
                need(o->ids[k] == kNoName, "a name for a block that its worker does not know");
        if (!o && !unnamed && !w.own.size()) return;
        for (u32 r = 0; r < c.runs.size() && c.runs[r].start < end; ++r) {
            const u32 stop = std::min(end, ix_.chains_.run_end(c, r));
            for (u32 d = c.runs[r].start; d < stop; ++d) {
                const u64 own = o && d >= o->start && d - o->start < o->ids.size() ? o->ids[d - o->start] : kNoName;
                if (own != kNoName && own != kNameless) continue;
                const u32 ref = ix_.chains_.ref(c, d);
                const u64 name = own == kNameless ? kNoName : ix_.chains_.name(ref);
                if (name != kNoName) {
                    if (w.own.size()) need(ix_.find(id, name) == ref, "a name leads to another block");
                    continue;
                }
                if (w.copies.count(ref)) continue;
                for (u32 h : w.holders)
                    need((d + 1) % ix_.holders_[h].factor || !ix_.sets_.has(c.runs[r].set, h),
                         "a block is held without a name");
            }
        }
    }

    static constexpr u32 kMostAlike = 4096;

    Index& ix_;
    const u8* data_;
    u64 bytes_;
    u64 at_ = 0, end_ = 0;
    u64 from_[kSections] = {}, to_[kSections] = {};
    u64 n_sets_ = 0;
    std::vector<u32> first_;               // a worker's first holder; its others follow, then its ghost
    std::vector<u64> wide_;                // holders of blocks of several index blocks
    std::vector<u32> knower_, knower_no_;  // workers that have holders, and which of them a worker is
    std::vector<std::size_t> set_at_;      // where a set's words begin in
    std::vector<u64> knowers_;             // the workers that know a block with this set, as bits
    std::vector<ChainRecord> records_;
};

void read_snapshot(Index& ix, const u8* data, u64 bytes, std::vector<u64>& counters) {
    SnapshotReader(ix, data, bytes).read(counters);
}
void fit_loaded(Index& ix) { SnapshotReader::fit(ix); }

}  // namespace kvindex
