// Batch JPEG decoder: bytes to the resampled, flipped crop in the batch, looking only at the crop's part of the image.
//
// Plain C interface, loaded by ctypes (imnet_prep/images/batch_decoder.py). Threads share nothing.
// Source: libjpeg-turbo's libjpeg.txt (partial decompression, scaled decompression, error handling by longjmp).

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <algorithm>
#include <exception>
#include <memory>
#include <vector>

#include <jpeglib.h>
#include <jerror.h>

#include "api.h"
#include "resample.h"
#include "vectors.h"
#ifdef IMNET_FAST_ENTROPY
#include "entropy.h"
#endif

namespace {

constexpr int kMaxScans = 500;   // encoders write about 10; each is a pass over every block, so thousands are an attack
constexpr int kRowsAtOnce = 4;   // most rows that libjpeg makes in one go (a sampling factor is at most 4)
// Reduced in the DCT domain while the rest is still reduced by this factor: the mean difference of any of 250 real
// photographs to a full decode is then 0.8 of 255 at most, at outputs of 32 to 224 (1.8 with a factor of 2, 2.1 with 1).
constexpr double kReduceGap = 3.0;

enum Flags { kReduce = 1, kFast = 2 };
enum Status : int32_t { kGood = 0, kFault = 1, kNotTaken = 2 };

struct ErrorManager {
  jpeg_error_mgr base;  // first: libjpeg's pointer to it is a pointer to this
  jmp_buf jump;
  int corrupt;    // warnings that mean damaged image data
  bool gave_up;   // the fast entropy decoder leaves the image to libjpeg's
  char message[JMSG_LENGTH_MAX];
};

// Warnings of damaged image data. The others (bytes between segments, odd JFIF or Adobe versions) change no pixel.
bool MeansDamage(int code) {
  switch (code) {
    case JWRN_HIT_MARKER:
    case JWRN_HUFF_BAD_CODE:
    case JWRN_JPEG_EOF:
    case JWRN_MUST_RESYNC:
    case JWRN_BOGUS_PROGRESSION:
    case JWRN_NOT_SEQUENTIAL:
    case JWRN_ARITH_BAD_CODE:
      return true;
    default:
      return false;
  }
}

void OnError(j_common_ptr info) {
  auto* errors = reinterpret_cast<ErrorManager*>(info->err);
  errors->base.format_message(info, errors->message);
  longjmp(errors->jump, 1);
}

void OnMessage(j_common_ptr info, int level) {
  auto* errors = reinterpret_cast<ErrorManager*>(info->err);
  if (level >= 0) return;  // a trace message
  ++errors->base.num_warnings;
  if (!MeansDamage(errors->base.msg_code)) return;
  if (errors->corrupt++ == 0) errors->base.format_message(info, errors->message);
}

void OnOutput(j_common_ptr) {}  // never to stderr

void Fail(ErrorManager* errors, const char* text) {
  std::snprintf(errors->message, sizeof errors->message, "%s", text);
  longjmp(errors->jump, 1);
}

void OnProgress(j_common_ptr info) {
  auto* decoder = reinterpret_cast<j_decompress_ptr>(info);
  if (decoder->input_scan_number > kMaxScans) {
    Fail(reinterpret_cast<ErrorManager*>(info->err), "more scans than an encoder writes");
  }
}

#ifdef IMNET_FAST_ENTROPY
void GiveUp(j_decompress_ptr info) {
  auto* errors = reinterpret_cast<ErrorManager*>(info->err);
  errors->gave_up = true;
  longjmp(errors->jump, 1);
}
#endif

struct Request {
  const uint8_t* data;
  size_t size_bytes;
  int32_t listed[2];  // width, height that the header must give
  int32_t limits[4];  // left, top, right, bottom
  double box[4];
  bool flip;
  imnet::Filter filter;
  int size;
  bool reduce;
  bool fast;
  uint8_t* out;
};

class Handle {
 public:
  Handle() {
    info_.err = jpeg_std_error(&errors_.base);
    errors_.base.error_exit = OnError;
    errors_.base.emit_message = OnMessage;
    errors_.base.output_message = OnOutput;
    progress_.progress_monitor = OnProgress;
  }
  ~Handle() { Reset(); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  // The calling thread's own.
  static Handle& Own() {
    thread_local std::unique_ptr<Handle> own;
    if (own == nullptr) own = std::make_unique<Handle>();
    return *own;
  }

  Status Decode(const Request& request, char* message) {
    try {
      const Status status = Try(request, message, request.fast);
      return errors_.gave_up ? Try(request, message, false) : status;
    } catch (const std::exception&) {  // out of memory
      Reset();
      throw;
    }
  }

 private:
  void Reset() { jpeg_destroy_decompress(&info_); }
  Status Try(const Request& request, char* message, bool fast);
  // Only these two may longjmp back into Try's setjmp; neither owns anything that a jump would leak.
  Status Start(const Request& request, bool fast);
  void Rows(const Request& request);
  void Prepare(const Request& request);

  jpeg_decompress_struct info_{};
  jpeg_progress_mgr progress_{};
  ErrorManager errors_{};
#ifdef IMNET_FAST_ENTROPY
  imnet::EntropyDecoder entropy_;
  bool fast_ = false;
#endif
  imnet::Axis x_, y_;
  std::vector<uint8_t> lines_, ring_;
  size_t line_stride_ = 0, ring_stride_ = 0;
  int ring_rows_ = 0, reduction_ = 1;
};

Status Handle::Try(const Request& request, char* message, bool fast) {
  errors_.corrupt = 0;
  errors_.gave_up = false;
  errors_.base.num_warnings = 0;
  errors_.message[0] = '\0';
  Status status = kGood;
  if (setjmp(errors_.jump)) {
    Reset();
    std::snprintf(message, imnet::kMessageBytes, "%s", errors_.message);
    return kFault;
  }
  jpeg_create_decompress(&info_);  // anew for each image, as libjpeg keeps tables that the next image may lack
  info_.progress = &progress_;
  status = Start(request, fast);
  if (status == kGood) Rows(request);
  Reset();
  if (errors_.corrupt) {
    std::snprintf(message, imnet::kMessageBytes, "damaged image data: %s", errors_.message);
    return kFault;
  }
  return status;
}

Status Handle::Start(const Request& request, [[maybe_unused]] bool fast) {
  if (request.size_bytes < 2 || request.data[0] != 0xFF || request.data[1] != 0xD8) return kNotTaken;
  jpeg_mem_src(&info_, request.data, static_cast<unsigned long>(request.size_bytes));
  jpeg_read_header(&info_, TRUE);
  // Nothing has been sized by the header yet, so one that lies costs no memory.
  const int width = static_cast<int>(info_.image_width), height = static_cast<int>(info_.image_height);
  if (width != request.listed[0] || height != request.listed[1]) {
    std::snprintf(errors_.message, sizeof errors_.message, "%d x %d by its header, %d x %d by the record list", width,
                  height, request.listed[0], request.listed[1]);
    longjmp(errors_.jump, 1);
  }
  const bool known = (info_.num_components == 1 && info_.jpeg_color_space == JCS_GRAYSCALE) ||
                     (info_.num_components == 3 &&
                      (info_.jpeg_color_space == JCS_YCbCr || info_.jpeg_color_space == JCS_RGB));
  if (!known || info_.data_precision != 8) return kNotTaken;
  info_.out_color_space = JCS_EXT_RGBX;
  reduction_ = 1;
  if (request.reduce && request.filter != imnet::Filter::kBox) {  // a box shows the difference
    const double scale = std::min(request.box[2] - request.box[0], request.box[3] - request.box[1]) / request.size;
    while (reduction_ < 4 && scale >= 2 * reduction_ * kReduceGap) reduction_ *= 2;
  }
  info_.scale_num = 1;
  info_.scale_denom = static_cast<unsigned>(reduction_);
  jpeg_start_decompress(&info_);
#ifdef IMNET_FAST_ENTROPY
  fast_ = fast && entropy_.TakeOver(&info_, GiveUp);
#endif
  Prepare(request);
  return kGood;
}

// Weights and buffers. Nothing here calls libjpeg, so nothing jumps over the vectors.
void Handle::Prepare(const Request& request) {
  const double r = reduction_;
  const int width = static_cast<int>(info_.output_width), height = static_cast<int>(info_.output_height);
  const int right = std::min(width, (request.limits[2] + reduction_ - 1) / reduction_);
  const int bottom = std::min(height, (request.limits[3] + reduction_ - 1) / reduction_);
  const int left = std::min(request.limits[0] / reduction_, right - 1);
  const int top = std::min(request.limits[1] / reduction_, bottom - 1);
  x_.Build(request.filter, request.box[0] / r, request.box[2] / r, left, right, request.size, request.flip);
  y_.Build(request.filter, request.box[1] / r, request.box[3] / r, top, bottom, request.size, false);
  ring_rows_ = y_.taps + 2;
  ring_stride_ = 4 * static_cast<size_t>(request.size) + 32;
  ring_.resize(ring_stride_ * static_cast<size_t>(ring_rows_));
  const size_t pixels = static_cast<size_t>(info_.output_width) + static_cast<size_t>(x_.taps) + imnet::kSlackPixels;
  line_stride_ = (4 * pixels + 31) / 32 * 32;
  lines_.resize(line_stride_ * kRowsAtOnce + 64);
}

void Handle::Rows(const Request& request) {
  // Chroma beside the crop takes part in upsampling, so two pixels more are decoded on each side.
  constexpr int kMargin = 2;
  JDIMENSION from = static_cast<JDIMENSION>(std::max(0, x_.first - kMargin));
  JDIMENSION wide = std::min(info_.output_width, static_cast<JDIMENSION>(x_.end + kMargin)) - from;
  if (wide < info_.output_width) {
    jpeg_crop_scanline(&info_, &from, &wide);
#ifdef IMNET_FAST_ENTROPY
    if (fast_) {  // as jpeg_crop_scanline counts its columns
      const int across = info_.num_components == 1 ? 1 : info_.max_h_samp_factor;
      const int pixels = across * DCTSIZE / reduction_;
      entropy_.Want(static_cast<int>(from) / pixels, (static_cast<int>(from + wide) + pixels - 1) / pixels - 1);
    }
#endif
  }
  const int skip = y_.first - kMargin;
  if (skip > 0) jpeg_skip_scanlines(&info_, static_cast<JDIMENSION>(skip));
  uint8_t* lines[kRowsAtOnce];
  // libjpeg-turbo writes rows that are aligned past the cache, straight to memory, and reading them back costs a third
  // of the whole decode: 8 bytes off alignment, they stay in the cache.
  const size_t off = (32 - reinterpret_cast<uintptr_t>(lines_.data()) % 32) % 32 + 8;
  for (int k = 0; k < kRowsAtOnce; ++k) lines[k] = lines_.data() + off + static_cast<size_t>(k) * line_stride_;
  int made = 0;  // output rows
  while (made < request.size) {
    const int y = static_cast<int>(info_.output_scanline);
    const int got = static_cast<int>(jpeg_read_scanlines(&info_, lines, kRowsAtOnce));
    if (got == 0) Fail(&errors_, "the image ends before its last row");
    for (int k = 0; k < got; k += 2) {
      const int last = std::min(k + 1, got - 1);
      const uint8_t* const in[2] = {lines[k], lines[last]};
      uint8_t* const out[2] = {ring_.data() + static_cast<size_t>((y + k) % ring_rows_) * ring_stride_,
                               ring_.data() + static_cast<size_t>((y + last) % ring_rows_) * ring_stride_};
      if (y + last >= y_.first) imnet::HorizontalPair(x_, static_cast<int>(from), in, out);
      const int end = y + last + 1;
      for (; made < request.size && y_.start[made] + y_.count[made] <= end; ++made) {
        imnet::Vertical(y_, made, ring_.data(), ring_rows_, static_cast<int>(ring_stride_), request.size,
                        request.out + static_cast<size_t>(made) * request.size * 3);
      }
    }
  }
}

}  // namespace

IMNET_API const char* imnet_decoder() {
  static const char* const text = [] {
    static char buffer[96];
#define IMNET_TEXT2(x) #x
#define IMNET_TEXT(x) IMNET_TEXT2(x)
#ifdef IMNET_FAST_ENTROPY
    const char* entropy = ", own Huffman decoder";
#else
    const char* entropy = "";
#endif
    std::snprintf(buffer, sizeof buffer, "libjpeg-turbo %s, %s%s", IMNET_TEXT(LIBJPEG_TURBO_VERSION),
                  imnet::VectorUnit(), entropy);
    return buffer;
  }();
  return text;
}

// Decodes n images. listed: int32 (n, 2), width and height that the header must give; limits: int32 (n, 4);
// box: float64 (n, 4); flip: uint8 (n); out: uint8 (n, size, size, 3);
// flags: see Flags; status: int32 (n), see Status; messages: n times imnet::kMessageBytes bytes, zero-terminated where the status is kFault.
// Returns the number of images that are not good, or -1 for arguments out of range.
IMNET_API int imnet_decode_batch(int n, const uint8_t* const* data, const size_t* size_bytes, const int32_t* listed,
                                 const int32_t* limits, const double* box, const uint8_t* flip, int filter, int size,
                                 int flags, uint8_t* out, int32_t* status, char* messages) {
  if (n < 0 || size < 1 || filter < 0 || filter >= imnet::kFilters) return -1;
  int bad = 0;
  for (int i = 0; i < n; ++i) {
    Request request{};
    request.data = data[i];
    request.size_bytes = size_bytes[i];
    std::memcpy(request.listed, listed + 2 * i, sizeof request.listed);
    std::memcpy(request.limits, limits + 4 * i, sizeof request.limits);
    std::memcpy(request.box, box + 4 * i, sizeof request.box);
    request.flip = flip[i] != 0;
    request.filter = static_cast<imnet::Filter>(filter);
    request.size = size;
    request.reduce = (flags & kReduce) != 0;
    request.fast = (flags & kFast) != 0;
    request.out = out + static_cast<size_t>(i) * size * size * 3;
    char* message = messages + static_cast<size_t>(i) * imnet::kMessageBytes;
    if (request.limits[0] < 0 || request.limits[1] < 0 || request.limits[2] <= request.limits[0] ||
        request.limits[3] <= request.limits[1] || request.limits[2] > request.listed[0] ||
        request.limits[3] > request.listed[1]) {
      return -1;
    }
    try {
      status[i] = Handle::Own().Decode(request, message);
    } catch (const std::exception& error) {  // out of memory
      std::snprintf(message, imnet::kMessageBytes, "%s", error.what());
      status[i] = kFault;
    }
    bad += status[i] != kGood;
  }
  return bad;
}
