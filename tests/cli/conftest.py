import json

import pytest
from typer.testing import CliRunner

from peft_fused.cli import app


class Cli:
    """Runs the app in this process, with standard output and standard error apart."""

    def __call__(self, *arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.stderr
        return result

    def json(self, *arguments, code=0):
        """The single JSON value on standard output; anything else on it fails."""
        return json.loads(self(*arguments, "--json", code=code).stdout)


@pytest.fixture
def cli(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # whoever runs the tests has a terminal of some width
    return Cli()
