"""The compatibility matrix is the features' own rules, and names tests that are there."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from raytrain_adv import cli
from raytrain_adv.config import JobConfig, Section, compatibility, load
from raytrain_adv.config.compatibility import Cell
from raytrain_adv.config.explain import explain
from raytrain_adv.errors import JobError
from raytrain_adv.transforms import Transform, discover
from tests.matrix_runs import TOGETHER

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "compatibility.md"
SMALLEST = {"model_name_or_path": "m", "dataset": "d.json", "output_dir": "o"}
REFUSED = [cell for cell in compatibility.cells() if cell.verdict == "no"]
CAREFUL = [cell for cell in compatibility.cells() if cell.verdict == "careful"]


def loaded(folder: Path, **keys: Any) -> JobConfig:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({**SMALLEST, "finetuning_type": "full", **keys}))
    return load(path)


def refusal(folder: Path, **keys: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        loaded(folder, **keys)
    return caught.value


def together(cell: Cell) -> dict[str, Any]:
    return {key: value for one in cell.features for key, value in one.keys.items()}


@pytest.mark.parametrize("cell", REFUSED, ids=lambda cell: cell.slug)
def test_it_is_refused_with_both_keys(cell: Cell, tmp_path: Path) -> None:
    error = refusal(tmp_path, **together(cell))
    (line,) = [line for line in error.found.splitlines() if cell.reason in line]
    for key in cell.keys:
        assert key in line and f"{key}: " in error.fix


@pytest.mark.parametrize("cell", CAREFUL, ids=lambda cell: cell.slug)
def test_it_is_told_that_both_need_care(cell: Cell, tmp_path: Path) -> None:
    keys = together(cell) | TOGETHER.get(frozenset(one.slug for one in cell.features), {})
    (note,) = [note for note in loaded(tmp_path, **keys).notes if cell.reason in note]
    assert all(key in note for key in cell.keys)


def test_all_conflicts_are_found_at_once_with_their_lines_and_ways_out(tmp_path: Path) -> None:
    keys = {"enable_qat": True, "finetuning_type": "lora", "use_dora": True}
    error = refusal(tmp_path, **keys, pure_bf16=True, loss_kernel="liger", use_cpu=True)
    for pair in (
        "use_dora and enable_qat",
        "pure_bf16 and finetuning_type",
        "loss_kernel and use_cpu",
    ):
        assert f"{pair}: " in error.found and pair in error.fix
    assert "set use_dora: false, or enable_qat: false" in error.fix
    lines = error.found.splitlines()
    assert len(lines) == 3 and all("line " in line for line in lines)


def test_every_transform_shows_how_it_is_tried() -> None:
    for feature in compatibility.features():
        assert feature.keys, f"{feature.title} has no tried_with"
        if issubclass(feature.kind, Transform):
            own = {k: v for k, v in feature.keys.items() if k in feature.kind.model_fields}
            assert feature.kind.model_validate(own).enabled, feature.title
            assert not feature.kind.model_fields.keys().isdisjoint(own)


def test_every_rule_is_about_a_key_that_there_is() -> None:
    owned = {key for one in compatibility.features() for key in one.kind.model_fields}
    for feature in compatibility.features():
        rules = {**feature.kind.excludes, **feature.kind.careful}
        assert set(rules) <= owned, feature.title


def test_the_documentation_has_the_current_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "--check", str(PAGE)]) == 0


def test_a_stale_page_is_refused_and_brought_up_to_date(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text().replace("| yes c |", "| no r |", 1))
    assert cli.main(["explain", "--check", str(page)]) == 2
    assert "is stale" in capsys.readouterr().err
    assert cli.main(["explain", "--write", str(page)]) == 0
    assert page.read_text() == PAGE.read_text()


def ids_of(test: str) -> set[str]:
    """Return the ids that pytest gives to the parameters of a test function."""
    file, _, name = test.partition("::")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    (mark,) = [m for m in vars(module)[name].pytestmark if m.name == "parametrize"]
    return {f"{test}[{mark.kwargs['ids'](value)}]" for value in mark.args[1]}


def test_every_cell_names_a_test_that_there_is() -> None:
    named = {cell.test_id for cell in compatibility.cells()}
    there = {name for test in compatibility.LETTERS for name in ids_of(test)}
    assert named <= there, f"missing: {sorted(named - there)}"


def test_a_feature_is_explained_by_its_name_and_by_its_keys() -> None:
    text = explain("FP8")
    assert text == explain("fp8")
    assert explain("fp8_recipe").endswith(text.partition("\n\n")[2])
    assert "raytrain_adv/transforms/fp8.py" in text
    assert "fp8_exclude: text, or a list (text)" in text
    assert "[fp8+hf_kernels]" in text and "[lora+fp8]" in text
    assert "not with use_dora: DoRA computes with the base weights" in explain("qat")
    assert "use_dora not with QAT: DoRA computes with the base weights" in explain("lora")
    assert "not without finetuning_type: lora: " in explain("quantization_bit")
    assert explain("enable_fp8") == text, "as other trainers write it"


def test_several_features_are_explained_by_their_cells() -> None:
    text = explain("FP8 QAT")
    assert text == explain("fp8+qat")
    assert "FP8 and QAT: careful" in text and "[fp8+qat]" in text and "held-out losses" in text
    words = explain("standard quantization")
    assert explain("quantization_bit").endswith(words), "one name of two words"
    with pytest.raises(JobError, match="there is no feature 'foo'"):
        explain("fp8 foo")


def test_a_feature_is_explained_by_every_name_that_it_has_in_a_plan_a_report_or_a_page() -> None:
    for one in discover():
        own = explain(one.feature or one.__name__)
        assert explain(one.name).endswith(own), "the plan's and the report's"
        assert explain(one.__module__.rpartition(".")[2]).endswith(own), "the file's, as in README"
    for name in ("QLoRA", "quantized base", "quantized_base", "Standard Quantization"):
        assert explain(name).startswith("QLoRA: Keep the frozen model in 4 or 8 bits"), name


def test_options_of_a_sweep_and_refused_keys_are_explained() -> None:
    """They were no keys, though the job file reference and a refused job name them."""
    assert explain("keep_models").startswith("keep_models: one of all, best; 'all' by default\n")
    refused = explain("pref_beta")
    assert refused.startswith("pref_beta: LLaMA-Factory's key, refused: it belongs to another")
    assert "fix: delete it; use LLaMA-Factory or TRL for this stage" in refused


def test_a_feature_that_is_not_there_is_answered_with_the_nearest() -> None:
    with pytest.raises(JobError, match="there is no feature 'lorra'") as caught:
        explain("lorra fp8")
    assert "did you mean lora?" in caught.value.fix
    with pytest.raises(JobError, match="there is no key or feature 'pref_loess'") as caught:
        explain("pref_loess")
    assert "did you mean pref_loss?" in caught.value.fix
    with pytest.raises(JobError, match="there is no key or feature 'zzz'") as caught:
        explain("zzz")
    assert "raytrain-adv schema" in caught.value.fix


class First(Section):
    """A feature."""

    feature: ClassVar[str] = "First one"
    tried_with: ClassVar[dict[str, Any]] = {"first": True}
    first: bool = False
    first_size: int = 1


class Second(Section):
    """A feature that does not go with the first, nor with a size of it."""

    feature: ClassVar[str] = "Second"
    tried_with: ClassVar[dict[str, Any]] = {"second": True}
    excludes: ClassVar[dict[str, str]] = {"first": "they disagree", "first_size": "it is too large"}
    second: bool = False


def test_a_rule_of_either_side_makes_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = compatibility.Feature(First, "First one"), compatibility.Feature(Second, "Second")
    monkeypatch.setattr(compatibility, "features", lambda: (one, other))
    assert [cell.verdict for cell in compatibility.cells()] == ["yes", "no", "yes"]
    cell = compatibility.cell_of(one, other)
    assert (cell.slug, cell.reason, cell.keys) == (
        "first_one+second",
        "they disagree",
        ("second", "first"),
    )
    assert compatibility.exceptions(other) == {"first_size": "it is too large"}
    assert "| Second | no r | yes c |" in compatibility.table()
    assert "- Second, not with `first_size`: it is too large." in compatibility.table()
