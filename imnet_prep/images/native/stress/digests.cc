// Prints what the decoder makes of each image of a tar: the same lines on every machine. Not part of the package
// (`make cross`).
//
//   imnet_digests LIBRARY ARCHIVE...
//
// A line an image: its name, the end that the scan found, and a digest each of the whole, the shrunk and the batch images
// with their faults and warnings. Of images whose name begins with "damaged" the pixels are left out: where coefficients
// leave their range, libjpeg-turbo's code for one processor gives other pixels than that for another. What the library is
// goes to stderr.

#include <algorithm>
#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "imnet_prep/images/native/stress/library.h"

namespace {

using Bytes = std::vector<uint8_t>;
using CleanEnd = size_t(const uint8_t* data, size_t size, int lanes);
using Whole = int(const uint8_t* data, size_t size, int reduce, int channels, int width, int height, uint8_t* out, char* message);
using Shrunk = size_t(const uint8_t* data, size_t size, int reduce, int channels, int in_width, int in_height, int out_width,
                      int out_height, uint8_t* out);
using Batch = int(int n, const uint8_t* const* data, const size_t* sizes, const int32_t* listed, const int32_t* limits,
                  const double* box, const uint8_t* flip, int filter, int size, int flags, uint8_t* out, int32_t* status,
                  char* messages);

constexpr int kMessageBytes = 256;
constexpr int64_t kMostPixels = 64'000'000;

// FNV-1a.
struct Digest {
  uint64_t value = 14695981039346656037u;

  void Add(const void* data, size_t size) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    for (size_t i = 0; i < size; ++i) value = (value ^ bytes[i]) * 1099511628211u;
  }
  void Add(int64_t number) { Add(&number, sizeof number); }
};

struct Image {
  std::string name;
  Bytes data;
  bool damaged = false;
  int width = 0, height = 0, components = 0;

  int Reduced(int side, int reduce) const { return (side + reduce - 1) / reduce; }
};

// Width, height and components by the first frame header. What has none, or too many pixels, keeps a width of 0.
void ReadSize(Image* image) {
  const Bytes& data = image->data;
  for (size_t i = 2; i + 9 < data.size(); i += 2 + static_cast<size_t>(data[i + 2] << 8 | data[i + 3])) {
    if (data[i] != 0xFF) break;
    if (data[i + 1] < 0xC0 || data[i + 1] > 0xC2) continue;
    const int height = data[i + 5] << 8 | data[i + 6], width = data[i + 7] << 8 | data[i + 8];
    if (height == 0 || static_cast<int64_t>(width) * height > kMostPixels) return;
    image->height = height;
    image->width = width;
    image->components = data[i + 9];
    return;
  }
}

// The files of a tar. Source: POSIX.1-2008, pax, ustar interchange format.
std::vector<Image> ReadArchive(const char* path) {
  constexpr size_t kBlock = 512;
  std::ifstream file(path, std::ios::binary);
  const Bytes all{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  std::vector<Image> images;
  for (size_t at = 0; at + kBlock <= all.size() && all[at] != 0;) {
    const char* const header = reinterpret_cast<const char*>(all.data() + at);
    const size_t size = std::strtoul(std::string(header + 124, 12).c_str(), nullptr, 8);
    at += kBlock;
    if (at + size > all.size()) break;
    if (header[156] == '0') {
      images.push_back({std::string(header, strnlen(header, 100)), Bytes(all.data() + at, all.data() + at + size)});
      images.back().damaged = images.back().name.compare(0, 7, "damaged") == 0;
      ReadSize(&images.back());
    }
    at += (size + kBlock - 1) / kBlock * kBlock;
  }
  return images;
}

uint64_t DigestWhole(Whole* decode, const Image& image) {
  Digest digest;
  for (const int reduce : {1, 2, 4, 8}) {
    for (const int channels : {1, 3}) {
      const int width = image.Reduced(image.width, reduce), height = image.Reduced(image.height, reduce);
      Bytes out(static_cast<size_t>(width) * height * channels);
      char message[kMessageBytes];
      const int status = decode(image.data.data(), image.data.size(), reduce, channels, width, height, out.data(), message);
      digest.Add(status);
      digest.Add(message, std::strlen(message));
      if (status == 0 && !image.damaged) digest.Add(out.data(), out.size());
    }
  }
  return digest.value;
}

uint64_t DigestShrunk(Shrunk* decode, const Image& image) {
  Digest digest;
  for (const int reduce : {1, 2, 4}) {
    const int width = image.Reduced(image.width, reduce), height = image.Reduced(image.height, reduce);
    for (const int part : {1, 2, 5}) {  // fifths of the side
      const int out_width = std::max(1, width * part / 5), out_height = std::max(1, height * part / 5);
      Bytes out(static_cast<size_t>(out_width) * out_height * image.components);
      const size_t end = decode(image.data.data(), image.data.size(), reduce, image.components, width, height, out_width,
                                out_height, out.data());
      digest.Add(static_cast<int64_t>(end));
      if (end > 0 && !image.damaged) digest.Add(out.data(), out.size());
    }
  }
  return digest.value;
}

// Crops drawn for the image, in every filter, to the size of a training image and to an odd one.
uint64_t DigestBatch(Batch* decode, const Image& image, uint64_t random) {
  Digest digest;
  const auto draw = [&random](int below) {
    random = random * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int>((random >> 33) % static_cast<uint64_t>(below));
  };
  for (int turn = 0; turn < 8; ++turn) {
    const int32_t listed[2] = {image.width, image.height};
    int32_t limits[4];
    for (int axis = 0; axis < 2; ++axis) {
      const int a = draw(listed[axis]), b = draw(listed[axis]);
      limits[axis] = std::min(a, b);
      limits[axis + 2] = std::max(a, b) + 1;
    }
    const double box[4] = {limits[0] + 0.25, limits[1] + 0.125, limits[2] - 0.25, limits[3] * 1.0};
    const uint8_t flip = draw(2) == 1;
    const int size = turn < 4 ? 224 : 33;
    Bytes out(static_cast<size_t>(size) * size * 3);
    const uint8_t* const data = image.data.data();
    const size_t bytes = image.data.size();
    int32_t status = -1;
    char message[kMessageBytes] = "";
    digest.Add(decode(1, &data, &bytes, listed, limits, box, &flip, turn % 4, size, draw(4), out.data(), &status, message));
    digest.Add(status);
    digest.Add(message, std::strlen(message));
    if (status == 0 && !image.damaged) digest.Add(out.data(), out.size());
  }
  return digest.value;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const Library library(argv[1]);
  std::fprintf(stderr, "decoder: %s\n", library.function<const char*()>("imnet_decoder")());
  auto* const clean_end = library.function<CleanEnd>("imnet_clean_end");
  auto* const whole = library.function<Whole>("imnet_decode_whole");
  auto* const shrunk = library.function<Shrunk>("imnet_decode_shrunk");
  auto* const batch = library.function<Batch>("imnet_decode_batch");
  uint64_t number = 0;
  for (int i = 2; i < argc; ++i) {
    for (const Image& image : ReadArchive(argv[i])) {
      std::printf("%s", image.name.c_str());
      std::printf(" %zu", clean_end(image.data.data(), image.data.size(), 1 + static_cast<int>(++number % 4)));
      if (image.width > 0) {
        std::printf(" %016" PRIx64 " %016" PRIx64 " %016" PRIx64, DigestWhole(whole, image), DigestShrunk(shrunk, image),
                    DigestBatch(batch, image, number));
      }
      std::printf("\n");
    }
  }
  return number > 0 ? 0 : 1;
}
