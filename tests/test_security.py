"""What a file from elsewhere may not do: each test is an attack that succeeds where the defence is
missing."""

import base64
import json
import re
import struct
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, fails, write
from PIL import Image

import eval as evaluation
import judge as judges
import rewards
import train
from data import DataError, image_size, read_image
from model import read_checkpoint


class Bomb:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return Path.touch, (Path("bomb-went-off"),)


def test_nothing_is_unpickled(small, tmp_path, monkeypatch, capsys):
    """A checkpoint to start from, one to resume, one to evaluate, LPIPS' trunk and the aesthetic
    head."""
    monkeypatch.chdir(tmp_path)
    for name in ("bomb.pt", *(rewards.NETS[term].file for term in ("lpips", "aes"))):
        torch.save({"model": Bomb(), "state_dict": Bomb()}, name)
    assert "bomb.pt" in fails(capsys, train.main, small("run", "--init", "bomb.pt"))
    assert "bomb.pt" in fails(capsys, evaluation.main, ["--ckpt", "bomb.pt", "--data-root", "."])
    for term in ("lpips", "aes"):
        with pytest.raises(rewards.RewardError, match="does not hold the weights"):
            rewards.load_net(term, tmp_path / rewards.NETS[term].file)
    train.main(small("run", "--steps", 1))
    torch.save({**read_checkpoint("run/last.pt"), "step": Bomb()}, "run/last.pt")
    assert "last.pt" in fails(capsys, train.main, ["--resume", "run"])
    assert not Path("bomb-went-off").exists()
    torch.load("bomb.pt", weights_only=False)
    assert Path("bomb-went-off").exists()  # it would have


def test_names_reach_no_shell(small, photos, tmp_path, monkeypatch, capsys):
    """Images, folders and a judge called as commands are called."""
    monkeypatch.chdir(tmp_path)
    names = "$(touch pwned)", "; touch pwned #", "`touch pwned`", "a b'\"&& touch pwned"
    for i, name in enumerate(f"{name}.png" for name in names):
        write(photos / name, width=64, height=48, seed=i + 9)
        for part in ("input", "target"):
            write(tmp_path / "bench/$(touch pwned)" / part / name, seed=i)
    assert train.main(small("$(touch pwned)", "--steps", 2)) is None
    flags = ["--ckpt", "$(touch pwned)", "--data-root", "bench", "--save-images", "--device", "cpu"]
    assert evaluation.main(flags) is None
    assert len(list(Path("$(touch pwned)/images").rglob("*.png"))) == 8
    flags = ["restore", str(photos), "--ckpt", "$(touch pwned)", "--out", "; touch pwned"]
    assert evaluation.main([*flags, "--device", "cpu"]) is None
    Path("; touch pwned; ").mkdir()
    flags = small("judged", "--judge", "; touch pwned; ", "--judge-args='; touch pwned'")
    assert "judge" in fails(capsys, train.main, flags)
    assert not Path("pwned").exists()
    report = Path("$(touch pwned)/report.md").read_text()
    # the command there can be given to a shell as it stands
    assert f"'{tmp_path / '$(touch pwned)'}'" in report


@pytest.mark.parametrize(
    "line",
    ["../outside/0.png", "{outside}/0.png", "sub/../../outside/0.png", "1.png/../../outside/0.png"],
)
def test_lists_cannot_leave_the_data_root(small, tmp_path, capsys, line):
    outside = write(tmp_path / "outside/0.png", width=64, height=48).parent
    (tmp_path / "list.txt").write_text(f"0.png\n{line.format(outside=outside)}\n")
    said = fails(capsys, train.main, small("run", "--list", tmp_path / "list.txt"))
    assert "list.txt, line 2" in said and "is no training image" in said
    assert not (tmp_path / "run").exists()


def png_header(width, height):
    """A PNG of a few bytes that claims any size; its pixels, all zero, would be decoded for
    ever."""

    def chunk(name, content):
        code = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + code

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + head + rows + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(20_000, 10_000), (60_000, 60_000), (2**27 + 1, 1)])
def test_absurd_dimensions_are_refused_before_decoding(tmp_path, monkeypatch, size):
    # Pillow's own guard, which any library may have taken off
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_header(*size))

    def decode(*_):
        raise AssertionError("it was decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    for read in (read_image, image_size):
        claimed = f"bomb.png .*it claims {size[0]}×{size[1]} px; more than 128 MP are refused"
        with pytest.raises(DataError, match=claimed):
            read(tmp_path / "bomb.png")
    url = "data:image/png;base64," + base64.b64encode(png_header(*size)).decode()
    line = json.dumps(dict(id=1, gt=url, degraded=url, restored=url)).encode()
    # reading needs no model
    assert "does not hold an image" in judges.score_lines(None, [(1, line)])[0]["error"]


def test_no_image_is_a_program(tmp_path):
    """PostScript, which Pillow would hand to Ghostscript, under the name of a picture."""
    (tmp_path / "e.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    )
    with Image.open(tmp_path / "e.png") as image:
        assert image.format == "EPS"  # left to itself, it would
    for read in (read_image, image_size):
        with pytest.raises(DataError, match="e.png cannot be read as an image"):
            read(tmp_path / "e.png")


def test_values_that_are_no_numbers_are_no_image(tmp_path):
    """A TIFF of floats may hold them, and one would spoil every weight."""
    Image.new("F", (32, 32), float("nan")).save(tmp_path / "nan.tif")
    with pytest.raises(DataError, match="values that are no numbers"):
        read_image(tmp_path / "nan.tif")


def test_no_program_calls_a_shell_or_unpickles():
    """Neither is anywhere in the code, so that whoever reviews a change need look at the change
    alone."""
    forbidden = (
        r"shell=True|os\.(system|popen)|pickle\.loads?\(|weights_only=False|allow_pickle"
        r"|(all_gather|broadcast)_object|(?<![.\w])(eval|exec)\("
    )
    for path in [*ROOT.glob("*.py"), *ROOT.glob("experiments/*.py")]:
        text = path.read_text()
        assert not re.search(forbidden, text), (path.name, re.search(forbidden, text))
        assert text.count("torch.load(") == text.count("weights_only=True"), path.name
