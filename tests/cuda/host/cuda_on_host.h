// Runs CUDA C++ on a CPU, for tests: blocks one after another, each CUDA thread a fiber (or, with LANES_ARE_THREADS, a
// thread of the system, so that ThreadSanitizer sees races between lanes).
//
// Fibers switch at barriers and warp exchanges only, in an order drawn from a seed, so a missing barrier changes
// the answer. A barrier that some thread never reaches, where a GPU would hang, ends the process with a message.
// Shared memory holds noise when a block starts, as on a GPU.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <utility>
#include <vector>
#ifdef LANES_ARE_THREADS
#include <barrier>
#include <memory>
#include <thread>
#else
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ __attribute__((section("shared_memory"))) static

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct Index {
    unsigned x;
};

extern "C" char __start_shared_memory[], __stop_shared_memory[];

namespace on_host {

inline Index grid, block;
inline std::mt19937 noise;

// A GPU may be told to take subnormal numbers for zero (-ftz=true): those of float32. Tests tell it to, and must find
// wrong figures. An x86 processor then flushes float64 too. Fibers and new threads inherit the setting.
static bool flush_to_zero = false; // of this library: an inline one would be that of all
class FloatMode {
#ifdef __SSE__
    const unsigned before = __builtin_ia32_stmxcsr();

public:
    FloatMode() { __builtin_ia32_ldmxcsr(flush_to_zero ? before | 0x8040 : before); }
    ~FloatMode() { __builtin_ia32_ldmxcsr(before); }
#endif
};

// Where the threads of a warp, or of a block, wait for each other.
struct Meeting {
    unsigned members = 0, arrived = 0, round = 0;
    int line = 0;
    uint64_t offered[32] = {};
};
inline std::vector<Meeting> warps;
inline Meeting whole_block;

[[noreturn]] inline void die(const char* why) {
    fprintf(stderr, "cuda_on_host: block %u: %s\n", block.x, why);
    abort();
}

#ifdef LANES_ARE_THREADS

inline thread_local Index lane;
inline std::vector<std::unique_ptr<std::barrier<>>> barriers; // one for each warp, then that of the block

inline void meet(Meeting& m, int) {
    (&m == &whole_block ? barriers.back() : barriers[&m - warps.data()])->arrive_and_wait();
}

inline void run_block(unsigned threads, const std::function<void()>& body) {
    barriers.clear();
    for (unsigned w = 0; w < warps.size(); ++w) barriers.push_back(std::make_unique<std::barrier<>>(warps[w].members));
    barriers.push_back(std::make_unique<std::barrier<>>(threads));
    std::vector<std::thread> running;
    for (unsigned t = 0; t < threads; ++t)
        running.emplace_back([t, &body] {
            lane.x = t;
            body();
            barriers[t / 32]->arrive_and_drop();
            barriers.back()->arrive_and_drop();
        });
    for (auto& thread : running) thread.join();
}

#else

struct Fiber {
    ucontext_t context;
    bool done;
    std::vector<char> stack = std::vector<char>(64 << 10);
};
inline Index lane;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline bool progress; // since the scheduler last asked
inline const std::function<void()>* body_of_block;

inline void open_if_complete(Meeting& m) {
    if (!m.members || m.arrived < m.members) return;
    m.arrived = 0;
    ++m.round;
    progress = true;
}

inline void meet(Meeting& m, int line) {
    if (m.arrived == 0) m.line = line;
    else if (m.line != line) die("threads meet at different barriers");
    const unsigned round = m.round, me = lane.x;
    ++m.arrived;
    open_if_complete(m);
    while (m.round == round) {
        swapcontext(&fibers[me].context, &scheduler);
        lane.x = me;
    }
}

inline void run_fiber() {
    (*body_of_block)();
    const unsigned me = lane.x;
    fibers[me].done = progress = true;
    for (Meeting* m : {&warps[me / 32], &whole_block}) {
        --m->members;
        open_if_complete(*m);
    }
    swapcontext(&fibers[me].context, &scheduler);
}

// Each warp runs as far as it can before the next one starts.
inline void run_block(unsigned threads, const std::function<void()>& body) {
    body_of_block = &body;
    if (fibers.size() < threads) fibers.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        fiber.done = false;
        makecontext(&fiber.context, run_fiber, 0);
    }
    std::vector<unsigned> warp_order(warps.size()), lane_order(32);
    for (unsigned w = 0; w < warp_order.size(); ++w) warp_order[w] = w;
    for (unsigned i = 0; i < 32; ++i) lane_order[i] = i;
    for (bool alive = true, moved; alive;) {
        alive = moved = false;
        std::shuffle(warp_order.begin(), warp_order.end(), noise);
        for (unsigned w : warp_order) do {
                progress = false;
                std::shuffle(lane_order.begin(), lane_order.end(), noise);
                for (unsigned i : lane_order) {
                    const unsigned t = w * 32 + i;
                    if (t >= threads || fibers[t].done) continue;
                    alive = true;
                    lane.x = t;
                    swapcontext(&scheduler, &fibers[t].context);
                }
                moved |= progress;
            } while (progress);
        if (alive && !moved) die("a barrier that not every thread reaches");
    }
}

#endif

inline void launch(unsigned blocks, unsigned threads, unsigned seed, const std::function<void()>& body) {
    [[maybe_unused]] const FloatMode mode{};
    noise.seed(seed);
    grid.x = blocks;
    for (block.x = 0; block.x < blocks; ++block.x) {
        std::generate(__start_shared_memory, __stop_shared_memory, [] { return (char)noise(); });
        warps.assign((threads + 31) / 32, Meeting());
        for (unsigned t = 0; t < threads; ++t) ++warps[t / 32].members;
        whole_block = Meeting();
        whole_block.members = threads;
        run_block(threads, body);
    }
}

// Arguments come as CUDA's own launch takes them: an array of addresses.
template <class... Arguments, size_t... I>
void launch(void (*kernel)(Arguments...), unsigned blocks, unsigned threads, unsigned seed, void** arguments,
            std::index_sequence<I...>) {
    launch(blocks, threads, seed, [&] { kernel(*(Arguments*)arguments[I]...); });
}
template <class... Arguments>
void launch(void (*kernel)(Arguments...), unsigned blocks, unsigned threads, unsigned seed, void** arguments) {
    launch(kernel, blocks, threads, seed, arguments, std::index_sequence_for<Arguments...>());
}

// Every lane of a warp offers a value and takes that of lane `from`; its own if there is no such lane.
template <class T> T exchange(T offered, unsigned from) {
    Meeting& warp = warps[lane.x / 32];
    const unsigned me = lane.x % 32;
    memcpy(&warp.offered[me], &offered, sizeof offered);
    meet(warp, 0);
    T taken;
    memcpy(&taken, &warp.offered[from < 32 ? from : me], sizeof taken);
    meet(warp, 0);
    return taken;
}

template <class To, class From> To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    memcpy(&result, &x, sizeof result);
    return result;
}

} // namespace on_host

#define threadIdx on_host::lane
#define blockIdx on_host::block
#define gridDim on_host::grid
#define __syncthreads() on_host::meet(on_host::whole_block, __LINE__)

template <class T> T __shfl_down_sync(unsigned, T x, unsigned step) {
    return on_host::exchange(x, threadIdx.x % 32 + step);
}
template <class T> T __shfl_up_sync(unsigned, T x, unsigned step) {
    return on_host::exchange(x, threadIdx.x % 32 - step); // wraps to no lane
}
template <class T> T atomicAdd(T* at, T x) { return __atomic_fetch_add(at, x, __ATOMIC_RELAXED); }
template <class T> T atomicMax(T* at, T x) {
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (old < x && !__atomic_compare_exchange_n(at, &old, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline float __uint_as_float(unsigned x) { return on_host::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return on_host::bits_as<unsigned>(x); }
inline double __longlong_as_double(long long x) { return on_host::bits_as<double>(x); }
inline long long __double_as_longlong(double x) { return on_host::bits_as<long long>(x); }
inline double __dmul_rn(double a, double b) { return a * b; } // build with -ffp-contract=off
using std::fabs;
using std::fmax;
