"""Kernels are pinned once and loaded from where they were put; what differs from the lock is
refused, and a Hub that does not answer is said at once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from raytrain_adv.cli import main
from raytrain_adv.kernels import fetch, lock
from raytrain_adv.kernels.fetch import Place
from raytrain_adv.kernels.select import read_layers
from raytrain_adv.kernels.source import KernelEntry, read
from raytrain_adv.kernels.variants import Target
from tests.kernel_folders import LAYERS, refusal, write_kernel
from tests.tiny_models import job_for, write_checkpoint

CPU = Target(torch=(2, 13), cuda=None, machine="x86_64")
COMMIT, OLDER = "b" * 40, "a" * 40
CLOSED = "http://127.0.0.1:9"
PUBLISHERS = ("org", "partner", "stranger")


def wanted(given):
    (one,) = read(given)
    return one


@pytest.mark.parametrize(
    ("given", "source", "version", "revision"),
    [
        ("org/k", "org/k", None, None),
        ("org/k@v3", "org/k", 3, None),
        ("org/k@main", "org/k", None, "main"),
        (f"org/k@{COMMIT}", "org/k", None, COMMIT),
        (KernelEntry(repo="org/k", version=2), "org/k", 2, None),
        (KernelEntry(path="/k"), "/k", None, None),
        ("./k@v1", "./k@v1", None, None),
        ("jobs/kernels/swiglu", "jobs/kernels/swiglu", None, None),
    ],
)
def test_a_name_has_source_version_and_revision(given, source, version, revision):
    one = wanted(given)
    assert (one.source, one.version, one.revision) == (source, version, revision)
    assert one.is_local == (source in ("/k", "./k@v1", "jobs/kernels/swiglu"))


def test_files_are_put_next_to_the_lock_file_and_found_there_again(tmp_path):
    kernel, said = write_kernel(tmp_path / "mine"), []
    file = tmp_path / "out" / lock.FILE_NAME
    fetch.fetch([wanted(str(kernel))], Place(CPU, own=file), file, said.append)
    (locked,) = lock.read(file).kernels
    assert len(said) == 1 and locked.digest[:7] in said[0]
    folder = file.parent / locked.folder
    assert lock.digests(folder) == locked.files == lock.digests(kernel / "build" / "torch-cpu")
    (kernel / "build" / "torch-cpu" / "layers.py").write_text("changed")
    found = fetch.find(wanted(str(kernel)), Place(CPU, own=file))
    assert found.folder == folder and found.locked == locked
    fetch.fetch([wanted(str(kernel))], Place(CPU, own=file), file, said.append)
    assert len(said) == 1


def test_what_python_compiles_on_import_does_not_change_the_files(tmp_path):
    folder = write_kernel(tmp_path / "mine") / "build" / "torch-cpu"
    before = lock.digests(folder)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "layers.pyc").write_bytes(b"x")
    assert lock.digests(folder) == before


@pytest.fixture
def locked(tmp_path):
    """A kernel's folder and a lock file of it."""
    kernel, file = write_kernel(tmp_path / "mine"), tmp_path / "k.json"
    build = fetch.find(wanted(str(kernel)), Place(CPU))
    lock.write([build.locked], file)
    return kernel, file


def test_a_kernel_as_it_is_locked_is_taken(locked):
    kernel, file = locked
    assert fetch.find(wanted(str(kernel)), Place(CPU, given=file)).folder.name == "torch-cpu"


def test_files_that_do_not_match_the_lock_are_named(locked):
    kernel, file = locked
    folder = kernel / "build" / "torch-cpu"
    (folder / "layers.py").write_text("other")
    (folder / "more.py").write_text("new")
    (folder / "metadata.json").unlink()
    (folder / "metadata.json").write_text("{}")
    message = refusal(fetch.find, wanted(str(kernel)), Place(CPU, given=file))
    assert "layers.py: sha256" in message and "more.py is not in the lock" in message


def test_a_kernel_that_is_not_in_the_lock_is_refused(locked, tmp_path):
    other = write_kernel(tmp_path / "other")
    for name in (str(other), "org/activation@v1"):
        message = refusal(fetch.find, wanted(name), Place(CPU, given=locked[1]))
        assert "is not in the lock file of the job" in message


def test_a_locked_build_for_other_machines_is_refused(locked):
    kernel, file = locked
    gpu = Target(torch=(2, 11), cuda=(13, 0), machine="x86_64")
    message = refusal(fetch.find, wanted(str(kernel)), Place(gpu, given=file))
    assert "as it is locked, has no build for PyTorch 2.11 with CUDA 13.0" in message


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kernels": [{"source": 1}]}', "not json"])
def test_what_is_no_lock_file_is_refused(tmp_path, text):
    file = tmp_path / "k.json"
    file.write_text(text)
    assert "is not a lock file" in refusal(lock.read, file)
    assert "there is no lock file" in refusal(lock.read, tmp_path / "none.json")


def test_layers_are_read_through_imports_and_base_classes(tmp_path):
    folder = tmp_path / "k"
    (folder / "layers").mkdir(parents=True)
    (folder / "layers" / "__init__.py").write_text(
        "import torch\nfrom .norm import Norm, _Hidden as Shown\nfrom .more import *\n"
    )
    (folder / "layers" / "norm.py").write_text(
        "class Base:\n    can_torch_compile: bool = True\n    def forward(self, x): ...\n"
        "class Norm(Base):\n    has_backward = False\n"
        "class _Hidden(Base):\n    pass\n"
    )
    (folder / "layers" / "more.py").write_text("class Gate:\n    def forward(self, x): ...\n")
    found = read_layers(folder)
    assert set(found) >= {"Norm", "Shown", "Gate"}
    assert found["Norm"].can_torch_compile and not found["Norm"].has_backward
    assert found["Gate"].has_backward and not found["Gate"].can_torch_compile
    (folder / "layers" / "__init__.py").write_text("def broken(:\n")
    assert "cannot be read" in refusal(read_layers, folder)


# --- the commands


@pytest.fixture
def job(tmp_path):
    model = write_checkpoint("llama", tmp_path / "model")
    name = {"path": str(write_kernel(tmp_path / "mine"))}
    job_for(model, tmp_path / "job", use_kernels=True, kernel_name=name, use_cpu=True)
    return tmp_path / "job" / "job.yaml"


def test_lock_fetch_and_verify_prepare_a_kernel_and_notice_a_change(job, tmp_path, capsys):
    file = tmp_path / "lock" / "k.json"
    assert main(["kernels", "lock", str(job), f"--output={file}"]) == 0
    assert main(["kernels", "verify", str(file)]) == 2
    assert "never fetched" in capsys.readouterr().err
    assert main(["kernels", "fetch", str(file)]) == 0
    assert main(["kernels", "verify", str(file)]) == 0
    (layers,) = (tmp_path / "lock").glob("kernels/mine-*/torch-cpu/layers.py")
    layers.write_text("changed")
    assert main(["kernels", "verify", str(file)]) == 2
    assert "layers.py: sha256" in capsys.readouterr().err
    assert main(["kernels", "fetch", str(file)]) == 0
    assert main(["kernels", "verify", str(file)]) == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["x"], "No such command 'x'"),
        (["verify"], "Missing argument 'FILE'"),
        (["lock", "JOB", "--cuda"], "'--cuda' requires an argument"),
        (["lock", "JOB", "--torch", "new"], "is not a version"),
        (["lock", "JOB", "use_kernels=false", "kernel_name=null"], "uses no kernels"),
        (["lock", "JOB", "--cuda", "13.0"], "has no build for"),
    ],
)
def test_commands_report_what_is_wrong(job, capsys, arguments, says):
    assert main(["kernels", *(str(job) if a == "JOB" else a for a in arguments)]) == 2
    assert says in capsys.readouterr().err


# --- the Hub


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as kernels need: branches, a commit's files, a publisher."""

    files: Path
    asked: list[str]

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """Answer as to GET, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer."""
        path = unquote(self.path.partition("?")[0])
        self.asked.append(path)
        publisher = next((p for p in PUBLISHERS if f"/{p}/" in path), "")
        if path == f"/api/organizations/{publisher}/overview":
            trusted = publisher == "org"
            about = {"name": publisher, "fullname": "", "avatarUrl": ""}
            return self.reply({**about, "trustedKernelPublisher": trusted})
        api, files = f"/api/kernels/{publisher}/k/", f"/kernels/{publisher}/k/resolve/"
        if path == f"{api}refs":
            names = {"v1": OLDER, "v3": COMMIT, "main": COMMIT}
            branches = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in names.items()
            ]
            return self.reply({"branches": branches, "converts": [], "tags": []})
        for commit in (COMMIT, OLDER):
            if path.startswith(f"{api}tree/{commit}"):
                return self.reply(self.tree(path.removeprefix(f"{api}tree/{commit}")))
            if path == f"{api}revision/{commit}":
                siblings = [{"rfilename": str(p.relative_to(self.files))} for p in self.every()]
                return self.reply({"id": f"{publisher}/k", "sha": commit, "siblings": siblings})
            if path.startswith(f"{files}{commit}/"):
                file = self.files / path.removeprefix(f"{files}{commit}/")
                return self.reply(file.read_bytes(), commit)
        missing = {"X-Error-Code": "RepoNotFound"}
        return self.reply({"error": "Repository not found"}, status=404, **missing)

    def every(self) -> list[Path]:
        """Return the repository's files."""
        return [p for p in sorted(self.files.rglob("*")) if p.is_file()]

    def tree(self, under: str) -> list[dict[str, object]]:
        """Return what is in a folder."""
        here = self.files / under.strip("/")
        if "recursive" in self.path.lower() and "true" in self.path.lower():
            entries = [p for p in sorted(here.rglob("*"))]
        else:
            entries = sorted(here.iterdir())
        return [
            {
                "path": str(p.relative_to(self.files)),
                "oid": "c" * 40,
                "type": "directory" if p.is_dir() else "file",
                "size": p.stat().st_size,
            }
            for p in entries
        ]

    def reply(self, content: object, commit: str = "", status: int = 200, **headers: str) -> None:
        """Send JSON or bytes."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{hash(self.path) & (2**64 - 1):x}"')
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[Hub]]]:
    """A Hub on this machine that has org/k; its address, and what it was asked."""
    repository = write_kernel(tmp_path / "repository", LAYERS)
    write_kernel(repository / "x", LAYERS, variant="torch-cuda")
    (repository / "x" / "build" / "torch-cuda").rename(repository / "build" / "torch-cuda")
    (repository / "x" / "build").rmdir()
    (repository / "x").rmdir()
    kind = type("OwnHub", (Hub,), {"files": repository, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", kind
    server.shutdown()
    server.server_close()


PROGRAM = """
import json, sys, time
slept, sleep = [], time.sleep
time.sleep = lambda seconds: (slept.append(seconds), sleep(seconds))
from pathlib import Path
from raytrain_adv.errors import JobError
from raytrain_adv.kernels import fetch
from raytrain_adv.kernels.fetch import Place
from raytrain_adv.kernels.source import read
from raytrain_adv.kernels.variants import Target
import huggingface_hub
loads, folder, *names = sys.argv[1:]
if loads == "loads":
    import torch
    from kernels import get_local_kernel
for number, name in enumerate(names):
    name, _, cuda = name.partition(" on ")
    target = Target((2, 13), (13, 0) if cuda == "cuda" else None, "x86_64")
    own = Path(folder) / (str(number) if loads != "loads" else "") / "kernels.lock.json"
    place = Place(target, own=own, trust=("partner",))
    start = time.process_time() + sum(slept)
    try:
        fetch.fetch(read(name), place, own, lambda text: None)
        build = fetch.find(read(name)[0], place)
        if loads == "loads":
            get_local_kernel(build.folder)
        found = " ".join([build.locked.commit, build.locked.variant, build.locked.trust])
    except JobError as error:
        found = f"REFUSED {error}"
    print("ANSWER", json.dumps([found, time.process_time() + sum(slept) - start]))
"""


def on_hub(endpoint, folder, *names, loads=False, offline=False):
    """Fetch kernels in a process of its own, as the Hub client reads its environment on import;
    return what came of each and the seconds that it computed or slept.
    """
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": str(int(offline))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "loads" if loads else "", str(folder / "out"), *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(lines) == len(names), done.stdout + done.stderr
    return [tuple(json.loads(line.removeprefix("ANSWER "))) for line in lines]


def test_a_name_on_the_hub_is_resolved_once_and_loads_without_it_in_a_second(hub, tmp_path):
    endpoint, kind = hub
    ((found, _),) = on_hub(endpoint, tmp_path, "org/k", loads=True)
    assert found.startswith(f"{COMMIT} torch-cpu marked by the Hub"), found
    assert any(path.endswith("/refs") for path in kind.asked)
    ((again, seconds),) = on_hub(CLOSED, tmp_path, "org/k", loads=True)
    assert again == found
    assert seconds < 1.0


def test_versions_commits_publishers_and_missing_names_are_told_apart(hub, tmp_path):
    names = ["org/k@v1", f"stranger/k@{COMMIT}", "org/k@v7", "org/none", "partner/k on cuda"]
    answers = [found for found, _ in on_hub(hub[0], tmp_path, *names)]
    assert answers[0].startswith(OLDER)
    assert "REFUSED stranger is not a publisher that the Hub trusts" in answers[1]
    assert "kernels_trust: [stranger]" in answers[1]
    assert "REFUSED org/k has no v7" in answers[2] and "main, v1, v3" in answers[2]
    assert "REFUSED kernel not found: there is no kernel org/none on the Hub" in answers[3]
    assert answers[4] == f"{COMMIT} torch-cuda named in kernels_trust"


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_that_does_not_answer_is_said_at_once_with_the_way_out(tmp_path, offline):
    names = ["org/k", "org/k@v1", f"org/k@{COMMIT}"]
    for found, seconds in on_hub(CLOSED, tmp_path, *names, offline=offline):
        assert "REFUSED org/k cannot be read from the Hub" in found
        assert "raytrain-adv kernels lock" in found
        assert seconds < 5.0
