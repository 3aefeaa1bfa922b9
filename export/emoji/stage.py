"""One stage of training: a plan, modules that descend by it, their running averages, and its file on the disk.

Knows optimisers, processes and how to resume; knows nothing of images, captions or what a loss means. Hidden matrices
are stepped by Muon (Jordan and others, 2024), each process orthogonalising its share of them; the rest by AdamW, which
alone needed several times as many images for the same loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from pytorch_optimizer import Muon
from pytorch_optimizer.optimizer.utils.matrix import zero_power_via_gram_newton_schulz
from torch import Tensor, nn
from tqdm import tqdm

# Layers at the edges of a network and tables; their weights are no maps between hidden states.
EDGES = ("conv_in", "conv_out", "quant_conv", "embed", "final_layer", "adaLN", "pad_token", "emoji", "colour")


@dataclass(frozen=True)
class Plan:
    """How one stage is trained: the learning rates of hidden matrices (Muon's) and of the rest (AdamW's).

    They rise over `warmup` steps and fall as a cosine to a hundredth.
    """

    name: str
    steps: int
    peak: float
    rest_peak: float
    batch: int
    warmup: int = 50
    average: float = 0.998
    save_steps: int = 200

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def random_of(plan: Plan, seed: int, step: int) -> Random:
    """Python's generator of one step and process; torch's is seeded with it, so resuming changes nothing."""
    random = Random(f"{seed}/{plan.name}/{step}/{dist.get_rank()}")
    torch.manual_seed(random.getrandbits(62))
    return random


def share(plan: Plan) -> int:
    """Of a batch, the images that fall to one process."""
    return plan.batch // dist.get_world_size()


class SinglePrecisionMuon(Muon):
    """The library's Muon, orthogonalising in float32: on processors without bfloat16 that is many times faster."""

    @staticmethod
    def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
        return [
            zero_power_via_gram_newton_schulz(one.flatten(1), num_steps=group["ns_steps"], dtype=torch.float32)
            for one in updates
        ]


def hidden_matrices(modules: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: weights that map hidden states to hidden states."""
    named = modules.named_parameters()
    return [value for name, value in named if value.ndim > 1 and not any(edge in name for edge in EDGES)]


def shares_of(matrices: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The matrices each process orthogonalises, so that all take about the same time."""
    shares: list[list[nn.Parameter]] = [[] for _ in range(dist.get_world_size())]
    costs = [0] * len(shares)
    for value in sorted(matrices, key=orthogonalising_cost, reverse=True):
        least = costs.index(min(costs))
        shares[least].append(value)
        costs[least] += orthogonalising_cost(value)
    return shares


def orthogonalising_cost(value: Tensor) -> int:
    rows, columns = sorted((len(value), value.numel() // len(value)))
    return rows * rows * (columns + 8 * rows)


class Stage:
    """The state of one stage: modules, their running averages, the optimiser and the number of steps taken."""

    def __init__(self, folder: Path, plan: Plan, modules: nn.ModuleDict) -> None:
        self.plan = plan
        self.modules = modules
        self.averages = copy.deepcopy(modules).requires_grad_(False).eval()
        self.step = 0
        self._file = folder / f"{plan.name}.pt"
        matrices = hidden_matrices(modules)
        chosen = {id(value) for value in matrices}
        rest = [value for value in modules.parameters() if id(value) not in chosen]
        self._shares = shares_of(matrices)
        groups = [
            {"params": self._shares[dist.get_rank()], "lr": plan.peak, "weight_decay": 0.01, "use_muon": True},
            {"params": rest, "lr": plan.rest_peak, "weight_decay": 0.01, "betas": (0.9, 0.99), "use_muon": False},
        ]
        self._optimizer = SinglePrecisionMuon(groups)
        if self._file.exists():
            self._restore(torch.load(self._file, weights_only=True))
        for value in [*modules.parameters(), *self.averages.parameters()]:
            dist.broadcast(value.data, 0)

    def _restore(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        self.modules.load_state_dict(state["modules"])
        self.averages.load_state_dict(state["averages"])
        self._optimizer.load_state_dict(state["optimizers"][dist.get_rank()])

    def save(self) -> None:
        """Written beside and renamed: an interrupted save leaves the last one whole."""
        optimizers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(optimizers, self._optimizer.state_dict())
        if dist.get_rank() > 0:
            return
        state = {
            "step": self.step,
            "modules": self.modules.state_dict(),
            "averages": self.averages.state_dict(),
            "optimizers": optimizers,
        }
        beside = self._file.with_suffix(".new")
        torch.save(state, beside)
        beside.replace(self._file)

    def run(self, loss_of: Callable[[int], Tensor], saved: Callable[[], None] = lambda: None) -> nn.ModuleDict:
        """Takes the steps that are left and returns the averaged modules; `saved` is called after every save."""
        first = dist.get_rank() == 0
        bar = tqdm(initial=self.step, total=self.plan.steps, desc=self.plan.name, mininterval=5, disable=not first)
        smooth = 0.0
        while self.step < self.plan.steps:
            loss = loss_of(self.step)
            self._descend(loss)
            smooth = 0.98 * smooth + 0.02 * loss.item() if smooth else loss.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            if self.step % self.plan.save_steps == 0 or self.step == self.plan.steps:
                self.save()
                if first:
                    saved()
        return self.averages

    def _descend(self, loss: Tensor) -> None:
        factor = self.plan.factor(self.step)
        for group, peak in zip(self._optimizer.param_groups, (self.plan.peak, self.plan.rest_peak), strict=True):
            group["lr"] = peak * factor
        self.modules.zero_grad(set_to_none=True)
        loss.backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self._optimizer.step()
        self._share_matrices()
        self.step += 1
        self._average()

    def _share_gradients(self) -> None:
        gradients = [value.grad for value in self.modules.parameters() if value.grad is not None]
        together = torch.cat([one.flatten() for one in gradients])
        dist.all_reduce(together)
        parts = (together / dist.get_world_size()).split([one.numel() for one in gradients])
        for one, part in zip(gradients, parts, strict=True):
            one.copy_(part.view_as(one))

    @torch.no_grad()
    def _share_matrices(self) -> None:
        """Each process sends the matrices that it has stepped to the others."""
        for rank, share in enumerate(self._shares):
            together = torch.cat([one.flatten() for one in share])
            dist.broadcast(together, rank)
            for one, part in zip(share, together.split([one.numel() for one in share]), strict=True):
                one.copy_(part.view_as(one))

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.plan.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.averages.parameters()), list(self.modules.parameters()), 1 - decay)
