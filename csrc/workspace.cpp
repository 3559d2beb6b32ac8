#include "workspace.h"

#include <algorithm>

#include "errors.h"
#include "threads.h"

namespace infopo {
namespace {

// If the distance between rows of W is a multiple of this, they share a few cache sets, and W has to be packed.
constexpr int64_t kPageBytes = 4096;

// Whether dX can read W in place: W is float32, H is a whole number of vectors, and the rows are spread over the cache
// (2 cores of Emerald Rapids, 128 rows, H 576: 164 GFLOP/s a core, 130 if W is packed).
bool reads_weight_in_place(const TileKernels& k, const Head& p) {
  return p.weight.dtype == Dtype::kFloat32 && p.H % k.lanes == 0 &&
         p.weight.stride * static_cast<int64_t>(sizeof(float)) % kPageBytes != 0;
}

}  // namespace

Buffers::Buffers(Arena& arena, const TileKernels& k, const Head& p, const Sizes& s, const Want& want) {
  const int64_t C = round_up(s.C, k.lanes);
  ld = C + k.lanes;  // not a power of two, so that rows of a tile do not share cache sets
  const auto panels = [&](int64_t K, int64_t N) { return reinterpret_cast<float*>(arena.take<char>(packed_size(k, K, N))); };
  columns = panels(p.H, C);
  rows = want.rows_panels ? panels(C, p.H) : nullptr;
  weight = want.weight_rows && !reads_weight_in_place(k, p) ? panels(s.Vb, p.H) : nullptr;
  z = want.all_logits || want.block ? arena.take<float>(round_up(want.all_logits ? p.V : s.Vb, k.block) * ld) : nullptr;
  tiles = want.own_tiles ? arena.take<float>(s.threads * kTile * ld) : nullptr;
  stage = p.weight.dtype == Dtype::kFloat32 ? nullptr : arena.take<float>(s.threads * kTile * k.depth);
  scratch = arena.take<float>(s.threads * 2 * C);
  max = want.reduce ? arena.take<float>(s.threads * C) : nullptr;
  sum = want.reduce ? arena.take<double>(s.threads * C) : nullptr;
  const int64_t hidden_rows = std::max(want.all_hidden_rows, want.hidden_rows ? s.C : 0);
  hidden = hidden_rows ? arena.take<float>(hidden_rows * p.H) : nullptr;
  weight_sum = want.weight_block ? arena.take<float>(s.Vb * p.H) : nullptr;
  total = arena.take<double>(C);
  lse = arena.take<float>(C);
  coefficient = arena.take<float>(C);
  target = arena.take<float>(C);
  labels = arena.take<int64_t>(C);
}

int64_t bytes_of(const TileKernels& k, const Head& p, const Sizes& s, const Want& want) {
  Arena counter;
  Buffers(counter, k, p, s, want);
  return counter.used();
}

int64_t even_size(int64_t n, int64_t most, int64_t lanes) {
  return std::min(most, round_up(ceil_div(n, ceil_div(n, std::min(n, most))), lanes));
}

// Tries a list of sizes in which C and Vb shrink together.
bool find_sizes(const TileKernels& k, const Head& p, int64_t n, const Want& want, Sizes& sizes) {
  constexpr Sizes kLadder[] = {
      {kMostRows, 3072, 0}, {kMostRows, 2048, 0}, {kMostRows, 1024, 0}, {256, 1024, 0}, {256, 512, 0},
      {128, 512, 0},        {128, 256, 0},        {64, 256, 0},         {48, 192, 0},   {32, 96, 0},
      {16, 96, 0},          {16, 48, 0},          {16, 16, 0},          {1, 16, 0}};
  for (int64_t threads = num_threads(); threads >= 1; threads /= 2) {
    for (const Sizes& step : kLadder) {
      sizes = {even_size(n, step.C, k.lanes), std::min(round_up(step.Vb, k.block), p.V), threads};
      if (bytes_of(k, p, sizes, want) <= p.workspace_bytes) return true;
    }
  }
  return false;
}

Sizes require_sizes(const TileKernels& k, const Head& p, int64_t n, const Want& want) {
  Sizes sizes{};
  if (!find_sizes(k, p, n, want, sizes)) {
    value_error("`workspace_mib` is too small for hidden size ", p.H, ": one row at a time needs ",
                bytes_of(k, p, sizes, want), " bytes, got ", p.workspace_bytes, "; raise it.");
  }
  return sizes;
}

}  // namespace infopo
