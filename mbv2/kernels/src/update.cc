// The optimizer: every weight and its state, changed in place by one operator. What the rules are: mbv2/training/optimizer.py.
#include <vector>

#include "guard.h"
#include "passes.h"

namespace mbv2 {
namespace {

// A tensor of whatever shape.
struct Values {
  float* data;
  int64_t count;
};

Values read_values(Call& call, const char* what) {
  Values v;
  v.data = call.any<float>(what, &v.count);
  return v;
}

std::vector<Values> read_for_each(Call& call, const char* what, const std::vector<Values>& gradients) {
  std::vector<Values> read;
  for (const Values& gradient : gradients) {
    read.push_back(read_values(call, what));
    if (read.back().count != gradient.count)
      call.refuse(std::string(what) + " " + std::to_string(read.size()) + " must have the gradient's " + std::to_string(gradient.count) +
                  " values, got " + std::to_string(read.back().count));
  }
  return read;
}

// Inputs: the number of the rule; the controls of a step; constants; of each weight the decay and the factor of its rate; the
// gradients; and, changed in place, the weights and the one or two tensors of their state.
OPERATOR(update) {
  int64_t count;
  const int32_t rule = *call.exactly<int32_t>("rule", {1});
  if (rule < 0 || rule >= static_cast<int32_t>(Rule::kCount)) call.refuse("no rule has the number " + std::to_string(rule));
  const float* controls = call.exactly<float>("controls", {6});
  const float* constants = call.exactly<float>("constants", {5});
  const float* decays = call.next<float>("decays", 1, &count);
  const float* factors = call.exactly<float>("factors", {count});
  std::vector<Values> gradients;
  for (int64_t i = 0; i < count; ++i) gradients.push_back(read_values(call, "gradient"));
  const std::vector<Values> weights = read_for_each(call, "weight", gradients), first = read_for_each(call, "first state", gradients);
  std::vector<Values> second(gradients.size());
  Update u;
  u.rule = static_cast<Rule>(rule);
  if (u.rule == Rule::kAdamw || u.rule == Rule::kRmsprop) second = read_for_each(call, "second state", gradients);
  float* done = call.exactly<float>("done", {1});
  call.done();

  u.first = constants[0];
  u.second = constants[1];
  u.epsilon = constants[2];
  u.rest_of_first = constants[3];
  u.rest_of_second = constants[4];
  u.mean_correction = controls[1];
  u.square_correction = controls[2];
  std::vector<int64_t> ends;  // of the weights, one after another
  int64_t total = 0;
  for (const Values& weight : weights) ends.push_back(total += weight.count);
  Passes passes;
  passes.parallel(total, 16, [&](int, int64_t begin, int64_t end) {
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t start = ends[i] - weights[i].count, from = begin > start ? begin - start : 0;
      const int64_t until = end < ends[i] ? end - start : weights[i].count;
      if (from >= until) continue;
      Update one = u;
      one.rate = controls[0] * factors[i];
      one.decay = decays[i];
      passes.vector.update(one, weights[i].data, gradients[i].data, first[i].data, second[i].data, from, until);
    }
  });
  *done = 1.0f;
}

}  // namespace
}  // namespace mbv2
