// Checks of tensors that a caller hands in; each failure names the value, the expectation and the remedy.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace vitrail {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Every check happens before anything is changed; the prefix tells Python that this was one.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "vitrail_C: ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());  // arrives in Python as RuntimeError
}

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

inline std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    default: return "dtype number " + std::to_string(int(type));
  }
}

inline std::string name_of(const torch::stable::Device& device) {
  if (device.is_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "device ") + std::to_string(device.index());
}

template <class Values>
std::string listed(const Values& values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

inline void check_type(const std::string& name, const Tensor& tensor, ScalarType expected) {
  const auto type = tensor.scalar_type();
  require(type == expected, name, " must be ", name_of(expected), ", got ", name_of(type), "; convert it first");
}

inline void check_device(const std::string& name, const Tensor& tensor, const torch::stable::Device& expected) {
  const auto device = tensor.device();
  require(device.type() == expected.type() && device.index() == expected.index(), name, " is on ", name_of(device),
          ", the others are on ", name_of(expected), "; move it there with .to(device)");
}

// The CUDA stream that PyTorch launches on now.
inline void* current_stream(const torch::stable::Device& device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index(), &stream));
  return stream;
}

// Whether the CPU has the instructions of x86-64-v3: AVX2, FMA and what came with them.
#if defined(__x86_64__)
inline bool has_v3() {
  static const bool answer = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  return answer;
}

// Whether it has those of x86-64-v4, AVX-512, and the products of bfloat16.
inline bool has_avx512_bf16() {
  static const bool answer = has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
  return answer;
}
#else
inline bool has_v3() { return false; }
inline bool has_avx512_bf16() { return false; }
#endif

}  // namespace vitrail
