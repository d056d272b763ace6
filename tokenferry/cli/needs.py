"""What a command needs, found out before the work: a folder that can be written, a GPU.

``args.fail`` is the ``error`` of the command's parser, which ends the program with code 2.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch


def need_folder(args: argparse.Namespace, name: str, folder: Path) -> None:
    """Make a folder if it is not there; end the program, naming the argument, if no files can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        args.fail(f"argument {name}: {folder}: {error.strerror}")


def need_gpu(args: argparse.Namespace) -> None:
    """End the program if ``--device`` is cuda and there is no GPU."""
    if args.device == "cuda" and torch.cuda.device_count() == 0:
        args.fail("argument --device: got cuda; allowed: cpu, since there is no GPU")
