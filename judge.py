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

import asyncio
import base64
import contextlib
import ctypes
import io
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
MAX_LINE = 1 << 26  # bytes of a request: three photographs of some 10 MP
MAX_REPLY = 1 << 20
DRAWN = dict(do_sample=True, temperature=0.7, top_p=0.9, top_k=0)  # Qwen's own top_k is 1
PAUSE = 0.5  # s before a server is asked again
START_TIMEOUT = (
    1800.0  # s; a first start downloads 16 GB, a later one has 60 s and thrice the first
)


class JudgeError(RuntimeError):
    """The judge cannot be had, or could not score; its text says why and what to do."""


@dataclass
class Config:
    """The judge by itself: reads requests, one JSON object a line, and writes scores."""

    model: str
    """Qwen2.5-VL: a folder, or a name on the Hugging Face hub; with --server, its name there"""
    server: str | None = None
    """ask an OpenAI-compatible server, as http://localhost:8000/v1, instead of loading the model"""
    timeout: float = 60.0
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
    batch_size: int = 16
    """requests scored at once"""
    min_pixels: int = 256 * 28 * 28
    """smaller images are enlarged to this many pixels; 784 pixels are one token"""
    max_pixels: int = 1280 * 28 * 28
    """larger images are reduced to this many pixels"""
    max_new_tokens: int = 512
    """longest written answer"""
    parent: int | None = None
    """process id of the trainer that starts it, which it tells when it is ready and ends with"""


def check(config):
    """Raises RunError for a flag that cannot work."""
    pixels = dict(min_pixels="[784, inf)", max_pixels="[784, inf)")
    ones = dict(batch_size="[1, inf)", max_new_tokens="[1, inf)")
    runs.check_ranges(config, timeout="(0, inf)", **pixels, **ones)
    runs.check_file("--prompt", config.prompt)
    runs.check_device(config.device)
    if config.min_pixels > config.max_pixels:
        raise runs.RunError("--min-pixels is above --max-pixels")
    if config.server and not runs.is_url(config.server):
        hint = "it begins with http:// or https://"
        raise runs.RunError(f"--server {config.server} is no address: {hint}")


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
    found = find_score("".join(t["token"] for t in tokens))
    place = found.start(1) if found else -1
    for t in tokens:
        if place == 0 and len(t["token"]) == 1:
            tops = [t, *(t.get("top_logprobs") or [])]
            likely = {top["token"]: top["logprob"] for top in tops}
            logits = torch.tensor([likely.get(digit, -math.inf) for digit in DIGITS])
            return expected_score(logits).item()
        place -= len(t["token"])
    return None


def score_tokens(tokenizer, chat):
    """The five tokens of 1 … 5 after `chat` and BEGIN. Raises JudgeError for a tokenizer in which
    they are not tokens of their own."""
    before = tokenizer.encode(chat + BEGIN)
    answers = [tokenizer.encode(f"{chat}{BEGIN}{digit}</Score>") for digit in DIGITS]
    tokens = [ids[len(before)] for ids in answers]
    same = all(ids[: len(before)] == before for ids in answers)
    if not same or [tokenizer.decode([token]) for token in tokens] != list(DIGITS):
        hint = "use --mode generate"
        raise JudgeError(f"the model's tokenizer has no tokens of their own for 1 to 5: {hint}")
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
        wanted = "must hold each of <gt>, <degraded> and <restored> once"
        raise JudgeError(f"the judge's prompt {path} {wanted}: there the images stand")
    return parts


# -------------------------------------------------------------------------------- the model itself


def is_hub_reachable(name):
    """Asked once, with a short wait: transformers itself retries for minutes. Raises JudgeError if
    there is no such model."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url = f"{constants.ENDPOINT}/{name}/resolve/main/config.json"
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise JudgeError(f"{constants.ENDPOINT} has no model {name}") from None
    except Exception:  # no network, no such host, no valid address, …
        return False
    return True


def load(config):
    """(model, processor) of a local folder or hub name. Raises JudgeError."""
    name, folder = config.model, Path(config.model).is_dir()
    if folder and not list(Path(name).glob("*.safetensors")):
        raise JudgeError(f"the folder {name} holds no weights of a model (*.safetensors)")
    if not folder and (name[0] in "/.~" or name.count("/") > 1):
        raise JudgeError(f"there is no folder {name} with a judge's model")
    local = folder or not is_hub_reachable(name)
    import transformers  # late: it takes seconds, and what is wrong so far shows before

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    try:
        processor = transformers.AutoProcessor.from_pretrained(
            name, local_files_only=local, padding_side="left"
        )
        model, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            name,
            local_files_only=local,
            dtype=types[config.dtype],
            attn_implementation=config.attention,
            use_safetensors=True,  # the other format is pickle
            output_loading_info=True,
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        unreachable = ": the hub cannot be reached, and it is not, or not whole, on this machine"
        hub = unreachable if local and not folder else ""
        reason = str(error).split("\n")[0][:300]
        raise JudgeError(f"the judge's model {name} cannot be loaded{hub} ({reason})") from None
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:  # transformers would fill them with random numbers
        count = f"{len(missing)} tensors are missing or of another shape, as {missing[0]}"
        raise JudgeError(f"the judge's model {name} is not complete: {count}")
    size = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    processor.image_processor.size = size
    return model.eval().requires_grad_(False).to(config.device), processor


class LocalJudge:
    """Qwen2.5-VL with its prompt: scores lists of requests, {name: image source}."""

    def __init__(self, config):
        self.config = config
        parts = prompt_parts(config.prompt, config.mode)
        self.model, self.processor = load(config)
        self.names = parts[1::2]  # the images' order in the prompt
        content = [dict(type="text", text=text) for text in parts]
        content[1::2] = [dict(type="image")] * len(self.names)
        message = dict(role="user", content=content)
        self.chat = self.processor.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        if config.mode == "logits":
            self.tokens = score_tokens(self.processor.tokenizer, self.chat)

    def read(self, source):
        """An image source as uint8 (3, H, W). Raises DataError."""
        image = (read_source(source) * 255).round().byte()
        if max(image.shape[1:]) > 200 * min(image.shape[1:]):
            size = f"{image.shape[2]}×{image.shape[1]} px"
            raise DataError(f"an image of {size} is too narrow for the model")
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
        if self.config.mode == "logits":
            return self.expect(requests)
        replies = [dict(score=None)] * len(requests)
        torch.manual_seed(0)
        for how in (dict(do_sample=False), DRAWN):  # the likeliest words would be the same again
            rows = [i for i, reply in enumerate(replies) if reply["score"] is None]
            texts = self.write([requests[i] for i in rows], **how) if rows else []
            for i, text in zip(rows, texts):
                score = parse_score(text)
                replies[i] = dict(score=score, text=text) | ({} if score else dict(error=NO_SCORE))
        return replies

    def write(self, requests, **sampling):
        """The answers the model writes."""
        inputs = self.inputs(requests, self.chat)
        longest = self.config.max_new_tokens
        out = self.model.generate(**inputs, max_new_tokens=longest, **sampling)
        answers = out[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(answers, skip_special_tokens=True)

    def expect(self, requests):
        """Replies of mode logits. Requests that differ in the restored image alone, a group of
        rollouts, are read together."""
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            same = [*(id(request[name]) for name in IMAGES[:2]), request["restored"].shape]
            groups[tuple(same) if self.names[-1] == "restored" else i].append(i)
        alone = [rows[0] for rows in groups.values() if len(rows) == 1]
        replies = [None] * len(requests)
        for rows in [alone, *(rows for rows in groups.values() if len(rows) > 1)]:
            if not rows:
                continue
            inputs = self.inputs([requests[i] for i in rows], self.chat + BEGIN)
            if rows is alone:
                hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
            else:
                hidden = self.read_group(inputs)
            for i, reply in zip(rows, self.read_scores(hidden[:, -1])):
                replies[i] = reply
        return replies

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


class ServerJudge:
    """The same for a model behind an OpenAI-compatible server (vLLM, SGLang, transformers serve).

    The environment's OPENAI_API_KEY is sent if it is set. Raises JudgeError if no server answers;
    whether it has the model, the first batch shows: not every server lists what it serves.
    """

    def __init__(self, config):
        self.config, self.parts = config, prompt_parts(config.prompt, config.mode)
        try:
            served = asyncio.run(self.served())
        except Exception as error:  # no address, no valid key, no connection, no time
            problem = f"no OpenAI-compatible server answers at {config.server}"
            raise JudgeError(f"{problem} ({describe(error)})") from None
        if config.model not in served:
            shown = ", ".join(served)[:300] or "nothing"
            print(f"note: the server lists {shown}, not {config.model}", file=sys.stderr)

    def client(self):
        """A client of one batch. It follows no redirect, which would hand the key to another host,
        and does not try again by itself."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.config.server,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
        )

    async def served(self):
        """Names of the models the server lists; none if it keeps no list."""
        import openai

        async with self.client() as client, asyncio.timeout(10):
            try:
                return [str(model.id) for model in (await client.models.list()).data or []]
            except (openai.APIStatusError, openai.APIResponseValidationError, TypeError):
                return []

    def read(self, source):
        """An image source as a data URL. Raises DataError for a path to no image."""
        is_data = isinstance(source, str) and source.startswith("data:")
        return source if is_data else data_url((read_source(source) * 255).round().byte())

    def score(self, requests):
        """Replies without their id, one per request {name: data URL}, within the time-out."""
        return asyncio.run(self.score_all(requests))

    async def score_all(self, requests):
        async with self.client() as client:
            return await asyncio.gather(*(self.score_one(client, r) for r in requests))

    async def score_one(self, client, request):
        """What may pass, as a broken connection, a busy server or an answer without a score, is
        tried once more, all within the time-out, however slowly an answer drips."""
        body = self.body(request)
        try:
            async with asyncio.timeout(self.config.timeout):
                try:
                    return await self.ask(client, body)
                except JudgeError as error:
                    await asyncio.sleep(PAUSE)
                    body |= dict(temperature=DRAWN["temperature"], top_p=DRAWN["top_p"])
                    if "answered 400" in str(error):  # perhaps it gives no log-probabilities
                        body = {k: v for k, v in body.items() if "logprobs" not in k}
                    return await self.ask(client, body)
        except JudgeError as error:
            return dict(score=None, error=str(error))
        except TimeoutError:
            return dict(score=None, error="the server did not answer in time")

    async def ask(self, client, body):
        """The reply to one request. Raises JudgeError."""
        import openai

        try:
            answer = await client.chat.completions.create(**body)
            return read_completion(answer, self.config.mode)
        except openai.APIStatusError as error:
            said = f"{error.status_code}: {error.response.text[:300]!r}"
            raise JudgeError(f"the server answered {said}") from None
        except openai.APITimeoutError:
            raise TimeoutError from None
        except openai.OpenAIError as error:
            raise JudgeError(f"the connection failed: {describe(error)}") from None
        except (AttributeError, IndexError, TypeError, ValueError, OverflowError):
            raise JudgeError("the server's answer is no chat completion") from None

    def body(self, request):
        """The request in the words of the protocol; request: {name: data URL}."""
        content = [dict(type="text", text=part) for part in self.parts]
        urls = [request[name] for name in self.parts[1::2]]
        content[1::2] = [dict(type="image_url", image_url=dict(url=url)) for url in urls]
        message = dict(role="user", content=[part for part in content if part.get("text") != ""])
        body = dict(model=self.config.model, messages=[message], temperature=0.0)
        if self.config.mode == "logits":
            return body | dict(max_tokens=32, logprobs=True, top_logprobs=20)
        return body | dict(max_tokens=self.config.max_new_tokens)


def describe(error):
    """An exception and what caused it, in a line."""
    cause = error.__cause__ or error
    return " ".join(f"{type(cause).__name__}: {cause}".split())[:200]


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
    if not isinstance(source, str):
        raise DataError("an image must be a path or a data URL")
    if not source.startswith("data:"):
        return read_image(source)
    try:
        coded = source.partition(";base64,")[2]
        return read_image(io.BytesIO(base64.b64decode(coded, validate=True)))
    except ValueError:  # of base64, or DataError, which would not name the image
        shown = f"the data URL {source[:40]}…"
        raise DataError(f"{shown} does not hold an image in base64") from None


def read_batches(file, size):
    """Lists of at most `size` (line number, bytes); an empty line ends a list. Of a line over
    MAX_LINE nothing is kept: None."""
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
    """One reply per (line number, line), in order; the requests among them are scored as one batch,
    and an image that several of them name is read once."""
    replies, valid, requests, read = [], [], [], {}
    for number, line in lines:
        reply = dict(id=None, score=None)
        replies.append(reply)
        try:
            request = read_request(line)
            reply["id"] = request["id"]
            sources = {name: request[name] for name in IMAGES}
            for source in sources.values():
                if not isinstance(source, str) or source not in read:
                    image = judge.read(source)
                    read[source] = image
            requests.append({name: read[source] for name, source in sources.items()})
            valid.append(reply)
        except (JudgeError, DataError) as error:
            reply["error"] = f"line {number}: {error}"
    try:
        answers = judge.score(requests) if requests else []
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        words = "out of memory: smaller batches or images need less"
        answers = [dict(score=None, error=words)] * len(valid)
    for reply, answer in zip(valid, answers):
        if answer["score"] is not None and not 1 <= answer["score"] <= 5:  # not a number, for one
            words = f"the model's score is {answer['score']}; another --dtype may help"
            answer = dict(score=None, error=words)
        reply |= answer
    return replies


def is_out_of_memory(error):
    words = ("can't allocate memory", "out of memory")
    of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return of_memory or any(word in str(error) for word in words)


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
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not be taken for a reply
    if config.parent:
        end_with(config.parent)
    try:
        judge = ServerJudge(config) if config.server else LocalJudge(config)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        hint = "use a smaller model or another --device"
        what = f"{config.model} in {config.dtype}"
        raise JudgeError(f"{config.device} has not the memory for {what}: {hint}") from None
    if config.parent:
        print(json.dumps(dict(ready=config.model)), file=replies, flush=True)
    scored = failed = seconds = 0
    for lines in read_batches(sys.stdin.buffer, config.batch_size):
        start = time.perf_counter()
        for reply in score_lines(judge, lines):
            print(json.dumps(reply), file=replies)
            scored += reply["score"] is not None
            failed += reply["score"] is None
        replies.flush()
        seconds += time.perf_counter() - start
    if scored + failed:
        gpu = runs.on_gpu(config.device)
        peak = torch.cuda.max_memory_allocated(config.device) / 2**30 if gpu else 0
        memory = f", peak {peak:.1f} GiB" if gpu else ""
        each = f"{seconds / (scored + failed):.3f} s each{memory}"
        print(f"{scored} scored, {failed} not; {each}", file=sys.stderr)
    return int(failed > 0)


def main(argv=None):
    return runs.program("judge.py", score_all, argv, (JudgeError, DataError))


# ------------------------------------------------------------------------------ the trainer's side


class Judge:
    """What training asks: a judge.py of its own, which works beside the trainer and is started
    again when it failed.

    command: what starts it; log: the file for what it says besides replies; timeout: s for a batch;
    patience: how many batches in a row may pass without a single whole group; check: called while
    it is waited for, raises what should end the waiting.
    After a batch `problem` says what went wrong, or None, and `metrics` has: latency, s from
    sending it to its last reply; wait, s the trainer stood still for it, a new start included;
    failures, rollouts without a score; starts so far.
    """

    def __init__(self, command, log, timeout=60.0, patience=5, check=lambda: None):
        self.command, self.log, self.check = command, Path(log), check
        self.timeout, self.patience = timeout, patience
        self.process, self.problem, self.metrics = None, None, {}
        self.starts = self.asked = self.failed_in_a_row = 0
        self.start_timeout = START_TIMEOUT

    def start(self, degraded, gt, group_size):
        """Starts it and has it score a first batch: what cannot work should fail before the
        training. Raises JudgeError."""
        self.launch()
        wait = self.ask(degraded, degraded[:, None].expand(-1, group_size, -1, -1, -1), gt)
        with contextlib.suppress(JudgeError):  # patience 1 ends at once
            wait()
        if self.failed_in_a_row:
            self.close()
            problem = f"the judge could not score a first batch: {self.problem}"
            raise JudgeError(f"{problem}; its log is {self.log}")

    def ask(self, degraded, restored, gt):
        """Sends one batch: degraded, gt (B, 3, H, W) and restored (B, G, 3, H, W) in [0, 1].

        Returns a function that waits for the scores: (B, G), 1 to 5, NaN where there is none. It
        raises JudgeError when patience ends. Returns at once, unless the judge has to be started
        again.
        """
        self.problem, wait, replies, answered = None, None, {}, []
        shape = restored.shape[:2]
        first, self.asked = self.asked, self.asked + shape.numel()
        ids = range(first, self.asked)
        images = [as_bytes(t) for t in (gt, degraded, restored)]

        def exchange(process):
            self.talk(process, make_requests(ids, *images), replies)
            answered.append(time.perf_counter())

        begun = time.perf_counter()
        try:
            # not in the background: the kernel ties a process to the thread that started it
            self.launch()
            wait = in_background(exchange, self.process)
        except JudgeError as error:
            self.problem = error
        sent = time.perf_counter()

        def scores():
            if restored.is_cuda:
                # the other rewards are under way: what they take is not waiting
                torch.cuda.synchronize(restored.device)
            waiting = time.perf_counter()
            try:
                if wait:
                    late = f"it did not answer within {self.timeout:g} s"
                    wait(sent + self.timeout - waiting, late, self.check)
            except JudgeError as error:
                self.problem = error
                self.close()  # the next batch starts it again
            values = torch.tensor([self.score_in(replies.get(i, {})) for i in ids]).view(shape)
            now = time.perf_counter()
            self.metrics = {
                "judge/latency": (answered or [now])[0] - sent,
                "judge/wait": now - waiting + sent - begun,
                "judge/failures": int(values.isnan().sum()),
                "judge/starts": self.starts,
            }
            any_group = values.isfinite().all(dim=1).any()
            self.failed_in_a_row = 0 if any_group else self.failed_in_a_row + 1
            if self.failed_in_a_row >= self.patience:
                times = f"the judge failed {self.patience} times in a row"
                last = f"the last time: {self.problem}; its log is {self.log}"
                raise JudgeError(f"{times}, {last}")
            return values.to(restored.device)

        return scores

    def score_in(self, reply):
        """The score in a reply, NaN if it has none that a judge can give."""
        score = reply.get("score")
        if type(score) in (int, float) and 1 <= score <= 5:
            return float(score)
        said = f"it replied {json.dumps(reply)[:100]}"
        self.problem = self.problem or reply.get("error") or said
        return math.nan

    def launch(self):
        """Starts it unless it runs, and returns when its model is loaded. Raises JudgeError with
        its last words."""
        if self.process and self.process.poll() is None:
            return
        pipe, begun, self.starts = subprocess.PIPE, time.perf_counter(), self.starts + 1
        try:
            self.log_start = self.log.stat().st_size if self.log.exists() else 0
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    self.command, stdin=pipe, stdout=pipe, stderr=log, start_new_session=True
                )
            wait = in_background(self.read_until, self.process, lambda reply: "ready" in reply)
            late = f"it was not ready within {self.start_timeout:.0f} s"
            wait(self.start_timeout, late, self.check)
        except (JudgeError, OSError) as error:
            self.close()
            problem = f"the judge could not start: {error}"
            raise JudgeError(f"{problem}; its log is {self.log}") from None
        if self.starts == 1:
            self.start_timeout = min(START_TIMEOUT, 60 + 3 * (time.perf_counter() - begun))

    def talk(self, process, requests, replies):
        """Sends requests as one batch and fills replies, {id: reply}. Raises JudgeError."""
        wanted = {request["id"] for request in requests}
        lines = "".join([json.dumps(request) + "\n" for request in requests] + ["\n"])

        def send():
            with contextlib.suppress(OSError):  # if it has ended, reading says why
                process.stdin.write(lines.encode())
                process.stdin.flush()

        def last(reply):
            if type(reply.get("id")) is int and reply["id"] in wanted:
                replies[reply["id"]] = reply
            return wanted <= replies.keys()

        in_background(send)  # it may reply before it has read all, and a pipe holds little
        self.read_until(process, last)

    def read_until(self, process, last):
        """Reads JSON objects from its output until one is the `last`; other lines are noise. Raises
        JudgeError at its end."""
        while line := process.stdout.readline(MAX_REPLY):
            try:
                reply = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(reply, dict) and last(reply):
                return
        code, said = process.wait(), self.last_words() or "without a word"
        if code == 2:
            raise JudgeError(said.removeprefix("judge.py: "))
        if code >= 0:
            raise JudgeError(f"{said} (exit code {code})")
        why = ", as the kernel does when memory runs out" if code == -signal.SIGKILL else ""
        raise JudgeError(f"signal {-code} ended it{why}")

    def last_words(self):
        """The last line that it wrote into its log."""
        with contextlib.suppress(OSError), open(self.log, "rb") as log:
            log.seek(max(self.log_start, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode(errors="replace").split("\n")
            # a frame around a message is no word
            said = (line.strip()[-400:] for line in reversed(lines) if re.search(r"\w", line))
            return next(said, "")

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


def make_requests(ids, gt, degraded, restored):
    """Requests with these ids for uint8 images (B, 3, H, W) and rollouts (B, G, 3, H, W)."""
    requests, numbers = [], iter(ids)
    for truth, image, group in zip(gt, degraded, restored):
        known = dict(gt=data_url(truth), degraded=data_url(image))
        requests += [dict(id=next(numbers), **known, restored=data_url(y)) for y in group]
    return requests


def in_background(function, *args):
    """Starts function(*args) in a thread that keeps no program from ending. Returns wait(seconds,
    problem, check), which calls check now and then and raises what it raised, what the function
    raised, or JudgeError(problem) if it is not done by then."""
    errors = []

    def run():
        try:
            function(*args)
        except Exception as error:
            errors.append(error)

    def wait(seconds, problem, check=lambda: None):
        end = time.monotonic() + seconds
        while thread.is_alive():
            check()
            if (left := end - time.monotonic()) <= 0:
                raise JudgeError(problem)
            thread.join(min(left, 0.2))
        if errors:
            raise errors[0]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return wait


if __name__ == "__main__":
    sys.exit(main())
