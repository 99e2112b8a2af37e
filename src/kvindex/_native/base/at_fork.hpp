// What becomes of things that threads share when their process forks.
#pragma once

#include <pthread.h>

#include <mutex>
#include <new>
#include <set>

namespace kvindex {

// The child has one thread, and whatever another one held or had half done stays so for ever. So the one that forks
// takes every Thing first (`before_fork`), gives it back (`after_fork`), and tells the child's copy (`in_child`). From
// C, not by os.register_at_fork: no other thread can get the interpreter lock in between and wait here with it.
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
    // Never taken down: processes fork until they end.
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
