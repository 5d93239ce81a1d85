// The operators as MindSpore's ops.Custom("<library>:<name>", ..., "aot") calls them: inputs then outputs, checked.
//
// Layouts: activations (N, H, W, C), weights as the parameters lie (OIHW). `switches` is int32 (8): kind, stride, TensorFlow
// padding, residual, frozen statistics. `numbers` is float32 (8): eps, momentum, three pixel means, three pixel scales.
// `saved` is float32 (4, C): mean, 1 / sqrt(variance + eps), scale, shift of one BatchNorm.
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "call.h"
#include "passes.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace mbv2 {
namespace {

thread_local std::string last_error;

int guarded(void (*body)(Call&), const char* name, int n, void** data, int* ndims, int64_t** shapes, const char** dtypes) {
  try {
    std::lock_guard<std::mutex> turn(Pool::instance().turn());
    Call call(name, n, data, ndims, shapes, dtypes);
    body(call);
    return 0;
  } catch (const Refused& refused) {
    last_error = refused.what();
    return 1;
  } catch (const std::bad_alloc&) {
    last_error = std::string(name) + ": out of memory";
    return 2;
  } catch (const std::exception& error) {  // none may cross the C interface
    last_error = std::string(name) + ": " + error.what();
    return 3;
  }
}

#define OPERATOR(NAME)                                                                                            \
  void NAME##_body(Call& call);                                                                                   \
  }                                                                                                               \
  EXPORT int mbv2_##NAME(int n, void** data, int* ndims, int64_t** shapes, const char** dtypes, void*, void*) {   \
    return guarded(NAME##_body, #NAME, n, data, ndims, shapes, dtypes);                                           \
  }                                                                                                               \
  namespace {                                                                                                     \
  void NAME##_body(Call& call)

enum Kind { kStem = 0, kExpand = 1 };

struct Options {
  int kind, stride;
  bool same, residual;
  NormOptions norm;
  const float *pixel_mean, *pixel_scale;
};

Options read_options(Call& call) {
  const int32_t* s = call.exactly<int32_t>("switches", {8});
  const float* f = call.exactly<float>("numbers", {8});
  if (s[0] != kStem && s[0] != kExpand) call.refuse("kind must be 0 or 1, got " + std::to_string(s[0]));
  if (s[1] != 1 && s[1] != 2) call.refuse("stride must be 1 or 2, got " + std::to_string(s[1]));
  for (int i = 2; i < 5; ++i)
    if (s[i] != 0 && s[i] != 1) call.refuse("switch " + std::to_string(i) + " must be 0 or 1, got " + std::to_string(s[i]));
  if (!(f[0] > 0)) call.refuse("eps must be more than 0");
  return {s[0], s[1], s[2] == 1, s[3] == 1, {f[0], f[1], s[4] == 1}, f + 2, f + 5};
}

// An activation (N, H, W, C).
struct Map {
  const float* data = nullptr;
  int images = 0, height = 0, width = 0, channels = 0;
  long rows() const { return static_cast<long>(images) * height * width; }
};

Map read_map(Call& call, const char* what) {
  int64_t s[4];
  const float* data = call.next<float>(what, 4, s);
  return {data, static_cast<int>(s[0]), static_cast<int>(s[1]), static_cast<int>(s[2]), call.channels("channels", s[3])};
}

Norm read_norm(Call& call, int channels) {
  Norm norm;
  norm.channels = channels;
  norm.gamma = call.exactly<float>("gamma", {channels});
  norm.beta = call.exactly<float>("beta", {channels});
  norm.moving_mean = call.exactly<float>("moving mean", {channels});
  norm.moving_variance = call.exactly<float>("moving variance", {channels});
  return norm;
}

struct NormOutputs {
  float *saved, *mean, *variance;
};

void save(const Norm& norm, float* saved) {
  const float* rows[4] = {norm.mean, norm.inverse, norm.scale, norm.shift};
  for (int r = 0; r < 4; ++r) std::memcpy(saved + static_cast<long>(r) * norm.channels, rows[r], sizeof(float) * norm.channels);
}

Norm read_saved(Call& call, Steps& steps, int channels) {
  const float* saved = call.exactly<float>("saved", {4, channels});
  Norm norm;
  norm.channels = channels;
  float** rows[4] = {&norm.mean, &norm.inverse, &norm.scale, &norm.shift};
  for (int r = 0; r < 4; ++r) {
    *rows[r] = steps.memory.channels(channels);
    std::memcpy(*rows[r], saved + static_cast<long>(r) * channels, sizeof(float) * channels);
  }
  return norm;
}

// Runs `convolve(sums, centre)` and settles the BatchNorm behind it.
template <class Convolve>
void normalise(Steps& steps, Norm& norm, long rows, const NormOptions& options, const NormOutputs& out, Convolve convolve) {
  steps.prepare(norm, options.eps);
  if (options.frozen) {
    convolve(static_cast<Totals*>(nullptr), static_cast<float*>(nullptr));
    std::memcpy(out.mean, norm.moving_mean, sizeof(float) * norm.channels);
    std::memcpy(out.variance, norm.moving_variance, sizeof(float) * norm.channels);
  } else {
    float* centre = steps.memory.channels(norm.channels);
    Totals sums;
    convolve(&sums, centre);
    steps.finish(norm, sums, centre, rows, options, out.mean, out.variance);
  }
  save(norm, out.saved);
}

NormOutputs read_norm_outputs(Call& call, int channels, float* saved) {
  NormOutputs out{saved, nullptr, nullptr};
  out.mean = call.exactly<float>("new moving mean", {channels});
  out.variance = call.exactly<float>("new moving variance", {channels});
  return out;
}

Stem stem_of(Steps& steps, const unsigned char* image, const int64_t* shape, int outputs, const Options& o) {
  const Window w = window_of(static_cast<int>(shape[1]), static_cast<int>(shape[2]), 2, o.same);
  Stem p;
  p.image = image;
  p.pixel = steps.pixel_values(o.pixel_mean, o.pixel_scale);
  p.images = static_cast<int>(shape[0]);
  p.height = static_cast<int>(shape[1]);
  p.width = static_cast<int>(shape[2]);
  p.out_height = w.out_height;
  p.out_width = w.out_width;
  p.pad_top = w.pad_top;
  p.pad_left = w.pad_left;
  p.outputs = outputs;
  return p;
}

Depthwise depthwise_of(const Map& x, const Options& o, const float* weights) {
  const Window w = window_of(x.height, x.width, o.stride, o.same);
  Depthwise p;
  p.x = x.data;
  p.images = x.images;
  p.height = x.height;
  p.width = x.width;
  p.channels = x.channels;
  p.out_height = w.out_height;
  p.out_width = w.out_width;
  p.stride = o.stride;
  p.pad_top = w.pad_top;
  p.pad_left = w.pad_left;
  p.weights = weights;
  return p;
}

// What all three block operators begin with: the input, the three convolutions' weights and BatchNorms, the options (which
// lie behind them), and the sizes that follow.
struct Block {
  Options options;
  const unsigned char* image = nullptr;
  int64_t image_shape[4] = {};
  Map x, hidden, z;  // x of an expanding block; hidden: the depthwise filter's input
  const float *expand = nullptr, *depthwise = nullptr, *project = nullptr;
  Norm norms[3];
};

// The input, by its rank's last size: bytes of an image, or an activation.
void read_block_input(Call& call, bool stem, Block& b) {
  if (stem) {
    b.image = call.next<uint8_t>("image", 4, b.image_shape);
    if (b.image_shape[3] != 3) call.refuse("image must have 3 colours, got " + std::to_string(b.image_shape[3]));
  } else {
    b.x = read_map(call, "x");
  }
}

const float* read_first_weights(Call& call, bool stem, const Block& b, int64_t* hidden) {
  int64_t s[4];
  const float* w = call.next<float>("first weights", 4, s);
  const int64_t inputs = stem ? 3 : b.x.channels, size = stem ? 3 : 1;
  if (s[1] != inputs || s[2] != size || s[3] != size)
    call.refuse("first weights must be (*, " + std::to_string(inputs) + ", " + std::to_string(size) + ", " + std::to_string(size) + ")");
  *hidden = call.channels("hidden channels", s[0]);
  return w;
}

void finish_block(Call& call, bool stem, int hidden, int outputs, Block& b) {
  b.options = read_options(call);
  if ((b.options.kind == kStem) != stem) call.refuse("kind does not fit the operator");
  if (stem) {
    const Window w = window_of(static_cast<int>(b.image_shape[1]), static_cast<int>(b.image_shape[2]), 2, b.options.same);
    b.hidden = {nullptr, static_cast<int>(b.image_shape[0]), w.out_height, w.out_width, hidden};
  } else {
    b.hidden = {nullptr, b.x.images, b.x.height, b.x.width, hidden};
  }
  const Window w = window_of(b.hidden.height, b.hidden.width, b.options.stride, b.options.same);
  b.z = {nullptr, b.hidden.images, w.out_height, w.out_width, outputs};
  if (b.options.residual && (stem || b.options.stride != 1 || outputs != b.x.channels))
    call.refuse("a residual needs stride 1 and as many outputs as inputs");
}

Block read_block(Call& call, bool stem) {
  Block b;
  read_block_input(call, stem, b);
  int64_t hidden, s[4];
  b.expand = read_first_weights(call, stem, b, &hidden);
  b.norms[0] = read_norm(call, static_cast<int>(hidden));
  b.depthwise = call.exactly<float>("depthwise weights", {hidden, 1, 3, 3});
  b.norms[1] = read_norm(call, static_cast<int>(hidden));
  b.project = call.next<float>("projection weights", 4, s);
  if (s[1] != hidden || s[2] != 1 || s[3] != 1) call.refuse("projection weights must be (*, " + std::to_string(hidden) + ", 1, 1)");
  const int outputs = call.channels("outputs", s[0]);
  b.norms[2] = read_norm(call, outputs);
  finish_block(call, stem, static_cast<int>(hidden), outputs, b);
  return b;
}

template <class T>
T* read_like(Call& call, const char* what, const Map& m) {
  return call.exactly<T>(what, {m.images, m.height, m.width, m.channels});
}

void train_block(Call& call, bool stem) {
  Block b = read_block(call, stem);
  const Options& o = b.options;
  const int hidden = b.hidden.channels, outputs = b.z.channels;
  const Map filtered{nullptr, b.z.images, b.z.height, b.z.width, hidden};
  float* z = read_like<float>(call, "z", b.z);
  float* y1 = read_like<float>(call, "y1", b.hidden);
  float* y2 = read_like<float>(call, "y2", filtered);
  float* y3 = read_like<float>(call, "y3", b.z);
  float* saved[3];
  for (int i = 0; i < 3; ++i) saved[i] = call.exactly<float>("saved", {4, i < 2 ? hidden : outputs});
  NormOutputs out[3];
  for (int i = 0; i < 3; ++i) out[i] = read_norm_outputs(call, i < 2 ? hidden : outputs, saved[i]);
  call.done();

  Steps steps;
  normalise(steps, b.norms[0], b.hidden.rows(), o.norm, out[0], [&](Totals* sums, float* centre) {
    if (stem) {
      Stem p = stem_of(steps, b.image, b.image_shape, hidden, o);
      p.packed = steps.stem_weights(b.expand, hidden);
      p.y = y1;
      steps.stem(p, b.expand, sums, centre);
    } else {
      Pointwise p;
      p.x = b.x.data;
      p.inputs = b.x.channels;
      p.outputs = hidden;
      p.packed = steps.pack(b.expand, 1, b.x.channels, b.x.channels, hidden);
      p.y = y1;
      steps.pointwise(p, b.hidden.rows(), sums, centre);
    }
  });
  b.hidden.data = y1;
  normalise(steps, b.norms[1], filtered.rows(), o.norm, out[1], [&](Totals* sums, float* centre) {
    Depthwise p = depthwise_of(b.hidden, o, steps.depthwise_weights(b.depthwise, hidden));
    p.in = b.norms[0].affine(true);
    p.y = y2;
    steps.depthwise(p, sums, centre);
  });
  normalise(steps, b.norms[2], b.z.rows(), o.norm, out[2], [&](Totals* sums, float* centre) {
    Pointwise p;
    p.x = y2;
    p.in = b.norms[1].affine(true);
    p.inputs = hidden;
    p.outputs = outputs;
    p.packed = steps.pack(b.project, 1, hidden, hidden, outputs);
    p.y = y3;
    steps.pointwise(p, b.z.rows(), sums, centre);
  });
  steps.affine(y3, b.norms[2].affine(false), o.residual ? b.x.data : nullptr, z, outputs, b.z.rows());
}

struct ParameterGradients {
  float *weight, *gamma, *beta;
};

ParameterGradients read_gradients(Call& call, std::initializer_list<int64_t> weight, int channels) {
  ParameterGradients g;
  g.weight = call.exactly<float>("weight gradient", weight);
  g.gamma = call.exactly<float>("gamma gradient", {channels});
  g.beta = call.exactly<float>("beta gradient", {channels});
  return g;
}

void grad_block(Call& call, bool stem) {
  Steps steps;
  Block b;
  const Map dz = read_map(call, "dz");
  read_block_input(call, stem, b);
  const Map y1 = read_map(call, "y1"), y2 = read_map(call, "y2"), y3 = read_map(call, "y3");
  const int hidden = y1.channels, outputs = y3.channels;
  for (int i = 0; i < 3; ++i) b.norms[i] = read_saved(call, steps, i < 2 ? hidden : outputs);
  int64_t first;
  b.expand = read_first_weights(call, stem, b, &first);
  b.depthwise = call.exactly<float>("depthwise weights", {hidden, 1, 3, 3});
  b.project = call.exactly<float>("projection weights", {outputs, hidden, 1, 1});
  finish_block(call, stem, hidden, outputs, b);
  const auto same = [](const Map& m, const Map& n) {
    return m.images == n.images && m.height == n.height && m.width == n.width && m.channels == n.channels;
  };
  const Map filtered{nullptr, b.z.images, b.z.height, b.z.width, hidden};
  if (first != hidden || !same(y1, b.hidden) || !same(y2, filtered) || !same(y3, b.z) || !same(dz, b.z))
    call.refuse("the sizes of dz, y1, y2, y3 do not fit each other");
  float* dx = stem ? nullptr : read_like<float>(call, "dx", b.x);
  const int64_t inputs = stem ? 3 : b.x.channels, size = stem ? 3 : 1;
  const ParameterGradients d1 = read_gradients(call, {hidden, inputs, size, size}, hidden);
  const ParameterGradients d2 = read_gradients(call, {hidden, 1, 3, 3}, hidden);
  const ParameterGradients d3 = read_gradients(call, {outputs, hidden, 1, 1}, outputs);
  call.done();

  const Options& o = b.options;
  float* g1 = steps.memory.floats(y1.rows() * hidden);
  float* g2 = steps.memory.floats(y2.rows() * hidden);
  Totals sums;
  steps.gradient_sums(dz.data, y3.data, Affine{}, b.norms[2].mean, nullptr, outputs, dz.rows(), sums);
  {
    PointwiseGradient p;
    p.out = steps.gradient(b.norms[2], sums, dz.rows(), o.norm.frozen, dz.data, y3.data, d3.gamma, d3.beta);
    p.x = y2.data;
    p.in = b.norms[1].affine(true);
    p.inputs = hidden;
    p.outputs = outputs;
    p.packed = steps.pack(b.project, hidden, 1, outputs, hidden);
    p.dx = g2;
    p.centre = b.norms[1].mean;
    steps.pointwise_gradient(p, dz.rows(), d3.weight, &sums);
  }
  {
    DepthwiseGradient p;
    p.out = steps.gradient(b.norms[1], sums, y2.rows(), o.norm.frozen, g2, y2.data, d2.gamma, d2.beta);
    p.shape = depthwise_of(y1, o, steps.depthwise_weights(b.depthwise, hidden));
    p.shape.in = b.norms[0].affine(true);
    p.dx = g1;
    p.centre = b.norms[0].mean;
    steps.depthwise_gradient(p, d2.weight, &sums);
  }
  const OutputGradient out = steps.gradient(b.norms[0], sums, y1.rows(), o.norm.frozen, g1, y1.data, d1.gamma, d1.beta);
  if (stem) {
    steps.stem_gradient(stem_of(steps, b.image, b.image_shape, hidden, o), out, d1.weight);
    return;
  }
  PointwiseGradient p;
  p.out = out;
  p.x = b.x.data;
  p.inputs = b.x.channels;
  p.outputs = hidden;
  p.packed = steps.pack(b.expand, b.x.channels, 1, hidden, b.x.channels);
  p.dx = dx;
  p.residual = o.residual ? dz.data : nullptr;
  steps.pointwise_gradient(p, y1.rows(), d1.weight, nullptr);
}

const float* folded_bias(Steps& steps, Norm& norm, float eps) {
  steps.prepare(norm, eps);
  return norm.shift;
}

void infer_block(Call& call, bool stem) {
  Block b = read_block(call, stem);
  float* z = read_like<float>(call, "z", b.z);
  call.done();
  Steps steps;
  const Options& o = b.options;
  const int hidden = b.hidden.channels;
  BlockInference p;
  p.stem = stem;
  p.x = b.x.data;
  p.inputs = stem ? 8 : b.x.channels;
  p.hidden = hidden;
  p.outputs = b.z.channels;
  p.expand_bias = folded_bias(steps, b.norms[0], o.norm.eps);
  if (stem) {
    p.first_stem = stem_of(steps, b.image, b.image_shape, hidden, o);
    p.expand = steps.stem_weights(b.expand, hidden, b.norms[0].scale);
  } else {
    p.expand = steps.pack(b.expand, 1, b.x.channels, b.x.channels, hidden, b.norms[0].scale);
  }
  const float* bias = folded_bias(steps, b.norms[1], o.norm.eps);
  p.depthwise = depthwise_of(b.hidden, o, steps.depthwise_weights(b.depthwise, hidden, b.norms[1].scale));
  p.depthwise.bias = bias;
  p.depthwise.relu6 = true;
  p.project_bias = folded_bias(steps, b.norms[2], o.norm.eps);
  p.project = steps.pack(b.project, 1, hidden, hidden, b.z.channels, b.norms[2].scale);
  p.residual = o.residual;
  p.z = z;
  steps.block(p);
}

OPERATOR(stem_block_train) { train_block(call, true); }
OPERATOR(stem_block_grad) { grad_block(call, true); }
OPERATOR(stem_block_infer) { infer_block(call, true); }
OPERATOR(block_train) { train_block(call, false); }
OPERATOR(block_grad) { grad_block(call, false); }
OPERATOR(block_infer) { infer_block(call, false); }

// Head: 1x1 convolution, BatchNorm, ReLU6, mean over the pixels.
struct Head {
  Map x;
  const float* weights;
  int outputs;
};

Head read_head(Call& call) {
  Head h;
  int64_t s[4];
  h.x = read_map(call, "x");
  h.weights = call.next<float>("weights", 4, s);
  if (s[1] != h.x.channels || s[2] != 1 || s[3] != 1) call.refuse("weights must be (*, " + std::to_string(h.x.channels) + ", 1, 1)");
  h.outputs = call.channels("outputs", s[0]);
  return h;
}

OPERATOR(head_train) {
  const Head h = read_head(call);
  Norm norm = read_norm(call, h.outputs);
  const Options o = read_options(call);
  float* pooled = call.exactly<float>("pooled", {h.x.images, h.outputs});
  float* y = call.exactly<float>("y", {h.x.images, h.x.height, h.x.width, h.outputs});
  float* saved = call.exactly<float>("saved", {4, h.outputs});
  const NormOutputs out = read_norm_outputs(call, h.outputs, saved);
  call.done();
  Steps steps;
  normalise(steps, norm, h.x.rows(), o.norm, out, [&](Totals* sums, float* centre) {
    Pointwise p;
    p.x = h.x.data;
    p.inputs = h.x.channels;
    p.outputs = h.outputs;
    p.packed = steps.pack(h.weights, 1, h.x.channels, h.x.channels, h.outputs);
    p.y = y;
    steps.pointwise(p, h.x.rows(), sums, centre);
  });
  steps.pool(y, norm.affine(true), pooled, h.x.images, h.x.height * h.x.width, h.outputs);
}

OPERATOR(head_grad) {
  Steps steps;
  int64_t s[2];
  const float* dpooled = call.next<float>("dpooled", 2, s);
  const Map x = read_map(call, "x");
  const int outputs = call.channels("outputs", s[1]);
  const float* y = call.exactly<float>("y", {x.images, x.height, x.width, outputs});
  const Norm norm = read_saved(call, steps, outputs);
  const float* weights = call.exactly<float>("weights", {outputs, x.channels, 1, 1});
  const Options o = read_options(call);
  if (s[0] != x.images) call.refuse("dpooled and x differ in batch size");
  float* dx = read_like<float>(call, "dx", x);
  const ParameterGradients d = read_gradients(call, {outputs, x.channels, 1, 1}, outputs);
  call.done();
  float* g = steps.memory.floats(x.rows() * outputs);
  Totals sums;
  steps.pool_gradient(dpooled, y, norm, g, x.images, x.height * x.width, sums);
  PointwiseGradient p;
  p.out = steps.gradient(norm, sums, x.rows(), o.norm.frozen, g, y, d.gamma, d.beta);
  p.x = x.data;
  p.inputs = x.channels;
  p.outputs = outputs;
  p.packed = steps.pack(weights, x.channels, 1, outputs, x.channels);
  p.dx = dx;
  steps.pointwise_gradient(p, x.rows(), d.weight, nullptr);
}

OPERATOR(head_infer) {
  const Head h = read_head(call);
  Norm norm = read_norm(call, h.outputs);
  const Options o = read_options(call);
  float* pooled = call.exactly<float>("pooled", {h.x.images, h.outputs});
  call.done();
  Steps steps;
  Pointwise p;
  p.x = h.x.data;
  p.bias = folded_bias(steps, norm, o.norm.eps);
  p.relu6 = true;
  p.inputs = h.x.channels;
  p.outputs = h.outputs;
  p.packed = steps.pack(h.weights, 1, h.x.channels, h.x.channels, h.outputs, norm.scale);
  float* y = steps.memory.floats(h.x.rows() * h.outputs);
  p.y = y;
  steps.pointwise(p, h.x.rows(), nullptr, nullptr);
  steps.pool(y, Affine{}, pooled, h.x.images, h.x.height * h.x.width, h.outputs);
}

// The parts on their own.

OPERATOR(stem) {
  int64_t s[4], w[4];
  const uint8_t* image = call.next<uint8_t>("image", 4, s);
  const float* weights = call.next<float>("weights", 4, w);
  if (s[3] != 3 || w[1] != 3 || w[2] != 3 || w[3] != 3) call.refuse("image must be (N, H, W, 3) and weights (*, 3, 3, 3)");
  const int outputs = call.channels("outputs", w[0]);
  const Options o = read_options(call);
  Steps steps;
  Stem p = stem_of(steps, image, s, outputs, o);
  p.y = call.exactly<float>("y", {s[0], p.out_height, p.out_width, outputs});
  call.done();
  p.packed = steps.stem_weights(weights, outputs);
  steps.stem(p, weights, nullptr, nullptr);
}

OPERATOR(stem_grad_weights) {
  int64_t s[4];
  const Map dy = read_map(call, "dy");
  const uint8_t* image = call.next<uint8_t>("image", 4, s);
  if (s[3] != 3) call.refuse("image must be (N, H, W, 3)");
  const Options o = read_options(call);
  Steps steps;
  const Stem p = stem_of(steps, image, s, dy.channels, o);
  if (dy.images != s[0] || dy.height != p.out_height || dy.width != p.out_width) call.refuse("dy does not fit the image");
  float* dw = call.exactly<float>("dw", {dy.channels, 3, 3, 3});
  call.done();
  steps.stem_gradient(p, steps.plain_gradient(dy.data, dy.channels), dw);
}

OPERATOR(depthwise) {
  const Map x = read_map(call, "x");
  const float* weights = call.exactly<float>("weights", {x.channels, 1, 3, 3});
  const Options o = read_options(call);
  Steps steps;
  Depthwise p = depthwise_of(x, o, steps.depthwise_weights(weights, x.channels));
  p.y = call.exactly<float>("y", {x.images, p.out_height, p.out_width, x.channels});
  call.done();
  steps.depthwise(p, nullptr, nullptr);
}

OPERATOR(depthwise_grad_data) {
  const Map dy = read_map(call, "dy");
  const float* weights = call.exactly<float>("weights", {dy.channels, 1, 3, 3});
  const Options o = read_options(call);
  int64_t s[4];
  float* dx = call.next<float>("dx", 4, s);
  call.done();
  const Map x{nullptr, static_cast<int>(s[0]), static_cast<int>(s[1]), static_cast<int>(s[2]), call.channels("channels", s[3])};
  Steps steps;
  DepthwiseGradient p;
  p.shape = depthwise_of(x, o, steps.depthwise_weights(weights, x.channels));
  if (x.images != dy.images || x.channels != dy.channels || p.shape.out_height != dy.height || p.shape.out_width != dy.width)
    call.refuse("dx does not fit dy");
  p.out = steps.plain_gradient(dy.data, dy.channels);
  p.dx = dx;
  steps.depthwise_gradient(p, nullptr, nullptr);
}

OPERATOR(depthwise_grad_weights) {
  const Map dy = read_map(call, "dy"), x = read_map(call, "x");
  const Options o = read_options(call);
  Steps steps;
  DepthwiseGradient p;
  p.shape = depthwise_of(x, o, nullptr);
  if (x.images != dy.images || x.channels != dy.channels || p.shape.out_height != dy.height || p.shape.out_width != dy.width)
    call.refuse("x does not fit dy");
  float* dw = call.exactly<float>("dw", {x.channels, 1, 3, 3});
  call.done();
  p.shape.weights = steps.memory.channels(9 * x.channels);
  p.out = steps.plain_gradient(dy.data, dy.channels);
  steps.depthwise_gradient(p, dw, nullptr);
}

OPERATOR(pointwise) {
  const Head h = read_head(call);
  float* y = call.exactly<float>("y", {h.x.images, h.x.height, h.x.width, h.outputs});
  call.done();
  Steps steps;
  Pointwise p;
  p.x = h.x.data;
  p.inputs = h.x.channels;
  p.outputs = h.outputs;
  p.packed = steps.pack(h.weights, 1, h.x.channels, h.x.channels, h.outputs);
  p.y = y;
  steps.pointwise(p, h.x.rows(), nullptr, nullptr);
}

OPERATOR(pointwise_grad) {
  const Map dy = read_map(call, "dy"), x = read_map(call, "x");
  const float* weights = call.exactly<float>("weights", {dy.channels, x.channels, 1, 1});
  if (dy.rows() != x.rows()) call.refuse("x does not fit dy");
  float* dx = read_like<float>(call, "dx", x);
  float* dw = call.exactly<float>("dw", {dy.channels, x.channels, 1, 1});
  call.done();
  Steps steps;
  PointwiseGradient p;
  p.out = steps.plain_gradient(dy.data, dy.channels);
  p.x = x.data;
  p.inputs = x.channels;
  p.outputs = dy.channels;
  p.packed = steps.pack(weights, x.channels, 1, dy.channels, x.channels);
  p.dx = dx;
  steps.pointwise_gradient(p, x.rows(), dw, nullptr);
}

// BatchNorm; kind 1: with ReLU6, kind 0: without.
OPERATOR(batchnorm_train) {
  const Map x = read_map(call, "x");
  Norm norm = read_norm(call, x.channels);
  const Options o = read_options(call);
  float* y = read_like<float>(call, "y", x);
  float* saved = call.exactly<float>("saved", {4, x.channels});
  const NormOutputs out = read_norm_outputs(call, x.channels, saved);
  call.done();
  Steps steps;
  normalise(steps, norm, x.rows(), o.norm, out, [&](Totals* sums, float* centre) {
    if (sums) steps.moments(x.data, x.channels, x.rows(), *sums, centre);
  });
  steps.affine(x.data, norm.affine(o.kind == 1), nullptr, y, x.channels, x.rows());
}

OPERATOR(batchnorm_grad) {
  Steps steps;
  const Map dy = read_map(call, "dy");
  const float* x = read_like<float>(call, "x", dy);
  const Norm norm = read_saved(call, steps, dy.channels);
  const Options o = read_options(call);
  float* dx = read_like<float>(call, "dx", dy);
  float* dgamma = call.exactly<float>("gamma gradient", {dy.channels});
  float* dbeta = call.exactly<float>("beta gradient", {dy.channels});
  call.done();
  const bool relu6 = o.kind == 1;
  float* g = relu6 ? steps.memory.floats(dy.rows() * dy.channels) : nullptr;
  Totals sums;
  steps.gradient_sums(dy.data, x, norm.affine(relu6), norm.mean, g, dy.channels, dy.rows(), sums);
  steps.output_gradient(steps.gradient(norm, sums, dy.rows(), o.norm.frozen, relu6 ? g : dy.data, x, dgamma, dbeta), dx, dy.channels,
                        dy.rows());
}

OPERATOR(batchnorm_infer) {
  const Map x = read_map(call, "x");
  Norm norm = read_norm(call, x.channels);
  const Options o = read_options(call);
  float* y = read_like<float>(call, "y", x);
  call.done();
  Steps steps;
  steps.prepare(norm, o.norm.eps);
  steps.affine(x.data, norm.affine(o.kind == 1), nullptr, y, x.channels, x.rows());
}

OPERATOR(add) {
  const Map a = read_map(call, "a");
  const float* b = read_like<float>(call, "b", a);
  float* c = read_like<float>(call, "sum", a);
  call.done();
  Steps steps;
  steps.add(a.data, b, c, a.rows() * a.channels);
}

}  // namespace
}  // namespace mbv2

// Why the last call on this thread was refused.
EXPORT const char* mbv2_last_error() { return mbv2::last_error.c_str(); }
EXPORT const char* mbv2_instruction_set() { return mbv2::vector_code().name; }
EXPORT int mbv2_threads() { return mbv2::Pool::instance().size(); }
// Returns the number of threads, which is smaller than `count` where the system starts no more.
EXPORT int mbv2_set_threads(int count) {
  try {
    std::lock_guard<std::mutex> turn(mbv2::Pool::instance().turn());
    mbv2::Pool::instance().resize(count);
  } catch (const std::exception&) {  // out of memory: the pool is as large as it is
  }
  return mbv2::Pool::instance().size();
}
