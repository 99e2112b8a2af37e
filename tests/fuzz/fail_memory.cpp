// Every allocation that a history of events makes fails once, and the index must be consistent afterwards.
//
// This is not a fuzzer, though `make fuzz` runs it: histories are drawn from seeds, and the failures are not chosen but
// tried exhaustively. Allocations fail one after the other, alone and with all that follow until the call returns. A
// twin of the index never lacks memory. The requirements:
//   - every invariant of Index::check() holds after the failure, after each call that follows, and at the end;
//   - no answer is ever larger than the twin's (if no hash means two contents), and pods that know less than the twin's
//     are degraded;
//   - when the pods have been removed, no block is left, and the memory is the same as at the start.
// Linked with --wrap for malloc, calloc, realloc, mmap and mremap (see the Makefile).

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "concurrent_index.hpp"

namespace {

bool g_watched = false, g_for_good = false;
long g_left = -1;  // allocations until one fails; -1: none of them does
long g_made = 0, g_failed = 0;

bool fails() {
    if (!g_watched) return false;
    ++g_made;
    if (g_left < 0) return false;
    if (g_left > 0) {
        --g_left;
        return false;
    }
    if (!g_for_good) g_left = -1;
    ++g_failed;
    return true;
}

}  // namespace

// NOLINTBEGIN(bugprone-reserved-identifier): the linker's names.
extern "C" {
void* __real_malloc(std::size_t n);
void* __real_calloc(std::size_t n, std::size_t size);
void* __real_realloc(void* p, std::size_t n);
void* __real_mmap(void* at, std::size_t n, int prot, int flags, int fd, off_t from);
void* __real_mremap(void* p, std::size_t from, std::size_t to, int flags);
void* __wrap_malloc(std::size_t n) { return fails() ? nullptr : __real_malloc(n); }
void* __wrap_calloc(std::size_t n, std::size_t size) { return fails() ? nullptr : __real_calloc(n, size); }
void* __wrap_realloc(void* p, std::size_t n) { return fails() ? nullptr : __real_realloc(p, n); }
void* __wrap_mmap(void* at, std::size_t n, int prot, int flags, int fd, off_t from) {
    return fails() ? MAP_FAILED : __real_mmap(at, n, prot, flags, fd, from);
}
void* __wrap_mremap(void* p, std::size_t from, std::size_t to, int flags) {
    return fails() ? MAP_FAILED : __real_mremap(p, from, to, flags);
}
}
// NOLINTEND(bugprone-reserved-identifier)

void* operator new(std::size_t n) {
    void* p = fails() ? nullptr : __real_malloc(n);
    if (!p) throw std::bad_alloc();
    return p;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

namespace {

using namespace kvindex;

constexpr u32 kPods = 3, kPrompts = 24;
const char* const kPodNames[kPods] = {"a", "b", "c"};
const char* const kMedia[3] = {"", "cpu", "Tape"};

[[noreturn]] void die(const std::string& what, u64 seed, long at) {
    std::fprintf(stderr, "kvindex memory: %s (seed %llu, allocation %ld%s)\n", what.c_str(),
                 static_cast<unsigned long long>(seed), at, g_for_good ? " and all that follow" : "");
    std::abort();
}

// The effect of one call, drawn once and applied to the index and the twin.
struct Call {
    enum Kind : u8 { events, clear_worker, remove_pod, guess, expire, reload } kind = events;
    u32 pod = 0;
    i64 rank = 0;
    Batch batch;
    std::vector<u64> prefixes;
    double until = 0;
};

struct History {
    std::vector<Call> calls;
    std::vector<std::vector<u32>> prompts;
    u64 budget = 0;
    bool ambiguous = false;  // one hash means two contents on one worker
};

History draw(u64 seed) {
    std::mt19937_64 random(seed);
    const auto below = [&](u64 n) { return random() % n; };
    History h;
    if (seed % 4 == 3) h.budget = 1u << 16;
    for (u32 i = 0; i < kPrompts; ++i) {
        // Each prompt begins like an earlier one, and forks at a random place.
        std::vector<u32> p = i ? h.prompts[below(i)] : std::vector<u32>();
        p.resize(below(p.size() + 1));
        while (p.size() < 60 && below(24)) p.push_back(static_cast<u32>(below(3)));
        if (p.empty()) p.push_back(7);
        h.prompts.push_back(p);
    }
    // Pods a and b have the same name for a prefix, and c has names of its own. In every second history, a few small
    // numbers have another meaning each time.
    h.ambiguous = seed % 2 == 1;
    const auto name = [&](u32 pod, const std::vector<u32>& p, std::size_t n) {
        const u64 full = xxh3_64(p.data(), n * sizeof(u32), pod == 2 ? 5 : 0);
        return h.ambiguous && full % 11 == 0 ? full % 7 : full;
    };
    for (u32 i = 0; i < 40; ++i) {
        Call c;
        c.pod = static_cast<u32>(below(kPods));
        c.rank = below(8) == 0;
        const std::vector<u32>& p = h.prompts[below(kPrompts)];
        const u64 what = below(40);
        if (what == 0) {
            c.kind = Call::clear_worker;
        } else if (what == 1) {
            c.kind = Call::remove_pod;
        } else if (what == 2) {
            c.kind = Call::expire;
            c.until = static_cast<double>(i);
        } else if (what == 3) {
            c.kind = Call::reload;
        } else if (what < 7) {
            c.kind = Call::guess;
            c.until = static_cast<double>(i + below(30));
            c.prefixes.resize(p.size());
            const BlockHasher hasher(1337, 1);
            hasher.locals(p.data(), p.size(), c.prefixes.data());
            hasher.chain(c.prefixes.data(), p.size(), nullptr, c.prefixes.data());
        }
        for (u64 n = c.kind == Call::events ? 1 + below(3) : 0; n; --n) {
            Event e;
            const u64 kind = below(20);
            const u64 medium = below(6), group = below(12);
            if (medium < 3) {
                e.medium.p = kMedia[medium];
                e.medium.n = static_cast<u32>(std::strlen(kMedia[medium]));
            }
            if (group < 2) {
                e.group = 1;
                e.window = 3;
            }
            e.hash_at = static_cast<u32>(c.batch.hashes.size());
            e.token_at = static_cast<u32>(c.batch.tokens.size());
            const std::size_t cut = below(2) ? 0 : below(p.size());
            if (kind == 0) {
                e.kind = EventKind::cleared;
            } else if (kind < 8) {
                e.kind = EventKind::removed;
                for (std::size_t k = p.size(); k > cut; --k) c.batch.hashes.push_back(name(c.pod, p, k));
            } else {
                e.kind = EventKind::stored;
                e.has_parent = cut != 0;
                if (cut) e.parent = name(c.pod, p, cut);
                const u32 factor = below(9) == 0 && cut % 2 == 0 && (p.size() - cut) % 2 == 0 && p.size() > cut ? 2 : 1;
                e.block_size = factor;
                for (std::size_t k = cut + factor; k <= p.size(); k += factor)
                    c.batch.hashes.push_back(name(c.pod, p, k));
                // Now and then, blocks are announced by name alone.
                if (kind < 18) c.batch.tokens.insert(c.batch.tokens.end(), p.begin() + static_cast<long>(cut), p.end());
            }
            e.n_hashes = static_cast<u32>(c.batch.hashes.size()) - e.hash_at;
            e.n_tokens = static_cast<u32>(c.batch.tokens.size()) - e.token_at;
            c.batch.events.push_back(e);
        }
        h.calls.push_back(std::move(c));
    }
    return h;
}

class World {
public:
    explicit World(u64 budget) : ix_(1, 1337, false, 40, budget, 0), bytes_(ix_.stats().figures.bytes) {
        for (u32 p = 0; p < kPods; ++p) pods_[p] = ix_.open_pod(kPodNames[p]);
    }
    // Returns false if there was no memory.
    bool act(const Call& c) {
        SnapshotBytes saved;
        if (c.kind == Call::reload) ix_.save(saved);
        try {
            g_watched = true;
            Report r;
            switch (c.kind) {
                case Call::events: ix_.apply(pods_[c.pod], c.rank, "", c.batch, Place{++seq_, 1.0, 1}, r); break;
                case Call::clear_worker: ix_.clear_worker(pods_[c.pod], c.rank); break;
                case Call::remove_pod: ix_.remove_pod(pods_[c.pod]); break;
                case Call::guess: ix_.guess(pods_[c.pod], c.rank, "", c.prefixes, c.until); break;
                case Call::expire: ix_.expire(c.until); break;
                case Call::reload: ix_.load(saved.data(), saved.size()); break;
            }
            g_watched = false;
        } catch (const std::bad_alloc&) {
            g_watched = false;
            return false;
        }
        if (c.kind == Call::remove_pod) pods_[c.pod] = ix_.open_pod(kPodNames[c.pod]);
        if (c.kind == Call::reload)
            for (const u64 pod : pods_)
                for (const i64 rank : {0, 1}) ix_.mark(pod, rank, 0);
        return true;
    }
    std::map<std::pair<u32, i64>, u32> ask(const std::vector<u32>& prompt) const {
        Prompt p;
        p.tokens = prompt.data();
        p.n_tokens = prompt.size();
        MatchResult m;
        ix_.match(p, "", nullptr, false, true, m);
        std::map<std::pair<u32, i64>, u32> out;
        for (const Hit& h : m.hits)
            for (u32 pod = 0; pod < kPods; ++pod)
                if (pods_[pod] == h.pod && (h.says & kReused)) {
                    u32& most = out[{pod, h.rank}];
                    most = std::max(most, h.blocks);
                }
        return out;
    }
    int state(u32 pod) const { return ix_.state(pods_[pod]); }
    std::string check() { return ix_.check(); }
    std::string finish() {
        for (u32 p = 0; p < kPods; ++p) ix_.remove_pod(pods_[p]);
        if (const std::string bad = ix_.check(); !bad.empty()) return "after remove_pod: " + bad;
        const Index::Figures f = ix_.stats().figures;
        if (f.blocks || f.chains || f.holders || f.workers || f.parked || f.guesses) return "something is left";
        if (f.bytes != bytes_) return std::to_string(f.bytes) + " bytes are left, not " + std::to_string(bytes_);
        return "";
    }

private:
    ConcurrentIndex ix_;
    u64 bytes_;
    u64 pods_[kPods] = {};
    i64 seq_ = -1;
};

// Runs the history, in which the allocation with number `at` fails. Returns the number of its allocations.
long run(u64 seed, const History& h, long at) {
    World world(h.budget), twin(0);
    g_left = at;
    g_made = g_failed = 0;
    bool struck = false;
    for (std::size_t i = 0; i < h.calls.size(); ++i) {
        const long failed = g_failed;
        const bool done = world.act(h.calls[i]);
        const bool now = g_failed != failed;
        struck |= now;
        g_left = now ? -1 : g_left;
        const long left = g_left, made = g_made;
        g_left = -1;
        // The caller of a failed add_prefix learns that the entry does not count. The caller of a failed load() learns
        // that nothing has changed, including the speculative entries.
        if (done || (h.calls[i].kind != Call::guess && h.calls[i].kind != Call::reload)) twin.act(h.calls[i]);
        g_left = left;
        g_made = made;
        if (!now && i + 1 < h.calls.size() && (!struck || i % 8)) continue;
        if (const std::string bad = world.check(); !bad.empty()) die("broken: " + bad, seed, at);
        for (const auto& prompt : h.prompts) {
            const auto got = world.ask(prompt), most = twin.ask(prompt);
            for (const auto& g : got)
                // If a hash means two contents, a block that was never parked here may have taken its name away from
                // another block in the twin.
                if (const auto m = most.find(g.first); !h.ambiguous && (m == most.end() || m->second < g.second))
                    die("answers too much after call " + std::to_string(i) + ": " + std::to_string(g.second) + " for " +
                            kPodNames[g.first.first] + "/" + std::to_string(g.first.second),
                        seed, at);
            for (const auto& m : most)
                if (const auto g = got.find(m.first); g == got.end() || g->second < m.second)
                    if (world.state(m.first.first) == 0) die("knows less without saying so", seed, at);
        }
    }
    const long made = g_made;
    g_left = -1;
    for (World* w : {&world, &twin})
        if (const std::string bad = w->finish(); !bad.empty()) die(bad, seed, at);
    return made;
}

}  // namespace

// NOLINTNEXTLINE(bugprone-exception-escape): an exception that escapes is a finding.
int main(int argc, char** argv) {
    const u64 seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 4;
    long tried = 0;
    for (u64 seed = 0; seed < seeds; ++seed) {
        const History h = draw(seed);
        const long all = run(seed, h, -1);
        for (const bool for_good : {false, true})
            for (long at = 0; at < all; ++at, ++tried) {
                g_for_good = for_good;
                run(seed, h, at);
            }
    }
    std::printf("%ld failed allocations in %llu histories\n", tried, static_cast<unsigned long long>(seeds));
    return 0;
}
