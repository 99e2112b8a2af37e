// Items of the heap and of pools are taken, resized and returned at random, and each keeps its contents.
//
// `make fuzz` runs it. Elsewhere, the address sanitizer watches items that malloc hands out, so the slabs themselves
// never run under it. Here they do (KVINDEX_SLABS). The requirements, beside a list of the live items:
//   - no two overlap, all are aligned to 16 bytes, each has as many bytes as Heap::room returns, and they keep their
//     contents while they are resized and while other memory is returned to the system;
//   - take_zeros gives zeros, even if the place was used before;
//   - nothing is unmapped that was not mapped, and in the end nothing is left mapped;
//   - if the system refuses memory, the call has no effect.
// Linked with --wrap for mmap, munmap and mremap (see the Makefile).

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "base/pool.hpp"

namespace {

std::map<std::uintptr_t, std::uintptr_t> g_mapped;  // begin and end; neighbours are joined
bool g_refuses = false;

[[noreturn]] void die(const std::string& what) {
    std::fprintf(stderr, "kvindex memory: %s\n", what.c_str());
    std::abort();
}

void mapped(void* p, std::size_t n) {
    auto from = reinterpret_cast<std::uintptr_t>(p), to = from + n;
    auto it = g_mapped.upper_bound(from);
    if (it != g_mapped.begin() && std::prev(it)->second > from) die("mapped twice");
    if (it != g_mapped.end() && it->first < to) die("mapped twice");
    if (it != g_mapped.end() && it->first == to) {
        to = it->second;
        it = g_mapped.erase(it);
    }
    if (it != g_mapped.begin() && std::prev(it)->second == from) {
        std::prev(it)->second = to;
    } else {
        g_mapped[from] = to;
    }
}
void unmapped(void* p, std::size_t n) {
    const auto from = reinterpret_cast<std::uintptr_t>(p);
    const std::uintptr_t to = from + (n + 4095) / 4096 * 4096;
    auto it = g_mapped.upper_bound(from);
    if (from % 4096 || it == g_mapped.begin() || std::prev(it)->second < to) die("unmapped what is not mapped");
    --it;
    const std::uintptr_t begin = it->first, end = it->second;
    g_mapped.erase(it);
    if (begin < from) g_mapped[begin] = from;
    if (to < end) g_mapped[to] = end;
}

}  // namespace

// NOLINTBEGIN(bugprone-reserved-identifier): the linker's names.
extern "C" {
void* __real_mmap(void* at, std::size_t n, int prot, int flags, int fd, off_t from);
int __real_munmap(void* p, std::size_t n);
void* __real_mremap(void* p, std::size_t from, std::size_t to, int flags);
void* __wrap_mmap(void* at, std::size_t n, int prot, int flags, int fd, off_t from) {
    void* const p = g_refuses ? MAP_FAILED : __real_mmap(at, n, prot, flags, fd, from);
    if (p != MAP_FAILED) mapped(p, n);
    return p;
}
int __wrap_munmap(void* p, std::size_t n) {
    unmapped(p, n);
    return __real_munmap(p, n);
}
void* __wrap_mremap(void* p, std::size_t from, std::size_t to, int flags) {
    if (g_refuses) return MAP_FAILED;
    unmapped(p, from);
    void* const q = __real_mremap(p, from, to, flags);
    mapped(q, to);
    return q;
}
}
// NOLINTEND(bugprone-reserved-identifier)

namespace {

using namespace kvindex;

class Random {
public:
    explicit Random(u64 seed) : rng_(seed) {}
    u64 below(u64 n) { return rng_() % n; }
    // Most items of an index are small, and some are as large as a large page or larger.
    std::size_t size() {
        const u64 kind = below(64);
        return kind < 40   ? 1 + below(300)
               : kind < 58 ? 1 + below(9000)
               : kind < 63 ? 1 + below(70'000)
                           : 1 + below(5 << 20);
    }

private:
    std::mt19937_64 rng_;
};

// The first bytes, and then some of each page: the same ones of a shorter item as of a longer one.
template <class F>
void each_byte(std::size_t n, F&& f) {
    for (std::size_t i = 0; i < n; i += i < 512 ? 1 : 509) f(i);
}
u8 mark(u64 id, std::size_t i) { return static_cast<u8>(id * 131 + i * 7 + (i >> 8) + 1); }

struct Item {
    std::size_t n;
    u64 id;
};

class Items {
public:
    explicit Items(u64 seed) : random_(seed) {}

    void step(bool fewer) {
        g_refuses = random_.below(16) == 0;
        const std::size_t before = mem_.bytes;
        try {
            if (live_.empty() || random_.below(16) >= (fewer ? 12u : 6u)) {
                take();
            } else if (random_.below(3)) {
                give();
            } else {
                resize();
            }
        } catch (const std::bad_alloc&) {
            if (!g_refuses) die("no memory");
            if (mem_.bytes != before) die("counted what was refused");
        }
        g_refuses = false;
    }
    void finish() {
        std::size_t bytes = 0;
        for (const auto& item : live_) {
            read(item_at(item.first), item.second.n, item.second.id);
            bytes += Heap::room(item.second.n);
        }
        if (bytes != mem_.bytes) die("miscounted");
        while (!live_.empty()) give();
        if (mem_.bytes) die("bytes are left");
    }

private:
    static u8* item_at(std::uintptr_t at) { return reinterpret_cast<u8*>(at); }  // NOLINT(performance-no-int-to-ptr)
    void write(u8* p, std::size_t n, u64 id) {
        each_byte(n, [&](std::size_t i) { p[i] = mark(id, i); });
    }
    void read(const u8* p, std::size_t n, u64 id) {
        each_byte(n, [&](std::size_t i) {
            if (p[i] != mark(id, i)) die("an item of " + std::to_string(n) + " bytes changed at " + std::to_string(i));
        });
    }
    void add(u8* p, std::size_t n, u64 id) {
        const std::size_t room = Heap::room(n);
        if (room < n) die("less room than was asked for");
        const auto at = reinterpret_cast<std::uintptr_t>(p);
        if (at % 16) die("not aligned");
        const auto after = live_.lower_bound(at);
        if (after != live_.end() && after->first < at + room) die("two items overlap");
        if (after != live_.begin() && std::prev(after)->first + Heap::room(std::prev(after)->second.n) > at)
            die("two items overlap");
        // Like a list that takes all the room there is.
        n = room <= 4096 ? room : n;
        write(p, n, id);
        live_[at] = {n, id};
    }
    std::map<std::uintptr_t, Item>::iterator any() {
        // By address, which is random enough.
        auto it = live_.lower_bound(last_ + random_.below(1 << 18));
        return it == live_.end() ? live_.begin() : it;
    }
    void take() {
        const std::size_t n = random_.size();
        const bool zeros = random_.below(2);
        u8* const p = static_cast<u8*>(zeros ? mem_.take_zeros(n) : mem_.take(n));
        if (zeros)
            each_byte(n, [&](std::size_t i) {
                if (p[i]) die("no zeros");
            });
        add(p, n, ++id_);
    }
    void give() {
        const auto it = any();
        const Item item = it->second;
        last_ = it->first;
        u8* const p = item_at(last_);
        read(p, item.n, item.id);
        live_.erase(it);
        mem_.give(p, item.n);
    }
    void resize() {
        const auto it = any();
        const Item item = it->second;
        last_ = it->first;
        u8* const p = item_at(last_);
        read(p, item.n, item.id);
        const std::size_t n = random_.below(2) ? random_.size() : item.n + item.n / 4 + 1;
        u8* const q = static_cast<u8*>(mem_.resize(p, item.n, n));
        live_.erase(it);
        read(q, std::min(n, item.n), item.id);
        add(q, n, item.id);
    }

    Random random_;
    Spare spare_;
    Memory mem_{spare_};
    std::map<std::uintptr_t, Item> live_;
    std::uintptr_t last_ = 0;
    u64 id_ = 0;
};

// One item size that divides a page, one that does not, and one whose slabs share a page with many others.
struct alignas(64) Whole {
    u64 words[16];
};
struct Odd {
    u64 words[12];
};
struct Small {
    u64 words[1];
};

template <class T>
void pool(u64 seed, u32 most) {
    Random random(seed);
    Spare spare;
    Memory mem(spare);
    {
        Pool<T> pool(mem);
        std::vector<u32> live;
        for (u32 phase = 0; phase < 8; ++phase) {
            // Shrinks to a few items anywhere, to the first ones, to no item, and grows again.
            const u32 goal = phase % 2 ? (phase == 7 ? 0 : most / 50) : most;
            while (live.size() < goal) {
                const u32 id = pool.take();
                for (u64& w : pool[id].words) {
                    if (w) die("an item of a pool is not new");
                    w = id + 1;
                }
                live.push_back(id);
            }
            while (live.size() > goal) {
                if (phase != 3) std::swap(live[random.below(live.size())], live.back());
                const u32 id = live.back();
                live.pop_back();
                for (const u64 w : pool[id].words)
                    if (w != id + 1) die("an item of a pool changed");
                pool.give(id);
                // Some items are taken while many are returned.
                if (random.below(8)) continue;
                const u32 other = pool.take();
                for (u64& w : pool[other].words) w = other + 1;
                live.push_back(other);
            }
            if (pool.size() != live.size()) die("a pool miscounts");
            std::size_t n = 0;
            pool.each([&](u32 id) {
                ++n;
                for (const u64 w : pool[id].words)
                    if (w != id + 1) die("an item of a pool changed");
            });
            if (n != live.size()) die("a pool lists others than it has");
        }
        if (!live.empty()) die("some are left");
    }
    if (mem.bytes) die("a pool leaves bytes");
}

}  // namespace

// NOLINTNEXTLINE(bugprone-exception-escape): an exception that escapes is a finding.
int main(int argc, char** argv) {
    const u64 seeds = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 4;
    for (u64 seed = 0; seed < seeds; ++seed) {
        {
            Items items(seed);
            for (u32 i = 0; i < 60'000; ++i) items.step(i / 10'000 % 2);
            items.finish();
        }
        if (!g_mapped.empty()) die("the heap leaves mappings");
        pool<Whole>(seed, 90'000);
        pool<Odd>(seed, 60'000);
        pool<Small>(seed, 900'000);
        if (!g_mapped.empty()) die("a pool leaves mappings");
    }
    std::printf("%llu histories of items\n", static_cast<unsigned long long>(seeds));
    return 0;
}
