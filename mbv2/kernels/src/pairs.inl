// 1x1 convolutions on bfloat16, two multiplications and additions a step: vdpbf16ps, or AMX's tdpbf16ps. product.inl and
// pointwise.inl do the same with single floats.
//
// A Pair holds two neighbours along the depth of a product, the earlier in its lower half. So the left matrix's rows are
// plain rows of bfloat16, and the right one has a Pair of two rows in each column.

INLINE void put_pairs(Pair* p, Wide first, Wide second) {
  const __m512i apart = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const __m512i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008, 0x170007,
                                         0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, apart));
}
INLINE void put_pairs(Pair* p, Eight first, Eight second) {
  const __m256i low = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh((__m256)first));
  const __m256i high = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh((__m256)second));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_or_si256(low, _mm256_slli_epi32(high, 16)));
}

// Sixteen rows of sixteen pairs, transposed.
INLINE void transpose_16(const Pair* from, int64_t from_stride, Pair* to, int64_t to_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * from_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + j + 2]);
      a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + j + 2]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {  // a[4 * i + j]: columns j, 4 + j, 8 + j, 12 + j of rows 4 * i to 4 * i + 3
    const __m512i even = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), odd = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88), odd2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    b[j] = _mm512_shuffle_i32x4(even, even2, 0x88);
    b[8 + j] = _mm512_shuffle_i32x4(even, even2, 0xdd);
    b[4 + j] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * to_stride, b[i]);
}

#if defined(__AMX_BF16__)

constexpr int kDepthStep = 16;  // pairs a tile holds along the depth

// Tiles 0 to 2 hold sums, 3 the left matrix, 4 to 6 the right one: 16 rows of 64 bytes each. The processor's state for as
// long as this lives.
template <>
struct Tiles<Pair> {
  Tiles() {
    struct Shape {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Shape shape;  // not on the stack: GCC takes only its first 8 bytes for read
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

// The same as for floats (product.inl), with aks = 1.
template <int NV, int MR>
INLINE void multiply(const Pair* a, int64_t ars, int64_t, const Pair* b, int64_t bks, int depth, Wide (&acc)[MR][NV]) {
  static_assert(MR == 16);
  asm volatile("" ::: "memory");  // the tiles' loads do not say that they read memory
  _tile_zero(0);
  if (NV > 1) _tile_zero(1);
  if (NV > 2) _tile_zero(2);
  for (int k = 0; k < depth; k += kDepthStep, a += kDepthStep, b += kDepthStep * bks) {
    _tile_loadd(3, a, ars * sizeof(Pair));
    _tile_loadd(4, b, bks * sizeof(Pair));
    _tile_dpbf16ps(0, 3, 4);
    if (NV > 1) {
      _tile_loadd(5, b + 16, bks * sizeof(Pair));
      _tile_dpbf16ps(1, 3, 5);
    }
    if (NV > 2) {
      _tile_loadd(6, b + 32, bks * sizeof(Pair));
      _tile_dpbf16ps(2, 3, 6);
    }
  }
  _tile_stored(0, &acc[0][0], sizeof acc[0]);
  if (NV > 1) _tile_stored(1, &acc[0][1 % NV], sizeof acc[0]);
  if (NV > 2) _tile_stored(2, &acc[0][2 % NV], sizeof acc[0]);
}

#else

constexpr int kDepthStep = 1;

template <int NV, int MR>
INLINE void multiply(const Pair* a, int64_t ars, int64_t aks, const Pair* b, int64_t bks, int depth, Wide (&acc)[MR][NV]) {
  clear(acc);
  for (int k = 0; k < depth; ++k) {
    __m512bh right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + j * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < MR; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * ars].bits));
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[r][j] = (Wide)_mm512_dpbf16_ps((__m512)acc[r][j], left, right[j]);
    }
    a += aks;
    b += bks;
  }
}

#endif

template <>
inline int depth_of<Pair>(int columns) { return (columns / 2 + kDepthStep - 1) / kDepthStep * kDepthStep; }

void pack_pairs(const float* w, int64_t k_stride, int64_t n_stride, int depth, int columns, const float* scale, float* packed,
                int p0, int p1) {
  const int pairs = depth_of<Pair>(depth);
  int index = 0;
  for (PanelPlan p(columns); !p.done(); p.next(), ++index) {
    if (index < p0 || index >= p1) continue;
    const int width = p.count() * LANES, first = p.first * LANES;
    Pair* panel = reinterpret_cast<Pair*>(packed) + static_cast<int64_t>(first) * pairs;
    if (n_stride == 1) {
      for (int k = 0; k < pairs; ++k, panel += width) {
        const float* rows = w + 2 * k * k_stride;
        for (int j = 0; j < width; j += LANES) {
          if (2 * k < depth) put_pairs(panel + j, packed_row(rows, first + j, columns, scale), packed_row(rows + k_stride, first + j, columns, scale));
          else put_pairs(panel + j, Wide{}, Wide{});
        }
      }
      continue;
    }
    for (int j = 0; j < width; j += LANES) {
      for (int k = 0; k < pairs; k += LANES) {  // sixteen columns' pairs, then transposed
        alignas(64) Pair across[LANES][LANES] = {}, down[LANES][LANES];
        const int left = depth - 2 * k;
        for (int n = 0; n < LANES && first + j + n < columns; ++n) {
          const float* column = w + (first + j + n) * n_stride + 2 * k;
          const Wide factor = Wide{} + (scale ? scale[first + j + n] : 1.0f);
          const Wide low = wide_upto(column, left) * factor, high = left > LANES ? wide_upto(column + LANES, left - LANES) * factor : Wide{};
          _mm512_store_si512(across[n], (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
        }
        transpose_16(across[0], LANES, down[0], LANES);
        for (int r = 0; r < LANES && k + r < pairs; ++r) std::memcpy(panel + static_cast<int64_t>(k + r) * width + j, down[r], sizeof down[r]);
      }
    }
  }
}

// Calls value(kind, row, c) for every vector of the rows, puts two rows' into one row of pairs, and zeros up to `until` rows.
template <class F>
INLINE void put_row_pairs(int rows, int until, int channels, Pair* to, int64_t stride, F value) {
  int r = 0;
  for (; r + 2 <= rows; r += 2, to += stride)
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) { put_pairs(to + c, value(kind, r, c), value(kind, r + 1, c)); });
  if (r < rows) {
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) { put_pairs(to + c, value(kind, r, c), kind); });
    r += 2;
    to += stride;
  }
  for (; r < until; r += 2, to += stride) std::memset(to, 0, sizeof(Pair) * stride);
}

// A tile of rows of a 1x1 convolution's gradient: see the one for floats in pointwise.inl.
template <>
struct GradientTile<Pair> {
  int inputs, outputs, height;
  int64_t x_stride, d_stride, row_stride, across;  // across: of the transposed gradient, whose rows lie along the depth
  Pair *activation, *gradient, *rows_of, *transposed;

  static int rows(int inputs, int outputs) {
    const int64_t fit = (300L << 10) / 2 / (spread(inputs) + 2 * spread(outputs)) / 96 * 96;
    return static_cast<int>(fit < 96 ? 96 : fit > 192 ? 192 : fit);
  }
  GradientTile(int in, int out, float* scratch)
      : inputs(in), outputs(out), height(rows(in, out)), x_stride(spread(in)), d_stride(spread(out)), row_stride(spread(depth_of<Pair>(out))),
        across(spread(height / 2)) {
    activation = reinterpret_cast<Pair*>(scratch);
    gradient = activation + height / 2 * x_stride;
    rows_of = gradient + height / 2 * d_stride;
    transposed = rows_of + (height + kMaxTileRows) * row_stride;
    if (depth_of<Pair>(outputs) * 2 > outputs) std::memset(rows_of, 0, sizeof(Pair) * height * row_stride);
  }
  static int64_t floats(int inputs, int outputs) {
    const int64_t height = rows(inputs, outputs), d = spread(outputs);
    return height / 2 * (spread(inputs) + d) + (height + kMaxTileRows) * spread(depth_of<Pair>(outputs)) + d * spread(height / 2);
  }

  template <class P>
  void load(const P& p, int64_t row, int count) {
    const int until = (count + 2 * kDepthStep - 1) / (2 * kDepthStep) * (2 * kDepthStep);
    const auto out = p.out;
    const auto slope = [&](auto kind, int r, int64_t c) __attribute__((always_inline)) {
      const auto d = output_gradient_at<decltype(kind)>(out, (row + r) * outputs + c, c);
      put(reinterpret_cast<bfloat16*>(rows_of + r * row_stride) + c, d);
      return d;
    };
    put_row_pairs(count, until, outputs, gradient, d_stride, slope);
    const Affine in = p.in;
    const auto* x = p.x + row * inputs;
    put_row_pairs(count, until, inputs, activation, x_stride, [&](auto kind, int r, int64_t c) __attribute__((always_inline)) {
      return apply(get_and_ask<decltype(kind)>(x + static_cast<int64_t>(r) * inputs + c), in, c);
    });
  }
  void add_weights(int count, float* dw) const {
    const int depth = depth_of<Pair>(count + 1);
#if defined(__AMX_BF16__)
    for (int c = 0; c < outputs; c += 16)
      for (int k = 0; k < depth; k += 16) transpose_16(gradient + k * d_stride + c, d_stride, transposed + c * across + k, across);
    product_transposed(transposed, across, 1, outputs, activation, x_stride, inputs, depth, dw);
#else
    product_transposed(gradient, 1, d_stride, outputs, activation, x_stride, inputs, depth, dw);
#endif
  }
  const Pair* left() const { return rows_of; }
  int64_t left_stride() const { return row_stride; }
};
