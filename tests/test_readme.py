"""The README keeps its promises: its examples run and its table names what there is."""

import re
from pathlib import Path

import pytest

import jaxdiff

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, defaults):
    exec(compile(EXAMPLES[number], f"README example {number + 1}", "exec"), {})


def test_there_are_eleven_examples():
    assert len(EXAMPLES) == 11


def test_the_table_names_what_is_exported():
    table = README.split("## What is there")[1].split("## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, flags=re.M)) == sorted(jaxdiff.__all__)


def test_there_are_two_commands():
    assert re.findall(r"```bash\n(.*?)\n```", README) == [
        'pip install -e ".[demo]" && jaxdiff demo',
        'pip install -e ".[test]" && pytest',
    ]
