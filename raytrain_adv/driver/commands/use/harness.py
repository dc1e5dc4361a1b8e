"""EleutherAI's lm-evaluation-harness, an extra, on a loaded model."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import yaml

from raytrain_adv.driver.commands.use.load import Loaded
from raytrain_adv.errors import JobError
from raytrain_adv.text import first_line, of_error, split_names

PACKAGE = "lm_eval"


class Harness:
    """Tasks by name or as local YAML files, checked before a model is loaded."""

    def __init__(self, tasks: str, num_fewshot: int | None, limit: int | None, chats: bool) -> None:
        """Find the tasks. Raises JobError if the harness is not installed, or does not know one of
        them.
        """
        if importlib.util.find_spec(PACKAGE) is None:
            fix = "pip install 'raytrain-adv[eval]'"
            raise JobError("--tasks needs lm-evaluation-harness", f"there is no {PACKAGE}", fix)
        from lm_eval.tasks import TaskManager

        given = split_names(tasks)
        files = [Path(one) for one in given if one.endswith((".yaml", ".yml"))]
        for file in files:
            if not file.is_file():
                raise JobError(f"there is no task file {file}", str(file.absolute()), "correct it")
        folders = [str(file.absolute().parent) for file in files]
        self.manager: Any = TaskManager(include_path=folders or None)
        self.names = [_name(Path(one)) if Path(one) in files else one for one in given]
        known = set(self.manager.all_tasks)
        if wrong := [name for name in self.names if name not in known]:
            found = f"{', '.join(wrong)}; it knows {len(known):,}"
            fix = "`lm_eval ls tasks` lists them; a local one is named by its YAML file"
            raise JobError("lm-evaluation-harness does not know a task", found, fix)
        self.num_fewshot, self.limit, self.chats = num_fewshot, limit, chats

    def run(self, loaded: Loaded, size: int) -> dict[str, tuple[float, float | None]]:
        """Return value and standard error of each metric, by `task metric`. Raises JobError if a
        task's data cannot be had, or it fails.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        try:
            model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=size)
            found = lm_eval.simple_evaluate(
                model=model,
                tasks=self.names,
                task_manager=self.manager,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                apply_chat_template=self.chats,
                log_samples=False,
            )
        except Exception as error:  # tasks run code and fetch data, and raise what they like
            what = f"lm-evaluation-harness failed on {', '.join(self.names)}"
            fix = "tasks fetch their data from the Hub; offline name a YAML file with local data"
            raise JobError(what, of_error(error), fix) from error
        return _figures(found["results"])


def _name(file: Path) -> str:
    class Loader(yaml.SafeLoader):
        """Reads a task's file without running the functions that it names."""

    Loader.add_constructor("!function", lambda loader, node: None)
    try:
        name = yaml.load(file.read_text(), Loader).get("task")
    except (yaml.YAMLError, AttributeError, OSError) as error:
        raise JobError(f"{file} is not a task file", first_line(error), "correct it") from error
    if not isinstance(name, str):
        raise JobError(f"{file} names no task", "there is no key task in it", "add task: NAME")
    return name


def _figures(results: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    figures = {}
    for task, values in results.items():
        for key, value in values.items():
            name, _, filter_name = key.partition(",")
            if name.endswith("_stderr") or not isinstance(value, int | float) or not filter_name:
                continue
            error = values.get(f"{name}_stderr,{filter_name}")
            shown = name if filter_name == "none" else f"{name} ({filter_name})"
            known = float(error) if isinstance(error, int | float) else None
            figures[f"{task} {shown}"] = (float(value), known)
    return figures
