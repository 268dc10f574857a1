// The CPU forms of the kernels of a decoding step: what takes PyTorch many small operations and passes, in one.
//
// Each function computes what the PyTorch reference in the Python file of its name computes; kernels/compiled.py builds
// and calls this file. T is float or bf16; arithmetic is float32, and results are rounded to T where the model's own
// operations round. A row's result is a function of that row alone, in one order of operations: the number of rows and
// threads changes no bit. A Vector is one register of the processor that the file is compiled for: compilers keep what
// is wider in memory, not in several registers.
//
// M rows, D width, H query heads, K key/value heads, R = H / K, E head dimension, P pages in a slot's table, V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

using i64 = int64_t;
constexpr i64 PAGE = 16;     // keys in a page of the cache
constexpr i64 PANEL = 16;    // rows of a matrix that are laid out together
// Numbers in a register, and what all registers hold of a product (rows of x, columns) and of scores (pages of keys).
#if defined __AVX512F__
constexpr i64 LANES = 16, ROWS = 8, COLUMNS = 2 * PANEL, PAGES = 2;
#elif defined __AVX__
constexpr i64 LANES = 8, ROWS = 6, COLUMNS = PANEL, PAGES = 1;
#else
constexpr i64 LANES = 4, ROWS = 6, COLUMNS = PANEL, PAGES = 1;
#endif
constexpr i64 TALL = 128;    // rows that meet a part of a matrix before the next ones do
constexpr i64 LONG = 2048;   // of a float32 sum, then added to the rest: over a vocabulary it would lose a digit
constexpr i64 AHEAD = 8;     // pages between the one that is read and the one that is fetched from memory
constexpr i64 PREFILL = 64;  // tokens of a prompt that go through a small model together
constexpr i64 BLOCK = 128;   // of the vocabulary, as in kernels/lm_head.py
constexpr i64 SMALL = 1 << 15;  // numbers; on fewer a second thread costs more than it takes over
enum { TARGET = 2, DRAW = 3, GREEDY = 4 };  // as in kernels/lm_head.py

// --- Registers of LANES numbers ---------------------------------------------------------------------------------------

using Vector = float __attribute__((vector_size(LANES * 4)));
using Words = uint32_t __attribute__((vector_size(LANES * 4)));
using Integers = int32_t __attribute__((vector_size(LANES * 4)));
using Halves = uint16_t __attribute__((vector_size(LANES * 2)));

struct bf16 { uint16_t bits; };

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline Vector load(const float* x) {
  Vector y;
  std::memcpy(&y, x, sizeof y);
  return y;
}
inline Vector widen(Halves x) {  // from bfloat16
#if defined __AVX512F__  // two instructions, of which a compiler makes six
  return (Vector)((Words)_mm512_cvtepu16_epi32((__m256i)x) << 16);
#elif defined __AVX2__
  return (Vector)((Words)_mm256_cvtepu16_epi32((__m128i)x) << 16);
#else
  return (Vector)(__builtin_convertvector(x, Words) << 16);
#endif
}
inline Vector load(const bf16* x) {
  Halves y;
  std::memcpy(&y, x, sizeof y);
  return widen(y);
}

inline Halves narrow(Vector x) {  // to bfloat16: the nearest, ties to even
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
  const Words bits = (Words)x, up = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return __builtin_convertvector(x == x ? up : Words{} + 0x7fc0, Halves);
#endif
}
inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }
inline void store(bf16* to, Vector x) {
  const Halves y = narrow(x);
  std::memcpy(to, &y, sizeof y);
}

// The first n of LANES numbers, for the end of a row; `rest` stands for the others.
template <class T> inline Vector load(const T* x, i64 n, float rest) {
  if (n >= LANES) return load(x);
  T some[LANES];
  std::memcpy(some, x, n * sizeof(T));
  Vector y = load(some);
  for (i64 l = n; l < LANES; ++l) y[l] = rest;
  return y;
}
template <class T> inline void store(T* to, Vector x, i64 n) {
  if (n >= LANES) return store(to, x);
  T some[LANES];
  store(some, x);
  std::memcpy(to, some, n * sizeof(T));
}

// To T and back. The compiler may fuse a product with the sum it goes into, but not through this.
template <class T> inline Vector rounded(Vector x) {
  if (std::is_same<T, bf16>()) return widen(narrow(x));
  asm("" : "+m"(x));
  return x;
}

// Both halves of a register, put together by `join`, and again, down to one number.
template <class Join> inline float folded(Vector x, Join join) {
  float a[LANES];
  store(a, x);
  for (i64 half = LANES / 2; half; half /= 2)
    for (i64 l = 0; l < half; ++l) a[l] = join(a[l], a[l + half]);
  return a[0];
}
inline float total(Vector x) {
#if defined __AVX512F__  // the same sums, in registers
  return _mm512_reduce_add_ps((__m512)x);
#endif
  return folded(x, [](auto a, auto b) { return a + b; });
}
inline float most(Vector x) {
#if defined __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#endif
  return folded(x, [](auto a, auto b) { return a > b ? a : b; });
}

// x in the lanes that are numbers begin to end of a row, of which it is number t and what follows; -inf in the others.
inline Vector within(Vector x, i64 t, i64 begin, i64 end) {
  Integers place;
  for (int l = 0; l < LANES; ++l) place[l] = l;
  place += int32_t(t);
  x = place < int32_t(end) ? x : Vector{} - INFINITY;
  return place >= int32_t(begin) ? x : Vector{} - INFINITY;
}

// e^x by 2^n e^r with |r| <= ln 2 / 2, to 1 ulp (the polynomial is that of Cephes's expf); 0 below -87; x at most 88.
inline Vector exponential(Vector x) {
  const Vector y = x < -87.0f ? Vector{} - 87.0f : x;
  const Vector n = y * 1.44269504f + 12582912.0f - 12582912.0f;
  const Vector r = y - n * 0.693359375f + n * 2.12194440e-4f;  // the first product is exact
  Vector p = Vector{} + 1.9875691500e-4f;
  for (float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + coefficient;
  p = p * (r * r) + r + 1.0f;
  const Vector power = (Vector)((__builtin_convertvector(n, Integers) + 127) << 23);
  return x < -87.0f ? Vector{} : p * power;
}

// An equal share of `all` for every thread, in multiples of `step`.
inline i64 equal_share(i64 all, i64 step = ROWS) {
#ifdef _OPENMP
  const i64 threads = omp_get_max_threads();
#else
  const i64 threads = 1;
#endif
  return (all + threads * step - 1) / (threads * step) * step;
}

// work(first, last) for all rows, `chunk` at a time; on one thread if there are few numbers to be computed.
template <class Work> inline void share(i64 rows, i64 numbers, i64 chunk, Work work) {
  if (numbers <= SMALL) return work(0, rows);
#pragma omp parallel for schedule(dynamic)
  for (i64 m = 0; m < rows; m += chunk) work(m, std::min(rows, m + chunk));
}

// --- Between the matrix products --------------------------------------------------------------------------------------

// out = weight * round(x / sqrt(mean(x^2) + eps)) of one row
template <class T> inline void norm(const T* x, const T* weight, T* out, float eps, i64 n) {
  Vector sum = {};
  for (i64 i = 0; i < n; i += LANES) {
    const Vector y = load(x + i, n - i, 0.0f);
    sum += y * y;
  }
  const float scale = 1.0f / std::sqrt(total(sum) / n + eps);
  for (i64 i = 0; i < n; i += LANES)
    store(out + i, load(weight + i, n - i, 0.0f) * rounded<T>(load(x + i, n - i, 0.0f) * scale), n - i);
}

// Rows m to last of x + delta, which is kept in `residual`, normed.
template <class T>
inline void add_and_norm(const T* x, const T* delta, const T* weight, T* residual, T* out, float eps, i64 m, i64 last,
                         i64 D) {
  for (; m < last; ++m) {
    const T* row = x + m * D;
    if (delta) {
      for (i64 i = 0; i < D; i += LANES)
        store(residual + m * D + i, load(row + i, D - i, 0.0f) + load(delta + m * D + i, D - i, 0.0f), D - i);
      row = residual + m * D;
    }
    norm(row, weight, out + m * D, eps, D);
  }
}

template <class T>
void add_rms_norm(const T* x, const T* delta, const T* weight, T* residual, T* out, float eps, i64 M, i64 D) {
  share(M, M * D, equal_share(M), [&](i64 m, i64 last) { add_and_norm(x, delta, weight, residual, out, eps, m, last, D); });
}

constexpr i64 SUMMED = 128;  // rows whose share of a weight's gradient is summed up together, whatever the threads

// Of the rows first to last: dx = (w dy - n mean(w dy n)) / root, n = x / root, and their dy n are added to d_weight.
template <class T>
inline void norm_gradient(const T* x, const T* weight, const T* d_y, T* d_x, float* d_weight, float eps, i64 m, i64 last,
                          i64 D) {
  for (; m < last; ++m) {
    const T *row = x + m * D, *given = d_y + m * D;
    Vector squares = {}, products = {};
    for (i64 i = 0; i < D; i += LANES) {
      const Vector a = load(row + i, D - i, 0.0f);
      squares += a * a;
      products += a * load(given + i, D - i, 0.0f) * load(weight + i, D - i, 0.0f);
    }
    const float scale = 1.0f / std::sqrt(total(squares) / D + eps), mean = total(products) / D * scale * scale;
    for (i64 i = 0; i < D; i += LANES) {
      const Vector a = load(row + i, D - i, 0.0f), g = load(given + i, D - i, 0.0f);
      store(d_x + m * D + i, (load(weight + i, D - i, 0.0f) * g - a * mean) * scale, D - i);
      store(d_weight + i, load(d_weight + i, D - i, 0.0f) + g * a * scale, D - i);
    }
  }
}
template <class T>
void rms_norm_gradient(const T* x, const T* weight, const T* d_y, T* d_x, T* d_weight, float eps, i64 M, i64 D) {
  const i64 parts = (M + SUMMED - 1) / SUMMED;
  std::vector<float> sums(parts * D);
  share(parts, M * D, 1, [&](i64 part, i64 last) {
    for (; part < last; ++part)
      norm_gradient(x, weight, d_y, d_x, &sums[part * D], eps, part * SUMMED, std::min(M, (part + 1) * SUMMED), D);
  });
  for (i64 i = 0; i < D; i += LANES) {
    Vector sum = {};
    for (i64 part = 0; part < parts; ++part) sum += load(&sums[part * D + i], D - i, 0.0f);
    store(d_weight + i, sum, D - i);
  }
}

template <class T> inline void gate(const T* gate_up, T* out, i64 m, i64 last, i64 F) {
  for (; m < last; ++m) {
    const T *gate = gate_up + 2 * m * F, *up = gate + F;
    for (i64 i = 0; i < F; i += LANES) {
      const Vector z = load(gate + i, F - i, 0.0f), silu = z / (1.0f + exponential(-z > 88.0f ? Vector{} + 88.0f : -z));
      store(out + m * F + i, rounded<T>(silu) * load(up + i, F - i, 0.0f), F - i);
    }
  }
}

template <class T> void swiglu(const T* gate_up, T* out, i64 M, i64 F) {
  share(M, M * F, equal_share(M), [&](i64 m, i64 last) { gate(gate_up, out, m, last, F); });
}

template <class T> void swiglu_gradient(const T* gate_up, const T* d_y, T* d_gate_up, i64 M, i64 F) {
  share(M, M * F, equal_share(M), [&](i64 m, i64 last) {
    for (; m < last; ++m) {
      const T *gate = gate_up + m * 2 * F, *up = gate + F;
      T* to = d_gate_up + m * 2 * F;
      for (i64 i = 0; i < F; i += LANES) {
        const i64 n = F - i;
        const Vector z = load(gate + i, n, 0.0f), d = load(d_y + m * F + i, n, 0.0f);
        const Vector s = 1.0f / (1.0f + exponential(-z > 88.0f ? Vector{} + 88.0f : -z));
        store(to + i, d * load(up + i, n, 0.0f) * s * (1.0f + z * (1.0f - s)), n);
        store(to + F + i, d * z * s, n);
      }
    }
  });
}

// --- The cache: keys [pages, K, E, PAGE], values [pages, K, PAGE, E], tables of pages [slots, P] ------------------------

template <class T> struct Cache {
  T *keys, *values;
  const int32_t* table;
  i64 K, E, P;

  T* key_page(i64 slot, i64 p, i64 k) const { return keys + (table[slot * P + p] * K + k) * PAGE * E; }
  T* value_page(i64 slot, i64 p, i64 k) const { return values + (table[slot * P + p] * K + k) * PAGE * E; }
};

template <class T>
inline void rotate_and_write(const T* qkv, const int32_t* position, const int32_t* slot, const T* cos, const T* sin,
                             const T* q_weight, const T* k_weight, T* q, const Cache<T>& cache, float eps, i64 m,
                             i64 last, i64 H) {
  const i64 K = cache.K, E = cache.E, half = E / 2;
  std::vector<T> normed(E), rotated(E);
  for (; m < last; ++m) {
    if (position[m] < 0) {  // an idle row
      std::fill_n(q + m * H * E, H * E, T{});
      continue;
    }
    const T *c = cos + position[m] * E, *s = sin + position[m] * E;
    const i64 page = position[m] / PAGE, t = position[m] % PAGE;
    for (i64 h = 0; h < H + K; ++h) {
      const T* x = qkv + (m * (H + 2 * K) + h) * E;
      if (q_weight) {
        norm(x, h < H ? q_weight : k_weight, normed.data(), eps, E);
        x = normed.data();
      }
      T* to = h < H ? q + (m * H + h) * E : rotated.data();
      for (i64 i = 0; i < half; i += LANES) {
        const i64 n = half - i;
        const Vector a = load(x + i, n, 0.0f), b = load(x + half + i, n, 0.0f);
        const Vector u = load(c + i, n, 0.0f), v = load(s + i, n, 0.0f);  // both halves of them are alike
        store(to + i, rounded<T>(a * u) - rounded<T>(b * v), n);
        store(to + half + i, rounded<T>(b * u) + rounded<T>(a * v), n);
      }
      if (h < H) continue;
      T* key = cache.key_page(slot[m], page, h - H) + t;
      for (i64 i = 0; i < E; ++i) key[i * PAGE] = to[i];
    }
    for (i64 k = 0; k < K; ++k)
      std::copy_n(qkv + (m * (H + 2 * K) + H + K + k) * E, E, cache.value_page(slot[m], page, k) + t * E);
  }
}

template <class T>
void rope_write(const T* qkv, const int32_t* position, const int32_t* slot, const T* cos, const T* sin,
                const T* q_weight, const T* k_weight, T* q, T* keys, T* values, const int32_t* table, float eps,
                i64 M, i64 H, i64 K, i64 E, i64 P) {
  const Cache<T> cache{keys, values, table, K, E, P};
  share(M, M * (H + K) * E, equal_share(M), [&](i64 m, i64 last) {
    rotate_and_write(qkv, position, slot, cos, sin, q_weight, k_weight, q, cache, eps, m, last, H);
  });
}

// Fetch n numbers into the cache.
template <i64 n, class T> inline void fetch(const T* x) {
  for (i64 i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(x + i);
}

// score[n][t] = sum_e query[n][e] key[e][t] for N queries and the keys of `pages` pages; what `next` names is fetched
// meanwhile
template <i64 N, i64 pages, class T>
inline void page_scores(const float* query, const T* const* key, const T* const* next, float* score, i64 stride, i64 E) {
  for (i64 t = 0; t < PAGE; t += LANES) {
    Vector even[pages][N] = {}, odd[pages][N] = {};
    for (i64 e = 0; e < E; e += 2)
      for (i64 p = 0; p < pages; ++p) {
        if (!t) fetch<2 * PAGE>(next[p] + e * PAGE);
        const Vector a = load(key[p] + e * PAGE + t), b = load(key[p] + (e + 1) * PAGE + t);
        for (i64 n = 0; n < N; ++n) {
          even[p][n] += query[n * E + e] * a;
          odd[p][n] += query[n * E + e + 1] * b;
        }
      }
    for (i64 p = 0; p < pages; ++p)
      for (i64 n = 0; n < N; ++n) store(score + n * stride + p * PAGE + t, even[p][n] + odd[p][n]);
  }
}

// sum[n][e] += sum_t weight[n][t] value[t][e] for N queries and `tokens` values of a page; `next` as above
template <i64 N, class T>
inline void page_values(const float* weight, const T* value, const T* next, float* sum, i64 stride, i64 tokens, i64 E) {
  i64 e = 0;
  for (; e + 2 * LANES <= E; e += 2 * LANES) {
    Vector left[N], right[N];
    for (i64 n = 0; n < N; ++n) left[n] = load(sum + n * E + e), right[n] = load(sum + n * E + e + LANES);
    for (i64 t = 0; t < tokens; ++t) {
      fetch<2 * LANES>(next + t * E + e);
      const Vector a = load(value + t * E + e), b = load(value + t * E + e + LANES);
      for (i64 n = 0; n < N; ++n) {
        left[n] += weight[n * stride + t] * a;
        right[n] += weight[n * stride + t] * b;
      }
    }
    for (i64 n = 0; n < N; ++n) store(sum + n * E + e, left[n]), store(sum + n * E + e + LANES, right[n]);
  }
  for (; e < E; e += LANES)
    for (i64 n = 0; n < N; ++n) {
      Vector o = load(sum + n * E + e, E - e, 0.0f);
      for (i64 t = 0; t < tokens; ++t) o += weight[n * stride + t] * load(value + t * E + e, E - e, 0.0f);
      store(sum + n * E + e, o, E - e);
    }
}

// work(r, N) for r = 0, 4, ..: N = 4 query heads at a time, and what is left over
template <class Work> inline void in_fours(i64 R, Work work) {
  i64 r = 0;
  for (; r + 4 <= R; r += 4) work(r, std::integral_constant<i64, 4>());
  if (R - r == 3) work(r, std::integral_constant<i64, 3>());
  if (R - r == 2) work(r, std::integral_constant<i64, 2>());
  if (R - r == 1) work(r, std::integral_constant<i64, 1>());
}

// s -> exp(s - max s) of n scores, a multiple of LANES; returns their sum
inline float exponentials(float* s, i64 n) {
  Vector tops = load(s), sum = {};
  for (i64 t = LANES; t < n; t += LANES) tops = load(s + t) > tops ? load(s + t) : tops;
  const float top = most(tops);
  for (i64 t = 0; t < n; t += LANES) {
    const Vector e = exponential(load(s + t) - top);
    store(s + t, e);
    sum += e;
  }
  return total(sum);
}

// Row m sees the first length[m] keys, or the last `window` of these. The query heads of a key head go through a page
// together, and neighbouring rows, which read the same prompt's keys, one after the other.
template <class T>
inline void attend_rows(const T* q, const Cache<T>& cache, const int32_t* slot, const int32_t* length, T* out,
                        i64 window, i64 first_row, i64 last_row, i64 H) {
  const i64 K = cache.K, E = cache.E, R = H / K;
  const float scale = 1.0f / std::sqrt(float(E));
  std::vector<float> query(R * E), sum(R * E), mass(R), score;
  for (i64 k = 0; k < K; ++k)
    for (i64 m = first_row; m < last_row; ++m) {
      const i64 end = length[m], first = window ? std::max<i64>(0, end - window) : 0;
      const T* from = q + (m * H + k * R) * E;
      T* to = out + (m * H + k * R) * E;
      if (!end) {  // an idle row
        std::fill_n(to, R * E, T{});
        continue;
      }
      for (i64 i = 0; i < R * E; i += LANES) store(&query[i], load(from + i, R * E - i, 0.0f) * scale, R * E - i);

      const i64 low = first / PAGE, high = (end + PAGE - 1) / PAGE, pages = high - low, stride = pages * PAGE;
      score.resize(R * stride);
      const i64 follower = m + 1 < last_row && length[m + 1] ? m + 1 : m;
      // What is read i pages after the row's first one: its keys, its values, the next row's keys.
      const auto page = [&](i64 i) -> const T* {
        if (i < pages) return cache.key_page(slot[m], low + i, k);
        if (i < 2 * pages) return cache.value_page(slot[m], low + i - pages, k);
        return cache.key_page(slot[follower], low + std::min(i - 2 * pages, pages - 1), k);
      };
      for (i64 p = low; p < high; p += PAGES) {
        const i64 i = p - low;
        const T *now[] = {page(i), page(i + 1)}, *next[] = {page(i + AHEAD), page(i + AHEAD + 1)};
        in_fours(R, [&](i64 r, auto n) {
          float* to_page = &score[r * stride + (p - low) * PAGE];
          if (p + PAGES <= high)
            page_scores<n(), PAGES>(&query[r * E], now, next, to_page, stride, E);
          else
            page_scores<n(), 1>(&query[r * E], now, next, to_page, stride, E);
        });
      }
      for (i64 r = 0; r < R; ++r) {
        float* s = &score[r * stride];
        std::fill(s, s + first - low * PAGE, -INFINITY);
        std::fill(s + end - low * PAGE, s + stride, -INFINITY);
        mass[r] = exponentials(s, stride);
      }
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (i64 p = low; p < high; ++p) {
        const T *value = page(pages + p - low), *next = page(pages + p - low + AHEAD);
        const i64 start = std::max(first, p * PAGE), tokens = std::min(end, (p + 1) * PAGE) - start;
        in_fours(R, [&](i64 r, auto n) {
          const float* weight = &score[r * stride + start - low * PAGE];
          page_values<n()>(weight, value + start % PAGE * E, next, &sum[r * E], stride, tokens, E);
        });
      }
      for (i64 r = 0; r < R; ++r)
        for (i64 e = 0; e < E; e += LANES) store(to + r * E + e, load(&sum[r * E + e], E - e, 0.0f) / mass[r], E - e);
    }
}

template <class T>
void attend(const T* q, T* keys, T* values, const int32_t* table, const int32_t* slot, const int32_t* length, T* out,
            i64 window, i64 M, i64 H, i64 K, i64 E, i64 P) {
  const Cache<T> cache{keys, values, table, K, E, P};
  share(M, M * H * E * PAGE, 8, [&](i64 m, i64 last) {
    attend_rows(q, cache, slot, length, out, window, m, last, H);
  });
}

// --- From logits to tokens, logprobs and entropies --------------------------------------------------------------------

// The first of n weights whose running sum exceeds the level, never one without weight.
template <class W> inline i64 invert(const W* weight, i64 n, double level) {
  double running = 0.0;
  i64 last = n - 1;  // among NaN
  for (i64 i = 0; i < n; ++i) {
    running += weight[i];
    if (weight[i] > 0) last = i;
    if (weight[i] > 0 && running > level) break;
  }
  return last;
}

// What is known of rows: token is read in mode TARGET, else written.
struct Drawn {
  i64* token;
  float *logprob, *entropy, *logsumexp;
};

// softmax [M, V] may be null, or in mode TARGET the logits.
template <class T>
inline void draw(const T* logits, const float* u, const Drawn& drawn, float* softmax, float temperature, i64 mode, i64 m,
                 i64 last, i64 V) {
  const i64 blocks = (V + BLOCK - 1) / BLOCK;
  std::vector<float> room(softmax ? 0 : V);
  std::vector<double> mass(blocks);
  for (; m < last; ++m) {
    i64& token = drawn.token[m];
    float* w = softmax ? softmax + m * V : room.data();
    Vector tops = Vector{} - INFINITY;
    for (i64 v = 0; v < V; v += LANES) {
      const Vector z = load(logits + m * V + v, V - v, -INFINITY) / temperature;
      store(w + v, z, V - v);
      tops = z > tops ? z : tops;
    }
    const float top = most(tops);
    if (mode == GREEDY) token = std::min<i64>(std::find(w, w + V, top) - w, V - 1);
    const bool given = mode != DRAW && token >= 0 && token < V;
    float chosen = given ? w[token] : NAN;

    double sum = 0.0, moment = 0.0;
    for (i64 b = 0; b < blocks; ++b) {
      Vector weights = {}, moments = {};
      for (i64 v = b * BLOCK; v < std::min(V, (b + 1) * BLOCK); v += LANES) {
        const Vector z = load(w + v, V - v, -INFINITY) - top, e = exponential(z);
        store(w + v, e, V - v);
        weights += e;
        moments += e > 0.0f ? z * e : Vector{};
      }
      sum += mass[b] = total(weights);
      moment += total(moments);
    }
    if (mode == DRAW) {
      const i64 first = invert(mass.data(), blocks, u[2 * m] * sum) * BLOCK, n = std::min(BLOCK, V - first);
      token = first + invert(w + first, n, u[2 * m + 1] * mass[first / BLOCK]);
      chosen = wide(logits[m * V + token]) / temperature;
    }
    const float log_total = float(std::log(sum));
    drawn.logprob[m] = chosen - top - log_total;
    drawn.entropy[m] = log_total - float(moment / sum);
    drawn.logsumexp[m] = top + log_total;
    const float scale = float(1.0 / sum);
    if (softmax)
      for (i64 v = 0; v < V; ++v) w[v] *= scale;
  }
}

template <class T>
void lm_head(const T* logits, const float* u, i64* token, float* logprob, float* entropy, float* logsumexp,
             float* softmax, float temperature, i64 mode, i64 M, i64 V) {
  const Drawn drawn{token, logprob, entropy, logsumexp};
  share(M, M * V, equal_share(M), [&](i64 m, i64 last) { draw(logits, u, drawn, softmax, temperature, mode, m, last, V); });
}

// --- Matrix products --------------------------------------------------------------------------------------------------

// What a product takes at a time: of a row of x one float32 or two bfloat16 numbers, of W what they meet in LANES
// of its rows.
inline float entries(const float* x) { return *x; }
inline Vector column(const float* w) { return load(w); }
inline Vector add_product(Vector sum, float x, Vector w) { return sum + x * w; }
#ifdef __AVX512BF16__
inline __m512bh entries(const bf16* x) {
  int32_t two;
  std::memcpy(&two, x, 4);
  return (__m512bh)_mm512_set1_epi32(two);
}
inline __m512bh column(const bf16* w) { return (__m512bh)_mm512_loadu_si512(w); }
inline Vector add_product(Vector sum, __m512bh x, __m512bh w) { return (Vector)_mm512_dpbf16_ps((__m512)sum, x, w); }
#endif

// Of a product: rows of x are `across` numbers apart, and what follows in a row `along`; panels are `depth` columns of
// W long, of which D meet x.
struct Product {
  i64 N, D, across, along = 1, depth = D;
  bool add = false;
};

// Columns n to last_column of y = x W^T + b for rows first to last, or what y has and x W^T. W [N, D] lies in panels, of
// each row S numbers of four bytes after one another: [ceil(N / PANEL), D / S, PANEL, S]. An element is one sum over D in
// order: ROWS rows are always worked on together, the last one standing in for those that lack. The next panels are
// fetched meanwhile.
template <class T>
inline void multiply(const T* x, const T* panels, const T* bias, T* y, i64 first, i64 last, i64 n, i64 last_column,
                     const Product& of) {
  constexpr i64 S = 4 / sizeof(T), PARTS = COLUMNS / LANES;
  const i64 N = of.N, D = of.D, along = of.along;
  const auto panel = [&](i64 at) { return panels + std::min(at, N - 1) / PANEL * PANEL * of.depth; };
  for (; n < last_column; n += COLUMNS)
    for (i64 m = first, ahead = n + COLUMNS; m < last; m += ROWS, ahead += PANEL) {
      const T *row[ROWS], *now[PARTS], *next = panel(ahead < n + 2 * COLUMNS ? ahead : n);
      for (i64 i = 0; i < ROWS; ++i) row[i] = x + std::min(m + i, last - 1) * of.across;
      for (i64 p = 0; p < PARTS; ++p) now[p] = panel(n + p * LANES) + p * LANES % PANEL * S;
      Vector sum[PARTS][ROWS] = {};
      for (i64 d = 0, at = 0; d < D; d += S, at += S * along) {
        __builtin_prefetch(next + d * PANEL);
        decltype(column(x)) w[PARTS];
        for (i64 p = 0; p < PARTS; ++p) w[p] = column(now[p] + d * PANEL);
        for (i64 i = 0; i < ROWS; ++i) {
          const auto z = entries(row[i] + at);
          for (i64 p = 0; p < PARTS; ++p) sum[p][i] = add_product(sum[p][i], z, w[p]);
        }
      }
      for (i64 i = 0; i < std::min(ROWS, last - m); ++i)
        for (i64 p = 0; p < PARTS; ++p) {
          const i64 at = n + p * LANES, more = N - at;
          if (more <= 0) continue;
          T* to = y + (m + i) * N + at;
          if (bias) sum[p][i] += load(bias + at, more, 0.0f);
          if (of.add) sum[p][i] += load(to, more, 0.0f);
          store(to, sum[p][i], more);
        }
    }
}

template <class T>
void linear(const T* x, const T* panels, const T* bias, T* y, i64 M, i64 N, i64 D, i64 across, i64 along, i64 add) {
  const i64 some = sizeof(T) == 4 ? LONG : D;  // in bfloat16 the parts would be rounded
  const auto part = [&](i64 m, i64 last_row, i64 n, i64 last_column) {
    for (; m < last_row; m += TALL) {
      const i64 last = std::min(last_row, m + TALL);
      i64 d = 0;
      do {
        const Product of{N, std::min(D - d, some), across, along, D, add || d};
        multiply(x + d * along, panels + d * PANEL, d ? nullptr : bias, y, m, last, n, last_column, of);
      } while ((d += some) < D);
    }
  };
  const i64 numbers = M * N * D / LANES;
  if (M > N)  // as in training
    share(M, numbers, equal_share(M, TALL), [&](i64 m, i64 last) { part(m, last, 0, N); });
  else
    share(N, numbers, equal_share(N, COLUMNS), [&](i64 n, i64 last) { part(0, M, n, last); });
}

// --- Attention in training --------------------------------------------------------------------------------------------

using Numbers = std::vector<float>;

// Of N tokens the heads [N, H + 2 K, E], queries, keys and values, and cos and sin [N, E] of their positions, both halves
// of a row alike.
template <class T> struct Heads {
  T* heads;
  const T *cos, *sin;
  i64 H, K, E;

  T* at(i64 token, i64 head) const { return heads + (token * (H + 2 * K) + head) * E; }
  bool rotates(i64 head) const { return head < H + K; }

  // The rows of a head from a token on, rotated unless they are values, as float32 times a scale.
  void read(i64 token, i64 rows, i64 head, float scale, float* to) const {
    for (const i64 last = token + rows; token < last; ++token, to += E)
      turned(at(token, head), token, head, 1.0f, scale, to);
  }
  // And their gradients from those of the rotated ones: what was turned is turned back.
  void write(const float* x, i64 token, i64 rows, i64 head, float scale) const {
    for (const i64 last = token + rows; token < last; ++token, x += E)
      turned(x, token, head, -1.0f, scale, at(token, head));
  }
  template <class From, class To>
  void turned(const From* x, i64 token, i64 head, float direction, float scale, To* to) const {
    const T *c = cos + token * E, *s = sin + token * E;
    const i64 half = rotates(head) ? E / 2 : 0;
    for (i64 i = 0; i < half; i += LANES) {
      const i64 n = half - i;
      const Vector a = load(x + i, n, 0.0f) * scale, b = load(x + half + i, n, 0.0f) * scale;
      const Vector u = load(c + i, n, 0.0f), v = load(s + i, n, 0.0f) * direction;
      store(to + i, a * u - b * v, n);
      store(to + half + i, b * u + a * v, n);
    }
    for (i64 i = 2 * half; i < E; i += LANES) store(to + i, load(x + i, E - i, 0.0f) * scale, E - i);
  }
};

// Rows of a tensor [N, H, E] as float32.
template <class T> inline void read_rows(const T* x, i64 apart, i64 rows, i64 E, float* to) {
  for (i64 m = 0; m < rows; ++m)
    for (i64 e = 0; e < E; e += LANES) store(to + m * E + e, load(x + m * apart + e, E - e, 0.0f), E - e);
}

// What multiply takes for x X^T and for x X, of X [N, D]: its rows, or its columns, side by side in panels.
inline void lay_rows(const Numbers& x, i64 N, i64 D, Numbers& to) {
  to.resize((N + PANEL - 1) / PANEL * PANEL * D);
  for (i64 n = 0; n < N; n += PANEL)
    for (i64 d = 0; d < D; ++d)
      for (i64 l = 0; l < PANEL; ++l) to[n * D + d * PANEL + l] = x[std::min(n + l, N - 1) * D + d];
}
inline void lay_columns(const Numbers& x, i64 N, i64 D, Numbers& to) {
  to.assign((D + PANEL - 1) / PANEL * PANEL * N, 0.0f);
  for (i64 d = 0; d < D; d += PANEL)
    for (i64 n = 0; n < N; ++n) std::copy_n(&x[n * D + d], std::min(PANEL, D - d), &to[(d / PANEL * N + n) * PANEL]);
}

// A piece of a row of tokens: `length` of them from `start`, which see themselves and those before them, and before these
// `before` tokens from `begin`, all of the piece that it goes on from. Numbered from the latter on there are T keys, of
// which query r sees those from `from` to `to`, the last `window` if that is not 0.
struct Piece {
  i64 start, length, origin, begin = 0, before = 0, window, T;

  Piece(const i64* table, i64 s, i64 window) : start(table[3 * s]), length(table[3 * s + 1]), origin(table[3 * s + 2]),
    window(window) {
    if (origin >= 0) begin = table[3 * origin], before = table[3 * origin + 1];
    T = before + length;
  }
  i64 from(i64 r) const { return window ? std::max<i64>(0, before + r + 1 - window) : 0; }
  i64 to(i64 r) const { return before + r + 1; }
  i64 room() const { return (T + PANEL - 1) / PANEL * PANEL; }  // numbers in a row of scores: whole registers
  template <class T> void read_keys(const Heads<T>& of, i64 head, Numbers& to) const {
    to.resize(this->T * of.E);
    of.read(begin, before, head, 1.0f, to.data());
    of.read(start, length, head, 1.0f, &to[before * of.E]);
  }
};

constexpr i64 TOGETHER = 64;  // queries that meet the keys together: their scores stay in the second cache

// work(r, n, from, to) for every TOGETHER queries r to r + n, which see some of the keys from `from` to `to`.
template <class Work> inline void by_queries(const Piece& c, Work work) {
  for (i64 r = 0; r < c.length; r += TOGETHER) {
    const i64 n = std::min(TOGETHER, c.length - r);
    work(r, n, c.from(r), c.to(r + n - 1));
  }
}

// The greatest score of the keys begin to end.
inline float greatest(const float* score, i64 begin, i64 end) {
  Vector tops = Vector{} - INFINITY;
  for (i64 t = begin / LANES * LANES; t < end; t += LANES) {
    const Vector z = within(load(score + t), t, begin, end);
    tops = z > tops ? z : tops;
  }
  return most(tops);
}

// p = e^(score - shift) of the keys begin to end, 0 of the others that this or another query sees, from `from` to `to`,
// whole registers of them; the sum.
inline float weigh(float* p, float shift, i64 begin, i64 end, i64 from, i64 to) {
  Vector sum = {};
  for (i64 t = from / LANES * LANES; t < to; t += LANES) {
    const bool seen = t < end && t + LANES > begin;
    const Vector e = seen ? exponential(within(load(p + t), t, begin, end) - shift) : Vector{};
    store(p + t, e);
    sum += e;
  }
  return total(sum);
}

// o [N, H, E] = softmax(q k^T / sqrt(E)) v, and the logsumexp [N, H] of each query's scores.
template <class T>
void causal_attention(const T* heads, const T* cos, const T* sin, const i64* table, T* o, float* logsumexp, i64 window,
                      i64 S, i64 N, i64 H, i64 K, i64 E) {
  const Heads<const T> of{heads, cos, sin, H, K, E};
  share(S * K, N * H * E, 1, [&](i64 unit, i64 last) {
    Numbers queries, keys, values, rows, out(TOGETHER * E), scores;
    for (; unit < last; ++unit) {
      const Piece c(table, unit / K, window);
      const i64 kv = unit % K, room = c.room();
      scores.resize(TOGETHER * room);
      c.read_keys(of, H + kv, rows);
      lay_rows(rows, c.T, E, keys);
      c.read_keys(of, H + K + kv, rows);
      lay_columns(rows, c.T, E, values);
      queries.resize(c.length * E);
      for (i64 h = kv * (H / K); h < (kv + 1) * (H / K); ++h) {
        of.read(c.start, c.length, h, 1.0f / std::sqrt(float(E)), queries.data());
        by_queries(c, [&](i64 r, i64 n, i64 from, i64 to) {
          const float* none = nullptr;
          float part[TOGETHER];
          multiply(&queries[r * E], keys.data(), none, scores.data(), 0, n, from / COLUMNS * COLUMNS, to, {room, E, E});
          for (i64 i = 0; i < n; ++i) {
            float* p = &scores[i * room];
            const float top = greatest(p, c.from(r + i), c.to(r + i));
            const float sum = weigh(p, top, c.from(r + i), c.to(r + i), from, to);
            part[i] = 1.0f / sum;
            logsumexp[(c.start + r + i) * H + h] = top + std::log(sum);
          }
          multiply(&scores[from], &values[from * PANEL], none, out.data(), 0, n, 0, E, {E, to - from, room, 1, c.T});
          for (i64 i = 0; i < n; ++i)
            for (i64 e = 0; e < E; e += LANES)
              store(o + ((c.start + r + i) * H + h) * E + e, load(&out[i * E + e], E - e, 0.0f) * part[i], E - e);
        });
      }
    }
  });
}

// The gradients of the heads from that of o: with p = softmax(z), dz = p (do v^T - sum_e do o), dq = dz k / sqrt(E),
// dk = dz^T q / sqrt(E), dv = p^T do. Pieces that go on from another leave their share of its keys and values in
// `shares`, and it sums them up in order: bits do not depend on threads.
template <class T>
void causal_attention_gradient(const T* heads, const T* cos, const T* sin, const i64* table, const T* o,
                               const float* logsumexp, const T* d_o, T* d_heads, i64 window, i64 S, i64 N, i64 H, i64 K,
                               i64 E) {
  const Heads<const T> of{heads, cos, sin, H, K, E};
  const Heads<T> to_heads{d_heads, cos, sin, H, K, E};
  const float scale = 1.0f / std::sqrt(float(E)), *none = nullptr;
  std::vector<i64> begins, goes_on;
  std::vector<std::vector<i64>> heirs(S);
  for (i64 s = 0; s < S; ++s) {
    const i64 origin = table[3 * s + 2];
    (origin < 0 ? begins : goes_on).push_back(s);
    if (origin >= 0) heirs[origin].push_back(s);
  }
  std::vector<Numbers> shares(S * K);  // [2, before, E] each: of keys, of values
  const auto work = [&](const std::vector<i64>& some, i64 unit, i64 last) {
    Numbers keys, values, key_columns, queries, query_columns, given, given_columns, out, rows, p, dz;
    Numbers d_queries(TOGETHER * E);
    for (; unit < last; ++unit) {
      const i64 s = some[unit / K], kv = unit % K;
      const Piece c(table, s, window);
      const i64 room = c.room(), own = c.length * E, before = c.before * E;
      p.resize(TOGETHER * room);
      dz.resize(TOGETHER * room);
      for (Numbers* x : {&queries, &given, &out}) x->resize(own);
      c.read_keys(of, H + kv, rows);
      lay_rows(rows, c.T, E, keys);
      lay_columns(rows, c.T, E, key_columns);
      c.read_keys(of, H + K + kv, rows);
      lay_rows(rows, c.T, E, values);
      Numbers d_keys(c.T * E), d_values(c.T * E);
      for (const i64 heir : heirs[s]) {
        const Numbers& share = shares[heir * K + kv];
        for (i64 i = 0; i < own; ++i) d_keys[i] += share[i], d_values[i] += share[own + i];
      }
      for (i64 h = kv * (H / K); h < (kv + 1) * (H / K); ++h) {
        of.read(c.start, c.length, h, scale, queries.data());
        lay_columns(queries, c.length, E, query_columns);
        read_rows(d_o + (c.start * H + h) * E, H * E, c.length, E, given.data());
        lay_columns(given, c.length, E, given_columns);
        read_rows(o + (c.start * H + h) * E, H * E, c.length, E, out.data());
        by_queries(c, [&](i64 r, i64 n, i64 from, i64 to) {
          const Product with_keys{room, E, E}, back{E, to - from, room, 1, c.T}, sum{E, n, 1, room, c.length, true};
          const i64 column = from / COLUMNS * COLUMNS;
          multiply(&queries[r * E], keys.data(), none, p.data(), 0, n, column, to, with_keys);
          multiply(&given[r * E], values.data(), none, dz.data(), 0, n, column, to, with_keys);
          for (i64 i = 0; i < n; ++i) {
            float *weight = &p[i * room], *slope = &dz[i * room];
            Vector products = {};
            for (i64 e = 0, at = (r + i) * E; e < E; e += LANES)
              products += load(&given[at + e], E - e, 0.0f) * load(&out[at + e], E - e, 0.0f);
            const float mean = total(products);
            weigh(weight, logsumexp[(c.start + r + i) * H + h], c.from(r + i), c.to(r + i), from, to);
            for (i64 t = from / LANES * LANES; t < to; t += LANES)
              store(slope + t, load(weight + t) * (load(slope + t) - mean));
          }
          multiply(&dz[from], &key_columns[from * PANEL], none, d_queries.data(), 0, n, 0, E, back);
          to_heads.write(d_queries.data(), c.start + r, n, h, scale);
          multiply(&p[from], &given_columns[r * PANEL], none, &d_values[from * E], 0, to - from, 0, E, sum);
          multiply(&dz[from], &query_columns[r * PANEL], none, &d_keys[from * E], 0, to - from, 0, E, sum);
        });
      }
      to_heads.write(&d_keys[before], c.start, c.length, H + kv, 1.0f);
      to_heads.write(&d_values[before], c.start, c.length, H + K + kv, 1.0f);
      if (c.origin < 0) continue;
      d_keys.resize(before);
      d_keys.insert(d_keys.end(), d_values.begin(), d_values.begin() + before);
      shares[s * K + kv].swap(d_keys);
    }
  };
  for (const auto* some : {&goes_on, &begins})
    share(some->size() * K, N * H * E, 1, [&](i64 unit, i64 last) { work(*some, unit, last); });
}

// --- The whole step of a small model ----------------------------------------------------------------------------------

template <class T>
void multiply_all(const std::vector<T>& x, const T* panels, const T* bias, std::vector<T>& y, i64 rows, i64 N, i64 D) {
  multiply(x.data(), panels, bias, y.data(), 0, rows, 0, N, {N, D, D});
}

// The tensors of a layer, matrices in panels.
template <class T> struct Layer {
  const T *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *post_norm, *gate_up, *down;
};

// A small model and the memory of its keys and values, as kernels/small_model.py lists them.
template <class T> struct Model {
  const T *embedding, *norm, *head, *cos, *sin;
  const Layer<T>* layers;
  T *keys, *values;
  i64 layer_size, L, D, F, H, K, E, V, window;
};

// Up to `room` rows on their way through the layers.
template <class T> struct Rows {
  const Model<T>& c;
  std::vector<int32_t> position, slot, length;
  std::vector<T> x, delta, h, qkv, q, out, gate_up, act;

  Rows(const Model<T>& c, i64 room)
      : c(c), position(room), slot(room), length(room), x(room * c.D), delta(room * c.D), h(room * c.D),
        qkv(room * (c.H + 2 * c.K) * c.E), q(room * c.H * c.E), out(room * c.H * c.E), gate_up(room * 2 * c.F),
        act(room * c.F) {}

  void begin(i64 m, i64 token, i64 place, i64 in_slot) {
    position[m] = place, slot[m] = in_slot, length[m] = place + 1;
    std::copy_n(c.embedding + token * c.D, c.D, &x[m * c.D]);
  }

  // The first n rows, to the normed states in h; or no further than to the last layer's keys and values.
  void through_layers(const int32_t* table, i64 P, float eps, i64 n, bool keys_only) {
    const T* no_bias = nullptr;
    for (i64 l = 0; l < c.L; ++l) {
      const Layer<T>& w = c.layers[l];
      const Cache<T> cache{c.keys + l * c.layer_size, c.values + l * c.layer_size, table, c.K, c.E, P};
      add_and_norm(x.data(), l ? delta.data() : nullptr, w.input_norm, x.data(), h.data(), eps, 0, n, c.D);
      multiply_all(h, w.qkv, w.qkv_bias, qkv, n, (c.H + 2 * c.K) * c.E, c.D);
      rotate_and_write(qkv.data(), position.data(), slot.data(), c.cos, c.sin, w.q_norm, w.k_norm, q.data(), cache, eps,
                       0, n, c.H);
      if (keys_only && l == c.L - 1) return;
      attend_rows(q.data(), cache, slot.data(), length.data(), out.data(), c.window, 0, n, c.H);
      multiply_all(out, w.o, no_bias, delta, n, c.D, c.H * c.E);
      add_and_norm(x.data(), delta.data(), w.post_norm, x.data(), h.data(), eps, 0, n, c.D);
      multiply_all(h, w.gate_up, no_bias, gate_up, n, 2 * c.F, c.D);
      gate(gate_up.data(), act.data(), 0, n, c.F);
      multiply_all(act, w.down, no_bias, delta, n, c.D, c.F);
    }
    add_and_norm(x.data(), delta.data(), c.norm, x.data(), h.data(), eps, 0, n, c.D);
  }
};

// The keys and values of prompts: tokens first[b] to first[b + 1] stand in the pages of table[b]. A prompt is one
// thread's, some rows at a time: what these see lies before them.
template <class T>
void prefill(const i64* tokens, const i64* first, const int32_t* table, const Model<T>* model, float eps, i64 prompts,
             i64 P) {
  share(prompts, first[prompts] * model->D * model->F / LANES, 1, [&](i64 b, i64 last) {
    Rows<T> rows(*model, PREFILL);
    for (; b < last; ++b)
      for (i64 at = first[b]; at < first[b + 1]; at += PREFILL) {
        const i64 n = std::min(PREFILL, first[b + 1] - at);
        for (i64 m = 0; m < n; ++m) rows.begin(m, tokens[at + m], at + m - first[b], b);
        rows.through_layers(table, P, eps, n, true);
      }
  });
}

// The samples in flight, a row each: tensors of nanomath/rollout/engine.py's Slots. Those with `width` + 1 columns have a
// spare last one, for what samples draw after their end.
struct Slots {
  i64* token;
  int32_t* position;
  i64* count;
  const i64* limit;
  bool* done;
  i64* tokens;
  float *logprobs, *sampling_logprobs;
  i64 width;

  void record(i64 m, i64 drawn, float logprob, float sampling_logprob, const i64* eos, i64 ends) const {
    const i64 place = m * (width + 1) + (done[m] ? width : count[m]);
    tokens[place] = drawn, logprobs[place] = logprob, sampling_logprobs[place] = sampling_logprob;
    count[m] += !done[m];
    position[m] += !done[m];
    done[m] = done[m] || count[m] >= limit[m] || std::find(eos, eos + ends, drawn) != eos + ends;
    token[m] = drawn;
  }
};

// Steps of nanomath/rollout/engine.py, with the layers of decoder.py; every thread takes rows of its own through them.
// noise [slots, width + 1, 2]: the uniform numbers of each token.
template <class T>
void decode(i64* token, int32_t* position, i64* count, const i64* limit, bool* done, i64* tokens, float* logprobs,
            float* sampling_logprobs, const float* noise, const i64* eos, const int32_t* table, const Model<T>* model,
            float temperature, float eps, i64 mode, i64 steps, i64 ends, i64 width, i64 M, i64 P) {
  const Slots slots{token, position, count, limit, done, tokens, logprobs, sampling_logprobs, width};
  const i64 V = model->V, D = model->D;
  share(M, M * V * D / LANES, equal_share(M), [&](i64 from, i64 to) {
    const i64 n = to - from;
    Rows<T> rows(*model, n);
    std::vector<T> logits(n * V);
    std::vector<float> u(2 * n), logprob(n), entropy(n), logsumexp(n);
    std::vector<i64> drawn(n);
    const Drawn found{drawn.data(), logprob.data(), entropy.data(), logsumexp.data()};
    for (i64 step = 0; step < steps && !std::all_of(done + from, done + to, [](bool end) { return end; }); ++step) {
      for (i64 m = 0; m < n; ++m) {
        const i64 row = from + m;
        rows.begin(m, token[row], position[row], row);
        std::copy_n(noise + 2 * (row * (width + 1) + count[row]), 2, &u[2 * m]);
      }
      rows.through_layers(table, P, eps, n, false);
      multiply_all(rows.h, model->head, (const T*)nullptr, logits, n, V, D);
      draw(logits.data(), u.data(), found, (float*)nullptr, temperature, mode, 0, n, V);
      for (i64 m = 0; m < n; ++m)
        slots.record(from + m, drawn[m], logprob[m], mode == GREEDY ? 0.0f : logprob[m], eos, ends);
    }
  });
}

}  // namespace

// What kernels/compiled.py calls, in the order of its signatures; null is what others do better (kernels/packed.py says
// who), or what is for small float32 models.
#define FORMS(T)                                                                                              \
  (void*)add_rms_norm<T>, (void*)rms_norm_gradient<T>, (void*)swiglu<T>, (void*)swiglu_gradient<T>, (void*)rope_write<T>, (void*)attend<T>, (void*)causal_attention<T>, \
      (void*)causal_attention_gradient<T>, (void*)lm_head<T>

void* const float_table[] = {FORMS(float), (void*)linear<float>, (void*)prefill<float>, (void*)decode<float>};
#if defined __AVX512BF16__ && !defined __AMX_BF16__
void* const bf16_table[] = {FORMS(bf16), (void*)linear<bf16>, nullptr, nullptr};
#else
void* const bf16_table[] = {FORMS(bf16), nullptr, nullptr, nullptr};
#endif

extern "C" void* const* float_forms() { return float_table; }
extern "C" void* const* bf16_forms() { return bf16_table; }
