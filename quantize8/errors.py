"""Errors a user can cause or meet. Each message says what is wrong, where, and what to do, in one line.

Quantize8Error
├── SourceError      the checkpoint cannot be found, opened or trusted
├── WeightError      a tensor holds values that int8 cannot stand for
├── RecipeError      a recipe is unknown, or a key or value in it is wrong
├── OutputError      the output folder cannot be made, or must not be replaced
├── ArtifactError    an artifact is damaged, or breaks a promise of its format
└── DependencyError  a package or device that this command needs is missing

DeviceWarning        a GPU is there but cannot be used, so the CPU is; printed, and nothing stops
"""


class Quantize8Error(Exception):
    """Base of all errors below; the command line prints it as one line and exits with code 1."""


class SourceError(Quantize8Error):
    """A checkpoint cannot be found, opened or trusted."""


class WeightError(Quantize8Error):
    """A tensor holds NaN, infinity, or magnitudes that the target format cannot hold."""


class RecipeError(Quantize8Error):
    """A recipe is unknown, or one of its keys or values is wrong."""


class OutputError(Quantize8Error):
    """The output folder cannot be made, is too small a disk, or must not be replaced."""


class ArtifactError(Quantize8Error):
    """An artifact is damaged, or breaks a promise of its format."""


class DependencyError(Quantize8Error):
    """A package or device that this command needs is missing."""


class DeviceWarning(UserWarning):
    """A GPU is there but cannot be used, so the CPU is."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
