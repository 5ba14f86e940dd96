"""The containers as far as they can be checked without an engine: what compose.yaml and the Dockerfiles promise."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from worker import queues
from worker.core import settings

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PINNED = re.compile(r"[\w./-]+:\d+\.\d+(\.\d+)?[\w.-]*")
URL = re.compile(r"http://127\.0\.0\.1:(\d+)/readyz")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = ("worker", "dicom_listener", "mu2_model", "training", "migrations")
RUN_BY = {  # the modules that an image's commands begin with, in compose.yaml
    "migrations": ("worker.__main__", "worker.cli.database", "migrations.env"),
    "listener": ("worker.__main__", "worker.cli.listener", "dicom_listener.receivers", "worker.cli.retention"),
    "worker-cpu": ("worker.celery", "worker.tasks", "worker.process", "worker.consumer"),
    "worker-gpu": ("worker.celery", "worker.tasks", "worker.process", "worker.consumer"),
    "review": ("worker.__main__", "worker.cli.review", "worker.cli.user"),
}
OF_AN_EXTRA_THAT_A_SITE_CHOOSES = {"torchao"}  # int8 weights
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
TORCH_WITH_CUDA = "2.13.0"  # the release whose needs are the next two; resolve them again for another
EXACT_NEEDS_OF_CUDA = {  # torch's own metadata on PyPI, for Linux
    "nvidia-cudnn-cu13": "9.20.0.48",
    "nvidia-cusparselt-cu13": "0.8.1",
    "nvidia-nccl-cu13": "2.29.7",
    "nvidia-nvshmem-cu13": "3.4.5",
    "triton": "3.7.1",
}
OPEN_NEEDS_OF_CUDA = {  # ranges, there or in the metadata of cuda-toolkit 13.0.3 and what that brings
    "cuda-bindings",
    "cuda-pathfinder",
    "cuda-toolkit",
    *(
        f"nvidia-{name}"
        for name in ("cublas", "cufft", "cufile", "curand", "cusolver", "cusparse", "nvjitlink", "nvtx")
    ),
    *(f"nvidia-cuda-{name}" for name in ("cupti", "nvrtc", "runtime")),
}
IN_THE_IMAGE = {"python", "mu2", "sh", "find", "grep", "redis-cli", "pg_isready"}  # slim has findutils and grep


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, continued lines joined."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


def extras_of(path: Path) -> tuple[str, ...]:
    """The extras of this project that a Dockerfile installs."""
    installs = [shlex.split(argument)[-1] for word, argument in instructions(path) if "pip install" in argument]
    return tuple(part for part in re.findall(r"\[(.*)\]", installs[-1]) for part in part.split(","))


def brought_by(extras: Iterable[str]) -> set[str]:
    """The distributions that these extras install, all that they need in turn included."""
    names = [*PROJECT["dependencies"], *(line for e in extras for line in PROJECT["optional-dependencies"][e])]
    waiting = [Requirement(line) for line in names]
    seen: set[tuple[str, str]] = set()
    while waiting:
        wanted = waiting.pop()
        for extra in ("", *wanted.extras):
            key = (canonicalize_name(wanted.name), extra)
            if key in seen:
                continue
            seen.add(key)
            try:
                lines = metadata.requires(wanted.name) or []
            except metadata.PackageNotFoundError:  # for another platform
                continue
            needed = [Requirement(line) for line in lines]
            waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def file_of(module: str) -> Path | None:
    """Where a module of ours stands."""
    place = ROOT.joinpath(*module.split("."))
    return next((p for p in (place.with_suffix(".py"), place / "__init__.py") if p.exists()), None)


def imports_of(path: Path, *, in_functions: bool) -> set[str]:
    """The dotted names that a file imports when it is loaded, and those that its functions import where asked for."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            if not for_types and (in_functions or not isinstance(node, ast.FunctionDef)):
                waiting.append(node)
    return found


def foreign_modules(entries: Iterable[str]) -> dict[str, str]:
    """What these modules import that is not ours, all that they import of ours included, and who imports it.

    A command imports what it needs when it runs; so of `worker.cli` only the entries' own functions count.
    """
    entries = set(entries)
    waiting, seen, foreign = list(entries), set[str](), dict[str, str]()
    while waiting:
        module = waiting.pop()
        if module in seen or (path := file_of(module)) is None:
            continue
        seen.add(module)
        for name in imports_of(path, in_functions=module in entries or not module.startswith("worker.cli")):
            top, *rest = name.split(".")
            if top in PACKAGES:
                waiting += [".".join([top, *rest[:depth]]) for depth in range(len(rest) + 1)]
            elif top not in sys.stdlib_module_names:
                foreign[top] = module
    return foreign


def environment(service: dict[str, Any]) -> dict[str, str]:
    """What a service's process sees: the example's variables, then its own."""
    variables: dict[str, str] = {}
    for line in (DOCKER / "settings.example.env").read_text().splitlines():
        if line and not line.startswith("#"):
            name, value = line.split("=", 1)
            variables[name] = "".join(shlex.split(value))
    return variables | {name: str(value) for name, value in service.get("environment", {}).items()}


def settings_of(service: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> settings.Settings:
    """The settings that a service would load, its secrets played by small files."""
    for name in [name for name in os.environ if name.startswith("MU2_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MU2_CONFIG", os.devnull)
    for name, value in environment(service).items():
        if name.startswith("MU2_"):
            if name.endswith("_FILE"):
                secret = folder / Path(value).name
                secret.write_text("sqlite:///x" if "DATABASE" in name else "redis://redis:6379/0")
                value = str(secret)
            monkeypatch.setenv(name, value)
    return settings.load()


def test_there_is_a_dockerfile_for_every_service_of_ours_and_no_other() -> None:
    named = {ROOT / service["build"]["dockerfile"] for service in OURS.values()}
    assert named == set(DOCKERFILES)
    assert {(DOCKER / service["build"]["context"]).resolve() for service in OURS.values()} == {ROOT}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_memory_limit_and_bounded_logs(name: str) -> None:
    assert "mem_limit" in SERVICES[name] and "max-size" in SERVICES[name]["logging"]["options"]


@pytest.mark.parametrize("name", sorted(set(SERVICES) - set(OURS)))
def test_foreign_images_are_pinned_and_run_without_root(name: str) -> None:
    assert PINNED.fullmatch(SERVICES[name]["image"])
    assert SERVICES[name]["user"] not in ("root", "0")


@pytest.mark.parametrize("name", OURS)
def test_services_of_ours_cannot_gain_rights_or_write_into_their_image(name: str) -> None:
    service = OURS[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_dockerfile_is_pinned_and_ends_without_root_and_with_a_health_check(path: Path) -> None:
    found = instructions(path)
    images = [argument.split()[0] for word, argument in found if word == "FROM"]
    users = [argument for word, argument in found if word == "USER"]
    assert images
    assert all(PINNED.fullmatch(image) for image in images), images
    assert users and users[-1] not in ("root", "0")
    assert any(word == "HEALTHCHECK" for word, _ in found)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_dockerfile_copies_what_exists_and_what_dockerignore_lets_through(path: Path) -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = [a for word, a in instructions(path) if word == "COPY" and not a.startswith("--from")]
    sources = {source for copy in copies for source in copy.split()[:-1]}
    assert sources
    assert {source for source in sources if not (ROOT / source).exists()} == set()
    assert sources - let_through == set()


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = settings_of(OURS[name], tmp_path, monkeypatch)
    assert loaded.hl7.destinations[0].drafts == "none"
    assert [peer.ae_title for peer in loaded.dicom.peers] == ["PACS", "ER_CT"]


@pytest.mark.parametrize("name", OURS)
def test_secrets_come_from_files_that_the_service_is_given(name: str) -> None:
    variables = environment(OURS[name])
    files = {Path(value).name for key, value in variables.items() if key.endswith("_FILE")}
    assert files == {"database_url", "queue_url"}
    mounted = {Path(value).name for value in variables.values() if value.startswith("/run/secrets/")}
    assert mounted == set(OURS[name]["secrets"])
    assert not any("PASSWORD" in key or re.search(r"://[^/]*:[^/]*@", value) for key, value in variables.items())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_image_holds_every_package_that_its_commands_import(path: Path) -> None:
    brought = brought_by(extras_of(path))
    makers = {m: {canonicalize_name(d) for d in made} for m, made in metadata.packages_distributions().items()}
    foreign = foreign_modules(RUN_BY[path.name.removesuffix(".Dockerfile")])
    assert {"sqlalchemy", "structlog"} <= set(foreign)
    missing = {m: user for m, user in foreign.items() if not makers.get(m, set()) & brought}
    assert set(missing) <= OF_AN_EXTRA_THAT_A_SITE_CHOOSES, missing


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_user_of_the_image_owns_what_compose_lets_it_write(path: Path) -> None:
    text = path.read_text()
    (uid,) = re.findall(r"useradd --uid (\d+) --user-group .* mu2 ", text)
    (owned,) = [set(line.split()) for line in re.findall(r"install -d -o mu2 -g mu2 -m 0750 (.*)", text)]
    for service in OURS.values():
        if service["build"]["dockerfile"] != f"docker/{path.name}":
            continue
        mounts = [volume.split(":") for volume in service.get("volumes", [])]
        assert {target for _, target, *mode in mounts if mode != ["ro"]} <= owned
        assert [t for t in service["tmpfs"] if t.startswith("/var/lib/mu2:")] == [
            f"/var/lib/mu2:uid={uid},gid={uid},mode=0750"
        ]
    (home,) = re.findall(r"MU2_HOME=(\S+)", text)
    assert home in owned


@pytest.mark.parametrize("name", SERVICES)
def test_health_check_runs_programs_that_its_image_has(name: str) -> None:
    kind, *words = SERVICES[name]["healthcheck"]["test"]
    programs = {words[0]} if kind == "CMD" else {part.split()[0] for part in words[0].split(" | ")}
    assert programs <= IN_THE_IMAGE


def test_images_hold_what_ships_and_no_state_of_this_machine() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_through = {line[1:] for line in rules if line.startswith("!")}
    assert let_through == {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", *PACKAGES}
    hidden = [line.removeprefix("**/") for line in rules[1:] if not line.startswith("!")]
    shipped = [p for package in PACKAGES for p in (ROOT / package).rglob("*") if p.suffix in (".safetensors", ".dcm")]
    assert shipped
    for path in shipped:
        assert not any(part == rule or path.match(rule) for rule in hidden for part in path.relative_to(ROOT).parts)


@pytest.mark.parametrize("package", ["worker", "dicom_listener", "mu2_model", "migrations"])
def test_package_takes_every_file_of_it_along(package: str) -> None:
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"].get(package, [])
    taken = {path for pattern in patterns for path in (ROOT / package).glob(pattern)}
    files = {p for p in (ROOT / package).rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {p for p in files - taken if p.suffix != ".py"} == set()


def test_gpu_image_takes_torch_with_cuda_and_the_others_may_take_it_without() -> None:
    assert re.fullmatch(r"[\d.]+", PINS["torch"]), "a local version (+cpu) would keep CUDA out of the GPU worker"
    assert "TORCH_INDEX" not in (DOCKER / "worker-gpu.Dockerfile").read_text()
    assert "args" not in OURS["worker-gpu"]["build"]
    for name in ("worker-cpu", "review"):
        assert OURS[name]["build"]["args"] == ["TORCH_INDEX"]


def test_what_torch_with_cuda_brings_is_pinned() -> None:
    assert PINS["torch"] == TORCH_WITH_CUDA
    assert {name: PINS.get(name) for name in EXACT_NEEDS_OF_CUDA} == EXACT_NEEDS_OF_CUDA
    assert OPEN_NEEDS_OF_CUDA - set(PINS) == set()


def test_all_that_is_installed_for_our_extras_is_pinned() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"int8"}
    installed = {canonicalize_name(found.name) for found in metadata.distributions()}
    assert brought_by(extras) & installed - {canonicalize_name(name) for name in PINS} == set()


def test_every_secret_is_declared_and_made(tmp_path: Path) -> None:
    script = tmp_path / "make-secrets.sh"
    script.write_text((DOCKER / "make-secrets.sh").read_text())
    subprocess.run(["sh", script], check=True)
    first = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    subprocess.run(["sh", script], check=True)

    made_elsewhere = set() if shutil.which("openssl") else {"review_certificate", "review_key"}
    assert {Path(secret["file"]).name for secret in COMPOSE["secrets"].values()} <= set(first) | made_elsewhere
    assert first == {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}, (
        "a second run changes nothing"
    )
    assert first["postgres_password"] in first["database_url"] and "@postgres:5432/mu2" in first["database_url"]
    assert first["redis_password"] in first["queue_url"] and "@redis:6379/" in first["queue_url"]
    assert f"requirepass {first['redis_password']}" in first["redis_conf"]
    assert "maxmemory-policy noeviction" in first["redis_conf"]


def test_every_queue_is_served_once() -> None:
    served = [
        queue
        for service in OURS.values()
        if "celery" in service.get("command", [])
        for queue in service["command"][service["command"].index("-Q") + 1].split(",")
    ]
    assert sorted(served) == sorted(queues.QUEUES)


@pytest.mark.parametrize(
    ("name", "group"),
    [("listener", "dicom"), ("worker-cpu", "worker"), ("worker-gpu", "worker"), ("review", "review")],
)
def test_health_checks_and_ports_match_the_settings(
    name: str, group: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = settings_of(OURS[name], tmp_path, monkeypatch)
    port = getattr(loaded, group).metrics_port
    health = " ".join(OURS[name]["healthcheck"]["test"])
    dockerfile = (ROOT / OURS[name]["build"]["dockerfile"]).read_text()
    assert [int(p) for p in URL.findall(health)] == [int(p) for p in URL.findall(dockerfile)] == [port]
    assert OURS[name]["expose"] == [str(port)]
    if name == "listener":
        assert OURS[name]["ports"] == [f"{loaded.dicom.port}:{loaded.dicom.port}"]
        assert loaded.dicom.host == "0.0.0.0"
    else:
        assert str(port) not in " ".join(OURS[name].get("ports", []))
    assert getattr(loaded, group).metrics_host == "0.0.0.0"


def test_the_review_page_speaks_tls_on_the_port_that_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = settings_of(OURS["review"], tmp_path, monkeypatch)
    assert loaded.review.tls_certificate is not None and loaded.review.tls_key is not None
    assert OURS["review"]["ports"] == [f"443:{loaded.review.port}"]


def test_the_gpu_worker_is_sized_for_one_a40(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = OURS["worker-gpu"]
    loaded = settings_of(gpu, tmp_path, monkeypatch)
    assert gpu["runtime"] == "nvidia"
    assert (loaded.model.device, loaded.model.dtype, loaded.model.max_batch) == ("cuda", "bfloat16", 8)
    assert str(loaded.model.path) in {volume.split(":")[1] for volume in gpu["volumes"]}


def test_databases_are_reachable_from_inside_only() -> None:
    assert COMPOSE["networks"]["inside"]["internal"]
    for name in ("redis", "postgres", "worker-gpu"):
        assert SERVICES[name]["networks"] == ["inside"] and "ports" not in SERVICES[name]


def test_instances_lie_in_one_volume_that_listener_and_workers_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("listener", "worker-cpu", "worker-gpu", "review"):
        dockerfile = (ROOT / OURS[name]["build"]["dockerfile"]).read_text()
        assert "store:/srv/mu2/store" in OURS[name]["volumes"]
        assert "MU2_STORE__URL=/srv/mu2/store" in dockerfile


def test_retention_runs_each_day_on_the_store_and_ends_when_a_run_fails(tmp_path: Path) -> None:
    service = OURS["retention"]
    assert "store:/srv/mu2/store" in service["volumes"]
    shell, flag, loop = service["command"]
    for program, works in (("mu2", "test $(wc -l < ../said) -lt 6"), ("sleep", "true")):
        script = tmp_path / "bin" / program
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\ncd "$(dirname "$0")"\necho {program} "$@" >> ../said\n{works}\n')
        script.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    subprocess.run(
        [shell, flag, loop.replace("/tmp/ran", str(tmp_path / "ran"))], env={"PATH": path}, check=True, timeout=20
    )
    said = (tmp_path / "said").read_text().splitlines()
    assert said == ["mu2 retention run --yes", "sleep 86400"] * 3 + ["mu2 retention run --yes"]
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_no_dockerfile_takes_the_packages_around_torch_from_the_index_of_torch(path: Path) -> None:
    runs = [argument for word, argument in instructions(path) if word == "RUN" and "index-url" in argument]
    assert all("--no-deps" in argument and "://" not in argument for argument in runs)
