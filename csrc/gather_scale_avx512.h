// Rows of gather-scale with AVX-512, for ascending columns and weights in fp32, bf16 or fp16.
// gather_scale.cpp includes this file once, under that instruction set's compiler options.
//
// Both directions walk the whole row, sixteen columns at a time, and never leave the registers:
// the forward pass compresses the selected lanes, the backward pass expands the gradient to them.
// Lanes outside the selection are never read, so that what stands there (NaN, say) cannot matter.

template <typename T>
__m512 load(__mmask16 mask, const T* source) {
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_loadu_ps(mask, source);
  } else {
    const __m256i halves = _mm256_maskz_loadu_epi16(mask, source);
    if constexpr (std::is_same_v<T, Half>) {
      return _mm512_maskz_cvtph_ps(0xffff, halves);
    } else {
      const __m512i words = _mm512_maskz_cvtepu16_epi32(0xffff, halves);
      return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, words, 16));
    }
  }
}

// A value in the 16-bit type T.
template <typename T>
__m256i rounded(__m512 value) {
  if constexpr (std::is_same_v<T, Half>) {
    return _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i high = _mm512_maskz_srli_epi32(0xffff, bits, 16);
    const __m512i odd = _mm512_and_epi32(high, _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i nearest =
        _mm512_maskz_srli_epi32(0xffff, _mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_set1_epi32(0x40);
    const __m512i result = _mm512_mask_or_epi32(nearest, nan, high, quiet);
    return _mm512_maskz_cvtepi32_epi16(0xffff, result);
  }
}

template <typename T>
void store(__mmask16 mask, T* target, __m512 value) {
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(target, mask, value);
  } else {
    _mm256_mask_storeu_epi16(target, mask, rounded<T>(value));
  }
}

// Stores all lanes past the cache, where a cached store would first read what it overwrites;
// `target` is part of a row that may_stream.
template <typename T>
void stream(T* target, __m512 value) {
  if constexpr (std::is_same_v<T, float>) {
    _mm512_stream_ps(target, value);
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target), rounded<T>(value));
  }
}

template <typename T>
bool may_stream(const T* row) {
  return reinterpret_cast<std::uintptr_t>(row) % 64 == 0;
}

template <typename T>
void zero_row(std::int64_t size, bool streams, T* row) {
  constexpr std::int64_t kLine = 64 / sizeof(T);
  const std::int64_t lines = streams && may_stream(row) ? size / kLine : 0;
  for (std::int64_t line = 0; line < lines; ++line) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(row + line * kLine), _mm512_setzero_si512());
  }
  std::memset(row + lines * kLine, 0, (size - lines * kLine) * sizeof(T));
}

// Other threads see streamed stores only after this.
inline void finish_rows() { _mm_sfence(); }

// Lanes 0 to count - 1.
inline __mmask16 first(std::int32_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

// out[j] = row[c_j] * row_scale * column_scale[c_j]; column_scale is padded to whole vectors. Rows
// are selected too irregularly for the processor to foresee `next`, the row after this one.
template <typename T>
void forward_row(const Selection& columns, const T* row, const T* next, float row_scale,
                 const float* column_scale, T* out) {
  const __m512 by_row = _mm512_set1_ps(row_scale);
  for (std::size_t k = 0; k < columns.masks.size(); ++k) {
    const __mmask16 mask = columns.masks[k];
    const std::int32_t start = columns.starts[k], count = columns.starts[k + 1] - start;
    _mm_prefetch(reinterpret_cast<const char*>(next + 16 * k), _MM_HINT_T0);
    const __m512 value = _mm512_mul_ps(load(mask, row + 16 * k), by_row);
    const __m512 product = _mm512_mul_ps(value, _mm512_loadu_ps(column_scale + 16 * k));
    store(first(count), out + start, _mm512_maskz_compress_ps(mask, product));
  }
}

// The row's part of d_weight (whole, zeros included), of the column sums (padded to whole vectors)
// and its own sum, as far as wanted; `weight` is read for the sums only.
template <bool kWeight, bool kSums, typename T, typename G>
float backward_row(const Selection& columns, const G* gradient, const T* weight, const T* next,
                   float row_scale, const float* column_scale, bool streams, T* d_weight,
                   float* sums) {
  const __m512 by_row = _mm512_set1_ps(row_scale);
  __m512 total = _mm512_setzero_ps();
  const std::size_t whole = columns.size / 16;
  streams = streams && may_stream(d_weight);
  for (std::size_t k = 0; k < columns.masks.size(); ++k) {
    const __mmask16 mask = columns.masks[k];
    const std::int32_t start = columns.starts[k], count = columns.starts[k + 1] - start;
    const __m512 packed = load(first(count), gradient + start);
    const __m512 value = _mm512_maskz_expand_ps(mask, packed);
    const __m512 by_column = _mm512_loadu_ps(column_scale + 16 * k);
    if constexpr (kSums) {
      _mm_prefetch(reinterpret_cast<const char*>(next + 16 * k), _MM_HINT_T0);
      const __m512 product = _mm512_mul_ps(value, load(mask, weight + 16 * k));
      total = _mm512_mask3_fmadd_ps(product, by_column, total, mask);
      const __m512 sum = _mm512_loadu_ps(sums + 16 * k);
      _mm512_storeu_ps(sums + 16 * k, _mm512_fmadd_ps(product, by_row, sum));
    }
    if constexpr (kWeight) {
      const __m512 scaled = _mm512_mul_ps(value, by_row);
      const __m512 product = _mm512_maskz_mul_ps(mask, scaled, by_column);
      if (streams && k < whole) {
        stream(d_weight + 16 * k, product);
      } else {
        store(k < whole ? 0xffff : first(columns.size % 16), d_weight + 16 * k, product);
      }
    }
  }
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, total);
  for (int width = 8; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}
