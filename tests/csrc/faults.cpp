// Small kernels, each in a correct form and with one fault planted; run on a CPU by csrc/cpu_cuda.h.
//
// Prints "right" if all results are; ends with status 1 and what is wrong otherwise.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cpu_cuda.h"

namespace {

constexpr unsigned kThreads = 64, kBlocks = 4, kSeeds = 4;
constexpr unsigned kSize = kThreads * kBlocks;

struct alignas(16) Four {
  float values[4];
};

template <bool kFault>
__global__ void reverse_block(float* result) {
  float* const parts = cpu_cuda::shared<float>(kThreads);
  parts[threadIdx.x] = threadIdx.x;
  if (!kFault) __syncthreads();
  result[blockIdx.x * kThreads + threadIdx.x] = parts[kThreads - 1 - threadIdx.x];
}

template <bool kFault>
__global__ void name_block(float* result) {
  result[kFault ? threadIdx.x : blockIdx.x * kThreads + threadIdx.x] = blockIdx.x;
}

template <bool kFault>
__global__ void count_threads(float* result) {
  if (kFault) {
    *result += 1;
  } else {
    atomicAdd(result, 1.0f);
  }
}

template <bool kFault>
__global__ void number_threads(float* result) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  result[i + kFault] = i;
}

template <bool kFault>
__global__ void number_shared(float* result) {
  float* const parts = cpu_cuda::shared<float>(kThreads);
  // A second array, so that there is memory behind the first one.
  float* const others = cpu_cuda::shared<float>(kThreads);
  parts[threadIdx.x + kFault] = others[threadIdx.x] = threadIdx.x;
  result[blockIdx.x * kThreads + threadIdx.x] = parts[threadIdx.x + kFault];
}

template <bool kFault>
__global__ void copy_four(const float* source, float* result) {
  const unsigned i = 4 * (blockIdx.x * kThreads + threadIdx.x);
  const Four four = *reinterpret_cast<const Four*>(source + i + kFault);
  std::memcpy(result + i, &four, sizeof four);
}

template <bool kFault>
__global__ void some_wait(float* result) {
  if (!kFault || threadIdx.x < 32) __syncthreads();
  result[blockIdx.x * kThreads + threadIdx.x] = 1;
}

template <bool kFault>
__global__ void wait_apart(float* result) {
  if (!kFault || threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  result[blockIdx.x * kThreads + threadIdx.x] = 1;
}

template <bool kFault>
__global__ void swap_lanes(float* result) {
  const float lane = threadIdx.x % 32;
  float other = -1;
  if (!kFault || lane < 16) other = __shfl_xor_sync(0xffffffffu, lane, 1);
  result[blockIdx.x * kThreads + threadIdx.x] = other;
}

using Expected = std::function<float(unsigned)>;

// Whether the kernel gives what is expected, in memory of exactly the right size.
template <typename Kernel>
bool right(Kernel kernel, unsigned size, const Expected& expected) {
  std::vector<float> result(size);
  float* const pointer = result.data();
  cpu_cuda::launch(dim3(kBlocks), kThreads, nullptr, [=] { kernel(pointer); });
  for (unsigned i = 0; i < size; ++i) {
    if (result[i] != expected(i)) return false;
  }
  return true;
}

template <bool kFault>
bool copy_is_right() {
  std::vector<float> source(4 * kSize + 4);
  for (unsigned i = 0; i < source.size(); ++i) source[i] = i;
  const float* const pointer = source.data();
  auto kernel = [=](float* result) { copy_four<kFault>(pointer, result); };
  return right(kernel, 4 * kSize, [](unsigned i) { return i + kFault; });
}

template <bool kFault>
std::map<std::string, std::function<bool()>> runs() {
  auto thread = [](unsigned i) { return i % kThreads; };
  auto one = [](unsigned) { return 1; };
  return {
      {"missing barrier",
       [=] {
         return right(reverse_block<kFault>, kSize,
                      [](unsigned i) { return kThreads - 1 - i % kThreads; });
       }},
      {"race between blocks",
       [] {
         // What the last block leaves, were they run in turn.
         return right(name_block<kFault>, kFault ? kThreads : kSize,
                      [](unsigned i) { return kFault ? kBlocks - 1 : i / kThreads; });
       }},
      {"sum without atomics",
       [] { return right(count_threads<kFault>, 1, [](unsigned) { return kSize; }); }},
      {"out of bounds",
       [] { return right(number_threads<kFault>, kSize, [](unsigned i) { return i; }); }},
      {"out of bounds in shared memory",
       [=] { return right(number_shared<kFault>, kSize, thread); }},
      {"misaligned access", copy_is_right<kFault>},
      {"divergent barrier", [=] { return right(some_wait<kFault>, kSize, one); }},
      {"two barriers", [=] { return right(wait_apart<kFault>, kSize, one); }},
      {"divergent shuffle",
       [] {
         return right(swap_lanes<kFault>, kSize,
                      [](unsigned i) { return (i % 32) ^ 1u; });
       }},
  };
}

}  // namespace

// Arguments: name of a run, and "correct" or "faulty".
int main(int, char** arguments) {
  const bool faulty = std::string(arguments[2]) == "faulty";
  const auto run = (faulty ? runs<true>() : runs<false>()).at(arguments[1]);
  try {
    for (unsigned seed = 0; seed < kSeeds; ++seed) {
      cpu_cuda::state().random.seed(seed);
      if (!run()) {
        std::puts("wrong values");
        return 1;
      }
    }
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  std::puts("right");
  return 0;
}
