// Patch gather: where the bytes of a uint8 patch lie, and how a staged copy of them becomes normalised values.
//
// A patch consists of segments of adjacent bytes: a row of it in [H, W, 3] images, a row of one plane of it in
// [3, H, W] images. Memory is read in windows, 16 bytes wide and aligned to 16: those that hold a byte of a segment.
// Such a window may hold foreign bytes as well, but lies within 16 aligned bytes of which one is wanted, so that it can
// be read wherever that one can. The stage holds every segment as it lay in its windows. From there, eight bytes at a
// time are put together in the order of the output: (row, column, channel).
#pragma once

#include "../portable.h"

namespace vitrail {

constexpr unsigned kWindow = 16;  // bytes
constexpr unsigned kOctet = 8;    // values

enum class Output { fp32, bf16, fp16 };

// One call. Strides are in bytes, which are pixel values, or in indices.
struct GatherCall {
  const uint8_t* images;
  const int64_t* indices;
  void* out;  // [rows, columns]
  int64_t rows;
  int64_t count;  // patches of a sample
  int64_t index_stride;
  int64_t image_stride, row_stride, plane_stride;  // no plane_stride where the channels of a pixel are adjacent
  int64_t columns;
  int32_t grid_width, patches;  // patches of a row of an image, and of an image
  float scale[3], shift[3];
};

struct Octet {
  uint32_t low, high;
};

// Four bytes that begin `bits` / 8 bytes into the eight bytes of two words; `bits` < 32.
VITRAIL_HD uint32_t funnel(uint32_t low, uint32_t high, unsigned bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, bits);
#else
  return uint32_t((uint64_t(high) << 32 | low) >> bits);
#endif
}

// Picks four of the eight bytes of two words; digit i of the selector, in base 16, names the byte for place i.
template <unsigned kSelector>
VITRAIL_HD uint32_t pick(uint32_t low, uint32_t high) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, kSelector);
#else
  const uint64_t bytes = uint64_t(high) << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= uint32_t(bytes >> 8 * (kSelector >> 4 * i & 7) & 0xFF) << 8 * i;
  return picked;
#endif
}

// The words of the stage are little-endian, like both sides' memory.
VITRAIL_HD uint32_t word_at(const uint32_t* stage, unsigned position) {
  const uint32_t* words = stage + position / 4;
  return funnel(words[0], words[1], 8 * (position % 4));
}

VITRAIL_HD Octet octet_at(const uint32_t* stage, unsigned position) {
  const uint32_t* words = stage + position / 4;
  const unsigned bits = 8 * (position % 4);
  return {funnel(words[0], words[1], bits), funnel(words[1], words[2], bits)};
}

// The first `count` bytes of one, then the first bytes of the other; 0 < count < 8.
VITRAIL_HD Octet join(Octet first, Octet second, unsigned count) {
  const uint64_t a = uint64_t(first.high) << 32 | first.low, b = uint64_t(second.high) << 32 | second.low;
  const uint64_t joined = (a & ((uint64_t(1) << 8 * count) - 1)) | b << 8 * count;
  return {uint32_t(joined), uint32_t(joined >> 32)};
}

// Likewise; 0 < count < 4.
VITRAIL_HD uint32_t join(uint32_t first, uint32_t second, unsigned count) {
  return (first & ((uint32_t(1) << 8 * count) - 1)) | second << 8 * count;
}

// Eight values from four pixels of three planes, leaving out the first `skipped` < 3 channels.
VITRAIL_HD Octet interleave(uint32_t red, uint32_t green, uint32_t blue, unsigned skipped) {
  const uint32_t first = pick<0x3410>(pick<0x1040>(red, green), blue);    // r0 g0 b0 r1
  const uint32_t second = pick<0x3250>(pick<0x2601>(green, red), blue);   // g1 b1 r2 g2
  const uint32_t third = pick<0x3710>(pick<0x3072>(blue, red), green);    // b2 r3 g3 b3
  return {funnel(first, second, 8 * skipped), funnel(second, third, 8 * skipped)};
}

// A byte as a float: into the last bits of 2^23, which is then taken away; exact, and quicker than a conversion.
VITRAIL_HD float byte_to_float(uint32_t byte) { return bit_cast<float>(0x4B000000u | byte) - 8388608.0f; }

VITRAIL_HD float normalise(uint32_t byte, float scale, float shift) {
  return fma(byte_to_float(byte), scale, shift);
}

// Scale and shift of consecutive values of a patch, whose channels take turns.
struct Affine {
  float scale[3], shift[3];

  // Beginning with a value of this channel.
  VITRAIL_HD Affine(const GatherCall& call, unsigned channel) {
    for (int i = 0; i < 3; ++i) {
      scale[i] = call.scale[i];
      shift[i] = call.shift[i];
    }
    if (channel >= 1) advance();
    if (channel == 2) advance();
  }

  VITRAIL_HD void advance() {
    const float first_scale = scale[0], first_shift = shift[0];
    scale[0] = scale[1];
    scale[1] = scale[2];
    scale[2] = first_scale;
    shift[0] = shift[1];
    shift[1] = shift[2];
    shift[2] = first_shift;
  }
};

// The patch that an index names, of `kSize` x `kSize` pixels.
template <bool kPlanar, unsigned kSize>
struct Patch {
  static constexpr unsigned kValues = 3 * kSize * kSize;
  static constexpr unsigned kOctets = (kValues + kOctet - 1) / kOctet;
  static constexpr unsigned kSegments = kPlanar ? 3 * kSize : kSize;
  static constexpr unsigned kLength = kPlanar ? kSize : 3 * kSize;             // bytes of a segment
  static constexpr unsigned kWindows = (kLength + 2 * kWindow - 2) / kWindow;  // that a segment can overlap
  static constexpr unsigned kPitch = kWindows * kWindow;  // bytes between segments of the stage
  static constexpr unsigned kItems = kSegments * kWindows;
  static constexpr unsigned kStage = kItems * kWindow + kWindow;  // bytes; a funnel looks beyond the last segment
  // Where this does not hold, an octet can begin in one row of a patch and end in the next.
  static constexpr bool kWithinRows = kSize % 8 == 0;

  const uint8_t* origin;  // of the first pixel
  int64_t row_stride, plane_stride;
  unsigned first, row_step, plane_step;  // the same, modulo the window

  // `index` must name a patch of the image.
  VITRAIL_HD Patch(const GatherCall& call, int64_t sample, int32_t index)
      : row_stride(call.row_stride), plane_stride(call.plane_stride) {
    const int32_t row = index / call.grid_width, column = index % call.grid_width;
    origin = call.images + sample * call.image_stride + int64_t(row) * kSize * row_stride +
             int64_t(column) * (kPlanar ? kSize : 3 * kSize);
    first = unsigned(reinterpret_cast<uintptr_t>(origin) % kWindow);
    row_step = unsigned(row_stride) % kWindow;
    plane_step = unsigned(plane_stride) % kWindow;
  }

  VITRAIL_HD const uint8_t* segment(unsigned number) const {
    if constexpr (kPlanar) return origin + number / kSize * plane_stride + number % kSize * row_stride;
    return origin + number * row_stride;
  }

  // Bytes of a segment's first window that precede the segment, which are as many as in the stage.
  VITRAIL_HD unsigned lead(unsigned number) const {
    if constexpr (kPlanar) return (first + number / kSize * plane_step + number % kSize * row_step) % kWindow;
    return (first + number * row_step) % kWindow;
  }

  // Where window number `item` of the stage lies in memory, which is aligned, or null if it holds no byte of the patch.
  VITRAIL_HD const uint8_t* window(unsigned item) const {
    const unsigned number = item / kWindows, offset = item % kWindows * kWindow, before = lead(number);
    return offset < before + kLength ? segment(number) + offset - before : nullptr;
  }

  // Where a segment begins in the stage.
  VITRAIL_HD unsigned position(unsigned number) const { return number * kPitch + lead(number); }

  // Values 8 n to 8 n + 7 of the patch; beyond its last one, anything.
  VITRAIL_HD Octet octet(const uint32_t* stage, unsigned n) const {
    return kPlanar ? planar_octet(stage, n * kOctet) : adjacent_octet(stage, n * kOctet);
  }

 private:
  VITRAIL_HD Octet adjacent_octet(const uint32_t* stage, unsigned value) const {
    const unsigned row = value / kLength, within = value % kLength;
    const Octet octet = octet_at(stage, position(row) + within);
    if constexpr (!kWithinRows) {
      const unsigned left = kLength - within;
      if (left < kOctet && row + 1 < kSize) return join(octet, octet_at(stage, position(row + 1)), left);
    }
    return octet;
  }

  VITRAIL_HD Octet planar_octet(const uint32_t* stage, unsigned value) const {
    const unsigned pixel = value / 3, row = pixel / kSize, column = pixel % kSize;
    return interleave(plane_word(stage, row, column), plane_word(stage, kSize + row, column),
                      plane_word(stage, 2 * kSize + row, column), value % 3);
  }

  // Four pixels of a plane. Where octets stay within rows, the fourth one is not used at a row's end.
  VITRAIL_HD uint32_t plane_word(const uint32_t* stage, unsigned number, unsigned column) const {
    const uint32_t word = word_at(stage, position(number) + column);
    if constexpr (!kWithinRows) {
      const unsigned left = kSize - column;
      if (left < 4 && number % kSize + 1 < kSize) return join(word, word_at(stage, position(number + 1)), left);
    }
    return word;
  }
};

// What a call is compiled for.
struct GatherKind {
  bool planar;
  int size;
  Output output;
};

template <class T>
struct Tag {
  using Type = T;
};

template <unsigned kSize, class Function>
void with_layout(bool planar, const Function& function) {
  planar ? function(Tag<Patch<true, kSize>>{}) : function(Tag<Patch<false, kSize>>{});
}

// Calls a function with tags of the type of patch and of the type of the output.
template <class Function>
void with_types(const GatherKind& kind, const Function& function) {
  const auto with_output = [&](auto patch) {
    switch (kind.output) {
      case Output::fp32: return function(patch, Tag<float>{});
      case Output::bf16: return function(patch, Tag<bf16>{});
      case Output::fp16: return function(patch, Tag<half>{});
    }
  };
  switch (kind.size) {
    case 8: return with_layout<8>(kind.planar, with_output);
    case 14: return with_layout<14>(kind.planar, with_output);
    case 16: return with_layout<16>(kind.planar, with_output);
    case 32: return with_layout<32>(kind.planar, with_output);
  }
}

void gather_baseline(const GatherCall& call, const GatherKind& kind);
void gather_v3(const GatherCall& call, const GatherKind& kind);
void gather_cuda(const GatherCall& call, const GatherKind& kind, void* stream);

}  // namespace vitrail
