// All vector code, compiled once for each instruction set with VARIANT (its namespace) and LANES set.
#include <cstring>
#include <new>
#include <type_traits>
#if LANES > 4
#include <immintrin.h>
#endif

#include "instruction_set.h"

namespace mbv2 {
namespace VARIANT {
namespace {

#include "simd.inl"
#include "product.inl"
#include "pointwise.inl"
#if defined(__AVX512BF16__)
#include "pairs.inl"
#endif
#include "depthwise.inl"
#include "stem.inl"
#include "elementwise.inl"
#include "update.inl"
#include "block.inl"

}  // namespace

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

// By name, as most of the functions have types in common.
int64_t pointwise_scratch(int inputs, int outputs) {
  const int64_t floats = pointwise_floats<float>(inputs, outputs), stored = pointwise_floats<Element<bfloat16, bfloat16>>(inputs, outputs);
  return floats > stored ? floats : stored;
}

constexpr InstructionSet table() {
  InstructionSet set{};
  set.name = TEXT(VARIANT);
  set.lanes = LANES;
  set.packed_size = packed_size;
  set.panels = panels;
  set.pack = pack;
#if defined(__AVX512BF16__)
  set.pack_bfloat16 = pack_pairs;
#else
  set.pack_bfloat16 = pack;
#endif
  set.pointwise_scratch = pointwise_scratch;
  set.pointwise = {{pointwise}, {pointwise}, {pointwise}};
  set.pointwise_gradient = {{pointwise_gradient}, {pointwise_gradient}, {pointwise_gradient}};
  set.depthwise_scratch = depthwise_scratch;
  set.depthwise = {{depthwise}, {depthwise}};
  set.depthwise_gradient = {{depthwise_gradient}, {depthwise_gradient}};
  set.stem_scratch = stem_scratch;
  set.stem = {{stem}, {stem}};
  set.stem_gradient = {{stem_gradient}, {stem_gradient}};
  set.affine = {{affine}, {affine}};
  set.moments = moments;
  set.gradient_sums = {{gradient_sums}, {gradient_sums}};
  set.output_gradient = output_gradient;
  set.add = add;
  set.update = update;
  set.pool = {{pool}, {pool}};
  set.pool_gradient = {{pool_gradient}, {pool_gradient}};
  set.block_scratch = {{block_scratch}, {block_scratch}};
  set.block = {{block}, {block}};
  return set;
}

extern const InstructionSet code;
const InstructionSet code = table();

}  // namespace VARIANT
}  // namespace mbv2
