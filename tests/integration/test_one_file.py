"""A feature is one file: a copy of the package with a new one in it needs no other change."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FEATURE = '''
"""A feature that nobody knows of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from raytrain_adv.transforms.modules import class_name
from raytrain_adv.transforms.transform import Change, Context, Plan, Transform

if TYPE_CHECKING:
    from torch import nn


class Doubled(Transform):
    """Double what comes out of MLPs."""

    name: ClassVar[str] = "doubled"
    feature: ClassVar[str] = "Doubled MLPs"
    stage: ClassVar[str] = "kernel"
    stacks_on: ClassVar[frozenset[str]] = frozenset({"adapter", "precision"})
    tried_with: ClassVar[dict[str, Any]] = {"use_badam": True}
    excludes: ClassVar[dict[str, str]] = {"fp8": "twice is too much for FP8"}
    careful: ClassVar[dict[str, str]] = {"enable_qat": "scales double too"}

    use_badam: bool = False
    """Double MLPs: a key that is LLaMA-Factory's, and is refused without this file."""

    def plan(self, model: nn.Module, context: Context) -> Plan:
        """Choose the MLPs."""
        found = {f: m for f, m in model.named_modules() if f.endswith(".mlp")}
        changes = {f: Change(class_name(m), self.after(m)) for f, m in found.items()}
        return Plan(self.name, changes, notes=("twice",))

    @staticmethod
    def after(module: nn.Module) -> str:
        """Return what a module becomes."""
        return f"{class_name(module)}, doubled"

    def prepare(self, model: nn.Module, plan: Plan) -> None:
        """Put the hooks on."""
        for fqn in plan.changes:
            module = model.get_submodule(fqn)
            module.register_forward_hook(lambda module, args, output: 2 * output)

    def what_is(self, module: nn.Module) -> str:
        """Return a module's class, and whether it is doubled."""
        return self.after(module) if module._forward_hooks else class_name(module)
'''
CHECK = """
import json, sys
from raytrain_adv import cli
from raytrain_adv.config import load
from raytrain_adv.config.schema import schema
from raytrain_adv.errors import JobError
import raytrain_adv

told = {"package": raytrain_adv.__file__, "schema": schema()["properties"]["use_badam"]}
base = sys.argv[1]
job = load(base)
for name, keys in (("refused", ["fp8=true"]), ("careful", ["enable_qat=true"])):
    try:
        told[name] = list(load(base, keys).notes)
    except JobError as error:
        told[name] = str(error)
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.model.build import build
from raytrain_adv.report.parts import TransformReport
plan = Transforms(job).prepare(build(job))["doubled"]
told["report"] = {"doubled": TransformReport.of(plan).model_dump(mode="json")}
print(json.dumps(told))
cli.main(["explain", "doubled_mlps"])
cli.main(["explain"])
print("stale", cli.main(["explain", "--check", "compatibility.md"]))
print("written", cli.main(["explain", "--write", "compatibility.md"]))
print("fresh", cli.main(["explain", "--check", "compatibility.md"]))
"""


def test_schema_plan_report_matrix_explain_and_the_rules_of_imports_pick_a_new_file_up(
    job_file, tmp_path
):
    copy = tmp_path / "copy"
    shutil.copytree(
        ROOT / "raytrain_adv",
        copy / "raytrain_adv",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name in ("docs/compatibility.md", "pyproject.toml"):
        shutil.copy(ROOT / name, copy)
    (copy / "raytrain_adv" / "transforms" / "doubled.py").write_text(FEATURE)
    (tmp_path / "check.py").write_text(CHECK)
    job = job_file(use_badam=True)

    def run(*command):
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(copy), "HF_HUB_OFFLINE": "1"}
        answer = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    told, _, text = run(sys.executable, tmp_path / "check.py", job).partition("\n")
    found = json.loads(told)
    assert Path(found["package"]).is_relative_to(copy)
    assert found["schema"]["type"] == "boolean" and "deprecated" not in found["schema"]
    assert "fp8 and use_badam: twice is too much for FP8" in found["refused"]
    assert "set fp8: false, or use_badam: false" in found["refused"]
    assert "use_badam and enable_qat need care together: scales double too" in found["careful"]
    entry = found["report"]["doubled"]
    assert entry["changed_modules"] == ["model.layers.[0-1].mlp"]
    assert entry["notes"] == ["twice"]
    assert "Doubled MLPs: Double what comes out of MLPs." in text
    assert "raytrain_adv/transforms/doubled.py" in text and "[fp8+doubled_mlps]" in text
    row = "| Doubled MLPs | yes c | yes c | no r | careful c |"
    assert row in text
    assert "stale 2" in text and "written 0" in text and "fresh 0" in text
    assert row in (copy / "compatibility.md").read_text()
    imports = run(Path(sys.executable).parent / "lint-imports", "--no-cache")
    assert "Contracts: 4 kept, 0 broken." in imports
