// What the CPU and the CUDA operator share: checks of their arguments, and the choice of types.
//
// trainer/kernels/gather_scale.py checks as much and says more; these checks guard traced graphs,
// which call the operators directly. Ranges of indices are checked where they are read.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <type_traits>

#include "gather_scale.h"

// What the library was built with (setup.py), which trainer/kernels/library.py reads in the file,
// also where it does not load.
#ifdef SHORN_TORCH
#define SHORN_TEXT_OF(x) #x
#define SHORN_TEXT(x) SHORN_TEXT_OF(x)
[[gnu::used]] static const char shorn_built_with[] =
    "shorn built with torch " SHORN_TEXT(SHORN_TORCH) ", CUDA " SHORN_TEXT(SHORN_TOOLKIT);
#endif

namespace shorn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "gather_scale: ";
  ((message << parts), ...);
  throw std::runtime_error(message.str());
}

inline void check_index(const OptionalTensor& index, const Tensor& weight, const char* name) {
  require(!index || (index->device() == weight.device() && index->dim() == 1 &&
                     index->scalar_type() == ScalarType::Long),
          name, "s must be [n] int64 on the weight's device");
}

inline void check_scale(const OptionalTensor& scale, const Tensor& weight, std::int64_t size,
                        const char* name) {
  const bool twice = weight.scalar_type() == ScalarType::Double;
  require(!scale || (scale->device() == weight.device() && scale->dim() == 1 &&
                     scale->size(0) == size &&
                     scale->scalar_type() == (twice ? ScalarType::Double : ScalarType::Float)),
          name, "_scale must be [", size, "] ", twice ? "fp64" : "fp32",
          " on the weight's device");
}

// Checks a selection; returns the weight with consecutive elements along its rows.
inline Tensor check(const Tensor& weight, const OptionalTensor& rows,
                    const OptionalTensor& row_scale, const OptionalTensor& columns,
                    const OptionalTensor& column_scale) {
  require(weight.dim() == 2, "weight must be a matrix");
  require(std::max(weight.size(0), weight.size(1)) <= std::numeric_limits<std::int32_t>::max(),
          "weight must have fewer than 2^31 rows and columns");
  check_index(rows, weight, "row");
  check_index(columns, weight, "column");
  check_scale(row_scale, weight, weight.size(0), "row");
  check_scale(column_scale, weight, weight.size(1), "column");
  const bool consecutive = weight.stride(1) == 1 || weight.size(1) <= 1;
  return consecutive ? weight : torch::stable::contiguous(weight);
}

inline std::int64_t selected(const OptionalTensor& index, std::int64_t size) {
  return index ? index->size(0) : size;
}

// Checks the gradient of a result; returns it in contiguous memory.
inline Tensor check_gradient(const Tensor& gradient, const Tensor& weight,
                             const OptionalTensor& rows, const OptionalTensor& columns) {
  const std::int64_t n = selected(rows, weight.size(0)), m = selected(columns, weight.size(1));
  require(gradient.device() == weight.device() && gradient.dim() == 2 && gradient.size(0) == n &&
              gradient.size(1) == m,
          "gradient must be [", n, ", ", m, "] on the weight's device");
  require(gradient.scalar_type() == weight.scalar_type() ||
              (gradient.scalar_type() == ScalarType::Float &&
               weight.scalar_type() != ScalarType::Double),
          "gradient must have the weight's dtype or fp32");
  return torch::stable::contiguous(gradient);
}

// Room for a gradient: empty where it is not wanted.
inline Tensor gradient_like(const Tensor& weight, bool wanted, std::int64_t size) {
  const bool twice = weight.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(weight, {wanted ? size : 0},
                                  twice ? ScalarType::Double : ScalarType::Float);
}

// Calls `run` with an element of the weight's type.
template <typename Run>
auto dispatch(const Tensor& weight, Run run) {
  switch (weight.scalar_type()) {
    case ScalarType::Double: return run(double());
    case ScalarType::Float: return run(float());
    case ScalarType::BFloat16: return run(BFloat16());
    case ScalarType::Half: return run(Half());
    default: throw std::runtime_error("gather_scale: weight must be fp64, fp32, bf16 or fp16");
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace shorn
