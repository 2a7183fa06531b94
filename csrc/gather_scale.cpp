// gather-scale on a CPU, registered for the schemas that trainer/kernels/gather_scale.py defines.
//
// Threads come from PyTorch and take rows. Results do not depend on how many there are: sums over
// rows are formed in blocks of kBlockRows, which are then added in order.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <vector>

#include "gather_scale_torch.h"

// One build serves every x86-64 processor: the loops are compiled for three instruction sets.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SHORN_X86 1
#include <immintrin.h>
#else
#define SHORN_X86 0
#endif

namespace shorn {
namespace {

constexpr std::int64_t kBlockRows = 32;
constexpr std::int64_t kMinimumRun = 16;
constexpr std::int64_t kGrain = 1 << 14;  // elements worth a thread
// Of a gradient that goes past the cache: until a model uses it, others have filled the cache.
constexpr std::int64_t kStreamedBytes = 1 << 20;

struct Run {
  std::int64_t start, length, target;
};

// Which elements of a row are used, in the form that moves them fastest.
struct Selection {
  enum Kind { kAll, kVectors, kRuns, kIndexed };
  Kind kind = kAll;
  std::int64_t size = 0, count = 0;
  std::vector<std::int32_t> index;
  std::vector<Run> runs;  // kRuns: consecutive elements
  // kVectors: a bit for each of sixteen elements, and how many are selected before them.
  std::vector<std::uint16_t> masks;
  std::vector<std::int32_t> starts;

  std::int64_t source(std::int64_t position) const {
    return index.empty() ? position : index[position];
  }
};

// The selected rows, and for each row of the weight its place among them or -1.
struct Rows {
  std::int64_t size = 0, count = 0;
  std::vector<std::int32_t> index, inverse;

  std::int64_t source(std::int64_t position) const {
    return index.empty() ? position : index[position];
  }
  std::int64_t target(std::int64_t row) const { return inverse.empty() ? row : inverse[row]; }
};

template <typename T>
struct Scale {
  const Wide<T>* values = nullptr;
  std::int64_t stride = 0;

  Wide<T> operator()(std::int64_t position) const {
    return values == nullptr ? Wide<T>(1) : values[position * stride];
  }
};

template <typename T>
struct Forward {
  const T* weight;
  std::int64_t stride;
  Rows rows;
  Selection columns;
  Scale<T> row_scale;
  std::vector<Wide<T>> column_scale;
  T* result;
};

template <typename T, typename G>
struct Backward {
  const G* gradient;
  const T* weight;
  std::int64_t stride;
  Rows rows;
  Selection columns;
  Scale<T> row_scale;
  std::vector<Wide<T>> column_scale;
  bool streams;          // d_weight is written past the cache
  T* d_weight;           // this and the next two: null where not wanted
  Wide<T>* d_row_scale;
  Wide<T>* sums;         // [blocks, sums_width]: columns, all for kVectors, else the selected
  std::int64_t sums_width;
};

namespace baseline {
#define SHORN_AVX512 0
#include "gather_scale_rows.h"
}  // namespace baseline

#if SHORN_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "gather_scale_rows.h"
}  // namespace avx2
#pragma GCC pop_options

#undef SHORN_AVX512
#define SHORN_AVX512 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "gather_scale_avx512.h"
#include "gather_scale_rows.h"
}  // namespace avx512
#pragma GCC pop_options

// PyTorch's own variable limits what is used: ATEN_CPU_CAPABILITY=default, avx2 or avx512.
bool allowed(const char* level) {
  const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
  return limit == nullptr || std::strcmp(limit, level) == 0;
}

bool has_avx512() {
  static const bool found =
      allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl");
  return found;
}

bool has_avx2() {
  static const bool found = (allowed("avx2") || allowed("avx512")) &&
                            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
}

// Calls `function` of the best instruction set of this processor.
#define SHORN_BEST(function, ...)        \
  do {                                   \
    if (has_avx512()) {                  \
      avx512::function(__VA_ARGS__);     \
    } else if (has_avx2()) {             \
      avx2::function(__VA_ARGS__);       \
    } else {                             \
      baseline::function(__VA_ARGS__);   \
    }                                    \
  } while (false)
#else
bool has_avx512() { return false; }
#define SHORN_BEST(function, ...) baseline::function(__VA_ARGS__)
#endif

std::vector<std::int32_t> read_index(const OptionalTensor& tensor, std::int64_t size,
                                     const char* name) {
  if (!tensor) return {};
  const auto* values = data<std::int64_t>(*tensor);
  const std::int64_t count = tensor->size(0), stride = tensor->stride(0);
  std::vector<std::int32_t> index(count);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t value = values[i * stride];
    require(value >= 0 && value < size, name, " index ", value, " is out of range for ", size,
            " ", name, "s");
    index[i] = static_cast<std::int32_t>(value);
  }
  return index;
}

Rows read_rows(const OptionalTensor& tensor, std::int64_t size, bool invert) {
  Rows rows;
  rows.size = rows.count = size;
  if (!tensor) return rows;
  rows.index = read_index(tensor, size, "row");
  rows.count = tensor->size(0);
  if (invert) {
    rows.inverse.assign(size, -1);
    for (std::int64_t i = 0; i < rows.count; ++i) {
      rows.inverse[rows.index[i]] = static_cast<std::int32_t>(i);
    }
  }
  return rows;
}

// `vectors`: whether kVectors may be chosen.
Selection read_columns(const OptionalTensor& tensor, std::int64_t size, bool vectors) {
  Selection columns;
  columns.size = columns.count = size;
  if (!tensor) return columns;
  columns.index = read_index(tensor, size, "column");
  columns.count = tensor->size(0);
  columns.kind = Selection::kIndexed;
  const auto& index = columns.index;
  if (std::adjacent_find(index.begin(), index.end(), std::greater_equal<>()) != index.end()) {
    return columns;
  }
  if (vectors) {
    columns.kind = Selection::kVectors;
    columns.masks.assign((size + 15) / 16, 0);
    columns.starts.assign(columns.masks.size() + 1, 0);
    for (const std::int32_t column : index) {
      columns.masks[column / 16] |= 1 << (column % 16);
      ++columns.starts[column / 16 + 1];
    }
    std::partial_sum(columns.starts.begin(), columns.starts.end(), columns.starts.begin());
    return columns;
  }
  for (std::int64_t j = 0; j < columns.count; ++j) {
    if (j == 0 || index[j] != index[j - 1] + 1) columns.runs.push_back({index[j], 0, j});
    ++columns.runs.back().length;
  }
  const auto runs = static_cast<std::int64_t>(columns.runs.size());
  if (runs * kMinimumRun <= columns.count) columns.kind = Selection::kRuns;
  return columns;
}

template <typename T>
Scale<T> read_scale(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return {data<Wide<T>>(*tensor), tensor->stride(0)};
}

// The scales of the selected columns; for kVectors those of all columns, padded.
template <typename T>
std::vector<Wide<T>> scales(const Scale<T>& scale, const Selection& columns) {
  const bool all = columns.kind == Selection::kVectors;
  const std::int64_t count = all ? columns.size : columns.count;
  std::vector<Wide<T>> values(all ? columns.masks.size() * 16 : count);
  for (std::int64_t j = 0; j < count; ++j) {
    values[j] = scale(all ? j : columns.source(j));
  }
  return values;
}

template <typename T>
constexpr bool kMayUseVectors = !std::is_same_v<T, double>;

std::int64_t grain(std::int64_t elements) {
  return std::max<std::int64_t>(1, kGrain / std::max<std::int64_t>(1, elements));
}

Tensor gather_scale(Tensor weight, OptionalTensor rows, OptionalTensor row_scale,
                    OptionalTensor columns, OptionalTensor column_scale) {
  weight = check(weight, rows, row_scale, columns, column_scale);
  return dispatch(weight, [&](auto element) {
    using T = decltype(element);
    Forward<T> task;
    task.weight = data<T>(weight);
    task.stride = weight.stride(0);
    task.rows = read_rows(rows, weight.size(0), false);
    task.columns = read_columns(columns, weight.size(1), kMayUseVectors<T> && has_avx512());
    task.row_scale = read_scale<T>(row_scale);
    task.column_scale = scales(read_scale<T>(column_scale), task.columns);
    const std::int64_t n = task.rows.count, m = task.columns.count;
    Tensor result = torch::stable::new_empty(weight, {n, m});
    task.result = mutable_data<T>(result);
    torch::stable::parallel_for(0, n, grain(m), [&](std::int64_t begin, std::int64_t end) {
      SHORN_BEST(forward_rows, task, begin, end);
    });
    return result;
  });
}

// Adds the blocks' column sums [blocks, width] and puts them where their columns stand.
template <typename T>
void add_blocks(const Wide<T>* sums, std::int64_t blocks, std::int64_t width,
                const Selection& columns, Wide<T>* d_column_scale) {
  const bool all = columns.kind == Selection::kVectors;
  const std::int64_t count = all ? columns.size : columns.count;
  if (count < columns.size) std::fill_n(d_column_scale, columns.size, Wide<T>(0));
  torch::stable::parallel_for(0, count, grain(blocks), [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> totals(end - begin);
    for (std::int64_t block = 0; block < blocks; ++block) {
      const Wide<T>* part = sums + block * width + begin;
      for (std::int64_t j = 0; j < end - begin; ++j) {
        totals[j] += part[j];
      }
    }
    for (std::int64_t j = begin; j < end; ++j) {
      d_column_scale[all ? j : columns.source(j)] = static_cast<Wide<T>>(totals[j - begin]);
    }
  });
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Fills the gradients of `task` that are wanted, with room for them already in place.
template <typename T, typename G>
void run_backward(Backward<T, G>& task, bool reduce, Wide<T>* d_column_scale) {
  const std::int64_t blocks = (task.rows.size + kBlockRows - 1) / kBlockRows;
  const std::int64_t elements = kBlockRows * task.columns.size;
  task.sums_width = static_cast<std::int64_t>(task.column_scale.size());
  // Every block fills its own part before it adds to it.
  std::unique_ptr<Wide<T>[]> sums(reduce ? new Wide<T>[blocks * task.sums_width] : nullptr);
  task.sums = sums.get();
  torch::stable::parallel_for(
      0, blocks, grain(elements), [&](std::int64_t begin, std::int64_t end) {
        SHORN_BEST(backward_blocks, task, begin, end);
      });
  if (d_column_scale != nullptr) {
    add_blocks<T>(task.sums, blocks, task.sums_width, task.columns, d_column_scale);
  }
}

Gradients gather_scale_backward(Tensor gradient, Tensor weight, OptionalTensor rows,
                                OptionalTensor row_scale, OptionalTensor columns,
                                OptionalTensor column_scale, bool need_weight,
                                bool need_row_scale, bool need_column_scale) {
  weight = check(weight, rows, row_scale, columns, column_scale);
  gradient = check_gradient(gradient, weight, rows, columns);
  const std::int64_t out = weight.size(0), in = weight.size(1);
  Tensor d_weight = need_weight ? torch::stable::new_empty(weight, {out, in})
                                : torch::stable::new_empty(weight, {std::int64_t(0)});
  Tensor d_row_scale = gradient_like(weight, need_row_scale, out);
  Tensor d_column_scale = gradient_like(weight, need_column_scale, in);
  const bool reduce = need_row_scale || need_column_scale;
  auto run = [&](auto element, auto gradient_element) {
    using T = decltype(element);
    using G = decltype(gradient_element);
    Backward<T, G> task;
    task.gradient = data<G>(gradient);
    task.weight = data<T>(weight);
    task.stride = weight.stride(0);
    task.rows = read_rows(rows, out, true);
    task.columns = read_columns(columns, in, kMayUseVectors<T> && has_avx512());
    task.row_scale = read_scale<T>(row_scale);
    task.column_scale = scales(read_scale<T>(column_scale), task.columns);
    task.streams = out * in * static_cast<std::int64_t>(sizeof(T)) >= kStreamedBytes;
    task.d_weight = need_weight ? mutable_data<T>(d_weight) : nullptr;
    task.d_row_scale = need_row_scale ? mutable_data<Wide<T>>(d_row_scale) : nullptr;
    auto* sums = need_column_scale ? mutable_data<Wide<T>>(d_column_scale) : nullptr;
    if (need_weight || reduce) run_backward(task, reduce, sums);
  };
  dispatch(weight, [&](auto element) {
    if (gradient.scalar_type() == weight.scalar_type()) {
      run(element, element);
    } else {
      run(element, Wide<decltype(element)>());
    }
  });
  return {d_weight, d_row_scale, d_column_scale};
}

}  // namespace
}  // namespace shorn

STABLE_TORCH_LIBRARY_IMPL(shorn, CPU, library) {
  library.impl("gather_scale_compiled", TORCH_BOX(&shorn::gather_scale));
  library.impl("gather_scale_backward_compiled", TORCH_BOX(&shorn::gather_scale_backward));
}
