// Logits in the memory of a weight gradient that nothing has been added to: until that is written it keeps them, float
// z[v][slot] in the bytes of its row v, a slot for each row that was scored when they were kept.
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

  // Map the memory of V rows in one go. It is about to be written for the first time, and page faults in the midst of
  // products cost more than the pages: 2.7 s instead of 2.0 for `backward` of 512 rows with a float32 dW of 1 GiB
  // (2 cores of Emerald Rapids, virtual machine). Systems without the call fault as usual.
  void populate(int64_t V, int64_t threads) const;
};

}  // namespace infopo
