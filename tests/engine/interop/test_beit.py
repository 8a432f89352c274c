"""Released checkpoints: BEiT's and SimMIM's names, and the pickled encoder of DALL-E, which must not run anything."""

import collections
import os
import pickle
import sys
import types
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vitrail.engine.interop import dall_e
from vitrail.engine.interop.beit import (
    encoder_from_official,
    encoder_to_official,
    from_official,
    to_official,
    unwrap,
)
from vitrail.engine.interop.dall_e import convert, read_encoder
from vitrail.engine.interop.mae import load_exactly
from vitrail.engine.methods.beit import BEiTConfig
from vitrail.engine.models.dall_e import DallEEncoder
from vitrail.engine.models.tokenizer import KMeansTokenizerConfig
from vitrail.engine.models.vit import ViTConfig, beit_vit

BLOCK = (
    *("gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
    *("attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
    *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
)


def official_names(
    depth=12, positions=("rel_pos_bias.relative_position_bias_table", INDEX := "rel_pos_bias.relative_position_index")
):
    outside = (
        "cls_token",
        "mask_token",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    )
    return {*outside, *positions, *(f"blocks.{i}.{name}" for i in range(depth) for name in BLOCK)}


def small(**changes):
    encoder = beit_vit(ViTConfig(image_size=24, patch_size=8, width=16, depth=2, heads=2))
    tokenizer = KMeansTokenizerConfig(patch_size=8, codes=10)
    config = BEiTConfig(encoder=replace(encoder, **changes), tokenizer=tokenizer, mask_count=3)
    torch.manual_seed(0)
    model = config.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_official_names_and_shapes():
    with torch.device("meta"):
        state = to_official(BEiTConfig().build().state_dict())
    assert state.keys() == official_names() | {"lm_head.weight", "lm_head.bias"}
    assert len(state) == 190
    assert state["rel_pos_bias.relative_position_bias_table"].shape == (732, 12)
    assert state[INDEX].shape == (197, 197)
    assert state[INDEX].dtype == torch.int64
    assert state["blocks.3.gamma_1"].shape == (768,)
    assert state["blocks.3.attn.qkv.weight"].shape == (2304, 768)
    assert state["lm_head.weight"].shape == (8192, 768)


def test_the_index_is_the_official_one():
    index = encoder_to_official(small().encoder.state_dict())[INDEX]
    assert index.shape == (10, 10)
    for i in range(9):
        for j in range(9):
            down, right = i // 3 - j // 3, i % 3 - j % 3
            assert index[1 + i, 1 + j] == (down + 2) * 5 + right + 2
    assert index[0, 1:].unique().tolist() == [25]
    assert index[1:, 0].unique().tolist() == [26]
    assert index[0, 0] == 27


def test_there_and_back():
    model, other = small(), small()
    official = to_official(model.state_dict())
    torch.manual_seed(1)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    load_exactly(other, from_official(official) | {"tokenizer.codebook": other.tokenizer.codebook})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    simmim = {f"encoder.{name}": value for name, value in encoder_to_official(model.encoder.state_dict()).items()}
    simmim |= {"decoder.0.weight": torch.zeros(192, 16, 1, 1), "decoder.0.bias": torch.zeros(192)}
    bare = encoder_from_official(official)
    prefixed = encoder_from_official(simmim)
    assert bare.keys() == prefixed.keys() == model.encoder.state_dict().keys()
    assert all(torch.equal(bare[name], prefixed[name]) for name in bare)


def test_the_release_with_absolute_positions():
    model = small(positions="learned", layer_scale=0.0)
    official = to_official(model.state_dict())
    scales = {name for name in official_names(2) if "gamma" in name}
    assert official.keys() == official_names(2, ("pos_embed",)) - scales | {"lm_head.weight", "lm_head.bias"}
    load_exactly(model.encoder, encoder_from_official(official))


def test_what_holds_the_weights():
    weights = {"cls_token": torch.zeros(1, 1, 4)}
    for checkpoint in ({"model": weights, "epoch": 3}, {"module": weights}, weights, {"module": {}, "model": weights}):
        assert unwrap(checkpoint) is weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"blocks.0.attn.relative_position_bias_table": torch.zeros(28, 2)},
            "with a table of positions in every block",
        ),
        ({"head.weight": torch.zeros(5, 16)}, "1 names are not those of an encoder.*: head.weight"),
        ({"blocks.0.attn.qkv.bias": torch.zeros(48)}, "blocks.0.attn.qkv.bias"),
    ],
)
def test_other_networks_are_refused(change, message):
    with pytest.raises(KeyError, match=message):
        from_official(to_official(small().state_dict()) | change)


def test_what_has_no_official_name_is_refused():
    state = small().state_dict()
    with pytest.raises(KeyError, match=r"decoder\.weight: no part of BEiT"):
        to_official(state | {"decoder.weight": torch.zeros(1)})
    with pytest.raises(KeyError, match=r"qkv\.bias: the official networks have nothing of the kind"):
        encoder_to_official({"blocks.0.attn.qkv.bias": torch.zeros(48)})
    wide = BEiTConfig(encoder=replace(small().config.encoder, image_size=(24, 40)), tokenizer=KMeansTokenizerConfig())
    with pytest.raises(ValueError, match="48 rows, which no square grid of patches has"):
        to_official(replace(wide, mask_count=3).build().state_dict())


# --- a stand-in of the package dall_e, whose classes hold what those of the published file hold ----------------------


def pretended(monkeypatch):
    """Modules of the published names; a function that makes an encoder of their classes."""

    class Conv2d(nn.Module):
        def __init__(self, n_in, n_out, kw, use_float16=True):
            super().__init__()
            self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, use_float16
            self.device, self.requires_grad = torch.device("cpu"), False
            self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw), requires_grad=False)
            self.b = nn.Parameter(torch.randn(n_out), requires_grad=False)

    class EncoderBlock(nn.Module):
        def __init__(self, n_in, n_out, n_layers):
            super().__init__()
            self.n_in, self.n_out, self.n_layers, self.n_hid = n_in, n_out, n_layers, n_out // 4
            self.device, self.post_gain = torch.device("cpu"), 1 / n_layers**2
            self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
            parts, widths = collections.OrderedDict(), (n_in, *(n_out // 4,) * 3, n_out)
            for i, kw in enumerate((3, 3, 3, 1)):
                parts[f"relu_{i + 1}"], parts[f"conv_{i + 1}"] = nn.ReLU(), Conv2d(widths[i], widths[i + 1], kw)
            self.res_path = nn.Sequential(parts)

    class Encoder(nn.Module):
        group_count = 4

        def __init__(self, n_hid, vocab_size):
            super().__init__()
            self.n_hid, self.vocab_size, self.n_blk_per_group, self.use_mixed_precision = n_hid, vocab_size, 2, True
            parts, n_in = collections.OrderedDict(input=Conv2d(3, n_hid, 7)), n_hid
            for group in range(4):
                blocks = collections.OrderedDict()
                for i in (1, 2):
                    blocks[f"block_{i}"] = EncoderBlock(n_in, n_hid * 2**group, 8)
                    n_in = n_hid * 2**group
                if group < 3:
                    blocks["pool"] = nn.MaxPool2d(kernel_size=2)
                parts[f"group_{group + 1}"] = nn.Sequential(blocks)
            last = Conv2d(n_in, vocab_size, 1, use_float16=False)
            parts["output"] = nn.Sequential(collections.OrderedDict(relu=nn.ReLU(), conv=last))
            self.blocks = nn.Sequential(parts)

    for where, classes in (("dall_e", ()), ("dall_e.utils", (Conv2d,)), ("dall_e.encoder", (EncoderBlock, Encoder))):
        module = types.ModuleType(where)
        for cls in classes:
            cls.__module__, cls.__qualname__ = where, cls.__name__
            setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, where, module)
    return Encoder


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_encoder_is_read_without_its_package(tmp_path, monkeypatch, zipped):
    path = tmp_path / "encoder.pkl"
    with monkeypatch.context() as pretending:
        torch.manual_seed(0)
        network = pretended(pretending)(8, 40)
        torch.save(network, path, _use_new_zipfile_serialization=zipped)
    assert "dall_e" not in sys.modules
    found = read_encoder(path)
    expected = network.state_dict()
    assert found.keys() == expected.keys() == DallEEncoder(8, 40).state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match=r"an encoder of another size; 74 tensors differ: .* instead of "):
        convert(path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_what_is_converted_can_be_loaded(tmp_path, monkeypatch, capsys):
    """The command, on an encoder that is pretended to be of the published size."""
    path, out = tmp_path / "encoder.pkl", tmp_path / "out.safetensors"
    with monkeypatch.context() as pretending:
        network = pretended(pretending)(8, 40).half()
        torch.save(network, path)
    monkeypatch.setattr(dall_e, "DallEEncoder", lambda: DallEEncoder(8, 40))
    monkeypatch.setattr(sys, "argv", ["dall_e", str(path), str(out)])
    dall_e.main()
    written = load_file(out)
    assert f"{sum(value.numel() for value in written.values())} weights in {out}" in capsys.readouterr().out
    encoder = DallEEncoder(8, 40)
    encoder.load_state_dict(written)
    for name, value in network.state_dict().items():
        assert written[name].dtype == torch.float32
        assert torch.equal(encoder.get_buffer(name), value.float()), name


class Harm:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def harmful(path, trace, kind, pretending):
    """Write a file that makes the folder `trace` when it is read by `pickle`."""
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Harm(trace)))
        return
    network = pretended(pretending)(8, 40)
    if kind == "attribute":
        network.blocks.extra = Harm(trace)
    if kind == "named as expected":
        sys.modules["dall_e.utils"].Conv2d.__reduce__ = lambda self: (os.mkdir, (str(trace),))
    torch.save(network, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "legacy":  # the harm is where the file tells its version
        path.write_bytes(pickle.dumps(Harm(trace)) + path.read_bytes())


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("kind", ["pickle", "attribute", "named as expected", "legacy"])
def test_harmful_files_are_refused_and_nothing_is_run(tmp_path, monkeypatch, kind):
    path, trace = tmp_path / "encoder.pkl", tmp_path / "trace"
    with monkeypatch.context() as pretending:
        harmful(path, trace, kind, pretending)
    with pytest.raises(ValueError, match=r"encoder.pkl was refused, and nothing in it was run \(.*mkdir.*\)"):
        read_encoder(path)
    assert not trace.exists()
    if kind == "pickle":  # it would have
        pickle.loads(path.read_bytes())
        assert trace.exists()


def test_other_files_are_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "other.pkl"
    for content, message in (
        ({"a": torch.zeros(2)}, r"holds a dict and no dall_e.encoder.Encoder"),
        (nn.Linear(2, 2), r"nothing in it was run \(it names torch.nn.modules.linear.Linear\)"),
        (nn.Sequential(nn.ReLU()), r"holds a Sequential and no"),
    ):
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            read_encoder(path)
    for garbage in (b"", b"no pickle", b"\x80\x02}q\x00."):
        path.write_bytes(garbage)
        with pytest.raises(ValueError, match=r"was refused"):
            read_encoder(path)
    for given in (path, tmp_path / "missing"):
        monkeypatch.setattr(sys, "argv", ["dall_e", str(given), str(tmp_path / "out")])
        with pytest.raises(SystemExit, match="2"):
            dall_e.main()
        assert capsys.readouterr().err.startswith("error: ")
