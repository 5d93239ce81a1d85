// Passes over whole tensors: what is left after fusion, and BatchNorm on its own.

// Rows summed in single precision before they are added to the double sums.
constexpr int kSumRows = 32;

template <class Y>
void affine(const Y* y, Affine in, const float* residual, float* z, int channels, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * channels;
    for (int c = 0; c < channels; c += 8) {
      Eight v = apply(eight(y + at + c), in, c);
      if (residual) v += eight(residual + at + c);
      put(z + at + c, v);
    }
  }
}

// Calls each(row, c) -> (u, v) in bands of rows and adds up u and v per channel.
template <class Each>
INLINE void sum_rows(int channels, int64_t begin, int64_t end, Sums sums, Each each) {
  for (int64_t row = begin; row < end; row += kSumRows) {
    const int64_t stop = row + kSumRows < end ? row + kSumRows : end;
    for (int c = 0; c < channels; c += 8) {
      Eight s = {}, q = {};
      for (int64_t r = row; r < stop; ++r) each(r, c, s, q);
      add_to(sums.first, s, c);
      add_to(sums.second, q, c);
    }
  }
}

void moments(const float* y, const float* centre, int channels, int64_t begin, int64_t end, Sums sums) {
  sum_rows(channels, begin, end, sums, [&](int64_t r, int c, Eight& s, Eight& q) __attribute__((always_inline)) {
    const Eight v = eight(y + r * channels + c) - eight(centre + c);
    s += v;
    q += v * v;
  });
}

template <class Y>
void gradient_sums(const float* g, const Y* y, Affine mask, const float* centre, float* to, int channels, int64_t begin,
                   int64_t end, Sums sums) {
  sum_rows(channels, begin, end, sums, [&](int64_t r, int c, Eight& s, Eight& q) __attribute__((always_inline)) {
    const int64_t at = r * channels + c;
    const Eight here = eight(y + at);
    Eight v = eight(g + at);
    if (mask.relu6) v = masked(v, here * eight(mask.scale + c) + eight(mask.shift + c));
    if (to) put(to + at, v);
    s += v;
    q += v * (here - eight(centre + c));
  });
}

void output_gradient(const OutputGradient<>& out, float* d, int channels, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    for (int c = 0; c < channels; c += 8) put(d + row * channels + c, output_gradient_at(out, row * channels + c, c));
}

void add(const float* a, const float* b, float* c, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 8) put(c + i, eight(a + i) + eight(b + i));
}

template <class Y>
void pool(const Y* y, Affine in, float* pooled, int pixels, int channels, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    for (int c = 0; c < channels; c += 8) {
      Eight s = {};
      for (int64_t i = 0; i < pixels; ++i) s += apply(eight(y + (n * pixels + i) * channels + c), in, c);
      put(pooled + n * channels + c, s / static_cast<float>(pixels));
    }
  }
}

template <class Y>
void pool_gradient(const float* dpooled, const Y* y, Affine in, const float* centre, Y* g, int pixels, int channels, int64_t begin,
                   int64_t end, Sums sums) {
  for (int64_t n = begin; n < end; ++n) {
    for (int c = 0; c < channels; c += 8) {
      const Eight share = eight(dpooled + n * channels + c) / static_cast<float>(pixels);
      Eight s = {}, q = {};
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t at = (n * pixels + i) * channels + c;
        const Eight here = eight(y + at);
        const Eight v = masked(share, here * eight(in.scale + c) + eight(in.shift + c));
        put(g + at, v);
        s += v;
        q += v * (here - eight(centre + c));
      }
      add_to(sums.first, s, c);
      add_to(sums.second, q, c);
    }
  }
}
