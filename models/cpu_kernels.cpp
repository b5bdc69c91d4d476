// Kernels for CPUs with AVX-512 BF16: attention (see block_attention.py) and the feed-forward layer
// (see swiglu.py and position_swiglu.py) in bfloat16, the losses of rows of logits (see
// cpu_rows.py), Adam-atan2's update and Muon's iterations. All compute in float32.
//
// Products read pairs of neighbouring bfloat16 values as 32-bit words, which _mm512_dpbf16_ps
// multiplies and adds in float32.
//
// Attention: a task is a row of the batch and a key head. It multiplies each block of queries with
// the keys that the block sees.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

using Half = uint16_t;
using Pair = uint32_t;  // two bfloat16 values that are neighbours along the summed axis

constexpr int64_t BLOCK = 32;  // queries
constexpr int64_t LANES = 16;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// A matrix of one head: row i begins at data + i * stride.
struct Rows {
  const Half* data;
  int64_t stride;
  const Half* at(int64_t i) const { return data + i * stride; }
};

// Widen 16 bfloat16 values to 32-bit words.
inline __m512i words(const Half* x) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
}

inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 load(const Half* x) { return _mm512_castsi512_ps(_mm512_slli_epi32(words(x), 16)); }
inline void store(float* out, __m512 x) { _mm512_storeu_ps(out, x); }
inline void store(Half* out, __m512 x) {
  _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh(x));
}

template <bool transposed, int R, int C, typename T>
inline void tile(int64_t pairs, const Pair* a, int64_t lda, const Pair* b, int64_t ldb, T* c,
                 int64_t ldc, bool add) {
  __m512 sum[R][C];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++)
      sum[r][j] = add ? load(c + r * ldc + j * LANES) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k++) {
    __m512bh right[C];
    for (int j = 0; j < C; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + k * ldb + j * LANES);
    for (int r = 0; r < R; r++) {
      __m512bh left = (__m512bh)_mm512_set1_epi32(transposed ? a[k * lda + r] : a[r * lda + k]);
      for (int j = 0; j < C; j++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], left, right[j]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < C; j++) store(c + r * ldc + j * LANES, sum[r][j]);
}

// C * LANES columns of `multiply`.
template <bool transposed, int C, typename T>
inline void columns(int64_t m, int64_t pairs, const Pair* a, int64_t lda, const Pair* b,
                    int64_t ldb, T* c, int64_t ldc, bool add) {
  const int64_t step = transposed ? 1 : lda;
  int64_t i = 0;
  if (!transposed && pairs < 24)  // between short sums, smaller tiles wait less
    for (; i + 2 <= m; i += 2)
      tile<transposed, 2, C>(pairs, a + i * step, lda, b, ldb, c + i * ldc, ldc, add);
  for (; i + 4 <= m; i += 4)
    tile<transposed, 4, C>(pairs, a + i * step, lda, b, ldb, c + i * ldc, ldc, add);
  for (; i < m; i++)
    tile<transposed, 1, C>(pairs, a + i * step, lda, b, ldb, c + i * ldc, ldc, add);
}

// c (m, n) = a · b, or c += a · b. a: (m, pairs), or (pairs, m) if transposed. b: (pairs, n), n a
// multiple of LANES. Leading dimensions of a and b are in pairs.
template <bool transposed, typename T>
void multiply(int64_t m, int64_t n, int64_t pairs, const Pair* a, int64_t lda, const Pair* b,
              int64_t ldb, T* c, int64_t ldc, bool add) {
  int64_t j = 0;
  for (; j + 4 * LANES <= n; j += 4 * LANES)
    columns<transposed, 4>(m, pairs, a, lda, b + j, ldb, c + j, ldc, add);
  switch ((n - j) / LANES) {
    case 3:
      return columns<transposed, 3>(m, pairs, a, lda, b + j, ldb, c + j, ldc, add);
    case 2:
      return columns<transposed, 2>(m, pairs, a, lda, b + j, ldb, c + j, ldc, add);
    case 1:
      return columns<transposed, 1>(m, pairs, a, lda, b + j, ldb, c + j, ldc, add);
  }
}

// out (size / 2, width), rows `stride` apart: pairs along the head; columns beyond `length` are 0.
void pack_columns(Rows x, int64_t length, int64_t size, Pair* out, int64_t width, int64_t stride) {
  const int64_t pairs = size / 2;
  int64_t i = 0;
  for (; i + 16 <= length; i += 16) {
    for (int64_t c = 0; c < pairs; c += 16) {
      __m512i r[16], t[16];
      for (int k = 0; k < 16; k++) r[k] = _mm512_loadu_si512(x.at(i + k) + 2 * c);
      for (int k = 0; k < 16; k += 2) {
        t[k] = _mm512_unpacklo_epi32(r[k], r[k + 1]);
        t[k + 1] = _mm512_unpackhi_epi32(r[k], r[k + 1]);
      }
      for (int k = 0; k < 16; k += 4) {
        r[k] = _mm512_unpacklo_epi64(t[k], t[k + 2]);
        r[k + 1] = _mm512_unpackhi_epi64(t[k], t[k + 2]);
        r[k + 2] = _mm512_unpacklo_epi64(t[k + 1], t[k + 3]);
        r[k + 3] = _mm512_unpackhi_epi64(t[k + 1], t[k + 3]);
      }
      for (int k = 0; k < 4; k++) {
        t[k] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0x88);
        t[k + 4] = _mm512_shuffle_i32x4(r[k], r[k + 4], 0xdd);
        t[k + 8] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0x88);
        t[k + 12] = _mm512_shuffle_i32x4(r[k + 8], r[k + 12], 0xdd);
      }
      for (int k = 0; k < 8; k++) {
        r[k] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0x88);
        r[k + 8] = _mm512_shuffle_i32x4(t[k], t[k + 8], 0xdd);
      }
      for (int k = 0; k < 16; k++) _mm512_storeu_si512(out + (c + k) * stride + i, r[k]);
    }
  }
  for (; i < width; i++)
    for (int64_t c = 0; c < pairs; c++) {
      Pair value = 0;
      if (i < length) std::memcpy(&value, x.at(i) + 2 * c, sizeof value);
      out[c * stride + i] = value;
    }
}

// out (ceil(length / 2) .. width / 2, size): pairs of rows; rows beyond `length` are 0.
void pack_rows(Rows x, int64_t length, int64_t size, Pair* out, int64_t width) {
  for (int64_t i = 0; i < width; i += 2)
    for (int64_t c = 0; c < size; c += LANES) {
      __m512i low = i < length ? words(x.at(i) + c) : _mm512_setzero_si512();
      __m512i high = i + 1 < length ? words(x.at(i + 1) + c) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + i / 2 * size + c,
                          _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// exp(x) for x < 88, with a relative error of about 1e-7.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // this order keeps NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145751953125f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), f);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

// The keys that a query sees: the prefix, and those from `first` to `end`.
struct Seen {
  int64_t prefix, first, end;
  __mmask16 lanes(int64_t key) const {
    if (key >= first && key + LANES <= end) return 0xffff;
    const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i k = _mm512_add_epi32(_mm512_set1_epi32((int)key), steps);
    const __mmask16 begun = _mm512_cmpge_epi32_mask(k, _mm512_set1_epi32((int)first));
    const __mmask16 inside = _mm512_mask_cmplt_epi32_mask(begun, k, _mm512_set1_epi32((int)end));
    return inside | _mm512_cmplt_epi32_mask(k, _mm512_set1_epi32((int)prefix));
  }
};

// Call visit(k, e) for each vector of keys from `low` to `high`, where e is
// exp(scale * (score - maximum)), 0 where unseen.
template <typename Visit>
inline void exponentiate(const float* scores, int64_t low, int64_t high, const Seen& seen,
                         float scale, const Visit& visit) {
  __m512 most = _mm512_set1_ps(-__builtin_inff());
  for (int64_t k = low; k < high; k += LANES)
    most = _mm512_mask_max_ps(most, seen.lanes(k), most, _mm512_loadu_ps(scores + k - low));
  const __m512 factor = _mm512_set1_ps(scale);
  const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  for (int64_t k = low; k < high; k += LANES) {
    const __m512 less = _mm512_sub_ps(_mm512_loadu_ps(scores + k - low), maximum);
    const __m512 x = _mm512_mul_ps(less, factor);
    visit(k - low, _mm512_maskz_mov_ps(seen.lanes(k), exponential(x)));
  }
}

struct Sizes {
  int64_t rows, heads, key_heads, length, size, prefix;
  const int32_t* bounds;  // (rows, length, 2), or null
  bool causal;

  int64_t width() const { return round_up(length, BLOCK); }

  Seen seen(int64_t row, int64_t i) const {
    Seen s{prefix, 0, length};
    if (bounds) {
      const int32_t* span = bounds + (row * length + i) * 2;
      s.first = span[0], s.end = span[1];
    }
    if (causal) s.end = std::min(s.end, i + 1), s.prefix = std::min(s.prefix, i + 1);
    return s;
  }

  // The keys that any query of the block sees: from a multiple of LANES to a multiple of LANES.
  void limits(int64_t row, int64_t begin, int64_t end, int64_t& low, int64_t& high) const {
    low = length, high = 0;
    for (int64_t i = begin; i < end; i++) {
      const Seen s = seen(row, i);
      low = std::min(low, s.prefix ? 0 : s.first);
      high = std::max(high, std::max(s.end, s.prefix));
    }
    low = low / LANES * LANES;
    high = round_up(high, LANES);
  }
};

// Parts of the scratch memory of a thread, each a multiple of 64 bytes.
struct Scratch {
  char* next;
  template <typename T>
  T* take(int64_t count) {
    T* found = (T*)next;
    next += round_up(count * (int64_t)sizeof(T), 64);
    return found;
  }
};

struct Heads {  // (rows, heads, length, size) of any strides but 1 for the last
  Half* data;
  int64_t row, head, position;
  Rows of(int64_t b, int64_t h, int64_t i = 0) const {
    return {data + b * row + h * head + i * position, position};
  }
  Half* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * row + h * head + i * position;
  }
};

void attend(const Sizes& s, int64_t row, int64_t head, const Heads& query, const Heads& key,
            const Heads& value, const Heads& out, Scratch scratch) {
  const int64_t width = s.width(), pairs = s.size / 2, group = s.heads / s.key_heads;
  Pair* keys = scratch.take<Pair>(pairs * width);
  Pair* values = scratch.take<Pair>(width / 2 * s.size);
  float* scores = scratch.take<float>(BLOCK * width);
  Half* p = scratch.take<Half>(BLOCK * width);
  float* found = scratch.take<float>(BLOCK * s.size);
  pack_columns(key.of(row, head), s.length, s.size, keys, width, width);
  pack_rows(value.of(row, head), s.length, s.size, values, width);
  const float scale = 1.0f / __builtin_sqrtf((float)s.size);
  for (int64_t h = head * group; h < (head + 1) * group; h++)
    for (int64_t begin = 0; begin < s.length; begin += BLOCK) {
      const int64_t end = std::min(begin + BLOCK, s.length), count = end - begin;
      int64_t low, high;
      s.limits(row, begin, end, low, high);
      const Rows q = query.of(row, h, begin);
      multiply<false>(count, high - low, pairs, (const Pair*)q.data, q.stride / 2, keys + low,
                      width, scores, width, false);
      float norm[BLOCK];
      for (int64_t i = 0; i < count; i++) {
        __m512 sum = _mm512_setzero_ps();
        exponentiate(scores + i * width, low, high, s.seen(row, begin + i), scale,
                     [&](int64_t k, __m512 e) {
                       sum = _mm512_add_ps(sum, e);
                       store(p + i * width + k, e);
                     });
        norm[i] = 1.0f / _mm512_reduce_add_ps(sum);
      }
      multiply<false>(count, s.size, (high - low) / 2, (const Pair*)p, width / 2,
                      values + low / 2 * s.size, s.size, found, s.size, false);
      for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < s.size; c += LANES)
          store(out.at(row, h, begin + i) + c,
                _mm512_mul_ps(_mm512_loadu_ps(found + i * s.size + c), _mm512_set1_ps(norm[i])));
    }
}

// Write the values of two rows as pairs.
inline void store_pairs(Pair* out, __m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}

void differentiate(const Sizes& s, int64_t row, int64_t head, const Heads& grad, const Heads& query,
                   const Heads& key, const Heads& value, const Heads& grad_query,
                   const Heads& grad_key, const Heads& grad_value, Scratch scratch) {
  const int64_t width = s.width(), pairs = s.size / 2, group = s.heads / s.key_heads;
  Pair* key_columns = scratch.take<Pair>(pairs * width);
  Pair* value_columns = scratch.take<Pair>(pairs * width);
  Pair* key_rows = scratch.take<Pair>(width / 2 * s.size);
  Pair* query_rows = scratch.take<Pair>(BLOCK / 2 * s.size);
  Pair* grad_rows = scratch.take<Pair>(BLOCK / 2 * s.size);
  float* p = scratch.take<float>(BLOCK * width);
  float* of_p = scratch.take<float>(BLOCK * width);
  Pair* p_pairs = scratch.take<Pair>(BLOCK / 2 * width);
  Pair* score_pairs = scratch.take<Pair>(BLOCK / 2 * width);
  Half* of_scores = scratch.take<Half>(BLOCK * width);
  float* found = scratch.take<float>(BLOCK * s.size);
  float* of_key = scratch.take<float>(width * s.size);
  float* of_value = scratch.take<float>(width * s.size);
  pack_columns(key.of(row, head), s.length, s.size, key_columns, width, width);
  pack_columns(value.of(row, head), s.length, s.size, value_columns, width, width);
  pack_rows(key.of(row, head), s.length, s.size, key_rows, width);
  std::fill_n(of_key, width * s.size, 0.0f);
  std::fill_n(of_value, width * s.size, 0.0f);
  const float scale = 1.0f / __builtin_sqrtf((float)s.size);
  for (int64_t h = head * group; h < (head + 1) * group; h++)
    for (int64_t begin = 0; begin < s.length; begin += BLOCK) {
      const int64_t end = std::min(begin + BLOCK, s.length), count = end - begin;
      int64_t low, high;
      s.limits(row, begin, end, low, high);
      const int64_t seen = high - low;
      const Rows q = query.of(row, h, begin), g = grad.of(row, h, begin);
      multiply<false>(count, seen, pairs, (const Pair*)q.data, q.stride / 2, key_columns + low,
                      width, p, width, false);
      multiply<false>(count, seen, pairs, (const Pair*)g.data, g.stride / 2, value_columns + low,
                      width, of_p, width, false);
      float norm[BLOCK], mean[BLOCK];
      for (int64_t i = 0; i < count; i++) {
        float *line = p + i * width, *of_line = of_p + i * width;
        __m512 sum = _mm512_setzero_ps(), dot = _mm512_setzero_ps();
        exponentiate(line, low, high, s.seen(row, begin + i), scale, [&](int64_t k, __m512 e) {
          sum = _mm512_add_ps(sum, e);
          dot = _mm512_fmadd_ps(e, _mm512_loadu_ps(of_line + k), dot);
          _mm512_storeu_ps(line + k, e);
        });
        norm[i] = 1.0f / _mm512_reduce_add_ps(sum);
        mean[i] = _mm512_reduce_add_ps(dot) * norm[i];
      }
      for (int64_t i = 0; i < count; i += 2) {
        const int64_t rows = std::min<int64_t>(2, count - i);
        for (int64_t k = 0; k < seen; k += LANES) {
          __m512 probability[2] = {}, gradient[2] = {};
          for (int64_t r = 0; r < rows; r++) {
            const int64_t place = (i + r) * width + k;
            const __m512 e = _mm512_loadu_ps(p + place), of_e = _mm512_loadu_ps(of_p + place);
            const __m512 distance = _mm512_sub_ps(of_e, _mm512_set1_ps(mean[i + r]));
            probability[r] = _mm512_mul_ps(e, _mm512_set1_ps(norm[i + r]));
            gradient[r] =
                _mm512_mul_ps(_mm512_mul_ps(probability[r], _mm512_set1_ps(scale)), distance);
            store(of_scores + place, gradient[r]);
          }
          store_pairs(p_pairs + i / 2 * width + k, probability[0], probability[1]);
          store_pairs(score_pairs + i / 2 * width + k, gradient[0], gradient[1]);
        }
      }
      pack_rows(q, count, s.size, query_rows, round_up(count, 2));
      pack_rows(g, count, s.size, grad_rows, round_up(count, 2));
      const int64_t halves = (count + 1) / 2;
      multiply<true>(seen, s.size, halves, p_pairs, width, grad_rows, s.size,
                     of_value + low * s.size, s.size, true);
      multiply<true>(seen, s.size, halves, score_pairs, width, query_rows, s.size,
                     of_key + low * s.size, s.size, true);
      multiply<false>(count, s.size, seen / 2, (const Pair*)of_scores, width / 2,
                      key_rows + low / 2 * s.size, s.size, found, s.size, false);
      for (int64_t i = 0; i < count; i++)
        for (int64_t c = 0; c < s.size; c += LANES)
          store(grad_query.at(row, h, begin + i) + c, _mm512_loadu_ps(found + i * s.size + c));
    }
  for (int64_t i = 0; i < s.length; i++)
    for (int64_t c = 0; c < s.size; c += LANES) {
      store(grad_key.at(row, head, i) + c, _mm512_loadu_ps(of_key + i * s.size + c));
      store(grad_value.at(row, head, i) + c, _mm512_loadu_ps(of_value + i * s.size + c));
    }
}

// 1 / x for x from 1, 1e-37 beyond 1e37, by an estimate and one step of Newton's method.
inline __m512 reciprocal(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(1e37f), x);  // this order keeps NaN
  const __m512 guess = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(guess, _mm512_fnmadd_ps(x, guess, _mm512_set1_ps(2.0f)));
}

// 1 / (1 + exp(-x)) with a relative error of 7e-5, a thirtieth of bfloat16's; at least 1e-37.
inline __m512 sigmoid(__m512 x) {
  __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
  t = _mm512_min_ps(_mm512_set1_ps(120.0f), _mm512_max_ps(_mm512_set1_ps(-126.0f), t));
  const __m512 n = _mm512_roundscale_ps(t, 8), f = _mm512_sub_ps(t, n);
  __m512 p = _mm512_set1_ps(0.00957123935f);  // 2^f, fitted for the least relative error
  for (float c : {0.055917956f, 0.240247175f, 0.693121791f, 0.999999285f})
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(p, n)));
}

// Vectors of a row of numbers of type T; lanes beyond its end are 0.
inline __mmask16 valid_lanes(int64_t left) {
  return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
}
inline __m512 load(const float* x, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, x); }
inline __m512 load(const Half* x, __mmask16 lanes) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* out, __m512 x, __mmask16 lanes) { _mm512_mask_storeu_ps(out, lanes, x); }
inline void store(Half* out, __m512 x, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(out, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}
inline float value_of(float x) { return x; }
inline float value_of(Half x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void assign(float* out, float x) { *out = x; }
inline void assign(Half* out, float x) {
  const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_set1_ps(x));
  *out = (Half)_mm256_extract_epi16(rounded, 0);
}

// Return the largest logit of a row and the first place that has it.
template <typename T>
float find_largest(const T* row, int64_t width, int64_t& place) {
  __m512 most = _mm512_set1_ps(-__builtin_inff());
  __m512i at = _mm512_setzero_si512();
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t k = 0; k < width; k += LANES) {
    const __mmask16 lanes = valid_lanes(width - k);
    const __m512 x = load(row + k, lanes);
    const __mmask16 larger = _mm512_mask_cmp_ps_mask(lanes, x, most, _CMP_GT_OQ);
    most = _mm512_mask_mov_ps(most, larger, x);
    at = _mm512_mask_add_epi32(at, larger, step, _mm512_set1_epi32((int)k));
  }
  const float found = _mm512_reduce_max_ps(most);
  const __mmask16 equal = _mm512_cmp_ps_mask(most, _mm512_set1_ps(found), _CMP_EQ_OQ);
  place = equal ? _mm512_mask_reduce_min_epi32(equal, at) : 0;
  return found;
}

// See `Rows` in token_losses.py; the formulas are those of `_softmax_rows`.
template <typename T>
float softmax_row(T* row, int64_t width, int64_t label, float scale, float largest, bool graded) {
  const __m512 most = _mm512_set1_ps(largest);
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += 64 * LANES) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = begin; k < std::min(width, begin + 64 * LANES); k += LANES) {
      const __mmask16 lanes = valid_lanes(width - k);
      const __m512 e = exponential(_mm512_sub_ps(load(row + k, lanes), most));
      sum = _mm512_mask_add_ps(sum, lanes, sum, e);
    }
    total += _mm512_reduce_add_ps(sum);
  }
  const float nll = __builtin_logf((float)total) + (largest - value_of(row[label]));
  if (!graded) return nll;
  const __m512 factor = _mm512_set1_ps(scale / (float)total);
  for (int64_t k = 0; k < width; k += LANES) {
    const __mmask16 lanes = valid_lanes(width - k);
    const __m512 e = exponential(_mm512_sub_ps(load(row + k, lanes), most));
    store(row + k, _mm512_mul_ps(e, factor), lanes);
  }
  assign(row + label, scale * __builtin_expm1f(-nll));
  return nll;
}

// The same as `_stablemax_rows`.
template <typename T>
float stablemax_row(T* row, int64_t width, int64_t label, float scale, bool graded) {
  const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += 64 * LANES) {
    __m512 sum = zero;
    for (int64_t k = begin; k < std::min(width, begin + 64 * LANES); k += LANES) {
      const __mmask16 lanes = valid_lanes(width - k);
      const __m512 x = load(row + k, lanes), grown = _mm512_add_ps(_mm512_abs_ps(x), one);
      const __mmask16 negative = _mm512_cmp_ps_mask(x, zero, _CMP_LT_OQ);
      sum = _mm512_mask_add_ps(sum, lanes, sum,
                               _mm512_mask_mov_ps(grown, negative, reciprocal(grown)));
    }
    total += _mm512_reduce_add_ps(sum);
  }
  const float x = value_of(row[label]), size = __builtin_fabsf(x), slope = 1.0f / (1.0f + size);
  const float log_s = x < 0 ? -__builtin_log1pf(size) : __builtin_log1pf(size);
  const float nll = __builtin_logf((float)total) - log_s;
  if (!graded) return nll;
  const float share = scale / (float)total;
  const __m512 factor = _mm512_set1_ps(share);
  for (int64_t k = 0; k < width; k += LANES) {
    const __mmask16 lanes = valid_lanes(width - k);
    const __m512 v = load(row + k, lanes);
    const __m512 r = reciprocal(_mm512_add_ps(_mm512_abs_ps(v), one));
    const __mmask16 negative = _mm512_cmp_ps_mask(v, zero, _CMP_LT_OQ);
    const __m512 grad = _mm512_mask_mul_ps(factor, negative, factor, _mm512_mul_ps(r, r));
    store(row + k, grad, lanes);
  }
  assign(row + label, share * (x < 0 ? slope * slope : 1.0f) - scale * slope);
  return nll;
}

// Return a token whose label is not below `width`; -1 if there is none.
template <typename T>
int64_t token_losses(T* logits, const int64_t* labels, const float* scale, float* nll,
                     int64_t* preds, int64_t tokens, int64_t width, bool stablemax, bool graded,
                     int threads) {
  for (int64_t t = 0; t < tokens; t++)
    if (labels[t] < 0 || labels[t] >= width) return t;
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; t++) {
    T* row = logits + t * width;
    const float largest = find_largest(row, width, preds[t]);
    nll[t] = stablemax ? stablemax_row(row, width, labels[t], scale[t], graded)
                       : softmax_row(row, width, labels[t], scale[t], largest, graded);
  }
  return -1;
}

// atan2(m, root) for root >= 0. The polynomial was fitted to atan at Chebyshev nodes; its relative
// error is 1e-7.
inline __m512 angle(__m512 m, __m512 root) {
  const __m512 size = _mm512_abs_ps(m), zero = _mm512_setzero_ps();
  const __mmask16 steep = _mm512_cmp_ps_mask(size, root, _CMP_GT_OQ);
  const __m512 large = _mm512_mask_mov_ps(root, steep, size);
  const __m512 small = _mm512_mask_mov_ps(size, steep, root);
  const __mmask16 both_zero = _mm512_cmp_ps_mask(large, zero, _CMP_EQ_OQ);
  const __m512 a = _mm512_mask_mov_ps(_mm512_div_ps(small, large), both_zero, zero);
  const __m512 u = _mm512_mul_ps(a, a);
  __m512 p = _mm512_set1_ps(-0.0023869972f);
  for (float c : {0.01350777131f, -0.03587153926f, 0.06250169128f, -0.0865688026f, 0.11033764482f,
                  -0.14278568327f, 0.19999739528f, -0.33333331347f})
    p = _mm512_fmadd_ps(p, u, _mm512_set1_ps(c));
  const __m512 found = _mm512_fmadd_ps(_mm512_mul_ps(a, u), p, a);
  const __m512 whole = _mm512_mask_sub_ps(found, steep, _mm512_set1_ps(1.57079633f), found);
  const __m512 sign = _mm512_and_ps(m, _mm512_set1_ps(-0.0f));
  return _mm512_or_ps(whole, sign);
}

// The feed-forward layer SwiGLU: out = (silu(x · gate) * (x · up)) · down. Weights are packed in
// panels of PANEL columns. A thread takes blocks of tokens, whose inner values stay in its cache.
constexpr int64_t PANEL = 64;
constexpr int64_t HALF = PANEL / 2;

struct Layer {
  int64_t tokens, size, inner;
  int64_t by_thread;  // whether each thread sums the gradients of the weights for its tokens

  int64_t panels() const { return (size + PANEL - 1) / PANEL; }
  int64_t width(int64_t j) const { return std::min(PANEL, size - j * PANEL); }

  // Tokens of a block: even, at most PANEL, and the blocks divide evenly between threads.
  int64_t block(int threads) const {
    const int64_t share = (tokens + threads - 1) / threads, count = (share + PANEL - 1) / PANEL;
    return round_up((share + count - 1) / std::max<int64_t>(count, 1), 4);
  }
};

// silu(gate) * up, and the gradients of gate and up from that of this product.
struct Gated {
  __m512 hidden, of_gate, of_up;

  Gated(__m512 gate, __m512 up, __m512 of_hidden) {
    const __m512 s = sigmoid(gate), silu = _mm512_mul_ps(gate, s);
    const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(_mm512_set1_ps(1.0f), s), s);
    hidden = _mm512_mul_ps(silu, up);
    of_up = _mm512_mul_ps(of_hidden, silu);
    of_gate = _mm512_mul_ps(_mm512_mul_ps(of_hidden, up), slope);
  }
};

struct PackedWeights {
  Pair* gate_up;       // (inner / HALF, size / 2, PANEL): HALF columns of gate, and of up
  Pair* down;          // panels of (inner / 2, width)
  Pair* down_rows;     // (inner / PANEL, size / 2, PANEL), for the gradient
  Pair* gate_up_rows;  // panels of (inner, width), for the gradient

  PackedWeights(Pair* start, const Layer& l) {
    const int64_t matrix = l.size * l.inner / 2;
    gate_up = start, down = start + 2 * matrix, down_rows = down + matrix;
    gate_up_rows = down_rows + matrix;
  }
};

// The same layer over positions: out = down · (silu(gate · x) * (up · x)) for each row x
// (length, size) of the batch. A task is PANEL columns of a row; all it computes stays in the
// cache.
struct PositionLayer {
  int64_t rows, length, size, inner;

  int64_t pairs() const { return (length + 1) / 2; }
  int64_t lanes() const { return round_up(length, LANES); }
  int64_t blocks() const { return (size + PANEL - 1) / PANEL; }
  // The k-th of the rows of gate and up, taken by turns: HALF of gate, then HALF of up.
  int64_t turn(int64_t k) const {
    return k / PANEL * HALF + k % HALF + (k % PANEL < HALF ? 0 : inner);
  }
};

// out (2 * inner, pairs) for gate_up (2 * inner, length), its rows by turns.
void pack_turns(const PositionLayer& l, const Half* gate_up, Pair* out) {
  for (int64_t k = 0; k < 2 * l.inner; k++) {
    const Half* row = gate_up + l.turn(k) * l.length;
    for (int64_t p = 0; p < l.length / 2; p++) *out++ = row[2 * p] | (Pair)row[2 * p + 1] << 16;
    if (l.length % 2) *out++ = row[l.length - 1];
  }
}

// What the gradients of the weights are sums of: panels of pairs of tokens, (halves, PANEL) each.
struct TokenPairs {
  int64_t halves;
  Pair *joint, *hidden, *x, *grad;  // of 2 * inner, inner, size and size columns

  TokenPairs(const Layer& l, int64_t halves, Pair* start) : halves(halves), joint(start) {
    hidden = joint + 2 * l.inner * halves;
    x = hidden + l.inner * halves, grad = x + l.size * halves;
  }
  static int64_t values(const Layer& l, int64_t halves) {
    return halves * (3 * l.inner + 2 * l.size);
  }
};

// One of the 3 * inner / PANEL * panels tiles of of_gate_up (2 * inner, size) and of_down
// (size, inner), or its sum with the first `count` pairs of tokens.
template <typename T>
void weight_gradient(const Layer& l, int64_t tile, const TokenPairs& p, int64_t count,
                     T* of_gate_up, T* of_down, bool add) {
  const int64_t panels = l.panels(), i = tile / panels, j = tile % panels, width = l.width(j);
  const int64_t chunks = l.inner / PANEL, stride = PANEL * p.halves;
  if (i < 2 * chunks)
    multiply<true>(PANEL, width, count, p.joint + i * stride, PANEL, p.x + j * stride, width,
                   of_gate_up + i * PANEL * l.size + j * PANEL, l.size, add);
  else
    multiply<true>(width, PANEL, count, p.grad + j * stride, width,
                   p.hidden + (i - 2 * chunks) * stride, PANEL,
                   of_down + j * PANEL * l.inner + (i - 2 * chunks) * PANEL, l.inner, add);
}

// Newton-Schulz iterations, in matrices of (rows, columns), both multiples of 32; rows <= columns.
struct Iteration {
  int64_t rows, columns;
  float a, b, c;
};

// Pack one panel of PANEL columns, (size / 2, width), of the transpose of x (length, size).
void pack_panel(Rows x, int64_t length, int64_t size, int64_t panel, Pair* out) {
  const int64_t column = panel * PANEL, width = std::min(PANEL, length - column);
  pack_columns({x.at(column), x.stride}, width, size, out + column * size / 2, width, width);
}

// Call visit(row, column, sums) for each vector of the product of x (rows, 2 * pairs) and packed
// panels of `columns` columns; if `lower`, of the tiles (HALF, PANEL) that meet the lower triangle.
// To be called by all threads.
template <typename Visit>
void visit_tiles(int64_t rows, int64_t columns, int64_t pairs, const Half* x, const Pair* panels,
                 bool lower, const Visit& visit) {
  const int64_t count = (columns + PANEL - 1) / PANEL;
#pragma omp for schedule(dynamic)
  for (int64_t task = 0; task < rows / HALF * count; task++) {
    const int64_t i = task / count * HALF, j = task % count * PANEL;
    if (lower && j >= i + HALF) continue;
    const int64_t width = std::min(PANEL, columns - j);
    alignas(64) float product[HALF * PANEL];
    multiply<false>(HALF, width, pairs, (const Pair*)(x + i * 2 * pairs), pairs, panels + j * pairs,
                    width, product, width, false);
    for (int64_t r = i; r < i + HALF; r++)
      for (int64_t k = 0; k < width; k += LANES)
        visit(r, j + k, load(product + (r - i) * width + k));
  }
}

// Copy the tiles of a symmetric matrix that `visit_tiles` left out from those below the diagonal.
void mirror(Half* x, int64_t size) {
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < size; i += HALF)
    for (int64_t c = (i + HALF + PANEL - 1) / PANEL * PANEL; c < size; c++)
      for (int64_t r = i; r < i + HALF; r++) x[r * size + c] = x[c * size + r];
}

}  // namespace

extern "C" {

// An update of `AdamATan2` in utils/training/optimizers/adam_atan2.py, and of the average unless it
// is null. All have `count` numbers.
struct AdamATan2 {
  float mean_weight, square_decay, correction, keep, rate, average_weight;
};

void adam_atan2(float* weight, const float* grad, float* mean, float* square, float* average,
                int64_t count, const AdamATan2* o, int threads) {
  const __m512 one_less = _mm512_set1_ps(1.0f - o->square_decay);
  const bool near_end = o->average_weight >= 0.5f;  // as in torch.lerp
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t k = 0; k < count; k += LANES) {
    const __mmask16 lanes = valid_lanes(count - k);
    const __m512 g = load(grad + k, lanes);
    __m512 m = load(mean + k, lanes), v = load(square + k, lanes), w = load(weight + k, lanes);
    m = _mm512_fmadd_ps(_mm512_set1_ps(o->mean_weight), _mm512_sub_ps(g, m), m);
    v = _mm512_fmadd_ps(_mm512_mul_ps(g, g), one_less,
                        _mm512_mul_ps(v, _mm512_set1_ps(o->square_decay)));
    const __m512 root = _mm512_mul_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(o->correction));
    w = _mm512_mul_ps(w, _mm512_set1_ps(o->keep));
    w = _mm512_fnmadd_ps(_mm512_set1_ps(o->rate), angle(m, root), w);
    store(mean + k, m, lanes);
    store(square + k, v, lanes);
    store(weight + k, w, lanes);
    if (average) {
      const __m512 old = load(average + k, lanes), distance = _mm512_sub_ps(w, old);
      const float factor = near_end ? o->average_weight - 1.0f : o->average_weight;
      store(average + k, _mm512_fmadd_ps(_mm512_set1_ps(factor), distance, near_end ? w : old),
            lanes);
    }
  }
}

int64_t token_losses_bfloat16(Half* logits, const int64_t* labels, const float* scale, float* nll,
                              int64_t* preds, int64_t tokens, int64_t width, bool stablemax,
                              bool graded, int threads) {
  return token_losses(logits, labels, scale, nll, preds, tokens, width, stablemax, graded, threads);
}

int64_t token_losses_float32(float* logits, const int64_t* labels, const float* scale, float* nll,
                             int64_t* preds, int64_t tokens, int64_t width, bool stablemax,
                             bool graded, int threads) {
  return token_losses(logits, labels, scale, nll, preds, tokens, width, stablemax, graded, threads);
}

// Return the bytes that a thread needs, enough for either function.
int64_t scratch_bytes(const Sizes* s) {
  const int64_t width = s->width();
  return 14 * width * s->size + 16 * BLOCK * width + 8 * BLOCK * s->size + 16 * 64;
}

void block_attention(const Sizes* s, const Heads* query, const Heads* key, const Heads* value,
                     const Heads* out, char* scratch, int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < s->rows * s->key_heads; task++)
    attend(*s, task / s->key_heads, task % s->key_heads, *query, *key, *value, *out,
           {scratch + omp_get_thread_num() * bytes});
}

void block_attention_backward(const Sizes* s, const Heads* query, const Heads* key,
                              const Heads* value, const Heads* grad, const Heads* grad_query,
                              const Heads* grad_key, const Heads* grad_value, char* scratch,
                              int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < s->rows * s->key_heads; task++)
    differentiate(*s, task / s->key_heads, task % s->key_heads, *grad, *query, *key, *value,
                  *grad_query, *grad_key, *grad_value, {scratch + omp_get_thread_num() * bytes});
}

// packed: 3 * inner * size pairs. gate_up: (2 * inner, size), gate and up; down: (size, inner).
void swiglu_pack(const Layer* l, const Half* gate_up, const Half* down, Pair* packed, int threads) {
  const int64_t size = l->size, inner = l->inner, pairs = size / 2;
  const PackedWeights w(packed, *l);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for nowait
    for (int64_t j = 0; j < inner / HALF; j++) {
      Pair* out = w.gate_up + j * PANEL * pairs;
      pack_columns({gate_up + j * HALF * size, size}, HALF, size, out, HALF, PANEL);
      pack_columns({gate_up + (inner + j * HALF) * size, size}, HALF, size, out + HALF, HALF,
                   PANEL);
    }
#pragma omp for nowait
    for (int64_t j = 0; j < inner / PANEL; j++)
      pack_rows({down + j * PANEL, inner}, size, PANEL, w.down_rows + j * PANEL * pairs, size);
#pragma omp for
    for (int64_t j = 0; j < l->panels(); j++) {
      const int64_t width = l->width(j);
      pack_columns({down + j * PANEL * inner, inner}, width, inner, w.down + j * PANEL * inner / 2,
                   width, width);
      pack_rows({gate_up + j * PANEL, size}, 2 * inner, width, w.gate_up_rows + j * PANEL * inner,
                2 * inner);
    }
  }
}

// out (tokens, size) for x (tokens, size). joint: null, or (tokens, 2 * inner) for the values of
// gate and up. scratch: threads * PANEL * inner values.
void swiglu(const Layer* l, const Half* x, Pair* packed, Half* joint, Half* out, Half* scratch,
            int threads) {
  const int64_t size = l->size, inner = l->inner, pairs = size / 2, block = l->block(threads);
  const PackedWeights w(packed, *l);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t begin = 0; begin < l->tokens; begin += block) {
    const int64_t count = std::min(block, l->tokens - begin);
    Half* hidden = scratch + omp_get_thread_num() * PANEL * inner;
    alignas(64) float both[PANEL * PANEL];
    for (int64_t c = 0; c < inner; c += HALF) {
      multiply<false>(count, PANEL, pairs, (const Pair*)(x + begin * size), pairs,
                      w.gate_up + 2 * c * pairs, PANEL, both, PANEL, false);
      for (int64_t r = 0; r < count; r++)
        for (int64_t k = 0; k < HALF; k += LANES) {
          const __m512 gate = load(both + r * PANEL + k), up = load(both + r * PANEL + HALF + k);
          store(hidden + r * inner + c + k, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up));
          if (joint) {
            Half* row = joint + (begin + r) * 2 * inner + c + k;
            store(row, gate), store(row + inner, up);
          }
        }
    }
    for (int64_t j = 0; j < l->panels(); j++)
      multiply<false>(count, l->width(j), inner / 2, (const Pair*)hidden, inner / 2,
                      w.down + j * PANEL * inner / 2, l->width(j), out + begin * size + j * PANEL,
                      size, false);
  }
}

// The gradients of x and, unless they are null, of the weights, from that of `out`, (tokens, size).
// scratch: threads * 2 * PANEL * inner values, and then even * (3 * inner + 2 * size), where `even`
// is the even number from `tokens`; if the gradients of the weights are summed by each thread, for
// each of them instead 6 * size * inner + PANEL * (3 * inner + 2 * size).
void swiglu_backward(const Layer* l, const Half* grad, const Half* x, const Half* joint,
                     Pair* packed, Half* of_x, Half* of_gate_up, Half* of_down, Half* scratch,
                     int threads) {
  const int64_t tokens = l->tokens, size = l->size, inner = l->inner, pairs = size / 2;
  const int64_t block = l->block(threads), tiles = 3 * inner / PANEL * l->panels();
  const int64_t weights = 3 * size * inner;
  const bool by_thread = of_gate_up && l->by_thread;
  const PackedWeights w(packed, *l);
  Pair* rest = (Pair*)(scratch + threads * 2 * PANEL * inner);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t own = weights + TokenPairs::values(*l, HALF);
    float* sums = (float*)(rest + thread * own);
    const TokenPairs p = by_thread ? TokenPairs(*l, HALF, (Pair*)sums + weights)
                                   : TokenPairs(*l, (tokens + 1) / 2, rest);
    if (by_thread) std::fill_n(sums, weights, 0.0f);
    Half* of_joint = scratch + thread * 2 * PANEL * inner;
    alignas(64) float of_hidden[PANEL * PANEL];
#pragma omp for schedule(static)
    for (int64_t begin = 0; begin < tokens; begin += block) {
      const int64_t count = std::min(block, tokens - begin), pair = by_thread ? 0 : begin / 2;
      for (int64_t c = 0; c < inner; c += PANEL) {
        multiply<false>(count, PANEL, pairs, (const Pair*)(grad + begin * size), pairs,
                        w.down_rows + c * pairs, PANEL, of_hidden, PANEL, false);
        for (int64_t r = 0; r < count; r += 2)
          for (int64_t k = 0; k < PANEL; k += LANES) {
            __m512 of_gate[2] = {}, of_up[2] = {}, hidden[2] = {};
            for (int64_t i = 0; i < std::min<int64_t>(2, count - r); i++) {
              const Half* row = joint + (begin + r + i) * 2 * inner + c + k;
              const Gated g(load(row), load(row + inner), load(of_hidden + (r + i) * PANEL + k));
              hidden[i] = g.hidden, of_gate[i] = g.of_gate, of_up[i] = g.of_up;
              Half* out = of_joint + (r + i) * 2 * inner + c + k;
              store(out, g.of_gate), store(out + inner, g.of_up);
            }
            if (!of_gate_up) continue;
            const int64_t place = c * p.halves + (pair + r / 2) * PANEL + k;
            store_pairs(p.joint + place, of_gate[0], of_gate[1]);
            store_pairs(p.joint + inner * p.halves + place, of_up[0], of_up[1]);
            store_pairs(p.hidden + place, hidden[0], hidden[1]);
          }
      }
      for (int64_t j = 0; j < l->panels(); j++) {
        const int64_t width = l->width(j), first = begin * size + j * PANEL;
        multiply<false>(count, width, inner, (const Pair*)of_joint, inner,
                        w.gate_up_rows + j * PANEL * inner, width, of_x + first, size, false);
        if (!of_gate_up) continue;
        const int64_t place = j * PANEL * p.halves + pair * width;
        pack_rows({x + first, size}, count, width, p.x + place, round_up(count, 2));
        pack_rows({grad + first, size}, count, width, p.grad + place, round_up(count, 2));
      }
      for (int64_t tile = 0; by_thread && tile < tiles; tile++)
        weight_gradient(*l, tile, p, (count + 1) / 2, sums, sums + 2 * inner * size, true);
    }
    if (by_thread) {
#pragma omp for schedule(static)
      for (int64_t k = 0; k < weights; k += LANES) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t i = 0; i < team; i++)
          total = _mm512_add_ps(total, load((float*)(rest + i * own) + k));
        store(k < 2 * inner * size ? of_gate_up + k : of_down + k - 2 * inner * size, total);
      }
    } else if (of_gate_up) {
#pragma omp for schedule(static)
      for (int64_t tile = 0; tile < tiles; tile++)
        weight_gradient(*l, tile, p, p.halves, of_gate_up, of_down, false);
    }
  }
}

// out (rows, length, size) for x of this shape. gate_up: (2 * inner, length), gate and up; down:
// (length, inner). scratch: 2 * inner * pairs values, and for each thread `own` =
// PANEL * (pairs + inner / 2).
void position_swiglu(const PositionLayer* l, const Half* x, const Half* gate_up, const Half* down,
                     Half* out, Pair* scratch, int64_t own, int threads) {
  const int64_t length = l->length, size = l->size, inner = l->inner, pairs = l->pairs();
  Pair* rest = scratch + 2 * inner * pairs;
  pack_turns(*l, gate_up, scratch);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t task = 0; task < l->rows * l->blocks(); task++) {
    const int64_t column = task % l->blocks() * PANEL, width = std::min(PANEL, size - column);
    const int64_t first = task / l->blocks() * length * size + column;
    Pair *x_rows = rest + omp_get_thread_num() * own, *hidden = x_rows + PANEL * pairs;
    alignas(64) float both[PANEL * PANEL];
    pack_rows({x + first, size}, length, width, x_rows, 2 * pairs);
    for (int64_t c = 0; c < inner; c += HALF) {
      multiply<false>(PANEL, width, pairs, scratch + 2 * c * pairs, pairs, x_rows, width, both,
                      width, false);
      for (int64_t r = 0; r < HALF; r += 2)
        for (int64_t k = 0; k < width; k += LANES) {
          __m512 found[2];
          for (int64_t i = 0; i < 2; i++) {
            const float* row = both + (r + i) * width + k;
            const __m512 gate = load(row), up = load(row + HALF * width);
            found[i] = _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up);
          }
          store_pairs(hidden + (c + r) / 2 * width + k, found[0], found[1]);
        }
    }
    multiply<false>(length, width, inner / 2, (const Pair*)down, inner / 2, hidden, width,
                    out + first, size, false);
  }
}

// The gradients of x and, unless they are null, of the weights, from that of `out`. scratch:
// inner * (3 * pairs + length) values, and for each thread `own` =
// 3 * inner * lanes + PANEL * (2 * pairs + lanes + length + 2 * PANEL + HALF + PANEL / 4).
void position_swiglu_backward(const PositionLayer* l, const Half* grad, const Half* x,
                              const Half* gate_up, const Half* down, Half* of_x, Half* of_gate_up,
                              Half* of_down, Pair* scratch, int64_t own, int threads) {
  const int64_t length = l->length, size = l->size, inner = l->inner;
  const int64_t pairs = l->pairs(), lanes = l->lanes();
  Pair *turns = scratch, *gate_up_rows = turns + 2 * inner * pairs;
  Pair *down_rows = gate_up_rows + inner * length, *rest = down_rows + inner * pairs;
  pack_turns(*l, gate_up, turns);
  for (int64_t k = 0; k < inner; k++)
    for (int64_t p = 0; p < length; p++)
      gate_up_rows[k * length + p] = gate_up[l->turn(2 * k) * length + p] |
                                     (Pair)gate_up[l->turn(2 * k + 1) * length + p] << 16;
  pack_rows({down, inner}, length, inner, down_rows, 2 * pairs);
#pragma omp parallel num_threads(threads)
  {
    // of gate and up by turns, (2 * inner, lanes), then of down, transposed, (inner, lanes)
    float* of_weights = (float*)(rest + omp_get_thread_num() * own);
    Scratch scratch{(char*)(of_weights + 3 * inner * lanes)};
    Pair *x_rows = scratch.take<Pair>(PANEL * pairs),
         *grad_rows = scratch.take<Pair>(PANEL * pairs);
    Pair *x_columns = scratch.take<Pair>(HALF * lanes),
         *grad_columns = scratch.take<Pair>(HALF * lanes);
    float* sum = scratch.take<float>(length * PANEL);
    float *both = scratch.take<float>(PANEL * PANEL),
          *of_hidden = scratch.take<float>(HALF * PANEL);
    Half *of_both = scratch.take<Half>(PANEL * PANEL), *hidden = scratch.take<Half>(HALF * PANEL);
    Pair* of_both_rows = scratch.take<Pair>(HALF * PANEL);
    if (of_gate_up) std::fill_n(of_weights, 3 * inner * lanes, 0.0f);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < l->rows * l->blocks(); task++) {
      const int64_t column = task % l->blocks() * PANEL, width = std::min(PANEL, size - column);
      const int64_t first = task / l->blocks() * length * size + column;
      pack_rows({x + first, size}, length, width, x_rows, 2 * pairs);
      pack_rows({grad + first, size}, length, width, grad_rows, 2 * pairs);
      if (of_gate_up) {
        pack_columns({x + first, size}, length, width, x_columns, lanes, lanes);
        pack_columns({grad + first, size}, length, width, grad_columns, lanes, lanes);
      }
      for (int64_t c = 0; c < inner; c += HALF) {
        multiply<false>(PANEL, width, pairs, turns + 2 * c * pairs, pairs, x_rows, width, both,
                        width, false);
        multiply<true>(HALF, width, pairs, down_rows + c, inner, grad_rows, width, of_hidden, width,
                       false);
        for (int64_t r = 0; r < HALF; r += 2)
          for (int64_t k = 0; k < width; k += LANES) {
            __m512 of_gate[2], of_up[2];
            for (int64_t i = 0; i < 2; i++) {
              const int64_t place = (r + i) * width + k, up = place + HALF * width;
              const Gated g(load(both + place), load(both + up), load(of_hidden + place));
              of_gate[i] = g.of_gate, of_up[i] = g.of_up;
              store(of_both + place, g.of_gate), store(of_both + up, g.of_up);
              store(hidden + place, g.hidden);
            }
            store_pairs(of_both_rows + r / 2 * width + k, of_gate[0], of_gate[1]);
            store_pairs(of_both_rows + (r + HALF) / 2 * width + k, of_up[0], of_up[1]);
          }
        multiply<true>(length, width, HALF, gate_up_rows + c * length, length, of_both_rows, width,
                       sum, width, c > 0);
        if (!of_gate_up) continue;
        multiply<false>(PANEL, lanes, width / 2, (const Pair*)of_both, width / 2, x_columns, lanes,
                        of_weights + 2 * c * lanes, lanes, true);
        multiply<false>(HALF, lanes, width / 2, (const Pair*)hidden, width / 2, grad_columns, lanes,
                        of_weights + (2 * inner + c) * lanes, lanes, true);
      }
      for (int64_t p = 0; p < length; p++)
        for (int64_t k = 0; k < width; k += LANES)
          store(of_x + first + p * size + k, load(sum + p * width + k));
    }
    const int64_t rows = of_gate_up ? 3 * inner : 0, team = omp_get_num_threads();
#pragma omp for schedule(static)
    for (int64_t k = 0; k < rows; k++)
      for (int64_t p = 0; p < length; p++) {
        float total = 0;
        for (int64_t thread = 0; thread < team; thread++)
          total += ((const float*)(rest + thread * own))[k * lanes + p];
        assign(k < 2 * inner ? of_gate_up + l->turn(k) * length + p
                             : of_down + p * inner + k - 2 * inner,
               total);
      }
  }
}

// x = a * x + (b * g + c * g * g) · x for g = x · xᵀ, `steps` times, rounded to bfloat16 after each
// product. x: (rows, columns). scratch: rows * (3 * rows + 2 * columns) values.
void newton_schulz(const Iteration* n, Half* x, int64_t steps, Half* scratch, int threads) {
  const int64_t rows = n->rows, columns = n->columns;
  const __m512 a = _mm512_set1_ps(n->a), b = _mm512_set1_ps(n->b), c = _mm512_set1_ps(n->c);
  Half *gram = scratch, *polynomial = gram + rows * rows, *next = polynomial + rows * rows;
  Pair *square = (Pair*)(next + rows * columns), *wide = square + rows * rows / 2;
#pragma omp parallel num_threads(threads)
  {
    Half *from = x, *to = next;
    for (int64_t step = 0; step < steps; step++) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < (rows + PANEL - 1) / PANEL; j++)
        pack_panel({from, columns}, rows, columns, j, wide);
      visit_tiles(rows, rows, columns / 2, from, wide, true,
                  [&](int64_t r, int64_t k, __m512 sum) { store(gram + r * rows + k, sum); });
      mirror(gram, rows);
#pragma omp for schedule(static)
      for (int64_t j = 0; j < (rows + PANEL - 1) / PANEL; j++)
        pack_panel({gram, rows}, rows, rows, j, square);
      visit_tiles(rows, rows, rows / 2, gram, square, true, [&](int64_t r, int64_t k, __m512 sum) {
        const __m512 first = _mm512_mul_ps(b, load(gram + r * rows + k));
        store(polynomial + r * rows + k, _mm512_fmadd_ps(c, sum, first));
      });
      mirror(polynomial, rows);
#pragma omp for schedule(static)
      for (int64_t j = 0; j < columns; j += PANEL) {
        const int64_t width = std::min(PANEL, columns - j);
        pack_rows({from + j, columns}, rows, width, wide + j * rows / 2, rows);
      }
      visit_tiles(rows, columns, rows / 2, polynomial, wide, false,
                  [&](int64_t r, int64_t k, __m512 sum) {
                    const __m512 first = _mm512_mul_ps(a, load(from + r * columns + k));
                    store(to + r * columns + k, _mm512_add_ps(sum, first));
                  });
      std::swap(from, to);
    }
    if (from != x) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; r++) std::copy_n(from + r * columns, columns, x + r * columns);
    }
  }
}
}
