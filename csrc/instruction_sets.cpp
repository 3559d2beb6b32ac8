// The choice of the instruction set. The machine that runs makes it, not the machine that built.
#include <torch/headeronly/util/Half.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <string>

#include "errors.h"
#include "tile_kernels.h"

namespace infopo {

float half_to_float(uint16_t bits) { return static_cast<float>(c10::Half(bits, c10::Half::from_bits())); }
uint16_t float_to_half(float x) { return c10::Half(x).x; }

namespace {

struct InstructionSet {
  const TileKernels& kernels;
  bool (*machine_has)();
  bool (*is_default)();                      // if the machine has it and it takes the type
  const TileKernels* other_types = nullptr;  // kernels for float32 and float16, if these are for bfloat16 only
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives a process the tile registers on request. The threads and children of the process have them then, too.
bool has_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
                              __builtin_cpu_supports("amx-bf16") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

// One instruction multiplies and adds pairs of bfloat16. It runs at twice the float rate on AMD (Zen 4 and later), and
// at half of it on Intel (measured on Emerald Rapids: docs/cpu.md), where widening to float is faster and more
// accurate.
bool multiplies_bf16_fast() { return __builtin_cpu_is("amd"); }
#endif

// The default is the first one that the machine has and that takes the type.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {.kernels = amx::kKernels, .machine_has = has_amx, .is_default = always, .other_types = &avx512::kKernels},
    {.kernels = avx512_bf16::kKernels,
     .machine_has = has_avx512_bf16,
     .is_default = multiplies_bf16_fast,
     .other_types = &avx512::kKernels},
    {.kernels = avx512::kKernels, .machine_has = has_avx512, .is_default = always},
    {.kernels = avx2::kKernels, .machine_has = has_avx2, .is_default = always},
#endif
    {.kernels = portable::kKernels, .machine_has = always, .is_default = always},
};

const TileKernels& named(const std::string& name, bool bf16) {
  std::string known;
  for (const InstructionSet& set : kInstructionSets) {
    known += (known.empty() ? "" : ", ") + std::string(set.kernels.name);
    if (name != set.kernels.name) continue;
    if (!set.machine_has()) {
      value_error("INFOPO_KERNELS_CPU_ISA=", name,
                  " asks for an instruction set that this machine lacks; unset it to let the machine decide.");
    }
    return set.other_types && !bf16 ? *set.other_types : set.kernels;
  }
  value_error("INFOPO_KERNELS_CPU_ISA=", name, " is not one of ", known,
              ", which this build has; unset it to let the machine decide.");
}

}  // namespace

const TileKernels& select_kernels(Dtype dtype) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const bool bf16 = dtype == Dtype::kBFloat16;
  const char* forced = std::getenv("INFOPO_KERNELS_CPU_ISA");
  if (forced && *forced) return named(forced, bf16);
  for (const InstructionSet& set : kInstructionSets) {
    if ((bf16 || !set.other_types) && set.machine_has() && set.is_default()) return set.kernels;
  }
  return portable::kKernels;
}

}  // namespace infopo
