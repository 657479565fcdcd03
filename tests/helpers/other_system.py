"""A conversion in parts, after one that stopped, on a simulated other system: FEATURES SOURCE OUT.

`posix` is Linux as it is. `bare` has no fcntl, no resource, no functions of `os` that only some systems have, and no C
library to call. `windows` in addition cannot move or remove a file that is open, and cannot open a folder.
"""

import builtins
import contextlib
import ctypes
import os
import sys
from pathlib import Path

MODULES = {"fcntl", "grp", "pwd", "resource", "syslog", "termios"}
FUNCTIONS = [  # but for those that the standard library uses on Linux without asking
    *("copy_file_range", "fchmod", "fchown", "getpgid", "killpg", "memfd_create", "posix_fadvise", "posix_fallocate"),
    *("pread", "preadv", "pwrite", "pwritev", "sched_getaffinity", "sched_setaffinity"),
]
OURS = ("quantize8", "filelock", "platformdirs")


def make_bare() -> None:
    """Remove what only POSIX has; asyncio and others that look at sys.platform keep their modules."""
    real_import, library = builtins.__import__, ctypes.CDLL

    def without(name, globals=None, locals=None, fromlist=(), level=0):
        importer = (globals or {}).get("__name__", "")
        if level == 0 and name in MODULES and importer.split(".")[0] in OURS:
            raise ImportError(f"No module named {name!r}")
        return real_import(name, globals, locals, fromlist, level)

    class Library(library):
        def __init__(self, name, *arguments, **options):
            if name is None:
                raise TypeError("argument of type 'NoneType' is not iterable")
            super().__init__(name, *arguments, **options)

    builtins.__import__, ctypes.CDLL = without, Library
    for name in FUNCTIONS:
        delattr(os, name)


def make_windows(folder: Path) -> None:
    """Refuse operations on the files in a folder that Windows refuses."""
    from quantize8 import files

    files.WINDOWS = True

    def full(path, at=None) -> Path:
        beside = Path.cwd() if at is None else Path(f"/proc/self/fd/{at}").readlink()
        return beside / os.fsdecode(path)

    def refuse_open(path: Path) -> None:
        if any(target.is_file() and target.is_relative_to(path) for target in open_files()):
            raise PermissionError(13, "The process cannot access the file because it is being used", str(path))

    def guarded(function, keys):
        def call(*paths, **options):
            for path, key in zip(paths, keys, strict=False):
                place = full(path, options.get(key, options.get("dir_fd")))
                if place.is_relative_to(folder):
                    refuse_open(place)
                    if function is renaming and path is paths[1] and place.exists():
                        raise FileExistsError(17, "Cannot create a file when that file already exists", str(place))
            return function(*paths, **options)

        return call

    renaming, opening = os.rename, os.open
    os.rename, os.replace = guarded(os.rename, ("src_dir_fd", "dst_dir_fd")), guarded(os.replace, ("src_dir_fd",) * 2)
    os.unlink, os.rmdir = guarded(os.unlink, ("dir_fd",)), guarded(os.rmdir, ("dir_fd",))
    os.remove = os.unlink

    def open_no_folder(path, flags, *arguments, **options):
        folderless = sys._getframe(1).f_globals.get("__name__", "").startswith("quantize8")
        if folderless and Path(path).is_dir():
            raise PermissionError(13, "Permission denied", path)
        return opening(path, flags, *arguments, **options)

    os.open = open_no_folder


def main(system: str, source: str, out: str) -> None:
    if system != "posix":
        make_bare()
    if system == "windows":
        make_windows(Path(out).parent)
    import quantize8
    from quantize8.commands.finalize import finalize
    from quantize8.conversion.driver import Writer
    from quantize8.destinations import journal
    from quantize8.destinations.local import partial_of

    size, original = {"max_shard_size": "6KB", "workers": 2}, Writer.write
    left = iter(range(5))

    def stopping(self, name, quantizer):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        return original(self, name, quantizer)

    Writer.write = stopping
    try:
        quantize8.convert(source, out, **size)
    except quantize8.OutputError as error:
        assert "resumes from here" in str(error), error
    else:
        raise AssertionError("did not stop")
    Writer.write = original
    assert not [path for path in open_files() if ".partial" in str(path)]
    for number in (1, 2):
        quantize8.convert(source, out, part=f"{number}/2", **size)
    assert not any(journal.is_locked(path) for path in partial_of(Path(out)).glob("*.journal"))
    finalize(out)
    assert not partial_of(Path(out)).exists(), [*partial_of(Path(out)).rglob("*")]
    quantize8.convert(source, out, overwrite=True, **size)  # in place of itself
    assert not partial_of(Path(out)).exists()
    assert quantize8.verify(out).tensors
    quantize8.plan(source)
    print(quantize8.run(out, "w1 w2 w3", max_new_tokens=4).text)


def open_files() -> list[Path]:
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(descriptor.readlink())
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
