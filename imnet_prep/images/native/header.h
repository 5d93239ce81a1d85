// What the segments before the scan of a baseline JPEG say, and the tables for reading that scan.
//
// Source: ITU-T T.81, annex B.2 (segments).
#ifndef IMNET_PREP_SCAN_HEADER_H_
#define IMNET_PREP_SCAN_HEADER_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <vector>

#include "codes.h"

namespace imnet {

// A block of the MCU, at its beginning or behind its DC value.
struct Node {
  const Entry* table;
  const Entry* then;  // the table for what follows in the block
  const Node* to[2];  // later in the block; at the next block's beginning
  const Tables* tables;
};

struct Component {
  int id, h, v, quantiser;
};

class Header {
 public:
  // Reads from SOI to the first byte of the scan; false in doubt. Made tables stay for the next image.
  bool Read(const uint8_t** at, const uint8_t* end) {
    const uint8_t* from = *at;
    components_.clear();
    std::fill(std::begin(quantisers_), std::end(quantisers_), false);
    for (int i = 0; i < 4; ++i) dc_[i].made = ac_[i].made = false;
    restart_interval_ = 0;
    if (end - from < 4 || from[0] != 0xFF || from[1] != 0xD8) return false;
    from += 2;
    for (;;) {
      if (end - from < 2 || *from != 0xFF) return false;
      while (from < end && *from == 0xFF) ++from;
      if (end - from < 3) return false;
      const int marker = *from++;
      const size_t length = static_cast<size_t>(from[0] << 8 | from[1]);
      if (length < 2 || length > static_cast<size_t>(end - from)) return false;
      const uint8_t* const body = from + 2;
      from += length;
      *at = from;
      if (marker == 0xDA) return StartScan(body, length - 2);
      if (!Segment(marker, body, length - 2)) return false;
    }
  }

  uint64_t mcus() const { return mcus_; }
  unsigned restart_interval() const { return restart_interval_; }  // in MCUs; 0: none
  size_t blocks() const { return blocks_; }                        // of an MCU
  const Node* nodes() const { return nodes_; }                     // the first block's beginning

 private:
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
      Code& table = kind == 0 ? dc_[id] : ac_[id];
      if (last.size() == 16 + count && std::memcmp(last.data(), body + 1, 16 + count) == 0) {
        table.made = true;  // most files carry the standard's tables
      } else {
        last.clear();
        for (Tables& made : tables_) {
          if (made.dc == &table || made.ac == &table) made.dc = nullptr;
        }
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
      if (component.h < 1 || component.h > 4 || component.v < 1 || component.v > 4) return false;
      if (component.quantiser > 3) return false;
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
    size_t blocks = 0;
    for (size_t i = 0; i < count; ++i) {
      const Component& component = components_[i];
      const int dc = body[2 + 2 * i] >> 4, ac = body[2 + 2 * i] & 15;
      if (body[1 + 2 * i] != component.id || dc > 3 || ac > 3) return false;
      if (!dc_[dc].made || !ac_[ac].made || !quantisers_[component.quantiser]) return false;
      const Tables* tables = tables_;
      while (tables < tables_ + i && (tables->dc != &dc_[dc] || tables->ac != &ac_[ac])) ++tables;
      if (tables->dc != &dc_[dc] || tables->ac != &ac_[ac]) tables_[i].Make(dc_[dc], ac_[ac]);
      for (int n = count == 1 ? 1 : component.h * component.v; n > 0; --n, ++blocks) {
        Node* const node = nodes_ + 2 * blocks;
        node[0] = {tables->first, tables->then, {node + 1, node + 2}, tables};
        node[1] = {tables->then, tables->then, {node + 1, node + 2}, tables};
      }
    }
    nodes_[2 * blocks - 2].to[1] = nodes_[2 * blocks - 1].to[1] = nodes_;
    blocks_ = blocks;
    return true;
  }

  Code dc_[4], ac_[4];
  Tables tables_[3];
  Node nodes_[20];
  std::vector<uint8_t> last_codes_[2][4];
  bool quantisers_[4] = {};
  std::vector<Component> components_;
  size_t blocks_ = 0;
  int width_ = 0, height_ = 0;
  unsigned restart_interval_ = 0;
  uint64_t mcus_ = 0;
};

}  // namespace imnet

#endif  // IMNET_PREP_SCAN_HEADER_H_
