// Which instruction set's code runs: the best that was built and that this processor has.
#include <cstdlib>
#include <cstring>
#if defined(MBV2_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "instruction_set.h"

namespace mbv2 {
#if defined(MBV2_X86)
#if defined(MBV2_AMX)
namespace amx { extern const InstructionSet code; }
#endif
namespace avx512bf16 { extern const InstructionSet code; }
namespace avx512 { extern const InstructionSet code; }
namespace avx2 { extern const InstructionSet code; }
#endif
namespace MBV2_BASE { extern const InstructionSet code; }  // what every such processor has

namespace {

#if defined(MBV2_AMX)
// Whether the processor multiplies tiles of bfloat16 and the system lets this process keep them.
bool may_use_tiles() {
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
}
#endif

const InstructionSet& choose() {
  const char* wanted = std::getenv("MBV2_ISA");  // for tests: a name of those below, where the processor has it
#if defined(MBV2_X86)
  __builtin_cpu_init();
  const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw");
  const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has16 = has512 && __builtin_cpu_supports("avx512bf16");
  const auto fits = [&](const char* name) { return !wanted || !*wanted || !std::strcmp(wanted, name); };
#if defined(MBV2_AMX)
  if (has16 && fits("amx") && may_use_tiles()) return amx::code;
#endif
  // Intel's processors take vdpbf16ps at half the rate of a multiplication and addition of floats: nothing is gained.
  if (has16 && fits("avx512bf16") && (__builtin_cpu_is("amd") || (wanted && *wanted))) return avx512bf16::code;
  if (has512 && fits("avx512")) return avx512::code;
  if (has2 && fits("avx2")) return avx2::code;
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
