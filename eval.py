"""Benchmark tables, before | after, in the layout of the paper's Tables 2 and 3; and restoring one's own photos.

    python eval.py --ckpt runs/NAME --data-root data
    python eval.py restore photo.jpg --ckpt runs/NAME
"""

import csv
import io
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import model as adair
import policy as policies
import rewards
import runs

TITLES = {"dehaze": "Dehazing", "derain": "Deraining", "denoise25": "Denoising", "deblur": "Deblurring", "lowlight": "Low-Light"}
WHOLE_PIXELS = 1 << 20  # photos above this are restored in tiles unless --tile 0 asks otherwise


def load(path, device):
    """(restore, init): the deterministic restorer of a run folder or a checkpoint file, official or ours, and the path of
    the model a run started from, None if that is unknown."""
    path = Path(path)
    file = path / "last.pt" if path.is_dir() else path
    config = file.parent / "config.json"
    if path.is_dir() and not file.exists():
        raise adair.CheckpointError(f"{path} is no run folder: it has no last.pt")
    checkpoint = adair.read_checkpoint(file)
    net = adair.load_adair(file, checkpoint=checkpoint).to(device, memory_format=torch.channels_last)
    policy = policies.load_policy(checkpoint)
    controller = policy.to(device).mean() if policy else None
    init = runs.load_json(config)["init"] if policy and config.exists() else None
    return partial(adair.restore, net, controller=controller), init


def evaluate_sets(restorers, sets, tile=None, lpips=None, folder=None):
    """Runs data.evaluate, shared by all processes, for every test set and every named restorer. lpips: (y, gt) -> number; folder: for the restored images.

    Returns ({set: {method: rows}}, [(set, input, one output per method, truth) of every set's first image, in the first process]).
    """
    results, figures = {}, []
    for name, samples in sets.items():
        base = os.path.commonpath([os.path.dirname(s.name) for s in samples])
        results[name], images = {}, []
        for method, restore in restorers.items():

            def also(sample, y, gt):
                if folder:
                    path = folder / name / method / os.path.relpath(sample.name, base)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    runs.write_image(path if path.suffix == ".png" else f"{path}.png", y)
                return {"lpips": lpips(y, gt)} if lpips else {}

            rows, kept = runs.evaluate(partial(restore, tile=tile), samples, f"{name}, {method}", [0], also)
            results[name][method] = rows
            images += kept.values()
        if images:
            degraded, gt = data.evaluation_pair(samples[0])
            figures.append((name, degraded, *images, gt))
        values = "  ".join(f"{m} {cell(rows)}" for m, rows in results[name].items())
        tqdm.write(f"{name}: {len(samples)} images, input {mean(rows, 'psnr_in'):.2f}  {values}")
    return results, figures


def lpips_of(weights_dir, device):
    """(y, gt) -> LPIPS (AlexNet) of two images (3, H, W) in [0, 1], if its weights are there, else None."""
    path = rewards.weight_path("lpips", weights_dir)
    if not path.is_file():
        print(f"LPIPS is not measured: {path} is not there (from {rewards.DOWNLOADS['lpips'][1]}{path.name})")
        return None
    net = rewards.load_net("lpips", path).to(device)

    @torch.no_grad()
    def distance(y, gt):
        return net(*(t[None].clamp(0, 1).to(device) * 2 - 1 for t in (y, gt))).item()

    return distance


def mean(rows, key):
    return float(np.mean([row[key] for row in rows]))


METRICS = {"psnr": 2, "ssim": 3, "lpips": 3}  # and how many decimals the tables show


def measured(rows):
    """The metrics that rows have."""
    return [key for key in METRICS if key in rows[0]]


def cell(rows):
    return "/".join(f"{mean(rows, key):.{METRICS[key]}f}" for key in measured(rows))


def table(results, columns, title, names):
    """(title, cells): one row per method and one column per set, and their average; the gain as last row. names: {task: what stands before a
    set's name}. None without columns."""
    if not columns:
        return None
    methods = list(results[columns[0]])
    keys = measured(results[columns[0]][methods[0]])
    means = {m: [[mean(results[c][m], key) for key in keys] for c in columns] for m in methods}
    means = {m: [*v, list(np.mean(v, axis=0))] for m, v in means.items()}
    heads = [*(f"{names.get(results[c][methods[0]][0]['task'], '')} {c}".strip() for c in columns), "Average"]

    def line(name, values, sign=""):
        return [name, *("/".join(f"{x:{sign}.{METRICS[key]}f}" for x, key in zip(v, keys)) for v in values)]

    cells = [["Method", *heads], *(line(m, v) for m, v in means.items())]
    if len(methods) == 2:
        cells.append(line("gain", np.subtract(means[methods[1]], means[methods[0]]), "+"))
    return f"{title}: {'/'.join(key.upper() for key in keys)}", cells


def tables(results):
    """Table 2 (in-domain, denoising at σ = 25), all noise levels, and Table 3 (every set that is not under test/)."""
    task_of = {name: next(iter(methods.values()))[0]["task"] for name, methods in results.items()}
    in_domain = [n for task in TITLES for n in results if task_of[n] == task]
    noise = [n for n in results if task_of[n].startswith("denoise")]
    out_of_domain = [n for n in results if task_of[n] not in data.TASKS]
    parts = (
        table(results, in_domain, "In domain (layout of Table 2)", TITLES),
        table(results, noise, "Denoising by noise level", {}),
        table(results, out_of_domain, "Out of domain (layout of Table 3)", {}),
    )
    return list(filter(None, parts))


def as_text(parts):
    lines = []
    for title, cells in parts:
        width = max(14, *(len(c) + 2 for row in cells for c in row[1:]))
        lines += [title, *(f"{row[0]:10}" + "".join(f"{c:>{width}}" for c in row[1:]) for row in cells), ""]
    return "\n".join(lines)


def as_markdown(parts):
    lines = []
    for title, (head, *rows) in parts:
        rule = ["---", *["---:"] * (len(head) - 1)]
        lines += [f"**{title}**", "", *(f"| {' | '.join(row)} |" for row in (head, rule, *rows)), ""]
    return "\n".join(lines)


def to_csv(lines):
    """CSV text of lists; the first one is the heading, floats get six decimals."""
    buffer = io.StringIO()
    csv.writer(buffer).writerows([f"{v:.6f}" if isinstance(v, float) else v for v in line] for line in lines)
    return buffer.getvalue()


def csv_files(results):
    """{file name: text}: the numbers of the tables, one line per set and method; and one line per image and method."""
    scores = measured(next(iter(next(iter(results.values())).values())))
    by_set = [["set", "method", "images", "psnr_input", *scores]]
    by_image = [["set", "method", "task", "image", "psnr_input", *scores]]
    for name, methods in results.items():
        for method, rows in methods.items():
            by_set.append([name, method, len(rows), *(mean(rows, k) for k in ("psnr_in", *scores))])
            by_image += [[name, method, r["task"], r["name"], *(r[k] for k in ("psnr_in", *scores))] for r in rows]
    return {"eval.csv": to_csv(by_set), "eval-images.csv": to_csv(by_image)}


def benchmark(args):
    args.device = runs.join(args.device)
    ckpt = Path(args.ckpt)
    out = Path(args.out or (ckpt if ckpt.is_dir() else f"runs/eval-{ckpt.resolve().parent.name}-{ckpt.stem}"))
    if (out / "eval.txt").exists() and not args.overwrite and runs.rank() == 0:
        raise runs.RunError(f"{out} holds an evaluation: give --overwrite, or another --out")
    restore, init = load(args.ckpt, args.device)
    init = args.before or init
    restorers = {"before": load(init, args.device)[0], "after": restore} if init else {"model": restore}
    if not Path(args.data_root).is_dir():
        raise data.DataError(f"there is no folder {args.data_root}")
    sets = data.list_adair_test(args.data_root, args.sets)
    sets = {name: samples[: args.limit or None] for name, samples in sets.items()}
    runs.same_everywhere("list of images", [data.names_digest(samples) for samples in sets.values()])
    for name, samples in sets.items():
        _, problems = data.check_headers(samples, 8, runs.spread)
        if problems:
            raise data.DataError(f"{problems[0]} (test set {name})")
    lpips = lpips_of(args.weights_dir, args.device)
    results, figures = evaluate_sets(restorers, sets, args.tile or None, lpips, out / "images" if args.save_images else None)
    if runs.rank():
        return
    parts = tables(results)
    limited = f"\nOnly the first {args.limit} images of each set (--limit).\n" if args.limit else ""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"eval.txt": as_text(parts) + limited, "eval.md": as_markdown(parts) + limited, **csv_files(results)}
    for name, content in texts.items():
        runs.write_atomic(out / name, content.encode())
    runs.plot_samples(out / "eval.png", figures, ("input", *restorers, "truth"))
    pictures = ", images/" if args.save_images else ""
    print(f"\n{texts['eval.txt']}\nwritten to {out}: {', '.join(texts)}, eval.png{pictures} (eval-images.csv: one line per image)")


def restore_photos(args):
    restore, _ = load(args.ckpt, args.device)
    source, out = Path(args.photo), Path(args.out)
    if not source.exists():
        raise data.DataError(f"there is no photo or folder {source}")
    photos = list(map(Path, data.images_in(source, recursive=True))) if source.is_dir() else [source]
    if not photos:
        raise data.DataError(f"{source} holds no image ({', '.join(sorted(data.IMAGE_TYPES))})")
    base = source if source.is_dir() else source.parent
    targets = {}
    for photo in photos:
        target = (out / photo.relative_to(base)).with_suffix(".png")
        if target in targets:
            raise data.DataError(f"{photo} and {targets[target]} would both become {target}: rename one")
        if target.exists() and not args.overwrite:
            raise data.DataError(f"{target} exists: give --overwrite, or another --out")
        targets[target] = photo
    broken = []
    for target, photo in tqdm(targets.items(), desc="restore", unit="photo"):
        try:
            image = data.read_image(photo)
            if min(image.shape[1:]) < 8:
                raise data.DataError(f"{photo} is {image.shape[2]}×{image.shape[1]} px; 8 px a side is the least")
        except data.DataError as error:
            broken.append(str(error))
            continue
        tile = args.tile if args.tile is not None else (512 if image[0].numel() > WHOLE_PIXELS else 0)
        restored = restore(image, tile=tile or None, progress=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        runs.write_image(target, restored)
    for problem in broken:
        tqdm.write(f"not restored: {problem}")
    if broken:
        raise data.DataError(f"{len(broken)} of {len(photos)} photo(s) could not be restored; the others are in {out}")
    print(f"restored {len(photos)} photo(s) into {out}")


def main(argv):
    runs.keep_freed_memory()
    benchmarking = argv[:1] != ["restore"]
    p = runs.Parser(prog="eval.py" if benchmarking else "eval.py restore", description=__doc__, formatter_class=runs.HelpFormatter)
    p.add_argument("--ckpt", required=True, help="run folder, or a checkpoint file: official AdaIR or ours")
    p.add_argument("--device", type=runs.device, default=runs.default_device(), help="cpu, cuda, cuda:1, …")
    p.add_argument("--overwrite", action="store_true", help="replace results that exist")
    if benchmarking:
        p.add_argument("--data-root", required=True, help="folder with test/ in AdaIR's layout, or sets with input/ + target/")
        p.add_argument("--before", help="checkpoint of the 'before' column (default: what the run started from)")
        p.add_argument("--sets", nargs="+", help="names of the test sets to use (default: all that are found)")
        p.add_argument("--limit", type=runs.number(int, 0), default=0, help="images per set, the first ones; 0: all")
        p.add_argument("--tile", type=runs.tile_size, default=0, help="restore in tiles of this many px; 0: whole images")
        p.add_argument("--save-images", action="store_true", help="write every restored image, into OUT/images/SET/METHOD")
        p.add_argument("--weights-dir", help=f"where LPIPS looks for its weights (default: {rewards.default_weights_dir()})")
        p.add_argument("--out", help="folder for the tables (default: the run folder, or runs/eval-FOLDER-NAME for a file)")
    else:
        p.add_argument("photo", help="an image, or a folder of images")
        p.add_argument("--out", default="restored", help="folder for the results, written as PNG")
        p.add_argument("--tile", type=runs.tile_size, help="px; 0: whole image (default: 512 above 1 MP, else whole)")
    try:
        args = p.parse_args(argv if benchmarking else argv[1:])
        (benchmark if benchmarking else restore_photos)(args)
    except (data.DataError, adair.CheckpointError, policies.PolicyError, rewards.RewardError, runs.RunError) as error:
        return p.fail(error)
    except OSError as error:  # a folder that cannot be written, a full disk
        return p.fail(error)
    except KeyboardInterrupt:
        return p.fail("stopped")
    except torch.OutOfMemoryError:
        return p.fail("the image does not fit into GPU memory: give a --tile (or a smaller one)")
    finally:
        runs.leave()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
