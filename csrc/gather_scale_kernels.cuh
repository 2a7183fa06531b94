// The CUDA kernels of gather-scale and their launches, without PyTorch: what is compiled for a GPU
// here also runs on a CPU through cpu_cuda.h, unchanged, for tests.
//
// All are bound by memory: 16-byte accesses where shapes and addresses allow (V elements a thread),
// one element otherwise. Sums take no atomics: tiles leave partial sums, added in a fixed order.
#pragma once

#include <cassert>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define SHORN_SHARED(type, name, count) __shared__ type name[count]
#define SHORN_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#else
#include "cpu_cuda.h"
#define SHORN_SHARED(type, name, count) type* const name = cpu_cuda::shared<type>(count)
#define SHORN_LAUNCH(kernel, grid, threads, stream, ...) \
  cpu_cuda::launch(grid, threads, stream, [&] { kernel(__VA_ARGS__); })
#endif

#include "gather_scale.h"

namespace shorn {
namespace gpu {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kForwardRows = 8;    // rows of a tile of the result
constexpr int kBackwardRows = 32;  // rows of a tile of the weight
constexpr int kGroup = 8;          // rows whose sums a warp reduces together

// Null stands for all rows or columns, and for scales of one.
template <typename T>
struct Forward {
  const T* weight;
  std::int64_t stride;
  const std::int64_t* rows;
  const std::int64_t* columns;
  const Wide<T>* row_scale;
  const Wide<T>* column_scale;
  T* result;
  int out, in, n, m;
};

// Gradients that are not wanted are null. `row_place` [out] and `column_place` [in] hold the place
// of each row and column in the selection, -1 outside; null for all.
template <typename T, typename G>
struct Backward {
  const G* gradient;
  const T* weight;
  std::int64_t stride;
  const int* row_place;
  const int* column_place;
  const Wide<T>* row_scale;
  const Wide<T>* column_scale;
  T* d_weight;
  Wide<T>* row_sums;     // [column_tiles(in), out]
  Wide<T>* column_sums;  // [row_tiles(out), in]
  int out, in, m;
};

inline int ceil_divide(int a, int b) { return (a + b - 1) / b; }
inline int row_tiles(int out) { return ceil_divide(out, kBackwardRows); }

template <typename T>
constexpr int kVector = 16 / sizeof(T);

// Tiles of the narrowest kind, which is the largest number there can be.
inline int column_tiles(int in) { return ceil_divide(in, kThreads); }

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T values[V];
};

// V consecutive elements, in accesses of at most 16 bytes.
template <int V, typename T>
SHORN_HOST_DEVICE void load(const T* source, T (&target)[V]) {
  constexpr int width = V < kVector<T> ? V : kVector<T>;
#pragma unroll
  for (int start = 0; start < V; start += width) {
    const auto pack = *reinterpret_cast<const Pack<T, width>*>(source + start);
#pragma unroll
    for (int v = 0; v < width; ++v) target[start + v] = pack.values[v];
  }
}

template <int V, typename T>
SHORN_HOST_DEVICE void store(T* target, const T (&source)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.values[v] = source[v];
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

// A thread computes V columns of kForwardRows rows, whose loads are all issued before its stores.
template <typename T, int V, bool kIndexed>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Forward<T> task) {
  const int column = (blockIdx.y * kThreads + threadIdx.x) * V;
  if (column >= task.m) return;
  int source[V];
  Wide<T> scale[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    source[v] = kIndexed ? static_cast<int>(task.columns[column + v]) : column + v;
    assert(source[v] >= 0 && source[v] < task.in);
    scale[v] = task.column_scale == nullptr ? Wide<T>(1) : task.column_scale[source[v]];
  }
  T values[kForwardRows][V];
  Wide<T> row_scale[kForwardRows];
  const int first = blockIdx.x * kForwardRows;
#pragma unroll
  for (int r = 0; r < kForwardRows; ++r) {
    if (first + r >= task.n) break;
    const std::int64_t row = task.rows == nullptr ? first + r : task.rows[first + r];
    assert(row >= 0 && row < task.out);
    row_scale[r] = task.row_scale == nullptr ? Wide<T>(1) : task.row_scale[row];
    const T* weight = task.weight + row * task.stride;
    if (kIndexed) {
#pragma unroll
      for (int v = 0; v < V; ++v) values[r][v] = weight[source[v]];
    } else {
      load(weight + column, values[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kForwardRows; ++r) {
    if (first + r >= task.n) break;
#pragma unroll
    for (int v = 0; v < V; ++v) values[r][v] = scaled<T>(values[r][v], row_scale[r], scale[v]);
    store(task.result + static_cast<std::int64_t>(first + r) * task.m + column, values[r]);
  }
}

// Sums of kGroup values over the lanes of a warp: lane l returns that of value l / 4. Every step
// halves the values a lane holds, so that 9 exchanges do for 8 sums.
template <typename W>
SHORN_HOST_DEVICE W reduce_group(W (&values)[kGroup], int lane) {
#pragma unroll
  for (int half = kGroup / 2; half > 0; half /= 2) {
    const int distance = half * 4;
    const bool upper = (lane & distance) != 0;
#pragma unroll
    for (int r = 0; r < half; ++r) {
      const W sent = upper ? values[r] : values[r + half];
      const W kept = upper ? values[r + half] : values[r];
      values[r] = kept + __shfl_xor_sync(0xffffffffu, sent, distance);
    }
  }
  const W pair = values[0] + __shfl_xor_sync(0xffffffffu, values[0], 2);
  return pair + __shfl_xor_sync(0xffffffffu, pair, 1);
}

// One row of a thread's V columns: writes d_weight, zero outside the selection, adds to the column
// sums and returns the thread's part of the row's sum.
template <typename T, typename G, int V, bool kIndexed>
SHORN_HOST_DEVICE Wide<T> backward_row(const Backward<T, G>& task, int row, int column,
                                       const int (&place)[V], const Wide<T> (&scale)[V],
                                       Wide<T> (&sums)[V]) {
  T d_weight[V];
#pragma unroll
  for (int v = 0; v < V; ++v) d_weight[v] = narrow<T>(0);
  Wide<T> total = 0;
  const int i = task.row_place == nullptr ? row : task.row_place[row];
  if (i >= 0) {
    G gradient[V];
    T weight[V];
    const G* source = task.gradient + static_cast<std::int64_t>(i) * task.m;
    if (kIndexed) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (place[v] >= 0) gradient[v] = source[place[v]];
      }
    } else {
      load(source + column, gradient);
    }
    const bool reduce = task.row_sums != nullptr || task.column_sums != nullptr;
    if (reduce) load(task.weight + row * task.stride + column, weight);
    const Wide<T> row_scale = task.row_scale == nullptr ? Wide<T>(1) : task.row_scale[row];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (kIndexed && place[v] < 0) continue;
      d_weight[v] = scaled<T>(gradient[v], row_scale, scale[v]);
      if (reduce) {
        const Wide<T> product = static_cast<Wide<T>>(widen(gradient[v])) * widen(weight[v]);
        total += product * scale[v];
        sums[v] += product * row_scale;
      }
    }
  }
  if (task.d_weight != nullptr) {
    store(task.d_weight + static_cast<std::int64_t>(row) * task.in + column, d_weight);
  }
  return total;
}

template <typename T, typename G, int V, bool kIndexed>
__global__ void __launch_bounds__(kThreads) backward_kernel(const Backward<T, G> task) {
  SHORN_SHARED(Wide<T>, parts, kWarps * kBackwardRows);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = (blockIdx.y * kThreads + threadIdx.x) * V;
  const int first = blockIdx.x * kBackwardRows;
  const bool inside = column < task.in;
  int place[V];
  Wide<T> scale[V], sums[V];
#pragma unroll
  for (int v = 0; v < V; ++v) {
    place[v] = kIndexed && inside ? task.column_place[column + v] : column + v;
    scale[v] = task.column_scale != nullptr && inside ? task.column_scale[column + v] : Wide<T>(1);
    sums[v] = 0;
  }
  for (int group = 0; group < kBackwardRows; group += kGroup) {
    Wide<T> totals[kGroup];
#pragma unroll
    for (int r = 0; r < kGroup; ++r) {
      const int row = first + group + r;
      totals[r] = 0;
      if (inside && row < task.out) {
        totals[r] = backward_row<T, G, V, kIndexed>(task, row, column, place, scale, sums);
      }
    }
    if (task.row_sums != nullptr) {
      const Wide<T> total = reduce_group(totals, lane);
      if (lane % 4 == 0) parts[warp * kBackwardRows + group + lane / 4] = total;
    }
  }
  if (task.column_sums != nullptr && inside) {
    const std::int64_t tile = blockIdx.x;
#pragma unroll
    for (int v = 0; v < V; ++v) task.column_sums[tile * task.in + column + v] = sums[v];
  }
  if (task.row_sums == nullptr) return;
  __syncthreads();
  const int row = first + threadIdx.x;
  if (threadIdx.x < kBackwardRows && row < task.out) {
    Wide<T> total = 0;
    for (int w = 0; w < kWarps; ++w) total += parts[w * kBackwardRows + threadIdx.x];
    task.row_sums[static_cast<std::int64_t>(blockIdx.y) * task.out + row] = total;
  }
}

// result[i] = sum over tiles of parts[tile, i].
template <typename W>
__global__ void add_parts_kernel(const W* parts, int tiles, int size, W* result) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= size) return;
  double total = 0;
#pragma unroll 8
  for (int tile = 0; tile < tiles; ++tile) {
    total += parts[static_cast<std::int64_t>(tile) * size + i];
  }
  result[i] = static_cast<W>(total);
}

static __global__ void fill_kernel(int* place, int size) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < size) place[i] = -1;
}

static __global__ void place_kernel(const std::int64_t* index, int count, int size, int* place) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  const std::int64_t unit = index[i];
  assert(unit >= 0 && unit < size);
  place[unit] = i;
}

// place[index[i]] = i, and -1 elsewhere.
inline void invert(const std::int64_t* index, int count, int size, int* place,
                   cudaStream_t stream) {
  if (size > 0) {
    SHORN_LAUNCH(fill_kernel, dim3(ceil_divide(size, kThreads)), kThreads, stream, place, size);
  }
  if (count > 0) {
    SHORN_LAUNCH(place_kernel, dim3(ceil_divide(count, kThreads)), kThreads, stream, index, count,
                 size, place);
  }
}

template <typename T>
bool aligned(const T* pointer) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0;
}

template <typename T>
void forward(const Forward<T>& task, cudaStream_t stream) {
  if (task.n == 0 || task.m == 0) return;
  constexpr int wide = kVector<T>;
  const bool indexed = task.columns != nullptr;
  // Gathered elements are loaded one by one: only their stores have to be aligned.
  const bool loads = indexed || (aligned(task.weight) && task.stride % wide == 0);
  const bool vector = loads && task.m % wide == 0 && aligned(task.result);
  auto* kernel =
      vector ? (indexed ? &forward_kernel<T, wide, true> : &forward_kernel<T, wide, false>)
             : (indexed ? &forward_kernel<T, 1, true> : &forward_kernel<T, 1, false>);
  const int columns = ceil_divide(task.m, kThreads * (vector ? wide : 1));
  SHORN_LAUNCH(kernel, dim3(ceil_divide(task.n, kForwardRows), columns), kThreads, stream, task);
}

// d_row_scale [out] and d_column_scale [in] are written where the task has room for their parts.
template <typename T, typename G>
void backward(const Backward<T, G>& task, Wide<T>* d_row_scale, Wide<T>* d_column_scale,
              cudaStream_t stream) {
  constexpr int wide = kVector<T>;
  const bool indexed = task.column_place != nullptr;
  const bool vector = task.in % wide == 0 && task.stride % wide == 0 && aligned(task.weight) &&
                      aligned(task.d_weight) && (indexed || aligned(task.gradient));
  auto* kernel =
      vector ? (indexed ? &backward_kernel<T, G, wide, true> : &backward_kernel<T, G, wide, false>)
             : (indexed ? &backward_kernel<T, G, 1, true> : &backward_kernel<T, G, 1, false>);
  const int rows = row_tiles(task.out);
  const int columns = ceil_divide(task.in, kThreads * (vector ? wide : 1));
  if (rows > 0 && columns > 0) {
    SHORN_LAUNCH(kernel, dim3(rows, columns), kThreads, stream, task);
  }
  auto* add = &add_parts_kernel<Wide<T>>;
  if (task.row_sums != nullptr && task.out > 0) {
    SHORN_LAUNCH(add, dim3(ceil_divide(task.out, kThreads)), kThreads, stream, task.row_sums,
                 columns, task.out, d_row_scale);
  }
  if (task.column_sums != nullptr && task.in > 0) {
    SHORN_LAUNCH(add, dim3(ceil_divide(task.in, kThreads)), kThreads, stream, task.column_sums,
                 rows, task.in, d_column_scale);
  }
}

}  // namespace gpu
}  // namespace shorn
