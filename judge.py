"""The expert reward's judge (Appendix B.2): Qwen2.5-VL looks at three images and gives a score of 1 to 5.

    python judge.py --model Qwen/Qwen2.5-VL-7B-Instruct --device cuda:0 < requests.jsonl > scores.jsonl

A request is one line of JSON, an image a path or a data URL (data:image/png;base64,…); its reply is one line, too:

    {"id": 7, "gt": "a.png", "degraded": "b.png", "restored": "c.png"}
    {"id": 7, "score": 3.62, "p": [0.01, 0.1, 0.3, 0.44, 0.15]}      --mode logits: p of the tokens 1 … 5
    {"id": 7, "score": 4, "text": "<Assessment>…"}                   --mode generate
    {"id": 7, "score": null, "error": "why there is none"}

Requests are scored in batches of --batch-size; an empty line ends a batch early. It exits with 1 if a request got no score.
Training starts this same program, and `Judge`, at the end of this file, asks it; to it, the program first says {"ready": …}.
Nothing but these lines goes to its output.
"""

import argparse
import base64
import contextlib
import ctypes
import http.client
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image

import data
import runs

# The images stand last and the restored one last of all: what comes before it is the same for a whole group, so a server keeps it.
PROMPT = """You are an expert in image restoration. You will see three images of one scene: the ground truth, a degraded version of it, \
and what a model restored from the degraded version.

1. Name the most plausible degradation: noise (slight, medium or strong), rain, haze, blur or low light. Say briefly why.
2. Compare the restored image with the ground truth in what this degradation is about. Noise and rain: how completely grain or \
streaks are gone. Haze: contrast, and what is left of the veil. Blur: how sharp edges are again. Low light: exposure and faithful colours.
3. Name what got better and which artifacts remain.
4. Give a score from 1 to 5:
   1: severe artifacts, or hardly any improvement
   2: a little better, but with serious problems
   3: clearly better, with visible gaps
   4: well restored, with only small flaws
   5: nearly perfect, not to be told from the ground truth
<format>

Ground truth (the clean reference):
<gt>
Degraded image (what the model was given):
<degraded>
Restored image (what you score):
<restored>"""
FORMAT = {
    "logits": "Answer with the score X alone, in this form:\n<Assessment><Score>X</Score></Assessment>",
    "generate": "Answer in this form, X being the score:\n<Assessment>\n<Degradation>type and reason</Degradation>\n"
    "<Analysis>comparison</Analysis>\n<Score>X</Score>\n</Assessment>",
}
IMAGES = ("gt", "degraded", "restored")
BEGIN = "<Assessment><Score>"  # what the assistant's turn begins with in mode logits
DIGITS = "12345"
SCORE = re.compile(r"<Score>[ \r\n]*([1-5])[ \r\n]*</Score>")
NO_SCORE = "the answer has no single <Score>X</Score> with X from 1 to 5"
MAX_LINE = 1 << 26  # bytes of a request: three photographs of some 10 MP
MAX_REPLY = 1 << 20
DRAWN = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=0)  # Qwen's own settings have top_k 1
PAUSE = 0.5  # s before a server is asked again
START_TIMEOUT = 1800.0  # s; a first start downloads 16 GB, a later one has 60 s and three times what the first took


class JudgeError(RuntimeError):
    """The judge cannot be had, or could not score; its text says why and what to do, in one sentence."""


# --------------------------------------------------------------------------------------- from an answer to a score


def expected_score(logits):
    """Σ k p_k over the five scores, p the softmax of the logits (or log-probabilities) (…, 5) of the tokens 1 … 5; (…)."""
    scores = torch.arange(1, 6, dtype=logits.dtype, device=logits.device)
    return (logits.softmax(dim=-1) @ scores).clamp(1, 5)  # rounding could lead out


def find_score(text):
    """The match of the one <Score>X</Score> in a text, X from 1 to 5; None if there is none, or more than one."""
    once = text.count("<Score>") == 1 and text.count("</Score>") == 1
    return SCORE.search(text) if once else None


def parse_score(text):
    """The score of 1 to 5 a text gives as <Score>X</Score>, or None."""
    found = find_score(text)
    return int(found[1]) if found else None


def score_tokens(encode, decode, chat):
    """Where a score is read off a tokenizer's vocabulary: (the text that begins the assistant's turn, the five tokens of
    1 … 5 that may follow it). A tokenizer that joins > and the digit gets the text without its >. Raises JudgeError."""
    ids = [encode(f"{chat}{BEGIN}{digit}</Score>") for digit in DIGITS]
    same = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*ids)))
    begin, tokens = decode(ids[0][:same])[len(decode(encode(chat))) :], [i[same] for i in ids]
    if len(set(tokens)) < 5 or encode(chat + begin) != ids[0][:same]:
        raise JudgeError("the model's tokenizer has no token of their own for the scores 1 to 5: use --mode generate")
    return begin, tokens


def score_from_logprobs(tokens):
    """The expectation at the score's place in an OpenAI-style list of tokens with top_logprobs; None without a valid score."""
    found = find_score("".join(t["token"] for t in tokens))
    if not found:
        return None
    place = found.start(1)
    for t in tokens:
        if place < len(t["token"]):
            break
        place -= len(t["token"])
    likely = {t["token"]: t["logprob"]} | {top["token"]: top["logprob"] for top in t.get("top_logprobs") or []}
    # the same token with another digit: a tokenizer may join it with its neighbours
    rivals = [t["token"][:place] + digit + t["token"][place + 1 :] for digit in DIGITS]
    return expected_score(torch.tensor([likely.get(r, -math.inf) for r in rivals])).item()


def prompt_parts(path, mode):
    """The prompt in the file --prompt names, or the built-in one, as a list of texts and, between them, image names ("gt",
    "degraded", "restored"). Raises JudgeError."""
    try:
        prompt = Path(path).read_text(encoding="utf-8") if path else PROMPT
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"the judge's prompt {path} cannot be read ({error})") from None
    parts = re.split("<(gt|degraded|restored)>", prompt.replace("<format>", FORMAT[mode]))
    if sorted(parts[1::2]) != ["degraded", "gt", "restored"]:
        raise JudgeError(f"the judge's prompt {path} must hold each of <gt>, <degraded> and <restored> once: there the images stand")
    return parts


# ------------------------------------------------------------------------------------------------ the model itself


def is_hub_reachable(name):
    """Asked once, with a short wait: transformers itself retries for minutes. Raises JudgeError if there is no such model."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(f"{constants.ENDPOINT}/{name}/resolve/main/config.json", timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise JudgeError(f"{constants.ENDPOINT} has no model {name}") from None
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


def load(args):
    """(model, processor) of a local folder or hub name, as --dtype, --device, --attention say. Raises JudgeError."""
    folder = Path(args.model).is_dir()
    if folder and not list(Path(args.model).glob("*.safetensors")):
        raise JudgeError(f"the folder {args.model} holds no weights of a model (*.safetensors)")
    if not folder and (args.model[0] in "/.~" or args.model.count("/") > 1):
        raise JudgeError(f"there is no folder {args.model} with a judge's model")
    local = folder or not is_hub_reachable(args.model)
    import transformers  # here: it takes seconds, and what is wrong so far shows before

    try:
        processor = transformers.AutoProcessor.from_pretrained(args.model, local_files_only=local, padding_side="left")
        model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            args.model,
            local_files_only=local,
            dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype],
            attn_implementation=args.attention,
            use_safetensors=True,  # the other format is pickle
            output_loading_info=True,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        hub = "" if folder or not local else ": the hub cannot be reached, and it is not, or not whole, on this machine"
        reason = str(error).split("\n")[0][:300]
        raise JudgeError(f"the judge's model {args.model} cannot be loaded{hub} ({reason})") from None
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:  # transformers would fill them with random numbers
        raise JudgeError(f"the judge's model {args.model} is not complete: {len(missing)} tensors are missing or of another shape, as {missing[0]}")
    processor.image_processor.size = {"shortest_edge": args.min_pixels, "longest_edge": args.max_pixels}
    return model.eval().requires_grad_(False).to(args.device), processor


class LocalJudge:
    """Qwen2.5-VL with its prompt: scores lists of requests whose images are uint8 tensors (3, H, W)."""

    def __init__(self, args):
        self.args = args
        parts = prompt_parts(args.prompt, args.mode)
        self.model, self.processor = load(args)
        self.names = parts[1::2]  # the images' order in the prompt
        content = [dict(type="image") if i % 2 else dict(type="text", text=text) for i, text in enumerate(parts)]
        message = dict(role="user", content=content)
        self.chat = self.processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        if args.mode == "logits":
            tokenizer = self.processor.tokenizer
            self.begin, self.tokens = score_tokens(tokenizer.encode, tokenizer.decode, self.chat)

    def inputs(self, requests, text):
        images = [[request[name] for name in self.names] for request in requests]
        inputs = self.processor(text=[text] * len(requests), images=images, padding=True, return_tensors="pt")
        return inputs.to(self.args.device)

    @torch.inference_mode()
    def score(self, requests):
        """Replies without their id, one per request."""
        if self.args.mode == "logits":
            return self.expect(requests)
        replies = [dict(score=None)] * len(requests)
        torch.manual_seed(0)
        for how in (dict(do_sample=False), DRAWN):  # the likeliest words would be the same once more
            rows = [i for i, reply in enumerate(replies) if reply["score"] is None]
            for i, text in zip(rows, self.write([requests[i] for i in rows], **how) if rows else []):
                score = parse_score(text)
                replies[i] = dict(score=score, text=text, **({} if score else dict(error=NO_SCORE)))
        return replies

    def expect(self, requests):
        """Replies of mode logits. Requests that differ in the restored image alone, a group of rollouts, are read together."""
        groups, head = defaultdict(list), self.model.get_output_embeddings()
        for i, r in enumerate(requests):
            shared = [r["gt"].numpy().tobytes(), r["degraded"].numpy().tobytes(), *(r[name].shape for name in IMAGES)]
            groups[tuple(shared) if self.names[-1] == "restored" else i].append(i)
        alone = [rows[0] for rows in groups.values() if len(rows) == 1]
        replies = [None] * len(requests)
        for rows in [rows for rows in groups.values() if len(rows) > 1] + ([alone] if alone else []):
            inputs = self.inputs([requests[i] for i in rows], self.chat + self.begin)
            hidden = self.model.model(**inputs, use_cache=False).last_hidden_state if rows is alone else self.read_group(inputs)
            hidden = hidden[:, -1]
            logits = hidden.float() @ head.weight[self.tokens].float().T  # (B, 5); in bfloat16 they would lie 0.1 apart and tie
            everything = head(hidden).float()
            everything[:, self.tokens] = logits
            p = (logits - everything.logsumexp(dim=-1, keepdim=True)).exp()  # among all tokens
            for i, score, row in zip(rows, expected_score(logits).tolist(), p.tolist()):
                replies[i] = dict(score=score, p=[round(v, 4) for v in row])
        return replies

    def read_group(self, inputs):
        """Last hidden states (G, length, width) of a group: what comes before the restored image is read once."""
        net, ids, grid = self.model.model, inputs["input_ids"], inputs["image_grid_thw"]
        types, mask = inputs["mm_token_type_ids"], inputs["attention_mask"]
        places, _ = net.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid, attention_mask=mask)  # (3, G, L)
        images = inputs["pixel_values"].split(grid.prod(dim=1).tolist())
        n = (ids[0] == net.config.vision_start_token_id).nonzero()[-1].item()  # where the restored image begins
        known = dict(pixel_values=torch.cat(images[:2]), image_grid_thw=grid[:2])
        past = net(input_ids=ids[:1, :n], position_ids=places[:, :1, :n], use_cache=True, **known).past_key_values
        past.batch_repeat_interleave(len(ids))
        new = dict(pixel_values=torch.cat(images[2::3]), image_grid_thw=grid[2::3])
        return net(input_ids=ids[:, n:], position_ids=places[..., n:], past_key_values=past, **new).last_hidden_state

    def write(self, requests, **sampling):
        inputs = self.inputs(requests, self.chat)
        out = self.model.generate(**inputs, max_new_tokens=self.args.max_new_tokens, **sampling)
        return self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class ServerJudge:
    """The same for a model behind an OpenAI-compatible server (vLLM, SGLang). The environment's OPENAI_API_KEY is sent if it
    is set. Raises JudgeError unless the server answers and has the model."""

    def __init__(self, args):
        self.args = args
        self.parts = prompt_parts(args.prompt, args.mode)
        try:
            served = [model["id"] for model in self.call("/models", None, 10)["data"]]
        except (JudgeError, KeyError, TypeError) as error:
            raise JudgeError(f"no OpenAI-compatible server answers at {args.server} ({error})") from None
        if args.model not in served:
            raise JudgeError(f"{args.server} has no model {args.model}; it serves {', '.join(map(str, served))[:300]}")

    def score(self, requests):
        deadline = time.monotonic() + self.args.timeout
        replies = [dict(score=None, error="the server did not answer in time")] * len(requests)

        def score(i):
            replies[i] = self.score_one(requests[i], deadline)

        for wait in [in_background(score, i) for i in range(len(requests))]:
            with contextlib.suppress(JudgeError):  # late: the reply above stands
                wait(deadline - time.monotonic(), "")
        return list(replies)

    def score_one(self, request, deadline):
        """What may pass, as a broken connection, a busy server or an answer without a score, is tried once more."""
        urls = {name: data_url(image) for name, image in request.items()}
        body = self.body(urls)
        for last in (False, True):
            try:
                return read_completion(self.call("/chat/completions", body, deadline - time.monotonic()), self.args.mode)
            except JudgeError as error:
                reply = dict(score=None, error=str(error))
                if last:
                    return reply
            body |= dict(temperature=DRAWN["temperature"], top_p=DRAWN["top_p"])
            if "answered 400" in reply["error"]:  # perhaps it gives fewer log-probabilities, or none
                body = {key: value for key, value in body.items() if "logprobs" not in key}
            time.sleep(min(PAUSE, max(deadline - time.monotonic(), 0)))

    def body(self, urls):
        content = [dict(type="text", text=part) for part in self.parts]
        content[1::2] = [dict(type="image_url", image_url=dict(url=urls[name])) for name in self.parts[1::2]]
        message = dict(role="user", content=[part for part in content if part.get("text") != ""])
        body = dict(model=self.args.model, messages=[message], temperature=0.0)
        if self.args.mode == "logits":
            return body | dict(max_tokens=32, logprobs=True, top_logprobs=20)
        return body | dict(max_tokens=self.args.max_new_tokens)

    def call(self, path, body, seconds):
        """The JSON answer to a GET (no body) or POST. Raises JudgeError."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        content, said, end = json.dumps(body).encode() if body else None, b"", time.monotonic() + seconds
        try:
            try:
                request = urllib.request.Request(self.args.server.rstrip("/") + path, content, headers)
                response = urllib.request.build_opener(NoRedirect).open(request, timeout=max(seconds, 0.1))
            except ValueError as error:
                raise JudgeError(f"the address or OPENAI_API_KEY cannot be sent: {error}") from None
            except urllib.error.HTTPError as error:
                raise JudgeError(f"the server answered {error.code} {error.reason}: {error.read(300).decode(errors='replace')!r}") from None
            with response:
                while len(said) < MAX_REPLY and time.monotonic() < end and (part := response.read1(1 << 16)):
                    said += part  # in parts: the time-out is one of silence
            return json.loads(said)
        except (OSError, http.client.HTTPException) as error:
            raise JudgeError(f"the connection failed: {error}") from None
        except (ValueError, RecursionError):
            late = time.monotonic() >= end
            raise JudgeError("the server did not answer in time" if late else "the server's answer is not JSON") from None


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the API key to another host."""

    def redirect_request(self, *args):
        return None


def read_completion(answer, mode):
    """The reply in a chat completion: by its log-probabilities in mode logits, where they are given. Raises JudgeError."""
    try:
        choice = answer["choices"][0]
        text, tokens = choice["message"]["content"], (choice.get("logprobs") or {}).get("content")
        score = score_from_logprobs(tokens) if tokens and mode == "logits" else None
        score = score or parse_score(text)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError):
        raise JudgeError("the server's answer is no chat completion") from None
    if score is None:
        raise JudgeError(NO_SCORE)
    return dict(score=score, text=text)


# --------------------------------------------------------------------------------------------------- the program


def data_url(image):
    """A uint8 image (3, H, W) as a PNG in a data URL."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, format="png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def read_image(source):
    """A path or data URL as uint8 (3, H, W). Raises DataError."""
    if not isinstance(source, str):
        raise data.DataError("an image must be a path or a data URL")
    if source.startswith("data:"):
        try:
            image = data.read_image(io.BytesIO(base64.b64decode(source.partition(";base64,")[2], validate=True)))
        except ValueError:  # of base64, or DataError, which would not name the image
            raise data.DataError(f"the data URL {source[:40]}… does not hold an image in base64") from None
    else:
        image = data.read_image(source)
    image = (image * 255).round().byte()
    if max(image.shape[1:]) > 200 * min(image.shape[1:]):
        raise data.DataError(f"an image of {image.shape[2]}×{image.shape[1]} px is too narrow for the model")
    return image


def read_batches(file, size):
    """Lists of at most `size` (line number, bytes); an empty line ends a list. Of a line over MAX_LINE nothing is kept: None."""
    batch, number = [], 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            while not line.endswith(b"\n") and (line := file.readline(MAX_LINE)):
                pass
            line = None
        empty = line is not None and not line.strip()
        if not empty:
            batch.append((number, line))
        if batch and (empty or len(batch) == size):
            yield batch
            batch = []
    if batch:
        yield batch


def read_request(line):
    """A request, a dict. Raises JudgeError."""
    if line is None:
        raise JudgeError(f"the line is longer than {MAX_LINE >> 20} MiB")
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise JudgeError("the line is not JSON") from None
    if not isinstance(request, dict) or not {"id", *IMAGES} <= request.keys():
        raise JudgeError('a request is an object with "id", "gt", "degraded" and "restored"')
    return request


def score_lines(judge, lines):
    """One reply per (line number, line), in order; those that are requests are scored as one batch."""
    replies, valid, images = [], [], []
    for number, line in lines:
        reply = dict(id=None, score=None)
        replies.append(reply)
        try:
            request = read_request(line)
            reply["id"] = request["id"]
            images.append({name: read_image(request[name]) for name in IMAGES})
            valid.append(reply)
        except (JudgeError, data.DataError) as error:
            reply["error"] = f"line {number}: {error}"
    try:
        answers = judge.score(images) if images else []
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        answers = [dict(score=None, error="out of memory: smaller batches or images need less")] * len(valid)
    for reply, answer in zip(valid, answers):
        if answer["score"] is not None and not 1 <= answer["score"] <= 5:  # not a number, for one
            answer = dict(score=None, error=f"the model's score is {answer['score']}; another --dtype may help")
        reply |= answer
    return replies


def is_out_of_memory(error):
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory")
    )


def end_with(parent):
    """Makes the kernel kill this process when its parent, whose process id this is, ends in whatever way (Linux; elsewhere
    the end of the input ends it)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the process that started the judge is gone")


def is_url(text):
    return text.startswith(("http://", "https://"))


def parser():
    p = runs.Parser(prog="judge.py", description=__doc__, formatter_class=runs.HelpFormatter)
    gpu = torch.cuda.is_available()
    p.add_argument("--model", required=True, help="Qwen2.5-VL: a folder, or a name on the Hugging Face hub; with --server, its name there")
    p.add_argument("--server", help="ask an OpenAI-compatible server, as http://localhost:8000/v1, instead of loading the model")
    p.add_argument("--timeout", type=runs.number(float, 0, open_low=True), default=60.0, help="s, for a batch sent to a server")
    p.add_argument("--mode", choices=FORMAT, default="logits", help="expectation over the score's tokens, or the paper's written answer")
    p.add_argument("--prompt", type=runs.existing_file, help="file with a prompt of your own: <gt>, <degraded>, <restored> mark the images")
    p.add_argument("--device", type=runs.device, default=runs.default_device(), help="cpu, cuda, cuda:1, …")
    p.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help=f"default here: {'bf16' if gpu else 'fp32'}")
    p.add_argument("--attention", choices=("sdpa", "eager", "flash_attention_2"), default="sdpa", help="as transformers names them")
    p.add_argument("--batch-size", type=runs.number(int, 1), default=16, help="requests scored at once")
    p.add_argument("--min-pixels", type=runs.number(int, 784), default=256 * 28 * 28, help="smaller images are enlarged to; 784 are a token")
    p.add_argument("--max-pixels", type=runs.number(int, 784), default=1280 * 28 * 28, help="larger images are reduced to")
    p.add_argument("--max-new-tokens", type=runs.number(int, 1), default=512, help="length of a written answer")
    p.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the trainer's process id
    return p


def main(argv):
    p = parser()
    args = p.parse_args(argv)
    if args.min_pixels > args.max_pixels:
        p.error("--min-pixels is above --max-pixels")
    if args.server and not is_url(args.server):
        p.error(f"--server {args.server} is no address: it begins with http:// or https://")
    args.dtype = args.dtype or ("bf16" if runs.on_gpu(args.device) else "fp32")
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    if args.parent:
        end_with(args.parent)
    try:
        judge = ServerJudge(args) if args.server else LocalJudge(args)
    except JudgeError as error:
        return p.fail(error)
    except KeyboardInterrupt:
        return p.fail("stopped")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return p.fail(f"{args.device} has not the memory for {args.model} in {args.dtype}: use a smaller model or another --device")
    if args.parent:
        print(json.dumps(dict(ready=args.model)), file=replies, flush=True)
    scored = failed = seconds = 0
    try:
        for lines in read_batches(sys.stdin.buffer, args.batch_size):
            start = time.perf_counter()
            for reply in score_lines(judge, lines):
                print(json.dumps(reply), file=replies)
                scored, failed = scored + (reply["score"] is not None), failed + (reply["score"] is None)
            replies.flush()
            seconds += time.perf_counter() - start
    except KeyboardInterrupt:
        return p.fail("stopped")
    except OSError as error:  # a full disk, a reader that has gone
        return p.fail(f"the scores could not be written ({error.strerror})")
    if scored + failed:
        memory = f", peak {torch.cuda.max_memory_allocated(args.device) / 2**30:.1f} GiB" if runs.on_gpu(args.device) else ""
        print(f"{scored} scored, {failed} not; {seconds / (scored + failed):.3f} s each{memory}", file=sys.stderr)
    return int(failed > 0)


# -------------------------------------------------------------------------------------------- the trainer's side


class Judge:
    """What training asks: a judge.py of its own, which works beside the trainer and is started again when it failed.

    command: what starts it; log: the file for what it says besides replies; timeout: s for a batch; patience: how many
    batches in a row may pass without a single whole group. After a batch `problem` says what went wrong, or None, and
    `metrics` has: latency, s from sending it to its last reply; wait, s the trainer stood still for it, a new start
    included; failures, rollouts without a score; starts so far.
    """

    def __init__(self, command, log, timeout=60.0, patience=5):
        self.command, self.log, self.timeout, self.patience = command, Path(log), timeout, patience
        self.process, self.problem, self.metrics = None, None, {}
        self.starts = self.asked = self.failed_in_a_row = 0
        self.start_timeout = START_TIMEOUT

    def start(self, degraded, gt, group_size):
        """Starts it and has it score a first batch: what cannot work should fail before the training. Raises JudgeError."""
        self.launch()
        wait = self.ask(degraded, degraded.repeat_interleave(group_size, dim=0), gt)
        with contextlib.suppress(JudgeError):  # patience 1 ends at once
            wait()
        if self.failed_in_a_row:
            self.close()
            raise JudgeError(f"the judge could not score a first batch: {self.problem}; its log is {self.log}")

    def ask(self, degraded, y, gt):
        """Sends one batch: degraded, gt (B, 3, H, W) and y (B·G, 3, H, W), image by image, in [0, 1]. Returns a function that
        waits for the scores: (B, G), 1 to 5, NaN where there is none. It raises JudgeError when patience ends. Returns at
        once, unless the judge has to be started again."""
        self.problem, wait, replies, answered = None, None, {}, []
        images = [(t.detach().float().clamp(0, 1) * 255).round().byte().cpu() for t in (gt, degraded, y)]
        ids = range(self.asked, self.asked + len(y))
        self.asked += len(y)

        def exchange(process):
            self.talk(process, make_requests(ids, *images), replies)
            answered.append(time.perf_counter())

        begun = time.perf_counter()
        try:
            self.launch()  # not in the background: the kernel ties a process to the thread that started it
            wait = in_background(exchange, self.process)
        except JudgeError as error:
            self.problem = error
        sent = time.perf_counter()

        def scores():
            if y.is_cuda:
                torch.cuda.synchronize(y.device)  # the other rewards are under way: what they take is not waiting
            waiting = time.perf_counter()
            try:
                if wait:
                    wait(sent + self.timeout - waiting, f"it did not answer within {self.timeout:g} s")
            except JudgeError as error:
                self.problem = error
                self.close()  # the next batch starts it again
            values = torch.tensor([self.score_in(replies.get(i, {})) for i in ids]).reshape(len(gt), -1)  # (B, G)
            now = time.perf_counter()
            self.metrics = {"judge/latency": (answered or [now])[0] - sent, "judge/wait": now - waiting + sent - begun}
            self.metrics |= {"judge/failures": int(values.isnan().sum()), "judge/starts": self.starts}
            self.failed_in_a_row = 0 if values.isfinite().all(dim=1).any() else self.failed_in_a_row + 1
            if self.failed_in_a_row >= self.patience:
                raise JudgeError(f"the judge failed {self.patience} times in a row, the last time: {self.problem}; its log is {self.log}")
            return values.to(y.device)

        return scores

    def score_in(self, reply):
        """The score in a reply, NaN if it has none that a judge can give."""
        score = reply.get("score")
        if type(score) in (int, float) and 1 <= score <= 5:
            return float(score)
        self.problem = self.problem or reply.get("error") or f"it replied {json.dumps(reply)[:100]}"
        return math.nan

    def launch(self):
        """Starts it unless it runs, and returns when its model is loaded. Raises JudgeError with its last words."""
        if self.process and self.process.poll() is None:
            return
        pipe, begun, self.starts = subprocess.PIPE, time.perf_counter(), self.starts + 1
        try:
            self.log_start = self.log.stat().st_size if self.log.exists() else 0
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=log, start_new_session=True)
            wait = in_background(self.read_until, self.process, lambda reply: "ready" in reply)
            wait(self.start_timeout, f"it was not ready within {self.start_timeout:.0f} s")
        except (JudgeError, OSError) as error:
            self.close()
            raise JudgeError(f"the judge could not start: {error}; its log is {self.log}") from None
        if self.starts == 1:
            self.start_timeout = min(START_TIMEOUT, 60 + 3 * (time.perf_counter() - begun))

    def talk(self, process, requests, replies):
        """Sends requests as one batch and fills replies, {id: reply}. Raises JudgeError."""
        wanted = {request["id"] for request in requests}

        def send():
            with contextlib.suppress(OSError):  # if it has ended, reading says why
                process.stdin.write("".join([json.dumps(request) + "\n" for request in requests] + ["\n"]).encode())
                process.stdin.flush()

        def last(reply):
            if type(reply.get("id")) is int and reply["id"] in wanted:
                replies[reply["id"]] = reply
            return wanted <= replies.keys()

        in_background(send)  # it may reply before it has read all, and a pipe holds little
        self.read_until(process, last)

    def read_until(self, process, last):
        """Reads JSON objects from its output until one is the `last`; other lines are noise. Raises JudgeError at its end."""
        while line := process.stdout.readline(MAX_REPLY):
            try:
                reply = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(reply, dict) and last(reply):
                return
        code, said = process.wait(), "without a word"
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            log.seek(max(self.log_start, log.seek(0, os.SEEK_END) - 4096))
            words = log.read().decode(errors="replace").split("\n")
            said = next((line.strip()[-400:] for line in reversed(words) if line.strip()), said)
        killed = f"signal {-code} ended it" + (", as the kernel does when memory runs out" if code == -signal.SIGKILL else "")
        raise JudgeError(killed if code < 0 else said.removeprefix("judge.py: ") if code == 2 else f"{said} (exit code {code})")

    def close(self):
        """Ends it at once: there is nothing to save."""
        if self.process and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)
        self.process = None


def make_requests(ids, gt, degraded, restored):
    """Requests with these ids for uint8 images (B, 3, H, W) and rollouts (B·G, 3, H, W)."""
    group = len(restored) // len(gt)
    gts, degradeds = ([url for image in t for url in [data_url(image)] * group] for t in (gt, degraded))
    files = zip(ids, gts, degradeds, map(data_url, restored))
    return [dict(id=i, gt=a, degraded=b, restored=c) for i, a, b, c in files]


def in_background(function, *args):
    """Starts function(*args) in a thread that keeps no program from ending. Returns wait(seconds, problem), which raises what
    it raised, or JudgeError(problem) if it is not done by then."""
    errors = []

    def run():
        try:
            function(*args)
        except Exception as error:
            errors.append(error)

    def wait(seconds, problem):
        thread.join(max(seconds, 0))
        if thread.is_alive():
            raise JudgeError(problem)
        if errors:
            raise errors[0]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return wait


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
