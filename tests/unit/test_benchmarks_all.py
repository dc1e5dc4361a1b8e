"""jobs/benchmarks/all.py: what its ratios are compared with, and that an error is a row."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "jobs/benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("all")


def figures(script: Any, **changed: Any) -> dict[str, dict[str, Any]]:
    """Return figures with which each ratio is 1, but for what is changed."""
    return {name: {"seconds": 1.0, "peak_gib": 8.0} for name in script.VARIANTS} | changed


def test_a_ratio_that_fell_more_than_5_percent_is_named(script: Any) -> None:
    found = figures(script, fp8={"seconds": 0.8, "peak_gib": 8.0})
    table, wrong = script.compare(found, {"FP8": 1.32, "FP8, memory": 1.04, "QAT int4": 0.9})
    assert wrong == ["FP8 fell by 5.3 %"]
    assert "FP8                                  1.250   1.320    -5.3%  fell" in table
    assert "FP8, memory                          1.000   1.040    -3.8%\n" in table


def test_larger_is_better_for_memory_too(script: Any) -> None:
    found = figures(script, chunked={"seconds": 1.0, "peak_gib": 2.0})
    assert script.ratios_of(found)["chunked loss, memory"] == 4.0


def test_a_variant_that_failed_is_a_row_with_its_error(script: Any) -> None:
    found = figures(script, chunked={"error": "Traceback\nOutOfMemoryError: 80 GiB"})
    table, wrong = script.compare(found, {"chunked loss": 1.1})
    assert "chunked loss                                 1.100  OutOfMemoryError: 80 GiB" in table
    assert wrong == ["chunked loss was not measured", "chunked loss, memory was not measured"]


def test_a_stored_ratio_without_a_figure_is_wrong(script: Any) -> None:
    found = figures(script, chunked={"seconds": 1.0, "peak_gib": 0.0})
    assert script.compare(found, {"chunked loss, memory": 1.1})[1] == [
        "chunked loss, memory was not measured"
    ]


def test_each_ratio_is_of_variants_that_are_measured(script: Any) -> None:
    assert {v for ratio in script.RATIOS.values() for v in ratio[:2]} == set(script.VARIANTS)


def test_the_next_variants_are_measured_in_another_process_after_a_failure(
    script: Any, tmp_path: Path
) -> None:
    started = []

    class Failing(script.Run):  # type: ignore[misc]
        def _in_a_process(self, names: list[str], left_s: float) -> str:
            started.append(names)
            for name in names:
                if name == "fp8":
                    return "CUDA error"
                self._keep(name, {"seconds": 1.0})
            return ""

    run = Failing("tiny", 60, tmp_path / "out.json")
    run.measure(["bf16", "fp8", "qat int4"])
    assert started == [["bf16", "fp8", "qat int4"], ["qat int4"]]
    assert run.figures["fp8"] == {"error": "CUDA error"}
    assert json.loads((tmp_path / "out.json").read_text())["ratios"] == {"QAT int4": 1.0}


def test_what_no_time_is_left_for_is_not_begun(script: Any) -> None:
    run = script.Run("tiny", 0, None)
    run.measure(["bf16", "fp8"])
    assert run.figures["fp8"] == {"error": "not measured: 0 s were over"}


def test_a_gpu_without_stored_ratios_fails(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Done(script.Run):  # type: ignore[misc]
        def measure(self, names: list[str]) -> None:
            self.head = {"device": "NVIDIA H200"}
            self.figures = figures(script, fp8={"seconds": seconds, "peak_gib": 8.0})

    monkeypatch.setattr(script, "Run", Done)
    arguments = ["all.py", "--quick", "--results", str(tmp_path / "all_quick.json")]
    monkeypatch.setattr("sys.argv", arguments)
    seconds = 0.8
    with pytest.raises(SystemExit, match="nothing is stored for NVIDIA H200"):
        script.main()
    monkeypatch.setattr("sys.argv", [*arguments, "--store"])
    script.main()
    stored = json.loads((tmp_path / "all_quick.json").read_text())
    assert stored["command"] == "python jobs/benchmarks/all.py --quick --store"
    monkeypatch.setattr("sys.argv", arguments)
    script.main()
    seconds = 0.9
    with pytest.raises(SystemExit, match=r"FP8 fell by 11\.1 %"):
        script.main()


def test_nothing_is_stored_where_nothing_was_measured(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.Run, "measure", lambda self, names: None)
    file = tmp_path / "all_full.json"
    monkeypatch.setattr("sys.argv", ["all.py", "--store", "--results", str(file)])
    with pytest.raises(SystemExit, match="nothing was measured, and nothing is stored"):
        script.main()
    assert not file.exists()
