// gather-scale on CUDA, registered for the schemas that trainer/kernels/gather_scale.py defines.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "gather_scale_kernels.cuh"
#include "gather_scale_torch.h"

namespace shorn {
namespace {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Kernels read indices and scales without strides; the tensor must outlive its use.
OptionalTensor contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(torch::stable::contiguous(*tensor)) : std::nullopt;
}

template <typename T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? shorn::data<T>(*tensor) : nullptr;
}

Tensor gather_scale(Tensor weight, OptionalTensor rows, OptionalTensor row_scale,
                    OptionalTensor columns, OptionalTensor column_scale) {
  weight = check(weight, rows, row_scale, columns, column_scale);
  rows = contiguous(rows), columns = contiguous(columns);
  row_scale = contiguous(row_scale), column_scale = contiguous(column_scale);
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const auto out = static_cast<int>(weight.size(0)), in = static_cast<int>(weight.size(1));
  const std::int64_t n = selected(rows, out), m = selected(columns, in);
  Tensor result = torch::stable::new_empty(weight, {n, m});
  dispatch(weight, [&](auto element) {
    using T = decltype(element);
    gpu::forward<T>({shorn::data<T>(weight), weight.stride(0), data<std::int64_t>(rows),
                     data<std::int64_t>(columns), data<Wide<T>>(row_scale),
                     data<Wide<T>>(column_scale), mutable_data<T>(result), out, in,
                     static_cast<int>(n), static_cast<int>(m)},
                    current_stream(weight));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

// For every unit of `size` its place in the index, or -1; nothing for all units.
OptionalTensor places(const OptionalTensor& index, const Tensor& weight, int size) {
  if (!index) return std::nullopt;
  Tensor place = torch::stable::new_empty(weight, {std::int64_t(size)}, ScalarType::Int);
  gpu::invert(shorn::data<std::int64_t>(*index), static_cast<int>(index->size(0)), size,
              mutable_data<int>(place), current_stream(weight));
  return place;
}

Gradients gather_scale_backward(Tensor gradient, Tensor weight, OptionalTensor rows,
                                OptionalTensor row_scale, OptionalTensor columns,
                                OptionalTensor column_scale, bool need_weight,
                                bool need_row_scale, bool need_column_scale) {
  weight = check(weight, rows, row_scale, columns, column_scale);
  gradient = check_gradient(gradient, weight, rows, columns);
  rows = contiguous(rows), columns = contiguous(columns);
  row_scale = contiguous(row_scale), column_scale = contiguous(column_scale);
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  const auto out = static_cast<int>(weight.size(0)), in = static_cast<int>(weight.size(1));
  Tensor d_weight = need_weight ? torch::stable::new_empty(weight, {out, in})
                                : torch::stable::new_empty(weight, {std::int64_t(0)});
  Tensor d_row_scale = gradient_like(weight, need_row_scale, out);
  Tensor d_column_scale = gradient_like(weight, need_column_scale, in);
  if (!need_weight && !need_row_scale && !need_column_scale) {
    return {d_weight, d_row_scale, d_column_scale};
  }
  const OptionalTensor row_place = places(rows, weight, out);
  const OptionalTensor column_place = places(columns, weight, in);
  const Tensor row_sums =
      gradient_like(weight, need_row_scale, std::int64_t(gpu::column_tiles(in)) * out);
  const Tensor column_sums =
      gradient_like(weight, need_column_scale, std::int64_t(gpu::row_tiles(out)) * in);
  auto run = [&](auto element, auto gradient_element) {
    using T = decltype(element);
    using G = decltype(gradient_element);
    using W = Wide<T>;
    auto wanted = [](bool needed, const Tensor& tensor) {
      return needed ? mutable_data<W>(tensor) : nullptr;
    };
    const int m = static_cast<int>(selected(columns, in));
    gpu::backward<T, G>({shorn::data<G>(gradient), shorn::data<T>(weight), weight.stride(0),
                         data<int>(row_place), data<int>(column_place), data<W>(row_scale),
                         data<W>(column_scale),
                         need_weight ? mutable_data<T>(d_weight) : nullptr,
                         wanted(need_row_scale, row_sums),
                         wanted(need_column_scale, column_sums), out, in, m},
                        wanted(need_row_scale, d_row_scale),
                        wanted(need_column_scale, d_column_scale), current_stream(weight));
  };
  dispatch(weight, [&](auto element) {
    if (gradient.scalar_type() == weight.scalar_type()) {
      run(element, element);
    } else {
      run(element, Wide<decltype(element)>());
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {d_weight, d_row_scale, d_column_scale};
}

}  // namespace
}  // namespace shorn

STABLE_TORCH_LIBRARY_IMPL(shorn, CUDA, library) {
  library.impl("gather_scale_compiled", TORCH_BOX(&shorn::gather_scale));
  library.impl("gather_scale_backward_compiled", TORCH_BOX(&shorn::gather_scale_backward));
}
