// Which JPEGs have the same pixels in every libjpeg.
#ifndef IMNET_PREP_NATIVE_SAMPLING_H_
#define IMNET_PREP_NATIVE_SAMPLING_H_

#include <cstddef>
#include <cstdio>

#include <jpeglib.h>

namespace imnet {

// Those whose pixels have been the same since version 6b: grey, 4:4:4, 4:2:2 and 4:2:0.
inline bool KnownSampling(const jpeg_decompress_struct& info) {
  if (info.num_components == 1) return true;
  const jpeg_component_info* const part = info.comp_info;
  for (int i = 1; i < info.num_components; ++i) {
    if (part[i].h_samp_factor != 1 || part[i].v_samp_factor != 1) return false;
  }
  return part[0].v_samp_factor <= part[0].h_samp_factor && part[0].h_samp_factor <= 2;
}

}  // namespace imnet

#endif  // IMNET_PREP_NATIVE_SAMPLING_H_
