"""The flow model's training: what it asks of the transformer, and what it shows it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from captions import caption
from emoji_flow import train
from emoji_flow.models import TOKENS, build_scheduler, read_tokenizer, tokenize, write_tokenizer
from emoji_flow.train import capitalized, flow_loss, lengthened, resample
from world import COLOUR_NAMES, emoji_list


class Knowing:
    """A transformer that knows the latents: the way to them from the noise, as the pipeline wants it, negated."""

    def __init__(self, latents: Tensor) -> None:
        self._latents = latents

    def __call__(self, _transformer: Any, noisy: Tensor, time: Tensor, *_text: Tensor) -> Tensor:
        return (self._latents - noisy) / (1 - time)[:, None, None, None]


def test_knowing_the_latents_leaves_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    latents, text = torch.randn(64, 16, 8, 8), torch.zeros(64, 1)
    monkeypatch.setattr(train, "denoise", Knowing(latents))
    assert flow_loss(torch.nn.Identity(), latents, text, text) < 1e-6
    monkeypatch.setattr(train, "denoise", lambda _transformer, noisy, *_: torch.zeros_like(noisy))
    assert 1.8 < flow_loss(torch.nn.Identity(), latents, text, text) < 2.2


def test_the_scheduler_goes_where_the_answer_points() -> None:
    torch.manual_seed(0)
    latents, sample = torch.randn(1, 16, 8, 8), torch.randn(1, 16, 8, 8)
    scheduler = build_scheduler()
    scheduler.set_timesteps(5)
    for timestep in scheduler.timesteps:
        answer = Knowing(latents)(None, sample, 1 - timestep[None] / 1000)
        sample = scheduler.step(-answer, timestep, sample).prev_sample
    assert torch.allclose(sample, latents, atol=1e-4)


def test_resampling_with_a_model_that_knows_the_latents_gives_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    latents, text = torch.randn(3, 16, 8, 8), torch.zeros(6, 1)
    monkeypatch.setattr(train, "denoise", Knowing(latents.repeat(2, 1, 1, 1)))
    assert torch.allclose(resample(torch.nn.Identity(), latents, text, text), latents, atol=1e-4)


def test_a_lengthened_caption_takes_the_second_block_of_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 0)
    random = Random(0)
    texts = [caption(random, one.names, random.choice(COLOUR_NAMES)) for one in emoji_list()]
    long = [lengthened(random, text) for text in ["", *texts]]
    assert all(text in longer for text, longer in zip(["", *texts], long, strict=True))
    _, mask = tokenize(read_tokenizer(tmp_path), long, 3 * TOKENS)
    assert int(mask.sum(1).min()) > TOKENS
    assert (mask.sum(1) > 2 * TOKENS).float().mean() < 0.05


def test_some_captions_begin_with_a_capital() -> None:
    random = Random(0)
    shown = [capitalized(random, "a rocket") for _ in range(2000)]
    assert set(shown) == {"a rocket", "A rocket"}
    assert 0.12 < shown.count("A rocket") / 2000 < 0.18
    assert capitalized(random, "") == ""
