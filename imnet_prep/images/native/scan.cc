// Reads every entropy-coded bit of a baseline JPEG without making pixels, to tell whether it is whole.
//
// A decoder needs each coefficient's value; here its length is enough, so one look-up steps over several symbols and
// their bits. The answer is "clean" or "in doubt": whatever is unusual is left to libjpeg, whose verdict counts, so a
// machine without this library comes to the same results, only later.
//
// Each look-up waits for the one before. So several decoders ("lanes") take turns in one thread: the first reads from
// the start, the others from somewhere inside, guessing that an MCU begins there. Such a guess soon falls into step,
// for Huffman codes synchronise. What a lane will read depends only on the bit and on the block of the MCU where it
// stands: predictions play no part. So a lane that ends a block just where the next lane ended the same block of an MCU
// may stop, for the next lane reads the rest. The answer is always that of one lane alone.
//
// Source: ITU-T T.81, annex B.1.1 (markers) and F.2.2 (decoding).
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "api.h"
#include "big_endian.h"
#include "header.h"

namespace imnet {
namespace {

constexpr size_t kPadding = 64;     // readable zeros after a segment: a window is 8 bytes
constexpr int kLanes = 4;           // _LANES in __init__.py; their states just fit in the registers
constexpr size_t kShortest = 1024;  // bytes for a lane: photographs fall into step in about 40, seldom after 1,000
constexpr size_t kGroups = 64;      // of look-ups before the lanes are compared
constexpr size_t kEnds = 512;       // of blocks that a lane keeps for another to meet it

struct Lane {
  uint64_t* ends;  // of the first kEnds blocks, then of the recent ones
  uint64_t begin, at;
  const Node* node;
  Lane* next;               // to be met
  Lane* joined = nullptr;   // the one that was met
  size_t there = 0;         // after so many of its blocks
  bool dropped = false;     // will not be met
  size_t count = 0;         // blocks, invalid ones too
  size_t recent = 0;        // of them since the lanes were compared
  size_t good = 0;          // after so many blocks all were valid
  size_t seen = 0;          // blocks of `next` that ended before the last of this lane

  uint64_t* Recent() const { return ends + std::min(count - recent, kEnds); }
};

// A lane while it runs.
struct State {
  uint64_t at;
  const Node* node;
  uint64_t* out;
};

class Scanner {
 public:
  // The byte behind the end marker, or 0 in doubt.
  size_t CleanEnd(const uint8_t* data, size_t size, int lanes) {
    max_lanes_ = static_cast<size_t>(std::clamp(lanes, 1, kLanes));
    return IsClean(data, size) ? static_cast<size_t>(at_ - data) : 0;
  }

 private:
  bool IsClean(const uint8_t* data, size_t size) {
    at_ = data;
    end_ = data + size;
    return header_.Read(&at_, end_) && Scan();
  }

  // All segments of the scan, and the end marker right after it.
  bool Scan() {
    int restart = 0;
    for (uint64_t left = header_.mcus(); left > 0;) {
      const int marker = Unstuff();
      const uint64_t interval = header_.restart_interval();
      const uint64_t due = interval == 0 ? left : std::min(left, interval);
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
  bool Mcus(uint64_t mcus) {
    size_t n = std::clamp<size_t>(clean_bytes_ / kShortest, 1, max_lanes_);
    Lane lanes[kLanes];
    Lane* active[kLanes];
    for (size_t i = 0; i < n; ++i) {
      const uint64_t begin = clean_bytes_ * i / n * 8 * kBit;
      lanes[i] = {ends_[i], begin, begin, header_.nodes(), i + 1 < n ? &lanes[i + 1] : nullptr};
      active[i] = &lanes[i];
    }
    while (n > 0) {
      size_t groups = kGroups, left = 0;
      for (size_t i = 0; i < n; ++i) groups = std::min(groups, Room(*active[i]));
      if (n == 1) Run<1>(active, groups);
      if (n == 2) Run<2>(active, groups);
      if (n == 3) Run<3>(active, groups);
      if (n == 4) Run<4>(active, groups);
      if (lanes[0].good > 0) return false;
      for (size_t i = 0; i < n; ++i) {
        if (!active[i]->dropped && !Joins(active[i]) && Room(*active[i]) > 0) active[left++] = active[i];
      }
      n = left;
    }
    size_t before = 0;
    const Lane* lane = lanes;
    for (; lane->joined != nullptr; lane = lane->joined) {
      if (lane->joined->good > lane->there) return false;
      before += lane->count - lane->there;
    }
    return Finish(lane->at, lane->node, before + lane->count, mcus * header_.blocks());
  }

  // Groups of look-ups that all begin 64 bits or more before the segment's end. None takes more than 56.
  size_t Room(const Lane& lane) const {
    const size_t bits = 8 * clean_bytes_ - lane.at / kBit;
    return bits < 64 ? 0 : (bits - 64) / 56 + 1;
  }

  // Whether the lane met another since the last comparison.
  bool Joins(Lane* lane) const {
    for (; lane->next != nullptr; lane->next = lane->next->next, lane->seen = 0) {
      Lane& next = *lane->next;
      if (lane->at < next.begin) return false;
      const size_t known = std::min(next.count, kEnds);
      const uint64_t* end = lane->Recent();
      for (size_t here = lane->count - lane->recent + 1; here <= lane->count; ++here, ++end) {
        while (lane->seen < known && next.ends[lane->seen] < *end) ++lane->seen;
        if (lane->seen == known) break;
        const size_t there = lane->seen + 1;
        if (next.ends[lane->seen] == *end && here % header_.blocks() == there % header_.blocks()) {
          lane->joined = &next;
          lane->there = there;
          lane->count = here;
          return true;
        }
      }
      if (lane->seen < known) return false;
      next.dropped = true;
    }
    return false;
  }

  // The last blocks, symbol by symbol. Where there are none left to read, the segment's end is too far.
  bool Finish(uint64_t at, const Node* node, size_t blocks, size_t due) const {
    while (blocks < due) {
      at = Step(at, *node->tables);
      if ((at & kOver) != 0 || at / kBit > 8 * clean_bytes_) return false;
      const size_t end = at / kEnd % 2;
      if (end != 0) at -= at % kBit;
      blocks += end;
      node = node->to[end];
    }
    return blocks == due && at / kBit + 8 > 8 * clean_bytes_;
  }

  uint64_t Window(uint64_t at) const {
    return LoadBigEndian(clean_.data() + at / (8 * kBit)) << (at / kBit % 8);
  }

  // Over one symbol. kOver in the result: it is invalid.
  uint64_t Step(uint64_t at, const Tables& tables) const {
    const uint64_t k = at % kBit;
    const Symbol symbol = (k == 0 ? tables.dc : tables.ac)->Find(static_cast<uint32_t>(Window(at) >> 48));
    const uint64_t next = at - k + static_cast<uint64_t>(symbol.length + symbol.size) * kBit;
    if (symbol.length == 0 || symbol.size > kMaxSize - (k > 0)) return next | kOver;
    if (k == 0) return next + 1;
    if (symbol.size == 0 && symbol.run != 15) return next | (symbol.run == 0 ? kEnd : kOver);
    const uint64_t last = k + static_cast<uint64_t>(symbol.run);
    if (last > 63 || (last == 63 && symbol.size == 0)) return next | kOver;
    return last == 63 ? next | kEnd : next + last + 1;
  }

  // A group of look-ups, one of which does not fit. An invalid code ends a block, so that a guess may go on.
  __attribute__((noinline)) uint64_t Slow(uint64_t at, const Node& node, const uint64_t* out, Lane* lane) const {
    Entry entry = node.table[Window(at) >> (64 - kLookBits)];
    if (((at + entry) & kOver) == 0) {
      at += entry;
      if ((at & kEnd) != 0) return at;
      entry = node.then[Window(at) >> (64 - kLookBits)];
    }
    do {
      at = Step(at, *node.tables);
    } while (entry != kLong && (at & (kEnd | kOver)) == 0);
    if ((at & kOver) == 0) return at;
    lane->good = lane->count + static_cast<size_t>(out - lane->Recent()) + 1;
    return ((at & ~kOver) + kBit) | kEnd;
  }

  // Two look-ups; one where a block ends. It has no branch that is hard to foretell.
  __attribute__((always_inline)) void Group(State* state, Lane* lane) const {
    const Node& node = *state->node;
    uint64_t window = Window(state->at);
    const uint32_t one = node.table[window >> (64 - kLookBits)];
    window <<= one / kBit;
    const uint32_t two = node.then[window >> (64 - kLookBits)];
    uint64_t at = state->at + one + (two >> (one / kEnd % 2 * 16));
    if (__builtin_expect((at & kOver) != 0, 0)) at = Slow(state->at, node, state->out, lane);
    const uint64_t end = at / kEnd % 2;
    at &= (end - 1) | ~(kBit - 1);
    *state->out = at;
    state->at = at;
    state->out += end;
    state->node = node.to[end];
  }

  template <int N>
  void Run(Lane* const* lanes, size_t groups) const {
    State states[N];
    for (int i = 0; i < N; ++i) {
      lanes[i]->recent = 0;
      states[i] = {lanes[i]->at, lanes[i]->node, lanes[i]->Recent()};
    }
    for (; groups > 0; --groups) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) Group(&states[i], lanes[i]);
    }
    for (int i = 0; i < N; ++i) {
      lanes[i]->recent = static_cast<size_t>(states[i].out - lanes[i]->Recent());
      lanes[i]->count += lanes[i]->recent;
      lanes[i]->at = states[i].at;
      lanes[i]->node = states[i].node;
    }
  }

  size_t max_lanes_ = 1;
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
  Header header_;
  uint64_t ends_[kLanes][kEnds + kGroups];
  std::vector<uint8_t> clean_;
  size_t clean_bytes_ = 0;
};

}  // namespace
}  // namespace imnet

IMNET_API int imnet_abi() { return imnet::kAbi; }

// Where every bit of the image was read and is as it should be, the byte behind its end marker. 0: in doubt.
IMNET_API size_t imnet_clean_end(const uint8_t* data, size_t size, int lanes) {
  try {
    thread_local std::unique_ptr<imnet::Scanner> scanner = std::make_unique<imnet::Scanner>();
    return scanner->CleanEnd(data, size, lanes);
  } catch (const std::bad_alloc&) {
    return 0;
  }
}
