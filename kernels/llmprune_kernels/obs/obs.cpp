// The recursion over one block of columns (reference.py), all columns of some outputs at a time in the nearest cache.
//
// Two arithmetics. `paper` rounds as the column loop in torch does: divide; multiply, then subtract, each rounded (the
// build forbids fusing them). `fast` multiplies by the inverse and fuses.
//
// Matrices are [columns][outputs] with rows `stride` apart; `upper` is [columns][columns], rows `upper_stride` apart.
// Functions take a `level` as in bitmask.cpp, and never more than `llmprune_cpu_level()`.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define LLMPRUNE_X86 1
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))
#define AVX2 __attribute__((target("avx2,fma")))
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

constexpr int64_t WIDTH = 64;  // outputs at a time: 128 columns of them fill 32 KiB

struct Block {
  float* weights;        // overwritten with the pruned block
  int64_t stride;
  const float* upper;
  int64_t upper_stride;
  uint8_t* keep;         // [columns][outputs], dense; read where m is 0, else written
  float* errors;         // [columns][outputs], dense; none for fast arithmetic
  int64_t columns, outputs;
  int64_t n, m;          // keep n of every m columns; m is 0 where the mask is given
};

// Mark the n highest of m scores of each output; among equals the lowest column goes first.
INLINE void choose(const float* scores, int64_t n, int64_t m, uint8_t* keep) {
  for (int64_t a = 0; a < m; a++) {
    int32_t rank[WIDTH] = {};
    const float* own = scores + a * WIDTH;
    for (int64_t b = 0; b < m; b++) {
      const float* other = scores + b * WIDTH;
      if (b < a)
        for (int64_t o = 0; o < WIDTH; o++) rank[o] += other[o] <= own[o];
      else
        for (int64_t o = 0; o < WIDTH; o++) rank[o] += other[o] < own[o];
    }
    for (int64_t o = 0; o < WIDTH; o++) keep[a * WIDTH + o] = rank[o] >= m - n;
  }
}

template <bool paper> INLINE float score(float weight, float diagonal) {
  if (paper) return (weight * weight) / (diagonal * diagonal);
  float ratio = weight * (1 / diagonal);
  return ratio * ratio;
}

template <bool paper> INLINE float error_of(float weight, bool kept, float diagonal) {
  if (paper) return weight / (kept ? std::numeric_limits<float>::infinity() : diagonal);
  return kept ? 0.0f : weight * (1 / diagonal);
}

// Prune the columns of WIDTH outputs, which lie side by side in `tile`, from left to right.
template <bool paper> INLINE void prune_tile(const Block& block, float* tile, uint8_t* keep, float* errors) {
  std::vector<float> scores(block.m * WIDTH);
  for (int64_t column = 0; column < block.columns; column++) {
    float* weights = tile + column * WIDTH;
    const float* factors = block.upper + column * block.upper_stride;
    if (block.m && column % block.m == 0) {
      for (int64_t i = 0; i < block.m; i++) {
        float diagonal = block.upper[(column + i) * (block.upper_stride + 1)];
        for (int64_t o = 0; o < WIDTH; o++) scores[i * WIDTH + o] = score<paper>(weights[i * WIDTH + o], diagonal);
      }
      choose(scores.data(), block.n, block.m, keep + column * WIDTH);
    }
    alignas(64) float error[WIDTH];
    for (int64_t o = 0; o < WIDTH; o++) error[o] = error_of<paper>(weights[o], keep[column * WIDTH + o], factors[column]);
    for (int64_t right = column + 1; right < block.columns; right++) {
      float* charged = tile + right * WIDTH;
      float factor = factors[right];
      for (int64_t o = 0; o < WIDTH; o++)
        charged[o] = paper ? charged[o] - factor * error[o] : __builtin_fmaf(-factor, error[o], charged[o]);
    }
    for (int64_t o = 0; o < WIDTH; o++) weights[o] = keep[column * WIDTH + o] ? weights[o] : 0.0f;
    if (paper) std::memcpy(errors + column * WIDTH, error, sizeof error);
  }
}

// Copy `width` outputs of all columns between a matrix and a tile; what a narrow tile lacks is left as it is.
template <typename T> INLINE void gather(const T* from, int64_t stride, int64_t columns, int64_t width, T* tile) {
  for (int64_t c = 0; c < columns; c++) std::memcpy(tile + c * WIDTH, from + c * stride, width * sizeof(T));
}

template <typename T> INLINE void scatter(const T* tile, int64_t stride, int64_t columns, int64_t width, T* to) {
  for (int64_t c = 0; c < columns; c++) std::memcpy(to + c * stride, tile + c * WIDTH, width * sizeof(T));
}

template <bool paper> INLINE void prune_outputs(const Block& block, int64_t first) {
  int64_t width = block.outputs - first < WIDTH ? block.outputs - first : WIDTH, columns = block.columns;
  std::vector<float> tile(columns * WIDTH), errors(paper ? columns * WIDTH : 0);
  std::vector<uint8_t> keep(columns * WIDTH);
  gather(block.weights + first, block.stride, columns, width, tile.data());
  if (!block.m) gather<uint8_t>(block.keep + first, block.outputs, columns, width, keep.data());
  prune_tile<paper>(block, tile.data(), keep.data(), errors.data());
  scatter(tile.data(), block.stride, columns, width, block.weights + first);
  if (block.m) scatter(keep.data(), block.outputs, columns, width, block.keep + first);
  if (paper) scatter(errors.data(), block.outputs, columns, width, block.errors + first);
}

template <bool paper> void prune_any(const Block& block, int64_t first) { prune_outputs<paper>(block, first); }
#ifdef LLMPRUNE_X86
template <bool paper> AVX2 void prune_avx2(const Block& block, int64_t first) { prune_outputs<paper>(block, first); }
template <bool paper> AVX512 void prune_avx512(const Block& block, int64_t first) { prune_outputs<paper>(block, first); }
#endif

template <bool paper> void prune(const Block& block, int threads, int level) {
  auto tile = prune_any<paper>;
#ifdef LLMPRUNE_X86
  if (level >= 1) tile = prune_avx2<paper>;
  if (level >= 2) tile = prune_avx512<paper>;
#endif
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t first = 0; first < block.outputs; first += WIDTH) tile(block, first);
}

}  // namespace

extern "C" {

void obs_paper(float* weights, int64_t stride, const float* upper, int64_t upper_stride, uint8_t* keep, float* errors,
               int64_t columns, int64_t outputs, int64_t n, int64_t m, int threads, int level) {
  prune<true>({weights, stride, upper, upper_stride, keep, errors, columns, outputs, n, m}, threads, level);
}

void obs_fast(float* weights, int64_t stride, const float* upper, int64_t upper_stride, uint8_t* keep,
              int64_t columns, int64_t outputs, int64_t n, int64_t m, int threads, int level) {
  prune<false>({weights, stride, upper, upper_stride, keep, nullptr, columns, outputs, n, m}, threads, level);
}

}  // extern "C"
