// Matrices stored as a bitmask and the values it marks: expand them, multiply by them.
//
// The layout is described in layout.py; it is that of compressed files, so that a mapped file is multiplied where it
// lies. Functions take a `level`: 2 AVX-512 with VBMI2 and BF16, 1 AVX2 with FMA and F16C, 0 any CPU. The caller must
// not ask for more than `llmprune_cpu_level()`. No function allocates Python objects or knows torch.

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

constexpr int ROWS = 8;       // of a group: the unit that is dealt out to threads, and whose first value is known
constexpr int COLUMNS = 32;   // that a word of the bitmask marks
constexpr int PANEL = 32;     // words whose weights are expanded before many tokens are multiplied by them
constexpr int AT_ONCE = 3;    // tokens that share one pass over the registers
constexpr int TOKENS = 96;    // tokens whose sums are kept at a time
constexpr int LANES = 16;     // floats that a sum is spread over
constexpr int64_t COUNTED = 1 << 14;  // elements counted in one of their own size, which vectors hold the most of
constexpr int64_t AHEAD = 4096;  // bytes of values that are asked for before they are needed
constexpr int64_t SLACK = 32;    // values behind a group that are read, and not used: registers are loaded whole

constexpr int64_t LITTLE = 1 << 16;  // weights, or bytes of masks, that are not worth a second thread

enum Type { F32 = 0, BF16 = 1, F16 = 2 };

// Words of the bitmask that a row takes; the last one may be short.
inline int64_t words_of(int64_t inputs) { return (inputs + COLUMNS - 1) / COLUMNS; }

struct Bitmask {
  const uint8_t* masks;    // [outputs][row_bytes]
  const void* values;      // row by row
  const int64_t* starts;   // [groups + 1]: where the values of a group begin, counted from `values`
  int64_t outputs, inputs;

  int64_t row_bytes() const { return (inputs + 7) / 8; }
  int64_t words() const { return words_of(inputs); }
  int64_t groups() const { return (outputs + ROWS - 1) / ROWS; }
};

// Threads wait for each other at the end, the longer the busier the machine is.
inline int enough(int threads, int64_t work) { return work < LITTLE ? 1 : threads; }

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

// The bits of `count` columns from `column`, a multiple of 8, on.
inline uint32_t bits_of(const uint8_t* mask, int64_t column, int64_t count) {
  uint32_t bits = 0;
  if (count >= COLUMNS) {
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

// Some rows, 8 or at the end fewer, and where their values lie.
template <typename T> struct Group {
  const uint8_t* masks;
  int64_t row_bytes, inputs, height;
  const T* first;       // value
  const T* next[ROWS];  // after `find_rows`
  std::vector<T> copied;  // the last values, with room behind them: a file may end there

  Group(const Bitmask& matrix, int64_t number)
      : masks(matrix.masks + number * ROWS * matrix.row_bytes()), row_bytes(matrix.row_bytes()), inputs(matrix.inputs),
        height(matrix.outputs - number * ROWS < ROWS ? matrix.outputs - number * ROWS : ROWS) {
    auto values = static_cast<const T*>(matrix.values);
    const T *begin = values + matrix.starts[number], *end = values + matrix.starts[number + 1];
    first = begin;
    if (end + SLACK <= values + matrix.starts[matrix.groups()]) return;
    copied.reserve(end - begin + SLACK);
    copied.assign(begin, end);
    copied.resize(end - begin + SLACK);
    first = copied.data();
  }

  const uint8_t* mask(int64_t row) const { return masks + row * row_bytes; }
  int64_t words() const { return words_of(inputs); }
  uint32_t word(int64_t row, int64_t number) const { return bits_of(mask(row), number * COLUMNS, inputs - number * COLUMNS); }

  // Find where each row begins.
  void find_rows(int level) {
    next[0] = first;
    for (int64_t row = 1; row < height; row++) next[row] = next[row - 1] + ones(mask(row - 1), row_bytes, level);
  }
};

template <Type type> using GroupOf = Group<typename Stored<type>::T>;

// Write the weights of some words of each row to `out`, [ROWS][PANEL * COLUMNS] and widened, and move on behind them.
template <Type type> void widen_panel_any(GroupOf<type>& group, int64_t first, int64_t count, float* out) {
  std::memset(out, 0, sizeof(float) * ROWS * PANEL * COLUMNS);
  for (int64_t row = 0; row < group.height; row++)
    for (int64_t word = 0; word < count; word++)
      for (uint32_t mask = group.word(row, first + word); mask; mask &= mask - 1)
        out[(row * PANEL + word) * COLUMNS + __builtin_ctz(mask)] = widen<type>(*group.next[row]++);
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
        for (int64_t column = 0; column < words * COLUMNS; column += LANES)                               \
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

void multiply_any(const float* panel, int64_t words, const float* x, int64_t x_stride, int64_t tokens, float* sums)
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

template <typename T> AVX2 inline void ask_ahead(const T* values, int64_t ahead = AHEAD) {
  for (int line = 0; line < int(sizeof(T)) / 2; line++) _mm_prefetch((const char*)values + ahead + 64 * line, _MM_HINT_T0);
}

AVX2 inline __m256 widen_bf16(__m128i values) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(values), 16));
}

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

template <Type type> AVX2 void widen_panel_avx2(GroupOf<type>& group, int64_t first, int64_t count, float* out) {
  for (int64_t row = 0; row < group.height; row++) {
    auto values = group.next[row];
    for (int64_t word = 0; word < count; word++) {
      ask_ahead(values);
      uint32_t bits = group.word(row, first + word);
      for (int part = 0; part < 4; part++) {
        uint32_t mask = bits >> (8 * part) & 255;
        _mm256_storeu_ps(out + (row * PANEL + word) * COLUMNS + 8 * part, spread_avx2<type>(mask, values));
        values += _mm_popcnt_u32(mask);
      }
    }
    group.next[row] = values;
  }
}

// The rows of a group, one after the other, times one token: its values are one stream, as a prefetcher wants it.
template <Type type> AVX2 void one_token_avx2(GroupOf<type>& group, const float* x, float* sums) {
  auto values = group.first;
  for (int64_t row = 0; row < group.height; row++) {
    __m256 now[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t word = 0; word < group.words(); word++) {
      ask_ahead(values);
      uint32_t bits = group.word(row, word);
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++) {
        uint32_t mask = bits >> (8 * part) & 255;
        __m256 x_now = _mm256_loadu_ps(x + word * COLUMNS + 8 * part);
        now[part % 2] = _mm256_fmadd_ps(spread_avx2<type>(mask, values), x_now, now[part % 2]);
        values += _mm_popcnt_u32(mask);
      }
    }
    _mm256_storeu_ps(sums + row * LANES, now[0]);
    _mm256_storeu_ps(sums + row * LANES + 8, now[1]);
  }
}

AVX2 void multiply_avx2(
    const float* panel, int64_t words, const float* x, int64_t x_stride, int64_t tokens, float* sums)
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

template <Type type> AVX512 void widen_panel_avx512(GroupOf<type>& group, int64_t first, int64_t count, float* out) {
  for (int64_t row = 0; row < group.height; row++) {
    auto values = group.next[row];
    for (int64_t word = 0; word < count; word++) {
      ask_ahead(values);
      uint32_t mask = group.word(row, first + word);
      __m512 low, high;
      spread_avx512<type>(mask, values, low, high);
      _mm512_storeu_ps(out + (row * PANEL + word) * COLUMNS, low);
      _mm512_storeu_ps(out + (row * PANEL + word) * COLUMNS + 16, high);
      values += _mm_popcnt_u32(mask);
    }
    group.next[row] = values;
  }
}

template <Type type> AVX512 void one_token_avx512(GroupOf<type>& group, const float* x, float* sums) {
  auto values = group.first;
  for (int64_t row = 0; row < group.height; row++) {
    __m512 low_sum = _mm512_setzero_ps(), high_sum = _mm512_setzero_ps();
    for (int64_t word = 0; word < group.words(); word++) {
      ask_ahead(values);
      uint32_t mask = group.word(row, word);
      __m512 low, high;
      spread_avx512<type>(mask, values, low, high);
      low_sum = _mm512_fmadd_ps(low, _mm512_loadu_ps(x + word * COLUMNS), low_sum);
      high_sum = _mm512_fmadd_ps(high, _mm512_loadu_ps(x + word * COLUMNS + 16), high_sum);
      values += _mm_popcnt_u32(mask);
    }
    _mm512_storeu_ps(sums + row * LANES, _mm512_add_ps(low_sum, high_sum));
  }
}

AVX512 void multiply_avx512(
    const float* panel, int64_t words, const float* x, int64_t x_stride, int64_t tokens, float* sums)
MULTIPLY_BODY(64, 8)

// bfloat16 on AVX-512 multiplies pairs without widening them (vdpbf16ps), so it has kernels of its own.

template <int LINES, int TOKENS_NOW>
AVX512 inline void add_word(const uint32_t (&masks)[LINES], const uint16_t* (&next)[LINES], const uint16_t* x,
                            int64_t x_stride, __m512 (&sums)[LINES][TOKENS_NOW]) {
#pragma GCC unroll 4
  for (int line = 0; line < LINES; line++) {
    auto weights = (__m512bh)_mm512_maskz_expand_epi16(masks[line], load_apart(next[line]));
    next[line] += _mm_popcnt_u32(masks[line]);
#pragma GCC unroll 6
    for (int token = 0; token < TOKENS_NOW; token++)
      sums[line][token] =
          _mm512_dpbf16_ps(sums[line][token], weights, (__m512bh)_mm512_loadu_si512(x + token * x_stride));
  }
}

// LINES rows from `row` on times few tokens, everything in registers; returns where the values of the next row begin.
// One row at a time is one stream of values. Several share the loads of x, and ask for what the rows after them need.
template <int LINES, int TOKENS_NOW>
AVX512 const uint16_t* few_tokens(const Group<uint16_t>& group, int64_t row, const uint16_t* values, const uint16_t* x,
                                  int64_t x_stride, float* y, int64_t y_stride) {
  const uint16_t* next[LINES];
  next[0] = values;
  for (int line = 1; line < LINES; line++)
    next[line] = next[line - 1] + ones_avx2(group.mask(row + line - 1), group.row_bytes);
  const int64_t ahead = LINES == 1 ? AHEAD : 2 * LINES * (next[LINES - 1] - next[0]) / (LINES > 1 ? LINES - 1 : 1);
  const int64_t whole = group.inputs / COLUMNS;
  __m512 sums[LINES][TOKENS_NOW];
  for (auto& line : sums) for (auto& sum : line) sum = _mm512_setzero_ps();
  uint32_t masks[LINES];
  int64_t word = 0;
  for (; word + 4 <= whole; word += 4) {
    for (auto values : next) ask_ahead(values, ahead), ask_ahead(values, ahead + 64);
#pragma GCC unroll 4
    for (int64_t now = word; now < word + 4; now++) {
#pragma GCC unroll 4
      for (int line = 0; line < LINES; line++)
        masks[line] = bits_of(group.mask(row + line), now * COLUMNS, COLUMNS);
      add_word<LINES, TOKENS_NOW>(masks, next, x + now * COLUMNS, x_stride, sums);
    }
  }
  for (; word < group.words(); word++) {
    for (int line = 0; line < LINES; line++) masks[line] = group.word(row + line, word);
    add_word<LINES, TOKENS_NOW>(masks, next, x + word * COLUMNS, x_stride, sums);
  }
  for (int line = 0; line < LINES; line++)
    for (int token = 0; token < TOKENS_NOW; token++)
      y[token * y_stride + row + line] = _mm512_reduce_add_ps(sums[line][token]);
  return next[LINES - 1];
}

using FewTokens = const uint16_t* (*)(const Group<uint16_t>&, int64_t, const uint16_t*, const uint16_t*, int64_t,
                                      float*, int64_t);

struct Few {
  int lines;
  FewTokens several, one;
};

// For 1, 2, ... FEW tokens: as many rows at a time as was measured to be fastest, and what takes the rows that are left.
constexpr int FEW = 6;
constexpr int IN_PARTS = 18;  // tokens that are multiplied FEW at a time: the values of a group stay in the cache
constexpr Few few[FEW] = {
    {1, few_tokens<1, 1>, few_tokens<1, 1>}, {1, few_tokens<1, 2>, few_tokens<1, 2>},
    {4, few_tokens<4, 3>, few_tokens<1, 3>}, {4, few_tokens<4, 4>, few_tokens<1, 4>},
    {4, few_tokens<4, 5>, few_tokens<1, 5>}, {4, few_tokens<4, 6>, few_tokens<1, 6>},
};

void times_few(const Group<uint16_t>& group, const uint16_t* x, int64_t x_stride, int64_t tokens, float* y,
               int64_t y_stride) {
  const Few& kernel = few[tokens - 1];
  const uint16_t* values = group.first;
  int64_t row = 0;
  for (; row + kernel.lines <= group.height; row += kernel.lines)
    values = kernel.several(group, row, values, x, x_stride, y, y_stride);
  for (; row < group.height; row++) values = kernel.one(group, row, values, x, x_stride, y, y_stride);
}

// Write the weights of some words of each row to `out`, [ROWS][PANEL * COLUMNS], and move on behind them.
AVX512 void expand_panel(Group<uint16_t>& group, int64_t first, int64_t count, uint16_t* out) {
  for (int64_t row = 0; row < group.height; row++) {
    const uint16_t* values = group.next[row];
    for (int64_t word = 0; word < count; word++) {
      if (word % 2 == 0) ask_ahead(values);
      uint32_t mask = group.word(row, first + word);
      _mm512_storeu_si512(out + (row * PANEL + word) * COLUMNS, _mm512_maskz_expand_epi16(mask, load_apart(values)));
      values += _mm_popcnt_u32(mask);
    }
    group.next[row] = values;
  }
}

template <int TOKENS_NOW>
AVX512 void multiply_pairs(const uint16_t* panel, int64_t words, const uint16_t* x, int64_t x_stride, float* memory) {
  __m512 sums[ROWS][TOKENS_NOW];
#pragma GCC unroll 8
  for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 3
    for (int token = 0; token < TOKENS_NOW; token++)
      sums[row][token] = _mm512_loadu_ps(memory + (row * TOKENS + token) * LANES);
  for (int64_t word = 0; word < words; word++) {
    __m512bh x_now[TOKENS_NOW];
    for (int token = 0; token < TOKENS_NOW; token++)
      x_now[token] = (__m512bh)_mm512_loadu_si512(x + token * x_stride + word * COLUMNS);
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
      auto weights = (__m512bh)_mm512_loadu_si512(panel + (row * PANEL + word) * COLUMNS);
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

// ---- one group of rows ---------------------------------------------------------------------------------------------

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

template <Type type> struct Widened {  // the kernels that multiply in float32
  void (*widen_panel)(GroupOf<type>&, int64_t, int64_t, float*);
  void (*multiply)(const float*, int64_t, const float*, int64_t, int64_t, float*);
  void (*one_token)(GroupOf<type>&, const float*, float*);  // may be missing

  void operator()(GroupOf<type>& group, const float* x, int64_t x_stride, int64_t tokens, float* y, int64_t y_stride) const {
    float panel[ROWS * PANEL * COLUMNS], sums[ROWS * TOKENS * LANES];
    if (tokens == 1 && one_token) {
      std::memset(sums, 0, sizeof(float) * ROWS * LANES);
      one_token(group, x, sums);
      return add_up(sums, 1, 1, group.height, y, y_stride);
    }
    std::memset(sums, 0, sizeof sums);
    for (int64_t word = 0; word < group.words(); word += PANEL) {
      int64_t now = group.words() - word < PANEL ? group.words() - word : PANEL;
      widen_panel(group, word, now, panel);
      multiply(panel, now, x + word * COLUMNS, x_stride, tokens, sums);
    }
    add_up(sums, TOKENS, tokens, group.height, y, y_stride);
  }
};

template <Type type> Widened<type> widened(int level) {
#ifdef LLMPRUNE_X86
  if constexpr (type != BF16)
    if (level >= 2) return {widen_panel_avx512<type>, multiply_avx512, one_token_avx512<type>};
  if (level >= 1) return {widen_panel_avx2<type>, multiply_avx2, one_token_avx2<type>};
#endif
  return {widen_panel_any<type>, multiply_any, nullptr};
}

template <Type type>
void linear(const Bitmask& matrix, const void* x, int64_t tokens, float* y, int threads, int level) {
  Widened<type> kernel = widened<type>(level);
  int64_t x_stride = matrix.words() * COLUMNS;
#pragma omp parallel for schedule(static) num_threads(enough(threads, matrix.outputs * matrix.inputs * tokens))
  for (int64_t number = 0; number < matrix.groups(); number++) {
    GroupOf<type> group(matrix, number);
    for (int64_t token = 0; token < tokens; token += TOKENS) {
      int64_t now = tokens - token < TOKENS ? tokens - token : TOKENS;
      if (now > 1 || !kernel.one_token) group.find_rows(level);
      kernel(group, static_cast<const float*>(x) + token * x_stride, x_stride, now,
             y + token * matrix.outputs + number * ROWS, matrix.outputs);
    }
  }
}

#ifdef LLMPRUNE_X86

void many_tokens(Group<uint16_t>& group, const uint16_t* x, int64_t x_stride, int64_t tokens, float* y,
                 int64_t y_stride) {
  alignas(64) uint16_t panel[ROWS * PANEL * COLUMNS];
  alignas(64) float sums[ROWS * TOKENS * LANES];
  std::memset(sums, 0, sizeof sums);
  for (int64_t word = 0; word < group.words(); word += PANEL) {
    int64_t now = group.words() - word < PANEL ? group.words() - word : PANEL, token = 0;
    const uint16_t* from = x + word * COLUMNS;
    expand_panel(group, word, now, panel);
    for (; token + AT_ONCE <= tokens; token += AT_ONCE)
      multiply_pairs<AT_ONCE>(panel, now, from + token * x_stride, x_stride, sums + token * LANES);
    for (; token < tokens; token++)
      multiply_pairs<1>(panel, now, from + token * x_stride, x_stride, sums + token * LANES);
  }
  add_up(sums, TOKENS, tokens, group.height, y, y_stride);
}

void linear_bf16_avx512(const Bitmask& matrix, const uint16_t* x, int64_t tokens, float* y, int threads) {
  int64_t x_stride = matrix.words() * COLUMNS;
#pragma omp parallel for schedule(static) num_threads(enough(threads, matrix.outputs * matrix.inputs * tokens))
  for (int64_t number = 0; number < matrix.groups(); number++) {
    Group<uint16_t> group(matrix, number);
    float* to = y + number * ROWS;
    if (tokens <= IN_PARTS) {
      int64_t parts = (tokens + FEW - 1) / FEW, token = 0;
      for (int64_t part = 0; part < parts; part++) {
        int64_t now = (tokens - token) / (parts - part);
        times_few(group, x + token * x_stride, x_stride, now, to + token * matrix.outputs, matrix.outputs);
        token += now;
      }
      continue;
    }
    for (int64_t token = 0; token < tokens; token += TOKENS) {
      int64_t now = tokens - token < TOKENS ? tokens - token : TOKENS;
      group.find_rows(2);
      many_tokens(group, x + token * x_stride, x_stride, now, to + token * matrix.outputs, matrix.outputs);
    }
  }
}

#endif

// ---- layouts -------------------------------------------------------------------------------------------------------

template <typename T> void expand_group(const Group<T>& group, T* out) {
  const T* values = group.first;
  for (int64_t row = 0; row < group.height; row++, out += group.inputs)
    for (int64_t column = 0; column < group.inputs; column += COLUMNS) {
      int64_t count = group.inputs - column < COLUMNS ? group.inputs - column : COLUMNS;
      uint32_t mask = bits_of(group.mask(row), column, count);
      for (int64_t i = 0; i < count; i++) out[column + i] = mask >> i & 1 ? *values++ : T(0);
    }
}

#ifdef LLMPRUNE_X86

// Where rows begin at whole cache lines they are written past the cache, which need not read them first then.
AVX512 void expand_group_avx512(const Group<uint16_t>& group, uint16_t* out) {
  const uint16_t* values = group.first;
  bool whole_lines = group.inputs % COLUMNS == 0 && uintptr_t(out) % 64 == 0;
  for (int64_t row = 0; row < group.height; row++, out += group.inputs)
    for (int64_t column = 0; column < group.inputs; column += COLUMNS) {
      if (column % (2 * COLUMNS) == 0) ask_ahead(values);
      int64_t count = group.inputs - column;
      uint32_t mask = bits_of(group.mask(row), column, count);
      __m512i spread = _mm512_maskz_expand_epi16(mask, load_apart(values));
      if (whole_lines) _mm512_stream_si512((__m512i*)(out + column), spread);
      else _mm512_mask_storeu_epi16(out + column, __mmask32(count < COLUMNS ? (1u << count) - 1 : ~0u), spread);
      values += _mm_popcnt_u32(mask);
    }
  _mm_sfence();
}

#endif

template <typename T> void expand(const Bitmask& matrix, T* out, int threads, int level) {
#pragma omp parallel for schedule(static) num_threads(enough(threads, matrix.outputs * matrix.inputs))
  for (int64_t number = 0; number < matrix.groups(); number++) {
    Group<T> group(matrix, number);
    T* to = out + number * ROWS * matrix.inputs;
#ifdef LLMPRUNE_X86
    if constexpr (sizeof(T) == 2)
      if (level >= 2) {
        expand_group_avx512(group, to);
        continue;
      }
#endif
    expand_group(group, to);
  }
}

template <typename T> void nonzero(const T* dense, int64_t rows, int64_t columns, int64_t* counts, int threads) {
#pragma omp parallel for schedule(static) num_threads(enough(threads, rows * columns))
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

template <typename T> void pack(const Bitmask& matrix, const T* dense, uint8_t* masks, T* values, int threads) {
#pragma omp parallel for schedule(static) num_threads(enough(threads, matrix.outputs * matrix.inputs))
  for (int64_t number = 0; number < matrix.groups(); number++) {
    T* to = values + matrix.starts[number];
    int64_t last = (number + 1) * ROWS < matrix.outputs ? (number + 1) * ROWS : matrix.outputs;
    for (int64_t row = number * ROWS; row < last; row++)
      for (int64_t byte = 0; byte < matrix.row_bytes(); byte++) {
        const T* from = dense + row * matrix.inputs + 8 * byte;
        uint8_t mask = 0;
        for (int64_t i = 0; i < 8 && 8 * byte + i < matrix.inputs; i++)
          if (from[i]) {
            mask |= 1u << i;
            *to++ = from[i];
          }
        masks[row * matrix.row_bytes() + byte] = mask;
      }
  }
}

}  // namespace

extern "C" {

// Raised whenever a function below changes its meaning; native.py refuses a library of another number.
int llmprune_abi() { return 6; }

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

// Where the values of each group of rows begin, by the bits of a mask; those at the ends of rows must be clear.
void bitmask_starts(const uint8_t* masks, int64_t outputs, int64_t inputs, int64_t* starts, int threads, int level) {
  Bitmask matrix{masks, nullptr, nullptr, outputs, inputs};
#pragma omp parallel for schedule(static) num_threads(enough(threads, outputs * matrix.row_bytes()))
  for (int64_t number = 0; number < matrix.groups(); number++) {
    int64_t rows = outputs - number * ROWS < ROWS ? outputs - number * ROWS : ROWS;
    starts[number + 1] = ones(masks + number * ROWS * matrix.row_bytes(), rows * matrix.row_bytes(), level);
  }
  starts[0] = 0;
  for (int64_t number = 0; number < matrix.groups(); number++) starts[number + 1] += starts[number];
}

// How many elements of each row are not zero in all their bits. `size` is the bytes of an element: 2 or 4.
void bitmask_nonzero(const void* dense, int64_t rows, int64_t columns, int size, int64_t* counts, int threads) {
  if (size == 2) nonzero((const uint16_t*)dense, rows, columns, counts, threads);
  if (size == 4) nonzero((const uint32_t*)dense, rows, columns, counts, threads);
}

// Dense to bitmask and values, given the starts. `size` is 2 or 4.
void bitmask_pack(const void* dense, int64_t outputs, int64_t inputs, int size, uint8_t* masks, void* values,
                  const int64_t* starts, int threads) {
  Bitmask matrix{masks, values, starts, outputs, inputs};
  if (size == 2) pack(matrix, (const uint16_t*)dense, masks, (uint16_t*)values, threads);
  if (size == 4) pack(matrix, (const uint32_t*)dense, masks, (uint32_t*)values, threads);
}

// Bitmask and values to dense. `size` is the bytes of an element: 1, 2, 4 or 8.
void bitmask_expand(const uint8_t* masks, const void* values, const int64_t* starts, int64_t outputs, int64_t inputs,
                    int size, void* out, int threads, int level) {
  Bitmask matrix{masks, values, starts, outputs, inputs};
  if (size == 1) expand(matrix, (uint8_t*)out, threads, level);
  if (size == 2) expand(matrix, (uint16_t*)out, threads, level);
  if (size == 4) expand(matrix, (uint32_t*)out, threads, level);
  if (size == 8) expand(matrix, (uint64_t*)out, threads, level);
}

// y[tokens][outputs] = x[tokens][inputs, padded with zeros to whole words] . weight^T. `type` is that of the values:
// 0 float32, 1 bfloat16, 2 float16; x is float32, but bfloat16 where both type and level are bfloat16 and AVX-512.
void bitmask_linear(const uint8_t* masks, const void* values, const int64_t* starts, int64_t outputs, int64_t inputs,
                    int type, const void* x, int64_t tokens, float* y, int threads, int level) {
  Bitmask matrix{masks, values, starts, outputs, inputs};
#ifdef LLMPRUNE_X86
  if (type == BF16 && level >= 2) return linear_bf16_avx512(matrix, (const uint16_t*)x, tokens, y, threads);
#endif
  if (type == F32) linear<F32>(matrix, x, tokens, y, threads, level);
  if (type == BF16) linear<BF16>(matrix, x, tokens, y, threads, level);
  if (type == F16) linear<F16>(matrix, x, tokens, y, threads, level);
}
}
