"""The top rung of the ladder: the compiled kernels on a GPU. `pytest tests/kernels -m gpu`."""

from functools import partial

import pytest
import torch
from ladder import Problem, check_accuracy, evaluate, poisoned_memory
from ladder_guards import check_guarded
from patch_pixels import make_images, placed
from swin_windows import windows

from vitrail.kernels import (
    MaskedPatchEmbed,
    clip_loss,
    cross_view_match,
    explain,
    extension,
    info_nce_loss,
    koleo_loss,
    masked_patch_gather,
    masked_patch_loss,
    nt_xent_loss,
    prototype_cross_entropy,
    random_masking,
    region_match,
    region_match_crops,
    restore_tokens,
    softmax_col_pass,
    softmax_row_pass,
    window_attention,
)
from vitrail.kernels.checks import interpreting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or interpreting(), reason="needs a CUDA GPU, not the interpreter"),
]

needs_extension = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative error, as a norm, that rounding probabilities to the dtype of the operands explains.
ROUNDED = {torch.float16: 2**-9, torch.bfloat16: 2**-6}
FUNCTIONS = {
    "random_masking": random_masking,
    "masked_patch_gather": masked_patch_gather,
    "restore_tokens": restore_tokens,
    "masked_patch_loss": masked_patch_loss,
    "softmax_row_pass": softmax_row_pass,
    "softmax_row_pass with values": softmax_row_pass,
    "softmax_col_pass": softmax_col_pass,
    "nt_xent_loss": nt_xent_loss,
    "info_nce_loss": info_nce_loss,
    "clip_loss": clip_loss,
    "prototype_cross_entropy": prototype_cross_entropy,
    "koleo_loss": koleo_loss,
    # Of two tokens that are about as near, either may win: only the similarities are compared.
    "region_match": lambda **inputs: region_match(**inputs)[1],
    "region_match for all pairs": lambda **inputs: region_match_crops(**inputs)[1],
    "window_attention": window_attention,
    "window_attention of large windows": window_attention,
}
CALLS = tuple(FUNCTIONS)
MASKING = CALLS[:4]
WINDOWS = CALLS[14:]
SOFTMAX = CALLS[4:11] + WINDOWS  # whose probabilities are rounded to the dtype of the operands


def softmax_problem(call: str, rows: int, width: int) -> Problem:
    """A call of the losses and passes over inner products, or of the search that goes with them."""
    generator = torch.Generator().manual_seed(rows)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    queries, keys = randn(rows, width) / width**0.5, randn(2 * rows + 1, width)
    prototypes = torch.nn.functional.normalize(randn(3 * rows + 5, width))
    return {
        "softmax_row_pass": Problem({"queries": queries, "keys": keys, "scale": 3.0, "exclude": (1,)}),
        "softmax_row_pass with values": Problem(
            {
                "queries": queries,
                "keys": keys,
                "values": randn(2 * rows + 1, 96),
                "scale": 0.3,
                "bias": randn(2 * rows + 1),
                "exclude": (0, -3),
                "bounded": True,
            }
        ),
        "softmax_col_pass": Problem(
            {
                "queries": queries,
                "keys": keys,
                "lse": (3 * queries @ keys.T).logsumexp(1),
                "scale": 3.0,
                "weight": randn(rows).clamp(-2, 2),
            }
        ),
        "nt_xent_loss": Problem({"z1": randn(rows, width), "z2": randn(rows, width)}, ("z1", "z2")),
        "info_nce_loss": Problem({"q": randn(rows, width), "k": randn(rows, width)}, ("q",)),
        "clip_loss": Problem({"a": randn(rows, width), "b": randn(rows, width)}, ("a", "b")),
        "prototype_cross_entropy": Problem(
            {
                "student": queries.repeat(4, 1),
                "student_prototypes": prototypes,
                "teacher": queries.repeat(2, 1) + 0.1 * randn(2 * rows, width),
                "teacher_prototypes": prototypes + 0.01 * randn(*prototypes.shape),
                "student_temp": 0.1,
                "teacher_temp": 0.04,
                "center": 0.1 * randn(len(prototypes)),
                "match": cross_view_match(4, 2, rows),
            },
            ("student", "student_prototypes"),
        ),
        "koleo_loss": Problem({"x": randn(max(rows, 2), width)}, ("x",)),
        "region_match": Problem({"student": randn(rows, 9, width), "teacher": randn(rows, 49, width)}),
        "region_match for all pairs": Problem(
            {
                "student": randn(116 * rows, width),
                "teacher": randn(98 * rows, width),
                "student_tokens": [49, 49, 9, 9],
                "teacher_tokens": [49, 49],
            }
        ),
    }[call]


def windows_problem(call: str, batch: int, grid: tuple[int, int], width: int) -> Problem:
    """A call in shifted windows of 7 or 14, on maps that need padding; heads of 32, or of 48 for odd widths."""
    window, head = 14 if "large" in call else 7, 48 if width % 32 else 32
    return windows(grid, window, 3, heads=max(width // 128, 2), width=head, batch=batch)


def problem(call: str, batch: int = 8, patch: int = 14, grid: tuple[int, int] = (16, 16), width: int = 512) -> Problem:
    """A call at about the sizes of ViT-H/14, or at odd ones."""
    if call in WINDOWS:
        return windows_problem(call, batch, grid, width)
    if call not in MASKING:
        return softmax_problem(call, 25 * batch, width)
    generator = torch.Generator().manual_seed(batch)
    length, columns = grid[0] * grid[1], -(-3 * patch * patch // 8) * 8
    keep = length // 4
    size = (batch, grid[0] * patch, grid[1] * patch, 3)
    images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    noise = torch.rand(batch, length, generator=generator)
    ids_keep, ids_mask, ids_restore = random_masking(batch, length, keep, noise=noise)
    pixels = {"patch_size": patch, "mean": MEAN, "std": STD, "pad_to": columns}
    randn = partial(torch.randn, generator=generator)
    return {
        "random_masking": Problem({"batch": batch, "length": length, "keep": keep, "noise": noise}),
        "masked_patch_gather": Problem({"images": images / 255, "indices": ids_keep, **pixels}, ("images",)),
        "restore_tokens": Problem(
            {
                "visible": randn(batch, 1 + keep, width),
                "ids_restore": ids_restore,
                "mask_token": randn(width),
                "pos_embed": randn(1 + length, width),
            },
            ("visible", "mask_token", "pos_embed"),
        ),
        "masked_patch_loss": Problem(
            {"pred": randn(batch, length - keep, columns), "images": images, "masked_indices": ids_mask, **pixels},
            ("pred",),
        ),
    }[call]


def on_gpu(call: str, dtype: torch.dtype = torch.float32, **sizes: object) -> Problem:
    dtype = torch.float32 if call == "random_masking" else dtype
    return problem(call, **sizes).to(dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("call", CALLS)
def test_close_to_float64(call, dtype):
    dtype = torch.float32 if call == "random_masking" else dtype
    reference = partial(FUNCTIONS[call], impl="reference")
    if call not in SOFTMAX or dtype == torch.float32:
        check_accuracy(FUNCTIONS[call], reference, problem(call), dtype, "triton")
        return
    rounded = problem(call).to(dtype)
    truth = evaluate(reference, rounded.to(torch.float64))
    for name, got in evaluate(partial(FUNCTIONS[call], impl="triton"), rounded.to(dtype, "cuda")).items():
        error = (got.cpu().double() - truth[name]).norm() / truth[name].norm()
        assert error <= ROUNDED[dtype], f"{name} is off by {error:.2g}"


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "patch": 8, "grid": (1, 4), "width": 1},
        {"batch": 3, "patch": 16, "grid": (7, 9), "width": 65},
        {"batch": 65, "patch": 32, "grid": (3, 2), "width": 1280},
        {"batch": 2, "patch": 14, "grid": (37, 37), "width": 197},
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_odd_shapes(call, sizes):
    reference = partial(FUNCTIONS[call], impl="reference")
    check_accuracy(FUNCTIONS[call], reference, problem(call, **sizes), torch.float32, "triton")
    check_guarded(FUNCTIONS[call], problem(call, **sizes))


@pytest.mark.parametrize("call", CALLS)
def test_twenty_runs_on_two_streams_are_bit_identical(call):
    case = on_gpu(call, torch.bfloat16)
    function = partial(FUNCTIONS[call], impl="triton")
    first = evaluate(function, case)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    for repeat in range(20):
        stream = streams[repeat % 2]
        stream.wait_stream(streams[1 - repeat % 2])
        with torch.cuda.stream(stream):
            again = evaluate(function, case)
        torch.cuda.synchronize()
        assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize("call", CALLS)
def test_a_captured_graph_replays_the_same_result(call):
    case = on_gpu(call)
    function = partial(FUNCTIONS[call], impl="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = {name: value.clone() for name, value in evaluate(function, case).items()}
    torch.cuda.current_stream().wait_stream(stream)
    leaves = {name: case.inputs[name].detach().requires_grad_() for name in case.differentiable}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on any host synchronisation
        outputs = function(**{**case.inputs, **leaves})
    graph.replay()
    torch.cuda.synchronize()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for index, output in enumerate(outputs):
        assert torch.equal(output, expected[f"output {index}"])


@pytest.mark.parametrize("call", CALLS)
def test_nothing_waits_for_the_device(call):
    """Fails by what PyTorch raises at the first synchronisation."""
    case = on_gpu(call)
    leaves = {name: case.inputs[name].detach().requires_grad_() for name in case.differentiable}
    FUNCTIONS[call](**{**case.inputs, **leaves})  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = FUNCTIONS[call](**{**case.inputs, **leaves})
        if leaves:
            outputs.backward(torch.ones_like(outputs))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("call", CALLS)
def test_auto_takes_triton(call):
    if call != "region_match for all pairs":  # it is `region_match` by another name, which `explain` does not know
        assert explain(call.split(" ")[0], **on_gpu(call, torch.bfloat16).inputs)["triton"] == []


def test_the_loss_stores_no_target():
    case = on_gpu("masked_patch_loss", torch.bfloat16, batch=64)
    masked_patch_loss(**case.inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    masked_patch_loss(**case.inputs)
    assert torch.cuda.max_memory_allocated() - before < 2**20  # the targets would take 27 MB in float32


def test_contrastive_losses_store_no_logits():
    case = on_gpu("nt_xent_loss", torch.bfloat16, batch=640, width=128)  # 16,000 images: a matrix of logits takes 2 GB
    evaluate(nt_xent_loss, case)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    evaluate(nt_xent_loss, case)
    assert torch.cuda.max_memory_allocated() - before < 2**28


def test_chunked_products_agree_with_the_passes():
    case = on_gpu("prototype_cross_entropy", torch.bfloat16)
    chunked = evaluate(partial(prototype_cross_entropy, impl="chunked"), case)
    for name, value in evaluate(partial(prototype_cross_entropy, impl="triton"), case).items():
        assert (value - chunked[name]).float().norm() <= ROUNDED[torch.bfloat16] * value.float().norm()


@pytest.mark.parametrize("impl", ["triton", pytest.param("cuda", marks=needs_extension)])
def test_offsets_beyond_32_bits(impl):
    batch, size, patch = 2**14 + 1, 224, 16  # 2.5 GB of pixels
    images = torch.zeros(batch, size, size, 3, dtype=torch.uint8, device="cuda")
    images[-1] = 255
    indices = torch.full((batch, 1), 195, device="cuda")
    got = masked_patch_gather(images, indices, patch, impl=impl)
    assert got[-1].min() == 1
    assert got[:-1].max() == 0


@needs_extension
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["hwc", "chw"])
@pytest.mark.parametrize("patch", [8, 14, 16, 32])
def test_the_extension_gathers_the_same_bits_as_on_the_cpu(patch, layout, dtype):
    images = make_images(3, 2 * patch, 3 * patch, layout)
    indices = torch.tensor([[0, 5, 5], [4, 2, 3], [1, 0, 4]])
    width = images.stride(-2) if layout == "chw" else images.stride(1)
    gather = partial(masked_patch_gather, patch_size=patch, mean=MEAN, std=STD, dtype=dtype, impl="cuda")
    for surplus in (0, 1, 2, 4, 300):  # rows of the result that are aligned to 2, 4, 8 and 16 bytes
        columns = 3 * patch * patch + surplus
        expected = gather(images, indices, pad_to=columns)
        for offset in range(0, 32, 3):
            with poisoned_memory():
                got = gather(placed(images.cuda(), offset, width + offset), indices.cuda(), pad_to=columns)
            assert torch.equal(got.cpu(), expected), (surplus, offset)


@needs_extension
def test_the_extension_gathers_in_a_captured_graph_and_yields_zeros_out_of_range():
    images = make_images(2, 28, 42, "hwc")
    indices = torch.tensor([[0, 5, 5], [4, 2, 3]], device="cuda")
    on_device = images.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # fails on any host synchronisation
        got = masked_patch_gather(on_device, indices, 14, pad_to=592, impl="cuda")
    indices.copy_(torch.tensor([[-1, 1, 6], [2**32, 0, -(2**40)]]))
    graph.replay()
    expected = torch.zeros(2, 3, 592)
    expected[0, 1], expected[1, 1] = masked_patch_gather(images, torch.tensor([[1], [0]]), 14, pad_to=592)[:, 0]
    assert torch.equal(got.cpu(), expected)


def test_embedding_equals_a_convolution():
    torch.manual_seed(0)
    module = MaskedPatchEmbed(None, 16, 64).cuda()
    images = torch.rand(2, 3, 64, 96, device="cuda")
    expected = torch.nn.functional.conv2d(images, module.proj.weight, module.proj.bias, stride=16)
    torch.testing.assert_close(module(images), expected.flatten(2).transpose(1, 2), rtol=1e-3, atol=1e-3)
