"""push_to_hub, against a server on this machine that answers as the Hub does."""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raytrain_adv.driver.output import upload
from raytrain_adv.errors import JobError, UploadError
from raytrain_adv.report.record import RunReport

TOKEN = "hf_" + "a1" * 17
PUSHES = {"push_to_hub": True}


@dataclass
class Hub:
    """What the server was told, and how it is to answer."""

    address: str = ""
    role: str = "write"
    fails: int = 0
    """Commits that are answered by 503."""
    private: dict[str, bool] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)
    commits: list[str] = field(default_factory=list)


class Answers(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/whoami-v2":
            token = {"role": self.hub.role}
            self.answer({"name": "me", "type": "user", "auth": {"accessToken": token}})
        else:
            name = self.path.removeprefix("/api/models/").partition("?")[0]
            facts = {"id": name, "private": self.hub.private[name], "siblings": [], "tags": []}
            self.answer(facts)

    def do_PUT(self):
        self.hub.files[self.path.removeprefix("/lfs/")] = self.body()
        self.answer({})

    def do_POST(self):
        hub, sent, path = self.hub, self.body(), self.path
        if path == "/api/repos/create":
            asked = json.loads(sent)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            if name in hub.private:
                return self.answer({"url": f"{hub.address}/{name}", "error": "exists"}, 409)
            hub.private[name] = private
            return self.answer({"url": f"{hub.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/branch/" in path:
            hub.branches.append(path.rpartition("/branch/")[2])
            return self.answer({})
        if "/preupload/" in path:
            files = json.loads(sent)["files"]
            large = {one["path"]: one["path"].endswith(".safetensors") for one in files}
            modes = [{"path": p, "uploadMode": "lfs" if x else "regular", "shouldIgnore": False}
                     for p, x in large.items()]  # fmt: skip
            return self.answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [{**one, "actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}}
                       for one in json.loads(sent)["objects"]]  # fmt: skip
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            if hub.fails:
                hub.fails -= 1
                return self.answer({"error": "come back later"}, 503)
            hub.commits.append(path)
            for line in map(json.loads, sent.decode().splitlines()):
                if line["key"] in ("file", "lfsFile"):
                    repo = path.removeprefix("/api/models/").partition("/commit/")[0]
                    hub.files[f"{repo}/{line['value']['path']}"] = line["value"]
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            return self.answer({"commitUrl": f"{hub.address}/{name}/commit/1", "commitOid": "1",
                                "success": True})  # fmt: skip
        return self.answer({"error": f"no {path}"}, 404)


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    found = Hub()
    handler = type("Handler", (Answers,), {"hub": found})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    found.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", found.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # files go as LFS objects
    yield found
    server.shutdown()
    server.server_close()


def finished(job) -> RunReport:
    """Return the report of a run that left an adapter beside its converted base."""
    out = Path(job.output.output_dir)
    for name in ("model", "model-quantized"):
        (out / name).mkdir(parents=True)
        (out / name / "model.safetensors").write_bytes(name.encode())
        (out / name / "README.md").write_text(f'---\ntags: []\n---\nload("{name}")\n')
    (out / "model-quantized" / "config.json").write_text("{}")
    base = json.dumps({"base_model_name_or_path": str(out / "model-quantized")})
    (out / "model-quantized" / "adapter_config.json").write_text(base)
    folders = {"model_dir": str(out / "model"), "quantized_dir": str(out / "model-quantized")}
    return RunReport(status="done", **folders)


def pushed(job, report, **options):
    said: list[str] = []
    return upload.upload(job, report, said.append, **{"waits_s": (0.0, 0.0), **options}), said


QAT = {"enable_qat": True, "qat_weight_dtype": "int4"}


def test_each_folder_goes_to_a_private_repository_of_its_own(make_job, hub):
    job = make_job(**PUSHES, **QAT, hub_model_id="tuned", hub_revision="v1")
    report, said = pushed(job, finished(job))
    assert [one.repository for one in report.uploads] == ["me/tuned", "me/tuned-quantized"]
    assert hub.private == {"me/tuned": True, "me/tuned-quantized": True}
    assert set(hub.branches) == {"v1"} and all(path.endswith("/v1") for path in hub.commits)
    assert b"model-quantized" in hub.files.values()
    adapter = hub.files["me/tuned-quantized/adapter_config.json"]
    import base64

    assert json.loads(base64.b64decode(adapter["content"])) == {
        "base_model_name_or_path": "me/tuned-quantized"
    }
    card = base64.b64decode(hub.files["me/tuned/README.md"]["content"])
    assert b'load("me/tuned")' in card
    assert f"{hub.address}/me/tuned/commit/1" in said[0]
    assert any("is at" in note for note in report.notes)
    upload.refuse_incomplete(report)
    again, said = pushed(job, report)
    assert again.uploads == report.uploads and not said and len(hub.commits) == 2


def test_the_base_that_an_adapter_belongs_to_is_uploaded_and_named(make_job, hub):
    """The adapter was uploaded alone: nobody could load it."""
    import base64

    lora = {"finetuning_type": "lora", "pissa_init": True, "train_from_scratch": False}
    job = make_job(**PUSHES, **lora, hub_model_id="tuned")
    report = finished(job).model_copy(update={"quantized_dir": None})
    out = Path(job.output.output_dir)
    (out / "model-quantized").rename(out / "model-base")
    base = {"base_model_name_or_path": str((out / "model-base").resolve())}
    (out / "model" / "adapter_config.json").write_text(json.dumps(base))
    report, _ = pushed(job, report)
    assert [one.repository for one in report.uploads] == ["me/tuned", "me/tuned-base"]
    adapter = json.loads(base64.b64decode(hub.files["me/tuned/adapter_config.json"]["content"]))
    assert adapter == {"base_model_name_or_path": "me/tuned-base"}
    assert any("model-base -> " in line for line in upload.remarks(job))


def test_a_hub_that_fails_for_a_while_is_asked_again(make_job, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda s: None)
    job = make_job(**PUSHES)
    hub.fails = 1
    report, _ = pushed(job, finished(job).model_copy(update={"quantized_dir": None}))
    assert report.uploads[0].url


def test_a_failed_upload_is_reported_and_the_run_stays_done(make_job, hub):
    hub.private["me/out"] = False
    job = make_job(**PUSHES)
    report, said = pushed(job, finished(job).model_copy(update={"quantized_dir": None}))
    assert report.status == "done" and "is a public repository" in report.uploads[0].error
    assert "hf upload me/out" in said[-1]
    with pytest.raises(UploadError, match="The run is done") as refused:
        upload.refuse_incomplete(report)
    assert refused.value.exit_code == 6
    assert not hub.commits and TOKEN not in report.model_dump_json()


def test_a_hub_that_is_gone_is_reported(make_job, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    job = make_job(**PUSHES)
    report, said = pushed(job, finished(job), waits_s=(0.0,))
    assert all(one.error and not one.url for one in report.uploads)
    assert "trying again in 0 s" in said[0]


def test_the_token_is_checked_before_training(make_job, hub, monkeypatch):
    job = make_job(**PUSHES)
    upload.check(job)
    hub.role = "read"
    with pytest.raises(JobError, match="may only read"):
        upload.check(job)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(JobError, match="does not take the token") as refused:
        upload.check(job, waits_s=(0.0,))
    assert "hf_wrong" not in str(refused.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(JobError, match="HF_TOKEN is not set"):
        upload.check(job)
    upload.check(make_job())


def test_the_plan_says_what_goes_where_without_a_token(make_job, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    lines = list(upload.remarks(make_job(**PUSHES, **QAT, hub_model_id="org/tuned")))
    assert "a launch is refused: HF_TOKEN is not set" in lines[0]
    assert "model -> https://hub.example/org/tuned (private)" in lines[1]
    assert "https://hub.example/org/tuned-quantized (private)" in lines[2]
    assert list(upload.remarks(make_job())) == []


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"hub_model_id": "a/b"}, "nothing is uploaded"),
        ({**PUSHES, "export_model": False}, "no model to upload"),
        ({**PUSHES, "hub_strategy": "every_save"}, "the model is written at the end"),
        ({**PUSHES, "hub_model_id": "a/b/c"}, "hub_model_id"),
        ({**PUSHES, "hub_token": TOKEN}, "must not contain"),
    ],
)
def test_contradicting_keys_are_refused(make_job, keys, said):
    with pytest.raises(JobError, match=said):
        make_job(**keys)
