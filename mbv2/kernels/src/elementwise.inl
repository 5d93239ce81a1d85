// Passes over whole tensors: what is left after fusion, and BatchNorm on its own.

// Rows summed in single precision before they are added to the double sums.
constexpr int kSumRows = 32;

template <class Y>
void affine(const Y* y, Affine in, const float* residual, float* z, int channels, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * channels;
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
      using V = decltype(kind);
      V v = apply(get<V>(y + at + c), in, c);
      if (residual) v += get<V>(residual + at + c);
      put(z + at + c, v);
    });
  }
}

// Calls each(row, c, s, q), which adds to s and q, in bands of rows, and adds those up per channel.
template <class Each>
INLINE void sum_rows(int channels, int64_t begin, int64_t end, Sums sums, Each each) {
  for (int64_t row = begin; row < end; row += kSumRows) {
    const int64_t stop = row + kSumRows < end ? row + kSumRows : end;
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
      auto s = kind, q = kind;
      for (int64_t r = row; r < stop; ++r) each(r, c, s, q);
      add_to(sums.first, s, c);
      add_to(sums.second, q, c);
    });
  }
}

void moments(const float* y, const float* centre, int channels, int64_t begin, int64_t end, Sums sums) {
  sum_rows(channels, begin, end, sums, [&](int64_t r, int64_t c, auto& s, auto& q) __attribute__((always_inline)) {
    using V = std::remove_reference_t<decltype(s)>;
    const V v = get<V>(y + r * channels + c) - get<V>(centre + c);
    s += v;
    q += v * v;
  });
}

template <class Y>
void gradient_sums(const float* g, const Y* y, Affine mask, const float* centre, float* to, int channels, int64_t begin,
                   int64_t end, Sums sums) {
  sum_rows(channels, begin, end, sums, [&](int64_t r, int64_t c, auto& s, auto& q) __attribute__((always_inline)) {
    using V = std::remove_reference_t<decltype(s)>;
    const int64_t at = r * channels + c;
    const V here = get<V>(y + at);
    V v = get<V>(g + at);
    if (mask.relu6) v = masked(v, here * get<V>(mask.scale + c) + get<V>(mask.shift + c));
    if (to) put(to + at, v);
    s += v;
    q += v * (here - get<V>(centre + c));
  });
}

void output_gradient(const OutputGradient<>& out, float* d, int channels, int64_t begin, int64_t end) {
  load_gradient(out, begin, static_cast<int>(end - begin), channels, d + begin * channels, channels);
}

void add(const float* a, const float* b, float* c, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 8) put(c + i, eight(a + i) + eight(b + i));
}

template <class Y>
void pool(const Y* y, Affine in, float* pooled, int pixels, int channels, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
      auto s = kind;
      for (int64_t i = 0; i < pixels; ++i) s += apply(get<decltype(kind)>(y + (n * pixels + i) * channels + c), in, c);
      put(pooled + n * channels + c, s / static_cast<float>(pixels));
    });
  }
}

template <class Y>
void pool_gradient(const float* dpooled, const Y* y, Affine in, const float* centre, Y* g, int pixels, int channels, int64_t begin,
                   int64_t end, Sums sums) {
  for (int64_t n = begin; n < end; ++n) {
    by_channels(channels, [&](auto kind, int64_t c) __attribute__((always_inline)) {
      using V = decltype(kind);
      const V share = get<V>(dpooled + n * channels + c) / static_cast<float>(pixels);
      V s = kind, q = kind;
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t at = (n * pixels + i) * channels + c;
        const V here = get<V>(y + at);
        const V v = masked(share, here * get<V>(in.scale + c) + get<V>(in.shift + c));
        put(g + at, v);
        s += v;
        q += v * (here - get<V>(centre + c));
      }
      add_to(sums.first, s, c);
      add_to(sums.second, q, c);
    });
  }
}
