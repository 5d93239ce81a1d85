// Vectors of 16 bytes through the extension of GCC and Clang: NEON, SSE2, or whatever the processor has. The code for AVX2
// stands beside them, as the extension has no word for its multiply-and-add of pairs.
#ifndef IMNET_PREP_NATIVE_VECTORS_H_
#define IMNET_PREP_NATIVE_VECTORS_H_

#include <cstdint>
#include <cstring>

#include "platform.h"

#if defined(__x86_64__) && !defined(IMNET_PORTABLE)  // IMNET_PORTABLE: for tests
#define IMNET_AVX2 1
#include <immintrin.h>
#endif

namespace imnet {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes are widened as the processors of MindSpore order them");

using Bytes = uint8_t __attribute__((vector_size(16)));
using Shorts = uint16_t __attribute__((vector_size(16)));
using Ints = int32_t __attribute__((vector_size(16)));

#if defined(__clang__)
#define IMNET_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define IMNET_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a){__VA_ARGS__})
#endif

// 16 bytes to 32 bits each. By interleaving with zeros: GCC takes __builtin_convertvector apart here.
inline void Widen(const uint8_t* from, Ints (&to)[4]) {
  const Bytes zero = {};
  const Shorts zeros = {};
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  const auto low = reinterpret_cast<Shorts>(IMNET_SHUFFLE(bytes, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  const auto high =
      reinterpret_cast<Shorts>(IMNET_SHUFFLE(bytes, zero, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
  to[0] = reinterpret_cast<Ints>(IMNET_SHUFFLE(low, zeros, 0, 8, 1, 9, 2, 10, 3, 11));
  to[1] = reinterpret_cast<Ints>(IMNET_SHUFFLE(low, zeros, 4, 12, 5, 13, 6, 14, 7, 15));
  to[2] = reinterpret_cast<Ints>(IMNET_SHUFFLE(high, zeros, 0, 8, 1, 9, 2, 10, 3, 11));
  to[3] = reinterpret_cast<Ints>(IMNET_SHUFFLE(high, zeros, 4, 12, 5, 13, 6, 14, 7, 15));
}

// 4 bytes to 32 bits each.
inline Ints Widen(const uint8_t* from) {
  const Bytes zero = {};
  const Shorts zeros = {};
  Ints four = {};
  std::memcpy(&four, from, 4);
  const auto bytes = reinterpret_cast<Bytes>(four);
  const auto low = reinterpret_cast<Shorts>(IMNET_SHUFFLE(bytes, zero, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  return reinterpret_cast<Ints>(IMNET_SHUFFLE(low, zeros, 0, 8, 1, 9, 2, 10, 3, 11));
}

// The lowest byte of each.
inline Bytes Narrow(Ints a, Ints b, Ints c, Ints d) {
  const auto low = IMNET_SHUFFLE(reinterpret_cast<Shorts>(a), reinterpret_cast<Shorts>(b), 0, 2, 4, 6, 8, 10, 12, 14);
  const auto high = IMNET_SHUFFLE(reinterpret_cast<Shorts>(c), reinterpret_cast<Shorts>(d), 0, 2, 4, 6, 8, 10, 12, 14);
  return IMNET_SHUFFLE(reinterpret_cast<Bytes>(low), reinterpret_cast<Bytes>(high),  //
                       0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

// Whether the code for AVX2 is to be used.
inline bool HasAvx2() {
#ifdef IMNET_AVX2
  static const bool has = __builtin_cpu_supports("avx2");
  return has;
#else
  return false;
#endif
}

// What the vector code runs on.
inline const char* VectorUnit() {
  if (HasAvx2()) return "avx2";
#if defined(__aarch64__)
  return "neon";
#elif defined(__x86_64__)
  return "sse2";
#else
  return "generic";
#endif
}

}  // namespace imnet

#endif  // IMNET_PREP_NATIVE_VECTORS_H_
