"""A cache of encoded texts, such as the empty negative prompt or a prompt that is repeated with another seed.

Used instead of Triton's response cache, in which even a hit takes a round trip to Triton, and which caches only whole
requests: a new prompt with the usual negative prompt would be a miss for both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from hypergen_sampler.conditioning import Array
from hypergen_sampler.prompts import EncoderInputs

Encode = Callable[[str, EncoderInputs, Sequence[str]], Awaitable[dict[str, Array]]]
Rows = dict[str, Array]


class TextCache:
    """An LRU cache of at most `max_bytes`; calls `encode` for texts that are not cached."""

    def __init__(self, encode: Encode, max_bytes: int) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._held: OrderedDict[tuple[str | bytes, ...], Rows] = OrderedDict()

    async def __call__(self, encoder: str, inputs: EncoderInputs, outputs: Sequence[str]) -> Rows:
        """Encode tokenized texts [B, L]; returns the text encoder's named outputs, such as hidden states [B, L, D].

        Every call for the same encoder must name the same inputs and outputs.
        """
        held = self._held  # what is encoded now is not for the cache after `clear`
        keys = [(encoder, *(row.tobytes() for row in rows)) for rows in zip(*inputs.values(), strict=True)]
        # Referenced here, too, as concurrent calls may evict them while new texts are encoded.
        texts = {key: held[key] for key in keys if key in held}
        new = list(dict.fromkeys(key for key in keys if key not in texts))
        if new:
            rows = [keys.index(key) for key in new]
            made = await self._encode(encoder, {name: array[rows] for name, array in inputs.items()}, outputs)
            texts |= {key: {name: made[name][row].copy() for name in outputs} for row, key in enumerate(new)}
        for key in keys:
            held[key] = texts[key]
            held.move_to_end(key)
        if new:
            self._make_room()
        return {name: np.stack([texts[key][name] for key in keys]) for name in outputs}

    def clear(self) -> None:
        """Forget all texts, also those that are being encoded, since the text encoders have changed."""
        self._held = OrderedDict()

    def _make_room(self) -> None:
        while sum(array.nbytes for rows in self._held.values() for array in rows.values()) > self._max_bytes:
            self._held.popitem(last=False)
