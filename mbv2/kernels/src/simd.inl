// Vectors through the compiler's own extension (GCC and Clang, any processor). Included by vector.cc alone, inside the
// namespace of one instruction set, which sets LANES.
//
// Wide: LANES floats. Eight: 8 floats, as channels come in eights.

#define INLINE inline __attribute__((always_inline))

typedef float Wide __attribute__((vector_size(LANES * 4)));
typedef float WideAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32)));
typedef float EightAt __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t WideBits __attribute__((vector_size(LANES * 4)));
typedef uint32_t EightBits __attribute__((vector_size(32)));
typedef uint16_t WideHalves __attribute__((vector_size(LANES * 2)));
typedef uint16_t WideHalvesAt __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint16_t EightHalves __attribute__((vector_size(16)));
typedef uint16_t EightHalvesAt __attribute__((vector_size(16), aligned(2), may_alias));

INLINE Wide wide(const float* p) { return *reinterpret_cast<const WideAt*>(p); }
INLINE void put(float* p, Wide v) { *reinterpret_cast<WideAt*>(p) = v; }
INLINE Eight eight(const float* p) { return *reinterpret_cast<const EightAt*>(p); }
#if LANES != 8
INLINE void put(float* p, Eight v) { *reinterpret_cast<EightAt*>(p) = v; }
#endif

INLINE Wide wide(const bfloat16* p) {
#if LANES == 16  // GCC would convert two halves and join them
  return reinterpret_cast<Wide>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
#else
  return reinterpret_cast<Wide>(__builtin_convertvector(*reinterpret_cast<const WideHalvesAt*>(p), WideBits) << 16);
#endif
}
INLINE Eight eight(const bfloat16* p) {
  return reinterpret_cast<Eight>(__builtin_convertvector(*reinterpret_cast<const EightHalvesAt*>(p), EightBits) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
template <class Bits, class V>
INLINE Bits rounded(V v) {
  const Bits bits = reinterpret_cast<Bits>(v), up = bits + 0x7fff + ((bits >> 16) & 1);
  return (v == v ? up : bits | 0x400000) >> 16;
}
#if defined(__AVX512BF16__)
INLINE void put(bfloat16* p, Wide v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
INLINE void put(bfloat16* p, Eight v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), (__m128i)_mm256_cvtneps_pbh((__m256)v));
}
#else
INLINE void put(bfloat16* p, Wide v) {
#if LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded<WideBits>(v))));
#else
  *reinterpret_cast<WideHalvesAt*>(p) = __builtin_convertvector(rounded<WideBits>(v), WideHalves);
#endif
}
#if LANES != 8
INLINE void put(bfloat16* p, Eight v) {
  *reinterpret_cast<EightHalvesAt*>(p) = __builtin_convertvector(rounded<EightBits>(v), EightHalves);
}
#endif
#endif

// Asks for memory that is read or written soon; past the end of a tensor that does no harm.
template <class T>
INLINE void ask_for(const T* p) {
  __builtin_prefetch(p, 0, 2);
}

// Sixteen values or eight, by the type that is asked for.
template <class V, class T>
INLINE V get(const T* p) {
  if constexpr (sizeof(V) == sizeof(Eight)) return eight(p);
  else return wide(p);
}

// Calls each(kind, c) for vectors of channels, from c on: wide ones, then perhaps one of eight. `kind` has the vector's type.
template <class F>
INLINE void by_channels(int64_t channels, F each) {
  int64_t c = 0;
#if LANES == 16
  for (; c + 16 <= channels; c += 16) each(Wide{}, c);
#endif
  for (; c < channels; c += 8) each(Eight{}, c);
}

// The first `count` of a wide vector: all of them, or 8 of 16 at the right edge of a matrix.
template <class T>
INLINE Wide wide_upto(const T* p, int count) {
#if LANES == 16
  if (count < 16) {
    Wide v = {};
    *reinterpret_cast<EightAt*>(&v) = eight(p);
    return v;
  }
#endif
  (void)count;
  return wide(p);
}
template <class T>
INLINE void put_upto(T* p, Wide v, int count) {
#if LANES == 16
  if (count < 16) {
    put(p, static_cast<Eight>(*reinterpret_cast<const EightAt*>(&v)));
    return;
  }
#endif
  (void)count;
  put(p, v);
}

// The larger and the smaller of a bound and v; v where it is NaN. That is what x86's instructions give, in place of which GCC
// compares and blends.
template <class V>
INLINE V at_least(V bound, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_max_ps((__m512)bound, (__m512)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_max_ps((__m256)bound, (__m256)v);
#endif
  return bound > v ? bound : v;
}
template <class V>
INLINE V at_most(V bound, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_min_ps((__m512)bound, (__m512)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_min_ps((__m256)bound, (__m256)v);
#endif
  return bound < v ? bound : v;
}

template <class V>
INLINE V relu6(V v) {
  return at_most(V{} + 6.0f, at_least(V{}, v));
}

// g where 0 < v < 6, else 0.
template <class V>
INLINE V masked(V g, V v) {
  const V zero = {}, six = zero + 6.0f;
  return ((v > zero) & (v < six)) ? g : zero;
}

template <class V>
INLINE V apply(V v, const Affine& in, int64_t c) {
  if (in.scale) v = v * get<V>(in.scale + c) + get<V>(in.shift + c);
  return in.relu6 ? relu6(v) : v;
}

template <class V>
INLINE void add_to(double* sums, V v, int64_t c) {
#if LANES == 16  // GCC would add one after another
  if constexpr (sizeof(V) == 64) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v)), high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
    _mm512_storeu_pd(sums + c, _mm512_add_pd(_mm512_loadu_pd(sums + c), low));
    _mm512_storeu_pd(sums + c + 8, _mm512_add_pd(_mm512_loadu_pd(sums + c + 8), high));
    return;
  }
#endif
  for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) sums[c + i] += v[i];
}
