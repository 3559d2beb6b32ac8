// Threads, and what each of them takes.
//
// Work is split among threads by place (of the vocabulary, then of the result), partial sums are merged in order: the
// result depends on the number of threads, never on their timing.
#pragma once

#include <ATen/Parallel.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstdint>

#include "tile_kernels.h"

namespace infopo {

// Subnormal numbers count as 0 while a kernel runs on this thread. A rejected sequence about to underflow (log-weight
// -70 to -90) fills G with them, each worth a microcode trap: 36 to 56 s for a call that takes 1.7 s without (N 256,
// H 576, V 49152, Emerald Rapids). What is lost is below 1.2e-38.
class FlushSubnormals {
 public:
#if defined(__SSE2__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }  // FTZ and DAZ
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
#else
  FlushSubnormals() {}  // other processors take them at full speed
#endif
};

template <typename F>
void on_threads(int64_t threads, const F& f) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals guard;
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

struct Range {
  int64_t begin, end;
};

// Part t of [0, n): whole multiples of `align`, as even as they allow.
inline Range part(int64_t n, int64_t threads, int64_t t, int64_t align = 1) {
  const int64_t units = ceil_div(n, align);
  return {std::min(n, units * t / threads * align), std::min(n, units * (t + 1) / threads * align)};
}

}  // namespace infopo
