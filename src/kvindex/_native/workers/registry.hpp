// The existing pods, workers, holders and models, and the state of each, without any block.
//
// A pod's state is always the worst of the states of its streams and workers, and a worker's own state follows from its
// flags (`judge` after each change of one). A match reads the faces of a worker's holders, and masks of the holders
// that stand for the whole worker (`refresh` after each change of its holders, groups or speculative entry).
#pragma once

#include <algorithm>
#include <atomic>
#include <cassert>

#include "workers/directory.hpp"
#include "workers/workers.hpp"

namespace kvindex {

class SectionReader;
class SectionWriter;
struct RestorePlan;
struct SavePlan;

class Registry {
public:
    Registry(Memory& m, bool set_presence, PodDirectory& directory)
        : mem_(m), set_presence_(set_presence), media_(m), directory_(&directory) {}
    ~Registry() {
        for (auto& w : workers_)
            if (w) w->release(mem_);
        for (Space& s : spaces_) {
            s.heads.release(mem_);
            s.names.release(mem_);
        }
    }
    Registry(const Registry&) = delete;
    Registry& operator=(const Registry&) = delete;

    u32 find_pod(const std::string& name) const {
        const u64 uid = directory_->uid(name);
        return uid ? static_cast<u32>(uid) : kNone;
    }
    u32 pod(const std::string& name) {
        if (const u32 found = find_pod(name); found != kNone) return found;
        const u32 id = free_pods_.empty() ? static_cast<u32>(pods_.size()) : free_pods_.back();
        // Unique among all indexes of the process: an answer may combine several.
        static std::atomic<u64> made{0};
        const u64 uid = (++made << 32) | id;
        open_pod(name, uid);
        if (!free_pods_.empty()) free_pods_.pop_back();
        return id;
    }
    // The numbers that an index has assigned. No other index may assign them to anything else.
    struct Numbers {
        std::unordered_map<std::string, u64> pods;
        std::vector<u32> free_pods;
        u32 pod_slots = 0;
        u64 pods_version = 0;
        Media::Numbers media;
        Standing first_standing = Standing::unheard;
    };
    Numbers numbers() const {
        return {directory_->all(), free_pods_, pod_slots(), pods_version_, media_.numbers(), first_standing_};
    }
    // Whether no number has been assigned since.
    bool as_of(const Numbers& n) const {
        return n.pods_version == pods_version_ && n.media.next == media_.numbers_given();
    }
    // Takes the place of the index whose callers use `directory`, which gets the pods of this index.
    void settle(PodDirectory& directory) {
        directory.become(*directory_);
        directory_ = &directory;
    }
    u32 find_space(const std::string& model) const {
        const auto it = space_ids_.find(model);
        return it == space_ids_.end() ? kNone : it->second;
    }
    // Whether announcements count once, for pods that are opened from now on.
    bool counts_once() const { return set_presence_; }
    u64 pods_version() const { return pods_version_; }
    // A number that distinguishes this index from all others of the process.
    u64 origin() const { return pods_version_ >> 32; }
    bool any_pods() const { return directory_->size() != 0; }
    u32 pod_slots() const { return static_cast<u32>(pods_.size()); }
    const Pod& pod_at(u32 id) const { return pods_[id]; }
    // The pod that had this number when it was opened, or kNone if it has been removed since.
    u32 slot(u64 uid) const {
        const u32 id = static_cast<u32>(uid);
        return uid && id < pods_.size() && pods_[id].uid == uid ? id : kNone;
    }
    Pod& pod_at(u32 id) { return pods_[id]; }
    const Media& media() const { return media_; }
    Media& media() { return media_; }

    const PodDirectory& directory() const { return *directory_; }

    // An event has arrived.
    void heard(u32 pod) {
        if (pods_[pod].standing != Standing::unheard) return;
        pods_[pod].standing = Standing::followed;
        sum_up(pod);
    }
    void mark(u32 pod, i64 rank, State v) {
        pods_[pod].streams[rank] = v;
        pods_[pod].standing = Standing::followed;
        judge(pod);
    }
    // No stream is followed any more, so all pods are stale from now on.
    void nobody_listens() {
        first_standing_ = Standing::cut_off;
        for (u32 id = 0; id < pods_.size(); ++id) {
            Pod& p = pods_[id];
            p.standing = Standing::cut_off;
            for (auto& s : p.streams) s.second = State::stale;
            try {
                for (u32 w : p.workers) p.streams[workers_[w]->rank] = State::stale;
                // Ranks without blocks are stale too: that they are empty is also out of date.
                for (const auto& s : p.positions) p.streams[s.first] = State::stale;
            } catch (const std::bad_alloc&) {
                p.refused.add_unknown();
            }
            judge(id);
        }
    }
    void set_presence(u32 pod, bool set) {
        pods_[pod].set_presence = set;
        judge(pod);
    }
    void set_engine(u32 pod, Engine engine, bool eagle, std::vector<i64> groups, bool hybrid) {
        Pod& p = pods_[pod];
        p.engine = engine;
        p.eagle = eagle;
        p.eagle_groups = std::move(groups);
        p.hybrid = hybrid;
        judge(pod);
        for (u32 w : p.workers) refresh(w);
    }
    void set_chunk(u32 pod, u32 tokens) {
        pods_[pod].chunk_tokens = tokens;
        judge(pod);
    }
    void set_clear_media(u32 pod, const std::vector<std::string>& media) {
        set_media(pods_[pod].clear_media, media);
        pods_[pod].has_clear_media = true;
    }
    void set_media(std::vector<u32>& list, const std::vector<std::string>& media) {
        std::vector<u32> ids;
        ids.reserve(media.size());
        for (const std::string& m : media) {
            const u32 id = media_.id(m.data(), m.size());
            if (id == kNone) continue;
            media_.take(id);
            ids.push_back(id);
        }
        for (u32 id : list) media_.drop(id);
        list = std::move(ids);
    }
    void set_max_blocks(u32 pod, u64 most) {
        pods_[pod].max_blocks = most;
        pods_[pod].spare = 0;
    }
    // Updates the state of a pod: the worst of the states of its streams and workers.
    void judge(u32 pod) {
        for (u32 w : pods_[pod].workers) workers_[w]->state = own_state(*workers_[w]);
        sum_up(pod);
    }
    // After a change of one worker. Few changes affect its state, and a pod may have a thousand workers.
    void judge(Worker& w) {
        const State now = own_state(w);
        if (now == w.state) return;
        w.state = now;
        sum_up(w.pod);
    }
    void sum_up(u32 pod) {
        Pod& p = pods_[pod];
        State v = p.standing == Standing::followed ? State::exact : State::stale;
        for (const auto& s : p.streams) v = std::max(v, s.second);
        if (p.refused.any || p.hybrid) v = std::max(v, State::degraded);
        for (u32 w : p.workers) v = std::max(v, workers_[w]->state);
        if (v == p.state) return;
        p.state = v;
        for (u32 w : p.workers) {
            for (u32 h : workers_[w]->holders) faces_[h].state = v;
            if (workers_[w]->guess != kNone) faces_[workers_[w]->guess].state = v;
        }
    }
    State own_state(const Worker& w) const {
        bool degraded = w.sticky || w.in_doubt || !w.unsure.empty() || w.small_blocks || w.pending != 0;
        const Pod& p = pods_[w.pod];
        degraded |= p.hybrid;
        // If announcements are not counted, blocks that a window has left cannot be distinguished from those that it
        // holds: vLLM 0.33.0 announces both, and 69 of 1,050 recorded answers were too high.
        for (const Group& g : w.groups)
            degraded |=
                (g.kind == Attention::chunked && !p.chunk_tokens) || (g.kind != Attention::full && p.set_presence);
        degraded |= unruled_tiers(w);
        return degraded ? State::degraded : State::exact;
    }
    // Whether vLLM 0.33.0 reuses another length of one of the worker's tiers than the answers here. Beside a window,
    // the connector loads all but the last token of a prompt of whole blocks, while an answer is whole blocks: 4 of
    // 1,050 were too low. If a draft model makes some of several groups drop a block, pool and connector look it up in
    // different ways: 193 to 312 of 1,050 differed, in both directions.
    bool unruled_tiers(const Worker& w) const {
        const Pod& p = pods_[w.pod];
        if (p.engine != Engine::vllm) return false;
        const bool drops = w.groups.size() > 1 && !looks_ahead(w);
        bool unruled = false, tiered = false;
        for (const Group& g : w.groups)
            unruled |= g.kind == Attention::sliding || g.kind == Attention::chunked || (drops && p.drops(g));
        for (u32 h : w.holders) tiered |= holders_[h].medium != 0;
        return unruled && tiered;
    }
    // Whether the worker's hashes cover the tokens that a draft model reads. Then no block is dropped.
    static bool looks_ahead(const Worker& w) {
        return std::any_of(w.lengths.begin(), w.lengths.end(), [](u32 length) { return length != 0; });
    }
    const Space& space_at(u32 id) const { return spaces_[id]; }
    Space& space_at(u32 id) { return spaces_[id]; }
    u32 space_slots() const { return static_cast<u32>(spaces_.size()); }
    // The mean number of slots that a search for an existing name or chain head reads.
    double probes() const {
        u64 looked = 0, found = 0;
        const auto count = [&](const auto& table) {
            looked += table.probes();
            found += table.size();
        };
        for (const Space& s : spaces_) {
            count(s.heads);
            count(s.names);
        }
        for (const auto& w : workers_)
            if (w) count(w->own);
        return found ? static_cast<double>(looked) / static_cast<double>(found) : 0;
    }
    const Worker& worker_at(u32 id) const { return *workers_[id]; }
    Worker& worker_at(u32 id) { return *workers_[id]; }
    bool has_worker(u32 id) const { return id < workers_.size() && workers_[id]; }
    u32 worker_slots() const { return static_cast<u32>(workers_.size()); }
    u32 workers() const { return static_cast<u32>(workers_.size() - free_workers_.size()); }
    const Holder& holder(u32 id) const { return holders_[id]; }
    Holder& holder(u32 id) { return holders_[id]; }
    u32 holders() const { return static_cast<u32>(holders_.size() - free_holders_.size()); }
    u32 holder_slots() const { return static_cast<u32>(holders_.size()); }
    // The holders that have a face, and the speculative holders that stand for one of them.
    const std::vector<u64>& simple() const { return simple_; }
    const std::vector<u64>& guessed() const { return guessed_; }
    // The holders of workers that no single bit describes, and those among them without which a prefix ends.
    const std::vector<u64>& grouped() const { return grouped_; }
    const std::vector<u64>& rooted() const { return rooted_; }
    const Face& face(u32 holder) const { return faces_[holder]; }
    u32 stands_for(u32 guess) const { return stands_for_[guess]; }
    // The holder whose bit stands for the whole worker, or kNone if the worker's groups and media matter. A speculative
    // entry is on the GPU, so beside copies on the GPU it is one more bit for the same blocks.
    u32 face_of(const Worker& w) const {
        if (w.holders.empty()) return w.groups.empty() ? w.guess : kNone;
        if (w.holders.size() != 1 || w.groups.size() != 1 || w.groups[0].kind != Attention::full) return kNone;
        return w.guess == kNone || holders_[w.holders[0]].medium == 0 ? w.holders[0] : kNone;
    }
    Face describe(const Worker& w) const {
        const Pod& p = pods_[w.pod];
        Face f{p.uid, static_cast<u32>(w.rank), 0, 1, p.state, 0, 0};
        const bool ahead = looks_ahead(w);
        bool rootless = !w.groups.empty(), windows = false, drops = false, lookahead = false;
        for (const Group& g : w.groups) {
            rootless &= g.kind != Attention::full;
            windows |= g.kind != Attention::full;
            if (ahead || !p.drops(g)) continue;
            drops = true;
            lookahead |= g.kind != Attention::full;
        }
        // A window that drops a block looks for it behind the end of the other groups.
        if (rootless || lookahead) f.flags |= kRootless;
        if (p.engine == Engine::vllm || p.engine == Engine::sglang) f.flags |= kTiers;
        if (!w.holders.empty()) {
            f.medium = holders_[w.holders[0]].medium;
            f.factor = holders_[w.holders[0]].factor;
        }
        bool alike = w.holders.size() <= 0xFFFF && w.guess == kNone;
        for (u32 h : w.holders) {
            if (holders_[h].medium != f.medium) f.medium = kNone;
            alike &= holders_[h].factor == f.factor;
        }
        if (w.guess != kNone && f.medium != 0) f.medium = kNone;  // A speculative entry is on the GPU.
        for (const Group& g : w.groups) alike &= g.factor == f.factor;
        if (alike) f.bits = static_cast<std::uint16_t>(w.holders.size());
        // vLLM's connectors load a whole prompt, unless a window requires that its last token can be computed again.
        if (p.engine == Engine::vllm && (f.medium == 0 || f.medium == kNone || windows)) f.flags |= kCutsLast;
        if (drops) f.flags |= w.groups.size() == 1 ? kDropsLast : kDropsEach;
        if (f.factor != 1 || f.flags & kRuled) f.flags |= kOdd;
        return f;
    }
    u64 holders_version() const { return holders_version_; }
    u64 held(const Worker& w) const {
        u64 n = 0;
        for (u32 h : w.holders) n += holders_[h].blocks;
        return n;
    }

    // ---- making and removing ----------------------------------------------------------------------------------------

    u32 space(const std::string& model) {
        const auto it = space_ids_.find(model);
        if (it != space_ids_.end()) return it->second;
        const u32 id = static_cast<u32>(spaces_.size());
        widen(spaces_, id + 1);
        Space made;
        made.model = model;
        space_ids_.emplace(model, id);
        spaces_.push_back(std::move(made));
        return id;
    }
    u32 find_worker(u32 pod, i64 rank, u32 space) const {
        for (u32 w : pods_[pod].workers)
            if (workers_[w]->rank == rank && workers_[w]->space == space) return w;
        return kNone;
    }
    u32 worker(u32 pod, i64 rank, u32 space) {
        const u32 found = find_worker(pod, rank, space);
        return found != kNone ? found : add_worker(pod, rank, space);
    }
    u32 add_worker(u32 pod, i64 rank, u32 space) {
        const u32 id = free_workers_.empty() ? static_cast<u32>(workers_.size()) : free_workers_.back();
        widen(workers_, id + 1);
        widen(free_workers_, workers_.size() + 1);
        widen(pods_[pod].workers, pods_[pod].workers.size() + 1);
        widen(spaces_[space].hybrids, workers_.size() + 1);
        std::unique_ptr<Worker> made(new Worker(mem_));
        if (free_workers_.empty()) {
            workers_.emplace_back();
        } else {
            free_workers_.pop_back();
        }
        workers_[id] = std::move(made);
        charge(kWorkerBytes);
        Worker& w = *workers_[id];
        w.pod = pod;
        w.rank = rank;
        w.space = space;
        // The events of a rank that had no room are unknown: its groups might limit every answer.
        w.shed = w.muted = w.sticky = pods_[pod].refused.of(rank);
        w.state = own_state(w);
        pods_[pod].workers.push_back(id);
        return id;
    }
    u32 new_holder(u32 worker, u32 medium, u32 group, u32 factor) {
        Worker& w = *workers_[worker];
        const u32 id = free_holders_.empty() ? static_cast<u32>(holders_.size()) : free_holders_.back();
        widen(holders_, id + 1);
        widen(faces_, id + 1);
        widen(stands_for_, id + 1);
        widen(free_holders_, holders_.size() + 1);
        widen(w.holders, w.holders.size() + 1);
        for (std::vector<u64>* mask : {&simple_, &guessed_, &grouped_, &rooted_, &w.mask}) widen(*mask, (id >> 6) + 1);
        if (free_holders_.empty()) {
            holders_.emplace_back();
            faces_.emplace_back();
            stands_for_.push_back(kNone);
        } else {
            free_holders_.pop_back();
        }
        charge(kHolderBytes);
        holders_[id] = Holder{worker, medium, group, factor, 0};
        media_.take(medium);
        ++holders_version_;
        return id;
    }
    void free_holder(u32 id) {
        refund(kHolderBytes);
        media_.drop(holders_[id].medium);
        holders_[id] = Holder();
        for (std::vector<u64>* mask : {&simple_, &guessed_, &grouped_, &rooted_}) set_bit(*mask, id, false);
        free_holders_.push_back(id);
        ++holders_version_;
    }
    // A second holder like `h`, which no match counts until it is shown.
    u32 hidden_like(u32 id, u32 h) {
        Worker& w = *workers_[id];
        widen(w.hidden, w.hidden.size() + 1);
        const u32 twin = new_holder(id, holders_[h].medium, holders_[h].group, holders_[h].factor);
        set_bit(w.mask, twin, true);
        w.hidden.push_back(twin);
        return twin;
    }
    // From now on, the holder's blocks count, all at once. Needs no memory.
    void show(u32 id, u32 h) {
        Worker& w = *workers_[id];
        assert(w.holders.size() < w.holders.capacity());
        w.hidden.erase(std::find(w.hidden.begin(), w.hidden.end(), h));
        w.holders.push_back(h);
        ++pods_[w.pod].holders;
        refresh(id);
    }
    void hide(u32 id, u32 h) {
        Worker& w = *workers_[id];
        widen(w.hidden, w.hidden.size() + 1);
        w.holders.erase(std::find(w.holders.begin(), w.holders.end(), h));
        w.hidden.push_back(h);
        --pods_[w.pod].holders;
        for (std::vector<u64>* mask : {&simple_, &grouped_, &rooted_}) set_bit(*mask, h, false);
        refresh(id);
    }
    // Removes a holder without blocks, hidden or not.
    void drop_holder(u32 id, u32 h) noexcept {
        Worker& w = *workers_[id];
        pods_[w.pod].holders -= static_cast<u32>(std::count(w.holders.begin(), w.holders.end(), h));
        for (std::vector<u32>* list : {&w.holders, &w.hidden})
            list->erase(std::remove(list->begin(), list->end(), h), list->end());
        set_bit(w.mask, h, false);
        free_holder(h);
        refresh(id);
    }
    u32 ghost(u32 id) {
        Worker& w = *workers_[id];
        if (w.ghost == kNone) {
            w.ghost = new_holder(id, 0, 0, 1);
            set_bit(w.mask, w.ghost, true);
        }
        return w.ghost;
    }
    // The index of the worker's group with this number, or the number of its groups.
    static u32 find_group(const Worker& w, i64 number) {
        const i64 id = number < 0 ? 0 : number;
        u32 g = 0;
        while (g < w.groups.size() && w.groups[g].id != id) ++g;
        return g;
    }
    // The group of an event. kNone: the worker would have one too many.
    u32 group(Worker& w, const GroupSpec& spec, u32 factor) {
        const i64 id = spec.id < 0 ? 0 : spec.id;
        const u32 g = find_group(w, id);
        if (g == kMostGroups) return kNone;
        const bool made = g == w.groups.size();
        if (made) {
            w.groups.emplace_back();
            w.groups[g].id = id;
            charge(sizeof(Group));
        }
        Group& to = w.groups[g];
        const Group before = to;
        to.factor = std::max(to.factor, factor);
        if (spec.kind) {
            to.kind = attention_of(spec.kind, spec.kind_length);
            to.told_kind = true;
        }
        if (spec.window > 0) {
            to.window = static_cast<u32>(std::min<i64>(spec.window, 0x7FFFFFFF));
            if (!to.told_kind) to.kind = Attention::sliding;
        }
        if (made || before.kind != to.kind) judge(w);
        if (before.factor != to.factor) pods_[w.pod].spare = 0;
        return g;
    }
    // kNone: the worker or pod would have one too many.
    u32 holder_for(u32 id, const char* medium, u32 length, u32 group, u32 factor) {
        Worker& w = *workers_[id];
        const u32 known = media_.find(medium, length);
        for (u32 h : w.holders)
            if (holders_[h].medium == known && holders_[h].group == group && holders_[h].factor == factor) return h;
        if (!holder_fits(w, known) || length > kLongestMedium) return kNone;
        const u32 made = media_.id(medium, length);
        if (made == kNone) return kNone;
        u32 h;
        try {
            h = new_holder(id, made, group, factor);
        } catch (const std::bad_alloc&) {
            media_.drop_unused(made);
            throw;
        }
        add_holder(w, h);
        judge(w);
        refresh(id);
        return h;
    }
    bool holder_fits(const Worker& w, u32 medium) const {
        if (w.holders.size() >= kMostHolders || pods_[w.pod].holders >= kMostHoldersOfPod) return false;
        std::vector<u32> media;
        for (u32 h : w.holders) {
            if (holders_[h].medium == medium) return true;
            media.push_back(holders_[h].medium);
        }
        std::sort(media.begin(), media.end());
        return std::unique(media.begin(), media.end()) - media.begin() < kMostMedia;
    }
    void add_holder(Worker& w, u32 h) {
        w.holders.push_back(h);
        set_bit(w.mask, h, true);
        ++pods_[w.pod].holders;
    }
    // Classifies the worker as "a bit describes it" or "its groups and media must be examined".
    void refresh(u32 id) {
        Worker& w = *workers_[id];
        for (u32 h : w.holders) set_bit(simple_, h, false);
        if (w.guess != kNone) {
            set_bit(simple_, w.guess, false);
            set_bit(guessed_, w.guess, false);
        }
        w.face = face_of(w);
        const Face f = describe(w);
        for (u32 h : w.holders) faces_[h] = f;
        if (w.guess != kNone) faces_[w.guess] = f;
        if (w.face != kNone) {
            set_bit(simple_, w.face, true);
            if (w.guess != kNone && w.guess != w.face) {
                set_bit(guessed_, w.guess, true);
                stands_for_[w.guess] = w.face;
            }
        }
        const bool listed = w.face == kNone && (!w.holders.empty() || w.guess != kNone);
        for (u32 h : w.holders) {
            set_bit(grouped_, h, listed);
            set_bit(rooted_, h, listed && w.groups[holders_[h].group].kind == Attention::full);
        }
        if (w.guess != kNone) {
            set_bit(grouped_, w.guess, listed);
            set_bit(rooted_, w.guess, listed);
        }
        spaces_[w.space].rootless -= w.rootless;
        w.rootless = listed && f.flags & kRootless;
        spaces_[w.space].rootless += w.rootless;
        std::vector<u32>& list = spaces_[w.space].hybrids;
        if (listed && w.in_hybrid_list == kNone) {
            assert(list.size() < list.capacity());  // widened with the worker: an index that starts over has no memory
            w.in_hybrid_list = static_cast<u32>(list.size());
            list.push_back(id);
        } else if (!listed && w.in_hybrid_list != kNone) {
            list[w.in_hybrid_list] = list.back();
            workers_[list.back()]->in_hybrid_list = w.in_hybrid_list;
            list.pop_back();
            w.in_hybrid_list = kNone;
        }
    }
    // Records that the worker has blocks with this number of lookahead tokens. Returns false if its model has too many
    // lengths already: each of them costs every question one more pass.
    bool learn_length(Worker& w, u32 lookahead) {
        if (std::find(w.lengths.begin(), w.lengths.end(), lookahead) == w.lengths.end()) {
            Space& s = spaces_[w.space];
            if (lookahead && !s.lengths.count(lookahead) && s.lengths.size() >= kMostLengths) return false;
            widen(w.lengths, w.lengths.size() + 1);
            ++(lookahead ? s.lengths[lookahead] : s.plain);
            w.lengths.push_back(lookahead);
            judge(w);
            if (!w.holders.empty()) refresh(holders_[w.holders[0]].worker);
        }
        w.length = lookahead;
        return true;
    }
    void drop_lengths(Worker& w) {
        Space& s = spaces_[w.space];
        for (u32 lookahead : w.lengths) {
            if (lookahead == 0) {
                --s.plain;
            } else if (const auto it = s.lengths.find(lookahead); --it->second == 0) {
                s.lengths.erase(it);
            }
        }
        w.lengths.clear();
        w.length = kNone;
    }
    void spoil(u32 id) {
        workers_[id]->sticky = true;
        judge(*workers_[id]);
    }
    void drop_worker(u32 id) {
        Worker& w = *workers_[id];
        if (w.ghost != kNone) free_holder(w.ghost);
        drop_groups(w);
        w.release(mem_);
        workers_[id].reset();
        refund(kWorkerBytes);
        free_workers_.push_back(id);
    }

    // The memory that streams take and that only a clear or the end of the pod returns. In a bounded index, it must not
    // fill the budget.
    std::size_t fixed() const { return fixed_ + media_.bytes(); }
    // Including their places in lists, pods and masks.
    static constexpr std::size_t kWorkerBytes = sizeof(Worker) + sizeof(void*) + 64;
    static constexpr std::size_t kHolderBytes = sizeof(Holder) + 64;
    void charge(std::size_t n) {
        mem_.add(n);
        fixed_ += n;
    }
    void refund(std::size_t n) {
        mem_.sub(n);
        fixed_ -= n;
    }
    void drop_groups(Worker& w) {
        refund(sizeof(Group) * w.groups.size());
        w.groups.clear();
    }

    // Records that a batch of this stream has been applied. `clean`: earlier losses do not matter any more.
    void advance(u32 pod, i64 rank, const std::string& model, u64 seq, double ts, u64 fingerprint, bool clean,
                 bool lost) {
        std::map<i64, Position>& all = pods_[pod].positions;
        const auto it = all.find(rank);
        if (it == all.end() && all.size() >= kMostWorkers) return;
        const bool whole = it == all.end() ? seq == 0 : it->second.whole && seq == it->second.seq + 1;
        const Position at{seq, ts, fingerprint, space(model), !lost && (clean || whole)};
        all[rank] = at;
    }
    // An event without a number has arrived, so the position of the stream is unknown from now on.
    void lose_place(u32 pod, i64 rank) {
        if (!pods_[pod].positions.empty()) pods_[pod].positions.erase(rank);
    }
    // A payload of this worker was lost.
    void lost_payload(u32 pod, i64 rank) {
        for (u32 w : pods_[pod].workers)
            if (workers_[w]->rank == rank) spoil(w);
    }
    // The lengths of lookahead of a worker's blocks. Only 0 if no block of it is known.
    std::vector<u32> lengths(u32 pod, i64 rank, const std::string& model) const {
        const u32 space = find_space(model);
        const u32 id = space == kNone ? kNone : find_worker(pod, rank, space);
        return id == kNone || workers_[id]->lengths.empty() ? std::vector<u32>(1, 0) : workers_[id]->lengths;
    }
    // Whether this worker is known and has blocks with this lookahead, or may be the only worker of a rank that is
    // followed.
    bool follows(u32 pod, i64 rank, const std::string& model, u32 lookahead) const {
        const Pod& p = pods_[pod];
        const u32 space = find_space(model);
        bool is_taken = false;
        for (u32 w : p.workers) {
            const Worker& each = *workers_[w];
            if (each.rank != rank) continue;
            if (each.space != space) {
                is_taken = true;
            } else if (each.lengths.empty()) {
                return lookahead == 0;
            } else {
                return std::find(each.lengths.begin(), each.lengths.end(), lookahead) != each.lengths.end();
            }
        }
        return !is_taken && lookahead == 0 && p.streams.count(rank) != 0;
    }

    // From here on, the pod's number and name lead to no pod. The name may be opened again.
    void close_pod(u32 id) {
        Pod& p = pods_[id];
        directory_->close(p.name);
        p.uid = 0;
        ++pods_version_;
    }
    void drop_pod(u32 id, const std::vector<u32>& workers) {
        Pod& p = pods_[id];
        for (u32 w : workers) drop_worker(w);
        for (const std::vector<u32>* list : {&p.clear_media, &p.ignore_media})
            for (u32 m : *list) media_.drop(m);
        p = Pod();
        free_pods_.push_back(id);
    }
    // Whether no pod is left.
    bool deserted() const { return free_pods_.size() == pods_.size(); }
    // Returns memory that was kept for the next pod.
    void shrink() {
        assert(deserted());
        pods_.clear();
        pods_.shrink_to_fit();
        free_pods_.clear();
        workers_.clear();
        workers_.shrink_to_fit();
        free_workers_.clear();
        holders_.clear();
        holders_.shrink_to_fit();
        free_holders_.clear();
        simple_.clear();
        guessed_.clear();
        grouped_.clear();
        rooted_.clear();
        faces_.clear();
        stands_for_.clear();
    }
    // Resets everything but the worker's own properties, since no block of it is known any more.
    void reset_worker(u32 id) {
        Worker& w = *workers_[id];
        w.forget(mem_);
        for (const std::vector<u32>* list : {&w.holders, &w.hidden})
            for (u32 h : *list) free_holder(h);
        pods_[w.pod].holders -= static_cast<u32>(w.holders.size());
        w.holders.clear();
        w.hidden.clear();
        w.mask.clear();
        if (w.ghost != kNone) {
            holders_[w.ghost].blocks = 0;
            set_bit(w.mask, w.ghost, true);
        }
        drop_groups(w);
        drop_lengths(w);
        w.placed_full = w.small_blocks = w.sticky = w.in_doubt = w.shed = w.muted = false;
        refresh(id);
        judge(w);
    }
    // All content of all workers has been dropped, so each worker now holds more than is known. Needs no memory. The
    // properties of workers stay, since their groups limit their answers.
    void forget_content() noexcept {
        for (const auto& worker : workers_) {
            if (!worker) continue;
            Worker& w = *worker;
            w.forget(mem_);
            for (const std::vector<u32>* list : {&w.holders, &w.hidden})
                for (u32 h : *list) holders_[h].blocks = 0;
            if (w.ghost != kNone) holders_[w.ghost].blocks = 0;
            if (w.guess != kNone) free_holder(w.guess);
            w.guess = kNone;
            w.shed = w.sticky = true;
        }
        for (Space& s : spaces_) {
            s.heads.release(mem_);
            s.names.release(mem_);
        }
        for (u32 id = 0; id < workers_.size(); ++id)
            if (workers_[id]) refresh(id);
        for (u32 p = 0; p < pods_.size(); ++p) judge(p);
    }

    // The first broken invariant, or an empty string.
    std::string check() const;
    // The snapshot sections of this part, which are verified while they are read.
    void number(SavePlan& plan) const;
    void save(SectionWriter& to, SavePlan& plan) const;
    void restore(SectionReader& in, RestorePlan& plan, const Numbers& before);

private:
    static constexpr std::size_t kMostLengths = 4;

    void open_pod(const std::string& name, u64 uid) {
        const u32 id = static_cast<u32>(uid);
        widen(pods_, id + 1);
        widen(free_pods_, std::max<std::size_t>(pods_.size(), id + 1) + 1);
        Pod p;
        p.name = name;
        p.set_presence = set_presence_;
        p.standing = first_standing_;
        p.uid = uid;
        directory_->open(name, uid);
        // Here and in all other functions that create something, no memory is needed from a certain point on. So the
        // pod is created as a whole or not at all.
        if (id == pods_.size()) pods_.emplace_back();
        pods_[id] = std::move(p);
        ++pods_version_;
    }
    void restore_media(SectionReader& in, RestorePlan& plan, const Numbers& before);
    void restore_models(SectionReader& in);
    void restore_pods(SectionReader& in, RestorePlan& plan, const Numbers& before);
    void restore_workers(SectionReader& in, RestorePlan& plan);
    std::string check_faces(u32 id) const;
    std::string check_worker(u32 id) const;
    std::string check_spaces() const;
    std::string check_media() const;

    // No two indexes have a version in common: a filter that was compiled for one index must not pass as another's,
    // such as that of an index loaded in its place.
    static u64 first_version() {
        static std::atomic<u64> made{0};
        return ++made << 32;
    }

    Memory& mem_;
    std::size_t fixed_ = 0;
    const bool set_presence_;
    Media media_;
    std::vector<Pod> pods_;
    PodDirectory* directory_;
    Standing first_standing_ = Standing::unheard;  // of a newly opened pod
    std::vector<u32> free_pods_;
    std::vector<std::unique_ptr<Worker>> workers_;
    std::vector<u32> free_workers_;
    std::vector<Holder> holders_;
    std::vector<u32> free_holders_;
    std::vector<u64> simple_, guessed_, grouped_, rooted_;
    std::vector<Face> faces_;      // by holder
    std::vector<u32> stands_for_;  // by speculative holder: the holder
    std::vector<Space> spaces_;
    std::unordered_map<std::string, u32> space_ids_;
    u64 pods_version_ = first_version();
    u64 holders_version_ = 1;
};

}  // namespace kvindex
