"""The expert reward's judge (Appendix B.2): Qwen2.5-VL looks at three images and gives a score of 1
to 5.

    python judge.py --model Qwen/Qwen2.5-VL-7B-Instruct < requests.jsonl > scores.jsonl

A request is one line of JSON, an image a path or a data URL (data:image/png;base64,…); its reply is
one line, too:

    {"id": 7, "gt": "a.png", "degraded": "b.png", "restored": "c.png"}
    {"id": 7, "score": 3.62}                             --mode logits
    {"id": 7, "score": 4, "text": "<Assessment>…"}       --mode generate
    {"id": 7, "score": null, "error": "why there is none"}

Requests are scored in batches of --batch-size; an empty line ends a batch early. It exits with 1 if
a request got no score. Training starts this same program, and `Judge`, at the end of this file,
asks it; to it, the program first says {"ready": …}. Nothing but these lines goes to its output.
"""

import base64
import contextlib
import ctypes
import functools
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image

import runs
from data import DataError, read_image

# The images stand last and the restored one last of all: what comes before it is the same for a
# whole group, so a server keeps it.
PROMPT = """You are an expert in image restoration. You will see three images of one scene: the \
ground truth, a degraded version of it, and what a model restored from the degraded version.

1. Name the most plausible degradation: noise (slight, medium or strong), rain, haze, blur or low \
light. Say briefly why.
2. Compare the restored image with the ground truth in what this degradation is about. Noise and \
rain: how completely grain or streaks are gone. Haze: contrast, and what is left of the veil. \
Blur: how sharp edges are again. Low light: exposure and faithful colours.
3. Name what got better and which artifacts remain.
4. Give a score from 1 to 5:
   1: severe artifacts, or hardly any improvement
   2: a little better, but with serious problems
   3: clearly better, with visible gaps
   4: well restored, with only small flaws
   5: nearly perfect, hard to distinguish from the ground truth
<format>

Ground truth (the clean reference):
<gt>
Degraded image (what the model was given):
<degraded>
Restored image (what you score):
<restored>"""
FORMAT = {
    "logits": "Answer with the score X alone, in this form:\n"
    "<Assessment><Score>X</Score></Assessment>",
    "generate": "Answer in this form, X being the score:\n<Assessment>\n"
    "<Degradation>type and reason</Degradation>\n<Analysis>comparison</Analysis>\n"
    "<Score>X</Score>\n</Assessment>",
}
IMAGES = ("gt", "degraded", "restored")
BEGIN = "<Assessment><Score>"  # what the assistant's turn begins with in mode logits
DIGITS = "12345"
SCORE = re.compile(r"<Score>[ \r\n]*([1-5])[ \r\n]*</Score>")
NO_SCORE = "the answer has no single <Score>X</Score> with X from 1 to 5"
DRAWN = dict(temperature=0.7, top_p=0.9)  # how a second answer is drawn
PIPES = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
START_TIMEOUT = 1800.0  # s; a first start downloads 16 GB


class JudgeError(RuntimeError):
    """The judge cannot be had, or could not score; its text says why and what to do."""


@dataclass
class Config:
    """The judge by itself: reads requests, one JSON object a line, and writes scores."""

    model: str
    """Qwen2.5-VL: a folder, or a name on the Hugging Face hub; with --server, its name there"""
    server: str | None = None
    """ask an OpenAI-compatible server, as http://localhost:8000/v1, instead of loading the model"""
    timeout: runs.AboveZero = 60.0
    """seconds that a batch sent to a server may take"""
    mode: Literal["logits", "generate"] = "logits"
    """expectation over the score's tokens, or the written answer of Appendix B.2"""
    prompt: str | None = None
    """file with a prompt of your own: <gt>, <degraded>, <restored> mark the images"""
    device: str = runs.default_device()
    """cpu, cuda, cuda:1, …"""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """of the weights; without it, bf16 on a GPU and fp32 on a CPU"""
    batch_size: runs.Positive = 16
    """requests scored at once"""
    min_pixels: runs.Positive = 256 * 28 * 28
    """smaller images are enlarged to this many pixels; 784 pixels are one token"""
    max_pixels: runs.Positive = 1280 * 28 * 28
    """larger images are reduced to this many pixels"""
    max_new_tokens: runs.Positive = 512
    """longest written answer"""
    parent: int | None = None
    """process id of the trainer that starts it, which it tells when it is ready and ends with"""


# ------------------------------------------------------------------------ from an answer to a score


def expected_score(logits):
    """Σ k p_k over the five scores, p the softmax of the logits (or log-probabilities) (…, 5) of
    the tokens 1 … 5; (…)."""
    scores = torch.arange(1, 6, dtype=logits.dtype, device=logits.device)
    return (logits.softmax(dim=-1) @ scores).clamp(1, 5)  # rounding could lead out


def find_score(text):
    """The match of the one <Score>X</Score> in a text, X from 1 to 5; None without, or of more."""
    once = text.count("<Score>") == 1 and text.count("</Score>") == 1
    return SCORE.search(text) if once else None


def parse_score(text):
    """The score of 1 to 5 a text gives as <Score>X</Score>, or None."""
    found = find_score(text)
    return int(found[1]) if found else None


def score_from_logprobs(tokens):
    """The expectation at the score's place in a server's list of tokens with top_logprobs; None
    without a valid score, or where it is no token of its own."""
    found = find_score("".join(t.token for t in tokens))
    place = found.start(1) if found else -1
    for t in tokens:
        if place == 0 and len(t.token) == 1:
            likely = {top.token: top.logprob for top in [t, *(t.top_logprobs or [])]}
            logits = torch.tensor([likely.get(digit, -math.inf) for digit in DIGITS])
            return expected_score(logits).item()
        place -= len(t.token)
    return None


def score_tokens(tokenizer, chat):
    """The five tokens of 1 … 5 after `chat` and BEGIN. Raises JudgeError for a tokenizer in which
    they are not tokens of their own."""
    n = len(tokenizer.encode(chat + BEGIN))
    tokens = [tokenizer.encode(f"{chat}{BEGIN}{digit}</Score>")[n] for digit in DIGITS]
    if tokenizer.decode(tokens) != DIGITS:
        raise JudgeError("the model has no tokens of their own for 1 to 5: use --mode generate")
    return tokens


def prompt_parts(path, mode):
    """The prompt in the file --prompt names, or the built-in one, as a list of texts and, between
    them, image names ("gt", "degraded", "restored"). Raises JudgeError."""
    prompt = Path(path).read_text(encoding="utf-8") if path else PROMPT
    parts = re.split("<(gt|degraded|restored)>", prompt.replace("<format>", FORMAT[mode]))
    if sorted(parts[1::2]) != sorted(IMAGES):
        raise JudgeError(f"{path} must hold each of <gt>, <degraded> and <restored> once")
    return parts


def reason(error):
    """An exception, or what caused it, in a line."""
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


# -------------------------------------------------------------------------------- the model itself


def load(config):
    """(model, processor) of a local folder or hub name. Raises JudgeError."""
    import transformers  # late: it takes seconds
    from huggingface_hub import HfApi, snapshot_download

    folder, hub = config.model, ""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.dtype]
    try:
        if not Path(folder).is_dir():
            try:
                HfApi().model_info(folder, timeout=5)  # a download would ask for minutes
            except Exception as error:  # no network, no such model: perhaps it is on this machine
                hub = f" (the hub: {reason(error)})"
            folder = snapshot_download(folder, ignore_patterns="*.bin", local_files_only=bool(hub))
        processor = transformers.AutoProcessor.from_pretrained(folder, padding_side="left")
        model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,  # the other format is pickle
            output_loading_info=True,
        )
        model.to(config.device)
    except Exception as error:
        raise JudgeError(
            f"the judge's model {config.model} cannot be loaded on {config.device}: "
            f"{reason(error)}{hub}"
        ) from None
    missing = [*info["missing_keys"], *info["mismatched_keys"]]
    if missing:  # transformers would fill them with random numbers
        raise JudgeError(f"{config.model} lacks {len(missing)} tensors, as {missing[0]}")
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    processor.image_processor.size = size
    return model.eval().requires_grad_(False), processor


class LocalJudge:
    """Qwen2.5-VL with its prompt: scores lists of requests {name: uint8 image (3, H, W)}."""

    def __init__(self, config):
        self.config = config
        parts = prompt_parts(config.prompt, config.mode)
        self.model, self.processor = load(config)
        self.names = parts[1::2]  # the images' order in the prompt
        content = [dict(type="text", text=text) for text in parts]
        content[1::2] = [dict(type="image")] * len(self.names)
        self.chat = self.processor.apply_chat_template(
            [dict(role="user", content=content)], tokenize=False, add_generation_prompt=True
        )
        if config.mode == "logits":
            self.tokens = score_tokens(self.processor.tokenizer, self.chat)

    @torch.inference_mode()
    def score(self, requests):
        """Replies without their id, one per request."""
        return self.expect(requests) if self.config.mode == "logits" else self.assess(requests)

    def inputs(self, requests, text):
        """The model's inputs for requests that are answered after `text`."""
        images = [[request[name] for name in self.names] for request in requests]
        texts = [text] * len(requests)
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        return inputs.to(self.config.device)

    def assess(self, requests):
        """Replies of mode generate. An answer without a score is drawn once more: the likeliest
        words would be the same again."""
        texts = [""] * len(requests)
        torch.manual_seed(0)
        drawn = dict(do_sample=True, top_k=0, **DRAWN)  # Qwen's own top_k is 1
        for sampling in (dict(do_sample=False), drawn):
            rows = [i for i, text in enumerate(texts) if not find_score(text)]
            if rows:
                inputs = self.inputs([requests[i] for i in rows], self.chat)
                longest = self.config.max_new_tokens
                out = self.model.generate(**inputs, max_new_tokens=longest, **sampling)
                answers = out[:, inputs["input_ids"].shape[1] :]
                answers = self.processor.batch_decode(answers, skip_special_tokens=True)
                for i, text in zip(rows, answers):
                    texts[i] = text
        return [dict(score=parse_score(text), text=text) for text in texts]

    def expect(self, requests):
        """Replies of mode logits. Requests that differ in the last image alone, a group of
        rollouts, are read together."""
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            first, second, last = (request[name] for name in self.names)
            groups[id(first), id(second), last.shape].append(i)
        replies = [None] * len(requests)
        head = self.model.get_output_embeddings().weight[self.tokens].float()
        for rows in groups.values():
            hidden = self.read_group(self.inputs([requests[i] for i in rows], self.chat + BEGIN))
            # in float32: in bfloat16 they would lie 0.1 apart and tie
            scores = expected_score(hidden[:, -1].float() @ head.T)
            for i, score in zip(rows, scores.tolist()):
                replies[i] = dict(score=score)
        return replies

    def read_group(self, inputs):
        """Last hidden states (G, length, width) of a group: what comes before the last image is
        read once."""
        net, ids, grid = self.model.model, inputs["input_ids"], inputs["image_grid_thw"]
        types, mask = inputs["mm_token_type_ids"], inputs["attention_mask"]
        places, _ = net.get_rope_index(  # (3, G, L)
            ids, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=mask
        )
        images = inputs["pixel_values"].split(grid.prod(dim=1).tolist())
        n = (ids[0] == net.config.vision_start_token_id).nonzero()[-1].item()  # the last image
        past = net(
            input_ids=ids[:1, :n],
            position_ids=places[:, :1, :n],
            pixel_values=torch.cat(images[:2]),
            image_grid_thw=grid[:2],
            use_cache=True,
        ).past_key_values
        past.batch_repeat_interleave(len(ids))
        return net(
            input_ids=ids[:, n:],
            position_ids=places[..., n:],
            pixel_values=torch.cat(images[2::3]),
            image_grid_thw=grid[2::3],
            past_key_values=past,
        ).last_hidden_state


# ----------------------------------------------------------------------------------------- a server


class ServerJudge:
    """The same for a model behind an OpenAI-compatible server (vLLM, SGLang, transformers serve),
    which is sent the environment's OPENAI_API_KEY."""

    def __init__(self, config):
        self.config, self.parts = config, prompt_parts(config.prompt, config.mode)

    def score(self, requests):
        """Replies without their id, one per request, within the time-out, however slowly an answer
        drips."""
        import openai

        client = openai.OpenAI(
            base_url=self.config.server,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.config.timeout,
            max_retries=1,
            # a redirect would hand the key to another host
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )
        threads = futures.ThreadPoolExecutor(len(requests))
        pending = [threads.submit(self.score_one, client, request) for request in requests]
        done, _ = futures.wait(pending, self.config.timeout)
        client.close()  # ends what is under way
        threads.shutdown(wait=False)
        late = dict(score=None, error="the server did not answer in time")
        return [future.result() if future in done else late for future in pending]

    def score_one(self, client, request):
        """The reply to one request. An answer without a score is drawn once more; a server that
        refuses is asked without log-probabilities, which it may not give."""
        import openai

        content = [dict(type="text", text=part) for part in self.parts]
        urls = [data_url(request[name]) for name in self.parts[1::2]]
        content[1::2] = [dict(type="image_url", image_url=dict(url=url)) for url in urls]
        content = [part for part in content if part.get("text") != ""]
        asked = dict(model=self.config.model, messages=[dict(role="user", content=content)])
        length = dict(max_tokens=self.config.max_new_tokens)
        if self.config.mode == "logits":
            length = dict(max_tokens=32, logprobs=True, top_logprobs=20)
        for sampling in (dict(temperature=0.0), DRAWN):
            try:
                answer = client.chat.completions.create(**asked, **length, **sampling)
                choice = answer.choices[0]
                text, listed = choice.message.content, choice.logprobs
                tokens = listed.content if listed and self.config.mode == "logits" else None
                score = score_from_logprobs(tokens or []) or parse_score(text)
                if score:
                    return dict(score=score, text=text)
                problem = NO_SCORE
            except openai.BadRequestError as error:
                problem, length = reason(error), dict(max_tokens=length["max_tokens"])
            except openai.OpenAIError as error:
                problem = f"the server {self.config.server} failed: {reason(error)}"
                break  # the client has tried twice
            except Exception as error:
                problem = f"the server's answer is no chat completion ({reason(error)})"
        return dict(score=None, error=problem)


# ------------------------------------------------------------------------------------- the program


def data_url(image):
    """A uint8 image (3, H, W) as a PNG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_bytes(images):
    """Images in [0, 1] as uint8 on the CPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().byte().cpu()


def read_source(source):
    """The image (3, H, W) in [0, 1] at a path or in a data URL. Raises DataError."""
    if not source.startswith("data:"):
        return read_image(source)
    try:
        coded = source.partition(";base64,")[2]
        return read_image(io.BytesIO(base64.b64decode(coded, validate=True)))
    except ValueError:  # of base64, or DataError, which would not name the image
        raise DataError(f"the data URL {source[:40]}… does not hold an image in base64") from None


def read_batches(file, size):
    """Lists of at most `size` (line number, line); an empty line ends a list."""
    batch = []
    for number, line in enumerate(file, 1):
        if line.strip():
            batch.append((number, line))
        if batch and (not line.strip() or len(batch) == size):
            yield batch
            batch = []
    if batch:
        yield batch


def score_lines(judge, lines):
    """One reply per (line number, line), in order; the requests among them are scored as one batch,
    and an image that several of them name is read once."""
    replies, valid, requests = [], [], []
    read = functools.cache(lambda source: as_bytes(read_source(source)))
    for number, line in lines:
        reply = dict(id=None, score=None)
        replies.append(reply)
        try:
            request = json.loads(line)
            reply["id"] = request["id"]
            requests.append({name: read(request[name]) for name in IMAGES})
            valid.append(reply)
        except DataError as error:
            reply["error"] = f"line {number}: {error}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            reply["error"] = f"line {number} is no JSON object of id, gt, degraded and restored"
    try:
        answers = judge.score(requests) if requests else []
    except Exception as error:  # out of memory, an image too narrow for the model, …
        traceback.print_exc()
        answers = [dict(score=None, error=reason(error))] * len(valid)
        torch.cuda.empty_cache()
    for reply, answer in zip(valid, answers):
        reply |= answer
        if reply["score"] is None:
            reply.setdefault("error", NO_SCORE)
        elif not 1 <= reply["score"] <= 5:  # not a number, for one
            problem = f"the model's score is {reply['score']}; another --dtype may help"
            reply |= dict(score=None, error=problem)
    return replies


def end_with(parent):
    """Makes the kernel kill this process when its parent, whose process id this is, ends in
    whatever way (Linux; elsewhere the end of the input ends it)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the process that started the judge is gone")


def score_all(argv):
    """Reads requests and writes scores until the input ends. Returns the exit code."""
    config = runs.flags(Config, "judge.py", __doc__, argv)
    runs.check_file("--prompt", config.prompt)
    runs.check_device(config.device)
    if config.min_pixels > config.max_pixels:
        raise runs.RunError("--min-pixels is above --max-pixels")
    config.dtype = config.dtype or ("bf16" if runs.on_gpu(config.device) else "fp32")
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    if config.parent:
        end_with(config.parent)
    judge = ServerJudge(config) if config.server else LocalJudge(config)
    if config.parent:
        print(json.dumps(dict(ready=config.model)), file=output, flush=True)
    scored = failed = 0
    for lines in read_batches(sys.stdin.buffer, config.batch_size):
        for reply in score_lines(judge, lines):
            print(json.dumps(reply), file=output)
            scored += reply["score"] is not None
            failed += reply["score"] is None
        output.flush()
    print(f"{scored} scored, {failed} not", file=sys.stderr)
    return int(failed > 0)


def main(argv=None):
    return runs.program("judge.py", score_all, argv, (JudgeError, DataError, UnicodeDecodeError))


# ------------------------------------------------------------------------------ the trainer's side


class Judge:
    """What training asks: a judge.py of its own, which works beside the trainer and is started
    again when it failed.

        judge = Judge(command, log)
        judge.start(degraded, gt, group_size)
        pending = judge.ask(degraded, restored, gt)  # returns at once
        …                                            # what else there is to compute
        scores = judge.result(pending)               # (B, G)
        judge.close()

    command: what starts it; log: the file for what it says besides replies; timeout: s to wait for
    a batch; patience: how many batches in a row may pass without a single whole group; check:
    called while it is waited for, raises what should end the waiting.
    After a batch `problem` says what went wrong, or None, and `metrics` has: wait, s the trainer
    stood still for it, a new start included; failures, rollouts without a score; starts so far.
    """

    def __init__(self, command, log, timeout=60.0, patience=5, check=lambda: None):
        self.command, self.log, self.check = command, Path(log), check
        self.timeout, self.start_timeout, self.patience = timeout, START_TIMEOUT, patience
        self.process, self.problem, self.metrics = None, None, {}
        self.starts = self.failed_in_a_row = 0
        self.ids = range(0)  # of the batch that was asked last

    def start(self, degraded, gt, group_size):
        """Starts it and has it score a first batch: what cannot work should fail before the
        training. Raises JudgeError."""
        self.result(self.ask(degraded, degraded[:, None].expand(-1, group_size, -1, -1, -1), gt))
        if self.failed_in_a_row:
            raise JudgeError(
                f"the judge could not score a first batch: {self.problem}; its log is {self.log}"
            )

    def ask(self, degraded, restored, gt):
        """Sends one batch: degraded, gt (B, 3, H, W) and restored (B, G, 3, H, W) in [0, 1].
        Returns a future for `result`, at once, unless the judge has to be started again."""
        self.problem, self.shape, self.device = None, restored.shape[:2], restored.device
        self.ids = range(self.ids.stop, self.ids.stop + self.shape.numel())
        images = [as_bytes(gt), as_bytes(degraded), as_bytes(restored)]
        begun = time.perf_counter()
        try:
            # not in a thread: the kernel ties a process to the thread that started it
            self.launch()
            pending = self.threads.submit(self.exchange, self.process, self.ids, *images)
        except JudgeError as error:
            pending = futures.Future()
            pending.set_exception(error)
        self.waited = time.perf_counter() - begun
        return pending

    def result(self, pending):
        """Waits for the scores of what was asked last: (B, G), 1 to 5, NaN where there is none.
        Raises JudgeError when patience ends."""
        if self.device.type == "cuda":
            # the other rewards are under way: what they take is not waiting
            torch.cuda.synchronize(self.device)
        begun, replies = time.perf_counter(), {}
        try:
            replies = self.wait(pending, self.timeout)
        except JudgeError as error:
            self.problem = error
            self.close()  # the next batch starts it again
        scores = [self.score_in(replies.get(i, {})) for i in self.ids]
        scores = torch.tensor(scores).view(self.shape)
        self.metrics = {
            "judge/wait": self.waited + time.perf_counter() - begun,
            "judge/failures": int(scores.isnan().sum()),
            "judge/starts": self.starts,
        }
        any_group = scores.isfinite().all(dim=1).any()
        self.failed_in_a_row = 0 if any_group else self.failed_in_a_row + 1
        if self.failed_in_a_row >= self.patience:
            raise JudgeError(
                f"the judge failed {self.patience} times in a row, the last time: {self.problem}; "
                f"its log is {self.log}"
            )
        return scores.to(self.device)

    def score_in(self, reply):
        """The score in a reply, NaN if it has none that a judge can give."""
        score = reply.get("score")
        if type(score) in (int, float) and 1 <= score <= 5:
            return float(score)
        self.problem = self.problem or reply.get("error") or f"it replied {str(reply)[:100]}"
        return math.nan

    def wait(self, future, seconds):
        """The result of a future. Raises what `check` raises, or JudgeError if it is not there
        within so many seconds."""
        end = time.monotonic() + seconds
        while not future.done():
            self.check()
            if time.monotonic() > end:
                raise JudgeError(f"it did not answer within {seconds:g} s")
            futures.wait([future], timeout=0.1)
        return future.result()

    def launch(self):
        """Starts it unless it runs, and returns when its model is loaded. Raises JudgeError with
        its last words."""
        if self.process and self.process.poll() is None:
            return
        self.starts, begun = self.starts + 1, time.perf_counter()
        self.threads = futures.ThreadPoolExecutor(2)  # one sends, one reads
        try:
            with open(self.log, "ab") as log:
                self.log_start = log.tell()
                self.process = subprocess.Popen(
                    self.command, stderr=log, start_new_session=True, **PIPES
                )
            self.wait(self.threads.submit(next, self.replies(self.process)), self.start_timeout)
        except (JudgeError, OSError) as error:
            self.close()
            raise JudgeError(f"it could not start: {error}") from None
        if self.starts == 1:  # nothing has to be downloaded again
            self.start_timeout = min(START_TIMEOUT, 60 + 3 * (time.perf_counter() - begun))

    def exchange(self, process, ids, gt, degraded, restored):
        """Sends requests with these ids for uint8 images, gt and degraded (B, 3, H, W), restored
        (B, G, 3, H, W), as one batch. Returns {id: reply}. Raises JudgeError."""
        lines, numbers = [], iter(ids)
        for truth, before, group in zip(gt, degraded, restored):
            request = dict(gt=data_url(truth), degraded=data_url(before))
            for y in group:
                lines.append(json.dumps(request | dict(id=next(numbers), restored=data_url(y))))
        # it may reply before it has read all, and a pipe holds little; an empty line ends the batch
        self.threads.submit(print, *lines, "", sep="\n", file=process.stdin, flush=True)
        replies = {}
        for reply in self.replies(process):
            if type(reply.get("id")) is int and reply["id"] in ids:
                replies[reply["id"]] = reply
            if len(replies) == len(ids):
                return replies

    def replies(self, process):
        """Yields the JSON objects it writes; other lines are noise. Raises JudgeError at the end of
        its output."""
        for line in process.stdout:
            try:
                reply = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(reply, dict):
                yield reply
        code = process.wait()
        if code < 0:
            raise JudgeError(f"signal {-code} ended it (9: as the kernel does for want of memory)")
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
        said = lines[-1][-400:] if lines else "it ended without a word"
        raise JudgeError(f"{said} (exit code {code})")

    def close(self):
        """Ends it at once: there is nothing to save."""
        if self.process:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
        self.process = None


def make_judge(config, folder, stop):
    """The judge that train.py's --judge asks for, not yet started, in a context that ends it; or of
    None."""
    expert = config.expert
    if expert.judge == "none":
        return contextlib.nullcontext()
    batch = min(16, config.training.batch_size * config.policy.group_size)  # what a GPU can hold
    command = [sys.executable, __file__, f"--parent={os.getpid()}", f"--batch-size={batch}"]
    command += [f"--mode={expert.judge_mode}", f"--model={expert.judge_model or expert.judge}"]
    if runs.is_url(expert.judge):
        # a little less time than we wait for it, so that it can say which request failed
        timeout = 0.9 * expert.judge_timeout
        command += [f"--server={expert.judge}", f"--timeout={timeout}", "--device=cpu"]
    else:
        command.append(f"--device={expert.judge_device or judge_device(config.device)}")
    if expert.judge_prompt:
        command.append(f"--prompt={expert.judge_prompt}")
    command += shlex.split(expert.judge_args)
    name = f"judge-{runs.rank()}.log" if runs.rank() else "judge.log"
    judge = Judge(command, folder / name, expert.judge_timeout, expert.judge_patience, stop.check)
    return contextlib.closing(judge)


def judge_device(device):
    """Where a trainer's judge goes: behind the trainers' GPUs, rank i's to cuda:(world + i); beside
    a CPU trainer to the CPU. Raises RunError if there is no such GPU."""
    if not runs.on_gpu(device):
        return "cpu"
    world, taken = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.device(device).index or 0
    wanted = 0 if world == 1 and taken else world + runs.local_rank()
    if wanted >= torch.cuda.device_count():
        raise runs.RunError(
            f"the judge wants a GPU of its own, cuda:{wanted}, and this machine has "
            f"{torch.cuda.device_count()}: name one with --judge-device ({device} would be shared "
            "with the training), or a server with --judge"
        )
    return f"cuda:{wanted}"


if __name__ == "__main__":
    sys.exit(main())
