// What operators are called with, read and checked.
//
// Layouts: activations (N, H, W, C), weights as the parameters lie (OIHW). `switches` is int32 (8): kind, stride, TensorFlow
// padding, residual, frozen statistics. `numbers` is float32 (8): eps, momentum, three pixel means, three pixel scales.
// `saved` is float32 (4, C): mean, 1 / sqrt(variance + eps), scale, shift of one BatchNorm.
#pragma once

#include <cstring>

#include "call.h"
#include "passes.h"

namespace mbv2 {

enum Kind { kStem = 0, kExpand = 1 };

struct Options {
  int kind, stride;
  bool same, residual;
  NormOptions norm;
  const float *pixel_mean, *pixel_scale;
};

Options read_options(Call& call);

// An activation (N, H, W, C).
template <class T = float>
struct Activation {
  const T* data = nullptr;
  int images = 0, height = 0, width = 0, channels = 0;
  int64_t rows() const { return static_cast<int64_t>(images) * height * width; }
};

template <class T = float>
Activation<T> read_activation(Call& call, const char* what) {
  int64_t s[4];
  const T* data = call.next<T>(what, 4, s);
  return {data, static_cast<int>(s[0]), static_cast<int>(s[1]), static_cast<int>(s[2]), call.channels("channels", s[3])};
}

template <class T, class M>
T* read_like(Call& call, const char* what, const Activation<M>& m) {
  return call.exactly<T>(what, {m.images, m.height, m.width, m.channels});
}

Norm read_norm(Call& call, int channels);
// The BatchNorm that `save` wrote in the forward pass.
Norm read_saved(Call& call, Passes& passes, int channels);
void save(const Norm& norm, float* saved);

struct NormOutputs {
  float *saved, *mean, *variance;
};
NormOutputs read_norm_outputs(Call& call, int channels, float* saved);

struct ParameterGradients {
  float *weight, *gamma, *beta;
};
ParameterGradients read_gradients(Call& call, std::initializer_list<int64_t> weight, int channels);

// A 1x1 convolution's input and weights.
struct Matrix {
  Activation<> x;
  const float* weights;
  int outputs;
};
Matrix read_matrix(Call& call);

// The stem and the depthwise filter as the passes take them, without their output.
template <class Y = float>
Stem<Y> stem_of(Passes& passes, const unsigned char* image, const int64_t* shape, int outputs, const Options& o) {
  const Window w = window_of(static_cast<int>(shape[1]), static_cast<int>(shape[2]), 2, o.same);
  Stem<Y> p;
  p.image = image;
  p.pixel = passes.pixel_values(o.pixel_mean, o.pixel_scale);
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

template <class T>
Depthwise<T> depthwise_of(const Activation<T>& x, const Options& o, const float* weights) {
  const Window w = window_of(x.height, x.width, o.stride, o.same);
  Depthwise<T> p;
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

// The bias of a BatchNorm folded into the weights before it, which are to be multiplied by norm.scale.
const float* folded_bias(Passes& passes, Norm& norm, float eps);

// Runs `convolve(sums, centre)` and settles the BatchNorm behind it.
template <class Convolve>
void normalise(Passes& passes, Norm& norm, int64_t rows, const NormOptions& options, const NormOutputs& out, Convolve convolve) {
  passes.prepare(norm, options.eps);
  if (options.frozen) {
    convolve(static_cast<Totals*>(nullptr), static_cast<float*>(nullptr));
    std::memcpy(out.mean, norm.moving_mean, sizeof(float) * norm.channels);
    std::memcpy(out.variance, norm.moving_variance, sizeof(float) * norm.channels);
  } else {
    float* centre = passes.memory.channels(norm.channels);
    Totals sums;
    convolve(&sums, centre);
    passes.finish(norm, sums, centre, rows, options, out.mean, out.variance);
  }
  save(norm, out.saved);
}

}  // namespace mbv2
