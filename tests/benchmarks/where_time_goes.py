"""Where the time of one image goes, as a table: what the engines compute, and what lies around them.

    python tests/benchmarks/where_time_goes.py [--model MODEL] [--images 40]

Starts `hypergen serve`, generates images one at a time and puts together what is told of each: the client's clock, the
answer's `Server-Timing`, and Triton's statistics of the component models. Each line is a mean over all images.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
from tritonclient.grpc import InferenceServerClient

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.running_server import Server, start_server, stop_server

WARM_UP = 3
COMPONENTS = ("text_encoder", "unet", "vae_decoder")


def main() -> None:
    """Start the server, generate, print the table."""
    parser = argparse.ArgumentParser(description="Where the time of one image goes.")
    parser.add_argument("--model", default="", help="[default: the shipped checkpoint]")
    parser.add_argument("--images", type=int, default=40)
    options = parser.parse_args()
    server = start_server(model=options.model, key=None)
    try:
        print(_table(_measure(server, options.images)))
    finally:
        stop_server(server)


def _measure(server: Server, images: int) -> dict[str, float]:
    """Milliseconds per image, by what took them."""
    spent: Counter[str] = Counter()
    with httpx.Client(base_url=server.url, timeout=600) as client:
        for number in range(WARM_UP):
            _generate(client, number)
        before = _computed(server)
        for number in range(images):
            spent.update(_generate(client, WARM_UP + number))
        spent.update(_computed(server))
        spent.subtract(before)
    return {name: milliseconds / images for name, milliseconds in spent.items()}


def _generate(client: httpx.Client, number: int) -> dict[str, float]:
    """One image of a prompt that none had before."""
    began = time.perf_counter()
    answer = client.post("/v1/images/generations", json={"prompt": f"a cat, number {number}"})
    total = (time.perf_counter() - began) * 1000
    answer.raise_for_status()
    phases = re.findall(r"([\w-]+);dur=([\d.]+)", answer.headers["server-timing"])
    return {"client": total, **{name: float(milliseconds) for name, milliseconds in phases}}


def _computed(server: Server) -> dict[str, float]:
    """Milliseconds that each component has computed since the start, as Triton counts them."""
    triton = InferenceServerClient(server.triton_url)
    try:
        answers = [triton.get_inference_statistics(name, client_timeout=10) for name in COMPONENTS]
        models = [answer.model_stats[0] for answer in answers]
        return {model.name: model.inference_stats.compute_infer.ns / 1e6 for model in models}
    finally:
        triton.close()


def _table(spent: dict[str, float]) -> str:
    phases = ("queue", "encode-text", "denoise", "decode", "encode-image")
    lines = {
        "the UNet computes": spent["unet"],
        "the decoder computes": spent["vae_decoder"],
        "the text encoder computes": spent["text_encoder"],
        "between the steps: scheduler, batches, the way to the UNet": spent["denoise"] - spent["unet"],
        "the way to the decoder": spent["decode"] - spent["vae_decoder"],
        "tokens, and the way to the text encoder": spent["encode-text"] - spent["text_encoder"],
        "the image's file": spent["encode-image"],
        "HTTP, gRPC and the queue": spent["client"] - sum(spent[phase] for phase in phases) + spent["queue"],
    }
    rows = [f"| {name} | {value:.1f} ms | {value / spent['client']:.0%} |" for name, value in lines.items()]
    return "\n".join([f"| one image | {spent['client']:.1f} ms | |", "|---|---|---|", *rows])


if __name__ == "__main__":
    main()
