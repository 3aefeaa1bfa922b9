"""A cache of encoded texts: the empty negative prompt, or a prompt that is repeated with another seed.

Kept here rather than in Triton's response cache, whose hit is still a round trip to Triton, and which knows only whole
requests: a new prompt with the usual negative one would be a miss for both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
import numpy.typing as npt

from hypergen_sampler.conditioning import Array

Encode = Callable[[str, npt.NDArray[np.int32], Sequence[str]], Awaitable[dict[str, Array]]]
Rows = dict[str, Array]


class TextCache:
    """Asks `encode` for the texts that it does not hold; of those it does, the latest `max_bytes` stay."""

    def __init__(self, encode: Encode, max_bytes: int) -> None:
        self._encode = encode
        self._max_bytes = max_bytes
        self._held: OrderedDict[tuple[str, bytes], Rows] = OrderedDict()

    async def __call__(self, encoder: str, input_ids: npt.NDArray[np.int32], outputs: Sequence[str]) -> Rows:
        """[B, L] token ids to the named outputs of the model of a text encoder, such as hidden states [B, L, D].

        An encoder must always be asked for the same outputs.
        """
        keys = [(encoder, ids.tobytes()) for ids in input_ids]
        # Held here as well: while new ones are encoded, others may push them out.
        texts = {key: self._held[key] for key in keys if key in self._held}
        new = list(dict.fromkeys(key for key in keys if key not in texts))
        if new:
            ids = np.stack([input_ids[keys.index(key)] for key in new])
            made = await self._encode(encoder, ids, outputs)
            texts |= {key: {name: made[name][row].copy() for name in outputs} for row, key in enumerate(new)}
        for key in keys:
            self._held[key] = texts[key]
            self._held.move_to_end(key)
        if new:
            self._make_room()
        return {name: np.stack([texts[key][name] for key in keys]) for name in outputs}

    def _make_room(self) -> None:
        while sum(array.nbytes for rows in self._held.values() for array in rows.values()) > self._max_bytes:
            self._held.popitem(last=False)
