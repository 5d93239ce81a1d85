// Vectors through the compiler's own extension (GCC and Clang, any processor). Included by vector.cc alone, inside the
// namespace of one instruction set, which sets LANES.
//
// Wide: LANES floats, for the matrix products. Eight: 8 floats, for everything else, as channels come in eights.

#define INLINE inline __attribute__((always_inline))

typedef float Wide __attribute__((vector_size(LANES * 4)));
typedef float WideAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef float Eight __attribute__((vector_size(32)));
typedef float EightAt __attribute__((vector_size(32), aligned(4), may_alias));
typedef int EightInt __attribute__((vector_size(32)));

INLINE Wide wide(const float* p) { return *reinterpret_cast<const WideAt*>(p); }
INLINE void put(float* p, Wide v) { *reinterpret_cast<WideAt*>(p) = v; }
INLINE Eight eight(const float* p) { return *reinterpret_cast<const EightAt*>(p); }
#if LANES != 8
INLINE void put(float* p, Eight v) { *reinterpret_cast<EightAt*>(p) = v; }
#endif

// The first `count` of a wide vector: all of them, or 8 of 16 at the right edge of a matrix.
INLINE Wide wide_upto(const float* p, int count) {
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
INLINE void put_upto(float* p, Wide v, int count) {
#if LANES == 16
  if (count < 16) {
    *reinterpret_cast<EightAt*>(p) = *reinterpret_cast<const EightAt*>(&v);
    return;
  }
#endif
  (void)count;
  put(p, v);
}

// Written so that NaN stays NaN: the comparison is false for it.
template <class V>
INLINE V relu6(V v) {
  const V zero = {}, six = zero + 6.0f;
  v = zero > v ? zero : v;
  return six < v ? six : v;
}

// g where 0 < v < 6, else 0.
INLINE Eight masked(Eight g, Eight v) {
  const Eight zero = {}, six = zero + 6.0f;
  return reinterpret_cast<Eight>(reinterpret_cast<EightInt>(g) & ((v > zero) & (v < six)));
}

INLINE Eight apply(Eight v, const Affine& in, int c) {
  if (in.scale) v = v * eight(in.scale + c) + eight(in.shift + c);
  return in.relu6 ? relu6(v) : v;
}

INLINE void add_to(double* sums, Eight v, int c) {
  for (int i = 0; i < 8; ++i) sums[c + i] += v[i];
}
