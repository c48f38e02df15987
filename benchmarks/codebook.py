# SPDX-License-Identifier: Apache-2.0
"""Makes mim_jax/tokenizers/kmeans.npz, the codewords of the tokenizer `kmeans`.

python benchmarks/codebook.py

Random squares of 8 to 64 pixels a side of the embedded photographs' training files,
averaged down to 4 x 4 pixels; k-means with a fixed seed; centres rounded to 8 bits, by
ascending mean value. Takes 15 seconds on one core. Other versions of the libraries
may round to slightly other centres: the committed file is what counts, and it holds
this command and the versions that made it.
"""

import hashlib
import json
import platform

import numpy as np
import PIL
import skimage
import sklearn
from PIL import Image
from sklearn.cluster import KMeans

from mim_jax.data.sources.photos import TRAIN, Photos, locate
from mim_jax.tokenizers.kmeans import CODEBOOK, SIDE

WORDS = 512
SQUARES = 4000  # of each photograph
LEAST, MOST = 8, 64  # side of a square in pixels
SEED = 0


def squares() -> np.ndarray:
    """Random squares, SIDE x SIDE x 3 numbers in 0..255 each, as rows."""
    random = np.random.RandomState(SEED)  # its streams are frozen
    source, rows = Photos(), []
    for index in range(len(source)):
        photograph = Image.fromarray(source[index]["image"])
        for _ in range(SQUARES):
            side = int(round(LEAST * (MOST / LEAST) ** random.uniform()))
            left = random.randint(photograph.width - side + 1)
            top = random.randint(photograph.height - side + 1)
            box = (left, top, left + side, top + side)
            small = photograph.resize((SIDE, SIDE), Image.Resampling.BOX, box)
            rows.append(np.asarray(small).reshape(-1))
    return np.stack(rows).astype(np.float64)


def main() -> None:
    rows = squares()
    fitted = KMeans(WORDS, n_init=1, max_iter=100, random_state=SEED).fit(rows)
    words = np.round(fitted.cluster_centers_).astype(np.uint8)
    words = words[np.argsort(fitted.cluster_centers_.mean(axis=1), kind="stable")]
    assert len(np.unique(words, axis=0)) == WORDS
    made = {
        "command": "python benchmarks/codebook.py",
        "squares": len(rows),
        "mean_squared_error": round(float(fitted.inertia_ / rows.size), 2),
        "sha256": {
            name: hashlib.sha256(locate(name).read_bytes()).hexdigest()
            for name in TRAIN
        },
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "scikit-image": skimage.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    shape = (WORDS, SIDE, SIDE, 3)
    record = np.array(json.dumps(made))
    np.savez_compressed(CODEBOOK, codewords=words.reshape(shape), made=record)
    size = CODEBOOK.stat().st_size
    variance = round(float(rows.var(axis=0).mean()), 2)
    print(json.dumps({**made, "bytes": size, "variance": variance}, indent=2))


if __name__ == "__main__":
    main()
