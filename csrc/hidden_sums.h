// Where float32 rows of dX add up: the result itself if it is float32, else rows of the workspace.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "chunk.h"
#include "threads.h"

namespace infopo {

class HiddenSums {
 public:
  HiddenSums(const Chunk& chunk, void* result) : chunk_(chunk), result_(result) {}

  // Pointers for the chunk's rows; `first` is the chunk's place among the accumulator's rows.
  float* const* rows(int64_t first) {
    const int64_t H = chunk_.p.H;
    pointers_.resize(chunk_.live);
    for (int64_t c = 0; c < chunk_.live; ++c) {
      pointers_[c] = direct() ? static_cast<float*>(result_) + chunk_.rows[c] * H : chunk_.b.hidden + (first + c) * H;
    }
    return pointers_.data();
  }

  void clear(int64_t first) {
    float* const* row = rows(first);
    for_rows([&](int64_t c) { std::memset(row[c], 0, chunk_.p.H * sizeof(float)); });
  }

  void round_into_result(int64_t first) {
    if (direct()) return;
    const Dtype dtype = chunk_.p.hidden.dtype;
    const int64_t H = chunk_.p.H;
    float* const* row = rows(first);
    for_rows(
        [&](int64_t c) { chunk_.k.store_row(row[c], H, false, dtype, result_row(result_, dtype, chunk_.rows[c], H)); });
  }

  // f(c) for each row of the chunk, in parallel
  template <typename F>
  void for_rows(const F& f) const {
    on_threads(chunk_.sizes.threads, [&](int64_t t) {
      const Range own = part(chunk_.live, chunk_.sizes.threads, t);
      for (int64_t c = own.begin; c < own.end; ++c) f(c);
    });
  }

 private:
  bool direct() const { return chunk_.p.hidden.dtype == Dtype::kFloat32; }

  const Chunk& chunk_;
  void* result_;
  std::vector<float*> pointers_;
};

}  // namespace infopo
