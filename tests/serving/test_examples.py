"""The files of docs/examples: what systemd says of the unit, and both commands run as processes, to their end."""

import configparser
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from mpt import errors
from serving.ports import free_port
from serving.serve_config import read_file
from tests.serving import servers

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
COMPOSE: dict[str, Any] = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())
SERVICE: dict[str, Any] = COMPOSE["services"]["mpt"]
# Of the Compose Specification (https://compose-spec.io), those that may stand here.
SERVICE_KEYS = {
    "image", "build", "command", "environment", "ports", "volumes", "secrets", "healthcheck", "stop_signal", "user",
    "stop_grace_period", "restart", "read_only", "tmpfs", "cap_drop", "security_opt", "ulimits", "deploy", "shm_size",
}  # fmt: skip
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period", "start_interval", "disable"}


class _Unit(configparser.RawConfigParser):
    """systemd's files are like INI: case counts, and a key may be there twice (here: lines of Environment)."""

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def unit() -> dict[str, str]:
    """The [Service] section, the lines of `Environment` as one."""
    text = (EXAMPLES / "mpt.service").read_text()
    variables = re.findall(r"^Environment=(.*)$", text, re.M)
    parser = _Unit(strict=False, interpolation=None)
    parser.read_string(text)
    return {**parser["Service"], "Environment": " ".join(variables)}


def seconds(text: str) -> float:
    """A duration of systemd or Compose."""
    number, unit = re.fullmatch(r"(\d+)([a-z]*)", text).groups()
    return int(number) * {"": 1, "s": 1, "m": 60}[unit]


def by_systemd() -> tuple[list[str], dict[str, str]]:
    return shlex.split(unit()["ExecStart"]), dict(word.split("=", 1) for word in shlex.split(unit()["Environment"]))


def by_compose() -> tuple[list[str], dict[str, str]]:
    return SERVICE["command"], SERVICE["environment"]


def systemd(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd here")
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=100)


def test_systemd_finds_nothing_wrong_with_the_unit_and_little_that_is_open(tmp_path: Path) -> None:
    """With a program that is there: it looks for that too. Its score goes from 0, closed, to 10."""
    copy = tmp_path / "mpt.service"
    text = (EXAMPLES / "mpt.service").read_text()
    copy.write_text(text.replace("/opt/mpt/bin/mpt", sys.executable))
    done = systemd("verify", "--man=no", str(copy))
    assert (done.returncode, done.stderr.replace(str(copy), "")) == (0, "")
    assert systemd("security", "--offline=true", "--threshold=20", str(copy)).returncode == 0
    copy.write_text(text.replace("Restart=on-failure", "Restart=sometimes"))
    assert "sometimes" in systemd("verify", "--man=no", str(copy)).stderr


def test_what_no_start_heals_is_not_started_again() -> None:
    """By the exit codes of every error there is: a mistake and a damaged file are for people."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MPTError)]
    codes = {kind.__name__: kind.exit_code for kind in kinds}
    kept_down = {int(code) for code in unit()["RestartPreventExitStatus"].split()}
    assert unit()["Restart"] == "on-failure" and codes["DeviceLost"] == 6
    assert kept_down == {codes["UserError"], codes["DamagedFile"]} == {2, 3}
    assert not {codes["DeviceLost"], codes["MachineRefused"], 0} & kept_down
    assert SERVICE["restart"].startswith("on-failure:")  # Docker knows no codes, but an end


def test_the_stop_is_the_servers_own_and_longer_than_its_drain() -> None:
    drain_s = read_file(EXAMPLES / "serve.yaml")["drain_s"]
    assert unit()["KillSignal"] == SERVICE["stop_signal"] == "SIGTERM" and unit()["KillMode"] == "mixed"
    assert min(seconds(unit()["TimeoutStopSec"]), seconds(SERVICE["stop_grace_period"])) >= drain_s + 10


def test_the_compose_file_is_of_the_specification() -> None:
    assert COMPOSE.keys() <= {"services", "secrets", "volumes", "networks"} and SERVICE.keys() <= SERVICE_KEYS
    assert SERVICE["healthcheck"].keys() <= HEALTH_KEYS and SERVICE["healthcheck"]["test"][0] == "CMD"
    assert {each["source"] for each in SERVICE["secrets"]} == COMPOSE["secrets"].keys()
    image = (EXAMPLES.parents[1] / "Dockerfile").read_text()
    assert f"-t {SERVICE['image']}" in image and f"AS {SERVICE['build']['target']}\n" in image
    assert (EXAMPLES / SERVICE["build"]["context"]).resolve() == EXAMPLES.parents[1]
    user = SERVICE["user"].split(":")[0]
    assert f"USER {user}:" in image and f"uid={user}" in SERVICE["tmpfs"][0]
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        command = ["docker", "compose", "--file", str(EXAMPLES / "compose.yaml"), "config", "--quiet"]
        assert subprocess.run(command, capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("how", [by_systemd, by_compose])
def test_the_command_runs_with_its_environment_and_stops_at_its_signal(how, tmp_path, monkeypatch) -> None:
    """Folders of the machine lie in the test's, and it takes a free port; all else is as it stands."""
    command, environment = how()
    etc = tmp_path / "etc" / "mpt"
    etc.mkdir(parents=True)
    port = free_port()
    (etc / "serve.yaml").write_text((EXAMPLES / "serve.yaml").read_text().replace("8000", str(port)))
    (etc / "keys.txt").write_text("alice: sk-of-the-example tokens_per_day=1000\n")
    for name, value in environment.items():
        if name != "MPT_CACHE":  # the compiled C code, which another folder would have compiled again
            monkeypatch.setenv(name, f"{tmp_path}{value}" if value.startswith("/") else value)
    program, kind, *options = [word.replace("/etc/mpt", str(etc)) for word in command]
    assert Path(program).name == "mpt"
    server = servers.start(kind, *options)
    try:
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(SERVICE["healthcheck"]["test"][-1].replace("8000", str(port))).status_code == 200
        ask = {"model": "mpt-tiny-chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        headers = {"authorization": "Bearer sk-of-the-example"}
        assert httpx.post(f"{url}/v1/chat/completions", json=ask, headers=headers, timeout=100).status_code == 200
        assert httpx.post(f"{url}/v1/chat/completions", json=ask).status_code == 401
    finally:
        code = server.stop(signal.Signals[unit()["KillSignal"]])
    assert code == 0
    state = tmp_path / environment["XDG_STATE_HOME"].lstrip("/") / "mpt" / "quotas.sqlite"
    assert state.exists()  # inside the one folder that the service may write and that is kept


def test_a_mistake_in_the_file_ends_with_the_code_that_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("models: {a: {root: mpt-tiny, max_runing: 3}}\n")
    command = [sys.executable, "-m", "mpt", "serve", "--config", str(tmp_path / "serve.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert str(done.returncode) in unit()["RestartPreventExitStatus"].split()
