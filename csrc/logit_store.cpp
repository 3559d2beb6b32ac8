#include "logit_store.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>

#include "threads.h"

namespace infopo {
namespace {

constexpr int64_t kNumbersOfReference = sizeof(float) / sizeof(uint16_t);

}  // namespace

bool LogitStore::narrow_holds(const LogitMap& map) {
  constexpr float kLargestHalf = 65504;
  return map.softcap == 0 || 2 * std::fabs(map.scale) * map.softcap <= kLargestHalf;
}

int64_t LogitStore::slots_of_row(const TileKernels& k, Dtype dtype, int64_t H) {
  const int64_t bytes = H * element_size(dtype), slots = bytes % k.packed_bytes == 0 ? bytes / k.packed_bytes : 0;
  return slots < kFewestKeptRows ? 0 : slots;
}

LogitStore LogitStore::in(const TileKernels& k, void* weight_gradient, Dtype dtype, int64_t V, int64_t H, void* beside,
                          int64_t numbers) {
  LogitStore store{.data = static_cast<char*>(weight_gradient),
                   .row_bytes = H * element_size(dtype),
                   .size = k.packed_bytes,
                   .slots = slots_of_row(k, dtype, H)};
  if (store.size == sizeof(float) || !store.slots || V == 0) return store;
  const int64_t references = kNumbersOfReference * store.groups(V);  // of a slot
  if (numbers <= references * store.slots) {
    store.slots = numbers / references;
  } else {
    store.slots_beside = (numbers - references * store.slots) / (references + V);
  }
  if (beside) {
    store.reference = static_cast<float*>(beside);
    store.beside = static_cast<uint16_t*>(beside) + references * store.all_slots();
  }
  return store;
}

int64_t LogitStore::numbers_beside(const TileKernels& k, Dtype dtype, int64_t V, int64_t H, int64_t rows) {
  if (k.packed_bytes == sizeof(float)) return 0;
  return kNumbersOfReference * ceil_div(V, kGroup) * rows + V * std::max<int64_t>(0, rows - slots_of_row(k, dtype, H));
}

void LogitStore::populate(int64_t V, int64_t threads) const {
#if defined(MADV_POPULATE_WRITE)
  const int64_t page = sysconf(_SC_PAGESIZE);
  char* const first = data - reinterpret_cast<uintptr_t>(data) % page;
  char* const last = data + V * row_bytes;
  on_threads(threads, [&](int64_t t) {
    const Range own = part(last - first, threads, t, page);
    if (own.begin < own.end) madvise(first + own.begin, own.end - own.begin, MADV_POPULATE_WRITE);
  });
#else
  (void)V, (void)threads;
#endif
}

}  // namespace infopo
