"""ArviZ, without the announcement of its next line that 0.23 makes on import."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
    import arviz

__all__ = ["arviz"]
