// A pool of persistent threads that run the parts of one task after another.
//
// A part is claimed, never assigned: if a worker sleeps or the machine is busy, the caller runs the parts itself. It
// waits only for parts that another thread has begun.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define INKLING_PAUSE() _mm_pause()
#else
#define INKLING_PAUSE() std::this_thread::yield()
#endif

namespace INKLING_ISA {

constexpr int kSpins = 4000;  // some tens of microseconds: about the time between two tokens

class Pool {
public:
    // `patience`: how often an idle worker yields the processor before it sleeps; waking it takes longer than many a
    // task.
    explicit Pool(int threads, int patience = 0) : patience_(patience) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work_until_stopped(); });
    }
    ~Pool() {
        stop_.store(true);
        wake();
        for (auto& worker : workers_) worker.join();
    }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return 1 + int(workers_.size()); }

    // To be called before several `run`s: sleeping workers wake up meanwhile.
    void wake() {
        if (sleeping_.load() > 0) {
            epoch_.fetch_add(1);
            epoch_.notify_all();
        }
    }

    // work(part) for every part below `parts`, each on one thread; returns when all are done.
    template <class Work>
    void run(int parts, const Work& work) {
        if (workers_.empty() || parts < 2) {
            for (int part = 0; part < parts; ++part) call<Work>(&work, part);
            return;
        }
        call_ = call<Work>;
        context_ = &work;
        done_.store(0, std::memory_order_relaxed);
        // Upper half: parts; lower half: the next one to claim.
        ticket_.store(uint64_t(parts) << 32, std::memory_order_release);
        while (claim_and_do()) {
        }
        for (int spins = 0; done_.load(std::memory_order_acquire) < parts; ++spins) {
            if (spins > 4096) std::this_thread::yield();
            INKLING_PAUSE();
        }
    }

private:
    // One compiled copy for all threads: in another the compiler may fuse multiplications and additions differently.
    template <class Work>
    __attribute__((noinline)) static void call(const void* work, int part) {
        (*static_cast<const Work*>(work))(part);
    }

    bool claim_and_do() {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        do {
            if (uint32_t(ticket) >= ticket >> 32) return false;
        } while (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel));
        // This work cannot end before this part is done, so that call_ and context_ are its own.
        call_(context_, int(uint32_t(ticket)));
        done_.fetch_add(1, std::memory_order_acq_rel);
        return true;
    }

    void work_until_stopped() {
        while (!stop_.load(std::memory_order_relaxed)) {
            const uint32_t epoch = epoch_.load();
            bool worked = false;
            for (int spins = 0; spins < kSpins + patience_ && !worked; ++spins) {
                worked = claim_and_do();
                if (spins < kSpins)
                    INKLING_PAUSE();
                else
                    std::this_thread::yield();
            }
            if (!worked) {
                sleeping_.fetch_add(1);
                if (!stop_.load()) epoch_.wait(epoch);
                sleeping_.fetch_sub(1);
            }
        }
    }

    const int patience_;
    std::vector<std::thread> workers_;
    void (*call_)(const void*, int) = nullptr;
    const void* context_ = nullptr;
    alignas(64) std::atomic<uint64_t> ticket_{0};
    alignas(64) std::atomic<int> done_{0};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};
};

}  // namespace INKLING_ISA
