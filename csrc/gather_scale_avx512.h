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

// Stores all lanes past the cache, where a cached store would first read what it overwrites.
template <typename T>
void stream(T* target, __m512 value) {
  if constexpr (std::is_same_v<T, float>) {
    _mm512_stream_ps(target, value);
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target), rounded<T>(value));
  }
}

template <typename T>
void zero_row(std::int64_t size, bool streams, T* row) {
  if (!streams) {
    std::memset(row, 0, size * sizeof(T));
    return;
  }
  constexpr std::int64_t kLine = 64 / sizeof(T);
  for (std::int64_t column = 0; column < size; column += kLine) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(row + column), _mm512_setzero_si512());
  }
}

// Lanes 0 to count - 1.
inline __mmask16 first(std::int32_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

// How many rows are walked side by side: they share what is done for a column.
constexpr int kRows = 4;

// out[r][j] = row[r][c_j] * row_scale[r] * column_scale[c_j]; column_scale is padded to whole
// vectors.
template <int kCount, typename T>
void forward_group(const Selection& columns, const T* const* rows, const float* row_scale,
                   const float* column_scale, T* const* out) {
  for (std::size_t k = 0; k < columns.masks.size(); ++k) {
    const __mmask16 mask = columns.masks[k];
    const std::int32_t start = columns.starts[k];
    const __mmask16 packed = first(columns.starts[k + 1] - start);
    const __m512 by_column = _mm512_loadu_ps(column_scale + 16 * k);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const __m512 by_row = _mm512_set1_ps(row_scale[r]);
      const __m512 value = _mm512_mul_ps(load(mask, rows[r] + 16 * k), by_row);
      const __m512 product = _mm512_mul_ps(value, by_column);
      store(packed, out[r] + start, _mm512_maskz_compress_ps(mask, product));
    }
  }
}

// Rows [begin, end) of the result.
template <typename T>
void forward_vectors(const Forward<T>& task, std::int64_t begin, std::int64_t end) {
  const auto group = [&](auto count, std::int64_t i) {
    constexpr int kCount = decltype(count)::value;
    const T* rows[kCount];
    float row_scale[kCount];
    T* out[kCount];
    for (int r = 0; r < kCount; ++r) {
      const std::int64_t row = task.rows.source(i + r);
      rows[r] = task.weight + row * task.stride;
      row_scale[r] = task.row_scale(row);
      out[r] = task.result + (i + r) * task.columns.count;
    }
    forward_group<kCount>(task.columns, rows, row_scale, task.column_scale.data(), out);
  };
  std::int64_t i = begin;
  for (; i + kRows <= end; i += kRows) group(std::integral_constant<int, kRows>(), i);
  for (; i < end; ++i) group(std::integral_constant<int, 1>(), i);
}

// Sum of sixteen lanes.
inline float sum(__m512 value) {
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, value);
  for (int width = 8; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// One row of a backward pass.
template <typename T, typename G>
struct BackwardRow {
  const G* gradient;
  const T* weight;
  float row_scale;
  T* d_weight;
};

// The rows' parts of d_weight (whole, zeros included) and of the column sums (padded to whole
// vectors), and their own sums, as far as wanted; the weight is read for sums only.
template <int kCount, bool kWeight, bool kSums, typename T, typename G>
void backward_group(const Selection& columns, const BackwardRow<T, G>* rows,
                    const float* column_scale, bool streams, float* sums, float* totals) {
  __m512 total[kCount];
  for (int r = 0; r < kCount; ++r) total[r] = _mm512_setzero_ps();
  const std::size_t whole = columns.size / 16;
  for (std::size_t k = 0; k < columns.masks.size(); ++k) {
    const __mmask16 mask = columns.masks[k];
    const std::int32_t start = columns.starts[k];
    const __mmask16 packed = first(columns.starts[k + 1] - start);
    const __m512 by_column = _mm512_loadu_ps(column_scale + 16 * k);
    __m512 column_sum;
    if constexpr (kSums) column_sum = _mm512_loadu_ps(sums + 16 * k);
#pragma GCC unroll 4
    for (int r = 0; r < kCount; ++r) {
      const BackwardRow<T, G>& row = rows[r];
      const __m512 by_row = _mm512_set1_ps(row.row_scale);
      const __m512 value = _mm512_maskz_expand_ps(mask, load(packed, row.gradient + start));
      if constexpr (kSums) {
        const __m512 product = _mm512_mul_ps(value, load(mask, row.weight + 16 * k));
        total[r] = _mm512_mask3_fmadd_ps(product, by_column, total[r], mask);
        column_sum = _mm512_fmadd_ps(product, by_row, column_sum);
      }
      if constexpr (kWeight) {
        const __m512 product = _mm512_maskz_mul_ps(mask, _mm512_mul_ps(value, by_row), by_column);
        if (streams) {
          stream(row.d_weight + 16 * k, product);
        } else {
          store(k < whole ? 0xffff : first(columns.size % 16), row.d_weight + 16 * k, product);
        }
      }
    }
    if constexpr (kSums) _mm512_storeu_ps(sums + 16 * k, column_sum);
  }
  for (int r = 0; r < kCount; ++r) totals[r] = sum(total[r]);
}

template <int kCount, typename T, typename G>
void backward_group(const Backward<T, G>& task, const BackwardRow<T, G>* rows, bool streams,
                    float* sums, float* totals) {
  const auto group = sums == nullptr            ? backward_group<kCount, true, false, T, G>
                     : task.d_weight == nullptr ? backward_group<kCount, false, true, T, G>
                                                : backward_group<kCount, true, true, T, G>;
  group(task.columns, rows, task.column_scale.data(), streams, sums, totals);
}

// Blocks [begin, end) of kBlockRows rows of the weight.
template <typename T, typename G>
void backward_vectors(const Backward<T, G>& task, std::int64_t begin, std::int64_t end) {
  const std::int64_t size = task.columns.size;
  const bool streams = task.streams && size * sizeof(T) % 64 == 0 &&
                       reinterpret_cast<std::uintptr_t>(task.d_weight) % 64 == 0;
  for (std::int64_t block = begin; block < end; ++block) {
    float* sums = task.sums == nullptr ? nullptr : task.sums + block * task.sums_width;
    if (sums != nullptr) std::fill_n(sums, task.sums_width, 0.0f);
    BackwardRow<T, G> rows[kBlockRows];
    std::int64_t places[kBlockRows];
    float totals[kBlockRows];
    int live = 0;
    const std::int64_t last = std::min(task.rows.size, (block + 1) * kBlockRows);
    for (std::int64_t row = block * kBlockRows; row < last; ++row) {
      const std::int64_t i = task.rows.target(row);
      T* d_weight = task.d_weight == nullptr ? nullptr : task.d_weight + row * size;
      if (i >= 0) {
        rows[live] = {task.gradient + i * task.columns.count, task.weight + row * task.stride,
                      task.row_scale(row), d_weight};
        places[live++] = row;
      } else {
        if (d_weight != nullptr) zero_row(size, streams, d_weight);
        if (task.d_row_scale != nullptr) task.d_row_scale[row] = 0;
      }
    }
    int done = 0;
    for (; done + kRows <= live; done += kRows) {
      backward_group<kRows>(task, rows + done, streams, sums, totals + done);
    }
    for (; done < live; ++done) {
      backward_group<1>(task, rows + done, streams, sums, totals + done);
    }
    if (task.d_row_scale != nullptr) {
      for (int r = 0; r < live; ++r) task.d_row_scale[places[r]] = totals[r];
    }
  }
  // Other threads see streamed stores only after this.
  _mm_sfence();
}
