"""inventory.py: folders counted against the published numbers."""

import pytest
from conftest import cut_off, reference_files, write

import inventory
from data import DataError, list_adair_test, list_training

PUBLISHED = {  # file names as the data sets' authors gave them, in AdaIR's folders
    "Train/Denoise": ["100075.jpg", "8023.jpg", "00001.bmp", "04744.bmp"],
    "Train/Derain/rainy": ["rain-1.png", "rain-2.png", "rain-200.png"],
    "Train/Derain/gt": ["norain-1.png", "norain-2.png", "norain-200.png"],
    "Train/Dehaze/synthetic/part1": ["0005_0.8_0.04.jpg", "0005_1_0.2.jpg"],
    "Train/Dehaze/synthetic/part4": ["8970_0.95_0.16.jpg"],
    "Train/Dehaze/original": ["0005.jpg", "8970.jpg"],
    "Train/Deblur/blur": ["GOPR0372_07_00-000047.png", "GOPR0884_11_00-000047.png"],
    "Train/Deblur/sharp": ["GOPR0372_07_00-000047.png", "GOPR0884_11_00-000047.png"],
    "Train/Enhance/low": ["2.png", "779.png"],
    "Train/Enhance/gt": ["2.png", "779.png"],
    "test/denoise/CBSD68": ["3096.jpg", "101085.jpg"],
    "test/denoise/Urban100": ["img_001.png"],
    "test/denoise/Kodak24": ["kodim01.PNG"],
    "test/derain/Rain100L/input": ["rain-001.png", "rain-100.png"],
    "test/derain/Rain100L/target": ["norain-001.png", "norain-100.png"],
    "test/dehaze/SOTS/input": ["0001_0.8_0.2.jpg"],
    "test/dehaze/SOTS/target": ["0001.png"],
    "test/deblur/gopro/input": ["GOPR0384_11_00-000001.png"],
    "test/deblur/gopro/target": ["GOPR0384_11_00-000001.png"],
    "test/enhance/lol/input": ["1.png"],
    "test/enhance/lol/target": ["1.png"],
    **{
        f"{name}/{part}": ["1.png"]
        for name in ("ood/RRSHID", "GT-RAIN", "SIDD", "ReLoBlur", "LoLi_Street")
        for part in ("input", "target")
    },
}


@pytest.fixture
def published(tmp_path):
    for folder, names in PUBLISHED.items():
        for i, name in enumerate(names):
            write(tmp_path / folder / name, seed=i)
    return tmp_path


def look(root, capsys, *flags):
    """(exit code, lines) of the command, without the bars of its table."""
    code = inventory.main(["--data-root", str(root), "--crop", "32", *flags])
    lines = capsys.readouterr().out.splitlines()
    return code, [" ".join(line.replace("|", " ").split()) for line in lines]


def numbers(lines):
    """{folder: [found, stated]} of the table."""
    rows = [
        line.split()
        for line in lines
        if line.startswith(("Train/", "test/", "ood/")) or line[:1].isupper()
    ]
    return {row[0]: row[1:3] for row in rows if len(row) > 3}


def test_a_complete_tree_is_counted_against_the_published_numbers(published, capsys):
    code, lines = look(published, capsys)
    assert code == 0 and not any("not there" in line or "problem(s)" in line for line in lines)
    counts = numbers(lines)
    assert (
        counts["Train/Denoise"] == ["4", "5144"]
        and counts["Train/Dehaze"] == ["3", "72135"]
        and counts["Train/Derain"] == ["3", "200"]
    )
    assert counts["Train/Deblur"] == ["2", "2103"] and counts["Train/Enhance"] == ["2", "485"]
    assert (
        counts["test/denoise/CBSD68"] == ["2", "68"]
        and counts["test/dehaze/SOTS"] == ["1", "500"]
        and counts["test/derain/Rain100L"] == ["2", "100"]
    )
    assert (
        counts["test/deblur/gopro"] == ["1", "1111"]
        and counts["test/enhance/lol"] == ["1", "15"]
        and counts["LoLi_Street"] == ["1", "-"]
    )
    assert any("LoLi-Street, out of domain" in line for line in lines) and any(
        "67 of BSD400" in line for line in lines
    )
    gts = {s.name: s.gt for s in list_adair_test(published)["Rain100L"]}
    assert gts["test/derain/Rain100L/input/rain-001.png"].endswith("target/norain-001.png")


def test_what_is_wrong_is_named_and_decides_the_exit_code(published, capsys):
    low = published / "Train/Enhance/low/2.png"
    cut_off(low, 300)
    (published / "Train/Derain/gt/norain-2.png").unlink()
    code, lines = look(published, capsys)
    assert code == 0  # training leaves both out
    assert any("rain-2.png has no clean image norain-2.*" in line for line in lines) and any(
        "low/2.png cannot be read" in line for line in lines
    )
    assert not any(
        "low/2.png cannot be read" in line for line in look(published, capsys, "--headers")[1]
    )
    (published / "test/deblur/gopro/target/GOPR0384_11_00-000001.png").unlink()
    code, lines = look(published, capsys)
    assert code == 1 and "eval.py would fail on test/deblur/gopro" in lines
    assert look(published, capsys, "--tasks", "dehaze", "derain")[0] == 0
    for name in ("2.png", "779.png"):
        (published / "Train/Enhance/gt" / name).unlink()
    code, lines = look(published, capsys, "--tasks", "lowlight")
    assert code == 1 and any("train.py would fail: " in line for line in lines)
    assert any(line == "Train/Enhance 0 485 LOL 2" for line in lines)
    for name in ("2.png", "779.png"):
        (published / "Train/Enhance/low" / name).unlink()
    assert any(
        "Train/Enhance/low/NAME, gt/NAME: LOL, 485" in line
        for line in look(published, capsys, "--tasks", "lowlight")[1]
    )


def test_a_folder_without_one_pair_is_not_called_absent(published, capsys):
    for name in ("1", "2", "200"):
        (published / f"Train/Derain/gt/norain-{name}.png").rename(
            published / f"Train/Derain/gt/rain-{name}.png"
        )
    code, lines = look(published, capsys, "--tasks", "derain")
    assert code == 1 and any(line == "Train/Derain 0 200 Rain100L 6" for line in lines)
    assert any("rain-1.png has no clean image norain-1.*" in line for line in lines) and not any(
        "Train/Derain/rainy" in line and "Rain100L, 200" in line for line in lines
    )
    words = (
        "no pairs in AdaIR's layout .* for derain; 6 file.s. cannot be used, as .*rain-1.png has no"
    )
    with pytest.raises(DataError, match=words):
        list_training(published, tasks=["derain"])


def test_the_program_on_real_pairs(capsys):
    code, lines = look(reference_files("data"), capsys, "--headers")
    counts = numbers(lines)
    assert (
        code == 0
        and counts["Train/Dehaze"] == ["96", "72135"]
        and counts["test/derain/Rain100L"] == ["51", "100"]
        and counts["ood/polyu"] == ["50", "-"]
    )
    assert any("test/denoise/Urban100/*: Urban100, 100" in line for line in lines)


def test_a_folder_of_photos_is_looked_at_too(tmp_path, capsys):
    for i in range(6):
        write(tmp_path / f"{i}.png", width=24, height=24)
    code, lines = look(tmp_path, capsys)
    assert code == 1 and any("no training image of 32 px is left" in line for line in lines)
