"""Write cluster/requirements.txt: the tested set with a hash for every file the image installs.

    python3.12 cluster/pin.py

to be run, on Linux x86_64, by the Python version of the image: which packages are needed, and which
of their files, depends on it. Versions are those of constraints.txt where it names them.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FILE = ROOT / "cluster" / "requirements.txt"
EXTRAS = ("advanced",)
IMAGE_ONLY = ("boto3", "setuptools>=77")
"""The autoscaler of `ray up` on AWS; what installs this package."""
OTHERWISE = ("python-dateutil",)
"""Not as constraints.txt has it: botocore wants a version below 3 (boto3 1.44)."""
HEADER = """# What cluster/Dockerfile installs, files by their hash: Python {python}, Linux x86_64.
# Made by: python{python} cluster/pin.py
"""


def main() -> None:
    """Resolve, and write the file."""
    installed = resolve(wanted())
    lines = sorted(line(one) for one in installed)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    FILE.write_text(HEADER.format(python=python) + "".join(lines))
    print(f"{FILE}: {len(lines)} packages")


def wanted() -> list[str]:
    """Return what the image needs, as pyproject.toml says it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [need for name in EXTRAS for need in project["optional-dependencies"][name]]
    return [*project["dependencies"], *extras, *IMAGE_ONLY]


def resolve(needs: list[str]) -> list[dict[str, Any]]:
    """Return what pip would install for these needs, without installing it."""
    with tempfile.TemporaryDirectory() as folder:
        report, constraints = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        tested = (ROOT / "constraints.txt").read_text().splitlines()
        kept = [one for one in tested if one.partition("==")[0] not in OTHERWISE]
        constraints.write_text("\n".join(kept))
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--only-binary", ":all:", "--report", str(report)]
        subprocess.run([*command, "--constraint", str(constraints), *needs], check=True)
        return list(json.loads(report.read_text())["install"])


def line(installed: dict[str, Any]) -> str:
    """Return a package's line: its version and its file's hash."""
    about, archive = installed["metadata"], installed["download_info"]["archive_info"]
    return (
        f"{about['name'].lower()}=={about['version']} --hash=sha256:{archive['hashes']['sha256']}\n"
    )


if __name__ == "__main__":
    main()
