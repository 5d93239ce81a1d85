// A JPEG to all of its pixels, reduced in the DCT domain where asked for, and libjpeg's first warning: what OpenCV
// decodes, and writes to stderr.
//
// libjpeg-turbo has two Huffman decoders, and the faster one takes a code that no table has for a zero without a
// warning. It is used only while a block's worth of input is left in the buffer, so the input comes in small pieces.
//
// Source: libjpeg-turbo's libjpeg.txt (data source managers, error handling by longjmp) and jdhuff.c (decode_mcu).

#include <algorithm>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdio>

#include <jpeglib.h>

#include "api.h"
#include "sampling.h"

namespace {

constexpr size_t kPiece = 448;  // bytes; from 512 on (BUFSIZE in jdhuff.c) the faster decoder may run

enum Status { kGood = 0, kGaveUp = 1, kNotTaken = 2 };

struct Decoder {
  jpeg_decompress_struct info;
  jpeg_error_mgr errors;
  jpeg_source_mgr source;
  const uint8_t* next;  // what is not in the buffer yet
  const uint8_t* end;
  jmp_buf jump;
  char* message;
};

Decoder* Of(void* info) { return static_cast<Decoder*>(static_cast<j_common_ptr>(info)->client_data); }

void OnError(j_common_ptr info) { longjmp(Of(info)->jump, kGaveUp); }

void OnMessage(j_common_ptr info, int level) {
  if (level >= 0 || info->err->num_warnings++ > 0) return;  // a trace message, or not the first warning
  char text[JMSG_LENGTH_MAX];
  info->err->format_message(info, text);
  std::snprintf(Of(info)->message, imnet::kMessageBytes, "%s", text);
}

void OnOutput(j_common_ptr) {}  // never to stderr

void Nothing(j_decompress_ptr) {}

boolean Fill(j_decompress_ptr info) {
  Decoder* const decoder = Of(info);
  if (decoder->next == decoder->end) longjmp(decoder->jump, kNotTaken);  // OpenCV stops here without a word
  const size_t size = std::min(kPiece, static_cast<size_t>(decoder->end - decoder->next));
  decoder->source.next_input_byte = decoder->next;
  decoder->source.bytes_in_buffer = size;
  decoder->next += size;
  return TRUE;
}

void Skip(j_decompress_ptr info, long count) {
  if (count <= 0) return;
  Decoder* const decoder = Of(info);
  const size_t here = std::min(decoder->source.bytes_in_buffer, static_cast<size_t>(count));
  decoder->source.next_input_byte += here;
  decoder->source.bytes_in_buffer -= here;
  decoder->next += std::min(static_cast<size_t>(count) - here, static_cast<size_t>(decoder->end - decoder->next));
}

bool Start(j_decompress_ptr info, int reduce, int channels, int width, int height) {
  jpeg_read_header(info, TRUE);
  if (info->arith_code || info->data_precision != 8 || !imnet::KnownSampling(*info)) return false;
  if (info->jpeg_color_space != (info->num_components == 1 ? JCS_GRAYSCALE : JCS_YCbCr)) return false;
  info->out_color_space = channels == 1 ? JCS_GRAYSCALE : JCS_EXT_BGR;
  info->scale_num = 1;
  info->scale_denom = static_cast<unsigned>(reduce);
  jpeg_start_decompress(info);
  return static_cast<int>(info->output_width) == width && static_cast<int>(info->output_height) == height;
}

}  // namespace

// Decodes at 1 / reduce to out: uint8 (height, width, channels), BGR or grey. message: kMessageBytes bytes, libjpeg's
// first warning or empty. Returns a Status.
IMNET_API int imnet_decode_whole(const uint8_t* data, size_t size_bytes, int reduce, int channels, int width,
                                 int height, uint8_t* out, char* message) {
  Decoder decoder{};
  message[0] = '\0';
  decoder.message = message;
  decoder.next = data;
  decoder.end = data + size_bytes;
  j_decompress_ptr info = &decoder.info;
  info->err = jpeg_std_error(&decoder.errors);
  decoder.errors.error_exit = OnError;
  decoder.errors.emit_message = OnMessage;
  decoder.errors.output_message = OnOutput;
  info->client_data = &decoder;
  if (const int status = setjmp(decoder.jump)) {
    jpeg_destroy_decompress(info);
    return status;
  }
  jpeg_create_decompress(info);
  decoder.source = {nullptr, 0, Nothing, Fill, Skip, jpeg_resync_to_restart, Nothing};
  info->src = &decoder.source;
  const bool taken = Start(info, reduce, channels, width, height);
  while (taken && info->output_scanline < info->output_height) {
    uint8_t* row = out + static_cast<size_t>(info->output_scanline) * width * channels;
    jpeg_read_scanlines(info, &row, 1);
  }
  if (taken) jpeg_finish_decompress(info);
  jpeg_destroy_decompress(info);
  return taken ? kGood : kNotTaken;
}
