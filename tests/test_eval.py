"""eval.py: benchmark tables, LPIPS, restoring photos."""

import lpips
import numpy as np
import pytest
import torch
import torchvision
from conftest import cut_off, fails, write
from PIL import Image

import eval as evaluation
import rewards
import train
from data import read_image
from metrics import multiple_of_16, psnr, ssim
from model import load_adair, restore


@pytest.fixture
def bench(tmp_path):
    """Test sets of all five tasks and one out-of-domain set, two images each."""
    root = tmp_path / "bench"
    folders = "derain/Rain100L", "dehaze/SOTS", "deblur/gopro", "enhance/lol"
    for i in range(2):
        write(root / f"test/denoise/bsd68/{i}.png", seed=i)
        for folder in (*(f"test/{name}" for name in folders), "real"):
            write(root / folder / f"input/{i}.png", seed=i + 5)
            write(root / folder / f"target/{i}.png", seed=i)
    return root


def test_benchmark_tables(small, bench, init, tmp_path, capsys):
    train.main(small("run", "--steps", 1))
    run = tmp_path / "run"
    flags = ["--ckpt", run, "--data-root", bench, "--device", "cpu"]
    assert evaluation.main([str(flag) for flag in flags]) is None
    text = (run / "eval.md").read_text()
    for words in ("Dehazing SOTS", "Low-Light lol", "Average", "Out of domain", "real"):
        assert words in text
    assert all(f"\n| {method}" in text for method in ("before", "after", "gain"))
    of_table_2 = "Dehazing", "Deraining", "Denoising", "Deblurring", "Low-Light"
    order = [text.index(word) for word in of_table_2]
    assert order == sorted(order)
    assert "holds an evaluation" in fails(capsys, evaluation.main, flags)
    rows = (run / "eval.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 8
    assert len((run / "eval-images.csv").read_text().splitlines()) == 1 + 2 * 2 * 8
    found = next(r for r in rows if r.startswith("gopro,before")).split(",")
    assert rows[0] == "set,method,images,psnr_input,psnr,ssim" and found[2] == "2"
    net, expected = load_adair(init), []
    for i in range(2):
        paths = (bench / f"test/deblur/gopro/{kind}/{i}.png" for kind in ("input", "target"))
        degraded, gt = (multiple_of_16(read_image(path)) for path in paths)
        y = restore(net, degraded)
        expected.append([psnr(degraded, gt).item(), psnr(y, gt).item(), ssim(y, gt)])
    numbers = [float(cell) for cell in found[3:]]
    assert numbers == pytest.approx(np.mean(expected, axis=0).tolist(), abs=1e-3)
    assert Image.open(run / "eval.png").width > 4 * 264  # input, before, after, truth


def test_evaluation_leaves_nothing_out(init, bench, tmp_path, capsys):
    flags = ["--ckpt", init, "--data-root", bench, "--device", "cpu", "--out", tmp_path]
    write(bench / "real/input/0.png", width=48)
    said = fails(capsys, evaluation.main, flags)
    assert "0.png is 48×64 px but its clean image" in said
    write(bench / "real/input/0.png")
    cut_off(bench / "real/input/0.png")
    said = fails(capsys, evaluation.main, [*flags, "--sets", "real"])
    assert "real/input/0.png cannot be read" in said
    (bench / "real/input/0.png").unlink()
    assert "has no degraded image" in fails(capsys, evaluation.main, flags)
    chosen = [*flags, "--sets", "gopro"]  # a set nobody asked for does not matter
    assert evaluation.main([str(flag) for flag in chosen]) is None
    flags = [*flags, "--overwrite", "--sets", "x"]
    assert "has no test set 'x'" in fails(capsys, evaluation.main, flags)
    flags[3] = "/nowhere"
    assert "there is no folder" in fails(capsys, evaluation.main, flags)


def test_lpips_stands_beside_psnr_where_its_weights_are(init, bench, tmp_path, capsys):
    torch.save(torchvision.models.alexnet().state_dict(), tmp_path / rewards.NETS["lpips"].file)
    flags = ["--ckpt", init, "--data-root", bench, "--device", "cpu", "--sets", "real"]
    with_weights = [*flags, "--weights-dir", tmp_path, "--out", tmp_path / "e"]
    evaluation.main([str(flag) for flag in with_weights])
    lines = (tmp_path / "e/eval-images.csv").read_text().splitlines()
    head, *rows = [line.split(",") for line in lines]
    assert head[-1] == "lpips" and "PSNR/SSIM/LPIPS" in (tmp_path / "e/eval.md").read_text()
    net, model = rewards.load_lpips(tmp_path / rewards.NETS["lpips"].file), load_adair(init)
    assert isinstance(net, lpips.LPIPS)
    for row, i in zip(rows, range(2), strict=True):
        y, gt = (read_image(bench / f"real/{part}/{i}.png") for part in ("input", "target"))
        y = restore(model, y).clamp(0, 1)
        expected = net(2 * y[None] - 1, 2 * gt[None] - 1).item()
        assert float(row[-1]) == pytest.approx(expected, abs=1e-4)
    without = [*flags, "--weights-dir", tmp_path / "none", "--out", tmp_path / "f"]
    evaluation.main([str(flag) for flag in without])
    assert "LPIPS is not measured" in capsys.readouterr().out
    assert "LPIPS" not in (tmp_path / "f/eval.md").read_text()


def test_restore_a_folder_and_refuse_to_overwrite(init, photos, tmp_path, capsys):
    write(photos / "sub/grey.png", pixels=np.full((41, 33), 90, dtype=np.uint8))
    out = tmp_path / "out"
    flags = ["restore", photos, "--ckpt", init, "--out", out, "--device", "cpu"]
    assert evaluation.main([str(flag) for flag in flags]) is None
    assert Image.open(out / "sub/grey.png").size == (33, 41)
    assert len(list(out.rglob("*.png"))) == 7
    expected = restore(load_adair(init), read_image(photos / "0.png")).clamp(0, 1)
    difference = (read_image(out / "0.png") - expected).abs().max()
    assert difference < 0.51 / 255 + 1e-4  # rounded, not truncated
    assert "rename one, or give --overwrite" in fails(capsys, evaluation.main, flags)
    again = [*flags, "--overwrite", "--tile", 72]
    assert evaluation.main([str(flag) for flag in again]) is None
    assert "--tile is 60" in fails(capsys, evaluation.main, [*flags, "--tile", 60])


def test_restore_names_what_it_cannot_read(init, photos, tmp_path, capsys):
    (photos / "broken.png").write_bytes(b"nothing")
    flags = ["restore", photos, "--ckpt", init, "--out", tmp_path / "out", "--device", "cpu"]
    write(photos / "small.png", width=7)
    assert "2 of 8 photo(s) could not be restored" in fails(capsys, evaluation.main, flags)
    assert len(list((tmp_path / "out").iterdir())) == 6
    flags[1] = "/nowhere.jpg"
    assert "1 of 1 photo(s) could not be restored" in fails(capsys, evaluation.main, flags)
