"""A running cluster's dashboard, as a client: its jobs and runs."""

import contextlib
import os
from typing import Any
from urllib.parse import urlsplit

import psutil
import requests
from ray._private.authentication.authentication_token_setup import (
    AUTH_MODE_ENV_VAR,
    _enable_token_auth,
)
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined] # compiled
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from raytrain_adv.errors import ClusterError
from raytrain_adv.text import first_line

DEFAULT = "http://127.0.0.1:8265"
RETRIES = ("port-retries", 50)  # the option for further ports, and its default
LOOPBACK = ("127.0.0.1", "localhost", "::1")
NEVER = "Train state data is not available"  # where nothing has run yet (ray 2.60)
RUNS = "/api/train/v2/runs/v1"  # Ray Train's runs (ray 2.60); its web pages have no tab for them


def named(address: str | None) -> str | None:
    """Return the given address, or the one that the environment names for Ray's own commands."""
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")


def of_this_machine() -> list[str]:
    """Return the dashboards of the Rays that run on this machine, those of launches among them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if not any(part.endswith("ray/dashboard/dashboard.py") for part in line):
            continue
        options = dict(part.partition("=")[::2] for part in line)
        first, tries = (int(options.get(f"--{key}", n)) for key, n in (("port", 8265), RETRIES))
        with contextlib.suppress(psutil.Error):  # it has just ended, or is another user's
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN and 0 <= one.laddr.port - first <= tries:
                    host = one.laddr.ip if one.laddr.ip not in ("0.0.0.0", "::") else LOOPBACK[0]
                    found.append(f"http://{host}:{one.laddr.port}")
    return sorted(found)


def connect(address: str | None) -> JobSubmissionClient:
    """Return a client of a dashboard: of `named`, or this machine's. Raises ClusterError."""
    url = named(address) or DEFAULT
    try:
        return _client(url)
    except AuthenticationError as error:
        raise ClusterError(
            "The cluster requires its token",
            f"{url}: {first_line(error)}",
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or put the token into ~/.ray/auth_token); "
            "cluster/README.md says where it is; a Ray that a launch started on this machine has "
            "it in ~/.ray/auth_token of the user who launched",
        ) from None
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            "The cluster's dashboard does not answer",
            f"{url}: {first_line(error)}",
            "pass the dashboard's address, as --address http://127.0.0.1:8265, and check that it "
            "can be reached from here (kubectl port-forward, ray dashboard)",
        ) from None


def _client(url: str) -> JobSubmissionClient:
    """Return a client; one that sends this user's token, if this machine's Ray requires it.

    A Ray that a launch started requires it by default, and Ray's own clients do not send it unless
    RAY_AUTH_MODE is set (ray 2.60). It is not sent to another machine without RAY_AUTH_MODE.
    """
    try:
        return JobSubmissionClient(url)
    except AuthenticationError:
        if urlsplit(url).hostname not in LOOPBACK or AUTH_MODE_ENV_VAR in os.environ:
            raise
        if not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
            raise
        _enable_token_auth()
        return JobSubmissionClient(url)


def train_runs(client: JobSubmissionClient) -> list[dict[str, Any]]:
    """Return Ray Train's runs with attempts and workers, the last first. Raises ClusterError."""
    try:
        # Private, for its headers with the cluster's token; there is no public client (ray 2.60).
        answer = client._do_request("GET", RUNS)
        if answer.status_code == 500 and NEVER in answer.text:
            return []
        answer.raise_for_status()
    except (requests.RequestException, RuntimeError) as error:
        raise ClusterError(
            "The dashboard cannot list Ray Train's runs",
            f"{RUNS}: {first_line(error)}",
            "the cluster needs ray 2.60 with ray[default]",
        ) from None
    runs: list[dict[str, Any]] = answer.json()["train_runs"]
    return sorted(runs, key=lambda run: run["start_time_ns"], reverse=True)
