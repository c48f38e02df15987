# SPDX-License-Identifier: Apache-2.0
"""Writes similarity.json: FSIM and FSIMc by piq, on distorted embedded photographs.

python tests/golden/make_similarity.py, where the extra `oracle` is installed.
"""

import json
import pathlib

import numpy as np
import piq
import torch
from distorted import pairs


def main() -> None:
    values = {}
    for name, image, reference in pairs():
        tensors = [
            torch.tensor(np.moveaxis(x, -1, 0)[None]) for x in (image, reference)
        ]
        values[name] = [
            float(piq.fsim(*tensors, data_range=1.0, chromatic=chromatic))
            for chromatic in (False, True)
        ]
    found = {
        "command": "python tests/golden/make_similarity.py",
        "versions": {"piq": piq.__version__, "torch": torch.__version__},
        "fsim_fsimc": values,
    }
    path = pathlib.Path(__file__).parent / "similarity.json"
    path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
