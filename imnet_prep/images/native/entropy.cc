#include "entropy.h"
#include "big_endian.h"

#include <algorithm>
#include <cstring>

#define JPEG_INTERNALS  // jpegint.h declares the entropy decoder's place in libjpeg
extern "C" {
#include <jpegint.h>
}

namespace imnet {
namespace {

// Kinds of look-up entry. kValue: run and value are known, length covers both. kBits: run, and the size in the value's
// place; length covers the code alone. kEnd: end of block. kZeros: sixteen zeros. kLong: the code is longer.
enum Kind { kValue = 0, kBits = 1, kEnd = 2, kZeros = 3, kLong = 4 };
constexpr int32_t kKindMask = 0xF000;

constexpr uint8_t kNaturalOrder[64 + 16] = {0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,
                                       12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6,  7,  14, 21, 28,
                                       35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51,
                                       58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
                                            // where damaged data leads beyond a block's end
                                            63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

constexpr int32_t Entry(int value, Kind kind, int run, int length) {
  return static_cast<int32_t>(static_cast<uint32_t>(value) << 16 | static_cast<uint32_t>(kind) << 12 |
                              static_cast<uint32_t>(run) << 8 | static_cast<uint32_t>(length));
}

// The value that `size` bits stand for (T.81, table F.2 and figure F.12).
inline int32_t Extend(uint32_t raw, int size) {
  const int32_t value = static_cast<int32_t>(raw);
  return size == 0 || value >= 1 << (size - 1) ? value : value - (1 << size) + 1;
}

}  // namespace

bool EntropyDecoder::Table::Make(const JHUFF_TBL& source, bool dc) {
  int count = 0;
  for (int length = 1; length <= 16; ++length) count += source.bits[length];
  if (count == 0 || count > 256) return false;
  if (made && std::memcmp(bits + 1, source.bits + 1, 16) == 0 && std::memcmp(symbol, source.huffval, count) == 0) {
    return true;  // most files carry the standard's tables
  }
  made = false;
  std::memcpy(bits, source.bits, sizeof bits);
  std::memset(symbol, 0, sizeof symbol);
  std::memcpy(symbol, source.huffval, count);
  for (int32_t& entry : look) entry = Entry(0, kLong, 0, 0);
  int code = 0, place = 0;
  for (int length = 1; length <= 16; ++length, code <<= 1) {
    offset[length] = place - code;
    for (int i = 0; i < bits[length]; ++i, ++code, ++place) {
      if (code >= 1 << length) return false;  // more codes than there is room for
      const int run = dc ? 0 : symbol[place] >> 4, size = dc ? symbol[place] : symbol[place] & 15;
      if (size > 15) return false;
      if (length > kLookBits) continue;
      const int rest = kLookBits - length;
      for (int tail = 0; tail < 1 << rest; ++tail) {
        int32_t& entry = look[code << rest | tail];
        if (!dc && size == 0) {
          entry = run == 15 ? Entry(0, kZeros, 0, length) : Entry(0, kEnd, 0, length);
        } else if (size <= rest) {
          const uint32_t raw = size == 0 ? 0 : static_cast<uint32_t>(tail) >> (rest - size);
          entry = Entry(Extend(raw, size), kValue, run, length + size);
        } else {
          entry = Entry(size, kBits, run, length);
        }
      }
    }
    limit[length] = static_cast<uint32_t>(code) << (16 - length);
  }
  made = true;
  return true;
}

bool EntropyDecoder::TakeOver(j_decompress_ptr info, GiveUp give_up) {
  if (info->progressive_mode || info->arith_code || info->inputctl->has_multiple_scans || info->data_precision != 8 ||
      info->comps_in_scan != info->num_components || info->Ss != 0 || info->Se != DCTSIZE2 - 1 || info->Al != 0) {
    return false;
  }
  block_count_ = info->blocks_in_MCU;
  bool made_dc[NUM_HUFF_TBLS] = {}, made_ac[NUM_HUFF_TBLS] = {};
  for (int i = 0; i < block_count_; ++i) {
    const int member = info->MCU_membership[i];
    const jpeg_component_info* component = info->cur_comp_info[member];
    const int dc = component->dc_tbl_no, ac = component->ac_tbl_no;
    if (dc < 0 || dc >= NUM_HUFF_TBLS || ac < 0 || ac >= NUM_HUFF_TBLS) return false;
    if (info->dc_huff_tbl_ptrs[dc] == nullptr || info->ac_huff_tbl_ptrs[ac] == nullptr) return false;
    if (!made_dc[dc] && !dc_[dc].Make(*info->dc_huff_tbl_ptrs[dc], true)) return false;
    if (!made_ac[ac] && !ac_[ac].Make(*info->ac_huff_tbl_ptrs[ac], false)) return false;
    made_dc[dc] = made_ac[ac] = true;
    blocks_[i] = Block{&dc_[dc], &ac_[ac], member};
  }
  std::memset(last_dc_, 0, sizeof last_dc_);
  wild_ = false;
  next_ = info->src->next_input_byte;
  end_ = next_ + info->src->bytes_in_buffer;
  clean_.resize(kLowWater + kPiece + kPadding + 1);  // a stuffed byte may come one beyond a piece
  StartSegment();
  column_ = 0;
  columns_ = static_cast<int>(info->MCUs_per_row);
  Want(0, columns_ - 1);
  restart_interval_ = until_restart_ = info->restart_interval;
  next_restart_ = 0;
  give_up_ = give_up;
  info->client_data = this;
  info->entropy->decode_mcu = DecodeMcu;
  return true;
}

boolean EntropyDecoder::DecodeMcu(j_decompress_ptr info, JBLOCKROW* blocks) {
  auto* self = static_cast<EntropyDecoder*>(info->client_data);
  if (self->restart_interval_ != 0 && self->until_restart_-- == 0 && !self->Restart()) self->give_up_(info);
  const int column = self->column_;
  self->column_ = column + 1 == self->columns_ ? 0 : column + 1;
  const bool wanted = blocks != nullptr && column >= self->first_column_ && column <= self->last_column_;
  if (!(wanted ? self->Mcu<true>(blocks) : self->Mcu<false>(blocks))) self->give_up_(info);
  return TRUE;
}

template <bool kStore>
bool EntropyDecoder::Mcu(JBLOCKROW* blocks) {
  if (clean_end_ - clean_next_ < static_cast<ptrdiff_t>(kLowWater) && !segment_done_) Fetch();
  for (int i = 0; i < block_count_; ++i) {
    if (!DecodeBlock<kStore>(blocks_[i], kStore ? blocks[i][0] : nullptr)) return false;
  }
  return BitsLeft() >= 0;  // else bits beyond the segment's end were used
}

template <bool kStore>
bool EntropyDecoder::DecodeBlock(const Block& block, JCOEF* out) {
  // The state lives in registers here.
  uint64_t window = window_;
  int bits = bits_;
  const uint8_t* next = clean_next_;
  const auto refill = [&] {
    window |= LoadBigEndian(next) >> bits;
    next += (63 - bits) >> 3;
    bits |= 56;
  };
  const auto skip = [&](int count) {
    window <<= count;
    bits -= count;
  };

  refill();
  int32_t entry = block.dc->look[window >> (64 - kLookBits)];
  int32_t difference;
  if ((entry & kKindMask) == 0) {
    skip(entry & 255);
    difference = entry >> 16;
  } else {
    int size = entry >> 16, length = entry & 255;
    if ((entry & kKindMask) == kLong << 12) size = LongCode(*block.dc, window, &length);
    if (size < 0) return false;
    skip(length);
    difference = size == 0 ? 0 : Extend(static_cast<uint32_t>(window >> (64 - size)), size);
    skip(size);
  }
  int32_t& last = last_dc_[block.component];
  last = static_cast<int32_t>(static_cast<uint32_t>(last) + static_cast<uint32_t>(difference));
  wild_ |= last != static_cast<int16_t>(last);
  if (kStore) out[0] = static_cast<JCOEF>(last);

  const int32_t* const look = block.ac->look;
  int k = 1;
  while (k < DCTSIZE2) {
    refill();
    // At least 56 bits are there. Three look-ups take at most 33, which leaves the 31 that a long code may need at the
    // third, so only then is more fetched.
    for (int n = 0; n < 3; ++n) {
      entry = look[window >> (64 - kLookBits)];
      skip(entry & 255);
      k += entry >> 8 & 15;
      if ((entry & kKindMask) != 0) break;
      if (kStore) out[kNaturalOrder[k]] = static_cast<JCOEF>(entry >> 16);
      if (++k >= DCTSIZE2) break;
    }
    const int kind = entry >> 12 & 15;
    if (kind == kValue) continue;
    if (kind == kEnd) break;
    if (kind == kZeros) {
      k += 16;
      continue;
    }
    int size = entry >> 16;
    if (kind == kLong) {
      int length = 0;
      const int symbol = LongCode(*block.ac, window, &length);
      if (symbol < 0) return false;
      skip(length);
      size = symbol & 15;
      if (size == 0) {
        if (symbol >> 4 != 15) break;
        k += 16;
        continue;
      }
      k += symbol >> 4;
    }
    if (kStore) out[kNaturalOrder[k]] = static_cast<JCOEF>(Extend(static_cast<uint32_t>(window >> (64 - size)), size));
    skip(size);
    ++k;
  }
  window_ = window;
  bits_ = bits;
  clean_next_ = next;
  return k <= DCTSIZE2;
}

// A code of more than kLookBits bits; gives its symbol and length, or -1 where there is no such code.
int EntropyDecoder::LongCode(const Table& table, uint64_t window, int* length) {
  const uint32_t code = static_cast<uint32_t>(window >> 48);
  for (*length = kLookBits + 1; *length <= 16; ++*length) {
    if (code < table.limit[*length]) {
      const int place = static_cast<int>(code >> (16 - *length)) + table.offset[*length];
      return place >= 0 && place < 256 ? table.symbol[place] : -1;
    }
  }
  return -1;
}

// Takes the stuffing out of the next piece. What is left of the last piece moves to the front.
void EntropyDecoder::Fetch() {
  uint8_t* const base = clean_.data();
  const size_t left = clean_end_ > clean_next_ ? static_cast<size_t>(clean_end_ - clean_next_) : 0;
  std::memmove(base, clean_next_, left);
  uint8_t* to = base + left;
  const uint8_t* const full = base + kLowWater + kPiece;
  while (to < full) {
    const size_t most = std::min(static_cast<size_t>(full - to), static_cast<size_t>(end_ - next_));
    const void* const found = std::memchr(next_, 0xFF, most);
    const size_t plain = found != nullptr ? static_cast<size_t>(static_cast<const uint8_t*>(found) - next_) : most;
    std::memcpy(to, next_, plain);
    to += plain;
    next_ += plain;
    if (found == nullptr && next_ < end_) continue;
    if (end_ - next_ < 2 || next_[1] != 0) {
      segment_done_ = true;
      break;
    }
    *to++ = 0xFF;
    next_ += 2;
  }
  if (segment_done_) std::memset(to, 0, kPadding);
  clean_next_ = base;
  clean_end_ = to;
}

const uint8_t* EntropyDecoder::CleanEnd() {
  if (!segment_done_ && BitsLeft() < 8) Fetch();
  if (!segment_done_ || BitsLeft() >= 8 || wild_) return nullptr;
  return end_ - next_ >= 2 && next_[0] == 0xFF && next_[1] == 0xD9 ? next_ + 2 : nullptr;
}

bool EntropyDecoder::Restart() {
  // Up to 7 bits may be left of the last byte, then the marker must come, after any number of fill bytes.
  if (!segment_done_ && BitsLeft() < 8) Fetch();
  if (!segment_done_ || BitsLeft() >= 8) return false;
  while (end_ - next_ >= 2 && next_[0] == 0xFF && next_[1] == 0xFF) ++next_;
  if (end_ - next_ < 2 || next_[0] != 0xFF || next_[1] != 0xD0 + next_restart_) return false;
  next_ += 2;
  next_restart_ = (next_restart_ + 1) & 7;
  until_restart_ = restart_interval_ - 1;
  std::memset(last_dc_, 0, sizeof last_dc_);
  StartSegment();
  return true;
}

void EntropyDecoder::StartSegment() {
  window_ = 0;
  bits_ = 0;
  segment_done_ = false;
  clean_next_ = clean_end_ = clean_.data();
  Fetch();
}

}  // namespace imnet
