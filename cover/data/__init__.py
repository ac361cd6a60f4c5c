"""Images for pretraining: found, checked, decoded once, normalised, cropped."""

from cover.data.dataset import BatchSampler, PretrainDataset, batches_of
from cover.data.images import ImageSet, check, open_images
from cover.data.manifest import splits
from cover.data.report import DataError, ImageError, Report

__all__ = [
    "BatchSampler",
    "DataError",
    "ImageError",
    "ImageSet",
    "PretrainDataset",
    "Report",
    "batches_of",
    "check",
    "open_images",
    "splits",
]
