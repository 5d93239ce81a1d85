#include "operands.h"

#include <string>

namespace mbv2 {

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

Norm read_norm(Call& call, int channels) {
  Norm norm;
  norm.channels = channels;
  norm.gamma = call.exactly<float>("gamma", {channels});
  norm.beta = call.exactly<float>("beta", {channels});
  norm.moving_mean = call.exactly<float>("moving mean", {channels});
  norm.moving_variance = call.exactly<float>("moving variance", {channels});
  return norm;
}

void save(const Norm& norm, float* saved) {
  const float* rows[4] = {norm.mean, norm.inverse, norm.scale, norm.shift};
  for (int r = 0; r < 4; ++r) std::memcpy(saved + static_cast<int64_t>(r) * norm.channels, rows[r], sizeof(float) * norm.channels);
}

Norm read_saved(Call& call, Passes& passes, int channels) {
  const float* saved = call.exactly<float>("saved", {4, channels});
  Norm norm;
  norm.channels = channels;
  float** rows[4] = {&norm.mean, &norm.inverse, &norm.scale, &norm.shift};
  for (int r = 0; r < 4; ++r) {
    *rows[r] = passes.memory.channels(channels);
    std::memcpy(*rows[r], saved + static_cast<int64_t>(r) * channels, sizeof(float) * channels);
  }
  return norm;
}

NormOutputs read_norm_outputs(Call& call, int channels, float* saved) {
  NormOutputs out{saved, nullptr, nullptr};
  out.mean = call.exactly<float>("new moving mean", {channels});
  out.variance = call.exactly<float>("new moving variance", {channels});
  return out;
}

ParameterGradients read_gradients(Call& call, std::initializer_list<int64_t> weight, int channels) {
  ParameterGradients g;
  g.weight = call.exactly<float>("weight gradient", weight);
  g.gamma = call.exactly<float>("gamma gradient", {channels});
  g.beta = call.exactly<float>("beta gradient", {channels});
  return g;
}

Matrix read_matrix(Call& call) {
  Matrix h;
  int64_t s[4];
  h.x = read_activation(call, "x");
  h.weights = call.next<float>("weights", 4, s);
  if (s[1] != h.x.channels || s[2] != 1 || s[3] != 1) call.refuse("weights must be (*, " + std::to_string(h.x.channels) + ", 1, 1)");
  h.outputs = call.channels("outputs", s[0]);
  return h;
}

const float* folded_bias(Passes& passes, Norm& norm, float eps) {
  passes.prepare(norm, eps);
  return norm.shift;
}

}  // namespace mbv2
