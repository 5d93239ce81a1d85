// All vector code, compiled once for each instruction set with VARIANT (its namespace) and LANES set.
#include <cstring>
#include <new>

#include "instruction_set.h"

namespace mbv2 {
namespace VARIANT {
namespace {

#include "simd.inl"
#include "product.inl"
#include "pointwise.inl"
#include "depthwise.inl"
#include "stem.inl"
#include "elementwise.inl"
#include "block.inl"

}  // namespace

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

extern const Vector code;
const Vector code = {
    TEXT(VARIANT), LANES,
    packed_size, panels, pack,
    pointwise_scratch, pointwise, pointwise_gradient,
    depthwise_scratch, depthwise, depthwise_gradient,
    stem_scratch, stem, stem_gradient,
    affine, moments, gradient_sums, output_gradient, add, pool, pool_gradient,
    block_scratch, block,
};

}  // namespace VARIANT
}  // namespace mbv2
