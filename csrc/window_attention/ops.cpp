// Window attention as ops of PyTorch, for the CPU.
#include "../checks.h"
#include "attention.h"

namespace vitrail {
namespace {

#if defined(__x86_64__)
bool has_v4() {
  static const bool answer = has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl");
  return answer;
}
#endif

// A map [B, H, W, channels] of the dtype of all of them.
Map map_of(const std::string& name, const Tensor& tensor, const Tensor& like, int64_t channels) {
  check_type(name, tensor, like.scalar_type());
  require(tensor.device().is_cpu(), name, " is on ", name_of(tensor.device()), "; this op is for the CPU");
  const auto sizes = tensor.sizes(), strides = tensor.strides(), all = like.sizes();
  require(sizes.size() == 4 && sizes[0] == all[0] && sizes[1] == all[1] && sizes[2] == all[2] && sizes[3] == channels,
          name, " must have shape [", all[0], ", ", all[1], ", ", all[2], ", ", channels, "], got ", listed(sizes));
  require(strides[3] == 1, name, " has strides ", listed(strides), ", expected 1 in the last dimension; pass ", name,
          ".contiguous()");
  return {tensor.data_ptr(), strides[0], strides[1], strides[2]};
}

float* floats_of(const std::string& name, const Tensor& tensor, int64_t count) {
  check_type(name, tensor, ScalarType::Float);
  require(tensor.device().is_cpu() && tensor.is_contiguous() && tensor.numel() == count, name, " must hold ", count,
          " adjacent values on the CPU, got sizes ", listed(tensor.sizes()), " with strides ", listed(tensor.strides()));
  return static_cast<float*>(tensor.data_ptr());
}

std::vector<Run> runs_of(const std::string& name, const std::vector<int64_t>& numbers, int64_t length, int64_t window) {
  require(numbers.size() % 4 == 0, name, " must hold start, count, tokens and padded tokens of each run, got ",
          numbers.size(), " numbers");
  std::vector<Run> runs;
  int64_t next = 0;
  for (size_t i = 0; i < numbers.size(); i += 4) {
    const Run run{numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]};
    require(run.start == next && run.count > 0 && run.real > 0 && run.real <= run.full && run.full <= window, name,
            " has a run of ", run.count, " segments of ", run.real, " and ", run.full, " tokens at ", run.start,
            ", expected one at ", next, " with segments no longer than the window of ", window);
    next += run.count * run.real;
    runs.push_back(run);
  }
  require(next == length, name, " ends at ", next, ", expected ", length, ": the length of the map");
  return runs;
}

// What both passes hand in alike.
struct Common {
  AttentionCall call{};
  std::vector<Run> rows, columns;

  Common(const Tensor& qkv, const Tensor& table, const Tensor& padding, const Tensor& lse,
         const std::vector<int64_t>& row_runs, const std::vector<int64_t>& column_runs, int64_t window, double scale) {
    require(qkv.scalar_type() == ScalarType::BFloat16 || qkv.scalar_type() == ScalarType::Float,
            "qkv must be bfloat16 or float32, got ", name_of(qkv.scalar_type()), "; use the reference");
    const auto sizes = qkv.sizes(), table_sizes = table.sizes();
    require(sizes.size() == 4, "qkv must have shape [B, H, W, 3C], got ", listed(sizes));
    require(window > 0 && table_sizes.size() == 2 && table_sizes[0] == (2 * window - 1) * (2 * window - 1),
            "bias_table must have ", (2 * window - 1) * (2 * window - 1), " rows, got sizes ", listed(table_sizes));
    call.heads = table_sizes[1];
    require(call.heads > 0 && sizes[3] % (3 * call.heads) == 0 && sizes[3] / (3 * call.heads) % 16 == 0,
            "qkv has ", sizes[3], " channels, expected queries, keys and values of ", call.heads,
            " heads whose width is a multiple of 16; use the reference");
    call.batch = sizes[0];
    call.height = sizes[1];
    call.width = sizes[2];
    call.head_width = sizes[3] / (3 * call.heads);
    call.window = window;
    call.scale = float(scale);
    call.half = qkv.scalar_type() == ScalarType::BFloat16;
    call.qkv = map_of("qkv", qkv, qkv, sizes[3]);
    call.table = floats_of("bias_table", table, table.numel());
    call.padding = padding.numel() ? floats_of("qkv_bias", padding, sizes[3]) : nullptr;
    call.lse = floats_of("lse", lse, call.batch * call.heads * call.height * call.width);
    rows = runs_of("rows", row_runs, call.height, window);
    columns = runs_of("columns", column_runs, call.width, window);
    call.rows = rows.data();
    call.columns = columns.data();
    call.row_runs = int64_t(rows.size());
    call.column_runs = int64_t(columns.size());
  }
};

void forward_op(Tensor out, Tensor lse, Tensor qkv, Tensor table, Tensor padding, std::vector<int64_t> rows,
                std::vector<int64_t> columns, int64_t window, double scale, int64_t parts) {
  Common common(qkv, table, padding, lse, rows, columns, window, scale);
  require(parts > 0, "parts must be positive, got ", parts);
  common.call.parts = parts;
  common.call.out = map_of("out", out, qkv, common.call.heads * common.call.head_width);
#if defined(__x86_64__)
  require(has_v3(), "this CPU has no AVX2 and FMA; use the reference");
  (has_v4() ? attention_forward_v4 : attention_forward_v3)(common.call);
#else
  fail("the op is written for x86-64; use the reference");
#endif
}

void backward_op(Tensor grad_qkv, Tensor table_parts, Tensor padding_parts, Tensor grad, Tensor qkv, Tensor table,
                 Tensor padding, Tensor out, Tensor lse, std::vector<int64_t> rows, std::vector<int64_t> columns,
                 int64_t window, double scale) {
  Common common(qkv, table, padding, lse, rows, columns, window, scale);
  AttentionCall& call = common.call;
  const int64_t width = call.heads * call.head_width;
  call.out = map_of("out", out, qkv, width);
  call.grad = map_of("grad", grad, qkv, width);
  call.grad_qkv = map_of("grad_qkv", grad_qkv, qkv, 3 * width);
  require(table_parts.sizes().size() == 3 && table_parts.sizes()[0] > 0, "table_parts must have shape ",
          "[parts, heads, offsets] with a part or more, got ", listed(table_parts.sizes()));
  call.parts = table_parts.sizes()[0];
  call.table_parts = floats_of("table_parts", table_parts, call.parts * table.numel());
  call.padding_parts = floats_of("padding_parts", padding_parts, call.parts * 2 * width);
#if defined(__x86_64__)
  require(has_v3(), "this CPU has no AVX2 and FMA; use the reference");
  (has_v4() ? attention_backward_v4 : attention_backward_v3)(call);
#else
  fail("the op is written for x86-64; use the reference");
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitrail_C, m) {
  m.def(
      "window_attention_out(Tensor(a!) out, Tensor(b!) lse, Tensor qkv, Tensor bias_table, Tensor qkv_bias, int[] rows, "
      "int[] columns, int window_size, float scale, int parts) -> ()");
  m.def(
      "window_attention_backward_out(Tensor(a!) grad_qkv, Tensor(b!) table_parts, Tensor(c!) padding_parts, Tensor grad, "
      "Tensor qkv, Tensor bias_table, Tensor qkv_bias, Tensor out, Tensor lse, int[] rows, int[] columns, "
      "int window_size, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CPU, m) {
  m.impl("window_attention_out", TORCH_BOX(&forward_op));
  m.impl("window_attention_backward_out", TORCH_BOX(&backward_op));
}

}  // namespace vitrail
