// Patch gather on the CPU, on PyTorch's thread pool.
//
// Compiled once for each level of instructions; VITRAIL_LEVEL is the namespace of this one.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "gather.h"

namespace vitrail {
namespace VITRAIL_LEVEL {

constexpr int kPeriod = 48;  // values: whole pixels, and whole vectors of floats

// One row after another: its segments into the stage, the stage's octets into a row of bytes, those into the output.
template <class Patch, class T>
class Rows {
 public:
  explicit Rows(const GatherCall& call) : call_(call) {
    Affine affine(call, 0);
    for (int i = 0; i < kPeriod; ++i) {
      scale_[i] = affine.scale[i % 3];
      shift_[i] = affine.shift[i % 3];
    }
  }

  void write(int64_t row) {
    T* const out = static_cast<T*>(call_.out) + row * call_.columns;
    const int64_t sample = row / call_.count;
    const int64_t index = call_.indices[sample * call_.index_stride + row % call_.count];
    int64_t written = 0;
    if (index >= 0 && index < call_.patches) {
      const Patch patch(call_, sample, int32_t(index));
      auto* const stage = reinterpret_cast<uint8_t*>(stage_);
      for (unsigned s = 0; s < Patch::kSegments; ++s)  // not by windows, which may reach beyond the image
        memcpy(stage + patch.position(s), patch.segment(s), Patch::kLength);
      for (unsigned n = 0; n < Patch::kOctets; ++n) {
        const Octet octet = patch.octet(stage_, n);
        memcpy(bytes_ + n * kOctet, &octet.low, 4);
        memcpy(bytes_ + n * kOctet + 4, &octet.high, 4);
      }
      written = Patch::kValues;
      constexpr int64_t kWhole = Patch::kValues / kPeriod * kPeriod;
      for (int64_t k = 0; k < kWhole; k += kPeriod) convert<kPeriod>(bytes_ + k, out + k);
      convert<Patch::kValues - kWhole>(bytes_ + kWhole, out + kWhole);
    }
    memset(out + written, 0, (call_.columns - written) * sizeof(T));  // in all three types, zero has no bit set
  }

 private:
  template <int kCount>
  void convert(const uint8_t* bytes, T* __restrict out) const {
#pragma GCC ivdep
    for (int i = 0; i < kCount; ++i) out[i] = from_float<T>(normalise(bytes[i], scale_[i], shift_[i]));
  }

  const GatherCall& call_;
  float scale_[kPeriod], shift_[kPeriod];
  uint32_t stage_[Patch::kStage / 4] = {};  // defined everywhere, since octets look beyond their segments
  uint8_t bytes_[Patch::kOctets * kOctet];
};

inline void gather(const GatherCall& call, const GatherKind& kind) {
  with_types(kind, [&](auto patch, auto output) {
    using Patch = typename decltype(patch)::Type;
    using T = typename decltype(output)::Type;
    constexpr int64_t kGrain = 1 + (1 << 15) / Patch::kValues;  // waking other threads takes about as long
    torch::stable::parallel_for(0, call.rows, kGrain, [&](int64_t begin, int64_t end) {
      Rows<Patch, T> rows(call);
      for (int64_t row = begin; row < end; ++row) rows.write(row);
    });
  });
}

}  // namespace VITRAIL_LEVEL
}  // namespace vitrail
