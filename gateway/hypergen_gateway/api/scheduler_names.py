"""The names that AUTOMATIC1111's stable-diffusion-webui has for schedulers.

Which of diffusers' schedulers each is, is from the table "Schedulers" of diffusers' documentation
(`docs/source/en/api/schedulers/overview.md`). A name may end in how sigmas are spaced, as in "DPM++ 2M Karras".
"""

from __future__ import annotations

_NAMES = {
    "ddim": "ddim",
    "dpm++ 2m": "dpmpp_2m",
    "dpm++ 2m sde": "dpmpp_2m_sde",
    "dpm++ sde": "dpmpp_sde",
    "euler": "euler",
    "euler a": "euler_a",
    "heun": "heun",
    "lcm": "lcm",
    "plms": "pndm",
    "unipc": "unipc",
}
_SIGMAS = ("karras", "exponential", "beta")


def scheduler_of(name: str | None) -> tuple[str | None, str | None]:
    """The scheduler that is meant, under our name, and the sigmas that the name implies; others are returned as is."""
    if name is None:
        return None, None
    words = name.lower().split()
    sigmas = words.pop() if len(words) > 1 and words[-1] in _SIGMAS else None
    known = _NAMES.get(" ".join(words))
    return (name, None) if known is None else (known, sigmas)
