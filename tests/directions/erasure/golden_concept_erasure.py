"""Write golden_concept_erasure.json: what the package concept-erasure computes on rows that a formula makes.

Run it where that package is installed (0.2.4 was used; it is no dependency of assay):

    python tests/directions/erasure/golden_concept_erasure.py

Every number is float64 on one thread; the rows come from `rows()` below, which the test imports too.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def rows(n: int, d: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated rows whose means depend on the class, by PCG64 from a fixed seed."""
    rng = np.random.Generator(np.random.PCG64(n * 1000 + d * 10 + classes))
    y = np.arange(n) % classes
    mixing = rng.standard_normal((d, d)) * np.geomspace(3, 0.1, d)
    means = rng.standard_normal((classes, d))
    return rng.standard_normal((n, d)) @ mixing + means[y] + 1.0, y


CASES = [(600, 8, 2), (600, 8, 3), (90, 12, 2)]


def main() -> None:
    import importlib.metadata

    import torch
    from concept_erasure import LeaceFitter

    torch.set_num_threads(1)
    found = []
    for n, d, classes in CASES:
        x, y = rows(n, d, classes)
        z = torch.nn.functional.one_hot(torch.from_numpy(y), classes).double()
        for shrinkage in (False, True):
            eraser = LeaceFitter.fit(torch.from_numpy(x), z, shrinkage=shrinkage).eraser
            case = {"n": n, "d": d, "classes": classes, "shrinkage": shrinkage, "method": "leace"}
            found.append(case | {"P": eraser.P.tolist(), "row0": eraser(torch.from_numpy(x))[0].tolist()})
        orth = LeaceFitter.fit(torch.from_numpy(x), z, method="orth").eraser
        case = {"n": n, "d": d, "classes": classes, "shrinkage": False, "method": "orth"}
        found.append(case | {"P": orth.P.tolist(), "row0": orth(torch.from_numpy(x))[0].tolist()})
    origin = {
        "package": f"concept-erasure {importlib.metadata.version('concept-erasure')}",
        "torch": torch.__version__,
        "settings": "defaults but shrinkage; float64, CPU, one thread",
        "script": Path(__file__).name,
    }
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps({"origin": origin, "cases": found}) + "\n")


if __name__ == "__main__":
    main()
