// Logits in the memory of a weight gradient to which nothing has been added. The memory keeps them until the gradient
// is written: row v of the gradient holds float z[v][slot], with a slot for each row that was scored when they were
// kept.
#pragma once

#include <cstdint>

#include "tile_kernels.h"

namespace infopo {

struct LogitStore {
  void* data = nullptr;  // [V, H] contiguous; null for none
  int64_t row_bytes = 0;
  int64_t slots = 0;

  static LogitStore in(void* weight_gradient, Dtype dtype, int64_t H);

  float* row(int64_t v) const { return reinterpret_cast<float*>(static_cast<char*>(data) + v * row_bytes); }

  // Maps the memory of V rows at once. It is about to be written for the first time, and page faults during products
  // take longer: 2.7 s instead of 2.0 for `backward` of 512 rows with a float32 dW of 1 GiB (2 cores of Emerald Rapids,
  // virtual machine). On systems without this call the page faults come as usual.
  void populate(int64_t V, int64_t threads) const;
};

}  // namespace infopo
