// SPDX-License-Identifier: Apache-2.0
//
// Every call of the shared index, from many threads, for ThreadSanitizer: make tsan.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "concurrent_index.hpp"

using namespace kvindex;

namespace {

// A batch of one array event, [0.0, [["BlockStored", [names], None, [tokens], 4, None]]], or of a clear.
std::vector<u8> stored(u32 first, u32 blocks) {
    std::vector<u8> out{0x92, 0xCB, 0, 0, 0, 0, 0, 0, 0, 0, 0x91, 0x96, 0xAB};
    const auto number = [&](u32 v) {
        out.push_back(0xCE);
        for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<u8>(v >> shift));
    };
    const auto list = [&](u32 n) {
        out.push_back(0xDC);
        out.push_back(static_cast<u8>(n >> 8));
        out.push_back(static_cast<u8>(n));
    };
    for (const char* c = "BlockStored"; *c; ++c) out.push_back(static_cast<u8>(*c));
    list(blocks);
    for (u32 i = 0; i < blocks; ++i) number(first + i);
    out.push_back(0xC0);
    list(4 * blocks);
    for (u32 i = 0; i < 4 * blocks; ++i) number(4 * first + i);
    out.push_back(4);
    out.push_back(0xC0);
    return out;
}

std::vector<u8> cleared() {
    std::vector<u8> out{0x92, 0xCB, 0, 0, 0, 0, 0, 0, 0, 0, 0x91, 0x91, 0xB0};
    for (const char* c = "AllBlocksCleared"; *c; ++c) out.push_back(static_cast<u8>(*c));
    return out;
}

void require(bool well, const char* what) {
    if (well) return;
    std::fprintf(stderr, "%s\n", what);
    std::abort();
}

void run(double seconds, u64 max_bytes, double ttl) {
    ConcurrentIndex index(4, 1337, false, 100, max_bytes, ttl);
    const std::vector<std::string> names{"a", "b", "c"};
    std::vector<std::vector<u8>> batches{cleared()};
    for (u32 i = 0; i < 24; ++i) batches.push_back(stored(1 + 40 * i, 1 + 13 * (i % 5)));
    PodNames filter({"a", "c"});
    std::atomic<bool> over{false};
    std::atomic<u64> done{0};

    // Like the Python boundary: a remembered number is looked up, and a missing pod is opened.
    const auto uid = [&](const std::string& name) {
        const u64 known = index.directory().find(name);
        return known && index.directory().has(known) ? known : index.open_pod(name);
    };
    const auto work = [&](unsigned seed) {
        std::vector<u32> tokens(160);
        std::vector<u64> prefixes(10);
        u64 state = seed;
        const auto draw = [&](u64 n) {
            return ((state = state * 6364136223846793005ull + 1442695040888963407ull) >> 33) % n;
        };
        MatchResult result;
        while (!over.load(std::memory_order_relaxed)) {
            const std::string& name = names[draw(names.size())];
            const std::vector<u8>& batch = batches[draw(batches.size())];
            Report report;
            double ts = 0;
            i64 rank = 0;
            DecodeFault fault;
            Prompt prompt;
            const u32 first = 4 * (1 + 40 * static_cast<u32>(draw(24)));
            for (u32 i = 0; i < tokens.size(); ++i) tokens[i] = first + i;
            prompt.tokens = tokens.data();
            prompt.n_tokens = tokens.size();
            switch (draw(16)) {
                default:
                    index.ingest(uid(name), batch.data(), batch.size(), "", static_cast<i64>(draw(2)),
                                 static_cast<i64>(draw(9)) - 1, draw(2) == 0, report, ts, rank, fault);
                    break;
                case 4:
                case 5:
                case 6:
                case 7:
                    if (index.match(prompt, "", draw(2) ? &filter : nullptr, draw(2) == 0, draw(2) == 0, result))
                        for (const Hit& hit : result.hits) {
                            bool known = false;
                            index.directory().name(hit.pod, known);
                        }
                    break;
                case 8: index.remove_pod(index.directory().find(name)); break;
                case 9:
                    hash_prompt(prompt, 4, 1337, true, (prefixes.resize(40), prefixes.data()));
                    index.guess(uid(name), 0, "", prefixes, 0.001 * static_cast<double>(draw(1000)));
                    break;
                case 10: index.configure(uid(name), -1, draw(2) == 0, {"CPU"}, -1, -1); break;
                case 11: index.mark(uid(name), 0, static_cast<int>(draw(3))); break;
                case 12: index.clear_worker(uid(name), 0); break;
                case 13: {
                    const u64 known = index.directory().find(name);
                    index.stats();
                    index.state(known);
                    index.pod_figures(known);
                    index.places(known);
                    break;
                }
                case 14: index.expire(0.001 * static_cast<double>(draw(1000))); break;
                case 15:
                    if (draw(20) == 0) {
                        SnapshotBytes bytes;
                        index.save(bytes);
                        // With a budget, it may not fit beside the content that has arrived since.
                        try {
                            if (draw(2)) index.load(bytes.data(), bytes.size());
                        } catch (const SnapshotRefused&) {
                            require(max_bytes != 0, "what was saved is refused");
                        }
                    }
                    break;
            }
            done.fetch_add(1, std::memory_order_relaxed);
        }
    };
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 6; ++i) threads.emplace_back(work, i + 1);
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
    over.store(true);
    for (std::thread& t : threads) t.join();
    require(index.check().empty(), index.check().c_str());
    // After every race, each name must be usable.
    for (const std::string& name : names) {
        Report report;
        double ts = 0;
        i64 rank = 0;
        DecodeFault fault;
        index.remove_pod(index.directory().find(name));
        const Taken taken =
            index.ingest(uid(name), batches[2].data(), batches[2].size(), "", 0, -1, true, report, ts, rank, fault);
        require(taken == Taken::yes && (report.stored != 0 || max_bytes),
                "what an engine says of a name is not stored");
    }
    std::printf("%llu calls, max_bytes %llu, ttl %g: clean\n", static_cast<unsigned long long>(done.load()),
                static_cast<unsigned long long>(max_bytes), ttl);
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = (argc > 1 ? std::atof(argv[1]) : 20) / 3;
    run(seconds, 0, 0);
    run(seconds, 1 << 16, 0);
    run(seconds, 0, 0.5);
}
