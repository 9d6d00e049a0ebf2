// Threads that go through one computation together, and a barrier that does not mind being interrupted.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif

namespace hasten {

inline void relax() {
#ifdef __x86_64__
    _mm_pause();
#endif
}

// Keeps the n-th of `count` threads on a core of its own, if these are all the cores that the process may use. Threads that
// meet every few microseconds must not share one, and a scheduler has those that it wakes for a short while do just that.
inline void stay_on_core(int n, int count) {
#ifdef __linux__
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed) || CPU_COUNT(&allowed) != count) return;
    CPU_ZERO(&one);
    for (int core = 0; core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &allowed) && n-- == 0) CPU_SET(core, &one), sched_setaffinity(0, sizeof one, &one);
#else
    (void)n, (void)count;
#endif
}

// A barrier is crossed some sixty times per token, so it spins; but a core that somebody else needs is given up soon,
// or a machine with other work on it would spend its time waiting for a thread that is not running.
class Team {
public:
    explicit Team(int count) : count_(count) {
        for (int i = 1; i < count; i++) threads_.emplace_back([this, i] { follow(i); });
    }
    ~Team() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            done_ = true, round_.fetch_add(1);
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }
    int count() const { return count_; }

    // job(i) in every thread, this one included; returns when all have finished.
    void run(std::function<void(int)> job) {
        job_ = std::move(job);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            round_.fetch_add(1, std::memory_order_release);
        }
        if (sleeping_.load()) wake_.notify_all();
        job_(0);
        barrier();
    }

    void barrier() {
        if (count_ == 1) return;
        unsigned phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == count_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; spins++) spins < PATIENCE ? relax() : std::this_thread::yield();
    }

private:
    static constexpr int PATIENCE = 4000, LONG = 200000;

    void follow(int i) {
        stay_on_core(i, count_);
        for (unsigned seen = 0;;) {
            for (int spins = 0; round_.load(std::memory_order_acquire) == seen && spins < LONG; spins++)
                spins < PATIENCE ? relax() : std::this_thread::yield();
            if (round_.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return round_.load() != seen; });
                sleeping_.fetch_sub(1);
            }
            if (done_) return;
            seen++;
            job_(i);
            barrier();
        }
    }

    int count_;
    std::vector<std::thread> threads_;
    std::function<void(int)> job_;
    std::atomic<unsigned> round_{0}, phase_{0};
    std::atomic<int> arrived_{0}, sleeping_{0};
    std::atomic<bool> done_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
};

}  // namespace hasten
