// Which instruction set serves: chosen on the machine that runs, not on the one that built.
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <string>

#include "errors.h"
#include "tile_kernels.h"

namespace infopo {

float half_to_float(uint16_t bits) { return static_cast<float>(c10::Half(bits, c10::Half::from_bits())); }
uint16_t float_to_half(float x) { return c10::Half(x).x; }

namespace {

bool machine_has(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  if (isa == "avx512_bf16") return machine_has("avx512") && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == "portable";
}

// Pairs of bfloat16 multiplied and added in one instruction: twice the float rate on AMD (Zen 4 and later), half of it on
// Intel (measured on Emerald Rapids: docs/cpu.md), where widening to float is faster and more accurate.
bool multiplies_bf16_fast() {
#if defined(__x86_64__)
  return machine_has("avx512_bf16") && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

const TileKernels* built_kernels(const std::string& isa) {
  if (isa == "avx512_bf16") return avx512_bf16_kernels();
  if (isa == "avx512") return avx512_kernels();
  if (isa == "avx2") return avx2_kernels();
  return isa == "portable" ? portable_kernels() : nullptr;
}

}  // namespace

const TileKernels& select_kernels(Dtype dtype) {
  const bool bf16 = dtype == Dtype::kBFloat16;
  const char* forced = std::getenv("INFOPO_KERNELS_CPU_ISA");
  if (forced && *forced) {
    const TileKernels* kernels = built_kernels(forced);
    if (!kernels || !machine_has(forced)) {
      value_error("INFOPO_KERNELS_CPU_ISA=", forced,
                  kernels ? " asks for an instruction set that this machine lacks"
                          : " is not one of avx512_bf16, avx512, avx2, portable (as far as this build has them)",
                  "; unset it to let the machine decide.");
    }
    return kernels == avx512_bf16_kernels() && !bf16 ? *avx512_kernels() : *kernels;
  }
  if (bf16 && avx512_bf16_kernels() && multiplies_bf16_fast()) return *avx512_bf16_kernels();
  for (const char* isa : {"avx512", "avx2"}) {
    if (built_kernels(isa) && machine_has(isa)) return *built_kernels(isa);
  }
  return *portable_kernels();
}

}  // namespace infopo
