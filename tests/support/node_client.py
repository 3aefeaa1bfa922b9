"""OpenAI's Node client and Vercel's AI SDK, for tests: installed once under build/ and used by tests/gateway."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "tests/gateway/clients/node"
INSTALLED = ROOT / "build/node-client"


def install_node_client() -> Path:
    """A folder with the scripts and their dependencies.

    Where there is no Node the test is skipped with the reason.
    """
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node or npm is not installed")
    INSTALLED.mkdir(parents=True, exist_ok=True)
    # The tests run in several processes at once.
    with FileLock(INSTALLED.with_name("node-client.lock")):
        for file in SOURCE.iterdir():
            shutil.copyfile(file, INSTALLED / file.name)
        wanted, done = INSTALLED / "package.json", INSTALLED / "node_modules/.installed.json"
        if not done.is_file() or done.read_bytes() != wanted.read_bytes():
            command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock"]
            installed = subprocess.run(command, cwd=INSTALLED, capture_output=True, text=True, timeout=240, check=False)
            if installed.returncode != 0:
                pytest.skip(f"npm cannot install the clients: {installed.stderr[-200:]}")
            shutil.copyfile(wanted, done)
    return INSTALLED


async def run_node_client(
    folder: Path, base_url: str, api_key: str, model: str = "", mask: bytes = b"", script: str = "client.mjs"
) -> dict[str, Any]:
    """What the script saw of the gateway at `base_url`, which ends in /v1. `mask` is a PNG file."""
    environment = {
        "HYPERGEN_BASE_URL": base_url,
        "HYPERGEN_API_KEY": api_key,
        "HYPERGEN_MODEL": model,
        "HYPERGEN_MASK": base64.b64encode(mask).decode(),
    }
    process = await asyncio.create_subprocess_exec(
        "node",
        script,
        cwd=folder,
        env=os.environ | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, problems = await asyncio.wait_for(process.communicate(), 240)
    assert process.returncode == 0, problems.decode()
    return dict(json.loads(output))
