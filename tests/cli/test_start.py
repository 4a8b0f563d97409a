"""How the command starts: without torch and PEFT, which are slow to import, until a command needs them."""

import subprocess
import sys

import pytest

from peft_fused.registry import METHODS

# As the script that pip installs, which imports the app before it looks at the arguments.
SCRIPT = """
import sys
sys.argv = ["/somewhere/bin/peft-fused", {arguments}]
from peft_fused.cli import app
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
{after}
"""


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", ["'--help'", "'bench', '--help'", "'env'", "'env', '--json'"])
def test_without_what_is_not_needed(arguments):
    unneeded = {"peft", "transformers"} | ({"torch"} if "--help" in arguments else set())
    after = f"assert 'peft_fused' in sys.modules and not {unneeded} & set(sys.modules)"
    assert python(SCRIPT.format(arguments=arguments, after=after))


def test_every_name_is_there_when_it_is_asked_for():
    after = """
import peft_fused
assert "peft" not in sys.modules
assert all(getattr(peft_fused, name) is not None for name in peft_fused.__all__)
from peft_fused.ops.dispatch import explainers
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
assert [explainer.__name__ for explainer in explainers] == ["explain_left", "explain_frozen"], explainers
assert "ROSA" in PEFT_TYPE_TO_TUNER_MAPPING
print("all")
"""
    assert python(SCRIPT.format(arguments="'--help'", after=after)).endswith("all\n")


@pytest.mark.parametrize("imports", ["import peft, peft_fused", "import peft_fused, peft"])
def test_any_other_program_has_the_methods_registered_by_the_import(imports):
    code = f"{imports}; print(all(name in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING for name in {NAMES}))"
    assert python(code) == "True\n"


NAMES = tuple(name.upper() for name in METHODS)
