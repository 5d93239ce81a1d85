#include "passes.h"

#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <type_traits>

namespace mbv2 {
namespace {

std::vector<std::unique_ptr<Arena>>& arenas() {
  static std::vector<std::unique_ptr<Arena>> all;  // used under the pool's turn
  return all;
}

// From the scale as it is stored, so that its rounding does not move the mean.
float shift_of(float beta, double mean, float scale) { return static_cast<float>(beta - mean * static_cast<double>(scale)); }

constexpr int kStemWindow = 32;  // columns of the stem's weight gradient, 27 of them used

}  // namespace

float* Memory::floats(size_t count) {
  auto& all = arenas();
  if (at_ == all.size()) all.emplace_back(new Arena);
  float* data = all[at_++]->reserve(count);
  if (!data) throw std::bad_alloc();
  return data;
}

float* Memory::channels(int count) {
  float* data = floats(padded_channels(count));
  std::memset(data, 0, sizeof(float) * padded_channels(count));
  return data;
}

Passes::Passes() : vector(vector_code()), workers_(Pool::instance().size()) {}

void Passes::parallel(int64_t total, int64_t grain, const std::function<void(int, int64_t, int64_t)>& job) {
  std::vector<std::exception_ptr> failures(workers_);
  Pool::instance().run([&](int worker) {
    const Range r = part(total, worker, workers_, grain);
    try {
      if (r.begin < r.end) job(worker, r.begin, r.end);
    } catch (...) {  // out of memory: told to the caller, on its own thread
      failures[worker] = std::current_exception();
    }
  });
  for (const auto& failure : failures)
    if (failure) std::rethrow_exception(failure);
}

float* Passes::scratch(int worker, int64_t floats) {
  float* data = Pool::instance().arena(worker).reserve(floats);
  if (!data) throw std::bad_alloc();
  return data;
}

template <class Y>
const float* Passes::pack(const float* w, int64_t k_stride, int64_t n_stride, int depth, int columns, const float* scale) {
  const auto pack = std::is_same_v<Y, bfloat16> ? vector.pack_bfloat16 : vector.pack;
  float* packed = memory.floats(vector.packed_size(depth, columns) + 16);
  parallel(vector.panels(columns), 1, [&](int, int64_t begin, int64_t end) {
    pack(w, k_stride, n_stride, depth, columns, scale, packed, static_cast<int>(begin), static_cast<int>(end));
  });
  return packed;
}

float* Passes::depthwise_weights(const float* w, int channels, const float* scale) {
  float* out = memory.floats(9L * channels);
  for (int k = 0; k < 9; ++k)
    for (int c = 0; c < channels; ++c) out[static_cast<int64_t>(k) * channels + c] = w[c * 9 + k] * (scale ? scale[c] : 1.0f);
  return out;
}

const float* Passes::pixel_values(const float* mean, const float* scale) {
  float* out = memory.floats(256 * 3);
  for (int v = 0; v < 256; ++v)
    for (int c = 0; c < 3; ++c) out[v * 3 + c] = (static_cast<float>(v) - mean[c]) * scale[c];
  return out;
}

const float* Passes::stem_weights(const float* w, int outputs, const float* scale) {
  float* ordered = memory.floats(static_cast<size_t>(kStemDepth) * outputs);  // (27, outputs)
  for (int o = 0; o < outputs; ++o)
    for (int c = 0; c < 3; ++c)
      for (int k = 0; k < 9; ++k) ordered[(k * 3L + c) * outputs + o] = w[(o * 3L + c) * 9 + k];
  return pack(ordered, outputs, 1, kStemDepth, outputs, scale);
}

void Passes::prepare(Norm& norm, float eps) {
  const int n = norm.channels;
  norm.mean = memory.channels(n);
  norm.inverse = memory.channels(n);
  norm.scale = memory.channels(n);
  norm.shift = memory.channels(n);
  for (int c = 0; c < n; ++c) {
    const double inverse = 1.0 / std::sqrt(static_cast<double>(norm.moving_variance[c]) + eps);
    norm.mean[c] = norm.moving_mean[c];
    norm.inverse[c] = static_cast<float>(inverse);
    norm.scale[c] = static_cast<float>(norm.gamma[c] * inverse);
    norm.shift[c] = shift_of(norm.beta[c], norm.moving_mean[c], norm.scale[c]);
  }
}

void Passes::finish(Norm& norm, const Totals& sums, const float* centre, int64_t rows, const NormOptions& options, float* new_mean,
                   float* new_variance) {
  const double count = static_cast<double>(rows);
  // MindSpore keeps the unbiased variance; of a single value there is none, and the biased one (0) is kept.
  const double unbiased = rows > 1 ? count / (count - 1) : 1.0;
  const double keep = options.momentum;
  for (int c = 0; c < norm.channels; ++c) {
    const double offset = sums.first[c] / count;
    double variance = sums.second[c] / count - offset * offset;
    if (variance < 0) variance = 0;  // NaN stays
    const double mean = centre[c] + offset, inverse = 1.0 / std::sqrt(variance + options.eps);
    norm.mean[c] = static_cast<float>(mean);
    norm.inverse[c] = static_cast<float>(inverse);
    // A single value is its own mean: beta is left of it, and no gradient. Its scale would only let rounding through.
    norm.scale[c] = rows > 1 ? static_cast<float>(norm.gamma[c] * inverse) : 0.0f;
    norm.shift[c] = shift_of(norm.beta[c], mean, norm.scale[c]);
    new_mean[c] = static_cast<float>(keep * norm.moving_mean[c] + (1 - keep) * mean);
    new_variance[c] = static_cast<float>(keep * norm.moving_variance[c] + (1 - keep) * variance * unbiased);
  }
}

template <class G, class Y>
OutputGradient<G, Y> Passes::gradient(const Norm& norm, const Totals& sums, int64_t rows, bool frozen, const G* g, const Y* y, float* dgamma,
                                      float* dbeta) {
  const int n = norm.channels;
  float *b = memory.channels(n), *shift = memory.channels(n);
  const double count = static_cast<double>(rows);
  for (int c = 0; c < n; ++c) {
    const double inverse = norm.inverse[c], scale = norm.scale[c];
    dbeta[c] = static_cast<float>(sums.first[c]);
    dgamma[c] = static_cast<float>(sums.second[c] * inverse);
    b[c] = static_cast<float>(-scale * inverse * inverse * sums.second[c] / count);
    shift[c] = static_cast<float>(-scale * sums.first[c] / count);
  }
  return {g, y, norm.scale, frozen ? nullptr : b, norm.mean, shift};
}

OutputGradient<> Passes::plain_gradient(const float* g, int channels) {
  float* one = memory.channels(channels);
  for (int c = 0; c < channels; ++c) one[c] = 1.0f;
  return {g, g, one, nullptr, nullptr, nullptr};
}

Totals Passes::gather(int channels, const std::function<void(const std::function<Sums(int)>&)>& body) {
  const int64_t stride = 2L * static_cast<int64_t>(padded_channels(channels));
  double* all = memory.doubles(stride * workers_);
  std::memset(all, 0, sizeof(double) * stride * workers_);
  body([&](int worker) { return Sums{all + worker * stride, all + worker * stride + stride / 2}; });
  Totals totals{std::vector<double>(channels), std::vector<double>(channels)};
  for (int worker = 0; worker < workers_; ++worker) {
    const double* from = all + worker * stride;
    for (int c = 0; c < channels; ++c) {
      totals.first[c] += from[c];
      totals.second[c] += from[stride / 2 + c];
    }
  }
  return totals;
}

float* Passes::partial(int64_t floats) {
  float* all = memory.floats(floats * workers_);
  parallel(workers_, 1, [&](int, int64_t begin, int64_t end) {
    std::memset(all + begin * floats, 0, sizeof(float) * floats * (end - begin));
  });
  return all;
}

void Passes::reduce(const float* partials, int64_t floats, float* to) {
  parallel(floats, 1024, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = partials[i];
      for (int worker = 1; worker < workers_; ++worker) sum += partials[worker * floats + i];
      to[i] = sum;
    }
  });
}

template <class X, class Y>
void Passes::pointwise(Pointwise<X, Y> p, int64_t rows, Totals* sums, float* centre) {
  const int64_t floats = vector.pointwise_scratch(p.inputs, p.outputs);
  if (sums) {  // around one row's values: no cancellation however far the mean lies from zero
    Pointwise<X, Y> one = p;
    one.x = p.x + rows / 2 * p.inputs;
    one.y = memory.values<Y>(p.outputs);
    vector.pointwise.template of<Forward<Pointwise<X, Y>>>()(one, 0, 1, scratch(0, floats), Sums{});
    for (int c = 0; c < p.outputs; ++c) centre[c] = value(one.y[c]);
  }
  p.centre = centre;
  const auto all = [&](const std::function<Sums(int)>& of) {
    parallel(rows, 48, [&](int worker, int64_t begin, int64_t end) {
      vector.pointwise.template of<Forward<Pointwise<X, Y>>>()(p, begin, end, scratch(worker, floats), of(worker));
    });
  };
  if (sums) *sums = gather(p.outputs, all);
  else all([](int) { return Sums{}; });
}

template <class T>
void Passes::depthwise(Depthwise<T> p, Totals* sums, float* centre) {
  const int64_t floats = vector.depthwise_scratch(p.width, p.out_width, p.channels), rows = static_cast<int64_t>(p.images) * p.out_height;
  const auto filter = vector.depthwise.template of<Forward<Depthwise<T>>>();
  if (sums) {  // around one pixel's values, from the middle of the first image
    const int64_t row = p.out_height / 2;
    filter(p, row, row + 1, scratch(0, floats), Sums{});
    for (int c = 0; c < p.channels; ++c) centre[c] = value(p.y[(row * p.out_width + p.out_width / 2) * p.channels + c]);
  }
  p.centre = centre;
  const auto all = [&](const std::function<Sums(int)>& of) {
    parallel(rows, 1, [&](int worker, int64_t begin, int64_t end) {
      filter(p, begin, end, scratch(worker, floats), of(worker));
    });
  };
  if (sums) *sums = gather(p.channels, all);
  else all([](int) { return Sums{}; });
}

template <class Y>
void Passes::stem(Stem<Y> p, Totals* sums, float* centre) {
  const int64_t floats = vector.stem_scratch(p.width, p.out_width, p.outputs), rows = static_cast<int64_t>(p.images) * p.out_height;
  const auto convolve = vector.stem.template of<Forward<Stem<Y>>>();
  if (sums) {  // around one pixel's values, likewise
    const int64_t row = p.out_height / 2;
    convolve(p, row, row + 1, scratch(0, floats), Sums{});
    for (int c = 0; c < p.outputs; ++c) centre[c] = value(p.y[(row * p.out_width + p.out_width / 2) * p.outputs + c]);
  }
  p.centre = centre;
  const auto all = [&](const std::function<Sums(int)>& of) {
    parallel(rows, 1, [&](int worker, int64_t begin, int64_t end) {
      convolve(p, begin, end, scratch(worker, floats), of(worker));
    });
  };
  if (sums) *sums = gather(p.outputs, all);
  else all([](int) { return Sums{}; });
}

void Passes::moments(const float* y, int channels, int64_t rows, Totals& sums, float* centre) {
  std::memcpy(centre, y + rows / 2 * channels, sizeof(float) * channels);
  sums = gather(channels, [&](const std::function<Sums(int)>& of) {
    parallel(rows, 32, [&](int worker, int64_t begin, int64_t end) { vector.moments(y, centre, channels, begin, end, of(worker)); });
  });
}

template <class Y>
void Passes::affine(const Y* y, Affine in, const float* residual, float* z, int channels, int64_t rows) {
  parallel(rows, 32, [&](int, int64_t begin, int64_t end) {
    vector.affine.template of<AffineOf<Y>>()(y, in, residual, z, channels, begin, end);
  });
}

template <class G, class Y, class X>
void Passes::pointwise_gradient(PointwiseGradient<G, Y, X> p, int64_t rows, float* dw, Totals* sums) {
  const int64_t floats = vector.pointwise_scratch(p.inputs, p.outputs), size = static_cast<int64_t>(p.inputs) * p.outputs;
  float* partials = dw ? partial(size) : nullptr;
  const auto all = [&](const std::function<Sums(int)>& of) {
    parallel(rows, 48, [&](int worker, int64_t begin, int64_t end) {
      vector.pointwise_gradient.template of<Backward<PointwiseGradient<G, Y, X>>>()(
          p, begin, end, scratch(worker, floats), dw ? partials + worker * size : nullptr, of(worker));
    });
  };
  if (sums) *sums = gather(p.inputs, all);
  else all([](int) { return Sums{}; });
  if (dw) reduce(partials, size, dw);
}

template <class T>
void Passes::depthwise_gradient(DepthwiseGradient<T> p, float* dw, Totals* sums) {
  const Depthwise<T>& d = p.shape;
  const int64_t floats = vector.depthwise_scratch(d.width, d.out_width, d.channels), size = 9L * d.channels, rows = static_cast<int64_t>(d.images) * d.height;
  float* partials = dw ? partial(size) : nullptr;
  const auto all = [&](const std::function<Sums(int)>& of) {
    parallel(rows, 1, [&](int worker, int64_t begin, int64_t end) {
      vector.depthwise_gradient.template of<Backward<DepthwiseGradient<T>>>()(
          p, begin, end, scratch(worker, floats), dw ? partials + worker * size : nullptr, of(worker));
    });
  };
  if (sums) *sums = gather(d.channels, all);
  else all([](int) { return Sums{}; });
  if (!dw) return;
  for (int c = 0; c < d.channels; ++c) {
    for (int k = 0; k < 9; ++k) {
      float sum = 0;
      for (int worker = 0; worker < workers_; ++worker) sum += partials[worker * size + static_cast<int64_t>(k) * d.channels + c];
      dw[c * 9 + k] = sum;
    }
  }
}

template <class Y>
void Passes::stem_gradient(const Stem<Y>& p, const OutputGradient<Y, Y>& out, float* dw) {
  const int64_t floats = vector.stem_scratch(p.width, p.out_width, p.outputs), size = static_cast<int64_t>(kStemWindow) * p.outputs;
  const int64_t rows = static_cast<int64_t>(p.images) * p.out_height;
  float* partials = partial(size);
  parallel(rows, 1, [&](int worker, int64_t begin, int64_t end) {
    vector.stem_gradient.template of<StemBackward<Y>>()(p, out, begin, end, scratch(worker, floats), partials + worker * size);
  });
  for (int o = 0; o < p.outputs; ++o) {
    for (int c = 0; c < 3; ++c) {
      for (int k = 0; k < 9; ++k) {
        float sum = 0;
        for (int worker = 0; worker < workers_; ++worker) sum += partials[worker * size + o * kStemWindow + k * 3 + c];
        dw[(o * 3L + c) * 9 + k] = sum;
      }
    }
  }
}

template <class Y>
void Passes::gradient_sums(const float* g, const Y* y, Affine mask, const float* mean, float* masked, int channels, int64_t rows,
                           Totals& sums) {
  sums = gather(channels, [&](const std::function<Sums(int)>& of) {
    parallel(rows, 32, [&](int worker, int64_t begin, int64_t end) {
      vector.gradient_sums.template of<GradientSums<Y>>()(g, y, mask, mean, masked, channels, begin, end, of(worker));
    });
  });
}

void Passes::output_gradient(const OutputGradient<>& out, float* d, int channels, int64_t rows) {
  parallel(rows, 32, [&](int, int64_t begin, int64_t end) { vector.output_gradient(out, d, channels, begin, end); });
}

template <class Y>
void Passes::pool_gradient(const float* dpooled, const Y* y, const Norm& norm, Y* g, int images, int pixels, Totals& sums) {
  sums = gather(norm.channels, [&](const std::function<Sums(int)>& of) {
    parallel(images, 1, [&](int worker, int64_t begin, int64_t end) {
      vector.pool_gradient.template of<PoolBackward<Y>>()(dpooled, y, norm.affine(true), norm.mean, g, pixels, norm.channels, begin, end,
                                                          of(worker));
    });
  });
}

template <class T>
void Passes::block(const BlockInference<T>& p) {
  const int64_t floats = vector.block_scratch.template of<int64_t (*)(const BlockInference<T>&)>()(p);
  parallel(static_cast<int64_t>(p.depthwise.images) * p.depthwise.out_height, 1, [&](int worker, int64_t begin, int64_t end) {
    vector.block.template of<BlockOf<T>>()(p, begin, end, scratch(worker, floats));
  });
}

template <class Y>
void Passes::pool(const Y* y, Affine in, float* pooled, int images, int pixels, int channels) {
  parallel(images, 1, [&](int, int64_t begin, int64_t end) {
    vector.pool.template of<PoolOf<Y>>()(y, in, pooled, pixels, channels, begin, end);
  });
}

void Passes::add(const float* a, const float* b, float* c, int64_t count) {
  parallel(count, 8, [&](int, int64_t begin, int64_t end) { vector.add(a, b, c, begin, end); });
}

Window window_of(int height, int width, int stride, bool same) {
  const auto before = [&](int size) {
    if (!same) return 1;
    const int total = ((size + stride - 1) / stride - 1) * stride + 3 - size;
    return total > 0 ? total / 2 : 0;
  };
  return {(height + stride - 1) / stride, (width + stride - 1) / stride, before(height), before(width)};
}

// Float32 throughout, and with bfloat16 within a block.
template const float* Passes::pack<float>(const float*, int64_t, int64_t, int, int, const float*);
template const float* Passes::pack<bfloat16>(const float*, int64_t, int64_t, int, int, const float*);
template OutputGradient<> Passes::gradient(const Norm&, const Totals&, int64_t, bool, const float*, const float*, float*, float*);
template OutputGradient<float, bfloat16> Passes::gradient(const Norm&, const Totals&, int64_t, bool, const float*, const bfloat16*, float*,
                                                          float*);
template OutputGradient<bfloat16, bfloat16> Passes::gradient(const Norm&, const Totals&, int64_t, bool, const bfloat16*, const bfloat16*,
                                                             float*, float*);
template void Passes::pointwise(Pointwise<>, int64_t, Totals*, float*);
template void Passes::pointwise(Pointwise<float, bfloat16>, int64_t, Totals*, float*);
template void Passes::pointwise(Pointwise<bfloat16, bfloat16>, int64_t, Totals*, float*);
template void Passes::pointwise_gradient(PointwiseGradient<>, int64_t, float*, Totals*);
template void Passes::pointwise_gradient(PointwiseGradient<float, bfloat16, bfloat16>, int64_t, float*, Totals*);
template void Passes::pointwise_gradient(PointwiseGradient<bfloat16, bfloat16, float>, int64_t, float*, Totals*);
#define FOR_EACH_TYPE(T)                                                                                                      \
  template void Passes::depthwise(Depthwise<T>, Totals*, float*);                                                             \
  template void Passes::stem(Stem<T>, Totals*, float*);                                                                       \
  template void Passes::affine(const T*, Affine, const float*, float*, int, int64_t);                                         \
  template void Passes::depthwise_gradient(DepthwiseGradient<T>, float*, Totals*);                                            \
  template void Passes::stem_gradient(const Stem<T>&, const OutputGradient<T, T>&, float*);                                   \
  template void Passes::gradient_sums(const float*, const T*, Affine, const float*, float*, int, int64_t, Totals&);           \
  template void Passes::pool_gradient(const float*, const T*, const Norm&, T*, int, int, Totals&);                            \
  template void Passes::pool(const T*, Affine, float*, int, int, int);                                                        \
  template void Passes::block(const BlockInference<T>&);
FOR_EACH_TYPE(float)
FOR_EACH_TYPE(bfloat16)
#undef FOR_EACH_TYPE

}  // namespace mbv2
