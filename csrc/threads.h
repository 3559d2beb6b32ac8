// torch's threads, as bindings.cpp hands them over: the kernels share its pool, and obey torch.set_num_threads.
#pragma once

#include <cstdint>

namespace infopo {

int64_t num_threads();

// Calls `part(begin, end, context)` on parts of [0, n) that cover it, in parallel.
void run_parts(int64_t n, void (*part)(int64_t begin, int64_t end, void* context), void* context);

// Calls f(begin, end) likewise.
template <typename F>
void parallel_for(int64_t n, const F& f) {
  run_parts(
      n, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace infopo
