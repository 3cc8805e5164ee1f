"A map of checkpoints whose every point decodes to a model that works."
from .atlas import Atlas, Charting, chart
from .token_vae import TokenVAE
from .vae import CheckpointDecoder, CheckpointEncoder, EpsilonVAE, MetricPredictor, WeightBlockEmbedder

__all__ = ["Atlas", "Charting", "CheckpointDecoder", "CheckpointEncoder", "EpsilonVAE", "MetricPredictor", "TokenVAE", "WeightBlockEmbedder", "chart"]
