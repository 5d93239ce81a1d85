// Feeds damaged JPEGs to the decoder under sanitizers; not part of the installed library (see test_native.py).
//
//   g++ -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -DIMNET_FAST_ENTROPY
//       fuzz.cc decode_whole.cc decoder.cc entropy.cc resample.cc shrink.cc decode_shrunk.cc -ljpeg -o fuzz && ./fuzz ROUNDS SEED FILE...

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" {
int imnet_decode_batch(int n, const uint8_t* const* data, const size_t* size_bytes, const int32_t* listed,
                       const int32_t* limits, const double* box, const uint8_t* flip, int filter, int size, int flags,
                       uint8_t* out, int32_t* status, char* messages);
int imnet_decode_whole(const uint8_t* data, size_t size_bytes, int reduce, int channels, int width, int height,
                       uint8_t* out, char* message);
#ifdef IMNET_FAST_ENTROPY
size_t imnet_decode_shrunk(const uint8_t* data, size_t size_bytes, int reduce, int channels, int in_width, int in_height,
                           int out_width, int out_height, uint8_t* out);
#endif
}

namespace {

using Bytes = std::vector<uint8_t>;

void Mutate(Bytes* data, std::mt19937* random) {
  const auto draw = [&](size_t below) { return below == 0 ? 0 : (*random)() % below; };
  for (size_t n = draw(8); n > 0 && !data->empty(); --n) {
    const size_t place = draw(data->size());
    const size_t length = std::min<size_t>(draw(80), data->size() - place);
    switch (draw(6)) {
      case 0:
        (*data)[place] = static_cast<uint8_t>(draw(256));
        break;
      case 1:
        (*data)[place] ^= static_cast<uint8_t>(1u << draw(8));
        break;
      case 2:
        data->erase(data->begin() + place, data->begin() + place + length);
        break;
      case 3: {
        const Bytes copy(data->begin() + place, data->begin() + place + length);
        data->insert(data->begin() + draw(data->size()), copy.begin(), copy.end());
        break;
      }
      case 4:
        data->resize(place);
        break;
      default:
        (*data)[place] = 0xFF;
        if (place + 1 < data->size()) (*data)[place + 1] = static_cast<uint8_t>(0xC0 + draw(64));
    }
  }
}

// Width and height by the first frame header; the pipeline refuses what has none, or too many pixels.
bool Size(const Bytes& data, int* width, int* height) {
  for (size_t i = 2; i + 9 < data.size(); ++i) {
    const uint8_t marker = data[i + 1];
    if (data[i] != 0xFF || marker < 0xC0 || marker > 0xC2) continue;
    *height = data[i + 5] << 8 | data[i + 6];
    *width = data[i + 7] << 8 | data[i + 8];
    return *width > 0 && *height > 0 && static_cast<int64_t>(*width) * *height < 4000000;
  }
  return false;
}

// Whole images, shrunk and not. Gives how many were taken.
int Whole(const Bytes& data, int width, int height, std::mt19937* random) {
  const int reduce = 1 << (*random)() % 4, channels = (*random)() % 4 == 0 ? 1 : 3;
  const int in_width = (width + reduce - 1) / reduce, in_height = (height + reduce - 1) / reduce;
  Bytes whole(static_cast<size_t>(in_width) * in_height * channels);
  char message[256];
  int taken = imnet_decode_whole(data.data(), data.size(), reduce, channels, in_width, in_height, whole.data(), message) == 0;
#ifdef IMNET_FAST_ENTROPY
  const int out_width = 1 + static_cast<int>((*random)() % in_width);
  const int out_height = 1 + static_cast<int>((*random)() % in_height);
  Bytes out(static_cast<size_t>(out_width) * out_height * channels);
  const size_t end = imnet_decode_shrunk(data.data(), data.size(), reduce, channels, in_width, in_height, out_width,
                                         out_height, out.data());
  if (end > data.size()) std::abort();
  taken += end > 0;
#endif
  return taken;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  std::mt19937 random(static_cast<unsigned>(std::atoi(argv[2])));
  std::vector<Bytes> sources;
  for (int i = 3; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    sources.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  int good = 0, bad = 0, others = 0, taken = 0;
  for (int round = 0; round < std::atoi(argv[1]); ++round) {
    Bytes data = sources[random() % sources.size()];
    Mutate(&data, &random);
    data.shrink_to_fit();  // so that a read beyond the end is seen
    int width = 0, height = 0;
    if (!Size(data, &width, &height)) continue;
    taken += Whole(data, width, height, &random);
    const int32_t listed[2] = {width, height};
    int32_t limits[4] = {0, 0, width, height};
    for (int axis = 0; axis < 2; ++axis) {
      const int a = static_cast<int>(random() % limits[axis + 2]), b = static_cast<int>(random() % limits[axis + 2]);
      limits[axis] = std::min(a, b);
      limits[axis + 2] = std::max(a, b) + 1;
    }
    const double box[4] = {limits[0] + 0.25, limits[1] * 1.0, limits[2] * 1.0, limits[3] - 0.25};
    const uint8_t flip = random() & 1;
    const int size = 1 + static_cast<int>(random() % 40);
    Bytes out(static_cast<size_t>(size) * size * 3);
    const uint8_t* pointer = data.data();
    const size_t bytes = data.size();
    int32_t status = -1;
    char message[256] = "";
    imnet_decode_batch(1, &pointer, &bytes, listed, limits, box, &flip, static_cast<int>(random() % 4), size,
                      static_cast<int>(random() % 4), out.data(), &status, message);
    ++(status == 0 ? good : status == 1 ? bad : others);
  }
  std::printf("good %d bad %d others %d taken %d\n", good, bad, others, taken);
  return 0;
}
