// Depthwise 3x3, forward and backward: a ring of activated rows, then a vector of channels along the row.

// Output rows that the filter forms at once, where the registers hold 9 weights and 8 sums; and input rows under so many.
constexpr int kRowsAtOnce = LANES == 16 ? 2 : 1;
template <int S, int R>
constexpr int kRowsUnder = (R - 1) * S + 3;

int64_t depthwise_scratch(int width, int out_width, int channels) {
  const int64_t wide_row = static_cast<int64_t>((width > out_width ? width : out_width) + 3) * channels;
  return kRowsUnder<2, kRowsAtOnce> * wide_row + 64;
}

// Input row `iy` of image `n` with a zero column on each side; zero where it lies outside.
template <class T>
inline void load_padded_row(const Depthwise<T>& p, int64_t n, int iy, float* to) {
  const int channels = p.channels;
  const size_t column = sizeof(float) * channels;
  if (iy < 0 || iy >= p.height) {
    std::memset(to, 0, column * (p.width + 2));
    return;
  }
  std::memset(to, 0, column);
  load_rows(p.x + (n * p.height + iy) * static_cast<int64_t>(p.width) * channels, p.in, p.width, channels, to + channels, channels);
  std::memset(to + static_cast<int64_t>(p.width + 1) * channels, 0, column);
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
    for (; ox < p.out_width; ++ox) columns(std::integral_constant<int, 1>{}, ox);
    if (sums.first) {
      add_to(sums.first, s, c);
      add_to(sums.second, q, c);
    }
  });
}

template <int S, class T>
void depthwise_of_stride(const Depthwise<T>& p, int64_t begin, int64_t end, float* scratch, Sums sums) {
  constexpr int kRows = kRowsUnder<S, kRowsAtOnce>;
  // The last column under a window at stride 2 without left padding is width + 1: the zero column on the right.
  const int64_t row_size = static_cast<int64_t>(p.width + 2) * p.channels;
  int64_t held[kRows];  // n * (height + 4) + iy, by place in the ring
  for (int64_t& key : held) key = -100;
  for (int64_t row = begin, done; row < end; row += done) {
    const int64_t n = row / p.out_height;
    const int oy = static_cast<int>(row % p.out_height);
    done = row + kRowsAtOnce <= end && oy + kRowsAtOnce <= p.out_height ? kRowsAtOnce : 1;
    const float* rows[kRows];
    for (int i = 0; i < (done - 1) * S + 3; ++i) {
      const int iy = oy * S - p.pad_top + i;
      const int place = (iy + kRows) % kRows;
      const int64_t key = n * (p.height + 4) + iy;
      float* to = scratch + place * row_size;
      if (held[place] != key) {
        load_padded_row(p, n, iy, to);
        held[place] = key;
      }
      rows[i] = to;
    }
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

// Row `oy` of the gradient at the output, with a zero column on each side.
template <class T>
inline void load_gradient_row(const DepthwiseGradient<T>& p, int64_t n, int oy, float* to) {
  const Depthwise<T>& d = p.shape;
  const size_t column = sizeof(float) * d.channels;
  if (oy < 0 || oy >= d.out_height) {
    std::memset(to, 0, column * (d.out_width + 2));
    return;
  }
  std::memset(to, 0, column);
  load_gradient(p.out, (n * d.out_height + oy) * d.out_width, d.out_width, d.channels, to + d.channels, d.channels);
  std::memset(to + static_cast<int64_t>(d.out_width + 1) * d.channels, 0, column);
}

// What one input row takes part in: the kernel rows ky that reach an output row, and that row's gradient.
struct Reach {
  int count = 0;
  int ky[3];
  const float* row[3];
};

// Takes both gradients in one pass where the registers hold 9 weights, 9 sums, 4 columns of results and of activations.
constexpr bool kBothAtOnce = LANES == 16;

// The gradient of one input row from the rows of the output's gradient that it reaches.
template <int S, class T>
INLINE void gradient_row(const DepthwiseGradient<T>& p, const Reach& reach, const T* x, T* dx, float* dw, Sums sums) {
  const Depthwise<T> d = p.shape;
  const int64_t channels = d.channels;
  const bool summed = sums.first != nullptr;
  by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
    using V = decltype(kind);
    const V centre = summed ? get<V>(p.centre + c) : V{};
    const V scale = d.in.scale ? get<V>(d.in.scale + c) : V{} + 1.0f, shift = d.in.scale ? get<V>(d.in.shift + c) : V{};
    V s = {}, q = {};
    const auto read = [&](int ix) __attribute__((always_inline)) { return x ? get<V>(x + ix * channels + c) : V{}; };
    const auto finish = [&](int ix, V v, V here) __attribute__((always_inline)) {
      if (x) ask_for_part<V>(x + d.width * channels, d.width, c, ix);
      ask_for_part<V>(dx + d.width * channels, d.width, c, ix);
      if (d.in.relu6) v = masked(v, here * scale + shift);
      put(dx + ix * channels + c, v);
      if (summed) {
        s += v;
        q += v * (here - centre);
      }
    };
    const auto activated = [&](V here) __attribute__((always_inline)) {
      const V v = here * scale + shift;
      return d.in.relu6 ? relu6(v) : v;
    };
    V t[9] = {};  // of dw: by the rows in reach, the columns from right to left
    if (S == 1) {
      V w[9];  // mirrored: an input column takes from output columns ix - 1 .. ix + 1
      const float* rows[3];
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const bool there = i < reach.count;
        rows[i] = reach.row[there ? i : 0];
#pragma GCC unroll 3
        for (int kx = 0; kx < 3; ++kx) w[i * 3 + kx] = there ? get<V>(d.weights + (reach.ky[i] * 3 + 2 - kx) * channels + c) : V{};
      }
      const auto columns = [&](auto both, auto count, int ix) __attribute__((always_inline)) {
        constexpr int N = decltype(count)::value;
        const float* here[3];
        for (int ky = 0; ky < 3; ++ky) here[ky] = rows[ky] + ix * channels + c;
        V acc[N] = {}, a[N];
        if constexpr (decltype(both)::value) {
#pragma GCC unroll 4
          for (int i = 0; i < N; ++i) a[i] = activated(read(ix + i));
          window<N, 1>(here, channels, w, acc, a, t);
        } else {
          window<N, 1>(here, channels, w, acc);
        }
        if (!dx) return;
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) finish(ix + i, acc[i], read(ix + i));
      };
      const auto row = [&](auto both) __attribute__((always_inline)) {
        int ix = 0;
        for (; ix + 4 <= d.width; ix += 4) columns(both, std::integral_constant<int, 4>{}, ix);
        for (; ix < d.width; ++ix) columns(both, std::integral_constant<int, 1>{}, ix);
      };
      if (kBothAtOnce && dw) row(std::true_type{});
      else if (dx) row(std::false_type{});
      for (int ix = 0; !kBothAtOnce && dw && ix < d.width; ++ix) {
        const V a = activated(read(ix));
#pragma GCC unroll 9
        for (int i = 0; i < 9; ++i) t[i] += a * get<V>(rows[i / 3] + (ix + i % 3) * channels + c);
      }
    } else {  // an input column has two taps where its place in the padded row is even, else one
      const auto row = [&](auto count) __attribute__((always_inline)) {
        constexpr int K = decltype(count)::value;
        const float* from[K];
        V w[K][3], left[K], right[K];
        for (int i = 0; i < K; ++i) {
          from[i] = reach.row[i] + c;
          for (int kx = 0; kx < 3; ++kx) w[i][kx] = get<V>(d.weights + (reach.ky[i] * 3 + kx) * channels + c);
        }
        const auto column = [&](auto taps, int ix) __attribute__((always_inline)) {
          const V here = read(ix), a = activated(here);
          V v = {};
#pragma GCC unroll 2
          for (int i = 0; i < K; ++i) {
            if constexpr (decltype(taps)::value == 2) {
              v += w[i][0] * right[i] + w[i][2] * left[i];
              t[i * 3 + 2] += a * right[i];
              t[i * 3] += a * left[i];
            } else {
              v += w[i][1] * right[i];
              t[i * 3 + 1] += a * right[i];
            }
          }
          if (dx) finish(ix, v, here);
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
      else for (int ix = 0; dx && ix < d.width; ++ix) finish(ix, V{}, read(ix));
    }
    for (int i = 0; dw && i < 3 * reach.count; ++i) {
      float* to = dw + (reach.ky[i / 3] * 3 + 2 - i % 3) * channels + c;
      put(to, get<V>(to) + t[i]);
    }
    if (sums.first) {
      add_to(sums.first, s, c);
      add_to(sums.second, q, c);
    }
  });
}

template <class T>
void depthwise_gradient(const DepthwiseGradient<T>& p, int64_t begin, int64_t end, float* scratch, float* dw, Sums sums) {
  const Depthwise<T>& d = p.shape;
  // Two columns more than the output: a right-hand tap may lie one past it.
  const int64_t row_size = static_cast<int64_t>(d.out_width + 2) * d.channels;
  const int64_t x_row = static_cast<int64_t>(d.width) * d.channels;
  int64_t held[3] = {-100, -100, -100};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / d.height;
    const int iy = static_cast<int>(row % d.height);
    Reach reach;
    for (int ky = 0; ky < 3; ++ky) {
      const int above = iy + d.pad_top - ky;
      if (above < 0 || above % d.stride || above / d.stride >= d.out_height) continue;
      const int oy = above / d.stride, place = oy % 3;
      const int64_t key = n * (d.out_height + 4) + oy;
      float* to = scratch + place * row_size;
      if (held[place] != key) {
        load_gradient_row(p, n, oy, to);
        held[place] = key;
      }
      reach.ky[reach.count] = ky;
      reach.row[reach.count++] = to;
    }
    const T* x = d.x ? d.x + row * x_row : nullptr;
    T* dx = p.dx ? p.dx + row * x_row : nullptr;
    if (d.stride == 1) gradient_row<1>(p, reach, x, dx, dw, sums);
    else gradient_row<2>(p, reach, x, dx, dw, sums);
  }
}
