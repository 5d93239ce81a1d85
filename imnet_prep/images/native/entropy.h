// A faster Huffman decoder for baseline JPEG, put in the place of libjpeg-turbo's inside one decompression.
//
// libjpeg reads a symbol, then its bits, then stores; most symbols with their bits fit in 11 bits, so here one look-up gives
// run, value and length. Blocks outside the crop are stepped over without being stored. Anything out of the ordinary
// (a marker that is not due, a bad code, data that ends) makes it give up; the caller then decodes the image again
// with libjpeg's own decoder, whose verdict counts.
//
// Source: ITU-T T.81, annex F.2.2 (decoding procedure) and annex C (code tables).
#ifndef IMNET_PREP_NATIVE_ENTROPY_H_
#define IMNET_PREP_NATIVE_ENTROPY_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <jpeglib.h>

namespace imnet {

class EntropyDecoder {
 public:
  // Called when the decoder gives up; it must not return (it jumps out of libjpeg).
  using GiveUp = void (*)(j_decompress_ptr);

  // Takes over, right after jpeg_start_decompress. Does nothing and gives false where the image is not of the kind
  // that it decodes (one interleaved or grey sequential Huffman scan). `info->client_data` becomes this object.
  bool TakeOver(j_decompress_ptr info, GiveUp give_up);

  // After the last MCU: whether every bit was as an encoder writes it, up to an end marker right behind; gives the byte
  // after that. libjpeg would have decoded the same, and complained of nothing.
  const uint8_t* CleanEnd();

  // Columns of MCUs that are wanted, inclusive; call it after jpeg_crop_scanline.
  void Want(int first_column, int last_column) {
    first_column_ = first_column;
    last_column_ = last_column;
  }

 private:
  static constexpr int kLookBits = 11;
  struct Table {
    // For the next kLookBits bits: value << 16 | kind << 12 | run << 8 | length. Kinds: see entropy.cc.
    int32_t look[1 << kLookBits];
    uint32_t limit[18];  // first 16 bits, as a number, that are beyond the codes of a length
    int32_t offset[17];  // code of that length + offset = position in symbol
    uint8_t symbol[256];
    uint8_t bits[17];  // the table that this was made from
    bool made = false;

    bool Make(const JHUFF_TBL& source, bool dc);
  };
  struct Block {
    Table* dc;
    Table* ac;
    int component;
  };

  static boolean DecodeMcu(j_decompress_ptr info, JBLOCKROW* blocks);
  template <bool kStore>
  bool Mcu(JBLOCKROW* blocks);
  template <bool kStore>
  bool DecodeBlock(const Block& block, JCOEF* out);
  static int LongCode(const Table& table, uint64_t window, int* length);
  bool Restart();
  void Fetch();
  void StartSegment();
  // Bits of the segment that are not used yet, as far as they were fetched; negative where it was read beyond its end.
  ptrdiff_t BitsLeft() const { return bits_ + 8 * (clean_end_ - clean_next_); }

  Table dc_[NUM_HUFF_TBLS], ac_[NUM_HUFF_TBLS];
  Block blocks_[D_MAX_BLOCKS_IN_MCU];
  int block_count_ = 0;
  int32_t last_dc_[MAX_COMPS_IN_SCAN] = {};
  bool wild_ = false;  // a DC coefficient left 16 bits
  // The next bits: window_ holds them from the top, bits_ of them; then come the bytes from clean_next_ on.
  uint64_t window_ = 0;
  int bits_ = 0;
  const uint8_t* clean_next_ = nullptr;
  // Entropy-coded bytes with the stuffing taken out, a piece at a time, and zeros after a segment's last byte.
  static constexpr size_t kPiece = 4096;
  static constexpr size_t kLowWater = 2600;  // an MCU takes at most 10 blocks of 64 coefficients of 31 bits, 2480 bytes
  static constexpr size_t kPadding = 4096;
  std::vector<uint8_t> clean_;
  const uint8_t* clean_end_ = nullptr;  // the segment's last byte so far
  bool segment_done_ = false;           // a marker or the end of the data comes at next_
  const uint8_t* next_ = nullptr;
  const uint8_t* end_ = nullptr;
  int column_ = 0, columns_ = 1, first_column_ = 0, last_column_ = 0;
  unsigned restart_interval_ = 0, until_restart_ = 0;
  int next_restart_ = 0;
  GiveUp give_up_ = nullptr;
};

}  // namespace imnet

#endif  // IMNET_PREP_NATIVE_ENTROPY_H_
