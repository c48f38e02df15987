# SPDX-License-Identifier: Apache-2.0
"""mim_jax.main as one host of several, watched: for hosts_test.py.

What it reads goes to $READS/<process>, a line per record of the training split.
$UNREADABLE="process:step" makes that host unable to read that step's checkpoint,
$UNDECODABLE="index,..." makes those records no images, $DRAWING=seconds makes the
first host's report slow, $SOON=seconds how long a host looks for what the first one
writes. HOST in the arguments is the number of this host.
"""

import os
import pathlib
import sys
import time

from absl import app

from mim_jax import main, train
from mim_jax.data.sources.digits import Digits
from mim_jax.run import digests, rundir, storage
from mim_jax.run.commandline import parse

HOST = os.environ.get("JAX_PROCESS_ID", "0")
read_record, restored = Digits.__getitem__, storage.read_tree
report = train.report.measure
bad_records = set(map(int, os.environ.get("UNDECODABLE", "-1").split(",")))
bad_host, _, bad_step = os.environ.get("UNREADABLE", "").partition(":")


def reading(self, index):
    if self.split == "train" and "READS" in os.environ:
        with (pathlib.Path(os.environ["READS"]) / HOST).open("a") as file:
            file.write(f"{index}\n")
    record = read_record(self, index)
    return record | {"image": b"no image"} if index in bad_records else record


def restoring(folder, step, target):
    if (HOST, str(step)) == (bad_host, bad_step):
        raise digests.DamageError("this host's part is gone")
    return restored(folder, step, target)


def reporting(*given):
    if HOST == "0":
        time.sleep(float(os.environ.get("DRAWING", "0")))
    report(*given)


if __name__ == "__main__":
    Digits.__getitem__ = reading
    storage.read_tree = restoring
    train.report.measure = reporting
    rundir._SOON = float(os.environ.get("SOON", "30"))
    sys.argv = [word.replace("HOST", HOST) for word in sys.argv]
    app.run(main.main, flags_parser=parse)
