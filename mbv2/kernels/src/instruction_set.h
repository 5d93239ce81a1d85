// What the operators and the vector code (vector.cc, compiled once per instruction set) share.
//
// Activations are channels-last: a tensor (N, H, W, C) is a matrix of N*H*W rows and C columns. Every channel count is a
// multiple of 8, as in every MobileNetV2. A convolution's output `y` is kept before BatchNorm; whoever reads it applies
// scale, shift and ReLU6 while loading, so that no normalised copy is ever stored. What blocks hand to each other is float32;
// the `y` between, and the gradients there, are float32 or bfloat16. All arithmetic is in float32.
#pragma once

#include <cstdint>
#include <cstring>

namespace mbv2 {

// The upper half of a float32.
struct bfloat16 {
  uint16_t bits;
};

inline float value(float v) { return v; }
inline float value(bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float whole;
  std::memcpy(&whole, &bits, sizeof whole);
  return whole;
}

// y -> y * scale + shift, then perhaps ReLU6. No scale: the tensor is used as it is.
struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
  bool relu6 = false;
};

// The gradient at a convolution's output, from the gradient g behind its BatchNorm: a * g + b * (y - mean) + c.
template <class G = float, class Y = float>
struct OutputGradient {
  const G* g = nullptr;
  const Y* y = nullptr;
  const float* a = nullptr;
  const float* b = nullptr;  // none: frozen statistics, or no BatchNorm: a * g
  const float* mean = nullptr;
  const float* c = nullptr;
};

// Where a worker adds its sums per channel: of v and v * v in the forward pass (v = y - centre), of g and g * (x - centre)
// in the backward pass. Null: not wanted.
struct Sums {
  double* first = nullptr;
  double* second = nullptr;
};

template <class X = float, class Y = float>
struct Pointwise {  // y (rows, outputs) = in(x (rows, inputs)) * weights
  const X* x = nullptr;
  Affine in;
  int inputs = 0, outputs = 0;
  const float* packed = nullptr;  // by `pack`, for this Y
  Y* y = nullptr;
  const float* centre = nullptr;  // of the sums
  const float* bias = nullptr;    // inference: y = relu6(product + bias) + residual
  bool relu6 = false;
  const float* residual = nullptr;
};

template <class G = float, class Y = float, class X = float>
struct PointwiseGradient {
  OutputGradient<G, Y> out;
  const X* x = nullptr;
  Affine in;
  int inputs = 0, outputs = 0;
  const float* packed = nullptr;      // the transposed weights; none: no gradient of the input is wanted
  X* dx = nullptr;                    // with in.relu6, already masked by it
  const float* residual = nullptr;    // added to dx
  const float* centre = nullptr;      // of the sums of dx, dx * (x - centre)
};

template <class T = float>
struct Depthwise {  // 3x3
  const T* x = nullptr;
  Affine in;
  int images = 0, height = 0, width = 0, channels = 0, out_height = 0, out_width = 0;
  int stride = 1, pad_top = 1, pad_left = 1;
  const float* weights = nullptr;  // (9, channels)
  T* y = nullptr;
  const float* centre = nullptr;
  const float* bias = nullptr;  // inference, as above
  bool relu6 = false;
};

template <class T = float>
struct DepthwiseGradient {
  OutputGradient<T, T> out;
  Depthwise<T> shape;  // x, in, sizes, weights
  T* dx = nullptr;     // masked by in.relu6
  const float* centre = nullptr;
};

template <class Y = float>
struct Stem {  // 3x3, stride 2, from uint8 (N, H, W, 3)
  const unsigned char* image = nullptr;
  const float* pixel = nullptr;  // (256, 3): the normalised value of each byte
  int images = 0, height = 0, width = 0, out_height = 0, out_width = 0, pad_top = 1, pad_left = 1, outputs = 0;
  const float* packed = nullptr;
  Y* y = nullptr;
  const float* centre = nullptr;
};

constexpr int kStemDepth = 27;  // in the order ky, kx, colour

template <class T = float>  // what 1x1 convolutions multiply, where the processor can
struct BlockInference {  // one image's inverted residual in bands of rows, the hidden layer never leaving the cache
  bool stem = false;
  Stem<> first_stem;
  const float* x = nullptr;
  int inputs = 0, hidden = 0, outputs = 0;
  const float* expand = nullptr;   // packed, BatchNorm folded in
  const float* expand_bias = nullptr;
  Depthwise<> depthwise;           // sizes, weights, bias
  const float* project = nullptr;  // packed
  const float* project_bias = nullptr;
  bool residual = false;
  float* z = nullptr;
};

// In the order of SLOTS in mbv2/training/optimizer.py.
enum class Rule : int32_t { kSgd, kNesterov, kAdamw, kRmsprop, kCount };

struct Update {  // one step of an optimizer for one weight
  Rule rule = Rule::kSgd;
  float rate = 0, decay = 0;
  float first = 0, second = 0, epsilon = 0;  // momentum or beta1; RMSProp's decay or beta2
  float rest_of_first = 0, rest_of_second = 0;  // 1 - first, 1 - second
  float mean_correction = 1, square_correction = 1;
};

// The kinds of functions. Each works on part [begin, end) of the rows that its comment names; `scratch` belongs to the worker.
template <class P>
using Forward = void (*)(const P&, int64_t begin, int64_t end, float* scratch, Sums);
template <class P>
using Backward = void (*)(const P&, int64_t begin, int64_t end, float* scratch, float* dw, Sums);
template <class T>
using BlockOf = void (*)(const BlockInference<T>&, int64_t begin, int64_t end, float* scratch);
template <class Y>
using StemBackward = void (*)(const Stem<Y>&, const OutputGradient<Y, Y>&, int64_t begin, int64_t end, float* scratch, float* dw);
template <class Y>
using AffineOf = void (*)(const Y* y, Affine, const float* residual, float* z, int channels, int64_t begin, int64_t end);
template <class Y>
using GradientSums = void (*)(const float* g, const Y* y, Affine mask, const float* centre, float* masked, int channels, int64_t begin,
                              int64_t end, Sums);
template <class Y>
using PoolOf = void (*)(const Y* y, Affine in, float* pooled, int pixels, int channels, int64_t begin, int64_t end);
template <class Y>
using PoolBackward = void (*)(const float* dpooled, const Y* y, Affine in, const float* centre, Y* g, int pixels, int channels, int64_t begin,
                              int64_t end, Sums);

// A function for each of several types, found by its own: of<Forward<Stem<float>>>().
template <class F>
struct One {
  F function;
};
template <class... F>
struct Each : One<F>... {
  template <class G>
  constexpr G of() const {
    return One<G>::function;
  }
};

// One instruction set's functions.
struct InstructionSet {
  const char* name;
  int lanes;
  int64_t (*packed_size)(int depth, int columns);
  // Panels [p0, p1) of the matrix with element (k, n) at w[k * k_stride + n * n_stride] * scale[n]; and for products that take
  // bfloat16 where the processor can.
  int (*panels)(int columns);
  void (*pack)(const float* w, int64_t k_stride, int64_t n_stride, int depth, int columns, const float* scale, float* packed, int p0,
               int p1);
  void (*pack_bfloat16)(const float* w, int64_t k_stride, int64_t n_stride, int depth, int columns, const float* scale, float* packed,
                        int p0, int p1);

  int64_t (*pointwise_scratch)(int inputs, int outputs);  // matrix rows
  Each<Forward<Pointwise<>>, Forward<Pointwise<float, bfloat16>>, Forward<Pointwise<bfloat16, bfloat16>>> pointwise;
  Each<Backward<PointwiseGradient<>>, Backward<PointwiseGradient<float, bfloat16, bfloat16>>,
             Backward<PointwiseGradient<bfloat16, bfloat16, float>>>
      pointwise_gradient;

  int64_t (*depthwise_scratch)(int width, int out_width, int channels);
  Each<Forward<Depthwise<>>, Forward<Depthwise<bfloat16>>> depthwise;  // output rows of all images
  // Input rows of all images; dw (9, channels) is added to. Null dx or dw: not wanted.
  Each<Backward<DepthwiseGradient<>>, Backward<DepthwiseGradient<bfloat16>>> depthwise_gradient;

  int64_t (*stem_scratch)(int width, int out_width, int outputs);
  Each<Forward<Stem<>>, Forward<Stem<bfloat16>>> stem;                        // output rows of all images
  Each<StemBackward<float>, StemBackward<bfloat16>> stem_gradient;            // dw (27, outputs)

  // Elementwise over matrix rows.
  Each<AffineOf<float>, AffineOf<bfloat16>> affine;
  void (*moments)(const float* y, const float* centre, int channels, int64_t begin, int64_t end, Sums);
  // Sums of g and g * (y - centre), g masked by mask.relu6 of y; the masked g is stored if `masked` is there.
  Each<GradientSums<float>, GradientSums<bfloat16>> gradient_sums;
  void (*output_gradient)(const OutputGradient<>&, float* d, int channels, int64_t begin, int64_t end);
  void (*add)(const float* a, const float* b, float* c, int64_t begin, int64_t end);  // single values, in eights
  // Changes w, m and (AdamW, RMSProp) s in place.
  void (*update)(const Update&, float* w, const float* g, float* m, float* s, int64_t begin, int64_t end);  // single values
  // Mean over the pixels of images [begin, end) of in(y), and the gradient of it, masked, with its sums.
  Each<PoolOf<float>, PoolOf<bfloat16>> pool;
  Each<PoolBackward<float>, PoolBackward<bfloat16>> pool_gradient;

  Each<int64_t (*)(const BlockInference<>&), int64_t (*)(const BlockInference<bfloat16>&)> block_scratch;
  Each<BlockOf<float>, BlockOf<bfloat16>> block;  // output rows of all images
};

const InstructionSet& vector_code();  // the best that this processor has

}  // namespace mbv2
