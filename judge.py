"""The expert reward's judge (Appendix B.2): Qwen2.5-VL looks at three images and gives a score of 1
to 5.

    python judge.py --model Qwen/Qwen2.5-VL-7B-Instruct < requests.jsonl > scores.jsonl

A request is one line of JSON, an image a path or a data URL (data:image/png;base64,…); its reply is
one line, too:

    {"id": 7, "gt": "a.png", "degraded": "b.png", "restored": "c.png"}
    {"id": 7, "score": 3.62, "p": [0.01, 0.1, 0.3, 0.44, 0.15]}      --mode logits: p of 1 … 5
    {"id": 7, "score": 4, "text": "<Assessment>…"}                   --mode generate
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
import signal
import subprocess
import sys
import time
from collections import defaultdict
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from PIL import Image
from pydantic import Field

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


Pixels = Annotated[int, Field(ge=784)]  # of an image: 784 are one token


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
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """as transformers names them"""
    batch_size: runs.Positive = 16
    """requests scored at once"""
    min_pixels: Pixels = 256 * 28 * 28
    """smaller images are enlarged to this many pixels; 784 pixels are one token"""
    max_pixels: Pixels = 1280 * 28 * 28
    """larger images are reduced to this many pixels"""
    max_new_tokens: runs.Positive = 512
    """longest written answer"""
    parent: int | None = None
    """process id of the trainer that starts it, which it tells when it is ready and ends with"""


def check(config):
    """Raises RunError for a flag that cannot work."""
    runs.check_file("--prompt", config.prompt)
    runs.check_device(config.device)
    if config.min_pixels > config.max_pixels:
        raise runs.RunError("--min-pixels is above --max-pixels")
    if config.server and not runs.is_url(config.server):
        raise runs.RunError(
            f"--server {config.server} is no address: it begins with http:// or https://"
        )


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
    """The expectation at the score's place in an OpenAI-style list of tokens with top_logprobs;
    None without a valid score, or where it is no token of its own."""
    found, place = find_score("".join(t["token"] for t in tokens)), 0
    for t in tokens:
        if found and place == found.start(1) and t["token"] == found[1]:
            likely = {top["token"]: top["logprob"] for top in [t, *(t.get("top_logprobs") or [])]}
            logits = torch.tensor([likely.get(digit, -math.inf) for digit in DIGITS])
            return expected_score(logits).item()
        place += len(t["token"])
    return None


def score_tokens(tokenizer, chat):
    """The five tokens of 1 … 5 after `chat` and BEGIN. Raises JudgeError for a tokenizer in which
    they are not tokens of their own."""
    before = tokenizer.encode(chat + BEGIN)
    answers = [tokenizer.encode(f"{chat}{BEGIN}{digit}</Score>") for digit in DIGITS]
    tokens = [ids[len(before)] for ids in answers]
    same = all(ids[: len(before)] == before for ids in answers)
    if not same or [tokenizer.decode([token]) for token in tokens] != list(DIGITS):
        raise JudgeError(
            "the model's tokenizer has no tokens of their own for 1 to 5: use --mode generate"
        )
    return tokens


def prompt_parts(path, mode):
    """The prompt in the file --prompt names, or the built-in one, as a list of texts and, between
    them, image names ("gt", "degraded", "restored"). Raises JudgeError."""
    try:
        prompt = Path(path).read_text(encoding="utf-8") if path else PROMPT
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"the judge's prompt {path} cannot be read ({error})") from None
    parts = re.split("<(gt|degraded|restored)>", prompt.replace("<format>", FORMAT[mode]))
    if sorted(parts[1::2]) != sorted(IMAGES):
        raise JudgeError(
            f"the judge's prompt {path} must hold each of <gt>, <degraded> and <restored> once: "
            "there the images stand"
        )
    return parts


def reason(error):
    """An exception, or what caused it, in a line."""
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:300]


def is_out_of_memory(error):
    words = ("MemoryError", "out of memory", "can't allocate memory")
    return any(w in reason(error) for w in words)


# -------------------------------------------------------------------------------- the model itself


def load(config):
    """(model, processor) of a local folder or hub name. Raises JudgeError."""
    import transformers  # late: it takes seconds
    from huggingface_hub import HfApi

    name, hub, is_local = config.model, "", Path(config.model).is_dir()
    if not is_local:
        try:
            HfApi().model_info(name, timeout=5)  # transformers itself would retry for minutes
        except Exception as error:  # no network, no such model, no valid name, …
            hub, is_local = f" from this machine, nor from the hub ({reason(error)})", True
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.dtype]
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            name, local_files_only=is_local, padding_side="left"
        )
        model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name,
            local_files_only=is_local,
            dtype=dtype,
            attn_implementation=config.attention,
            use_safetensors=True,  # the other format is pickle
            output_loading_info=True,
        )
        model.to(config.device)
    except Exception as error:
        raise JudgeError(
            f"the judge's model {name} cannot be loaded on {config.device}{hub}: {reason(error)}"
        ) from None
    missing = [*info["missing_keys"], *info["mismatched_keys"]]
    if missing:  # transformers would fill them with random numbers
        raise JudgeError(
            f"the judge's model {name} is not complete: {len(missing)} tensors are missing or of "
            f"another shape, as {missing[0]}"
        )
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    processor.image_processor.size = size
    return model.eval().requires_grad_(False), processor


class LocalJudge:
    """Qwen2.5-VL with its prompt: scores lists of requests, {name: image source}."""

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

    def read(self, source):
        """An image source as uint8 (3, H, W). Raises DataError."""
        image = (read_source(source) * 255).round().byte()
        height, width = image.shape[1:]
        if max(height, width) > 200 * min(height, width):
            raise DataError(f"an image of {width}×{height} px is too narrow for the model")
        return image

    def inputs(self, requests, text):
        """The model's inputs for requests {name: image} that are answered after `text`."""
        images = [[request[name] for name in self.names] for request in requests]
        texts = [text] * len(requests)
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        return inputs.to(self.config.device)

    @torch.inference_mode()
    def score(self, requests):
        """Replies without their id, one per request {name: image}."""
        return self.expect(requests) if self.config.mode == "logits" else self.assess(requests)

    def assess(self, requests):
        """Replies of mode generate. An answer without a score is drawn once more: the likeliest
        words would be the same again."""
        replies = [dict(score=None)] * len(requests)
        torch.manual_seed(0)
        drawn = dict(do_sample=True, top_k=0, **DRAWN)  # Qwen's own top_k is 1
        for sampling in (dict(do_sample=False), drawn):
            rows = [i for i, reply in enumerate(replies) if reply["score"] is None]
            texts = self.write([requests[i] for i in rows], **sampling) if rows else []
            for i, text in zip(rows, texts):
                replies[i] = dict(score=parse_score(text), text=text)
        return [r if r["score"] else dict(r, error=NO_SCORE) for r in replies]

    def write(self, requests, **sampling):
        """The answers the model writes."""
        inputs = self.inputs(requests, self.chat)
        longest = self.config.max_new_tokens
        out = self.model.generate(**inputs, max_new_tokens=longest, **sampling)
        answers = out[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(answers, skip_special_tokens=True)

    def expect(self, requests):
        """Replies of mode logits. Requests that differ in the restored image alone, a group of
        rollouts, are read together; those that are alone, as one batch."""
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            shared = id(request["gt"]), id(request["degraded"]), request["restored"].shape
            groups[shared if self.names[-1] == "restored" else i].append(i)
        hidden = {}  # request: its last hidden state (width,)
        for rows in groups.values():
            if len(rows) > 1:
                inputs = self.inputs([requests[i] for i in rows], self.chat + BEGIN)
                hidden |= zip(rows, self.read_group(inputs)[:, -1])
        alone = [i for i in range(len(requests)) if i not in hidden]
        if alone:
            inputs = self.inputs([requests[i] for i in alone], self.chat + BEGIN)
            states = self.model.model(**inputs, use_cache=False).last_hidden_state
            hidden |= zip(alone, states[:, -1])
        return self.read_scores(torch.stack([hidden[i] for i in range(len(requests))]))

    def read_scores(self, hidden):
        """Replies from the last hidden states (B, width)."""
        head = self.model.get_output_embeddings()
        # (B, 5), in float32: in bfloat16 they would lie 0.1 apart and tie
        logits = hidden.float() @ head.weight[self.tokens].float().T
        everything = head(hidden).float()
        everything[:, self.tokens] = logits
        p = (logits - everything.logsumexp(dim=-1, keepdim=True)).exp()  # among all tokens
        scores = zip(expected_score(logits).tolist(), p.tolist())
        return [dict(score=score, p=[round(v, 4) for v in row]) for score, row in scores]

    def read_group(self, inputs):
        """Last hidden states (G, length, width) of a group: what comes before the restored image is
        read once."""
        net, ids, grid = self.model.model, inputs["input_ids"], inputs["image_grid_thw"]
        types, mask = inputs["mm_token_type_ids"], inputs["attention_mask"]
        places, _ = net.get_rope_index(  # (3, G, L)
            ids, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=mask
        )
        images = inputs["pixel_values"].split(grid.prod(dim=1).tolist())
        # n: where the restored image begins
        n = (ids[0] == net.config.vision_start_token_id).nonzero()[-1].item()
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
    """The same for a model behind an OpenAI-compatible server (vLLM, SGLang, transformers serve).

    The environment's OPENAI_API_KEY is sent if it is set. Raises JudgeError if no server answers;
    whether it has the model, the first batch shows: not every server lists what it serves.
    """

    def __init__(self, config):
        import openai

        self.config, self.parts = config, prompt_parts(config.prompt, config.mode)
        try:
            with self.client(timeout=10) as client:
                served = [str(model.id) for model in client.models.list().data or []]
        except (openai.APIStatusError, openai.APIResponseValidationError, TypeError):
            served = []  # it keeps no list
        except Exception as error:  # no address, no valid key, no connection, no time
            raise JudgeError(
                f"no OpenAI-compatible server answers at {config.server} ({reason(error)})"
            ) from None
        if config.model not in served:
            shown = str(served)[:300]
            print(f"note: the server lists {shown}, not {config.model}", file=sys.stderr)

    def client(self, timeout):
        """A client that tries once more what may pass, as a busy server. It follows no redirect,
        which would hand the key to another host."""
        import openai

        return openai.OpenAI(
            base_url=self.config.server,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=1,
            http_client=openai.DefaultHttpxClient(follow_redirects=False),
        )

    def read(self, source):
        """An image source as a data URL. Raises DataError for a path to no image."""
        if source.startswith("data:"):
            return source
        return data_url((read_source(source) * 255).round().byte())

    def score(self, requests):
        """Replies without their id, one per request {name: data URL}, within the time-out, however
        slowly an answer drips."""
        threads = ThreadPoolExecutor(len(requests))
        with self.client(self.config.timeout) as client:
            pending = [threads.submit(self.score_one, client, request) for request in requests]
            done, _ = futures.wait(pending, self.config.timeout)
        threads.shutdown(wait=False)  # the closed client ends what is under way
        late = dict(score=None, error="the server did not answer in time")
        return [future.result() if future in done else late for future in pending]

    def score_one(self, client, request):
        """The reply to one request {name: data URL}. An answer without a score is drawn once more;
        a server that refuses is asked without log-probabilities, which it may not give."""
        import openai

        body = self.body(request)
        for sampling in (dict(temperature=0.0), DRAWN):
            try:
                answer = client.chat.completions.create(**body, **sampling)
                return read_completion(answer, self.config.mode)
            except openai.BadRequestError as error:
                problem = reason(error)
                body = {k: v for k, v in body.items() if "logprobs" not in k}
            except openai.OpenAIError as error:
                return dict(score=None, error=f"the server failed: {reason(error)}")
            except JudgeError as error:
                problem = str(error)
            except (AttributeError, IndexError, TypeError, ValueError, OverflowError):
                problem = "the server's answer is no chat completion"
        return dict(score=None, error=problem)

    def body(self, request):
        """The request in the words of the protocol; request: {name: data URL}."""
        content = [dict(type="text", text=part) for part in self.parts]
        urls = [request[name] for name in self.parts[1::2]]
        content[1::2] = [dict(type="image_url", image_url=dict(url=url)) for url in urls]
        message = dict(role="user", content=[part for part in content if part.get("text") != ""])
        body = dict(model=self.config.model, messages=[message])
        if self.config.mode == "logits":
            return body | dict(max_tokens=32, logprobs=True, top_logprobs=20)
        return body | dict(max_tokens=self.config.max_new_tokens)


def read_completion(answer, mode):
    """The reply in a chat completion: by its log-probabilities in mode logits, where they are
    given. Raises JudgeError for one without a score, AttributeError and its like for no answer."""
    choice = answer.choices[0]
    text, tokens = choice.message.content, choice.logprobs and choice.logprobs.content
    tokens = [token.model_dump() for token in tokens or []] if mode == "logits" else []
    score = score_from_logprobs(tokens) or parse_score(text)
    if score is None:
        raise JudgeError(NO_SCORE)
    return dict(score=score, text=text)


# ------------------------------------------------------------------------------------- the program


def data_url(image):
    """A uint8 image (3, H, W) as a PNG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


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


def read_request(line):
    """A request, a dict. Raises JudgeError."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise JudgeError("the line is not JSON") from None
    if not isinstance(request, dict) or not {"id", *IMAGES} <= request.keys():
        raise JudgeError('a request is an object with "id", "gt", "degraded" and "restored"')
    return request


def score_lines(judge, lines):
    """One reply per (line number, line), in order; the requests among them are scored as one batch,
    and an image that several of them name is read once."""
    replies, valid, requests = [], [], []
    read = functools.cache(judge.read)
    for number, line in lines:
        reply = dict(id=None, score=None)
        replies.append(reply)
        try:
            request = read_request(line)
            reply["id"] = request["id"]
            if not all(isinstance(request[name], str) for name in IMAGES):
                raise JudgeError("an image must be a path or a data URL")
            requests.append({name: read(request[name]) for name in IMAGES})
            valid.append(reply)
        except (JudgeError, DataError) as error:
            reply["error"] = f"line {number}: {error}"
    try:
        answers = judge.score(requests) if requests else []
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        problem = "out of memory: smaller batches or images need less"
        answers = [dict(score=None, error=problem)] * len(valid)
    for reply, answer in zip(valid, answers):
        if answer["score"] is not None and not 1 <= answer["score"] <= 5:  # not a number, for one
            problem = f"the model's score is {answer['score']}; another --dtype may help"
            answer = dict(score=None, error=problem)
        reply |= answer
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
    check(config)
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
    return runs.program("judge.py", score_all, argv, (JudgeError, DataError))


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

    command: what starts it; log: the file for what it says besides replies; timeout: s for a batch;
    patience: how many batches in a row may pass without a single whole group; check: called while
    it is waited for, raises what should end the waiting.
    After a batch `problem` says what went wrong, or None, and `metrics` has: latency, s from
    sending it to its last reply; wait, s the trainer stood still for it, a new start included;
    failures, rollouts without a score; starts so far.
    """

    def __init__(self, command, log, timeout=60.0, patience=5, check=lambda: None):
        self.command, self.log, self.check = command, Path(log), check
        self.timeout, self.start_timeout, self.patience = timeout, START_TIMEOUT, patience
        self.process, self.problem, self.metrics = None, None, {}
        self.starts = self.failed_in_a_row = 0
        self.ids = range(0)  # of the batch that was asked last
        self.threads = ThreadPoolExecutor(2)  # one sends, one reads

    def start(self, degraded, gt, group_size):
        """Starts it and has it score a first batch: what cannot work should fail before the
        training. Raises JudgeError."""
        self.launch()
        pending = self.ask(degraded, degraded[:, None].expand(-1, group_size, -1, -1, -1), gt)
        with contextlib.suppress(JudgeError):  # patience 1 ends at once
            self.result(pending)
        if self.failed_in_a_row:
            self.close()
            raise JudgeError(
                f"the judge could not score a first batch: {self.problem}; its log is {self.log}"
            )

    def ask(self, degraded, restored, gt):
        """Sends one batch: degraded, gt (B, 3, H, W) and restored (B, G, 3, H, W) in [0, 1].

        Returns a future for `result`, at once, unless the judge has to be started again. The next
        batch may be asked after that.
        """
        self.problem, self.shape, self.device = None, restored.shape[:2], restored.device
        self.ids = range(self.ids.stop, self.ids.stop + self.shape.numel())
        self.asked = time.perf_counter()
        try:
            # not in a thread: the kernel ties a process to the thread that started it
            self.launch()
            images = dict(gt=as_bytes(gt), degraded=as_bytes(degraded), restored=as_bytes(restored))
            pending = self.threads.submit(self.exchange, self.process, self.ids, images)
        except JudgeError as error:
            pending = futures.Future()
            pending.set_exception(error)
        self.sent = time.perf_counter()
        return pending

    def result(self, pending):
        """Waits for the scores of what was asked last: (B, G), 1 to 5, NaN where there is none.
        Raises JudgeError when patience ends."""
        if self.device.type == "cuda":
            # the other rewards are under way: what they take is not waiting
            torch.cuda.synchronize(self.device)
        waiting, replies, answered = time.perf_counter(), {}, None
        try:
            late = f"it did not answer within {self.timeout:g} s"
            replies, answered = self.wait(pending, self.sent + self.timeout - waiting, late)
        except JudgeError as error:
            self.problem = error
            self.close()  # the next batch starts it again
        scores = torch.tensor([self.score_in(replies.get(i, {})) for i in self.ids])
        scores = scores.view(self.shape)
        now = time.perf_counter()
        self.metrics = {
            "judge/latency": (answered or now) - self.sent,
            "judge/wait": now - waiting + self.sent - self.asked,
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
        said = f"it replied {json.dumps(reply)[:100]}"
        self.problem = self.problem or reply.get("error") or said
        return math.nan

    def wait(self, future, seconds, late):
        """The result of a future. Raises what `check` raises, or JudgeError(late) if it is not
        there within so many seconds."""
        end = time.monotonic() + seconds
        while not future.done():
            self.check()
            if time.monotonic() > end:
                raise JudgeError(late)
            futures.wait([future], timeout=0.1)
        return future.result()

    def launch(self):
        """Starts it unless it runs, and returns when its model is loaded. Raises JudgeError with
        its last words."""
        if self.process and self.process.poll() is None:
            return
        begun, self.starts = time.perf_counter(), self.starts + 1
        try:
            with open(self.log, "ab") as log:
                self.log_start = log.tell()
                self.process = subprocess.Popen(
                    self.command, stderr=log, start_new_session=True, **PIPES
                )
            is_ready = (reply for reply in self.replies(self.process) if "ready" in reply)
            ready = self.threads.submit(next, is_ready)
            late = f"it was not ready within {self.start_timeout:.0f} s"
            self.wait(ready, self.start_timeout, late)
        except (JudgeError, OSError) as error:
            self.close()
            raise JudgeError(f"the judge could not start: {error}; its log is {self.log}") from None
        if self.starts == 1:  # nothing has to be downloaded again
            self.start_timeout = min(START_TIMEOUT, 60 + 3 * (time.perf_counter() - begun))

    def exchange(self, process, ids, images):
        """Sends requests with these ids for uint8 images, gt and degraded (B, 3, H, W), restored
        (B, G, 3, H, W), as one batch. Returns {id: reply} and when the last came. Raises
        JudgeError."""
        requests, numbers = [], iter(ids)
        for gt, degraded, group in zip(images["gt"], images["degraded"], images["restored"]):
            known = dict(gt=data_url(gt), degraded=data_url(degraded))
            requests += [dict(id=next(numbers), **known, restored=data_url(y)) for y in group]
        lines = "".join(json.dumps(request) + "\n" for request in requests)
        # it may reply before it has read all, and a pipe holds little
        self.threads.submit(print, lines, file=process.stdin, flush=True)
        replies = {}
        for reply in self.replies(process):
            if type(reply.get("id")) is int and reply["id"] in ids:
                replies[reply["id"]] = reply
            if len(replies) == len(ids):
                return replies, time.perf_counter()

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
        raise JudgeError(f"{self.last_words()} (exit code {code})")

    def last_words(self):
        """The last line with a word in it that it wrote into its log."""
        text = self.log.read_bytes()[self.log_start :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if re.search(r"\w", line)]
        return lines[-1][-400:] if lines else "it ended without a word"

    def close(self):
        """Ends it at once: there is nothing to save."""
        if self.process and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
        self.process = None


def as_bytes(images):
    """Images in [0, 1] as uint8 on the CPU."""
    return (images.detach().float().clamp(0, 1) * 255).round().byte().cpu()


if __name__ == "__main__":
    sys.exit(main())
