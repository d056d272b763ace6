from __future__ import annotations

import subprocess
import sys

import pytest

from tokenferry.cli import COMMANDS, main
from tokenferry.version import __version__


def test_module_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tokenferry", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.strip() == f"tokenferry {__version__}"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown and text in shown for name, text in COMMANDS.items())


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"tokenferry {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["ferry"], ["--ranks", "2"]])
def test_wrong_command_is_an_argument_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: tokenferry" in capsys.readouterr().err


def test_commands_are_imported_only_when_they_run() -> None:
    code = (
        "import sys, tokenferry.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith('tokenferry.cli.')], 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] False"
