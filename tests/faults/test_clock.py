"""A clock that is wrong, goes backwards or jumps changes no result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from audit import Fault
from disturbed import Disturbed

Disturb = Callable[..., Disturbed]
DAY = 86400
CLOCKS = {
    "a month behind": {"0": -30 * DAY},
    "an hour back in the middle": {"250": -3600},
    "back and forth": {str(at): -7200 if at % 2 else 0 for at in range(50, 900, 25)},
    "a year ahead in the middle": {"300": 365 * DAY},
}


@pytest.mark.acceptance
@pytest.mark.parametrize("name", CLOCKS)
def test_a_wrong_clock(disturb: Disturb, name: str) -> None:
    sweep = disturb(f"clock: {name}")
    ended = sweep.command(Fault(clock=CLOCKS[name]))
    sweep.count += 1
    assert ended.code == 0, ended.told[-3000:]
    sweep.end()
    again = sweep.command(Fault(clock={"0": -400 * DAY}))  # what is there is of the future
    assert "6 runs, 6 done, 0 to do" in again.told
