from dataclasses import asdict

from raytrain_adv.worker.checkpoint import FORMAT, MANIFEST, Progress, find, newest
from raytrain_adv.worker.storage import Storage


def write_checkpoint(root, attempt, step, *, manifest=True, size=3):
    folder = Storage.at(str(root / attempt / f"step_{step:08d}"))
    folder.make()
    (root / attempt / f"step_{step:08d}" / "__0_0.distcp").write_bytes(b"abc")
    if manifest:
        folder.write_json(
            MANIFEST,
            {
                "format": FORMAT,
                "progress": asdict(Progress(step, 4, 10, 0, 0.0, 0.0)),
                "fingerprint": "f",
                "job": {},
                "optimizer": True,
                "files": {"__0_0.distcp": size},
            },
        )
    return folder


def test_the_newest_complete_checkpoint_is_found_over_attempts(tmp_path):
    write_checkpoint(tmp_path, "a_001", 10)
    write_checkpoint(tmp_path, "a_002", 20)
    write_checkpoint(tmp_path, "a_001", 30, manifest=False)
    found = newest(Storage.at(str(tmp_path)))
    assert found is not None and found.progress.step == 20


def test_a_checkpoint_with_a_torn_file_is_not_taken(tmp_path):
    folder = write_checkpoint(tmp_path, "a_001", 10, size=4)
    assert find(folder) is None


def test_a_torn_manifest_is_not_taken(tmp_path):
    folder = write_checkpoint(tmp_path, "a_001", 10)
    (tmp_path / "a_001" / "step_00000010" / MANIFEST).write_text('{"format": 1, "progr')
    assert find(folder) is None


def test_no_checkpoint_is_found_in_an_empty_or_missing_folder(tmp_path):
    assert newest(Storage.at(str(tmp_path / "nowhere"))) is None
