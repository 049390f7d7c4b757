// Products xT y of matrices of bfloat16 with fp32 sums: the multiplication that AVX-512 has an instruction for.
//
// x and y are [tokens][inputs]. Both are packed, KEPT tokens at a time, into panels of WIDTH inputs in which two tokens
// of an input lie side by side, as the instruction wants them. A part of the result of WIDTH x WIDTH then takes one
// panel of each. The sums of KEPT tokens are made in registers, in the order of the tokens.
//
// Only for `llmprune_cpu_level()` 2; elsewhere torch's products are as good.

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__)
#define LLMPRUNE_X86 1
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")))
#endif

#ifdef LLMPRUNE_X86
namespace {

constexpr int64_t WIDTH = 64;        // inputs of a panel: 4 registers of sums
constexpr int64_t PAIRS = 512;       // of tokens that a panel holds: 128 KiB
constexpr int64_t KEPT = 2 * PAIRS;
constexpr int ROWS = 4;              // rows of the result at a time: 16 registers of sums
constexpr int LANES = 16;

struct Matrix {
  const uint16_t* elements;
  int64_t stride;  // between tokens
};

// Pack `width` inputs from `first` on; a token or an input that is not there counts as zeros.
AVX512 void pack(Matrix x, int64_t start, int64_t tokens, int64_t first, int64_t width, uint32_t* panel) {
  const uint16_t none[WIDTH] = {};
  for (int64_t token = 0; token < tokens; token += 2, panel += WIDTH) {
    const uint16_t* low = x.elements + (start + token) * x.stride + first;
    const uint16_t* high = token + 1 < tokens ? low + x.stride : none;
    for (int64_t i = 0; i < width; i++) panel[i] = low[i] | uint32_t(high[i]) << 16;
    for (int64_t i = width; i < WIDTH; i++) panel[i] = 0;
  }
}

// Add a panel of x (whose inputs are rows of the result) times one of y to `before` times WIDTH x WIDTH of the result.
AVX512 void multiply(const uint32_t* x, const uint32_t* y, int64_t pairs, float scale, float before, float* out,
                     int64_t stride, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; row += ROWS) {
    __m512 sums[ROWS][WIDTH / LANES];
    for (auto& line : sums)
      for (auto& sum : line) sum = _mm512_setzero_ps();
    for (int64_t pair = 0; pair < pairs; pair++) {
      __m512i right[WIDTH / LANES];
      for (int64_t j = 0; j < WIDTH / LANES; j++) right[j] = _mm512_loadu_si512(y + pair * WIDTH + j * LANES);
      for (int i = 0; i < ROWS; i++) {
        __m512i left = _mm512_set1_epi32(int(x[pair * WIDTH + row + i]));
        for (int64_t j = 0; j < WIDTH / LANES; j++)
          sums[i][j] = _mm512_dpbf16_ps(sums[i][j], (__m512bh)left, (__m512bh)right[j]);
      }
    }
    for (int64_t i = 0; i < ROWS && row + i < rows; i++)
      for (int64_t j = 0; j < WIDTH / LANES && j * LANES < columns; j++) {
        __mmask16 inside = columns - j * LANES < LANES ? __mmask16((1u << (columns - j * LANES)) - 1) : __mmask16(-1);
        float* to = out + (row + i) * stride + j * LANES;
        __m512 old = _mm512_mul_ps(_mm512_maskz_loadu_ps(inside, to), _mm512_set1_ps(before));
        __m512 sum = _mm512_fmadd_ps(sums[i][j], _mm512_set1_ps(scale), old);
        _mm512_mask_storeu_ps(to, inside, sum);
      }
  }
}

int64_t panels(int64_t inputs) { return (inputs + WIDTH - 1) / WIDTH; }
int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Make the result [inputs][inputs] `before` times what it was plus `scale` x xT y. With a `tile`, a multiple of WIDTH,
// what lies right of the diagonal's squares of that size is left out.
void add_product(Matrix x, Matrix y, int64_t tokens, int64_t inputs, float scale, float before, float* out, int64_t tile,
                 uint32_t* packed, int threads) {
  int64_t across = panels(inputs), size = PAIRS * WIDTH;
  bool same = x.elements == y.elements;
  uint32_t *left = packed, *right = same ? left : left + across * size;
  for (int64_t start = 0; start < tokens; start += KEPT) {
    int64_t count = least(KEPT, tokens - start);
    float kept = start ? 1.0f : before;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t p = 0; p < across; p++) {
        pack(x, start, count, p * WIDTH, least(WIDTH, inputs - p * WIDTH), left + p * size);
        if (!same) pack(y, start, count, p * WIDTH, least(WIDTH, inputs - p * WIDTH), right + p * size);
      }
#pragma omp for schedule(dynamic)
      for (int64_t down = across - 1; down >= 0; down--) {  // the longest rows first
        int64_t end = tile ? least(across, (down * WIDTH / tile + 1) * tile / WIDTH) : across;
        for (int64_t p = 0; p < end; p++)
          multiply(left + down * size, right + p * size, (count + 1) / 2, scale, kept,
                   out + (down * inputs + p) * WIDTH, inputs, least(WIDTH, inputs - down * WIDTH), least(WIDTH, inputs - p * WIDTH));
      }
    }
  }
}

}  // namespace
#endif

extern "C" {

// 32-bit words that the packed panels of a matrix take. The caller provides them, as running out of memory is hers to
// tell: for x, and for y where that is another matrix.
int64_t gram_words(int64_t inputs) {
#ifdef LLMPRUNE_X86
  return panels(inputs) * PAIRS * WIDTH;
#else
  return 0;
#endif
}

void gram_bf16(const uint16_t* x, int64_t x_stride, const uint16_t* y, int64_t y_stride, int64_t tokens, int64_t inputs,
               float scale, float before, float* out, int64_t tile, uint32_t* packed, int threads) {
#ifdef LLMPRUNE_X86
  add_product({x, x_stride}, {y, y_stride}, tokens, inputs, scale, before, out, tile, packed, threads);
#endif
}

}  // extern "C"
