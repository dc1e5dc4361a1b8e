from raytrain_adv.run.redact import REDACTED, redact, redact_arguments


def test_environment_variables_and_passwords_are_hidden_and_their_names_kept():
    job = {"ray_init_kwargs": {"_redis_password": "p", "runtime_env": {"env_vars": {"A": "x"}}}}
    hidden = redact(job)["ray_init_kwargs"]
    assert hidden == {"_redis_password": REDACTED, "runtime_env": {"env_vars": {"A": REDACTED}}}


def test_keys_of_the_schema_stay_as_they_are():
    job = {"tokenized_path": "/t", "lr_scheduler_kwargs": {"min_lr": 1e-5}, "report_to": ["wandb"]}
    assert redact(job) == job


def test_secrets_in_command_line_arguments_are_hidden():
    command = "launch job.yaml max_steps=3 ray_init_kwargs={env_vars: {A: x=y}} seed=1"
    assert redact_arguments(command) == f"launch job.yaml max_steps=3 ray_init_kwargs={REDACTED}"
