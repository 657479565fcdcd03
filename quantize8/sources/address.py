"""Addresses with a scheme: finding fsspec's driver for one, and showing it without the secrets it may contain."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from quantize8.errors import DependencyError, Quantize8Error, first_line

HUB_SCHEME = "hf://"
_DRIVERS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


def scheme_of(address: str) -> str:
    """The scheme of an address, such as "s3", which selects the driver."""
    return address.partition("://")[0]


def without_secrets(address: str) -> str:
    """An address without the user, password and query that it may contain."""
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    if address.startswith(HUB_SCHEME):  # on the hub, @ separates the revision
        return address.rstrip("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def reason(error: BaseException, address: str) -> str:
    """The first line of a driver's error, without the secrets of the address."""
    text = first_line(error).replace(address, without_secrets(address))
    rest = address.partition("://")[2]
    user, _, password = rest.partition("/")[0].rpartition("@")[0].partition(":")
    secrets = {f"{user}:{password}" if password else "", password, unquote(password), rest.partition("?")[2]}
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def file_system(address: str, error: type[Quantize8Error], **options: Any) -> tuple[Any, str]:
    """Return fsspec's driver for an address, and the path within it.

    Args:
        address: The address, with its scheme.
        error: The class of error to raise when the driver refuses the address.
        options: Passed on to the driver.

    Returns:
        The file system, and the path that it takes.

    Raises:
        DependencyError: The driver is not installed.
        Quantize8Error: The driver refuses the address; the class is `error`.
    """
    import fsspec

    scheme, shown = scheme_of(address), without_secrets(address)
    try:
        system, root = fsspec.core.url_to_fs(address, **options)
    except ImportError:
        extra = "'quantize8[remote]'" if _DRIVERS.get(scheme) == "s3fs" else _DRIVERS.get(scheme, "its driver")
        raise DependencyError(f"{shown}: {scheme}:// needs a driver of fsspec; pip install {extra}") from None
    except Exception as refused:  # an unknown scheme is a ValueError; each driver has its own errors
        raise error(f"{shown}: cannot be opened ({reason(refused, address)})") from None
    return system, str(root)
