"""Which versions of what were at work: part of every manifest."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from nest.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "scikit-learn", "numpy")


def package_versions(*more: str) -> dict[str, str]:
    """Versions of Python and of the packages that decide results, as far as installed.

    Args:
        more: Packages besides those that every manifest names.
    """
    versions = {"python": platform.python_version(), "nest": __version__}
    for package in (*PACKAGES, *more):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
