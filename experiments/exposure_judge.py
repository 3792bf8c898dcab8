"""A judge whose answer is known: how close the exposure of a restored image is to the truth's. It
speaks the protocol of OpenAI's servers, so the trainer asks it as it asks a real Qwen2.5-VL, and
sees of it a score alone, which it cannot differentiate.

    python -m experiments.exposure_judge &
    python train.py --judge http://127.0.0.1:8001/v1 --judge-model exposure --rewards qwen \
        --freeze-backbone
"""

import json
import math
import sys
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import runs
from judge import read_source
from rewards import luma

FAR = 0.2  # a difference of mean luminance that is worth the lowest score


def mean_luminance(image):
    """Of an image (3, H, W) in [0, 1]."""
    return luma(image[None]).mean().item()


def closeness(restored, gt):
    """1 for equal exposure (mean luminance in [0, 1]), 0 at FAR or more."""
    return max(0.0, 1 - abs(restored - gt) / FAR)


def completion(share):
    """An answer whose score has the expectation 1 + 4·share: 5 with this probability, else 1."""
    likely = {"1": math.log(max(1 - share, 1e-9)), "5": math.log(max(share, 1e-9))}
    top = [dict(token=token, logprob=value) for token, value in likely.items()]
    digit = max(top, key=lambda of_token: of_token["logprob"]) | dict(top_logprobs=top)
    start, end = (dict(token=t, logprob=0.0, top_logprobs=[]) for t in ("<Score>", "</Score>"))
    message = dict(role="assistant", content=f"<Score>{digit['token']}</Score>")
    return dict(choices=[dict(message=message, logprobs=dict(content=[start, digit, end]))])


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(dict(data=[dict(id="exposure")]))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = request["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        # in the order of the judge's prompt
        gt, _, restored = (mean_luminance(read_source(url)) for url in urls)
        self.reply(completion(closeness(restored, gt)))

    def reply(self, answer):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
        pass


@dataclass
class Config:
    """Answer as a judge."""

    port: int = 8001
    """of 127.0.0.1"""


def run_program(argv):
    port = runs.flags(Config, "experiments.exposure_judge", __doc__, argv).port
    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        print(f"http://127.0.0.1:{port}/v1", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    sys.exit(runs.program("experiments.exposure_judge", run_program))
