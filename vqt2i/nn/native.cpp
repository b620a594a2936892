// A transformer on a CPU: all its operations in one call, as native.py lists them, for a step of decoding or for whole
// sequences.
//
// A row is one position of one sequence. Where there are several positions of each, rows stand sequence by sequence.
// Activations are fp32. A product reads its matrix once for all rows: outputs lie along the lanes of a vector, a word (1
// fp32, 2 bf16 or 4 8-bit numbers) of each row is broadcast to them. Every number is summed in the same order whatever
// rows stand beside it, so a row's result does not depend on its neighbours, bit by bit.
//
// Vectors are those of GCC and Clang, which make any instruction set of them; the two products that need more than that
// to be fast have an AVX-512 version, and where the CPU multiplies tiles of matrices (AMX) one by these.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <sched.h>
#include <type_traits>
#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16, PANEL = 4;  // outputs of a vector, vectors of a panel
constexpr int WIDTH = LANES * PANEL;  // outputs of a panel
#if defined(__AVX512F__)
constexpr int TILE = 6;  // rows at once: 6 x 4 sums, 4 weights and a broadcast fill 32 registers
#else
constexpr int TILE = 2;
#endif

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef int8_t bytes __attribute__((vector_size(16)));

template <class V, class T> inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V, class T> inline void store(T* to, V v) { std::memcpy(to, &v, sizeof v); }
inline floats as_floats(words v) { return (floats)v; }
inline float as_float(uint32_t word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}
inline halves to_bf16(floats x) {  // to the nearest, ties to even
  words word = (words)x;
  return __builtin_convertvector((word + 0x7fff + (word >> 16 & 1)) >> 16, halves);
}
inline float sum(floats v) {
  v += __builtin_shuffle(v, ints{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  v += __builtin_shuffle(v, ints{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  v += __builtin_shuffle(v, ints{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
  return v[0] + v[1];
}

// e^x to about 1e-7 of itself, for x <= 88; below -87 it is 0. By 2^n e^r, |r| <= ln 2 / 2, and Taylor's series of e^r.
inline floats exponential(floats x) {
  const floats magic = floats{} + 12582912.0f;  // adding it rounds to whole numbers
  floats capped = x < 88.0f ? x : floats{} + 88.0f;
  floats n = (capped * 1.44269504088896341f + magic) - magic;
  floats r = capped - n * 0.693359375f + n * 2.12194440e-4f;
  floats y = floats{} + 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  ints exponent = __builtin_convertvector(n, ints) + 127;
  floats scaled = y * (floats)(exponent << 23);
  return x < -87.0f ? floats{} : scaled;
}

// ---- products ------------------------------------------------------------------------------------------------------

struct Fp32 {
  typedef floats Sum;
  static inline Sum add(Sum sum, uint32_t x, words w) { return sum + as_float(x) * as_floats(w); }
};

struct Bf16 {
  typedef floats Sum;
  static inline Sum add(Sum sum, uint32_t x, words w) {
#if defined(__AVX512BF16__)
    return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
#else
    sum += as_float(x << 16) * as_floats(w << 16);
    return sum + as_float(x & 0xffff0000) * as_floats(w & 0xffff0000);
#endif
  }
};

struct Int8 {  // weights are unsigned, 128 more than they are; inputs signed
  typedef ints Sum;
  static inline Sum add(Sum sum, uint32_t x, words w) {
#if defined(__AVX512VNNI__)
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
#else
    for (int i = 0; i < 4; i++) sum += (ints)(w >> (8 * i) & 255) * (int32_t)(int8_t)(x >> (8 * i));
    return sum;
#endif
  }
};

template <class T, int ROWS>
inline void tile(const uint32_t* x, int64_t n_words, const uint32_t* panel, typename T::Sum (*sums)[PANEL]) {
  typename T::Sum own[ROWS][PANEL] = {};
  for (int64_t k = 0; k < n_words; k++, panel += WIDTH) {
    words w[PANEL];
    __builtin_prefetch(panel + 16 * WIDTH);
    for (int c = 0; c < PANEL; c++) {
      w[c] = load<words>(panel + c * LANES);
#if defined(__AVX512F__)
      asm("" : "+v"(w[c]));  // GCC would load it again for each row
#endif
    }
    for (int r = 0; r < ROWS; r++)
      for (int c = 0; c < PANEL; c++) own[r][c] = T::add(own[r][c], x[r * n_words + k], w[c]);
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < PANEL; c++) sums[r][c] = own[r][c];
}

template <class T>
inline void tile_of(int n_rows, const uint32_t* x, int64_t n_words, const uint32_t* panel, typename T::Sum (*sums)[PANEL]) {
  switch (n_rows) {
    case 1: return tile<T, 1>(x, n_words, panel, sums);
    case 2: return tile<T, 2>(x, n_words, panel, sums);
#if defined(__AVX512F__)
    case 3: return tile<T, 3>(x, n_words, panel, sums);
    case 4: return tile<T, 4>(x, n_words, panel, sums);
    case 5: return tile<T, 5>(x, n_words, panel, sums);
    case 6: return tile<T, 6>(x, n_words, panel, sums);
#endif
  }
}

#if HAS_TILES
// A tile register holds 16 rows of 64 bytes. One of A has 16 words of each of 16 rows of inputs, one of B the same words
// of 16 outputs as a panel has them, one of C the 16 x 16 sums. All tiles are whole: rows that are missing in the last A
// are whatever lies there, and their sums are read by nobody.
constexpr int TILE_ROWS = 16, TILE_WORDS = 16;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

bool may_use_tiles() {  // Linux wants to be asked, for they make a thread's state larger
  static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return granted;
}

struct TileRegisters {  // a thread's, for as long as it needs them
  TileRegisters() {
    static const TileConfig config;
    if (may_use_tiles()) _tile_loadconfig(&config);
  }
  ~TileRegisters() {
    if (may_use_tiles()) _tile_release();
  }
};

// SUM += rows of tile A x outputs of tile B, by the type of the inputs
#define TILE_ADD(SUM, A, B)                                              \
  if constexpr (std::is_same_v<T, Bf16>) _tile_dpbf16ps(SUM, A, B);      \
  else _tile_dpbsud(SUM, A, B)

// Up to 16 rows with a panel.
template <class T> void by_tiles_16(const uint32_t* x, int64_t n_words, const uint32_t* panel, typename T::Sum* sums) {
  const int64_t x_bytes = 4 * n_words, panel_bytes = 4 * WIDTH;
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int64_t k = 0; k < n_words; k += TILE_WORDS, x += TILE_WORDS, panel += TILE_WORDS * WIDTH) {
    for (int i = 0; i < TILE_WORDS * PANEL; i++) __builtin_prefetch(panel + TILE_WORDS * WIDTH + i * LANES);
    _tile_loadd(4, x, x_bytes);
    _tile_loadd(5, panel, panel_bytes);
    _tile_loadd(6, panel + LANES, panel_bytes);
    TILE_ADD(0, 4, 5);
    TILE_ADD(1, 4, 6);
    _tile_loadd(7, panel + 2 * LANES, panel_bytes);
    _tile_loadd(5, panel + 3 * LANES, panel_bytes);
    TILE_ADD(2, 4, 7);
    TILE_ADD(3, 4, 5);
  }
  _tile_stored(0, sums, panel_bytes);
  _tile_stored(1, sums + 1, panel_bytes);
  _tile_stored(2, sums + 2, panel_bytes);
  _tile_stored(3, sums + 3, panel_bytes);
}

// 17 to 32 rows, half of a panel after the other.
template <class T> void by_tiles_32(const uint32_t* x, int64_t n_words, const uint32_t* panel, typename T::Sum* sums) {
  const int64_t x_bytes = 4 * n_words, panel_bytes = 4 * WIDTH;
  const uint32_t* lower = x + TILE_ROWS * n_words;
  for (int c = 0; c < PANEL; c += 2) {
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    for (int64_t k = 0; k < n_words; k += TILE_WORDS) {
      const uint32_t* outputs = panel + k * WIDTH + c * LANES;
      if (c == 0)
        for (int i = 0; i < TILE_WORDS * PANEL; i++) __builtin_prefetch(outputs + TILE_WORDS * WIDTH + i * LANES);
      _tile_loadd(4, x + k, x_bytes);
      _tile_loadd(6, outputs, panel_bytes);
      _tile_loadd(5, lower + k, x_bytes);
      _tile_loadd(7, outputs + LANES, panel_bytes);
      TILE_ADD(0, 4, 6);
      TILE_ADD(1, 4, 7);
      TILE_ADD(2, 5, 6);
      TILE_ADD(3, 5, 7);
    }
    _tile_stored(0, sums + c, panel_bytes);
    _tile_stored(1, sums + c + 1, panel_bytes);
    _tile_stored(2, sums + TILE_ROWS * PANEL + c, panel_bytes);
    _tile_stored(3, sums + TILE_ROWS * PANEL + c + 1, panel_bytes);
  }
}
#else
struct TileRegisters {
  TileRegisters() {}  // that a variable of it counts as used
};
#endif

}  // namespace

// ---- what native.py fills in ---------------------------------------------------------------------------------------

extern "C" {

constexpr int MANY = 8;  // tokens of a whole sequence

enum Kind : int32_t { EMBED, NORM, LINEAR, ATTEND, ACTIVATE };
enum Format : int32_t { FP32, BF16, INT8 };                          // of LINEAR's matrix
enum Norm : int32_t { RMS, LAYER, SCALED_LAYER };                    // NORM's format
enum Activation : int32_t { SWIGLU, GELU, GELU_TANH, GELU_QUICK };   // ACTIVATE's

struct Operation {
  int32_t kind, format;
  int32_t in, out;        // numbers of buffers; LINEAR writes the logits to buffer -1, for the scored rows only
  int32_t n_in, n_out;    // widths
  int32_t adds, layer;    // whether it adds to what `out` holds; ATTEND's layer
  float eps, padding;
  const void *weight, *bias;     // EMBED: table of ids, of positions; NORM, LINEAR: its own; ATTEND: of the norms of q, k
  const float* scale;            // LINEAR: of each output, for INT8
  const uint8_t* visible;        // ATTEND: which own positions (columns) a position (row) sees; null for all before it
};

struct Branches {
  int32_t n_rows, n_each, n_prefix, capacity;  // sequences, those of each prefix, its length; own positions at most
  const void* prefix;                          // keys and values (layer, 2, prefix, head, position, head width)
  const uint8_t* hidden;                       // of each prefix, its padding; null for none
  const int64_t* n_before;                     // of each sequence, where its own positions begin; null is 0
  void* own;                                   // keys and values (layer, 2, sequence, head, position, head width)
};

struct Call {
  int32_t n_operations, n_branches, n_sequences, n_tokens;  // tokens of each sequence
  int32_t first, n_scored, n_heads, head_width;             // first: number of the first token
  int32_t n_threads, cache_format, n_positions, causal;     // n_positions: room for the scores of a query
  const Operation* operations;
  const Branches* branches;
  const int64_t* ids;
  const float* cos_sin;  // of own positions; null for none
  float* const* buffers;
  uint32_t* packed;   // rows x words of the widest input of LINEAR
  float* row_scales;  // two numbers a row
  float* scores;      // of each thread n_positions, and of whole sequences as many for each number of a head's width
  float* logits;
};

}  // extern "C"

namespace {

// Where the threads of a step meet, some 13 times a layer. OpenMP's own barrier lets a thread that waits sleep, and where
// anything else runs on the machine each meeting then costs a turn of the scheduler: 640 ms a step instead of 10.
struct Meeting {
  std::atomic<int> n_here{0}, turn{0};
  void wait() {
    int n_threads = omp_get_num_threads(), now = turn.load(std::memory_order_acquire);
    if (n_here.fetch_add(1, std::memory_order_acq_rel) + 1 == n_threads) {
      n_here.store(0, std::memory_order_relaxed);
      turn.store(now + 1, std::memory_order_release);
      return;
    }
    for (int64_t n = 0; turn.load(std::memory_order_acquire) == now; n++)
      if (n < 1000000) relax();
      else sched_yield();
  }
  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
};

struct Share {  // of `n` things, those of one thread
  int64_t start, stop;
  Share(int64_t n) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    start = n * thread / threads, stop = n * (thread + 1) / threads;
  }
};

inline floats load_some(const float* from, int count) {  // what is missing is 0
  if (count >= LANES) return load<floats>(from);
  floats v = {};
  std::memcpy(&v, from, 4 * count);
  return v;
}

template <class V, class T> inline void store_some(T* to, V v, int count) {
  if (count >= LANES) store(to, v);
  else std::memcpy(to, &v, sizeof(T) * count);
}

// Words of a row of inputs, and of each output in a matrix: of the smaller formats a whole number of vectors.
inline int64_t per_word(const Operation& op) { return op.format == FP32 ? 1 : op.format == BF16 ? 2 : 4; }
inline int64_t words_of(const Operation& op) {
  int64_t n = (op.n_in + per_word(op) - 1) / per_word(op);
  return op.format == FP32 ? n : (n + LANES - 1) / LANES * LANES;
}

// Rows as the words that a product broadcasts; for 8 bits every row has a scale of its own.
void pack(const Call& s, const Operation& op, const float* in, int64_t row, int64_t slot) {
  const float* x = in + row * op.n_in;
  const int64_t n_words = words_of(op);
  uint32_t* out = s.packed + slot * n_words;
  std::fill(out + op.n_in / per_word(op), out + n_words, 0);
  if (op.format == FP32) {
    std::memcpy(out, x, 4 * op.n_in);
  } else if (op.format == BF16) {
    for (int i = 0; i < op.n_in; i += LANES)
      store_some((uint16_t*)out + i, to_bf16(load_some(x + i, op.n_in - i)), op.n_in - i);
  } else {
    floats tops = {};
    for (int i = 0; i < op.n_in; i += LANES) {
      floats v = load_some(x + i, op.n_in - i);
      v = v < 0.0f ? -v : v;
      tops = v > tops ? v : tops;
    }
    float top = 1e-20f;
    for (int i = 0; i < LANES; i++) top = std::max(top, tops[i]);
    const floats magic = floats{} + 12582912.0f;  // adding it rounds to whole numbers
    ints totals = {};
    for (int i = 0; i < op.n_in; i += LANES) {
      ints whole = __builtin_convertvector((load_some(x + i, op.n_in - i) * (127 / top) + magic) - magic, ints);
      totals += whole;
      store_some((int8_t*)out + i, __builtin_convertvector(whole, bytes), op.n_in - i);
    }
    int32_t total = 0;
    for (int i = 0; i < LANES; i++) total += totals[i];
    s.row_scales[2 * slot] = top / 127, s.row_scales[2 * slot + 1] = (float)(128 * total);
  }
}

inline floats scaled(const Operation&, const Call&, int64_t, int, floats sum) { return sum; }
inline floats scaled(const Operation& op, const Call& s, int64_t slot, int o, ints sum) {
  floats exact = __builtin_convertvector(sum - (int32_t)s.row_scales[2 * slot + 1], floats);
  return exact * s.row_scales[2 * slot] * load<floats>(op.scale + o);
}

#if HAS_TILES
constexpr int MOST_ROWS = 2 * TILE_ROWS;  // multiplied with a panel at once
bool uses_tiles(const Operation& op) { return op.format != FP32 && may_use_tiles(); }
#else
constexpr int MOST_ROWS = TILE;
bool uses_tiles(const Operation&) { return false; }
#endif

// Rows start .. stop times a panel. Whether by tiles depends on the operation alone, so that a row's sums do too.
template <class T>
inline void sums_of(bool in_tiles, int n_rows, const uint32_t* x, int64_t n_words, const uint32_t* panel,
                    typename T::Sum (*sums)[PANEL]) {
#if HAS_TILES
  if constexpr (!std::is_same_v<T, Fp32>)
    if (in_tiles) {
      if (n_rows <= TILE_ROWS) by_tiles_16<T>(x, n_words, panel, *sums);
      else by_tiles_32<T>(x, n_words, panel, *sums);
      return;
    }
#endif
  tile_of<T>(n_rows, x, n_words, panel, sums);
}

template <class T> void multiply(const Call& s, const Operation& op, int64_t n_rows, float* out) {
  int64_t n_words = words_of(op), n_panels = (op.n_out + WIDTH - 1) / WIDTH;
  bool in_tiles = uses_tiles(op);
  int64_t size = in_tiles ? MOST_ROWS : TILE, n_tiles = (n_rows + size - 1) / size;
  Share mine(n_panels);
  for (int64_t p = mine.start; p < mine.stop; p++) {
    const uint32_t* panel = (const uint32_t*)op.weight + p * n_words * WIDTH;
    for (int64_t t = 0; t < n_tiles; t++) {
      // tiles of equal sizes, but those of AMX are as full as they can be
      int64_t start = in_tiles ? t * size : n_rows * t / n_tiles;
      int64_t stop = in_tiles ? std::min(n_rows, start + size) : n_rows * (t + 1) / n_tiles;
      alignas(64) typename T::Sum sums[MOST_ROWS][PANEL];
      sums_of<T>(in_tiles, stop - start, s.packed + start * n_words, n_words, panel, sums);
      for (int64_t row = start; row < stop; row++)
        for (int c = 0; c < PANEL; c++) {
          int o = p * WIDTH + c * LANES, count = op.n_out - o;
          if (count <= 0) break;
          floats y = scaled(op, s, row, o, sums[row - start][c]);
          float* to = out + row * op.n_out + o;
          if (op.bias) y += load_some((const float*)op.bias + o, count);
          if (op.adds) y += load_some(to, count);
          store_some(to, y, count);
        }
    }
  }
}

void linear(const Call& s, const Operation& op, Meeting& meeting) {
  int64_t n_all = (int64_t)s.n_sequences * s.n_tokens;
  bool head = op.out < 0;
  int64_t n_rows = head ? (int64_t)s.n_sequences * s.n_scored : n_all;
  Share mine(n_rows);
  for (int64_t slot = mine.start; slot < mine.stop; slot++) {
    int64_t row = head ? slot / s.n_scored * s.n_tokens + s.n_tokens - s.n_scored + slot % s.n_scored : slot;
    pack(s, op, s.buffers[op.in], row, slot);
  }
  meeting.wait();
  float* out = head ? s.logits : s.buffers[op.out];
  if (op.format == FP32) multiply<Fp32>(s, op, n_rows, out);
  if (op.format == BF16) multiply<Bf16>(s, op, n_rows, out);
  if (op.format == INT8) multiply<Int8>(s, op, n_rows, out);
}

// The branches that a sequence is of; `sequence` becomes its number among theirs.
inline const Branches& branches_of(const Call& s, int64_t& sequence) {
  const Branches* b = s.branches;
  while (sequence >= b->n_rows) sequence -= b->n_rows, b++;
  return *b;
}

void embed(const Call& s, const Operation& op) {
  Share mine((int64_t)s.n_sequences * s.n_tokens);
  for (int64_t row = mine.start; row < mine.stop; row++) {
    const float* from = (const float*)op.weight + s.ids[row] * op.n_out;
    float* to = s.buffers[op.out] + row * op.n_out;
    std::memcpy(to, from, 4 * op.n_out);
    if (op.bias) {
      int64_t sequence = row / s.n_tokens, position = s.first + row % s.n_tokens;
      const Branches& b = branches_of(s, sequence);
      const float* place = (const float*)op.bias + (position + (b.n_before ? b.n_before[sequence] : 0)) * op.n_out;
      for (int i = 0; i < op.n_out; i++) to[i] += place[i];
    }
  }
}

inline float total_of(const float* x, int n, float shift, bool squared) {  // of x - shift or of its squares
  floats total = {};
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    floats v = load<floats>(x + i) - shift;
    total += squared ? v * v : v;
  }
  float whole = sum(total);
  for (; i < n; i++) whole += squared ? (x[i] - shift) * (x[i] - shift) : x[i] - shift;
  return whole;
}

inline void rms_norm(const float* x, float* y, const float* weight, int n, float eps) {
  float factor = 1 / std::sqrt(total_of(x, n, 0, true) / n + eps);
  for (int i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
}

// `y` may be `x`. SCALED_LAYER is LayerNorm of x / max|x|, whose variance only `eps` is compared with.
inline void layer_norm(const float* x, float* y, const float* weight, const float* bias, int n, float eps, bool scaled) {
  float top = scaled ? 1e-30f : 1;
  if (scaled)
    for (int i = 0; i < n; i++) top = std::max(top, std::fabs(x[i]));
  float mean = total_of(x, n, 0, false) / n;
  float factor = 1 / std::sqrt(total_of(x, n, mean, true) / n / top / top + eps) / top;
  for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * weight[i] + bias[i];
}

void norm(const Call& s, const Operation& op) {
  Share mine((int64_t)s.n_sequences * s.n_tokens);
  const float *weight = (const float*)op.weight, *bias = (const float*)op.bias;
  for (int64_t row = mine.start; row < mine.stop; row++) {
    float *x = s.buffers[op.in] + row * op.n_in, *y = s.buffers[op.out] + row * op.n_in;
    float* to = op.adds ? x : y;  // what is added goes by way of its input, which nothing reads again
    if (op.format == RMS) rms_norm(x, to, weight, op.n_in, op.eps);
    else layer_norm(x, to, weight, bias, op.n_in, op.eps, op.format == SCALED_LAYER);
    if (op.adds)
      for (int i = 0; i < op.n_in; i++) y[i] += to[i];
  }
}

inline floats logistic(floats x) { return 1.0f / (1.0f + exponential(-x)); }

// Abramowitz & Stegun 7.1.26 would do for pictures; this is the C library's, so that logits are those of PyTorch.
inline float exact_gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678118654752f)); }

inline floats gelu(floats x, int kind) {
  if (kind == GELU_QUICK) return x * logistic(1.702f * x);
  if (kind == GELU_TANH) return x * logistic(1.5957691216057308f * (x + 0.044715f * x * x * x));  // 1 + tanh z = 2 / (1 + e^-2z)
  for (int i = 0; i < LANES; i++) x[i] = exact_gelu(x[i]);
  return x;
}

void activate(const Call& s, const Operation& op) {  // gelu(x), or silu(first half) * second half
  Share mine((int64_t)s.n_sequences * s.n_tokens);
  for (int64_t row = mine.start; row < mine.stop; row++) {
    const float *a = s.buffers[op.in] + row * op.n_in, *b = a + op.n_out;
    float* y = s.buffers[op.out] + row * op.n_out;
    for (int i = 0; i < op.n_out; i += LANES) {
      int count = op.n_out - i;
      floats x = load_some(a + i, count);
      store_some(y + i, op.format == SWIGLU ? x * logistic(x) * load_some(b + i, count) : gelu(x, op.format), count);
    }
  }
}

// ---- attention -----------------------------------------------------------------------------------------------------

inline floats wide(const float* from) { return load<floats>(from); }
inline floats wide(const uint16_t* from) { return (floats)(__builtin_convertvector(load<halves>(from), words) << 16); }
inline void narrow(float* to, floats x) { store(to, x); }
inline void narrow(uint16_t* to, floats x) { store(to, to_bf16(x)); }

// Have the key or value that lies `ahead` of this one come from memory meanwhile.
template <int PARTS, class C> inline void fetch(const C* from, int64_t ahead) {
  for (int i = 0; i < PARTS * LANES; i += 64 / sizeof(C)) __builtin_prefetch(from + ahead + i, 0, 2);
}

template <int PARTS, class C>  // PARTS: vectors of a head
inline void score(const floats* q, const C* keys, int n, float* scores, int64_t ahead) {
  for (int j = 0; j < n; j++, keys += PARTS * LANES) {
    fetch<PARTS>(keys, ahead);
    floats total = q[0] * wide(keys);
    for (int i = 1; i < PARTS; i++) total += q[i] * wide(keys + i * LANES);
    scores[j] = sum(total);
  }
}

// As `score`, from keys that lie side by side: number `h` of them all from `h * stride` on. Up to 15 scores too many.
inline void score_side_by_side(const float* q, int H, const float* turned, int64_t stride, int n, float* scores) {
  for (int j = 0; j < n; j += LANES) {
    floats total = {};
    for (int h = 0; h < H; h++) total += q[h] * load<floats>(turned + h * stride + j);
    store(scores + j, total);
  }
}

template <int PARTS, class C>
inline void gather(floats* y, const C* values, int n, const float* weights, int64_t ahead) {
  constexpr int WAYS = PARTS <= 2 ? 4 : 2;  // sums side by side, that none waits for the one before
  floats sums[WAYS][PARTS] = {};
  int j = 0;
  for (; j + WAYS <= n; j += WAYS)
    for (int k = 0; k < WAYS; k++, values += PARTS * LANES) {
      fetch<PARTS>(values, ahead);
      for (int i = 0; i < PARTS; i++) sums[k][i] += weights[j + k] * wide(values + i * LANES);
    }
  for (; j < n; j++, values += PARTS * LANES)
    for (int i = 0; i < PARTS; i++) sums[0][i] += weights[j] * wide(values + i * LANES);
  for (int k = 0; k < WAYS; k++)
    for (int i = 0; i < PARTS; i++) y[i] += sums[k][i];
}

// Softmax of one row of scores; returns one over their sum, which the weights are yet to be multiplied by.
inline float exponentiate(float* scores, int n) {
  float top = -INFINITY;
  for (int j = 0; j < n; j++) top = std::max(top, scores[j]);
  for (int j = n; j % LANES; j++) scores[j] = -INFINITY;
  floats total = {};
  for (int j = 0; j < n; j += LANES) {
    floats weights = exponential(load<floats>(scores + j) - top);
    store(scores + j, weights);
    total += weights;
  }
  return 1 / sum(total);
}

inline void turn(float* x, const float* cosine, const float* sine, int half) {  // rotary positions
  for (int i = 0; i < half; i++) {
    float first = x[i], second = x[i + half];
    x[i] = first * cosine[i] - second * sine[i], x[i + half] = second * cosine[i] + first * sine[i];
  }
}

template <int PARTS, class C> void attend(const Call& s, const Operation& op, Meeting& meeting) {
  const int H = PARTS * LANES, half = H / 2, N = s.n_heads, D = N * H;
  const float* gains = (const float*)op.weight;
  // norms and positions of queries and keys, keys and values into the cache
  Share rows((int64_t)s.n_sequences * s.n_tokens);
  for (int64_t row = rows.start; row < rows.stop; row++) {
    int64_t sequence = row / s.n_tokens, position = s.first + row % s.n_tokens;
    const Branches& b = branches_of(s, sequence);
    float* qkv = s.buffers[op.in] + row * 3 * D;
    for (int n = 0; n < N; n++) {
      float *q = qkv + n * H, *k = q + D, *v = k + D;
      if (gains) rms_norm(q, q, gains, H, op.eps), rms_norm(k, k, gains + H, H, op.eps);
      if (s.cos_sin) {
        const float *cosine = s.cos_sin + position * H, *sine = cosine + half;
        turn(q, cosine, sine, half), turn(k, cosine, sine, half);
      }
      for (int i = 0; i < H; i++) q[i] *= 1 / std::sqrt((float)H);
      C* own = (C*)b.own + ((op.layer * 2 * b.n_rows + sequence) * N + n) * b.capacity * H + position * H;
      C* own_values = own + (int64_t)b.n_rows * N * b.capacity * H;
      for (int i = 0; i < H; i += LANES)
        narrow(own + i, load<floats>(k + i)), narrow(own_values + i, load<floats>(v + i));
    }
  }
  meeting.wait();
  // head by head, sequence by sequence: a prefix's keys stay in the CPU's cache for all sequences that share them
  Share mine((int64_t)N * s.n_sequences);
  // Of whole sequences there are many queries, for whom it pays to turn the keys. Steps sum in one order always, so that
  // it makes no difference how many tokens are read in one.
  const bool many = !s.ids && s.n_tokens >= MANY;
  float* scores = s.scores + omp_get_thread_num() * (int64_t)s.n_positions * (many ? 1 + H : 1);
  float* turned = scores + s.n_positions;
  for (int64_t at = mine.start; at < mine.stop; at++) {
    int64_t n = at / s.n_sequences, all = at % s.n_sequences, sequence = all;
    const Branches& b = branches_of(s, sequence);
    int64_t n_prefixes = b.n_rows / b.n_each, prefix = sequence / b.n_each, P = b.n_prefix;
    const C* keys = (const C*)b.prefix + ((op.layer * 2 * n_prefixes + prefix) * N + n) * P * H;
    const C* values = keys + n_prefixes * N * P * H;
    const C* own_keys = (const C*)b.own + ((op.layer * 2 * (int64_t)b.n_rows + sequence) * N + n) * b.capacity * H;
    const C* own_values = own_keys + (int64_t)b.n_rows * N * b.capacity * H;
    if (many)
      for (int j = 0; j < s.first + s.n_tokens; j++)
        for (int i = 0; i < H; i += LANES) {
          floats key = wide(own_keys + j * H + i);
          for (int k = 0; k < LANES; k++) turned[(i + k) * (int64_t)s.n_positions + j] = key[k];
        }
    const int64_t next = (int64_t)N * b.capacity * H;  // of the next sequence: each has few, here and there in memory
    for (int l = 0; l < s.n_tokens; l++) {
      int64_t row = all * s.n_tokens + l, position = s.first + l;
      int n_own = s.causal ? position + 1 : s.first + s.n_tokens;
      floats q[PARTS], y[PARTS] = {};
      for (int i = 0; i < PARTS; i++) q[i] = wide(s.buffers[op.in] + row * 3 * D + n * H + i * LANES);
      score<PARTS>(q, keys, P, scores, 0);
      if (many) score_side_by_side((const float*)q, H, turned, s.n_positions, n_own, scores + P);
      else score<PARTS>(q, own_keys, n_own, scores + P, next);
      if (b.hidden)
        for (int j = 0; j < P; j++)
          if (b.hidden[prefix * P + j]) scores[j] = -INFINITY;
      if (op.visible)
        for (int j = 0; j < n_own; j++)
          if (!op.visible[position * op.n_out + j]) scores[P + j] = -INFINITY;
      float share = exponentiate(scores, P + n_own);
      gather<PARTS>(y, values, P, scores, 0);
      gather<PARTS>(y, own_values, n_own, scores + P, next);
      for (int i = 0; i < PARTS; i++) store(s.buffers[op.out] + row * D + n * H + i * LANES, y[i] * share);
    }
  }
}

template <int PARTS> void attend_in(const Call& s, const Operation& op, Meeting& meeting) {
  if (s.cache_format == BF16) attend<PARTS, uint16_t>(s, op, meeting);
  else attend<PARTS, float>(s, op, meeting);
}

void attend_of(const Call& s, const Operation& op, Meeting& meeting) {
  switch (s.head_width / LANES) {
    case 1: return attend_in<1>(s, op, meeting);
    case 2: return attend_in<2>(s, op, meeting);
    case 3: return attend_in<3>(s, op, meeting);
    case 4: return attend_in<4>(s, op, meeting);
    case 5: return attend_in<5>(s, op, meeting);
    case 6: return attend_in<6>(s, op, meeting);
    case 8: return attend_in<8>(s, op, meeting);
  }
}

}  // namespace

extern "C" void vqt2i_run(const Call* call) {
  const Call& s = *call;
  Meeting meeting;
#pragma omp parallel num_threads(s.n_threads)
  {
    TileRegisters tiles;
    for (int i = 0; i < s.n_operations; i++) {
      const Operation& op = s.operations[i];
      switch (op.kind) {
        case EMBED: embed(s, op); break;
        case NORM: norm(s, op); break;
        case LINEAR: linear(s, op, meeting); break;
        case ATTEND: attend_of(s, op, meeting); break;
        case ACTIVATE: activate(s, op); break;
      }
      meeting.wait();
    }
  }
}
