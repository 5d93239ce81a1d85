// The first convolution: 3x3, stride 2, from bytes. An output row's windows are laid out as a matrix, then multiplied.

constexpr int kWindow = 32;  // 27 values of a window, ky, kx, colour, and zeros

inline int64_t stem_window_floats(const Stem& p) { return static_cast<int64_t>(p.out_width + kMaxTileRows) * kWindow; }

int64_t stem_scratch(const Stem& p) {
  return 3L * (p.width + 2) * 3 + stem_window_floats(p) + (p.out_width + kMaxTileRows) * spread(p.outputs) + 2L * padded(p.outputs) + 64;
}

// The normalised input rows in use, and the windows of one output row.
struct StemRows {
  const Stem& p;
  float* ring;
  float* windows;
  int64_t held[3] = {-100, -100, -100};

  StemRows(const Stem& stem, float* scratch) : p(stem), ring(scratch), windows(scratch + 3L * (stem.width + 2) * 3) {
    std::memset(windows, 0, sizeof(float) * stem_window_floats(p));
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

void stem(const Stem& p, int64_t begin, int64_t end, float* scratch, Sums sums) {
  StemRows rows(p, scratch);
  TileSums tile{rows.windows + stem_window_floats(p), nullptr};
  tile.second = tile.first + padded(p.outputs);
  for (int64_t row = begin; row < end; ++row) {
    rows.load(row);
    float* y = p.y + row * p.out_width * p.outputs;
    if (p.bias) {
      StoreInference store{y, nullptr, p.outputs, p.bias, p.relu6, nullptr};
      product(rows.windows, kWindow, p.out_width, p.packed, kStemDepth, p.outputs, store);
    } else if (sums.first) {
      tile.clear(padded(p.outputs));
      StoreForward<true> store{y, p.outputs, p.centre, tile};
      product(rows.windows, kWindow, p.out_width, p.packed, kStemDepth, p.outputs, store);
      tile.flush(sums, p.outputs);
    } else {
      StoreForward<false> store{y, p.outputs, nullptr, tile};
      product(rows.windows, kWindow, p.out_width, p.packed, kStemDepth, p.outputs, store);
    }
  }
}

void stem_gradient(const Stem& p, const OutputGradient& out, int64_t begin, int64_t end, float* scratch, float* dw) {
  StemRows rows(p, scratch);
  float* gradient = rows.windows + stem_window_floats(p);
  const int64_t stride = spread(p.outputs);
  for (int64_t row = begin; row < end; ++row) {
    rows.load(row);
    load_gradient(out, row * p.out_width, p.out_width, p.outputs, gradient, stride);
    product_transposed(gradient, stride, p.outputs, rows.windows, kWindow, kWindow, p.out_width, dw);
  }
}
