// Separable resampling of 4-byte pixels with Pillow's antialiased filters, in 16-bit fixed point, for the loader.
//
// shrink.h does it to the bit as Pillow, in 32 bits, for storage. The two stay apart: to 224 x 224, shrink.h takes 0.8
// times as long from 230 to 375 pixels, but 1.13 times from 500 x 375 and 1.22 times from 1000 x 750 (medians of 61
// alternating runs, AVX2); it has one filter; and the pixels that training has seen would change.
#ifndef IMNET_PREP_NATIVE_RESAMPLE_H_
#define IMNET_PREP_NATIVE_RESAMPLE_H_

#include <cstdint>
#include <vector>

namespace imnet {

enum class Filter { kBilinear = 0, kBicubic = 1, kBox = 2, kLanczos = 3 };
constexpr int kFilters = 4;

// One axis: output sample i is the sum over t of coef[i * taps + t] * input[start[i] + t] / 2^14.
struct Axis {
 public:
  int size = 0;   // output samples
  int taps = 0;   // even; those beyond count[i] are 0
  int first = 0;  // lowest input sample that is used
  int end = 0;    // one past the highest
  std::vector<int32_t> start;
  std::vector<int32_t> count;
  std::vector<int16_t> coef;

  // Maps [in0, in1) of the input to `size` samples; only input in [lo, hi) is looked at.
  void Build(Filter filter, double in0, double in1, int lo, int hi, int out_size, bool flip);

 private:
  std::vector<double> weights_;
};

// Pixels of slack that a source row must have beyond its last one.
constexpr int kSlackPixels = 4;

// Resamples two rows of RGBX along x: source pixel `origin` lies at rows[0][0]. Writes axis.size pixels to each output.
void HorizontalPair(const Axis& axis, int origin, const uint8_t* const rows[2], uint8_t* const out[2]);

// Resamples along y: output row i of `axis` from ring rows (row y at ring[(y % ring_rows) * stride]); writes packed RGB.
void Vertical(const Axis& axis, int i, const uint8_t* ring, int ring_rows, int stride, int width, uint8_t* out);

}  // namespace imnet

#endif  // IMNET_PREP_NATIVE_RESAMPLE_H_
