"""Libraries that must be installed for an adapter."""

from __future__ import annotations

import importlib.metadata
import importlib.util


def require(library: str, minimum: str, distribution: str | None = None) -> None:
    """Check that a library is installed, and not too old.

    Args:
        library: The name to import. Our extra that installs it has the same name.
        minimum: The oldest version that we support.
        distribution: The name of its distribution, if it is another one.

    Raises:
        ImportError: If not.
    """
    install = f"Install it with `pip install jaxwrap[{library}]`."
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"needs {library!r}, which is not installed. {install}")
    distribution = distribution or library
    found = importlib.metadata.version(distribution)
    if _numbers(found) < _numbers(minimum):
        raise ImportError(
            f"needs {distribution} {minimum} or newer; {found} is installed. {install}"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())
