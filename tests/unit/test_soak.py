"""What a soak takes for growth."""

from __future__ import annotations

from tests.soak import grown, growth


def _measured(files: list[float]) -> list[dict[str, float]]:
    return [
        {"hour": hour, "step": 720 * hour, "minutes": hour, "resident_mib": 500.0, "files": files}
        for hour, files in enumerate(files, 1)
    ]


def test_a_file_more_each_few_hours_is_growth_and_one_that_comes_and_goes_is_none() -> None:
    assert growth(_measured([6 + hour // 3 for hour in range(24)]))["files"] > 6
    assert grown(growth(_measured([6 + hour // 3 for hour in range(24)]))) == ["files"]
    assert grown(growth(_measured([6 + hour % 2 for hour in range(24)]))) == []
    assert grown(growth(_measured([1, 3, *[6] * 22]))) == []  # it warms up
