// Inference of one inverted residual in bands of output rows: expanded rows go to a ring in the cache, through the depthwise
// filter, and into the projection; only the block's output is written to memory.

struct BandPlan {
  int out_rows, ring_rows;
  int64_t row_floats;  // one hidden row with its two zero columns
  template <class T>
  explicit BandPlan(const BlockInference<T>& p) {
    const Depthwise<>& d = p.depthwise;
    out_rows = (kForwardRows + d.out_width - 1) / d.out_width;
    if (out_rows < kRowsAtOnce) out_rows = kRowsAtOnce;
    if (out_rows > d.out_height) out_rows = d.out_height;
    ring_rows = (out_rows - 1) * d.stride + 3;
    row_floats = static_cast<int64_t>(d.width + 2) * p.hidden;
  }
};

template <class T>
inline int64_t places_floats(const BlockInference<T>& p, const BandPlan& plan) {
  return (static_cast<int64_t>(plan.ring_rows) * p.depthwise.width + kMaxTileRows) * static_cast<int64_t>(sizeof(int64_t) / sizeof(float));
}

// The expansion's left matrix as it is multiplied: a copy where its rows are not floats, or fewer than a tile.
template <class T>
inline int64_t copy_floats(const BlockInference<T>& p, const BandPlan& plan) {
  using E = Element<T, T>;
  const int64_t rows = std::is_same_v<E, float> ? kMaxTileRows : static_cast<int64_t>(plan.ring_rows) * p.depthwise.width;
  return (rows + kMaxTileRows) * spread(depth_of<E>(p.inputs));
}

// The projection's left matrix: what the filter gives.
template <class T>
inline int64_t filtered_stride(const BlockInference<T>& p) {
  using E = Element<T, T>;
  return std::is_same_v<E, float> ? p.hidden : spread(depth_of<E>(p.hidden));
}
template <class T>
inline int64_t filtered_floats(const BlockInference<T>& p, const BandPlan& plan) {
  return (static_cast<int64_t>(plan.out_rows) * p.depthwise.out_width + kMaxTileRows) * filtered_stride(p);
}

template <class T>
int64_t block_scratch(const BlockInference<T>& p) {
  const BandPlan plan(p);
  const Stem<>& s = p.first_stem;
  const int64_t stem = p.stem ? stem_scratch(s.width, s.out_width, s.outputs) : 0;
  return (plan.ring_rows + 1) * plan.row_floats + filtered_floats(p, plan) + copy_floats(p, plan) + places_floats(p, plan) + stem + 64;
}

template <class T>
void block(const BlockInference<T>& p, int64_t begin, int64_t end, float* scratch) {
  using E = Element<T, T>;
  using Stored = std::conditional_t<std::is_same_v<E, float>, float, bfloat16>;
  constexpr int kEach = sizeof(E) / sizeof(Stored);
  [[maybe_unused]] const Tiles<E> tiles;
  const Depthwise<>& d = p.depthwise;
  const BandPlan plan(p);
  float* ring = scratch;
  float* zero_row = ring + plan.ring_rows * plan.row_floats;
  E* filtered = reinterpret_cast<E*>(zero_row + plan.row_floats);
  E* copy = filtered + filtered_floats(p, plan);
  int64_t* places = reinterpret_cast<int64_t*>(copy + copy_floats(p, plan));
  float* stem_memory = reinterpret_cast<float*>(places) + places_floats(p, plan);
  // Neighbours of the rows; and with bfloat16 what fills them up to whole tiles.
  std::memset(scratch, 0, sizeof(float) * (plan.ring_rows + 1) * plan.row_floats);
  if (kEach > 1) std::memset(filtered, 0, sizeof(E) * (filtered_floats(p, plan) + copy_floats(p, plan)));
  const E *expand_weights = reinterpret_cast<const E*>(p.expand), *project_weights = reinterpret_cast<const E*>(p.project);
  for (int r = 0; r < plan.ring_rows; ++r)
    for (int x = 0; x < d.width; ++x) places[r * d.width + x] = r * plan.row_floats + static_cast<int64_t>(x + 1) * p.hidden;
  StemRows<float>* stem_rows = nullptr;
  alignas(StemRows<float>) unsigned char stem_place[sizeof(StemRows<float>)];
  if (p.stem) stem_rows = new (stem_place) StemRows<float>(p.first_stem, stem_memory);

  const auto expand = [&](int64_t n, int from, int to) {  // hidden rows [from, to), neighbours in the ring
    float* first = ring + (from % plan.ring_rows) * plan.row_floats;
    StoreInference<float> store{first, places, p.hidden, p.expand_bias, true, nullptr};
    if (p.stem) {
      for (int iy = from; iy < to; ++iy, store.y += plan.row_floats) {
        stem_rows->load(n * d.height + iy);
        product(stem_rows->windows, kWindow, d.width, p.expand, kStemDepth, p.hidden, store);
      }
      return;
    }
    const int rows = (to - from) * d.width;
    const float* left = p.x + (n * d.height + from) * static_cast<int64_t>(d.width) * p.inputs;
    if (!p.expand) {
      for (int r = 0; r < rows; ++r) std::memcpy(first + places[r], left + static_cast<int64_t>(r) * p.inputs, sizeof(float) * p.inputs);
      return;
    }
    const int depth = depth_of<E>(p.inputs);
    if (kEach == 1 && rows >= kMaxTileRows) {
      product(reinterpret_cast<const E*>(left), p.inputs, rows, expand_weights, depth, p.hidden, store);
      return;
    }
    load_rows(left, Affine{}, rows, p.inputs, reinterpret_cast<Stored*>(copy), kEach * spread(depth));
    product(copy, spread(depth), rows, expand_weights, depth, p.hidden, store);
  };

  int64_t image = -1;
  int done = 0;  // hidden rows of this image up to here are or were in the ring
  for (int64_t row = begin; row < end;) {
    const int64_t n = row / d.out_height;
    const int oy = static_cast<int>(row % d.out_height);
    int64_t stop = row + plan.out_rows;
    if (stop > end) stop = end;
    if (stop > (n + 1) * d.out_height) stop = (n + 1) * d.out_height;
    const int out_rows = static_cast<int>(stop - row);
    int first = oy * d.stride - d.pad_top, last = first + (out_rows - 1) * d.stride + 3;
    if (first < 0) first = 0;
    if (last > d.height) last = d.height;
    if (n != image) {
      image = n;
      done = first;
    }
    for (int iy = done > first ? done : first; iy < last;) {
      const int room = plan.ring_rows - iy % plan.ring_rows;
      const int until = last - iy < room ? last : iy + room;
      expand(n, iy, until);
      iy = until;
    }
    done = last;
    const auto filter = [&](auto of_stride, auto at_once, int r) {
      constexpr int S = decltype(of_stride)::value, R = decltype(at_once)::value;
      const float* rows[kRowsUnder<S, R>];
      for (int i = 0; i < kRowsUnder<S, R>; ++i) {
        const int iy = (oy + r) * S - d.pad_top + i;
        rows[i] = iy < 0 || iy >= d.height ? zero_row : ring + (iy % plan.ring_rows) * plan.row_floats;
      }
      const int64_t stride = kEach * filtered_stride(p);
      depthwise_rows<S, R>(d, rows, reinterpret_cast<Stored*>(filtered) + static_cast<int64_t>(r) * d.out_width * stride, stride, Sums{});
    };
    const auto filter_all = [&](auto of_stride) {
      int r = 0;
      for (; r + kRowsAtOnce <= out_rows; r += kRowsAtOnce) filter(of_stride, std::integral_constant<int, kRowsAtOnce>{}, r);
      for (; r < out_rows; ++r) filter(of_stride, std::integral_constant<int, 1>{}, r);
    };
    if (d.stride == 1) filter_all(std::integral_constant<int, 1>{});
    else filter_all(std::integral_constant<int, 2>{});
    const int64_t at = row * d.out_width * p.outputs;
    StoreInference<float> store{p.z + at, nullptr, p.outputs, p.project_bias, false, p.residual ? p.x + at : nullptr};
    product(filtered, filtered_stride(p), out_rows * d.out_width, project_weights, depth_of<E>(p.hidden), p.outputs, store);
    row = stop;
  }
}
