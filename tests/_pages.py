"""The fenced blocks of README.md and docs/, and a copy of the checkout in which they are run.

The word behind a fence's language says what a block is: nothing, `long` (takes minutes), `gpu`
(needs one), `file=PATH` (a file of a worked example). A `text` block is what the block before it
prints.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass

_FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__")  # environments, for one, are large

# Runs the blocks of each page in one namespace; what each printed or raised goes to a file. Their
# code lies in a .py file at the lines that it has in the page: Dynamo and the report read it there.
RUNNER = """
import contextlib, io, json, sys, traceback, warnings
warnings.filterwarnings("ignore")
blocks, target = json.load(open(sys.argv[1])), sys.argv[2]
import torch
torch.backends.mkldnn.enabled = False
pages, done, whole = {}, [], {}
for page, line, text in blocks:
    lines = whole.setdefault(page, [])
    lines += [""] * (line - len(lines)) + text.splitlines()
for page, lines in whole.items():
    open(page, "w").write("\\n".join(lines))
for page, line, text in blocks:
    out, error = io.StringIO(), ""
    torch._dynamo.reset()
    with contextlib.redirect_stdout(out):
        try:
            exec(compile("\\n" * line + text, page, "exec"), pages.setdefault(page, {}))
        except BaseException:
            error = traceback.format_exc()
    done.append((out.getvalue(), error))
json.dump(done, open(target, "w"))
"""


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is that of its fence, ``shown`` what it is said to print."""

    page: str
    line: int
    language: str
    word: str
    text: str
    shown: str = ""

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        return self.text.replace("\\\n", " ").strip().splitlines()


def pages(checkout: pathlib.Path) -> list[str]:
    return ["README.md", *(f"docs/{p.name}" for p in sorted((checkout / "docs").glob("*.md")))]


def blocks(checkout: pathlib.Path) -> list[Block]:
    """Every block of every page but the text blocks, which go to the block in front of them."""
    found: list[Block] = []
    for page in pages(checkout):
        content = (checkout / page).read_text(encoding="utf-8")
        for match in _FENCE.finditer(content):
            line = content.count("\n", 0, match.start()) + 1
            language, word, text = match[1], match[2].strip(), match[3]
            if language == "text":
                found[-1] = Block(**{**vars(found[-1]), "shown": text})
            elif language:
                found.append(Block(page, line, language, word, text))
    return found


def plain(text: str) -> str:
    """Output without what differs from run to run: times, line numbers, the width of columns."""
    text = re.sub(r"\d+\.\d+ s\b( \([a-z]+ \d[^)]*\))?", "# s", text)
    text = re.sub(r"(\.(?:py|md)):\d+", r"\1:#", text)
    return "\n".join(" ".join(line.split()) for line in text.strip().splitlines())


class Sandbox:
    """A copy of the checkout with an environment of its own that sees this one's libraries."""

    def __init__(self, checkout: pathlib.Path, root: pathlib.Path) -> None:
        self.root = root / "checkout"
        shutil.copytree(checkout, self.root, ignore=LEFT_OUT)
        home = root / "venv"
        venv.create(home, with_pip=False)
        self.bin = home / "bin"
        (self.bin / "pip").write_text('#!/bin/sh\nexec python -m pip "$@"\n')
        (self.bin / "pip").chmod(0o755)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        ours = dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib"))
        # A .pth line adds the folders without their own .pth files: no dsv4fuse from here.
        site = home / "lib" / version / "site-packages"
        (site / "libraries.pth").write_text("".join(f"{folder}\n" for folder in ours))
        self.seen: dict[str, str] = {}

    @property
    def env(self) -> dict[str, str]:
        """As a newcomer's, but that pip takes nothing from the network."""
        drop = ("PYTHON", "PYTEST", "TRITON", "DSV4FUSE", "TORCH_", "COV_", "PIP_REQ")
        env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        env |= {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
        env |= {"PATH": f"{self.bin}{os.pathsep}{env['PATH']}", "VIRTUAL_ENV": str(self.bin.parent)}
        return env | {"PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}

    def shell(self, command: str) -> str:
        """What a command prints; one that ran already is not run again."""
        if command not in self.seen:
            self.seen[command] = self._run(command)
        return self.seen[command]

    def _run(self, command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.root, env=self.env, text=True,
            capture_output=True, timeout=1500,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def python(self, given: list[Block]) -> dict[str, tuple[str, str]]:
        """What each block prints and raises; the blocks of a page share their names."""
        files = [self.root.parent / n for n in ("runner.py", "blocks.json", "done.json")]
        files[0].write_text(RUNNER)
        rows = [(str(self.root / f"{pathlib.Path(b.page).stem}.py"), b.line, b.text) for b in given]
        files[1].write_text(json.dumps(rows))
        self._run(f"PYTHONPATH={self.root} python {' '.join(map(str, files))}")
        done = json.loads(files[2].read_text())
        return {b.name: tuple(result) for b, result in zip(given, done, strict=True)}
