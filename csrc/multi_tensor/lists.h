// Lists of tensors as the executors see them, and how they are cut into chunks.
//
// A kernel over lists visits chunks of kChunk elements of one tensor each. Within a chunk, thread t of kThreads takes
// kPack neighbouring elements of every row of kRow. Sums depend on this partition and on nothing else: not on the number
// of threads of a CPU, not on how many tensors travel in a launch, not on alignment.
#pragma once

#include <cstdint>
#include <utility>

#include "../portable.h"

namespace vitrail {

constexpr int kThreads = 128;
constexpr int kPack = 8;  // 16 bytes of bf16, twice 16 of fp32
constexpr int kRow = kThreads * kPack;
constexpr int kChunk = 16 * kRow;
constexpr int kWarp = 32;

VITRAIL_HD int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

// Corresponding tensors of several lists. Pointers and sizes belong to the caller.
//
//   pointers[s][t]     tensor t of stream s
//   sizes[t]           its number of elements, the same in every stream
//   indices[t]         its number in the caller's list: where its coefficients are
//   first_partials[t]  where the sums of its first chunk go
struct Lists {
  static constexpr int kMaxStreams = 8;
  void* const* pointers[kMaxStreams];
  const int64_t* sizes;
  const int32_t* indices;
  const int32_t* first_partials;
  int64_t count;
};

// Lists whose streams have one element type each.
struct Group {
  Lists lists;
  unsigned bf16;  // bit s: stream s is bf16, else fp32
};

// A call's tensors, sorted into groups.
struct Groups {
  const Group* groups;
  int64_t count;
};

// Calls `function` with a bf16 or a float, whichever `is_bf16` says: a type chosen at run time.
template <class Function>
void with_type(bool is_bf16, const Function& function) {
  if (is_bf16) {
    function(bf16{});
  } else {
    function(float{});
  }
}

// The element types of an operation's streams.
template <class... T>
struct Types {
  static constexpr int kCount = sizeof...(T);
};

template <int index, class List>
struct TypeAt;

template <int index, class First, class... Rest>
struct TypeAt<index, Types<First, Rest...>> : TypeAt<index - 1, Types<Rest...>> {};

template <class First, class... Rest>
struct TypeAt<0, Types<First, Rest...>> {
  using type = First;
};

// What an operation over lists must offer (see ema.h for the simplest):
//
//   using Streams = Types<...>           element types, in the order of Lists::pointers
//   static constexpr unsigned kReads     bit s: stream s is read
//   static constexpr unsigned kWrites    bit s: stream s is written
//   static constexpr int kSums           sums that each chunk hands on; 0 for none
//   Coefficients coefficients(index)     what differs between tensors; with `bool skip`: leave this one alone
//   void operator()(float* x, const Coefficients&, float* sums)
//                                        one element of every stream, in float32; adds to the sums
template <class Op>
struct Traits {
  static constexpr int kStreams = Op::Streams::kCount;
  static constexpr int kSlots = Op::kSums > 0 ? Op::kSums : 1;  // arrays have at least one element
  template <int stream>
  using Type = typename TypeAt<stream, typename Op::Streams>::type;
  using Indices = std::make_index_sequence<kStreams>;
  VITRAIL_HD static constexpr bool reads(int stream) { return Op::kReads >> stream & 1; }
  VITRAIL_HD static constexpr bool writes(int stream) { return Op::kWrites >> stream & 1; }
};

// A scalar that a caller changes at each step: on the host its value, on the device where to read it.
struct Scalar {
  double value;
  const double* pointer;
  VITRAIL_HD double read() const { return pointer ? *pointer : value; }
};

// Adds the sums of a thread's elements of a row, pairwise.
VITRAIL_HD float pack_sum(const float* lanes) {
  static_assert(kPack == 8, "the tree is written out");
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

VITRAIL_HD bool raised(const float* flag) { return flag && *flag != 0.0f; }

}  // namespace vitrail
