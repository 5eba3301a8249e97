"""What models answered, kept by content: nothing is generated twice in a run directory."""

from __future__ import annotations

import json
import os
import pathlib

from .tables import digest


class Responses:
    """Responses of one model by prompt: lines `["hash of the prompt", "response"]` in a folder.

    Each process appends to a file of its own and reads all of them. A response is on disk once it is set; a line that a
    kill has cut off is never read.

    Args:
        folder: named by all that a response depends on besides its prompt.
        writer: number of this process; no two that run at the same time may share it.
    """

    def __init__(self, folder: str | os.PathLike[str], writer: int = 0):
        self._folder = pathlib.Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._own = self._folder / f"{writer}.jsonl"
        self._own.touch()
        self._responses: dict[str, str] = {}
        self._read: dict[pathlib.Path, int] = {}  # bytes of whole lines
        self.refresh()
        os.truncate(self._own, self._read[self._own])  # or the next line would go on where a kill stopped

    def refresh(self) -> None:
        """Reads what other processes have added."""
        for path in self._folder.glob("*.jsonl"):
            position = self._read.get(path, 0)
            with path.open("rb") as file:
                file.seek(position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # cut off, or not finished yet
                    position += len(line)
                    try:
                        prompt, response = json.loads(line)
                    except (ValueError, TypeError):  # damaged: it counts as never asked
                        continue
                    self._responses[prompt] = response
            self._read[path] = position

    def __contains__(self, prompt: str) -> bool:
        return digest(prompt) in self._responses

    def __getitem__(self, prompt: str) -> str:
        return self._responses[digest(prompt)]

    def __setitem__(self, prompt: str, response: str) -> None:
        key = digest(prompt)
        line = json.dumps([key, response], ensure_ascii=False).encode() + b"\n"
        with self._own.open("ab") as file:  # closed each time: other nodes see what is closed
            file.write(line)
        self._responses[key] = response
