// Eight bytes of a JPEG as one number, the first byte highest.
#ifndef IMNET_PREP_BIG_ENDIAN_H_
#define IMNET_PREP_BIG_ENDIAN_H_

#include <cstdint>
#include <cstring>

namespace imnet {

inline uint64_t LoadBigEndian(const uint8_t* data) {
  uint64_t value;
  std::memcpy(&value, data, sizeof value);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

}  // namespace imnet

#endif  // IMNET_PREP_BIG_ENDIAN_H_
