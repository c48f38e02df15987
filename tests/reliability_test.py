# SPDX-License-Identifier: Apache-2.0
"""docs/reliability.md and README's table of exit codes say what the program does."""

import ast
import pathlib
import re

import yaml

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
README = (ROOT / "README.md").read_text()


def rows(text: str, head: str) -> list[list[str]]:
    """The rows of every table with this head."""
    found = []
    for part in text.split(f"{head}\n")[1:]:
        for line in part.splitlines()[1:]:
            if not line.startswith("|"):
                break
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


CODES = [int(code) for code, _ in rows(README, "| exit code | meaning |")]
FAULTS = rows(PAGE, "| fault | what happens | exit code | test |")


def constants() -> set[int]:
    """The numbers that the package calls EXIT_..., but for those of `aot`."""
    found = set()
    for path in (ROOT / "mim_jax").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if "aot" in path.parts or not isinstance(node, ast.Assign):
                continue
            (target,) = node.targets
            targets = target.elts if isinstance(target, ast.Tuple) else [target]
            value = node.value
            values = value.elts if isinstance(value, ast.Tuple) else [value]
            for one, number in zip(targets, values, strict=False):
                if isinstance(one, ast.Name) and one.id.startswith("EXIT_"):
                    found.add(ast.literal_eval(number))
    return found


def test_readme_has_every_exit_code_and_no_other():
    assert sorted(constants() | {0}) == CODES


def test_what_the_launch_scripts_stop_at_are_the_codes_that_restarting_cannot_mend():
    text = (ROOT / "launch" / "jobset.yaml").read_text()
    (job,) = yaml.safe_load(re.sub("@.*?@", "1", text))["spec"]["replicatedJobs"]
    (rule,) = job["template"]["spec"]["podFailurePolicy"]["rules"]
    stops = rule["onExitCodes"]["values"]
    assert stops == [code for code in CODES if code not in (0, 6, 75)]
    watch = (ROOT / "launch" / "watch.sh").read_text()
    told = re.findall(r"^    (\d+)\) .*over \1 ", watch, re.MULTILINE)
    assert sorted(map(int, told)) == [0, *stops]
    for code in map(str, stops):
        assert re.search(rf"told && over {code} \"exit code {code}: ", watch)


def test_every_row_has_a_code_of_readme_and_a_test_that_is_there():
    assert len(FAULTS) > 45
    for fault, _, code, test in FAULTS:
        said = "-", "128 + its number", "134 (SIGABRT)", "that of the run"
        assert code in said or int(code) in CODES, fault
        if test == "the same":
            continue
        named = re.fullmatch(r"`(tests/[\w/]+_test\.py)::(test_\w+)`", test)
        assert named, fault
        body = ast.parse((ROOT / named[1]).read_text()).body
        assert named[2] in {getattr(one, "name", "") for one in body}, test


def test_every_code_has_a_fault():
    seen = {int(code) for _, _, code, _ in FAULTS if code.isdigit()}
    assert seen == {code for code in CODES if code}
