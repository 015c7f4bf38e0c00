"""The systemd unit and the container file of examples/, as far as they can be used here."""

import configparser
import json
import re
import shlex
import shutil
import subprocess

import pytest
from builds import ROOT
from serving import Server

UNIT = ROOT / "examples" / "moba.service"
CONTAINER = ROOT / "examples" / "Containerfile"
NEEDLE = ROOT / "models" / "needle-2m"


def run_as_written(build_folder, arguments, paths):
    """Start the server with the arguments of an example, the model, the port and `paths` replaced; return it."""
    assert arguments[:4] == ["/opt/moba/bin/moba", "serve", "-m", arguments[3]]
    assert arguments[arguments.index("--port") + 1] == "8080"
    paths = {arguments[3]: NEEDLE, "8080": 0, **paths}
    flags = [paths.get(argument, argument) for argument in arguments[2:]]
    return Server(build_folder, *flags, "--cache-size", "64m")


def test_unit_starts_the_server(build_folder, tmp_path):
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(UNIT)
    service = unit["Service"]
    assert service["CacheDirectory"] == service["StateDirectory"] == "moba"
    assert service["Environment"].startswith("MODEL=/var/lib/moba/")
    server = run_as_written(
        build_folder, shlex.split(service["ExecStart"]), {"${CACHE_DIRECTORY}": tmp_path / "cache"}
    )
    assert server.send("/health")[0] == 200
    assert server.stop() == (0, "")
    assert (tmp_path / "cache").is_dir()


def test_drop_in_of_the_unit_listens_with_a_key(build_folder, tmp_path):
    (line,) = re.findall(r"^#\s+ExecStart=(/.*)$", UNIT.read_text(), re.M)
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    paths = {"${CACHE_DIRECTORY}": tmp_path / "cache", "${CREDENTIALS_DIRECTORY}/keys": keys}
    server = run_as_written(build_folder, [*shlex.split(line), "--port", "8080"], paths)
    server.url = f"http://127.0.0.1:{server.port}"
    assert server.send("/v1/models")[0] == 401
    assert server.send("/v1/models", Authorization="Bearer key")[0] == 200
    assert server.stop() == (0, "")


def test_systemd_accepts_the_unit(tmp_path):
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    # The program must exist for it.
    text = UNIT.read_text().replace("/opt/moba/bin/moba", "/bin/true")
    (tmp_path / "moba.service").write_text(text)
    done = subprocess.run(
        [program, "verify", "--man=no", tmp_path / "moba.service"], capture_output=True, text=True
    )
    said = [line for line in done.stderr.splitlines() if "moba.service" in line]
    assert done.returncode == 0 and said == [], done.stderr


def container_steps():
    """Return [(instruction, rest)] of the container file."""
    text = re.sub(r"\\\n", " ", CONTAINER.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def test_container_file_starts_a_healthy_server(build_folder, tmp_path):
    steps = dict(container_steps())
    assert list(steps) == [
        "FROM",
        "ADD",
        "RUN",
        "USER",
        "VOLUME",
        "EXPOSE",
        "HEALTHCHECK",
        "ENTRYPOINT",
    ]
    keys = tmp_path / "keys"
    keys.write_text("key\n")
    entry = json.loads(steps["ENTRYPOINT"])
    paths = {"/run/secrets/keys": keys, "/cache": tmp_path / "cache"}
    server = run_as_written(build_folder, entry, paths)
    command = json.loads(steps["HEALTHCHECK"].split("CMD ")[1])
    check = [part.replace("8080", str(server.port)) for part in command]
    assert subprocess.run(check, timeout=20).returncode == 0
    assert server.stop() == (0, "")
    assert subprocess.run(check, timeout=20, stderr=subprocess.DEVNULL).returncode != 0


def test_container_file_unpacks_the_archive_of_make_dist(tmp_path):
    """Does what ADD and RUN do, in a folder instead of the root, with an archive that is named as make dist names it."""
    steps = dict(container_steps())
    pattern, place = steps["ADD"].split()
    name = re.search(r'NAME = f"(moba-.*)"', (ROOT / "tools" / "make_dist.py").read_text())[1]
    name = re.sub(r"\{.*?\}", "x", name)
    context, root = tmp_path / "dist", tmp_path / "root"
    (context / name / "bin").mkdir(parents=True)
    (context / name / "bin" / "moba").write_text("#!/bin/sh\necho started\n")
    (context / name / "bin" / "moba").chmod(0o755)
    subprocess.run(["tar", "cfz", f"{name}.tar.gz", name], cwd=context, check=True)
    (archive,) = context.glob(pattern)
    (root / "opt").mkdir(parents=True)
    subprocess.run(["tar", "xf", archive, "-C", f"{root}{place}"], check=True)
    commands = [command.strip() for command in steps["RUN"].split("&&")]
    assert [command.split()[0] for command in commands] == ["ln", "useradd", "install"]
    subprocess.run(["sh", "-ec", commands[0].replace("/opt/", f"{root}/opt/")], check=True)
    started = subprocess.run(
        [root / "opt" / "moba" / "bin" / "moba"], capture_output=True, text=True
    )
    assert started.stdout == "started\n"
    subprocess.run(
        ["sh", "-ec", commands[2].replace("-o moba ", "").replace(" /", f" {root}/")], check=True
    )
    assert (root / "cache").is_dir() and (root / "models").is_dir()
