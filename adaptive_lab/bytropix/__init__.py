"A byte-level language model: patches, nested levels, count experts."
from .config import ByteModelConfig
from .model import ByteModel
from .patching import babylon_patches

__all__ = ["ByteModel", "ByteModelConfig", "babylon_patches"]
