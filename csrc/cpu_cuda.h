// Runs CUDA kernels on a CPU, for tests: one fiber for each thread of a block, one block at a time.
//
// Enough of CUDA for kernels of 1-D blocks that use shared memory, __syncthreads and full-warp
// shuffles. Blocks run in random order, as do the threads between barriers; shared memory holds NaN
// at first. Barriers that some threads miss, and shuffles outside a full warp, are errors.
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

struct Barrier {
  unsigned arrived = 0, passed = 0;
  int line = 0;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::size_t shared_used;
  unsigned shuffles;
  bool done;
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
  alignas(16) char shared[kShared];
  ucontext_t scheduler;
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
  swapcontext(&s.fibers[s.current].context, &s.scheduler);
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

inline void block_barrier(int line) { wait(state().barrier, state().threads, line); }

template <typename T>
T shuffle_xor(unsigned mask, T value, int distance) {
  static_assert(sizeof(T) <= 16);
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
  State& s = state();
  std::size_t& used = s.fibers[s.current].shared_used;
  used = (used + 15) / 16 * 16;
  T* memory = reinterpret_cast<T*>(s.shared + used);
  used += count * sizeof(T);
  if (used > kShared) fail("more shared memory than a block has");
  return memory;
}

inline void run_fiber() {
  State& s = state();
  (*s.body)();
  s.fibers[s.current].done = s.progress = true;
  leave();
}

inline void start_fiber(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  fiber.shared_used = fiber.shuffles = 0;
  fiber.done = false;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void run_block() {
  State& s = state();
  std::memset(s.shared, 0xff, kShared);
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
      swapcontext(&s.scheduler, &s.fibers[thread].context);
      if (!s.failure.empty()) throw std::runtime_error(std::exchange(s.failure, ""));
    }
    if (!s.progress) throw std::runtime_error("deadlock: a barrier that some threads never reach");
    auto done = [&](unsigned thread) { return s.fibers[thread].done; };
    order.erase(std::remove_if(order.begin(), order.end(), done), order.end());
  }
}

inline void launch(dim3 grid, unsigned threads, cudaStream_t, const std::function<void()>& body) {
  State& s = state();
  s.body = &body;
  s.threads = threads;
  std::vector<unsigned> blocks(grid.x * grid.y);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), s.random);
  for (unsigned block : blocks) {
    blockIdx = dim3(block % grid.x, block / grid.x);
    run_block();
  }
}

}  // namespace cpu_cuda
