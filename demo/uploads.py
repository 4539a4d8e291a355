"""Gradio's folder of uploads: folders in it for files made for download, and empty ones taken away. Gradio deletes files only."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

EMPTY_FOR_S = 60.0  # until then, somebody may be about to write into it


def folder() -> Path:
    """Where Gradio looks for files to hand out, and deletes them after a while."""
    from gradio.utils import get_upload_folder  # imported already, by way of page.gr

    return Path(get_upload_folder())


def new_folder(name: str) -> str:
    """A new folder there."""
    root = folder()
    root.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(dir=root, prefix=f"{name}_")


def remove_empty(root: Path, *, empty_for_s: float = EMPTY_FOR_S) -> int:
    """Remove the folders in `root` that have been empty for so long. Returns how many that were."""
    removed = 0
    if not root.is_dir():
        return removed
    for path in root.iterdir():
        with suppress(OSError):  # it is not empty, or gone
            # A folder changes when a file leaves it. What somebody writes into in this moment is not empty, and stays.
            if path.is_dir() and not path.is_symlink() and time.time() - path.stat().st_mtime >= empty_for_s:
                path.rmdir()
                removed += 1
    return removed


def tidying(every_s: float) -> Callable[[Any], AbstractAsyncContextManager[None]]:
    """A server's lifespan in which empty folders are removed every so often."""

    async def tidy() -> None:
        while True:
            await asyncio.sleep(every_s)
            await asyncio.to_thread(remove_empty, folder())

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(tidy())
        try:
            yield
        finally:
            task.cancel()

    return lifespan
