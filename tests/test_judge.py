"""judge.py: arithmetic of both modes, the real program on a tiny Qwen2.5-VL, servers, faults, and
training with a judge."""

import contextlib
import dataclasses
import http.server
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import tiny_judge
import torch
from conftest import ROOT, fails, logged, write
from safetensors.torch import load_file, save_file
from test_runs import finish, start, until

import judge as judges
import rewards
import runs
import train
from config import parse

SMALL = ("--min-pixels", "3136")  # 4 tokens of an image, instead of 256
EXPECTED = sum(k * p for k, p in enumerate(tiny_judge.P, 1))  # 3.7, see tiny_judge


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Qwen2.5-VL that answers 4, and expects EXPECTED, whatever it sees."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_judge.build(folder)
    return folder


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """One whose score depends on the images."""
    folder = tmp_path_factory.mktemp("seeing")
    tiny_judge.build(folder, images=True)
    return folder


def picture(seed, height=64, width=64):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))


def trio(seed, *size):
    return {name: picture(3 * seed + i, *size) for i, name in enumerate(judges.IMAGES)}


def group_of(seed, restored):
    """Requests that share truth and degraded image."""
    shared = trio(seed)
    return [dict(shared, restored=trio(j)["restored"]) for j in restored]


def local(model, **settings):
    """The judge with a model of its own, in this process."""
    settings = dict(dtype="fp32", device="cpu", min_pixels=3136) | settings
    return judges.LocalJudge(judges.Config(str(model), **settings))


# --------------------------------------------------------------------------------------- arithmetic


def test_expectation_over_five_logits():
    logits = torch.randn(4, 5, dtype=torch.float64) * 3
    wanted = scipy.special.softmax(logits.numpy(), axis=1) @ np.arange(1, 6)
    np.testing.assert_allclose(judges.expected_score(logits), wanted, rtol=1e-12)
    assert judges.expected_score(torch.tensor([0.0, 0, 0, 0, 0])) == pytest.approx(3)
    assert judges.expected_score(torch.tensor([-math.inf] * 4 + [-9.0])) == pytest.approx(5)


@pytest.mark.parametrize(
    "text, score",
    [
        ("<Assessment>\n<Analysis>fine</Analysis>\n<Score>4</Score>\n</Assessment>", 4),
        ("<Score>\n 5 \n</Score>", 5),
        ("The score is 4.", None),
        ("<Score>0</Score>", None),
        ("<Score>45</Score>", None),
        ("<Score>-4</Score>", None),
        ("<Score>4.5</Score>", None),
        ("<Score>4/5</Score>", None),
        ("<Score>4</Score> or rather <Score>5</Score>", None),
        ("<Score>4</Score></Score>", None),
        ("<Score>4</Sco", None),
        ("<score>4</score>", None),
        ("<Score>４</Score>", None),  # full width
        ("<Score>٤</Score>", None),  # Arabic
        ("<Score>\u00a04</Score>", None),  # no-break space
        ("<Degradation>Nebel, dünn 薄雾</Degradation><Score>2</Score>", 2),
    ],
)
def test_a_written_score_is_read_strictly(text, score):
    assert judges.parse_score(text) == score


def test_the_scores_are_tokens_of_their_own(tiny):
    """As in Qwen's tokenizer, whose digits stand alone."""
    judge = local(tiny)
    encode, chat = judge.processor.tokenizer.encode, judge.chat + judges.BEGIN
    for digit, token in zip("12345", judge.tokens):  # how the tokenizer itself writes the score
        assert encode(f"{chat}{digit}</Score>")[: len(encode(chat)) + 1] == [*encode(chat), token]


@pytest.mark.parametrize(
    "split", [r"\p{L}+|>\p{N}|[^\s\p{L}\p{N}]|\s+", r"\p{L}+|\p{N}</|[^\s\p{L}\p{N}]|\s+"]
)
def test_a_tokenizer_without_tokens_for_scores_is_refused(split):
    """It joins a digit with what stands beside it."""
    texts = [f"<Assessment><Score>{d}</Score></Assessment>" for d in "12345"] * 50
    tokenizer = tiny_judge.train_tokenizer(texts, split, size=330)
    with pytest.raises(judges.JudgeError, match="--mode generate"):
        judges.score_tokens(tokenizer, "<|im_start|>assistant\n")


def logprobs(*tokens):
    """OpenAI's list: (token, its p, {other token: p})."""
    as_top = lambda p: [dict(token=t, logprob=math.log(v)) for t, v in p.items()]  # noqa: E731
    return [
        dict(token=t, logprob=math.log(p), top_logprobs=as_top(others)) for t, p, others in tokens
    ]


def test_score_from_a_servers_logprobs():
    def score(*tokens):
        text = json.dumps(logprobs(*tokens))
        as_objects = json.loads(text, object_hook=lambda fields: SimpleNamespace(**fields))
        return judges.score_from_logprobs(as_objects)

    before = [("<Assessment>", 1.0, {}), ("<Score", 1.0, {"4": 1.0}), (">", 1.0, {"1": 0.9})]
    after = [("</Score>", 1.0, {"5": 1.0})]
    digit = ("4", 0.5, {"4": 0.5, "3": 0.25, "x": 0.125, "5": 0.125})
    expected = (0.5 * 4 + 0.25 * 3 + 0.125 * 5) / 0.875
    assert score(*before, digit, *after) == pytest.approx(expected)
    assert score(*before, ("", 0.9, {"1": 0.9}), ("5", 1.0, {}), *after) == pytest.approx(5)
    assert score(*before, ("2", 0.3, {}), *after) == pytest.approx(2)  # no others given
    joined = [(">4</", 0.6, {">4</": 0.6, ">2</": 0.2}), ("Score>", 1.0, {})]
    assert score(*before[:2], *joined) is None  # the text counts
    assert score(*before, digit, *after, *before[1:], digit, *after) is None  # two scores
    assert score(*before, ("7", 0.9, {"4": 0.1}), *after) is None


def test_the_prompt_asks_what_the_paper_asks(tmp_path):
    parts = judges.prompt_parts(None, "generate")
    assert parts[1::2] == ["gt", "degraded", "restored"]  # what a group shares comes first
    for label, part in zip(("Ground truth", "Degraded", "Restored"), parts[::2]):
        assert label in part
    words = "noise rain haze blur light contrast exposure artifacts 1: 5: <Score>X</Score>"
    assert all(word in "".join(parts[::2]) for word in words.split())
    (tmp_path / "prompt.txt").write_text("compare <gt> with <restored>")
    with pytest.raises(judges.JudgeError, match="prompt.txt must hold each of <gt>, <degraded>"):
        judges.prompt_parts(tmp_path / "prompt.txt", "logits")


# ----------------------------------------------------------------------- the model, as it is loaded


def plain_score(judge, request):
    """By one pass over everything, with the model's own head."""
    logits = judge.model(**judge.inputs([request], judge.chat + judges.BEGIN)).logits[0, -1]
    p = scipy.special.softmax(logits[judge.tokens].detach().double().numpy())
    return (p * np.arange(1, 6)).sum()


def test_a_group_shares_its_past_and_gets_the_same_scores(seeing, monkeypatch):
    """A group, with a repeated image, among requests that are alone."""
    judge, sizes = local(seeing), []
    a, b = group_of(0, (1, 2)), group_of(2, (5, 0, 5))
    requests = [a[0], *b, a[1], trio(1, 30, 200), trio(3)]
    read = judge.read_group
    note = lambda inputs: sizes.append(len(inputs["input_ids"])) or read(inputs)  # noqa: E731
    monkeypatch.setattr(judge, "read_group", note)
    scores = [reply["score"] for reply in judge.score(requests)]
    assert sizes == [2, 3, 1, 1]
    wanted = [plain_score(judge, request) for request in requests]
    np.testing.assert_allclose(scores, wanted, atol=5e-6)
    # the scores do depend on what is seen
    assert max(scores) - min(scores) > 1e-4 and scores[1] == pytest.approx(scores[3], abs=1e-6)


def test_bfloat16_does_not_round_scores_to_ties(seeing):
    """As on a GPU: hidden states have 8 bits, but the expectation must not."""
    exact, rounded = local(seeing), local(seeing, dtype="bf16")
    requests = group_of(0, range(4))
    scores = [reply["score"] for reply in rounded.score(requests)]
    wanted = [reply["score"] for reply in exact.score(requests)]
    np.testing.assert_allclose(scores, wanted, atol=0.02)
    assert len(set(scores)) == 4


def test_images_go_where_the_prompt_names_them(seeing, tmp_path):
    """The restored one first, so that a group shares nothing."""
    path = tmp_path / "prompt.txt"
    path.write_text("restored: <restored> truth: <gt> before: <degraded> <format>")
    judge = local(seeing, prompt=str(path))
    requests = group_of(0, (1, 2))
    scores = [reply["score"] for reply in judge.score(requests)]
    np.testing.assert_allclose(scores, [plain_score(judge, r) for r in requests], atol=5e-6)
    levels = dict(gt=10, degraded=100, restored=200)
    request = {
        name: torch.full((3, 56, 56), level, dtype=torch.uint8) for name, level in levels.items()
    }
    inputs = judge.inputs([request], judge.chat)
    pixels = inputs["pixel_values"].unflatten(0, (3, -1)).mean(dim=(1, 2))
    assert pixels.argsort().tolist() == [1, 2, 0]  # restored, gt, degraded
    texts = judge.chat.split("<|vision_start|><|image_pad|><|vision_end|>")[:3]
    assert [t.split()[-1] for t in texts] == ["restored:", "truth:", "before:"]


def test_small_images_are_enlarged_and_large_ones_reduced(tiny):
    judge = local(tiny, min_pixels=judges.Config.min_pixels)
    inputs = judge.inputs([trio(0, 128, 128), trio(0, 1500, 2000)], judge.chat)
    sides = inputs["image_grid_thw"].prod(dim=1) / 4  # tokens; without min_pixels 25
    assert sides[:3].tolist() == [256] * 3
    assert all(1000 < s <= 1280 for s in sides[3:].tolist())


def test_incomplete_weights_are_refused(tiny, tmp_path):
    """transformers itself would fill the missing tensor with random numbers."""
    folder = shutil.copytree(tiny, tmp_path / "judge")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(judges.JudgeError, match="lacks 1 tensors, as lm_head.weight"):
        local(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(judges.JudgeError, match="cannot be loaded"):
        local(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(judges.JudgeError, match="on cpu: .*no file named model.safet"):
        local(folder)


@pytest.mark.parametrize("name", ["no-such/model", "my model", "/no/such/folder"])
def test_a_model_that_is_nowhere(monkeypatch, name):
    """Without the minutes that transformers would try for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tried again"))
    words = ".*the hub: ConnectError" if name == "no-such/model" else "HFValidationError"
    with pytest.raises(judges.JudgeError, match=f"model {name} cannot be loaded on cpu: {words}"):
        local(name)


def test_an_unparsable_answer_is_tried_once_more(tiny, monkeypatch):
    """Cut off after one token the answer has no score; the second try is drawn, not the likeliest
    again."""
    judge = local(tiny, mode="generate", max_new_tokens=1)
    tries, generate = [], judge.model.generate

    def noted(**given):
        tries.append((len(given["input_ids"]), given["do_sample"]))
        return generate(**given)

    monkeypatch.setattr(judge.model, "generate", noted)
    replies = judge.score([trio(0), trio(1)])
    assert [reply["score"] for reply in replies] == [None, None]
    assert tries == [(2, False), (2, True)]


def test_padding_changes_no_answer(seeing):
    """Requests of three sizes in one batch, so that two are padded on the left."""
    judge = local(seeing, mode="generate")
    requests = [trio(0, 64, 64), trio(1, 140, 90), trio(2, 30, 200)]
    inputs = judge.inputs(requests, judge.chat)
    mask = inputs["attention_mask"]
    assert (mask[:, -1] == 1).all() and (mask[:, 0] == 0).sum() == 2
    together = judge.model(**inputs).logits[:, -1]
    alone = [judge.model(**judge.inputs([r], judge.chat)).logits[0, -1] for r in requests]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)
    assert [reply["score"] for reply in judge.score(requests)] == [4, 4, 4]


# ---------------------------------------------------------------------------- the program by itself


def lines_of(tmp_path):
    """Six requests, of paths and of base64 in turn; the fourth names a file that is not there."""
    files = {}
    for name, image in trio(0).items():
        files[name] = str(write(tmp_path / f"{name}.png", image.permute(1, 2, 0).numpy()))
    lines = [dict(id=i, **(files if i % 2 else urls(1))) for i in range(6)]
    lines[3]["restored"] = str(tmp_path / "no.png")
    return [json.dumps(line) for line in lines]


def test_the_program_scores_json_lines(tiny, tmp_path):
    """Batches of 4, a hole in the middle, noise-free output."""
    text = "\n".join([*lines_of(tmp_path), "no JSON", '{"id": 7}\n'])
    command = [sys.executable, ROOT / "judge.py", "--device", "cpu", "--model", tiny]
    command += ["--batch-size", "4", *SMALL]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["id"] for r in replies] == [0, 1, 2, 3, 4, 5, None, 7] and done.returncode == 1
    assert "5 scored, 3 not" in done.stderr
    errors = [r["error"] for r in replies if r["score"] is None]
    words = "line 4: there is no image", "line 7 is no JSON object", "line 8"
    assert [word in error for word, error in zip(words, errors, strict=True)] == [True] * 3
    for reply in replies[:3] + replies[4:6]:
        assert reply["score"] == pytest.approx(EXPECTED, abs=1e-4)


def test_written_answers_of_json_lines(tiny, tmp_path):
    judge = local(tiny, mode="generate")
    replies = judges.score_lines(judge, list(enumerate(lines_of(tmp_path), 1)))
    missing = replies.pop(3)
    assert missing["score"] is None and "line 4: there is no image" in missing["error"]
    text = "<Assessment><Score>4</Score></Assessment>"
    assert replies == [dict(id=i, score=4, text=text) for i in (0, 1, 2, 4, 5)]


def test_a_number_that_is_no_score_is_an_error():
    judge = SimpleNamespace(score=lambda requests: [dict(score=math.nan)])
    (reply,) = judges.score_lines(judge, [(1, json.dumps(dict(id=1, **urls(0))))])
    assert reply["score"] is None and "--dtype" in reply["error"]


def test_batches_end_at_empty_lines():
    text = io.BytesIO(b"a\nb\n\n\nc\nd\ne\nf")
    assert list(judges.read_batches(text, 3)) == [
        [(1, b"a\n"), (2, b"b\n")],
        [(5, b"c\n"), (6, b"d\n"), (7, b"e\n")],
        [(8, b"f")],
    ]


@pytest.mark.parametrize(
    "image", [5, ["a.png"], "data:image/png;base64,AAAA", "data:image/png;base64,%%", "data:,hello"]
)
def test_what_is_no_image_is_an_error_of_its_line(image):
    line = json.dumps(dict(id="a", gt=image, degraded=image, restored=image))
    (reply,) = judges.score_lines(None, [(2, line)])  # reading needs no model
    words = f"line 2: the data URL {image}… does not hold an image in base64"
    words = words if isinstance(image, str) else "line 2 is no JSON object of id, gt, degraded"
    assert (reply["id"], reply["score"]) == ("a", None) and reply["error"].startswith(words)


# ---------------------------------------------------------- the trainer's side, with real processes


def command(*flags):
    program = [sys.executable, str(ROOT / "judge.py")]
    return [*program, "--device", "cpu", "--parent", str(os.getpid()), *map(str, flags)]


def asked(judge, b=1, g=2, size=32):
    """What it is asked: b groups of g random images."""
    degraded, gt = torch.rand(2, b, 3, size, size)
    return judge.ask(degraded, torch.rand(b, g, 3, size, size), gt)


def scores_of(judge, **size):
    return judge.result(asked(judge, **size))


def is_gone(pid):
    """Whether a process that is no child of ours has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    except FileNotFoundError:
        return True


def test_the_real_judge_scores_batches_and_is_not_waited_for_when_it_hangs(tiny, tmp_path):
    judge = judges.Judge(command("--model", tiny, *SMALL), tmp_path / "log", timeout=300)
    with contextlib.closing(judge):
        judge.start(torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), 2)
        scores = scores_of(judge, b=2, g=2)
        torch.testing.assert_close(scores, torch.full((2, 2), EXPECTED), atol=1e-4, rtol=0)
        assert judge.problem is None and judge.metrics["judge/failures"] == 0
        assert judge.metrics["judge/wait"] >= 0 and judge.starts == 1

        os.kill(judge.process.pid, signal.SIGSTOP)  # it hangs
        judge.timeout = 0.5
        assert scores_of(judge, g=4, size=256).isnan().all()  # more than a pipe holds
        assert "did not answer within 0.5 s" in str(judge.problem) and judge.process is None


FAKE = """
import json, sys
print(json.dumps(dict(ready=1)), flush=True)
for line in iter(sys.stdin.readline, ""):
    if line.strip():
        for reply in open(sys.argv[1]):
            print(reply.replace('"#"', str(json.loads(line)["id"])), end="", flush=True)
"""


def fake(tmp_path, *replies):
    """A process that answers every request with these lines, "#" being the request's id."""
    lines = [reply if isinstance(reply, str) else json.dumps(reply) for reply in replies]
    (tmp_path / "replies").write_text("".join(line + "\n" for line in lines))
    words = [sys.executable, "-c", FAKE, str(tmp_path / "replies")]
    return judges.Judge(words, tmp_path / "log", timeout=300)


@pytest.mark.parametrize(
    "replies, score",
    [
        (
            ["INFO 4 5", "4", "[1, 2]", "null", "{", '{"score": 1}']
            + [dict(id=-1, score=1), dict(id=[0], score=1), dict(id="#", score=3.5)],
            3.5,
        ),
        (
            ["\x00\xff" * 999, "[" * 200000, "x" * 3_000_000]
            + [dict(id=True, score=1), dict(id="#", score=2)],
            2,
        ),
        ([dict(id="#", score=99)], None),
        ([dict(id="#", score=True)], None),
        ([dict(id="#", score="4")], None),
        ([dict(id="#", score=math.nan)], None),
        ([dict(id="#")], None),
        ([dict(id="#", score=None, error="too dark to see")], None),
    ],
)
def test_noise_is_never_read_as_a_score(tmp_path, replies, score):
    judge = fake(tmp_path, *replies)
    with contextlib.closing(judge):
        scores = scores_of(judge)
        assert scores.tolist() == [[score, score]] if score else scores.isnan().all()
        assert judge.metrics["judge/failures"] == (0 if score else 2)
        assert score or str(judge.problem)
        assert judge.starts == 1  # nothing here is a reason to start it again


def test_its_first_batch_and_its_patience(tmp_path):
    never = fake(tmp_path, dict(id="#", score=None, error="too dark to see"))
    with contextlib.closing(never):
        with pytest.raises(judges.JudgeError, match="not score a first batch: too dark to see"):
            never.start(torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16), 2)
        never.patience, never.failed_in_a_row = 3, 0
        assert scores_of(never).isnan().all() and scores_of(never).isnan().all()
        with pytest.raises(judges.JudgeError, match="failed 3 times in a row, the last .* dark"):
            scores_of(never)


LIFE = """
import json, os, sys, time
lives = sys.argv[1]
open(lives, "a").write("x")
life = os.path.getsize(lives)
print(json.dumps(dict(ready=1)), flush=True)
for line in iter(sys.stdin.readline, ""):
    if line.strip():
        if life == 1:
            time.sleep(600)
        print(json.dumps(dict(id=json.loads(line)["id"], score=2.5, text="x" * 3000)), flush=True)
"""


def alive(tmp_path, **rest):
    """A judge that hangs in its first life and scores in the next."""
    words = [sys.executable, "-c", LIFE, str(tmp_path / "lives")]
    return contextlib.closing(judges.Judge(words, tmp_path / "log", **rest))


def test_after_a_hang_it_is_started_again_however_long_that_takes(tmp_path, monkeypatch):
    """The wait for a batch begins when the judge is ready: loading may take longer than
    --judge-timeout. Here it takes 50 s, by a clock that is put forward meanwhile."""
    clock, late = time.monotonic, []
    with alive(tmp_path, timeout=0.5) as judge:
        assert scores_of(judge).isnan().all()
        assert "did not answer within 0.5 s" in str(judge.problem)
        monkeypatch.setattr(time, "monotonic", lambda: clock() + (50 if late else 0))
        monkeypatch.setattr(time, "perf_counter", time.monotonic)
        judge.timeout, judge.check = 40, lambda: late.append(True)
        assert scores_of(judge).tolist() == [[2.5, 2.5]]
        assert judge.starts == 2 and judge.problem is None and judge.metrics["judge/wait"] > 50
        judge.timeout = 300
        # requests and replies both larger than a pipe holds
        assert scores_of(judge, g=64, size=64).tolist() == [[2.5] * 64]


def test_after_a_kill_it_is_started_again(tmp_path):
    with alive(tmp_path, timeout=300) as judge:
        pending = asked(judge, b=2, g=2)
        os.kill(judge.process.pid, signal.SIGKILL)
        assert judge.result(pending).isnan().all() and "signal 9 ended it" in str(judge.problem)
        assert judge.metrics["judge/failures"] == 4
        assert scores_of(judge).tolist() == [[2.5, 2.5]]
        assert judge.starts == 2 and judge.failed_in_a_row == 0


def test_a_judge_that_never_gets_ready(tmp_path):
    judge = judges.Judge([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log")
    judge.start_timeout = 0.5
    with pytest.raises(judges.JudgeError, match="could not start: it did not answer within 0.5 s"):
        judge.launch()
    assert judge.process is None
    with pytest.raises(judges.JudgeError, match="could not start: .*No such file"):
        judges.Judge(judge.command, tmp_path / "no/log").launch()


def test_a_judge_that_ends_after_its_start_says_why(tmp_path):
    words = "import sys; print('{\"ready\": 1}', flush=True); sys.stdin.readline(); "
    words += "sys.exit('the card fell out')"
    judge = judges.Judge([sys.executable, "-c", words], tmp_path / "log")
    assert scores_of(judge).isnan().all()
    assert str(judge.problem) == "the card fell out (exit code 1)"


TRAINER = """
import os, sys, time, torch, judge
command = [sys.executable, judge.__file__, "--device", "cpu", "--parent", str(os.getpid())]
command += ["--model", sys.argv[1]]
hanging, loading = (judge.Judge(command, sys.argv[2]) for _ in range(2))
hanging.start(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32), 2)
print(hanging.process.pid, flush=True)
loading.check = lambda: time.sleep(600)
loading.launch()
"""


def children(pid):
    """Process ids of the judges a process started."""
    words = ["pgrep", "-P", str(pid), "-f", "judge.py"]
    found = subprocess.run(words, capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_no_judge_outlives_its_trainer(tiny, tmp_path):
    """SIGKILL leaves the trainer no time for anything; its judges end all the same, one that is
    stopped and one that has just been started."""
    words = [sys.executable, "-c", TRAINER, tiny, tmp_path / "log"]
    trainer = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    hanging = int(trainer.stdout.readline())
    until(lambda: len(children(trainer.pid)) == 2)
    pids = children(trainer.pid)
    os.kill(hanging, signal.SIGSTOP)
    assert not any(map(is_gone, pids))
    trainer.kill()
    trainer.wait()
    until(lambda: all(map(is_gone, pids)))


# ------------------------------------------------------------------------------------------ servers


class Handler(http.server.BaseHTTPRequestHandler):
    """Speaks enough of OpenAI's protocol. `server.behave(n)` says what the n-th request gets."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, body, self.headers.get("Authorization")))
            n = len(self.server.seen)
        answer = self.server.behave(n)
        if answer == "close":
            self.connection.close()
        elif answer == "slow":
            self.server.over.wait()
        elif answer == "drip":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # when nobody listens any more
                while not self.server.over.wait(0.1):
                    self.wfile.write(b" ")
            self.server.dripped.set()
        elif answer == "redirect":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.2:{self.server.server_port}/v1/models")
            self.end_headers()
        elif answer == "malformed":
            self.reply(200, '{"choices": [')
        elif isinstance(answer, int):
            self.reply(answer, dict(error="busy"))
        else:
            self.reply(200, answer)

    def reply(self, code, answer):
        content = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    s.seen, s.lock = [], threading.Lock()
    s.over, s.dripped = threading.Event(), threading.Event()
    s.behave = lambda n: completion("<Assessment><Score>4</Score></Assessment>")
    s.url = f"http://127.0.0.1:{s.server_port}/v1"
    threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
    yield s
    s.over.set()
    s.shutdown()
    s.server_close()


def completion(text, tokens=None):
    choice = dict(message=dict(role="assistant", content=text))
    return dict(choices=[choice | dict(logprobs=dict(content=tokens))] if tokens else [choice])


WITH_LOGPROBS = logprobs(
    ("<Score>", 1.0, {}), ("4", 0.5, {"4": 0.5, "2": 0.5}), ("</Score>", 1.0, {})
)


def served(server, **settings):
    return judges.ServerJudge(judges.Config("qwen", server.url, **settings))


def urls(seed):
    """The images of a request as a line has them."""
    return {name: judges.data_url(image) for name, image in trio(seed).items()}


def test_a_server_gets_labelled_images_and_gives_an_expectation(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.behave = lambda n: completion("<Score>4</Score>", WITH_LOGPROBS)
    (reply,) = served(server).score([trio(0)])
    assert reply["score"] == pytest.approx(3)  # of 4 and 2
    path, body, key = server.seen[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "qwen"
    assert body["temperature"] == 0 and body["logprobs"] is True and body["top_logprobs"] == 20
    content = body["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url"] * 3
    labels = zip(("truth", "Degraded", "Restored"), trio(0).values())
    for (label, image), text, found in zip(labels, content[::2], content[1::2]):
        assert label in text["text"].splitlines()[-1]
        found = judges.read_source(found["image_url"]["url"])
        assert torch.equal((found * 255).round().byte(), image)


def test_a_server_without_logprobs_and_one_that_writes(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert served(server).score([trio(0)] * 3)[2]["score"] == 4
    assert server.seen[0][2] == "Bearer none"  # a dummy key
    odd = logprobs(("token_id:27", 1.0, {}), ("token_id:20", 1.0, {}))
    server.behave = lambda n: completion("<Score>5</Score>", odd)
    assert served(server).score([trio(0)])[0]["score"] == 5  # tokens that do not make up the text
    text = "<Assessment>\n<Analysis>dunkel</Analysis>\n<Score>2</Score>\n</Assessment>"
    server.behave = lambda n: completion(text, WITH_LOGPROBS)
    assert served(server, mode="generate").score([trio(0)]) == [dict(score=2, text=text)]
    assert "logprobs" not in server.seen[-1][1] and server.seen[-1][1]["max_tokens"] == 512


@pytest.mark.parametrize(
    "first, words",
    [
        (429, "429"),
        ("close", "failed: "),
        ("malformed", "no chat completion"),
        (dict(choices=[]), "no chat completion"),
        (completion("four, I should say"), "no single <Score>"),
        (completion(None), "no chat completion"),
        (completion("", [dict(token="<Score>4</Score>", logprob=10**400)]), "no "),
    ],
)
def test_what_a_server_does_wrong_is_tried_once_more(server, first, words):
    """Once: by its client, or by us where an answer is no score."""
    good = server.behave
    server.behave = lambda n: first if n == 1 else good(n)
    assert served(server).score([trio(0)])[0]["score"] == 4 and len(server.seen) == 2
    server.behave = lambda n: first
    (reply,) = served(server).score([trio(0)])
    assert reply["score"] is None and words in reply["error"] and len(server.seen) == 4


def test_a_redirect_does_not_get_the_key(server):
    server.behave = lambda n: "redirect"
    (reply,) = served(server).score([trio(0)])
    assert reply["score"] is None and "302" in reply["error"] and len(server.seen) == 1


def test_a_server_that_refuses(server):
    server.behave = lambda n: 400
    assert "400" in served(server).score([trio(0)])[0]["error"]
    asked = ["logprobs" in body for _, body, _ in server.seen]
    assert asked == [True, False]  # perhaps it was these it would not give


@pytest.mark.parametrize("how", ["slow", "drip"])
def test_a_server_that_is_slow(server, how):
    """It would go on until the test is over; nothing is left to read it."""
    server.behave = lambda n: how
    replies = served(server, timeout=0.5).score([trio(0)] * 3)
    assert [reply["error"] for reply in replies] == ["the server did not answer in time"] * 3
    assert how != "drip" or server.dripped.wait(60)


def test_a_server_that_is_not_there():
    """Named by the first batch."""
    judge = judges.ServerJudge(judges.Config("qwen", "http://127.0.0.1:9/v1"))
    (reply,) = judge.score([trio(0)])
    assert reply["error"].startswith("the server http://127.0.0.1:9/v1 failed: ConnectError")


def test_a_real_server(tiny, tmp_path):
    """transformers' own, with the tiny judge: it gives no log-probabilities, so that X counts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    program = os.path.join(os.path.dirname(sys.executable), "transformers")
    command = [program, "serve", str(tiny), "--port", url[17:-3], "--device", "cpu"]
    with open(tmp_path / "log", "wb") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def answers():
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{url}/models", timeout=5).close() or True

    try:
        until(lambda: process.poll() is not None or answers())
        judge = judges.ServerJudge(judges.Config(str(tiny), url))
        scores = [reply["score"] for reply in judge.score([trio(0), trio(1)])]
        assert scores == [4, 4], (tmp_path / "log").read_text()[-2000:]
    finally:
        process.kill()


# ----------------------------------------------------------------------------------------- training


def test_a_judge_that_cannot_start_ends_the_run_before_it_begins(small, tmp_path, capsys):
    flags = small("run", "--judge", tmp_path, "--judge-args=--batch-size 0")
    message = fails(capsys, train.main, flags)
    assert "first batch: it could not start: " in message and "--batch-size is 0" in message
    # the same --out serves once more: nothing of a run is in it
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["judge.log"]
    said = fails(capsys, judges.main, ["--model", "x", "--device", "cuda:63"])
    assert "'cuda:63' is no device of this machine" in said


def test_a_run_with_a_judge_survives_its_death(small, seeing, tmp_path):
    """The real program beside the real trainer, killed in the middle."""
    run, given = tmp_path / "run", ["--judge-timeout", 300, f"--judge-args={' '.join(SMALL)}"]
    process = start([ROOT / "train.py", *small("run", "--judge", seeing, *given)])
    try:
        until(lambda: process.poll() is not None or len(logged(run)) >= 2)
        (pid,) = children(process.pid)
        os.kill(pid, signal.SIGKILL)
        finish(process)
    finally:
        process.kill()
    rows = logged(run)
    assert len(rows) == 10 and rows[0]["judge/starts"] == 1 and rows[-1]["judge/starts"] == 2
    failures = [row["judge/failures"] for row in rows]
    assert set(failures) <= {0, 4} and failures.count(0) >= 8
    for row in rows:
        if row["judge/failures"]:
            assert "rewards/qwen/mean" not in row
        else:
            assert row["rewards/qwen/mean"] == pytest.approx((EXPECTED - 1) / 4, abs=0.05)
    said = f"The judge left {sum(failures):.0f} rollouts without a score."
    assert said in (run / "report.md").read_text()
    terms = {row["term"]: row for row in json.loads((run / "rewards.json").read_text())}
    assert terms["qwen"]["weight"] == pytest.approx(0.1) and str(seeing) in terms["qwen"]["state"]
    left = subprocess.run(["pgrep", "-f", str(seeing)], capture_output=True, text=True)
    assert not left.stdout


def test_a_run_whose_judge_keeps_failing_stops_and_can_be_resumed(small, server, tmp_path, capsys):
    good = server.behave
    server.behave = lambda n: good(n) if n <= 4 + 3 * 4 else 500  # the first batch and three steps
    flags = "--judge-model qwen --judge-patience 2 --judge-timeout 300".split()
    message = fails(capsys, train.main, small("run", "--judge", server.url, *flags))
    assert "failed 2 times in a row" in message and "500" in message
    run = tmp_path / "run"
    assert f"after step 4; --resume {run} goes on" in message
    assert torch.load(run / "last.pt", weights_only=True)["step"] == 4
    rows = logged(run)
    assert [row["judge/failures"] for row in rows] == [0, 0, 0, 4]
    assert rows[0]["rewards/qwen/mean"] == pytest.approx(0.75)
    server.behave = good
    resumed = ["--resume", str(run), "--judge-model", "qwen", "--judge-timeout", "60"]
    assert train.main(resumed) is None
    assert json.loads((run / "config.json").read_text())["expert"]["judge_timeout"] == 60
    assert [row["judge/failures"] for row in logged(run)] == [0, 0, 0, 4] + [0] * 6


def test_a_step_asks_first_and_waits_last(tmp_path, monkeypatch):
    """One batch for the whole step, sent before the other rewards are computed and awaited after
    them."""
    events, judge = [], fake(tmp_path, dict(id="#", score=3))

    def note(place, name):
        function = getattr(place, name)
        noted = lambda *given, **rest: events.append(name) or function(*given, **rest)  # noqa: E731
        monkeypatch.setattr(place, name, noted)

    for name in ("r_psnr", "r_ssim", "r_task", "r_qwen"):
        note(rewards, name)
    note(judge, "ask")
    note(judge, "result")
    reward = rewards.Reward(rewards.parse_terms("default", judge=True))
    restored, (degraded, gt) = torch.rand(2, 3, 3, 32, 32), torch.rand(2, 2, 3, 32, 32)
    with contextlib.closing(judge):
        _, terms = reward(restored, degraded, gt, ["dehaze", "deblur"], judge)
    assert events == ["ask", "r_psnr", "r_ssim", "r_task", "r_task", "result", "r_qwen"]
    assert terms["qwen"].tolist() == [[0.5] * 3] * 2


def test_a_run_that_is_asked_to_end_does_not_wait_for_its_judge(tmp_path):
    """SIGTERM comes while it is waited for, the third time that the wait looks up."""
    words = "import time; print('{\"ready\": 1}', flush=True); time.sleep(600)"
    with runs.Stop() as stop:
        judge, looks = judges.Judge([sys.executable, "-c", words], tmp_path / "log"), []

        def check():
            looks.append(time.time())
            if len(looks) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            stop.check()

        with contextlib.closing(judge):
            pending = asked(judge)
            judge.check = check
            with pytest.raises(runs.Stopped, match="SIGTERM"):
                judge.result(pending)
        assert len(looks) in (3, 4)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--judge", "http://localhost:1/v1"], "--judge-model"),
        (["--judge-model", "qwen"], "--judge-model"),
        (["--judge", "x", "--objective", "sft"], "leave --judge out"),
        (["--judge", "x", "--rewards", "psnr,task"], "leaves its term qwen out"),
        (["--judge", "x", "--rewards", "qwen,gen=0"], "qwen alone"),
        (["--rewards", "psnr,qwen"], "name one with --judge"),
        (["--judge", "x", "--judge-prompt", "no.txt"], "no.txt"),
        (["--judge", "x", "--judge-mode", "guess"], "guess"),
        (["--judge", "x", "--judge-args='"], "--judge-args: No closing quotation"),
        (["--judge", "x", "--judge-timeout", "0"], "--judge-timeout is 0"),
    ],
)
def test_impossible_judges_are_one_sentence(small, capsys, flags, words):
    assert words in fails(capsys, train.main, small("run", *flags))


def test_a_resumed_run_keeps_its_kind_of_judge(tmp_path, capsys):
    """One without a judge gets none; a server's goes on with a judge of its own."""

    def stored(*flags):
        config = parse(["--device", "cpu", *flags])
        runs.save_json(tmp_path / "config.json", dataclasses.asdict(config))
        return ["--resume", str(tmp_path)]

    resume = stored()
    said = fails(capsys, train.main, [*resume, "--judge", "x"])
    assert "cannot gain or lose its judge" in said
    resume = stored("--judge", "http://h/v1", "--judge-model", "qwen", "--judge-mode", "generate")
    said = fails(capsys, train.main, [*resume, "--judge", "none"])
    assert "cannot gain or lose its judge" in said
    expert = parse([*resume, "--judge", str(tmp_path), "--judge-mode", "logits"]).expert
    assert (expert.judge, expert.judge_model, expert.judge_mode) == (str(tmp_path), None, "logits")
    resume = stored("--judge", "m")
    assert "--judge-model" in fails(capsys, train.main, [*resume, "--judge", "http://h/v1"])


@pytest.mark.parametrize(
    "device, world, rank, wanted",
    [
        ("cpu", 1, 0, "cpu"),
        ("cuda", 1, 0, "cuda:1"),
        ("cuda:1", 1, 0, "cuda:0"),
        ("cuda:0", 2, 0, "cuda:2"),
        ("cuda:1", 2, 1, "cuda:3"),
    ],
)
def test_every_rank_has_a_judge_of_its_own(monkeypatch, tmp_path, device, world, rank, wanted):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert judges.judge_device(device) == wanted
    config = parse(["--judge", "m", "--device", "cpu", "--judge-args=--min-pixels 784"])
    config.device = device
    with judges.make_judge(config, tmp_path, runs.Stop()) as judge:
        assert f"--device={wanted}" in judge.command
        assert judge.command[-2:] == ["--min-pixels", "784"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if wanted not in ("cpu", "cuda:0"):
        with pytest.raises(
            runs.RunError,
            match=f"wants a GPU of its own, {wanted}, and this machine has 1: .*--judge-device",
        ):
            judges.judge_device(device)
