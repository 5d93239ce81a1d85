#include "resample.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "vectors.h"

namespace imnet {
namespace {

constexpr int kBits = 14;  // 1.0 is 16384, so a weight of up to 2 fits an int16
constexpr int32_t kHalf = 1 << (kBits - 1);

constexpr double kPi = 3.14159265358979323846;

double Sinc(double x) { return x == 0.0 ? 1.0 : std::sin(x * kPi) / (x * kPi); }

// Source: Pillow's src/libImaging/Resample.c defines these kernels (bicubic with a = -0.5).
double Kernel(Filter filter, double x) {
  if (filter == Filter::kBox) return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
  x = std::fabs(x);
  switch (filter) {
    case Filter::kBilinear:
      return x < 1.0 ? 1.0 - x : 0.0;
    case Filter::kBox:
      break;
    case Filter::kBicubic:
      if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
      return x < 2.0 ? ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0 : 0.0;
    case Filter::kLanczos:
      return x < 3.0 ? Sinc(x) * Sinc(x / 3.0) : 0.0;
  }
  return 0.0;
}

double Support(Filter filter) {
  switch (filter) {
    case Filter::kBilinear:
      return 1.0;
    case Filter::kBox:
      return 0.5;
    case Filter::kBicubic:
      return 2.0;
    case Filter::kLanczos:
      return 3.0;
  }
  return 1.0;
}

inline uint8_t Clip(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kBits, 0, 255)); }

inline Ints Clip(Ints sum) {
  const Ints least = {}, most = least + 255;
  sum >>= kBits;
  sum = sum < least ? least : sum;
  return sum > most ? most : sum;
}

void HorizontalVectors(const Axis& axis, int origin, const uint8_t* row, uint8_t* out) {
  const int16_t* coef = axis.coef.data();
  for (int i = 0; i < axis.size; ++i, coef += axis.taps) {
    const uint8_t* const pixel = row + 4 * static_cast<ptrdiff_t>(axis.start[i] - origin);
    Ints sum = Ints{} + kHalf, four[4];
    int t = 0;
    for (; t + 4 <= axis.taps; t += 4) {
      Widen(pixel + 4 * t, four);
      for (int n = 0; n < 4; ++n) sum += four[n] * coef[t + n];
    }
    for (; t < axis.taps; ++t) sum += Widen(pixel + 4 * t) * coef[t];
    sum = Clip(sum);
    const Bytes bytes = Narrow(sum, sum, sum, sum);
    std::memcpy(out + 4 * i, &bytes, 4);
  }
}

// Four pixels at a time; gives how many were written.
int VerticalVectors(const int16_t* coef, const uint8_t* const* rows, int count, int width, uint8_t* out) {
  int x = 0;
  // Each pixel is stored with a byte more, which the next one overwrites: the last is left to the caller.
  for (; x + 5 <= width; x += 4) {
    Ints sum[4], four[4];
    for (Ints& pixel : sum) pixel = Ints{} + kHalf;
    for (int t = 0; t < count; ++t) {
      Widen(rows[t] + 4 * x, four);
      for (int n = 0; n < 4; ++n) sum[n] += four[n] * coef[t];
    }
    const Bytes bytes = Narrow(Clip(sum[0]), Clip(sum[1]), Clip(sum[2]), Clip(sum[3]));
    const auto pixels = reinterpret_cast<Ints>(bytes);
    for (int n = 0; n < 4; ++n) {
      const int32_t pixel = pixels[n];
      std::memcpy(out + 3 * (x + n), &pixel, 4);
    }
  }
  return x;
}

// From pixel `from` on.
void VerticalRest(const int16_t* coef, const uint8_t* const* rows, int count, int width, uint8_t* out, int from) {
  for (int x = from; x < width; ++x) {
    int32_t sum[3] = {kHalf, kHalf, kHalf};
    for (int t = 0; t < count; ++t) {
      for (int c = 0; c < 3; ++c) sum[c] += coef[t] * rows[t][4 * x + c];
    }
    for (int c = 0; c < 3; ++c) out[3 * x + c] = Clip(sum[c]);
  }
}

#ifdef IMNET_AVX2

// Two taps of one pixel become one multiply-add: bytes of pixels p, p+1 are interleaved by channel as 16-bit pairs.
// The lower lane is the first row, the upper lane the second.
__attribute__((target("avx2"))) void HorizontalAvx2(const Axis& axis, int origin, const uint8_t* const rows[2],
                                                    uint8_t* const out[2]) {
  const __m256i low = _mm256_setr_epi8(0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1,  //
                                       0, -1, 4, -1, 1, -1, 5, -1, 2, -1, 6, -1, 3, -1, 7, -1);
  const __m256i high = _mm256_setr_epi8(8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1,  //
                                        8, -1, 12, -1, 9, -1, 13, -1, 10, -1, 14, -1, 11, -1, 15, -1);
  const __m256i half = _mm256_set1_epi32(kHalf);
  const int taps = axis.taps;
  const int16_t* coef = axis.coef.data();
  for (int i = 0; i < axis.size; ++i, coef += taps) {
    const size_t offset = 4 * static_cast<size_t>(axis.start[i] - origin);
    const uint8_t* a = rows[0] + offset;
    const uint8_t* b = rows[1] + offset;
    __m256i sum = half;
    int t = 0;
    for (; t + 4 <= taps; t += 4) {
      const __m256i pixels = _mm256_inserti128_si256(
          _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a + 4 * t))),
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 4 * t)), 1);
      int32_t pair[2];
      std::memcpy(pair, coef + t, sizeof pair);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, low), _mm256_set1_epi32(pair[0])));
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, high), _mm256_set1_epi32(pair[1])));
    }
    if (t < taps) {  // two more
      const __m256i pixels = _mm256_inserti128_si256(
          _mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a + 4 * t))),
          _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b + 4 * t)), 1);
      int32_t pair;
      std::memcpy(&pair, coef + t, sizeof pair);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_shuffle_epi8(pixels, low), _mm256_set1_epi32(pair)));
    }
    sum = _mm256_srai_epi32(sum, kBits);
    sum = _mm256_packs_epi32(sum, sum);
    sum = _mm256_packus_epi16(sum, sum);
    const int32_t first = _mm_cvtsi128_si32(_mm256_castsi256_si128(sum));
    const int32_t second = _mm_cvtsi128_si32(_mm256_extracti128_si256(sum, 1));
    std::memcpy(out[0] + 4 * i, &first, 4);
    std::memcpy(out[1] + 4 * i, &second, 4);
  }
}

// Eight pixels at a time; gives how many were written.
__attribute__((target("avx2"))) int VerticalAvx2(const int16_t* coef, const uint8_t* const* rows, int count, int width,
                                                 uint8_t* out) {
  const __m256i zero = _mm256_setzero_si256();
  const __m256i half = _mm256_set1_epi32(kHalf);
  const __m256i drop = _mm256_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1,  //
                                        0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, -1, -1, -1, -1);
  int x = 0;
  // The last store of a group writes 4 bytes beyond its 24, so the last group of a row is left to the caller.
  for (; x + 10 <= width; x += 8) {
    __m256i s0 = half, s1 = half, s2 = half, s3 = half;
    for (int t = 0; t < count; t += 2) {
      const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[t] + 4 * x));
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[t + 1] + 4 * x));
      int32_t pair;
      std::memcpy(&pair, coef + t, sizeof pair);
      const __m256i weight = _mm256_set1_epi32(pair);
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weight));
      s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weight));
      s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weight));
      s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weight));
    }
    s0 = _mm256_packs_epi32(_mm256_srai_epi32(s0, kBits), _mm256_srai_epi32(s1, kBits));
    s2 = _mm256_packs_epi32(_mm256_srai_epi32(s2, kBits), _mm256_srai_epi32(s3, kBits));
    const __m256i rgb = _mm256_shuffle_epi8(_mm256_packus_epi16(s0, s2), drop);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * x), _mm256_castsi256_si128(rgb));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 3 * x + 12), _mm256_extracti128_si256(rgb, 1));
  }
  return x;
}

#endif  // IMNET_AVX2

}  // namespace

void Axis::Build(Filter filter, double in0, double in1, int lo, int hi, int out_size, bool flip) {
  const double scale = (in1 - in0) / out_size;
  const double stretch = std::max(scale, 1.0);
  const double support = Support(filter) * stretch;
  size = out_size;
  taps = (static_cast<int>(std::ceil(support)) * 2 + 1 + 1) / 2 * 2;
  start.resize(size);
  count.resize(size);
  coef.assign(static_cast<size_t>(size) * taps, 0);
  first = hi;
  end = lo;
  weights_.resize(taps);
  int longest = 0;
  for (int i = 0; i < size; ++i) {
    const double centre = in0 + (i + 0.5) * scale;
    const int from = std::clamp(static_cast<int>(std::floor(centre - support + 0.5)), lo, hi - 1);
    const int to = std::clamp(static_cast<int>(std::floor(centre + support + 0.5)), from + 1, hi);
    const int n = std::min(to - from, taps);
    double total = 0.0;
    for (int t = 0; t < n; ++t) {
      weights_[t] = Kernel(filter, (from + t - centre + 0.5) / stretch);
      total += weights_[t];
    }
    const int place = flip ? size - 1 - i : i;
    int16_t* fixed = &coef[static_cast<size_t>(place) * taps];
    int32_t left = 1 << kBits;
    int largest = 0;
    for (int t = 0; t < n; ++t) {
      const double share = total != 0.0 ? weights_[t] / total : (t == 0);
      fixed[t] = static_cast<int16_t>(std::lrint(share * (1 << kBits)));
      left -= fixed[t];
      if (fixed[t] > fixed[largest]) largest = t;
    }
    fixed[largest] = static_cast<int16_t>(fixed[largest] + left);  // flat areas stay exactly as they are
    start[place] = from;
    count[place] = n;
    longest = std::max(longest, n);
    first = std::min(first, from);
    end = std::max(end, from + n);
  }
  const int needed = (longest + 1) / 2 * 2;
  if (needed < taps) {
    for (int i = 1; i < size; ++i) {
      std::memmove(&coef[static_cast<size_t>(i) * needed], &coef[static_cast<size_t>(i) * taps], needed * sizeof(int16_t));
    }
    taps = needed;
  }
}

void HorizontalPair(const Axis& axis, int origin, const uint8_t* const rows[2], uint8_t* const out[2]) {
#ifdef IMNET_AVX2
  if (HasAvx2()) {
    HorizontalAvx2(axis, origin, rows, out);
    return;
  }
#endif
  HorizontalVectors(axis, origin, rows[0], out[0]);
  if (out[1] != out[0]) HorizontalVectors(axis, origin, rows[1], out[1]);
}

void Vertical(const Axis& axis, int i, const uint8_t* ring, int ring_rows, int stride, int width, uint8_t* out) {
  const int count = axis.count[i];
  const int16_t* coef = &axis.coef[static_cast<size_t>(i) * axis.taps];
  constexpr int kMost = 64;
  const uint8_t* some[kMost];
  std::vector<const uint8_t*> many;
  const uint8_t** rows = some;
  if (count + 1 > kMost) {
    many.resize(count + 1);
    rows = many.data();
  }
  for (int t = 0; t < count; ++t) rows[t] = ring + static_cast<size_t>((axis.start[i] + t) % ring_rows) * stride;
  rows[count] = rows[count - 1];  // the partner of an odd last tap; its weight is 0
#ifdef IMNET_AVX2
  const int done = (HasAvx2() ? VerticalAvx2 : VerticalVectors)(coef, rows, count, width, out);
#else
  const int done = VerticalVectors(coef, rows, count, width, out);
#endif
  VerticalRest(coef, rows, count, width, out, done);
}

}  // namespace imnet
