// Antialiased shrinking to the bit as Pillow does it (Image.resize with BILINEAR), while the rows of an image come in.
#ifndef IMNET_PREP_NATIVE_SHRINK_H_
#define IMNET_PREP_NATIVE_SHRINK_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace imnet {

class Shrinker {
 public:
  // `channels`: 1 or 3, packed. `out`: room for out_height rows of out_width pixels.
  void Start(int channels, int in_width, int in_height, int out_width, int out_height, uint8_t* out);

  // Bytes behind an input row's last pixel that are read, whatever they hold.
  size_t Slack() const { return static_cast<size_t>(channels_ * x_.taps) + 19; }

  // The next input rows, from the top; each output row is written as soon as it can be.
  void Take(const uint8_t* const* rows, int count);

 private:
  // Output sample i is the sum over t of weight[i * taps + t] * input[start[i] + t], over 2^22 and rounded.
  struct Axis {
    int in = 0, out = 0;
    int taps = 0;  // 3 or a multiple of 4; the weights beyond count[i] are 0
    std::vector<int32_t> start, count, weight;

    void Build(int in_size, int out_size);
  };

  uint8_t* RingRow(int y) { return ring_.data() + static_cast<size_t>(y % ring_rows_) * ring_stride_; }
  void HorizontalPair(const uint8_t* const in[2], uint8_t* const out[2]) const;
  void Emit();

  Axis x_, y_;
  int channels_ = 3, in_rows_ = 0, out_rows_ = 0;
  uint8_t* out_ = nullptr;
  // The last input rows, shrunk along x.
  std::vector<uint8_t> ring_;
  size_t ring_stride_ = 0;
  int ring_rows_ = 1;
  std::vector<const uint8_t*> rows_;
};

}  // namespace imnet

#endif  // IMNET_PREP_NATIVE_SHRINK_H_
