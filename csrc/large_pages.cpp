#include "large_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace infopo {

void prefer_large_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const int64_t start = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)),
                first = (start + kLargePage - 1) / kLargePage * kLargePage,
                last = (start + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(static_cast<char*>(data) + (first - start), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace infopo
