"""Names of stable-diffusion-webui, and the classes that diffusers' documentation gives for them."""

from __future__ import annotations

import pytest

from hypergen_gateway.api.scheduler_names import scheduler_of


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DPM++ 2M Karras", ("dpmpp_2m", "karras")),
        ("DPM++ 2M SDE Exponential", ("dpmpp_2m_sde", "exponential")),
        ("DPM++ SDE", ("dpmpp_sde", None)),
        ("DPM2 a Karras", ("DPM2 a Karras", None)),
        ("Euler a", ("euler_a", None)),
        ("euler  A", ("euler_a", None)),
        ("PLMS", ("pndm", None)),
        ("euler_a", ("euler_a", None)),
        ("dpmpp_2m_karras", ("dpmpp_2m_karras", None)),
        ("Karras", ("Karras", None)),
        ("magic Karras", ("magic Karras", None)),
        ("", ("", None)),
        (None, (None, None)),
    ],
)
def test_a_name_is_the_scheduler_that_people_mean(name: str | None, meant: tuple[str | None, str | None]) -> None:
    assert scheduler_of(name) == meant
