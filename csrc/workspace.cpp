#include "workspace.h"

#include <algorithm>

#include "errors.h"
#include "threads.h"

namespace infopo {
namespace {

// If the distance between rows of W is a multiple of this, they share a few cache sets, and W has to be packed.
constexpr int64_t kPageBytes = 4096;

// Words of a block of a pooled tail: whole tiles, the same number for each thread. A large block has fewer waits between
// threads. If the logits of the whole vocabulary are there, it takes no memory for them, or little beside them.
int64_t tail_block(int64_t Vb, int64_t threads, const Want& want) {
  constexpr int64_t kLargest = 3072;
  const int64_t unit = kTailTile * threads;
  if (want.all_logits || want.narrow_logits) Vb = kLargest;
  return Vb >= unit ? Vb / unit * unit : Vb >= kTailTile ? Vb / kTailTile * kTailTile : Vb;
}

}  // namespace

bool reads_weight_in_place(const TileKernels& k, const Head& p) {
  return p.weight.dtype == Dtype::kFloat32 && p.H % k.lanes == 0 &&
         p.weight.stride * static_cast<int64_t>(sizeof(float)) % kPageBytes != 0;
}

Buffers::Buffers(Arena& arena, const TileKernels& k, const Head& p, const Sizes& s, const Want& want) {
  const int64_t C = round_up(s.C, k.lanes);
  ld = C + 16;  // one cache line more, so that rows of a tile do not share cache sets
  const auto panels = [&](int64_t K, int64_t N) {
    return reinterpret_cast<float*>(arena.take<char>(packed_size(k, K, N)));
  };
  columns = panels(p.H, C);
  rows = want.rows_panels ? panels(C, p.H) : nullptr;
  weight = want.weight_rows && !want.tail && !reads_weight_in_place(k, p) ? panels(s.Vb, p.H) : nullptr;
  z = want.all_logits || want.block ? arena.take<float>(round_up(want.all_logits ? p.V : s.Vb, k.block) * ld) : nullptr;
  tiles = want.own_tiles ? arena.take<float>(s.threads * k.tile * ld) : nullptr;
  store = {};
  if (want.narrow_logits) {
    store = {.size = 2, .slots_beside = C};
    store.reference = arena.take<float>(store.groups(p.V) * C);
    store.beside = arena.take<uint16_t>(p.V * C);
  }
  stage = p.weight.dtype == Dtype::kFloat32 ? nullptr : arena.take<float>(s.threads * k.tile * k.stage);
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
  tail = {};
  if (!want.tail) return;
  const int64_t rows_of_block = round_up(s.Vb, k.block), tiles_of_block = ceil_div(s.Vb, kTailTile);
  tail.share = arena.take<float>(s.Vb);
  tail.words = arena.take<int64_t>(rows_of_block);
  tail.rows = arena.take<float>(s.threads * 2 * C);
  tail.counts = arena.take<int64_t>(s.threads * 2);
  if (want.rows_panels) {
    tail.out = arena.take<float*>(s.Vb);
    tail.pools = arena.take<float>(tiles_of_block * p.H);
  }
  if (!want.weight_rows) return;
  tail.means = arena.take<float>(tiles_of_block * p.H);
  const bool in_place = k.packed_bytes == sizeof(float);
  tail.stride = in_place ? round_up(p.H, k.lanes) + k.lanes : p.H;  // rows spread over the cache sets
  tail.piece = std::min(kPiece, rows_of_block);
  tail.gathered = arena.take<char>(tail.piece * tail.stride * (in_place ? 4 : element_size(p.weight.dtype)));
  tail.panels = in_place ? nullptr : panels(tail.piece, p.H);
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
      const int64_t Vb = want.tail ? tail_block(step.Vb, threads, want) : round_up(step.Vb, k.block);
      // With a tail the tile in which logits are formed is not the block, which then need not stay in the cache.
      // Float32 sums of dW need to: 768 rows of H 576 are 1.7 MiB.
      const int64_t most = !want.tail ? k.most_block * threads : want.weight_block ? 768 * threads : p.V;
      sizes = {even_size(n, step.C, k.lanes), std::min({Vb, most, p.V}), threads};
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
