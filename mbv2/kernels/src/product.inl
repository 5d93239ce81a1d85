// The register-tiled matrix product: packed panels on the right, an epilogue that sees the sums while they are in registers.

// Two bfloat16 (pairs.inl), where this instruction set multiplies them.
struct Pair {
  uint32_t bits;
};
#if defined(__AVX512BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// What the processor needs while products of E run: nothing but for AMX.
template <class E>
struct Tiles {};

// How many E a row of so many columns takes along the depth of a product.
template <class E>
inline int depth_of(int columns) { return columns; }

// A row stride of an odd number of cache lines: columns of a tile then fall into different sets of the cache.
inline int64_t spread(int columns) { return ((columns + 15) / 16 | 1) * 16L; }

// Rows a tile of NV vectors holds: NV * rows accumulators and NV + 1 more registers; AMX has tiles of its own.
template <int NV, class E>
constexpr int tile_rows() {
#if defined(__AMX_BF16__)
  if (std::is_same_v<E, Pair>) return 16;
#endif
#if LANES == 16
  return NV == 3 ? 8 : NV == 2 ? 12 : 16;
#else
  return NV == 3 ? 4 : NV == 2 ? 6 : 8;
#endif
}
constexpr int kMaxTileRows = 16;

constexpr int kForwardRows = 48;  // a multiple of every tile height: rows that go through the panels together

// A matrix's columns are cut into panels of 1 to 3 vectors, as many threes as leave no single one.
struct PanelPlan {
  explicit PanelPlan(int columns) : vectors((columns + LANES - 1) / LANES) {}
  int vectors, first = 0;
  bool done() const { return first >= vectors; }
  int count() const {
    const int left = vectors - first;
    return left == 1 ? 1 : left == 2 || left == 4 ? 2 : 3;
  }
  void next() { first += count(); }
};

int panels(int columns) {
  int n = 0;
  for (PanelPlan p(columns); !p.done(); p.next()) ++n;
  return n;
}

// Floats of the largest packing: whole tiles of AMX.
int64_t packed_size(int depth, int columns) { return (depth + 15L) / 16 * 16 * ((columns + LANES - 1) / LANES) * LANES; }

// Columns [first, first + LANES) of row k, zeros past the matrix, times their scale: columns lie next to each other.
INLINE Wide packed_row(const float* row, int first, int columns, const float* scale) {
  const int left = columns - first;
  if (left <= 0) return Wide{};
  const Wide v = wide_upto(row + first, left);
  return scale ? v * wide_upto(scale + first, left) : v;
}

// One stride is 1: of neighbouring columns (a transposed matrix), or along the depth.
void pack(const float* w, int64_t k_stride, int64_t n_stride, int depth, int columns, const float* scale, float* packed, int p0, int p1) {
  constexpr int kBlock = 64;  // of the depth: rows of the panel that stay in the cache while its columns are filled
  int index = 0;
  for (PanelPlan p(columns); !p.done(); p.next(), ++index) {
    if (index < p0 || index >= p1) continue;
    const int width = p.count() * LANES, first = p.first * LANES;
    float* panel = packed + static_cast<int64_t>(first) * depth;
    if (n_stride == 1) {
      for (int k = 0; k < depth; ++k, panel += width)
        for (int j = 0; j < width; j += LANES) put(panel + j, packed_row(w + k * k_stride, first + j, columns, scale));
      continue;
    }
    for (int begin = 0; begin < depth; begin += kBlock) {
      const int end = begin + kBlock < depth ? begin + kBlock : depth;
      for (int j = 0; j < width; ++j) {
        const int n = first + j;
        const float factor = n < columns ? (scale ? scale[n] : 1.0f) : 0.0f;
        const float* column = w + (n < columns ? n : 0) * n_stride;
        for (int k = begin; k < end; ++k) panel[static_cast<int64_t>(k) * width + j] = column[k * k_stride] * factor;
      }
    }
  }
}

template <int NV, int MR>
INLINE void clear(Wide (&acc)[MR][NV]) {
#pragma GCC unroll 16
  for (int r = 0; r < MR; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[r][j] = Wide{};
}

// acc[r][j] = sum over k of left(r, k) * right(k, j), left at a[r * ars + k * aks].
template <int NV, int MR>
INLINE void multiply(const float* a, int64_t ars, int64_t aks, const float* b, int64_t bks, int depth, Wide (&acc)[MR][NV]) {
  clear(acc);
  for (int k = 0; k < depth; ++k) {
    Wide right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = wide(b + j * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const float left = a[r * ars];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] += left * right[j];
    }
    a += aks;
    b += bks;
  }
}

// One panel: all rows in tiles. The last tile reaches back over rows already done (epilogue gets lo > 0); with fewer rows
// than a tile it reads past them, which the caller's buffer allows, and the epilogue gets hi < MR.
template <int NV, class E, class Epilogue>
INLINE void panel_rows(const E* a, int64_t ars, int64_t aks, int rows, const E* b, int64_t bks, int depth, int column, Epilogue& epilogue) {
  constexpr int MR = tile_rows<NV, E>();
  int r0 = 0;
  for (; r0 + MR <= rows; r0 += MR) {
    Wide acc[MR][NV];
    multiply<NV, MR>(a + r0 * ars, ars, aks, b, bks, depth, acc);
    epilogue.template finish<NV, MR, true>(acc, r0, column, 0, MR);
  }
  if (r0 < rows) {
    const int start = rows >= MR ? rows - MR : 0;
    Wide acc[MR][NV];
    multiply<NV, MR>(a + start * ars, ars, aks, b, bks, depth, acc);
    epilogue.template finish<NV, MR, false>(acc, start, column, r0 - start, rows - start);
  }
}

// left (rows, depth) times packed (depth, columns).
template <class E, class Epilogue>
inline void product(const E* a, int64_t ars, int rows, const E* packed, int depth, int columns, Epilogue& epilogue) {
  for (PanelPlan p(columns); !p.done(); p.next()) {
    const int column = p.first * LANES, nv = p.count();
    const E* b = packed + static_cast<int64_t>(column) * depth;
    if (nv == 3) panel_rows<3>(a, ars, 1, rows, b, 3 * LANES, depth, column, epilogue);
    else if (nv == 2) panel_rows<2>(a, ars, 1, rows, b, 2 * LANES, depth, column, epilogue);
    else panel_rows<1>(a, ars, 1, rows, b, LANES, depth, column, epilogue);
  }
}

// out (left columns, right columns) += transposed left (depth, left columns) times right (depth, right columns).
struct AddTo {
  float* out;
  int columns;
  template <int NV, int MR, bool FULL>
  INLINE void finish(Wide (&acc)[MR][NV], int row, int column, int lo, int hi) {
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      if (!FULL && (r < lo || r >= hi)) continue;
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        const int c = column + j * LANES;
        float* p = out + static_cast<int64_t>(row + r) * columns + c;
        put_upto(p, wide_upto(p, columns - c) + acc[r][j], columns - c);
      }
    }
  }
};

// Left at left[column * lcs + k * lks].
template <class E>
inline void product_transposed(const E* left, int64_t lcs, int64_t lks, int left_columns, const E* right, int64_t right_stride,
                               int right_columns, int depth, float* out) {
  AddTo epilogue{out, right_columns};
  for (PanelPlan p(right_columns); !p.done(); p.next()) {
    const int column = p.first * LANES, nv = p.count();
    const E* b = right + column;
    if (nv == 3) panel_rows<3>(left, lcs, lks, left_columns, b, right_stride, depth, column, epilogue);
    else if (nv == 2) panel_rows<2>(left, lcs, lks, left_columns, b, right_stride, depth, column, epilogue);
    else panel_rows<1>(left, lcs, lks, left_columns, b, right_stride, depth, column, epilogue);
  }
}

// Sums of one tile of rows in single precision, added to the worker's in double: exact enough at any row count.
struct TileSums {
  float* first;
  float* second;
  void clear(int columns) {
    std::memset(first, 0, sizeof(float) * columns);
    std::memset(second, 0, sizeof(float) * columns);
  }
  void flush(Sums to, int columns) {
    for (int c = 0; c < columns; ++c) {
      to.first[c] += first[c];
      to.second[c] += second[c];
    }
  }
};

// y = sums; and the moments around `centre`.
template <bool MOMENTS, class Y>
struct StoreForward {
  Y* y;
  int columns;
  const float* centre;
  TileSums sums;
  template <int NV, int MR, bool FULL>
  INLINE void finish(Wide (&acc)[MR][NV], int row, int column, int lo, int hi) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const int c = column + j * LANES;
      Y* p = y + static_cast<int64_t>(row) * columns + c;
      Wide s = {}, q = {}, m = {};
      if (MOMENTS) m = wide(centre + c);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        if (!FULL && (r < lo || r >= hi)) continue;
        put_upto(p + static_cast<int64_t>(r) * columns, acc[r][j], columns - c);
        ask_for(p + static_cast<int64_t>(r + kForwardRows) * columns);
        if (MOMENTS) {
          const Wide d = acc[r][j] - m;
          s += d;
          q += d * d;
        }
      }
      if (MOMENTS) {
        put(sums.first + c, wide(sums.first + c) + s);
        put(sums.second + c, wide(sums.second + c) + q);
      }
    }
  }
};

// Inference: y = act(sums + bias) + residual; row r of the product goes to y + places[r], or to row r of y.
template <class Y>
struct StoreInference {
  Y* y;
  const int64_t* places;
  int columns;
  const float* bias;
  bool clip;
  const float* residual;  // row stride `columns`
  template <int NV, int MR, bool FULL>
  INLINE void finish(Wide (&acc)[MR][NV], int row, int column, int lo, int hi) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const int c = column + j * LANES;
      const Wide add = wide(bias + c);
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        if (!FULL && (r < lo || r >= hi)) continue;
        Wide v = acc[r][j] + add;
        if (clip) v = relu6(v);
        if (residual) v += wide_upto(residual + static_cast<int64_t>(row + r) * columns + c, columns - c);
        const int64_t at = places ? places[row + r] : static_cast<int64_t>(row + r) * columns;
        put_upto(y + at + c, v, columns - c);
      }
    }
  }
};

// Backward: dx = sums, masked by where the activation lies inside (0, 6), with the sums of dx and dx * (x - centre); or
// dx = sums + residual.
template <bool MASK, bool SUMS, bool RESIDUAL, class X>
struct StoreBackward {
  X* dx;
  int columns;
  const X* x;
  Affine in;  // of x, to the activation
  const float* centre;
  const float* residual;
  TileSums sums;
  template <int NV, int MR, bool FULL>
  INLINE void finish(Wide (&acc)[MR][NV], int row, int column, int lo, int hi) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      const int c = column + j * LANES, left = columns - c;
      const int64_t at = static_cast<int64_t>(row) * columns + c;
      Wide s = {}, q = {}, m = {}, scale = {}, shift = {};
      if (SUMS) m = wide(centre + c);
      if (MASK) {
        scale = wide(in.scale + c);
        shift = wide(in.shift + c);
      }
#pragma GCC unroll 16
      for (int r = 0; r < MR; ++r) {
        if (!FULL && (r < lo || r >= hi)) continue;
        const int64_t here = at + static_cast<int64_t>(r) * columns;
        Wide v = acc[r][j];
        Wide before = {};
        if (MASK || SUMS) before = wide_upto(x + here, left);
        if (MASK) v = masked(v, before * scale + shift);
        if (RESIDUAL) v += wide_upto(residual + here, left);
        put_upto(dx + here, v, left);
        ask_for(dx + here + static_cast<int64_t>(kForwardRows) * columns);
        if (SUMS) {
          s += v;
          q += v * (before - m);
        }
      }
      if (SUMS) {
        put(sums.first + c, wide(sums.first + c) + s);
        put(sums.second + c, wide(sums.second + c) + q);
      }
    }
  }
};
