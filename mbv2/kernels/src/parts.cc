// The parts of a block on their own.
#include "guard.h"
#include "operands.h"

namespace mbv2 {
namespace {

OPERATOR(stem) {
  int64_t s[4], w[4];
  const uint8_t* image = call.next<uint8_t>("image", 4, s);
  const float* weights = call.next<float>("weights", 4, w);
  if (s[3] != 3 || w[1] != 3 || w[2] != 3 || w[3] != 3) call.refuse("image must be (N, H, W, 3) and weights (*, 3, 3, 3)");
  const int outputs = call.channels("outputs", w[0]);
  const Options o = read_options(call);
  Passes passes;
  Stem<> p = stem_of(passes, image, s, outputs, o);
  p.y = call.exactly<float>("y", {s[0], p.out_height, p.out_width, outputs});
  call.done();
  p.packed = passes.stem_weights(weights, outputs);
  passes.stem(p, nullptr, nullptr);
}

OPERATOR(stem_grad_weights) {
  int64_t s[4];
  const Activation<> dy = read_activation(call, "dy");
  const uint8_t* image = call.next<uint8_t>("image", 4, s);
  if (s[3] != 3) call.refuse("image must be (N, H, W, 3)");
  const Options o = read_options(call);
  Passes passes;
  const Stem<> p = stem_of(passes, image, s, dy.channels, o);
  if (dy.images != s[0] || dy.height != p.out_height || dy.width != p.out_width) call.refuse("dy does not fit the image");
  float* dw = call.exactly<float>("dw", {dy.channels, 3, 3, 3});
  call.done();
  passes.stem_gradient(p, passes.plain_gradient(dy.data, dy.channels), dw);
}

OPERATOR(depthwise) {
  const Activation<> x = read_activation(call, "x");
  const float* weights = call.exactly<float>("weights", {x.channels, 1, 3, 3});
  const Options o = read_options(call);
  Passes passes;
  Depthwise<> p = depthwise_of(x, o, passes.depthwise_weights(weights, x.channels));
  p.y = call.exactly<float>("y", {x.images, p.out_height, p.out_width, x.channels});
  call.done();
  passes.depthwise(p, nullptr, nullptr);
}

OPERATOR(depthwise_grad_data) {
  const Activation<> dy = read_activation(call, "dy");
  const float* weights = call.exactly<float>("weights", {dy.channels, 1, 3, 3});
  const Options o = read_options(call);
  int64_t s[4];
  float* dx = call.next<float>("dx", 4, s);
  call.done();
  const Activation<> x{nullptr, static_cast<int>(s[0]), static_cast<int>(s[1]), static_cast<int>(s[2]), call.channels("channels", s[3])};
  Passes passes;
  DepthwiseGradient<> p;
  p.shape = depthwise_of(x, o, passes.depthwise_weights(weights, x.channels));
  if (x.images != dy.images || x.channels != dy.channels || p.shape.out_height != dy.height || p.shape.out_width != dy.width)
    call.refuse("dx does not fit dy");
  p.out = passes.plain_gradient(dy.data, dy.channels);
  p.dx = dx;
  passes.depthwise_gradient(p, nullptr, nullptr);
}

OPERATOR(depthwise_grad_weights) {
  const Activation<> dy = read_activation(call, "dy"), x = read_activation(call, "x");
  const Options o = read_options(call);
  Passes passes;
  DepthwiseGradient<> p;
  p.shape = depthwise_of(x, o, nullptr);
  if (x.images != dy.images || x.channels != dy.channels || p.shape.out_height != dy.height || p.shape.out_width != dy.width)
    call.refuse("x does not fit dy");
  float* dw = call.exactly<float>("dw", {x.channels, 1, 3, 3});
  call.done();
  p.shape.weights = passes.memory.channels(9 * x.channels);
  p.out = passes.plain_gradient(dy.data, dy.channels);
  passes.depthwise_gradient(p, dw, nullptr);
}

OPERATOR(pointwise) {
  const Matrix h = read_matrix(call);
  float* y = call.exactly<float>("y", {h.x.images, h.x.height, h.x.width, h.outputs});
  call.done();
  Passes passes;
  Pointwise<> p;
  p.x = h.x.data;
  p.inputs = h.x.channels;
  p.outputs = h.outputs;
  p.packed = passes.pack(h.weights, 1, h.x.channels, h.x.channels, h.outputs);
  p.y = y;
  passes.pointwise(p, h.x.rows(), nullptr, nullptr);
}

OPERATOR(pointwise_grad) {
  const Activation<> dy = read_activation(call, "dy"), x = read_activation(call, "x");
  const float* weights = call.exactly<float>("weights", {dy.channels, x.channels, 1, 1});
  if (dy.rows() != x.rows()) call.refuse("x does not fit dy");
  float* dx = read_like<float>(call, "dx", x);
  float* dw = call.exactly<float>("dw", {dy.channels, x.channels, 1, 1});
  call.done();
  Passes passes;
  PointwiseGradient<> p;
  p.out = passes.plain_gradient(dy.data, dy.channels);
  p.x = x.data;
  p.inputs = x.channels;
  p.outputs = dy.channels;
  p.packed = passes.pack(weights, x.channels, 1, dy.channels, x.channels);
  p.dx = dx;
  passes.pointwise_gradient(p, x.rows(), dw, nullptr);
}

// BatchNorm; kind 1: with ReLU6, kind 0: without.
OPERATOR(batchnorm_train) {
  const Activation<> x = read_activation(call, "x");
  Norm norm = read_norm(call, x.channels);
  const Options o = read_options(call);
  float* y = read_like<float>(call, "y", x);
  float* saved = call.exactly<float>("saved", {4, x.channels});
  const NormOutputs out = read_norm_outputs(call, x.channels, saved);
  call.done();
  Passes passes;
  normalise(passes, norm, x.rows(), o.norm, out, [&](Totals* sums, float* centre) {
    if (sums) passes.moments(x.data, x.channels, x.rows(), *sums, centre);
  });
  passes.affine(x.data, norm.affine(o.kind == 1), nullptr, y, x.channels, x.rows());
}

OPERATOR(batchnorm_grad) {
  Passes passes;
  const Activation<> dy = read_activation(call, "dy");
  const float* x = read_like<float>(call, "x", dy);
  const Norm norm = read_saved(call, passes, dy.channels);
  const Options o = read_options(call);
  float* dx = read_like<float>(call, "dx", dy);
  float* dgamma = call.exactly<float>("gamma gradient", {dy.channels});
  float* dbeta = call.exactly<float>("beta gradient", {dy.channels});
  call.done();
  const bool relu6 = o.kind == 1;
  float* g = relu6 ? passes.memory.floats(dy.rows() * dy.channels) : nullptr;
  Totals sums;
  passes.gradient_sums(dy.data, x, norm.affine(relu6), norm.mean, g, dy.channels, dy.rows(), sums);
  passes.output_gradient(passes.gradient(norm, sums, dy.rows(), o.norm.frozen, relu6 ? g : dy.data, x, dgamma, dbeta), dx, dy.channels,
                        dy.rows());
}

OPERATOR(batchnorm_infer) {
  const Activation<> x = read_activation(call, "x");
  Norm norm = read_norm(call, x.channels);
  const Options o = read_options(call);
  float* y = read_like<float>(call, "y", x);
  call.done();
  Passes passes;
  passes.prepare(norm, o.norm.eps);
  passes.affine(x.data, norm.affine(o.kind == 1), nullptr, y, x.channels, x.rows());
}

OPERATOR(add) {
  const Activation<> a = read_activation(call, "a");
  const float* b = read_like<float>(call, "b", a);
  float* c = read_like<float>(call, "sum", a);
  call.done();
  Passes passes;
  passes.add(a.data, b, c, a.rows() * a.channels);
}

}  // namespace
}  // namespace mbv2
