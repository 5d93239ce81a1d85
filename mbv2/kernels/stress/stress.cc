// Calls the operators of a training step at many sizes, on tensors of exactly their size, from two threads at once and with
// pools of 1 to 3: for AddressSanitizer, ThreadSanitizer and valgrind (`make sanitize`), and on other processors and systems
// (`make cross`).
//
//   mbv2_stress LIBRARY [write|compare RESULTS]
//
// Exit status 0: nothing was refused, no NaN came, two threads got the same values, and, with `compare`, each tensor differs
// from the one that another machine wrote by at most kBound of its norm. Sizes at which BatchNorm sees fewer than kFewest
// values are left out of that, as it magnifies rounding there, and so is bfloat16, whose last digit is larger than the bound.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "imnet_prep/images/native/stress/library.h"

namespace {

using Operator = int(int, void**, int*, int64_t**, const char**, void*, void*);
using Results = std::vector<std::vector<float>>;  // of one operator after another, a tensor each

constexpr double kBound = 1e-5;
constexpr int64_t kFewest = 16;

// A tensor of exactly its size: reading one element past it is an error that a sanitizer sees.
struct Tensor {
  std::vector<int64_t> shape;
  const char* type;
  std::unique_ptr<unsigned char[]> bytes;
  size_t size;

  Tensor(std::vector<int64_t> s, const char* t = "float32") : shape(std::move(s)), type(t), size(size_of(t)) {
    for (const int64_t d : shape) size *= static_cast<size_t>(d);
    bytes.reset(new unsigned char[size]);
  }
  static size_t size_of(const char* t) { return !std::strcmp(t, "uint8") ? 1 : !std::strcmp(t, "bfloat16") ? 2 : 4; }
  float* floats() { return reinterpret_cast<float*>(bytes.get()); }
  int32_t* ints() { return reinterpret_cast<int32_t*>(bytes.get()); }
  size_t count() const { return size / size_of(type); }
  std::vector<float> values() const {
    std::vector<float> all(count());
    const size_t bytes_each = size_of(type);  // a bfloat16 is the upper half of a float
    for (size_t i = 0; i < all.size(); ++i) {
      const uint32_t zero = 0;
      std::memcpy(&all[i], &zero, sizeof zero);
      std::memcpy(reinterpret_cast<unsigned char*>(&all[i]) + 4 - bytes_each, bytes.get() + i * bytes_each, bytes_each);
    }
    return all;
  }
};

struct Random {
  uint64_t state;
  float next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<float>(static_cast<double>(state >> 40) / (1 << 23) - 1.0);
  }
};

Tensor filled(Random& r, std::vector<int64_t> shape, float scale, float offset = 0) {
  Tensor t(std::move(shape));
  for (size_t i = 0; i < t.count(); ++i) t.floats()[i] = r.next() * scale + offset;
  return t;
}

// Calls an operator of the library; `all` ends with its outputs.
bool run(const Library& library, const std::string& name, const std::vector<Tensor*>& all, size_t outputs, Results& results) {
  std::vector<void*> data;
  std::vector<int> ndims;
  std::vector<int64_t*> shapes;
  std::vector<const char*> types;
  for (Tensor* t : all) {
    data.push_back(t->bytes.get());
    ndims.push_back(static_cast<int>(t->shape.size()));
    shapes.push_back(t->shape.data());
    types.push_back(t->type);
  }
  auto* const op = library.function<Operator>("mbv2_" + name);
  if (op(static_cast<int>(all.size()), data.data(), ndims.data(), shapes.data(), types.data(), nullptr, nullptr)) {
    std::fprintf(stderr, "%s refused: %s\n", name.c_str(), library.function<const char*()>("mbv2_last_error")());
    return false;
  }
  for (size_t i = all.size() - outputs; i < all.size(); ++i) {
    results.push_back(all[i]->values());
    for (const float value : results.back()) {
      if (std::isfinite(value)) continue;
      std::fprintf(stderr, "%s: output %zu is not finite\n", name.c_str(), i);
      return false;
    }
  }
  return true;
}

void norms(Random& r, int64_t channels, std::vector<Tensor>& to) {
  to.push_back(filled(r, {channels}, 0.5f, 1));
  to.push_back(filled(r, {channels}, 0.5f, 1));
  to.push_back(filled(r, {channels}, 0.5f));
  to.push_back(filled(r, {channels}, 0.4f, 1));
}

struct Size {
  bool stem;
  int64_t batch, height, width, inputs, hidden, outputs;
  int stride, same;
};

std::vector<Tensor*> pointers(std::vector<Tensor>& all, std::vector<Tensor>& more) {
  std::vector<Tensor*> p;
  for (Tensor& t : all) p.push_back(&t);
  for (Tensor& t : more) p.push_back(&t);
  return p;
}

// Train, gradient, inference of one block; `stored`: the type of the convolutions' outputs.
bool block(const Library& library, const Size& s, const std::string& stored, Results& results) {
  Random r{42};
  const int64_t hidden = s.hidden, h = s.stem ? (s.height + 1) / 2 : s.height, w = s.stem ? (s.width + 1) / 2 : s.width;
  const int64_t oh = (h + s.stride - 1) / s.stride, ow = (w + s.stride - 1) / s.stride;
  std::vector<Tensor> in;
  if (s.stem) {
    in.emplace_back(std::vector<int64_t>{s.batch, s.height, s.width, 3}, "uint8");
    for (size_t i = 0; i < in[0].size; ++i) in[0].bytes[i] = static_cast<unsigned char>(i * 37 % 251);
    in.push_back(filled(r, {hidden, 3, 3, 3}, 0.5f));
  } else {
    in.push_back(filled(r, {s.batch, h, w, s.inputs}, 1));
    in.push_back(filled(r, {hidden, s.inputs, 1, 1}, 0.5f));
  }
  norms(r, hidden, in);
  in.push_back(filled(r, {hidden, 1, 3, 3}, 0.5f));
  norms(r, hidden, in);
  in.push_back(filled(r, {s.outputs, hidden, 1, 1}, 0.5f));
  norms(r, s.outputs, in);
  Tensor switches({8}, "int32"), numbers({8});
  const int32_t values[8] = {s.stem ? 0 : 1, s.stride, s.same, !s.stem && s.stride == 1 && s.inputs == s.outputs, 0, 0, 0, 0};
  std::memcpy(switches.ints(), values, sizeof values);
  const float reals[8] = {1e-5f, 0.9f, 124, 116, 104, 0.017f, 0.017f, 0.017f};
  std::memcpy(numbers.floats(), reals, sizeof reals);
  in.push_back(std::move(switches));
  in.push_back(std::move(numbers));

  std::vector<Tensor> out;
  const std::vector<int64_t> z{s.batch, oh, ow, s.outputs};
  const std::vector<std::vector<int64_t>> shapes = {z,           {s.batch, h, w, hidden}, {s.batch, oh, ow, hidden}, z,        {4, hidden},
                                                    {4, hidden}, {4, s.outputs},          {hidden},                  {hidden}, {hidden},
                                                    {hidden},    {s.outputs},             {s.outputs}};
  for (size_t i = 0; i < shapes.size(); ++i) out.emplace_back(shapes[i], i >= 1 && i <= 3 ? stored.c_str() : "float32");
  const std::string name = s.stem ? "stem_block" : "block", suffix = stored == "float32" ? "" : "_" + stored;
  if (!run(library, name + "_train" + suffix, pointers(in, out), out.size(), results)) return false;

  Tensor dz = filled(r, z, 1);
  std::vector<Tensor*> call{&dz, &in[0]};
  for (int i = 1; i < 7; ++i) call.push_back(&out[i]);
  for (const int i : {1, 6, 11, 16, 17}) call.push_back(&in[i]);
  std::vector<Tensor> grads;
  if (!s.stem) grads.emplace_back(in[0].shape);
  for (const int i : {1, 6, 11})
    for (int k = 0; k < 3; ++k) grads.emplace_back(k ? std::vector<int64_t>{in[i].shape[0]} : in[i].shape);
  for (Tensor& t : grads) call.push_back(&t);
  if (!run(library, name + "_grad" + suffix, call, grads.size(), results)) return false;

  std::vector<Tensor> inferred;
  inferred.emplace_back(z);
  return run(library, name + "_infer" + suffix, pointers(in, inferred), 1, results);
}

bool head(const Library& library, int64_t batch, int64_t size, int64_t inputs, int64_t outputs, const std::string& stored, Results& results) {
  Random r{7};
  std::vector<Tensor> in, out, inferred;
  in.push_back(filled(r, {batch, size, size, inputs}, 1));
  in.push_back(filled(r, {outputs, inputs, 1, 1}, 0.5f));
  norms(r, outputs, in);
  in.emplace_back(std::vector<int64_t>{8}, "int32");
  std::memset(in.back().bytes.get(), 0, 32);
  in.back().ints()[1] = 1;
  in.push_back(filled(r, {8}, 0, 0.5f));
  const std::vector<std::vector<int64_t>> shapes = {{batch, outputs}, {batch, size, size, outputs}, {4, outputs}, {outputs}, {outputs}};
  for (size_t i = 0; i < shapes.size(); ++i) out.emplace_back(shapes[i], i == 1 ? stored.c_str() : "float32");
  const std::string suffix = stored == "float32" ? "" : "_" + stored;
  if (!run(library, "head_train" + suffix, pointers(in, out), out.size(), results)) return false;
  std::vector<Tensor> grads;
  grads.emplace_back(in[0].shape);
  grads.emplace_back(in[1].shape);
  grads.emplace_back(std::vector<int64_t>{outputs});
  grads.emplace_back(std::vector<int64_t>{outputs});
  std::vector<Tensor*> call{&out[0], &in[0], &out[1], &out[2], &in[1], &in[6], &in[7]};
  for (Tensor& t : grads) call.push_back(&t);
  if (!run(library, "head_grad" + suffix, call, grads.size(), results)) return false;
  inferred.emplace_back(std::vector<int64_t>{batch, outputs});
  return run(library, "head_infer" + suffix, pointers(in, inferred), 1, results);
}

// One step of each optimizer, for weights of several sizes.
bool update(const Library& library, Results& results) {
  bool good = true;
  for (int rule = 0; rule < 4; ++rule) {
    const std::vector<int64_t> sizes = {1, 7, 1000, 12345};
    const int64_t count = static_cast<int64_t>(sizes.size());
    Random r{rule + 1u};
    std::vector<Tensor> in, changed;
    in.emplace_back(std::vector<int64_t>{1}, "int32");
    in.back().ints()[0] = rule;
    in.push_back(filled(r, {6}, 0.1f, 0.5f));
    in.push_back(filled(r, {5}, 0.1f, 0.5f));
    for (int i = 0; i < 2; ++i) in.push_back(filled(r, {count}, 0.1f, 0.5f));
    for (const int64_t size : sizes) in.push_back(filled(r, {size}, 1));
    for (int of = 0; of < (rule < 2 ? 2 : 3); ++of)
      for (const int64_t size : sizes) changed.push_back(filled(r, {size}, 0.4f, 0.5f));
    changed.push_back(filled(r, {1}, 0));
    good &= run(library, "update", pointers(in, changed), changed.size(), results);
  }
  return good;
}

// Every operator at every size; each block from two threads at once.
bool all_operators(const Library& library, const std::string& stored, Results& results) {
  const Size sizes[] = {
      {true, 2, 33, 18, 3, 32, 16, 1, 0},  {true, 1, 8, 9, 3, 16, 8, 1, 1},     {true, 1, 3, 1, 3, 48, 24, 1, 0},
      {false, 2, 9, 7, 16, 96, 24, 2, 0},  {false, 3, 8, 6, 24, 144, 24, 1, 0}, {false, 1, 10, 10, 8, 48, 8, 2, 1},
      {false, 4, 2, 2, 40, 240, 40, 1, 1}, {false, 2, 1, 1, 160, 960, 160, 1, 0}, {false, 1, 5, 60, 24, 144, 32, 1, 0},
  };
  bool good = true;
  for (const Size& s : sizes) {
    Results first, second;
    bool also = true;
    std::thread beside([&] { also = block(library, s, stored, second); });
    good &= block(library, s, stored, first);
    beside.join();
    good &= also && first == second;
    const int64_t halvings = s.stride * (s.stem ? 2 : 1);
    if (s.batch * s.height * s.width < kFewest * halvings * halvings) continue;
    results.insert(results.end(), first.begin(), first.end());
  }
  if (stored == "float32") good &= update(library, results);
  return head(library, 3, 7, 112, 1280, stored, results) && head(library, 1, 1, 320, 64, stored, results) && good;
}

void write(const Results& results, const char* path) {
  std::ofstream file(path, std::ios::binary);
  for (const auto& tensor : results) file.write(reinterpret_cast<const char*>(tensor.data()), static_cast<std::streamsize>(4 * tensor.size()));
}

// The largest difference of a tensor from that of the file, relative to its norm.
double difference(const Results& results, const char* path) {
  std::ifstream file(path, std::ios::binary);
  double largest = 0;
  for (const auto& tensor : results) {
    std::vector<float> other(tensor.size());
    if (!file.read(reinterpret_cast<char*>(other.data()), static_cast<std::streamsize>(4 * other.size()))) return INFINITY;
    double apart = 0, norm = 0;
    for (size_t i = 0; i < other.size(); ++i) {
      apart += std::pow(static_cast<double>(tensor[i]) - other[i], 2);
      norm += std::pow(static_cast<double>(other[i]), 2);
    }
    if (apart > 0) largest = std::max(largest, std::sqrt(apart / norm));
  }
  return file.get() == EOF ? largest : INFINITY;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 4) return 2;
  const Library library(argv[1]);
  std::printf("operators: %s\n", library.function<const char*()>("mbv2_instruction_set")());
  bool good = true;
  for (int threads = 1; threads <= 3; ++threads) {
    library.function<int(int)>("mbv2_set_threads")(threads);
    Results results, halves;
    good &= all_operators(library, "float32", results);
    good &= all_operators(library, "bfloat16", halves);
    if (threads > 1 || argc == 2) continue;
    if (std::strcmp(argv[2], "write") == 0) {
      write(results, argv[3]);
    } else {
      const double found = difference(results, argv[3]);
      std::printf("largest difference: %.2g of a tensor's norm (at most %.0g)\n", found, kBound);
      good &= found <= kBound;
    }
  }
  std::puts(good ? "ok" : "failed");
  return good ? 0 : 1;
}
