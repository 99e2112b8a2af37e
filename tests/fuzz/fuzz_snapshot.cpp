// A fuzzer of snapshots: every file is refused, or gives an index in which nothing is broken, now and later.
//
// The input is a file. Its size and its checksum are corrected, so that the content is tested instead of the detection
// of damage. An accepted file has to pass _check(), is used, has to pass again, can be saved and loaded once more, and
// leaves nothing behind when its pods have been removed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "concurrent_index.hpp"

using namespace kvindex;

namespace {

[[noreturn]] void die(const std::string& what) {
    std::fprintf(stderr, "kvindex fuzz: %s\n", what.c_str());
    std::abort();
}

void sound(ConcurrentIndex& ix, const char* when) {
    const std::string broken = ix.check();
    if (!broken.empty()) die(std::string(when) + ": " + broken);
}

Event event(EventKind kind, Batch& b, std::vector<u64> hashes, std::vector<u32> tokens, u32 block_size, bool has_parent,
            u64 parent) {
    Event e;
    e.kind = kind;
    e.hash_at = static_cast<u32>(b.hashes.size());
    e.n_hashes = static_cast<u32>(hashes.size());
    e.token_at = static_cast<u32>(b.tokens.size());
    e.n_tokens = static_cast<u32>(tokens.size());
    e.block_size = block_size;
    e.has_parent = has_parent;
    e.parent = parent;
    b.hashes.insert(b.hashes.end(), hashes.begin(), hashes.end());
    b.tokens.insert(b.tokens.end(), tokens.begin(), tokens.end());
    return e;
}

std::vector<u64> pods(const ConcurrentIndex& ix) {
    std::size_t all = 0;
    std::vector<u64> out;
    for (const std::string& name : ix.directory().some(kNone, all)) out.push_back(ix.directory().find(name));
    return out;
}

void use(ConcurrentIndex& ix, u32 size) {
    Batch b;
    const std::vector<u32> tokens(std::size_t{4} * size, 7);
    b.events.push_back(event(EventKind::stored, b, {1000, 1001, 1002, 1003}, tokens, size, false, 0));
    b.events.push_back(event(EventKind::removed, b, {1, 2, 1001, 2000}, {}, 0, false, 0));
    b.events.push_back(event(EventKind::stored, b, {2001, 2002},
                             std::vector<u32>(tokens.begin(), tokens.begin() + std::ptrdiff_t{2} * size), size, true,
                             2000));
    for (const u64 pod : pods(ix))
        for (const char* model : {"", "m"}) {
            Report r;
            ix.apply(pod, 0, model, b, Place(), r);
            MatchResult m;
            Prompt p;
            p.tokens = tokens.data();
            p.n_tokens = tokens.size();
            ix.match(p, model, nullptr, false, true, m);
        }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const u8* data, std::size_t n) {
    if (n < kSnapshotHead) return 0;
    // Aligned to eight bytes, like bytes objects and files in memory.
    std::vector<u64> room(n / 8 + 1);
    u8* file = reinterpret_cast<u8*>(room.data());
    std::memcpy(file, data, n);
    SnapshotHeader h{};
    std::memcpy(&h, file, sizeof h);
    std::memcpy(h.magic, kSnapshotMagic, sizeof h.magic);
    h.version = kSnapshotVersion;
    h.zero = 0;
    h.bytes = n;
    h.sections = kSections;
    // Small blocks, since hashing would otherwise take most of the time.
    h.block_size = h.block_size % 8 + 1;
    h.set_presence &= 1;
    h.max_parked &= 0xFFFF;
    std::memcpy(file, &h, sizeof h);
    h.checksum = xxh3_64(file + kChecksumFrom, n - kChecksumFrom, 0);
    std::memcpy(file, &h, sizeof h);
    ConcurrentIndex ix(h.block_size, h.seed, h.set_presence != 0, h.max_parked);
    try {
        ix.load(file, n);
    } catch (const SnapshotRefused&) {
        return 0;
    }
    sound(ix, "loaded");
    SnapshotBytes again;
    ix.save(again);
    ConcurrentIndex second(h.block_size, h.seed, h.set_presence != 0, h.max_parked);
    second.load(again.data(), again.size());
    sound(second, "loaded again");
    SnapshotBytes third;
    second.save(third);
    if (third.size() != again.size() || std::memcmp(third.data(), again.data(), again.size()) != 0)
        die("what was loaded is saved as something else");
    use(ix, h.block_size);
    sound(ix, "used");
    // The snapshot replaces an index with content of its own: pods of other names, in another order, and media.
    for (const char* name : {"y", "x"}) second.open_pod(name);
    for (const u64 pod : pods(second)) {
        second.configure(pod, -1, true, {"Tape", "cpu"}, -1, -1);
        second.mark(pod, 3, 0);
    }
    use(second, h.block_size);
    second.load(again.data(), again.size());
    sound(second, "loaded in place");
    SnapshotBytes fourth;
    second.save(fourth);
    if (fourth.size() != again.size()) die("what was loaded in place is saved as something else");
    for (const u64 pod : pods(ix)) {
        ix.clear_worker(pod, 0);
        sound(ix, "cleared");
    }
    for (const u64 pod : pods(ix)) ix.remove_pod(pod);
    sound(ix, "removed");
    if (ix.stats().figures.blocks != 0) die("blocks are left when all pods are gone");
    return 0;
}
