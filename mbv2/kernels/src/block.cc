// Whole inverted residuals; stem_block begins at the image. What is read: operands.h.
#include "guard.h"
#include "operands.h"

namespace mbv2 {
namespace {

// What all three block operators begin with: the input, the three convolutions' weights and BatchNorms, the options (which
// lie behind them), and the sizes that follow.
struct Block {
  Options options;
  const unsigned char* image = nullptr;
  int64_t image_shape[4] = {};
  Activation<> x, hidden, z;  // x of an expanding block; hidden: the depthwise filter's input
  const float *expand = nullptr, *depthwise = nullptr, *project = nullptr;
  Norm norms[3];
};

// The input, by its rank's last size: bytes of an image, or an activation.
void read_block_input(Call& call, bool stem, Block& b) {
  if (stem) {
    b.image = call.next<uint8_t>("image", 4, b.image_shape);
    if (b.image_shape[3] != 3) call.refuse("image must have 3 colours, got " + std::to_string(b.image_shape[3]));
  } else {
    b.x = read_activation(call, "x");
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

// Y: how the convolutions' outputs, and in grad_block their gradients, are stored.
template <class Y>
void train_block(Call& call, bool stem) {
  Block b = read_block(call, stem);
  const Options& o = b.options;
  const int hidden = b.hidden.channels, outputs = b.z.channels;
  const Activation<> filtered{nullptr, b.z.images, b.z.height, b.z.width, hidden};
  float* z = read_like<float>(call, "z", b.z);
  Y* y1 = read_like<Y>(call, "y1", b.hidden);
  Y* y2 = read_like<Y>(call, "y2", filtered);
  Y* y3 = read_like<Y>(call, "y3", b.z);
  float* saved[3];
  for (int i = 0; i < 3; ++i) saved[i] = call.exactly<float>("saved", {4, i < 2 ? hidden : outputs});
  NormOutputs out[3];
  for (int i = 0; i < 3; ++i) out[i] = read_norm_outputs(call, i < 2 ? hidden : outputs, saved[i]);
  call.done();

  Passes passes;
  normalise(passes, b.norms[0], b.hidden.rows(), o.norm, out[0], [&](Totals* sums, float* centre) {
    if (stem) {
      Stem<Y> p = stem_of<Y>(passes, b.image, b.image_shape, hidden, o);
      p.packed = passes.stem_weights(b.expand, hidden);
      p.y = y1;
      passes.stem(p, sums, centre);
    } else {
      Pointwise<float, Y> p;
      p.x = b.x.data;
      p.inputs = b.x.channels;
      p.outputs = hidden;
      p.packed = passes.pack<Y>(b.expand, 1, b.x.channels, b.x.channels, hidden);
      p.y = y1;
      passes.pointwise(p, b.hidden.rows(), sums, centre);
    }
  });
  const Activation<Y> first{y1, b.hidden.images, b.hidden.height, b.hidden.width, hidden};
  normalise(passes, b.norms[1], filtered.rows(), o.norm, out[1], [&](Totals* sums, float* centre) {
    Depthwise<Y> p = depthwise_of(first, o, passes.depthwise_weights(b.depthwise, hidden));
    p.in = b.norms[0].affine(true);
    p.y = y2;
    passes.depthwise(p, sums, centre);
  });
  normalise(passes, b.norms[2], b.z.rows(), o.norm, out[2], [&](Totals* sums, float* centre) {
    Pointwise<Y, Y> p;
    p.x = y2;
    p.in = b.norms[1].affine(true);
    p.inputs = hidden;
    p.outputs = outputs;
    p.packed = passes.pack<Y>(b.project, 1, hidden, hidden, outputs);
    p.y = y3;
    passes.pointwise(p, b.z.rows(), sums, centre);
  });
  passes.affine(y3, b.norms[2].affine(false), o.residual ? b.x.data : nullptr, z, outputs, b.z.rows());
}

template <class Y>
void grad_block(Call& call, bool stem) {
  Passes passes;
  Block b;
  const Activation<> dz = read_activation(call, "dz");
  read_block_input(call, stem, b);
  const auto y1 = read_activation<Y>(call, "y1"), y2 = read_activation<Y>(call, "y2"), y3 = read_activation<Y>(call, "y3");
  const int hidden = y1.channels, outputs = y3.channels;
  for (int i = 0; i < 3; ++i) b.norms[i] = read_saved(call, passes, i < 2 ? hidden : outputs);
  int64_t first;
  b.expand = read_first_weights(call, stem, b, &first);
  b.depthwise = call.exactly<float>("depthwise weights", {hidden, 1, 3, 3});
  b.project = call.exactly<float>("projection weights", {outputs, hidden, 1, 1});
  finish_block(call, stem, hidden, outputs, b);
  const auto same = [](const auto& m, const auto& n) {
    return m.images == n.images && m.height == n.height && m.width == n.width && m.channels == n.channels;
  };
  const Activation<> filtered{nullptr, b.z.images, b.z.height, b.z.width, hidden};
  if (first != hidden || !same(y1, b.hidden) || !same(y2, filtered) || !same(y3, b.z) || !same(dz, b.z))
    call.refuse("the sizes of dz, y1, y2, y3 do not fit each other");
  float* dx = stem ? nullptr : read_like<float>(call, "dx", b.x);
  const int64_t inputs = stem ? 3 : b.x.channels, size = stem ? 3 : 1;
  const ParameterGradients d1 = read_gradients(call, {hidden, inputs, size, size}, hidden);
  const ParameterGradients d2 = read_gradients(call, {hidden, 1, 3, 3}, hidden);
  const ParameterGradients d3 = read_gradients(call, {outputs, hidden, 1, 1}, outputs);
  call.done();

  const Options& o = b.options;
  Y* g1 = passes.memory.values<Y>(y1.rows() * hidden);
  Y* g2 = passes.memory.values<Y>(y2.rows() * hidden);
  Totals sums;
  passes.gradient_sums(dz.data, y3.data, Affine{}, b.norms[2].mean, nullptr, outputs, dz.rows(), sums);
  {
    PointwiseGradient<float, Y, Y> p;
    p.out = passes.gradient(b.norms[2], sums, dz.rows(), o.norm.frozen, dz.data, y3.data, d3.gamma, d3.beta);
    p.x = y2.data;
    p.in = b.norms[1].affine(true);
    p.inputs = hidden;
    p.outputs = outputs;
    p.packed = passes.pack<Y>(b.project, hidden, 1, outputs, hidden);
    p.dx = g2;
    p.centre = b.norms[1].mean;
    passes.pointwise_gradient(p, dz.rows(), d3.weight, &sums);
  }
  {
    DepthwiseGradient<Y> p;
    p.out = passes.gradient<Y, Y>(b.norms[1], sums, y2.rows(), o.norm.frozen, g2, y2.data, d2.gamma, d2.beta);
    p.shape = depthwise_of(y1, o, passes.depthwise_weights(b.depthwise, hidden));
    p.shape.in = b.norms[0].affine(true);
    p.dx = g1;
    p.centre = b.norms[0].mean;
    passes.depthwise_gradient(p, d2.weight, &sums);
  }
  const OutputGradient<Y, Y> out = passes.gradient<Y, Y>(b.norms[0], sums, y1.rows(), o.norm.frozen, g1, y1.data, d1.gamma, d1.beta);
  if (stem) {
    passes.stem_gradient(stem_of<Y>(passes, b.image, b.image_shape, hidden, o), out, d1.weight);
    return;
  }
  PointwiseGradient<Y, Y> p;
  p.out = out;
  p.x = b.x.data;
  p.inputs = b.x.channels;
  p.outputs = hidden;
  p.packed = passes.pack<Y>(b.expand, b.x.channels, 1, hidden, b.x.channels);
  p.dx = dx;
  p.residual = o.residual ? dz.data : nullptr;
  passes.pointwise_gradient(p, y1.rows(), d1.weight, nullptr);
}

// T: what 1x1 convolutions multiply, where the processor can.
template <class T>
void infer_block(Call& call, bool stem) {
  Block b = read_block(call, stem);
  float* z = read_like<float>(call, "z", b.z);
  call.done();
  Passes passes;
  const Options& o = b.options;
  const int hidden = b.hidden.channels;
  BlockInference<T> p;
  p.stem = stem;
  p.x = b.x.data;
  p.inputs = stem ? 8 : b.x.channels;
  p.hidden = hidden;
  p.outputs = b.z.channels;
  p.expand_bias = folded_bias(passes, b.norms[0], o.norm.eps);
  if (stem) {
    p.first_stem = stem_of(passes, b.image, b.image_shape, hidden, o);
    p.expand = passes.stem_weights(b.expand, hidden, b.norms[0].scale);
  } else {
    p.expand = passes.pack<T>(b.expand, 1, b.x.channels, b.x.channels, hidden, b.norms[0].scale);
  }
  const float* bias = folded_bias(passes, b.norms[1], o.norm.eps);
  p.depthwise = depthwise_of(b.hidden, o, passes.depthwise_weights(b.depthwise, hidden, b.norms[1].scale));
  p.depthwise.bias = bias;
  p.depthwise.relu6 = true;
  p.project_bias = folded_bias(passes, b.norms[2], o.norm.eps);
  p.project = passes.pack<T>(b.project, 1, hidden, hidden, b.z.channels, b.norms[2].scale);
  p.residual = o.residual;
  p.z = z;
  passes.block(p);
}

OPERATOR(stem_block_train) { train_block<float>(call, true); }
OPERATOR(stem_block_grad) { grad_block<float>(call, true); }
OPERATOR(stem_block_train_bfloat16) { train_block<bfloat16>(call, true); }
OPERATOR(stem_block_grad_bfloat16) { grad_block<bfloat16>(call, true); }
OPERATOR(stem_block_infer) { infer_block<float>(call, true); }
OPERATOR(stem_block_infer_bfloat16) { infer_block<bfloat16>(call, true); }
OPERATOR(block_train) { train_block<float>(call, false); }
OPERATOR(block_grad) { grad_block<float>(call, false); }
OPERATOR(block_train_bfloat16) { train_block<bfloat16>(call, false); }
OPERATOR(block_grad_bfloat16) { grad_block<bfloat16>(call, false); }
OPERATOR(block_infer) { infer_block<float>(call, false); }
OPERATOR(block_infer_bfloat16) { infer_block<bfloat16>(call, false); }

}  // namespace
}  // namespace mbv2
