// What the operators and the vector code (vector.cc, compiled once per instruction set) share.
//
// Activations are float32 and channels-last: a tensor (N, H, W, C) is a matrix of N*H*W rows and C columns. Every channel
// count is a multiple of 8, as in every MobileNetV2. A convolution's output `y` is kept before BatchNorm; whoever reads it
// applies scale, shift and ReLU6 while loading, so that no normalised copy is ever stored.
#pragma once

#include <cstdint>

namespace mbv2 {

// y -> y * scale + shift, then perhaps ReLU6. No scale: the tensor is used as it is.
struct Affine {
  const float* scale = nullptr;
  const float* shift = nullptr;
  bool relu6 = false;
};

// The gradient at a convolution's output, from the gradient g behind its BatchNorm: a * g + b * (y - mean) + c.
struct OutputGradient {
  const float* g = nullptr;
  const float* y = nullptr;
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

struct Pointwise {  // y (rows, outputs) = in(x (rows, inputs)) * weights
  const float* x = nullptr;
  Affine in;
  int inputs = 0, outputs = 0;
  const float* packed = nullptr;  // by `pack`
  float* y = nullptr;
  const float* centre = nullptr;  // of the sums
  const float* bias = nullptr;    // inference: y = relu6(product + bias) + residual
  bool relu6 = false;
  const float* residual = nullptr;
};

struct PointwiseGradient {
  OutputGradient out;
  const float* x = nullptr;
  Affine in;
  int inputs = 0, outputs = 0;
  const float* packed = nullptr;      // the transposed weights; none: no gradient of the input is wanted
  float* dx = nullptr;                // with in.relu6, already masked by it
  const float* residual = nullptr;    // added to dx
  const float* centre = nullptr;      // of the sums of dx, dx * (x - centre)
};

struct Depthwise {  // 3x3
  const float* x = nullptr;
  Affine in;
  int images = 0, height = 0, width = 0, channels = 0, out_height = 0, out_width = 0;
  int stride = 1, pad_top = 1, pad_left = 1;
  const float* weights = nullptr;  // (9, channels)
  float* y = nullptr;
  const float* centre = nullptr;
  const float* bias = nullptr;  // inference, as above
  bool relu6 = false;
};

struct DepthwiseGradient {
  OutputGradient out;
  Depthwise shape;      // x, in, sizes, weights
  float* dx = nullptr;  // masked by in.relu6
  const float* centre = nullptr;
};

struct Stem {  // 3x3, stride 2, from uint8 (N, H, W, 3)
  const unsigned char* image = nullptr;
  const float* pixel = nullptr;  // (256, 3): the normalised value of each byte
  int images = 0, height = 0, width = 0, out_height = 0, out_width = 0, pad_top = 1, pad_left = 1, outputs = 0;
  const float* packed = nullptr;
  float* y = nullptr;
  const float* centre = nullptr;
  const float* bias = nullptr;
  bool relu6 = false;
};

constexpr int kStemDepth = 27;  // in the order ky, kx, colour

struct BlockInference {  // one image's inverted residual in bands of rows, the hidden layer never leaving the cache
  bool stem = false;
  Stem first_stem;
  const float* x = nullptr;
  int inputs = 0, hidden = 0, outputs = 0;
  const float* expand = nullptr;   // packed, BatchNorm folded in
  const float* expand_bias = nullptr;
  Depthwise depthwise;             // sizes, weights, bias
  const float* project = nullptr;  // packed
  const float* project_bias = nullptr;
  bool residual = false;
  float* z = nullptr;
};

// One instruction set's functions. Each works on part [begin, end) of the rows it names; `scratch` belongs to the worker.
struct InstructionSet {
  const char* name;
  int lanes;
  int64_t (*packed_size)(int depth, int columns);
  // Panels [p0, p1) of the matrix with element (k, n) at w[k * k_stride + n * n_stride] * scale[n].
  int (*panels)(int columns);
  void (*pack)(const float* w, int64_t k_stride, int64_t n_stride, int depth, int columns, const float* scale, float* packed, int p0,
               int p1);

  int64_t (*pointwise_scratch)(int inputs, int outputs);
  void (*pointwise)(const Pointwise&, int64_t begin, int64_t end, float* scratch, Sums);            // matrix rows
  void (*pointwise_gradient)(const PointwiseGradient&, int64_t begin, int64_t end, float* scratch, float* dw, Sums);

  int64_t (*depthwise_scratch)(const Depthwise&);
  void (*depthwise)(const Depthwise&, int64_t begin, int64_t end, float* scratch, Sums);            // output rows of all images
  // Input rows of all images; dw (9, channels) is added to. Null dx or dw: not wanted.
  void (*depthwise_gradient)(const DepthwiseGradient&, int64_t begin, int64_t end, float* scratch, float* dw, Sums);

  int64_t (*stem_scratch)(const Stem&);
  void (*stem)(const Stem&, int64_t begin, int64_t end, float* scratch, Sums);                      // output rows of all images
  void (*stem_gradient)(const Stem&, const OutputGradient&, int64_t begin, int64_t end, float* scratch, float* dw);  // dw (27, outputs)

  // Elementwise over matrix rows.
  void (*affine)(const float* y, Affine, const float* residual, float* z, int channels, int64_t begin, int64_t end);
  void (*moments)(const float* y, const float* centre, int channels, int64_t begin, int64_t end, Sums);
  // Sums of g and g * (y - centre), g masked by mask.relu6 of y; the masked g is stored if `masked` is there.
  void (*gradient_sums)(const float* g, const float* y, Affine mask, const float* centre, float* masked, int channels, int64_t begin,
                        int64_t end, Sums);
  void (*output_gradient)(const OutputGradient&, float* d, int channels, int64_t begin, int64_t end);
  void (*add)(const float* a, const float* b, float* c, int64_t begin, int64_t end);                // single values, in eights
  // Mean over the pixels of images [begin, end) of in(y), and the gradient of it, masked, with its sums.
  void (*pool)(const float* y, Affine in, float* pooled, int pixels, int channels, int64_t begin, int64_t end);
  void (*pool_gradient)(const float* dpooled, const float* y, Affine in, const float* centre, float* g, int pixels, int channels,
                        int64_t begin, int64_t end, Sums);

  int64_t (*block_scratch)(const BlockInference&);
  void (*block)(const BlockInference&, int64_t begin, int64_t end, float* scratch);                 // output rows of all images
};

const InstructionSet& vector_code();  // the best that this processor has

}  // namespace mbv2
