// The CUDA kernels of gather-scale behind a C interface, run on a CPU through csrc/cpu_cuda.h.
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "gather_scale_kernels.cuh"

namespace {

std::string message;

struct Arguments {
  const void *gradient, *weight;
  const std::int64_t *rows, *columns;
  const void *row_scale, *column_scale;
  void *result, *d_weight, *d_row_scale, *d_column_scale;
  std::int64_t stride;
  int out, in, n, m;
};

template <typename T>
void run_forward(const Arguments& a) {
  shorn::gpu::forward<T>({static_cast<const T*>(a.weight), a.stride, a.rows, a.columns,
                          static_cast<const shorn::Wide<T>*>(a.row_scale),
                          static_cast<const shorn::Wide<T>*>(a.column_scale),
                          static_cast<T*>(a.result), a.out, a.in, a.n, a.m},
                         nullptr);
}

template <typename T, typename G>
void run_backward(const Arguments& a) {
  using W = shorn::Wide<T>;
  using namespace shorn::gpu;
  std::vector<int> row_place(a.out), column_place(a.in);
  if (a.rows != nullptr) invert(a.rows, a.n, a.out, row_place.data(), nullptr);
  if (a.columns != nullptr) invert(a.columns, a.m, a.in, column_place.data(), nullptr);
  std::vector<W> row_sums(column_tiles(a.in) * a.out), column_sums(row_tiles(a.out) * a.in);
  backward<T, G>({static_cast<const G*>(a.gradient), static_cast<const T*>(a.weight), a.stride,
                  a.rows == nullptr ? nullptr : row_place.data(),
                  a.columns == nullptr ? nullptr : column_place.data(),
                  static_cast<const W*>(a.row_scale), static_cast<const W*>(a.column_scale),
                  static_cast<T*>(a.d_weight),
                  a.d_row_scale == nullptr ? nullptr : row_sums.data(),
                  a.d_column_scale == nullptr ? nullptr : column_sums.data(), a.out, a.in, a.m},
                 static_cast<W*>(a.d_row_scale), static_cast<W*>(a.d_column_scale), nullptr);
}

template <typename T>
void run(const Arguments& a, bool backward, bool wide_gradient) {
  if (!backward) {
    run_forward<T>(a);
  } else if (wide_gradient) {
    run_backward<T, shorn::Wide<T>>(a);
  } else {
    run_backward<T, T>(a);
  }
}

}  // namespace

// Returns null, or what went wrong. dtype: 0 fp64, 1 fp32, 2 bf16, 3 fp16.
extern "C" const char* gather_scale_on_cpu(const Arguments* a, int dtype, int backward,
                                           int wide_gradient, unsigned seed) {
  cpu_cuda::state().random.seed(seed);
  try {
    switch (dtype) {
      case 0: run<double>(*a, backward, wide_gradient); break;
      case 1: run<float>(*a, backward, wide_gradient); break;
      case 2: run<shorn::BFloat16>(*a, backward, wide_gradient); break;
      default: run<shorn::Half>(*a, backward, wide_gradient); break;
    }
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

#ifdef SHORN_MAIN
// Many shapes in buffers of exactly the right size, for the sanitizers: values are not checked.
template <typename T, typename G>
void sweep(int out, int in, int keep, bool rows, bool columns, int slack) {
  using W = shorn::Wide<T>;
  auto pick = [&](int size) {
    std::vector<std::int64_t> index;
    for (int i = 0; i < size; ++i) {
      if (i % 4 < keep) index.push_back(i);
    }
    return index;
  };
  const std::vector<std::int64_t> row_index = pick(out), column_index = pick(in);
  const int n = rows ? static_cast<int>(row_index.size()) : out;
  const int m = columns ? static_cast<int>(column_index.size()) : in;
  const std::int64_t stride = in + slack;
  std::vector<T> weight((out - 1) * stride + in), d_weight(out * in), result(n * m);
  std::vector<G> gradient(n * m);
  std::vector<W> row_scale(out), column_scale(in), d_row_scale(out), d_column_scale(in);
  const Arguments a{gradient.data(), weight.data(),
                    rows ? row_index.data() : nullptr,
                    columns ? column_index.data() : nullptr,
                    row_scale.data(), column_scale.data(), result.data(), d_weight.data(),
                    d_row_scale.data(), d_column_scale.data(), stride, out, in, n, m};
  run_forward<T>(a);
  run_backward<T, G>(a);
}

int main() {
#ifdef __SANITIZE_THREAD__
  // Every CUDA thread of every block is a thread of its own to it, which takes its time.
  const std::vector<int> outs{33}, ins{264, 300};
#else
  const std::vector<int> outs{1, 33, 64}, ins{1, 40, 264, 300};
#endif
  for (int out : outs) {
    for (int in : ins) {
      for (int choice = 0; choice < 4; ++choice) {
        sweep<float, float>(out, in, 1 + choice % 3, choice & 1, choice & 2, choice);
        sweep<shorn::BFloat16, float>(out, in, 2, choice & 1, choice & 2, 8);
        sweep<double, double>(out, in, 3, choice & 1, choice & 2, 0);
      }
    }
  }
  std::puts("swept");
}
#endif
