// The GPU's patch gather, one lane after another, for tests where no GPU is: csrc/patch_gather/gather.cu in plain C++.
#include "patch_gather/gather.h"

#include <vector>

using namespace vitrail;

// Writes call.rows rows of float32; the memory of [first, last) holds the images. Returns how many of the windows that
// are read hold no byte of the images: those could lie on pages that do not exist.
extern "C" int64_t gather_as_a_warp(const GatherCall* call, int planar, int size, const uint8_t* first,
                                    const uint8_t* last) {
  int64_t stray = 0;
  with_types({planar != 0, size, Output::fp32}, [&](auto kind, auto) {
    using Patch = typename decltype(kind)::Type;
    for (int64_t row = 0; row < call->rows; ++row) {
      const int64_t sample = row / call->count;
      const Patch patch(*call, sample, int32_t(call->indices[sample * call->index_stride + row % call->count]));
      std::vector<uint32_t> stage(Patch::kStage / 4, 0xDEADBEEF);
      for (unsigned item = 0; item < Patch::kItems; ++item) {
        const uint8_t* source = patch.window(item);
        if (source == nullptr) continue;
        if (uintptr_t(source) % kWindow || source + kWindow <= first || source >= last) ++stray;
        memcpy(reinterpret_cast<uint8_t*>(stage.data()) + item * kWindow, source, kWindow);
      }
      auto* out = static_cast<float*>(call->out) + row * call->columns;
      for (unsigned lane = 0; lane < 32; ++lane) {
        Affine affine(*call, lane * kOctet % 3);
        for (unsigned n = lane; n < Patch::kOctets; n += 32) {
          const Octet octet = patch.octet(stage.data(), n);
          for (unsigned i = 0; i < kOctet && n * kOctet + i < Patch::kValues; ++i) {
            const uint32_t byte = (i < 4 ? octet.low : octet.high) >> 8 * (i % 4) & 0xFF;
            out[n * kOctet + i] = normalise(byte, affine.scale[i % 3], affine.shift[i % 3]);
          }
          affine.advance();
        }
      }
    }
  });
  return stray;
}
