"""DSML: deep metric learning by the signal-to-noise ratio."""

from fgvczoo.models.dsml.distance import snr_distance, snr_distance_pairs
from fgvczoo.models.dsml.module import DSML

__all__ = ["DSML", "snr_distance", "snr_distance_pairs"]
