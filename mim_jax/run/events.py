# SPDX-License-Identifier: Apache-2.0
"""Event files for TensorBoard."""

import io
import socket
import struct
import time
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from mim_jax.run import files

_EVENTS: Any = event_pb2  # its classes are made when it is imported
_START = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)


class Events:
    """Writes the events of one process to a file of its own.

    The writer of tensorboardX writes in a thread, which ends when the disk is full;
    then the next calls block for ever. This one raises.

    Args:
        folder: made if absent, in a folder that exists.
        step: where the run goes on. TensorBoard hides what an earlier process wrote of
            later steps.
    Raises:
        DiskError: the folder cannot be made.
        OSError: the file cannot be written; so do all methods.

    Attributes:
        path: of the file.
    """

    def __init__(self, folder: files.Place, step: int):
        files.make(folder)
        seconds = f"{int(time.time()):010d}"  # names are in the order of their time
        self.path = folder / f"events.out.tfevents.{seconds}.{socket.gethostname()}"
        self._file = files.append(self.path)
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=_START)

    def scalar(self, name: str, value: float | int, step: int) -> None:
        """Add a number."""
        self._add(step=step, summary=summary.scalar(name, value))

    def picture(self, name: str, path: files.Place, step: int) -> None:
        """Add the picture of a file."""
        with Image.open(io.BytesIO(files.read(path))) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._add(step=step, summary=summary.image(name, pixels, dataformats="HWC"))

    def flush(self) -> None:
        """Bring what was added to the disk, so that TensorBoard shows it."""
        files.flush(self._file)

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _add(self, **about: Any) -> None:
        data = _EVENTS.Event(wall_time=time.time(), **about).SerializeToString()
        length = struct.pack("<Q", len(data))
        for part in (length, data):
            self._file.write(part + struct.pack("<I", masked_crc32c(part)))
