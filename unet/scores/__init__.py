"""Scores: of membranes in slices as ISBI 2012 took them, and of cells in volumes as CREMI took them."""

from unet.scores.agglomeration import agglomerate, check_limit
from unet.scores.slices import (
    THRESHOLDS,
    StackScores,
    dice,
    pixel_error,
    score_agglomerated,
    score_stack,
    thinned_segments,
    v_rand_v_info,
)
from unet.scores.volumes import Overlaps, VolumeScores, score_volumes

__all__ = [
    "THRESHOLDS",
    "Overlaps",
    "StackScores",
    "VolumeScores",
    "agglomerate",
    "check_limit",
    "dice",
    "pixel_error",
    "score_agglomerated",
    "score_stack",
    "score_volumes",
    "thinned_segments",
    "v_rand_v_info",
]
