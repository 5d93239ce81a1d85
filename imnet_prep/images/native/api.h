// What every part of the library's C interface shares.
#ifndef IMNET_PREP_NATIVE_API_H_
#define IMNET_PREP_NATIVE_API_H_

#include "platform.h"

namespace imnet {

constexpr int kAbi = 4;             // _ABI in __init__.py
constexpr int kMessageBytes = 256;  // MESSAGE_BYTES in __init__.py; libjpeg's messages have up to 200

}  // namespace imnet

#endif  // IMNET_PREP_NATIVE_API_H_
