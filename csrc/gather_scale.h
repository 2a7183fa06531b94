// Element arithmetic of gather-scale, shared by the CPU operator, the CUDA kernels and their tests.
//
// A weight is stored as double, float, BFloat16 or Half, and multiplied in Wide<T>: double for
// double, float for the others. Every result is rounded once, to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SHORN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SHORN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace shorn {

struct BFloat16 {
  std::uint16_t bits;
};

struct Half {
  std::uint16_t bits;
};

template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

SHORN_HOST_DEVICE std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SHORN_HOST_DEVICE float float_of(std::uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SHORN_HOST_DEVICE double widen(double value) { return value; }
SHORN_HOST_DEVICE float widen(float value) { return value; }

SHORN_HOST_DEVICE float widen(BFloat16 value) {
  return float_of(static_cast<std::uint32_t>(value.bits) << 16);
}

SHORN_HOST_DEVICE float widen(Half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const std::uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & 0x0f800000u;
  // Moves the exponent from bias 15 to bias 127; the subtraction normalises subnormal numbers.
  const float normal = float_of(magnitude + ((127u - 15u) << 23));
  const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
  const float special = float_of(magnitude | 0x7f800000u);
  const float finite = exponent == 0 ? subnormal : normal;
  const float absolute = exponent == 0x0f800000u ? special : finite;
  return float_of(bits_of(absolute) | (static_cast<std::uint32_t>(value.bits & 0x8000u) << 16));
#endif
}

// Rounds a wide value to the storage type T. Integer arithmetic, so that loops vectorise on
// processors without instructions for these types.
template <typename T>
SHORN_HOST_DEVICE T narrow(Wide<T> value);

template <>
SHORN_HOST_DEVICE double narrow<double>(double value) {
  return value;
}

template <>
SHORN_HOST_DEVICE float narrow<float>(float value) {
  return value;
}

template <>
SHORN_HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (bits >> 16) | 0x40u;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<std::uint16_t>(nan ? quiet : rounded)};
#endif
}

template <>
SHORN_HOST_DEVICE Half narrow<Half>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  // A unit in the last place of 0.5 is the smallest subnormal number: the addition rounds.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const std::uint32_t rebiased = magnitude - ((127u - 15u) << 23);
  const std::uint32_t normal = (rebiased + 0x0fffu + ((rebiased >> 13) & 1u)) >> 13;
  const std::uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const std::uint32_t absolute = magnitude >= (143u << 23) ? special : finite;
  return {static_cast<std::uint16_t>(absolute | ((bits >> 16) & 0x8000u))};
#endif
}

// Element of the result from an element of the weight, and its inverse for the weight's gradient.
template <typename T, typename S>
SHORN_HOST_DEVICE T scaled(S value, Wide<T> row_scale, Wide<T> column_scale) {
  return narrow<T>(widen(value) * row_scale * column_scale);
}

}  // namespace shorn
