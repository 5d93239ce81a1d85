// The passes that operators are made of: each runs one piece of vector code on all workers and puts their sums together in
// the order of the workers, so that the result does not depend on which finished first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "instruction_set.h"
#include "pool.h"

namespace mbv2 {

// Channel vectors are read in whole wide vectors: room for the last.
inline size_t padded_channels(int channels) { return (static_cast<size_t>(channels) + 15) / 16 * 16; }

// Memory of one operator call: its k-th request is served by the k-th arena, which is kept for the next call.
class Memory {
 public:
  float* floats(size_t count);  // throws std::bad_alloc
  template <class T>
  T* values(size_t count) { return reinterpret_cast<T*>(floats((count * sizeof(T) + sizeof(float) - 1) / sizeof(float))); }
  double* doubles(size_t count) { return reinterpret_cast<double*>(floats(2 * count)); }
  float* channels(int count);   // zeroed

 private:
  size_t at_ = 0;
};

// One BatchNorm between a convolution and its reader.
struct Norm {
  int channels = 0;
  const float *gamma = nullptr, *beta = nullptr, *moving_mean = nullptr, *moving_variance = nullptr;
  float *mean = nullptr, *inverse = nullptr, *scale = nullptr, *shift = nullptr;  // inverse: 1 / sqrt(variance + eps)
  Affine affine(bool relu6) const { return {scale, shift, relu6}; }
};

struct NormOptions {
  float eps = 1e-5f, momentum = 0.9f;
  bool frozen = false;  // the moving statistics are used and kept
};

struct Totals {  // per channel, of all workers
  std::vector<double> first, second;
};

class Passes {
 public:
  Passes();
  Memory memory;
  const InstructionSet& vector;

  void parallel(int64_t total, int64_t grain, const std::function<void(int worker, int64_t begin, int64_t end)>& job);
  float* scratch(int worker, int64_t floats);

  // (depth, columns) with element (k, n) at w[k * k_stride + n * n_stride], times scale[n].
  // For products in which nothing or something is stored as bfloat16.
  template <class Y = float>
  const float* pack(const float* w, int64_t k_stride, int64_t n_stride, int depth, int columns, const float* scale = nullptr);
  // (C, 3, 3) -> (9, C), times scale.
  float* depthwise_weights(const float* w, int channels, const float* scale = nullptr);
  const float* pixel_values(const float* mean, const float* scale);
  // (O, 3, 3, 3) in the order of a window, packed.
  const float* stem_weights(const float* w, int outputs, const float* scale = nullptr);

  // Allocates the norm's vectors, and fills them from the moving statistics.
  void prepare(Norm& norm, float eps);
  // Fills them from the batch's sums around `centre`, and gives the new moving statistics.
  void finish(Norm& norm, const Totals& sums, const float* centre, int64_t rows, const NormOptions&, float* new_mean, float* new_variance);
  // dgamma, dbeta, and the gradient at the convolution's output, from sums of g and g * (y - mean).
  template <class G, class Y>
  OutputGradient<G, Y> gradient(const Norm& norm, const Totals& sums, int64_t rows, bool frozen, const G* g, const Y* y, float* dgamma,
                                float* dbeta);
  OutputGradient<> plain_gradient(const float* g, int channels);

  // Forward. With `sums` (and the operation's centre set by these functions), the moments of y.
  template <class X, class Y>
  void pointwise(Pointwise<X, Y> p, int64_t rows, Totals* sums, float* centre);
  template <class T>
  void depthwise(Depthwise<T> p, Totals* sums, float* centre);
  template <class Y>
  void stem(Stem<Y> p, Totals* sums, float* centre);
  void moments(const float* y, int channels, int64_t rows, Totals& sums, float* centre);
  template <class Y>
  void affine(const Y* y, Affine in, const float* residual, float* z, int channels, int64_t rows);

  // Backward. dw: (outputs, inputs), (C, 3, 3), (O, 3, 3, 3) as the parameters lie.
  template <class G, class Y, class X>
  void pointwise_gradient(PointwiseGradient<G, Y, X> p, int64_t rows, float* dw, Totals* sums);
  template <class T>
  void depthwise_gradient(DepthwiseGradient<T> p, float* dw, Totals* sums);
  template <class Y>
  void stem_gradient(const Stem<Y>& p, const OutputGradient<Y, Y>& out, float* dw);
  template <class Y>
  void gradient_sums(const float* g, const Y* y, Affine mask, const float* mean, float* masked, int channels, int64_t rows, Totals& sums);
  void output_gradient(const OutputGradient<>& out, float* d, int channels, int64_t rows);
  template <class Y>
  void pool_gradient(const float* dpooled, const Y* y, const Norm& norm, Y* g, int images, int pixels, Totals& sums);

  template <class T>
  void block(const BlockInference<T>& p);
  template <class Y>
  void pool(const Y* y, Affine in, float* pooled, int images, int pixels, int channels);
  void add(const float* a, const float* b, float* c, int64_t count);

 private:
  Totals gather(int channels, const std::function<void(const std::function<Sums(int)>&)>& body);
  float* partial(int64_t floats);  // zeroed, one a worker
  void reduce(const float* partials, int64_t floats, float* to);
  int workers_;
};

// Sizes and padding of a 3x3 convolution; symmetric: 1 on each side; same: TensorFlow's.
struct Window {
  int out_height, out_width, pad_top, pad_left;
};
Window window_of(int height, int width, int stride, bool same);

}  // namespace mbv2
