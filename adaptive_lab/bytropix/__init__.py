"A byte-level language model: patches, nested levels, count experts."
from .config import ByteModelConfig
from .generation import generate_text, load_model
from .model import ByteModel
from .patching import babylon_patches
from .stepper import Stepper

__all__ = ["ByteModel", "ByteModelConfig", "Stepper", "babylon_patches", "generate_text", "load_model"]
