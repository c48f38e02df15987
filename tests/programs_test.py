# SPDX-License-Identifier: Apache-2.0
"""Compiled programs, which are native code, are never taken from a run directory."""

import subprocess
import sys

import jax
import pytest
from tiny import tree_of

from mim_jax import train
from mim_jax.run import programs


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's folder for caches; JAX's own settings come back after the test."""
    before = jax.config.jax_compilation_cache_dir
    xla = jax.config.jax_persistent_cache_enable_xla_caches
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    yield tmp_path / "caches" / "mim_jax" / "compiled"
    jax.config.update("jax_compilation_cache_dir", before)
    jax.config.update("jax_persistent_cache_enable_xla_caches", xla)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


class Left(Exception):
    pass


@pytest.mark.parametrize("keeps", [True, False])
def test_a_run_takes_no_program_from_its_directory(home, tmp_path, monkeypatch, keeps):
    def leave(*_):
        raise Left

    monkeypatch.setattr(train.beginning, "begin", leave)
    tree = tree_of("mae")
    tree.steps, tree.batch_size, tree.compile_cache = 2, 8, keeps
    (tmp_path / "run" / "compiled").mkdir(parents=True)  # of an older version
    with pytest.raises(Left):
        train.run(tree, tmp_path / "run")
    assert jax.config.jax_compilation_cache_dir == (str(home) if keeps else None)
    assert not list((tmp_path / "run" / "compiled").iterdir())


def test_the_folder_is_the_users_alone(home, capfd):
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == str(home)
    assert home.stat().st_mode & 0o077 == 0
    jax.config.update("jax_compilation_cache_dir", None)
    home.chmod(0o777)  # anybody could put a program there
    programs.keep()
    assert jax.config.jax_compilation_cache_dir is None
    told = f"compiled programs are not kept in {home}: others may write there\n"
    assert capfd.readouterr().err == told


def test_programs_that_compile_in_an_instant_are_kept_too(home):
    code = """
import jax
from mim_jax.run import programs
programs.keep()
jax.jit(lambda x: 2 * x)(1.0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(home.iterdir())


def test_the_users_own_bound_for_what_is_kept_stays(home, monkeypatch):
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(before))
    programs.keep()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before > 0


def test_a_folder_that_the_user_names_is_taken(home, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))  # as JAX reads it
    programs.keep()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path) and not home.exists()


def test_where_no_folder_can_be_made_none_is_used(home, tmp_path, monkeypatch, capfd):
    (tmp_path / "caches").write_text("a file")
    programs.keep()
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")
    programs.keep()
    assert jax.config.jax_compilation_cache_dir is None
    first, second = capfd.readouterr().err.splitlines()
    assert "compiled programs are not kept in " in first and "Not a dir" in first
    assert "home directory" in second
