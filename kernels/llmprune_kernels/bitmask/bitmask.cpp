// Matrices stored as a bitmask and the values it marks: expand them, multiply by them.
//
// Two layouts, both described in layout.py: rows (the one on disk) and tiles of 8 rows x 32 columns (the fast one).
// Functions take a `level`: 2 AVX-512 with VBMI2 and BF16, 1 AVX2 with FMA and F16C, 0 any CPU. The caller must not ask
// for more than `llmprune_cpu_level()`. No function allocates Python objects or knows torch.

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#define LLMPRUNE_X86 1
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,avx512bf16,avx2,fma,f16c,popcnt")))
#define AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))
#endif

namespace {

constexpr int ROWS = 8;       // of a tile
constexpr int COLUMNS = 32;   // of a tile
constexpr int PANEL = 32;     // tiles whose weights are expanded before many tokens are multiplied by them
constexpr int AT_ONCE = 3;    // tokens that share one pass over the registers
constexpr int TOKENS = 96;    // tokens whose sums are kept at a time
constexpr int LANES = 16;     // floats that a sum is spread over
constexpr int64_t COUNTED = 1 << 14;  // elements counted in one of their own size, which vectors hold the most of
constexpr int64_t AHEAD = 4096;  // bytes of values that are asked for before they are needed

enum Type { F32 = 0, BF16 = 1, F16 = 2 };

struct Tiles {
  const uint32_t* masks;    // [tile rows][tile columns][ROWS]
  const void* values;       // per tile row one stream: tile by tile, row by row
  const int64_t* offsets;   // [tile rows + 1], in values
  int64_t outputs, inputs;

  int64_t across() const { return (inputs + COLUMNS - 1) / COLUMNS; }
  int64_t down() const { return (outputs + ROWS - 1) / ROWS; }
  const uint32_t* masks_of(int64_t row) const { return masks + row * across() * ROWS; }
  int64_t height(int64_t row) const { return outputs - row * ROWS < ROWS ? outputs - row * ROWS : ROWS; }
  int64_t width(int64_t column) const {
    return inputs - column * COLUMNS < COLUMNS ? inputs - column * COLUMNS : COLUMNS;
  }
};

// ---- any CPU -------------------------------------------------------------------------------------------------------

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float from_half(uint16_t half) {
  uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  float tiny = float(fraction) * 0x1p-24f;
  return sign ? -tiny : tiny;
}

template <Type type> struct Stored { using T = uint16_t; };
template <> struct Stored<F32> { using T = float; };

template <Type type> float widen(typename Stored<type>::T value) {
  if constexpr (type == F32) return value;
  else if constexpr (type == BF16) return from_bits(uint32_t(value) << 16);
  else return from_half(value);
}

// Write the values that `mask` marks to their places among `count` elements, zeros elsewhere; return the next value.
template <typename T> const T* scatter(uint64_t mask, const T* values, T* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) out[i] = mask >> i & 1 ? *values++ : T(0);
  return values;
}

template <Type type>
const void* widen_panel_any(const uint32_t* masks, const void* stream, int64_t tiles, float* out) {
  auto values = static_cast<const typename Stored<type>::T*>(stream);
  std::memset(out, 0, sizeof(float) * ROWS * PANEL * COLUMNS);
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int row = 0; row < ROWS; row++)
      for (uint32_t mask = masks[tile * ROWS + row]; mask; mask &= mask - 1)
        out[(row * PANEL + tile) * COLUMNS + __builtin_ctz(mask)] = widen<type>(*values++);
  return values;
}

// sums[row][token] += panel[row] . x[token], spread over LANES. The body is compiled for each level, with the vectors
// and the number of rows at a time that its registers hold.
#define VECTOR(bytes) float __attribute__((vector_size(bytes), aligned(4), may_alias))

#define MULTIPLY_BODY(bytes, LINES)                                                                       \
  {                                                                                                       \
    typedef VECTOR(bytes) Vector;                                                                         \
    constexpr int WIDTH = bytes / 4, PARTS = LANES / WIDTH;                                               \
    for (int row = 0; row < ROWS; row += LINES)                                                           \
      for (int64_t token = 0; token < tokens; token++) {                                                  \
        Vector now[LINES][PARTS];                                                                         \
        for (int line = 0; line < LINES; line++)                                                          \
          for (int part = 0; part < PARTS; part++)                                                        \
            now[line][part] = *(const Vector*)(sums + ((row + line) * TOKENS + token) * LANES + part * WIDTH); \
        for (int64_t column = 0; column < tiles * COLUMNS; column += LANES)                               \
          _Pragma("GCC unroll 4") for (int part = 0; part < PARTS; part++) {                              \
            Vector x_now = *(const Vector*)(x + token * x_stride + column + part * WIDTH);                \
            const float* weights = panel + row * PANEL * COLUMNS + column + part * WIDTH;                 \
            _Pragma("GCC unroll 8") for (int line = 0; line < LINES; line++)                              \
              now[line][part] += *(const Vector*)(weights + line * PANEL * COLUMNS) * x_now;              \
          }                                                                                               \
        for (int line = 0; line < LINES; line++)                                                          \
          for (int part = 0; part < PARTS; part++)                                                        \
            *(Vector*)(sums + ((row + line) * TOKENS + token) * LANES + part * WIDTH) = now[line][part];  \
      }                                                                                                   \
  }

void multiply_any(const float* panel, int64_t tiles, const float* x, int64_t x_stride, int64_t tokens, float* sums)
MULTIPLY_BODY(16, 2)

// ---- x86 -----------------------------------------------------------------------------------------------------------

#ifdef LLMPRUNE_X86

// For each mask of 8 bits: which of the next values goes to which place, as byte indices of pshufb and as lane indices
// of vpermd; an index with its highest bit set means zero.
struct Places {
  alignas(64) uint8_t bytes[256][16];
  alignas(64) int32_t lanes[256][8];
  Places() {
    for (int mask = 0; mask < 256; mask++)
      for (int i = 0, next = 0; i < 8; i++) {
        bool marked = mask >> i & 1;
        bytes[mask][2 * i] = marked ? 2 * next : 0x80;
        bytes[mask][2 * i + 1] = marked ? 2 * next + 1 : 0x80;
        lanes[mask][i] = marked ? next++ : -1;
      }
  }
};
const Places places;

// The barrier keeps load and expansion two instructions: fused, they decode slowly.
AVX512 inline __m512i load_apart(const void* from) {
  __m512i loaded = _mm512_loadu_si512(from);
  asm volatile("" : "+v"(loaded));
  return loaded;
}

template <typename T> AVX2 inline void ask_ahead(const T* values) {
  for (int line = 0; line < 2 * int(sizeof(T)); line++) _mm_prefetch((const char*)values + AHEAD + 64 * line, _MM_HINT_T0);
}

AVX2 inline __m256 widen_bf16(__m128i values) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}

// The next weights of a row of a tile, 8 of them, as `mask` spreads them.
template <Type type> AVX2 inline __m256 spread_avx2(uint32_t mask, const typename Stored<type>::T* values) {
  if constexpr (type == F32) {
    __m256i lanes = _mm256_load_si256((const __m256i*)places.lanes[mask]);
    __m256 moved = _mm256_permutevar8x32_ps(_mm256_loadu_ps(values), lanes);
    return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(lanes, 31)), moved);
  } else {
    __m128i bytes = _mm_load_si128((const __m128i*)places.bytes[mask]);
    __m128i moved = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)values), bytes);
    if constexpr (type == BF16) return widen_bf16(moved);
    else return _mm256_cvtph_ps(moved);
  }
}

template <Type type>
AVX2 const void* widen_panel_avx2(const uint32_t* masks, const void* stream, int64_t tiles, float* out) {
  auto values = static_cast<const typename Stored<type>::T*>(stream);
  for (int64_t tile = 0; tile < tiles; tile++) {
    ask_ahead(values);
    for (int row = 0; row < ROWS; row++)
      for (int part = 0; part < 4; part++) {
        uint32_t mask = masks[tile * ROWS + row] >> (8 * part) & 255;
        _mm256_storeu_ps(out + (row * PANEL + tile) * COLUMNS + 8 * part, spread_avx2<type>(mask, values));
        values += _mm_popcnt_u32(mask);
      }
  }
  return values;
}

template <Type type>
AVX2 void one_token_avx2(const uint32_t* masks, const void* stream, int64_t across, const float* x, float* sums) {
  auto values = static_cast<const typename Stored<type>::T*>(stream);
  __m256 now[ROWS];
  for (auto& sum : now) sum = _mm256_setzero_ps();
  for (int64_t tile = 0; tile < across; tile++, masks += ROWS, x += COLUMNS) {
    ask_ahead(values);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        uint32_t mask = masks[row] >> (8 * part) & 255;
        now[row] = _mm256_fmadd_ps(spread_avx2<type>(mask, values), _mm256_loadu_ps(x + 8 * part), now[row]);
        values += _mm_popcnt_u32(mask);
      }
  }
  for (int row = 0; row < ROWS; row++) _mm256_storeu_ps(sums + row * LANES, now[row]);
}

AVX2 void multiply_avx2(
    const float* panel, int64_t tiles, const float* x, int64_t x_stride, int64_t tokens, float* sums)
MULTIPLY_BODY(32, 4)

template <Type type>
AVX512 inline void spread_avx512(uint32_t mask, const typename Stored<type>::T* values, __m512& low, __m512& high) {
  if constexpr (type == F32) {
    low = _mm512_maskz_expand_ps(__mmask16(mask), _mm512_loadu_ps(values));
    high = _mm512_maskz_expand_ps(__mmask16(mask >> 16), _mm512_loadu_ps(values + _mm_popcnt_u32(mask & 0xffff)));
  } else {
    __m512i spread = _mm512_maskz_expand_epi16(mask, load_apart(values));
    low = _mm512_cvtph_ps(_mm512_castsi512_si256(spread));
    high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(spread, 1));
  }
}

template <Type type>
AVX512 const void* widen_panel_avx512(const uint32_t* masks, const void* stream, int64_t tiles, float* out) {
  auto values = static_cast<const typename Stored<type>::T*>(stream);
  for (int64_t tile = 0; tile < tiles; tile++) {
    ask_ahead(values);
    for (int row = 0; row < ROWS; row++) {
      __m512 low, high;
      spread_avx512<type>(masks[tile * ROWS + row], values, low, high);
      _mm512_storeu_ps(out + (row * PANEL + tile) * COLUMNS, low);
      _mm512_storeu_ps(out + (row * PANEL + tile) * COLUMNS + 16, high);
      values += _mm_popcnt_u32(masks[tile * ROWS + row]);
    }
  }
  return values;
}

template <Type type>
AVX512 void one_token_avx512(const uint32_t* masks, const void* stream, int64_t across, const float* x, float* sums) {
  auto values = static_cast<const typename Stored<type>::T*>(stream);
  __m512 now[ROWS];
  for (auto& sum : now) sum = _mm512_setzero_ps();
  for (int64_t tile = 0; tile < across; tile++, masks += ROWS, x += COLUMNS) {
    ask_ahead(values);
    __m512 x_low = _mm512_loadu_ps(x), x_high = _mm512_loadu_ps(x + 16);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
      __m512 low, high;
      spread_avx512<type>(masks[row], values, low, high);
      now[row] = _mm512_fmadd_ps(high, x_high, _mm512_fmadd_ps(low, x_low, now[row]));
      values += _mm_popcnt_u32(masks[row]);
    }
  }
  for (int row = 0; row < ROWS; row++) _mm512_storeu_ps(sums + row * LANES, now[row]);
}

AVX512 void multiply_avx512(
    const float* panel, int64_t tiles, const float* x, int64_t x_stride, int64_t tokens, float* sums)
MULTIPLY_BODY(64, 8)

// bfloat16 on AVX-512 multiplies pairs without widening them (vdpbf16ps), so it has kernels of its own.
AVX512 inline int64_t marked(const uint32_t* masks, int from, int to) {
  int64_t count = 0;
  for (int line = from; line < to; line++) count += _mm_popcnt_u32(masks[line]);
  return count;
}

// LINES rows of a tile row, from `first` on, times few tokens, everything in registers. Values of other rows are skipped.
template <int LINES, int TOKENS_NOW>
AVX512 void few_tokens(const uint32_t* masks, const uint16_t* values, int64_t across, int first, const uint16_t* x,
                       int64_t x_stride, float* y, int64_t y_stride, int64_t height) {
  __m512 sums[LINES][TOKENS_NOW];
  for (auto& line : sums) for (auto& sum : line) sum = _mm512_setzero_ps();
  for (int64_t tile = 0; tile < across; tile++, masks += ROWS) {
    ask_ahead(values);
    if (!(tile & 1)) _mm_prefetch((const char*)masks + 512, _MM_HINT_T0);
    const uint16_t* x_now = x + tile * COLUMNS;
    if constexpr (LINES < ROWS) values += marked(masks, 0, first);
#pragma GCC unroll 8
    for (int line = 0; line < LINES; line++) {
      uint32_t mask = masks[first + line];
      auto weights = (__m512bh)_mm512_maskz_expand_epi16(mask, load_apart(values));
      values += _mm_popcnt_u32(mask);
#pragma GCC unroll 6
      for (int token = 0; token < TOKENS_NOW; token++)
        sums[line][token] =
            _mm512_dpbf16_ps(sums[line][token], weights, (__m512bh)_mm512_loadu_si512(x_now + token * x_stride));
    }
    if constexpr (LINES < ROWS) values += marked(masks, first + LINES, ROWS);
  }
  for (int line = 0; line < LINES && first + line < height; line++)
    for (int token = 0; token < TOKENS_NOW; token++)
      y[token * y_stride + first + line] = _mm512_reduce_add_ps(sums[line][token]);
}

using FewTokens = void (*)(const uint32_t*, const uint16_t*, int64_t, int, const uint16_t*, int64_t, float*, int64_t,
                           int64_t);

struct Few {
  int lines;
  FewTokens multiply;
};

// For 1, 2, ... FEW tokens: as many rows at a time as leave the sums in registers.
constexpr int FEW = 6;
constexpr Few few[FEW] = {
    {8, few_tokens<8, 1>}, {8, few_tokens<8, 2>}, {8, few_tokens<8, 3>},
    {4, few_tokens<4, 4>}, {4, few_tokens<4, 5>}, {4, few_tokens<4, 6>},
};

AVX512 const uint16_t* expand_panel(const uint32_t* masks, const uint16_t* values, int64_t tiles, uint16_t* out) {
  for (int64_t tile = 0; tile < tiles; tile++, masks += ROWS) {
    ask_ahead(values);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
      _mm512_storeu_si512(out + (row * PANEL + tile) * COLUMNS,
                          _mm512_maskz_expand_epi16(masks[row], load_apart(values)));
      values += _mm_popcnt_u32(masks[row]);
    }
  }
  return values;
}

template <int TOKENS_NOW>
AVX512 void multiply_pairs(const uint16_t* panel, int64_t tiles, const uint16_t* x, int64_t x_stride, float* memory) {
  __m512 sums[ROWS][TOKENS_NOW];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
    for (int token = 0; token < TOKENS_NOW; token++)
      sums[row][token] = _mm512_loadu_ps(memory + (row * TOKENS + token) * LANES);
  for (int64_t tile = 0; tile < tiles; tile++) {
    __m512bh x_now[TOKENS_NOW];
    for (int token = 0; token < TOKENS_NOW; token++)
      x_now[token] = (__m512bh)_mm512_loadu_si512(x + token * x_stride + tile * COLUMNS);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
      auto weights = (__m512bh)_mm512_loadu_si512(panel + (row * PANEL + tile) * COLUMNS);
#pragma GCC unroll 3
      for (int token = 0; token < TOKENS_NOW; token++)
        sums[row][token] = _mm512_dpbf16_ps(sums[row][token], weights, x_now[token]);
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
    for (int token = 0; token < TOKENS_NOW; token++)
      _mm512_storeu_ps(memory + (row * TOKENS + token) * LANES, sums[row][token]);
}

#endif

// ---- one tile row --------------------------------------------------------------------------------------------------

// y[token][row] = all lanes of sums[row][token]; the rows of `sums` lie `stride` tokens apart.
void add_up(const float* sums, int64_t stride, int64_t tokens, int64_t height, float* y, int64_t y_stride) {
  for (int64_t row = 0; row < height; row++)
    for (int64_t token = 0; token < tokens; token++) {
      const float* lanes = sums + (row * stride + token) * LANES;
      float total = 0;
      for (int lane = 0; lane < LANES; lane++) total += lanes[lane];
      y[token * y_stride + row] = total;
    }
}

struct Widened {  // the kernels that multiply in float32
  const void* (*widen_panel)(const uint32_t*, const void*, int64_t, float*);
  void (*multiply)(const float*, int64_t, const float*, int64_t, int64_t, float*);
  void (*one_token)(const uint32_t*, const void*, int64_t, const float*, float*);  // may be missing

  void operator()(const Tiles& tiles, int64_t row, const void* stream, const float* x, int64_t x_stride, int64_t tokens,
                  float* y) const {
    float panel[ROWS * PANEL * COLUMNS], sums[ROWS * TOKENS * LANES];
    if (tokens == 1 && one_token) {
      std::memset(sums, 0, sizeof(float) * ROWS * LANES);
      one_token(tiles.masks_of(row), stream, tiles.across(), x, sums);
      return add_up(sums, 1, 1, tiles.height(row), y, tiles.outputs);
    }
    std::memset(sums, 0, sizeof sums);
    for (int64_t tile = 0; tile < tiles.across(); tile += PANEL) {
      int64_t now = tiles.across() - tile < PANEL ? tiles.across() - tile : PANEL;
      stream = widen_panel(tiles.masks_of(row) + tile * ROWS, stream, now, panel);
      multiply(panel, now, x + tile * COLUMNS, x_stride, tokens, sums);
    }
    add_up(sums, TOKENS, tokens, tiles.height(row), y, tiles.outputs);
  }
};

template <Type type> Widened widened(int level) {
#ifdef LLMPRUNE_X86
  if constexpr (type != BF16)
    if (level >= 2) return {widen_panel_avx512<type>, multiply_avx512, one_token_avx512<type>};
  if (level >= 1) return {widen_panel_avx2<type>, multiply_avx2, one_token_avx2<type>};
#endif
  return {widen_panel_any<type>, multiply_any, nullptr};
}

template <Type type>
void linear(const Tiles& tiles, const void* x, int64_t tokens, float* y, int threads, int level) {
  Widened kernel = widened<type>(level);
  int64_t x_stride = tiles.across() * COLUMNS;
  auto values = static_cast<const typename Stored<type>::T*>(tiles.values);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < tiles.down(); row++)
    for (int64_t token = 0; token < tokens; token += TOKENS) {
      int64_t now = tokens - token < TOKENS ? tokens - token : TOKENS;
      kernel(tiles, row, values + tiles.offsets[row], static_cast<const float*>(x) + token * x_stride, x_stride, now,
             y + token * tiles.outputs + row * ROWS);
    }
}

#ifdef LLMPRUNE_X86

void many_tokens(const Tiles& tiles, int64_t row, const uint16_t* x, int64_t x_stride, int64_t tokens, float* y) {
  alignas(64) uint16_t panel[ROWS * PANEL * COLUMNS];
  alignas(64) float sums[ROWS * TOKENS * LANES];
  std::memset(sums, 0, sizeof sums);
  auto values = static_cast<const uint16_t*>(tiles.values) + tiles.offsets[row];
  for (int64_t tile = 0; tile < tiles.across(); tile += PANEL) {
    int64_t now = tiles.across() - tile < PANEL ? tiles.across() - tile : PANEL, token = 0;
    const uint16_t* from = x + tile * COLUMNS;
    values = expand_panel(tiles.masks_of(row) + tile * ROWS, values, now, panel);
    for (; token + AT_ONCE <= tokens; token += AT_ONCE)
      multiply_pairs<AT_ONCE>(panel, now, from + token * x_stride, x_stride, sums + token * LANES);
    for (; token < tokens; token++)
      multiply_pairs<1>(panel, now, from + token * x_stride, x_stride, sums + token * LANES);
  }
  add_up(sums, TOKENS, tokens, tiles.height(row), y, tiles.outputs);
}

void linear_bf16_avx512(const Tiles& tiles, const uint16_t* x, int64_t tokens, float* y, int threads) {
  int64_t x_stride = tiles.across() * COLUMNS;
  auto values = static_cast<const uint16_t*>(tiles.values);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < tiles.down(); row++) {
    float* to = y + row * ROWS;
    if (tokens <= FEW) {
      const Few& kernel = few[tokens - 1];
      for (int first = 0; first < tiles.height(row); first += kernel.lines)
        kernel.multiply(tiles.masks_of(row), values + tiles.offsets[row], tiles.across(), first, x, x_stride, to,
                        tiles.outputs, tiles.height(row));
      continue;
    }
    for (int64_t token = 0; token < tokens; token += TOKENS) {
      int64_t now = tokens - token < TOKENS ? tokens - token : TOKENS;
      many_tokens(tiles, row, x + token * x_stride, x_stride, now, to + token * tiles.outputs);
    }
  }
}

#endif

// ---- layouts -------------------------------------------------------------------------------------------------------

uint32_t bits_of(const uint8_t* mask, int64_t column, int64_t count) {
  uint32_t bits = 0;
  if (count == COLUMNS) {
    std::memcpy(&bits, mask + column / 8, 4);  // of a known size, which is one instruction
    return bits;
  }
  std::memcpy(&bits, mask + column / 8, (count + 7) / 8);
  return bits & ((1u << count) - 1);
}

int64_t ones_any(const uint8_t* masks, int64_t bytes) {
  int64_t count = 0;
  for (int64_t at = 0; at < bytes; at++) count += __builtin_popcount(masks[at]);
  return count;
}

#ifdef LLMPRUNE_X86

AVX2 int64_t ones_avx2(const uint8_t* masks, int64_t bytes) {
  int64_t count = 0, at = 0;
  for (uint64_t word; at + 8 <= bytes; at += 8) {
    std::memcpy(&word, masks + at, 8);
    count += _mm_popcnt_u64(word);
  }
  for (; at < bytes; at++) count += _mm_popcnt_u32(masks[at]);
  return count;
}

#endif

int64_t ones(const uint8_t* masks, int64_t bytes, int level) {
#ifdef LLMPRUNE_X86
  if (level >= 1) return ones_avx2(masks, bytes);
#endif
  return ones_any(masks, bytes);
}

template <typename T> void expand_row(const uint8_t* mask, const T* values, int64_t columns, T* out) {
  for (int64_t column = 0; column < columns; column += COLUMNS) {
    int64_t count = columns - column < COLUMNS ? columns - column : COLUMNS;
    values = scatter(bits_of(mask, column, count), values, out + column, count);
  }
}

template <typename T> void expand_tile_row(const Tiles& tiles, int64_t row, T* out) {
  auto values = static_cast<const T*>(tiles.values) + tiles.offsets[row];
  for (int64_t tile = 0; tile < tiles.across(); tile++)
    for (int64_t line = 0; line < tiles.height(row); line++)
      values = scatter(tiles.masks_of(row)[tile * ROWS + line], values, out + line * tiles.inputs + tile * COLUMNS,
                       tiles.width(tile));
}

#ifdef LLMPRUNE_X86

AVX512 void expand_row_avx512(const uint8_t* mask, const uint16_t* values, int64_t columns, uint16_t* out) {
  for (int64_t column = 0; column < columns; column += COLUMNS) {
    int64_t count = columns - column < COLUMNS ? columns - column : COLUMNS;
    uint32_t bits = bits_of(mask, column, count);
    int64_t marked = _mm_popcnt_u32(bits);  // the file ends with the last value: read no more than the marked ones
    __m512i loaded = _mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << marked) - 1), values);
    __mmask32 within = __mmask32((uint64_t(1) << count) - 1);
    _mm512_mask_storeu_epi16(out + column, within, _mm512_maskz_expand_epi16(bits, loaded));
    values += marked;
  }
}

// Where rows begin at whole cache lines they are written past the cache, which need not read them first then.
AVX512 void expand_tile_row_avx512(const Tiles& tiles, int64_t row, uint16_t* out) {
  auto values = static_cast<const uint16_t*>(tiles.values) + tiles.offsets[row];
  const uint32_t* masks = tiles.masks_of(row);
  int64_t height = tiles.height(row), inputs = tiles.inputs;
  bool whole_lines = inputs % COLUMNS == 0 && uintptr_t(out) % 64 == 0;
  for (int64_t column = 0; column < inputs; column += COLUMNS, masks += ROWS) {
    ask_ahead(values);
    auto within = __mmask32(inputs - column < COLUMNS ? (1u << (inputs - column)) - 1 : ~0u);
    for (int64_t line = 0; line < height; line++) {
      __m512i spread = _mm512_maskz_expand_epi16(masks[line], load_apart(values));
      uint16_t* to = out + line * inputs + column;
      if (whole_lines) _mm512_stream_si512((__m512i*)to, spread);
      else _mm512_mask_storeu_epi16(to, within, spread);
      values += _mm_popcnt_u32(masks[line]);
    }
  }
  _mm_sfence();
}

#endif

template <typename T>
void expand_rows(const uint8_t* masks, const T* values, int64_t rows, int64_t columns, T* out, int threads, int level) {
  int64_t bytes = (columns + 7) / 8;
  std::vector<int64_t> first(rows + 1, 0);
  for (int64_t row = 0; row < rows; row++) first[row + 1] = first[row] + ones(masks + row * bytes, bytes, level);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
#ifdef LLMPRUNE_X86
    if constexpr (sizeof(T) == 2)
      if (level >= 2) {
        expand_row_avx512(masks + row * bytes, (const uint16_t*)values + first[row], columns,
                          (uint16_t*)out + row * columns);
        continue;
      }
#endif
    expand_row(masks + row * bytes, values + first[row], columns, out + row * columns);
  }
}

template <typename T> void pack_row(const Tiles& tiles, int64_t row, const T* dense, uint32_t* masks, T* values) {
  for (int64_t tile = 0; tile < tiles.across(); tile++)
    for (int64_t line = 0; line < ROWS; line++) {
      uint32_t mask = 0;
      const T* from = dense + (row * ROWS + line) * tiles.inputs + tile * COLUMNS;
      for (int64_t i = 0; line < tiles.height(row) && i < tiles.width(tile); i++)
        if (from[i]) {
          mask |= 1u << i;
          *values++ = from[i];
        }
      masks[(row * tiles.across() + tile) * ROWS + line] = mask;
    }
}

template <typename T> void nonzero(const T* dense, int64_t rows, int64_t columns, int64_t* counts, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    int64_t found = 0;
    for (int64_t first = 0; first < columns; first += COUNTED) {
      int64_t last = columns - first < COUNTED ? columns : first + COUNTED;
      T some = 0;
      for (int64_t column = first; column < last; column++) some += dense[row * columns + column] != 0;
      found += some;
    }
    counts[row] = found;
  }
}

template <typename T> void pack(Tiles tiles, const T* dense, uint32_t* masks, T* values, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < tiles.down(); row++)
    pack_row(tiles, row, dense, masks, values + tiles.offsets[row]);
}

template <typename T> void expand(const Tiles& tiles, T* out, int threads, int level) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < tiles.down(); row++) {
    T* to = out + row * ROWS * tiles.inputs;
#ifdef LLMPRUNE_X86
    if constexpr (sizeof(T) == 2)
      if (level >= 2) {
        expand_tile_row_avx512(tiles, row, (uint16_t*)to);
        continue;
      }
#endif
    expand_tile_row(tiles, row, to);
  }
}

}  // namespace

extern "C" {

// Raised whenever a function below changes its meaning; native.py refuses a library of another number.
int llmprune_abi() { return 4; }

int llmprune_cpu_level() {
#ifdef LLMPRUNE_X86
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16")) return 2;
  return avx2 ? 1 : 0;
#else
  return 0;
#endif
}

// How many bits are set; the unused ones at the end of rows must not be. `count` takes the number.
void bitmask_count(const uint8_t* masks, int64_t bytes, int64_t* count, int level) { *count = ones(masks, bytes, level); }

// Rows to dense. `size` is the bytes of an element: 1, 2, 4 or 8.
void bitmask_expand_rows(const uint8_t* masks, const void* values, int64_t rows, int64_t columns, int size, void* out,
                         int threads, int level) {
  if (size == 1) expand_rows(masks, (const uint8_t*)values, rows, columns, (uint8_t*)out, threads, level);
  if (size == 2) expand_rows(masks, (const uint16_t*)values, rows, columns, (uint16_t*)out, threads, level);
  if (size == 4) expand_rows(masks, (const uint32_t*)values, rows, columns, (uint32_t*)out, threads, level);
  if (size == 8) expand_rows(masks, (const uint64_t*)values, rows, columns, (uint64_t*)out, threads, level);
}

// How many elements of each row are not zero in all their bits. `size` is the bytes of an element: 2 or 4.
void bitmask_nonzero(const void* dense, int64_t rows, int64_t columns, int size, int64_t* counts, int threads) {
  if (size == 2) nonzero((const uint16_t*)dense, rows, columns, counts, threads);
  if (size == 4) nonzero((const uint32_t*)dense, rows, columns, counts, threads);
}

// Dense to tiles, given the offsets. `size` is 2 or 4.
void bitmask_pack(const void* dense, int64_t outputs, int64_t inputs, int size, uint32_t* masks, void* values,
                  const int64_t* offsets, int threads) {
  Tiles tiles{masks, values, offsets, outputs, inputs};
  if (size == 2) pack(tiles, (const uint16_t*)dense, masks, (uint16_t*)values, threads);
  if (size == 4) pack(tiles, (const uint32_t*)dense, masks, (uint32_t*)values, threads);
}

// Tiles to dense.
void bitmask_expand(const uint32_t* masks, const void* values, const int64_t* offsets, int64_t outputs, int64_t inputs,
                    int size, void* out, int threads, int level) {
  Tiles tiles{masks, values, offsets, outputs, inputs};
  if (size == 2) expand(tiles, (uint16_t*)out, threads, level);
  if (size == 4) expand(tiles, (uint32_t*)out, threads, level);
}

// y[tokens][outputs] = x[tokens][inputs, padded with zeros to whole tiles] . weight^T. `type` is that of the values:
// 0 float32, 1 bfloat16, 2 float16; x is float32, but bfloat16 where both type and level are bfloat16 and AVX-512.
void bitmask_linear(const uint32_t* masks, const void* values, const int64_t* offsets, int64_t outputs, int64_t inputs,
                    int type, const void* x, int64_t tokens, float* y, int threads, int level) {
  Tiles tiles{masks, values, offsets, outputs, inputs};
#ifdef LLMPRUNE_X86
  if (type == BF16 && level >= 2) return linear_bf16_avx512(tiles, (const uint16_t*)x, tokens, y, threads);
#endif
  if (type == F32) linear<F32>(tiles, x, tokens, y, threads, level);
  if (type == BF16) linear<BF16>(tiles, x, tokens, y, threads, level);
  if (type == F16) linear<F16>(tiles, x, tokens, y, threads, level);
}
}
