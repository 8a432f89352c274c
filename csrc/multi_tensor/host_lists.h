// From the caller's lists of tensors to the groups that the executors take, with every check on the way.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../checks.h"
#include "lists.h"

namespace vitrail {
namespace {  // the tensors' own type is not for export

// One list of corresponding tensors.
struct Stream {
  std::string name;
  const std::vector<Tensor>& tensors;
  bool may_be_bf16;
  bool must_be_bf16 = false;
};

// Whether a tensor's elements fill one stretch of memory, in whatever order of dimensions.
inline bool is_dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] > 1) dims.emplace_back(strides[i], sizes[i]);
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline bool same_layout(const Tensor& left, const Tensor& right) {
  const auto sizes = left.sizes(), others = right.sizes();
  if (sizes.size() != others.size()) return false;
  const auto strides = left.strides(), other_strides = right.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != others[i] || (sizes[i] > 1 && strides[i] != other_strides[i])) return false;
  return true;
}

// Corresponding lists of tensors on one device. Absent lists are left out before they come here.
class HostLists {
 public:
  explicit HostLists(std::vector<Stream> streams) : streams_(std::move(streams)) {
    const Stream& first = streams_.front();
    count_ = int64_t(first.tensors.size());
    require(count_ > 0, first.name, " is empty; there is nothing to do");
    device_ = first.tensors.front().device();
    sizes_.reserve(count_);
    for (const Stream& stream : streams_)
      require(int64_t(stream.tensors.size()) == count_, stream.name, " holds ", stream.tensors.size(), " tensors, ",
              first.name, " holds ", count_, "; they must correspond one to one");
    int64_t chunks = 0;
    for (int64_t t = 0; t < count_; ++t) {
      sizes_.push_back(first.tensors[t].numel());
      add(t, chunks);
      chunks += chunks_of(sizes_.back());
    }
    require(chunks <= INT32_MAX, "the lists hold ", chunks, " chunks of ", kChunk, " elements, at most ", INT32_MAX,
            " are possible; split the lists");
    chunks_ = chunks;
    finish();
  }

  HostLists(const HostLists&) = delete;
  HostLists& operator=(const HostLists&) = delete;

  Groups groups() const { return {groups_.data(), int64_t(groups_.size())}; }
  int64_t count() const { return count_; }
  int64_t chunks() const { return chunks_; }
  const int64_t* sizes() const { return sizes_.data(); }  // of all tensors, in the caller's order
  torch::stable::Device device() const { return device_; }

 private:
  struct Storage {
    std::vector<void*> pointers[Lists::kMaxStreams];
    std::vector<int64_t> sizes;
    std::vector<int32_t> indices, first_partials;
  };

  // Checks tensor t of every stream and sorts it into the group of its types.
  void add(int64_t t, int64_t first_partial) {
    const Tensor& first = streams_.front().tensors[t];
    unsigned bf16 = 0;
    for (size_t s = 0; s < streams_.size(); ++s) {
      const Stream& stream = streams_[s];
      const Tensor& tensor = stream.tensors[t];
      const auto name = [&] { return stream.name + "[" + std::to_string(t) + "]"; };
      if (tensor.device() != device_) check_device(name(), tensor, device_);
      const auto type = tensor.scalar_type();
      const bool is_bf16 = type == ScalarType::BFloat16;
      if (stream.must_be_bf16) {
        if (!is_bf16) check_type(name(), tensor, ScalarType::BFloat16);
      } else if (!stream.may_be_bf16) {
        if (type != ScalarType::Float) check_type(name(), tensor, ScalarType::Float);
      } else if (!is_bf16 && type != ScalarType::Float) {
        fail(name(), " must be float32 or bfloat16, got ", name_of(type), "; convert it, or use the reference");
      }
      bf16 |= unsigned(is_bf16) << s;
      if (s == 0 ? !is_dense(tensor) : !same_layout(first, tensor))
        fail(name(), " has sizes ", listed(tensor.sizes()), " and strides ", listed(tensor.strides()),
             s == 0 ? std::string(", which leave gaps or overlap; make it contiguous")
                    : ", " + streams_[0].name + "[" + std::to_string(t) + "] has " + listed(first.sizes()) + " and " +
                          listed(first.strides()) + "; give both the same layout",
             ", or use the reference");
    }
    if (!last_ || bf16 != last_type_) {  // most lists are of one type
      std::unique_ptr<Storage>& storage = by_type_[bf16];
      if (!storage) storage = std::make_unique<Storage>();
      last_ = storage.get();
      last_type_ = bf16;
    }
    Storage* const storage = last_;
    for (size_t s = 0; s < streams_.size(); ++s) storage->pointers[s].push_back(streams_[s].tensors[t].data_ptr());
    storage->sizes.push_back(sizes_[t]);
    storage->indices.push_back(int32_t(t));
    storage->first_partials.push_back(int32_t(first_partial));
  }

  void finish() {
    for (const auto& [bf16, storage] : by_type_) {
      Group group{};
      group.bf16 = bf16;
      for (size_t s = 0; s < streams_.size(); ++s) group.lists.pointers[s] = storage->pointers[s].data();
      group.lists.sizes = storage->sizes.data();
      group.lists.indices = storage->indices.data();
      group.lists.first_partials = storage->first_partials.data();
      group.lists.count = int64_t(storage->sizes.size());
      groups_.push_back(group);
    }
  }

  std::vector<Stream> streams_;
  int64_t count_ = 0, chunks_ = 0;
  std::vector<int64_t> sizes_;
  torch::stable::Device device_{torch::headeronly::DeviceType::CPU};
  std::map<unsigned, std::unique_ptr<Storage>> by_type_;
  Storage* last_ = nullptr;  // of the tensor before
  unsigned last_type_ = 0;
  std::vector<Group> groups_;
};

// A 0-d float64 tensor: on the CPU its value is read here, on the GPU it stays where it is.
inline Scalar scalar(const std::string& name, const Tensor& tensor, const torch::stable::Device& device) {
  check_type(name, tensor, ScalarType::Double);
  require(tensor.numel() == 1, name, " must hold one number, got shape ", listed(tensor.sizes()));
  const auto* pointer = static_cast<const double*>(tensor.data_ptr());
  if (tensor.device().is_cpu()) return {*pointer, nullptr};
  check_device(name, tensor, device);
  return {0.0, pointer};
}

// A float32 tensor of one number, or null.
inline const float* flag(const std::string& name, const std::optional<Tensor>& tensor,
                         const torch::stable::Device& device) {
  if (!tensor) return nullptr;
  check_type(name, *tensor, ScalarType::Float);
  check_device(name, *tensor, device);
  require(tensor->numel() == 1, name, " must hold one number, got shape ", listed(tensor->sizes()));
  return static_cast<const float*>(tensor->data_ptr());
}

// Multipliers of the gradients: float32, one for all or one for each tensor, or null.
struct Scales {
  const float* values = nullptr;
  bool one_for_all = true;

  Scales(const std::optional<Tensor>& tensor, int64_t count, const torch::stable::Device& device) {
    if (!tensor) return;
    check_type("scales", *tensor, ScalarType::Float);
    check_device("scales", *tensor, device);
    one_for_all = tensor->numel() == 1;
    require(one_for_all || (tensor->dim() == 1 && tensor->numel() == count), "scales must hold one number or ", count,
            ", one for each tensor, got shape ", listed(tensor->sizes()));
    require(one_for_all || tensor->strides()[0] == 1, "scales must be contiguous, got stride ", tensor->strides()[0]);
    values = static_cast<const float*>(tensor->data_ptr());
  }
};

// Step counters: one float32 number a tensor.
inline std::vector<float*> step_pointers(const std::vector<Tensor>& steps, int64_t count,
                                         const torch::stable::Device& device) {
  require(int64_t(steps.size()) == count, "steps holds ", steps.size(), " tensors, expected one for each of the ", count);
  std::vector<float*> pointers;
  for (const Tensor& step : steps) {
    check_type("a step", step, ScalarType::Float);
    check_device("a step", step, device);
    require(step.numel() == 1, "a step must hold one number, got shape ", listed(step.sizes()));
    pointers.push_back(static_cast<float*>(step.data_ptr()));
  }
  return pointers;
}

// Memory for intermediate results, from PyTorch's allocator.
template <class T>
T* workspace(std::vector<Tensor>& keep, const Tensor& like, int64_t count) {
  const int64_t bytes = count * int64_t(sizeof(T));
  keep.push_back(torch::stable::new_empty(like, {bytes}, ScalarType::Byte));
  return static_cast<T*>(keep.back().data_ptr());
}

// Runs `operation` on the device of the lists, with the best instructions that the CPU has.
#define VITRAIL_RUN(operation, call, lists)                            \
  do {                                                                 \
    const auto device = (lists).device();                              \
    if (device.is_cuda()) {                                            \
      const torch::stable::accelerator::DeviceGuard guard(device.index()); \
      operation##_cuda(call, current_stream(device));                  \
    } else if (has_v3()) {                                             \
      operation##_v3(call);                                            \
    } else {                                                           \
      operation##_baseline(call);                                      \
    }                                                                  \
  } while (0)

}  // namespace
}  // namespace vitrail
