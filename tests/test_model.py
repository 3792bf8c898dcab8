"""AdaIR against reference values of the original, its controls port, mask rules, checkpoints and
any image size."""

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import reference_files, small_adair
from safetensors.torch import save_file

import model

FORMULA = json.loads((Path(__file__).parent / "adair_formula.json").read_text())
UNUSED_SHAPES = {"conv.weight": (None, 3, 3, 3)}
UNUSED_SHAPES |= {"score_gen.weight": (2, 2, 7, 7), "score_gen.bias": (2,)}


def official_shapes(net):
    """The official state dict's names and shapes: ours and the three unused tensors of every
    AFLB."""
    shapes = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    for i, channels in enumerate(net.channels, start=1):
        shapes |= {f"fre{i}.{k}": tuple(s or channels for s in v) for k, v in UNUSED_SHAPES.items()}
    return shapes


def formula_state():
    """Weights given by the formulas under which the original's outputs were recorded."""
    net = model.AdaIR(**FORMULA["config"])
    state = {}
    for i, (key, shape) in enumerate(sorted(official_shapes(net).items())):
        w = np.sin(0.731 * np.arange(math.prod(shape)) + 1.37 * i)
        if key.endswith("para1"):
            w = 0.5 * w
        elif key.endswith("para2"):
            w = 1 + 0.2 * w
        elif key.endswith("temperature"):
            w = 1 + 0.3 * w
        elif "norm" in key and key.endswith("weight"):
            w = 1 + 0.1 * w
        elif key.endswith("bias"):
            w = 0.1 * w
        elif key.endswith("rate_conv.2.weight"):
            w = 0 * w
        else:
            w = 0.6 * w * math.sqrt(2 / math.prod(shape[1:]))
        state[key] = torch.tensor(w, dtype=torch.float32).reshape(shape)
    return state


def formula_input(height, width):
    j = np.arange(3 * height * width)
    x = 0.5 + 0.5 * np.sin(0.0137 * j + 0.3 * np.sin(0.00071 * j))
    return torch.tensor(x, dtype=torch.float32).reshape(1, 3, height, width)


@pytest.fixture(scope="module")
def formula_net(tmp_path_factory):
    path = tmp_path_factory.mktemp("formula") / "model.ckpt"
    torch.save({"state_dict": {"net." + k: v for k, v in formula_state().items()}}, path)
    return model.load_adair(path)


@pytest.mark.parametrize("case", FORMULA["cases"], ids=lambda c: "x".join(map(str, c["size"])))
def test_outputs_are_those_of_the_original(formula_net, case):
    """The last case has a mask that is not empty."""
    with torch.no_grad():
        y = formula_net(formula_input(*case["size"]))
    assert torch.allclose(y.flatten()[case["positions"]], torch.tensor(case["values"]), atol=1e-4)
    assert abs(y.mean().item() - case["mean"]) < 1e-4 and abs(y.std().item() - case["std"]) < 1e-4
    rate = torch.tensor([0.5])  # sigmoid(0): the formula's rate_conv is 0
    halves = [int(formula_net.fre3.half_size(rate, side // 2, "adair")) for side in case["size"]]
    assert halves == case["aflb3_mask_half"]


@pytest.mark.parametrize("i", range(3))
def test_recorded_outputs_of_a_lightning_checkpoint(i):
    net = model.load_adair(reference_files("golden", "adair_tiny_lightning.ckpt"))
    io = np.load(reference_files("golden", "adair_tiny_io.npz"))
    with torch.no_grad():
        y = net(torch.from_numpy(io[f"x{i}"]).float())
    assert (y - torch.from_numpy(io[f"y{i}"])).abs().max() < 1e-4
    found = [net.config[key] for key in ("dim", "num_blocks", "ffn_expansion")]
    assert found == [16, [1, 2, 1, 2], 2.66]


def test_default_size_is_the_published_one():
    with torch.device("meta"):
        shapes = official_shapes(model.AdaIR())
    assert sum(math.prod(s) for s in shapes.values()) == 28_784_824


def test_empty_mask_puts_everything_into_the_high_band():
    f = torch.randn(2, 3, 16, 24)
    zero = torch.zeros(2, dtype=torch.int)
    low, high = model.split_bands(f, model.band_mask(zero, zero, 16, 24))
    assert torch.equal(low, torch.zeros_like(f)) and torch.allclose(high, f.abs())


@pytest.mark.parametrize("height, width", [(16, 24), (15, 9)])
def test_bands_against_the_rolled_spectrum(height, width):
    """One FFT and a difference equal two inverse transforms of a rolled, masked spectrum."""
    f, a, b = torch.randn(1, 2, height, width, dtype=torch.float64), 3, 2
    spectrum = torch.roll(torch.fft.fft2(f, norm="forward"), (height // 2, width // 2), (-2, -1))
    mask = torch.zeros(height, width)
    mask[height // 2 - a : height // 2 + a, width // 2 - b : width // 2 + b] = 1

    def back(s):
        rolled = torch.roll(s, (-(height // 2), -(width // 2)), (-2, -1))
        return torch.fft.ifft2(rolled, norm="forward").abs()

    ours = model.band_mask(torch.tensor([a]), torch.tensor([b]), height, width)
    low, high = model.split_bands(f, ours)
    assert torch.allclose(low, back(spectrum * mask), atol=1e-12)
    assert torch.allclose(high, back(spectrum * (1 - mask)), atol=1e-12)


def test_fraction_rule(net):
    for rate, side, half in ((0.25, 64, 8), (0.01, 64, 0), (1.0, 16, 8), (0.5, 9, 2)):
        assert int(net.fre1.half_size(torch.tensor([rate]), side, "fraction")) == half


def fixed(r, g=1.0):
    return lambda level, f, y: torch.tensor([[r, r, g, g]]).expand(len(y), 4)


def test_rates_act_under_fraction_and_not_under_adair_at_128():
    x = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        for rule, acts in (("fraction", True), ("adair", False)):
            net = small_adair(mask_rule=rule)
            difference = (net(x, fixed(0.1)) - net(x, fixed(0.6))).abs().max()
            assert (difference > 1e-4) == acts, (rule, difference)


def test_controller_with_the_constants_changes_nothing(net):
    x = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        assert torch.allclose(net(x), net(x, fixed(0.25)), atol=1e-6)
        assert not torch.allclose(net(x), net(x, fixed(0.25, g=1.2)), atol=1e-3)


def test_controller_is_asked_at_three_levels(net):
    asked = []

    def controller(level, f, y):
        assert f.shape == y.shape
        asked.append((level, tuple(y.shape)))
        return torch.ones(len(y), 4) * 0.5

    net(torch.rand(2, 3, 64, 32), controller)
    assert asked == [(0, (2, 64, 8, 4)), (1, (2, 32, 16, 8)), (2, (2, 16, 32, 16))]


def test_one_encoding_serves_a_group(net):
    x = torch.rand(2, 3, 32, 32)
    gates = torch.rand(6, 4)

    def controller(level, f, y):
        return gates[: len(y)]

    with torch.no_grad():
        group = net.decode(net.encode(x), controller, copies=3)
        alone = net(x.repeat_interleave(3, dim=0), controller)
    assert torch.allclose(group, alone, atol=1e-5)


@pytest.mark.parametrize("height, width", [(8, 8), (9, 15), (33, 64), (50, 41)])
def test_restore_takes_any_size(net, height, width):
    image = torch.rand(3, height, width)
    assert model.restore(net, image).shape == image.shape
    assert model.restore(net, image[None]).shape == (1, 3, height, width)


def test_restore_is_forward_where_nothing_is_padded(net):
    image = torch.rand(1, 3, 32, 40)
    with torch.no_grad():
        assert torch.equal(model.restore(net, image), net(image))


def test_restore_refuses_other_shapes_and_tiles(net):
    for shape in ((3, 7, 32), (1, 32, 32), (32, 32)):
        with pytest.raises(ValueError, match="restore\\(\\) takes"):
            model.restore(net, torch.rand(shape))
    with pytest.raises(ValueError, match="multiple of 8"):
        model.restore(net, torch.rand(3, 128, 128), tile=100)


def test_tiles_blend_without_seams():
    """A network that returns its input must come back unchanged through tiling, at sizes that fit
    and do not fit."""

    class Identity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.output = torch.nn.Conv2d(1, 1, 1)

        def forward(self, x, controller=None):
            return x

    for height, width in ((96, 96), (97, 200), (300, 131), (20, 200)):
        image = torch.rand(3, height, width)
        assert torch.allclose(model.restore(Identity(), image, tile=96), image, atol=1e-6)


@pytest.fixture
def state():
    return {k: torch.rand(shape) for k, shape in official_shapes(small_adair()).items()}


@pytest.mark.parametrize("kind", ["lightning", "bare", "safetensors", "ours"])
def test_every_kind_of_checkpoint_loads(tmp_path, state, kind):
    path = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    if kind == "lightning":
        torch.save({"state_dict": {"net." + k: v for k, v in state.items()}, "epoch": 3}, path)
    elif kind == "bare":
        torch.save(state, path)
    elif kind == "safetensors":
        save_file(state, path)
    else:
        net = small_adair()
        state = net.state_dict()
        torch.save(dict(model=state, config=net.config), path)
    loaded = model.load_adair(path)
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    rule = ("fraction", [0.25, 0.25]) if kind == "ours" else ("adair", [0.01, 0.01])
    found = [loaded.config[key] for key in ("dim", "heads", "mask_rule", "rates")]
    assert found == [8, [1, 2, 4, 8], *rule] and not loaded.training


def test_unknown_missing_and_misshapen_tensors_are_named(tmp_path, state):
    state["extra.weight"] = torch.zeros(1)
    del state["fre2.para1"]
    state["output.weight"] = torch.zeros(3, 5, 3, 3)
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(model.CheckpointError) as error:
        model.load_adair(tmp_path / "m.pt")
    missing = 'Missing key(s) in state_dict: "fre2.para1"'
    for words in (missing, "extra.weight", "for output.weight"):
        assert words in str(error.value)


@pytest.mark.parametrize("other", [{"weight": torch.zeros(2)}, {"model": 1}, [1], 5])
def test_another_models_checkpoint_is_refused(tmp_path, other):
    torch.save(other, tmp_path / "m.pt")
    with pytest.raises(model.CheckpointError, match="m.pt is not an AdaIR"):
        model.load_adair(tmp_path / "m.pt")


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("bomb-went-off"),))


def test_a_pickle_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, "bomb.ckpt")
    Path("plain.ckpt").write_bytes(pickle.dumps({"state_dict": Bomb()}))
    for name in ("bomb.ckpt", "plain.ckpt"):
        with pytest.raises(model.CheckpointError, match=name):
            model.load_adair(name)
    assert not Path("bomb-went-off").exists()


def test_missing_and_garbled_checkpoints(tmp_path):
    with pytest.raises(model.CheckpointError, match="there is no checkpoint"):
        model.load_adair(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(model.CheckpointError, match="text.pt"):
        model.load_adair(tmp_path / "text.pt")


def test_a_damaged_checkpoint_is_refused_in_words(tmp_path):
    """Cut off, holes, flipped bytes: some of torch's errors have no text at all."""
    torch.save({"state_dict": small_adair().state_dict()}, tmp_path / "whole.pt")
    whole, rng, refused = (tmp_path / "whole.pt").read_bytes(), np.random.default_rng(0), 0
    for i in range(40):
        damaged, at = bytearray(whole), int(rng.integers(len(whole)))
        if i % 4 == 0:
            damaged = damaged[:at]
        elif i % 4 == 1:
            damaged[at : at + 500] = b""
        else:
            first = 0 if i % 4 == 2 else len(whole) - 20_000
            for place in rng.integers(first, first + 20_000, 60):
                damaged[place] = rng.integers(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            model.load_adair(tmp_path / "damaged.pt")
        except model.CheckpointError as error:
            assert "damaged.pt" in str(error) and "()" not in str(error)
            refused += 1
    assert refused > 25
