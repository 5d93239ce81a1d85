// Reads every entropy-coded bit of a baseline JPEG without making pixels, to tell whether it is whole.
//
// A decoder needs each coefficient's value; here its length is enough, so one look-up steps over up to three symbols and
// their bits. The answer is "clean" or "in doubt": whatever is unusual is left to libjpeg, whose verdict counts, so a
// machine without this library comes to the same results, only later.
//
// Source: ITU-T T.81, annex B (markers), C (code tables) and F.2.2 (decoding).
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace {

constexpr int kAbi = 2;  // _ABI in __init__.py
constexpr int kLookBits = 10;
constexpr int kMaxSize = 11;     // bits of a value that an 8-bit baseline encoder writes (DC; AC has 10)
constexpr size_t kPadding = 64;  // readable zeros after a segment: a refill reads 8 bytes ahead

// The next kLookBits bits. `bits` are stepped over and `advance` coefficients with them; `end`: the block ends there.
// `bits` is 0 where the code is longer, or must not be.
class Entry {  // packed in 16 bits: the tables are to stay in the first-level cache
 public:
  Entry() = default;
  Entry(int bits, int advance, int end) : packed_(static_cast<uint16_t>(bits | advance << 5 | end << 11)) {}
  int bits() const { return packed_ & 31; }
  int advance() const { return packed_ >> 5 & 63; }
  bool end() const { return packed_ >> 11 != 0; }

 private:
  uint16_t packed_ = 0;
};

struct Symbol {
  int size;  // of the value
  int run;
  int length;  // of the code; 0 where there is none
};

class Table {
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
    for (uint32_t bits = 0; bits < 1u << kLookBits; ++bits) {
      one_[bits] = Look(bits, 1);
      many_[bits] = dc ? one_[bits] : Look(bits, 3);
    }
    made = true;
    return true;
  }

  const Entry* one() const { return one_; }
  const Entry* many() const { return many_; }

  // The symbol at the top of 16 bits.
  Symbol Find(uint32_t bits16) const {
    for (int length = 1; length <= 16; ++length) {
      if (bits16 < limit_[length]) {
        const int value = symbol_[(static_cast<int>(bits16 >> (16 - length)) + offset_[length]) & 255];
        return dc_ ? Symbol{value, 0, length} : Symbol{value & 15, value >> 4, length};
      }
    }
    return Symbol{0, 0, 0};
  }

 private:
  Entry Look(uint32_t bits, int most) const {
    int used = 0, advance = 0, end = 0;
    for (int n = 0; n < most && used < kLookBits; ++n) {
      const int known = kLookBits - used;
      const uint32_t rest = (bits << used & ((1u << kLookBits) - 1)) << (16 - kLookBits);
      const Symbol symbol = Find(rest);
      if (symbol.length == 0 || symbol.length > known || symbol.size > (dc_ ? kMaxSize : kMaxSize - 1)) break;
      used += symbol.length + symbol.size;
      if (dc_) break;
      if (symbol.size == 0 && symbol.run != 15) {
        end = 1;
        if (symbol.run != 0) return Entry();  // EOBn belongs to progressive files
        break;
      }
      advance += symbol.run + 1;
    }
    return Entry(used, advance, end);
  }

  Entry one_[1 << kLookBits], many_[1 << kLookBits];
  uint32_t limit_[17];  // the first 16 bits, as a number, that lie beyond the codes of a length
  int offset_[17];      // code of that length + offset = position in symbol_
  uint8_t symbol_[256];
  bool dc_ = false;
};

struct Component {
  int id, h, v, quantiser;
};

inline uint64_t LoadBigEndian(const uint8_t* data) {
  uint64_t value;
  std::memcpy(&value, data, sizeof value);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  value = __builtin_bswap64(value);
#endif
  return value;
}

// The bits of one segment, its stuffing taken out.
struct Bits {
  const uint8_t* next;
  uint64_t window = 0;  // the next bits, from the top
  int count = 0;        // of them

  void Refill() {
    window |= LoadBigEndian(next) >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }
  void Skip(int bits) {
    window <<= bits;
    count -= bits;
  }
};

class Scanner {
 public:
  // The byte behind the end marker, or 0 in doubt.
  size_t CleanEnd(const uint8_t* data, size_t size) {
    return IsClean(data, size) ? static_cast<size_t>(at_ - data) : 0;
  }

 private:
  bool IsClean(const uint8_t* data, size_t size) {
    at_ = data;
    end_ = data + size;
    components_.clear();
    std::fill(std::begin(quantisers_), std::end(quantisers_), false);
    for (int i = 0; i < 4; ++i) dc_[i].made = ac_[i].made = false;
    restart_interval_ = 0;
    if (size < 4 || at_[0] != 0xFF || at_[1] != 0xD8) return false;
    at_ += 2;
    for (;;) {
      if (end_ - at_ < 2 || *at_ != 0xFF) return false;
      while (at_ < end_ && *at_ == 0xFF) ++at_;
      if (end_ - at_ < 3) return false;
      const int marker = *at_++;
      const size_t length = static_cast<size_t>(at_[0] << 8 | at_[1]);
      if (length < 2 || length > static_cast<size_t>(end_ - at_)) return false;
      const uint8_t* const body = at_ + 2;
      const size_t body_size = length - 2;
      at_ += length;
      if (marker == 0xDA) return StartScan(body, body_size) && Scan();
      if (!Segment(marker, body, body_size)) return false;
    }
  }

  bool Segment(int marker, const uint8_t* body, size_t size) {
    if ((marker >= 0xE0 && marker <= 0xEF) || marker == 0xFE) return true;
    if (marker == 0xDB) return Quantisers(body, size);
    if (marker == 0xC4) return Codes(body, size);
    if (marker == 0xC0 || marker == 0xC1) return Frame(body, size);
    if (marker == 0xDD && size == 2) {
      restart_interval_ = static_cast<unsigned>(body[0] << 8 | body[1]);
      return true;
    }
    return false;  // progressive, arithmetic, lossless, and what has no place here
  }

  bool Quantisers(const uint8_t* body, size_t size) {
    while (size > 0) {
      const int id = body[0] & 15;
      const size_t need = body[0] >> 4 == 0 ? 65 : 129;
      if (id > 3 || body[0] >> 4 > 1 || size < need) return false;
      quantisers_[id] = true;
      body += need;
      size -= need;
    }
    return true;
  }

  bool Codes(const uint8_t* body, size_t size) {
    while (size > 0) {
      const int id = body[0] & 15, kind = body[0] >> 4;
      if (size < 17 || id > 3 || kind > 1) return false;
      size_t count = 0;
      for (int i = 1; i <= 16; ++i) count += body[i];
      if (count > 256 || size < 17 + count) return false;
      std::vector<uint8_t>& last = last_codes_[kind][id];
      Table& table = kind == 0 ? dc_[id] : ac_[id];
      if (last.size() == 16 + count && std::memcmp(last.data(), body + 1, 16 + count) == 0) {
        table.made = true;  // most files carry the standard's tables
      } else {
        last.clear();
        if (!table.Make(body + 1, body + 17, kind == 0)) return false;
        last.assign(body + 1, body + 17 + count);
      }
      body += 17 + count;
      size -= 17 + count;
    }
    return true;
  }

  bool Frame(const uint8_t* body, size_t size) {
    if (!components_.empty() || size < 6 || body[0] != 8) return false;
    height_ = body[1] << 8 | body[2];
    width_ = body[3] << 8 | body[4];
    const size_t count = body[5];
    if (width_ == 0 || height_ == 0 || (count != 1 && count != 3) || size != 6 + 3 * count) return false;
    int across = 1, down = 1, blocks = 0;
    for (size_t i = 0; i < count; ++i) {
      const uint8_t* part = body + 6 + 3 * i;
      const Component component{part[0], part[1] >> 4, part[1] & 15, part[2]};
      if (component.h < 1 || component.h > 4 || component.v < 1 || component.v > 4 || component.quantiser > 3) return false;
      for (const Component& other : components_) {
        if (other.id == component.id) return false;
      }
      across = std::max(across, component.h);
      down = std::max(down, component.v);
      blocks += component.h * component.v;
      components_.push_back(component);
    }
    for (const Component& component : components_) {
      if (across % component.h != 0 || down % component.v != 0) return false;  // not every decoder upsamples that
    }
    if (count == 1) across = down = 1;  // a scan of one component is not interleaved
    if (count > 1 && blocks > 10) return false;
    mcus_ = static_cast<uint64_t>((width_ + 8 * across - 1) / (8 * across)) *
            static_cast<uint64_t>((height_ + 8 * down - 1) / (8 * down));
    return true;
  }

  bool StartScan(const uint8_t* body, size_t size) {
    const size_t count = components_.size();
    if (count == 0 || size != 4 + 2 * count || body[0] != count) return false;
    if (body[size - 3] != 0 || body[size - 2] != 63 || body[size - 1] != 0) return false;
    block_count_ = 0;
    for (size_t i = 0; i < count; ++i) {
      const Component& component = components_[i];
      const int dc = body[2 + 2 * i] >> 4, ac = body[2 + 2 * i] & 15;
      if (body[1 + 2 * i] != component.id || dc > 3 || ac > 3) return false;
      if (!dc_[dc].made || !ac_[ac].made || !quantisers_[component.quantiser]) return false;
      for (int n = count == 1 ? 1 : component.h * component.v; n > 0; --n) blocks_[block_count_++] = {&dc_[dc], &ac_[ac]};
    }
    return true;
  }

  // All segments of the scan, and the end marker right after it.
  bool Scan() {
    int restart = 0;
    for (uint64_t left = mcus_; left > 0;) {
      const int marker = Unstuff();
      const uint64_t due = restart_interval_ == 0 ? left : std::min<uint64_t>(left, restart_interval_);
      if (!Mcus(due)) return false;
      left -= due;
      if (marker != (left == 0 ? 0xD9 : 0xD0 + restart)) return false;
      restart = (restart + 1) & 7;
    }
    return true;
  }

  // Copies the bytes up to the next marker, without their stuffing, and gives the marker; 0 where there is none.
  int Unstuff() {
    const size_t most = static_cast<size_t>(end_ - at_) + kPadding;
    if (clean_.size() < most) clean_.resize(most);
    uint8_t* to = clean_.data();
    int marker = 0;
    while (at_ < end_) {
      const void* found = std::memchr(at_, 0xFF, static_cast<size_t>(end_ - at_));
      const size_t plain = found == nullptr ? static_cast<size_t>(end_ - at_)
                                            : static_cast<size_t>(static_cast<const uint8_t*>(found) - at_);
      std::memcpy(to, at_, plain);
      to += plain;
      at_ += plain;
      if (end_ - at_ < 2) break;
      const int next = at_[1];
      at_ += 2;
      if (next != 0) {
        marker = next;
        break;
      }
      *to++ = 0xFF;
    }
    clean_bytes_ = static_cast<size_t>(to - clean_.data());
    std::memset(to, 0, kPadding);
    return marker;
  }

  // MCUs that must fill the segment to its last byte.
  bool Mcus(uint64_t count) {
    const uint8_t* const begin = clean_.data();
    const uint8_t* const last = begin + clean_bytes_;
    Bits bits{begin};
    for (; count > 0; --count) {
      for (int i = 0; i < block_count_; ++i) {
        // A block of bits beyond the end could run on into what was never written.
        if (bits.next > last + 8 || !Block(*blocks_[i].dc, *blocks_[i].ac, last + 16, &bits)) return false;
      }
    }
    const int64_t left = 8 * (last - bits.next) + bits.count;
    return left >= 0 && left < 8;
  }

  static bool Block(const Table& dc, const Table& ac, const uint8_t* stop, Bits* state) {
    Bits bits = *state;  // in registers
    bits.Refill();
    const Entry first = dc.one()[bits.window >> (64 - kLookBits)];
    if (first.bits() != 0) {
      bits.Skip(first.bits());
    } else {
      const Symbol symbol = dc.Find(static_cast<uint32_t>(bits.window >> 48));
      if (symbol.length == 0 || symbol.size > kMaxSize) return false;
      bits.Skip(symbol.length + symbol.size);
    }
    const Entry* const many = ac.many();
    int k = 1;
    while (k < 64) {
      bits.Refill();
      if (bits.next > stop) return false;
      // 56 bits at least: two look-ups take at most 40.
      for (int n = 0; n < 2; ++n) {
        const Entry entry = many[bits.window >> (64 - kLookBits)];
        if (entry.bits() == 0 || k + entry.advance() > 63) {
          // The long way, one symbol: the block may end before what the entry holds.
          const Symbol symbol = ac.Find(static_cast<uint32_t>(bits.window >> 48));
          if (symbol.length == 0 || symbol.size >= kMaxSize) return false;
          bits.Skip(symbol.length + symbol.size);
          if (symbol.size == 0 && symbol.run == 0) {
            k = 64;
          } else if (symbol.size == 0 && symbol.run != 15) {
            return false;
          } else {
            k += symbol.run + 1;
            if (k > 64 || (k == 64 && symbol.size == 0)) return false;
          }
          break;
        }
        bits.Skip(entry.bits());
        k += entry.advance();
        if (entry.end()) {
          k = 64;
          break;
        }
      }
    }
    *state = bits;
    return true;
  }

  struct BlockTables {
    const Table* dc;
    const Table* ac;
  };

  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
  Table dc_[4], ac_[4];
  std::vector<uint8_t> last_codes_[2][4];
  bool quantisers_[4] = {};
  std::vector<Component> components_;
  BlockTables blocks_[16];
  int block_count_ = 0, width_ = 0, height_ = 0;
  unsigned restart_interval_ = 0;
  uint64_t mcus_ = 0;
  std::vector<uint8_t> clean_;
  size_t clean_bytes_ = 0;
};

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int imnet_scan_abi() { return kAbi; }

// Where every bit of the image was read and is as it should be, the byte behind its end marker. 0: in doubt.
__attribute__((visibility("default"))) size_t imnet_scan_clean_end(const uint8_t* data, size_t size) {
  try {
    thread_local std::unique_ptr<Scanner> scanner = std::make_unique<Scanner>();
    return scanner->CleanEnd(data, size);
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
}
