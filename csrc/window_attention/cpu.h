// Window attention on the CPU, on PyTorch's thread pool: a rectangle of one head at a time, in float32.
//
// Compiled once for each level of instructions; VITRAIL_LEVEL is the namespace of this one, VITRAIL_LANES its floats in
// a vector. Which rectangles are added up in which order does not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "attention.h"
#include "vectors.h"

namespace vitrail {
namespace VITRAIL_LEVEL {

constexpr int64_t kPad = 16;  // floats: rows of scores are whole vectors on every level

// Memory of a thread, aligned to cache lines.
class Arena {
 public:
  explicit Arena(int64_t floats) : memory_(floats + kPad) {
    next_ = memory_.data();
    while (reinterpret_cast<uintptr_t>(next_) % 64) ++next_;
  }
  float* take(int64_t floats) {
    float* const taken = next_;
    next_ += (floats + kPad - 1) / kPad * kPad;
    return taken;
  }

 private:
  std::vector<float> memory_;
  float* next_;
};

// Rectangles of one kind, for one head: how many keys there are, and the biases of their scores. All padded keys are
// one, whose bias is their log-sum-exp.
struct Kind {
  const AttentionCall& call;
  const Run &down, &across;
  const int64_t head, tokens;
  const bool padded;
  const int64_t keys, row;  // of a row of scores: what counts, and what is stored

  Kind(const AttentionCall& call, int64_t number, int64_t head)
      : call(call),
        down(call.rows[number / call.column_runs]),
        across(call.columns[number % call.column_runs]),
        head(head),
        tokens(down.real * across.real),
        padded(down.full > down.real || across.full > across.real),
        keys(tokens + padded),
        row((keys + kPad - 1) / kPad * kPad) {}

  // Row of the table for a query and a key of a rectangle.
  int64_t offset(int64_t query_row, int64_t query_column, int64_t key_row, int64_t key_column) const {
    return (query_row - key_row + call.window - 1) * (2 * call.window - 1) + query_column - key_column + call.window - 1;
  }

  float at(int64_t offset) const { return call.table[offset * call.heads + head]; }

  template <class Visit>
  void for_pads(Visit visit) const {
    for (int64_t i = 0; i < down.full; ++i)
      for (int64_t j = i < down.real ? across.real : 0; j < across.full; ++j) visit(i, j);
  }

  // The log-sum-exp of the biases of a query's padded keys.
  float virtual_bias(int64_t i, int64_t j) const {
    float top = -INFINITY, sum = 0.0f;
    for_pads([&](int64_t k, int64_t l) { top = std::max(top, at(offset(i, j, k, l))); });
    for_pads([&](int64_t k, int64_t l) { sum += std::exp(at(offset(i, j, k, l)) - top); });
    return top + std::log(sum);
  }

  void write_bias(float* bias) const {
    for (int64_t query = 0; query < tokens; ++query, bias += row) {
      const int64_t i = query / across.real, j = query % across.real;
      int64_t key = 0;
      for (int64_t k = 0; k < down.real; ++k)
        for (int64_t l = 0; l < across.real; ++l) bias[key++] = at(offset(i, j, k, l));
      if (padded) bias[key++] = virtual_bias(i, j);
      std::fill(bias + key, bias + row, -INFINITY);
    }
  }

  // Adds the gradient of the biases to one of the table, [(2 w - 1)^2].
  void fold(const float* bias, const float* grad, float* table) const {
    for (int64_t query = 0; query < tokens; ++query, grad += row, bias += row) {
      const int64_t i = query / across.real, j = query % across.real;
      int64_t key = 0;
      for (int64_t k = 0; k < down.real; ++k)
        for (int64_t l = 0; l < across.real; ++l) table[offset(i, j, k, l)] += grad[key++];
      if (!padded) continue;
      for_pads([&](int64_t k, int64_t l) {
        table[offset(i, j, k, l)] += grad[key] * std::exp(at(offset(i, j, k, l)) - bias[key]);
      });
    }
  }

  int64_t count() const { return down.count * across.count; }

  // Offset of a token in a map, from that of a rectangle's first one.
  int64_t within(const Map& map, int64_t token) const {
    return token / across.real * map.row + token % across.real * map.column;
  }

  int64_t corner(const Map& map, int64_t image, int64_t rectangle) const {
    return image * map.image + (down.start + rectangle / across.count * down.real) * map.row +
           (across.start + rectangle % across.count * across.real) * map.column;
  }
};

// Copies a rectangle of a map, channels from `channel` on, to rows of floats, and asks for the next one's: a head's
// channels of a token are a line or two of cache, too far from the next token's for the processor to foresee.
template <class T>
void read(const Kind& kind, const Map& map, int64_t image, int64_t rectangle, int64_t channel, float scale, float* to) {
  const int64_t width = kind.call.head_width;
  const Vector factor = broadcast(scale);
  const int64_t here = kind.corner(map, image, rectangle);
  const int64_t next = rectangle + 1 < kind.count()      ? kind.corner(map, image, rectangle + 1)
                       : image + 1 < kind.call.batch ? kind.corner(map, image + 1, 0)
                                                     : here;
  const T* const corner = static_cast<const T*>(map.data) + here + channel;
  for (int64_t i = 0; i < kind.down.real; ++i)
    for (int64_t j = 0; j < kind.across.real; ++j, to += width) {
      const T* const from = corner + i * map.row + j * map.column;
      for (int64_t c = 0; c < width; c += kLanes) {
        __builtin_prefetch(from + (next - here) + c);
        store(to + c, mul(load(from + c), factor));
      }
    }
}

// Writes rows of floats, each times `scale`, to tokens `first` and following ones of a rectangle of a map.
template <class T>
void write(const Kind& kind, const Map& map, int64_t image, int64_t rectangle, int64_t channel, float scale,
           const float* from, int64_t first, int64_t count) {
  const int64_t width = kind.call.head_width;
  T* const corner = static_cast<T*>(map.data) + kind.corner(map, image, rectangle) + channel;
  for (int64_t token = first; token < first + count; ++token, from += width) {
    T* const to = corner + kind.within(map, token);
#pragma GCC ivdep
    for (int64_t c = 0; c < width; ++c) to[c] = from_float<T>(from[c] * scale);
  }
}

// A key or value more, that of padding, and zeros up to a whole vector.
inline void read_padding(const Kind& kind, int64_t part, float* to) {
  const int64_t width = kind.call.head_width;
  float* const row = to + kind.tokens * width;
  std::fill(row, to + kind.row * width, 0.0f);
  if (kind.padded && kind.call.padding)
    std::copy_n(kind.call.padding + (part * kind.call.heads + kind.head) * width, width, row);
}

inline int64_t channel_of(const Kind& kind, int64_t part) {
  return (part * kind.call.heads + kind.head) * kind.call.head_width;
}

inline int64_t largest(const AttentionCall& call) {
  int64_t most = 0;
  for (int64_t number = 0; number < call.row_runs * call.column_runs; ++number)
    most = std::max(most, Kind(call, number, 0).row);
  return most;
}

// The map of the log-sum-exp of one head.
inline Map lse_of(const AttentionCall& call, int64_t head) {
  const int64_t area = call.height * call.width;
  return {call.lse + head * area, call.heads * area, call.width, 1};
}

template <class T>
class Forward {
 public:
  Forward(const AttentionCall& call, int64_t most)
      : call_(call), arena_(most * (4 * call.head_width + most) + kRows * (most + call.head_width) + 8 * kPad) {
    q_ = arena_.take(most * call.head_width);
    k_ = arena_.take(most * call.head_width);
    columns_ = arena_.take(most * call.head_width);
    v_ = arena_.take(most * call.head_width);
    bias_ = arena_.take(most * most);
    scores_ = arena_.take(kRows * most);
    out_ = arena_.take(kRows * call.head_width);
  }

  // One head of some images.
  void run(int64_t part, int64_t head) {
    for (int64_t number = 0; number < call_.row_runs * call_.column_runs; ++number) {
      const Kind kind(call_, number, head);
      kind.write_bias(bias_);
      for (int64_t image = call_.first_image(part); image < call_.first_image(part + 1); ++image)
        for (int64_t rectangle = 0; rectangle < kind.count(); ++rectangle) attend(kind, image, rectangle);
    }
  }

 private:
  void attend(const Kind& kind, int64_t image, int64_t rectangle) {
    const int64_t width = call_.head_width;
    read<T>(kind, call_.qkv, image, rectangle, channel_of(kind, 0), call_.scale, q_);
    read<T>(kind, call_.qkv, image, rectangle, channel_of(kind, 1), 1.0f, k_);
    read<T>(kind, call_.qkv, image, rectangle, channel_of(kind, 2), 1.0f, v_);
    read_padding(kind, 1, k_);
    read_padding(kind, 2, v_);
    transpose(k_, kind.row, width, columns_, kind.row);
    const Map lse = lse_of(call_, kind.head);
    float* const lse_corner = static_cast<float*>(lse.data) + kind.corner(lse, image, rectangle);
    for (int64_t first = 0; first < kind.tokens; first += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, kind.tokens - first);
      product(rows, kind.row, width, {q_ + first * width, width, 1}, columns_, kind.row, bias_ + first * kind.row,
              kind.row, scores_, kind.row);
      float inverse[kRows];
      for (int64_t m = 0; m < rows; ++m) {
        float top;
        const float sum = softmax(scores_ + m * kind.row, kind.row, top);
        lse_corner[kind.within(lse, first + m)] = top + std::log(sum);
        inverse[m] = 1.0f / sum;
      }
      product(rows, width, kind.keys, {scores_, kind.row, 1}, v_, width, nullptr, 0, out_, width);
      for (int64_t m = 0; m < rows; ++m)
        write<T>(kind, call_.out, image, rectangle, channel_of(kind, 0), inverse[m], out_ + m * width, first + m, 1);
    }
  }

  // Turns scores into their exponentials, less the largest; returns the sum of those.
  static float softmax(float* scores, int64_t count, float& top) {
    Vector most = load(scores);
    for (int64_t j = kLanes; j < count; j += kLanes) most = max(most, load(scores + j));
    top = largest_of(most);
    const Vector shift = broadcast(top);
    Vector sum = broadcast(0.0f);
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vector weight = exponential(sub(load(scores + j), shift));
      store(scores + j, weight);
      sum = add(sum, weight);
    }
    return sum_of(sum);
  }

  const AttentionCall& call_;
  Arena arena_;
  float *q_, *k_, *columns_, *v_, *bias_, *scores_, *out_;
};

template <class T>
class Backward {
 public:
  Backward(const AttentionCall& call, int64_t most)
      : call_(call), arena_(most * (8 * call.head_width + 4 * most) + 16 * kPad) {
    const int64_t rows = most * call.head_width, pairs = most * most;
    for (float** part : {&q_, &k_, &k_columns_, &v_, &v_columns_, &grad_, &out_, &result_}) *part = arena_.take(rows);
    for (float** part : {&bias_, &grad_bias_, &weights_, &grad_scores_}) *part = arena_.take(pairs);
  }

  // One head of some images, whose contributions to the table and the padding are those of `part`.
  void run(int64_t part, int64_t head) {
    const int64_t offsets = (2 * call_.window - 1) * (2 * call_.window - 1), width = call_.head_width;
    float* const table = call_.table_parts + (part * call_.heads + head) * offsets;
    padding_ = call_.padding_parts + (part * call_.heads + head) * 2 * width;
    std::fill_n(table, offsets, 0.0f);
    std::fill_n(padding_, 2 * width, 0.0f);
    for (int64_t number = 0; number < call_.row_runs * call_.column_runs; ++number) {
      const Kind kind(call_, number, head);
      kind.write_bias(bias_);
      std::fill_n(grad_bias_, kind.tokens * kind.row, 0.0f);
      for (int64_t image = call_.first_image(part); image < call_.first_image(part + 1); ++image)
        for (int64_t rectangle = 0; rectangle < kind.count(); ++rectangle) differentiate(kind, image, rectangle);
      kind.fold(bias_, grad_bias_, table);
    }
  }

 private:
  void differentiate(const Kind& kind, int64_t image, int64_t rectangle) {
    const int64_t width = call_.head_width, row = kind.row;
    read<T>(kind, call_.qkv, image, rectangle, channel_of(kind, 0), call_.scale, q_);
    read<T>(kind, call_.qkv, image, rectangle, channel_of(kind, 1), 1.0f, k_);
    read<T>(kind, call_.qkv, image, rectangle, channel_of(kind, 2), 1.0f, v_);
    read<T>(kind, call_.grad, image, rectangle, channel_of(kind, 0), 1.0f, grad_);
    read<T>(kind, call_.out, image, rectangle, channel_of(kind, 0), 1.0f, out_);
    read_padding(kind, 1, k_);
    read_padding(kind, 2, v_);
    transpose(k_, row, width, k_columns_, row);
    transpose(v_, row, width, v_columns_, row);
    const Map lse = lse_of(call_, kind.head);
    const float* const lse_corner = static_cast<const float*>(lse.data) + kind.corner(lse, image, rectangle);
    for (int64_t first = 0; first < kind.tokens; first += kRows) {
      const int64_t rows = std::min<int64_t>(kRows, kind.tokens - first), from = first * row;
      product(rows, row, width, {q_ + first * width, width, 1}, k_columns_, row, bias_ + from, row, weights_ + from,
              row);
      product(rows, row, width, {grad_ + first * width, width, 1}, v_columns_, row, nullptr, 0, grad_scores_ + from,
              row);
      for (int64_t m = 0; m < rows; ++m)
        through_softmax(first + m, lse_corner[kind.within(lse, first + m)], row, width);
      product(rows, width, kind.keys, {grad_scores_ + from, row, 1}, k_, width, nullptr, 0, result_, width);
      write<T>(kind, call_.grad_qkv, image, rectangle, channel_of(kind, 0), call_.scale, result_, first, rows);
    }
    product(kind.keys, width, kind.tokens, {grad_scores_, 1, row}, q_, width, nullptr, 0, result_, width);
    finish(kind, image, rectangle, 1);
    product(kind.keys, width, kind.tokens, {weights_, 1, row}, grad_, width, nullptr, 0, result_, width);
    finish(kind, image, rectangle, 2);
  }

  // Turns the scores of a query into probabilities, and the gradient of those into that of the scores.
  void through_softmax(int64_t query, float lse, int64_t row, int64_t width) {
    Vector products = broadcast(0.0f);
    for (int64_t c = 0; c < width; c += kLanes)
      products = mul_add(load(grad_ + query * width + c), load(out_ + query * width + c), products);
    const Vector delta = broadcast(sum_of(products)), shift = broadcast(lse);
    float *const weights = weights_ + query * row, *const grad = grad_scores_ + query * row;
    float* const grad_bias = grad_bias_ + query * row;
    for (int64_t j = 0; j < row; j += kLanes) {
      const Vector weight = exponential(sub(load(weights + j), shift));
      const Vector through = mul(weight, sub(load(grad + j), delta));
      store(weights + j, weight);
      store(grad + j, through);
      store(grad_bias + j, add(load(grad_bias + j), through));
    }
  }

  // Writes the gradients of keys (1) or values (2), and adds that of the padded one.
  void finish(const Kind& kind, int64_t image, int64_t rectangle, int64_t part) {
    write<T>(kind, call_.grad_qkv, image, rectangle, channel_of(kind, part), 1.0f, result_, 0, kind.tokens);
    if (!kind.padded) return;
    const int64_t width = call_.head_width;
    float* const sum = padding_ + (part - 1) * width;
    for (int64_t c = 0; c < width; ++c) sum[c] += result_[kind.tokens * width + c];
  }

  const AttentionCall& call_;
  Arena arena_;
  float *q_, *k_, *k_columns_, *v_, *v_columns_, *grad_, *out_, *result_;
  float *bias_, *grad_bias_, *weights_, *grad_scores_;
  float* padding_ = nullptr;
};

template <template <class> class Pass>
void attention(const AttentionCall& call) {
  const int64_t most = largest(call);
  torch::stable::parallel_for(0, call.parts * call.heads, 1, [&](int64_t begin, int64_t end) {
    const auto run = [&](auto pass) {
      for (int64_t task = begin; task < end; ++task) pass.run(task / call.heads, task % call.heads);
    };
    if (call.half) {
      run(Pass<bf16>(call, most));
    } else {
      run(Pass<float>(call, most));
    }
  });
}

}  // namespace VITRAIL_LEVEL
}  // namespace vitrail
