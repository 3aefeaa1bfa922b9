"""What the text encoders are asked, and what is at hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from hypergen_sampler.conditioning import Array
from hypergen_sampler.prompts import EncoderInputs
from hypergen_sampler.text_cache import TextCache

STATES = ["encoder_hidden_states"]
EMPTY, CAT, DOG = [0, 0, 0], [1, 2, 0], [3, 0, 0]


class Encoder:
    """Text encoders whose hidden states are the ids, and of one of them ten more; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[list[int]]]] = []

    async def __call__(self, model: str, inputs: EncoderInputs, outputs: Sequence[str]) -> dict[str, Array]:
        ids = inputs["input_ids"]
        self.asked.append((model, ids.tolist()))
        await asyncio.sleep(0)
        return {name: ids[:, :, None].astype(np.float32) + 10 * (model == "other") for name in outputs}


def states(cache: TextCache, *texts: list[int], model: str = "one") -> list[list[float]]:
    answer = asyncio.run(cache(model, {"input_ids": np.array(texts, dtype=np.int32)}, STATES))
    made: list[list[float]] = answer["encoder_hidden_states"][:, :, 0].tolist()
    return made


def test_only_new_texts_are_encoded_and_the_order_is_the_asker_s() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, 1000)
    assert states(cache, EMPTY, CAT) == [EMPTY, CAT]
    assert states(cache, DOG, EMPTY) == [DOG, EMPTY]
    assert states(cache, EMPTY, CAT) == [EMPTY, CAT]
    assert encoder.asked == [("one", [EMPTY, CAT]), ("one", [DOG])]


def test_a_text_twice_in_one_call_is_encoded_once() -> None:
    encoder = Encoder()
    assert states(TextCache(encoder, 1000), CAT, CAT) == [CAT, CAT]
    assert encoder.asked == [("one", [CAT])]


def test_each_model_has_its_own() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, 1000)
    assert states(cache, CAT) == [CAT]
    assert states(cache, CAT, model="other") == [[11, 12, 10]]
    assert len(encoder.asked) == 2


def test_what_was_not_asked_for_the_longest_makes_room() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, 2 * 3 * 4)  # two texts of three float32
    states(cache, EMPTY, CAT)
    states(cache, EMPTY, DOG)
    assert states(cache, EMPTY, DOG) == [EMPTY, DOG]
    assert states(cache, CAT) == [CAT]
    assert encoder.asked == [("one", [EMPTY, CAT]), ("one", [DOG]), ("one", [CAT])]


def test_a_cache_too_small_for_one_call_answers_all_the_same() -> None:
    assert states(TextCache(Encoder(), 1), EMPTY, CAT) == [EMPTY, CAT]


def test_what_is_encoded_while_the_encoders_change_is_not_kept() -> None:
    encoder = Encoder()
    cache = TextCache(encoder, 1000)
    cat = {"input_ids": np.array([CAT], dtype=np.int32)}

    async def change_meanwhile() -> None:
        encoding = asyncio.create_task(cache("one", cat, STATES))
        await asyncio.sleep(0)
        assert encoder.asked == [("one", [CAT])]
        cache.clear()
        await encoding

    asyncio.run(change_meanwhile())
    assert states(cache, CAT) == [CAT]
    assert len(encoder.asked) == 2
