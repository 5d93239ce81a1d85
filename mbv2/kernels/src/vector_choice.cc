// Which instruction set's code runs: the best that was built and that this processor has.
#include <cstdlib>
#include <cstring>

#include "instruction_set.h"

namespace mbv2 {
#if defined(MBV2_X86)
namespace avx512 { extern const InstructionSet code; }
namespace avx2 { extern const InstructionSet code; }
#endif
namespace MBV2_BASE { extern const InstructionSet code; }  // what every such processor has

namespace {

const InstructionSet& choose() {
  const char* wanted = std::getenv("MBV2_ISA");  // for tests: avx512, avx2 or baseline, where the processor has it
#if defined(MBV2_X86)
  __builtin_cpu_init();
  const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw");
  const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool none = !wanted || !*wanted;
  if (has512 && (none || !std::strcmp(wanted, "avx512"))) return avx512::code;
  if (has2 && (none || std::strcmp(wanted, "baseline"))) return avx2::code;
#endif
  (void)wanted;
  return MBV2_BASE::code;
}

}  // namespace

const InstructionSet& vector_code() {
  static const InstructionSet& chosen = choose();
  return chosen;
}

}  // namespace mbv2
