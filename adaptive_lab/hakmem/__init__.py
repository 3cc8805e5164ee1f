"An optimizer that finds its rate by Q-learning, and a monitor of gradients."
from .monitor import GradientMonitor
from .optimizer import HAKMEM, HAKMEMEnhancedSGD

__all__ = ["HAKMEM", "GradientMonitor", "HAKMEMEnhancedSGD"]
