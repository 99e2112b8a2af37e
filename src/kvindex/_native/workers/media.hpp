// The media of copies, by number.
#pragma once

#include <cstring>
#include <map>
#include <string>
#include <unordered_map>

#include "base/memory.hpp"

namespace kvindex {

// Media are compared without case. The known ones are shown in upper case, others as first seen.
inline std::string lower(const char* p, std::size_t n) {
    std::string s(p, n);
    for (char& c : s)
        if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    return s;
}

// Names of media, each kept while a holder or a pod's configuration uses it. A number is never used twice, so an
// earlier answer with a removed medium never names another one.
class Media {
public:
    explicit Media(Memory& m) : m_(m) {
        put("gpu", "GPU", next_++);
        names_.begin()->second.users = 1;
    }
    ~Media() = default;
    Media(const Media&) = delete;
    Media& operator=(const Media&) = delete;

    // The numbers that have been assigned, for an index that takes the place of this one's.
    struct Numbers {
        std::map<u32, std::string> names;
        u32 next = 1;
    };
    Numbers numbers() const {
        Numbers out;
        for (const auto& n : names_) out.names.emplace(n.first, n.second.shown);
        out.next = next_;
        return out;
    }
    u32 numbers_given() const { return next_; }
    // Takes over the numbers of another index. Requires that only "GPU" has a name yet. Names without a user are
    // removed by the next sweep.
    void follow(const Numbers& before) {
        for (const auto& n : before.names)
            if (n.first) put(lower(n.second.data(), n.second.size()), n.second, n.first);
        next_ = before.next;
    }

    // The number of a name. A new name is removed by the next sweep unless it gets a user. Returns kNone when all
    // numbers have been used.
    u32 id(const char* p, std::size_t n) {
        const u32 known = find(p, n);
        if (known != kNone) return known;
        if (next_ == kNone) return kNone;
        const std::string key = lower(p, n);
        std::string shown(p, n);
        for (const char* k : kKnown)
            if (lower(k, std::strlen(k)) == key) shown = k;
        put(key, shown, next_);
        return next_++;
    }
    u32 find(const char* p, std::size_t n) const {
        if (n == 0) return 0;
        const Seen& seen = seen_[place(p, n)];
        if (seen.name && seen.name->size() == n && std::memcmp(seen.name->data(), p, n) == 0) return seen.id;
        const auto it = ids_.find(lower(p, n));
        return it == ids_.end() ? kNone : it->second;
    }
    void take(u32 id) {
        if (id) ++names_.at(id).users;
    }
    void drop(u32 id) {
        if (id == 0) return;
        const auto it = names_.find(id);
        if (--it->second.users == 0) forget(it);
    }
    void drop_unused(u32 id) {
        const auto it = names_.find(id);
        if (it != names_.end() && it->second.users == 0) forget(it);
    }
    // Removes the media without users.
    void sweep() {
        for (auto it = names_.begin(); it != names_.end();) {
            const auto here = it++;
            if (here->second.users == 0) forget(here);
        }
    }
    // The medium's place in the order in which an engine reads tiers. All other media come last.
    u32 tier(u32 id) const {
        const auto it = names_.find(id);
        u32 n = 0;
        while (n < kTiers && (it == names_.end() || it->second.shown != kKnown[n])) ++n;
        return n;
    }
    // Host memory: CPU, CPU_PINNED, CPU_TIER1, ...
    bool is_host(u32 id) const {
        const auto it = names_.find(id);
        return it != names_.end() && it->second.key.compare(0, 3, "cpu") == 0;
    }
    std::size_t bytes() const { return bytes_; }
    // Empty if the medium has been removed.
    std::string name(u32 id) const {
        const auto it = names_.find(id);
        return it == names_.end() ? std::string() : it->second.shown;
    }
    bool has(u32 id) const { return names_.count(id) != 0; }
    u32 size() const { return static_cast<u32>(names_.size()); }
    // In the order of their numbers.
    template <class F>
    void each(F&& f) const {
        for (const auto& n : names_) f(n.first, n.second.shown, n.second.users);
    }

private:
    // As engines write them. The first are tiers, in the order in which an engine reads them: its own pool, host
    // memory, then slower media.
    static constexpr const char* kKnown[] = {"GPU",     "CPU",      "CPU_PINNED", "DISK",
                                             "STORAGE", "EXTERNAL", "CPU_TIER1",  "CPU_TIER2"};
    static constexpr u32 kTiers = 6;

    struct Name {
        std::string key, shown;
        u64 users;
    };
    struct Seen {
        const std::string* name = nullptr;  // the shown name, which is how engines write it
        u32 id = 0;
    };
    using Names = std::map<u32, Name>;

    static std::size_t place(const char* p, std::size_t n) { return (n * 3 + static_cast<u8>(p[0])) % kSeen; }
    static std::size_t weight(const Name& n) { return 2 * n.key.size() + 256; }
    void put(const std::string& key, const std::string& shown, u32 id) {
        const auto it = names_.emplace(id, Name{key, shown, 0}).first;
        try {
            ids_.emplace(key, id);
        } catch (const std::bad_alloc&) {
            names_.erase(it);
            throw;
        }
        count(id, weight(it->second));
        seen_[place(shown.data(), shown.size())] = {&it->second.shown, id};
    }
    void forget(Names::iterator it) {
        Seen& seen = seen_[place(it->second.shown.data(), it->second.shown.size())];
        if (seen.id == it->first) seen = {};
        count(it->first, 0 - weight(it->second));
        ids_.erase(it->second.key);
        names_.erase(it);
    }
    // "GPU" always exists, so its bytes are not counted.
    void count(u32 id, std::size_t n) {
        if (id == 0) return;
        bytes_ += n;
        m_.add(n);
    }

    static constexpr std::size_t kSeen = 16;
    Memory& m_;
    Names names_;
    std::unordered_map<std::string, u32> ids_;
    Seen seen_[kSeen];
    u32 next_ = 0;
    std::size_t bytes_ = 0;
};

}  // namespace kvindex
