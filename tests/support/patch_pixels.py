"""uint8 images at awkward places in memory, and what gathering patches of them gives to the last bit."""

import numpy as np
import torch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYOUTS = ("hwc", "chw", "channels_last", "cropped", "cropped planes")


def make_images(batch: int, height: int, width: int, layout: str) -> torch.Tensor:
    """Random images of one of `LAYOUTS`; the cropped ones begin at odd addresses and have odd strides."""
    generator = torch.Generator().manual_seed(height * width)
    images = torch.randint(0, 256, (batch, height, width, 3), generator=generator, dtype=torch.uint8)
    if layout == "hwc":
        return images
    if layout == "cropped":
        return placed(images, offset=7, pitch=3 * width + 11)
    chw = images.permute(0, 3, 1, 2)
    if layout == "cropped planes":
        return placed(chw.contiguous(), offset=5, pitch=width + 13)
    return chw if layout == "channels_last" else chw.contiguous()


def placed(images: torch.Tensor, offset: int, pitch: int) -> torch.Tensor:
    """Copies contiguous images so that they begin `offset` bytes behind a 64-byte boundary.

    Args:
        images: [B, H, W, 3] or [B, 3, H, W], on any device.
        offset: Of the first byte.
        pitch: Bytes from one row of an image, or of a plane, to the next; planes and images are further apart by odd
            numbers of bytes.
    """
    interleaved = images.shape[3] == 3
    rows = images.shape[1] if interleaved else images.shape[2]
    plane = rows * pitch + 3
    strides = (rows * pitch + 9, pitch, 3, 1) if interleaved else (3 * plane + 5, plane, pitch, 1)
    span = 1 + sum((size - 1) * stride for size, stride in zip(images.shape, strides, strict=True))
    buffer = torch.full((max(span, 0) + offset + 128,), 0xA5, dtype=torch.uint8, device=images.device)
    start = -buffer.data_ptr() % 64 + offset
    return buffer.as_strided(images.shape, strides, start).copy_(images)


def exact(
    images: torch.Tensor,
    indices: torch.Tensor,
    patch: int,
    columns: int,
    dtype: torch.dtype,
    mean: tuple[float, ...] | None = MEAN,
    std: tuple[float, ...] | None = STD,
) -> torch.Tensor:
    """Gathers pixel by pixel: byte times scale plus shift, rounded once to float32 and once to `dtype`.

    80-bit floats hold the product and the sum of such numbers exactly. An index out of range gives zeros.
    """
    assert np.finfo(np.longdouble).nmant >= 63
    scale = [np.float32(1 / 255 / s) for s in std or (1.0,) * 3]
    shift = [np.float32(-m / s) for m, s in zip(mean or (0.0,) * 3, std or (1.0,) * 3, strict=True)]
    table = [[np.float32(np.longdouble(x) * np.longdouble(a) + np.longdouble(b)) for x in range(256)]
             for a, b in zip(scale, shift, strict=True)]  # fmt: skip
    pixels = images.numpy() if images.shape[3] == 3 else images.numpy().transpose(0, 2, 3, 1)
    width = pixels.shape[2] // patch
    count = pixels.shape[1] // patch * width
    out = np.zeros((*indices.shape, columns), np.float32)
    for b, row_of_indices in enumerate(indices.tolist()):
        for v, index in enumerate(row_of_indices):
            if not 0 <= index < count:
                continue
            top, left = index // width * patch, index % width * patch
            for k in range(3 * patch * patch):
                row, column, channel = k // (3 * patch), k // 3 % patch, k % 3
                out[b, v, k] = table[channel][pixels[b, top + row, left + column, channel]]
    return torch.from_numpy(out).to(dtype)
