// Depthwise 3x3, forward and backward: a ring of three activated rows, then a vector of channels along the row.

int64_t depthwise_scratch(int width, int out_width, int channels) {
  const int64_t wide_row = static_cast<int64_t>((width > out_width ? width : out_width) + 3) * channels;
  return 4 * wide_row + 64;
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

// N neighbouring outputs of stride S; rows point at the first input column under the window. With `a`, t[k] += the sum over
// outputs of a times what lies under tap k.
template <int N, int S, class V>
INLINE void window(const float* const (&rows)[3], int64_t channels, const V (&w)[9], V (&acc)[N], const V* a = nullptr, V* t = nullptr) {
#pragma GCC unroll 3
  for (int ky = 0; ky < 3; ++ky) {
#pragma GCC unroll 16
    for (int j = 0; j < (N - 1) * S + 3; ++j) {
      const V v = get<V>(rows[ky] + j * channels);
#pragma GCC unroll 3
      for (int kx = 0; kx < 3; ++kx) {
        const int from = j - kx;
        if (from < 0 || from % S || from / S >= N) continue;
        acc[from / S] += v * w[ky * 3 + kx];
        if (a) t[ky * 3 + kx] += a[from / S] * v;
      }
    }
  }
}

// One output row, its columns y_stride apart; of p only the sizes, the weights and what follows them are used.
template <int S, class P, class T>
inline void depthwise_row(const P p, const float* const (&rows)[3], T* y, int64_t y_stride, Sums sums) {
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
    const auto finish = [&](int ox, V v) __attribute__((always_inline)) {
      if (p.bias) {
        v += bias;
        if (p.relu6) v = relu6(v);
      }
      put(y + ox * y_stride + c, v);
      if (sums.first) {
        v -= centre;
        s += v;
        q += v * v;
      }
    };
    int ox = 0;
    for (; ox + 4 <= p.out_width; ox += 4) {
      const int64_t at = (ox * S + skip) * channels + c;
      const float* here[3] = {rows[0] + at, rows[1] + at, rows[2] + at};
      V acc[4] = {};
      window<4, S>(here, channels, w, acc);
      for (int i = 0; i < 4; ++i) finish(ox + i, acc[i]);
    }
    for (; ox < p.out_width; ++ox) {
      const int64_t at = (ox * S + skip) * channels + c;
      const float* here[3] = {rows[0] + at, rows[1] + at, rows[2] + at};
      V acc[1] = {};
      window<1, S>(here, channels, w, acc);
      finish(ox, acc[0]);
    }
    if (sums.first) {
      add_to(sums.first, s, c);
      add_to(sums.second, q, c);
    }
  });
}

template <class T>
void depthwise(const Depthwise<T>& p, int64_t begin, int64_t end, float* scratch, Sums sums) {
  // The last column under a window at stride 2 without left padding is width + 1: the zero column on the right.
  const int64_t row_size = static_cast<int64_t>(p.width + 2) * p.channels;
  int64_t held[3] = {-100, -100, -100};  // n * (height + 4) + iy, by place in the ring
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / p.out_height;
    const int oy = static_cast<int>(row % p.out_height);
    const float* rows[3];
    for (int ky = 0; ky < 3; ++ky) {
      const int iy = oy * p.stride - p.pad_top + ky;
      const int place = (iy + 3) % 3;
      const int64_t key = n * (p.height + 4) + iy;
      float* to = scratch + place * row_size;
      if (held[place] != key) {
        load_padded_row(p, n, iy, to);
        held[place] = key;
      }
      rows[ky] = to;
    }
    T* y = p.y + row * p.out_width * p.channels;
    if (p.stride == 1) depthwise_row<1>(p, rows, y, p.channels, sums);
    else depthwise_row<2>(p, rows, y, p.channels, sums);
  }
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

// The gradient of one input row from the rows of the output's gradient that it reaches; at stride 2 a column has 1 or 2 taps.
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
      V w[9] = {};  // mirrored: an input column takes from output columns ix - 1 .. ix + 1
      const float* rows[3] = {reach.row[0], reach.row[0], reach.row[0]};
      for (int i = 0; i < reach.count; ++i) {
        rows[i] = reach.row[i];
        for (int kx = 0; kx < 3; ++kx) w[i * 3 + kx] = get<V>(d.weights + (reach.ky[i] * 3 + 2 - kx) * channels + c);
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
    } else {
      for (int ix = 0; ix < d.width; ++ix) {
        const int at = ix + d.pad_left;
        const V here = read(ix), a = activated(here);
        V v = {};
        for (int i = 0; i < reach.count; ++i) {
          const float* from = reach.row[i] + c;
          const float* w = d.weights + reach.ky[i] * 3 * channels + c;
          if (at % 2 == 0) {
            const V right = get<V>(from + (at / 2 + 1) * channels), left = get<V>(from + at / 2 * channels);
            v += get<V>(w) * right + get<V>(w + 2 * channels) * left;
            t[i * 3 + 2] += a * right;
            t[i * 3] += a * left;
          } else {
            const V middle = get<V>(from + (at / 2 + 1) * channels);
            v += get<V>(w + channels) * middle;
            t[i * 3 + 1] += a * middle;
          }
        }
        if (dx) finish(ix, v, here);
      }
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
