#include "shrink.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vectors.h"

namespace imnet {
namespace {

// Source: Pillow's src/libImaging/Resample.c defines the arithmetic: along x, then along y, 8 bits between the two,
// weights of 22 bits. They are not negative, so no sum leaves 0 to 255.
constexpr int kBits = 22;
constexpr int32_t kHalf = 1 << (kBits - 1);

void HorizontalGrey(const uint8_t* row, const int32_t* start, const int32_t* weight, int taps, int size, uint8_t* out) {
  for (int i = 0; i < size; ++i, weight += taps) {
    int32_t sum = kHalf;
    for (int t = 0; t < taps; ++t) sum += weight[t] * row[start[i] + t];
    out[i] = static_cast<uint8_t>(sum >> kBits);
  }
}

// Three channels. Writes one byte beyond the output row.
void HorizontalVectors(const uint8_t* row, const int32_t* start, const int32_t* weight, int taps, int size, uint8_t* out) {
  for (int i = 0; i < size; ++i, weight += taps) {
    const uint8_t* const pixel = row + 3 * static_cast<ptrdiff_t>(start[i]);
    Ints sum = Ints{} + kHalf;
    for (int t = 0; t < taps; ++t) sum += Widen(pixel + 3 * t) * weight[t];
    sum >>= kBits;
    const Bytes bytes = Narrow(sum, sum, sum, sum);
    std::memcpy(out + 3 * i, &bytes, 4);
  }
}

// 16 bytes at a time; gives how many were written.
int VerticalVectors(const uint8_t* const* rows, const int32_t* weight, int count, int size, uint8_t* out) {
  int k = 0;
  for (; k + 16 <= size; k += 16) {
    Ints sum[4], values[4];
    for (Ints& part : sum) part = Ints{} + kHalf;
    for (int t = 0; t < count; ++t) {
      Widen(rows[t] + k, values);
      for (int n = 0; n < 4; ++n) sum[n] += values[n] * weight[t];
    }
    const Bytes bytes = Narrow(sum[0] >> kBits, sum[1] >> kBits, sum[2] >> kBits, sum[3] >> kBits);
    std::memcpy(out + k, &bytes, sizeof bytes);
  }
  return k;
}

// From byte `from` on.
void VerticalRest(const uint8_t* const* rows, const int32_t* weight, int count, int size, uint8_t* out, int from) {
  for (int k = from; k < size; ++k) {
    int32_t sum = kHalf;
    for (int t = 0; t < count; ++t) sum += weight[t] * rows[t][k];
    out[k] = static_cast<uint8_t>(sum >> kBits);
  }
}

#ifdef IMNET_AVX2

// Pixel n of 16 bytes, each channel in 32 bits.
alignas(16) constexpr int8_t kSpread[4][16] = {
    {0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, -1, -1, -1, -1},
    {3, -1, -1, -1, 4, -1, -1, -1, 5, -1, -1, -1, -1, -1, -1, -1},
    {6, -1, -1, -1, 7, -1, -1, -1, 8, -1, -1, -1, -1, -1, -1, -1},
    {9, -1, -1, -1, 10, -1, -1, -1, 11, -1, -1, -1, -1, -1, -1, -1},
};

// Three channels of two rows: one in the lower lane, one in the upper. Writes one byte beyond each output row.
__attribute__((target("avx2"))) void HorizontalAvx2(const uint8_t* const rows[2], const int32_t* start,
                                                    const int32_t* weight, int taps, int size, uint8_t* const out[2]) {
  __m256i pixel[4];
  for (int n = 0; n < 4; ++n) {
    pixel[n] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kSpread[n])));
  }
  const __m256i bytes = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                         0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const uint8_t *const upper = rows[0], *const lower = rows[1];
  uint8_t *const to_upper = out[0], *const to_lower = out[1];
  for (int i = 0; i < size; ++i, weight += taps) {
    const uint8_t* a = upper + 3 * static_cast<ptrdiff_t>(start[i]);
    const uint8_t* b = lower + 3 * static_cast<ptrdiff_t>(start[i]);
    __m256i sum = _mm256_set1_epi32(kHalf);
    for (int t = 0; t < taps; t += 4, a += 12, b += 12) {
      const __m256i four =
          _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a))),
                                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1);
      for (int n = 0; n < 4; ++n) {
        if (n == 3 && t + 3 == taps) break;  // three taps is the most common number
        const __m256i values = _mm256_shuffle_epi8(four, pixel[n]);
        sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(values, _mm256_set1_epi32(weight[t + n])));
      }
    }
    sum = _mm256_shuffle_epi8(_mm256_srli_epi32(sum, kBits), bytes);
    const int32_t first = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
    const int32_t second = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
    std::memcpy(to_upper + 3 * i, &first, 4);
    std::memcpy(to_lower + 3 * i, &second, 4);
  }
}

// 32 bytes at a time; gives how many were written.
__attribute__((target("avx2"))) int VerticalAvx2(const uint8_t* const* rows, const int32_t* weight, int count, int size,
                                                 uint8_t* out) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int k = 0;
  for (; k + 32 <= size; k += 32) {
    __m256i sum[4];
    for (__m256i& part : sum) part = _mm256_set1_epi32(kHalf);
    for (int t = 0; t < count; ++t) {
      const __m256i factor = _mm256_set1_epi32(weight[t]);
      for (int n = 0; n < 4; ++n) {
        const __m256i values =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(rows[t] + k + 8 * n)));
        sum[n] = _mm256_add_epi32(sum[n], _mm256_mullo_epi32(values, factor));
      }
    }
    const __m256i low = _mm256_packus_epi32(_mm256_srli_epi32(sum[0], kBits), _mm256_srli_epi32(sum[1], kBits));
    const __m256i high = _mm256_packus_epi32(_mm256_srli_epi32(sum[2], kBits), _mm256_srli_epi32(sum[3], kBits));
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), packed);
  }
  return k;
}

#endif  // IMNET_AVX2

}  // namespace

void Shrinker::Axis::Build(int in_size, int out_size) {
  if (in == in_size && out == out_size) return;
  in = 0;  // until all is there
  out = out_size;
  const double scale = static_cast<double>(in_size) / out;
  const double support = std::max(scale, 1.0), inverse = 1.0 / support;
  const int most = 2 * static_cast<int>(std::ceil(support)) + 1;
  taps = (most + 3) / 4 * 4;
  start.resize(out);
  count.resize(out);
  weight.assign(static_cast<size_t>(out) * taps, 0);
  std::vector<double> share(most);
  int longest = 0;
  for (int i = 0; i < out; ++i) {
    const double centre = (i + 0.5) * scale;
    const int from = std::max(0, static_cast<int>(centre - support + 0.5));
    const int n = std::min(in_size, static_cast<int>(centre + support + 0.5)) - from;
    double total = 0.0;
    for (int t = 0; t < n; ++t) {
      share[t] = std::max(0.0, 1.0 - std::fabs((t + from - centre + 0.5) * inverse));
      total += share[t];
    }
    for (int t = 0; t < n; ++t) {
      weight[static_cast<size_t>(i) * taps + t] = static_cast<int32_t>(0.5 + share[t] / total * (1 << kBits));
    }
    start[i] = from;
    count[i] = n;
    longest = std::max(longest, n);
  }
  const int needed = longest <= 3 ? 3 : (longest + 3) / 4 * 4;
  for (int i = 1; i < out && needed < taps; ++i) {
    std::memmove(&weight[static_cast<size_t>(i) * needed], &weight[static_cast<size_t>(i) * taps],
                 needed * sizeof(int32_t));
  }
  taps = needed;
  in = in_size;
}

void Shrinker::Start(int channels, int in_width, int in_height, int out_width, int out_height, uint8_t* out) {
  channels_ = channels;
  x_.Build(in_width, out_width);
  y_.Build(in_height, out_height);
  in_rows_ = out_rows_ = 0;
  out_ = out;
  ring_rows_ = y_.taps + 2;
  ring_stride_ = static_cast<size_t>(channels) * out_width + 32;
  ring_.resize(ring_stride_ * ring_rows_);
  rows_.resize(y_.taps);
}

void Shrinker::Take(const uint8_t* const* rows, int count) {
  for (int k = 0; k < count; k += 2) {
    const int last = std::min(k + 1, count - 1);
    const uint8_t* const in[2] = {rows[k], rows[last]};
    uint8_t* const to[2] = {RingRow(in_rows_), RingRow(in_rows_ + last - k)};
    HorizontalPair(in, to);
    in_rows_ += last - k + 1;
    while (out_rows_ < y_.out && y_.start[out_rows_] + y_.count[out_rows_] <= in_rows_) Emit();
  }
}

void Shrinker::HorizontalPair(const uint8_t* const in[2], uint8_t* const out[2]) const {
#ifdef IMNET_AVX2
  if (channels_ == 3 && HasAvx2()) {
    HorizontalAvx2(in, x_.start.data(), x_.weight.data(), x_.taps, x_.out, out);
    return;
  }
#endif
  const auto horizontal = channels_ == 3 ? HorizontalVectors : HorizontalGrey;
  for (int n = 0; n < 2; ++n) horizontal(in[n], x_.start.data(), x_.weight.data(), x_.taps, x_.out, out[n]);
}

void Shrinker::Emit() {
  const int count = y_.count[out_rows_], bytes = channels_ * x_.out;
  const int32_t* const weight = &y_.weight[static_cast<size_t>(out_rows_) * y_.taps];
  for (int t = 0; t < count; ++t) rows_[t] = RingRow(y_.start[out_rows_] + t);
#ifdef IMNET_AVX2
  const int done = (HasAvx2() ? VerticalAvx2 : VerticalVectors)(rows_.data(), weight, count, bytes, out_);
#else
  const int done = VerticalVectors(rows_.data(), weight, count, bytes, out_);
#endif
  VerticalRest(rows_.data(), weight, count, bytes, out_, done);
  out_ += bytes;
  ++out_rows_;
}

}  // namespace imnet
