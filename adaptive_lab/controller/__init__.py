"A transformer whose heads have gates, and a controller that learns which of them are needed."
from .enhanced import EnhancedController
from .feedback import calculate_reward
from .model import AdaptiveTransformer, Gates

__all__ = ["AdaptiveTransformer", "EnhancedController", "Gates", "PruneEnv", "calculate_reward"]


def __getattr__(name):
    if name == "PruneEnv":  # gymnasium is imported by those only who want an environment
        from .environment import PruneEnv

        return PruneEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
