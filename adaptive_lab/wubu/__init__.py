"Nested Poincaré balls with a learnable geometry."
from .geometry import PoincareBall
from .levels import WuBuConfig, WuBuLevels

__all__ = ["PoincareBall", "WuBuConfig", "WuBuLevels"]
