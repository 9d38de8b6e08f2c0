"""Semantic segmentation from a pretrained backbone, as mmsegmentation and ImageNetSegModel configure it (methods/transfer.md, 5)."""
