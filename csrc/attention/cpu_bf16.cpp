// Attention for CPUs that multiply bfloat16: AVX-512 with its BF16 instructions. One head of one image at a time, whose
// scores never leave the core's own caches.
//
// An instruction multiplies pairs of neighbours along the depth of a product and adds both to a float32. A matrix lies
// ready as the right factor in pairs: a row for every two of the depth, in which column c holds the two elements of
// column c side by side, 32 bits. Four vectors of columns lie together, row after row, in the order in which they are
// read; fewer if no more are left. As the left factor, 32 bits at a time are broadcast.
//
// What comes from elsewhere is included before the pragma: its inline functions may be shared with the other files.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "attention.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("arch=x86-64-v4,avx512bf16")
#include "../avx512_bf16.h"

namespace vitrail {
namespace {

constexpr int kRows = 6, kColumns = 4;  // of a block of a product, in rows and vectors: its sums fill the registers
constexpr int64_t kQueries = 24;  // at a time: what is read of a right factor into the first cache serves them all
static_assert(kQueries % 2 == 0, "rows of scores are stored as pairs");
constexpr float kLog2E = 1.44269504f;

inline int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

// The left factor of a product: the pair (i, k) of row i lies at data[i row + k pair], 32 bits each.
struct Left {
  const uint32_t* data;
  int64_t row, pair;
};

inline Left rows_of(const bf16* data, int64_t stride) {
  return {reinterpret_cast<const uint32_t*>(data), stride / 2, 1};
}

// A block of a product of depth 2 `pairs`: each(m, n, sums) for its rows and vectors.
template <int kM, int kN, class Each>
inline void block(const Left& a, const uint32_t* b, int64_t pairs, const Each& each) {
  __m512 sums[kM][kN];  // in registers, as all their loops are unrolled
#pragma GCC unroll 6
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) sums[m][n] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh right[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) right[n] = (__m512bh)_mm512_load_si512(b + (k * kN + n) * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < kM; ++m) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(int(a.data[m * a.row + k * a.pair]));
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) sums[m][n] = _mm512_dpbf16_ps(sums[m][n], left, right[n]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) each(m, n, sums[m][n]);
}

// Some columns of a product; each(row, column, sums).
template <int kN, class Each>
inline void columns_product(int64_t rows, int64_t pairs, const Left& a, const uint32_t* b, int64_t column,
                            const Each& each) {
  int64_t row = 0;
  const auto take = [&](auto count) {
    constexpr int kM = decltype(count)::value;
    block<kM, kN>({a.data + row * a.row, a.row, a.pair}, b + column * pairs, pairs,
                  [&](int m, int n, __m512 sums) { each(row + m, column + n * kLanes, sums); });
    row += kM;
  };
  while (rows - row >= kRows) take(std::integral_constant<int, kRows>());
  switch (rows - row) {
    case 5: take(std::integral_constant<int, 5>()); break;
    case 4: take(std::integral_constant<int, 4>()); break;
    case 3: take(std::integral_constant<int, 3>()); break;
    case 2: take(std::integral_constant<int, 2>()); break;
    case 1: take(std::integral_constant<int, 1>()); break;
    default: break;
  }
}

// A product of depth 2 `pairs`; each(row, column, sums) for all its vectors.
template <class Each>
inline void product(int64_t rows, int64_t columns, int64_t pairs, const Left& a, const uint32_t* b, const Each& each) {
  int64_t column = 0;
  for (; columns - column >= kColumns * kLanes; column += kColumns * kLanes)
    columns_product<kColumns>(rows, pairs, a, b, column, each);
  switch ((columns - column) / kLanes) {
    case 3: columns_product<3>(rows, pairs, a, b, column, each); break;
    case 2: columns_product<2>(rows, pairs, a, b, column, each); break;
    case 1: columns_product<1>(rows, pairs, a, b, column, each); break;
    default: break;
  }
}

// The right factor of `pairs` rows and `columns` columns: where vectors of columns from `column` on begin, and how far
// apart its rows are.
struct Panel {
  uint32_t* data;
  int64_t row;

  Panel(uint32_t* factor, int64_t columns, int64_t pairs, int64_t column) {
    const int64_t first = column / (kColumns * kLanes) * (kColumns * kLanes);
    data = factor + first * pairs + column - first;
    row = std::min(kColumns * kLanes, columns - first);
  }
};

// 16 elements, or zeros where there is no row.
inline __m256i row_of(const bf16* from, bool real) {
  return real ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)) : _mm256_setzero_si256();
}

// Pairs along the rows' own direction, for a product with their transpose: `count` rows of `width` elements become
// width / 2 rows of `columns` columns; the columns behind them are zero.
inline void pair_channels(const bf16* from, int64_t stride, int64_t count, int64_t width, uint32_t* to,
                          int64_t columns) {
  for (int64_t first = 0; first < columns; first += 8) {
    const Panel panel(to, columns, width / 2, first);
    for (int64_t c = 0; c < width / 2; c += 8) {
      __m256i row[8], pair[8];
      for (int64_t i = 0; i < 8; ++i) row[i] = row_of(from + (first + i) * stride + 2 * c, first + i < count);
      for (int i = 0; i < 8; i += 2) {
        pair[i] = _mm256_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm256_unpackhi_epi32(row[i], row[i + 1]);
      }
      for (int i = 0; i < 8; i += 4) {
        row[i] = _mm256_unpacklo_epi64(pair[i], pair[i + 2]);
        row[i + 1] = _mm256_unpackhi_epi64(pair[i], pair[i + 2]);
        row[i + 2] = _mm256_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        row[i + 3] = _mm256_unpackhi_epi64(pair[i + 1], pair[i + 3]);
      }
      uint32_t* const corner = panel.data + c * panel.row;
      for (int i = 0; i < 4; ++i) {
        const __m256i low = _mm256_permute2x128_si256(row[i], row[i + 4], 0x20);
        const __m256i high = _mm256_permute2x128_si256(row[i], row[i + 4], 0x31);
        _mm256_store_si256(reinterpret_cast<__m256i*>(corner + i * panel.row), low);
        _mm256_store_si256(reinterpret_cast<__m256i*>(corner + (i + 4) * panel.row), high);
      }
    }
  }
}

inline __m512i interleaved(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// Pairs of rows: `count` rows of `width` elements become half as many of `width` columns, up to `pairs` with zeros.
inline void pair_rows(const bf16* from, int64_t stride, int64_t count, int64_t width, uint32_t* to, int64_t pairs) {
  for (int64_t c = 0; c < width; c += kLanes) {
    const Panel panel(to, width, pairs, c);
    for (int64_t k = 0; k < pairs; ++k) {
      const bf16* const row = from + 2 * k * stride + c;
      const __m256i upper = row_of(row, 2 * k < count), lower = row_of(row + stride, 2 * k + 1 < count);
      _mm512_store_si512(panel.data + k * panel.row, interleaved(upper, lower));
    }
  }
}

// Asks for some tokens of the head that comes next: a head's channels are a line or two of cache, too far from the next
// token's for the processor to foresee.
inline void expect(const Tokens& tokens, int64_t task, const AttentionOfTokens& call, int64_t first, int64_t count) {
  const bf16* const next = tokens.of(task / call.heads, task % call.heads, call.width);
  for (int64_t token = first; token < std::min(first + kQueries, count); ++token)
    for (int64_t c = 0; c < call.width; c += 32) __builtin_prefetch(next + token * tokens.token + c);
}

// Memory of a thread, aligned to cache lines.
class Arena {
 public:
  explicit Arena(int64_t words) : memory_(words + 64) {
    next_ = memory_.data();
    while (reinterpret_cast<uintptr_t>(next_) % 64) ++next_;
  }
  template <class T>
  T* take(int64_t words) {
    uint32_t* const taken = next_;
    next_ += whole(words, kLanes);
    return reinterpret_cast<T*>(taken);
  }

 private:
  std::vector<uint32_t> memory_;
  uint32_t* next_;
};

// Mask of the last vector of a row of scores: what lies behind the keys counts for nothing.
inline __mmask16 within(int64_t column, int64_t keys) {
  return keys - column >= kLanes ? __mmask16(0xFFFF) : __mmask16((1u << (keys - column)) - 1);
}

// The largest score of a row times `factor`, in all lanes.
inline __m512 largest(const float* scores, const AttentionOfTokens& call, __m512 factor) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t j = 0; j < call.keys; j += kLanes)
    most = _mm512_mask_max_ps(most, within(j, call.keys), _mm512_load_ps(scores + j), most);
  return _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(most)), factor);
}

// 2^(factor score - top), zero where no key is.
inline __m512 exponential(const float* scores, __m512 factor, __m512 top, __mmask16 here) {
  return _mm512_maskz_mov_ps(here, exp2(_mm512_fmsub_ps(_mm512_load_ps(scores), factor, top)));
}

class Forward {
 public:
  explicit Forward(const AttentionOfTokens& call)
      : call_(call), row_(whole(call.keys, kLanes)), arena_(row_ * (call.width + 2 * kQueries)) {
    k_ = arena_.take<uint32_t>(row_ * call.width / 2);
    v_ = arena_.take<uint32_t>(row_ * call.width / 2);
    scores_ = arena_.take<float>(kQueries * row_);
    weights_ = arena_.take<bf16>(kQueries * row_ / 2);
  }

  // One head of one image, while the memory of the one after it comes, if there is one.
  void run(int64_t task, int64_t tasks) {
    const int64_t image = task / call_.heads, head = task % call_.heads, width = call_.width;
    const bf16* const q = call_.q.of(image, head, width);
    bf16* const out = call_.out.of(image, head, width);
    pair_channels(call_.k.of(image, head, width), call_.k.token, call_.keys, width, k_, row_);
    pair_rows(call_.v.of(image, head, width), call_.v.token, call_.keys, width, v_, row_ / 2);
    for (int64_t first = 0; first < call_.queries; first += kQueries) {
      const int64_t rows = std::min(kQueries, call_.queries - first);
      if (task + 1 < tasks) {
        expect(call_.q, task + 1, call_, first, call_.queries);
        expect(call_.k, task + 1, call_, first, call_.keys);
        expect(call_.v, task + 1, call_, first, call_.keys);
      }
      product(rows, row_, width / 2, rows_of(q + first * call_.q.token, call_.q.token), k_,
              [&](int64_t m, int64_t j, __m512 sums) { _mm512_store_ps(scores_ + m * row_ + j, sums); });
      float inverse[kQueries];
      for (int64_t m = 0; m < rows; ++m) inverse[m] = softmax(m);
      product(rows, width, row_ / 2, rows_of(weights_, row_), v_, [&](int64_t m, int64_t c, __m512 sums) {
        store(out + (first + m) * call_.out.token + c, _mm512_mul_ps(sums, _mm512_set1_ps(inverse[m])));
      });
    }
  }

 private:
  // Turns a row of scores into weights, the largest of them 1; returns the inverse of their sum.
  float softmax(int64_t m) {
    const float* const scores = scores_ + m * row_;
    const __m512 factor = _mm512_set1_ps(call_.scale * kLog2E);
    const __m512 top = largest(scores, call_, factor);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < row_; j += kLanes) {
      const __m512 weight = exponential(scores + j, factor, top, within(j, call_.keys));
      store(weights_ + m * row_ + j, weight);
      sum = _mm512_add_ps(sum, weight);
    }
    return 1.0f / _mm512_reduce_add_ps(sum);
  }

  const AttentionOfTokens& call_;
  const int64_t row_;
  Arena arena_;
  uint32_t *k_, *v_;
  float* scores_;
  bf16* weights_;
};

class Backward {
 public:
  explicit Backward(const AttentionOfTokens& call)
      : call_(call),
        row_(whole(call.keys, kLanes)),
        pairs_(whole(call.queries, 2) / 2),
        arena_(call.width * (3 * row_ / 2 + 2 * pairs_) + row_ * (2 * pairs_ + 3 * kQueries)) {
    const int64_t width = call.width;
    for (uint32_t** part : {&k_, &k_rows_, &v_}) *part = arena_.take<uint32_t>(row_ * width / 2);
    for (uint32_t** part : {&q_, &grad_}) *part = arena_.take<uint32_t>(pairs_ * width);
    for (uint32_t** part : {&weights_, &grad_scores_}) *part = arena_.take<uint32_t>(pairs_ * row_);
    for (float** part : {&scores_, &products_}) *part = arena_.take<float>(kQueries * row_);
    rows_ = arena_.take<bf16>(kQueries * row_ / 2);
  }

  void run(int64_t task, int64_t tasks) {
    const int64_t image = task / call_.heads, head = task % call_.heads, width = call_.width;
    const int64_t queries = call_.queries, keys = call_.keys;
    const bf16 *const q = call_.q.of(image, head, width), *const k = call_.k.of(image, head, width);
    const bf16* const grad = call_.grad.of(image, head, width);
    pair_channels(k, call_.k.token, keys, width, k_, row_);
    pair_channels(call_.v.of(image, head, width), call_.v.token, keys, width, v_, row_);
    pair_rows(k, call_.k.token, keys, width, k_rows_, row_ / 2);
    pair_rows(q, call_.q.token, queries, width, q_, pairs_);
    pair_rows(grad, call_.grad.token, queries, width, grad_, pairs_);
    const __m512 scale = _mm512_set1_ps(call_.scale);
    for (int64_t first = 0; first < queries; first += kQueries) {
      const int64_t rows = std::min(kQueries, queries - first);
      if (task + 1 < tasks) {
        expect(call_.q, task + 1, call_, first, queries);
        expect(call_.k, task + 1, call_, first, keys);
        expect(call_.v, task + 1, call_, first, keys);
        expect(call_.grad, task + 1, call_, first, queries);
      }
      product(rows, row_, width / 2, rows_of(q + first * call_.q.token, call_.q.token), k_,
              [&](int64_t m, int64_t j, __m512 sums) { _mm512_store_ps(scores_ + m * row_ + j, sums); });
      product(rows, row_, width / 2, rows_of(grad + first * call_.grad.token, call_.grad.token), v_,
              [&](int64_t m, int64_t j, __m512 sums) { _mm512_store_ps(products_ + m * row_ + j, sums); });
      for (int64_t m = 0; m < whole(rows, 2); ++m) through_softmax(m, m < rows);
      store_pairs(first / 2, whole(rows, 2));
      bf16* const grad_q = call_.grad_q.of(image, head, width) + first * call_.grad_q.token;
      product(rows, width, row_ / 2, rows_of(rows_, row_), k_rows_, [&](int64_t m, int64_t c, __m512 sums) {
        store(grad_q + m * call_.grad_q.token + c, _mm512_mul_ps(sums, scale));
      });
    }
    finish(call_.grad_k, image, head, grad_scores_, q_, scale);
    finish(call_.grad_v, image, head, weights_, grad_, _mm512_set1_ps(1.0f));
  }

 private:
  // Turns a row of scores into probabilities, and the gradient of those into that of the scores. A row
  // behind the last query is zero, to make a pair.
  void through_softmax(int64_t m, bool real) {
    float *const scores = scores_ + m * row_, *const products = products_ + m * row_;
    if (!real) {
      std::fill_n(scores, row_, 0.0f);
      std::fill_n(rows_ + m * row_, row_, bf16{0});
      return;
    }
    const __m512 factor = _mm512_set1_ps(call_.scale * kLog2E);
    const __m512 top = largest(scores, call_, factor);
    __m512 total = _mm512_setzero_ps(), sum = total;
    for (int64_t j = 0; j < row_; j += kLanes) {
      const __m512 weight = exponential(scores + j, factor, top, within(j, call_.keys));
      _mm512_store_ps(scores + j, weight);
      total = _mm512_add_ps(total, weight);
      sum = _mm512_fmadd_ps(weight, _mm512_load_ps(products + j), sum);
    }
    const float inverse = 1.0f / _mm512_reduce_add_ps(total);
    const __m512 share = _mm512_set1_ps(inverse), mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) * inverse);
    for (int64_t j = 0; j < row_; j += kLanes) {
      const __m512 probability = _mm512_mul_ps(_mm512_load_ps(scores + j), share);
      _mm512_store_ps(scores + j, probability);
      store(rows_ + m * row_ + j, _mm512_mul_ps(probability, _mm512_sub_ps(_mm512_load_ps(products + j), mean)));
    }
  }

  // Keeps a block's probabilities and gradients of scores as pairs of queries.
  void store_pairs(int64_t first, int64_t rows) {
    for (int64_t m = 0; m < rows; m += 2)
      for (int64_t j = 0; j < row_; j += kLanes) {
        const int64_t upper = m * row_ + j, lower = upper + row_, to = (first + m / 2) * row_ + j;
        _mm512_store_si512(weights_ + to,
                           interleaved((__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(scores_ + upper)),
                                       (__m256i)_mm512_cvtneps_pbh(_mm512_load_ps(scores_ + lower))));
        _mm512_store_si512(grad_scores_ + to,
                           interleaved(_mm256_load_si256(reinterpret_cast<const __m256i*>(rows_ + upper)),
                                       _mm256_load_si256(reinterpret_cast<const __m256i*>(rows_ + lower))));
      }
  }

  // The transpose of pairs of queries by rows of queries: gradients of the keys or of the values.
  void finish(const Tokens& to, int64_t image, int64_t head, const uint32_t* left, const uint32_t* right, __m512 scale) {
    const int64_t width = call_.width;
    bf16* const rows = to.of(image, head, width);
    product(call_.keys, width, pairs_, {left, 1, row_}, right,
            [&](int64_t m, int64_t c, __m512 sums) { store(rows + m * to.token + c, _mm512_mul_ps(sums, scale)); });
  }

  const AttentionOfTokens& call_;
  const int64_t row_, pairs_;
  Arena arena_;
  uint32_t *k_, *k_rows_, *v_, *q_, *grad_, *weights_, *grad_scores_;
  float *scores_, *products_;
  bf16* rows_;
};

template <class Pass>
void attention(const AttentionOfTokens& call) {
  torch::stable::parallel_for(0, call.batch * call.heads, 1, [&](int64_t begin, int64_t end) {
    Pass pass(call);
    for (int64_t task = begin; task < end; ++task) pass.run(task, end);
  });
}

}  // namespace

void attention_of_tokens_forward(const AttentionOfTokens& call) { attention<Forward>(call); }

void attention_of_tokens_backward(const AttentionOfTokens& call) { attention<Backward>(call); }

}  // namespace vitrail
#endif
