// Depthwise 3x3, forward and backward: a ring of activated rows, then a vector of channels along the row.

// Output rows that the filter forms at once, where the registers hold 9 weights and 8 sums; and input rows under so many.
constexpr int kRowsAtOnce = LANES == 16 ? 2 : 1;
template <int S, int R>
constexpr int kRowsUnder = (R - 1) * S + 3;

// Input rows whose gradients are formed at once at stride 1: the weights and sums stay in registers meanwhile.
constexpr int kGradientRows = 4;

// The rows held last, ROWS of an image in a row at most, each with a zero column on both sides; rows outside the image are zero.
template <int ROWS>
class Ring {
 public:
  Ring(float* memory, int width, int channels) : memory_(memory), size_(floats(width, channels)), column_(channels) {
    std::memset(memory, 0, sizeof(float) * (ROWS + 1) * size_);
    for (int64_t& row : held_) row = -1;
  }
  static int64_t floats(int width, int channels) { return (width + 2L) * channels; }

  // Row y of image n of so many rows; load(row of all images, to) loads one that is not held.
  template <class Load>
  const float* row(int64_t n, int y, int height, Load load) {
    if (y < 0 || y >= height) return memory_ + ROWS * size_;
    const int64_t row = n * height + y;
    float* place = memory_ + row % ROWS * size_;
    if (held_[row % ROWS] != row) {
      load(row, place + column_);
      held_[row % ROWS] = row;
    }
    return place;
  }

 private:
  float* memory_;
  int64_t size_, column_, held_[ROWS];
};

constexpr int kRingRows = kRowsUnder<2, kRowsAtOnce> > kGradientRows + 2 ? kRowsUnder<2, kRowsAtOnce> : kGradientRows + 2;

int64_t depthwise_scratch(int width, int out_width, int channels) {
  return (kRingRows + 1) * Ring<1>::floats(width > out_width ? width : out_width, channels) + 64;
}

// R rows of N neighbouring outputs of stride S; rows point at the first input column under the window. With `a`, t[k] += the
// sum over outputs of a times what lies under tap k.
template <int N, int S, int R = 1, class V>
INLINE void window(const float* const* rows, int64_t channels, const V (&w)[9], V (&acc)[R * N], const V* a = nullptr, V* t = nullptr) {
#pragma GCC unroll 5
  for (int i = 0; i < kRowsUnder<S, R>; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < (N - 1) * S + 3; ++j) {
      const V v = get<V>(rows[i] + j * channels);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const int ky = i - r * S;
        if (ky < 0 || ky > 2) continue;
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) {
          const int from = j - kx;
          if (from < 0 || from % S || from / S >= N) continue;
          acc[r * N + from / S] += v * w[ky * 3 + kx];
          if (a) t[ky * 3 + kx] += a[r * N + from / S] * v;
        }
      }
    }
  }
}

// Asks for a part of the rows that follow: they lie in one piece, but the filter goes through them a vector of channels at a
// time, which the processor does not foresee. The columns of all vectors ask for the whole.
template <class V, class T>
INLINE void ask_for_part(const T* rows, int columns, int64_t c, int column) {
  ask_for(rows + c * columns + column * static_cast<int64_t>(sizeof(V) / sizeof(float)));
}

// R output rows, their columns y_stride apart; of p only the sizes, the weights and what follows them are used.
template <int S, int R, class P, class T>
inline void depthwise_rows(const P p, const float* const* rows, T* y, int64_t y_stride, Sums sums) {
  const int64_t channels = p.channels;
  const int skip = 1 - p.pad_left;
  by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
    using V = decltype(kind);
    V w[9];
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) w[k] = get<V>(p.weights + k * channels + c);
    V s = {}, q = {};
    const V centre = sums.first ? get<V>(p.centre + c) : V{};
    const V bias = p.bias ? get<V>(p.bias + c) : V{};
    const auto columns = [&](auto count, int ox) __attribute__((always_inline)) {
      constexpr int N = decltype(count)::value;
      const float* here[kRowsUnder<S, R>];
      for (int i = 0; i < kRowsUnder<S, R>; ++i) here[i] = rows[i] + (ox * S + skip) * channels + c;
      V acc[R * N] = {};
      window<N, S, R>(here, channels, w, acc);
#pragma GCC unroll 8
      for (int i = 0; i < R * N; ++i) {
        V v = acc[i];
        if (p.bias) {
          v += bias;
          if (p.relu6) v = relu6(v);
        }
        const int place = i / N * p.out_width + ox + i % N;
        put(y + place * y_stride + c, v);
        if (!p.bias) ask_for_part<V>(y + R * p.out_width * y_stride, R * p.out_width, c, place);
        if (sums.first) {
          v -= centre;
          s += v;
          q += v * v;
        }
      }
    };
    int ox = 0;
    for (; ox + 4 <= p.out_width; ox += 4) columns(std::integral_constant<int, 4>{}, ox);
    for (; ox + 2 <= p.out_width; ox += 2) columns(std::integral_constant<int, 2>{}, ox);
    for (; ox < p.out_width; ++ox) columns(std::integral_constant<int, 1>{}, ox);
    if (sums.first) {
      add_to(sums.first, s, c);
      add_to(sums.second, q, c);
    }
  });
}

template <int S, class T>
void depthwise_of_stride(const Depthwise<T>& p, int64_t begin, int64_t end, float* scratch, Sums sums) {
  // The last column under a window at stride 2 without left padding is width + 1: the zero column on the right.
  constexpr int kRows = kRowsUnder<S, kRowsAtOnce>;
  Ring<kRows> ring(scratch, p.width, p.channels);
  const auto load = [&](int64_t row, float* to) {
    load_rows(p.x + row * p.width * p.channels, p.in, p.width, p.channels, to, p.channels);
  };
  for (int64_t row = begin, done; row < end; row += done) {
    const int64_t n = row / p.out_height;
    const int oy = static_cast<int>(row % p.out_height);
    done = row + kRowsAtOnce <= end && oy + kRowsAtOnce <= p.out_height ? kRowsAtOnce : 1;
    const float* rows[kRows];
    for (int i = 0; i < (done - 1) * S + 3; ++i) rows[i] = ring.row(n, oy * S - p.pad_top + i, p.height, load);
    T* y = p.y + row * p.out_width * p.channels;
    if (done == kRowsAtOnce) depthwise_rows<S, kRowsAtOnce>(p, rows, y, p.channels, sums);
    else depthwise_rows<S, 1>(p, rows, y, p.channels, sums);
  }
}

template <class T>
void depthwise(const Depthwise<T>& p, int64_t begin, int64_t end, float* scratch, Sums sums) {
  if (p.stride == 1) depthwise_of_stride<1>(p, begin, end, scratch, sums);
  else depthwise_of_stride<2>(p, begin, end, scratch, sums);
}

// Takes both gradients in one pass where the registers hold 9 weights, 9 sums, 4 columns of results and of activations.
constexpr bool kBothAtOnce = LANES == 16;

// A vector of channels of some input rows, and what its gradients add up to. By value, as load_rows.
template <class V, class T>
struct InputColumns {
  const T* x;
  T* dx;
  int columns;  // of all the rows
  int64_t channels, c;
  bool clipped, summed;
  V scale, shift, centre, s = {}, q = {};

  InputColumns(const DepthwiseGradient<T>& p, const T* x, T* dx, int columns, int64_t c, bool summed)
      : x(x), dx(dx), columns(columns), channels(p.shape.channels), c(c), clipped(p.shape.in.relu6), summed(summed) {
    const Affine& in = p.shape.in;
    scale = in.scale ? get<V>(in.scale + c) : V{} + 1.0f;
    shift = in.scale ? get<V>(in.shift + c) : V{};
    centre = summed ? get<V>(p.centre + c) : V{};
  }
  INLINE V read(int at) const { return x ? get<V>(x + at * channels + c) : V{}; }
  INLINE V activated(V here) const {
    const V v = here * scale + shift;
    return clipped ? relu6(v) : v;
  }
  INLINE void finish(int at, V v, V here) {
    if (x) ask_for_part<V>(x + columns * channels, columns, c, at);
    ask_for_part<V>(dx + columns * channels, columns, c, at);
    if (clipped) v = masked(v, here * scale + shift);
    put(dx + at * channels + c, v);
    if (summed) {
      s += v;
      q += v * (here - centre);
    }
  }
  INLINE void add_sums(Sums sums) const {
    if (!summed) return;
    add_to(sums.first, s, c);
    add_to(sums.second, q, c);
  }
};

// The gradient of `count` input rows of stride 1, from the rows of the output's gradient that they reach, the one above first.
template <class T>
INLINE void gradient_rows(const DepthwiseGradient<T>& p, const float* const* reached, int count, const T* x, T* dx, float* dw, Sums sums) {
  const int64_t channels = p.shape.channels;
  const int width = p.shape.width;
  by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
    using V = decltype(kind);
    InputColumns<V, T> input(p, x, dx, count * width, c, sums.first != nullptr);
    V w[9], t[9] = {};  // mirrored: an input pixel takes from output pixels one before to one behind
#pragma GCC unroll 9
    for (int k = 0; k < 9; ++k) w[k] = get<V>(p.shape.weights + (8 - k) * channels + c);
    for (int r = 0; r < count; ++r) {
      const auto columns = [&](auto both, auto number, int ix) __attribute__((always_inline)) {
        constexpr int N = decltype(number)::value;
        const int at = r * width + ix;
        const float* here[3];
        for (int i = 0; i < 3; ++i) here[i] = reached[r + i] + ix * channels + c;
        V acc[N] = {}, a[N];
        if constexpr (decltype(both)::value) {
#pragma GCC unroll 4
          for (int i = 0; i < N; ++i) a[i] = input.activated(input.read(at + i));
          window<N, 1>(here, channels, w, acc, a, t);
        } else {
          window<N, 1>(here, channels, w, acc);
        }
        if (!dx) return;
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) input.finish(at + i, acc[i], input.read(at + i));
      };
      const auto row = [&](auto both) __attribute__((always_inline)) {
        int ix = 0;
        for (; ix + 4 <= width; ix += 4) columns(both, std::integral_constant<int, 4>{}, ix);
        for (; ix + 2 <= width; ix += 2) columns(both, std::integral_constant<int, 2>{}, ix);
        for (; ix < width; ++ix) columns(both, std::integral_constant<int, 1>{}, ix);
      };
      if (kBothAtOnce && dw) row(std::true_type{});
      else if (dx) row(std::false_type{});
      for (int ix = 0; !kBothAtOnce && dw && ix < width; ++ix) {
        const V a = input.activated(input.read(r * width + ix));
#pragma GCC unroll 9
        for (int k = 0; k < 9; ++k) t[k] += a * get<V>(reached[r + k / 3] + (ix + k % 3) * channels + c);
      }
    }
    for (int k = 0; dw && k < 9; ++k) {
      float* to = dw + (8 - k) * channels + c;
      put(to, get<V>(to) + t[k]);
    }
    input.add_sums(sums);
  });
}

// What an input row of stride 2 takes part in: the kernel rows ky that reach an output row, and that row's gradient.
struct Reach {
  int count = 0;
  int ky[2];
  const float* row[2];
};

// The gradient of one input row of stride 2. A column has two taps where its place in the padded row is even, else one.
template <class T>
INLINE void gradient_row(const DepthwiseGradient<T>& p, const Reach& reach, const T* x, T* dx, float* dw, Sums sums) {
  const Depthwise<T> d = p.shape;
  const int64_t channels = d.channels;
  by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
    using V = decltype(kind);
    InputColumns<V, T> input(p, x, dx, d.width, c, sums.first != nullptr);
    V t[6] = {};  // of dw: by the rows in reach, the columns from left to right
    const auto row = [&](auto number) __attribute__((always_inline)) {
      constexpr int K = decltype(number)::value;
      const float* from[K];
      V w[K][3], left[K], right[K];
      for (int i = 0; i < K; ++i) {
        from[i] = reach.row[i] + c;
        for (int kx = 0; kx < 3; ++kx) w[i][kx] = get<V>(d.weights + (reach.ky[i] * 3 + kx) * channels + c);
      }
      const auto column = [&](auto taps, int ix) __attribute__((always_inline)) {
        const V here = input.read(ix), a = input.activated(here);
        V v = {};
#pragma GCC unroll 2
        for (int i = 0; i < K; ++i) {
          if constexpr (decltype(taps)::value == 2) {
            v += w[i][0] * right[i] + w[i][2] * left[i];
            t[i * 3] += a * right[i];
            t[i * 3 + 2] += a * left[i];
          } else {
            v += w[i][1] * right[i];
            t[i * 3 + 1] += a * right[i];
          }
        }
        if (dx) input.finish(ix, v, here);
      };
      const auto load_right = [&](int q) __attribute__((always_inline)) {
        for (int i = 0; i < K; ++i) right[i] = get<V>(from[i] + q * channels);
      };
      load_right(d.pad_left);
      if (d.pad_left) column(std::integral_constant<int, 1>{}, 0);
      for (int ix = d.pad_left; ix < d.width; ix += 2) {
        for (int i = 0; i < K; ++i) left[i] = right[i];
        load_right((ix + d.pad_left) / 2 + 1);
        column(std::integral_constant<int, 2>{}, ix);
        if (ix + 1 < d.width) column(std::integral_constant<int, 1>{}, ix + 1);
      }
    };
    if (reach.count == 2) row(std::integral_constant<int, 2>{});
    else if (reach.count == 1) row(std::integral_constant<int, 1>{});
    else for (int ix = 0; dx && ix < d.width; ++ix) input.finish(ix, V{}, input.read(ix));
    for (int i = 0; dw && i < 3 * reach.count; ++i) {
      float* to = dw + (reach.ky[i / 3] * 3 + i % 3) * channels + c;
      put(to, get<V>(to) + t[i]);
    }
    input.add_sums(sums);
  });
}

template <class T>
void depthwise_gradient(const DepthwiseGradient<T>& p, int64_t begin, int64_t end, float* scratch, float* dw, Sums sums) {
  const Depthwise<T>& d = p.shape;
  Ring<kGradientRows + 2> ring(scratch, d.out_width, d.channels);  // a right-hand tap may lie one past the output
  const auto load = [&](int64_t row, float* to) { load_gradient(p.out, row * d.out_width, d.out_width, d.channels, to, d.channels); };
  const int64_t x_row = static_cast<int64_t>(d.width) * d.channels;
  for (int64_t row = begin, done; row < end; row += done) {
    const int64_t n = row / d.height;
    const int iy = static_cast<int>(row % d.height);
    const T* x = d.x ? d.x + row * x_row : nullptr;
    T* dx = p.dx ? p.dx + row * x_row : nullptr;
    if (d.stride == 1) {
      const int64_t left = d.height - iy < end - row ? d.height - iy : end - row;
      done = left < kGradientRows ? left : kGradientRows;
      const float* reached[kGradientRows + 2];
      for (int i = 0; i < done + 2; ++i) reached[i] = ring.row(n, iy - 1 + i, d.out_height, load);
      gradient_rows(p, reached, static_cast<int>(done), x, dx, dw, sums);
      continue;
    }
    done = 1;
    Reach reach;
    for (int ky = 0; ky < 3; ++ky) {
      const int above = iy + d.pad_top - ky;
      if (above < 0 || above % 2 || above / 2 >= d.out_height) continue;
      reach.ky[reach.count] = ky;
      reach.row[reach.count++] = ring.row(n, above / 2, d.out_height, load);
    }
    gradient_row(p, reach, x, dx, dw, sums);
  }
}
