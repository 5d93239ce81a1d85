// Calls the block and head operators at many sizes, on tensors of exactly their size, from two threads at once and with
// pools of 1 to 3: for AddressSanitizer, ThreadSanitizer and valgrind (`make sanitize`). Exit status 0: nothing refused, no
// NaN, and the same bits twice.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

using Operator = int(int, void**, int*, int64_t**, const char**, void*, void*);
extern "C" {
Operator mbv2_stem_block_train, mbv2_stem_block_grad, mbv2_stem_block_infer, mbv2_block_train, mbv2_block_grad, mbv2_block_infer,
    mbv2_head_train, mbv2_head_grad, mbv2_head_infer;
const char* mbv2_last_error();
int mbv2_set_threads(int);
}

namespace {

// A tensor of exactly its size: reading one element past it is an error that a sanitizer sees.
struct Tensor {
  std::vector<int64_t> shape;
  const char* type;
  std::unique_ptr<unsigned char[]> bytes;
  size_t size;

  Tensor(std::vector<int64_t> s, const char* t = "float32") : shape(std::move(s)), type(t), size(!std::strcmp(t, "uint8") ? 1 : 4) {
    for (const int64_t d : shape) size *= static_cast<size_t>(d);
    bytes.reset(new unsigned char[size]);
  }
  float* floats() { return reinterpret_cast<float*>(bytes.get()); }
  int32_t* ints() { return reinterpret_cast<int32_t*>(bytes.get()); }
  size_t count() const { return size / 4; }
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

bool run(Operator* op, const char* name, std::vector<Tensor*> all, size_t outputs) {
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
  if (op(static_cast<int>(all.size()), data.data(), ndims.data(), shapes.data(), types.data(), nullptr, nullptr)) {
    std::fprintf(stderr, "%s refused: %s\n", name, mbv2_last_error());
    return false;
  }
  for (size_t i = all.size() - outputs; i < all.size(); ++i)
    for (size_t k = 0; k < all[i]->count(); ++k)
      if (!std::isfinite(all[i]->floats()[k])) {
        std::fprintf(stderr, "%s: output %zu is not finite\n", name, i);
        return false;
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

// Train, gradient, inference of one block; its outputs end to end, to be compared.
bool block(const Size& s, std::vector<float>& result) {
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
  for (const auto& shape : shapes) out.emplace_back(shape);
  if (!run(s.stem ? mbv2_stem_block_train : mbv2_block_train, "block_train", pointers(in, out), out.size())) return false;

  Tensor dz = filled(r, z, 1);
  std::vector<Tensor*> call{&dz, &in[0]};
  for (int i = 1; i < 7; ++i) call.push_back(&out[i]);
  for (const int i : {1, 6, 11, 16, 17}) call.push_back(&in[i]);
  std::vector<Tensor> grads;
  if (!s.stem) grads.emplace_back(in[0].shape);
  for (const int i : {1, 6, 11})
    for (int k = 0; k < 3; ++k) grads.emplace_back(k ? std::vector<int64_t>{in[i].shape[0]} : in[i].shape);
  for (Tensor& t : grads) call.push_back(&t);
  if (!run(s.stem ? mbv2_stem_block_grad : mbv2_block_grad, "block_grad", call, grads.size())) return false;

  std::vector<Tensor> inferred;
  inferred.emplace_back(z);
  if (!run(s.stem ? mbv2_stem_block_infer : mbv2_block_infer, "block_infer", pointers(in, inferred), 1)) return false;
  for (auto* list : {&out, &grads, &inferred})
    for (Tensor& t : *list) result.insert(result.end(), t.floats(), t.floats() + t.count());
  return true;
}

bool head(int64_t batch, int64_t size, int64_t inputs, int64_t outputs) {
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
  for (const auto& shape : shapes) out.emplace_back(shape);
  if (!run(mbv2_head_train, "head_train", pointers(in, out), out.size())) return false;
  std::vector<Tensor> grads;
  grads.emplace_back(in[0].shape);
  grads.emplace_back(in[1].shape);
  grads.emplace_back(std::vector<int64_t>{outputs});
  grads.emplace_back(std::vector<int64_t>{outputs});
  std::vector<Tensor*> call{&out[0], &in[0], &out[1], &out[2], &in[1], &in[6], &in[7]};
  for (Tensor& t : grads) call.push_back(&t);
  if (!run(mbv2_head_grad, "head_grad", call, grads.size())) return false;
  inferred.emplace_back(std::vector<int64_t>{batch, outputs});
  return run(mbv2_head_infer, "head_infer", pointers(in, inferred), 1);
}

}  // namespace

int main() {
  const Size sizes[] = {
      {true, 2, 33, 18, 3, 32, 16, 1, 0},  {true, 1, 8, 9, 3, 16, 8, 1, 1},     {true, 1, 3, 1, 3, 48, 24, 1, 0},
      {false, 2, 9, 7, 16, 96, 24, 2, 0},  {false, 3, 8, 6, 24, 144, 24, 1, 0}, {false, 1, 10, 10, 8, 48, 8, 2, 1},
      {false, 4, 2, 2, 40, 240, 40, 1, 1}, {false, 2, 1, 1, 160, 960, 160, 1, 0}, {false, 1, 5, 60, 24, 144, 32, 1, 0},
  };
  bool good = true;
  for (int threads = 1; threads <= 3; ++threads) {
    mbv2_set_threads(threads);
    for (const Size& s : sizes) {
      std::vector<float> first, second;
      bool also = true;
      std::thread beside([&] { also = block(s, second); });
      good &= block(s, first);
      beside.join();
      good &= also && first.size() == second.size() && !std::memcmp(first.data(), second.data(), first.size() * sizeof(float));
    }
    good &= head(3, 7, 112, 1280) && head(1, 1, 320, 64);
  }
  std::puts(good ? "ok" : "failed");
  return good ? 0 : 1;
}
