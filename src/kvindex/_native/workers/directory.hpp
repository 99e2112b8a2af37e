// The existing pods: the one map from names to numbers, and back.
#pragma once

#include <cstdint>
#include <mutex>
#include <new>
#include <string>
#include <unordered_map>
#include <vector>

namespace kvindex {

// A number is never used twice, so "number 5 was given to pod a" stays true, and a caller may keep the number. This
// class reports whether the pod still exists. The map changes under the index's write lock and under a mutex of its
// own, so a call finds its pod before it waits for the index. A batch that waits while its pod is removed is dropped. A
// call that begins after the removal opens the pod again.
class PodDirectory {
public:
    using Uid = std::uint64_t;  // 0: no pod

    // Needs no mutex if the caller holds the index's lock in either mode.
    Uid uid(const std::string& name) const {
        const auto it = uids_.find(name);
        return it == uids_.end() ? 0 : it->second;
    }
    std::size_t size() const { return uids_.size(); }

    // For any thread at any time.
    Uid find(const std::string& name) const {
        const std::lock_guard<std::mutex> g(m_);
        return uid(name);
    }
    bool has(Uid uid) const {
        const std::lock_guard<std::mutex> g(m_);
        const auto it = names_.find(uid);
        return it != names_.end() && it->second.open;
    }
    // Also finds a removed pod while few others have been removed since. Otherwise, the name is empty and `known` is
    // false.
    std::string name(Uid uid, bool& known) const {
        const std::lock_guard<std::mutex> g(m_);
        const auto it = names_.find(uid);
        known = it != names_.end();
        return known ? it->second.name : std::string();
    }
    // Up to `most` names, for a message.
    std::vector<std::string> some(std::size_t most, std::size_t& all) const {
        const std::lock_guard<std::mutex> g(m_);
        std::vector<std::string> out;
        for (auto it = uids_.begin(); it != uids_.end() && out.size() < most; ++it) out.push_back(it->first);
        all = uids_.size();
        return out;
    }

    std::unordered_map<std::string, Uid> all() const { return uids_; }

    // Takes over the pods of another directory. If memory runs out, nothing changes.
    void become(const PodDirectory& other) {
        const std::lock_guard<std::mutex> g(m_);
        PodDirectory next;
        next.uids_ = uids_;
        next.names_ = names_;
        next.removed_ = removed_;
        next.next_ = next_;
        for (const auto& pod : uids_)
            if (other.uid(pod.first) != pod.second) next.close(pod.first);
        for (const auto& pod : other.uids_)
            if (!next.uid(pod.first)) next.open(pod.first, pod.second);
        uids_.swap(next.uids_);
        names_.swap(next.names_);
        removed_.swap(next.removed_);
        next_ = next.next_;
    }

    // Adds both entries or, if memory runs out, neither.
    void open(const std::string& name, Uid uid) {
        const std::lock_guard<std::mutex> g(m_);
        names_.emplace(uid, Entry{name, true});
        try {
            uids_.emplace(name, uid);
        } catch (...) {
            names_.erase(uid);
            throw;
        }
    }
    void close(const std::string& name) noexcept {
        const std::lock_guard<std::mutex> g(m_);
        const auto it = uids_.find(name);
        if (it == uids_.end()) return;
        const Uid uid = it->second;
        uids_.erase(it);
        names_.at(uid).open = false;
        try {
            if (removed_.size() < kRemembered) removed_.reserve(removed_.size() < 16 ? 16 : kRemembered);
        } catch (const std::bad_alloc&) {
            names_.erase(uid);
            return;
        }
        if (removed_.size() < kRemembered) {
            removed_.push_back(uid);
            return;
        }
        names_.erase(removed_[next_]);
        removed_[next_] = uid;
        next_ = (next_ + 1) % kRemembered;
    }

    // A fork of the process: see base/at_fork.hpp.
    void before_fork() { m_.lock(); }
    void after_fork() { m_.unlock(); }
    void in_child() { new (&m_) std::mutex(); }

private:
    // The number of removed pods whose names earlier answers can still find.
    static constexpr std::size_t kRemembered = 1024;
    struct Entry {
        std::string name;
        bool open;
    };

    mutable std::mutex m_;
    std::unordered_map<std::string, Uid> uids_;
    std::unordered_map<Uid, Entry> names_;
    std::vector<Uid> removed_;  // a ring, once it is full
    std::size_t next_ = 0;
};

}  // namespace kvindex
