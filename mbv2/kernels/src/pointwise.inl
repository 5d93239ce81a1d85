// 1x1 convolution, forward and backward, a tile of rows at a time.

inline int padded(int columns) { return (columns + 15) / 16 * 16; }

// What products are made of where X and Y are stored.
template <class X, class Y>
using Element = std::conditional_t<kPairs && (std::is_same_v<X, bfloat16> || std::is_same_v<Y, bfloat16>), Pair, float>;

// A value's successor by so many bytes is asked for when it is read: the processor's own foresight ends with each page of 4 kB.
constexpr int64_t kAhead = 4096;
template <class V, class T>
INLINE V get_and_ask(const T* p) {
  ask_for(p + kAhead / sizeof(T));
  return get<V>(p);
}

// Rows of in(x) to a buffer of the given stride. By value, here and below: what is stored could else have changed it.
template <class X, class T>
inline void load_rows(const X* x, const Affine in, int rows, int channels, T* out, int64_t stride) {
  for (int r = 0; r < rows; ++r) {
    const X* from = x + static_cast<int64_t>(r) * channels;
    T* to = out + r * stride;
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
      put(to + c, apply(get_and_ask<decltype(kind)>(from + c), in, c));
    });
  }
}

template <class V, class G, class Y>
INLINE V output_gradient_at(const OutputGradient<G, Y>& out, int64_t at, int64_t c) {
  V d = get<V>(out.a + c) * get_and_ask<V>(out.g + at);
  if (out.b) d += get<V>(out.b + c) * (get_and_ask<V>(out.y + at) - get<V>(out.mean + c)) + get<V>(out.c + c);
  return d;
}

template <class G, class Y>
inline void load_gradient(const OutputGradient<G, Y> out, int64_t row, int rows, int channels, float* to, int64_t stride) {
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * channels;
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
      put(to + r * stride + c, output_gradient_at<decltype(kind)>(out, at + c, c));
    });
  }
}

template <class X, class Y>
void pointwise(const Pointwise<X, Y>& p, int64_t begin, int64_t end, float* scratch, Sums sums) {
  using E = Element<X, Y>;
  [[maybe_unused]] const Tiles<E> tiles;
  E* buffer = reinterpret_cast<E*>(scratch);
  const int depth = depth_of<E>(p.inputs);
  const int64_t stride = spread(depth);
  if (std::is_same_v<E, Pair> && 2 * depth > p.inputs) std::memset(scratch, 0, sizeof(E) * (kForwardRows + kMaxTileRows) * stride);
  TileSums tile{scratch + (kForwardRows + kMaxTileRows) * stride, nullptr};
  tile.second = tile.first + padded(p.outputs);
  for (int64_t row = begin; row < end; row += kForwardRows) {
    const int rows = static_cast<int>(end - row < kForwardRows ? end - row : kForwardRows);
    const X* x = p.x + row * p.inputs;
    const E* left = buffer;
    int64_t left_stride = stride;
    const bool as_it_is = std::is_same_v<X, E> && !p.in.scale && !p.in.relu6 && rows >= kMaxTileRows;
    if (as_it_is) {
      left = reinterpret_cast<const E*>(x);
      left_stride = p.inputs;
    } else if constexpr (std::is_same_v<E, float>) {
      load_rows(x, p.in, rows, p.inputs, buffer, stride);
    } else {
      load_rows(x, p.in, rows, p.inputs, reinterpret_cast<bfloat16*>(buffer), 2 * stride);
    }
    Y* y = p.y + row * p.outputs;
    const auto run = [&](auto store) { product(left, left_stride, rows, reinterpret_cast<const E*>(p.packed), depth, p.outputs, store); };
    if (p.bias) {
      run(StoreInference<Y>{y, nullptr, p.outputs, p.bias, p.relu6, p.residual ? p.residual + row * p.outputs : nullptr});
    } else if (sums.first) {
      tile.clear(padded(p.outputs));
      run(StoreForward<true, Y>{y, p.outputs, p.centre, tile});
      tile.flush(sums, p.outputs);
    } else {
      run(StoreForward<false, Y>{y, p.outputs, nullptr, tile});
    }
  }
}

// A tile of rows in which the gradients of input and weights are formed: the activation and the gradient at the output.
template <class E>
struct GradientTile {
  int inputs, outputs, height;
  int64_t x_stride, d_stride;
  float *activation, *gradient;

  // Both matrices in half of a 512 kB second-level cache.
  static int rows(int inputs, int outputs) {
    const int64_t fit = (300L << 10) / 4 / (spread(inputs) + spread(outputs)) / 48 * 48;
    return static_cast<int>(fit < 48 ? 48 : fit > 192 ? 192 : fit);
  }
  static int64_t floats(int inputs, int outputs) { return (rows(inputs, outputs) + kMaxTileRows) * (spread(inputs) + spread(outputs)); }

  GradientTile(int in, int out, float* scratch)
      : inputs(in), outputs(out), height(rows(in, out)), x_stride(spread(in)), d_stride(spread(out)), activation(scratch),
        gradient(activation + (height + kMaxTileRows) * x_stride) {}

  template <class P>
  void load(const P& p, int64_t row, int count) {
    load_rows(p.x + row * inputs, p.in, count, inputs, activation, x_stride);
    load_gradient(p.out, row, count, outputs, gradient, d_stride);
  }
  void add_weights(int count, float* dw) const {
    product_transposed(gradient, 1, d_stride, outputs, activation, x_stride, inputs, count, dw);
  }
  const float* left() const { return gradient; }
  int64_t left_stride() const { return d_stride; }
};

template <class E>
int64_t pointwise_floats(int inputs, int outputs) {
  const int64_t forward = (kForwardRows + kMaxTileRows) * spread(depth_of<E>(inputs)), backward = GradientTile<E>::floats(inputs, outputs);
  return (forward > backward ? forward : backward) + 2L * padded(inputs) + 2L * padded(outputs) + 64;
}

template <class G, class Y, class X>
void pointwise_gradient(const PointwiseGradient<G, Y, X>& p, int64_t begin, int64_t end, float* scratch, float* dw, Sums sums) {
  using E = Element<X, Y>;
  [[maybe_unused]] const Tiles<E> tiles;
  GradientTile<E> tile(p.inputs, p.outputs, scratch);
  TileSums totals{scratch + tile.floats(p.inputs, p.outputs), nullptr};
  totals.second = totals.first + padded(p.inputs);
  const E* packed = reinterpret_cast<const E*>(p.packed);
  for (int64_t row = begin; row < end; row += tile.height) {
    const int rows = static_cast<int>(end - row < tile.height ? end - row : tile.height);
    const int64_t at = row * p.inputs;
    tile.load(p, row, rows);
    if (dw) tile.add_weights(rows, dw);
    if (!packed) continue;
    X* dx = p.dx + at;
    const X* x = p.x + at;
    const float* residual = p.residual ? p.residual + at : nullptr;
    if (sums.first) totals.clear(padded(p.inputs));
    auto run = [&](auto store) { product(tile.left(), tile.left_stride(), rows, packed, depth_of<E>(p.outputs), p.inputs, store); };
    if (p.in.relu6 && sums.first)
      run(StoreBackward<true, true, false, X>{dx, p.inputs, x, p.in, p.centre, nullptr, totals});
    else if (p.in.relu6)
      run(StoreBackward<true, false, false, X>{dx, p.inputs, x, p.in, nullptr, nullptr, totals});
    else if (residual)
      run(StoreBackward<false, false, true, X>{dx, p.inputs, x, p.in, nullptr, residual, totals});
    else
      run(StoreBackward<false, false, false, X>{dx, p.inputs, x, p.in, nullptr, nullptr, totals});
    if (sums.first) totals.flush(sums, p.inputs);
  }
}
