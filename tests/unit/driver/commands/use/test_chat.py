"""Chat with finished models: which weights, which prompt, what is kept."""

import io
import json
import threading
from pathlib import Path
from shutil import copytree

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytrain_adv import cli
from raytrain_adv.config.load import load_keys, with_keys
from raytrain_adv.data.prepare import prepare
from raytrain_adv.data.tokens.templates import find_template
from raytrain_adv.driver.commands.use.answer import batch, prompt_ids, stream
from raytrain_adv.driver.commands.use.chat import Chat
from raytrain_adv.driver.commands.use.load import load
from raytrain_adv.driver.commands.use.sampling import Sampling
from raytrain_adv.driver.commands.use.source import find
from raytrain_adv.errors import JobError

CPU = torch.device("cpu")
GREEDY = Sampling(do_sample=False, max_new_tokens=8)


def opened(folder: Path):
    return load(find(str(folder))[0], CPU, "", False)


def test_a_run_is_served_by_its_converted_model_if_it_has_one(runs):
    names = [source.folder.name for source in find(str(runs["qat"]))]
    assert names == ["model-quantized", "model"]
    assert [source.folder.name for source in find(str(runs["lora"]))] == ["model"]
    assert "torchao" in opened(runs["qat"]).words()


def test_a_folder_without_a_model_is_refused_with_what_to_do(tmp_path, runs):
    with pytest.raises(JobError, match="there is no folder"):
        find(str(tmp_path / "nothing"))
    with pytest.raises(JobError, match="neither a run nor a model folder"):
        find(str(tmp_path))
    (tmp_path / "run.json").write_bytes((runs["lora"] / "run.json").read_bytes())
    with pytest.raises(JobError, match="raytrain-adv export"):
        find(str(tmp_path))


def test_a_folder_of_runs_is_refused_with_them_named(tmp_path, runs):
    (run := tmp_path / "saves" / "mine").mkdir(parents=True)
    (run / "run.json").write_bytes((runs["lora"] / "run.json").read_bytes())
    with pytest.raises(JobError, match="neither a run") as caught:
        find(str(tmp_path / "saves"))
    assert caught.value.fix == f"name one of the runs in it: {run}"


def test_a_sweep_is_refused_with_its_trials_named(tmp_path, runs):
    (trial := tmp_path / "trials" / "lr_1").mkdir(parents=True)
    (tmp_path / "sweep.json").write_text("{}")
    (trial / "run.json").write_bytes((runs["lora"] / "run.json").read_bytes())
    with pytest.raises(JobError, match="is a sweep") as caught:
        find(str(tmp_path))
    assert (caught.value.found, str(trial) in caught.value.fix) == ("it has 1 run", True)


def test_a_question_becomes_the_tokens_it_had_in_training(runs):
    keys = json.loads((runs["lora"] / "run.json").read_text())["job"]
    prepared = prepare(load_keys(keys, "run.json"), lambda sentence: None)
    loaded = opened(runs["lora"])
    rows = json.loads(Path(keys["dataset"]).read_text())
    trained = {tuple(p.input_ids) for p in prepared.prompts(99, loaded.tokenizer)}
    asked = {
        tuple(prompt_ids(loaded, [{"role": "user", "content": row["instruction"]}], True))
        for row in rows
    }
    assert len(trained) == 9 and trained <= asked


@pytest.mark.parametrize("thinks", [False, True])
def test_a_model_is_asked_to_think_as_in_its_training(runs, tmp_path, thinks):
    """One that was trained with empty thoughts in its prompts was asked to begin with thoughts."""
    copytree(runs["lora"], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["job"]["enable_thinking"] = thinks
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    loaded = opened(tmp_path / "run")
    loaded.tokenizer.chat_template = find_template("qwen3").write(not thinks)
    asked = [{"role": "user", "content": "One?"}]
    as_trained, same, other = (prompt_ids(loaded, asked, t) for t in (None, thinks, not thinks))
    assert as_trained == same != other


def test_an_adapter_computes_what_peft_computes(runs):
    ids = torch.arange(3, 40).unsqueeze(0)
    peft = AutoModelForCausalLM.from_pretrained(runs["lora"] / "model", dtype=torch.bfloat16)
    for name, parameter in peft.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    with torch.no_grad():
        wanted = peft.eval()(input_ids=ids).logits
        assert torch.equal(opened(runs["lora"]).model(input_ids=ids).logits, wanted)


def test_streamed_text_is_the_whole_answer_and_ends_on_request(runs):
    loaded = opened(runs["qat"])
    ids = prompt_ids(loaded, [{"role": "user", "content": "Count to 3, starting from 1."}], True)
    whole = batch(loaded, [ids], GREEDY)[0]
    assert "".join(stream(loaded, ids, GREEDY, threading.Event())) == whole.text
    stopped = threading.Event()
    stopped.set()
    assert len("".join(stream(loaded, ids, GREEDY, stopped))) < len(whole.text)


def test_a_chat_keeps_its_history_until_it_is_cleared(runs):
    chat = Chat([opened(runs["lora"])], GREEDY)
    chat.clear()
    first = "".join(text for _, text in chat.answers("One?", threading.Event()))
    assert [m["content"] for m in chat.histories[0]] == ["One?", first]
    list(chat.answers("Two?", threading.Event()))
    assert [m["role"] for m in chat.histories[0]] == ["user", "assistant"] * 2
    assert "begins again" in chat.command("/system Be brief.")
    assert chat.histories == [[{"role": "system", "content": "Be brief."}]]
    assert "temperature 0.2" in chat.command("/set do_sample=true temperature=0.2")
    assert chat.command("/exit") is None


def test_lines_of_a_pipe_are_answered_by_both_models(runs, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Count to 2.\n\n/clear\nCount to 3.\n"))
    options = ["--compare", str(runs["qat"] / "model"), "max_new_tokens=4", "do_sample=false"]
    assert cli.main(["chat", str(runs["lora"]), "--device", "cpu", *options]) == 0
    out, err = capsys.readouterr()
    assert [line.split("]")[0] for line in out.splitlines() if line.startswith("[")] == [
        "[lora/model",
        "[qat/model",
    ] * 2
    assert "an adapter on model-source" in err and "system message: Count." in err


def test_an_answer_goes_on_when_the_other_models_has_ended(runs):
    models = [opened(runs["lora"]), opened(runs["qat"])]
    models[0].model.generation_config.eos_token_id = list(range(models[0].model.vocab_size))
    chat = Chat(models, Sampling(do_sample=False, max_new_tokens=24))
    chat.clear()
    list(chat.answers("Count to 3.", threading.Event()))
    ids = prompt_ids(models[1], chat.histories[1][:1], True)
    whole = batch(models[1], [ids], chat.sampling)[0]
    assert chat.histories[0][1]["content"] == "" and whole.num_tokens > 4
    assert chat.histories[1][1]["content"] == whole.text


def test_wrong_sampling_keys_are_refused_together(capsys, runs):
    assert cli.main(["chat", str(runs["lora"]), "temprature=1", "top_p=2", "top_k=true"]) == 2
    err = capsys.readouterr().err
    assert "did you mean temperature?" in err and "top_p" in err and "top_k" in err
    assert with_keys(Sampling(), ["top_k=5"]).top_k == 5


def test_a_prompt_longer_than_the_model_is_refused(runs):
    loaded = opened(runs["lora"])
    too_long = [5] * loaded.model.config.max_position_embeddings
    with pytest.raises(JobError, match="no room for an answer"):
        list(stream(loaded, too_long, GREEDY, threading.Event()))
