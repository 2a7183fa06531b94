// The loops of gather-scale on a CPU. gather_scale.cpp includes this file once for every
// instruction set, inside a namespace and under that set's compiler options; hence no include guard
// and no includes.

// Selected elements of a row, in contiguous memory.
template <typename T>
void select(const Selection& columns, const T* row, T* out) {
  if (columns.kind == Selection::kRuns) {
    for (const Run& run : columns.runs) {
      std::memcpy(out + run.target, row + run.start, run.length * sizeof(T));
    }
    return;
  }
  const std::int32_t* index = columns.index.data();
  for (std::int64_t j = 0; j < columns.count; ++j) {
    out[j] = row[index[j]];
  }
}

// Inverse of select: a whole row, zero outside the selection.
template <typename T>
void spread(const Selection& columns, const T* values, T* row) {
  std::memset(row, 0, columns.size * sizeof(T));
  if (columns.kind == Selection::kRuns) {
    for (const Run& run : columns.runs) {
      std::memcpy(row + run.start, values + run.target, run.length * sizeof(T));
    }
    return;
  }
  const std::int32_t* index = columns.index.data();
  for (std::int64_t j = 0; j < columns.count; ++j) {
    row[index[j]] = values[j];
  }
}

// Rows [begin, end) of the result.
template <typename T>
void forward_rows(const Forward<T>& task, std::int64_t begin, std::int64_t end) {
#if SHORN_AVX512
  if constexpr (!std::is_same_v<T, double>) {
    if (task.columns.kind == Selection::kVectors) return forward_vectors(task, begin, end);
  }
#endif
  const std::int64_t m = task.columns.count;
  const Wide<T>* column_scale = task.column_scale.data();
  std::vector<T> buffer(m);
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t row = task.rows.source(i);
    const T* values = task.weight + row * task.stride;
    const Wide<T> row_scale = task.row_scale(row);
    T* out = task.result + i * m;
    if (task.columns.kind != Selection::kAll) {
      select(task.columns, values, buffer.data());
      values = buffer.data();
    }
    for (std::int64_t j = 0; j < m; ++j) {
      out[j] = scaled<T>(values[j], row_scale, column_scale[j]);
    }
  }
}

// Adds gradient * weight * row_scale to the column sums; returns the sum of
// gradient * weight * column_scale.
template <typename T, typename G>
Wide<T> reduce_row(const G* gradient, const T* weight, Wide<T> row_scale,
                   const Wide<T>* column_scale, std::int64_t m, Wide<T>* sums) {
  Wide<T> total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t j = 0; j < m; ++j) {
    const Wide<T> product = widen(gradient[j]) * widen(weight[j]);
    sums[j] += product * row_scale;
    total += product * column_scale[j];
  }
  return total;
}

// The row's part of the gradients: the whole of d_weight's row, and its sum, which is returned.
template <typename T, typename G>
Wide<T> backward_row(const Backward<T, G>& task, const G* gradient, const T* weight,
                     Wide<T> row_scale, T* d_weight, Wide<T>* sums, T* buffer) {
  const Selection& columns = task.columns;
  const Wide<T>* column_scale = task.column_scale.data();
  Wide<T> total = 0;
  if (sums != nullptr) {
    if (columns.kind != Selection::kAll) {
      select(columns, weight, buffer);
      weight = buffer;
    }
    total = reduce_row<T>(gradient, weight, row_scale, column_scale, columns.count, sums);
  }
  if (d_weight != nullptr) {
    T* values = columns.kind == Selection::kAll ? d_weight : buffer;
    for (std::int64_t j = 0; j < columns.count; ++j) {
      values[j] = scaled<T>(gradient[j], row_scale, column_scale[j]);
    }
    if (values == buffer) spread(columns, values, d_weight);
  }
  return total;
}

// Blocks [begin, end) of kBlockRows rows of the weight.
template <typename T, typename G>
void backward_blocks(const Backward<T, G>& task, std::int64_t begin, std::int64_t end) {
#if SHORN_AVX512
  if constexpr (!std::is_same_v<T, double>) {
    if (task.columns.kind == Selection::kVectors) return backward_vectors(task, begin, end);
  }
#endif
  const std::int64_t m = task.columns.count, size = task.columns.size;
  std::vector<T> buffer(m);
  const std::int64_t last = std::min(task.rows.size, end * kBlockRows);
  Wide<T>* sums = nullptr;
  for (std::int64_t row = begin * kBlockRows; row < last; ++row) {
    if (task.sums != nullptr && row % kBlockRows == 0) {
      sums = task.sums + row / kBlockRows * task.sums_width;
      std::fill_n(sums, task.sums_width, Wide<T>(0));
    }
    const std::int64_t i = task.rows.target(row);
    T* d_weight = task.d_weight == nullptr ? nullptr : task.d_weight + row * size;
    Wide<T> total = 0;
    if (i >= 0) {
      total = backward_row(task, task.gradient + i * m, task.weight + row * task.stride,
                           task.row_scale(row), d_weight, sums, buffer.data());
    } else if (d_weight != nullptr) {
      std::memset(d_weight, 0, size * sizeof(T));
    }
    if (task.d_row_scale != nullptr) task.d_row_scale[row] = total;
  }
}
