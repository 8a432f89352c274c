// Window attention on the CPU: what a call holds.
//
// The windows and the mask of a shifted one leave rectangles of the map, within each of which attention is dense
// (kernels/window_attention/README.md). An axis is cut into runs of equal segments, and two runs make rectangles of one
// kind.
#pragma once

#include "../portable.h"

namespace vitrail {

struct Run {
  int64_t start;  // first token
  int64_t count;  // segments
  int64_t real;   // tokens of each
  int64_t full;   // of each, with those that padding adds
};

// A map [B, H, W, channels] whose channels are adjacent; strides in elements.
struct Map {
  void* data;
  int64_t image, row, column;
};

struct AttentionCall {
  Map qkv;
  Map out;             // result; in the backward pass an input
  Map grad, grad_qkv;  // backward alone
  float* lse;          // [B, heads, H, W], contiguous
  const float* table;  // [(2 w - 1)^2, heads], contiguous
  const float* padding;  // [3 C]: what a padded token holds; null for zeros
  float* table_parts;    // [parts, heads, (2 w - 1)^2]: what each part of the batch adds to the gradient of the table
  float* padding_parts;  // [parts, heads, 2, width]: to that of `padding`, keys and values
  const Run* rows;
  const Run* columns;
  int64_t row_runs, column_runs;
  int64_t batch, height, width;
  int64_t heads, head_width, window;
  int64_t parts;  // of the batch: a task is one head of the images of a part
  float scale;
  bool half;  // bfloat16, else float32

  VITRAIL_HD int64_t first_image(int64_t part) const { return batch * part / parts; }
};

void attention_forward_v3(const AttentionCall& call);
void attention_forward_v4(const AttentionCall& call);
void attention_backward_v3(const AttentionCall& call);
void attention_backward_v4(const AttentionCall& call);

}  // namespace vitrail
