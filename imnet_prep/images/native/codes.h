// Huffman codes of a baseline JPEG, and look-up tables that step over several symbols and their values' bits at once.
//
// Source: ITU-T T.81, annex C (code tables) and F.2.2 (decoding).
#ifndef IMNET_PREP_SCAN_CODES_H_
#define IMNET_PREP_SCAN_CODES_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace imnet {

constexpr int kLookBits = 12;  // the tables of two components fill the first-level cache
constexpr int kMaxSize = 11;   // bits of a value that an 8-bit baseline encoder writes (DC; AC has 10)

// Where a decoder stands: the bit, times kBit, plus the coefficients of the block behind it (0: the DC value is next).
// Entries of look-up tables are added to that. kEnd: the block ends. kOver, any bit of it: the entry does not fit here.
constexpr uint64_t kBit = 1024, kEnd = 512, kOver = 64 + 128 + 256;
using Entry = uint16_t;
constexpr Entry kLong = 64;  // a code of more than kLookBits, or none

struct Symbol {
  int size;  // of the value
  int run;
  int length;  // of the code; 0 where there is none
};

class Code {
 public:
  bool made = false;

  // Takes 16 counts and their symbols; false where they are no code, or none that a baseline encoder makes.
  bool Make(const uint8_t* counts, const uint8_t* symbols, bool dc) {
    made = false;
    dc_ = dc;
    int count = 0;
    for (int i = 0; i < 16; ++i) count += counts[i];
    std::memset(symbol_, 0, sizeof symbol_);
    std::memcpy(symbol_, symbols, static_cast<size_t>(count));
    uint32_t code = 0;
    int place = 0;
    for (int length = 1; length <= 16; ++length, code <<= 1) {
      offset_[length] = place - static_cast<int>(code);
      code += counts[length - 1];
      place += counts[length - 1];
      if (code > 1u << length) return false;  // more codes than there is room for
      limit_[length] = code << (16 - length);
    }
    for (int i = 0; i < count && dc; ++i) {
      if (symbol_[i] > 15) return false;  // libjpeg refuses the table
    }
    int length = 1;
    for (uint32_t top = 0; top < 256; ++top) {
      while (length < 9 && top << 8 >= limit_[length]) ++length;
      least_[top] = static_cast<uint8_t>(length);
    }
    made = true;
    return true;
  }

  // The symbol at the top of 16 bits.
  Symbol Find(uint32_t bits16) const {
    for (int length = least_[bits16 >> 8]; length <= 16; ++length) {
      if (bits16 < limit_[length]) return At(static_cast<int>(bits16 >> (16 - length)) + offset_[length], length);
    }
    return Symbol{0, 0, 0};
  }

  // Fills 2^known entries with the symbols in so many bits; tails[n] has the entries for n bits behind a first symbol.
  void Fill(int known, const Entry* const* tails, Entry unknown, Entry* to) const {
    Entry* const end = to + (size_t{1} << known);
    uint32_t from = 0;
    for (int length = 1, place = 0; length <= known; ++length) {
      for (; from < limit_[length]; from += 1u << (16 - length)) {
        const Symbol symbol = At(place++, length);
        const bool last = !dc_ && symbol.size == 0 && symbol.run != 15;
        const bool valid = symbol.size <= (dc_ ? kMaxSize : kMaxSize - 1) && !(last && symbol.run != 0);
        const int used = length + symbol.size, left = std::max(0, known - used);
        const uint64_t entry = static_cast<uint64_t>(used) * kBit + (last ? kEnd : symbol.run + 1u);
        Entry* const until = to + (size_t{1} << (known - length));
        if (!valid || last || left == 0) {
          std::fill(to, until, valid ? static_cast<Entry>(entry) : unknown);
          to = until;
        }
        for (const Entry* const tail = tails[left]; to < until; to += size_t{1} << left) {
          for (size_t i = 0; i < size_t{1} << left; ++i) to[i] = static_cast<Entry>(entry + tail[i]);
        }
      }
    }
    std::fill(to, end, unknown);
  }

 private:
  Symbol At(int place, int length) const {
    const int value = symbol_[place & 255];
    return dc_ ? Symbol{value, 0, length} : Symbol{value & 15, value >> 4, length};
  }

  uint32_t limit_[17];  // the first 16 bits, as a number, that lie beyond the codes of a length
  int offset_[17];      // code of that length + offset = position in symbol_
  uint8_t symbol_[256];
  uint8_t least_[256];  // the shortest code that may begin with 8 bits
  bool dc_ = false;
};

// The look-up tables for the blocks of a component.
struct Tables {
  const Code* dc = nullptr;
  const Code* ac = nullptr;
  Entry first[1 << kLookBits], then[1 << kLookBits];  // from the DC value on; from any other coefficient on

  void Make(const Code& of_dc, const Code& of_ac) {
    dc = &of_dc;
    ac = &of_ac;
    Entry room[1 << kLookBits];
    const Entry* tails[kLookBits];
    Entry* to = room;
    for (int known = 0; known < kLookBits; ++known) {
      ac->Fill(known, tails, 0, to);
      tails[known] = to;
      to += size_t{1} << known;
    }
    ac->Fill(kLookBits, tails, kLong, then);
    dc->Fill(kLookBits, tails, kLong, first);
  }
};

}  // namespace imnet

#endif  // IMNET_PREP_SCAN_CODES_H_
