"""The training loop: what it steps, saves and takes up again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import train
from dataset import EMOJI, Choice, captions_of, choose, of_all_emoji
from models import build_scheduler
from stage import Plan, Stage, hidden_matrices, random_of, shares_of
from train import Parts, mixed, resample, without_slips
from train_lora import badge
from world import COLOUR_NAMES, colour_table, held_out_colour


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(folder: Path, steps: int, stop_after: int | None = None) -> Tensor:
    """A little regression; `stop_after` ends the run as a crash after a save would."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    plan = Plan("little", steps, 0.1, 0.1, 8, warmup=2)
    stage = Stage(folder, plan, nn.ModuleDict({"m": module}))

    def loss_of(step: int) -> Tensor:
        if step == stop_after:
            stage.save()
            raise KeyboardInterrupt
        random_of(plan, 0, step)
        values = torch.randn(8, 3)
        error: Tensor = module(values) - values[:, :2]
        return error.square().mean()

    averages = stage.run(loss_of)
    return torch.cat([value.flatten() for value in averages.parameters()])


def test_an_interrupted_run_equals_one_that_was_not(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", 20)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", 20, stop_after=7)
    assert torch.equal(trained(tmp_path / "parts", 20), whole)


def test_a_finished_stage_takes_no_step(tmp_path: Path) -> None:
    first = trained(tmp_path / "done", 5)
    assert torch.equal(trained(tmp_path / "done", 5, stop_after=0), first)


def test_muon_steps_hidden_matrices_and_nothing_else() -> None:
    modules = nn.ModuleDict({"conv_in": nn.Conv2d(3, 4, 3), "hidden": nn.Conv2d(4, 4, 3), "norm": nn.GroupNorm(2, 4)})
    hidden: Any = modules["hidden"]
    assert [id(value) for value in hidden_matrices(modules)] == [id(hidden.weight)]


def test_the_processes_share_all_matrices_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    matrices = [nn.Parameter(torch.zeros(rows, 64)) for rows in (64, 64, 32, 32, 16, 16)]
    one, other = shares_of(matrices)
    assert sorted(len(value) for value in one) == sorted(len(value) for value in other) == [16, 32, 64]


def test_the_rate_rises_then_falls_to_a_hundredth() -> None:
    plan = Plan("plan", 1000, 2.0, 2.0, 8, warmup=10)
    assert plan.factor(0) == pytest.approx(0.1)
    assert plan.factor(10) == pytest.approx(1.0)
    assert plan.factor(505) == pytest.approx(0.01 + 0.99 / 2)
    assert plan.factor(1000) == pytest.approx(0.01)


def test_held_out_pairs_are_never_chosen() -> None:
    picks = choose(Random(0), 5000, 3)
    assert all(held_out_colour(int(e)) != int(c) for e, c in zip(picks.emoji, picks.colour, strict=True))
    assert len(set(picks.emoji.tolist())) == len(EMOJI)


def test_a_tenth_of_the_captions_is_dropped() -> None:
    empty = captions_of(Random(1), choose(Random(0), 5000, 3)).count("")
    assert 0.08 < empty / 5000 < 0.12


def test_rows_of_all_emoji_come_in_their_order() -> None:
    rows = of_all_emoji(lambda emoji: torch.full((2,), float(emoji)), "rows")
    assert torch.equal(rows, torch.arange(len(EMOJI)).bfloat16()[:, None].expand(-1, 2))


class Knowing:
    """A UNet that knows which latents lie under the noise: the velocity that leads to them, by its definition."""

    def __init__(self, latents: Tensor) -> None:
        self._latents = latents.repeat(2, 1, 1, 1)
        self._cumulated = build_scheduler().alphas_cumprod

    def __call__(self, noisy: Tensor, timestep: Tensor, *_states: Tensor, **_options: bool) -> tuple[Tensor]:
        signal, noise = self._cumulated[timestep].sqrt(), (1 - self._cumulated[timestep]).sqrt()
        return (signal * (noisy - signal * self._latents) / noise - noise * self._latents,)


def test_a_unet_that_knows_the_latents_generates_them_again() -> None:
    latents = torch.randn(3, 16, 8, 8)
    parts = Parts(
        vae=None,
        tokenizer=lambda texts, **_: {"input_ids": torch.zeros(len(texts), 1)},
        text_encoder=lambda ids: (ids,),
        unet=Knowing(latents),
        latents=train.Latents({}, 1.0),
    )
    assert torch.allclose(resample(parts, latents, ["a", "b", "c"]), latents, atol=1e-4)


def test_a_sample_in_the_other_placement_gives_way_to_the_true_latents() -> None:
    true = torch.tensor([0.0, 1.0])[None, :, None, None, None, None]
    sampled = torch.tensor([[0.2, 0.9], [0.8, 0.4]])[None, :, :, None, None, None, None]
    assert without_slips(sampled, true).flatten().tolist() == pytest.approx([0.2, 0.9, 0.0, 1.0])


def test_three_quarters_of_the_decoders_latents_are_sampled() -> None:
    count = 4000
    picks = Choice(torch.zeros(count).long(), torch.ones(count).long(), torch.ones(count).long())
    sampled = torch.zeros(1, train.SAMPLES, 2, 2, 1, 1, 1)
    sampled[0, :, 1, 1] = 1
    share = mixed(torch.zeros(count, 1, 1, 1), sampled, picks).mean()
    assert share == pytest.approx(0.75, abs=0.03)


def test_a_badge_is_the_emoji_on_a_disc_of_another_colour() -> None:
    cut = torch.zeros(1, 4, 64, 64, dtype=torch.uint8)
    cut[:, :, 30:34, 30:34] = torch.tensor([0, 255, 0, 255], dtype=torch.uint8)[:, None, None]
    red, blue = COLOUR_NAMES.index("red"), COLOUR_NAMES.index("blue")
    made = badge(cut, torch.tensor([red]))[0]
    assert made[:, 31, 31].tolist() == [0, 1, 0]
    assert torch.equal(made[:, 31, 10], colour_table()[blue])
    assert torch.equal(made[:, 2, 2], colour_table()[red])
