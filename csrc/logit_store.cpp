#include "logit_store.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "threads.h"

namespace infopo {
namespace {

// Below this many slots another pass over W costs more than the product it saves.
constexpr int64_t kFewestKeptRows = 64;

}  // namespace

LogitStore LogitStore::in(void* weight_gradient, Dtype dtype, int64_t H) {
  const int64_t row_bytes = H * element_size(dtype), size = sizeof(float);
  const int64_t slots = row_bytes % size == 0 ? row_bytes / size : 0;
  return {.data = weight_gradient, .row_bytes = row_bytes, .slots = slots >= kFewestKeptRows ? slots : 0};
}

void LogitStore::populate(int64_t V, int64_t threads) const {
#if defined(MADV_POPULATE_WRITE)
  const int64_t page = sysconf(_SC_PAGESIZE);
  char* const first = static_cast<char*>(data) - reinterpret_cast<uintptr_t>(data) % page;
  char* const last = static_cast<char*>(data) + V * row_bytes;
  on_threads(threads, [&](int64_t t) {
    const Range own = part(last - first, threads, t, page);
    if (own.begin < own.end) madvise(first + own.begin, own.end - own.begin, MADV_POPULATE_WRITE);
  });
#else
  (void)V, (void)threads;
#endif
}

}  // namespace infopo
