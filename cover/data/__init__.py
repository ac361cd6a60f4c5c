"""Images for pretraining: found, checked, decoded once, normalised, cropped."""

from cover.data.dataset import BatchSampler, PretrainDataset
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
    "check",
    "open_images",
    "splits",
]
