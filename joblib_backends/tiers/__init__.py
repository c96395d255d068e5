"""Places where batches run, behind one contract (``base``): inline, threads, processes, dask, fake."""

from .base import Tier, Work, load_tier, loaded_tier, register_tier, tier_names

__all__ = ["Tier", "Work", "load_tier", "loaded_tier", "register_tier", "tier_names"]
