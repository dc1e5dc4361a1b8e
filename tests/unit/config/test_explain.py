import pytest

from raytrain_adv import cli
from raytrain_adv.config.compatibility import known_features
from raytrain_adv.config.explain import _key, explain
from raytrain_adv.config.job import section_types
from raytrain_adv.config.llamafactory.keys import (
    LISTED,
    MAPPED,
    REFUSED,
    REFUSED_VALUES,
    RENAMED,
    SAME,
    WRITTEN_AS,
)
from raytrain_adv.config.llamafactory.translate import known_keys
from raytrain_adv.config.schema import schema
from raytrain_adv.errors import JobError


def test_every_key_of_a_job_is_explained_by_its_sentence():
    for key, field in schema()["properties"].items():
        text = " ".join("\n".join(_key(key, field)).split())
        assert text.startswith(f"{key}: ") and field["description"] in text


def test_a_key_of_a_feature_is_explained_before_its_feature():
    text = explain("fp8_recipe")
    assert text.startswith("fp8_recipe: one of tensorwise") and "FP8: Train the linears" in text


def test_another_trainers_name_of_a_key_is_explained():
    assert explain("micro_batch_size").startswith("per_device_train_batch_size: ")


@pytest.mark.parametrize("key", sorted({*known_keys(), *WRITTEN_AS}))
def test_every_key_that_the_loader_knows_is_explained_as_it_is_loaded(key):
    text = " ".join(explain(key).split())
    owned = {name for kind in section_types() for name in kind.model_fields}
    if key in SAME and key not in owned:
        assert f"accepted as it is: {SAME[key].why}" in text
    elif key in LISTED and key not in owned:
        assert f"no effect here: {LISTED[key]}" in text
    elif key in MAPPED:
        assert " runs as " in text and MAPPED[key][2] in text
    elif key in REFUSED and key not in owned:
        assert f"refused: {REFUSED[key].why}" in text and REFUSED[key].fix in text
    elif key in RENAMED:
        assert f"name of {RENAMED[key]}." in text
    elif key in WRITTEN_AS and key not in owned | known_features().keys():
        assert text.startswith(f"{WRITTEN_AS[key]}: ")


def test_a_job_may_state_that_ray_is_used(make_job):
    make_job(use_ray=True)
    with pytest.raises(JobError, match="use_ray: false: Ray starts the workers of every job"):
        make_job(use_ray=False)


@pytest.mark.parametrize(("key", "value"), REFUSED_VALUES)
def test_a_refused_value_is_explained_with_its_key(key, value):
    why, fix = REFUSED_VALUES[key, value]
    text = " ".join(explain(key).split())
    assert value in text and (why or fix) in text


def test_other_names_of_values_are_explained_with_their_key():
    assert "adamw_bnb_8bit runs as adamw_torch_8bit" in explain("optim")
    assert "freeze runs as finetuning_type: 'full' and freeze_" in explain("finetuning_type")


def test_a_misspelled_key_is_answered_with_the_nearest():
    with pytest.raises(JobError, match="did you mean learning_rate"):
        explain("lerning_rate")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_ask_this_program(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    assert "_RAYTRAIN_ADV_COMPLETE" in capsys.readouterr().out


def test_completion_lists_the_commands(monkeypatch, capsys):
    monkeypatch.setenv("_RAYTRAIN_ADV_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "raytrain-adv stat")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit):
        cli.main([])
    assert capsys.readouterr().out == "plain,status\n"


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("raytrain-adv ")
