// 1x1 convolution, forward and backward, a tile of rows at a time.

constexpr int kForwardRows = 48;  // a multiple of every tile height

// Rows a backward tile holds: both matrices of it in half of a 512 kB second-level cache.
inline int backward_rows(int inputs, int outputs) {
  const int64_t fit = (300L << 10) / 4 / (spread(inputs) + spread(outputs)) / 48 * 48;
  return static_cast<int>(fit < 48 ? 48 : fit > 192 ? 192 : fit);
}

inline int padded(int columns) { return (columns + 15) / 16 * 16; }

int64_t pointwise_scratch(int inputs, int outputs) {
  const int64_t rows = backward_rows(inputs, outputs) + kMaxTileRows;
  return rows * (spread(inputs) + spread(outputs)) + 2L * padded(inputs) + 2L * padded(outputs) + 64;
}

// Rows of in(x) to a buffer of the given stride.
template <class X>
inline void load_rows(const X* x, const Affine& in, int rows, int channels, float* out, int64_t stride) {
  for (int r = 0; r < rows; ++r) {
    const X* from = x + static_cast<int64_t>(r) * channels;
    float* to = out + r * stride;
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) { put(to + c, apply(get<decltype(kind)>(from + c), in, c)); });
  }
}

template <class V, class G, class Y>
INLINE V output_gradient_at(const OutputGradient<G, Y>& out, int64_t at, int64_t c) {
  V d = get<V>(out.a + c) * get<V>(out.g + at);
  if (out.b) d += get<V>(out.b + c) * (get<V>(out.y + at) - get<V>(out.mean + c)) + get<V>(out.c + c);
  return d;
}

template <class G, class Y>
inline void load_gradient(const OutputGradient<G, Y>& out, int64_t row, int rows, int channels, float* to, int64_t stride) {
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * channels;
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
      put(to + r * stride + c, output_gradient_at<decltype(kind)>(out, at + c, c));
    });
  }
}

template <class X, class Y>
void pointwise(const Pointwise<X, Y>& p, int64_t begin, int64_t end, float* scratch, Sums sums) {
  float* buffer = scratch;
  const int64_t stride = spread(p.inputs);
  TileSums tile{buffer + (kForwardRows + kMaxTileRows) * stride, nullptr};
  tile.second = tile.first + padded(p.outputs);
  for (int64_t row = begin; row < end; row += kForwardRows) {
    const int rows = static_cast<int>(end - row < kForwardRows ? end - row : kForwardRows);
    const X* x = p.x + row * p.inputs;
    const float* left = buffer;
    int64_t left_stride = stride;
    bool loads = true;
    if constexpr (std::is_same_v<X, float>) {
      if (!p.in.scale && !p.in.relu6 && rows >= kMaxTileRows) {
        left = x;
        left_stride = p.inputs;
        loads = false;
      }
    }
    if (loads) load_rows(x, p.in, rows, p.inputs, buffer, stride);
    Y* y = p.y + row * p.outputs;
    const auto run = [&](auto store) { product(left, left_stride, rows, p.packed, p.inputs, p.outputs, store); };
    if constexpr (std::is_same_v<Y, float>) {
      if (p.bias) {
        run(StoreInference{y, nullptr, p.outputs, p.bias, p.relu6, p.residual ? p.residual + row * p.outputs : nullptr});
        continue;
      }
    }
    if (sums.first) {
      tile.clear(padded(p.outputs));
      run(StoreForward<true, Y>{y, p.outputs, p.centre, tile});
      tile.flush(sums, p.outputs);
    } else {
      run(StoreForward<false, Y>{y, p.outputs, nullptr, tile});
    }
  }
}

template <class G, class Y, class X>
void pointwise_gradient(const PointwiseGradient<G, Y, X>& p, int64_t begin, int64_t end, float* scratch, float* dw, Sums sums) {
  const int tile_height = backward_rows(p.inputs, p.outputs);
  const int64_t x_stride = spread(p.inputs), d_stride = spread(p.outputs);
  float* activation = scratch;
  float* gradient = activation + (tile_height + kMaxTileRows) * x_stride;
  TileSums tile{gradient + (tile_height + kMaxTileRows) * d_stride, nullptr};
  tile.second = tile.first + padded(p.inputs);
  for (int64_t row = begin; row < end; row += tile_height) {
    const int rows = static_cast<int>(end - row < tile_height ? end - row : tile_height);
    const int64_t at = row * p.inputs;
    load_rows(p.x + at, p.in, rows, p.inputs, activation, x_stride);
    load_gradient(p.out, row, rows, p.outputs, gradient, d_stride);
    if (dw) product_transposed(gradient, d_stride, p.outputs, activation, x_stride, p.inputs, rows, dw);
    if (!p.packed) continue;
    X* dx = p.dx + at;
    const X* x = p.x + at;
    const float* residual = p.residual ? p.residual + at : nullptr;
    if (sums.first) tile.clear(padded(p.inputs));
    auto run = [&](auto store) { product(gradient, d_stride, rows, p.packed, p.outputs, p.inputs, store); };
    if (p.in.relu6 && sums.first)
      run(StoreBackward<true, true, false, X>{dx, p.inputs, activation, x_stride, x, p.centre, nullptr, tile});
    else if (p.in.relu6)
      run(StoreBackward<true, false, false, X>{dx, p.inputs, activation, x_stride, nullptr, nullptr, nullptr, tile});
    else if (residual)
      run(StoreBackward<false, false, true, X>{dx, p.inputs, nullptr, 0, nullptr, nullptr, residual, tile});
    else
      run(StoreBackward<false, false, false, X>{dx, p.inputs, nullptr, 0, nullptr, nullptr, nullptr, tile});
    if (sums.first) tile.flush(sums, p.inputs);
  }
}
