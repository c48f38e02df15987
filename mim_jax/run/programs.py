# SPDX-License-Identifier: Apache-2.0
"""Where compiled programs are kept, so that the next start need not compile them.

They are native code, which JAX loads and runs by their names alone. A run directory may
come from somebody else, so they are never kept there, but in a folder of the user's.
"""

import os
import pathlib
import sys

import jax


def folder() -> pathlib.Path:
    """`mim_jax/compiled` in the user's folder for caches ($XDG_CACHE_HOME)."""
    caches = os.environ.get("XDG_CACHE_HOME", "") or "~/.cache"
    return pathlib.Path(caches).expanduser() / "mim_jax" / "compiled"


def keep() -> None:
    """Let this process keep its compiled programs, and take those of earlier ones.

    JAX_COMPILATION_CACHE_DIR, as JAX itself reads it, names another folder. Whoever may
    write there can run code here. Where there is no folder that only this user may
    write, programs are not kept, and a line says so.
    """
    # XLA's own caches put the folder's name into the key of each program.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    place = "the user's folder for caches"
    try:
        place = folder()
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = place.stat()
        mine = about.st_uid == os.geteuid() and not about.st_mode & 0o022
        why = "" if mine else "others may write there"
    except (OSError, RuntimeError) as error:  # or nobody knows the home directory
        why = str(error)
    if why:
        print(
            f"compiled programs are not kept in {place}: {why}",
            file=sys.stderr,
            flush=True,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(place))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # A start has dozens of small programs, one for each shape of a leaf. JAX keeps
        # none that compiles in less than a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
