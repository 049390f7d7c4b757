// The k-th smallest of many floats, by counting: one pass counts the upper halves of their bits, a second one picks
// out those that share the half in which the k-th lies, of which few are left to select from.
//
// The highest of every group of a few floats, by rank: each is compared with all others of its group, which is many
// comparisons and no branch, for LANES groups at a time.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int HALF = 16;
constexpr int64_t BINS = 1 << HALF;

// Bits that sort as the floats do.
inline uint32_t ordered(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

inline float from_ordered(uint32_t bits) {
  bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

constexpr int LANES = 16;

// Mark the `n` highest of each group of M floats, of LANES groups or as many as there are.
template <int M>
inline void keep_highest(const float* values, int64_t groups, int n, uint8_t* keep) {
  float held[M][LANES] = {};
  int32_t rank[M][LANES] = {};
  for (int64_t g = 0; g < groups; g++)
    for (int i = 0; i < M; i++) held[i][g] = values[g * M + i];
  for (int i = 0; i < M; i++)
    for (int j = i + 1; j < M; j++)
      for (int g = 0; g < LANES; g++) {
        int32_t first = held[i][g] <= held[j][g];
        rank[j][g] += first;
        rank[i][g] += 1 - first;
      }
  for (int64_t g = 0; g < groups; g++)
    for (int i = 0; i < M; i++) keep[g * M + i] = rank[i][g] >= M - n;
}

template <int M>
void keep_highest_of_all(const float* values, int64_t groups, int n, uint8_t* keep, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; g += LANES)
    if (groups - g >= LANES)  // a number that the compiler knows
      keep_highest<M>(values + g * M, LANES, n, keep + g * M);
    else
      keep_highest<M>(values + g * M, groups - g, n, keep + g * M);
}

}  // namespace

// For groups of 4 and of 8, which the compiler unrolls.
extern "C" void select_highest(const float* values, int64_t groups, int n, int m, uint8_t* keep, int threads) {
  (m == 4 ? keep_highest_of_all<4> : keep_highest_of_all<8>)(values, groups, n, keep, threads);
}

extern "C" float select_kth(const float* values, int64_t count, int64_t k, int threads) {
  std::vector<int64_t> bins(BINS);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> own(BINS);
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; i++) own[ordered(values[i]) >> HALF]++;
#pragma omp critical
    for (int64_t b = 0; b < BINS; b++) bins[b] += own[b];
  }
  int64_t bin = 0, before = 0;
  while (before + bins[bin] < k) before += bins[bin++];
  std::vector<uint32_t> inside;
  inside.reserve(bins[bin]);
#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> own;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < count; i++) {
      uint32_t bits = ordered(values[i]);
      if (int64_t(bits >> HALF) == bin) own.push_back(bits);
    }
#pragma omp critical
    inside.insert(inside.end(), own.begin(), own.end());
  }
  auto kth = inside.begin() + (k - before - 1);
  std::nth_element(inside.begin(), kth, inside.end());
  return from_ordered(*kth);
}
