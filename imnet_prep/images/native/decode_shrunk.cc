// A JPEG to its shrunk pixels in one pass: no whole image lies in memory, and every compressed bit is read.
//
// Strict: it succeeds only where libjpeg has nothing to complain of, from the first marker to the last bit before the
// end marker. Whatever else it meets, the caller decides otherwise (imnet_prep/images/check.py).
//
// Source: libjpeg-turbo's libjpeg.txt (scaled decompression, error handling by longjmp).

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <vector>

#include <jpeglib.h>

#include "api.h"
#include "entropy.h"
#include "sampling.h"
#include "shrink.h"

namespace {

constexpr int kRowsAtOnce = 4;  // most rows that libjpeg makes in one go (a sampling factor is at most 4)

struct ErrorManager {
  jpeg_error_mgr base;  // first: libjpeg's pointer to it is a pointer to this
  jmp_buf jump;
};

void GiveUp(j_common_ptr info) { longjmp(reinterpret_cast<ErrorManager*>(info->err)->jump, 1); }

void OnMessage(j_common_ptr info, int level) {
  if (level < 0) GiveUp(info);  // a warning
}

void OnOutput(j_common_ptr) {}  // never to stderr

struct Request {
  const uint8_t* data;
  size_t size_bytes;
  int reduce;    // 1, 2, 4 or 8, in the DCT domain
  int channels;  // 1: grey, 3: BGR
  int in_width, in_height;  // after the reduction
  int out_width, out_height;
  uint8_t* out;
};

class Handle {
 public:
  Handle() {
    info_.err = jpeg_std_error(&errors_.base);
    errors_.base.error_exit = GiveUp;
    errors_.base.emit_message = OnMessage;
    errors_.base.output_message = OnOutput;
  }
  ~Handle() { Reset(); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  // Where the image ends in the data, or 0.
  size_t Decode(const Request& request) {
    try {
      return Try(request);
    } catch (const std::exception&) {  // out of memory
      Reset();
      throw;
    }
  }

  // The calling thread's own.
  static Handle& Own() {
    thread_local std::unique_ptr<Handle> own;
    if (own == nullptr) own = std::make_unique<Handle>();
    return *own;
  }

 private:
  void Reset() { jpeg_destroy_decompress(&info_); }
  size_t Try(const Request& request) {
    if (setjmp(errors_.jump)) {
      Reset();
      return 0;
    }
    jpeg_create_decompress(&info_);  // anew for each image, as libjpeg keeps tables that the next image may lack
    const uint8_t* const end = Start(request) ? Rows(request) : nullptr;
    Reset();
    return end == nullptr ? 0 : static_cast<size_t>(end - request.data);
  }
  // Only these two may longjmp back into Try's setjmp; neither owns anything that a jump would leak.
  bool Start(const Request& request);
  const uint8_t* Rows(const Request& request);
  void Prepare(const Request& request);

  jpeg_decompress_struct info_{};
  ErrorManager errors_{};
  imnet::EntropyDecoder entropy_;
  imnet::Shrinker shrinker_;
  std::vector<uint8_t> lines_;
  size_t line_bytes_ = 0;
};

bool Handle::Start(const Request& request) {
  if (request.size_bytes < 2 || request.data[0] != 0xFF || request.data[1] != 0xD8) return false;
  jpeg_mem_src(&info_, request.data, static_cast<unsigned long>(request.size_bytes));
  jpeg_read_header(&info_, TRUE);
  // Such images the entropy decoder does not take, and starting to decompress them decodes them whole.
  if (jpeg_has_multiple_scans(&info_) || info_.arith_code) return false;
  if (info_.data_precision != 8 || info_.num_components != request.channels || !imnet::KnownSampling(info_)) return false;
  if (info_.jpeg_color_space != (request.channels == 1 ? JCS_GRAYSCALE : JCS_YCbCr)) return false;
  info_.out_color_space = request.channels == 1 ? JCS_GRAYSCALE : JCS_EXT_BGR;
  info_.scale_num = 1;
  info_.scale_denom = static_cast<unsigned>(request.reduce);
  jpeg_calc_output_dimensions(&info_);
  if (static_cast<int>(info_.output_width) != request.in_width ||
      static_cast<int>(info_.output_height) != request.in_height) {
    return false;
  }
  jpeg_start_decompress(&info_);
  if (!entropy_.TakeOver(&info_, [](j_decompress_ptr info) { GiveUp(reinterpret_cast<j_common_ptr>(info)); })) {
    return false;
  }
  Prepare(request);
  return true;
}

// Weights and buffers. Nothing here calls libjpeg, so nothing jumps over the vectors.
void Handle::Prepare(const Request& request) {
  shrinker_.Start(request.channels, request.in_width, request.in_height, request.out_width, request.out_height,
                  request.out);
  const size_t bytes = static_cast<size_t>(request.channels) * request.in_width + shrinker_.Slack();
  line_bytes_ = (bytes + 31) / 32 * 32;
  lines_.resize(line_bytes_ * kRowsAtOnce + 64);
}

const uint8_t* Handle::Rows(const Request& request) {
  uint8_t* lines[kRowsAtOnce];
  // 8 bytes off alignment, as in decoder.cc: libjpeg-turbo writes aligned rows past the cache.
  const size_t off = (32 - reinterpret_cast<uintptr_t>(lines_.data()) % 32) % 32 + 8;
  for (int k = 0; k < kRowsAtOnce; ++k) lines[k] = lines_.data() + off + static_cast<size_t>(k) * line_bytes_;
  for (int left = request.in_height; left > 0;) {
    const int got = static_cast<int>(jpeg_read_scanlines(&info_, lines, kRowsAtOnce));
    if (got == 0) GiveUp(reinterpret_cast<j_common_ptr>(&info_));
    shrinker_.Take(lines, got);
    left -= got;
  }
  return entropy_.CleanEnd();
}

}  // namespace

// Decodes at 1 / reduce, in_width x in_height, and shrinks to out: uint8 (out_height, out_width, channels), BGR or grey.
// Returns the byte behind the end marker, or 0: left to others.
IMNET_API size_t imnet_decode_shrunk(const uint8_t* data, size_t size_bytes, int reduce, int channels, int in_width,
                                     int in_height, int out_width, int out_height, uint8_t* out) {
  const bool known = (channels == 1 || channels == 3) && (reduce == 1 || reduce == 2 || reduce == 4 || reduce == 8);
  if (!known || out_width < 1 || out_height < 1) return 0;
  if (in_width < out_width || in_height < out_height) return 0;
  try {
    return Handle::Own().Decode(
        Request{data, size_bytes, reduce, channels, in_width, in_height, out_width, out_height, out});
  } catch (const std::exception&) {  // out of memory
    return 0;
  }
}
