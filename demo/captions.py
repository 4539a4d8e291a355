"""Downloads of the page: the files of `whisper_moe.captions`."""

from whisper_moe.captions import FORMATS, write_files

__all__ = ["FORMATS", "write_files"]
