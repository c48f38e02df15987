# SPDX-License-Identifier: Apache-2.0
"""Eight CPU devices, strict types and ranks: set before anything imports JAX."""

import gc
import importlib.metadata
import os
import socket
import sys

# Test programs run for milliseconds: compiling them well takes longer than it saves.
_FLAGS = (
    "--xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0"
    " --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
)
# Later versions have no other emitters, and end at a flag that they do not know.
if importlib.metadata.version("jaxlib") < "0.11":
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "agg"
# Two workers share two cores: no thread of NumPy or scikit-learn waits for one.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import hypothesis  # noqa: E402  (only now)
import jax  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_bias_correction = optax.tree.bias_correction


def _promoting(moment, decay, count):
    # Adam takes a float to the power of an int32: optax is not written to be strict.
    with jax.numpy_dtype_promotion("standard"):
        return _bias_correction(moment, decay, count)


optax.tree.bias_correction = _promoting

_connect = socket.socket.connect


def _locally(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
        raise OSError(f"a test wants the network: {address}")
    return _connect(self, address)


socket.socket.connect = _locally


@pytest.fixture(autouse=True, scope="module")
def _few_programs():
    """Thousands of compiled programs in one process meet Linux's limit of memory maps
    (vm.max_map_count), and the next compilation crashes."""
    yield
    if "tiny" in sys.modules:
        sys.modules["tiny"].step_of.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def _no_compile_cache():
    """A run keeps compiled programs, for all that its process compiles from then on:
    here that would be every later test, and XLA has crashed writing one of them."""
    yield
    assert not jax.config.jax_compilation_cache_dir, "set compile_cache = False"


# What takes longest, the longest first. Two workers take files in this order and end
# together: a long file that begins last would leave one of them idle.
LONGEST = (
    *("main_job_test", "notebooks_test", "soak_test", "shipped_test"),
    *("contract_test", "end_to_end_test", "configs_test", "compare_test"),
    *("train_mesh_test", "train_test", "buckets_test", "launch_watch_test"),
    *("plugins_test", "during_test", "evaluate_test", "hosts_test", "shifts_job_test"),
)


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


# The same settings in every run: a red test is red again, and nothing is written.
hypothesis.settings.register_profile(
    "house", deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("house")
