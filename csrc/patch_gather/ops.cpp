// Patch gather as an op of PyTorch, for CPU and CUDA.
#include "../checks.h"
#include "gather.h"

namespace vitrail {
namespace {

Output output_of(const Tensor& out) {
  switch (out.scalar_type()) {
    case ScalarType::Float: return Output::fp32;
    case ScalarType::BFloat16: return Output::bf16;
    case ScalarType::Half: return Output::fp16;
    default:
      fail("out must be float32, bfloat16 or float16, got ", name_of(out.scalar_type()),
           "; allocate it so, and convert afterwards");
  }
}

// Sizes and strides of images in either order, as [batch, height, width, channel].
struct Images {
  int64_t height, width;
  int64_t image_stride, row_stride, pixel_stride, channel_stride;

  explicit Images(const Tensor& images) {
    check_type("images", images, ScalarType::Byte);
    const auto sizes = images.sizes(), strides = images.strides();
    require(sizes.size() == 4 && (sizes[1] == 3 || sizes[3] == 3),
            "images must have shape [B, H, W, 3] or [B, 3, H, W], got ", listed(sizes));
    const int channel = sizes[3] == 3 ? 3 : 1, row = channel == 3 ? 1 : 2, pixel = row + 1;
    height = sizes[row];
    width = sizes[pixel];
    image_stride = strides[0];
    row_stride = strides[row];
    pixel_stride = strides[pixel];
    channel_stride = strides[channel];
    require(planar() || (pixel_stride == 3 && channel_stride == 1), "images have strides ", listed(strides),
            "; the pixels of a row, or those of each of its planes, must be adjacent; pass images.contiguous()");
  }

  bool planar() const { return pixel_stride == 1; }
};

void check_sizes(const Tensor& images, const Images& layout, const Tensor& indices, const Tensor& out, int64_t size) {
  require(size == 8 || size == 14 || size == 16 || size == 32, "patch_size is ", size,
          "; the extension is built for 8, 14, 16, 32; use the reference");
  require(layout.height > 0 && layout.width > 0 && layout.height % size == 0 && layout.width % size == 0,
          "images of ", layout.height, " x ", layout.width, " pixels are no whole number of patches of ", size,
          "; crop or resize them");
  check_type("indices", indices, ScalarType::Long);
  check_device("indices", indices, images.device());
  check_device("out", out, images.device());
  const auto index_sizes = indices.sizes(), out_sizes = out.sizes();
  require(index_sizes.size() == 2 && index_sizes[0] == images.sizes()[0], "indices must have shape [B, count] with B=",
          images.sizes()[0], " as in images, got ", listed(index_sizes));
  require(index_sizes[1] <= 1 || indices.strides()[1] == 1, "indices have strides ", listed(indices.strides()),
          ", expected 1 in the last dimension; pass indices.contiguous()");
  require(out_sizes.size() == 3 && out_sizes[0] == index_sizes[0] && out_sizes[1] == index_sizes[1] &&
              out_sizes[2] >= 3 * size * size,
          "out must have shape [", index_sizes[0], ", ", index_sizes[1], ", ", 3 * size * size, " or more], got ",
          listed(out_sizes));
  require(out.is_contiguous(), "out has strides ", listed(out.strides()), "; it must be contiguous");
  require(out_sizes[0] * out_sizes[1] <= INT32_MAX, "the call gathers ", out_sizes[0] * out_sizes[1],
          " patches, at most ", INT32_MAX, " are possible; split the batch");
  require(layout.height / size * (layout.width / size) <= INT32_MAX, "images of ", layout.height, " x ", layout.width,
          " pixels have more than ", INT32_MAX, " patches; cut them up");
}

void gather_op(Tensor out, Tensor images, Tensor indices, int64_t patch_size, std::vector<double> scale,
               std::vector<double> shift) {
  const Images layout(images);
  const Output output = output_of(out);
  check_sizes(images, layout, indices, out, patch_size);
  require(scale.size() == 3 && shift.size() == 3, "scale and shift must hold 3 values each, got ", scale.size(),
          " and ", shift.size());
  GatherCall call{static_cast<const uint8_t*>(images.data_ptr()),
                  static_cast<const int64_t*>(indices.data_ptr()),
                  out.data_ptr(),
                  out.sizes()[0] * out.sizes()[1],
                  out.sizes()[1],
                  indices.strides()[0],
                  layout.image_stride,
                  layout.row_stride,
                  layout.planar() ? layout.channel_stride : 0,
                  out.sizes()[2],
                  int32_t(layout.width / patch_size),
                  int32_t(layout.height / patch_size * (layout.width / patch_size)),
                  {},
                  {}};
  for (int i = 0; i < 3; ++i) {
    call.scale[i] = float(scale[i]);
    call.shift[i] = float(shift[i]);
  }
  if (call.rows == 0) return;
  const GatherKind kind{layout.planar(), int(patch_size), output};
  const auto device = images.device();
  if (device.is_cuda()) {
    const torch::stable::accelerator::DeviceGuard guard(device.index());
    gather_cuda(call, kind, current_stream(device));
  } else if (has_v3()) {
    gather_v3(call, kind);
  } else {
    gather_baseline(call, kind);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(vitrail_C, m) {
  m.def(
      "masked_patch_gather_out(Tensor(a!) out, Tensor images, Tensor indices, int patch_size, float[] scale, "
      "float[] shift) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CPU, m) { m.impl("masked_patch_gather_out", TORCH_BOX(&gather_op)); }
STABLE_TORCH_LIBRARY_IMPL(vitrail_C, CUDA, m) { m.impl("masked_patch_gather_out", TORCH_BOX(&gather_op)); }

}  // namespace vitrail
