"Nested Poincaré balls with a learnable geometry, and hierarchies in one."
from .embedding import Embedding, embed
from .geometry import PoincareBall
from .levels import WuBuConfig, WuBuLevels

__all__ = ["Embedding", "PoincareBall", "WuBuConfig", "WuBuLevels", "embed"]
