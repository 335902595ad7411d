"""Names of the notebook API; their home is `ldm.conditioning`."""

from ldm.conditioning.presets import PRESET_STAGES, joint, preset
from ldm.request import PLACEHOLDER, Words

__all__ = ["PLACEHOLDER", "PRESET_STAGES", "Words", "joint", "preset"]
