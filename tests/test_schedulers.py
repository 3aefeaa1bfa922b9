"""Checkpoints with every diffusers scheduler and variant of its config, compared with diffusers' pipelines.

diffusers itself reads the checkpoint, as its pipelines change the configs that they read. The reference for a scheduler
that a request selects is `X.from_config(pipeline.scheduler.config)`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hypergen_export.checkpoints.checkpoint import open_checkpoint
from hypergen_export.checkpoints.schedulers import checkpoint_schedulers
from hypergen_export.errors import UnsupportedModelError
from hypergen_sampler.request import InvalidInputError
from hypergen_sampler.schedulers import Schedulers
from support.miniature import save_miniature
from support.parity import Pair, Sampler, by_diffusers, held, held_from_image, input_image, mask, request_of, sampler_of
from support.pipelines import pipeline_of
from support.scheduler_tables import CLASSES, SERVED, schedulers_in

pytestmark = pytest.mark.claim("families")

STEPS = 6
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.fixture(scope="module")
def plain_of(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Sampler]:
    """The samplers of the miniatures whose schedulers are exchanged here."""
    return {
        family: sampler_of(save_miniature(tmp_path_factory.mktemp("plain") / family, family=family))
        for family in ("sd-1", "sdxl", "lcm")
    }


def checkpoint_with(plain: Sampler, folder: Path, config: Mapping[str, Any], index: str = "") -> Path:
    """The checkpoint with this whole scheduler_config.json; `index` names another class than that does."""
    shutil.copytree(plain.checkpoint.folder, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(config)))
    path = folder / "model_index.json"
    scheduler = ["diffusers", index or config["_class_name"]]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": scheduler}))
    return folder


def pair_with(plain: Sampler, folder: Path, steps: int = STEPS) -> Pair:
    """Ours and diffusers' of a checkpoint that differs from the plain one in its scheduler alone."""
    checkpoint = open_checkpoint(str(folder))
    schedulers = schedulers_in(checkpoint_schedulers(checkpoint, steps))
    pipeline = pipeline_of(folder, **modules_of(plain.checkpoint.folder))
    return Pair(dataclasses.replace(plain, checkpoint=checkpoint, schedulers=schedulers), pipeline)


@functools.cache
def modules_of(folder: Path) -> dict[str, Any]:
    """diffusers' modules and tokenizers of a checkpoint."""
    parts = pipeline_of(folder).components
    return {name: part for name, part in parts.items() if part is not None and name != "scheduler"}


async def assert_equals_diffusers(pair: Pair, **fields: Any) -> None:
    request = request_of(num_inference_steps=STEPS, guidance_scale=3.0, **fields)
    pair.choose(request.scheduler)
    held(await pair.sampler.generate(request), by_diffusers(pair.pipeline, request))


# What diffusers itself saves of a scheduler that it made: no more than the class knows, and its defaults.
AS_SAVED: Mapping[str, dict[str, Any]] = {
    "DDIM without clip_sample": {"_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False},
    "DDIM with clip_sample": {"_class_name": "DDIMScheduler", "clip_sample": True, "steps_offset": 1},
    "DDIM without steps_offset": {"_class_name": "DDIMScheduler", "clip_sample": False},
    "DDPM without clip_sample": {"_class_name": "DDPMScheduler"},
    "Heun with clip_sample": {"_class_name": "HeunDiscreteScheduler", "clip_sample": True},
    "DDIMParallel": {"_class_name": "DDIMParallelScheduler"},
    "DDPMParallel": {"_class_name": "DDPMParallelScheduler"},
    "PNDM without steps_offset": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "PNDM with a steps_offset of 0": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 0},
    "PNDM with Runge-Kutta steps": {"_class_name": "PNDMScheduler", "steps_offset": 0},
    "Euler with a steps_offset of 0": {
        "_class_name": "EulerDiscreteScheduler",
        "steps_offset": 0,
        "timestep_spacing": "leading",
    },
}


@pytest.mark.parametrize("config", AS_SAVED.values(), ids=AS_SAVED.keys())
async def test_an_old_config_is_amended_as_its_pipeline_amends_it(
    config: dict[str, Any], plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    plain = plain_of["sd-1"]
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", BETAS | config))
    for scheduler in ("", "ddim", "euler", "pndm"):
        # The checkpoint's own class under its name is the checkpoint's own scheduler: see below.
        if not scheduler or CLASSES[scheduler][0] != config["_class_name"]:
            await assert_equals_diffusers(pair, scheduler=scheduler)


@pytest.mark.parametrize("name", ["DDIM without steps_offset", "PNDM without steps_offset"])
async def test_an_old_config_of_sdxl_is_amended_as_its_pipeline_amends_it(
    name: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    plain = plain_of["sdxl"]
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", BETAS | AS_SAVED[name]))
    for scheduler in ("", "euler"):
        await assert_equals_diffusers(pair, scheduler=scheduler)


@pytest.mark.parametrize("config", AS_SAVED.values(), ids=AS_SAVED.keys())
async def test_an_old_config_is_amended_by_the_pipelines_that_start_from_an_image_too(
    config: dict[str, Any], plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    plain = plain_of["sd-1"]
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", BETAS | config))
    for given in (None, mask()):
        request = request_of(
            num_inference_steps=STEPS, strength=0.7, guidance_scale=3.0, image=input_image(), mask=given
        )
        await held_from_image(pair, request)


@pytest.mark.parametrize("config", [AS_SAVED["DDIM without clip_sample"], AS_SAVED["PNDM without steps_offset"]])
async def test_its_own_scheduler_under_its_name_is_the_checkpoints_own(
    config: dict[str, Any], plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    plain = plain_of["sd-1"]
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", BETAS | config))
    name = "ddim" if config["_class_name"] == "DDIMScheduler" else "pndm"
    pair.choose("")
    request = request_of(num_inference_steps=STEPS, scheduler=name)
    held(await pair.sampler.generate(request), by_diffusers(pair.pipeline, request))


@pytest.mark.parametrize(
    ("stated", "index"),
    [
        ("PNDMScheduler", "DDIMScheduler"),
        ("DDIMScheduler", "EulerAncestralDiscreteScheduler"),
        ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"),
        ("SchedulerOfMine", "UniPCMultistepScheduler"),
        (None, "DDIMScheduler"),
    ],
)
async def test_the_class_that_the_index_names_is_loaded(
    stated: str | None, index: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    plain = plain_of["sd-1"]
    config = {**BETAS, "clip_sample": False, "steps_offset": 1} | ({"_class_name": stated} if stated else {})
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", config, index))
    assert type(pair.pipeline.scheduler).__name__ == index
    for scheduler in ("", "heun"):
        await assert_equals_diffusers(pair, scheduler=scheduler)


WITHOUT_ADD_NOISE = ("DDIMInverseScheduler", "IPNDMScheduler")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("class_name", SERVED)
async def test_every_class_that_diffusers_pipeline_takes_is_served(
    class_name: str, prediction_type: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    plain = plain_of["sd-1"]
    config = {"_class_name": class_name, **BETAS, "steps_offset": 1, "prediction_type": prediction_type}
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", config))
    await assert_equals_diffusers(pair)


@pytest.mark.parametrize("class_name", SERVED)
async def test_every_class_starts_from_an_image_as_by_diffusers_or_is_rejected_for_it(
    class_name: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    plain = plain_of["sd-1"]
    config = {"_class_name": class_name, **BETAS, "steps_offset": 1}
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", config))
    for given in (None, mask()):
        request = request_of(num_inference_steps=STEPS, strength=0.7, image=input_image(), mask=given)
        if class_name in WITHOUT_ADD_NOISE:
            with pytest.raises(InvalidInputError, match="image: must be absent"):
                await pair.sampler.generate(request)
        else:
            await held_from_image(pair, request)


HABITS: Mapping[str, Mapping[str, Any]] = {
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace"},
    "zero SNR": {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
        "set_alpha_to_one": False,
    },
    "Karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "Lu": {"use_lu_lambdas": True},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "thresholding": {"thresholding": True},
    "sigma_min at last": {"final_sigmas_type": "sigma_min"},
    "no lower order at last": {"lower_order_final": False},
    "Euler at last": {"euler_at_final": True},
    "order 1": {"solver_order": 1},
    "order 3": {"solver_order": 3},
    "SDE": {"algorithm_type": "sde-dpmsolver++"},
    "log-linear": {"interpolation_type": "log_linear"},
    "continuous": {"timestep_type": "continuous"},
    "Runge-Kutta": {"skip_prk_steps": False},
    "trained betas": {"trained_betas": [0.0005 + 0.00001 * step for step in range(1000)]},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "distilled from 20": {"original_inference_steps": 20},
    "alpha to one": {"set_alpha_to_one": True},
}
# A habit -> the classes that it is tried on; others do not know it, or are refused for it.
OF_MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
HAVE: Mapping[str, tuple[str, ...]] = {
    "leading": ("EulerDiscreteScheduler", "PNDMScheduler", *OF_MULTISTEP),
    "trailing": ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler", *OF_MULTISTEP),
    "linspace": ("DDIMScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "DDPMScheduler"),
    "zero SNR": ("DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", *OF_MULTISTEP),
    "Karras": ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DEISMultistepScheduler", *OF_MULTISTEP),
    "exponential": ("EulerDiscreteScheduler", "HeunDiscreteScheduler", *OF_MULTISTEP),
    "Lu": ("DPMSolverMultistepScheduler",),
    "flow": ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"),
    "thresholding": ("DDIMScheduler", *OF_MULTISTEP),
    "sigma_min at last": ("EulerDiscreteScheduler", *OF_MULTISTEP),
    "no lower order at last": ("DPMSolverMultistepScheduler",),
    "Euler at last": ("DPMSolverMultistepScheduler",),
    "order 1": OF_MULTISTEP,
    "order 3": OF_MULTISTEP,
    "SDE": ("DPMSolverMultistepScheduler",),
    "log-linear": ("EulerDiscreteScheduler",),
    "continuous": ("EulerDiscreteScheduler",),
    "Runge-Kutta": ("PNDMScheduler",),
    "trained betas": ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"),
    "cosine": ("DDPMScheduler", "EulerDiscreteScheduler"),
    "distilled from 20": ("LCMScheduler", "TCDScheduler"),
    "alpha to one": ("DDIMScheduler", "PNDMScheduler"),
}


@pytest.mark.parametrize(("habit", "class_name"), [(habit, name) for habit, names in HAVE.items() for name in names])
async def test_every_habit_of_a_config_is_diffusers(
    habit: str, class_name: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    plain = plain_of["sd-1"]
    config = {"_class_name": class_name, **BETAS, "steps_offset": 1, **HABITS[habit]}
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", config))
    await assert_equals_diffusers(pair)
    # What another scheduler takes over of the habit is the same whichever of the classes had it.
    for name in ("dpmpp_2m", "euler_a") if class_name == HAVE[habit][0] else ():
        if name in pair.sampler.schedulers.names and CLASSES[name][0] != class_name:
            await assert_equals_diffusers(pair, scheduler=name)


@pytest.mark.parametrize("name", ["deis", "dpmpp_2m", "dpmpp_2m_karras"])
@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"},
        {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "EulerDiscreteScheduler", "use_exponential_sigmas": True},
    ],
    ids=["deis", "sde", "exponential"],
)
async def test_an_override_whose_class_refuses_the_checkpoints_solver_takes_its_own(
    config: dict[str, Any], name: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    plain = plain_of["sd-1"]
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", BETAS | config))
    ours = await pair.sampler.generate(request_of(num_inference_steps=STEPS, scheduler=name))
    class_name, overrides = CLASSES[name]
    if class_name == config["_class_name"] and not overrides:
        return
    import diffusers

    kind = getattr(diffusers, class_name)
    try:
        pair.pipeline.scheduler = kind.from_config(pair.pipeline.scheduler.config, **overrides)
    except (ValueError, NotImplementedError):
        pair.pipeline.scheduler = kind(**BETAS, **overrides)
    held(ours, by_diffusers(pair.pipeline, request_of(num_inference_steps=STEPS)))


OPTIONS: tuple[dict[str, Any], ...] = (
    {"scheduler": "euler", "timestep_spacing": "trailing"},
    {"scheduler": "euler", "sigmas": "karras"},
    {"scheduler": "dpmpp_2m", "sigmas": "exponential"},
    {"scheduler": "dpmpp_2m_karras", "sigmas": "exponential", "timestep_spacing": "linspace"},
    {"scheduler": "dpmpp_2m_sde", "sigmas": "karras"},
    {"scheduler": "dpmpp_sde", "sigmas": "karras"},
    {"scheduler": "ddim", "eta": 0.6, "timestep_spacing": "trailing"},
    {"scheduler": "ddim", "guidance_rescale": 0.7},
    {"scheduler": "", "timestep_spacing": "trailing"},
)


@pytest.mark.parametrize("fields", OPTIONS, ids=lambda fields: " ".join(map(str, fields.values())))
@pytest.mark.parametrize("family", ["sd-1", "sdxl"])
async def test_options_of_a_scheduler_are_those_of_diffusers(
    family: str, fields: dict[str, Any], plain_of: Mapping[str, Sampler]
) -> None:
    plain = plain_of[family]
    pair = Pair(plain, pipeline_of(plain.checkpoint.folder))
    request = request_of(num_inference_steps=STEPS, guidance_scale=3.0, **fields)
    ours = await plain.generate(request)
    pair.choose(request.scheduler)
    spaced = {"timestep_spacing": request.timestep_spacing} if request.timestep_spacing else {}
    sigmas = {f"use_{kind}_sigmas": kind == request.sigmas for kind in ("karras", "exponential") if request.sigmas}
    pair.pipeline.scheduler = type(pair.pipeline.scheduler).from_config(
        pair.pipeline.scheduler.config, **spaced, **sigmas
    )
    held(ours, by_diffusers(pair.pipeline, request))
    plainly = request_of(num_inference_steps=STEPS, guidance_scale=3.0, scheduler=request.scheduler)
    without, _ = await plain.generate(plainly)
    assert np.abs(without - ours[0]).max() > 1e-3 * np.abs(without).max(), "the options change nothing"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"scheduler": "ddim", "sigmas": "karras"}, "sigmas: must be absent, as the scheduler has no choice"),
        ({"scheduler": "euler", "eta": 0.5}, "eta: must be absent or 0, as the scheduler takes none"),
        ({"scheduler": "euler_a", "sigmas": "exponential"}, "sigmas: must be absent"),
        ({"scheduler": "lcm", "timestep_spacing": "trailing"}, "timestep_spacing: must be absent"),
        ({"scheduler": "tcd", "timestep_spacing": "linspace"}, "timestep_spacing: must be absent"),
    ],
)
async def test_an_option_that_a_scheduler_lacks_is_refused(
    fields: dict[str, Any], words: str, plain_of: Mapping[str, Sampler]
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        await plain_of["sd-1"].generate(request_of(**fields))


@pytest.mark.parametrize("name", sorted(CLASSES))
async def test_betas_that_the_config_leaves_to_its_class_are_every_schedulers(
    name: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    """PNDM's of its own are linear from 0.0001; LCM's, Heun's and TCD's are not."""
    import diffusers

    plain = plain_of["sd-1"]
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "steps_offset": 1}
    pair = pair_with(plain, checkpoint_with(plain, tmp_path / "changed", config))
    class_name, overrides = CLASSES[name]
    linear = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
    kind = getattr(diffusers, class_name)
    pair.pipeline.scheduler = kind.from_config(pair.pipeline.scheduler.config, **linear, **overrides)
    request = request_of(num_inference_steps=STEPS, scheduler=name)
    held(await pair.sampler.generate(request), by_diffusers(pair.pipeline, request))


@pytest.mark.parametrize("class_name", ["EDMEulerScheduler", "CMStochasticIterativeScheduler", "IPNDMScheduler"])
def test_where_no_betas_are_known_only_the_checkpoints_own_scheduler_is_offered(
    class_name: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    folder = checkpoint_with(plain_of["sd-1"], tmp_path / "changed", {"_class_name": class_name})
    table = checkpoint_schedulers(open_checkpoint(str(folder)), STEPS)
    assert table.names == (table.own_name,) == (class_name,)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "DPMSolverSDEScheduler"}, "not installed: pip install torchsde"),
        ({"_class_name": "CosineDPMSolverMultistepScheduler"}, "not installed: pip install torchsde"),
        ({"_class_name": "SchedulerOfMine"}, "has no such scheduler"),
        ({"_class_name": "UNet2DConditionModel"}, "has no such scheduler"),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, "install scipy"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "it has no init_noise_sigma"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "it has no init_noise_sigma"),
        ({"_class_name": "DDPMWuerstchenScheduler"}, "it has no order"),
        ({"_class_name": "KarrasVeScheduler"}, "KarrasVeScheduler cannot be served: "),
        ({"_class_name": "AmusedScheduler"}, "AmusedScheduler cannot be served: "),
        ({"_class_name": "PNDMScheduler", "prediction_type": "sample"}, "prediction_type given as sample"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "sigmoid"}, "sigmoid"),
        ({"_class_name": "DDIMScheduler", "num_train_timesteps": 4}, "cannot be served: "),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "final_sigmas_type"),
    ],
)
def test_what_cannot_be_served_is_one_line_at_export(
    config: dict[str, Any], said: str, plain_of: Mapping[str, Sampler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other packages of the tests bring scipy; nothing brings torchsde.
    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_discrete.is_scipy_available", lambda: False)
    folder = checkpoint_with(plain_of["sd-1"], tmp_path / "changed", config)
    with pytest.raises(UnsupportedModelError) as refusal:
        checkpoint_schedulers(open_checkpoint(str(folder)), STEPS)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("scheduler", [None, [None, None], ["my_library", "DDIMScheduler"], ["diffusers", None]])
def test_an_index_without_a_scheduler_of_diffusers_is_refused(
    scheduler: Any, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    folder = checkpoint_with(plain_of["sd-1"], tmp_path / "changed", {"_class_name": "DDIMScheduler"})
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scheduler": scheduler}))
    with pytest.raises(UnsupportedModelError, match=r"its scheduler is .*, but only those of diffusers are supported"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"_class_name": "DDIMScheduler"}, "ddim"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "dpmpp_2m"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}, "dpmpp_2m_karras"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "DPMSolverMultistepScheduler",
        ),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
    ],
)
def test_the_checkpoints_own_scheduler_is_called_as_requests_call_it_or_by_its_class(
    config: dict[str, Any], name: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    folder = checkpoint_with(plain_of["sd-1"], tmp_path / "changed", config)
    table = checkpoint_schedulers(open_checkpoint(str(folder)), STEPS)
    assert table.own_name == name
    assert table.schedulers[name] == table.schedulers[""]


@pytest.mark.parametrize("class_name", SERVED)
def test_what_is_offered_takes_any_number_of_steps_or_refuses_it(
    class_name: str, plain_of: Mapping[str, Sampler], tmp_path: Path
) -> None:
    """`make` takes all steps once, and finds what fails or is not finite."""
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        config = {"_class_name": class_name, **BETAS, "steps_offset": 1, "prediction_type": prediction_type}
        folder = checkpoint_with(plain_of["sd-1"], tmp_path / prediction_type, config)
        try:
            schedulers = schedulers_in(checkpoint_schedulers(open_checkpoint(str(folder)), 20))
        except UnsupportedModelError:
            assert prediction_type == "sample", "diffusers takes the others with every class"
            continue
        # Others are made of the same configuration whatever the class: one class shows them.
        names = schedulers.names if class_name in ("DDIMScheduler", "PNDMScheduler") else ("",)
        refused = {(name, steps) for name in names for steps in (1, 2, 3, 20) if not takes(schedulers, name, steps)}
        # Runge-Kutta's begins with four steps where the config does not skip them.
        runge_kutta = {"pndm", ""} if class_name == "PNDMScheduler" else {"pndm"}
        assert refused <= {(name, steps) for name in runge_kutta for steps in (1, 2, 3)}


def takes(schedulers: Schedulers, name: str, steps: int) -> bool:
    try:
        schedulers.make(name, steps=steps)
    except InvalidInputError:
        return False
    return True
