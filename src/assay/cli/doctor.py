"""`assay doctor`: what is installed, what is missing and which extra brings it, the cache, and the tests' browser."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from assay.base.artifacts import home
from assay.base.version import __version__
from assay.cli.present import byte_text, output
from assay.studies.store import cache_sizes

DISTRIBUTION = "assay"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A package that assay asks for.

    Attributes:
        name: Its name.
        wanted: The versions asked for, as in pyproject: `>=1.13`.
        installed: The version there is, or None.
        fits: Whether that version is among those asked for.
        extras: The extras of assay that bring it; empty for a package assay cannot do without.
    """

    name: str
    wanted: str
    installed: str | None
    fits: bool
    extras: tuple[str, ...]

    @property
    def core(self) -> bool:
        """Whether assay cannot do without it."""
        return not self.extras

    @property
    def state(self) -> str:
        """What is the matter with it, and what mends it."""
        if self.installed is None or not self.fits:
            problem = "missing" if self.installed is None else f"{self.installed} does not fit {self.wanted}"
            brings = "assay" if self.core else f"assay[{self.extras[0]}]"
            return f'{problem}: pip install "{brings}"'
        return "ok"


def packages(distribution: str = DISTRIBUTION) -> tuple[Package, ...] | None:
    """Return what the installed distribution asks for, core first; None when it is not installed as one.

    The distribution's own metadata, made from pyproject, is the only source.

    Args:
        distribution: The distribution's name.
    """
    try:
        asked = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    extras: dict[str, list[str]] = {}
    wanted: dict[str, list[str]] = {}
    for line in asked:
        requirement, _, marker = line.partition(";")
        match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[[^\]]*\])?\s*\(?([^)]*)\)?", requirement)
        if match is None or _normal(match.group(1)) == _normal(distribution):
            continue  # an extra made of other extras
        name, extra = _normal(match.group(1)), re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        wanted.setdefault(name, []).extend(filter(None, [match.group(2).strip()]))
        extras.setdefault(name, []).append(extra.group(1) if extra else "")
    found = [_package(name, ",".join(dict.fromkeys(wanted[name])), extras[name]) for name in wanted]
    return tuple(sorted(found, key=lambda package: (package.extras, package.name)))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _package(name: str, wanted: str, extras: list[str]) -> Package:
    try:
        installed: str | None = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return Package(
        name=name,
        wanted=wanted,
        installed=installed,
        fits=installed is not None and _fits(installed, wanted),
        extras=() if "" in extras else tuple(sorted(set(extras))),
    )


def _fits(version: str, wanted: str) -> bool:
    """Tell whether a version is among those asked for; where it cannot be told, it is taken to be."""
    try:
        from packaging.specifiers import InvalidSpecifier, SpecifierSet
        from packaging.version import InvalidVersion
    except ImportError:
        return True
    try:
        return SpecifierSet(wanted).contains(version, prereleases=True)
    except (InvalidSpecifier, InvalidVersion):
        return True


def torch_facts() -> dict[str, Any]:
    """Return the version of torch, its threads and its CUDA devices, or why it cannot be used."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"problem": f"cannot be imported: {error}"}
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "version": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda or "not built in",
        "devices": devices if torch.cuda.is_available() else [],
    }


def facts(distribution: str = DISTRIBUTION) -> dict[str, Any]:
    """Return everything `doctor` reports, as JSON values."""
    folder = home()
    near = next(path for path in (folder, *folder.parents) if path.exists())
    listed = packages(distribution)
    return {
        "assay": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "torch": torch_facts(),
        "installed": listed is not None,
        "packages": [{**dataclasses.asdict(package), "state": package.state} for package in listed or ()],
        "cache": {
            "folder": str(folder),
            "bytes": sum(entry.bytes for entry in cache_sizes()),
            "free": shutil.disk_usage(near).free,
            "writable": os.access(near, os.W_OK),
        },
        "browser": next((path for name in BROWSERS if (path := shutil.which(name))), None),
    }


def doctor(*, as_json: bool, distribution: str = DISTRIBUTION, console: Console | None = None) -> int:
    """Print the report; return 1 when a package that assay cannot do without is missing, else 0."""
    report = facts(distribution)
    broken = [package for package in report["packages"] if not package["extras"] and package["state"] != "ok"]
    if as_json:
        sys.stdout.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    else:
        _show(report, console or output())
    return 1 if broken or "problem" in report["torch"] else 0


def _show(report: dict[str, Any], console: Console) -> None:
    torch, cache = report["torch"], report["cache"]
    devices = ", ".join(torch.get("devices", [])) or "none"
    rows = [
        ("assay", report["assay"]),
        ("python", f"{report['python']} ({report['executable']})"),
        ("platform", f"{report['platform']}, {report['processors']} processors"),
        (
            "torch",
            torch.get("problem")
            or f"{torch['version']}, {torch['threads']} threads, CUDA {torch['cuda']}, devices: {devices}",
        ),
        ("cache", f"{cache['folder']}: {byte_text(cache['bytes'])} used, {byte_text(cache['free'])} free on its disk"),
        ("browser", report["browser"] or f"none of {', '.join(BROWSERS)} on PATH (only the report's tests need one)"),
    ]
    if not cache["writable"]:
        rows.append(("", "the cache cannot be written: set ASSAY_HOME to a folder that can"))
    facts_table = Table(box=None, show_header=False, pad_edge=False)
    for label, text in rows:
        facts_table.add_row(Text(label, style="bold"), Text(str(text)))
    console.print(facts_table)
    console.print()
    if not report["installed"]:
        console.print(
            'assay runs from its source and is not installed, so its packages are unknown: pip install -e "."',
            markup=False,
        )
        return
    table = Table(box=None, pad_edge=False)
    for column in ("Package", "Installed", "Wanted", "Brought by", "State"):
        table.add_column(column)
    for package in report["packages"]:
        brings = ", ".join(package["extras"]) or "assay itself"
        fine = package["state"] == "ok"
        style = "" if fine else "yellow" if package["extras"] else "bold red"
        table.add_row(
            package["name"], package["installed"] or "-", package["wanted"], brings, Text(package["state"], style)
        )
    console.print(table)
