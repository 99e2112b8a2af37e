// A coverage-guided fuzzer of everything that changes the index and of everything that queries it.
//
// An input is a header of eight bytes and a list of operations. Bit 0 of the header chooses their form:
//   raw         payloads as on the wire, each one msgpack value or prefixed by a length, between records;
//   structured  records of eight bytes, each one event or call over a handful of contents, hashes, groups and media.
// Structured records reach cases that bytes rarely reach (a hole, a fork that is removed again, an orphan of an
// orphan), and the mutator below moves whole records about.
//
// There is no model of the index here (tests/model.py is one, and the property tests use it). The requirements instead:
//   - every invariant of Index::check() holds;
//   - the effect of a worker's stream does not depend on other workers: beside the index that gets everything, there is
//     one index for each (pod, rank), and reports, answers, figures and states must be the same in both;
//   - an index that gets hashed batches equals one that gets the payloads: in half of the inputs, the indexes of one
//     (pod, rank) get hashed batches;
//   - payloads that are read as hashed batches are refused, or leave a consistent index;
//   - a prompt and its prefix hashes have one answer; filters only leave out; an answer of L is an answer of L to the
//     first L blocks alone, and no medium alone gives more than all;
//   - when the pods have been removed, no block is left, and the memory is the same as at the start.
// KVINDEX_FUZZ_SHOW=1 prints each operation as a line of Python.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "concurrent_index.hpp"
#include "wire/fields.hpp"
#include "wire/json_tokens.hpp"
#include "wire/peek.hpp"

namespace {

using namespace kvindex;

constexpr u32 kPods = 3;
constexpr std::size_t kRecord = 8;
constexpr double kForEver = 1e9;
const char* const kPodNames[kPods] = {"a", "b", "c"};
const char* const kModels[2] = {"", "m"};
const char* const kMedia[4] = {"", "gpu", "Tape", "CPU"};
const char* const kKinds[4] = {"full_attention", "sliding_window", "mamba", "chunked_local_attention"};
const bool kShow = std::getenv("KVINDEX_FUZZ_SHOW") != nullptr;

[[noreturn]] void die(const std::string& what) {
    std::fprintf(stderr, "kvindex fuzz: %s\n", what.c_str());
    std::fflush(nullptr);
    std::abort();
}

// A question: a prompt's tokens with everything else that goes into their hashes.
struct Query {
    std::vector<u32> tokens;
    std::string lora, salt;
    std::string extra;  // packed
    u32 model = 0;
};

// Answers without the parts that may differ between two equivalent indexes: numbers of pods and media.
using Line = std::tuple<u32, i64, std::string, u32>;  // pod, rank, medium ("*": all), blocks
using Answer = std::multiset<Line>;

std::string text(const Answer& a) {
    std::string s;
    for (const Line& l : a)
        s += std::string(" ") + kPodNames[std::get<0>(l)] + "/" + std::to_string(std::get<1>(l)) + " " +
             std::get<2>(l) + "=" + std::to_string(std::get<3>(l));
    return s.empty() ? " nothing" : s;
}

std::string python(const StrRef& s) { return s.set() ? "'" + std::string(s.p, s.n) + "'" : "None"; }

// A field in the payload must equal the field that the decoder has read.
void check_fields(const u8* payload, const Event& e) {
    if (e.many || e.bad != Reason::none) return;
    const auto text = [&](const char* name) {
        const StrRef found = event_text(payload + e.offset, e.bytes, e.kind, name, std::strlen(name));
        return std::make_pair(found.set(), std::string(found.set() ? found.p : "", found.n));
    };
    const auto read = [](const StrRef& s) { return std::make_pair(s.set(), std::string(s.set() ? s.p : "", s.n)); };
    if (e.kind != EventKind::cleared && text("medium") != read(e.medium)) die("two media of one event");
    if (e.kind == EventKind::stored && text("kv_cache_spec_kind") != read(e.spec_kind)) die("two kinds of one group");
    if (e.kind == EventKind::stored && text("lora_id") != read(e.lora_id_name)) die("two LoRA ids of one event");
}

class World {
public:
    explicit World(const u8* header) : bytes_at_start_(0) {
        for (u32 i = 0; i < kRecord; ++i) head_[i] = header[i];
        static const u32 sizes[3] = {1, 4, 16};
        size_ = sizes[head_[1] % 3];
        stretch_ = 1 + (head_[1] >> 2 & 3) * 2;
        set_presence_ = (head_[1] >> 4 & 3) == 3;
        max_parked_ = head_[1] >> 6 & 1 ? 6 : 65536;
        if (kShow) std::printf("start(%u, %d, %u)\n", size_, set_presence_, max_parked_);
        all_ = make();
        wild_ = make();
        bytes_at_start_ = all_->stats().figures.bytes;
        for (u32 p = 0; p < kPods; ++p) open(p);
    }

    void record(const u8* r) {
        switch (r[0] % 20) {
            default: stored_path(r); break;  // 0 to 5, and all values without a case
            case 6: stored_at_will(r); break;
            case 7: masked(r); break;
            case 8: removed_path(r); break;
            case 9: removed_path(r); break;
            case 10: removed_at_will(r); break;
            case 11: evicted(r); break;
            case 12: cleared(r); break;
            case 13: guessed(r); break;
            case 14: expired(r); break;
            case 15: pod_removed(r); break;
            case 16: worker_cleared(r); break;
            case 17: configured(r); break;
            case 18: marked(r); break;
            case 19: odd(r); break;
        }
        ++steps_;
        // Every step at first, since a failure is easiest to read there, then now and then: checks cost more than the
        // steps.
        if (steps_ <= 12 || steps_ % 6 == 0) verify();
    }
    void payload(u32 who, const u8* p, std::size_t n) {
        const u32 pod = who % kPods, model = who >> 2 & 1;
        const i64 rank = who >> 3 & 1 ? static_cast<i64>(who >> 4 & 1) : -1;
        if (kShow) {
            std::printf("payload(%u, '%s', %lld, '", pod, kModels[model], static_cast<long long>(rank));
            for (std::size_t i = 0; i < n; ++i) std::printf("%02x", p[i]);
            std::printf("')\n");
        }
        Batch batch;
        DecodeFault fault, again;
        const bool sound = decode_batch(p, n, batch, fault);
        const BatchPeek look = peek_batch(p, n, true), glance = peek_batch(p, n, false);
        if (sound && (look.rank != batch.dp_rank || look.timed == std::isnan(batch.ts)))
            die("a stream and the index read a batch differently");
        if (look.timed != glance.timed || look.events != glance.events || look.events > n / 3)
            die("two looks at one batch");
        for (std::size_t i = 0; sound && i < batch.events.size(); ++i) check_fields(p, batch.events[i]);
        const i64 at = rank >= 0 ? rank : sound && batch.dp_rank >= 0 ? batch.dp_rank : 0;
        Report one, other;
        double ts = 0;
        i64 used = at, ignored = at;
        if (all_->ingest(pods_[pod], p, n, kModels[model], rank, -1, true, one, ts, used, again) !=
            (sound ? Taken::yes : Taken::no_batch))
            die("one payload, two opinions");
        if (!sound && (fault.offset > n || again.offset != fault.offset)) die("a fault outside the payload");
        if (used != at) die("another rank than the batch's");
        Solo& s = solo(pod, at);
        if (by_hashes()) {
            Batch scratch;
            std::vector<u8> out;
            hash_payload(size_, 1337, head(pod, at, model), p, n, scratch, out);
            follow(s, out);
        } else {
            s.index->ingest(s.uid, p, n, kModels[model], rank, -1, true, other, ts, ignored, again);
            same(one, other);
        }
        u64 batches = 0, unsound = 0;
        wild_->ingest_hashed(p, n, batches, unsound);
        for (const Event& e : batch.events)
            if (sound && e.bad == Reason::none) remember(batch, e, model);
        ++steps_;
        if (steps_ <= 12 || steps_ % 6 == 0) verify();
    }
    void finish() {
        verify();
        for (std::size_t i = 0; i < asked_.size() && i < 24; ++i) ask(asked_[i]);
        for (auto& s : solos_)
            if (const std::string bad = s.second.index->check(); !bad.empty()) die("alone: " + bad);
        if (const std::string bad = wild_->check(); !bad.empty()) die("of any bytes: " + bad);
        for (u32 p = 0; p < kPods; ++p) {
            all_->remove_pod(pods_[p]);
            if (const std::string bad = all_->check(); !bad.empty()) die("after remove_pod: " + bad);
        }
        const Index::Figures f = all_->stats().figures;
        const u64 left[] = {f.blocks, f.chains, f.sets - 1, f.holders, f.workers, f.parked, f.guesses};
        const char* const names[] = {"blocks", "chains", "sets", "holders", "workers", "parked", "guesses"};
        for (u32 i = 0; i < 7; ++i)
            if (left[i]) die(std::string(names[i]) + " are left when all pods are gone: " + std::to_string(left[i]));
        if (f.bytes != bytes_at_start_)
            die(std::to_string(f.bytes) + " bytes when all pods are gone, " + std::to_string(bytes_at_start_) +
                " at the start");
    }

private:
    // The index that one (pod, rank) would have to itself.
    struct Solo {
        std::unique_ptr<ConcurrentIndex> index;
        u64 uid = 0;
    };
    struct Configuration {
        int presence = -1;
        bool has_media = false;
        std::vector<std::string> media;
        i64 chunk = -1;
    };
    // One path of contents, as a record describes it.
    struct Path {
        std::vector<u8> types;
        bool lora = false, salt = false;
    };

    std::unique_ptr<ConcurrentIndex> make() const {
        return std::make_unique<ConcurrentIndex>(size_, 1337, set_presence_, max_parked_);
    }
    // Whether the indexes of one (pod, rank) get hashed batches.
    bool by_hashes() const { return head_[6] & 1; }
    static HashedHead head(u32 pod, i64 rank, u32 model) {
        HashedHead h;
        ref(h.pod, kPodNames[pod]);
        ref(h.model, kModels[model]);
        h.rank = rank;
        return h;
    }
    static void follow(Solo& s, const std::vector<u8>& hashed) {
        u64 batches = 0, unsound = 0;
        if (!s.index->ingest_hashed(hashed.data(), hashed.size(), batches, unsound) || batches != 1)
            die("what was written cannot be read");
    }
    // Followed from the start: a pod is not exact without a stream that is followed, and each rank is marked
    // separately.
    void open(u32 pod) {
        pods_[pod] = all_->open_pod(kPodNames[pod]);
        all_->mark(pods_[pod], 0, static_cast<int>(State::exact));
    }
    Solo& solo(u32 pod, i64 rank) {
        Solo& s = solos_[{pod, rank}];
        if (!s.index) {
            s.index = make();
            s.uid = s.index->open_pod(kPodNames[pod]);
            s.index->mark(s.uid, rank, static_cast<int>(State::exact));
            const Configuration& c = configured_[pod];
            s.index->configure(s.uid, c.presence, c.has_media, c.media, c.chunk, -1);
        }
        return s;
    }

    // ---- the meaning of a record ------------------------------------------------------------------------------------

    static u32 pod_of(const u8* r) { return r[1] % kPods; }
    static i64 rank_of(const u8* r) { return (r[1] >> 2 & 7) == 7; }
    static u32 model_of(const u8* r) { return (r[1] >> 5) == 7; }
    u32 factor_of(const u8* r) const {
        return head_[2] & 1 ? 1 : (r[5] >> 4 & 3) == 3 ? 1 + (head_[2] >> 1 & 1) : (r[5] >> 4 & 3) == 2 ? 2 : 1;
    }

    Path path_of(const u8* r) const {
        Path p;
        const u32 n = 1 + (r[2] & 7);
        for (u32 i = 0; i < n; ++i)
            for (u32 k = 0; k < stretch_; ++k) p.types.push_back(r[3 + i / 4] >> (i % 4 * 2) & 3);
        p.lora = r[5] >> 6 & 1;
        p.salt = r[5] >> 7;
        return p;
    }
    // Types 0 and 3 are the same tokens; 3 has an extra key. Extra keys belong to the first index block of an engine
    // block.
    template <class Tokens>
    void tokens(const u8* types, std::size_t n, Tokens& out) const {
        for (std::size_t i = 0; i < n; ++i)
            for (u32 k = 0; k < size_; ++k) out.push_back(types[i] == 3 ? 7 : 7 + (k + 1 == size_ ? types[i] : 0));
    }
    static std::string extra(const u8* types, std::size_t n, std::size_t step) {
        const std::size_t entries = (n + step - 1) / step;
        std::string s{static_cast<char>(0xdc), static_cast<char>(entries >> 8), static_cast<char>(entries)};
        bool any = false;
        for (std::size_t i = 0; i < n; i += step) {
            any |= types[i] == 3;
            s += types[i] == 3 ? "\x91\xa2mm" : "\xc0";
        }
        return any ? s : std::string();
    }
    // The engine's name for a prefix: shared by all pods, the pod's own, or a small number that clashes with others.
    u64 name(u32 pod, const Path& p, std::size_t blocks, bool alias) const {
        const u32 style = head_[3] >> (2 * pod) & 3;
        u64 seed = alias + u64{2} * (p.lora + 2 * p.salt);
        if (style == 1) seed += u64{8} * (pod + 1);
        const u64 h = xxh3_64(p.types.data(), blocks, seed);
        return style == 3 ? h % 24 : h;
    }
    // The input chooses a group's kind, and only some events contain it.
    void describe(Event& e, const u8* r) const {
        const u32 group = r[5] & 3;
        if (head_[4] & 1) {  // whether there are groups
            e.group = group == 0 && (r[6] & 1) ? -1 : static_cast<i64>(group);
            const u32 kind = group == 0 ? (head_[4] >> 1 & 3) * (head_[4] >> 3 & 1) : (group + (head_[4] >> 4)) & 3;
            if (r[6] & 6) ref(e.spec_kind, kKinds[kind]);
            if (kind == 1) e.window = 1 + head_[5] % (4 * size_ + 2);
        }
        const u32 medium = r[5] >> 2 & 3;
        if (medium) ref(e.medium, kMedia[medium]);
    }
    static void ref(StrRef& s, const char* text) {
        s.p = text;
        s.n = static_cast<u32>(std::strlen(text));
    }

    // ---- operations -------------------------------------------------------------------------------------------------

    void begin(EventKind kind) {
        batch_.reset();
        keys_.clear();
        batch_.events.emplace_back();
        batch_.events[0].kind = kind;
    }
    void apply(const u8* r) {
        Event& e = batch_.events[0];
        e.n_hashes = static_cast<u32>(batch_.hashes.size());
        e.n_tokens = static_cast<u32>(batch_.tokens.size());
        const u32 pod = pod_of(r), model = model_of(r);
        const i64 rank = rank_of(r);
        if (kShow) print(pod, rank, model, e);
        Report one, other;
        all_->apply(pods_[pod], rank, kModels[model], batch_, Place(), one);
        Solo& s = solo(pod, rank);
        if (by_hashes()) {
            Batch hashed = batch_;
            std::vector<u8> out;
            const BlockHasher blocks(1337, size_);
            ContentHasher(blocks).replace_tokens(hashed);
            write_hashed(head(pod, rank, model), hashed, out);
            follow(s, out);
        } else {
            s.index->apply(s.uid, rank, kModels[model], batch_, Place(), other);
            same(one, other);
        }
    }
    // Blocks cut..end of a path, below the name of the block before them.
    void stored_path(const u8* r) {
        begin(EventKind::stored);
        Event& e = batch_.events[0];
        const Path p = path_of(r);
        const u32 factor = factor_of(r), all = static_cast<u32>(p.types.size());
        u32 cut = std::min<u32>(((r[2] >> 3 & 7) * stretch_ + (r[7] & 3) * (r[7] >> 2 & 1)), all - 1);
        if (!(r[7] >> 3 & 1)) cut -= cut % factor;
        const bool alias = r[2] >> 6 & 1;
        const u32 n = (all - cut) / factor;
        if (cut) {
            e.has_parent = true;
            e.parent = name(pod_of(r), p, cut, r[2] >> 7);
        }
        for (u32 j = 0; j < n; ++j) batch_.hashes.push_back(name(pod_of(r), p, cut + (j + 1) * factor, alias));
        // Sometimes, a hash from elsewhere in the middle: repeated, moved, or its own parent.
        if (n && (r[7] >> 4) == 15) batch_.hashes[r[6] % n] = name(pod_of(r), p, 1 + (r[6] >> 3) % all, false);
        if (n && (r[7] >> 4) == 14) e.parent = batch_.hashes[r[6] % n];
        content(e, p, cut, n * factor, factor);
        describe(e, r);
        apply(r);
        question(r, p);
    }
    void content(Event& e, const Path& p, u32 cut, u32 blocks, u32 factor) {
        tokens(p.types.data() + cut, blocks, batch_.tokens);
        e.block_size = u64{size_} * factor;
        if (p.lora) ref(e.lora_name, "L");
        if (p.salt) ref(e.cache_salt, "s");
        keys_ = extra(p.types.data() + cut, blocks, factor);
        if (keys_.empty()) return;
        e.extra_keys = reinterpret_cast<const u8*>(keys_.data());
        e.extra_keys_bytes = static_cast<u32>(keys_.size());
    }
    // Any of 24 hashes for any content, below any of them.
    void stored_at_will(const u8* r) {
        begin(EventKind::stored);
        Event& e = batch_.events[0];
        const Path p = path_of(r);
        const u32 factor = factor_of(r),
                  n = std::max<u32>(1, std::min<u32>(static_cast<u32>(p.types.size()) / factor, 1 + (r[7] & 3)));
        for (u32 j = 0; j < n; ++j) batch_.hashes.push_back((r[6] + j * (1 + (r[7] >> 2 & 1))) % 24);
        e.has_parent = r[7] >> 3 & 1;
        if (e.has_parent) e.parent = (r[7] >> 4) + 8 * (r[6] >> 7);
        Path q = p;
        q.types.resize(std::size_t{n} * factor);
        content(e, q, 0, n * factor, factor);
        describe(e, r);
        apply(r);
        question(r, q);
    }
    // Some hashes of a path, with the tokens of the whole path or without tokens.
    void masked(const u8* r) {
        begin(EventKind::stored);
        Event& e = batch_.events[0];
        const Path p = path_of(r);
        const u32 factor = factor_of(r), n = static_cast<u32>(p.types.size()) / factor;
        for (u32 j = 0; j < n; ++j)
            if (j >= 8 || r[7] >> j & 1)
                batch_.hashes.push_back(name(pod_of(r), p, std::size_t{j + 1} * factor, r[2] >> 6 & 1));
        if (r[2] & 0x80) {
            if (n && batch_.hashes.size() == n) batch_.hashes.pop_back();
            content(e, p, 0, n * factor, factor);
        } else {
            e.block_size = r[6] >> 3 & 1 ? 0 : size_ * factor;
        }
        describe(e, r);
        apply(r);
        question(r, p);
    }
    void removed_path(const u8* r) {
        begin(EventKind::removed);
        const Path p = path_of(r);
        const u32 n = static_cast<u32>(p.types.size());
        for (u32 j = 0; j < n; ++j)
            if (r[7] >> (j / stretch_) & 1) batch_.hashes.push_back(name(pod_of(r), p, j + 1, r[2] >> 6 & 1));
        if (r[2] >> 7) std::reverse(batch_.hashes.begin(), batch_.hashes.end());
        describe(batch_.events[0], r);
        apply(r);
        question(r, p);
    }
    void removed_at_will(const u8* r) {
        begin(EventKind::removed);
        for (u32 j = 0; j < 24; ++j)
            if (r[2 + j / 8] >> (j % 8) & 1) batch_.hashes.push_back(r[6] & 1 ? j : 23 - j);
        describe(batch_.events[0], r);
        apply(r);
    }
    // Everything that this input has named so far, in one order or the other, so that forks are removed again.
    void evicted(const u8* r) {
        const u32 pod = pod_of(r);
        const std::size_t n = told_[pod].size();
        for (std::size_t i = 0; i < n && i < 64; ++i) {
            const Told t = told_[pod][r[2] & 1 ? n - 1 - i : i];
            if ((r[6] & 3) == 3 && i % 3 == 0) continue;
            begin(EventKind::removed);
            Event& e = batch_.events[0];
            for (std::size_t k = 0; k < t.hashes.size(); ++k)
                batch_.hashes.push_back(t.hashes[r[2] & 2 ? k : t.hashes.size() - 1 - k]);
            e.group = t.group;
            e.medium = t.medium;
            u8 as[kRecord];
            std::memcpy(as, r, kRecord);
            as[1] = t.who;
            apply(as);
        }
        if ((r[6] & 3) != 3) told_[pod].clear();
    }
    void cleared(const u8* r) {
        begin(EventKind::cleared);
        apply(r);
    }
    void guessed(const u8* r) {
        Query q = query(r, path_of(r));
        Prompt prompt;
        make_prompt(q, prompt);
        std::vector<u64> prefixes(q.tokens.size() / size_);
        hash_prompt(prompt, size_, 1337, true, prefixes.data());
        const double until = now_ + 1 + r[6] % 8;
        if (kShow) {
            std::printf("guess(%u, %lld, %g, ", pod_of(r), static_cast<long long>(rank_of(r)), until - now_);
            print(q);
        }
        all_->guess(pods_[pod_of(r)], rank_of(r), kModels[q.model], prefixes, until);
        Solo& s = solo(pod_of(r), rank_of(r));
        s.index->guess(s.uid, rank_of(r), kModels[q.model], prefixes, until);
        question(r, path_of(r));
    }
    void expired(const u8* r) {
        now_ += 1 + r[6] % 6;
        if (kShow) std::printf("expire(%d)\n", 1 + r[6] % 6);
        all_->expire(now_);
        if (all_->next_expiry() <= now_) die("something expired is still there");
        for (auto& s : solos_) s.second.index->expire(now_);
    }
    void pod_removed(const u8* r) {
        const u32 pod = pod_of(r);
        if (kShow) std::printf("remove_pod(%u)\n", pod);
        if (!all_->remove_pod(pods_[pod]) || all_->remove_pod(pods_[pod])) die("a pod is removed once");
        open(pod);
        for (auto it = solos_.begin(); it != solos_.end();)
            it = it->first.first == pod ? solos_.erase(it) : std::next(it);
        configured_[pod] = Configuration();
        told_[pod].clear();
    }
    void worker_cleared(const u8* r) {
        if (kShow) std::printf("clear_worker(%u, %lld)\n", pod_of(r), static_cast<long long>(rank_of(r)));
        all_->clear_worker(pods_[pod_of(r)], rank_of(r));
        Solo& s = solo(pod_of(r), rank_of(r));
        s.index->clear_worker(s.uid, rank_of(r));
    }
    void configured(const u8* r) {
        Configuration c;
        c.presence = (r[2] & 3) == 3 ? -1 : (r[2] & 3) - 1;
        c.has_media = r[2] >> 2 & 1;
        for (u32 m = 0; m < 4; ++m)
            if (r[2] >> (4 + m) & 1) c.media.push_back(kMedia[m]);
        c.chunk = r[3] & 1 ? static_cast<i64>((1 + (r[3] >> 1 & 3)) * size_) + (r[3] >> 3 & 1) : -1;
        if (kShow) {
            std::printf("configure(%u, %d, [", pod_of(r), c.presence);
            for (const std::string& m : c.media) std::printf("'%s', ", m.c_str());
            std::printf("], %d, %lld)\n", c.has_media, static_cast<long long>(c.chunk));
        }
        all_->configure(pods_[pod_of(r)], c.presence, c.has_media, c.media, c.chunk, -1);
        for (auto& s : solos_)
            if (s.first.first == pod_of(r))
                s.second.index->configure(s.second.uid, c.presence, c.has_media, c.media, c.chunk, -1);
        // The index of a later worker must get the whole configuration so far, not only the last change.
        Configuration& said = configured_[pod_of(r)];
        if (c.presence >= 0) said.presence = c.presence;
        if (c.has_media) said.media = c.media;
        said.has_media |= c.has_media;
        if (c.chunk >= 0) said.chunk = c.chunk;
    }
    void marked(const u8* r) {
        if (kShow) std::printf("mark(%u, %lld, %d)\n", pod_of(r), static_cast<long long>(rank_of(r)), r[6] % 3);
        all_->mark(pods_[pod_of(r)], rank_of(r), r[6] % 3);
        Solo& s = solo(pod_of(r), rank_of(r));
        s.index->mark(s.uid, rank_of(r), r[6] % 3);
    }
    // Events that cannot be placed as they are.
    void odd(const u8* r) {
        begin(r[2] & 1 ? EventKind::stored : static_cast<EventKind>(r[6] & 3));
        Event& e = batch_.events[0];
        const Path p = path_of(r);
        if (e.kind == EventKind::stored || e.kind == EventKind::removed)
            batch_.hashes.push_back(name(pod_of(r), p, 1, false));
        if (e.kind == EventKind::stored) {
            static const u64 sizes[8] = {0, 1, 3, 15, 24, 1ull << 32, ~0ull, 0x10000};
            e.block_size = sizes[r[7] & 7] * (r[7] >> 3 & 1 ? size_ : 1);
            batch_.tokens.assign(r[7] >> 4, 7);
        }
        if (r[6] & 4) e.bad = static_cast<Reason>(1 + r[6] / 8 % 3);
        if (e.bad != Reason::none) {
            batch_.hashes.clear();
            batch_.tokens.clear();
        }
        apply(r);
    }

    // ---- the requirements -------------------------------------------------------------------------------------------

    void same(const Report& a, const Report& b) const {
        bool equal = a.stored == b.stored && a.removed == b.removed && a.cleared == b.cleared && a.parked == b.parked &&
                     a.skipped == b.skipped && a.errors == b.errors;
        for (u32 i = 0; i < kReasons; ++i) equal &= a.reasons[i] == b.reasons[i];
        if (!equal)
            die("a report depends on other workers: stored " + std::to_string(a.stored) + "/" +
                std::to_string(b.stored) + ", removed " + std::to_string(a.removed) + "/" + std::to_string(b.removed) +
                ", parked " + std::to_string(a.parked) + "/" + std::to_string(b.parked) + ", skipped " +
                std::to_string(a.skipped) + "/" + std::to_string(b.skipped));
    }
    void verify() {
        if (const std::string bad = all_->check(); !bad.empty()) die("check: " + bad);
        for (u32 pod = 0; pod < kPods; ++pod) {
            int worst = 0;
            const std::vector<PodFigures> figures = all_->pod_figures(pods_[pod]);
            for (auto& s : solos_) {
                if (s.first.first != pod) continue;
                worst = std::max(worst, s.second.index->state(s.second.uid));
                const std::vector<PodFigures> alone = s.second.index->pod_figures(s.second.uid);
                for (const PodFigures& f : alone) {
                    const auto it = std::find_if(figures.begin(), figures.end(),
                                                 [&](const PodFigures& o) { return o.rank == f.rank; });
                    const PodFigures none{f.rank, 0, 0, 0, -1};
                    const PodFigures& other = it == figures.end() ? none : *it;
                    if (other.blocks != f.blocks || other.parked != f.parked || other.state != f.state)
                        die("figures depend on other workers");
                }
            }
            if (all_->state(pods_[pod]) != worst) die("a state is not the worst of the ranks'");
        }
        const std::size_t n = asked_.size();
        for (std::size_t i = 0; i < 2 && i < n; ++i) ask(asked_[i == 0 ? n - 1 : steps_ % n]);
    }
    Query query(const u8* r, const Path& p) const {
        Query q;
        tokens(p.types.data(), p.types.size(), q.tokens);
        q.lora = p.lora ? "L" : "";
        q.salt = p.salt ? "s" : "";
        q.extra = extra(p.types.data(), p.types.size(), 1);
        q.model = model_of(r);
        return q;
    }
    // The path of an operation becomes a prompt, and so does the same path with another end.
    void question(const u8* r, Path p) {
        if (batch_.events.size() && batch_.events[0].kind == EventKind::stored && !batch_.hashes.empty())
            told_[pod_of(r)].push_back({r[1], batch_.events[0].group, batch_.events[0].medium, batch_.hashes});
        p.types.push_back(r[6] & 3);
        if (asked_.size() < 64) {
            asked_.push_back(query(r, p));
        } else {
            asked_[steps_ % 64] = query(r, p);
        }
    }
    // The prompts that payloads contain: the content of each engine hash, if it is known.
    void remember(const Batch& b, const Event& e, u32 model) {
        if (e.kind != EventKind::stored || !e.n_hashes || e.n_tokens % e.n_hashes || e.n_tokens > 4096) return;
        Query q;
        q.model = model;
        if (e.has_parent) {
            const auto it = spelled_.find(e.parent);
            if (it == spelled_.end()) return;
            q = it->second;
            q.model = model;
            if (q.tokens.size() > 4096) return;
        } else {
            if (e.lora_name.set()) q.lora.assign(e.lora_name.p, e.lora_name.n);
            if (e.cache_salt.set()) q.salt.assign(e.cache_salt.p, e.cache_salt.n);
            if (e.extra_keys) q.extra.assign(reinterpret_cast<const char*>(e.extra_keys), e.extra_keys_bytes);
        }
        const std::size_t step = e.n_tokens / e.n_hashes;
        const u32* t = b.tokens.data() + e.token_at;
        for (u32 i = 0; i < e.n_hashes; ++i) {
            q.tokens.insert(q.tokens.end(), t + i * step, t + (i + 1) * step);
            if (spelled_.size() < 256) spelled_[b.hashes[e.hash_at + i]] = q;
        }
        if (asked_.size() < 64) asked_.push_back(q);
    }
    void make_prompt(const Query& q, Prompt& p) const {
        p.tokens = q.tokens.data();
        p.n_tokens = q.tokens.size();
        p.adapter = q.lora;
        p.adapted = !q.lora.empty();
        // Keys from a payload are sound there, but may start with a name of its adapter. They are still sound here.
        if (!read_extra(reinterpret_cast<const u8*>(q.extra.data()), q.extra.size(), q.salt, 1337,
                        q.tokens.size() / size_, p))
            die("extra keys of an event cannot be read as a prompt's");
    }
    Answer answer(const ConcurrentIndex& ix, const MatchResult& m, u32 only, u32 blocks) const {
        Answer a;
        u32 best = 0;
        const std::map<u32, std::string> media = ix.media(m.hits);
        for (const Hit& h : m.hits) {
            u32 pod = only;
            for (u32 p = 0; only == kNone && p < kPods; ++p)
                if (pods_[p] == h.pod) pod = p;
            if (pod == kNone) die("an answer of a pod that is gone");
            if (h.blocks == 0 || h.blocks > blocks)
                die("an answer of " + std::to_string(h.blocks) + " to " + std::to_string(blocks) + " blocks");
            if (h.says & kReused && h.says & kMedium) a.insert({pod, h.rank, "*", h.blocks});
            if (h.says & kReused) best = std::max(best, h.blocks);
            a.insert({pod, h.rank, h.medium == kNone ? "*" : lower_case(media.at(h.medium)), h.blocks});
        }
        if (m.best == kNone ? best != 0 : m.hits[m.best].blocks != best || !(m.hits[m.best].says & kReused))
            die("the best answer is not the best");
        return a;
    }
    static std::string lower_case(const std::string& s) { return lower(s.data(), s.size()); }
    Answer matched(const ConcurrentIndex& ix, const Prompt& p, u32 model, u32 only, PodNames* names = nullptr,
                   bool only_exact = false) {
        ix.match(p, kModels[model], names, only_exact, true, out_);
        return answer(ix, out_, only, static_cast<u32>(p.n_tokens / size_));
    }
    void ask(const Query& q) {
        Prompt p;
        make_prompt(q, p);
        if (kShow) {
            std::printf("ask(");
            print(q);
        }
        const u32 blocks = static_cast<u32>(q.tokens.size() / size_);
        const Answer got = matched(*all_, p, q.model, kNone);
        const auto expect = [&](const char* what, const Answer& want, const Answer& have) {
            if (want != have) die(std::string(what) + ":" + text(want) + ", but" + text(have));
        };
        Answer alone, exact, ready;
        for (auto& s : solos_)
            for (const Line& l : matched(*s.second.index, p, q.model, s.first.first)) alone.insert(l);
        expect("answers depend on other workers", alone, got);
        std::vector<u64> prefixes(blocks);
        hash_prompt(p, size_, 1337, true, prefixes.data());
        Prompt hashes;
        hashes.prefixes = prefixes.data();
        hashes.n_prefixes = blocks;
        all_->match(hashes, kModels[q.model], nullptr, false, true, out_);
        expect("tokens and their prefix hashes", got, answer(*all_, out_, kNone, blocks));
        for (const Line& l : got) {
            if (all_->state(pods_[std::get<0>(l)]) == 0) exact.insert(l);
            if (std::get<0>(l) != 1) ready.insert(l);
        }
        expect("of exact pods only", exact, matched(*all_, p, q.model, kNone, nullptr, true));
        expect("of ready pods only", ready, matched(*all_, p, q.model, kNone, &ready_));
        std::set<u32> lengths;
        for (const Line& l : got) {
            const bool whole = std::get<2>(l) == "*";
            if (whole) lengths.insert(std::get<3>(l));
            // No medium alone gives more than all media together.
            if (!whole && std::none_of(got.begin(), got.end(), [&](const Line& o) {
                    return std::get<2>(o) == "*" && std::get<0>(o) == std::get<0>(l) &&
                           std::get<1>(o) == std::get<1>(l) && std::get<3>(o) >= std::get<3>(l);
                }))
                die("a medium alone gives more than all:" + text(got));
        }
        for (const u32 length : lengths) {
            p.n_tokens = static_cast<u64>(length) * size_;
            const Answer shorter = matched(*all_, p, q.model, kNone);
            for (const Line& l : got)
                if (std::get<3>(l) == length && std::get<2>(l) == "*" && !shorter.count(l))
                    die("a prompt cut to its answer has another:" + text(got) + ", then" + text(shorter));
        }
    }

    // ---- lines of Python --------------------------------------------------------------------------------------------

    static void print(const Query& q) {
        std::printf("[");
        for (u32 t : q.tokens) std::printf("%u,", t);
        std::printf("], '%s', '%s', '%s', '", q.lora.c_str(), q.salt.c_str(), kModels[q.model]);
        for (char c : q.extra) std::printf("%02x", static_cast<u8>(c));
        std::printf("')\n");
    }
    void print(u32 pod, i64 rank, u32 model, const Event& e) const {
        std::printf("event(%u, %lld, '%s', %d, %d, [", pod, static_cast<long long>(rank), kModels[model],
                    static_cast<int>(e.kind), static_cast<int>(e.bad));
        for (u64 h : batch_.hashes) std::printf("%llu,", static_cast<unsigned long long>(h));
        std::printf("], %s, [", e.has_parent ? std::to_string(e.parent).c_str() : "None");
        for (u32 t : batch_.tokens) std::printf("%u,", t);
        std::printf("], %llu, group=%s, medium=%s, kind=%s, window=%lld, lora=%s, salt=%s, extra='",
                    static_cast<unsigned long long>(e.block_size),
                    e.group < 0 ? "None" : std::to_string(e.group).c_str(), python(e.medium).c_str(),
                    python(e.spec_kind).c_str(), static_cast<long long>(e.window), python(e.lora_name).c_str(),
                    python(e.cache_salt).c_str());
        for (char c : keys_) std::printf("%02x", static_cast<u8>(c));
        std::printf("')\n");
    }

    struct Told {
        u8 who;
        i64 group;
        StrRef medium;
        Scratch<u64> hashes;
    };

    u8 head_[kRecord];
    u32 size_, stretch_, max_parked_;
    bool set_presence_;
    std::size_t bytes_at_start_;
    std::unique_ptr<ConcurrentIndex> all_, wild_;
    u64 pods_[kPods] = {};
    std::map<std::pair<u32, i64>, Solo> solos_;
    Configuration configured_[kPods];
    std::vector<Told> told_[kPods];
    std::vector<Query> asked_;
    std::map<u64, Query> spelled_;
    PodNames ready_{{"a", "c", "nobody"}};
    Batch batch_;
    std::string keys_;
    MatchResult out_;
    double now_ = 0;
    std::size_t steps_ = 0;
};

// Long enough for tangles, short enough for thousands of runs a second.
constexpr std::size_t kMostSteps = 160;

void run_structured(World& world, const u8* p, std::size_t n) {
    for (std::size_t i = 0; i < kMostSteps && n >= kRecord; ++i, p += kRecord, n -= kRecord) world.record(p);
}

// The first byte determines the next operation: a payload that ends by itself, one with its length before it, or a
// record.
void run_raw(World& world, const u8* p, std::size_t n) {
    for (std::size_t i = 0; i < kMostSteps && n >= 2; ++i) {
        const u8 what = p[0];
        if (what >= 0xC0) {
            if (n < kRecord) return;
            world.record(p);
            p += kRecord;
            n -= kRecord;
            continue;
        }
        const u8 who = p[1];
        p += 2;
        n -= 2;
        std::size_t length = n;
        if (what >= 0x80) {
            if (n < 2) return;
            length = std::min<std::size_t>(n - 2, p[0] | p[1] << 8);
            p += 2;
            n -= 2;
        } else {
            MsgReader reader(p, n);
            if (reader.skip(1)) length = n - reader.left();
        }
        // A copy of exactly this size, so that the sanitizer sees any read beyond it.
        const std::vector<u8> payload(p, p + length);
        world.payload(who, payload.data(), payload.size());
        p += length;
        n -= length;
    }
}

}  // namespace

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

// Structured inputs: half of the time, whole records are moved, copied, dropped or changed in place.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
    const std::size_t n = size / kRecord;
    if (n < 2 || !(data[0] & 1) || seed % 2) return LLVMFuzzerMutate(data, size, max_size);
    seed /= 2;
    const auto draw = [&](std::size_t below) {
        seed = seed * 1103515245u + 12345u;
        return (seed >> 8) % below;
    };
    std::uint8_t* const at = data + kRecord * (1 + draw(n - 1));
    const std::uint8_t* const from = data + kRecord * (1 + draw(n - 1));
    const std::size_t rest = static_cast<std::size_t>(data + size - at);
    std::uint8_t copy[kRecord];
    std::memcpy(copy, from, kRecord);
    switch (draw(5)) {
        case 0: std::memmove(at, at + kRecord, rest - kRecord); return size - kRecord;
        case 1:
            std::memcpy(data + (from - data), at, kRecord);
            std::memcpy(at, copy, kRecord);
            return size;
        case 2:
        case 3:
            if (size + kRecord > max_size) break;
            std::memmove(at + kRecord, at, rest);
            std::memcpy(at, copy, kRecord);
            if (seed & 1) copy[0] = static_cast<std::uint8_t>(draw(256));
            if (seed & 2) at[draw(kRecord)] = static_cast<std::uint8_t>(draw(256));
            return size + kRecord;
        default: break;
    }
    at[draw(kRecord)] = static_cast<std::uint8_t>(draw(256));
    return size;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size < kRecord) return 0;
    if (data[0] ==
        '{') {  // a request, which only the sanitizers check here; tests/property/test_json_tokens.py checks the result
        std::vector<std::uint32_t> ids(size / 2);
        json_tokens(reinterpret_cast<const char*>(data), size, "tokens", 6, ids.data());
        return 0;
    }
    World world(data);
    if (data[0] & 1) {
        run_structured(world, data + kRecord, size - kRecord);
    } else {
        run_raw(world, data + kRecord, size - kRecord);
    }
    world.finish();
    return 0;
}
