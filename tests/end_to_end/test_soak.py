"""The short form of tests/benchmarks/soak.py: what is held stays flat once all shapes were seen; no request is lost."""

from __future__ import annotations

import pytest

from benchmarks.mixed_load import touch_every_shape
from benchmarks.soak import Series, soak, table, theil_sen, verdict
from support.running_server import Server

SECONDS = 36.0
IN_FLIGHT = 4
# In half of so short a time pools still fill, MiB and threads; what every request leaves is seen.
GROWTH = {"memory": 16.0, "shared memory": 4.0, "threads": 8.0}


async def test_what_a_server_holds_does_not_grow_under_mixed_load(server: Server) -> None:
    # Engines keep something for each shape that they see for the first time.
    await touch_every_shape(server)
    series, outcomes = await soak(server, SECONDS, IN_FLIGHT)
    print(f"{table(series)}\n\n{verdict(series, outcomes)}")
    assert not outcomes.lost
    assert outcomes.total > 50
    assert not [
        f"{each.kind} of {each.name}: {each.growth:+.1f}" for each in series if each.growth > GROWTH.get(each.kind, 1.0)
    ]


def test_the_slope_is_that_of_most_samples() -> None:
    times = [float(second) for second in range(100)]
    assert theil_sen(times, [3 * second for second in times]) == pytest.approx(3)
    spiky = [1000.0 if second % 10 == 0 else 2 * second for second in times]
    assert theil_sen(times, spiky) == pytest.approx(2, abs=0.05)
    assert theil_sen([0.0], [1.0]) == 0


def test_warming_up_is_no_growth() -> None:
    times = [float(second) for second in range(200)]
    series = Series("memory", "unet", times, [min(second, 90.0) for second in times])
    assert not series.grows
    assert Series("handles", "gateway", times, [second / 50 for second in times]).grows
