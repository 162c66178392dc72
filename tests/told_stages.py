"""What a listener was told of stages, checked: each begins before anything of it, never goes back, and ends."""

from __future__ import annotations

from collections.abc import Sequence

from ckptdiff.events import Event, StageBegun, StageProgress


def told_stages(events: Sequence[Event]) -> dict[str, list[StageProgress]]:
    """Each stage that was told, with its progress; of one that came twice, the last."""
    stages: dict[str, list[StageProgress]] = {}
    begun: StageBegun | None = None
    for event in events:
        if isinstance(event, StageBegun):
            _assert_ended(begun, stages)
            begun, stages[event.stage] = event, []
        elif isinstance(event, StageProgress):
            assert begun is not None and event.stage == begun.stage
            before = stages[event.stage][-1] if stages[event.stage] else StageProgress(event.stage, 0)
            assert before.done <= event.done <= begun.total
            assert before.done < begun.total or begun.total == 0, "it ended before"
            stages[event.stage].append(event)
    _assert_ended(begun, stages)
    return stages


def _assert_ended(begun: StageBegun | None, stages: dict[str, list[StageProgress]]) -> None:
    if begun is not None:
        assert stages[begun.stage] and stages[begun.stage][-1].done == begun.total, begun
