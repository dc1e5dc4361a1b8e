import pytest

from raytrain_adv import cli
from raytrain_adv.config.explain import _key, explain
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
