"""COVER: vector contrastive pretraining of dense networks for 2D and 3D medical images."""

from cover.checkpoint import load_backbone, load_model
from cover.data import check
from cover.evaluation import evaluate
from cover.figures import visualize
from cover.memory import plan
from cover.trainer import pretrain
from cover_kernels import __version__

__all__ = ["__version__", "check", "evaluate", "load_backbone", "load_model", "plan", "pretrain", "visualize"]
