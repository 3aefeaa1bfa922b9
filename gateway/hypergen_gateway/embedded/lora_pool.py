"""Which LoRAs have columns in the rank pool, and which of them running requests use.

Knows neither files nor engines. The columns of a LoRA need not be in a row.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

Columns = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Use:
    """A running request, and the LoRAs that it names."""

    names: frozenset[str]


@dataclass
class LoraPool:
    """The columns that LoRAs may take and give up while the model is served."""

    columns: frozenset[int]
    _held: dict[str, Columns] = field(default_factory=dict)  # the least recently used first
    _uses: set[Use] = field(default_factory=set)
    _leaving: list[tuple[Columns, set[Use]]] = field(default_factory=list)

    @property
    def held(self) -> dict[str, Columns]:
        """The LoRAs that have columns."""
        return dict(self._held)

    @property
    def free(self) -> list[int]:
        """The columns that no LoRA has, and no request uses that began when one had them."""
        self._leaving = [(columns, uses) for columns, uses in self._leaving if uses & self._uses]
        taken = {column for columns in self._held.values() for column in columns}
        taken |= {column for columns, _ in self._leaving for column in columns}
        return sorted(self.columns - taken)

    def begin(self, use: Use) -> None:
        """Keep the LoRAs of a request in the pool until it ends."""
        self._uses.add(use)
        self._touch(use)

    def end(self, use: Use) -> None:
        """The request has ended."""
        self._uses.discard(use)
        self._touch(use)

    def place(self, name: str, columns: Columns) -> None:
        """The columns hold this LoRA now."""
        self._held[name] = columns

    def remove(self, name: str) -> None:
        """The LoRA is not served any more. Its columns are free once the requests that use it have ended."""
        if name in self._held:
            self._leaving.append((self._held.pop(name), {use for use in self._uses if name in use.names}))

    def find_room(self, count: int, keep: Container[str] = ()) -> list[str] | None:
        """The LoRAs to remove for `count` free columns: as few as possible, the least recently used first.

        None if too many columns are in use. LoRAs in `keep` stay.
        """
        found, removed = len(self.free), list[str]()
        used = self._used
        for name, columns in self._held.items():
            if found >= count:
                break
            if name not in used and name not in keep:
                removed.append(name)
                found += len(columns)
        return removed if found >= count else None

    def find_due(self, count: int, keep: Container[str] = ()) -> set[str]:
        """The LoRAs that have to leave for `count` columns once no request uses them: the unused ones, then others."""
        found, due = len(self.columns) - sum(map(len, self._held.values())), set[str]()
        for name in sorted(self._held, key=self._used.__contains__):  # which keeps the order otherwise
            if found < count and name not in keep:
                due.add(name)
                found += len(self._held[name])
        return due

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these have columns."""
        return self._held.keys() >= set(names)

    @property
    def _used(self) -> set[str]:
        return {name for use in self._uses for name in use.names}

    def _touch(self, use: Use) -> None:
        for name in use.names & self._held.keys():
            self._held[name] = self._held.pop(name)
