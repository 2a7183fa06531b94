"""When times are believed."""

import pytest

from pruner.timing import Timing, too_busy


def test_a_single_slow_round_does_no_harm() -> None:
    timing = Timing((1.0, 1.01, 0.99, 1.0, 9.0, 1.0, 1.02))
    assert timing.seconds == 1.0 and timing.spread < 0.05
    assert too_busy({"a": timing}, {"a": 1}) is None
    assert timing.to_json() == {"seconds": 1.0, "rounds": 7, "spread": timing.spread}


@pytest.mark.parametrize(("slower", "busy"), [(1.1, False), (1.3, True)])
def test_equal_shapes_take_equal_time(slower: float, busy: bool) -> None:
    timings = {"sheared": Timing((1.0, 1.0)), "trained": Timing((slower, slower))}
    reason = too_busy(timings, {"sheared": 7, "trained": 7})
    assert (reason is not None) == busy
    if reason is not None:
        assert "sheared and trained, of one shape, differ by 30% (limit 20%)" in reason
    assert too_busy(timings, {"sheared": 7, "trained": 8}) is None


def test_rounds_that_wander_are_named() -> None:
    reason = too_busy(
        {"source": Timing((1.0, 1.5, 1.0, 1.5)), "b": Timing((1.0,))}, {"source": 1, "b": 2}
    )
    assert reason == "too busy to time: source: its rounds differ by 40% (limit 20%)"
