"""What a reader is: how the files of one tool are recognised and opened."""

from __future__ import annotations

from pathlib import Path

from graft.convert.config import ConvertConfig
from graft.convert.folder import ForeignFolder
from graft.convert.source import Source


class Reader:
    """Recognises and opens the files of one tool; as it stands here, none.

    An entry reads single files, folders, or both. No file or folder is recognised by two.
    """

    quant_method: str | None = None
    """What config.json calls the quantisation of its folders; None where that names no tool."""

    def reads_file(self, file: Path) -> bool:
        """Return whether a path, which may lead to nothing, is a file of this tool."""
        return False

    def open_file(self, file: Path, asked: ConvertConfig) -> tuple[Source, Path]:
        """Return what is in such a file, and the place of its tokenizer."""
        raise NotImplementedError

    def reads_folder(self, folder: ForeignFolder) -> bool:
        """Return whether a folder is one of this tool."""
        if self.quant_method is None or folder.is_pickled:
            return False
        return folder.settings.get("quant_method") == self.quant_method

    def open_folder(self, folder: ForeignFolder) -> Source:
        """Return what is in such a folder; raises GraftError for what graft cannot hold."""
        raise NotImplementedError
