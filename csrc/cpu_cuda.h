// Runs CUDA kernels on a CPU, for tests: one fiber for each thread of a block, one block at a time.
//
// Enough of CUDA for kernels of 1-D blocks that use shared memory, __syncthreads, full-warp shuffles
// and atomicAdd. Blocks run in random order, as do the threads between barriers; shared memory holds
// NaN at first. Barriers that some threads miss, and shuffles outside a full warp, are errors.
//
// AddressSanitizer sees every shared array as an allocation of its own. ThreadSanitizer sees every
// CUDA thread as a thread, ordered with others by __syncthreads and by the ends of launches only:
// it reports races within and between blocks even where the order of execution hides them.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __launch_bounds__(threads)
#define __syncthreads() cpu_cuda::block_barrier(__LINE__)
#define __shfl_xor_sync cpu_cuda::shuffle_xor

#ifdef __SANITIZE_THREAD__
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

struct dim3 {
  explicit dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
  unsigned x, y;
};
using cudaStream_t = void*;

inline dim3 threadIdx, blockIdx;

namespace cpu_cuda {

constexpr unsigned kLanes = 32;
constexpr std::size_t kStack = 1 << 17;
constexpr std::size_t kShared = 48 << 10;

// What ThreadSanitizer is told; nothing without it.
namespace tsan {
#ifdef __SANITIZE_THREAD__
constexpr bool kOn = true;
inline void* current() { return __tsan_get_current_fiber(); }
inline void* create() { return __tsan_create_fiber(0); }
inline void destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
// 1: the switch itself orders nothing.
inline void switch_to(void* fiber) { __tsan_switch_to_fiber(fiber, 1); }
inline void acquire(void* address) { __tsan_acquire(address); }
inline void release(void* address) { __tsan_release(address); }

// Hides the shim's own accesses, which all fibers make without order.
struct Quiet {
  Quiet() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Quiet() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
constexpr bool kOn = false;
inline void* current() { return nullptr; }
inline void* create() { return nullptr; }
inline void destroy(void*) {}
inline void switch_to(void*) {}
inline void acquire(void*) {}
inline void release(void*) {}

struct Quiet {
  Quiet() {}
};
#endif
}  // namespace tsan

struct Barrier {
  unsigned arrived = 0, passed = 0;
  int line = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::size_t shared_arrays;
  unsigned shuffles;
  bool done;
  void* sanitizer = nullptr;
};

struct Warp {
  Barrier barrier;
  alignas(16) char values[2][kLanes][16];
};

struct State {
  std::mt19937 random{0};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  char ordered[2];  // addresses that stand for every other barrier of a block
  char started, ended;  // and for the ends of a launch
  std::vector<std::unique_ptr<char[]>> shared;
  std::size_t shared_bytes = 0;
  ucontext_t scheduler;
  void* scheduler_sanitizer = nullptr;
  const std::function<void()>* body = nullptr;
  unsigned current = 0, threads = 0;
  bool progress = false;
  std::string failure;
};

inline State& state() {
  static State instance;
  return instance;
}

inline void leave() {
  State& s = state();
  Fiber& fiber = s.fibers[s.current];
  tsan::switch_to(s.scheduler_sanitizer);
  swapcontext(&fiber.context, &s.scheduler);
}

// Ends the launch: the scheduler throws, and this fiber is never resumed.
inline void fail(const std::string& message) {
  state().failure = message;
  leave();
}

inline void wait(Barrier& barrier, unsigned size, int line) {
  if (barrier.arrived != 0 && barrier.line != line) {
    fail("threads wait at different barriers, lines " + std::to_string(barrier.line) + " and " +
         std::to_string(line));
  }
  barrier.line = line;
  const unsigned passed = barrier.passed;
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.passed;
    state().progress = true;
  }
  while (barrier.passed == passed) leave();
}

inline void block_barrier(int line) {
  State& s = state();
  char* ordered;
  {
    tsan::Quiet quiet;
    ordered = &s.ordered[s.barrier.passed % 2];
  }
  tsan::release(ordered);
  {
    tsan::Quiet quiet;
    wait(s.barrier, s.threads, line);
  }
  tsan::acquire(ordered);
}

template <typename T>
T shuffle_xor(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) <= 16);
  tsan::Quiet quiet;
  if (mask != 0xffffffffu) fail("only shuffles of a full warp are supported");
  State& s = state();
  const unsigned lane = s.current % kLanes;
  Warp& warp = s.warps[s.current / kLanes];
  // Two sets of slots: the other one may still be read by lanes that have not gone on.
  auto& slots = warp.values[s.fibers[s.current].shuffles++ % 2];
  std::memcpy(slots[lane], &value, sizeof(T));
  wait(warp.barrier, kLanes, -1);
  std::memcpy(&value, slots[lane ^ static_cast<unsigned>(distance)], sizeof(T));
  return value;
}

// The same memory for all threads of a block that ask in the same order.
template <typename T>
T* shared(std::size_t count) {
  tsan::Quiet quiet;
  State& s = state();
  const std::size_t place = s.fibers[s.current].shared_arrays++;
  if (place == s.shared.size()) {
    const std::size_t bytes = count * sizeof(T);
    s.shared_bytes += (bytes + 15) / 16 * 16;
    if (s.shared_bytes > kShared) fail("more shared memory than a block has");
    s.shared.emplace_back(new char[bytes]);
    std::memset(s.shared.back().get(), 0xff, bytes);
  }
  return reinterpret_cast<T*>(s.shared[place].get());
}

inline void run_fiber() {
  State& s = state();
  tsan::acquire(&s.started);
  (*s.body)();
  tsan::release(&s.ended);
  {
    tsan::Quiet quiet;
    s.fibers[s.current].done = s.progress = true;
  }
  leave();
}

inline void start_fiber(Fiber& fiber) {
  // Memory that another fiber had as its stack would look like a race; new memory does not.
  if (!fiber.stack || tsan::kOn) fiber.stack.reset(new char[kStack]);
  if (fiber.sanitizer != nullptr) tsan::destroy(fiber.sanitizer);
  fiber.sanitizer = tsan::create();
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  fiber.shared_arrays = fiber.shuffles = 0;
  fiber.done = false;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void run_block() {
  State& s = state();
  s.shared.clear();
  s.shared_bytes = 0;
  s.barrier = Barrier();
  s.warps.assign((s.threads + kLanes - 1) / kLanes, Warp());
  if (s.fibers.size() < s.threads) s.fibers.resize(s.threads);
  std::vector<unsigned> order(s.threads);
  std::iota(order.begin(), order.end(), 0u);
  for (unsigned thread : order) start_fiber(s.fibers[thread]);
  while (!order.empty()) {
    std::shuffle(order.begin(), order.end(), s.random);
    s.progress = false;
    for (unsigned thread : order) {
      s.current = thread;
      threadIdx = dim3(thread, 0);
      tsan::switch_to(s.fibers[thread].sanitizer);
      swapcontext(&s.scheduler, &s.fibers[thread].context);
      if (!s.failure.empty()) throw std::runtime_error(std::exchange(s.failure, ""));
    }
    if (!s.progress) throw std::runtime_error("deadlock: a barrier that some threads never reach");
    auto done = [&](unsigned thread) { return s.fibers[thread].done; };
    order.erase(std::remove_if(order.begin(), order.end(), done), order.end());
  }
}

inline void run_grid(dim3 grid, unsigned threads, const std::function<void()>& body) {
  State& s = state();
  s.body = &body;
  s.threads = threads;
  s.scheduler_sanitizer = tsan::current();
  std::vector<unsigned> blocks(grid.x * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), s.random);
  for (unsigned block : blocks) {
    blockIdx = dim3(block % grid.x, block / grid.x);
    run_block();
  }
}

inline void launch(dim3 grid, unsigned threads, cudaStream_t, const std::function<void()>& body) {
  State& s = state();
  tsan::release(&s.started);
  {
    tsan::Quiet quiet;
    run_grid(grid, threads, body);
  }
  tsan::acquire(&s.ended);
}

}  // namespace cpu_cuda

template <typename T>
T atomicAdd(T* address, T value) {
  T seen, sum;
  __atomic_load(address, &seen, __ATOMIC_RELAXED);
  do {
    sum = seen + value;
  } while (!__atomic_compare_exchange(address, &seen, &sum, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return seen;
}
