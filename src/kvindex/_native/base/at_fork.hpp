// Locks and indexes across a fork of their process.
#pragma once

#include <pthread.h>

#include <mutex>
#include <new>
#include <set>

namespace kvindex {

// The child has one thread. A lock that another thread held stays locked there, and a half-done change stays half done.
// So the forking thread takes every Thing before the fork (`before_fork`), gives it back afterwards (`after_fork`), and
// notifies the child's copy (`in_child`). These are handlers of pthread_atfork, not of os.register_at_fork: between the
// latter, another thread could take the interpreter lock and wait here while it holds it.
template <class Thing>
class Forks {
public:
    static void add(Thing* t) {
        Forks& f = all();
        std::lock_guard<std::mutex> g(f.m_);
        f.things_.insert(t);
    }
    static void drop(Thing* t) {
        Forks& f = all();
        std::lock_guard<std::mutex> g(f.m_);
        f.things_.erase(t);
    }

private:
    Forks() {
        if (pthread_atfork(before, after, child)) throw std::bad_alloc();
    }
    // Never destroyed: a process may fork until it ends.
    static Forks& all() {
        static Forks* const f = new Forks();
        return *f;
    }
    static void before() {
        Forks& f = all();
        f.m_.lock();
        for (Thing* t : f.things_) t->before_fork();
    }
    static void after() {
        Forks& f = all();
        for (Thing* t : f.things_) t->after_fork();
        f.m_.unlock();
    }
    static void child() {
        Forks& f = all();
        for (Thing* t : f.things_) t->in_child();
        new (&f.m_) std::mutex();
    }

    std::mutex m_;
    std::set<Thing*> things_;
};

}  // namespace kvindex
