// Threads, and the share of each thread.
//
// Each thread has a fixed part of the vocabulary or of the result, and partial sums are merged in order. So the result
// depends on the number of threads, never on their timing.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstdint>

#include "tile_kernels.h"

namespace infopo {

// Subnormal numbers count as 0 while a kernel runs on this thread. A rejected sequence whose weight is about to
// underflow (log-weight -70 to -90) fills G with subnormals, and each causes a microcode trap: a call takes 36 to 56 s
// instead of 1.7 s (N 256, H 576, V 49152, Emerald Rapids). The lost values are below 1.2e-38.
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
  FlushSubnormals() {}  // other processors handle subnormals at full speed
#endif
};

// torch's threads, as bindings.cpp hands them over: the kernels share its pool and obey torch.set_num_threads.
int64_t num_threads();

// Calls body(begin, end, context) on parts that cover [0, n), in parallel.
void parallel_parts(int64_t n, void (*body)(int64_t begin, int64_t end, void* context), void* context);

template <typename F>
void on_threads(int64_t threads, const F& f) {
  const auto body = [](int64_t begin, int64_t end, void* context) {
    const FlushSubnormals guard;
    for (int64_t t = begin; t < end; ++t) (*static_cast<const F*>(context))(t);
  };
  parallel_parts(threads, body, const_cast<void*>(static_cast<const void*>(&f)));
}

struct Range {
  int64_t begin, end;
};

// Part t of [0, n). Parts are whole multiples of `align` and as equal as possible.
inline Range part(int64_t n, int64_t threads, int64_t t, int64_t align = 1) {
  const int64_t units = ceil_div(n, align);
  return {std::min(n, units * t / threads * align), std::min(n, units * (t + 1) / threads * align)};
}

}  // namespace infopo
