// The head: 1x1 convolution, BatchNorm, ReLU6, mean over the pixels.
#include "guard.h"
#include "operands.h"

namespace mbv2 {
namespace {

// Y: how the convolution's output and its gradient are stored.
template <class Y>
void train_head(Call& call) {
  const Matrix h = read_matrix(call);
  Norm norm = read_norm(call, h.outputs);
  const Options o = read_options(call);
  float* pooled = call.exactly<float>("pooled", {h.x.images, h.outputs});
  Y* y = call.exactly<Y>("y", {h.x.images, h.x.height, h.x.width, h.outputs});
  float* saved = call.exactly<float>("saved", {4, h.outputs});
  const NormOutputs out = read_norm_outputs(call, h.outputs, saved);
  call.done();
  Passes passes;
  normalise(passes, norm, h.x.rows(), o.norm, out, [&](Totals* sums, float* centre) {
    Pointwise<float, Y> p;
    p.x = h.x.data;
    p.inputs = h.x.channels;
    p.outputs = h.outputs;
    p.packed = passes.pack<Y>(h.weights, 1, h.x.channels, h.x.channels, h.outputs);
    p.y = y;
    passes.pointwise(p, h.x.rows(), sums, centre);
  });
  passes.pool(y, norm.affine(true), pooled, h.x.images, h.x.height * h.x.width, h.outputs);
}

template <class Y>
void grad_head(Call& call) {
  Passes passes;
  int64_t s[2];
  const float* dpooled = call.next<float>("dpooled", 2, s);
  const Activation<> x = read_activation(call, "x");
  const int outputs = call.channels("outputs", s[1]);
  const Y* y = call.exactly<Y>("y", {x.images, x.height, x.width, outputs});
  const Norm norm = read_saved(call, passes, outputs);
  const float* weights = call.exactly<float>("weights", {outputs, x.channels, 1, 1});
  const Options o = read_options(call);
  if (s[0] != x.images) call.refuse("dpooled and x differ in batch size");
  float* dx = read_like<float>(call, "dx", x);
  const ParameterGradients d = read_gradients(call, {outputs, x.channels, 1, 1}, outputs);
  call.done();
  Y* g = passes.memory.values<Y>(x.rows() * outputs);
  Totals sums;
  passes.pool_gradient(dpooled, y, norm, g, x.images, x.height * x.width, sums);
  PointwiseGradient<Y, Y> p;
  p.out = passes.gradient(norm, sums, x.rows(), o.norm.frozen, g, y, d.gamma, d.beta);
  p.x = x.data;
  p.inputs = x.channels;
  p.outputs = outputs;
  p.packed = passes.pack<Y>(weights, x.channels, 1, outputs, x.channels);
  p.dx = dx;
  passes.pointwise_gradient(p, x.rows(), d.weight, nullptr);
}

// Y: how the convolution's output is kept, and what it multiplies where the processor can.
template <class Y>
void infer_head(Call& call) {
  const Matrix h = read_matrix(call);
  Norm norm = read_norm(call, h.outputs);
  const Options o = read_options(call);
  float* pooled = call.exactly<float>("pooled", {h.x.images, h.outputs});
  call.done();
  Passes passes;
  Pointwise<float, Y> p;
  p.x = h.x.data;
  p.bias = folded_bias(passes, norm, o.norm.eps);
  p.relu6 = true;
  p.inputs = h.x.channels;
  p.outputs = h.outputs;
  p.packed = passes.pack<Y>(h.weights, 1, h.x.channels, h.x.channels, h.outputs, norm.scale);
  Y* y = passes.memory.values<Y>(h.x.rows() * h.outputs);
  p.y = y;
  passes.pointwise(p, h.x.rows(), nullptr, nullptr);
  passes.pool(y, Affine{}, pooled, h.x.images, h.x.height * h.x.width, h.outputs);
}

OPERATOR(head_train) { train_head<float>(call); }
OPERATOR(head_grad) { grad_head<float>(call); }
OPERATOR(head_infer) { infer_head<float>(call); }
OPERATOR(head_train_bfloat16) { train_head<bfloat16>(call); }
OPERATOR(head_grad_bfloat16) { grad_head<bfloat16>(call); }
OPERATOR(head_infer_bfloat16) { infer_head<bfloat16>(call); }

}  // namespace
}  // namespace mbv2
