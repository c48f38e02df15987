# SPDX-License-Identifier: Apache-2.0
"""No file of a run directory leads out of it, and a file is replaced whole or not at
all."""

import os
import pathlib
import resource
import stat

import pytest

from mim_jax.config import ConfigError
from mim_jax.run import files

FILES = (
    "config.json",
    "images.json",
    "lock",
    "metrics.jsonl",
    "parameters.txt",
    "summary.txt",
)
FOLDERS = ("checkpoints", "report", "tensorboard", "damaged-checkpoints", "profile")


@pytest.fixture
def run(tmp_path) -> pathlib.Path:
    """A run directory with one of everything, and a folder beside it."""
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in FOLDERS:
        (run / folder / "step-4").mkdir(parents=True)
        (run / folder / "step-4" / "file").write_text("ours")
    for name in FILES:
        (run / name).write_text("ours")
    outside.mkdir()
    (outside / "file").write_text("theirs")
    files.check(run)  # nothing is wrong yet
    return run


def replace(path: pathlib.Path, target: pathlib.Path) -> None:
    path.rename(path.with_name(f"{path.name}.before"))
    path.symlink_to(target)


@pytest.mark.parametrize(
    "name", [*FILES, "report/step-4/file", "checkpoints/step-4/file"]
)
@pytest.mark.parametrize("target", ["file", "nothing"])
def test_a_link_to_a_file_outside_is_refused(run, name, target):
    replace(run / name, run.parent / "outside" / target)
    with pytest.raises(ConfigError) as error:
        files.check(run)
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{run / name} is a link to {run.parent}/outside/{target}, ")


@pytest.mark.parametrize("name", [*FOLDERS, "report/step-4", "wandb"])
def test_a_link_to_a_folder_outside_is_refused(run, name):
    (run / "wandb").mkdir()
    replace(run / name, run.parent / "outside")
    with pytest.raises(ConfigError, match=f"{name} is a link to .*, out of the run"):
        files.check(run)


def test_no_chain_of_links_and_no_like_name_hides_where_it_leads(run):
    (run / "report.before").symlink_to(run.parent / "outside")
    (run / "report" / "inner").symlink_to("../report.before")  # a link to that link
    with pytest.raises(ConfigError, match="inner is a link to .*/outside, out of"):
        files.check(run)
    (run / "report" / "inner").unlink()
    (run.parent / "run-2").mkdir()  # its name begins with that of the run
    (run / "report" / "inner").symlink_to(run.parent / "run-2")
    with pytest.raises(ConfigError, match="inner is a link to .*/run-2, out of"):
        files.check(run)


def test_links_that_stay_and_what_is_not_of_the_run_are_left_alone(run, tmp_path):
    (run / "report" / "newest").symlink_to("step-4")
    (run / "data").symlink_to(tmp_path / "outside")  # the user's own
    (run / "wandb").mkdir()
    (run / "wandb" / "debug.log").symlink_to(tmp_path / "outside" / "file")
    link = tmp_path / "link"
    link.symlink_to(run)  # the user's command line names the link
    files.check(run)
    files.check(link)
    files.check(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/4"])
def test_a_pipe_is_refused_and_not_opened(run, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)  # to open it would wait for ever
    with pytest.raises(ConfigError, match=f"{name} is neither a file nor a folder"):
        files.check(run)


@pytest.mark.parametrize("name", [*FILES, "wandb.json", "results.json"])
def test_a_folder_where_a_file_belongs_is_refused(run, name):
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} is a folder, where a file belongs"):
        files.check(run)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_where_a_folder_belongs_is_refused(run, name):
    (run / name).rename(run / "before")
    (run / name).write_text("")
    with pytest.raises(ConfigError, match=f"{name} is a file, where a folder belongs"):
        files.check(run)


def test_a_link_is_replaced_and_what_it_leads_to_is_not_touched(run):
    theirs = run.parent / "outside" / "file"
    for made in (os.symlink, os.link):
        path = run / f"report/{made.__name__}"
        made(theirs, path)
        files.write(path, "new")
        assert path.read_text() == "new" and not path.is_symlink()
        assert theirs.read_text() == "theirs"
    # The name under which a file is written first may be anybody's link, too.
    partial = run / f"config.json.{os.getpid()}.tmp"
    partial.symlink_to(theirs)
    files.write(run / "config.json", b"new")
    assert (run / "config.json").read_bytes() == b"new" and not partial.exists()
    assert theirs.read_text() == "theirs"


def test_nothing_is_appended_through_a_link(run):
    theirs = run.parent / "outside" / "file"
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(theirs)
    with pytest.raises(OSError):
        files.append(run / "metrics.jsonl")
    assert theirs.read_text() == "theirs"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(run):
    before, there = resource.getrlimit(resource.RLIMIT_FSIZE), sorted(run.iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
    try:
        with pytest.raises(files.DiskError, match="config.json could not be written: "):
            files.write(run / "config.json", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (run / "config.json").read_text() == "ours"
    assert sorted(run.iterdir()) == there


def test_a_new_file_has_the_rights_that_the_user_chose(run):
    before = os.umask(0o027)
    try:
        files.write(run / "config.json", "new")
        files.append(run / "new").close()
    finally:
        os.umask(before)
    for name in ("config.json", "new"):
        assert stat.S_IMODE((run / name).stat().st_mode) == 0o640


def test_a_folder_is_not_made_in_one_that_is_gone(run):
    files.make(run / "report")
    files.make(run / "new")
    run.rename(run.with_name("away"))
    with pytest.raises(files.DiskError, match="new could not be made: "):
        files.make(run / "new")
    assert not run.exists()


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\udcff"])
def test_what_is_no_json_is_one_line(run, text):
    (run / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"config.json is not JSON: .+\Z"):
        files.read_json(run / "config.json")
