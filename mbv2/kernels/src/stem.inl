// The first convolution: 3x3, stride 2, from bytes. An output row's windows are laid out as a matrix, then multiplied.

constexpr int kWindow = 32;  // 27 values of a window, ky, kx, colour, and zeros

inline int64_t stem_window_floats(int out_width) { return static_cast<int64_t>(out_width + kMaxTileRows) * kWindow; }

int64_t stem_scratch(int width, int out_width, int outputs) {
  return 3L * (width + 2) * 3 + stem_window_floats(out_width) + (out_width + kMaxTileRows) * spread(outputs) + 2L * padded(outputs) + 64;
}

// The normalised input rows in use, and the windows of one output row.
template <class Y>
struct StemRows {
  const Stem<Y>& p;
  float* ring;
  float* windows;
  int64_t held[3] = {-100, -100, -100};

  StemRows(const Stem<Y>& stem, float* scratch) : p(stem), ring(scratch), windows(scratch + 3L * (stem.width + 2) * 3) {
    std::memset(windows, 0, sizeof(float) * stem_window_floats(p.out_width));
  }

  const float* row(int64_t n, int iy) {
    const int64_t size = (p.width + 2) * 3L;
    const int place = (iy + 3) % 3;
    const int64_t key = n * (p.height + 4) + iy;
    float* to = ring + place * size;
    if (held[place] == key) return to;
    held[place] = key;
    if (iy < 0 || iy >= p.height) {
      std::memset(to, 0, sizeof(float) * size);
      return to;
    }
    for (int c = 0; c < 3; ++c) to[c] = to[size - 3 + c] = 0;  // the padding is zero after normalisation
    const unsigned char* from = p.image + (n * p.height + iy) * static_cast<int64_t>(p.width) * 3;
    for (int i = 0; i < p.width * 3; i += 3)
      for (int c = 0; c < 3; ++c) to[3 + i + c] = p.pixel[from[i + c] * 3 + c];
    return to;
  }

  void load(int64_t out_row) {
    const int64_t n = out_row / p.out_height;
    const int iy = static_cast<int>(out_row % p.out_height) * 2 - p.pad_top;
    for (int ky = 0; ky < 3; ++ky) {
      const float* from = row(n, iy + ky) + (1 - p.pad_left) * 3;
      float* to = windows + ky * 9;
      for (int ox = 0; ox < p.out_width; ++ox, from += 6, to += kWindow) {
        const Eight v = eight(from);
        const float last = from[8];
        put(to, v);
        to[8] = last;
      }
    }
  }
};

template <class Y>
void stem(const Stem<Y>& p, int64_t begin, int64_t end, float* scratch, Sums sums) {
  StemRows<Y> rows(p, scratch);
  TileSums tile{rows.windows + stem_window_floats(p.out_width), nullptr};
  tile.second = tile.first + padded(p.outputs);
  for (int64_t row = begin; row < end; ++row) {
    rows.load(row);
    Y* y = p.y + row * p.out_width * p.outputs;
    const auto run = [&](auto store) { product(rows.windows, kWindow, p.out_width, p.packed, kStemDepth, p.outputs, store); };
    if (sums.first) {
      tile.clear(padded(p.outputs));
      run(StoreForward<true, Y>{y, p.outputs, p.centre, tile});
      tile.flush(sums, p.outputs);
    } else {
      run(StoreForward<false, Y>{y, p.outputs, nullptr, tile});
    }
  }
}

template <class Y>
void stem_gradient(const Stem<Y>& p, const OutputGradient<Y, Y>& out, int64_t begin, int64_t end, float* scratch, float* dw) {
  StemRows<Y> rows(p, scratch);
  float* gradient = rows.windows + stem_window_floats(p.out_width);
  const int64_t stride = spread(p.outputs);
  for (int64_t row = begin; row < end; ++row) {
    rows.load(row);
    load_gradient(out, row * p.out_width, p.out_width, p.outputs, gradient, stride);
    product_transposed(gradient, 1, stride, p.outputs, rows.windows, kWindow, kWindow, p.out_width, dw);
  }
}
